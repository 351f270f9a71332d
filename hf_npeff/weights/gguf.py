"""LoRA adapters in llama.cpp's format, GGUF: the same factors, with its names and its order of rotary dimensions.

Llama's rotary embeddings rotate dimension i with i + d/2 of each head in transformers, and 2i with 2i + 1 in llama.cpp.
So llama.cpp's files have the rows of q and k in another order, and an adapter's B needs the same order.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from hf_npeff import extras
from hf_npeff.errors import CorruptStoreError, UnsupportedModelError
from hf_npeff.weights.layouts import Layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_Rows = Literal["as they are", "q and k by pairs", "q, k and v apart"]
"""The order of the output rows of attention's maps in GGUF."""


@dataclass(frozen=True)
class _Architecture:
    name: str  # general.architecture
    rows: _Rows = "as they are"


ARCHITECTURES: Mapping[str, _Architecture] = {
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "gpt2": _Architecture("gpt2"),
    "gpt_neox": _Architecture("gptneox", "q, k and v apart"),
    "granite": _Architecture("granite", "q and k by pairs"),
    "llama": _Architecture("llama", "q and k by pairs"),
    "mistral": _Architecture("llama", "q and k by pairs"),
    "olmo2": _Architecture("olmo2"),
    "phi3": _Architecture("phi3"),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "smollm3": _Architecture("smollm3", "q and k by pairs"),
    "starcoder2": _Architecture("starcoder2"),
}
"""{transformers' model_type: its architecture in GGUF}, for the types that `make runtimes` compares with llama.cpp."""


@dataclass(frozen=True)
class _Base:
    """The information on the base model."""

    architecture: _Architecture
    heads: int
    key_value_heads: int
    layers: int
    tied: bool
    shapes: Mapping[str, tuple[int, int]] | None = None  # {tensor: (out, in)}, if its file is given


def check_gguf(kind: str, layouts: Mapping[str, Layout]) -> None:
    """Check that llama.cpp can load all of an adapter; it silently drops some parts.

    Raises:
        UnsupportedModelError: if it is not a LoRA, or changes anything other than weights of linear maps.
    """
    if kind != "lora":
        raise UnsupportedModelError(f"llama.cpp loads LoRA adapters, not {kind!r}; use to_adapter(kind='lora')")
    if wrong := [f"{name} ({layout})" for name, layout in layouts.items() if layout not in ("linear", "conv1d")]:
        raise UnsupportedModelError(
            f"llama.cpp's adapters change only weights of linear maps, but this one changes {', '.join(wrong[:3])}; "
            "leave those out of the direction (FisherConfig(target_modules=...)), or load it with PEFT"
        )


def write_gguf(
    factors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    path: str | os.PathLike[str],
    base: PretrainedConfig | str | os.PathLike[str] | None = None,
) -> None:
    """`Adapter.to_gguf`, from a LoRA's tensors and adapter_config.json."""
    gguf = extras.load("gguf", "Adapter.to_gguf")
    pairs = _pairs(factors)
    described = _described(config, base)
    tensors: dict[str, np.ndarray] = {}
    names = gguf.get_tensor_name_map(_number_of(gguf, described.architecture.name), described.layers)
    for module, (A, B) in sorted(pairs.items()):  # a file read again gives the same bytes
        name = _name_of(names, module, described)
        if described.shapes is not None:
            _check_shape(name, (B.shape[0], A.shape[1]), described.shapes)
        tensors[f"{name}.weight.lora_a"] = A.detach().cpu().float().numpy()
        tensors[f"{name}.weight.lora_b"] = np.ascontiguousarray(
            _in_order(B.detach().cpu().float(), name, described).numpy()
        )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # gguf's writer opens the file by its name, so a temporary folder beside it and not a temporary file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / "adapter.gguf"
        _write(gguf, unfinished, described.architecture.name, float(config["r"]), tensors)
        os.replace(unfinished, target)


def _write(gguf: Any, path: Path, architecture: str, alpha: float, tensors: Mapping[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp multiplies with alpha / rank, so 1 here: the scale is in B.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, value in tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# The adapter

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def _pairs(factors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: A (r, in), B (out, r)}.

    Raises:
        UnsupportedModelError: if a tensor is not a factor of a linear map's weight.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in factors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnsupportedModelError(
                f"{key} is not a factor of a linear map's weight, and llama.cpp loads no other tensors"
            )
        pairs.setdefault(match["module"], {})[match["factor"]] = value
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


# The base model


def _described(config: Mapping[str, Any], base: PretrainedConfig | str | os.PathLike[str] | None) -> _Base:
    if isinstance(base, str | os.PathLike) and Path(base).suffix == ".gguf":
        return _of_file(Path(base))
    if base is None or isinstance(base, str | os.PathLike):
        base = _config_of(config, base)
    return _of_config(getattr(base, "config", base))  # a model has one


def _config_of(of_adapter: Mapping[str, Any], base: str | os.PathLike[str] | None) -> PretrainedConfig:
    from transformers import AutoConfig

    name = str(of_adapter.get("base_model_name_or_path")) if base is None else os.fspath(base)
    revision = of_adapter.get("revision") if base is None else None
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of the base model {name!r} cannot be read: {error}; pass base=model.config, or a GGUF file of "
            "the base model"
        ) from error
    return config


def _of_config(config: Any) -> _Base:
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise UnsupportedModelError(
            f"the order of rows of a {config.model_type!r} model in llama.cpp was not tested, so its adapter is not "
            f"written as GGUF; tested model types: {', '.join(ARCHITECTURES)}. Load the adapter with PEFT"
        )
    heads = config.num_attention_heads
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    return _Base(known, heads, of_keys, config.num_hidden_layers, bool(getattr(config, "tie_word_embeddings", False)))


def _of_file(path: Path) -> _Base:
    """The information from a base model's GGUF file, whose tensors also give names and shapes."""
    gguf = extras.load("gguf", "Adapter.to_gguf")
    try:
        fields = (reader := gguf.GGUFReader(path)).fields
        name = fields["general.architecture"].contents()
        heads, layers = (fields[f"{name}.{key}"].contents() for key in ("attention.head_count", "block_count"))
    except (KeyError, ValueError, IndexError) as error:
        raise CorruptStoreError(f"{path} is not a GGUF file of a language model: {error!r}") from error
    known = next((each for each in ARCHITECTURES.values() if each.name == name), None)
    if known is None:
        tested = sorted({each.name for each in ARCHITECTURES.values()})
        raise UnsupportedModelError(
            f"{path} has the architecture {name!r}, whose order of rows was not tested; tested architectures: "
            f"{', '.join(tested)}. Load the adapter with PEFT"
        )
    of_keys = fields.get(f"{name}.attention.head_count_kv")
    # GGUF counts dimensions from the innermost, so a matrix is (in, out).
    shapes = {
        t.name.removesuffix(".weight"): (int(t.shape[1]), int(t.shape[0])) for t in reader.tensors if len(t.shape) == 2
    }
    return _Base(known, heads, heads if of_keys is None else of_keys.contents(), layers, "output" not in shapes, shapes)


# Names, and the order of rows


def _number_of(gguf: Any, name: str) -> Any:
    return next(number for number, each in gguf.MODEL_ARCH_NAMES.items() if each == name)


def _name_of(names: Any, module: str, base: _Base) -> str:
    """A module's name in GGUF, without ".weight".

    Raises:
        UnsupportedModelError: if it has no name in GGUF.
    """
    name = names.get_name(module)
    if name is None or "exps" in name or (name == "output" and base.tied):
        what = "a copy of the embeddings, which llama.cpp stores once" if name == "output" else "not a separate tensor"
        raise UnsupportedModelError(
            f"{module} is {what} in the architecture {base.architecture.name!r}: leave it out of the direction "
            "(FisherConfig(target_modules=...)), or load the adapter with PEFT"
        )
    return str(name)


def _check_shape(name: str, shape: tuple[int, int], shapes: Mapping[str, tuple[int, int]]) -> None:
    if shapes.get(name) != shape:
        there = f"of the shape {shapes[name]}" if name in shapes else "missing"
        raise ValueError(f"the adapter changes {name} as (out, in) = {shape}, which is {there} in the base's GGUF file")


def _in_order(B: Tensor, name: str, base: _Base) -> Tensor:
    """B (out, r) with its rows in GGUF's order."""
    rows, kind = base.architecture.rows, name.rpartition(".")[2]
    if rows == "q and k by pairs" and kind in ("attn_q", "attn_k"):
        heads = base.heads if kind == "attn_q" else base.key_value_heads
        # (head, half, dimension) -> (head, dimension, half)
        return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if rows == "q, k and v apart" and kind == "attn_qkv":
        # (head, q | k | v, dimension) -> (q | k | v, head, dimension)
        return B.unflatten(0, (base.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return B
