"""How a decomposition changes in training: figures of one point of a run, and its differences from the point before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.columns import described_by


def same_examples(a: Decomposition, b: Decomposition) -> bool:
    """Whether two decompositions have the same examples in the same order, by id and, if it is known, by content."""
    hashes = [d.columns.get("content_hash") for d in (a, b)]
    return a.example_ids == b.example_ids and (None in hashes or hashes[0] == hashes[1])


def drift(now: Decomposition, before: Decomposition | None, fixed: bool) -> dict[str, Any]:
    """Figures of a decomposition, and of its difference from an earlier one of the same examples.

    Args:
        now: the decomposition.
        before: the earlier decomposition, with the same components in the same order, or None.
        fixed: whether the components are fixed, so that only the coefficients change.

    Returns:
        `explained`; `active`, the number of components that are active on some example; and lists with an entry for
        each component: `share`, the share of the examples that it leads; `cosine`, the |cosine| of g_j with the
        earlier g_j; and `correlation`, that of its coefficients with the earlier ones. The last two are None without
        an earlier decomposition. If columns or texts were kept, there are also `accuracy` on each component's
        examples; `association`, the most certain association in words; and `associated`, the share of the component's
        examples that have it. They are None for a component without one.
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
        **_meaning(now),
    }
    if before is not None:
        measures["correlation"] = _correlations(W, before.coefficients.double())
        if not fixed:
            measures["cosine"] = (now.pseudo_fishers * before.pseudo_fishers).sum(1).abs().clamp_max(1).tolist()
    return measures


def _meaning(now: Decomposition) -> dict[str, list[Any]]:
    """What the examples of each component have in common, and how often the model predicts them right."""
    if not described_by(now.columns):
        return {name: [None] * len(now) for name in ("accuracy", "association", "associated")}
    components = now.associations(texts=now.texts is not None)
    first = [next(iter(component.associations), None) for component in components]
    return {
        "accuracy": [None if component.accuracy is None else component.accuracy[0] for component in components],
        "association": [None if a is None else a.feature for a in first],
        "associated": [None if a is None else a.share for a in first],
    }


def _correlations(W: Tensor, V: Tensor) -> list[float | None]:
    """Pearson's correlation, column by column; None for a column that is constant."""
    correlations: list[float | None] = []
    for w, v in zip((W - W.mean(0)).T, (V - V.mean(0)).T, strict=True):
        norm = float(w.norm() * v.norm())
        varies = norm > 1e-12  # beyond the rounding of float64
        correlations.append(max(-1.0, min(1.0, float(w @ v) / norm)) if varies else None)
    return correlations
