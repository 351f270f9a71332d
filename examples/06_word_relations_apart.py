"""Move word relations one at a time: the demo's components as directions, measured on held-out prompts.

Every relation's component is measured in four forms: plain, semi-orthogonal to the others, selective, and selective and
sparing; the last two at full rank, rank 4 and rank 1. Each takes the step that moves eight held-out prompts of the
relation by .5 nats. The ratio is their mean KL divided by that of three held-out prompts of every other relation. The
sign is the better one on analysed prompts.

    python examples/06_word_relations_apart.py --folder runs/demo

It uses the PEFs and the decomposition of `hf-npeff demo` if the folder has them. It writes relations.json there; a
second run continues where the first one stopped. `--only sparing` takes 25 minutes on one core.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_npeff import Decomposition, FisherConfig, NPEFFAnalyzer, ParameterDirection, PEFs
from hf_npeff.demo import MODEL_ID, TARGETS, load_model
from hf_npeff.studies.factors import best_components, purity
from hf_npeff.studies.settings import DemoConfig
from hf_npeff.studies.word_relations import word_pairs, word_relation_prompts
from hf_npeff.weights.lora import low_rank

KL = 0.5
"""The KL in nats on the relation's prompts to which every direction is scaled, within a sixth."""
OWN, OTHERS, WATCHED = 8, 3, 8
"""How many held-out prompts of the relation and of every other one; how many analysed prompts of each decide the
sign."""
RANKS = (None, 4, 1)
PLAIN = {"as it is": {"selective": False}, "semi-orthogonal": {"semi_orthogonal": True}}


def held_out(analysed: list[dict[str, Any]], seed: int) -> dict[str, list[str]]:
    """{relation: prompts} with other demonstrations, and with words that were not analysed if there are enough."""
    used = {(prompt["relation"], prompt["word"]) for prompt in analysed}
    generator = random.Random(seed)
    prompts: dict[str, list[str]] = {}
    for relation, pairs in word_pairs().items():
        new = [pair for pair in pairs if (relation, pair[0]) not in used]
        prompts[relation] = []
        for query in generator.sample(new if len(new) >= OWN else pairs, OWN):
            shown = generator.sample([pair for pair in pairs if pair != query], 4)
            prompts[relation].append("\n".join([*(f"{a} -> {b}" for a, b in shown), f"{query[0]} ->"]))
    return prompts


class Measured:
    """The predictions of a model after a step along a direction."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def predicted(self, prompts: list[str]) -> Tensor:
        """log p of the next token, (n, k)."""
        inputs = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return self.model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1].log_softmax(-1)

    def kl(self, direction: ParameterDirection, step: float, prompts: list[str]) -> float:
        """The mean KL from the original predictions to those after the step."""
        if new := [prompt for prompt in prompts if prompt not in self.before]:
            self.before |= dict(zip(new, self.predicted(new), strict=True))
        before = torch.stack([self.before[prompt] for prompt in prompts])
        with direction.applied_to(self.model, step):
            after = self.predicted(prompts)
        return float((before.exp() * (before - after)).sum(1).mean())

    def step(self, direction: ParameterDirection, first: float, prompts: list[str]) -> tuple[float, float]:
        """The step that moves the prompts by `KL`, with the sign of the first step, and the KL there."""
        step, kl = first, 0.0
        for _ in range(6):
            kl = self.kl(direction, step, prompts)
            if abs(kl - KL) < KL / 6:
                break
            step *= min(max((KL / max(kl, 1e-4)) ** 0.5, 0.3), 4.0)
        return step, kl

    def signed(self, direction: ParameterDirection, first: float, own: list[str], others: list[str]) -> float:
        """The step that reaches `KL` on its own analysed prompts, with the sign that moves the others less."""
        step, kl = self.step(direction, first, own)
        ahead, back = (kl, self.kl(direction, -step, own))
        ratios = [a / self.kl(direction, s, others) for a, s in ((ahead, step), (back, -step))]
        return step if ratios[0] >= ratios[1] else -step


def cut(direction: ParameterDirection, rank: int | None) -> ParameterDirection:
    """Every weight's change, truncated to a rank by its singular values, as `to_adapter` does."""
    if rank is None:
        return direction
    return ParameterDirection({n: torch.mm(*low_rank(d, rank)[:2]) for n, d in direction.items()}, direction.layouts)


def directions(
    analyzer: NPEFFAnalyzer,
    analysed: tuple[Decomposition, int, PEFs],
    prompts: list[dict[str, Any]],
    only: str,
) -> Iterator[tuple[str, int | None, ParameterDirection]]:
    """The directions of a component, as (kind, rank, direction)."""
    decomposition = analysed[0]
    for kind, how in PLAIN.items():
        if only in ("", kind):
            yield kind, None, analyzer.lift(*analysed, prompts, batch_size=16, **how)
    if only not in ("", "selective", "sparing"):
        return
    selective = analyzer.lift(*analysed, prompts, batch_size=16)
    for rank in RANKS if only != "sparing" else ():
        yield "selective", rank, cut(selective, rank)
    if only != "selective":
        same = [selective] * len(RANKS)
        spared = analyzer.spare(same, prompts, decomposition=decomposition, rank=RANKS, batch_size=16)
        yield from (("sparing", rank, direction) for rank, direction in zip(RANKS, spared, strict=True))


def main(folder: Path = Path("runs/demo"), relations: str = "", only: str = "", seed: int = 0) -> dict[str, Any]:
    demo = DemoConfig()
    model, tokenizer = load_model()
    model.name_or_path = MODEL_ID
    prompts = word_relation_prompts(demo.queries, seed=demo.seed)
    fisher = FisherConfig(rank=demo.rank, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384, seed=demo.seed)
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    pefs = analyzer.compute_pefs(prompts, folder / "pefs", batch_size=16)
    if not (folder / "decomposition" / "config.json").is_file():
        found = analyzer.decompose(pefs, demo.components, power=0.5, n_restarts=16, seed=demo.seed)
        found.save_pretrained(folder / "decomposition")
    decomposition = Decomposition.load(folder / "decomposition")
    best = best_components(decomposition.coefficients, decomposition.columns["relation"])
    tops = {
        str(relation): purity(decomposition[j].top_examples(12).columns["relation"])
        for relation, (j, _) in best.items()
    }
    pure = {name: best[name][0] for name, (own, share) in tops.items() if own == name and share >= 0.8}
    file = folder / "relations.json"
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    new, measured = held_out(prompts, seed), Measured(model, tokenizer)
    for relation in relations.split(",") if relations else list(pure):
        row = figures.setdefault(relation, {})
        own, others = new[relation], [p for r, some in new.items() if r != relation for p in some[:OTHERS]]
        top = [str(text) for text in decomposition[pure[relation]].top_examples(WATCHED).columns["text"]]
        quiet = [prompt["text"] for prompt in prompts if prompt["relation"] != relation][:WATCHED]
        if only and only in row:
            continue
        signs: dict[str, float] = {}
        for kind, rank, direction in directions(analyzer, (decomposition, pure[relation], pefs), prompts, only):
            if kind not in signs:
                signs[kind] = measured.signed(direction, 4.0 if kind == "sparing" else 0.2, top, quiet)
            step, kl = measured.step(direction, signs[kind], own)
            disturbed = measured.kl(direction, step, others)
            name = kind if rank is None else f"{kind}, rank {rank}"
            row[name] = {
                "step": round(step, 4),
                "own": round(kl, 4),
                "others": disturbed,
                "ratio": round(kl / disturbed, 1),
            }
            print(f"{relation:14} {name:20} {row[name]}", flush=True)
            file.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="the folder of the demo")
    parser.add_argument(
        "--relations", default="", help="relations, separated by commas; by default all with a pure component"
    )
    parser.add_argument(
        "--only", default="", choices=["", *PLAIN, "selective", "sparing"], help="measure only this kind of direction"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out prompts")
    main(**vars(parser.parse_args()))
