"""How well the features of several methods match annotated attributes that the methods never saw.

For every attribute, the best feature is chosen on one half of the examples and measured on the other half. Attributes
that cannot be measured are reported with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_npeff.baselines.method import MethodResult
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.measures import (
    agreement,
    auroc,
    aurocs,
    average_precision,
    best_components,
    best_threshold,
    purity,
)
from hf_npeff.studies.result import StudyResult, markdown, number, ratio
from hf_npeff.studies.settings import FactorsConfig

__all__ = [
    "auroc",
    "best_components",
    "purity",
    "Attributes",
    "FactorsConfig",
    "FactorsResult",
    "first_half",
    "run_factors",
]


@dataclass(frozen=True)
class AttributeScore:
    """How well one method finds one attribute.

    Attributes:
        attribute: the name of the attribute.
        feature: the number of the feature that is best on the first half.
        auroc: the AUROC of this feature on the other half.
        average_precision: the average precision of this feature on the other half.
        base_rate: the share of the other half that has the attribute, which is the average precision of chance.
        purity: the share of the feature's top examples, on the other half, that have the attribute.
        threshold: the threshold for the feature's coefficient, chosen on the first half.
    """

    attribute: str
    feature: int
    auroc: float
    average_precision: float
    base_rate: float
    purity: float
    threshold: float


@dataclass(frozen=True)
class MethodScore:
    """The scores of one method.

    Attributes:
        method: the name of the method.
        features: the number of features, r.
        attributes: the score for each attribute.
        mean_auroc: the mean AUROC over the attributes.
        mean_average_precision: the mean average precision over the attributes.
        found: how many attributes have an AUROC of at least `found_at`.
        at_once: for examples of the other half that have two or more attributes, the mean number of these that are
            found.
        possible: the mean number of attributes of these examples.
        wrong: the mean number of attributes that are found in these examples although they lack them.
        all_at_once: the share of these examples in which every attribute is found.
        purity: the mean purity over the attributes.
        stability: the mean |correlation| of matched features between seeds; NaN with one seed.
        seconds: the seconds that the method took.
    """

    method: str
    features: int
    attributes: list[AttributeScore]
    mean_auroc: float
    mean_average_precision: float
    found: int
    at_once: float
    possible: float
    wrong: float
    all_at_once: float
    purity: float
    stability: float
    seconds: float

    def feature_of(self, attribute: str) -> int:
        """The feature that was chosen for an attribute.

        Raises:
            KeyError: if the attribute was not measured.
        """
        return {score.attribute: score.feature for score in self.attributes}[attribute]


@dataclass
class FactorsResult(StudyResult):
    """The outcome of `run_factors`.

    Attributes:
        methods: the scores of each method.
        excluded: {attribute: the reason why it was not measured}.
        missing: {attribute: how many examples are not annotated}; these are left out for this attribute only.
        n: the number of examples in both halves together.
        halves: (n,) bool, True for the half on which features are measured.
        config: the settings.
        facts: {method: its settings and diagnostics}.
        selectivity: {method: KL ratio}, for the methods for which it was measured.
    """

    methods: list[MethodScore]
    excluded: dict[str, str]
    missing: dict[str, int]
    n: int
    halves: Tensor
    config: FactorsConfig
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    selectivity: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {
            "study": "factors",
            "config": asdict(self.config),
            "examples": self.n,
            "methods": [asdict(row) for row in self.methods],
            "selectivity": self.selectivity,
            "excluded": self.excluded,
            "missing": self.missing,
            "facts": self.facts,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FactorsResult:
        """What `to_dict` wrote, also after a file, where numbers that are not finite are None."""
        config = FactorsConfig(**values["config"])
        rows = [
            MethodScore(**{**_known(row), "attributes": [AttributeScore(**_known(a)) for a in row["attributes"]]})
            for row in values["methods"]
        ]
        rest = {key: values[key] for key in ("facts", "selectivity")}
        n = values["examples"]
        return cls(rows, values["excluded"], values["missing"], n, ~first_half(n, config.seed), config, **rest)

    def table(self) -> str:
        """A table with a row for each method."""
        header = ["method", "features", "mean AUROC", "mean AP", f"found (≥ {self.config.found_at:g})", "at once"]
        header += ["wrong", "purity", "stability", "KL ratio", "seconds"]
        rows = []
        for row in self.methods:
            rows.append(
                [
                    row.method,
                    row.features,
                    number(row.mean_auroc),
                    number(row.mean_average_precision),
                    f"{row.found} of {len(row.attributes)}",
                    f"{number(row.at_once, 2)} of {number(row.possible, 2)}",
                    number(row.wrong, 2),
                    number(row.purity, 2),
                    number(row.stability, 2),
                    ratio(self.selectivity.get(row.method)),
                    number(row.seconds, 1),
                ]
            )
        lines = [markdown(header, rows)]
        if self.excluded:
            reasons = "; ".join(f"{name} ({why})" for name, why in sorted(self.excluded.items()))
            lines += ["", f"Not measured, {len(self.excluded)}: {reasons}."]
        if self.missing:
            lines += ["", "Without annotation: " + ", ".join(f"{k} {v}" for k, v in sorted(self.missing.items())) + "."]
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """The AUROC of every attribute for each method, from the attribute that is found best to the worst."""
        axes = figure.add_subplot()
        for row in self.methods:
            values = sorted((score.auroc for score in row.attributes), reverse=True)
            axes.plot(range(1, len(values) + 1), values, marker=".", label=f"{row.method} ({row.mean_auroc:.2f})")
        axes.axhline(self.config.found_at, color="gray", linewidth=0.8, linestyle=":")
        axes.set(xlabel="attributes, from best found to worst", ylabel="AUROC on the other half", ylim=(0.4, 1.02))
        axes.legend(title="mean AUROC", frameon=False, fontsize=8)


def run_factors(
    methods: Sequence[MethodResult],
    attributes: Attributes,
    config: FactorsConfig | None = None,
    *,
    seeds: Mapping[str, Sequence[Tensor]] | None = None,
) -> FactorsResult:
    """Measure how well the features of methods match annotated attributes.

    Args:
        methods: the results of the methods, each with coefficients for the same n examples.
        attributes: the attributes of these examples.
        config: the settings.
        seeds: {method: coefficients (n, r) of fits with further seeds}, for the stability.

    Raises:
        ValueError: if there are no methods, two have the same name, their number of examples is not that of the
            attributes, or no attribute can be measured.

    Example:
        >>> from hf_npeff.baselines import MethodResult
        >>> attributes = Attributes.from_columns({"animal": [row["animal"] for row in dataset]}, min_count=5)
        >>> result = run_factors([MethodResult.of_decomposition(decomposition)], attributes)
        >>> print(result.table())
        | ...
    """
    config = config or FactorsConfig()
    n = len(attributes.values)
    if not methods or len({m.name for m in methods}) < len(methods):
        raise ValueError(f"expected methods of different names, but got {[m.name for m in methods]}")
    for method in methods:
        if len(method.coefficients) != n:
            raise ValueError(
                f"{method.name} has coefficients for {len(method.coefficients)} examples, but the attributes have {n}"
            )
    few = attributes.counts < config.at_least
    other_half = ~first_half(n, config.seed)
    first, second = ~other_half & ~few, other_half & ~few
    usable, excluded = _measurable(attributes, first, second, config.min_count)
    if not usable:
        raise ValueError(f"no attribute can be measured: {excluded or 'there are none'}")
    rows = [
        _score(method, attributes, usable, first, second, config, (seeds or {}).get(method.name, ()))
        for method in methods
    ]
    diagnostics = {method.name: method.facts for method in methods}
    return FactorsResult(rows, excluded, attributes.missing, n, other_half, config, diagnostics)


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row from a file, whose None were numbers that are not finite."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def first_half(n: int, seed: int) -> Tensor:
    """(n,) bool: the random half on which features are chosen."""
    half = torch.zeros(n, dtype=torch.bool)
    half[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]] = True
    return half


def _measurable(
    attributes: Attributes, first: Tensor, second: Tensor, min_count: int
) -> tuple[list[int], dict[str, str]]:
    usable, excluded = [], dict(attributes.excluded)
    for a, name in enumerate(attributes.names):
        counts = [int((attributes.values[half, a] == v).sum()) for half in (first, second) for v in (1, 0)]
        if min(counts) >= min_count:
            usable.append(a)
        else:
            excluded[name] = (
                f"the two halves have {counts[0]} and {counts[2]} examples with it, {counts[1]} and {counts[3]} "
                f"without it: fewer than {min_count}"
            )
    return usable, excluded


def _score(
    method: MethodResult,
    attributes: Attributes,
    usable: Sequence[int],
    first: Tensor,
    second: Tensor,
    config: FactorsConfig,
    seeds: Sequence[Tensor],
) -> MethodScore:
    W = method.coefficients.double()
    scores, flagged = [], torch.zeros(int(second.sum()), len(usable), dtype=torch.bool)
    for column, a in enumerate(usable):
        values = attributes.values[:, a]
        here, there = first & ~values.isnan(), second & ~values.isnan()
        feature = int(aurocs(W[here], values[here] == 1).argmax())
        w, truth = W[there, feature], values[there] == 1
        threshold = best_threshold(W[here, feature], values[here] == 1)
        top = torch.argsort(w, descending=True, stable=True)[: config.top]
        scores.append(
            AttributeScore(
                attributes.names[a],
                feature,
                auroc(w, truth),
                average_precision(w, truth),
                float(truth.double().mean()),
                float(truth[top].double().mean()),
                threshold,
            )
        )
        flagged[:, column] = W[second, feature] >= threshold
    truth = attributes.values[second][:, list(usable)]
    several = (truth == 1).sum(1) >= 2
    hits = (flagged & (truth == 1))[several].sum(1).double()
    has = (truth == 1)[several].sum(1).double()
    wrong = (flagged & (truth == 0))[several].sum(1).double()
    return MethodScore(
        method.name,
        len(method),
        scores,
        _mean([s.auroc for s in scores]),
        _mean([s.average_precision for s in scores]),
        sum(s.auroc >= config.found_at for s in scores),
        float(hits.mean()),
        float(has.mean()),
        float(wrong.mean()),
        float((hits == has).double().mean()),
        _mean([s.purity for s in scores]),
        _mean([agreement(method.coefficients, other) for other in seeds]),
        method.seconds,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
