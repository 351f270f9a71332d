"""The common parts of adapters that PEFT loads: their settings, their rank, and how much of a change they keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_npeff.config import is_count

_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "feature-extraction": "FEATURE_EXTRACTION",
}


def peft_config(peft_type: str, info: Mapping[str, Any], rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """The settings that every adapter_config.json of PEFT has."""
    return {
        "peft_type": peft_type,
        "task_type": _TASK_TYPES.get(str(info.get("task"))),
        "base_model_name_or_path": info.get("model"),
        "revision": info.get("revision"),
        "inference_mode": True,
        "r": rank,
        "target_modules": list(targets),
        "auto_mapping": _auto_mapping(info),
    }


def _auto_mapping(info: Mapping[str, Any]) -> dict[str, str] | None:
    """The mapping that AutoPeftModel needs if the task has no PEFT type that loads without a saved head."""
    if str(info.get("task")) in _TASK_TYPES or not info.get("architecture"):
        return None
    return {"base_model_class": str(info["architecture"]), "parent_library": str(info.get("module"))}


def loading_class(info: Mapping[str, Any]) -> str:
    """The class that loads the base model: one of transformers, or SentenceTransformer for an embedding model."""
    embeds = info.get("task") == "feature-extraction"
    return "SentenceTransformer" if embeds else str(info.get("architecture") or "AutoModel")


def check_rank(rank: int) -> None:
    """Check that a rank is a positive whole number.

    Raises:
        ValueError: if it is not one.
    """
    if not is_count(rank):
        raise ValueError(f"rank must be a positive whole number, but it is {rank!r}")


def retained(deltas: Mapping[str, Tensor], kept: Mapping[str, float]) -> float:
    """The kept share of the squared norm of all deltas together, from the share of each."""
    energies = {name: float(delta.double().square().sum()) for name, delta in deltas.items()}
    total = sum(energies.values())
    return sum(kept[name] * energy for name, energy in energies.items()) / total if total else 1.0
