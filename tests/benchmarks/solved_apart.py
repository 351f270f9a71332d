"""Selective directions as this library solved for them before, each by itself: what benchmarks compare with.

Every component has a Gram matrix of its own, of the examples that it leaves alone, and for a ridge that is chosen 55
factorisations of it, with folds of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.cross_validation import folds_of_kept
from hf_npeff.weights.ridge import FOLDS, SELECTIVE_RIDGES, folds_of, held_out
from hf_npeff.weights.ridge_systems import effective_rank, fold_grams, solve_shifted, top_eigenvalue


def selective(contrast: Contrast, coefficients: Tensor) -> tuple[Tensor, float]:
    """The coordinates (m,) of the selective direction of coefficients (n, c), and the ridge that was chosen."""
    X = contrast.space.rows
    beta = coefficients.to(X)
    g = torch.einsum("ncm,nc->m", X, beta)
    M = contrast.disturbance()
    top = top_eigenvalue(M)
    scores = cross_validated(contrast, beta, top)
    share = max(scores, key=lambda s: scores[s])
    effective_rank(M, share * top)
    return solve_shifted(M, g, share * top), share


def cross_validated(contrast: Contrast, coefficients: Tensor, top: float) -> dict[float, float]:
    """{ridge: predicted selectivity on examples that were held out}, by folds over the examples."""
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
        grams += fold_grams(kept, folds_of_kept(kept, folds), folds)
    return grams
