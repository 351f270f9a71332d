"""How time and memory grow with n, d, r and c, each doubled four times, with the fitted exponents.

    python -m tests.benchmarks.scaling [--keep]

Rows: PEFs of a random 2-layer BERT of hidden size 64 (16 tokens, random projections, countsketch), against n, c and d.
Fit: ten iterations of block_power on random rows, against n, d, r and c. Each point runs in a process of its own;
seconds are of its processor time, medians of five after one that is not counted. Memory is the largest RssAnon above
what is held before the first of them, stored rows included. An exponent is the e of the least-squares fit of
a + b·x^e (a, b ≥ 0) to the five points, relative errors; a is what does not grow: the self-test, Python's own work.
Where sixteen times the size costs less than a quarter more, there is no exponent to speak of.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from scipy.optimize import nnls

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.decomposition.solvers import DenseRows, block_power
from tests.benchmarks.measure import keep, kept, machine
from tests.benchmarks.memory import Peak

DOUBLINGS, ROUNDS = 4, 5
BASES = {"rows": {"n": 128, "c": 2, "d": 1024}, "fit": {"n": 1000, "c": 4, "d": 512, "r": 16}}
FLAT = 1.25


def rows(n: int, c: int, d: int) -> Callable[[], Any]:
    """What computes PEFs of n examples."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=30
    )
    model = transformers.BertForSequenceClassification(config)
    fisher = FisherConfig(rank=c, output_factor="projection", sketch="countsketch", sketch_dim=d, sketch_tolerance=1e6)
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    data = {"input_ids": torch.randint(5, 512, (n, 16), generator=torch.Generator().manual_seed(0))}
    small = {"input_ids": data["input_ids"][:2]}
    analyzer.compute_pefs(small)

    def work() -> Any:
        return analyzer.compute_pefs(data, batch_size=32)

    return work


def fit(n: int, c: int, d: int, r: int) -> Callable[[], Any]:
    """What makes rows and takes ten iterations."""

    def work() -> Any:
        A = torch.nn.functional.normalize(torch.randn(n, c, d, generator=torch.Generator().manual_seed(0)), dim=2)
        G = torch.nn.functional.normalize(torch.randn(r, d, generator=torch.Generator().manual_seed(1)), dim=1)
        begin = time.process_time()
        block_power(DenseRows(A), G, max_iterations=10, tolerance=0.0)
        return time.process_time() - begin

    return work


def point(stage: str, size: dict[str, int]) -> tuple[float, float]:
    """Seconds and MiB, in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        work = {"rows": rows, "fit": fit}[stage](**size)
        taken = []
        with Peak() as peak:
            held = work()
        del held
        for _ in range(ROUNDS):
            begin = time.process_time()
            told = work()
            taken.append(told if isinstance(told, float) else time.process_time() - begin)
        sender.send((statistics.median(taken), peak.largest - peak.before))

    process = context.Process(target=child)
    process.start()
    process.join()
    return receiver.recv() if receiver.poll() else (math.nan, math.nan)


def growth(xs: list[int], ys: list[float]) -> tuple[float | None, float]:
    """The exponent e of y = a + b·x^e, and the constant a as a share of the first y; None and 1 where y is flat."""
    y = np.maximum(np.array(ys), 1e-9)
    if y[-1] < FLAT * y[0]:
        return None, 1.0
    fits = []
    for e in np.arange(0.2, 2.01, 0.01):
        terms = np.stack([np.ones(len(y)), (np.array(xs) / xs[0]) ** e], 1) / y[:, None]
        (a, _), residual = nnls(terms, np.ones(len(y)))
        fits.append((residual, float(e), min(1.0, float(a / y[0]))))
    return min(fits)[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    figures: dict[str, Any] = {}
    for stage in options.stages:
        for letter in BASES[stage]:
            sizes = [BASES[stage][letter] * 2**k for k in range(DOUBLINGS + 1)]
            points = [point(stage, BASES[stage] | {letter: size}) for size in sizes]
            seconds, mib = ([p[i] for p in points] for i in range(2))
            fits = [growth(sizes, seconds), growth(sizes, mib)]
            found = {
                "sizes": sizes, "seconds": seconds, "MiB": mib, "base": BASES[stage],
                "exponents": [e for e, _ in fits], "constants": [a for _, a in fits],
            }  # fmt: skip
            figures.setdefault(stage, {})[letter] = found
            shown = ["flat" if e is None else f"exponent {e:.2f}, constant {a:.0%} of the first" for e, a in fits]
            print(
                f"{stage:4} {letter} = {sizes[0]} … {sizes[-1]}: seconds {' '.join(f'{s:.3f}' for s in seconds)} "
                f"({shown[0]}), MiB {' '.join(f'{m:.0f}' for m in mib)} ({shown[1]})",
                flush=True,
            )
    if options.keep:
        keep("scaling", {**kept("scaling"), **figures})


if __name__ == "__main__":
    main()
