"""Error, time and size of sketches on SmolLM2: the table of docs/sketches.md.

    python -m tests.benchmarks.sketches [--prompts 32] [--rank 4]

The error is that of off-diagonal inner products of unit-norm PEFs against unsketched rows, module by module, over all
linear maps but the output embedding. Seconds are those of the rows of one example; the floor is the same passes with
nothing collected (hooks that do nothing), in the same process. Bytes are those of one example's rows in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.demo import load_model
from hf_npeff.fisher.gradients import LinearHooks
from hf_npeff.fisher.selftest import collect_rows, measure_sketches
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.studies.word_relations import word_relation_prompts

SETTINGS = [
    ("kronecker", 8), ("kronecker", 16), ("kronecker", 32), ("two-stage", 4096), ("two-stage", 8192),
    ("two-stage", 16_384), ("two-stage", 32_768), ("countsketch", 8192),
]  # fmt: skip


class Nothing:
    """A receiver that keeps nothing."""

    def take_input(self, name: str, x: torch.Tensor) -> None:
        return None

    def take_gradient(self, name: str, saved: Any, delta: torch.Tensor) -> None:
        return None


def floor_seconds(work: Any, run: Any) -> float:
    started = time.perf_counter()
    with LinearHooks(work.model, work.maps, Nothing()) as hooks:
        hooks.begin(len(run.values))
        source, V = run()
        for i in range(V.shape[1]):
            hooks.backward(source, V[:, i], last=i == V.shape[1] - 1)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_model()
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=options.rank))
    examples = Examples(word_relation_prompts(8), tokenizer)[: options.prompts]
    with analyzer.fisher_pass() as work:
        chosen = work.prepare(examples).line(work.sketch)
        runs = [work.run(examples[i : i + 8]) for i in range(0, len(examples), 8)]
        tries = list(dict.fromkeys([(work.sketch.kind, work.sketch.setting), *SETTINGS]))
        _, errors = measure_sketches(model, work.maps, {}, runs, tries, 0, None)
        print("auto:", chosen)
        print(
            "| sketch | numbers a row | bytes an example | error | × floor | seconds an example |\n" + "|---" * 6 + "|"
        )
        for kind, dim in tries:
            sketch = Sketch({m.parameter: m.shape for m in work.maps}, kind, dim, 0)
            ratios, seconds = [], []
            for _ in range(options.rounds):
                floor = floor_seconds(work, runs[0])
                started = time.perf_counter()
                collect_rows(model, work.maps, {}, runs[0], sketch)
                seconds.append((time.perf_counter() - started) / len(runs[0].values))
                ratios.append(seconds[-1] * len(runs[0].values) / floor)
            print(
                f"| {kind} {dim} | {sketch.dim:,} | {sketch.dim * options.rank * 4:,} | "
                f"{errors[f'{kind} {dim}']:.3f} | "
                f"{statistics.median(ratios):.2f} | {statistics.median(seconds):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
