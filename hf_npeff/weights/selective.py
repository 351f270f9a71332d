"""Selective directions: the largest effect on a component's examples for a given effect on the examples to leave alone.

Let O be the mean of the PEFs F_i to leave alone, with raw norms. To second order, ½ δᵀOδ is their mean KL, in nats:

    maximise (gᵀδ)² / (δᵀOδ + λ‖δ‖²)  over δ in the span of the rows that were decomposed

With δ = Q y (row_space.py) and X = A Q this is, whatever other rows B (`keep`) are part of O,

    δᵀOδ = yᵀ M y,   M = (X_OᵀX_O + (BQ)ᵀ(BQ)) / N,     gᵀδ = (Xᵀβ)ᵀ y      ⇒      y ∝ (M + λI)⁻¹ Xᵀβ

so `keep` only needs its inner products with the rows, and no backward pass. Without it M acts like O, and
δ ∝ (O + λI)⁻¹ g is the optimum among all weight changes, because every term of it lies in the span. λ → ∞ gives g. λ is
given as a share of the largest eigenvalue of M.

`ridge="auto"` chooses the λ with the best predicted selectivity on held-out examples (cross_validation.py). The matrix
of all examples is factored once for all components, and the few examples that one moves are taken out (downdates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import Ridge
from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.cross_validation import cross_validated, folds_of_kept
from hf_npeff.weights.downdates import Downdates
from hf_npeff.weights.ridge import FOLDS, SELECTIVE_RIDGES, choose_ridge, folds_of
from hf_npeff.weights.ridge_systems import fold_grams, gram, shifted, top_eigenpair, top_eigenvalue


def selective(contrast: Contrast, coefficients: Tensor, ridge: Ridge) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`selective_together` for one direction, of coefficients (n, c)."""
    return selective_together([contrast], coefficients[None], ridge)[0]


def selective_together(
    contrasts: Sequence[Contrast], coefficients: Tensor, ridge: Ridge
) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """The selective directions of several g_j = Σ_ic β_jic A_ic.

    Args:
        contrasts: the examples that each direction moves and leaves alone, in one space and with the same `kept`.
        coefficients: β (r, n, c) of unscaled rows.
        ridge: λ over the largest eigenvalue of each M, or "auto".

    Returns:
        For each direction its coefficients (n, c) of unscaled rows, its coordinates y (m,), and entries for `info`.

    Raises:
        ValueError: if `ridge` is "auto" and there are too few examples to hold some out.
    """
    space = contrasts[0].space
    beta = coefficients.to(space.rows)
    whole = Downdates(contrasts[0].everything())
    rows = whole.to_eigenvectors(space.rows)
    others = [rows[~contrast.alone].flatten(0, 1) for contrast in contrasts]
    tops = [whole.top(W) / contrast.number for W, contrast in zip(others, contrasts, strict=True)]
    judged = cross_validated(contrasts, beta, tops) if ridge == "auto" else []
    made = []
    for j, (contrast, W, top) in enumerate(zip(contrasts, others, tops, strict=True)):
        chosen = choose_ridge(ridge, partial(judged.__getitem__, j))
        g = beta[j].flatten() @ rows.flatten(
            0, 1
        )  # separately, so that the result does not depend on the other directions, bit for bit
        N = contrast.number
        shift = N * chosen.share * top if top > 0 else 1.0  # if nothing is disturbed, every λ gives g
        y = N * whole.solve(W, g, [shift])[:, 0]
        info = {
            "selective": True,
            **chosen.info(),
            "effective_rank": whole.effective_rank(W, shift),
            "left_alone": N,
            "cosine_with_component": float(y @ g / (y.norm() * g.norm()).clamp_min(torch.finfo(y.dtype).tiny)),
            **space.info(),
        }
        y = whole.from_eigenvectors(y)
        made.append((space.coefficients(y), y, info))
    return made


def _held_out_grams(contrast: Contrast, folds: int) -> Tensor:
    """(folds, m, m): Σ X_iᵀX_i over the examples of each fold to leave alone, including kept ones."""
    grams = fold_grams(contrast.space.rows, folds_of(contrast.alone, folds), folds)
    if (kept := contrast.kept) is not None:
        grams += fold_grams(kept, folds_of_kept(kept, folds), folds)
    return grams


def most_different(contrast: Contrast, ridge: Ridge) -> tuple[Tensor, dict[str, Any]]:
    """The largest effect on the wanted examples for a given effect on those to leave alone, without a component.

    The generalised eigenvector of the largest eigenvalue of T y = μ (M + λI) y, with T the mean of F_i over the wanted
    examples: with M + λI = LLᵀ it is y = L⁻ᵀ z for the top eigenvector z of L⁻¹ T L⁻ᵀ.

    Args:
        contrast: the examples to move (`wanted` is 1 or 0) and to leave alone.
        ridge: λ over the largest eigenvalue of M, or "auto", which chooses the best ratio on held-out examples.

    Returns:
        y (m,), whose sign has no meaning, and entries for the direction's `info`.

    Raises:
        ValueError: if `ridge` is "auto" and either side has fewer than two examples.
    """
    X, moving = contrast.space.rows, contrast.wanted > 0
    M = contrast.disturbance()
    top = top_eigenvalue(M) or 1.0
    chosen = choose_ridge(ridge, lambda: _ratios(contrast, moving, M, top))
    # for the result itself, far more steps than comparing needs
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
    """{ridge: mean effect on wanted examples over that on the others, on held-out folds}."""
    X = contrast.space.rows
    folds = min(FOLDS, int(moving.sum()), contrast.number)
    if folds < 2:
        raise ValueError(
            "ridge='auto' needs to hold examples out of both sets, but one of them has a single example; set ridge= to "
            "a number, such as 0.01"
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
