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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import Ridge, check_ridge
from hf_npeff.weights.krylov import Krylov, lanczos, top_eigenpair, top_eigenvalue
from hf_npeff.weights.row_space import RowSpace

RIDGES = tuple(10 ** (-k / 2) for k in range(9))
"""Those that "auto" tries, from 1 to 1e-4."""
_FOLDS = 5
"""Parts of cross-validation, as usual (Hastie, Tibshirani & Friedman 2009, §7.10: five or ten)."""
_STEPS = 400
"""Of Lanczos' method at most; PEFs of 224 prompts need about 200 for a share of 1e-4."""
_SOLVED = 1e-9
_SCORED = 1e-4
"""Residuals of the solution and of those that are only compared: scores differ by percents."""
NONE_LEFT = (
    "no examples are left alone: what is to move is active on all of them. Give PEFs of other data as keep=, or use "
    "selective=False for a component's own direction"
)


@dataclass(frozen=True)
class Contrast:
    """What is to move and what is not, in the coordinates of a `RowSpace`.

    Attributes:
        space: of the rows that were decomposed.
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

    def operator(self, out: Tensor | None = None, kept_out: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """M on (m, b), in column b without the examples that fold b (n, b), (n', b) takes out."""
        X = self.space.rows
        c = X.shape[1]
        flat = X.flatten(0, 1)
        inside = self.alone[:, None].to(X) if out is None else (self.alone[:, None] & ~out).to(X)
        weights = inside.repeat_interleave(c, 0) / self.number
        further = None if self.kept is None else self.kept.flatten(0, 1)
        further_weights = torch.ones(1, 1).to(X) / self.number
        if self.kept is not None and kept_out is not None:
            further_weights = (~kept_out).to(X).repeat_interleave(self.kept.shape[1], 0) / self.number

        def apply(y: Tensor) -> Tensor:
            result = flat.T @ (weights * (flat @ y))
            return result if further is None else result + further.T @ (further_weights * (further @ y))

        return apply

    def top(self) -> float:
        """The largest eigenvalue of M; 0 where nothing moves the examples to be left alone."""
        rows = self.space.rows
        return top_eigenvalue(self.operator(), rows.shape[-1], rows)


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
    check_ridge(ridge)
    X = contrast.space.rows
    beta = coefficients.to(X)
    g = torch.einsum("ncm,nc->m", X, beta)
    top = contrast.top()
    scores: dict[float, float] = {}
    if isinstance(ridge, str):
        scores = cross_validated(contrast, beta, top)
        share = max(scores, key=lambda tried: scores[tried])
    else:
        share = float(ridge)
    shift = share * top if top > 0 else 1.0  # where nothing is disturbed, every λ gives g
    krylov = lanczos(contrast.operator(), g[:, None], steps=_STEPS, shift=shift, tolerance=_SOLVED)
    y = krylov.solution(shift)[:, 0]
    eigenvalues = torch.linalg.eigvalsh(krylov.tridiagonal()[0]).clamp_min(0)
    info = {
        "selective": True,
        "ridge": share,
        "effective_rank": float((eigenvalues / (eigenvalues + shift)).sum()),
        "left_alone": contrast.number,
        "cosine_with_component": float(y @ g / (y.norm() * g.norm()).clamp_min(torch.finfo(y.dtype).tiny)),
        "residual": float(krylov.residual(shift)),
        **contrast.space.info(),
    }
    if scores:
        info["cross_validated"] = scores[share]
        info["cross_validation"] = {f"{tried:.2g}": score for tried, score in scores.items()}
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
    X, kept = contrast.space.rows, contrast.kept
    active = contrast.wanted.to(X) * ~contrast.alone
    folds = min(_FOLDS, contrast.number)
    out = torch.stack([folds_of(contrast.alone, folds) == f for f in range(folds)], 1)
    if int((active > 0).sum()) >= 2 * folds:  # else g itself would be another one without them
        out |= torch.stack([folds_of(active > 0, folds) == f for f in range(folds)], 1)
    everywhere = torch.ones(0 if kept is None else len(kept), dtype=torch.bool, device=X.device)
    kept_out = torch.stack([folds_of(everywhere, folds) == f for f in range(folds)], 1)
    beta = coefficients[:, None] * (~out).to(X)[..., None]  # (n, folds, c)
    g = torch.einsum("ncm,nfc->mf", X, beta)
    smallest = min(RIDGES) * (top or 1.0)
    spaces = lanczos(contrast.operator(out, kept_out), g, steps=_STEPS, shift=smallest, tolerance=_SCORED)
    moving = (active > 0)[:, None]
    moved = _Effects(spaces, X, out & moving if bool((out & moving).any()) else moving.expand_as(out), active)
    others = [_Effects(spaces, X, out & contrast.alone[:, None])]
    if kept is not None:
        others.append(_Effects(spaces, kept, kept_out))
    scores = {}
    for share in RIDGES:
        inner = spaces.inner(share * (top or 1.0))
        disturbed = sum(effects.total(inner) for effects in others) / contrast.number
        scores[share] = moved.total(inner) / moved.weight / max(disturbed, torch.finfo(X.dtype).tiny)
    return scores


class _Effects:
    """What solutions in Krylov spaces do to rows: projected once, so that another shift costs no product with rows.

    Args:
        spaces: one a fold.
        rows: (n, c, m).
        watched: (n, folds), the examples that are looked at under the solution of every fold.
        weights: (n,) of the examples.
    """

    def __init__(self, spaces: Krylov, rows: Tensor, watched: Tensor, weights: Tensor | None = None):
        self.images, self.weights = [], []
        for f in range(watched.shape[1]):
            which = watched[:, f]
            self.images.append(rows[which] @ spaces.basis[:, :, f].T)
            self.weights.append(torch.ones(int(which.sum())).to(rows) if weights is None else weights[which])
        self.weight = sum(float(w.sum()) for w in self.weights)

    def total(self, inner: Tensor) -> float:
        """Σ w_i ‖A_i δ_f‖² of the solutions with the coordinates (f, k)."""
        effects = (image @ y for image, y in zip(self.images, inner, strict=True))
        return sum(float(w @ e.square().sum(1)) for w, e in zip(self.weights, effects, strict=True))


def folds_of(among: Tensor, folds: int) -> Tensor:
    """(n,): the fold of every example that is marked, −1 elsewhere; the same for the same examples, in any process."""
    fold_of = torch.full(among.shape, -1, dtype=torch.int64, device=among.device)
    places = among.nonzero()[:, 0]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).to(places.device)
    fold_of[places[order]] = torch.arange(len(places), device=places.device) % folds
    return fold_of


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
    check_ridge(ridge)
    X, moving = contrast.space.rows, contrast.wanted > 0
    top = contrast.top() or 1.0
    M = _dense(contrast)
    scores: dict[float, float] = {}
    if isinstance(ridge, str):
        scores = _ratios(contrast, moving, M, top)
        share = max(scores, key=lambda tried: scores[tried])
    else:
        share = float(ridge)
    value, y = _generalised(M, X[moving].flatten(0, 1), share * top, int(moving.sum()), steps=256)
    coefficients = contrast.space.coefficients(y).flatten()
    y = y * coefficients[coefficients.abs().argmax()].sign()
    info = {
        "ridge": share,
        "eigenvalue": value,
        "moved": int(moving.sum()),
        "left_alone": contrast.number,
        **contrast.space.info(),
    }
    if scores:
        info["cross_validated"] = scores[share]
        info["cross_validation"] = {f"{tried:.2g}": score for tried, score in scores.items()}
    return y, info


def _dense(contrast: Contrast) -> Tensor:
    """M (m, m)."""
    flat = contrast.space.rows[contrast.alone].flatten(0, 1)
    M = flat.T @ flat
    if contrast.kept is not None:
        further = contrast.kept.flatten(0, 1)
        M = M + further.T @ further
    return M / contrast.number


def _generalised(M: Tensor, rows: Tensor, shift: float, number: int, steps: int = 48) -> tuple[float, Tensor]:
    """The largest μ and y of (rowsᵀrows / number) y = μ (M + shift) y."""
    L = torch.linalg.cholesky(M + shift * torch.eye(len(M)).to(M))
    S = torch.linalg.solve_triangular(L, rows.T, upper=False)
    value, z = top_eigenpair(lambda v: S @ (S.T @ v) / number, len(M), M, steps)
    return value, torch.linalg.solve_triangular(L.T, z[:, None], upper=True)[:, 0]


def _ratios(contrast: Contrast, moving: Tensor, M: Tensor, top: float) -> dict[float, float]:
    """{ridge: mean effect on wanted examples over that on the others, each judged without the examples of its fold}."""
    X, kept = contrast.space.rows, contrast.kept
    folds = min(_FOLDS, int(moving.sum()), contrast.number)
    if folds < 2:
        raise ValueError(
            "ridge='auto' holds examples out of both sides, and one of them has a single example; give ridge= as a "
            "number, such as 0.01"
        )
    sides = folds_of(moving, folds), folds_of(contrast.alone, folds)
    everywhere = torch.ones(0 if kept is None else len(kept), dtype=torch.bool, device=X.device)
    further = folds_of(everywhere, folds)
    target, others = dict.fromkeys(RIDGES, 0.0), dict.fromkeys(RIDGES, 0.0)
    for f in range(folds):
        out_moving, out_alone = (side == f for side in sides)
        out = [X[out_alone]] + ([] if kept is None else [kept[further == f]])
        gone = torch.cat([rows.flatten(0, 1) for rows in out])
        left = M - gone.T @ gone / contrast.number
        rest = moving & ~out_moving
        for share in RIDGES:
            _, y = _generalised(left, X[rest].flatten(0, 1), share * top, int(rest.sum()))
            y = y / (X[rest] @ y).square().sum().sqrt()
            target[share] += float((X[out_moving] @ y).square().sum())
            others[share] += sum(float((rows @ y).square().sum()) for rows in out)
    tiny = torch.finfo(X.dtype).tiny
    return {s: (target[s] / int(moving.sum())) / max(others[s] / contrast.number, tiny) for s in RIDGES}
