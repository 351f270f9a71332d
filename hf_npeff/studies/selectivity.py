"""How selective features are: KL on an attribute's examples against KL on others when a feature is switched off or on.

All methods are measured on the same examples, at the step (or the degree of ablation) at which the mean KL on the
attribute's examples reaches the same target. For every method the sign is the better of both on examples of the half on
which features are chosen; what is measured are examples of the other half. For a direction in the weights, the weights
move along it. A feature of activations is removed from the hidden state, or added to it.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.method import Intervention, MethodResult
from hf_npeff.baselines.row_directions import lifted_together
from hf_npeff.data import Example
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.predictions import Predictions, predict
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.factors import FactorsResult
from hf_npeff.studies.result import LARGE_RATIO, StudyResult, markdown, number, ratio
from hf_npeff.studies.settings import SelectivityConfig
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.steps import find_scale

_LARGEST_ABLATION = 64.0
"""The multiples of a feature's own activation that are tried. Chosen: far larger than activations in a model, so that a
feature that does nothing can be distinguished from one that needs more."""
_FLOOR = torch.finfo(torch.float32).eps
"""A KL below this is a rounding error."""


@dataclass(frozen=True)
class SwitchedFeature:
    """The effect of switching one feature.

    Attributes:
        method: the method of the feature.
        attribute: the attribute on whose examples it is measured.
        feature: the number of the feature.
        scale: the step along a direction, or the degree of an ablation (1 removes the feature), with its sign.
        top: the mean KL on the attribute's examples, in nats.
        others: the mean KL on other examples, in nats.
        ratio: top / others.
        reached: whether the target was reached within 10%.
        ablated: for an ablation, the mean KL on the attribute's examples at scale 1.
        moved: the share of the attribute's examples with a KL of at least a tenth of the target. It is small if the
        mean comes from a few examples, because most of them lack the feature.
    """

    method: str
    attribute: str
    feature: int
    scale: float
    top: float
    others: float
    ratio: float
    reached: bool
    ablated: float | None = None
    moved: float | None = None


@dataclass
class SelectivityResult(StudyResult):
    """The outcome of `run_selectivity`.

    Attributes:
        rows: the effect of each method's feature for each attribute.
        excluded: {method: the reason why it was not measured}.
        config: the settings.
    """

    rows: list[SwitchedFeature]
    excluded: dict[str, str]
    config: SelectivityConfig

    @property
    def methods(self) -> list[str]:
        """The methods, in the order in which they were measured."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def ratios(self, method: str) -> list[float]:
        """The ratios of a method, for the attributes on which it reached the target."""
        return [row.ratio for row in self.rows if row.method == method and row.reached]

    def medians(self) -> dict[str, float]:
        """{method: median ratio over the attributes on which it reached the target}, without methods that never did."""
        return {m: statistics.median(ratios) for m in self.methods if (ratios := self.ratios(m))}

    def own_minus_others(self) -> dict[str, float]:
        """{method: mean over all attributes of the KL on their examples minus the KL on others, in nats}.

        All attributes count, with the KL that was reached. A feature that moves nothing or everything scores zero.
        This is the score of targeted probe perturbation (SAEBench, arXiv 2503.09532), with KL instead of a probe's
        accuracy.
        """
        rows = {m: [row for row in self.rows if row.method == m] for m in self.methods}
        return {m: statistics.mean(row.top - row.others for row in mine) for m, mine in rows.items()}

    def _moved(self, method: str) -> str:
        shares = [row.moved for row in self.rows if row.method == method and row.moved is not None]
        return f"{statistics.median(shares):.0%}" if shares else "–"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {
            "study": "selectivity",
            "config": asdict(self.config),
            "rows": [asdict(row) for row in self.rows],
            "medians": self.medians(),
            "own_minus_others": self.own_minus_others(),
            "excluded": self.excluded,
        }

    def table(self) -> str:
        """A table of KL ratios, by attribute and method; in brackets if the target was not reached."""
        attributes = list(dict.fromkeys(row.attribute for row in self.rows))
        cells = {(row.attribute, row.method): row for row in self.rows}
        body = []
        for attribute in attributes:
            measured = [cells.get((attribute, method)) for method in self.methods]
            body.append(
                [attribute]
                + ["–" if r is None else ratio(r.ratio) if r.reached else f"({ratio(r.ratio)})" for r in measured]
            )
        reached = [f"{len(self.ratios(m))} of {sum(row.method == m for row in self.rows)}" for m in self.methods]
        medians = self.medians()
        body.append(["median where reached", *(ratio(medians.get(m)) for m in self.methods)])
        body.append(["target reached", *reached])
        own = self.own_minus_others()
        body.append(["mean KL minus KL on others, nats", *(number(own[m], 2) for m in self.methods)])
        body.append(["median share of examples moved", *(self._moved(m) for m in self.methods)])
        lines = [markdown(["attribute", *self.methods], body)]
        lines += [f"\nNot measured: {name} ({why})." for name, why in self.excluded.items()]
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """The ratios on a logarithmic axis, with a dot for each attribute."""
        axes = figure.add_subplot()
        for position, method in enumerate(self.methods):
            mine = [row for row in self.rows if row.method == method]
            for reached, marker in ((True, "o"), (False, "x")):
                values = [min(max(row.ratio, 1e-2), LARGE_RATIO) for row in mine if row.reached == reached]
                axes.scatter([position] * len(values), values, marker=marker, alpha=0.6, color=f"C{position}")
        axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
        axes.set(yscale="log", ylabel="KL on examples with the attribute / without it (×: target not reached)")
        axes.set_xticks(range(len(self.methods)), self.methods, rotation=20, ha="right")


def run_selectivity(
    analyzer: NPEFFAnalyzer,
    methods: Sequence[MethodResult],
    dataset: Any,
    attributes: Attributes,
    factors: FactorsResult,
    config: SelectivityConfig | None = None,
) -> SelectivityResult:
    """Switch every method's feature for every attribute, on the same examples.

    The features are those that `run_factors` chose on the first half, and so are their signs: the more selective sign
    on half as many examples of the first half. Examples to measure on are drawn at random from the other half, so that
    they do not depend on any method's ranking.

    Args:
        analyzer: the analyzer of the model.
        methods: the results of the methods; those without interventions are reported as excluded.
        dataset: the examples of the coefficients, in the same order.
        attributes: the attributes of these examples.
        factors: the factors of the same methods and attributes.
        config: the settings.

    Raises:
        ValueError: if the dataset and the attributes have different numbers of examples.

    Example:
        >>> from hf_npeff.baselines import Site, activation_kmeans, hidden_states
        >>> from hf_npeff.studies.settings import SelectivityConfig
        >>> attributes = Attributes.from_columns({"animal": [row["animal"] for row in dataset]}, min_count=5)
        >>> site = Site(model)
        >>> methods = [activation_kmeans(hidden_states(analyzer, dataset, site), 3, site=site)]
        >>> config = SelectivityConfig(n_top=3, n_others=6)
        >>> result = run_selectivity(analyzer, methods, dataset, attributes, run_factors(methods, attributes), config)
    """
    config = config or SelectivityConfig()
    examples = analyzer.read(dataset)[:]
    if len(examples) != len(attributes.values):
        raise ValueError(f"the dataset has {len(examples)} examples, but the attributes have {len(attributes.values)}")
    excluded = {m.name: "it has no interventions" for m in methods if m.interventions is None}
    chosen = measured_attributes(attributes, factors, config)
    rows: list[SwitchedFeature] = []
    for method in lifted_for(methods, attributes, factors, config):
        if method.interventions is None:
            continue
        features = _features(method, factors, chosen)
        distinct = sorted(set(features))
        interventions = dict(zip(distinct, method.interventions(distinct), strict=True))
        for attribute, feature in zip(chosen, features, strict=True):
            values = attributes.values[:, attributes.names.index(attribute)]
            signed_on, measured_on = (
                [[examples[i] for i in part] for part in draw_examples(values, half, drawn)]
                for half, drawn in ((~factors.halves, config.for_signs), (factors.halves, config))
            )
            with analyzer.forward_pass() as forward:
                switched = switch(forward, interventions[feature], signed_on, measured_on, config)
            rows.append(SwitchedFeature(method.name, attribute, feature, **switched))
    return SelectivityResult(rows, excluded, config)


def measured_attributes(attributes: Attributes, factors: FactorsResult, config: SelectivityConfig) -> list[str]:
    """The attributes on which features are switched: those with the most examples among the measured ones."""
    measured = [score.attribute for score in factors.methods[0].attributes]
    measured.sort(key=lambda name: -int((attributes.values[:, attributes.names.index(name)] == 1).sum()))
    return measured[: config.max_attributes]


def _features(method: MethodResult, factors: FactorsResult, chosen: Sequence[str]) -> list[int]:
    scores = next(row for row in factors.methods if row.method == method.name)
    return [scores.feature_of(attribute) for attribute in chosen]


def lifted_for(
    methods: Sequence[MethodResult], attributes: Attributes, factors: FactorsResult, config: SelectivityConfig
) -> list[MethodResult]:
    """The same methods, with the directions that `run_selectivity` asks for lifted together where rows are the same."""
    chosen = measured_attributes(attributes, factors, config)
    return lifted_together(methods, [_features(method, factors, chosen) for method in methods])


def draw_examples(values: Tensor, half: Tensor, config: SelectivityConfig) -> tuple[list[int], list[int]]:
    """Random examples of one half: some that have an attribute (n,), and some that lack it."""
    generator = torch.Generator().manual_seed(config.seed)
    drawn = []
    for wanted, count in ((1, config.n_top), (0, config.n_others)):
        known = (half & (values == wanted)).nonzero()[:, 0]
        drawn.append(known[torch.randperm(len(known), generator=generator)[:count]].sort().values.tolist())
    return drawn[0], drawn[1]


def switch(
    forward: ForwardPass,
    intervention: Intervention,
    signed_on: Sequence[Sequence[Example]],
    measured_on: Sequence[Sequence[Example]],
    config: SelectivityConfig,
) -> dict[str, Any]:
    """Choose the more selective sign of an intervention on some examples, and measure it on others.

    Args:
        forward: the model's passes.
        intervention: what is scaled to the target KL.
        signed_on: examples with the attribute, and without it, on which the sign is chosen.
        measured_on: the same two, which are measured.
        config: the target and the size of batches.

    Returns:
        The fields of `SwitchedFeature` from `scale` on.
    """
    chosen = _Switching(forward, intervention, signed_on, config)
    both = [chosen.at_target(1.0, None)]
    both.append(chosen.at_target(-1.0, both[0]["scale"] if both[0]["reached"] else None))  # about the same step
    better = max(both, key=lambda m: (m["reached"], m["ratio"]))
    measured = _Switching(forward, intervention, measured_on, config)
    sign = math.copysign(1.0, better["scale"])
    return measured.at_target(sign, abs(better["scale"]) if better["reached"] else None) | {
        "ablated": None if measured.along_weights else measured.mean_on_top(1.0)
    }


class _Switching:
    """The effects of an intervention on two groups of examples."""

    def __init__(
        self,
        forward: ForwardPass,
        intervention: Intervention,
        groups: Sequence[Sequence[Example]],
        config: SelectivityConfig,
    ):
        self.forward, self.intervention, self.config = forward, intervention, config
        self.top, self.others = ((group, predict(forward, group, config.batch_size)) for group in groups)
        self.along_weights = isinstance(intervention, ParameterDirection)
        self.on_top = functools.cache(self._on_top)  # the step that a search ends at was tried in it

    def _each(self, scale: float, examples: Sequence[Example], before: Predictions) -> Tensor:
        with self.intervention.applied_to(self.forward.model, scale):
            return before.kl_to(predict(self.forward, examples, self.config.batch_size))

    def _on_top(self, scale: float) -> Tensor:
        return self._each(scale, *self.top)

    def mean_on_top(self, scale: float) -> float:
        """The mean KL on the attribute's examples, in nats."""
        return float(self.on_top(scale).mean())

    def at_target(self, sign: float, start: float | None) -> dict[str, Any]:
        """Scale one sign to the target; `start` is where the search begins, or None."""
        target = self.config.target_kl
        if isinstance(self.intervention, ParameterDirection):
            limit = self.intervention.norm_in(self.forward.model)
            start = start or min(0.05, limit)  # only where the search begins
        else:
            limit, start = _LARGEST_ABLATION, start or 1.0
        step, reached = find_scale(lambda s: self.mean_on_top(sign * s), target, start, limit, rounds=12)
        scale = sign * step
        a, b = self.mean_on_top(scale), float(self._each(scale, *self.others).mean())
        # A tenth of what was aimed at counts as moved
        moved = float((self.on_top(scale) >= target / 10).double().mean())
        selective = (a + _FLOOR) / (b + _FLOOR)
        return {"scale": scale, "top": a, "others": b, "ratio": selective, "reached": reached, "moved": moved}
