"""A LoRA adapter's folder, of ours or of anybody's, read as it acts: the scale in B, and what each key changes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_npeff.config import is_count
from hf_npeff.errors import CorruptStoreError, UnsupportedModelError
from hf_npeff.sharing.files import read_json, read_tensors

Layout = Literal["linear", "conv1d", "experts", "experts-transposed", "embedding", "bias", "norm", "other"]
"""What a parameter is to PEFT."""
LINEAR_LAYOUTS: tuple[Layout, ...] = ("linear", "conv1d", "experts", "experts-transposed")
"""Of weights that multiply inputs and nothing else: those of fused experts are (E, out, in), or (E, in, out)."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""Of every key in a file that PEFT loads."""
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<name>lora_(?:embedding_)?[AB])(?P<leaf>\.weight|\.bias)?")
_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")
"""What transformers calls its Conv1D modules: `fan_in_fan_out` holds for them, and not for a head beside them."""
_ELSEWHERE = ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "megatron_config", "target_parameters")
"""Settings that make the change another than BA·alpha/r."""


def read_lora(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Layout]]:
    """Tensors and config with `lora_alpha` = r and the scale in B, and {parameter: layout}.

    Raises:
        CorruptStoreError: if a file is missing or damaged, or keys and config are no LoRA's.
        UnsupportedModelError: if it is another kind of adapter, or a setting makes its change another than
            BA·lora_alpha/r.
    """
    folder = Path(directory)
    config = read_json(folder / CONFIG, None)
    kind = config.get("peft_type", config.get("kind"))
    if kind == "delta":
        raise UnsupportedModelError(f"{folder} holds a dense change; ParameterDirection.from_pretrained reads it")
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder} holds an adapter of the kind {kind!r}, and only LoRA is read here")
    if others := [name for name in _ELSEWHERE if config.get(name)]:
        raise UnsupportedModelError(
            f"{folder} is a LoRA with {others[0]}={config[others[0]]!r}, so its change is not BA·lora_alpha/r; "
            "load it with PEFT"
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if not is_count(rank) or not isinstance(alpha, int | float):
        raise CorruptStoreError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha is {alpha!r}, not two numbers")
    tensors = read_tensors(folder / WEIGHTS)
    layouts = {}
    for key in tensors:
        name, layouts[name] = _parameter_of(key, config, folder)
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if scale != 1:
        tensors = scaled_lora(tensors, scale)
    return tensors, {**config, "lora_alpha": rank, "use_rslora": False}, layouts


def scaled_lora(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A LoRA's tensors with its change so many times as large: B and biases are multiplied."""
    return {key: value * scale if _is_factor(key, "B") else value for key, value in tensors.items()}


def base_weights_of(directory: str | os.PathLike[str]) -> str | None:
    """The hash of the base model's weights that an adapter of ours has in its file."""
    try:
        with safe_open(Path(directory) / WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get("base_model_weights")
    except (OSError, SafetensorError):
        return None


def _is_factor(key: str, which: str) -> bool:
    match = _FACTOR.fullmatch(key)
    return match is not None and match["name"].endswith(which)


def _parameter_of(key: str, config: Mapping[str, Any], folder: Path) -> tuple[str, Layout]:
    """The parameter that a key changes, and what it is."""
    if not key.startswith(PREFIX):
        raise CorruptStoreError(f"{folder / WEIGHTS} has the key {key!r}, which does not begin with {PREFIX!r}")
    match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
    if match is None:  # stored whole
        return key.removeprefix(PREFIX), "norm" if "norm" in key.lower() or ".ln_" in key else "other"
    module = match["module"]
    if match["leaf"] == ".bias":
        return f"{module}.bias", "bias"
    if "embedding" in match["name"]:
        return f"{module}.weight", "embedding"
    conv1d = bool(config.get("fan_in_fan_out")) and module.rpartition(".")[2] in _CONV1D
    return f"{module}.weight", "conv1d" if conv1d else "linear"
