"""In-context learning: the same queries after more and more demonstrations, and after shuffled demonstrations.

All prompts are decomposed together, so that a component means the same for any number of demonstrations. Its
coefficients show at which number of demonstrations it appears and at which it fades.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.studies.measures import purity
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.prompted import first_token
from hf_npeff.studies.result import StudyResult, markdown, model_name, number
from hf_npeff.studies.settings import InContextConfig
from hf_npeff.studies.word_relations import word_pairs


def in_context_prompts(
    config: InContextConfig, pairs: Mapping[str, Sequence[tuple[str, str]]] | None = None
) -> list[dict[str, Any]]:
    """The same queries in every condition.

    A query's m demonstrations are the first m of its longest list, so that conditions differ in nothing else. Shuffled
    demonstrations keep the words and the answers, but give every word the answer of another word.

    Args:
        config: the settings.
        pairs: {relation: [(word, answer), …]}; None uses the word relations of gensim's list.

    Returns:
        Rows with `text`, `query`, `answer`, `relation`, `shots` and `shuffled`, condition after condition.

    Raises:
        ValueError: if a relation has too few pairs.
        ModuleNotFoundError: if gensim is not installed and no pairs are given.
    """
    pairs = word_pairs() if pairs is None else pairs
    most = max(config.shots)
    rng = random.Random(config.seed)
    queries = []
    for relation, known in pairs.items():
        if len(known) < max(config.queries, most + 1):
            raise ValueError(
                f"{relation} has {len(known)} pairs, too few for {config.queries} queries and {most} demonstrations"
            )
        for word, answer in rng.sample(list(known), config.queries):
            others = rng.sample([pair for pair in known if pair != (word, answer)], most)
            queries.append((relation, word, answer, others))
    rows = []
    for shuffled in (False, True) if config.shuffled else (False,):
        for shots in config.shots:
            if shuffled and shots < 2:
                continue  # one answer cannot be another's
            for relation, word, answer, others in queries:
                lines = [*_demonstrations(others[:shots], shuffled), f"{word} ->"]
                row = {"text": "\n".join(lines), "query": word, "answer": answer, "relation": relation}
                rows.append({**row, "shots": shots, "shuffled": shuffled})
    return rows


def _demonstrations(pairs: Sequence[tuple[str, str]], shuffled: bool) -> list[str]:
    answers = [answer for _, answer in pairs]
    if shuffled:
        answers = [*answers[1:], answers[0]]
    return [f"{word} -> {answer}" for (word, _), answer in zip(pairs, answers, strict=True)]


@dataclass(frozen=True)
class Condition:
    """One number of demonstrations, shuffled or not.

    Attributes:
        shots: the number of demonstrations of a prompt.
        shuffled: whether each demonstration has the answer of another one.
        accuracy: the share of queries whose most likely next token begins the answer.
        by_relation: {relation: accuracy}.
        shares: for each component, its mean share of an example's coefficients.
        active: for each component, the share of examples on which it is active.
        norm: the mean Frobenius norm of the PEFs before scaling.
        entropy: the mean entropy of the predictions, in nats.
    """

    shots: int
    shuffled: bool
    accuracy: float
    by_relation: dict[str, float]
    shares: list[float]
    active: list[float]
    norm: float
    entropy: float


@dataclass
class InContextResult(StudyResult):
    """The outcome of `run_in_context`.

    Attributes:
        conditions: the conditions, in the order of the prompts.
        relations: for each component, the most common relation of its top examples, with its share.
        model: the model's name.
        explained: the share of the PEFs that all components together explain.
        stability: the stability of every component.
        config: the settings.
        decomposition: the decomposition of all prompts together; None if the result was read from a file.
    """

    conditions: list[Condition]
    relations: list[tuple[str, float]]
    model: str
    explained: float
    stability: list[float]
    config: InContextConfig
    decomposition: Decomposition | None = None

    @property
    def changes(self) -> dict[str, list[int]]:
        """The components that appear, that fade, and that stay.

        A component appears if, with the most demonstrations, it is active on at least twice as many examples as with
        the fewest, and on at least 5% more of all examples. A component fades in the reverse case.
        """
        plain = [c for c in self.conditions if not c.shuffled]
        groups: dict[str, list[int]] = {"appear": [], "fade": [], "stay": []}
        for j, (before, after) in enumerate(zip(plain[0].active, plain[-1].active, strict=True)):
            # Chosen, for the sentence alone: twice, and by five hundredths; the table has every number.
            grown = after >= max(2 * before, before + 0.05)
            shrunk = before >= max(2 * after, after + 0.05)
            groups["appear" if grown else "fade" if shrunk else "stay"].append(j)
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON types."""
        return {
            "study": "in_context",
            "config": asdict(self.config),
            "model": self.model,
            "explained": self.explained,
            "stability": self.stability,
            "relations": self.relations,
            "conditions": [asdict(c) for c in self.conditions],
            "changes": self.changes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InContextResult:
        """What `to_dict` wrote, also after a file."""
        config = {**values["config"], "shots": tuple(values["config"]["shots"])}
        return cls(
            [Condition(**each) for each in values["conditions"]],
            [(name, share) for name, share in values["relations"]],
            values["model"],
            values["explained"],
            values["stability"],
            InContextConfig(**config),
        )

    def table(self) -> str:
        """A table with a row for each condition: accuracy, norms, and the components with the largest shares."""
        rows = []
        for c in self.conditions:
            leading = torch.tensor(c.shares).argsort(descending=True)[:3].tolist()
            shown = ", ".join(f"{j} ({c.shares[j]:.0%})" for j in leading)
            name = f"{c.shots}, shuffled" if c.shuffled else str(c.shots)
            rows.append([name, number(c.accuracy, 2), number(c.entropy, 2), number(c.norm, 2), shown])
        lines = [markdown(["demonstrations", "accuracy", "entropy", "PEF norm", "leading components"], rows), ""]
        body = []
        for j, (relation, share) in enumerate(self.relations):
            change = next(name for name, members in self.changes.items() if j in members)
            shares = " → ".join(f"{c.shares[j]:.1%}" for c in self.conditions if not c.shuffled)
            body.append([j, f"{relation} {share:.0%}", shares, change.removesuffix("s") + "s"])
        shots = ", ".join(str(c.shots) for c in self.conditions if not c.shuffled)
        lines.append(markdown(["component", "relation of its top examples", f"share under {shots}", "it"], body))
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """The accuracy on the left, the share of each component on the right."""
        left, right = figure.subplots(1, 2, width_ratios=[2, 3])
        for shuffled, style in ((False, "o-"), (True, "x--")):
            points = [c for c in self.conditions if c.shuffled == shuffled]
            if points:
                name = "shuffled answers" if shuffled else "true answers"
                left.plot([str(c.shots) for c in points], [c.accuracy for c in points], style, label=name)
        left.set(xlabel="demonstrations", ylabel="accuracy", ylim=(-0.03, 1.03))
        left.legend(frameon=False)
        values = torch.tensor([c.shares for c in self.conditions]).T
        order = sorted(range(len(values)), key=lambda j: int(values[j].argmax()))
        # Chosen: below that a share is nothing
        image = right.imshow(values[order].numpy(), aspect="auto", cmap="viridis", norm="log", vmin=3e-3)
        right.set_xticks(
            range(len(self.conditions)), [f"{c.shots}{' shuffled' * c.shuffled}" for c in self.conditions], rotation=30
        )
        names = [f"{self.relations[j][0]} {self.relations[j][1]:.0%} · {j}" for j in order]
        right.set_yticks(range(len(order)), names, fontsize=7)
        right.set(xlabel="demonstrations", title="mean share of a component")
        figure.colorbar(image, ax=right)


def run_in_context(
    analyzer: NPEFFAnalyzer,
    config: InContextConfig | None = None,
    *,
    pairs: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    parts: Path | None = None,
) -> InContextResult:
    """Decompose the same queries under several numbers of demonstrations.

    Args:
        analyzer: the analyzer of a causal language model, with its tokenizer.
        config: settings.
        pairs: the pairs of words and answers, as for `in_context_prompts`.
        parts: the folder in which the result is kept; the next run with the same settings reads it from there.

    Raises:
        ValueError: if the model predicts no tokens, or a relation has too few pairs.

    Example:
        >>> from hf_npeff.studies.settings import InContextConfig
        >>> pairs = {"comparative": [("big", "bigger"), ("small", "smaller"), ("good", "better"), ("bad", "worse")]}
        >>> config = InContextConfig(queries=2, shots=(0, 2), n_components=2, n_restarts=1)
        >>> result = run_in_context(analyzer, config, pairs=pairs)
    """
    if traits_of(analyzer.head).task != "causal-lm" or analyzer.processing_class is None:
        raise ValueError("in-context learning needs a causal language model and its tokenizer")
    config = config or InContextConfig()
    if parts is None:
        return _decomposed(analyzer, config, pairs)
    made_with: dict[str, Any] = {
        "config": asdict(config),
        "fisher": analyzer.fisher.to_dict(),
        "model": analyzer.weights(),
    }
    made_with["pairs"] = None if pairs is None else {name: [*known] for name, known in pairs.items()}
    compute = partial(_decomposed, analyzer, config, pairs)
    return InContextResult.from_dict(kept_part(parts, "result", made_with, lambda: compute().to_dict()))


def _decomposed(
    analyzer: NPEFFAnalyzer, config: InContextConfig, pairs: Mapping[str, Sequence[tuple[str, str]]] | None
) -> InContextResult:
    assert analyzer.processing_class is not None
    prompts = in_context_prompts(config, pairs)
    pefs = analyzer.compute_pefs(prompts, batch_size=config.batch_size)
    decomposition = analyzer.decompose(
        pefs, config.n_components, power=config.power, n_restarts=config.n_restarts, seed=config.seed
    )
    assert pefs.predictions is not None
    W = decomposition.coefficients.double()
    shares = W / W.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    firsts = [first_token(analyzer.processing_class, f" {row['answer']}") for row in prompts]
    right = pefs.predictions.flatten().cpu() == torch.tensor(firsts)
    entropies = pefs.entropies
    conditions = []
    for shots, shuffled in dict.fromkeys((row["shots"], row["shuffled"]) for row in prompts):
        here = torch.tensor([(row["shots"], row["shuffled"]) == (shots, shuffled) for row in prompts])
        relations: dict[str, list[float]] = {}
        for i in here.nonzero()[:, 0].tolist():
            relations.setdefault(prompts[i]["relation"], []).append(float(right[i]))
        conditions.append(
            Condition(
                shots,
                shuffled,
                float(right[here].double().mean()),
                {name: sum(values) / len(values) for name, values in relations.items()},
                shares[here].mean(0).tolist(),
                active_examples(W)[here].double().mean(0).tolist(),
                float(pefs.norms[here].double().mean()),
                float("nan") if entropies is None else float(entropies.flatten()[here].double().mean()),
            )
        )
    tops = [purity(component.top_examples(12).columns["relation"]) for component in decomposition]  # as on the page
    return InContextResult(
        conditions,
        [(str(name), share) for name, share in tops],
        model_name(decomposition.info),
        decomposition.explained,
        decomposition.stability.tolist(),
        config,
        decomposition,
    )
