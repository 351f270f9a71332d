"""One whole start of block_power: from directions of examples, with a few too many components, first in a subspace.

docs/decisions/2026-11-23-solver-experiments.md has the reason for each part, and what else was tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_npeff.decomposition.objective import coordinate_descent, overlaps
from hf_npeff.decomposition.solvers import Fit, Progress, Rows, block_power

_LEAST_DIMENSIONS = 64
"""The size of the subspace. Measured (docs/decisions): with 32 or 128, more starts end above the paper's algorithm."""
_SURPLUS_ITERATIONS = 3
"""How many iterations have twice as many components. Measured (docs/decisions): five end as low and take longer."""


def solve(
    rows: Rows,
    r: int,
    generator: torch.Generator,
    *,
    max_iterations: int,
    tolerance: float,
    progress: Progress | None = None,
) -> Fit:
    """A start of block_power, which iterates in the leading subspace as long as much is gained, then in all dimensions.

    All losses are in all dimensions. Iterations of both parts count, and `progress` is called for both.

    Args:
        rows: the PEFs.
        r: the number of components.
        generator: the random generator of the start.
        max_iterations: the most iterations of both parts together.
        tolerance: the tolerance of the second part, see `block_power`; that of the first is ten times as large, and at
            least 1e-4.
        progress: called after every iteration; it may stop the start.
    """
    inside, Q = _leading_subspace(rows, r, generator)
    G, W = _surplus(inside, r, generator)
    if Q is None:
        return block_power(rows, G, W=W, max_iterations=max_iterations, tolerance=tolerance, progress=progress)
    stopped = False

    def first_part(iteration: int, loss: float) -> bool:
        nonlocal stopped
        stopped = progress is not None and bool(progress(iteration, loss))
        return stopped

    # Ten times the tolerance: further iterations in all dimensions gain the rest anyway.
    first = block_power(
        # Only roughly, because all dimensions follow
        inside, G, W=W, max_iterations=max_iterations, tolerance=max(10 * tolerance, 1e-4), patience=2,
        progress=first_part,
    )  # fmt: skip
    done = len(first.losses) - 1
    G = torch.nn.functional.normalize(first.G @ Q, dim=1)
    if stopped or done == max_iterations:
        return Fit(first.W, G, first.losses, stopped)

    def second_part(iteration: int, loss: float) -> bool:
        return progress is not None and bool(progress(done + iteration, loss))

    fit = block_power(
        rows, G, W=first.W, max_iterations=max_iterations - done, tolerance=tolerance, progress=second_part
    )
    losses = fit.losses[1:]
    return Fit(fit.W, fit.G, [loss for loss in first.losses if loss >= losses[0]] + losses, fit.converged)


def start_from_surplus(rows: Rows, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """G (r, d) and W (n, r) from which `solve` starts; W is None if there are too few examples for a surplus."""
    inside, Q = _leading_subspace(rows, r, generator)
    G, W = _surplus(inside, r, generator)
    return (G if Q is None else torch.nn.functional.normalize(G @ Q, dim=1)), W


def start_from_examples(rows: Rows, r: int, generator: torch.Generator) -> Tensor:
    """k-means++ over PEFs: top eigenvectors of examples, drawn in proportion to what is not yet explained."""
    first = int(torch.randint(rows.n, (1,), generator=generator))
    chosen = [first]
    G = rows.top_directions([first])
    covered = rows.gather(rows.energies(G)[:, 0])
    while len(chosen) < r:
        left = (1 - covered).clamp_min(0).double().cpu() + 1e-9  # examples that are explained may still be drawn
        left[chosen] = 0
        if not bool((left > 0).any()):
            left = torch.ones_like(left)
        # Many components are drawn a few at a time: every draw reads all rows once.
        # Chosen: at most 16 readings, so that a sixteenth of the components is drawn at once.
        several = min(max(1, r // 16), r - len(chosen), int((left > 0).sum()))
        drawn = torch.multinomial(left, several, generator=generator).tolist()
        chosen += drawn
        g = rows.top_directions(drawn)
        G = torch.cat([G, g])
        covered = torch.maximum(covered, rows.gather(rows.energies(g).amax(1)))
    empty = G.norm(dim=1) < 0.5  # a zero PEF has no direction; others are unit vectors
    # Copies of an example too, because equal components would stay equal.
    empty |= ((G @ G.T).abs() > 1 - 1e-6).tril(-1).any(1)
    if bool(empty.any()):
        noise = torch.randn(G.shape, generator=generator).to(G.device, G.dtype)
        G[empty] = torch.nn.functional.normalize(noise, dim=1)[empty]
    return G


def _leading_subspace(rows: Rows, r: int, generator: torch.Generator) -> tuple[Rows, Tensor | None]:
    """The rows in the span of about their 2r leading directions, and its basis Q (k, d); if d is small, all rows.

    It makes two steps of subspace iteration with Σ_i F_i, from the directions of some examples. Together with the
    coordinates this takes five products with the rows. The solution is mostly in this subspace; the noise of single
    examples mostly is not.
    """
    k = min(max(2 * r, _LEAST_DIMENSIONS), rows.n)
    if 2 * k > rows.dim or rows.n < 2 * r:
        return rows, None
    Q = rows.top_directions(torch.randperm(rows.n, generator=generator)[:k].tolist())
    ones = torch.ones_like(rows.energies(Q))
    for _ in range(2):
        spread = rows.pull(Q, ones)
        Q = torch.linalg.qr(spread.T)[0].T.contiguous()
    return rows.within(Q), Q


def _surplus(rows: Rows, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """G (r, d) and W to start from: twice as many components are iterated, then the least needed are removed.

    A direct start can have two components on one true direction and none on another, in a local optimum that no
    small step leaves. With more components every direction has one, and duplicates cost little to remove.
    """
    more = min(2 * r, rows.n)
    G = start_from_examples(rows, max(r, more), generator)
    if more <= r:
        return G, None
    # The tolerance only skips iterations that gain less than a thousandth, before components are removed.
    fit = block_power(rows, G, max_iterations=_SURPLUS_ITERATIONS, tolerance=1e-3)
    N, H, W = rows.energies(fit.G), overlaps(fit.G), fit.W
    kept = torch.arange(more, device=W.device)
    while len(kept) > r:
        going = _least_needed(rows, W, H, count=-(-(len(kept) - r) // 2))
        kept, N, H = kept[~going], N[:, ~going], H[~going][:, ~going]
        W = coordinate_descent(W[:, ~going], N, H, 1)
    return fit.G[kept], W


def _least_needed(rows: Rows, W: Tensor, H: Tensor, count: int) -> Tensor:
    """A mask (r,) of at most `count` components that cost least to remove, ‖W_j‖² (1 − max_l H_jl), no two twins."""
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
