"""λ of a ridge regression in the space of the rows: given as a share, or chosen by cross-validation over folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import Ridge, check_ridge

RIDGES = tuple(10 ** (-k / 2) for k in range(9))
"""The shares that "auto" tries, from 1 to 1e-4."""
SELECTIVE_RIDGES = tuple(10 ** (-k / 2) for k in range(11))
"""The shares for selective directions, down to 1e-5. Measured for one component of the demo: the choice has 91% of the
best selectivity on held-out prompts with shares down to 1e-4, 97% with these, and smaller ones gain nothing."""
FOLDS = 5
"""The number of folds for cross-validation, as usual (Hastie, Tibshirani & Friedman 2009, §7.10: five or ten)."""


@dataclass(frozen=True)
class ChosenRidge:
    """λ as a share of the largest eigenvalue, and how it was chosen.

    Attributes:
        share: λ over the largest eigenvalue.
        judged: {share: its error or score on held-out examples}; empty if λ was given.
    """

    share: float
    judged: Mapping[float, float]

    def info(self) -> dict[str, Any]:
        """The entries for a direction's `info`."""
        if not self.judged:
            return {"ridge": self.share}
        judged = {f"{share:.2g}": value for share, value in self.judged.items()}
        return {"ridge": self.share, "cross_validated": self.judged[self.share], "cross_validation": judged}


def choose_ridge(
    ridge: Ridge, judge: Callable[[], Mapping[float, float]], best: Callable[..., float] = max
) -> ChosenRidge:
    """The given share, or the best one on held-out examples.

    Args:
        ridge: a share of the largest eigenvalue, or "auto".
        judge: computes {share: error or score on held-out examples}; called only for "auto".
        best: `max` for scores, `min` for errors.

    Raises:
        ValueError: if the ridge is neither "auto" nor a positive number, or if `judge` raises it.
    """
    check_ridge(ridge)
    if not isinstance(ridge, str):
        return ChosenRidge(float(ridge), {})
    judged = judge()
    return ChosenRidge(best(judged, key=lambda share: judged[share]), judged)


def folds_of(among: Tensor, folds: int) -> Tensor:
    """(n,): the fold of every marked example, −1 for others; the same for the same examples, in any process."""
    fold_of = torch.full(among.shape, -1, dtype=torch.int64, device=among.device)
    places = among.nonzero()[:, 0]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).to(places.device)
    fold_of[places[order]] = torch.arange(len(places), device=places.device) % folds
    return fold_of


def held_out(among: Tensor, folds: int) -> Tensor:
    """(n, folds) bool: the marked examples that each fold holds out."""
    return folds_of(among, folds)[:, None] == torch.arange(folds, device=among.device)
