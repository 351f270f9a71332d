"""(M + λI) y = g for many shifts λ and several g at once, by Lanczos' method; M is only ever applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHECKED_EVERY = 10
"""Steps between looks at the residual. Chosen: at most ten steps are in vain."""
_TINY = torch.finfo(torch.float64).tiny
_ROUNDING = 1e-13
"""What is new in a step below this share of the operator's size is rounding: the space is exhausted."""


@dataclass(frozen=True)
class Krylov:
    """Orthonormal bases of Krylov spaces, one for each of b vectors g, and what the operator is in them.

    Attributes:
        basis: V (k, m, b), V₀ = g/‖g‖; zero where a space was exhausted before the others.
        diagonal: of T = VᵀMV (k, b).
        beside: next to its diagonal (k, b): what leads out of the space last.
        norms: ‖g‖ (b,).
    """

    basis: Tensor
    diagonal: Tensor
    beside: Tensor
    norms: Tensor

    def tridiagonal(self) -> Tensor:
        """T (b, k, k)."""
        T = torch.diag_embed(self.diagonal.T)
        off = self.beside[:-1].T
        return T + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)

    def inner(self, shift: float) -> Tensor:
        """(b, k): the coordinates V y of y = (M + λI)⁻¹ g within the space."""
        T = self.tridiagonal()
        start = torch.zeros_like(T[..., 0])
        start[:, 0] = self.norms
        return torch.linalg.solve(T + shift * torch.eye(T.shape[-1]).to(T), start)

    def residual(self, shift: float) -> Tensor:
        """(b,): ‖(M + λI) y − g‖ / ‖g‖, which Lanczos' recurrence gives without applying M."""
        return self.beside[-1] * self.inner(shift)[:, -1].abs() / self.norms.clamp_min(_TINY)

    def solution(self, shift: float) -> Tensor:
        """(m, b): y."""
        return torch.einsum("kmb,bk->mb", self.basis, self.inner(shift))


def lanczos(
    operator: Callable[[Tensor], Tensor],
    g: Tensor,
    *,
    steps: int,
    shift: float = 0.0,
    tolerance: float = 0.0,
) -> Krylov:
    """Krylov spaces of a symmetric positive semi-definite operator, with full reorthogonalisation.

    Args:
        operator: M on (m, b), column b for space b.
        g: (m, b) float64; a zero column has a space of zeros.
        steps: at most.
        shift: of the hardest system that is to be solved.
        tolerance: stop when its residuals are below this share of ‖g‖; 0 goes on.
    """
    norms = g.norm(dim=0)
    limit = min(steps, len(g))
    V = g.new_zeros(limit, *g.shape)
    diagonal, beside = (g.new_zeros(limit, g.shape[1]) for _ in range(2))
    V[0] = g / norms.clamp_min(_TINY)
    scale = torch.zeros_like(norms)
    for step in range(limit):
        known = V[: step + 1]
        w = operator(V[step])
        diagonal[step] = (V[step] * w).sum(0)
        for _ in range(2):  # once leaves rounding of the size of what is taken out
            w = w - torch.einsum("kmb,kb->mb", known, torch.einsum("kmb,mb->kb", known, w))
        size = w.norm(dim=0)
        scale = torch.maximum(scale, diagonal[step].abs() + size)
        size = torch.where(size > _ROUNDING * scale, size, 0.0)
        beside[step] = size
        space = Krylov(known, diagonal[: step + 1], beside[: step + 1], norms)
        exhausted = not bool((size > 0).any())
        checked = tolerance > 0 and (step + 1) % _CHECKED_EVERY == 0
        if exhausted or (checked and bool((space.residual(shift) <= tolerance).all())):
            break
        if step + 1 < limit:
            V[step + 1] = torch.where(size > 0, w / size.clamp_min(_TINY), 0.0)
    return space


def top_eigenpair(operator: Callable[[Tensor], Tensor], m: int, like: Tensor, steps: int = 64) -> tuple[float, Tensor]:
    """The largest eigenvalue of an operator on (m, 1), and its eigenvector (m,), from a random start.

    Errors shrink exponentially in the steps, the faster the wider the gaps of the spectrum; the relative error of the
    eigenvalue is 1e-12 for the spectra of PEFs.
    """
    start = torch.randn(m, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like.device)
    found = lanczos(operator, start, steps=steps)
    values, vectors = torch.linalg.eigh(found.tridiagonal()[0])
    return float(values[-1]), found.basis[:, :, 0].T @ vectors[:, -1]


def top_eigenvalue(operator: Callable[[Tensor], Tensor], m: int, like: Tensor) -> float:
    """The largest eigenvalue of an operator on (m, 1)."""
    return top_eigenpair(operator, m, like)[0]
