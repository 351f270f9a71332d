"""How a decomposition moved: what is told of one point of a training run, beside the point before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.columns import described_by


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
        coefficients with those before; both are None without a decomposition to compare with. Where columns or texts
        were kept also `accuracy` on each component's examples, the `association` that is most certain, in words, and
        `associated`, the share of the component's examples that have it; None where there is none.
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
    """What the examples of each component have in common, and how often the model is right on them."""
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
    """Pearson's, column by column; None where a column does not vary."""
    correlations: list[float | None] = []
    for w, v in zip((W - W.mean(0)).T, (V - V.mean(0)).T, strict=True):
        norm = float(w.norm() * v.norm())
        varies = norm > 1e-12  # beyond the rounding of float64
        correlations.append(max(-1.0, min(1.0, float(w @ v) / norm)) if varies else None)
    return correlations
