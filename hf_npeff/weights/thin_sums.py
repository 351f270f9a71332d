"""Thin sums: parts of Σ_ic coef_jic δ_icᵀ x_ic, for many j at once, from which each sum is truncated to a low rank.

For a weight (out × in) there are two bases of orthonormal rows, Φ (s × out) and Ξ (s × in), the same for all sums. With
Ψ and Ω the first k rows of Φ and Ξ, these parts of each sum D_j are kept:

    X_j = D_j Ωᵀ (out × k),    Y_j = Ψ D_j (k × in),    Z_j = Φ D_j Ξᵀ  without what X_j and Y_j hold

X_j spans the columns that D_j reaches: Q = orth(X_j), P = orth(Y_jᵀ), and D_j ≈ Q C Pᵀ with C = (ΦQ)⁺ (Φ D_j Ξᵀ) (ΞP)⁺ᵀ
(Tropp, Yurtsever, Udell & Cevher 2019, Streaming low-rank matrix approximation, §2.7). Here this estimate is used only
for the unknown part; the known part is used exactly. With U = [Φᵀ, Q′] and V = [Ξᵀ, P′], where Q′ and P′ are the parts
of Q and P outside the bases,

    D_j ≈ U M Vᵀ,      M = [ Φ D_j Ξᵀ known          Φ D_j P′: rows of Ψ known, else as QCPᵀ ]
                           [ Q′ᵀD_j Ξᵀ: columns of Ω known, else as QCPᵀ          as QCPᵀ    ]

and the singular values of M (s + k) × (s + k) cut it. A weight with fewer entries than these sums is kept whole.

The pseudo-inverses amplify what of Φ D_j Ξᵀ lies outside Q and P, of which a D_j of slowly falling singular values has
much. So singular values σ of ΦQ and ΞP are inverted as σ / (σ² + λ²), with λ² in proportion to the share of ‖ΦD_jΞᵀ‖²
that is outside: 0 where D_j has no more than k directions, which then comes back whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_npeff.fisher.gradients import Receiver

_SOLVED = 0.05
"""Singular values of ΦQ below this: directions of Q that Φ hardly sees, which are left to what is known exactly. The
noise of the estimate would grow twentyfold there."""
_DAMPED = 0.7
"""λ² over the share of ‖Φ D Ξᵀ‖² outside Q and P. Measured on selective directions of 16 components of a MiniLM, rank
4, whose best cuts keep .78 of the energy: with 0 the cuts' own energy was .84, of which they explained .68, with .5
both were .71, and with 1 .65 and .70. Between the last two the reported energy is slightly too low."""
_MORE, _ROUNDS = 8, 4
"""Directions beyond the rank, and rounds, of subspace iteration (Halko, Martinsson & Tropp 2011: 5 to 10, and few)."""
_NOTHING = 1e-6
"""Singular values below this share of the largest are rounding in float32."""


@dataclass(frozen=True)
class Bases:
    """The two bases of a weight.

    Attributes:
        left: Φ (s, out).
        right: Ξ (s', in).
        thin: k, how many of their first rows are Ψ and Ω.
        probes: how many of the last rows of each were drawn at random in what the others leave out; 0 of a basis that
            is complete.
    """

    left: Tensor
    right: Tensor
    thin: int
    probes: tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """Sums of one weight, cut to a rank: D_j ≈ U diag(S) Vᵀ.

    Attributes:
        left: U (r, out, q).
        values: S (r, q), in descending order.
        right: V (r, in, q).
        energy: (r,) float64, ‖D_j‖²: exact for a weight whose sums are kept whole, otherwise estimated.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: Tensor

    def to_rank(self, rank: int) -> Cut:
        """The leading part."""
        return Cut(self.left[..., :rank], self.values[:, :rank], self.right[..., :rank], self.energy)


def is_kept_whole(shape: tuple[int, int], thin: int, size: int) -> bool:
    """Whether a weight (out, in) has no more entries than thin sums of it."""
    return shape[0] * shape[1] <= thin * (shape[0] + shape[1]) + (size - thin) ** 2


def basis_of(sample: Tensor, thin: int, size: int, probes: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Orthonormal rows: the leading directions of the columns of a sample, and random ones.

    Args:
        sample: (n, m), whose columns lie where those of the sums lie.
        thin: k, which the basis has at least.
        size: s rows, or n where that leaves fewer than k others.
        probes: how many of them are random.
        generator: draws them, and what the sample does not fill.

    Returns:
        (s, n), and the number of random rows in it.
    """
    n = len(sample)
    complete = n <= size + thin
    squared, mixing = torch.linalg.eigh(sample.double().T @ sample.double())  # half the time of an SVD
    values = squared.clamp_min(0).sqrt().flip(0)
    kept = _NOTHING * values[0].clamp_min(torch.finfo(values.dtype).tiny) < values
    U = (sample.double() @ mixing.flip(1))[:, kept] / values[kept]
    size, probes = (n, 0) if complete else (size, probes)
    leading = U[:, : size - probes]
    drawn = torch.randn(n, size - leading.shape[1], generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(torch.cat([leading, drawn], 1))[0].T
    return rows.contiguous(), probes


class SampleSums(Receiver):
    """Of one sum D: D G (out × m) and DᵀG′ (in × m), with random G and G′, for `basis_of`."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], columns: int, generator: torch.Generator):
        self._draws = {
            name: tuple(torch.randn(n, columns, generator=generator) for n in shape) for name, shape in shapes.items()
        }
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}

    def take_input(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, and x G."""
        x = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
        return x, x @ self._draw(name, 1, x)

    def take_gradient(self, name: str, saved: tuple[Tensor, Tensor], delta: Tensor) -> None:
        """Add to both."""
        x, drawn = saved
        delta = delta.flatten(0, 1).to(x.dtype)
        self.left[name] = self.left.get(name, 0) + delta.T @ drawn
        self.right[name] = self.right.get(name, 0) + x.T @ (delta @ self._draw(name, 0, x))

    def _draw(self, name: str, side: int, like: Tensor) -> Tensor:
        return self._draws[name][side].to(like)

    def of(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Both of a weight, on the CPU; zeros where no gradient came."""
        columns = self._draws[name][0].shape[1]
        parts = (self.left.get(name), self.right.get(name))
        left, right = (torch.zeros(n, columns) if p is None else p.cpu() for n, p in zip(shape, parts, strict=True))
        return left, right


class ThinSums(Receiver):
    """A receiver that adds thin sums up: every backward pass sends back one cotangent of each example of the batch.

    Args:
        places: {parameter: shape, and where and in which type its sums are kept}.
        bases: {parameter: bases}; weights without are kept whole.
        number: r, how many sums.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]],
        bases: Mapping[str, Bases],
        number: int,
    ):
        self._bases: dict[str, Bases] = {}
        self._sums: dict[str, tuple[Tensor, ...]] = {}
        for name, ((out, into), device, dtype) in places.items():
            shapes: tuple[tuple[int, int], ...] = ((out, into),)
            if name in bases:
                given = bases[name]
                left, right, k = given.left.to(device, dtype), given.right.to(device, dtype), given.thin
                self._bases[name] = Bases(left, right, k, given.probes)
                shapes = (out, k), (k, into), (len(left) - k, len(right) - k)
            self._sums[name] = tuple(torch.zeros(number, *shape, device=device, dtype=dtype) for shape in shapes)
        self._coefficients = torch.zeros(number, 0, 0)
        self._current = 0

    def begin(self, coefficients: Tensor) -> None:
        """Say what the examples of the coming batch count in every sum: (r, B, c)."""
        self._coefficients = coefficients

    def before_backward(self, number: int) -> None:
        """Cotangent `number` is sent back next."""
        self._current = number

    def take_input(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, and its coordinates x Ξᵀ."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if name not in self._bases:
            return x, x
        return x, x.to(wide) @ self._bases[name].right.to(x.device, wide).T

    def take_gradient(self, name: str, saved: tuple[Tensor, Tensor], delta: Tensor) -> None:
        """Add the products of every example, each counted as `begin` says."""
        x, inside = saved
        wide = torch.promote_types(delta.dtype, torch.float32)
        x, delta = x.to(wide), delta.to(wide)
        if name not in self._bases:
            self._add(name, 0, delta.mT @ x)
            return
        bases = self._bases[name]
        k = bases.thin
        outside = delta @ bases.left.to(delta.device, wide).T
        inside = inside.to(wide)
        self._add(name, 0, delta.mT @ inside[..., :k])
        self._add(name, 1, outside[..., :k].mT @ x)
        self._add(name, 2, outside[..., k:].mT @ inside[..., k:])

    def add_matrix(self, name: str, gradient: Tensor, coefficients: Tensor) -> None:
        """Add the gradient (out, in) of one example, which counts so much in every sum: (r,)."""
        self._coefficients, self._current = coefficients[:, None, None], 0
        if name not in self._bases:
            self._add(name, 0, gradient[None])
            return
        bases = self._bases[name]
        k = bases.thin
        gradient = gradient.to(bases.left)
        outside = bases.left @ gradient
        self._add(name, 0, (gradient @ bases.right[:k].T)[None])
        self._add(name, 1, outside[None, :k])
        self._add(name, 2, (outside[k:] @ bases.right[k:].T)[None])

    def _add(self, name: str, which: int, values: Tensor) -> None:
        """Add values (B, a, b) to one of a weight's sums (r, a, b)."""
        total = self._sums[name][which]
        counted = self._coefficients[:, :, self._current].to(total)
        flat = values.reshape(len(values), -1).to(total.device, total.dtype)
        total.view(len(total), -1).addmm_(counted, flat)

    def tensors(self) -> list[Tensor]:
        """All sums, in a fixed order: what processes add up."""
        return [tensor for sums in self._sums.values() for tensor in sums]

    def take(self, name: str, rank: int) -> Cut:
        """One weight's sums cut to a rank; they are let go.

        Source: `_known` and `_estimated` of the module's formulas.
        """
        sums = self._sums.pop(name)
        if name not in self._bases:
            (whole,) = sums
            U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
            energy = whole.double().square().sum((1, 2))
            return Cut(U, S, Vh.mT, energy).to_rank(rank)
        return _cut(self._bases.pop(name), sums[0], sums[1], sums[2], rank)


def _outside(rows: Tensor, values: Tensor) -> Tensor:
    """Orthonormal columns (r, n, q) that, with the basis `rows` (s, n), span the values (r, n, k)."""
    room = rows.shape[1] - len(rows)
    if room == 0:
        return values[..., :0]
    for _ in range(2):  # what is nearly in the basis is orthogonal to it only after a second time
        values = values - _times(rows.T, _times(rows, values))
        size = values.norm(dim=(1, 2), keepdim=True)
        values = torch.linalg.qr(values / size.clamp_min(torch.finfo(values.dtype).tiny))[0]
    return values - _times(rows.T, _times(rows, values))


def _times(matrix: Tensor, values: Tensor) -> Tensor:
    """Return matrix (a, n) @ values (r, n, k) as one product: torch would copy the matrix for every one of the r."""
    return torch.einsum("an,rnk->rak", matrix, values)


def _cut(bases: Bases, X: Tensor, Y: Tensor, rest: Tensor, rank: int) -> Cut:
    """D_j ≈ U M Vᵀ of the module's formulas, cut."""
    k, phi, xi = bases.thin, bases.left, bases.right
    Q, P = _outside(phi, X), _outside(xi, Y.mT)
    # The coordinates of X_j in [Φᵀ, Q′] and of Y_jᵀ in [Ξᵀ, P′].
    of_x = torch.cat([_times(phi, X), Q.mT @ X], 1)
    of_y = torch.cat([_times(xi, Y.mT), P.mT @ Y.mT], 1)
    s, t = len(phi), len(xi)
    M = X.new_zeros(len(X), of_x.shape[1], of_y.shape[1])
    M[:, k:s, k:t] = rest
    M[:, :s, :k] = of_x[:, :s]
    M[:, :k, :t] = of_y[:, :t].mT
    estimate = _estimate(M[:, :s, :t], of_x, of_y)
    M[:, s:] = estimate[:, s:]
    M[:, :, t:] = estimate[:, :, t:]
    M[:, s:, :k] = of_x[:, s:]
    M[:, :k, t:] = of_y[:, t:].mT
    U, S, V = _leading(M, rank)
    left = _times(phi.T, U[:, :s]) + Q @ U[:, s:]
    right = _times(xi.T, V[:, :t]) + P @ V[:, t:]
    return Cut(left, S, right, _energy(bases, M, estimate))


def _estimate(core: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """Q C Pᵀ in the bases U and V, from Φ D Ξᵀ (r, s, t) and the coordinates of X and of Yᵀ."""
    Q, P = (torch.linalg.qr(v / v.norm(dim=(1, 2), keepdim=True).clamp_min(_tiny(v)))[0] for v in (of_x, of_y))
    U, S, Uh = torch.linalg.svd(Q[:, : core.shape[1]], full_matrices=False)
    V, T, Vh = torch.linalg.svd(P[:, : core.shape[2]], full_matrices=False)
    inside = U.mT @ core @ V
    size = _squares(core).clamp_min(torch.finfo(torch.float64).tiny)
    seen = inside * (S > _SOLVED)[:, :, None] * (T > _SOLVED)[:, None]
    damping = _DAMPED * (1 - _squares(seen) / size).clamp(0, 1).to(S)[:, None]
    into, onto = (torch.where(v > _SOLVED, v / (v.square() + damping), 0.0) for v in (S, T))
    C = Uh.mT @ (into[:, :, None] * inside * onto[:, None]) @ Vh
    return Q @ C @ P.mT


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


def _energy(bases: Bases, M: Tensor, estimate: Tensor) -> Tensor:
    """(r,) float64, ‖D_j‖²: of the estimate, and of what is known to be left of it.

    ‖E + R‖² = ‖E‖² + 2⟨E, R⟩ + ‖R‖². Random rows of a basis see a share p / m of what lies in the m dimensions that its
    other rows leave out, so what they see of R counts m / p times; what X_j and Y_j hold is all there is of it.
    """
    k = bases.thin
    weights = []
    for rows, probes, size in zip((bases.left, bases.right), bases.probes, M.shape[1:], strict=True):
        counted = torch.ones(size, dtype=torch.float64, device=M.device)
        if probes:
            others = len(rows) - probes
            counted[others : len(rows)] = (rows.shape[1] - others) / probes
        weights.append(counted)
    each = weights[0][:, None] * weights[1]
    each[:k], each[:, :k] = 1, 1
    guess, left = estimate.double(), M.double() - estimate.double()
    return _squares(estimate) + ((2 * guess * left + left.square()) * each).sum((1, 2))


def _squares(values: Tensor) -> Tensor:
    return values.double().square().sum((1, 2))


def _leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (r, a, q), S (r, q), V (r, b, q), the leading q = `rank` singular triples of matrices (r, a, b)."""
    width = rank + _MORE
    if min(M.shape[1:]) <= 2 * width:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[..., :rank], S[:, :rank], Vh.mT[..., :rank]
    M = M.contiguous()
    scale = M.abs().amax((1, 2), keepdim=True).clamp_min(_tiny(M))
    unit = M / scale
    draw = torch.randn(M.shape[2], width, generator=torch.Generator().manual_seed(0)).to(M)
    basis = torch.linalg.qr(unit @ draw)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(unit @ (unit.mT @ basis))[0]
    U, S, Vh = torch.linalg.svd(basis.mT @ unit, full_matrices=False)
    return (basis @ U)[..., :rank], S[:, :rank] * scale[:, :, 0], Vh.mT[..., :rank]


class ProjectedSums(Receiver):
    """A receiver for a second pass: T_j = U_jᵀ D_j, exactly.

    Args:
        cuts: {parameter: cut}, whose U_j are measured with; weights without are passed over.
    """

    def __init__(self, cuts: Mapping[str, Cut]):
        self._left = {name: cut.left.permute(1, 0, 2).flatten(1).contiguous() for name, cut in cuts.items()}
        self._sums = {name: cut.right.new_zeros(cut.right.mT.shape) for name, cut in cuts.items()}
        self._coefficients = torch.zeros(0, 0, 0)
        self._current = 0

    def begin(self, coefficients: Tensor) -> None:
        """See `ThinSums.begin`."""
        self._coefficients = coefficients

    def before_backward(self, number: int) -> None:
        """Cotangent `number` is sent back next."""
        self._current = number

    def take_input(self, name: str, x: Tensor) -> Tensor:
        """The input, as it is."""
        return x

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add U_jᵀ δᵀ x of every example, each counted as `begin` says."""
        if name not in self._sums:
            return
        total, left = self._sums[name], self._left[name]
        r, q, _ = total.shape
        along = (delta.to(left) @ left).unflatten(-1, (r, q))
        counted = self._coefficients[:, :, self._current].to(total)
        along = along * counted.T[:, None, :, None]
        total.view(r * q, -1).addmm_(along.flatten(0, 1).flatten(1).mT, saved.to(total).flatten(0, 1))

    def add_matrix(self, name: str, gradient: Tensor, coefficients: Tensor) -> None:
        """See `ThinSums.add_matrix`."""
        if name in self._sums:
            r, q, _ = self._sums[name].shape
            along = (self._left[name].T @ gradient.to(self._left[name])).unflatten(0, (r, q))
            self._sums[name] += coefficients.to(along)[:, None, None] * along

    def tensors(self) -> list[Tensor]:
        """All sums, in a fixed order: what processes add up."""
        return list(self._sums.values())

    def take(self, name: str, cut: Cut, rank: int) -> Cut:
        """The cut again, from U_jᵀ D_j; the sums are let go."""
        if name not in self._sums:
            return cut.to_rank(rank)
        U, S, Vh = torch.linalg.svd(self._sums.pop(name), full_matrices=False)
        del self._left[name]
        return Cut(cut.left @ U, S, Vh.mT, cut.energy).to_rank(rank)
