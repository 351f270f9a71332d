"""Rows that were not made by hf_npeff, checked before they become PEFs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.pefs.norms import normalise
from hf_npeff.pefs.shards import ID
from hf_npeff.sharing.files import FORMAT_VERSION


def given_rows(
    rows: Tensor, fingerprint: str | None, columns: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, list[Any]], dict[str, Any]]:
    """The tensors, columns and info of PEFs, from (n, c, d) or (n, d) rows; see `PEFs.from_factors`.

    Raises:
        ValueError: if the rows or a column have a wrong shape, type or value.
    """
    columns = dict(columns)
    if rows.dim() == 2:
        rows = rows[:, None]
    if rows.dim() != 3 or 0 in rows.shape or not rows.is_floating_point():
        raise ValueError(f"factors must be floating-point (n, c, d), but they are {rows.dtype} {tuple(rows.shape)}")
    if not bool(torch.isfinite(rows).all()):
        bad = (~torch.isfinite(rows).flatten(1).all(1)).nonzero()[:, 0].tolist()
        raise ValueError(f"factors must be finite, but those of the examples {bad[:10]} are not")
    n, _, d = rows.shape
    unit, norms = normalise(rows)
    ids = [str(i) for i in columns.pop("example_ids", range(n))]
    if repeated := [i for i, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"example_ids must differ, but these come more than once: {repeated[:5]}")
    kept = {name: _as_list(name, values) for name, values in columns.items()}
    if wrong := {name: len(values) for name, values in {**kept, "example_ids": ids}.items() if len(values) != n}:
        raise ValueError(f"columns need {n} values, but these have other lengths: {wrong}")
    info = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint or f"rows-of-{d}",
        "fisher": FisherConfig().to_dict(),
        "sketch": None,
        "model": None,
        "revision": None,
        "selftest": None,
    }
    return {"factors": unit, "norms": norms}, {ID: ids, **kept}, info


def _as_list(name: str, values: Any) -> list[Any]:
    if not hasattr(values, "__len__") or isinstance(values, str):
        raise ValueError(f"the column {name!r} needs a list with one value per example, but it is {values!r}")
    return values.tolist() if hasattr(values, "tolist") else list(values)
