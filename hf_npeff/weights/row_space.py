"""The span of a set of rows, in orthonormal coordinates: where weight changes are solved for.

A weight change that can be lifted is a combination of rows, δ = Aᵀβ with A (R × d) the unscaled rows of all examples.
With an orthonormal basis Q (d × m) of their span, Q = AᵀT for a known T (R × m),

    δ = Q y,    ⟨A_a, δ⟩ = (X y)_a  with  X = A Q (R × m),    ‖δ‖ = ‖y‖,    β = T y

so that every problem in δ becomes one in m numbers, and its solution a combination of rows. Three ways to Q:

    K = AAᵀ = UΛUᵀ            T = UΛ^(−½),  X = UΛ^½           R ≤ d: exact
    AᵀA = VΛVᵀ                Q = V,  T = A V Λ^(−1)           d < R: exact
    T' = orth([AΩ, β])        Q = orth(AᵀT')                   both are large: the leading part of the span, found with
                                                               a random Ω (Halko, Martinsson & Tropp 2011, §4.5), and
                                                               the directions Aᵀβ that are asked about, whole

Other rows B meet the same changes as ⟨B_b, δ⟩ = (B Q y)_b, whether or not they lie in the span.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.pefs.store import PEFs

EXACT_DIMENSIONS = 2048
"""Up to here the span is taken whole: its eigenproblem takes seconds on one core, and eight times that at twice."""
SUBSPACE_DIMENSIONS = 1024
"""Of the leading part. Three products with all rows find it: a hundredth of what computing the rows takes."""
_CHUNK = 128
"""Examples whose rows are read at a time: bounds the memory."""
_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-9}
"""Eigenvalues of a Gram matrix below this share of the largest are rounding; it is summed in float64 from rows of
either type, and their own rounding, squared, stays below it."""


@dataclass(frozen=True)
class RowSpace:
    """Orthonormal coordinates of the span of rows.

    Attributes:
        rows: X (n, c, m) float64, coordinates of the unscaled rows.
        combine: T (n·c, m) float64: β = T y gives δ = Q y as a combination of unscaled rows.
        basis: Q (d, m).
        scales: (d,) what rows were multiplied with before, or None.
        captured: share of the squared norm of all rows that lies in the span that is used: 1 where it is whole.
    """

    rows: Tensor
    combine: Tensor
    basis: Tensor
    scales: Tensor | None
    captured: float

    @property
    def exact(self) -> bool:
        """Whether it is the whole span."""
        return self.captured == 1

    def coordinates(self, pefs: PEFs) -> Tensor:
        """(n', c', m): what a change Q y does to the unscaled rows of other PEFs of the same sketch."""
        return torch.cat([(A @ self.basis).double() for A in unscaled_rows(pefs, self.scales, self.basis)])

    def coefficients(self, y: Tensor) -> Tensor:
        """(…, n, c): the combinations of unscaled rows that are the changes y (…, m)."""
        return (y @ self.combine.T).unflatten(-1, self.rows.shape[:2])

    def info(self) -> dict[str, Any]:
        """What is kept of it with a direction."""
        n, c, m = self.rows.shape
        return {"rows": n * c, "dimensions": m, "captured": self.captured}


def unscaled_rows(pefs: PEFs, scales: Tensor | None, like: Tensor | None = None) -> Iterator[Tensor]:
    """A (·, c, d) of some examples after the others: unit rows times √norm, times `scales`; typed and placed `like`."""
    for chunk in pefs.chunks(_CHUNK):
        dtype = torch.promote_types(chunk.dtype, torch.float32) if like is None else like.dtype
        A = chunk.factors.to(chunk.factors.device if like is None else like.device, dtype)
        A = A * chunk.norms.sqrt().to(A)[:, None, None]
        yield A if scales is None else A * scales.to(A)


def row_space(
    pefs: PEFs,
    *,
    scales: Tensor | None = None,
    inside: Tensor | None = None,
    memory_budget: int | None = None,
    device: torch.device | str | None = None,
) -> RowSpace:
    """Coordinates of the span of the rows of PEFs.

    Args:
        pefs: n examples of c rows.
        scales: (d,) what every row is multiplied with first, or None.
        inside: (b, n, c), combinations of unscaled rows that have to lie in the span also where it is not whole.
        memory_budget: bytes that may be held; None sets no bound. Less than the whole span needs leaves its leading
            part.
        device: where it is computed; by default where the rows are.

    Raises:
        ValueError: if all rows are zero, or the budget holds nothing.
    """
    R, d = len(pefs) * pefs.rank, pefs.dim
    dtype = torch.promote_types(pefs.dtype, torch.float32)
    like = torch.empty(0, dtype=dtype, device=device or pefs.device)
    small = min(R, d)
    fits = memory_budget is None or 8 * small * (3 * small + R + d) <= memory_budget
    if small <= EXACT_DIMENSIONS and fits:
        return _whole(pefs, scales, like)
    extra = 0 if inside is None else len(inside)
    m = min(SUBSPACE_DIMENSIONS, small)
    if memory_budget is not None:  # T' and X, T in float64; the basis twice
        m = min(m, memory_budget // (8 * (3 * R + 2 * d)))
    if m <= extra:
        raise ValueError(
            f"memory_budget={memory_budget} holds {m} dimensions of {R} rows of {d} numbers, too few for {extra} "
            f"directions; give at least {8 * (3 * R + 2 * d) * (extra + 64)} bytes, or fewer examples"
        )
    return _leading(pefs, scales, like, inside, m)


def _whole(pefs: PEFs, scales: Tensor | None, like: Tensor) -> RowSpace:
    """By the eigenproblem of AAᵀ, or of AᵀA where that is smaller."""
    A = torch.cat([part.flatten(0, 1) for part in unscaled_rows(pefs, scales, like)])
    wide = A.double()
    rows_fewer = len(A) <= A.shape[1]
    values, vectors = torch.linalg.eigh(wide @ wide.T if rows_fewer else wide.T @ wide)
    kept = values > values[-1] * _ROUNDING[like.dtype]
    if not bool(values[-1] > 0):
        raise ValueError("all rows are zero: the model's predictions do not depend on the analysed weights")
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    root = values.sqrt()
    if rows_fewer:
        T = vectors / root
        X, Q = vectors * root, wide.T @ T
    else:
        X, Q = wide @ vectors, vectors
        T = X / values
    return RowSpace(X.unflatten(0, (len(pefs), pefs.rank)), T, Q, scales, 1.0)


def _leading(pefs: PEFs, scales: Tensor | None, like: Tensor, inside: Tensor | None, m: int) -> RowSpace:
    """The leading m dimensions, by one round of a randomised range finder; rows pass by three times."""
    extra = 0 if inside is None else len(inside)
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(pefs.dim, m - extra, generator=generator, dtype=torch.float32).to(like)
    images, energy = [], 0.0
    for A in unscaled_rows(pefs, scales, like):
        energy += float(torch.linalg.vector_norm(A, dtype=torch.float64)) ** 2
        images.append((A @ omega).flatten(0, 1))
    if energy == 0:
        raise ValueError("all rows are zero: the model's predictions do not depend on the analysed weights")
    T = torch.cat(images)
    T = T / T.abs().max()
    if inside is not None:
        asked = inside.flatten(1).to(T).T
        T = torch.cat([asked / asked.norm(dim=0).clamp_min(torch.finfo(T.dtype).tiny), T], 1)
    T = torch.linalg.qr(T)[0]
    C = torch.zeros(pefs.dim, m).to(like)
    start = 0
    for A in unscaled_rows(pefs, scales, like):
        rows = A.flatten(0, 1)
        C += rows.T @ T[start : start + len(rows)]
        start += len(rows)
    wide = C.double()
    values, V = torch.linalg.eigh(wide.T @ wide)
    kept = values > values[-1] * _ROUNDING[torch.float32]
    mixing = V[:, kept] / values[kept].sqrt()
    Q = (wide @ mixing).to(like.dtype)
    X = torch.cat([(A @ Q).double() for A in unscaled_rows(pefs, scales, like)])
    captured = min(float(X.square().sum()) / energy, 1 - 1e-12)
    return RowSpace(X, T.double() @ mixing, Q, scales, captured)
