"""block_power against the paper's algorithm at the best of five learning rates, on planted PEFs.

Both stop at the same relative tolerance or iteration limit, and are timed in one process on one thread. Printed are
the losses, the true directions found, and the time that block_power takes to the reference's best final loss as a
share of the reference's own; seconds are of processor time.

    PYTHONPATH=. python tests/benchmarks/solver.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_npeff.decomposition.solvers import DenseRows, Fit, block_power, reference, start_from_examples
from tests.planted import planted, recovered

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 6e-4)
TOLERANCE = 1e-5


@dataclass
class Clock:
    """Seconds of processor time at which each loss was reached: other processes do not count."""

    start: float = field(default_factory=time.process_time)
    trace: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, iteration: int, loss: float) -> bool:
        self.trace.append((time.process_time() - self.start, loss))
        return False

    def seconds_to(self, loss: float) -> float:
        """Seconds to a loss of at most this; infinite where it was never reached."""
        return next((seconds for seconds, reached in self.trace if reached <= loss), float("inf"))


def run_reference(A: Tensor, r: int, rate: float, iterations: int) -> tuple[Fit, Clock] | None:
    """One run of the reference, or None where it diverges."""
    clock = Clock()
    try:
        generator = torch.Generator().manual_seed(0)
        fit = reference(
            DenseRows(A),
            r,
            generator,
            learning_rate=rate,
            max_iterations=iterations,
            tolerance=TOLERANCE,
            progress=clock,
        )
    except FloatingPointError:
        return None
    return fit, clock


def run_block_power(A: Tensor, r: int, iterations: int) -> tuple[Fit, Clock]:
    """One run of block_power, its start included in the time."""
    clock = Clock()
    rows = DenseRows(A)
    G = start_from_examples(rows, r, torch.Generator().manual_seed(0))
    return block_power(rows, G, max_iterations=iterations, tolerance=TOLERANCE, progress=clock), clock


def compare(n: int, c: int, d: int, r: int, iterations: int, rates: tuple[float, ...]) -> float:
    """Print the comparison on one planted problem; return the share of the reference's time."""
    A, truth, _ = planted(n, c, d, r, overlap=0.3, noise=1.0, active=3, seed=0)
    print(f"planted: n={n} c={c} d={d} r={r}, overlap 0.3, noise 1.0, 3 components an example")
    run_block_power(A[: min(n, 200)], min(r, 10), 3)  # first calls are slow
    ours, clock = run_block_power(A, r, iterations)
    seconds = clock.trace[-1][0]
    print(
        f"block_power         loss {ours.losses[-1]:.6f}  {len(ours.losses) - 1:4d} iterations  {seconds:7.2f} s  "
        f"{recovered(ours.G, truth)} of {r} directions"
    )
    best: tuple[Fit, Clock, float] | None = None
    for rate in rates:
        result = run_reference(A, r, rate, iterations)
        if result is None:
            print(f"reference η={rate:<8g} diverges")
            continue
        fit, its_clock = result
        print(
            f"reference η={rate:<8g} loss {fit.losses[-1]:.6f}  {len(fit.losses):4d} iterations  "
            f"{its_clock.trace[-1][0]:7.2f} s  {recovered(fit.G, truth)} of {r} directions"
        )
        if best is None or fit.losses[-1] < best[0].losses[-1]:
            best = (fit, its_clock, rate)
    assert best is not None, "the reference diverged at every learning rate"
    fit, its_clock, rate = best
    target = fit.losses[-1]
    share = clock.seconds_to(target) / its_clock.seconds_to(target)
    print(
        f"time to the reference's best loss {target:.6f} (η={rate:g}): {clock.seconds_to(target):.2f} s against "
        f"{its_clock.seconds_to(target):.2f} s, ratio {share:.3f} (1/{1 / share if share else float('inf'):.1f})"
    )
    return share


def main(quick: bool = False) -> float:
    """Run on one thread; `quick` on a small problem."""
    torch.set_num_threads(1)
    return (
        compare(400, 4, 64, 12, 200, (3e-4, 1e-3, 2e-3, 3e-3, 5e-3))
        if quick
        else compare(3000, 6, 512, 100, 400, LEARNING_RATES)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small problem, a few seconds")
    main(parser.parse_args().quick)
