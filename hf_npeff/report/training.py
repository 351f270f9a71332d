"""A training run that an NPEFFCallback followed: its components over the steps."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_npeff.errors import CorruptStoreError

_HISTORY = "history.jsonl"
_FOLDER = "npeff"


@dataclass(frozen=True)
class Run:
    """The points of a run, T of them.

    Attributes:
        steps: optimizer steps.
        epochs: None where it is not known.
        explained: fraction explained at each.
        active: number of components in use.
        share: (T, r) share of the examples that each component leads.
        cosine: (T, r) |cosine| of each component with itself at the point before; NaN where not defined.
        correlation: (T, r) correlation of its coefficients with those at the point before.
    """

    steps: list[int]
    epochs: list[float | None]
    explained: list[float | None]
    active: list[int | None]
    share: np.ndarray
    cosine: np.ndarray
    correlation: np.ndarray


def history_file(folder: Path) -> Path:
    """history.jsonl of the latest point below a folder: of a run, of a checkpoint, or `npeff` itself.

    Raises:
        FileNotFoundError: if there is none.
    """
    for place in (folder, folder / _FOLDER):
        if (place / _HISTORY).is_file():
            return place / _HISTORY
    found = {}
    for path in folder.glob(f"checkpoint-*/{_FOLDER}/{_HISTORY}"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.parent.parent.name)
        if number is not None:
            found[int(number[1])] = path
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run of an NPEFFCallback: expected checkpoint-N/{_FOLDER}/{_HISTORY} in it"
        )
    return found[max(found)]


def read_run(folder: Path, r: int) -> Run:
    """The points of a run.

    Args:
        folder: as for `history_file`.
        r: components of the decomposition that it is shown with.

    Raises:
        FileNotFoundError: if there is no history.
        CorruptStoreError: if it cannot be read.
        ValueError: if it is of another number of components.
    """
    path = history_file(Path(folder))
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        steps = [int(record["step"]) for record in records]
        shares = [list(record["share"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error!r}") from error
    if not records or any(len(share) != r for share in shares):
        sizes = sorted({len(share) for share in shares})
        raise ValueError(
            f"{path} follows {sizes or 'no'} components, and the decomposition has {r}; they do not belong"
        )

    def table(name: str) -> np.ndarray:
        rows: list[Any] = [record.get(name) or [None] * r for record in records]
        return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float32).reshape(-1, r)

    return Run(
        steps,
        [record.get("epoch") for record in records],
        [record.get("explained") for record in records],
        [record.get("active") for record in records],
        table("share"),
        table("cosine"),
        table("correlation"),
    )
