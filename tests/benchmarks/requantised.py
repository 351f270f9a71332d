"""What is left of a component's change when it is merged into 8 and 4 bits, on the demo's model and prompts.

    python -m tests.benchmarks.requantised [--queries 16]

SmolLM2-135M-Instruct, as the package of the demo has it: dequantised from 4 bits (Q4_1), a grid that is none of the
four. Prompts of eight word relations; the component with the purest top examples is lifted selectively at rank 4, at a
step that moves them by .1 nats, and measured on other prompts. Printed for every grid, beside the base model and merged
into it: the share of the change of the predictions that is kept, the mean KL on the relation's own prompts and on the
others, and the leak, the others' over the own, as a multiple of that of the change as it is.
"""

from __future__ import annotations

import argparse
from typing import Any

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.demo import TARGETS, load_model
from hf_npeff.studies.factors import best_components
from hf_npeff.studies.word_relations import word_relation_prompts
from hf_npeff.weights.requantised import SCHEMES

_COMPONENTS, _RANK, _TOP, _KL = 16, 4, 8, 0.1


def line(step: Any, own: str, relations: list[str], plain: float) -> tuple[str, float]:
    """A row of the table, and the leak of the step."""
    groups = step.groups
    others = [(groups[f"relation={r}"].n, groups[f"relation={r}"].kl) for r in relations if r != own]
    kl_own = groups[f"relation={own}"].kl
    kl_others = sum(n * kl for n, kl in others) / sum(n for n, _ in others)
    leak = kl_others / kl_own
    what = "as it is" if step.quantised is None else f"{'merged into' if step.merged else 'beside'} {step.quantised}"
    kept = "100%" if step.kept is None else f"{step.kept:.0%}"
    return f"| {what} | {kept} | {kl_own:.3f} | {kl_others:.4f} | {leak / (plain or leak):.2f} |", leak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=16)
    queries = parser.parse_args().queries
    model, tokenizer = load_model()
    prompts = word_relation_prompts(queries)
    fisher = FisherConfig(rank=2, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384)
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    pefs = analyzer.compute_pefs(prompts, batch_size=16)
    decomposition = analyzer.decompose(pefs, _COMPONENTS, power=0.5)
    best = best_components(decomposition.coefficients, decomposition.columns["relation"])
    own, (component, precision) = max(best.items(), key=lambda item: item[1][1])
    (adapter,) = analyzer.lift_adapters(decomposition, pefs, prompts, rank=_RANK, components=[component], batch_size=16)
    (report,) = analyzer.evaluate_adapters(
        [adapter], decomposition, prompts, pefs, n_top=_TOP, n_others=32, target_kl=_KL, batch_size=16
    )
    print(f"component {component}, {own} (average precision {precision:.2f}): {report}")
    measured = analyzer.measure(
        adapter, word_relation_prompts(queries, seed=1), scales=(report.scale,), by="relation", random=False,
        quantise=SCHEMES, worst=0, batch_size=16,
    )  # fmt: skip
    print("| change | kept | KL, its own | KL, others | leak, × as it is |", "|---|---|---|---|---|", sep="\n")
    plain = 0.0
    for step in measured.steps:
        row, leak = line(step, str(own), sorted(set(map(str, best))), plain)
        plain = plain or leak
        print(row)


if __name__ == "__main__":
    main()
