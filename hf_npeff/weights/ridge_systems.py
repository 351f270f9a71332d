"""(M + λI) y = g for several matrices M and many λ: Gram matrices of rows, by folds, and Cholesky factors of them.

Rows have m coordinates (row_space.py), a few thousand at most, and there may be a hundred thousand rows. They are
multiplied with themselves once; everything after that has the size of m. If M is the Gram matrix of all folds and M_f
that of one, the matrix without this fold is M − M_f, so cross-validation needs no second pass over the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 4096
"""Rows that are widened to float64 and multiplied at a time: bounds the memory."""
_STEPS = 64
"""The most steps of Lanczos' method for the largest eigenvalue: its error shrinks exponentially with them, and is 1e-12
for the spectra of PEFs."""
_CHECKED = 8
"""Steps between checks whether the eigenvalue still changes. Chosen: a check costs as much as a step."""
_ROUNDING = 1e-13
"""If the new part of a step is below this share of the operator's size, it is rounding, and the space is exhausted."""


def fold_grams(rows: Tensor, fold_of: Tensor, folds: int) -> Tensor:
    """Σ_{i in f} X_iᵀX_i for every fold f: (folds, m, m) float64.

    Args:
        rows: X (n, c, m).
        fold_of: (n,) the fold of every example; −1 if it is in none.
        folds: the number of folds.
    """
    m = rows.shape[-1]
    grams = torch.zeros(folds, m, m, dtype=torch.float64, device=rows.device)
    size = max(1, _ROWS // rows.shape[1])
    for f in range(folds):
        for some in (fold_of == f).nonzero()[:, 0].split(size):
            flat = rows[some].flatten(0, 1).double()
            grams[f] += flat.T @ flat
    return grams


def gram(rows: Tensor, which: Tensor | None = None) -> Tensor:
    """Σ X_iᵀX_i (m, m) float64 over the examples that are marked (n,), or all."""
    marked = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if which is None else which
    return fold_grams(rows, marked.long() - 1, 1)[0]


def solve_shifted(M: Tensor, g: Tensor, shift: float) -> Tensor:
    """Solutions (M + λI)⁻¹ g for symmetric positive semi-definite M (…, m, m), g (…, m) and λ > 0."""
    L = torch.linalg.cholesky(shifted(M, shift))
    return torch.cholesky_solve(g[..., None], L)[..., 0]


def shifted(M: Tensor, shift: float) -> Tensor:
    """Return M + λI."""
    moved = M.clone()
    moved.diagonal(dim1=-2, dim2=-1).add_(shift)
    return moved


def effective_rank(M: Tensor, shift: float) -> float:
    """Degrees of freedom tr M(M + λI)⁻¹ = m − λ‖L⁻¹‖², with LLᵀ = M + λI (Hastie et al. 2009, §7.6)."""
    L = torch.linalg.cholesky(shifted(M, shift))
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(M)).to(M), upper=False)
    return len(M) - shift * float(inverse.square().sum())


def top_eigenpair(M: Tensor, steps: int = _STEPS) -> tuple[float, Tensor]:
    """The largest eigenvalue of a symmetric matrix and its eigenvector (m,), by Lanczos' method from a random start."""
    return top_eigenpair_of(M.__matmul__, M[0], steps)


def top_eigenpair_of(times: Callable[[Tensor], Tensor], like: Tensor, steps: int = _STEPS) -> tuple[float, Tensor]:
    """The same for a matrix given by its products with vectors (m,), with the dtype and device of `like` (m,)."""
    m = len(like)
    v = torch.randn(m, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    steps = min(steps, m)
    V, diagonal, beside = v.new_empty(steps + 1, m), [], []
    V[0] = v / v.norm()
    scale, value = 0.0, 0.0
    for k in range(steps):
        w = times(V[k])
        diagonal.append(float(w @ V[k]))
        known = V[: k + 1]
        for _ in range(2):  # doing it once would leave rounding of the size of the subtracted part
            w = w - known.T @ (known @ w)
        size = float(w.norm())
        scale = max(scale, abs(diagonal[-1]) + size)
        if size <= _ROUNDING * scale:
            break
        beside.append(size)
        V[k + 1] = w / size
        if k % _CHECKED == _CHECKED - 1:
            last, value = value, float(_tridiagonal(diagonal, beside[:k])[0][-1])
            if abs(value - last) <= _ROUNDING * value:
                break
    k = len(diagonal)
    values, vectors = _tridiagonal(diagonal, beside[: k - 1])
    return float(values[-1]), V[:k].T @ vectors[:, -1].to(like)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric tridiagonal matrix."""
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.linalg.eigh(
        torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    )


def top_eigenvalue(M: Tensor) -> float:
    """The largest eigenvalue of a symmetric matrix."""
    return top_eigenpair(M)[0]
