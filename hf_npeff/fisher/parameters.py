"""Parameters that are no linear map's weight (biases, norms, embeddings), by plain autograd.

Hooks see only a module's input and output. Other parameters are differentiated by autograd, one example at a time, so
any kind of layer works. The dense gradient goes through the same sketch, as a matrix (first dimension, rest). This
costs one forward and c full backward passes for each example, and the memory of one gradient of the chosen parameters.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_npeff.fisher.bare_model import bare_module_names, bare_name, bare_parameters
from hf_npeff.fisher.linear_layers import behaviour, is_at_hand, is_linear, packed_size
from hf_npeff.pefs.sketches import Sketch

_SHARE_TO_NAME = 0.05
"""No warning if a smaller share is left out; biases and norms of usual models have less than a hundredth."""
PACKED = " (quantised)"
"""What follows the name of a quantised layer that is not analysed."""
_LAYER_NUMBER = re.compile(r"\.\d+(?=\.)")


def find_parameters(model: nn.Module, wanted: str | Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """The parameters that `FisherConfig.parameters` names, {name: shape as a matrix}, in the model's order.

    Args:
        model: any module.
        wanted: a regular expression for the whole name, or a list of names or name endings. A tied parameter matches by
            any of its names and is listed under its first.

    Raises:
        ValueError: if a name, or the regular expression, matches no floating-point parameter.
    """
    if wanted is None:
        return {}
    first: dict[int, str] = {}
    every = {}
    for name, parameter in bare_parameters(model).items():
        if parameter.is_floating_point():
            every[name] = first.setdefault(id(parameter), name)
    chosen = set()
    if isinstance(wanted, str):
        try:
            chosen = {own for name, own in every.items() if re.fullmatch(wanted, name)}
        except re.error as error:
            raise ValueError(f"parameters={wanted!r} is not a regular expression: {error}") from error
        if not chosen:
            raise ValueError(f"parameters={wanted!r} matches none of the model's parameters{_close([wanted], every)}")
    else:
        unknown = []
        for target in wanted:
            named = {own for name, own in every.items() if name == target or name.endswith(f".{target}")}
            chosen |= named
            if not named:
                unknown.append(target)
        if unknown:
            raise ValueError(f"the model has no parameters {unknown}{_close(unknown, every)}")
    tensors = bare_parameters(model)
    if away := sorted(name for name in chosen if not is_at_hand(tensors[name])):
        raise ValueError(
            f"the parameters {away[:5]} are offloaded, quantised or sharded, so they cannot be differentiated; load "
            "them whole on a device"
        )
    return {name: _as_matrix(tensors[name].shape) for name in tensors if name in chosen}


def _close(unknown: Sequence[str], known: Mapping[str, str]) -> str:
    # Chosen: a few, and half alike or more
    close = [match for name in unknown for match in difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
    return f"; did you mean {', '.join(map(repr, close))}?" if close else f"; it has, for instance, {list(known)[:5]}"


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    rows = shape[0] if len(shape) else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return rows, columns


def modules_of(model: nn.Module, names: Mapping[str, tuple[int, int]]) -> set[str]:
    """Names of the modules that have these parameters, by any of their names."""
    tensors = bare_parameters(model)
    chosen = {id(tensors[name]) for name in names}
    return {
        prefix for prefix, module in model.named_modules()
        if any(id(parameter) in chosen for parameter in module.parameters(recurse=False))
    }  # fmt: skip


@contextlib.contextmanager
def requiring_gradients(model: nn.Module, names: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """The named parameters, which require gradients inside `with`; the model is frozen otherwise."""
    every = bare_parameters(model)
    tensors = [every[name] for name in names]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield tensors
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


def fitted(cotangent: Tensor, source: Tensor) -> Tensor:
    """A cotangent (B, t', s') cut to a source (B, t, s), on its device and in its dtype.

    A cotangent that was made for a batch is longer than the source of a shorter example, and zero beyond it.
    """
    return cotangent[tuple(slice(size) for size in source.shape)].to(source.device, source.dtype)


def gradients(
    model: nn.Module, names: Sequence[str], forward: Callable[[], Tensor], cotangents: Tensor
) -> Iterator[list[Tensor]]:
    """Gradients of ⟨source, v⟩ with respect to parameters, summed over the batch, for one cotangent v after another.

    Args:
        model: frozen.
        names: the names of the parameters.
        forward: a forward pass that returns the source.
        cotangents: (m, *source.shape), or larger (see `fitted`).

    Yields:
        m lists of tensors shaped like the parameters; zeros where the source does not depend on one.
    """
    with requiring_gradients(model, names) as tensors:
        source = forward()
        for i, v in enumerate(cotangents):
            if source.requires_grad:
                last = i == len(cotangents) - 1
                each = torch.autograd.grad(source, tensors, fitted(v, source), retain_graph=not last, allow_unused=True)
            else:
                each = (None,) * len(tensors)  # type: ignore[assignment]
            yield [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, each, strict=True)]


def sketched_rows(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    sketch: Sketch,
    forward: Callable[[], Tensor],
    cotangents: Tensor,
) -> Tensor:
    """The share of these parameters in the sketched rows of one example: (m, d).

    Args:
        model: frozen.
        shapes: as `find_parameters` returns them.
        sketch: the sketch of these parameters, and of others.
        forward: a forward pass over the example that returns the source.
        cotangents: (m, *source.shape), or larger (see `fitted`).
    """
    dtype = torch.promote_types(cotangents.dtype, torch.float32)
    rows = sketch.new_rows(len(cotangents), device=cotangents.device, dtype=dtype)
    for i, by_parameter in enumerate(gradients(model, list(shapes), forward, cotangents)):
        for (name, shape), gradient in zip(shapes.items(), by_parameter, strict=True):
            value = sketch.project_input(name, gradient.to(rows.device, dtype).reshape(1, *shape))
            sketch.add(rows[i : i + 1], name, sketch.project_output(name, value.mT).mT)
    return sketch.finish(rows)


def left_out(
    model: nn.Module, analysed: Mapping[str, tuple[int, int]], *, chosen_by_hand: bool = False
) -> dict[str, float]:
    """The parameters that are not analysed, largest first: fused experts, convolutions, other kinds of layers.

    A quantised layer that is no linear layer of PyTorch's counts with the entries of its weight (`packed_size`), under
    its own name and `PACKED`. Embeddings, including an output embedding, do not count, and neither do the parts of a
    PEFT adapter.

    Args:
        model: any module.
        analysed: {parameter: shape} of all analysed weights.
        chosen_by_hand: whether the user chose the linear maps; other linear maps are not listed then.

    Returns:
        {name, with layer numbers written as *: share of the parameters outside the embeddings}; empty if the shares add
        up to 5% or less, as those of biases and norms do in all but tiny models.
    """
    weights, bare = bare_parameters(model), bare_module_names(model)
    known = {id(weights[name]) for name in analysed if name in weights} | _embeddings_and_adapters(model)
    sizes: dict[str, int] = {}
    total = sum(a * b for a, b in analysed.values())
    for prefix, module in model.named_modules():
        if prefix not in bare:
            continue
        unchosen = chosen_by_hand and is_linear(module) and behaviour(module) == "product"
        if packed := packed_size(module):
            known |= {id(parameter) for parameter in module.parameters(recurse=False)}
            total += packed
            group = _LAYER_NUMBER.sub(".*", bare[prefix]) + PACKED
            sizes[group] = sizes.get(group, 0) + packed
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) in known:
                continue
            known.add(id(parameter))
            total += parameter.numel()
            if not unchosen:
                group = _LAYER_NUMBER.sub(".*", bare_name(name, bare))
                sizes[group] = sizes.get(group, 0) + parameter.numel()
    shares = {name: sizes[name] / total for name in sorted(sizes, key=sizes.__getitem__, reverse=True)}
    return shares if sum(shares.values()) > _SHARE_TO_NAME else {}


def _embeddings_and_adapters(model: nn.Module) -> set[int]:
    """Identities of the parameters of embeddings, of the output embedding, and of PEFT adapters."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    around = set() if output is None else {id(m) for m in output.modules()}  # a wrapper of PEFT's, with what is inside
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) or id(m) in around]
    parts = {id(p) for m in embeddings for p in m.parameters(recurse=False)}
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and hasattr(module, "adapter_layer_names"):
            own = {id(p) for p in base.parameters()}
            parts |= {id(p) for p in module.parameters() if id(p) not in own}
    return parts
