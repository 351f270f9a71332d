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
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_npeff import Decomposition, FisherConfig, NPEFFAnalyzer, ParameterDirection, PEFs
from tests import reference
from tests.benchmarks.measure import in_turn, keep, machine, ratio

VOCABULARY, LENGTH, RULES = 48, 8, 6
METHODS = ("exact", "adjoint", "iht", "fista")
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "exact, 16 top examples": {"method": "exact", "top_examples": 16},
    "adjoint": {"method": "adjoint"},
    "compressed sensing, IHT": {"method": "compressed_sensing", "solver": "iht"},
    "compressed sensing, FISTA": {"method": "compressed_sensing", "solver": "fista"},
}
ROUNDS, TARGET_KL = 5, 0.1
HEADER = (
    "| way | cosine, median | lowest | time / exact | step / exact | KL ratio | target reached |\n" + "|---" * 7 + "|"
)


def trained(seed: int = 0, hidden: int = 64, layers: int = 2, steps: int = 150) -> Any:
    """A BERT classifier that has learned which of six trigger words an input holds; a few seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            num_labels=RULES,
            max_position_embeddings=16,
            pad_token_id=0,
        )
        model = transformers.BertForSequenceClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(steps):
            ids, labels = batch(64, seed=1000 + step)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def batch(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Random words with one trigger in each, and, in a fifth of them, a second one of another class."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, VOCABULARY, (n, LENGTH), generator=generator)
    labels = torch.randint(0, RULES, (n,), generator=generator)
    ids[torch.arange(n), torch.randint(0, LENGTH // 2, (n,), generator=generator)] = 1 + labels
    both = torch.rand(n, generator=generator) < 0.2
    other = torch.randint(0, RULES, (n,), generator=generator)
    ids[both, LENGTH - 1] = 1 + other[both]
    return ids, labels


@dataclass
class Case:
    """A trained model, analysed."""

    analyzer: NPEFFAnalyzer
    data: list[dict[str, Any]]
    pefs: PEFs
    decomposition: Decomposition


def case(n: int = 80, rank: int = 2, components: int = 6, dim: int = 1024, **settings: Any) -> Case:
    """PEFs of a trained model in a countsketch of `dim` numbers, and a converged decomposition."""
    ids, labels = batch(n, seed=1)
    data = [
        {"id": f"e{i}", "input_ids": x, "label": y}
        for i, (x, y) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True))
    ]
    fisher = FisherConfig(rank=rank, sketch="countsketch", sketch_dim=dim, storage_dtype="float32")
    analyzer = NPEFFAnalyzer(trained(), fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    options = {"n_restarts": 4, "max_iterations": 3000, "tolerance": 1e-10, "progress": False, **settings}
    return Case(analyzer, data, pefs, analyzer.decompose(pefs, components, **options))


def continued(found: Case, iterations: int = 8) -> dict[str, Tensor]:
    """{parameter: (r, out, in)}: the decomposition continued without a sketch from the same coefficients.

    Unsketched rows in an orthonormal basis of them all; from W alone, G by dense eigenproblems with W fixed, then both.
    """
    config = FisherConfig(rank=found.pefs.rank, sketch="identity", storage_dtype="float32")
    whole = NPEFFAnalyzer(found.analyzer.model, fisher=config).compute_pefs(found.data)
    rows = whole.factors.double()
    Q, _ = torch.linalg.qr(rows.flatten(0, 1).T)
    A = rows @ Q
    W = found.decomposition.coefficients.double()
    F = A.mT @ A
    G = torch.stack([reference.top_eigenvector(torch.einsum("i,iab->ab", w, F)) for w in W.T])
    for _ in range(20):
        for j in range(len(G)):
            others = W.clone()
            others[:, j] = 0
            mixed = torch.einsum("i,il->l", W[:, j], others)
            R = torch.einsum("i,iab->ab", W[:, j], F) - torch.einsum("l,la,lb->ab", mixed, G, G)
            G[j] = reference.top_eigenvector(R)
    _, G, _ = reference.dense_fit(A, G, iterations)
    blocks, shapes = whole.sketch().blocks, whole.sketch().shapes
    assert blocks is not None
    return {name: (G @ Q.T)[:, blocks[name]].unflatten(1, shapes[name]) for name in shapes}


def cosines(found: Case, truth: dict[str, Tensor]) -> dict[str, list[float]]:
    """{method: |cosine| of every component to the truth}; ĝ and −ĝ are one component."""
    wanted = list(range(len(found.decomposition)))
    result = {}
    for method in METHODS:
        solver = method if method in ("iht", "fista") else "iht"
        how = "compressed_sensing" if method in ("iht", "fista") else method
        lifted = found.analyzer.lift(
            found.decomposition,
            wanted,
            found.pefs,
            found.data,
            method=how,
            solver=solver,  # type: ignore[arg-type]
        )
        result[method] = [
            abs(d.cosine({name: truth[name][j] for name in d})) for j, d in zip(wanted, lifted, strict=True)
        ]
    return result


def table(measured: dict[str, list[float]]) -> str:
    """Median and minimum of every method."""
    lines = ["method   median  minimum"]
    for method, values in measured.items():
        lines.append(f"{method:8} {float(torch.tensor(values).median()):.4f}   {min(values):.4f}")
    return "\n".join(lines)


def minilm(n: int = 48, components: int = 6) -> Case:
    """PEFs of a fine-tuned MiniLM's sentences in two stages, 1,300-fold, and their decomposition."""
    from tests.benchmarks import sets

    model, tokenizer, data = sets.fine_tuned()
    fisher = FisherConfig(rank=2, sketch="two-stage", sketch_dim=sets.SMALL_SKETCH, storage_dtype="float32")
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    pefs = analyzer.compute_pefs(data[:n])
    return Case(analyzer, data[:n], pefs, analyzer.decompose(pefs, components, n_restarts=4, progress=False))


def exact_directions(found: Case) -> dict[str, Tensor]:
    """{parameter: (r, out, in)}: exact lifting itself, where nothing better can be had."""
    wanted = list(range(len(found.decomposition)))
    directions = found.analyzer.lift(found.decomposition, wanted, found.pefs, found.data)
    return {name: torch.stack([d[name] for d in directions]) for name in directions[0]}


def compared(
    found: Case, truth: dict[str, Tensor], ways: Mapping[str, dict[str, Any]], some: int | None = None
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
    ids, labels = batch(16, seed=1)
    data = [{"input_ids": x, "label": y} for x, y in zip(ids.tolist(), labels.tolist(), strict=True)]
    fisher = FisherConfig(rank=1, sketch="countsketch", sketch_dim=4096)
    analyzer = NPEFFAnalyzer(trained(hidden=hidden, layers=layers, steps=1), fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 2, n_restarts=1, max_iterations=500, progress=False)
    analysed = sum(a * b for a, b in pefs.sketch().shapes.values()) * 4 / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of finished work would hide what lifting takes
    with Peak() as peak:
        direction: ParameterDirection = analyzer.lift(found, 0, pefs, data, batch_size=8)
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
        found = case(dim=dim)
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
