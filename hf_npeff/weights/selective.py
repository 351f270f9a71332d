"""Selective directions: what moves a component's examples most, for what it does to the examples to be left alone.

With O the mean of the PEFs F_i to be left alone, of raw norms: to second order ½ δᵀOδ is their mean KL, in nats,

    maximise (gᵀδ)² / (δᵀOδ + λ‖δ‖²)  over δ in the span of the rows that were decomposed

With δ = Q y (row_space.py) and X = A Q this is, whatever other rows B (`keep`) are part of O,

    δᵀOδ = yᵀ M y,   M = (X_OᵀX_O + (BQ)ᵀ(BQ)) / N,     gᵀδ = (Xᵀβ)ᵀ y      ⇒      y ∝ (M + λI)⁻¹ Xᵀβ

so `keep` only needs its inner products with the rows, no backward pass. Without it M acts as O does, and
δ ∝ (O + λI)⁻¹ g is the optimum among all weight changes: every term of it lies in the span. λ → ∞ gives g. λ is given
as a share of the largest eigenvalue of M.

`ridge="auto"` takes the λ of the best predicted selectivity on examples that were held out: folds of the examples to be
left alone are taken out of M, folds of the component's examples out of g = Aᵀβ, and

    score(λ) = Σ_i W_ij ‖A_i δ_(−fold i)‖² / Σ_i W_ij    over    the mean of ‖A_i δ_(−fold i)‖² over those left alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import Ridge
from hf_npeff.weights.ridge import FOLDS, SELECTIVE_RIDGES, choose_ridge, folds_of, held_out
from hf_npeff.weights.ridge_systems import (
    effective_rank,
    fold_grams,
    gram,
    shifted,
    solve_shifted,
    top_eigenpair,
    top_eigenvalue,
)
from hf_npeff.weights.row_space import RowSpace

NONE_LEFT = (
    "no examples are left alone: what is to move is active on all of them. Give PEFs of other data as keep=, or use "
    "selective=False for a component's own direction"
)


@dataclass(frozen=True)
class Contrast:
    """What is to move and what is not, in the coordinates of a `RowSpace`.

    Attributes:
        space: the space of the rows that were decomposed.
        wanted: (n,) how much each of their examples is wanted to move: coefficients of the component, or 1 and 0.
        alone: (n,) bool, which of them are to be left alone.
        kept: (n', c', m), coordinates of further rows to be left alone, or None.
    """

    space: RowSpace
    wanted: Tensor
    alone: Tensor
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.number:
            raise ValueError(NONE_LEFT)

    @property
    def number(self) -> int:
        """N, the examples to be left alone."""
        return int(self.alone.sum()) + (0 if self.kept is None else len(self.kept))

    def disturbance(self) -> Tensor:
        """M (m, m)."""
        total = gram(self.space.rows, self.alone)
        if self.kept is not None:
            total += gram(self.kept)
        return total / self.number

    def top(self) -> float:
        """The largest eigenvalue of M; 0 where nothing moves the examples to be left alone."""
        return top_eigenvalue(self.disturbance())


def selective(contrast: Contrast, coefficients: Tensor, ridge: Ridge) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The selective direction of g = Σ_ic β_ic A_ic.

    Args:
        contrast: what is to move and what is not.
        coefficients: β (n, c) of unscaled rows.
        ridge: λ over the largest eigenvalue of M, or "auto".

    Returns:
        The direction's coefficients (n, c) of unscaled rows, its coordinates y (m,), and what is kept of it.

    Raises:
        ValueError: if `ridge` is "auto" and there are too few examples to hold some out.
    """
    X = contrast.space.rows
    beta = coefficients.to(X)
    g = torch.einsum("ncm,nc->m", X, beta)
    M = contrast.disturbance()
    top = top_eigenvalue(M)
    chosen = choose_ridge(ridge, lambda: cross_validated(contrast, beta, top))
    shift = chosen.share * top if top > 0 else 1.0  # where nothing is disturbed, every λ gives g
    y = solve_shifted(M, g, shift)
    info = {
        "selective": True,
        **chosen.info(),
        "effective_rank": effective_rank(M, shift),
        "left_alone": contrast.number,
        "cosine_with_component": float(y @ g / (y.norm() * g.norm()).clamp_min(torch.finfo(y.dtype).tiny)),
        **contrast.space.info(),
    }
    return contrast.space.coefficients(y), y, info


def cross_validated(contrast: Contrast, coefficients: Tensor, top: float) -> dict[float, float]:
    """{ridge: predicted selectivity on examples that were held out}, by folds over the examples.

    Raises:
        ValueError: if there are fewer than two examples to be left alone.
    """
    if contrast.number < 2:
        raise ValueError(
            "ridge='auto' holds examples out, and there is only one to be left alone; give ridge= as a number, such "
            "as 0.01, or more examples"
        )
    X = contrast.space.rows
    active = contrast.wanted.to(X) * ~contrast.alone
    folds = min(FOLDS, contrast.number)
    out = held_out(contrast.alone, folds)
    if int((active > 0).sum()) >= 2 * folds:  # else g itself would be another one without them
        out |= held_out(active > 0, folds)
    beta = coefficients[:, None] * (~out).to(X)[..., None]  # (n, folds, c)
    g = torch.einsum("ncm,nfc->fm", X, beta)
    grams = _held_out_grams(contrast, folds)
    M = grams.sum(0)
    moving = (active > 0)[:, None]
    watched = out & moving if bool((out & moving).any()) else moving.expand_as(out)
    weight = float((active[:, None] * watched).sum())
    solutions = [solve_shifted((M - grams) / contrast.number, g, share * (top or 1.0)) for share in SELECTIVE_RIDGES]
    moved, disturbed = torch.zeros(2, len(SELECTIVE_RIDGES), dtype=torch.float64)
    for f in range(folds):
        Y = torch.stack([y[f] for y in solutions], 1)  # (m, ridges)
        which = watched[:, f]
        moved += (active[which] @ (X[which] @ Y).square().sum(1)).cpu()
        disturbed += (Y * (grams[f] @ Y)).sum(0).cpu()
    tiny = torch.finfo(X.dtype).tiny
    scores = (moved / weight) / (disturbed / contrast.number).clamp_min(tiny)
    return dict(zip(SELECTIVE_RIDGES, scores.tolist(), strict=True))


def _held_out_grams(contrast: Contrast, folds: int) -> Tensor:
    """(folds, m, m): Σ X_iᵀX_i over the examples of each fold that are to be left alone, kept ones included."""
    grams = fold_grams(contrast.space.rows, folds_of(contrast.alone, folds), folds)
    if (kept := contrast.kept) is not None:
        everywhere = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        grams += fold_grams(kept, folds_of(everywhere, folds), folds)
    return grams


def most_different(contrast: Contrast, ridge: Ridge) -> tuple[Tensor, dict[str, Any]]:
    """What moves the wanted examples most for what it does to those to be left alone, without a component.

    The generalised eigenvector of the largest eigenvalue of T y = μ (M + λI) y, with T the mean of F_i over the wanted
    examples: with M + λI = LLᵀ it is y = L⁻ᵀ z for the top eigenvector z of L⁻¹ T L⁻ᵀ.

    Args:
        contrast: what is to move (`wanted` is 1 or 0) and what is not.
        ridge: λ over the largest eigenvalue of M, or "auto": that of the best ratio on examples that are held out.

    Returns:
        y (m,), of a sign that means nothing, and what is kept of it with the direction.

    Raises:
        ValueError: if `ridge` is "auto" and either side has fewer than two examples.
    """
    X, moving = contrast.space.rows, contrast.wanted > 0
    M = contrast.disturbance()
    top = top_eigenvalue(M) or 1.0
    chosen = choose_ridge(ridge, lambda: _ratios(contrast, moving, M, top))
    # The answer itself: far more steps than comparing needs
    value, y = _generalised(M, gram(X, moving) / int(moving.sum()), chosen.share * top, steps=256)
    coefficients = contrast.space.coefficients(y).flatten()
    y = y * coefficients[coefficients.abs().argmax()].sign()
    info = {
        **chosen.info(),
        "eigenvalue": value,
        "moved": int(moving.sum()),
        "left_alone": contrast.number,
        **contrast.space.info(),
    }
    return y, info


def _generalised(M: Tensor, T: Tensor, shift: float, steps: int = 48) -> tuple[float, Tensor]:
    """The largest μ and y of T y = μ (M + shift) y."""
    L = torch.linalg.cholesky(shifted(M, shift))
    half = torch.linalg.solve_triangular(L, T, upper=False)
    value, z = top_eigenpair(torch.linalg.solve_triangular(L, half.T, upper=False), steps)
    return value, torch.linalg.solve_triangular(L.T, z[:, None], upper=True)[:, 0]


def _ratios(contrast: Contrast, moving: Tensor, M: Tensor, top: float) -> dict[float, float]:
    """{ridge: mean effect on wanted examples over that on the others, each judged without the examples of its fold}."""
    X = contrast.space.rows
    folds = min(FOLDS, int(moving.sum()), contrast.number)
    if folds < 2:
        raise ValueError(
            "ridge='auto' holds examples out of both sides, and one of them has a single example; give ridge= as a "
            "number, such as 0.01"
        )
    fold_of = folds_of(moving, folds)
    wanted, alone = fold_grams(X, fold_of, folds), _held_out_grams(contrast, folds)
    target, others = dict.fromkeys(SELECTIVE_RIDGES, 0.0), dict.fromkeys(SELECTIVE_RIDGES, 0.0)
    for f in range(folds):
        left = M - alone[f] / contrast.number
        T = (wanted.sum(0) - wanted[f]) / int((moving & (fold_of != f)).sum())
        for share in SELECTIVE_RIDGES:
            _, y = _generalised(left, T, share * top)
            y = y / (y @ T @ y).sqrt()
            target[share] += float(y @ wanted[f] @ y)
            others[share] += float(y @ alone[f] @ y)
    tiny = torch.finfo(X.dtype).tiny
    return {s: (target[s] / int(moving.sum())) / max(others[s] / contrast.number, tiny) for s in SELECTIVE_RIDGES}
