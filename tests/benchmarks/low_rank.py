"""All components at once: adapters against the time and memory of their PEFs, measuring them against moved weights.

    python -m tests.benchmarks.low_rank [--models MiniLM SmolLM2] [--components 64] [--keep]

Adapters of rank 4 of 64 components, over the time of computing the PEFs in the same process (processor time): plain
directions, selective ones, and selective ones with a second pass. The cosine of an adapter is that with the best cut
of exact lifting, by a whole SVD, of a few components. Solving for selective directions is timed alone too, against
solving for each by itself as this library did before (`solved_apart`), of a few components, times their number.
Memory is the peak of lifting in a process of its own, over that of computing the PEFs in another, as a multiple of
the adapters' size. 16 components are then measured, all together in the activations and one after another with moved
weights, as this library did before (`in_place`), which is kept here alone.

It was never run from beginning to end: no figures of it are kept, and docs/benchmarks.md has none.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.config import LiftRequest
from hf_npeff.decomposition.component import ACTIVE_SHARE
from hf_npeff.fisher.predictions import predict
from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.lifting import combination
from hf_npeff.weights.perturbation import choose_examples
from hf_npeff.weights.plans import Plan, made_selective
from hf_npeff.weights.row_space import row_space
from hf_npeff.weights.steps import find_scale, longest_step
from tests.benchmarks import sets, solved_apart
from tests.benchmarks.measure import keep, machine

RANK, BATCH, CHECKED, MEASURED = 4, 16, 6, 16
EXAMPLES = {"MiniLM": 256, "SmolLM2": 128}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"selective": False},
    "selective": {"selective": True},
    "selective, two passes": {"selective": True, "passes": 2},
}


def analysis(name: str, n: int | None = None) -> tuple[NPEFFAnalyzer, list[Any]]:
    """The model under analysis, and its data."""
    if name == "MiniLM":
        model, tokenizer, data = sets.fine_tuned()
        fisher = FisherConfig(rank=4, sketch="two-stage", sketch_dim=sets.SMALL_SKETCH)
    else:
        from hf_npeff.demo import TARGETS, load_model
        from hf_npeff.studies.word_relations import word_relation_prompts

        model, tokenizer = load_model()
        data = word_relation_prompts(-(-EXAMPLES[name] // 8))
        fisher = FisherConfig(rank=4, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384)
    return NPEFFAnalyzer(model, tokenizer, fisher=fisher), data[: n or EXAMPLES[name]]


def peak() -> float:
    """The largest memory of this process so far, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1024 if found else float("nan")


def cosines(analyzer: NPEFFAnalyzer, found: Any, pefs: PEFs, data: Any, adapters: Any, selective: bool) -> list[float]:
    """Of the adapters of a few components with the best cuts of exact lifting."""
    wanted = list(range(0, len(found), max(1, len(found) // CHECKED)))[:CHECKED]
    values = []
    for j, direction in analyzer.lift_each(found, wanted, pefs, data, selective=selective, batch_size=BATCH):
        inner = ours = best = 0.0
        for name, delta in direction.items():
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            cut, made = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK], adapters[j].delta(name)
            inner, ours, best = (
                total + float((a * b).sum())
                for total, a, b in ((inner, cut, made), (ours, made, made), (best, cut, cut))
            )
        values.append(inner / (ours * best) ** 0.5)
    return values


def solving(found: Any, pefs: PEFs) -> dict[str, float]:
    """Seconds of solving for all selective directions together, and one after another; how many ridges differ."""
    beta = combination(found, pefs)[0]
    plans = [Plan(j, torch.zeros(pefs.dim, dtype=torch.float64), beta[j], {}) for j in range(len(found))]
    begin = time.process_time()
    made = made_selective(found, plans, pefs, LiftRequest(selective=True), None, None)
    together = time.process_time() - begin
    W = found.coefficients.double()
    active = W / W.sum(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny) > ACTIVE_SHARE
    wanted = range(0, len(found), max(1, len(found) // CHECKED))[:CHECKED]
    begin = time.process_time()
    space = row_space(pefs, inside=beta)
    shared = time.process_time() - begin
    ridges = [solved_apart.selective(Contrast(space, W[:, j], ~active[:, j]), beta[j])[1] for j in wanted]
    apart = shared + (time.process_time() - begin - shared) * len(found) / len(wanted)
    same = sum(ridge == made[j].info["ridge"] for ridge, j in zip(ridges, wanted, strict=True))
    return {"together, s": together, "apart, s": apart, "ratio": apart / together, "same ridge": same / len(wanted)}


def in_place(
    analyzer: NPEFFAnalyzer, found: Any, j: int, direction: Any, data: Any
) -> dict[float, tuple[float, float]]:
    """{step of each sign: mean KL on top examples and on others}, with moved weights, a step at a time."""
    examples = analyzer.examples_of(found, data)
    with analyzer.forward_pass() as forward:
        groups = [[examples[i] for i in indices] for indices in choose_examples(found, j, 16, 64, 0)]
        before = [predict(forward, group, BATCH) for group in groups]

        def kl(step: float, which: int) -> float:
            with direction.applied_to(analyzer.model, step):
                return float(before[which].kl_to(predict(forward, groups[which], BATCH)).mean())

        effects = {}
        for sign in (1, -1):
            limit = longest_step(direction, analyzer.model)
            step = sign * find_scale(lambda s, sign=sign: kl(sign * s, 0), 0.5, limit=limit)[0]
            effects[step] = kl(step, 0), kl(step, 1)
        random = direction.random_like(0)
        with random.applied_to(analyzer.model, abs(step)):
            for group in groups:
                predict(forward, group, BATCH)
    return effects


def measured(analyzer: NPEFFAnalyzer, found: Any, pefs: PEFs, data: Any) -> dict[str, float]:
    """Time of measuring 16 components in both ways, lifting included."""
    wanted = list(range(min(MEASURED, len(found))))
    begin = time.process_time()
    analyzer.evaluate_components(found, pefs, data, wanted, batch_size=BATCH, n_top=16, n_others=64)
    together = time.process_time() - begin
    begin = time.process_time()
    for j, direction in analyzer.lift_each(found, wanted, pefs, data, batch_size=BATCH):
        in_place(analyzer, found, j, direction, data)
    return {"together, s": together, "in place, s": time.process_time() - begin}


def compared(name: str, components: int) -> dict[str, Any]:
    """Every figure of one model but memory."""
    analyzer, data = analysis(name)
    begin = time.process_time()
    pefs = analyzer.compute_pefs(data, batch_size=BATCH, progress=False)
    base = time.process_time() - begin
    found = analyzer.decompose(pefs, components, n_restarts=2, progress=False)
    print(f"{name}: {len(pefs)} PEFs in {base:.0f} s of the processor; {found}", flush=True)
    figures: dict[str, Any] = {"n": len(pefs), "PEFs, s": base, "solving": solving(found, pefs), "ways": {}}
    print(f"  {figures['solving']}", flush=True)
    for way, settings in WAYS.items():
        begin = time.process_time()
        adapters = analyzer.lift_adapters(found, pefs, data, RANK, batch_size=BATCH, **settings)
        seconds = time.process_time() - begin
        values = cosines(analyzer, found, pefs, data, adapters, settings["selective"])
        kept = statistics.median(a.retained_energy for a in adapters)
        figures["ways"][way] = {
            "time / PEFs": seconds / base, "cosine": statistics.median(values), "least": min(values), "energy": kept,
        }  # fmt: skip
        print(f"  {way}: {figures['ways'][way]}", flush=True)
    figures["measuring"] = measured(analyzer, found, pefs, data)
    print(f"  {figures['measuring']}", flush=True)
    return figures


def lone(what: str, name: str, components: int, folder: str) -> None:
    """The peak of computing PEFs, or of lifting them, in this process."""
    analyzer, data = analysis(name)
    if what == "pefs":
        analyzer.compute_pefs(data, folder, batch_size=BATCH, progress=False)
        print(json.dumps({"peak": peak()}))
        return
    pefs = PEFs.load(folder)
    found = analyzer.decompose(pefs, components, n_restarts=1, max_iterations=20, progress=False)
    before = peak()
    output = f"{folder}-adapters"
    adapters = analyzer.lift_adapters(
        found, pefs, data, RANK, selective=True, batch_size=BATCH, output_dir=output, check_weights=False
    )
    size = sum(t.numel() * t.element_size() for a in adapters for t in a.tensors.values()) / 2**20
    print(json.dumps({"peak": peak(), "before": before, "adapters": size}))


def memory(name: str, components: int) -> dict[str, float]:
    """Peaks in MiB, and what lifting takes over computing the PEFs, in sizes of the adapters."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for what in ("pefs", "adapters"):
            command = [sys.executable, "-m", "tests.benchmarks.low_rank", "--lone", what, name, f"{folder}/pefs"]
            out = subprocess.run(
                [*command, "--components", str(components)], check=True, capture_output=True, text=True
            )
            peaks[what] = json.loads(out.stdout.splitlines()[-1])
    over = (peaks["adapters"]["peak"] - peaks["pefs"]["peak"]) / peaks["adapters"]["adapters"]
    figures = {"PEFs": peaks["pefs"]["peak"], **peaks["adapters"], "over, adapters": over}
    print(f"  {figures}", flush=True)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["MiniLM", "SmolLM2"])
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--lone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.lone:
        what, name, folder = options.lone
        lone(what, name, options.components, folder)
        return
    print(machine())
    figures = {}
    for name in options.models:
        figures[name] = {**compared(name, options.components), "memory": memory(name, options.components)}
    if options.keep:
        keep("low-rank", {"models": figures})


if __name__ == "__main__":
    main()
