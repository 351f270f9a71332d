"""How well components are lifted to the weights of a small trained model, and the memory that one lifting takes.

    python -m tests.benchmarks.lifting [--keep]

Every method lifts all components: times are medians of five rounds in turn, as ratios to exact lifting. Each direction
then moves the parameters until the component's top examples have changed by 0.1 nats; the KL ratio is that on them over
that on others, the step is its length over that of exact lifting, medians over components. On the small model the
yardstick is the decomposition continued without a sketch from the same coefficients, by dense linear algebra
(`tests.reference`); on MiniLM, fine-tuned on intents of which several share a component, it is exact lifting, and
compressed sensing is left out. Memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer, ParameterDirection
from tests.benchmarks.measure import in_turn, keep, machine, ratio
from tests.trigger_words import TrainedCase, continued, sentences, trained, trained_case

WAYS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact", "selective": False},
    "exact, 16 top examples": {"method": "exact", "top_examples": 16},
    "adjoint": {"method": "adjoint"},
    "compressed sensing, IHT": {"method": "compressed_sensing", "solver": "iht"},
    "compressed sensing, FISTA": {"method": "compressed_sensing", "solver": "fista"},
}
ROUNDS, TARGET_KL = 5, 0.1
HEADER = (
    "| way | cosine, median | lowest | time / exact | step / exact | KL ratio | target reached |\n" + "|---" * 7 + "|"
)


def minilm(n: int = 48, components: int = 6) -> TrainedCase:
    """PEFs of a fine-tuned MiniLM's sentences in two stages, 1,300-fold, and their decomposition."""
    from tests.benchmarks import sets

    model, tokenizer, data = sets.fine_tuned()
    fisher = FisherConfig(rank=2, sketch="two-stage", sketch_dim=sets.SMALL_SKETCH, storage_dtype="float32")
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    pefs = analyzer.compute_pefs(data[:n])
    return TrainedCase(analyzer, data[:n], pefs, analyzer.decompose(pefs, components, n_restarts=4, progress=False))


def exact_directions(found: TrainedCase) -> dict[str, Tensor]:
    """{parameter: (r, out, in)}: exact lifting itself, where nothing better can be had."""
    wanted = list(range(len(found.decomposition)))
    directions = found.analyzer.lift(found.decomposition, wanted, found.pefs, found.data, selective=False)
    return {name: torch.stack([d[name] for d in directions]) for name in directions[0]}


def compared(
    found: TrainedCase, truth: dict[str, Tensor], ways: Mapping[str, dict[str, Any]], some: int | None = None
) -> dict[str, Any]:
    """{way: |cosine| to the truth, time over exact lifting, steps and KL ratios}, of the first `some` components."""
    wanted = list(range(len(found.decomposition)))[:some]

    def lift(settings: dict[str, Any]) -> list[ParameterDirection]:
        return found.analyzer.lift(found.decomposition, wanted, found.pefs, found.data, **settings)

    times = in_turn({way: functools.partial(lift, settings) for way, settings in ways.items()}, ROUNDS)
    figures: dict[str, Any] = {}
    steps: dict[str, list[float]] = {}
    for way, settings in ways.items():
        directions = lift(settings)
        cosines = [abs(d.cosine({n: truth[n][j] for n in d})) for j, d in zip(wanted, directions, strict=True)]
        reports = [
            found.analyzer.evaluate_direction(d, found.decomposition, j, found.data, target_kl=TARGET_KL)
            for j, d in zip(wanted, directions, strict=True)
        ]
        steps[way] = [abs(report.scale) for report in reports]
        figures[way] = {
            "step": statistics.median(a / b for a, b in zip(steps[way], steps["exact"], strict=True)),
            "cosine": statistics.median(cosines),
            "lowest": min(cosines),
            "time": ratio(times, way, "exact"),
            "KL ratio": statistics.median(report.ratio for report in reports),
            "random": statistics.median(report.random.ratio for report in reports),
            "reached": sum(report.reached for report in reports),
        }
        print(
            f"| {way} | {figures[way]['cosine']:.4f} | {figures[way]['lowest']:.4f} | {figures[way]['time']:.2f} | "
            f"{figures[way]['step']:.1f} | {figures[way]['KL ratio']:.1f} | "
            f"{figures[way]['reached']} of {len(wanted)} |",
            flush=True,
        )
    return figures


def memory(hidden: int = 512, layers: int = 6) -> dict[str, float]:
    """MiB of the weights under analysis, and of the peak that lifting one component adds to what was there."""
    from tests.benchmarks.memory import Peak

    torch.set_num_threads(1)
    ids, labels = sentences(16, seed=1)
    data = [{"input_ids": x, "label": y} for x, y in zip(ids.tolist(), labels.tolist(), strict=True)]
    fisher = FisherConfig(rank=1, sketch="countsketch", sketch_dim=4096)
    analyzer = NPEFFAnalyzer(trained(hidden=hidden, layers=layers, steps=1), fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 2, n_restarts=1, max_iterations=500, progress=False)
    analysed = sum(a * b for a, b in pefs.sketch().shapes.values()) * 4 / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of finished work would hide what lifting takes
    with Peak() as peak:
        direction: ParameterDirection = analyzer.lift(found, 0, pefs, data, batch_size=8, selective=False)
    assert len(direction)
    return {"weights": analysed, "added": peak.largest - peak.before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory()))
        return
    torch.set_num_threads(1)
    print(machine())
    figures: dict[str, Any] = {}
    for dim in (1024, 4096):
        found = trained_case(dim=dim)
        analysed = sum(a * b for a, b in found.pefs.sketch().shapes.values())
        print(f"\n{analysed:,} parameters in {found.pefs.dim:,} numbers ({analysed / found.pefs.dim:.0f}-fold)")
        print(HEADER)
        figures[str(dim)] = {"parameters": analysed, "ways": compared(found, continued(found), WAYS)}
    found = minilm()
    print(f"\nMiniLM, {len(found.data)} sentences\n{HEADER}")
    few = {way: settings for way, settings in WAYS.items() if settings["method"] != "compressed_sensing"}
    real = compared(found, exact_directions(found), few, some=3)
    command = [sys.executable, "-m", "tests.benchmarks.lifting", "--memory"]
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"lifting one component adds {out['added']:.0f} MiB at its peak; the weights under analysis, and so one "
        f"gradient copy, are {out['weights']:.0f} MiB"
    )
    if options.keep:
        analysed = sum(a * b for a, b in found.pefs.sketch().shapes.values())
        more = {"parameters": analysed, "d": found.pefs.dim, "components": 3, "ways": real}
        keep("lifting", {"dims": figures, "real": more, "memory": out})


if __name__ == "__main__":
    main()
