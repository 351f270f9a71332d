"""Solvers of the factorisation, each from one start: block_power (no learning rate) and the paper's reference.

A solver sees the rows only through the products of `Rows`. These may run over chunks of a memory map, over examples
divided among processes, or in Gram space. A solver returns W, G and the loss after every iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_npeff.config import Precision
from hf_npeff.decomposition.objective import (
    alignments,
    coordinate_descent,
    energies,
    loss_of,
    overlaps,
    pull,
    total_energy,
)

_DAMPING = (
    1e-3  # the smallest λ of a step, times the diagonal. Chosen: hardly shortens a step, and M stays well-conditioned
)
_DEPENDENT = 1e-6  # of the largest row or eigenvalue: below it, rows count as dependent on others


class Rows(Protocol):
    """The rows of n examples as a solver uses them. Sums run over all processes; W and N are this process's share."""

    n: int
    dim: int

    def total(self) -> Tensor:
        """Σ_i ‖F_i‖²."""

    def energies(self, G: Tensor) -> Tensor:
        """N (n, r)."""

    def pull(self, G: Tensor, W: Tensor) -> Tensor:
        """C (r, d)."""

    def reduce(self, value: Tensor) -> Tensor:
        """The sum of a small tensor over processes."""

    def gather(self, value: Tensor) -> Tensor:
        """Values of this process's examples (·, …) → of all n examples, in order."""

    def top_directions(self, indices: list[int]) -> Tensor:
        """The top eigenvector of F_i for every index, (len, d), unit."""

    def within(self, Q: Tensor) -> Rows:
        """The rows as coordinates in the span of orthonormal rows Q (k, d), with the `total` of the original rows.

        The loss of G (·, k) in these coordinates is therefore the loss of G Q.
        """


class DenseRows:
    """Rows held in one tensor.

    Args:
        A: (n, c, d).
        precision: the precision of the products with A; with "bfloat16", A itself is stored in bfloat16.
        total: Σ_i ‖F_i‖²; None computes it from A.
    """

    def __init__(self, A: Tensor, precision: Precision = "float32", total: Tensor | None = None):
        self.A = A.bfloat16() if precision == "bfloat16" else A
        self._total = total_energy(A) if precision == "bfloat16" and total is None else total  # before rounding
        self.tf32 = precision == "tf32"
        self.n = len(A)
        self.dim = A.shape[-1]
        self._last: tuple[Tensor, Tensor] | None = None

    def total(self) -> Tensor:
        """See `Rows`."""
        return total_energy(self.A) if self._total is None else self._total

    def _alignments(self, G: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not G:
            with _tf32(self.tf32):
                self._last = (G, alignments(self.A, G.to(self.A.dtype)).to(G.dtype))
        return self._last[1]

    def energies(self, G: Tensor) -> Tensor:
        """See `Rows`."""
        return energies(self._alignments(G))

    def pull(self, G: Tensor, W: Tensor) -> Tensor:
        """See `Rows`."""
        with _tf32(self.tf32):
            return pull(self.A, self._alignments(G), W).to(G.dtype)

    def reduce(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return value

    def top_directions(self, indices: list[int]) -> Tensor:
        """See `Rows`."""
        A = self.A[indices]
        return top_directions(A.to(torch.promote_types(A.dtype, torch.float32)))

    def within(self, Q: Tensor) -> DenseRows:
        """See `Rows`."""
        with _tf32(self.tf32):
            coordinates = alignments(self.A, Q.to(self.A.dtype)).to(Q.dtype)
        return DenseRows(coordinates, total=self.total())


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """Inside `with`, matrix products on CUDA are in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def top_directions(A: Tensor) -> Tensor:
    """The top eigenvectors of F_i = AᵀA for rows A (n, c, d): unit (n, d); zero rows give zeros."""
    _, vectors = torch.linalg.eigh((A @ A.mT).double())
    g = torch.einsum("nc,ncd->nd", vectors[..., -1].to(A.dtype), A)
    return torch.nn.functional.normalize(g, dim=1)


@dataclass
class Fit:
    """The result of one start.

    Attributes:
        W: (n, r) coefficients.
        G: (r, d) unit rows.
        losses: relative loss after the start and after every iteration.
        converged: whether it stopped before the iteration limit.
    """

    W: Tensor
    G: Tensor
    losses: list[float]
    converged: bool


Progress = Callable[[int, float], bool]
"""Called with the iteration and the relative loss; True stops the start."""


@dataclass
class _State:
    """G (r, d), W (n, r) and what follows from them: N (n, r), H (r, r), WᵀW (r, r) and the loss; and the last step."""

    G: Tensor
    N: Tensor
    H: Tensor
    W: Tensor
    WtW: Tensor
    loss: float
    step: Tensor | None = None


def _state(rows: Rows, total: Tensor, G: Tensor, W: Tensor | None, sweeps: int) -> _State:
    """The state at G, after sweeps of coordinate descent on W. If W is None, it starts from zero."""
    N, H = rows.energies(G), overlaps(G)
    return _swept(rows, total, G, N, H, torch.zeros_like(N) if W is None else W.to(N.dtype), sweeps)


def _swept(rows: Rows, total: Tensor, G: Tensor, N: Tensor, H: Tensor, W: Tensor, sweeps: int) -> _State:
    W = coordinate_descent(W, N, H, sweeps)
    WtW = rows.reduce(W.T @ W)
    gain = rows.reduce((W * N).sum(0, dtype=torch.float64).sum())
    loss = total - 2 * gain + (WtW.double() * H.double()).sum()
    return _State(G, N, H, W, WtW, float(loss / total.clamp_min(torch.finfo(torch.float64).tiny)))


def block_power(
    rows: Rows,
    G: Tensor,
    *,
    W: Tensor | None = None,
    fixed: int = 0,
    max_iterations: int,
    tolerance: float,
    patience: int = 3,
    progress: Progress | None = None,
) -> Fit:
    """Alternate a coupled power step on all g_j with a sweep of coordinate descent on W; the loss never rises.

    The gradient is 4(MG − C) with C_j = Σ_i W_ij F_i g_j and M = (WᵀW)∘(GGᵀ). For one component alone C/M is a step of
    power iteration. With several, M⁻¹C lets each step know of the others': its rows h_j are the least-squares solution
    of Σ_j W_ij g_j h_jᵀ ≈ F_i. The step is G ← normalise(G + (M + λ diag M)⁻¹ (C − MG)), at two products with the rows,
    as many as a gradient step. Where the loss rises, λ is raised and the step repeated from the same C.

    Args:
        rows: the PEFs.
        G: (r, d) unit rows to start from.
        W: coefficients to start from; None starts from zero.
        fixed: the first `fixed` rows of G do not change.
        max_iterations: the most iterations.
        tolerance: stop when `patience` iterations in a row improve the loss by less than this share of it.
        patience: see `tolerance`.
        progress: called after every iteration; it may stop the start.
    """
    total = rows.total()
    now = _state(rows, total, G, W, sweeps=2 if W is None else 1)
    losses = [now.loss]
    damping, quiet, revived = _DAMPING, 0, 0
    for iteration in range(max_iterations):
        before = now.loss
        now, damping = _step(rows, total, now, fixed, damping)
        quiet = quiet + 1 if before - now.loss <= tolerance * before else 0
        dead = _dead(now)
        dead[:fixed] = False
        # Chosen: not before coefficients have settled (a component may be empty for the first few iterations), and
        # three times, since a component that dies again has nothing left to explain.
        if bool(dead.any()) and revived < 3 and (iteration >= 5 or quiet >= patience):
            revived += 1
            alive = _revive(rows, total, now, dead)
            if alive.loss <= now.loss:
                now, quiet = alive, 0
        losses.append(now.loss)
        if (progress is not None and progress(iteration, now.loss)) or quiet >= patience:
            return Fit(now.W, now.G, losses, True)
    return Fit(now.W, now.G, losses, False)


def _dead(now: _State) -> Tensor:
    """A mask (r,) of the components whose coefficients are zero."""
    power = now.WtW.diagonal()
    return power <= 1e-12 * power.max().clamp_min(
        1e-300
    )  # these are squares: a millionth of the largest coefficients; avoids 0/0


def _step(rows: Rows, total: Tensor, now: _State, fixed: int, damping: float) -> tuple[_State, float]:
    """The next state, and the λ to begin the next step with."""
    G, WtW = now.G, now.WtW
    M = (WtW * (G @ G.T)).double()
    gradient = (rows.pull(G, now.W) - M.to(G.dtype) @ G)[fixed:].double()
    M = M[fixed:, fixed:]
    diagonal = M.diagonal()
    floor = 1e-9 * diagonal.max().clamp_min(1e-200)  # keeps M positive definite where a component is dead
    rounding = 2 * torch.finfo(G.dtype).eps  # of a relative loss, whose terms cancel
    while damping < 1e4:  # above this, G hardly moves, and the iteration changes W alone
        factor = torch.linalg.cholesky(M + torch.diag(damping * diagonal + floor))
        change = torch.cholesky_solve(gradient, factor).to(G.dtype)
        if now.step is not None:  # two components that mix may swap sides for ever; half a step meets in the middle
            # "against": at more than 120°. Chosen: a swap comes at 180°, a step that still finds its way below 90°.
            against = (change * now.step).sum(1) < -0.5 * change.norm(dim=1) * now.step.norm(dim=1)
            change = torch.where(against[:, None], 0.5 * change, change)
        stepped = torch.nn.functional.normalize(G[fixed:] + change, dim=1)
        stepped = torch.cat([G[:fixed], torch.where(_dead(now)[fixed:, None], G[fixed:], stepped)])
        after = _state(rows, total, stepped, now.W, sweeps=1)
        if after.loss <= now.loss:
            after.step = stepped[fixed:] - G[fixed:]
            return after, max(_DAMPING, 0.3 * damping)  # down slower than up: a raise costs a whole step again
        if after.loss - now.loss <= rounding:
            break
        damping = max(4 * damping, 0.3)  # as Levenberg-Marquardt; less than .3 hardly changes the step
    after = _swept(rows, total, G, now.N, now.H, now.W, sweeps=1)
    return (after if after.loss <= now.loss else now), _DAMPING


def _revive(rows: Rows, total: Tensor, now: _State, dead: Tensor) -> _State:
    """Dead components restart from the worst-explained examples. Their coefficients start at 0: the loss stays."""
    explained = 2 * (now.W * now.N).sum(1) - ((now.W @ now.H) * now.W).sum(1)
    worst, wanted = torch.argsort(rows.gather(explained), stable=True).tolist(), int(dead.sum())
    fresh = now.G[:0]
    while worst and len(fresh) < wanted:  # a zero PEF is never explained, and has no direction
        several = wanted + 64  # reading the rows once suffices, unless more than 64 of the worst are zero PEFs
        offered = rows.top_directions(worst[:several])
        exist = offered.norm(dim=1) > 0.5  # directions are unit vectors, or zero
        fresh, worst = torch.cat([fresh, offered[exist]])[:wanted], worst[several:]
    G = now.G.clone()
    G[dead.nonzero()[:, 0][: len(fresh)]] = fresh
    return _state(rows, total, G, now.W, sweeps=1)


def reference(
    rows: DenseRows,
    r: int,
    generator: torch.Generator,
    *,
    learning_rate: float,
    max_iterations: int,
    tolerance: float,
    warm_up: int = 10,
    patience: int = 3,
    progress: Progress | None = None,
) -> Fit:
    """The paper's algorithm, as a reference: multiplicative updates of W and gradient steps on G.

    W ← W ∘ N / (W H + ε);  G ← G − 4η [((WᵀW)∘(GGᵀ)) G − C]. W starts uniform in [0, 1), G normal with variance
    2/(r·d); the first `warm_up` steps move G alone. The rows of G are scaled to unit norm at the end, W absorbing it.

    Raises:
        FloatingPointError: if the loss is no longer finite, because the learning rate is too high.
    """
    device, dtype = rows.A.device, rows.A.dtype
    W = torch.rand(rows.n, r, generator=generator).to(device, dtype)
    G = (torch.randn(r, rows.dim, generator=generator) * (2 / (r * rows.dim)) ** 0.5).to(device, dtype)
    total = rows.total()
    losses: list[float] = []
    quiet = 0
    converged = False
    for iteration in range(max_iterations + warm_up):
        if iteration >= warm_up:
            N, H = rows.energies(G), overlaps(G)
            W = W * N / (W @ H + 1e-12)  # the paper's ε, against 0/0
        C = rows.pull(G, W)
        G = G - 4 * learning_rate * (((W.T @ W) * (G @ G.T)) @ G - C)
        loss = float(loss_of(total, W, rows.energies(G), overlaps(G)) / total)
        if not loss < float("inf"):
            raise FloatingPointError(
                f"the reference solver diverged at iteration {iteration}; lower learning_rate={learning_rate} "
                "(block_power has none)"
            )
        losses.append(loss)
        if progress is not None and progress(iteration, loss):
            converged = True
            break
        if iteration > warm_up:
            quiet = quiet + 1 if abs(losses[-2] - loss) <= tolerance * losses[-2] else 0
            if quiet >= patience:
                converged = True
                break
    norm = G.norm(dim=1)
    return Fit(W * norm.square(), G / norm.clamp_min(torch.finfo(dtype).tiny)[:, None], losses, converged)


def gram_space(A: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows (n, c, d) with n·c < d in at most n·c coordinates, with the same objective; and the map back for G.

    With K = AAᵀ = LLᵀ the coordinates are X = L, and a unit g with coordinates y is y L⁻¹ A. If rows are linearly
    dependent, K = UΛUᵀ gives X = UΛ^½ and y Λ^(−½)Uᵀ A, in as many coordinates as the rows span.
    """
    n, c, _ = A.shape
    flat = A.flatten(0, 1)
    K = _gram(flat)
    X, failed = torch.linalg.cholesky_ex(K)
    if failed or bool(X.diagonal().square().min() <= _DEPENDENT * K.diagonal().max()):
        values, U = torch.linalg.eigh(K)
        keep = values > _DEPENDENT * values[-1].clamp_min(1e-300)  # the relative accuracy of K
        X, back = U[:, keep] * values[keep].sqrt(), (U[:, keep] / values[keep].sqrt()).T
    else:
        back = torch.linalg.solve_triangular(X, torch.eye(n * c, dtype=X.dtype, device=X.device), upper=False)
    back = back.to(A.dtype)

    def to_rows(G: Tensor) -> Tensor:
        return torch.nn.functional.normalize((G @ back) @ flat, dim=1)

    return X.to(A.dtype).reshape(n, c, -1), to_rows


def _gram(flat: Tensor) -> Tensor:
    """AAᵀ in float64: products of 2,048 columns in the precision of A are added; only the lower half is computed."""
    K = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in flat.split(2048, dim=1):  # float32 sums of so many products, which are then added in float64
        for start in range(0, len(flat), 256):  # blocks that stay in a CPU's cache; the numbers do not depend on them
            stop = start + 256
            K[start:stop, :stop] += part[start:stop] @ part[:stop].T
    return K.tril() + K.tril(-1).T
