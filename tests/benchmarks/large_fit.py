"""A start of block_power at a size that no longer fits into a cache, and where its time goes.

    python -m tests.benchmarks.large_fit [--examples 20000] [--keep]

A planted problem: n examples of 4 rows in 4,096 numbers, 256 components. Seconds are of the processor, with one thread,
for one start as a fit makes it. Products read all rows: alignments with the components, and the pull of the weighted
alignments. "In the subspace" is what happens before the iteration goes on in all dimensions, "start" what makes the
subspace and the first components.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_npeff.decomposition import solvers, starts
from hf_npeff.decomposition.solvers import DenseRows
from tests.benchmarks.measure import keep, machine
from tests.benchmarks.memory import Peak
from tests.planted import planted, recovered

EXAMPLES, ROWS, NUMBERS, COMPONENTS = 20_000, 4, 4096, 256
MOST_ITERATIONS, TOLERANCE = 200, 1e-5  # the defaults of a fit
PRODUCTS, COEFFICIENTS, REST = "products", "coordinate descent on W", "the rest"


class Clock:
    """Seconds of the processor in each phase and stage; what runs inside a timed call counts there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.iterations: dict[str, int] = {}
        self.stage = "start"
        self._since = time.process_time()

    def lap(self, phase: str) -> None:
        """The time since the last call was spent in a phase."""
        now = time.process_time()
        phases = self.seconds.setdefault(self.stage, {})
        phases[phase] = phases.get(phase, 0.0) + now - self._since
        self._since = now

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call, counted as a phase."""

        def run(*args: Any, **options: Any) -> Any:
            self.lap(REST)
            try:
                return call(*args, **options)
            finally:
                self.lap(phase)

        return run

    def staged(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call of block_power, which is a stage; the one that follows is in all dimensions."""

        def run(rows: Any, *args: Any, **options: Any) -> Any:
            self.lap(REST)
            before, self.stage = self.stage, stage if rows.dim < NUMBERS else "all dimensions"
            fit = call(rows, *args, **options)
            self.lap(REST)
            self.iterations[self.stage] = len(fit.losses) - 1
            self.stage = before
            return fit

        return run


def measured(n: int) -> dict[str, Any]:
    """The figures of one start."""
    A, directions, _ = planted(n, ROWS, NUMBERS, COMPONENTS, overlap=0.1, noise=0.5, active=3, seed=0)
    rows = DenseRows(A)
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, Peak() as peak:
        clock = Clock()
        for name in ("_alignments", "pull", "within"):
            patch.setattr(DenseRows, name, clock.timed(PRODUCTS, getattr(DenseRows, name)))
        patch.setattr(solvers, "coordinate_descent", clock.timed(COEFFICIENTS, solvers.coordinate_descent))
        patch.setattr(starts, "block_power", clock.staged("in the subspace", starts.block_power))
        fit = starts.solve(rows, COMPONENTS, generator, max_iterations=MOST_ITERATIONS, tolerance=TOLERANCE)
        clock.lap(REST)
    return {
        "n": n, "c": ROWS, "d": NUMBERS, "r": COMPONENTS,
        "stages": clock.seconds, "iterations": clock.iterations, "loss": fit.losses[-1],
        "found": recovered(fit.G, directions), "MiB": peak.largest - peak.before, "rows, MiB": _mebibytes(A),
    }  # fmt: skip


def _mebibytes(A: Tensor) -> float:
    return A.numel() * A.element_size() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    figures = measured(options.examples)
    for name, value in figures.items():
        print(f"  {name}: {value}")
    if options.keep:
        keep("large-fit", figures)


if __name__ == "__main__":
    main()
