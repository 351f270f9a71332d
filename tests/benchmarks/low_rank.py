"""All components at once: adapters against the time and memory of their PEFs, measuring them against moved weights.

    python -m tests.benchmarks.low_rank [--models MiniLM SmolLM2] [--components 64] [--parts lifting …] [--keep]

Adapters of rank 4 of 64 components, over the time of computing the PEFs in the same process (processor time): plain
directions, selective ones, and selective ones with a second pass. The cosine of an adapter is that with the best cut
of exact lifting, by a whole SVD, of a few components. Solving for selective directions is timed alone too, against
solving for each by itself as this library did before (`solved_apart`), of a few components, times their number.
Memory is the peak of lifting in a process of its own, over that of computing the PEFs in another, as a multiple of
the adapters' size. 16 components are then measured in both ways, plain, lifting included: all together in the
activations, and one after another, lifted whole and measured with moved weights (`in_place`). The KL of a few adapters
is compared with that of the model whose weights their change is added to.
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

from hf_npeff import Adapter, FisherConfig, NPEFFAnalyzer, ParameterDirection, PEFs
from hf_npeff.config import LiftRequest
from hf_npeff.decomposition.component import ACTIVE_SHARE
from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.lifting import combination
from hf_npeff.weights.perturbation import choose_examples
from hf_npeff.weights.plans import Plan, made_selective
from hf_npeff.weights.row_space import row_space
from tests.benchmarks import in_place, sets, solved_apart
from tests.benchmarks.measure import keep, kept, machine

RANK, BATCH, CHECKED, MEASURED = 4, 16, 6, 16
PARTS = ("lifting", "solving", "measuring", "memory")
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


Cut = dict[str, torch.Tensor]
"""{parameter: the best approximation of a change of it}."""


def best_cuts(analyzer: NPEFFAnalyzer, found: Any, pefs: PEFs, data: Any, selective: bool) -> dict[int, Cut]:
    """Of exact lifting, of a few components."""
    wanted = list(range(0, len(found), max(1, len(found) // CHECKED)))[:CHECKED]
    cuts = {}
    for j, direction in analyzer.lift_each(found, wanted, pefs, data, selective=selective, batch_size=BATCH):
        cuts[j] = {}
        for name, delta in direction.items():
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            cuts[j][name] = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
    return cuts


def cosine(adapter: Adapter, cut: Cut) -> float:
    """Over all weights together."""
    inner = ours = best = 0.0
    for name, truth in cut.items():
        made = adapter.delta(name)
        inner += float((made * truth).sum())
        ours, best = ours + float(made.square().sum()), best + float(truth.square().sum())
    return inner / (ours * best) ** 0.5


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


def measured(analyzer: NPEFFAnalyzer, found: Any, pefs: PEFs, data: Any) -> dict[str, float]:
    """Processor time of measuring 16 components in both ways, lifting included, and of what it consists."""
    wanted, settings = list(range(min(MEASURED, len(found)))), {"n_top": 16, "n_others": 64, "batch_size": BATCH}
    clock = time.process_time
    begin = clock()
    adapters = analyzer.lift_adapters(found, pefs, data, RANK, wanted, selective=False, batch_size=BATCH)
    lifted = clock() - begin
    reports = analyzer.evaluate_adapters(adapters, found, data, pefs, **settings)
    together = clock() - begin
    begin = clock()
    alone = 0.0
    examples = analyzer.examples_of(found, data)
    for j, direction in analyzer.lift_each(found, wanted, pefs, data, selective=False, batch_size=BATCH):
        start = clock()
        with analyzer.forward_pass() as forward:
            groups = ([examples[i] for i in chosen] for chosen in choose_examples(found, j, 16, 64, 0))
            in_place.measured(in_place.Watching.of(forward, *groups, BATCH), direction)
        alone += clock() - start
    apart = clock() - begin
    differences = []
    for adapter, report in list(zip(adapters, reports, strict=True))[:CHECKED]:
        deltas = {name: adapter.delta(name) for name in adapter.linear_deltas()}
        norm = sum(float(d.double().square().sum()) for d in deltas.values()) ** 0.5
        direction = ParameterDirection(deltas, adapter.layouts)
        with analyzer.forward_pass() as forward:
            groups = ([examples[i] for i in chosen] for chosen in (report.top_examples, report.other_examples))
            watching = in_place.Watching.of(forward, *groups, BATCH)
            for effect in (report.best, report.opposite):
                kls = (watching.kl(direction, effect.scale * norm, which) for which in (0, 1))
                differences += [abs(a - b) for a, b in zip((effect.top, effect.others), kls, strict=True)]
    return {
        "together, s": together, "lifting, s": lifted, "in place, s": apart, "lifting whole, s": apart - alone,
        "ratio": apart / together, "ratio without lifting": alone / (together - lifted),
        "KL differs, nats": max(differences),
    }  # fmt: skip


def lifting(analyzer: NPEFFAnalyzer, found: Any, pefs: PEFs, data: Any, base: float) -> dict[str, dict[str, float]]:
    """{way: time over that of the PEFs, cosines with the best cuts, energy}."""
    ways, cuts = {}, {}
    for way, settings in WAYS.items():
        begin = time.process_time()
        adapters = analyzer.lift_adapters(found, pefs, data, RANK, batch_size=BATCH, **settings)
        seconds = time.process_time() - begin
        selective = settings["selective"]
        if selective not in cuts:
            cuts[selective] = best_cuts(analyzer, found, pefs, data, selective)
        values = [cosine(adapters[j], cut) for j, cut in cuts[selective].items()]
        retained = statistics.median(a.retained_energy for a in adapters)
        ways[way] = {
            "time / PEFs": seconds / base, "cosine": statistics.median(values), "least": min(values),
            "energy": retained,
        }  # fmt: skip
        print(f"  {way}: {ways[way]}", flush=True)
    return ways


def compared(name: str, components: int, parts: Sequence[str]) -> dict[str, Any]:
    """Every figure of one model but memory."""
    analyzer, data = analysis(name)
    begin = time.process_time()
    pefs = analyzer.compute_pefs(data, batch_size=BATCH, progress=False)
    base = time.process_time() - begin
    found = analyzer.decompose(pefs, components, n_restarts=2, progress=False)
    print(f"{name}: {len(pefs)} PEFs in {base:.0f} s of the processor; {found}", flush=True)
    figures: dict[str, Any] = {"n": len(pefs), "components": components, "PEFs, s": base}
    if "lifting" in parts:
        figures["ways"] = lifting(analyzer, found, pefs, data, base)
    for part, make in (
        ("measuring", lambda: measured(analyzer, found, pefs, data)),
        ("solving", lambda: solving(found, pefs)),
    ):
        if part in parts:
            figures[part] = make()
            print(f"  {part}: {figures[part]}", flush=True)
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the figures; all by default")
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    parser.add_argument("--lone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.lone:
        what, name, folder = options.lone
        lone(what, name, options.components, folder)
        return
    print(machine())
    figures = dict(kept("low-rank").get("models", {}))
    for name in options.models:
        made = compared(name, options.components, options.parts) if set(options.parts) - {"memory"} else {}
        if "memory" in options.parts:
            made["memory"] = memory(name, options.components)
        figures[name] = figures.get(name, {}) | made
        if options.keep:
            keep("low-rank", {"models": figures})


if __name__ == "__main__":
    main()
