"""(B − AᵀA + λI)⁻¹ for one matrix B, many sets of rows A that are taken out of it, and many λ.

With B = VΛVᵀ, found once, D = (Λ + λI)⁻¹ and W = AV (Woodbury),

    (B − AᵀA + λI)⁻¹ = V (D + D Wᵀ (I − W D Wᵀ)⁻¹ W D) Vᵀ

so each set of rows and λ costs products with a few rows, and no factorisation of the size of B. I − W D Wᵀ is as badly
conditioned as B + λI, so for small λ, and if many rows are taken out, B − AᵀA + λI is factored instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_npeff.weights.ridge_systems import effective_rank, solve_shifted, top_eigenpair_of

_FEW = 0.5
"""Rows over the size m of B up to which products are used: of a rows they take 2a²m + a³/3 operations, the
factorisation m³/3 at half their speed, so that they are equal a little above."""
_CONDITION = 1e-8
"""λ over the largest eigenvalue of B from which products are used: I − W D Wᵀ has no smaller an eigenvalue, and float64
leaves eight digits of its inverse."""


_DIAGONAL = 1e-14
"""What a matrix has off its diagonal, over its largest entry, that is rounding of float64 in the coordinates of its own
eigenvectors: 1e-15 of rows of MiniLM and SmolLM2. Beside the smallest λ of `_CONDITION` it is 1e-6."""


class Downdates:
    """A symmetric positive semi-definite matrix from which rows are taken out, in the coordinates of its eigenvectors.

    The Gram matrix of all rows in a whole span is diagonal already (`row_space`), and its eigenvectors are not looked
    for again.

    Args:
        matrix: B (m, m) float64, the Gram matrix of all rows, including those that will be taken out.
    """

    def __init__(self, matrix: Tensor):
        diagonal = matrix.diagonal()
        off = float((matrix - torch.diag(diagonal)).abs().max())
        self._order: Tensor | None = None
        self._vectors = matrix
        if off <= _DIAGONAL * float(diagonal.abs().max()):
            values, self._order = diagonal.sort()
        else:
            values, self._vectors = torch.linalg.eigh(matrix)
        self._values = values.clamp_min(0)

    def to_eigenvectors(self, x: Tensor) -> Tensor:
        """Vᵀx for every x (…, m)."""
        return x @ self._vectors if self._order is None else x[..., self._order]

    def from_eigenvectors(self, z: Tensor) -> Tensor:
        """V z for every z (…, m)."""
        return z @ self._vectors.T if self._order is None else z[..., self._order.argsort()]

    def solve(self, W: Tensor, h: Tensor, shifts: Sequence[float]) -> Tensor:
        """Vᵀ(B − AᵀA + λI)⁻¹ g for every λ: (m, shifts).

        Args:
            W: AV (a, m).
            h: Vᵀg (m,).
            shifts: every λ > 0.
        """
        if not self._is_easy(W, min(shifts)):
            left = self._left(W)
            return torch.stack([solve_shifted(left, h, shift) for shift in shifts], 1)
        d = 1 / (self._values[:, None] + torch.tensor(shifts, dtype=torch.float64).to(h))
        z = d * h[:, None]
        if len(W):
            inside = W @ z
            for i in range(len(shifts)):
                inside[:, i] = torch.cholesky_solve(inside[:, i : i + 1], _factor(W, d[:, i]))[:, 0]
            z += d * (W.T @ inside)
        return z

    def effective_rank(self, W: Tensor, shift: float) -> float:
        """Degrees of freedom tr M(M + λI)⁻¹ of the rest, M = B − AᵀA; see `ridge_systems.effective_rank`."""
        if not self._is_easy(W, shift):
            return effective_rank(self._left(W), shift)
        d = 1 / (self._values + shift)
        trace = float(d.sum())
        if len(W):
            trace += float(torch.linalg.solve_triangular(_factor(W, d), W * d, upper=False).square().sum())
        return len(d) - shift * trace

    def top(self, W: Tensor) -> float:
        """The largest eigenvalue of B − AᵀA."""
        return top_eigenpair_of(lambda v: self._values * v - W.T @ (W @ v), self._values)[0]

    def _is_easy(self, W: Tensor, shift: float) -> bool:
        return len(W) <= _FEW * len(self._values) and shift >= _CONDITION * float(self._values[-1])

    def _left(self, W: Tensor) -> Tensor:
        """B − AᵀA."""
        return torch.diag(self._values) - W.T @ W


def _factor(W: Tensor, d: Tensor) -> Tensor:
    """The Cholesky factor of I − W D Wᵀ."""
    inside = -(W * d) @ W.T
    inside.diagonal().add_(1)
    return torch.linalg.cholesky(inside)
