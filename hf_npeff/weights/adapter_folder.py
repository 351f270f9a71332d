"""Adapters' folders: written so that PEFT loads them; any LoRA is read with its effective scale, put into B."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from hf_npeff.config import is_count
from hf_npeff.errors import CorruptStoreError, UnsupportedModelError
from hf_npeff.sharing.cards import write_card
from hf_npeff.sharing.files import json_bytes, read_json, read_tensors, write_atomically, write_together
from hf_npeff.weights.layouts import Layout

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""The prefix of every key in a file that PEFT loads."""
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<name>lora_(?:embedding_)?[AB])(?P<leaf>\.weight|\.bias)?")
_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")
"""The class name of transformers' Conv1D modules: `fan_in_fan_out` applies to them, but not to a head beside them."""
_ELSEWHERE = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "megatron_config",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Settings with which the change is not BA·alpha/r, or acts only on some tokens."""
_OF_FACTORS_ALONE = ("gaussian", "orthogonal", "eva", "mica")
"""Values of PEFT's `init_lora_weights` that leave the base model's weights unchanged."""


def read_lora(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Layout]]:
    """Tensors and config with `lora_alpha` = r and the scale in B, and {parameter: layout}.

    Raises:
        CorruptStoreError: if a file is missing or damaged, or keys and config are not those of a LoRA.
        UnsupportedModelError: if it is another kind of adapter, or has a setting with which its change is not
            BA·lora_alpha/r.
    """
    folder = Path(directory)
    config = read_json(folder / CONFIG, None)
    kind = config.get("peft_type", config.get("kind"))
    if kind == "delta":
        raise UnsupportedModelError(f"{folder} has a dense change; read it with ParameterDirection.from_pretrained")
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder} has an adapter of the kind {kind!r}, but only LoRA can be read here")
    if others := [name for name in _ELSEWHERE if config.get(name)]:
        raise UnsupportedModelError(
            f"{folder} is a LoRA with {others[0]}={config[others[0]]!r}, so its change is not BA·lora_alpha/r; "
            "load it with PEFT"
        )
    if begins_elsewhere(config):
        raise UnsupportedModelError(
            f"{folder} is a LoRA with init_lora_weights={config['init_lora_weights']!r}, which changes the base "
            "model's weights before training, so its change is not BA·lora_alpha/r; convert it with PEFT "
            "(path_initial_model_for_weight_conversion of save_pretrained), or use ParameterDirection.from_adapter"
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


def begins_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether PEFT changes the base model's weights when it loads the adapter, as for PiSSA, OLoRA or CorDA."""
    begun: Any = config.get("init_lora_weights")
    named = isinstance(begun, str) and begun.lower() not in _OF_FACTORS_ALONE
    return named or bool(config.get("kasa_config"))


def scaled_lora(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A LoRA's tensors with its change multiplied by a factor, which goes into B and biases."""
    return {key: value * scale if _is_factor(key, "B") else value for key, value in tensors.items()}


def base_weights_of(directory: str | os.PathLike[str]) -> str | None:
    """The hash of the base model's weights in the file of an adapter written by hf_npeff."""
    try:
        with safe_open(Path(directory) / WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get("base_model_weights")
    except (OSError, SafetensorError):
        return None


def _is_factor(key: str, which: str) -> bool:
    match = _FACTOR.fullmatch(key)
    return match is not None and match["name"].endswith(which)


def _parameter_of(key: str, config: Mapping[str, Any], folder: Path) -> tuple[str, Layout]:
    """The parameter that a key changes, and its layout."""
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


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    weights_hash: str | None = None,
    card: str | None = None,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and, if there is a card, README.md.

    Args:
        folder: the folder; it is created if it is missing.
        tensors: the tensors under the keys of the file.
        config: the config of PEFT's adapter; of a dense delta, with `kind` "delta".
        weights_hash: the hash of the base model's weights.
        card: the text of README.md; None leaves an existing file alone.

    Raises:
        ValueError: if the folder has another PEFT adapter, because PEFT reads two files, which cannot be replaced in
            one step.
    """
    # PEFT warns of settings that it does not know; other information goes into the file of the weights.
    metadata = {"format": "pt", **({} if weights_hash is None else {"base_model_weights": weights_hash})}
    weights = tensors_to_bytes({name: v.detach().cpu().contiguous() for name, v in tensors.items()}, metadata)
    written = json_bytes(config)
    is_dense = config.get("kind") == "delta"
    if not is_dense:
        _check_replaceable(folder, written)
    folder.mkdir(parents=True, exist_ok=True)
    if card is not None:
        write_card(folder, card)
    if is_dense:
        written = json_bytes({**config, "sha256": hashlib.sha256(weights).hexdigest()})
        write_together(folder, {WEIGHTS: weights, CONFIG: written})
        return
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / CONFIG, written)


def _check_replaceable(folder: Path, config: bytes) -> None:
    """Check that no adapter with another config is overwritten: a crash in between would leave half of each."""
    if (folder / WEIGHTS).exists() and (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != config:
        raise ValueError(
            f"{folder} has another adapter, with other settings or for another model; save to another folder, or "
            f"remove {CONFIG} and {WEIGHTS} there first"
        )
