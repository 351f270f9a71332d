"""Checks of the description of a PEF store, because a folder may come from anybody and other code relies on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.errors import CorruptStoreError
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.weights_identity import check_identity

_TEXTS = ("model", "revision", "architecture", "task")
_MAPPINGS = ("sketch", "selftest", "versions", "dataset")


def check_info(info: Mapping[str, Any], path: Path) -> None:
    """Check that the entries of a description of PEFs have the right types.

    Raises:
        CorruptStoreError: if they do not.
        FormatVersionError: if another version wrote the Fisher config or the sketch.
    """
    try:
        FisherConfig.from_dict(info["fisher"])
        wrong = [name for name in _TEXTS if not isinstance(info.get(name), str | None)]
        wrong += [name for name in _MAPPINGS if not isinstance(info.get(name), dict | None)]
        if wrong or not isinstance(info["fingerprint"], str):
            raise TypeError(f"{wrong or 'fingerprint'}")
        check_identity(info.get("weights"))
        tested = info.get("selftest") or {}
        if not all(isinstance(tested.get(name), float | int | None) for name in ("sketch_error", "coverage")):
            raise TypeError("selftest")
        if info.get("sketch") is not None and Sketch.from_dict(info["sketch"]).fingerprint != info["fingerprint"]:
            raise ValueError("the fingerprint is not the sketch's")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptStoreError(f"{path} does not describe PEFs: {error!r}") from error


def check_width(info: Mapping[str, Any], d: int, folder: Path) -> None:
    """Check that rows have as many numbers as the described sketch makes."""
    if info.get("sketch") is not None and Sketch.from_dict(info["sketch"]).dim != d:
        raise CorruptStoreError(f"{folder}: the rows have {d} numbers, but the sketch makes another number")


def checked_entry(entry: Any, folder: Path) -> dict[str, Any]:
    """A manifest's entry of a shard, after checking it; raises a CorruptStoreError.

    Returns:
        name; start: the number of its first example; examples: how many it has; covers: how many were read, which is
        more if some were skipped; skipped: {id, reason} of each; sha256 and columns_sha256 of its files.
    """
    if not isinstance(entry, dict):
        raise CorruptStoreError(f"{folder}: the manifest names a shard {entry!r}")
    name: Any = entry.get("name")
    start: Any = entry.get("start")
    n: Any = entry.get("examples")
    skipped = checked_skipped(entry.get("skipped", []), folder)
    covers = entry.get("covers", n)
    # Whole numbers that JSON keeps
    counts = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**53 for x in (start, n, covers))
    if not counts or covers == 0 or covers - len(skipped) != n:
        raise CorruptStoreError(
            f"{folder}: the manifest gives a shard start={start!r}, examples={n!r} and covers={covers!r}, which are "
            "not whole numbers that fit together; compute the PEFs again"
        )
    if name != f"pefs-{start:05d}":
        raise CorruptStoreError(f"{folder}: the manifest names a shard {name!r}")
    checks = entry.get("checks", [])
    if not isinstance(checks, list) or not all(map(_is_check, checks)):
        raise CorruptStoreError(
            f"{folder}: the manifest's record of repeated checks of a shard cannot be read; compute the PEFs again"
        )
    return {**entry, "covers": covers, "skipped": skipped}


def _is_check(value: Any) -> bool:
    """Whether a value is what a repeated self-test found: texts and numbers by name."""
    return isinstance(value, dict) and all(isinstance(entry, str | int | float | None) for entry in value.values())


def checked_skipped(values: Any, folder: Path) -> list[dict[str, str]]:
    """The {id, reason} of skipped examples, or a CorruptStoreError."""
    try:
        skipped = [{"id": entry["id"], "reason": entry["reason"]} for entry in values]
    except (KeyError, TypeError) as error:
        raise CorruptStoreError(f"{folder}: the manifest's skipped examples are not readable: {error!r}") from error
    if not isinstance(values, list) or not all(isinstance(text, str) for entry in skipped for text in entry.values()):
        raise CorruptStoreError(f"{folder}: the manifest's skipped examples are not readable")
    return skipped


_DIMS = {
    "factors": (3,),
    "norms": (1,),
    "cotangents": (4,),
    "predictions": (1, 2, 3),
    "log_probs": (1, 2),
    "entropies": (1, 2),
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(tensors: Mapping[str, Tensor], path: Path, *, finite: bool) -> None:
    """Check the dimensions and types of tensors, and that they have no NaN or infinite numbers."""
    for name, t in tensors.items():
        types = (torch.float64,) if name == "norms" else (*_FLOATS, torch.int64) if name == "predictions" else _FLOATS
        if t.dim() not in _DIMS.get(name, ()) or t.dtype not in types or 0 in t.shape:
            raise CorruptStoreError(f"{path} has {name!r} as {t.dtype} {tuple(t.shape)}")
    if not bool((torch.isfinite(tensors["norms"]) & (tensors["norms"] >= 0)).all()):
        raise CorruptStoreError(f"{path}: norms have to be finite and not negative, but these are not")
    parts = tensors["factors"].split(64)  # bounds the memory
    if finite and not all(bool(torch.isfinite(part).all()) for part in parts):
        raise CorruptStoreError(f"{path} has rows that are not finite")
