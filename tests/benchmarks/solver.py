"""block_power against the paper's algorithm at the best of five learning rates, on planted and on real PEFs.

    python -m tests.benchmarks.solver [--seeds 5] [--large] [--keep]

The reference runs 400 iterations at each of five learning rates (times 1/n), and the one that ends lowest is kept. Then
both run from five seeds each. Printed are, as medians over seeds, the processor time that block_power takes to the
reference's final loss as a share of the reference's own, both losses where they end, planted directions found, how
often block_power ends above the reference, and how often the reference comes to within 1e-4 of block_power's end.
Everything that block_power does is in its time: its start, and, where it runs in Gram space, the way there and back.
Real PEFs are compared twice: with the reference on the rows as they are, as published, and with both in Gram space, the
way there counted for neither. Memory is the largest RssAnon above what is held before, in a forked process.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_npeff.decomposition.solvers import DenseRows, Fit, gram_space, reference
from hf_npeff.decomposition.starts import solve
from tests.benchmarks.measure import keep, kept, machine
from tests.benchmarks.memory import Peak
from tests.planted import planted, recovered

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
ITERATIONS, TOLERANCE, SAME = 400, 1e-5, 1e-4
PLANTED: dict[str, dict[str, Any]] = {
    "planted, 64 of overlap 0.3": {"n": 2000, "c": 4, "d": 512, "r": 64, "overlap": 0.3, "noise": 1.0, "active": 3},
    "planted, 64 of overlap 0": {"n": 2000, "c": 4, "d": 512, "r": 64, "overlap": 0.0, "noise": 0.5, "active": 2},
    "planted, 32 of overlap 0.6": {"n": 2000, "c": 4, "d": 512, "r": 32, "overlap": 0.6, "noise": 1.0, "active": 3},
    "planted, 24 in eight rows": {"n": 1500, "c": 8, "d": 384, "r": 24, "overlap": 0.3, "noise": 1.0, "active": 4},
    "planted, 48 in two rows": {"n": 4000, "c": 2, "d": 256, "r": 48, "overlap": 0.2, "noise": 0.5, "active": 2},
}  # fmt: skip
LARGE = {"n": 3000, "c": 6, "d": 512, "r": 100, "overlap": 0.3, "noise": 1.0, "active": 3}
REAL = 256


@dataclass
class Problem:
    """Rows (n, c, d), the components wanted, the planted directions where there are some; whether ours reduces rows."""

    A: Tensor
    r: int
    truth: Tensor | None = None
    reduce: bool = False


@dataclass
class Clock:
    """Seconds of processor time at which each loss was reached: other processes do not count."""

    start: float = field(default_factory=time.process_time)
    trace: list[tuple[float, float]] = field(default_factory=list)
    after: float = 0.0  # seconds that the result takes once iterations end

    def __call__(self, iteration: int, loss: float) -> bool:
        self.trace.append((time.process_time() - self.start, loss))
        return False

    def seconds_to(self, loss: float) -> float:
        """Seconds to a loss of at most this; infinite where it was never reached."""
        return self.after + next((seconds for seconds, reached in self.trace if reached <= loss), float("inf"))

    def seconds(self) -> float:
        """Seconds to the end."""
        return self.after + self.trace[-1][0]


def problems(large: bool) -> dict[str, Callable[[], Problem]]:
    """{name: what makes it}."""

    def make(settings: dict[str, Any]) -> Problem:
        A, truth, _ = planted(**settings, seed=0)
        return Problem(A, settings["r"], truth)

    def real(name: str, gram: bool) -> Problem:
        from tests.benchmarks import sets

        A = {"SmolLM2": sets.smollm2, "MiniLM": sets.minilm}[name]()[:REAL].factors.float()
        return Problem(gram_space(A)[0], 16) if gram else Problem(A, 16, reduce=True)

    found = {name: lambda s=settings: make(s) for name, settings in PLANTED.items()}
    if large:
        found["planted, 100 of overlap 0.3, large"] = lambda: make(LARGE)
    for name in ("SmolLM2", "MiniLM"):
        found[name] = lambda name=name: real(name, False)
        found[f"{name}, both in Gram space"] = lambda name=name: real(name, True)
    return found


def run_reference(problem: Problem, rate: float, seed: int) -> tuple[Fit, Clock] | None:
    """One run of the reference, or None where it diverges."""
    clock = Clock()
    generator = torch.Generator().manual_seed(seed)
    settings = {"max_iterations": ITERATIONS, "tolerance": TOLERANCE, "progress": clock}
    try:
        return reference(DenseRows(problem.A), problem.r, generator, learning_rate=rate, **settings), clock
    except FloatingPointError:
        return None


def run_block_power(problem: Problem, seed: int) -> tuple[Fit, Clock]:
    """One run of block_power: its start, and the way to Gram space and back, are in the time."""
    clock = Clock()
    X, to_rows = gram_space(problem.A) if problem.reduce else (problem.A, lambda G: G)
    settings = {"max_iterations": ITERATIONS, "tolerance": TOLERANCE, "progress": clock}
    fit = solve(DenseRows(X), problem.r, torch.Generator().manual_seed(seed), **settings)
    ended = time.process_time()
    fit.G = to_rows(fit.G)
    clock.after = time.process_time() - ended
    return fit, clock


def peak(work: Callable[[], Any]) -> float:
    """MiB that the work takes above what is held before, in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of finished work would hide what this takes
        with Peak() as found:
            work()
        sender.send(found.largest - found.before)

    process = context.Process(target=child)
    process.start()
    process.join()
    return receiver.recv() if receiver.poll() else float("nan")


def compare(name: str, problem: Problem, seeds: int) -> dict[str, Any]:
    """The figures of one problem, printed."""
    n = len(problem.A)
    run_block_power(Problem(problem.A[:100], 4), 0)  # first calls are slow
    tries = {rate / n: run_reference(problem, rate / n, 0) for rate in RATES}
    rate = min((rate for rate, found in tries.items() if found), key=lambda rate: tries[rate][0].losses[-1])  # type: ignore[index]
    shares, ours, theirs, iterations, seconds = [], [], [], [], []
    found: list[tuple[int, int]] = []
    reached = 0
    for seed in range(seeds):
        its = run_reference(problem, rate, seed)
        fit, clock = run_block_power(problem, seed)
        if its is None:
            continue
        target = its[0].losses[-1]
        shares.append(clock.seconds_to(target) / its[1].seconds_to(target))
        ours.append(fit.losses[-1])
        reached += its[1].seconds_to(fit.losses[-1] * (1 + SAME)) < float("inf")
        theirs.append(target)
        iterations.append((len(fit.losses) - 1, len(its[0].losses)))
        seconds.append((clock.seconds(), its[1].seconds()))
        if problem.truth is not None:
            found.append((recovered(fit.G, problem.truth), recovered(its[0].G, problem.truth)))
    median = statistics.median
    figures = {
        "share": median(shares),
        "slowest": max(shares) if max(shares) < float("inf") else None,
        "loss": median(ours), "reference": median(theirs),
        "worse": sum(a > b * (1 + SAME) for a, b in zip(ours, theirs, strict=True)),
        "seeds": len(ours), "reached": reached, "best": [min(ours), min(theirs)],
        "iterations": [median(x) for x in zip(*iterations, strict=True)],
        "seconds": [median(x) for x in zip(*seconds, strict=True)],
        "found": [median(x) for x in zip(*found, strict=True)] if found else None, "r": problem.r,
        "rate × n": rate * n, "diverged": [rate * n for rate, it in tries.items() if it is None],
        "MiB": [peak(lambda: run_block_power(problem, 0)), peak(lambda: run_reference(problem, rate, 0))],
    }  # fmt: skip
    directions = "" if not found else f", directions {figures['found'][0]:g} and {figures['found'][1]:g} of {problem.r}"
    print(
        f"{name}: 1/{1 / figures['share']:.1f} of the reference's time (slowest seed 1/{1 / max(shares):.1f}; "
        f"η·n = {rate * n:g}, {figures['seconds'][0]:.2f} s and {figures['seconds'][1]:.2f} s in all); losses "
        f"{figures['loss']:.5f} and {figures['reference']:.5f}{directions}, best "
        f"{min(ours):.5f} and {min(theirs):.5f}, worse for {figures['worse']} of "
        f"{figures['seeds']} seeds; the reference reaches our end for {reached}; "
        f"{figures['MiB'][0]:.0f} and {figures['MiB'][1]:.0f} MiB",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="also 3,000 examples and 100 components; ten minutes")
    parser.add_argument("--only", nargs="+", help="these problems alone, by the start of their names")
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name, make in problems(options.large).items():
        if options.only is None or name.startswith(tuple(options.only)):
            figures = compare(name, make(), 2 if name.endswith("large") else options.seeds)
            if options.keep:
                keep("solver", {"problems": kept("solver").get("problems", {}) | {name: figures}})


if __name__ == "__main__":
    main()
