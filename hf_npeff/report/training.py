"""A training run that an NPEFFCallback followed: its components over the steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.files import read_json_lines

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
        accuracy: (T, r) share of right predictions on its examples; NaN where not known.
        associated: (T, r) share of its examples that have what is most surely in common to them; NaN where nothing is.
        association: that, at the last point, in words; None where nothing is.
    """

    steps: list[int]
    epochs: list[float | None]
    explained: list[float | None]
    active: list[int | None]
    share: np.ndarray
    cosine: np.ndarray
    correlation: np.ndarray
    accuracy: np.ndarray
    associated: np.ndarray
    association: list[str | None]


def history_file(folder: Path) -> Path:
    """history.jsonl of the latest point below a folder: of a run, of a checkpoint, or `npeff` itself.

    Raises:
        FileNotFoundError: if there is none.
    """
    for place in (folder, folder / _FOLDER):
        if (place / _HISTORY).is_file():
            return place / _HISTORY
    histories = {}
    for path in folder.glob(f"checkpoint-*/{_FOLDER}/{_HISTORY}"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.parent.parent.name)
        if number is not None:
            histories[int(number[1])] = path
    if not histories:
        raise FileNotFoundError(
            f"{folder} has no run of an NPEFFCallback: expected checkpoint-N/{_FOLDER}/{_HISTORY} in it"
        )
    return histories[max(histories)]


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
    records = read_json_lines(path)
    sizes = sorted({len(r["share"]) if isinstance(r.get("share"), list) else 0 for r in records})
    if sizes != [r]:
        raise ValueError(
            f"{path} follows {sizes or 'no'} components, but the decomposition has {r}; they do not belong"
        )

    def numbers(name: str) -> list[Any]:
        values = [record.get(name) for record in records]
        if not all(value is None or isinstance(value, int | float) for value in values):
            raise TypeError(f"{name} should be numbers")
        return values

    def table(name: str) -> np.ndarray:
        rows: list[Any] = [record.get(name) or [None] * r for record in records]
        if any(abs(v) > 1e6 for row in rows for v in row if v is not None):  # chosen: no axis is readable above
            raise ValueError(f"{name} should be shares and cosines")
        return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float32).reshape(-1, r)

    try:
        return Run(
            [int(record["step"]) for record in records],
            numbers("epoch"),
            numbers("explained"),
            numbers("active"),
            table("share"),
            table("cosine"),
            table("correlation"),
            table("accuracy"),
            table("associated"),
            _words(records[-1].get("association"), r),
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error!r}") from error


def _words(values: Any, r: int) -> list[str | None]:
    """An association a component, in words."""
    if values is None:
        return [None] * r
    if not isinstance(values, list) or len(values) != r or not all(isinstance(v, str | None) for v in values):
        raise TypeError(f"association should be {r} texts")
    return list(values)
