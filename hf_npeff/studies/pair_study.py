"""The study of minimal pairs: data, models and methods, seed by seed, and the page with the results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.config import FisherConfig
from hf_npeff.studies.minimal_pairs import Margin, divergences, pair_margins, shuffled, summary
from hf_npeff.studies.pair_data import (
    attributes_of,
    crossed_relations,
    cue_rows,
    home_assistant_rows,
    minimal_pairs,
    with_bases,
)
from hf_npeff.studies.pair_methods import all_features, answers, home_assistant_analyzer, relation_analyzer
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.planted import TARGETS, planted_model
from hf_npeff.studies.result import StudyResult, markdown, number
from hf_npeff.studies.rival_settings import PAIR_DATA, MinimalPairsConfig
from hf_npeff.studies.settings import PlantedConfig

Loader = Callable[[], tuple[Any, Any]]
"""A function that returns a language model and its tokenizer."""
_TRAINED, _UNTRAINED = "trained", "random weights"
_SHUFFLED_SEED = 1
"""The seed of the permutation of examples. Any number serves."""


@dataclass
class MinimalPairsResult(StudyResult):
    """The outcome of `run_minimal_pairs`.

    Attributes:
        data: {data: {"facts": …, "trained": {method: summary}, "random weights": …, "shuffled": …}}.
        config: the settings.
    """

    data: dict[str, dict[str, Any]]
    config: MinimalPairsConfig

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {"study": "minimal_pairs", "config": asdict(self.config), "data": self.data}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MinimalPairsResult:
        """The result from what `to_dict` returned, also after it was written to a file."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["config"].items()}
        return cls(values["data"], MinimalPairsConfig(**given))

    def methods(self, data: str) -> list[str]:
        """The methods, sorted by margin, the best first."""
        rows = self.data[data][_TRAINED]
        return sorted(rows, key=lambda name: -rows[name]["margin"])

    def table(self) -> str:
        """A table for each data set, with a row for each method, the best first."""
        parts = []
        for data in self.data:
            rows, control = self.data[data][_TRAINED], self.data[data].get(_UNTRAINED, {})
            body = []
            for name in self.methods(data):
                row = rows[name]
                body.append(
                    [
                        name,
                        number(row["margin"], 2),
                        f"{number(row['low'], 2)} to {number(row['high'], 2)}",
                        f"{row['hits']:.0%}",
                        "–" if name == REFERENCE else _interval(self.data[data]["differences"][name]),
                        number(self.data[data]["shuffled"][name]["margin"], 2),
                        number(control[name]["margin"], 2) if name in control else "–",
                    ]
                )
            header = [
                "method, reading",
                "margin",
                "95% interval",
                "right feature first",
                "NPEFF ahead by",
                "shuffled",
                _UNTRAINED,
            ]
            parts.append(f"{data.replace('_', ' ')}:\n\n{markdown(header, body)}")
        return "\n\n".join(parts)

    def best_table(self) -> str:
        """A table with a row for each method: margin, interval and share of hits of its best reading, by data set."""
        kinds = dict.fromkeys(_kind(name) for data in self.data for name in self.methods(data))
        body = []
        for kind in kinds:
            cells = []
            for data in self.data:
                name = next((n for n in self.methods(data) if _kind(n) == kind), None)
                row = self.data[data][_TRAINED].get(name)
                cells += ["–", "–"] if row is None else [_interval(row), f"{row['hits']:.0%}"]
            body.append([kind, *cells])
        header = ["best reading of each method"]
        for data in self.data:
            header += [data.replace("_", " "), "right feature first"]
        return markdown(header, body)

    def draw(self, figure: Any) -> None:
        """The margins with their intervals, with a panel for each data set."""
        for panel, data in enumerate(self.data):
            axes = figure.add_subplot(1, len(self.data), panel + 1)
            names = list(reversed(self.methods(data)))
            rows = self.data[data][_TRAINED]
            for place, name in enumerate(names):
                row = rows[name]
                axes.plot([row["low"], row["high"]], [place, place], color="C0" if _ours(name) else "gray", linewidth=1)
                axes.plot([row["margin"]], [place], "o", color="C0" if _ours(name) else "gray", markersize=3)
            axes.axvline(0, color="gray", linewidth=0.6, linestyle=":")
            axes.set_yticks(range(len(names)), names, fontsize=5)
            axes.set(title=data.replace("_", " "), xlabel="margin over the best wrong feature", xlim=(-1, 1))

    def page(self) -> str:
        """The page that `write` leaves as README.md: the figure, what won, the tables."""
        described = []
        for data in self.data:
            facts = self.data[data]["facts"]
            moved = ", ".join(f"{name} {number(kl, 2)}" for name, kl in facts["KL"].items())
            described.append(
                f"- **{data.replace('_', ' ')}**: {facts['examples']} examples and {facts['pairs']} pairs over "
                f"{self.config.seeds} seeds, accuracy {number(facts['accuracy'], 2)}. Mean KL between the two answers "
                f"of a pair, in nats, by the factor that changes: {moved}."
            )
        return (
            "# Several factors, by minimal pairs\n\n![margins](figure.svg)\n\n"
            f"{self.verdict()}\n\n"
            f"Made by `{self.command()}`.{self.lacking()}\n\n"
            + "\n".join(described)
            + f"\n\n{self.table()}\n\n{_READING}"
        )

    def command(self) -> str:
        """The command that made the page; it names the data unless all are used."""
        chosen = "" if self.config.data is None else "".join(f" --data {name}" for name in self.config.names)
        return f"hf-npeff study minimal_pairs{chosen} -o docs/studies/minimal_pairs"

    def lacking(self) -> str:
        """A sentence that says which data were left out; empty if none."""
        missing = [name for name in PAIR_DATA if name not in self.data]
        return f" Not run: {', '.join(missing)}; without `--data` the command runs them too." if missing else ""

    def verdict(self) -> str:
        """For each data set, NPEFF compared with the best reading of each other method."""
        sentences = []
        for data in self.data:
            rows, less = self.data[data][_TRAINED], self.data[data]["differences"]
            others = [[name for name in self.methods(data) if _is(name, kind)][:1] for kind in _RIVALS]
            against = "; ".join(f"{name} {_interval(less[name])}" for best in others for name in best)
            sentences.append(
                f"On **{data.replace('_', ' ')}**, the margin of {REFERENCE} is {_interval(rows[REFERENCE])}. It "
                f"exceeds the best reading of each other method, on the same pairs, by: {against}."
            )
        return " ".join(sentences)


_OF_DATA = {
    "planted_cues": ("sentences",),
    "word_relations": ("words",),
    "home_assistant": ("per_attribute", "steps"),
}
"""The settings of each data set; the parts of other data sets do not depend on them."""
_OF_ALL = ("data", "seeds", "first_seed", "untrained")
REFERENCE = "NPEFF, power 0.25, alone"
"""The row that others are compared with: the best row of NPEFF on seed 10 of the planted cues."""
_RIVALS = (
    "gradient clustering",
    "gradient clustering, all rows",
    "Gradient Atoms",
    "NMF on PEFs",
    "SAE",
    "activations, k-means",
)
"""The methods that the first paragraph names, each with its best reading."""


def _is(name: str, kind: str) -> bool:
    """Whether a row is a reading of this method."""
    return name.startswith(f"{kind}, ") and name.removeprefix(f"{kind}, ").split(",")[0] in ("competing", "alone")


_READING = """How to read it:

- A **margin** is (right − wrong) / (right + wrong), for a pair in which one factor changes and one attribute appears.
  *Right* is how far the feature of this attribute rises. *Wrong* is how far another feature moves, for the one that
  moves most; the feature of the attribute that disappears does not count. Both are in units of each feature's standard
  deviation over the examples. A margin of 1 means that no other feature moves, 0 that another moves as far, and −1 that
  the right feature does not rise. Every attribute has a feature of its own. Features are chosen one to one by AUROC on
  half of the bases and measured on the pairs of the other half; then the halves change places. Attributes count
  equally.
- **Right feature first**: the share of pairs in which the right feature moves further than every other feature.
- **NPEFF ahead by**: how much the margin of "NPEFF, power 0.25, alone" exceeds that of the row, on the same pairs.
- A **competing** reading scores all features of an example together, so that they share what there is to explain
  (coefficients, assignments, TopK features). An **alone** reading scores every feature by itself (alignments, cosines,
  features before TopK).
- **Layer by attribute**: hidden states at the best layer for each attribute. Without these words, they are read at the
  layer that is best for all attributes. Both are chosen on the half on which features are chosen.
- **Shuffled**: features chosen for the attributes of other examples. **Random weights**: the same model before
  training, with one seed.
- Intervals come from drawing whole bases again, over all seeds together. They say nothing about other models or data.
- All methods have the same number of features. The settings of some methods were chosen on seed 10 of the planted cues
  ([what was tried](settings_planted_cues.json)). Gradient Atoms are shown without whitening too, which was better
  there.
"""


def _kind(name: str) -> str:
    """The method of a row, without its reading."""
    return name.split(", competing")[0].split(", alone")[0]


def _ours(name: str) -> bool:
    return name.startswith("NPEFF")


def _interval(row: Mapping[str, Any]) -> str:
    return f"{number(row['margin'], 2)} ({number(row['low'], 2)} to {number(row['high'], 2)})"


def run_minimal_pairs(
    config: MinimalPairsConfig | None = None, *, load_model: Loader | None = None, parts: Path | None = None
) -> MinimalPairsResult:
    """Make pairs that differ in one factor, fit every method, and measure whether the right feature alone moves.

    Args:
        config: the settings.
        load_model: returns the language model of the word relations and its tokenizer; it is called for every seed.
        parts: a folder for finished seeds, from which an interrupted run continues.

    Raises:
        ValueError: if the data include word relations and there is no `load_model`.
        ModuleNotFoundError: if a package of the data, a model or the methods is not installed.

    Example:
        >>> from hf_npeff.studies.rival_settings import MinimalPairsConfig
        >>> cues = MinimalPairsConfig(data="planted_cues", seeds=1)
        >>> result = run_minimal_pairs(cues, parts=Path("runs/pairs"))  # doctest: +SKIP
    """
    config = config or MinimalPairsConfig()
    if load_model is None and "word_relations" in config.names:
        raise ValueError(
            "the data word_relations need a language model: pass load_model, such as hf_npeff.demo.load_model"
        )
    data = {}
    for name in config.names:
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        trained = [_kept(parts, config, name, seed, True, load_model) for seed in seeds]
        rows: dict[str, Any] = {
            "facts": _facts(trained),
            _TRAINED: _summaries(trained, "margins"),
            "shuffled": _summaries(trained, "shuffled"),
            "differences": _differences(trained),
        }
        if config.untrained:
            rows[_UNTRAINED] = _summaries([_kept(parts, config, name, config.first_seed, False, load_model)], "margins")
        data[name] = rows
    return MinimalPairsResult(data, config)


def _kept(
    parts: Path | None, config: MinimalPairsConfig, name: str, seed: int, trained: bool, load_model: Loader | None
) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        return _DATA[name](config, seed, trained, load_model)

    settings = part_settings(config, name, seed, trained)
    return kept_part(parts, f"{name}-{seed}{'' if trained else '-untrained'}", settings, compute)


def part_settings(config: MinimalPairsConfig, name: str, seed: int, trained: bool) -> dict[str, Any]:
    """What the part of a data set, a seed, and trained or random weights depends on."""
    others = {key for data, keys in _OF_DATA.items() if data != name for key in keys}
    settings = {key: value for key, value in asdict(config).items() if key not in {*others, *_OF_ALL}}
    return settings | {"data": name, "seed": seed, "trained": trained}


def _cues(config: MinimalPairsConfig, seed: int, trained: bool, _: Loader | None) -> dict[str, Any]:
    task = (
        PlantedConfig(seed=seed) if trained else PlantedConfig(seed=seed, steps=1)
    )  # one step hardly changes random weights
    model, _error = planted_model(task)
    fisher = FisherConfig(rank=config.rank, target_modules=TARGETS, seed=seed)
    rows = cue_rows(task, config.sentences, seed=4000 + seed)  # other sentences than those of training
    served = [{int(name.split()[1]) % task.labels for name, there in row["factors"].items() if there} for row in rows]

    def right(predicted: Sequence[Any]) -> list[bool]:
        return [{k for k, y in enumerate(a[0]) if bool(y)} == s for a, s in zip(predicted, served, strict=True)]

    return _measured(NPEFFAnalyzer(model, fisher=fisher), rows, "first", right, config, seed)


def _relations(config: MinimalPairsConfig, seed: int, trained: bool, load_model: Loader | None) -> dict[str, Any]:
    assert load_model is not None
    rows = crossed_relations(config.words, seed=seed)
    analyzer = relation_analyzer(*load_model(), config.rank, seed, trained=trained)
    tokenizer: Any = analyzer.processing_class
    # Whether the likeliest token begins the answer
    firsts = [tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"][0] for row in rows]
    return _measured(analyzer, rows, "last", lambda y: [int(a) == b for a, b in zip(y, firsts, strict=True)],
                     config, seed)  # fmt: skip


def _sentences(config: MinimalPairsConfig, seed: int, trained: bool, _: Loader | None) -> dict[str, Any]:
    every = home_assistant_rows(seed=seed)
    rows = with_bases(every, config.per_attribute, seed=seed)
    texts = {row["text"] for row in rows}
    others = [row for row in every if row["text"] not in texts]
    analyzer = home_assistant_analyzer(others, config.rank, config.steps, seed, trained=trained)
    wanted = [[t > 0.5 for t in row["targets"]] for row in rows]

    def right(predicted: Sequence[Any]) -> list[bool]:
        return [[bool(y) for y in a[0]] == b for a, b in zip(predicted, wanted, strict=True)]

    return _measured(analyzer, rows, "first", right, config, seed)


_DATA: dict[str, Callable[[MinimalPairsConfig, int, bool, Loader | None], dict[str, Any]]] = {
    "planted_cues": _cues,
    "word_relations": _relations,
    "home_assistant": _sentences,
}


def _measured(
    analyzer: NPEFFAnalyzer,
    rows: Sequence[Mapping[str, Any]],
    position: str,
    right: Callable[[Sequence[Any]], Sequence[bool]],
    config: MinimalPairsConfig,
    seed: int,
) -> dict[str, Any]:
    dataset = [{key: row[key] for key in ("text", "input_ids") if key in row} for row in rows]
    factors, bases = [row["factors"] for row in rows], [f"{seed} {row['base']}" for row in rows]
    pairs, (names, have) = minimal_pairs(factors, bases), attributes_of(factors)
    predictions = answers(analyzer, dataset, config.batch_size)
    features, known = all_features(analyzer, dataset, position, config, seed)
    margins: dict[str, list[Margin]] = {}
    control: dict[str, list[Margin]] = {}
    for name, layers in features.items():
        for wanted, into in ((have, margins), (shuffled(have, _SHUFFLED_SEED), control)):
            for way, measured in pair_margins(layers, wanted, names, pairs, bases, seed).items():
                if way == "one layer" or len(layers) > 1:
                    into[name if way == "one layer" else f"{name}, {way}"] = measured
    return {
        "examples": len(rows),
        "pairs": len(pairs),
        "accuracy": statistics.mean(map(float, right(predictions.answers()))),
        "KL": dict(divergences(predictions, pairs)),
        "known": known,
        "margins": {name: [list(vars(m).values()) for m in each] for name, each in margins.items()},
        "shuffled": {name: [list(vars(m).values()) for m in each] for name, each in control.items()},
    }


def _facts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    factors = dict.fromkeys(name for part in parts for name in part["KL"])
    known = dict.fromkeys(name for part in parts for name in part["known"])
    return {
        "examples": sum(part["examples"] for part in parts),
        "pairs": sum(part["pairs"] for part in parts),
        "accuracy": statistics.mean(part["accuracy"] for part in parts),
        "KL": {name: statistics.mean(p["KL"][name] for p in parts if name in p["KL"]) for name in factors},
        "known": {name: _mean([p["known"][name] for p in parts]) for name in known},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that exist; with one start there is no stability."""
    given = [v for v in values if v is not None]
    return statistics.mean(given) if given else None


def _differences(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much the margins of the reference exceed those of every method on the same pairs, with the interval."""
    differences = {}
    for name in dict.fromkeys(name for part in parts for name in part["margins"]):
        pairs = [
            (Margin(*a), Margin(*b))
            for part in parts
            for a, b in zip(part["margins"][REFERENCE], part["margins"][name], strict=True)
        ]
        less = summary([Margin(a.attribute, a.base, a.margin - b.margin, a.hit and not b.hit) for a, b in pairs])
        differences[name] = {key: less[key] for key in ("margin", "low", "high")}
    return differences


def _summaries(parts: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    names = dict.fromkeys(name for part in parts for name in part[what])
    return {name: summary([Margin(*m) for part in parts for m in part[what][name]]) for name in names}
