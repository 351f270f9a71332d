"""Do two independent fits find the same components? On SmolLM2's word relations, or on a fine-tuned MiniLM's intents.

    python -m tests.benchmarks.stability [--model MiniLM] [--largest 2048] [--starts 24] [--store DIR] [--output FILE]

Two fits are the best of R starts each, of other seeds. The figure is the share of components of one that have a
partner of their own in the other at |cosine| ≥ 0.9, mean over pairs of fits. PEFs are computed once, with 8 rows; c
rows are their leading ones. Every start runs to convergence in Gram space and is kept, so that any R is read off the
same starts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.decomposition.solvers import DenseRows, Fit, gram_space
from hf_npeff.decomposition.starts import solve
from hf_npeff.decomposition.weighting import balanced
from hf_npeff.demo import TARGETS, load_model
from hf_npeff.studies.factors import best_components
from hf_npeff.studies.word_relations import word_relation_prompts
from tests.benchmarks import sets
from tests.benchmarks.measure import keep

RESTARTS = (1, 4, 12)
TOLERANCE = 1e-6


def agreement(G: Tensor, other: Tensor, threshold: float = 0.9) -> float:
    """The share of rows that have a partner of their own."""
    cosines = (G @ other.T).abs().cpu()
    matched = cosines[linear_sum_assignment(cosines.numpy(), maximize=True)]
    return float((matched >= threshold).double().mean())


def starts(rows: DenseRows, r: int, count: int) -> list[Fit]:
    generators = (torch.Generator().manual_seed(seed) for seed in range(count))
    return [solve(rows, r, generator, max_iterations=600, tolerance=TOLERANCE) for generator in generators]


def agreements(fits: list[Fit]) -> dict[int, float]:
    """{R: agreement of the best of R with the best of R others}, over all disjoint groups of R."""
    found = {}
    for R in RESTARTS:
        groups = [fits[i : i + R] for i in range(0, len(fits) - R + 1, R)]
        best = [min(group, key=lambda fit: fit.losses[-1]) for group in groups]
        pairs = list(itertools.combinations(best, 2))[:200]
        if pairs:
            found[R] = sum(agreement(a.G, b.G) for a, b in pairs) / len(pairs)
    return found


def compute(options: argparse.Namespace, device: str) -> PEFs:
    """PEFs of all examples, from the store where it is whole."""
    if options.model == "MiniLM":
        return sets.minilm()
    if options.store is not None and (options.store / "manifest.json").exists():
        return PEFs.load(options.store)
    model, tokenizer = load_model()
    fisher = FisherConfig(rank=8, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384)
    analyzer = NPEFFAnalyzer(model.to(device), tokenizer, fisher=fisher)
    prompts = word_relation_prompts(-(-options.largest // 8))[: options.largest]
    started = time.perf_counter()
    pefs = analyzer.compute_pefs(prompts, options.store, batch_size=64 if device == "cuda" else 16)
    print(f"PEFs of {len(prompts)} prompts, {time.perf_counter() - started:.0f} s on {device}")
    return pefs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(sets.ATTRIBUTES), default="SmolLM2")
    parser.add_argument("--smallest", type=int, default=64)
    parser.add_argument("--largest", type=int, default=2048)
    parser.add_argument("--starts", type=int, default=24)
    parser.add_argument("--rows", type=int, nargs="+", default=[4])
    parser.add_argument("--components", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--powers", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--store", type=Path, help="where PEFs are kept, or were")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    if options.model == "MiniLM":
        options.largest = min(options.largest, sets.EXAMPLES["MiniLM"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pefs = compute(options, device)
    relations = pefs.columns[sets.ATTRIBUTES[options.model]]
    print(
        "| n | c | power | r | explained | AUROC | " + " | ".join(f"best of {R}" for R in RESTARTS) + " | s a start |"
    )
    print("|---" * (7 + len(RESTARTS)) + "|")
    table = []
    sizes = [options.smallest * 2**i for i in range(12) if options.smallest * 2**i <= options.largest]
    for n, c, power in itertools.product(sizes, options.rows, options.powers):
        A = balanced(pefs.factors[:n, :c].to(device), torch.ones(pefs.dim), power)
        X, _ = gram_space(A) if n * c < A.shape[2] else (A, None)
        rows = DenseRows(X)
        for r in options.components:
            begun = time.perf_counter()
            fits = starts(rows, r, options.starts)
            seconds = (time.perf_counter() - begun) / options.starts
            best = min(fits, key=lambda fit: fit.losses[-1])
            found = best_components(best.W.cpu(), relations[:n])
            row = {
                "n": n, "c": c, "power": power, "r": r, "explained": 1 - best.losses[-1],
                "auroc": sum(score for _, score in found.values()) / len(found),
                "agreement": agreements(fits), "seconds": seconds,
            }  # fmt: skip
            table.append(row)
            print(
                f"| {n} | {c} | {power:g} | {r} | {row['explained']:.3f} | {row['auroc']:.3f} | "
                + " | ".join(f"{value:.2f}" for value in row["agreement"].values())
                + f" | {seconds:.2f} |",
                flush=True,
            )
            if options.output is not None:
                options.output.write_text(json.dumps(table, indent=1))
    if options.keep:
        keep(f"stability-{options.model}", {"table": table})


if __name__ == "__main__":
    main()
