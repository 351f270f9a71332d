"""Early stopping: time saved against explained fraction and components lost.

    python -m tests.benchmarks.stopping [--keep]

From the same start, block_power runs to a relative improvement of 1e-7 an iteration, and is stopped early at larger
tolerances. Given are, as medians over five starts, the share of the processor time, the share of the explained
fraction, the components that have a partner of their own at |cosine| ≥ 0.9 in the converged fit, and on planted PEFs
the planted directions found.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from hf_npeff.decomposition.solvers import DenseRows, Fit, block_power
from hf_npeff.decomposition.starts import start_from_surplus
from tests.benchmarks.measure import keep, machine
from tests.benchmarks.solver import Problem, problems
from tests.benchmarks.stability import agreement
from tests.planted import recovered

TOLERANCES = (3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)
CONVERGED, LIMIT, STARTS = 1e-7, 3000, 5
CHOSEN = ("planted, 64 of overlap 0.3", "SmolLM2", "MiniLM")


def stopped(problem: Problem, seed: int, tolerance: float) -> tuple[Fit, float]:
    """The fit and its seconds of processor time, its start included."""
    begin = time.process_time()
    rows = DenseRows(problem.A)
    G, W = start_from_surplus(rows, problem.r, torch.Generator().manual_seed(seed))
    fit = block_power(rows, G, W=W, max_iterations=LIMIT, tolerance=tolerance)
    return fit, time.process_time() - begin


def table(problem: Problem) -> list[dict[str, Any]]:
    """A row a tolerance."""
    whole = [stopped(problem, seed, CONVERGED) for seed in range(STARTS)]
    rows = []
    for tolerance in TOLERANCES:
        some = [stopped(problem, seed, tolerance) for seed in range(STARTS)]
        pairs = list(zip(some, whole, strict=True))
        found = None
        if problem.truth is not None:
            found = statistics.median(recovered(fit.G, problem.truth) for fit, _ in some)
        rows.append({
            "tolerance": tolerance,
            "iterations": statistics.median(len(fit.losses) - 1 for fit, _ in some),
            "time": statistics.median(a[1] / b[1] for a, b in pairs),
            "explained": statistics.median((1 - a[0].losses[-1]) / (1 - b[0].losses[-1]) for a, b in pairs),
            "same": statistics.median(agreement(a[0].G, b[0].G) for a, b in pairs),
            "found": found,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    figures = {}
    for name in CHOSEN:
        problem = problems(False)[name]()
        stopped(Problem(problem.A[:100], 4), 0, 1e-3)  # first calls are slow
        figures[name] = table(problem)
        print(f"\n{name}, {problem.r} components\n| tolerance | iterations | time | explained | components kept |")
        print("|---" * 5 + "|")
        for row in figures[name]:
            print(
                f"| {row['tolerance']:g} | {row['iterations']:g} | {row['time']:.2f} | {row['explained']:.4f} | "
                f"{row['same']:.2f} |",
                flush=True,
            )
    if options.keep:
        keep("stopping", {"problems": figures})


if __name__ == "__main__":
    main()
