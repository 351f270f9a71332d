"""Fidelity per cost of the output factors, on SmolLM2: Fisher error and agreement of coefficients, against time.

    python -m tests.benchmarks.fidelity [--prompts 64] [--truth 576] [--power 0.5] [--device cuda] [--output FILE]
    python -m tests.benchmarks.fidelity --errors-only [--keep]
    python -m tests.benchmarks.fidelity --time-only [--rounds 5] [--keep]

The truth is the exact Fisher: all h = 576 eigenpairs of the last hidden state's metric, h backward passes a batch (with
--truth the leading ones, for more prompts). Errors are ‖F̂ − F‖_F / ‖F‖_F of sketched PEFs, mean over prompts.
Coefficients are compared with those of the exact PEFs: mean correlation of matched components, and mean best AUROC for
the relations. Two fits of the exact PEFs from other starts say how large an agreement can be. Every time is that of the
rows of all prompts, self-test included. --errors-only and --time-only need no GPU: Fisher errors of 6 prompts
against their 64 leading rows; whole passes over 2 prompts, in turn, as ratios of processor time within a round to
spectral rows with c = 4.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_npeff import NPEFF, FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.data import Examples
from hf_npeff.demo import TARGETS, load_model
from hf_npeff.fisher.preparation import choose_metric, prepare
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.studies.factors import best_components
from hf_npeff.studies.word_relations import word_relation_prompts
from tests.benchmarks.measure import in_turn, keep, kept, machine, ratio

RANKS = (1, 2, 4, 8, 16, 32)
TIMED = [("spectral", 1), ("spectral", 4), ("spectral", 32), ("projection", 4), ("projection", 32), ("sampling", 32)]
FACTORS = ("spectral", "projection", "sampling")
BASE = FisherConfig(target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384, sketch_tolerance=10.0)
REDUCED = 64
"""The leading rows of an exact PEF that are decomposed: they hold all that a decomposition can see."""


def fisher_error(factors: Tensor, own_norms: Tensor, exact: Tensor, norms: Tensor) -> float:
    """Mean of ‖F̂ − F‖ / ‖F‖ over examples, from inner products of rows; PEFs (n, c, d) and (n, C, d) of unit norm."""
    errors = []
    for i in range(len(factors)):
        A = factors[i].to(exact.device) * (own_norms[i].item() / norms[i].item()) ** 0.5
        own = (A @ A.T).double().square().sum()
        cross = (A @ exact[i].T).double().square().sum()
        errors.append(float((own - 2 * cross + 1).clamp_min(0).sqrt()))
    return statistics.mean(errors)


def coefficient_agreement(W: Tensor, other: Tensor) -> float:
    """Mean correlation of the coefficients of matched components."""
    correlations = torch.corrcoef(torch.cat([W.T, other.T]).double())[: W.shape[1], W.shape[1] :].nan_to_num()
    return float(correlations[linear_sum_assignment(correlations.numpy(), maximize=True)].mean())


def auroc(W: Tensor, relations: list[str]) -> float:
    """Mean over relations of the best component's."""
    found = best_components(W, relations)
    return sum(score for _, score in found.values()) / len(found)


def config(factor: str, rank: int) -> FisherConfig:
    return dataclasses.replace(BASE, output_factor=factor, rank=rank)  # type: ignore[arg-type]


@contextlib.contextmanager
def passes(model: Any, tokenizer: Any, examples: Any) -> Iterator[Callable[[str, int], RowMaker]]:
    """What gives the pass of an output factor and c; all have the sketch that the first of them chose and tested."""
    sketch: Sketch | None = None
    with contextlib.ExitStack() as stack:

        def make(factor: str, rank: int) -> RowMaker:
            nonlocal sketch
            fisher = config(factor, rank)
            forward = stack.enter_context(NPEFFAnalyzer(model, tokenizer, fisher=fisher).forward_pass())
            if sketch is None:
                sketch = prepare(forward, fisher, examples).sketch
            return RowMaker(forward, fisher, sketch)

        yield make


def times(rounds: int) -> dict[str, float]:
    """{"factor c": time over that of spectral rows with c = 4} on one thread, printed."""
    torch.set_num_threads(1)
    print(machine())
    model, tokenizer = load_model()
    examples = Examples(word_relation_prompts(1), tokenizer)[:2]
    with passes(model, tokenizer, examples) as make:
        tries = {f"{factor} {c}": functools.partial(make(factor, c).rows, examples) for factor, c in TIMED}
        taken = in_turn(tries, rounds)
    found = {label: ratio(taken, label, "spectral 4") for label in taken}
    for label, value in found.items():
        print(f"{label:14} {value:6.2f} × spectral 4")
    return found


def fidelity(options: argparse.Namespace) -> dict[str, Any]:
    """Errors, agreement and times against the truth, printed."""
    model, tokenizer = load_model()
    model.to(options.device)
    prompts = word_relation_prompts(-(-options.prompts // 8))[: options.prompts]

    def compute(factor: str, rank: int) -> tuple[PEFs, float]:
        analyzer = NPEFFAnalyzer(model, tokenizer, fisher=config(factor, rank))
        started = time.perf_counter()
        pefs = analyzer.compute_pefs(prompts, batch_size=options.batch)
        return pefs, time.perf_counter() - started

    def components(pefs: PEFs, seed: int = 0) -> Tensor:
        device = options.device if torch.device(options.device).type == "cuda" else None
        estimator = NPEFF(
            options.components, n_restarts=options.restarts, power=options.power, seed=seed, device=device,
            progress=False,
        )  # fmt: skip
        return estimator.fit(pefs).coefficients

    compute("spectral", 1)  # first calls are slow
    truth, seconds = compute("spectral", options.truth)
    relations = truth.columns["relation"]
    exact, norms = truth.factors.to(options.device), truth.norms
    _, U = torch.linalg.eigh((exact @ exact.mT).double())
    reduced = PEFs.from_factors((U[..., -REDUCED:].mT.to(exact.dtype) @ exact).cpu(), relation=relations)
    W, again = components(reduced), components(reduced, seed=1)
    figures: dict[str, Any] = {
        "prompts": len(prompts), "truth": options.truth, "power": options.power, "device": str(options.device),
        "seconds of the truth": seconds, "auroc of the truth": auroc(W, relations),
        "agreement of two fits": coefficient_agreement(W, again), "components": options.components, "rows": [],
    }  # fmt: skip
    print(f"{len(prompts)} prompts on {options.device}, F^{options.power:g}, {options.components} components; truth: "
          f"{options.truth} rows, {seconds:.1f} s, AUROC {auroc(W, relations):.3f}; two fits of it agree at "
          f"{figures['agreement of two fits']:.2f}")  # fmt: skip
    print("| rows | c | Fisher error | agreement of coefficients | AUROC | seconds |\n" + "|---" * 6 + "|")
    for factor in FACTORS:
        for rank in options.ranks:
            pefs, seconds = compute(factor, rank)
            found = components(pefs)
            row = {
                "factor": factor, "c": rank, "error": fisher_error(pefs.factors, pefs.norms, exact, norms),
                "agreement": coefficient_agreement(W, found), "auroc": auroc(found, relations), "seconds": seconds,
            }  # fmt: skip
            figures["rows"].append(row)
            print(
                f"| {factor} | {rank} | {row['error']:.3f} | {row['agreement']:.2f} | {row['auroc']:.3f} | "
                f"{seconds:.1f} |",
                flush=True,
            )
            if options.output is not None:
                options.output.write_text(json.dumps(figures, indent=1))
    return figures


def errors(prompts: int, rows: int, ranks: Sequence[int]) -> dict[str, Any]:
    """{"factor c": Fisher error} of a few prompts against the leading rows, printed: what a CPU can do."""
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    examples = Examples(word_relation_prompts(1), tokenizer)[:prompts]
    found: dict[str, float] = {}
    with passes(model, tokenizer, examples) as make:

        def compute(factor: str, rank: int) -> tuple[Tensor, Tensor]:
            values = make(factor, rank).rows(examples)
            return values["factors"], values["norms"]

        truth = compute("spectral", rows)
        for factor in FACTORS:
            for rank in ranks:
                found[f"{factor} {rank}"] = fisher_error(*compute(factor, rank), *truth)
                print(f"{factor} {rank}: Fisher error {found[f'{factor} {rank}']:.3f}", flush=True)
    return {"prompts": prompts, "rows": rows, "values": found}


def metrics(prompts: int, rows: int, ranks: Sequence[int]) -> dict[str, Any]:
    """Fisher errors of spectral rows that are the best ones in either metric, and what that of the parameters takes."""
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    examples = Examples(word_relation_prompts(1), tokenizer)[:prompts]
    with passes(model, tokenizer, examples) as make:
        values = make("spectral", rows).rows(examples)
        truth = values["factors"], values["norms"]
        like = make("spectral", rows)
        wanted = dataclasses.replace(like.config, spectral_metric="parameters")
        begin = time.process_time()
        _, measured = choose_metric(like.forward, wanted)
        taken = time.process_time() - begin
        found: dict[str, float] = {}
        for rank in ranks:
            for name, metric in (("hidden", None), ("parameters", measured)):
                maker = dataclasses.replace(make("spectral", rank), metric=metric)
                begin = time.process_time()
                values = maker.rows(examples)
                seconds = (time.process_time() - begin) / prompts
                found[f"{name} {rank}"] = fisher_error(values["factors"], values["norms"], *truth)
                print(
                    f"{name} {rank}: Fisher error {found[f'{name} {rank}']:.3f}, {seconds:.2f} s a prompt", flush=True
                )
    print(f"measuring the metric of the parameters: {taken:.0f} s, as much as {taken / seconds:.0f} prompts at that c")
    return {"prompts": prompts, "rows": rows, "values": found, "as prompts": taken / seconds, "c": ranks[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--truth", type=int, default=576, help="rows of the truth")
    parser.add_argument("--power", type=float, default=1.0)
    parser.add_argument("--components", type=int, default=8)
    parser.add_argument("--restarts", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="where the figures go")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument(
        "--errors-only", action="store_true", help="Fisher errors of 6 prompts against 64 rows, on a CPU"
    )
    parser.add_argument("--metric-only", action="store_true", help="the metric of the parameters; minutes on a CPU")
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    if options.time_only:
        found = times(options.rounds)
        if options.keep:
            keep("fidelity", {**kept("fidelity"), "times": found})
    elif options.errors_only:
        of_few = errors(6, 64, [1, 4, 32])
        if options.keep:
            keep("fidelity", {**kept("fidelity"), "errors": of_few})
    elif options.metric_only:
        of_metrics = metrics(6, 64, [1, 4])
        if options.keep:
            keep("fidelity", {**kept("fidelity"), "metrics": of_metrics})
    else:
        fidelity(options)


if __name__ == "__main__":
    main()
