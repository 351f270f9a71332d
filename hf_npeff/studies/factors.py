"""How well components match annotated attributes that they never saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def auroc(scores: Tensor, positives: Tensor) -> float:
    """P(score of a positive > score of a negative), ties counting a half (Mann–Whitney).

    Args:
        scores: (n,).
        positives: (n,) bool.

    Raises:
        ValueError: if there are no positives, or no negatives.
    """
    n_positive = int(positives.sum())
    n_negative = len(positives) - n_positive
    if n_positive == 0 or n_negative == 0:
        raise ValueError("an AUROC needs positives and negatives; the attribute has only one value here")
    _, inverse, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    middle_ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2
    rank_sum = middle_ranks[inverse][positives].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def best_components(W: Tensor, values: Sequence[Hashable]) -> dict[Hashable, tuple[int, float]]:
    """{value of an attribute: (the component that ranks its examples highest, its AUROC)}.

    Args:
        W: (n, r) coefficients.
        values: n values of one attribute.

    Raises:
        ValueError: if the attribute has a single value.
    """
    found: dict[Hashable, tuple[int, float]] = {}
    for value in dict.fromkeys(values):
        positives = torch.tensor([v == value for v in values])
        scores = [auroc(W[:, j], positives) for j in range(W.shape[1])]
        best = max(range(len(scores)), key=scores.__getitem__)
        found[value] = (best, scores[best])
    return found


def purity(values: Sequence[Hashable]) -> tuple[Hashable, float]:
    """The most common value and its share.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("purity needs at least one value")
    value, count = Counter(values).most_common(1)[0]
    return value, count / len(values)
