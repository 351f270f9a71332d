"""Known mechanisms: do components point along the mechanisms of a toy model in which these are known?

In a toy model of superposition the mechanism of feature j is column j of W. Components are directions in the space of
W, so they can be compared with the columns. There are two measures: the published one (mean max cosine similarity,
column by column), and a stricter one, for which a component must leave the other columns alone. The controls are the
same model with random weights, whose mechanisms are its own columns too, and a dictionary of random directions.
A language model that has learned induction is the other known mechanism (induction.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.config import FisherConfig
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.pefs.store import PEFs
from hf_npeff.studies.induction import one_model
from hf_npeff.studies.measures import aurocs
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.result import StudyResult, markdown, number
from hf_npeff.studies.settings import MechanismsConfig
from hf_npeff.studies.superposition import sparse_features, superposition_model, train_superposition

_POWERS = {"NPEFF": 1.0, "NPEFF, power 0.5": 0.5}
PUBLISHED = {
    "5-2": "1.000 (SPD), 0.998 (APD)",
    "40-10": "1.000 (SPD), 0.996 (APD)",
}
"""The MMCS by column that was published for methods trained on such toys (arXiv 2506.20790 and 2501.14926)."""
_BATCH = 256
"""How many examples a forward pass takes. The toys are tiny."""
_MEASURES = {
    "by_column": "MMCS by column",
    "whole": "MMCS, whole direction",
    "least": "least feature",
    "coefficients": "AUROC, coefficients",
    "alignments": "AUROC, alignments",
    "stability": "stability",
}


def similarities(directions: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The |cosine| of directions (r, m·k) with the columns of W (m, k), by column and as whole directions: (r, k) each.

    By column: column j of the direction is compared with column j of W, and the direction's other columns are ignored.
    It is 0 if column j of the direction is 0. Whole: the direction is compared with the matrix that has column j of W
    and is zero elsewhere.
    """
    columns = directions.reshape(-1, *W.shape).double()
    inner = torch.einsum("rmk,mk->rk", columns, nn.functional.normalize(W.double(), dim=0)).abs()
    tiny = torch.finfo(torch.float64).tiny
    return inner / columns.norm(dim=1).clamp_min(tiny), inner / columns.flatten(1).norm(dim=1).clamp_min(tiny)[:, None]


@dataclass
class MechanismsResult(StudyResult):
    """The outcome of `run_mechanisms`.

    Attributes:
        toys: a dictionary for each toy and seed: `toy`, `seed`, the `loss` of its training, and `rows`,
            {what was compared with the columns: {measure: value}}.
        config: the settings.
        induction: what `induction.one_model` returns of every language model that repeats.
    """

    toys: list[dict[str, Any]]
    config: MechanismsConfig
    induction: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {
            "study": "mechanisms", "config": asdict(self.config), "toys": self.toys, "induction": self.induction
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MechanismsResult:
        """The result from what `to_dict` returned, also after it was written to a file."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["config"].items()}
        return cls(values["toys"], MechanismsConfig(**given), values["induction"])

    def values(self, toy: str, row: str, measure: str) -> list[float]:
        """The values of one measure of one row, for the seeds that have it."""
        known = [t["rows"][row].get(measure) for t in self.toys if t["toy"] == toy and row in t["rows"]]
        return [v for v in known if v is not None]

    def rows(self, toy: str) -> list[str]:
        """What was compared with a toy's columns."""
        return list(dict.fromkeys(row for t in self.toys if t["toy"] == toy for row in t["rows"]))

    def table(self) -> str:
        """A table with a row for each toy and each thing compared with it: the mean over the seeds, and the range."""
        body = []
        for toy in dict.fromkeys(t["toy"] for t in self.toys):
            for row in self.rows(toy):
                cells = [_shown(self.values(toy, row, measure)) for measure in _MEASURES]
                body.append([toy, row, *cells])
            if toy in PUBLISHED:
                body.append([toy, "published", PUBLISHED[toy], *["–"] * (len(_MEASURES) - 1)])
        return markdown(["toy", "directions", *_MEASURES.values()], body)

    def draw(self, figure: Any) -> None:
        """The similarity of whole directions, with a dot for each seed and a panel for each toy."""
        toys = list(dict.fromkeys(t["toy"] for t in self.toys))
        for panel, toy in enumerate(toys):
            axes = figure.add_subplot(1, len(toys), panel + 1)
            for place, row in enumerate(reversed(self.rows(toy))):
                for measure, marker in (("by_column", "|"), ("whole", "o")):
                    points = self.values(toy, row, measure)
                    axes.scatter(points, [place] * len(points), marker=marker, color="C0" if marker == "o" else "gray")
            axes.axvline(0.95, color="gray", linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(self.rows(toy))), list(reversed(self.rows(toy))) if panel == 0 else [])
            features, hidden = toy.split("-")
            axes.set(title=f"{features} features in {hidden} dimensions", xlim=(0, 1.03))
            axes.set_xlabel("MMCS: whole direction (dots), by column (bars)")

    def page(self) -> str:
        """The page that `write` leaves as README.md: the figure, what it says, the table."""
        whole = {toy: self.values(toy, "NPEFF", "whole") for toy in dict.fromkeys(t["toy"] for t in self.toys)}
        least = min(min(values) for values in whole.values())
        verdict = "at least" if least >= 0.95 else "NOT always"  # 0.95: the bar that was set before the study was run
        similarity = "; ".join(f"{toy}: {_shown(values)}" for toy, values in whole.items())
        seeds = f"{self.config.seeds} models of each size" if self.config.seeds > 1 else "one model of each size"
        return (
            "# Known mechanisms\n\n![similarity to the columns](figure.svg)\n\n"
            "In toy models of superposition, whose mechanisms are known, NPEFF's components point along them: mean max "
            f"cosine similarity {similarity} (mean and range over {seeds}), {verdict} 0.95 on every model.\n\n"
            f"Made by `hf-npeff study mechanisms -o docs/studies/mechanisms`. x̂ = ReLU(WᵀW x + b), "
            f"{self.config.steps} steps of training on features that are there with probability "
            f"{self.config.probability:g}; PEFs of {self.config.n} such inputs, all outputs, no sketch; as many "
            f"components as features.\n\n{self.table()}\n\n{_READING}{self._induction_page()}"
        )

    def induction_values(self, row: str, measure: str) -> list[float]:
        """A measure of the component of repetitions, seed by seed, where it is known."""
        return [v for each in self.induction if (v := each["rows"][row].get(measure)) is not None]

    def _induction_page(self) -> str:
        """The section about the language models that repeat."""
        if not self.induction:
            return ""
        body = []
        for row in self.induction[0]["rows"]:
            cells = [_shown(self.induction_values(row, measure), 2) for measure in _INDUCTION]
            reached = [len(self.induction_values(row, name)) for name in _RATIOS]
            asked = any(name in each["rows"][row] for each in self.induction for name in _RATIOS)
            both = " and ".join(f"{n} of {len(self.induction)}" for n in reached)
            body.append([row, *cells, both if asked else "–"])
        accuracy = {k: _shown([each["accuracy"][k] for each in self.induction], 2) for k in ("repetitions", "chains")}
        told = {row: _shown(self.induction_values(row, "coefficients"), 2) for row in self.induction[0]["rows"]}
        ours, random = (_shown(self.induction_values("NPEFF", name), 1) for name in _RATIOS)
        return (
            "\n## A language model that repeats\n\n"
            "One component stands for induction, though not for it alone. Its coefficients tell the sequences that "
            f"repeat from the others with an AUROC of {told['NPEFF']}; the best of as many random directions has "
            f"{told['random directions']}, and a component of untrained weights {told['NPEFF, weights untrained']}. A "
            f"step along its direction moves the predictions of repetitions {ours} times as far as those of the other "
            f"sequences; along a random direction, {random} times. Figures are means and ranges over "
            f"{len(self.induction)} models.\n\n"
            "Two layers with attention and MLPs, trained to predict sequences of which half repeat a random "
            "permutation of tokens, which only attention to an earlier copy can predict (induction, Olsson et al. "
            "2022), and half follow a table of successors nine times in ten. The last token of "
            f"{self.config.induction_n} sequences is analysed, with 16 components. Accuracy there: repetitions "
            f"{accuracy['repetitions']}, chains {accuracy['chains']}.\n\n"
            f"{markdown(['directions', *_INDUCTION.values(), 'KL reached'], body)}\n\n{_READING_INDUCTION}"
        )


_READING = """How to read it:

- **By column** is the published measure. It compares column j of W with column j of the component that fits best, and
  ignores the component's other columns. In 2 dimensions a dictionary of random directions nearly passes it, so there it
  says little.
- **Whole direction** is stricter: the component must be that column and nothing else. **Least feature** is this measure
  for the feature that is found worst. Signs do not count, because a component is a direction with both signs.
- **AUROC** says how well the component shows when its feature is at work, which means that the model's output for the
  feature is above 0. There is one for coefficients, which compete, and one for alignments, which read each component by
  itself.
- **Weights untrained** is the same analysis of a model with random weights, compared with its own columns. Such a model
  does well too, because an absent input moves no weight of its column, trained or not. The difference between
  the two rows shows what training adds. A similarity near 1 alone does not show that a model has learned.
- These toys are easy, because an input acts only through its own column. Modular addition is a circuit in which all
  parts act on every input; see [its page](modular_addition.md).
- Published methods are trained to rebuild W as a sum of components; NPEFF sees only how predictions move. The published
  figures are those of their authors, on models that the authors trained.
"""


_RATIOS = ("ratio", "ratio of a random direction")
_INDUCTION = {
    "coefficients": "AUROC, coefficients",
    "alignments": "AUROC, alignments",
    "attention": "in attention",
    "attention of others": "others in attention",
    "ratio": "KL ratio",
    "ratio of a random direction": "KL ratio, random",
}
_READING_INDUCTION = """- The component is chosen on one half of the sequences and measured on the other.
- **In attention** is the share of its squared norm that lies in the attention's weights, beside the mean of the other
  components: the circuit of induction is made of attention, successors need none.
- **KL ratio** is that of its selective direction, on fresh sequences: mean KL on repetitions over that on chains, at
  the step where the former is 0.3 nats. The last column says on how many models that was reached, by the component's
  direction and by a random one.
"""


def _shown(values: list[float], digits: int = 3) -> str:
    if not values:
        return "–"
    mean = number(statistics.mean(values), digits)
    return mean if len(values) == 1 else f"{mean} ({number(min(values), digits)}–{number(max(values), digits)})"


def run_mechanisms(config: MechanismsConfig | None = None, *, parts: Path | None = None) -> MechanismsResult:
    """Train toy models of superposition and a language model that repeats, and compare components with what is known.

    Args:
        config: the settings.
        parts: a folder for finished toys, from which an interrupted run continues.

    Example:
        >>> from hf_npeff.studies.settings import MechanismsConfig
        >>> small = MechanismsConfig(toys=("4-2",), steps=5, n=40, n_restarts=1, seeds=1, induction_steps=0)
        >>> list(run_mechanisms(small).toys[0]["rows"])[0]
        'NPEFF'
    """
    config = config or MechanismsConfig()
    toys = []
    for name, (features, hidden) in zip(config.names, config.sizes, strict=True):
        for seed in range(config.seeds):

            def compute(toy: str = name, k: int = features, m: int = hidden, number: int = seed) -> dict[str, Any]:
                return {"toy": toy, "seed": number, **_one_toy(config, k, m, number)}

            toys.append(kept_part(parts, f"{name}-{seed}", toy_settings(config, name, seed), compute))
    if not config.induction_steps:
        return MechanismsResult(toys, config)
    steps, n, restarts = config.induction_steps, config.induction_n, config.n_restarts
    repeating = [
        kept_part(
            parts,
            f"induction-{seed}",
            induction_settings(config, seed),
            partial(one_model, steps, n, restarts, seed),
        )
        for seed in range(config.induction_seeds)
    ]
    return MechanismsResult(toys, config, repeating)


def toy_settings(config: MechanismsConfig, name: str, seed: int) -> dict[str, Any]:
    """What the part of a toy of superposition depends on."""
    settings = {**asdict(config), "toys": name, "seeds": None, "seed": seed}
    for other in ("induction_steps", "induction_n", "induction_seeds"):
        del settings[other]
    return settings


def induction_settings(config: MechanismsConfig, seed: int) -> dict[str, Any]:
    """What the part of a language model that has learned induction depends on."""
    return {
        "steps": config.induction_steps,
        "n": config.induction_n,
        "n_restarts": config.n_restarts,
        "seed": seed,
        "signs": "on other sequences",
    }


def _one_toy(config: MechanismsConfig, features: int, hidden: int, seed: int) -> dict[str, Any]:
    model = superposition_model(features, hidden, seed)
    # No seed of the study shares a random stream with training
    x = _inputs(config.n, features, config.probability, torch.Generator().manual_seed(20_000 + seed))
    untrained = _held_against(model, toy_pefs(model, x), x, config, seed, 1.0)
    loss = train_superposition(
        model,
        probability=config.probability,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
    )
    pefs = toy_pefs(model, x)
    rows = {name: _held_against(model, pefs, x, config, seed, power) for name, power in _POWERS.items()}
    random = torch.randn(features, hidden * features, generator=torch.Generator().manual_seed(seed))
    rows["NPEFF, weights untrained"] = untrained
    rows["random directions"] = _cosines(random, model.embed.detach())[0]
    return {"loss": loss, "rows": rows}


def _inputs(n: int, k: int, probability: float, generator: torch.Generator) -> Tensor:
    """Inputs (n, k) without those that are all zero, since their PEF is zero."""

    def drawn() -> Iterator[Tensor]:
        while True:
            x = sparse_features(n, k, probability, generator)
            yield x[x.sum(1) > 0]

    kept: list[Tensor] = []
    for x in drawn():
        kept.append(x)
        if sum(map(len, kept)) >= n:
            break
    return torch.cat(kept)[:n]


def toy_pefs(model: nn.Module, x: Tensor) -> PEFs:
    """The PEFs of a toy model for inputs (n, k), with respect to W alone, with every output and no sketch."""
    k = x.shape[1]
    fisher = FisherConfig(rank=k, output_factor="exact", parameters=("embed",), target_modules=(), sketch="identity")
    dataset = [{"input_values": row.tolist()} for row in x]
    return NPEFFAnalyzer(model, fisher=fisher).compute_pefs(dataset, batch_size=_BATCH)


def _held_against(
    model: Any, pefs: PEFs, x: Tensor, config: MechanismsConfig, seed: int, power: float
) -> dict[str, Any]:
    decomposition = NPEFF(x.shape[1], n_restarts=config.n_restarts, power=power, seed=seed).fit(pefs)
    measured, best = _cosines(decomposition.pseudo_fishers, model.embed.detach())
    with torch.no_grad():
        on = model(x).logits > 0
    W, N = decomposition.explain(pefs)
    seen = [j for j in range(x.shape[1]) if 0 < int(on[:, j].sum()) < len(x)]
    for name, scores in (("coefficients", W), ("alignments", N)):
        each = [float(aurocs(scores[:, best[j] : best[j] + 1], on[:, j])[0]) for j in seen]
        measured[name] = statistics.mean(each) if each else None
    measured["stability"] = float(decomposition.stability.mean())
    measured["explained"] = decomposition.explained
    return measured


def _cosines(directions: Tensor, W: Tensor) -> tuple[dict[str, Any], list[int]]:
    """The measures of directions against the columns, and the direction that fits each column best."""
    by_column, whole = similarities(directions, W)
    best = whole.amax(0)
    measured = {"by_column": float(by_column.amax(0).mean()), "whole": float(best.mean()), "least": float(best.min())}
    return measured, whole.argmax(0).tolist()
