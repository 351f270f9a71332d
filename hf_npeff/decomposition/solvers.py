"""Solvers of the factorisation, each from one start: block_power (no learning rate) and the paper's reference.

A solver sees the rows only through `Rows`: three products, which may run over chunks of a memory map, over examples
sharded between processes, or in Gram space. What it returns is (W, G) and the loss after every iteration.
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


class Rows(Protocol):
    """The rows of n examples as a solver uses them; sums run over all processes, W and N are this process's share."""

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


class DenseRows:
    """Rows held in one tensor.

    Args:
        A: (n, c, d).
        precision: of the products with A; in "bfloat16" A itself is kept so.
    """

    def __init__(self, A: Tensor, precision: Precision = "float32"):
        self.A = A.bfloat16() if precision == "bfloat16" else A
        self._total = total_energy(A) if precision == "bfloat16" else None  # before rounding
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


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """Matrix products on CUDA in TF32 while this lasts."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def top_directions(A: Tensor) -> Tensor:
    """The top eigenvectors of F_i = AᵀA for factors A (n, c, d): unit (n, d); zero rows give zeros."""
    _, vectors = torch.linalg.eigh((A @ A.mT).double())
    g = torch.einsum("nc,ncd->nd", vectors[..., -1].to(A.dtype), A)
    return torch.nn.functional.normalize(g, dim=1)


@dataclass
class Fit:
    """One start's end.

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


def start_from_examples(rows: Rows, r: int, generator: torch.Generator) -> Tensor:
    """k-means++ over PEFs: top eigenvectors of examples, drawn in proportion to what no chosen direction explains."""
    first = int(torch.randint(rows.n, (1,), generator=generator))
    chosen = [first]
    G = rows.top_directions([first])
    covered = rows.gather(rows.energies(G)[:, 0])
    while len(chosen) < r:
        left = (1 - covered).clamp_min(0).double().cpu() + 1e-9
        left[chosen] = 0
        if not bool((left > 0).any()):
            left = torch.ones_like(left)
        # Many components are drawn a few at a time: every draw reads all rows once.
        several = min(max(1, r // 16), r - len(chosen), int((left > 0).sum()))
        drawn = torch.multinomial(left, several, generator=generator).tolist()
        chosen += drawn
        g = rows.top_directions(drawn)
        G = torch.cat([G, g])
        covered = torch.maximum(covered, rows.gather(rows.energies(g).amax(1)))
    empty = G.norm(dim=1) < 0.5  # a zero PEF has no direction
    empty |= ((G @ G.T).abs() > 1 - 1e-6).tril(-1).any(1)  # copies of an example: equal components would stay equal
    if bool(empty.any()):
        noise = torch.randn(G.shape, generator=generator).to(G.device, G.dtype)
        G[empty] = torch.nn.functional.normalize(noise, dim=1)[empty]
    return G


def start_from_surplus(
    rows: Rows, r: int, generator: torch.Generator, *, max_iterations: int = 5
) -> tuple[Tensor, Tensor | None]:
    """G (r, d) and W to start from: twice as many components take a few iterations, and then the least needed go.

    A direct start can leave two of r components on one true direction, and another without any, in an optimum that no
    small step leaves; with more of them, every direction finds one, and those that double it are cheap to lose
    (docs/decisions/2026-11-23-solver-experiments.md).
    """
    more = min(2 * r, rows.n)
    G = start_from_examples(rows, max(r, more), generator)
    if more <= r:
        return G, None
    fit = block_power(rows, G, max_iterations=max_iterations, tolerance=1e-3)
    N, H, W = rows.energies(fit.G), overlaps(fit.G), fit.W
    kept = torch.arange(more, device=W.device)
    while len(kept) > r:
        going = _least_needed(rows, W, H, count=-(-(len(kept) - r) // 2))
        kept, N, H = kept[~going], N[:, ~going], H[~going][:, ~going]
        W = coordinate_descent(W[:, ~going], N, H, 1)
    return fit.G[kept], W


def _least_needed(rows: Rows, W: Tensor, H: Tensor, count: int) -> Tensor:
    """A mask (r,) of at most `count` components whose loss costs least, ‖W_j‖² (1 − max_l H_jl), but no two twins."""
    others = H - torch.diag(H.diagonal())
    nearest = others.argmax(1).tolist()
    costs = rows.reduce(W.square().sum(0)) * (1 - others.amax(1))
    going: set[int] = set()
    spared: set[int] = set()
    for j in torch.argsort(costs, stable=True).tolist():
        if len(going) < count and j not in spared:
            going.add(j)
            spared.add(nearest[j])
    mask = torch.zeros(len(H), dtype=torch.bool, device=H.device)
    mask[list(going)] = True
    return mask


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
    """Alternate a sweep of coordinate descent on W with one shifted power step on every g_j; the loss never rises.

    With the others fixed, the best g_j is the top eigenvector of R_j = Σ_i W_ij F_i − Σ_{l≠j} (WᵀW)_jl g_l g_lᵀ, and
    g_j ← normalise(R_j g_j + s (WᵀW)_jj g_j) is one step of power iteration towards it. All steps are taken at once,
    which can raise the loss; then the shift s is raised and the step repeated from the same products.

    Args:
        rows: the PEFs.
        G: (r, d) unit rows to start from.
        W: coefficients to start from; None starts from zero.
        fixed: the first `fixed` rows of G stay as they are.
        max_iterations: at most.
        tolerance: stop when `patience` iterations in a row improve the loss by less than this share of it.
        patience: see `tolerance`.
        progress: may stop the start.
    """
    total = rows.total()
    scale = total.clamp_min(torch.finfo(torch.float64).tiny)
    N, H = rows.energies(G), overlaps(G)
    W = coordinate_descent(torch.zeros_like(N) if W is None else W.to(N.dtype), N, H, 4)

    def loss(W: Tensor, N: Tensor, H: Tensor) -> float:
        value = rows.reduce(loss_of(torch.zeros((), dtype=torch.float64, device=N.device), W, N, H))
        return float((total + value) / scale)

    current = loss(W, N, H)
    losses = [current]
    shift, quiet, revived = 0.5, 0, 0
    for iteration in range(max_iterations):
        C = rows.pull(G, W)
        WtW = rows.reduce(W.T @ W)
        power = WtW.diagonal()
        R = C - ((WtW - torch.diag(power)) * (G @ G.T)) @ G
        before = current
        dead = power <= 1e-12 * power.max().clamp_min(1e-300)
        for _ in range(12):
            stepped = R + shift * power[:, None] * G
            norm = stepped.norm(dim=1, keepdim=True)
            stepped = torch.where(dead[:, None] | (norm == 0), G, stepped / norm)
            if fixed:
                stepped[:fixed] = G[:fixed]
            N_new, H_new = rows.energies(stepped), overlaps(stepped)
            after = loss(W, N_new, H_new)
            if after <= current:
                G, N, H, current = stepped, N_new, H_new, after
                shift *= 0.7
                break
            shift = max(3 * shift, 0.1)
        W_new = coordinate_descent(W, N, H, 2)
        after = loss(W_new, N, H)
        if after <= current:
            W, current = W_new, after
        quiet = quiet + 1 if before - current <= tolerance * before else 0
        dead[:fixed] = False
        if bool(dead.any()) and revived < 3 and (iteration >= 5 or quiet >= patience):
            alive = _revive(rows, G, W, N, H, dead)
            revived += 1
            after = loss(alive[3], alive[1], alive[2])
            if after <= current:
                (G, N, H, W), current, quiet = alive, after, 0
        losses.append(current)
        if progress is not None and progress(iteration, current):
            return Fit(W, G, losses, True)
        if quiet >= patience:
            return Fit(W, G, losses, True)
    return Fit(W, G, losses, False)


def _revive(
    rows: Rows, G: Tensor, W: Tensor, N: Tensor, H: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dead components restart from the worst-explained examples; their weight starts at 0, so the loss stays."""
    explained = 2 * (W * N).sum(1) - ((W @ H) * W).sum(1)
    worst, wanted = torch.argsort(rows.gather(explained), stable=True).tolist(), int(dead.sum())
    fresh = G[:0]
    while worst and len(fresh) < wanted:  # a zero PEF is never explained, and has no direction to offer
        found = rows.top_directions(worst[: wanted + 64])
        fresh, worst = torch.cat([fresh, found[found.norm(dim=1) > 0.5]])[:wanted], worst[wanted + 64 :]
    G = G.clone()
    where = dead.nonzero()[:, 0][: len(fresh)]
    G[where] = fresh
    N, H = rows.energies(G), overlaps(G)
    return G, N, H, coordinate_descent(W, N, H, 1)


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
    """The paper's algorithm, the yardstick: multiplicative updates of W and gradient steps on G.

    W ← W ∘ N / (W H + ε);  G ← G − 4η [((WᵀW)∘(GGᵀ)) G − C]. W starts uniform in [0, 1), G normal with variance
    2/(r·d); the first `warm_up` steps move G alone. The rows of G are scaled to unit norm at the end, W absorbing it.

    Raises:
        FloatingPointError: if the loss stops being finite: the learning rate is too high.
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
            W = W * N / (W @ H + 1e-12)
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
    """Rows (n, c, d) with n·c < d in at most n·c coordinates: the same objective, and the way back for G.

    With K = AAᵀ = UΛUᵀ the coordinates are X = UΛ^½, and a unit g with coordinates y is Λ^(−½)Uᵀ A.
    """
    n, c, _ = A.shape
    flat = A.flatten(0, 1)
    K = _gram(flat)
    values, U = torch.linalg.eigh(K)
    keep = values > values[-1].clamp_min(1e-300) * 1e-10
    values, U = values[keep], U[:, keep]
    X = (U * values.sqrt()).to(A.dtype).reshape(n, c, -1)
    back = (U / values.sqrt()).to(A.dtype)

    def to_rows(G: Tensor) -> Tensor:
        return torch.nn.functional.normalize((G @ back.T) @ flat, dim=1)

    return X, to_rows


def _gram(flat: Tensor) -> Tensor:
    """AAᵀ in float64, accumulated over columns so that no float64 copy of A is made."""
    K = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in flat.split(4096, dim=1):
        wide = part.double()
        K += wide @ wide.T
    return K
