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

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.demo import load_model
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.gradients import Receiver, backward_passes
from hf_npeff.fisher.preparation import prepare
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.fisher.selftest import KnownCotangents
from hf_npeff.fisher.sketch_choice import known_cotangents, measure_sketches
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.studies.word_relations import word_relation_prompts

SETTINGS = [
    ("kronecker", 8), ("kronecker", 16), ("kronecker", 32), ("two-stage", 4096), ("two-stage", 8192),
    ("two-stage", 16_384), ("two-stage", 32_768), ("countsketch", 8192),
]  # fmt: skip


def floor_seconds(forward: ForwardPass, known: KnownCotangents) -> float:
    started = time.perf_counter()
    values, source = list(known.values.unbind(1)), forward.source_of(known.examples)
    backward_passes(forward.model, forward.maps, Receiver(), len(known.examples), source, lambda _: values)
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
    with analyzer.forward_pass() as forward:
        maker = prepare(forward, analyzer.fisher, examples)
        chosen = "" if maker.selftest is None else maker.selftest.line(maker.sketch)
        groups = [examples[i : i + 8] for i in range(0, len(examples), 8)]
        batches = [known_cotangents(maker.forward, maker.config, maker.metric, group) for group in groups]
        tries = list(dict.fromkeys([(maker.sketch.kind, maker.sketch.setting), *SETTINGS]))
        _, errors = measure_sketches(maker.forward, maker.config, batches, tries, 0, None)
        print("auto:", chosen)
        print(
            "| sketch | numbers a row | bytes an example | error | × floor | seconds an example |\n" + "|---" * 6 + "|"
        )
        for kind, dim in tries:
            sketch = Sketch(maker.forward.shapes, kind, dim, 0)
            with_sketch = RowMaker(maker.forward, maker.config, sketch)
            ratios, seconds = [], []
            for _ in range(options.rounds):
                floor = floor_seconds(maker.forward, batches[0])
                started = time.perf_counter()
                with_sketch.rows_of(batches[0].examples, batches[0].values)
                seconds.append((time.perf_counter() - started) / len(batches[0].examples))
                ratios.append(seconds[-1] * len(batches[0].examples) / floor)
            print(
                f"| {kind} {dim} | {sketch.dim:,} | {sketch.dim * options.rank * 4:,} | "
                f"{errors[f'{kind} {dim}']:.3f} | "
                f"{statistics.median(ratios):.2f} | {statistics.median(seconds):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
