"""Measures of coefficients and attributes, as pure functions. They are checked against scikit-learn or by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from hf_npeff.config import INTERVAL
from hf_npeff.extras import load


def auroc(scores: Tensor, positives: Tensor) -> float:
    """The AUROC: P(score of a positive > score of a negative), where ties count one half (Mann–Whitney).

    Args:
        scores: (n,).
        positives: (n,) bool.

    Raises:
        ValueError: if there are no positives, or no negatives.
    """
    return float(aurocs(scores[:, None], positives)[0])


def aurocs(scores: Tensor, positives: Tensor) -> Tensor:
    """The AUROC of every column of scores (n, r): (r,), float64.

    Raises:
        ValueError: if there are no positives, or no negatives.
    """
    n_positive = int(positives.sum())
    n_negative = len(positives) - n_positive
    if n_positive == 0 or n_negative == 0:
        raise ValueError(
            "an AUROC needs positives and negatives, but the attribute has the same value on all these examples"
        )
    rank_sums = middle_ranks(scores)[positives].sum(0)
    return (rank_sums - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def middle_ranks(scores: Tensor) -> Tensor:
    """The ranks, from 1, in every column of scores (n, r); ties share their mean rank. (n, r), float64."""
    columns = []
    for column in scores.double().T:
        _, inverse, counts = torch.unique(column, return_inverse=True, return_counts=True)
        columns.append((counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse])
    return torch.stack(columns, 1)


def average_precision(scores: Tensor, positives: Tensor) -> float:
    """The average precision: Σ_t (R_t − R_{t−1}) P_t over the distinct scores t, descending, as in scikit-learn.

    Args:
        scores: (n,).
        positives: (n,) bool.

    Raises:
        ValueError: if there are no positives.
    """
    if not bool(positives.any()):
        raise ValueError("average precision needs positives, but none of these examples has the attribute")
    values, order = scores.double().sort(descending=True)
    hits = positives[order].double().cumsum(0)
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])  # of every group of ties
    hits, taken = hits[last], torch.arange(1, len(values) + 1, dtype=torch.float64)[last]
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=torch.float64))
    return float((gained * hits / taken).sum() / hits[-1])


def best_threshold(scores: Tensor, positives: Tensor) -> float:
    """The threshold t for "score ≥ t" with the largest difference of true and false positive rate (Youden).

    It lies half-way to the next lower score, so that it suits other examples too.

    Args:
        scores: (n,).
        positives: (n,) bool.

    Raises:
        ValueError: if there are no positives, or no negatives.
    """
    n_positive = int(positives.sum())
    if n_positive in (0, len(positives)):
        raise ValueError(
            "a threshold needs positives and negatives, but the attribute has the same value on all these examples"
        )
    values, order = scores.double().sort(descending=True)
    kept = positives[order].double().cumsum(0)
    others = torch.arange(1, len(values) + 1, dtype=torch.float64) - kept
    youden = kept / n_positive - others / (len(positives) - n_positive)
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    youden[~last] = -2
    best = int(youden.argmax())
    below = values[min(best + 1, len(values) - 1)]
    return float((values[best] + below) / 2)


def best_components(W: Tensor, values: Sequence[Hashable]) -> dict[Hashable, tuple[int, float]]:
    """{value of an attribute: (the component that ranks its examples highest, its AUROC)}.

    Args:
        W: (n, r) coefficients.
        values: n values of one attribute.

    Raises:
        ValueError: if the attribute has a single value.
    """
    best_of: dict[Hashable, tuple[int, float]] = {}
    for value in dict.fromkeys(values):
        scores = aurocs(W, torch.tensor([v == value for v in values])).tolist()
        best = max(range(len(scores)), key=scores.__getitem__)
        best_of[value] = (best, scores[best])
    return best_of


def purity(values: Sequence[Hashable]) -> tuple[Hashable, float]:
    """The most common value and its share.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("purity needs at least one value")
    value, count = Counter(values).most_common(1)[0]
    return value, count / len(values)


def agreement(W: Tensor, other: Tensor) -> float:
    """The mean |correlation| of the columns of two fits (n, r) to the same examples, matched one to one to maximise it.

    A constant column has correlation 0.

    Raises:
        ValueError: if the fits have different numbers of examples.
        ModuleNotFoundError: if scipy is not installed.
    """
    if len(W) != len(other):
        raise ValueError(f"agreement needs the same examples, but the fits have {len(W)} and {len(other)}")
    a, b = (x.double() - x.double().mean(0) for x in (W, other))
    a, b = (x / x.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny) for x in (a, b))
    correlations = (a.T @ b).abs()
    optimize = load("scipy.optimize", "matching one to one")
    rows, columns = optimize.linear_sum_assignment(correlations.numpy(), maximize=True)
    return float(correlations[rows, columns].mean())


def bootstrap_interval(values: Tensor, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean of values (n,).

    Raises:
        ValueError: if there are none.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    generator = torch.Generator().manual_seed(seed)
    means = values.double()[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, high
