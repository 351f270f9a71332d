"""The span of a set of rows, in orthonormal coordinates, in which weight changes are solved for.

A weight change that can be lifted is a combination of rows, δ = Aᵀβ with A (R × d) the unscaled rows of all examples.
With an orthonormal basis Q (d × m) of their span, Q = AᵀT for a known T (R × m),

    δ = Q y,    ⟨A_a, δ⟩ = (X y)_a  with  X = A Q (R × m),    ‖δ‖ = ‖y‖,    β = T y

so that every problem in δ becomes one in m numbers, and its solution a combination of rows. Three ways to Q:

    K = AAᵀ = UΛUᵀ            X = UΛ^½,  T = XΛ^(−1)           R ≤ d: exact, and Q itself is hardly ever needed
    AᵀA = VΛVᵀ                Q = V,  X = A V,  T = XΛ^(−1)    d < R: exact
    T' = orth(A_S Ω)          Q = orth([Aᵀβ, A_Sᵀ T'])         both are large: the leading part of the span, found with
                                                               a random Ω (Halko, Martinsson & Tropp 2011, §4.5) from
                                                               a sample S of the rows, drawn with probabilities of
                                                               their squared norms (Frieze, Kannan & Vempala 2004),
                                                               and the directions Aᵀβ that are asked about, whole

In the last case all rows take part in only one product, X = A Q. For other rows B, ⟨B_b, δ⟩ = (B Q y)_b, whether or not
they lie in the span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.ridge_systems import gram

EXACT_DIMENSIONS = 2048
"""Up to this dimension the whole span is used: its eigenproblem takes three seconds of a core, and eight times that for
twice the size."""
SUBSPACE_DIMENSIONS = 1024
"""The dimensions of the leading part: twice as many would double the time of the product with all rows, which
dominates."""
SAMPLED_ROWS = 4
"""The number of sampled rows for each dimension of the leading part. Measured on 924 rows of SmolLM2 in 128 dimensions:
2, 4 and 6 capture .628, .641 and .638 of the squared norm, all rows .638, and the best possible subspace .716."""
_CHUNK = 128
"""Examples whose rows are read at a time: bounds the memory."""
_COLUMNS = 2048
"""Rows that are widened to float64 at a time, for the same reason."""
_BLOCK = 256
"""Columns of a Gram matrix that are computed together. Chosen: one product is still large beside starting it."""
_SQUARES = 16
"""The most matrices (m, m) in memory while the span is found and used for solving: those of five folds, and their
factors."""
_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-9}
"""Eigenvalues of a Gram matrix below this share of the largest are rounding; it is summed in float64 from rows of
either type, and their own rounding, squared, stays below it."""


@dataclass(frozen=True)
class RowSpace:
    """Orthonormal coordinates of the span of rows.

    Attributes:
        rows: X (n, c, m) float64, coordinates of the unscaled rows.
        combine: y (…, m) → β (…, n·c): δ = Q y as a combination of unscaled rows.
        make_basis: makes Q.
        scales: (d,) factors of the columns of rows, or None.
        captured: share of the squared norm of all rows in the part of the span that is used: 1 for the whole span.
    """

    rows: Tensor
    combine: Callable[[Tensor], Tensor]
    make_basis: Callable[[], Tensor]
    scales: Tensor | None
    captured: float

    @property
    def exact(self) -> bool:
        """Whether it is the whole span."""
        return self.captured == 1

    @cached_property
    def basis(self) -> Tensor:
        """Q (d, m)."""
        return self.make_basis()

    @cached_property
    def gram(self) -> Tensor:
        """XᵀX (m, m) of all rows."""
        return gram(self.rows)

    def coordinates(self, pefs: PEFs) -> Tensor:
        """The coordinates (n', c', m) of the unscaled rows of other PEFs with the same sketch."""
        return torch.cat([(A @ self.basis).double() for A in unscaled_rows(pefs, self.scales, self.basis)])

    def coefficients(self, y: Tensor) -> Tensor:
        """(…, n, c): the combinations of unscaled rows that are the changes y (…, m)."""
        return self.combine(y).unflatten(-1, self.rows.shape[:2])

    def info(self) -> dict[str, Any]:
        """What is kept of it with a direction."""
        n, c, m = self.rows.shape
        return {"rows": n * c, "dimensions": m, "captured": self.captured}


def unscaled_rows(pefs: PEFs, scales: Tensor | None, like: Tensor | None = None) -> Iterator[Tensor]:
    """A (·, c, d) of some examples: unit rows times √norm, times `scales`, with dtype and device of `like`."""
    for chunk in pefs.chunks(_CHUNK):
        dtype = torch.promote_types(chunk.dtype, torch.float32) if like is None else like.dtype
        A = chunk.factors.to(chunk.factors.device if like is None else like.device, dtype)
        A = A * chunk.norms.sqrt().to(A)[:, None, None]
        yield A if scales is None else A * scales.to(A)


def combined_rows(pefs: PEFs, coefficients: Tensor, scales: Tensor | None, like: Tensor) -> Tensor:
    """Σ_ic β_bic A_ic (b, d), for combinations (b, n, c) of unscaled rows; summed in float64."""
    total = torch.zeros(len(coefficients), pefs.dim, dtype=torch.float64, device=like.device)
    start = 0
    for A in unscaled_rows(pefs, scales, like):
        total += coefficients[:, start : start + len(A)].to(A).flatten(1) @ A.flatten(0, 1)
        start += len(A)
    return total


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
        scales: (d,) factors of the columns of rows, or None.
        inside: (b, n, c), combinations of unscaled rows that have to be in the span, even if only a part of it is used.
        memory_budget: bytes that may be used, here and in solving; None sets no limit. If the whole span needs more,
            only its leading part is used.
        device: the device for the computation; by default that of the rows.

    Raises:
        ValueError: if all rows are zero, or the budget is too small.
    """
    R, d = len(pefs) * pefs.rank, pefs.dim
    dtype = torch.promote_types(pefs.dtype, torch.float32)
    like = torch.empty(0, dtype=dtype, device=device or pefs.device)
    small = min(R, d)
    fits = memory_budget is None or bytes_needed(small, R, d) <= memory_budget
    if small <= EXACT_DIMENSIONS and fits:
        return _whole(pefs, scales, like)
    extra = 0 if inside is None else len(inside)
    m = min(SUBSPACE_DIMENSIONS, small)
    if memory_budget is not None:
        while m > 0 and bytes_needed(m, R, d) > memory_budget:
            m -= 1
    if m <= extra:
        raise ValueError(
            f"memory_budget={memory_budget} holds {m} dimensions of {R} rows of {d} numbers, too few for {extra} "
            f"directions; set it to at least {bytes_needed(extra + 64, R, d)} bytes, or fewer examples"
        )
    return _leading(pefs, scales, like, inside, m)


def bytes_needed(m: int, R: int, d: int) -> int:
    """Bytes of m dimensions of R rows of d numbers: X, turned too, the basis and its source, and matrices (m, m)."""
    return 8 * m * (2 * R + 2 * d + _SQUARES * m)


def _whole(pefs: PEFs, scales: Tensor | None, like: Tensor) -> RowSpace:
    """By the eigenproblem of AAᵀ, or of AᵀA where that is smaller."""
    A = torch.cat([part.flatten(0, 1) for part in unscaled_rows(pefs, scales, like)])
    rows_fewer = len(A) <= A.shape[1]
    values, vectors = torch.linalg.eigh(_gram(A if rows_fewer else A.T))
    kept = values > values[-1] * _ROUNDING[like.dtype]
    if not bool(values[-1] > 0):
        raise ValueError("all rows are zero: the model's predictions do not depend on the analysed weights")
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    X = vectors * values.sqrt() if rows_fewer else A.double() @ vectors

    def combine(y: Tensor) -> Tensor:
        return (y / values) @ X.T

    def make_basis() -> Tensor:
        return A.T.double() @ (X / values) if rows_fewer else vectors

    return RowSpace(X.unflatten(0, (len(pefs), pefs.rank)), combine, make_basis, scales, 1.0)


def _gram(A: Tensor) -> Tensor:
    """AAᵀ, summed in float64; what lies above its diagonal is not computed twice."""
    total = torch.zeros(len(A), len(A), dtype=torch.float64, device=A.device)
    for columns in A.split(_COLUMNS, 1):
        wide = columns.double()
        for start in range(0, len(A), _BLOCK):
            rows = slice(start, start + _BLOCK)
            total[start:, rows] += wide[start:] @ wide[rows].T
    return total.tril() + total.tril(-1).T


def _leading(pefs: PEFs, scales: Tensor | None, like: Tensor, inside: Tensor | None, m: int) -> RowSpace:
    """The leading m dimensions, from a sample of the rows; all rows are read three times, once for a product."""
    extra = 0 if inside is None else len(inside)
    sizes = torch.cat([A.square().sum(-1, dtype=torch.float64).cpu() for A in unscaled_rows(pefs, scales, like)])
    energy = float(sizes.sum())
    if energy == 0:
        raise ValueError("all rows are zero: the model's predictions do not depend on the analysed weights")
    sampled = _sample(sizes.flatten(), SAMPLED_ROWS * m).unflatten(0, sizes.shape)
    shorten = _Shortening(pefs.dim, m - extra, like)
    T = torch.linalg.qr(torch.cat([shorten(A) for A in _chosen(pefs, scales, like, sampled)]))[0]
    C = torch.zeros(m - extra, pefs.dim).to(like)
    start = 0
    for A in _chosen(pefs, scales, like, sampled):
        C += T[start : start + len(A)].T @ A
        start += len(A)
    lengths = torch.ones(extra, dtype=torch.float64)
    if inside is not None:
        asked = combined_rows(pefs, inside, scales, like)
        lengths = asked.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny) / C.norm(dim=1).max().double()
        C = torch.cat([(asked / lengths[:, None]).to(C), C])
    values, V = torch.linalg.eigh(_gram(C))
    kept = values > values[-1] * _ROUNDING[torch.float32]
    mixing = V[:, kept] / values[kept].sqrt()
    Q = torch.cat([columns.T.double() @ mixing for columns in C.split(_COLUMNS, 1)]).to(like.dtype)
    X = torch.cat([(A @ Q).double() for A in unscaled_rows(pefs, scales, like)])
    captured = min(float(X.square().sum()) / energy, 1 - 1e-12)  # not 1, which would mean that nothing was left out
    places = sampled.flatten().nonzero()[:, 0].to(like.device)
    wide = T.double()

    def combine(y: Tensor) -> Tensor:
        z = y @ mixing.T
        beta = z.new_zeros(*z.shape[:-1], len(pefs) * pefs.rank)
        beta[..., places] = z[..., extra:] @ wide.T
        return beta if inside is None else beta + (z[..., :extra] / lengths) @ inside.flatten(1).to(z)

    return RowSpace(X, combine, lambda: Q, scales, captured)


def _sample(sizes: Tensor, number: int) -> Tensor:
    """(R,) bool: a sample of different rows, drawn with probabilities of their sizes; all if there are no more."""
    number = min(number, int((sizes > 0).sum()))
    chosen = torch.multinomial(sizes, number, generator=torch.Generator().manual_seed(0))
    return torch.zeros(len(sizes), dtype=torch.bool).index_fill_(0, chosen, True)


def _chosen(pefs: PEFs, scales: Tensor | None, like: Tensor, which: Tensor) -> Iterator[Tensor]:
    """Some rows (·, d), those that are marked (n, c), chunk by chunk."""
    for A, mine in zip(unscaled_rows(pefs, scales, like), which.split(_CHUNK), strict=True):
        yield A[mine.to(A.device)]


class _Shortening:
    """AΩ (·, k) for a random Ω (d, k) with one ±1 in each row: needs no product, and is as good as a Gaussian Ω.

    Args:
        d: the length of a row.
        k: the length after shortening.
        like: a tensor with the device and dtype to use.
    """

    def __init__(self, d: int, k: int, like: Tensor):
        generator = torch.Generator().manual_seed(0)
        self.k, self.missing = k, -d % k
        self.order = torch.randperm(d, generator=generator).to(like.device)
        self.signs = (torch.randint(2, (d,), generator=generator) * 2 - 1).to(like)

    def __call__(self, A: Tensor) -> Tensor:
        mixed = torch.nn.functional.pad((A * self.signs)[:, self.order], (0, self.missing))
        return mixed.unflatten(1, (-1, self.k)).sum(1)
