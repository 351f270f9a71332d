"""The regression guard: a few ratios of every stage, against those that are kept.

    python -m tests.benchmarks.guard [--keep]

Prints what moved by more than a fifth, and which way. A ratio that a busy machine moved comes back on a second run;
what does not come back is a change. It fails nothing: figures are for people.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_npeff.decomposition.solvers import DenseRows, block_power
from tests.benchmarks.cases import case
from tests.benchmarks.measure import in_turn, keep, kept, machine, ratio
from tests.benchmarks.solver import Problem, run_block_power, run_reference
from tests.benchmarks.ways import floor, ours
from tests.planted import planted

ROUNDS, MOVED = 5, 0.2


def row_ratios() -> dict[str, float]:
    """Every sketch over the floor, and its error, on the BERT-like model."""
    with case("BERT-like") as found:
        ways = ours(found)
        tries: dict[str, Callable[[], Any]] = {label: way.rows for label, way in ways.items()}
        times = in_turn({"floor": floor(found.model, found.run)} | tries, ROUNDS)
        ratios = {f"rows, {label} / floor": ratio(times, label, "floor") for label in ways}
        return ratios | {f"error, {label}": way.error(0) for label, way in ways.items() if way.error}


def solver_ratios() -> dict[str, float]:
    """An iteration over its two products with the rows, and the whole fit over the reference."""
    A, truth, _ = planted(1000, 4, 512, 64, overlap=0.3, noise=1.0, active=3, seed=0)
    problem = Problem(A, 64, truth)
    rows = DenseRows(A)
    G = torch.nn.functional.normalize(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    W = torch.rand(1000, 64, generator=torch.Generator().manual_seed(0))

    def products() -> None:
        rows._last = None
        rows.pull(G, W)

    times = in_turn(
        {
            "products": lambda: [products() for _ in range(10)],
            "iterations": lambda: block_power(DenseRows(A), G, max_iterations=10, tolerance=0.0),
        },
        ROUNDS,
    )
    shares = []
    for seed in range(3):
        its = run_reference(problem, 1.0 / 1000, seed)
        _, clock = run_block_power(problem, seed)
        assert its is not None
        shares.append(clock.seconds_to(its[0].losses[-1]) / its[1].seconds_to(its[0].losses[-1]))
    return {
        "solver, iteration / products": ratio(times, "iterations", "products"),
        "solver, time / reference": statistics.median(shares),
    }


def import_ratio() -> dict[str, float]:
    """`import hf_npeff` over an empty process."""

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    times = in_turn(
        {code: functools.partial(run, code) for code in ("pass", "import hf_npeff")}, ROUNDS, time.perf_counter
    )
    return {"import hf_npeff / python -c pass": ratio(times, "import hf_npeff", "pass")}


def compared(found: Mapping[str, float], before: Mapping[str, float]) -> int:
    """How many ratios moved by more than a fifth; all are printed."""
    moved = 0
    for name, value in found.items():
        old = before.get(name)
        change = "new" if old is None else f"{value / old - 1:+.0%}"
        much = old is not None and abs(value / old - 1) > MOVED
        moved += much
        print(f"{name:40} {value:8.3f}  {change}{'   MOVED' if much else ''}")
    for name in before.keys() - found.keys():
        print(f"{name:40} is not measured any more")
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the figures: the next run is compared with them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    begin = time.perf_counter()
    found = {**import_ratio(), **solver_ratios(), **row_ratios()}
    moved = compared(found, kept("guard").get("ratios", {}))
    print(f"{moved} of {len(found)} moved by more than {MOVED:.0%}; {time.perf_counter() - begin:.0f} s")
    if options.keep:
        keep("guard", {"ratios": found})


if __name__ == "__main__":
    main()
