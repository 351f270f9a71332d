"""Fair readings and controls: every method is read in both ways and at every layer, and compared with controls.

Attributes that can be predicted from the model's output are measured apart from the others. NPEFF sees how predictions
depend on weights, so it claims to find only the former. The controls are: the same model with random weights;
attributes of other examples; random directions among the rows; and the number of distinct components as the number of
components grows.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.row_dictionaries import Readings, named
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.pefs.store import PEFs
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.factors import first_half
from hf_npeff.studies.measures import agreement, aurocs, bootstrap_interval
from hf_npeff.studies.pair_methods import Features, answers, of_rows, of_states, rows_and_states
from hf_npeff.studies.probes import linear_probes
from hf_npeff.studies.result import StudyResult, markdown, number
from hf_npeff.studies.rival_settings import FairConfig

_AT_LEAST = 5
"""The least number of examples that have, and that lack, an attribute in each half, as in `FactorsConfig`."""
_SAME = 0.9
"""Two components with at least this |cosine| count as the same. Chosen: as for the stability of components."""
_RESTARTED = 64
"""Up to this number of components the splitting curve has two starts. Above it has one, because of the time."""


@dataclass
class FairResult(StudyResult):
    """The outcome of `run_fair`.

    Attributes:
        rows: {method and reading: {"attributes": {attribute: AUROC}, "layer by attribute": the same or None,
            "shuffled": mean, "random weights": mean or None, "stability": number or None}}.
        output_auroc: {attribute: the AUROC of a probe of the model's output}.
        curve: the splitting curve, with a dictionary for each number of components.
        facts: figures about the data and the fits, as JSON types.
        config: the settings.
    """

    rows: dict[str, dict[str, Any]]
    output_auroc: dict[str, float]
    curve: list[dict[str, Any]]
    config: FairConfig
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {"study": "fair", **{k: v for k, v in vars(self).items() if k != "config"},
                "config": asdict(self.config)}  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FairResult:
        """What `to_dict` wrote, also after a file."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["config"].items()}
        return cls(values["rows"], values["output_auroc"], values["curve"], FairConfig(**given), values["facts"])

    def kinds(self) -> dict[str, list[str]]:
        """The attributes in two groups: {"predictable from the output": attributes, "not predictable": attributes}."""
        each = {"predictable from the output": [], "not predictable": []}  # type: dict[str, list[str]]
        for name in next(iter(self.rows.values()))["attributes"]:
            kind = (
                "predictable from the output"
                if self.output_auroc.get(name, 0.0) >= self.config.predictable_at
                else "not predictable"
            )
            each[kind].append(name)
        return each

    def mean(self, row: str, kind: str | None = None, way: str = "attributes") -> float | None:
        """The mean AUROC of a row, over all attributes or over those of a kind."""
        scores = self.rows[row][way]
        names = [a for a in scores or {} if kind is None or a in self.kinds()[kind]]
        return statistics.mean(scores[a] for a in names) if names else None

    def table(self) -> str:
        """A table with a row for each method and reading, the best on predictable attributes first; then the curve."""
        kinds = self.kinds()
        header = ["method, reading", *(f"{kind} ({len(names)})" for kind, names in kinds.items()), "all",
                  "layer by attribute", "shuffled", "random weights", "stability"]  # fmt: skip
        order = sorted(
            self.rows, key=lambda row: -(self.mean(row, "predictable from the output") or self.mean(row) or 0.0)
        )
        body = []
        for row in order:
            cells = [self.mean(row, kind) for kind in kinds] + [self.mean(row), self.mean(row, None, _BY_ATTRIBUTE)]
            cells += [self.rows[row][name] for name in ("shuffled", "random weights", "stability")]
            body.append([row, *(number(cell) for cell in cells)])
        columns = {"components": "components", "distinct": "distinct", "used": "in use", "explained": "explained",
                   "coefficients": "mean AUROC, coefficients", "alignments": "mean AUROC, alignments",
                   "stability": "stability"}  # fmt: skip
        curve = [[point["components"], point["distinct"], point["used"],
                  *(number(point[name]) for name in list(columns)[3:])] for point in self.curve]  # fmt: skip
        return f"{markdown(header, body)}\n\nNumber of components:\n\n{markdown(list(columns.values()), curve)}"

    def draw(self, figure: Any) -> None:
        """Mean AUROC on predictable attributes against the others, with a dot for each method and reading."""
        axes = figure.add_subplot()
        predictable, other = self.kinds()
        for row in self.rows:
            x, y = self.mean(row, other), self.mean(row, predictable)
            if x is not None and y is not None:
                axes.scatter([x], [y], color="C0" if row.startswith("NPEFF") else "gray", s=14)
                axes.annotate(row, (x, y), fontsize=5, xytext=(3, 0), textcoords="offset points")
        axes.axhline(0.5, color="gray", linewidth=0.6, linestyle=":")
        axes.set(xlabel="mean AUROC, not predictable from the output", ylabel="mean AUROC, predictable")

    def difference(self, one: str, other: str, kind: str) -> tuple[float, float, float]:
        """The mean difference of the AUROCs of two rows over the attributes of a kind, with its bootstrap interval.

        Raises:
            ValueError: if there are no attributes of that kind.
        """
        a, b = (self.rows[row]["attributes"] for row in (one, other))
        differences = torch.tensor([a[name] - b[name] for name in self.kinds()[kind]], dtype=torch.float64)
        return (float(differences.mean()), *bootstrap_interval(differences))


_BY_ATTRIBUTE = "layer by attribute"


def run_fair(
    analyzer: NPEFFAnalyzer, dataset: Any, attributes: Attributes, position: Any, config: FairConfig | None = None
) -> FairResult:
    """Fit every method, read it in both ways and at every layer, and compare it with its controls.

    Args:
        analyzer: the analyzer of the model.
        dataset: as for `NPEFFAnalyzer.compute_pefs`.
        attributes: the attributes of its examples.
        position: the token at which hidden states are read, "first" or "last".
        config: the settings.

    Raises:
        ValueError: if no attribute can be measured.
        ModuleNotFoundError: if scikit-learn or scipy is not installed.

    Example:
        >>> from hf_npeff.studies.rival_settings import FairConfig
        >>> few = FairConfig(n_components=3, seeds=1, n_restarts=1, sae_steps=5, sizes=(2, 3), layers=1)
        >>> attributes = Attributes.from_columns({"animal": [row["animal"] for row in dataset]}, min_count=5)
        >>> result = run_fair(analyzer, dataset, attributes, "last", few)
    """
    config = config or FairConfig()
    choose = first_half(len(attributes.values), config.seed)
    measured = measurable(attributes, choose)
    if not measured.names:
        raise ValueError(f"no attribute has {_AT_LEAST} examples with it and without it in each half")
    pefs, gradients, states = rows_and_states(analyzer, dataset, position, config)
    fits = [_fits(pefs, gradients, states, config, config.seed + k) for k in range(config.seeds)]
    bare = analyzer_with_random_weights(analyzer, config.seed)
    control = _fits(*rows_and_states(bare, dataset, position, config), config, config.seed)[0]
    permuted = Attributes(measured.names, measured.values[_permutation(len(measured.values), config.seed)])
    rows = {}
    for name, layers in fits[0][0].items():
        one, each, best = found_by(layers, measured, choose)
        others = [agreement(layers[best], fit[0][name][best]) for fit in fits[1:]]
        rows[name] = {
            "attributes": one,
            _BY_ATTRIBUTE: each if len(layers) > 1 else None,
            "shuffled": statistics.mean(found_by(layers, permuted, choose)[0].values()),
            "random weights": statistics.mean(found_by(control[name], measured, choose)[0].values()),
            "stability": statistics.mean(others) if others else None,
        }
    predictions = answers(analyzer, dataset, config.batch_size)
    outputs = torch.stack([predictions.distribution(z).logits.flatten() for z in predictions.logits])
    output_auroc = linear_probes(nn.functional.log_softmax(outputs, dim=1), measured, choose=choose)
    curve = [_point(pefs, r, measured, choose, config) for r in config.sizes if r <= len(pefs) * pefs.rank]
    facts = {"examples": len(pefs), "sketch error": pefs.sketch_error, **fits[0][1]}
    return FairResult(rows, output_auroc, curve, config, facts)


def _permutation(n: int, seed: int) -> Tensor:
    # Not the permutation that makes the halves, which has the same seed
    return torch.randperm(n, generator=torch.Generator().manual_seed(30_000 + seed))


def measurable(attributes: Attributes, choose: Tensor) -> Attributes:
    """The attributes that enough examples have, and lack, in each half."""
    kept = []
    for a in range(len(attributes.names)):
        values = attributes.values[:, a]
        counts = [int((values[half] == v).sum()) for half in (choose, ~choose) for v in (0, 1)]
        if min(counts) >= _AT_LEAST:
            kept.append(a)
    return Attributes([attributes.names[a] for a in kept], attributes.values[:, kept])


def found_by(
    layers: Sequence[Tensor], attributes: Attributes, choose: Tensor
) -> tuple[dict[str, float], dict[str, float], int]:
    """The AUROC of each attribute's best feature, at the best layer for all attributes and at the best for each.

    Layers and features are chosen on the examples in `choose` and measured on the others.

    Returns:
        {attribute: AUROC} at the layer that is best for all, the same at the best layer for each, and the number of the
        former layer.
    """
    first = torch.zeros(len(layers), len(attributes.names), dtype=torch.float64)
    other = torch.zeros_like(first)
    for a in range(len(attributes.names)):
        values = attributes.values[:, a]
        here, there = choose & ~values.isnan(), ~choose & ~values.isnan()
        for i, W in enumerate(layers):
            scores = aurocs(W[here], values[here] == 1)
            feature = int(scores.argmax())
            first[i, a] = scores[feature]
            other[i, a] = aurocs(W[there][:, feature : feature + 1], values[there] == 1)[0]
    best = int(first.mean(1).argmax())
    each = other[first.argmax(0), torch.arange(len(attributes.names))]
    return (
        dict(zip(attributes.names, other[best].tolist(), strict=True)),
        dict(zip(attributes.names, each.tolist(), strict=True)),
        best,
    )


def _fits(
    pefs: PEFs, gradients: PEFs, states: Sequence[Tensor], config: FairConfig, seed: int
) -> tuple[Features, dict[str, float]]:
    features, known = of_rows(pefs, gradients, config, seed)
    features.update(of_states(states, config, seed))
    random = {"random directions": random_directions(pefs, config.n_components, seed)}
    features.update({name: [W] for name, W in named(random).items()})
    return features, known


def random_directions(pefs: PEFs, r: int, seed: int) -> Readings:
    """A dictionary that was not fitted: random combinations of the rows, read in the same way as components."""
    n, c, d = pefs.factors.shape
    mixing = torch.randn(r, n * c, generator=torch.Generator().manual_seed(seed))
    G = nn.functional.normalize(mixing @ pefs.factors.reshape(n * c, d).float(), dim=1)
    made = Decomposition(torch.zeros(n, r), G, config=NPEFF(r).config, info=dict(pefs.info),
                         example_ids=pefs.example_ids)  # fmt: skip
    return Readings(*made.explain(pefs))


def analyzer_with_random_weights(analyzer: NPEFFAnalyzer, seed: int) -> NPEFFAnalyzer:
    """The same analysis of the same architecture with random weights; the global random state is not changed."""
    model: Any = analyzer.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config).eval()
    return NPEFFAnalyzer(fresh, analyzer.processing_class, fisher=analyzer.fisher)


def distinct(directions: Tensor, same: float = _SAME) -> int:
    """How many groups unit directions (r, d) form, where two with |cosine| ≥ `same` are in the same group."""
    joined = (directions @ directions.T).abs() >= same
    left, groups = set(range(len(directions))), 0
    while left:
        groups, reached = groups + 1, [left.pop()]
        while reached:
            near = {j for j in joined[reached.pop()].nonzero()[:, 0].tolist() if j in left}
            left -= near
            reached += near
    return groups


def _point(pefs: PEFs, r: int, attributes: Attributes, choose: Tensor, config: FairConfig) -> dict[str, Any]:
    """The point of the splitting curve for one number of components."""
    starts = 2 if r <= _RESTARTED else 1
    decomposition = NPEFF(r, n_restarts=starts, seed=config.seed).fit(pefs)
    W, N = decomposition.explain(pefs)
    scores = [statistics.mean(found_by([X], attributes, choose)[0].values()) for X in (W, N)]
    return {
        "components": r,
        "distinct": distinct(decomposition.pseudo_fishers),
        "used": int((W.sum(0) > 0).sum()),
        "explained": decomposition.explained,
        "coefficients": scores[0],
        "alignments": scores[1],
        "stability": float(decomposition.stability.mean()) if starts > 1 else None,
    }
