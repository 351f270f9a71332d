"""A hash of every number in a model's current weights, which identifies them.

The hash reads every number once, at about half a second for every GB on one core. A block of 256 KiB, as 64-bit words
x_i, becomes one word, modulo 2⁶⁴,

    s = Σ_i m(w_i x_i),   m(y) = y ⊕ (y ≫ 32),   with w_i fixed, odd and random,

and SHA-256 is computed over these. Sums of integers are the same on every device and in any order. Without w_i two
numbers could be swapped unnoticed, and without m half of all patterns of flipped signs would cancel. The hash detects
accidental differences, not a collision that somebody searches for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.bare_model import acting_adapters, bare_module_names, base_of, is_wrapper
from hf_npeff.fisher.fsdp import is_sharded
from hf_npeff.fisher.linear_layers import packed_size
from hf_npeff.pefs.weights_identity import WeightsIdentity

logger = logging.getLogger(__name__)
_WORDS = 2**15
"""Of 8 bytes in a block: two blocks stay in a core's cache, and PyTorch does not start threads for one."""
_BLOCKS_AT_ONCE = 256
"""Blocks that an accelerator processes together: 64 MiB."""
_LETTERS = 32
"""Hexadecimal digits of the hashes that are kept: 128 bits."""


class _UnknownError(Exception):
    """Some weights cannot be read; the message says which."""


def identity_of(model: nn.Module) -> WeightsIdentity:
    """The identity of a model's current weights; warns if they cannot be read.

    If FSDP2 shards them, all processes must call this together, because one weight after another is gathered.
    """
    quantization = _quantization_of(model)
    try:
        with torch.no_grad():
            return WeightsIdentity(_hash_of_weights(model), _hashes_of_adapters(model), quantization)
    except _UnknownError as error:
        logger.warning("the model's weights cannot be identified: %s", error)
        return WeightsIdentity(None, {}, quantization, str(error))


def _quantization_of(model: nn.Module) -> str | None:
    config: Any = getattr(getattr(base_of(model), "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _hash_of_weights(model: nn.Module) -> str:
    bare = bare_module_names(model)
    known: dict[int, str] = {}  # a tied weight is read once
    lines = []
    for path, module in model.named_modules():
        if path not in bare or is_wrapper(module):
            continue
        for leaf, tensor in _own_tensors(module):
            if id(tensor) not in known:
                known[id(tensor)] = _line_of(_read(model, path, leaf, tensor), module)
            lines.append(f"{bare[path]}.{leaf}\t{known[id(tensor)]}")
    return _hash_of_lines(lines)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and the buffers that are saved with it."""
    yield from ((name, value) for name, value in module._parameters.items() if value is not None)
    for name, value in module._buffers.items():
        if value is not None and name not in module._non_persistent_buffers_set:
            yield name, value
    if packed_size(module):  # HQQ's scales and zeros are in a dictionary, and its bias is a plain attribute
        yield from _tensors_in({name: held for name, held in vars(module).items() if not name.startswith("_")})


def _tensors_in(held: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a dictionary, and in those inside it."""
    for key, value in held.items():
        if isinstance(value, Tensor):
            yield f"{place}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors_in(value, f"{place}{key}.")


def _hashes_of_adapters(model: nn.Module) -> dict[str, str]:
    lines: dict[str, list[str]] = {}
    for path, wrapper in model.named_modules():
        if not is_wrapper(wrapper):
            continue
        around: Any = wrapper
        for adapter in acting_adapters(wrapper):
            mine = []
            for part in around.adapter_layer_names:
                holder = getattr(around, part, None)  # only of the wrapper itself; deeper ones are handled separately
                # Copies under modules_to_save run in place of a module of the model, and are hashed as that module.
                if part != "modules_to_save" and hasattr(holder, "keys") and adapter in holder:  # type: ignore[operator]
                    mine += _lines_of_part(model, path, part, adapter, holder[adapter])  # type: ignore[index]
            for setting in ("scaling", "token_indices"):
                values = getattr(around, setting, None)
                if mine and isinstance(values, dict) and adapter in values:
                    mine.append(f"{setting}\t{values[adapter]!r}")
            if mine:
                lines.setdefault(adapter, []).append("\n".join([bare_place(path), *mine]))
    prompts = getattr(model, "prompt_encoder", None)
    # PEFT switches virtual tokens off by giving the model another forward meanwhile.
    if isinstance(prompts, nn.ModuleDict) and "forward" not in vars(model):
        for adapter in [name for name in getattr(model, "active_adapters", ()) if name in prompts]:
            lines[adapter] = _lines_of_part(model, "", "prompt_encoder", adapter, prompts[adapter])
    return {adapter: _hash_of_lines(kept) for adapter, kept in lines.items()}


def bare_place(path: str) -> str:
    """The place of a wrapper in the bare model, whether PEFT's model is around it or transformers added the adapter."""
    return path.removeprefix("base_model.model.")


def _lines_of_part(model: nn.Module, path: str, part: str, adapter: str, held: Any) -> list[str]:
    """The lines for one module, or one tensor, of an adapter."""
    if isinstance(held, Tensor):
        return [f"{part}\t{_line_of(_read(model, f'{path}.{part}', adapter, held), None)}"]
    lines = []
    for inner, module in held.named_modules() if isinstance(held, nn.Module) else ():
        place = ".".join(filter(None, (path, part, adapter, inner)))
        for leaf, tensor in _own_tensors(module):
            lines.append(f"{part}.{inner}.{leaf}\t{_line_of(_read(model, place, leaf, tensor), module)}")
    return lines


def _hash_of_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogatepass")).hexdigest()[:_LETTERS]


def _read(model: nn.Module, path: str, leaf: str, tensor: Tensor) -> Tensor:
    """A tensor that has its numbers, wherever it is; with its attributes, in which bitsandbytes keeps scales.

    Raises:
        _UnknownError: if they cannot be read.
    """
    if is_sharded(tensor):
        whole: Tensor = tensor.data.full_tensor()  # type: ignore[attr-defined]
        return whole
    if tensor.device.type != "meta":
        return tensor  # detached, it would lose its scales
    # Accelerate offloads to a map in hooks: the module's own hook, or that of a module around it.
    at, inside = path, leaf
    while True:
        for held in _offload_maps(model.get_submodule(at)):
            if inside in held:
                read: Tensor = held[inside]
                return read
        if not at:
            raise _UnknownError(f"{path}.{leaf} is on the device 'meta', and no hook of Accelerate offloads it")
        at, _, name = at.rpartition(".")
        inside = f"{name}.{inside}"


def _offload_maps(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    for inner in getattr(hook, "hooks", (hook,)):
        if getattr(inner, "weights_map", None) is not None:
            yield inner.weights_map


def _line_of(tensor: Tensor, module: nn.Module | None) -> str:
    """A tensor's type, shape and content in a line; for a quantised tensor, those of all its parts."""
    parts = list(_parts_of(tensor, module))
    return "\t".join(f"{name}{part.dtype} {tuple(part.shape)} {digest(part)}" for name, part in parts)


def _parts_of(tensor: Tensor, module: nn.Module | None, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if hasattr(tensor, "__tensor_flatten__"):  # subclasses that hold several tensors, as torchao's do
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _parts_of(getattr(tensor, inner), None, f"{name}{inner} ")
        return
    yield name, tensor
    state = getattr(tensor, "quant_state", None)  # of bitsandbytes in 4 bits; scales may be quantised again
    while state is not None:
        for kept in ("absmax", "code", "offset"):
            if isinstance(value := getattr(state, kept, None), Tensor):
                yield f"{name}{kept} ", value
        state, name = getattr(state, "state2", None), f"{name}state2."
    scales = getattr(tensor, "SCB", None)  # of bitsandbytes in 8 bits; its first forward pass takes them to the module
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scales, Tensor):
        yield f"{name}SCB ", scales


def digest(tensor: Tensor) -> str:
    """A hash of a plain tensor's bytes, the same on every device.

    Raises:
        _UnknownError: if it is sparse.
    """
    if tensor.layout != torch.strided:
        raise _UnknownError(f"a weight has the layout {tensor.layout}")
    words, rest = _words_of(tensor)
    whole = len(words) // _WORDS * _WORDS
    summed = _block_sums(words[:whole].view(whole // _WORDS, _WORDS))
    hashed = hashlib.sha256(summed.numpy().tobytes())
    hashed.update(words[whole:].cpu().numpy().tobytes())
    hashed.update(rest.cpu().numpy().tobytes())
    return hashed.hexdigest()[:_LETTERS]


def _words_of(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's bytes as 64-bit words, and the remaining bytes."""
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    if octets.storage_offset() % 8:  # a view that begins within a word, as memory-mapped files give them
        octets = octets.clone()
    fits = len(octets) // 8 * 8
    return octets[:fits].view(torch.int64), octets[fits:]


def _block_sums(blocks: Tensor) -> Tensor:
    """The s of every block (n, _WORDS) → (n,), on the CPU."""
    weights = _word_weights(blocks.device)
    if blocks.device.type != "cpu":
        parts = [_mixed(weights * part).sum(1) for part in blocks.split(_BLOCKS_AT_ONCE)]
        return torch.cat(parts).cpu() if parts else torch.zeros(0, dtype=torch.int64)
    sums = torch.zeros(len(blocks), dtype=torch.int64)
    product, shifted = torch.empty_like(weights), torch.empty_like(weights)
    for i, block in enumerate(blocks):  # one by one they stay in the cache; all at once would take ten times as long
        torch.mul(block, weights, out=product)
        torch.bitwise_right_shift(product, 32, out=shifted)
        torch.sum(product.bitwise_xor_(shifted), 0, out=sums[i])
    return sums


def _mixed(words: Tensor) -> Tensor:
    return words ^ (words >> 32)


@lru_cache(maxsize=8)  # a few devices
def _word_weights(device: torch.device) -> Tensor:
    """The w_i (_WORDS,): odd numbers from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) + 1).to(device)
