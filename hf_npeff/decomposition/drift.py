"""How a decomposition moved: what is told of one point of a training run, beside the point before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition


def same_examples(a: Decomposition, b: Decomposition) -> bool:
    """Whether two decompositions are of the same examples in the same order, by id and, where it is known, content."""
    hashes = [d.columns.get("content_hash") for d in (a, b)]
    return a.example_ids == b.example_ids and (None in hashes or hashes[0] == hashes[1])


def drift(now: Decomposition, before: Decomposition | None, fixed: bool) -> dict[str, Any]:
    """What is told of a decomposition, and of how it differs from one of the same examples before it.

    Args:
        now: the decomposition.
        before: the one before, with the same components in the same order, or None.
        fixed: whether the components were kept fixed, so that only the coefficients moved.

    Returns:
        `explained`; `active`, the number of components that are active on some example; and lists with an entry a
        component: `share` of the examples that it leads, `cosine` of g_j with that before (|·|), `correlation` of its
        coefficients with those before. The last two are None without a decomposition to compare with.
    """
    W = now.coefficients.double()
    total = W.sum(1, keepdim=True)
    active = active_examples(W).any(0)
    leading = W.argmax(1)[total[:, 0] > 0]
    measures: dict[str, Any] = {
        "explained": now.explained,
        "active": int(active.sum()),
        "share": (torch.bincount(leading, minlength=len(now)) / len(W)).tolist(),
        "cosine": None,
        "correlation": None,
    }
    if before is not None:
        measures["correlation"] = _correlations(W, before.coefficients.double())
        if not fixed:
            measures["cosine"] = (now.pseudo_fishers * before.pseudo_fishers).sum(1).abs().clamp_max(1).tolist()
    return measures


def _correlations(W: Tensor, V: Tensor) -> list[float | None]:
    """Pearson's, column by column; None where a column does not vary."""
    correlations: list[float | None] = []
    for w, v in zip((W - W.mean(0)).T, (V - V.mean(0)).T, strict=True):
        norm = float(w.norm() * v.norm())
        varies = norm > 1e-12  # beyond the rounding of float64
        correlations.append(max(-1.0, min(1.0, float(w @ v) / norm)) if varies else None)
    return correlations
