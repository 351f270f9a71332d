"""Early stopping on PEFs that a start does not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hf_npeff.config import DecompositionConfig
from hf_npeff.decomposition.objective import loss_of, nonnegative_coefficients, overlaps
from hf_npeff.decomposition.solvers import Fit, Progress, Rows, block_power


class HeldOut:
    """The relative loss of held-out PEFs, with their coefficients at the minimum."""

    def __init__(self, rows: Rows, to_rows: Callable[[Tensor], Tensor]):
        self.rows = rows
        self.to_rows = to_rows
        self.total = rows.total()

    def loss(self, G: Tensor) -> float:
        """The relative loss for the solver's G (r, d), with W at its minimum."""
        G = self.to_rows(G)
        N, H = self.rows.energies(G), overlaps(G)
        W = nonnegative_coefficients(N, H)
        value = self.rows.reduce(loss_of(torch.zeros_like(self.total), W, N.double(), H.double()))
        return float((self.total + value) / self.total)


def until_held_out_rises(
    rows: Rows, G: Tensor, held_out: HeldOut, config: DecompositionConfig, progress: Progress, every: int = 10
) -> Fit:
    """Run rounds of a few iterations until the held-out loss no longer improves, and keep the best round."""
    fit = block_power(
        rows, G, max_iterations=min(every, config.max_iterations), tolerance=config.tolerance, progress=progress
    )
    best, best_loss = fit, held_out.loss(fit.G)
    losses = list(fit.losses)
    done = every
    worse = 0
    while not fit.converged and done < config.max_iterations:

        def onwards(iteration: int, loss: float, done: int = done) -> bool:
            return progress(done + iteration, loss)

        fit = block_power(
            rows,
            fit.G,
            W=fit.W,
            max_iterations=min(every, config.max_iterations - done),
            tolerance=config.tolerance,
            progress=onwards,
        )
        losses += fit.losses[1:]
        done += every
        now = held_out.loss(fit.G)
        if now < best_loss * (1 - config.tolerance):
            best, best_loss, worse = Fit(fit.W, fit.G, list(losses), True), now, 0
        else:
            worse += 1
            if worse >= 2:
                return dataclasses.replace(best, converged=True)
    return dataclasses.replace(best, converged=fit.converged)
