"""Chooses λ of selective directions by their effect on held-out examples, for many directions together.

Folds of the examples to leave alone are taken out of M, folds of the component's examples out of g = Aᵀβ, and

    score(λ) = Σ_i W_ij ‖A_i δ_(−fold i)‖² / Σ_i W_ij    over    the mean of ‖A_i δ_(−fold i)‖² over those left alone

Each direction leaves nearly all examples alone, but different ones. So all examples are divided into folds once, the
matrix without a fold is factored once, and the few examples that a direction moves are then taken out (`downdates`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.downdates import Downdates
from hf_npeff.weights.ridge import FOLDS, SELECTIVE_RIDGES, folds_of, held_out
from hf_npeff.weights.ridge_systems import gram

_EVEN = 0.5
"""Each fold needs at least this share of an equal part of the examples to leave alone. Chosen: a fold that holds out
nothing cannot judge, and one that holds out most examples leaves too few."""


def cross_validated(
    contrasts: Sequence[Contrast], coefficients: Tensor, tops: Sequence[float]
) -> list[dict[float, float]]:
    """{ridge: predicted selectivity on held-out examples} for every direction, by cross-validation over the examples.

    Args:
        contrasts: the contrast of each direction, in one space and with the same `kept`.
        coefficients: β (r, n, c) of unscaled rows.
        tops: the largest eigenvalue of each M.

    Raises:
        ValueError: if there are fewer than two examples to leave alone.
    """
    if min(contrast.number for contrast in contrasts) < 2:
        raise ValueError(
            "ridge='auto' needs to hold examples out, but there is only one to leave alone; set ridge= to a number, "
            "such as 0.01, or use more examples"
        )
    judged = [_Judged(*each) for each in zip(contrasts, coefficients, tops, strict=True)]
    groups: dict[tuple[int, ...], list[_Judged]] = {}
    for each in judged:
        groups.setdefault(tuple(each.fold_of.tolist()), []).append(each)
    total = contrasts[0].everything()
    for group in groups.values():
        for f in range(group[0].folds):
            _judge(group, f, total)
    return [each.scores() for each in judged]


def _judge(group: Sequence[_Judged], f: int, total: Tensor) -> None:
    """Add the effect on a fold of directions that were made without it, for directions that share folds.

    Args:
        group: the directions.
        f: the fold.
        total: Σ X_iᵀX_i over all examples and kept rows.
    """
    space, kept = group[0].contrast.space, group[0].contrast.kept
    kept_held = None if kept is None else gram(kept, folds_of_kept(kept, group[0].folds) == f)
    held = gram(space.rows, group[0].fold_of == f)
    left = Downdates(total - held if kept_held is None else total - held - kept_held)
    rows = left.to_eigenvectors(space.rows)
    if kept_held is not None:
        kept_held = left.to_eigenvectors(left.to_eigenvectors(kept_held).T)
    g = torch.stack([each.coefficients_without(f) for each in group]).flatten(1) @ rows.flatten(0, 1)
    for each, h in zip(group, g, strict=True):
        each.judge(f, left, rows, h, kept_held)


def partition(contrast: Contrast) -> tuple[Tensor, int]:
    """The fold (n,) of every example, −1 for none, and how many folds there are.

    All examples are divided into the same folds for all directions. If this does not divide the examples to leave alone
    evenly, these get folds of their own.
    """
    alone, kept = contrast.alone, contrast.kept
    shared = folds_of(torch.ones_like(alone), FOLDS)
    counts = torch.bincount(shared[alone], minlength=FOLDS)
    if kept is not None:
        counts = counts + torch.bincount(folds_of_kept(kept, FOLDS), minlength=FOLDS)
    if int(counts.min()) >= max(1, _EVEN * contrast.number / FOLDS):
        return shared, FOLDS
    folds = min(FOLDS, contrast.number)
    return folds_of(alone, folds), folds


def folds_of_kept(kept: Tensor, folds: int) -> Tensor:
    """(n',): the fold of every kept example."""
    return folds_of(torch.ones(len(kept), dtype=torch.bool, device=kept.device), folds)


class _Judged:
    """A direction whose ridges are judged fold by fold.

    Args:
        contrast: the examples to move and to leave alone.
        coefficients: β (n, c) of unscaled rows.
        top: the largest eigenvalue of M.

    Attributes:
        fold_of: (n,), see `partition`.
        folds: the number of folds.
    """

    def __init__(self, contrast: Contrast, coefficients: Tensor, top: float):
        self.contrast, self.top = contrast, top
        self.fold_of, self.folds = partition(contrast)
        alone = contrast.alone
        self._weights = contrast.wanted.to(contrast.space.rows) * ~alone
        moving = self._weights > 0
        out = alone[:, None] & (self.fold_of[:, None] == torch.arange(self.folds, device=alone.device))
        if int(moving.sum()) >= 2 * self.folds:  # else g itself would be another one without them
            out |= held_out(moving, self.folds)
        self._coefficients, self._out = coefficients, out
        among = moving[:, None]
        self._watched = out & among if bool((out & among).any()) else among.expand_as(out)
        self._moved, self._disturbed = torch.zeros(2, len(SELECTIVE_RIDGES), dtype=torch.float64)

    def coefficients_without(self, f: int) -> Tensor:
        """β (n, c) without the examples of a fold."""
        return self._coefficients * ~self._out[:, f, None]

    def judge(self, f: int, left: Downdates, rows: Tensor, g: Tensor, kept: Tensor | None) -> None:
        """Add the effect on a fold of directions made without it, computed in the eigenvectors of the rest.

        Args:
            f: the fold.
            left: Σ X_iᵀX_i over all examples outside the fold, and the kept rows.
            rows: X (n, c, m).
            g: (m,), without the fold.
            kept: (m, m), Σ X_iᵀX_i over the kept examples in it, or None.
        """
        alone, inside, N = self.contrast.alone, self.fold_of == f, self.contrast.number
        shifts = [share * (self.top or 1.0) * N for share in SELECTIVE_RIDGES]
        Y = left.solve(rows[~alone & ~inside].flatten(0, 1), g, shifts)
        which = self._watched[:, f]
        self._moved += (self._weights[which] @ (rows[which] @ Y).square().sum(1)).cpu()
        self._disturbed += (rows[alone & inside].flatten(0, 1) @ Y).square().sum(0).cpu()
        if kept is not None:
            self._disturbed += (Y * (kept @ Y)).sum(0).cpu()

    def scores(self) -> dict[float, float]:
        """{ridge: score}."""
        weight = float((self._weights[:, None] * self._watched).sum())
        tiny = torch.finfo(torch.float64).tiny
        scores = (self._moved / weight) / (self._disturbed / self.contrast.number).clamp_min(tiny)
        return dict(zip(SELECTIVE_RIDGES, scores.tolist(), strict=True))
