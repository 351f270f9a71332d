"""The effect of moving the weights along a direction: KL on a component's examples, on others, and at random.

A component is selectively disrupted if predictions move on its top examples and nowhere else. Both signs are tried,
each with the step whose mean KL on the top examples reaches a target, and compared with a random direction of equal
norm.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.fisher.distributions import HALF_SQUARED
from hf_npeff.weights.measurement import Measurement
from hf_npeff.weights.off_target import OffTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Effect:
    """The measured effect of one step along a direction.

    Attributes:
        scale: the step's length and sign.
        top: mean KL on the top examples, in nats.
        others: mean KL on the other examples, in nats.
        ratio: top / others.
        interval: 95% bootstrap interval of the ratio over examples.
        top_quantiles: 10%, 50% and 90% quantiles of the KL on the top examples.
        other_quantiles: the same for the others.
        top_flips: share of the top examples whose likeliest outcome changes; None for regression.
        other_flips: the same for the others.
        top_accuracy: accuracy before and after, over the labelled top examples; None without labels, and for
            regression. If an example has several labels, all have to be right; tokens count one by one.
        other_accuracy: the same for the others.
        top_labelled: how many of the top examples have a label.
        other_labelled: the same for the others.
        top_absolute_error: mean |prediction − label| before and after, for regression with labels, otherwise None.
        other_absolute_error: the same for the others.
        top_squared_error: mean (prediction − label)² before and after.
        other_squared_error: the same for the others.
        other_worst: the largest KL on one of the others.
        other_worst_example: the index of that example.
    """

    scale: float
    top: float
    others: float
    ratio: float
    interval: tuple[float, float]
    top_quantiles: tuple[float, float, float]
    other_quantiles: tuple[float, float, float]
    top_flips: float | None
    other_flips: float | None
    top_accuracy: tuple[float, float] | None = None
    other_accuracy: tuple[float, float] | None = None
    top_labelled: int = 0
    other_labelled: int = 0
    top_absolute_error: tuple[float, float] | None = None
    other_absolute_error: tuple[float, float] | None = None
    top_squared_error: tuple[float, float] | None = None
    other_squared_error: tuple[float, float] | None = None
    other_worst: float | None = None
    other_worst_example: int | None = None

    def __repr__(self) -> str:
        what = "KL" if self.top_flips is not None else HALF_SQUARED
        return (
            f"Effect({what} {self.top:.3g} on top, {self.others:.3g} on others, ratio {self.ratio:.3g} at "
            f"{self.scale:.3g}{self._answers_changed})"
        )

    @property
    def _answers_changed(self) -> str:
        """What is added about answers: a KL says little of them where a model is sure. Empty for regression."""
        if self.top_flips is None or self.other_flips is None:
            return ""
        return f"; answers changed {self.top_flips:.0%} and {self.other_flips:.0%}"


@dataclass(frozen=True)
class PerturbationReport:
    """A direction's effect on a component's top examples and on others.

    Attributes:
        component: the component's number.
        target: the KL on the top examples that the steps should reach, or None if the scale was given.
        best: the effect of the more selective sign.
        opposite: the effect of the other sign; None if a scale was given.
        random: the effect of a random direction of equal norm, with the best step's length.
        top_examples: indices of the top examples.
        other_examples: indices of the others.
        changed: answers before and after the best step: index, id, text, before, after, whether it is a top example.
        reached: whether the target was reached.
        labels: the number of labels behind accuracies or errors, or why there are none.
        held_out: the measurement of the best step on other data, if it was asked for.
        off_target: inputs, found by a search, that the best step moves although they are not the component's, if the
            search was asked for.
        step_length: the length of the best step after rounding to the weights' dtype, over its length before. Only
            `applied_to` and PEFT's `merge_and_unload` round; steps that are measured in the activations are not
            rounded. None if the weights cannot be changed: quantised, offloaded or sharded.
        step_cosine: the cosine of the rounded step with the step; None in the same cases.
        tried: (scale, mean KL on the top examples in nats) of every step that the search tried, by scale.

    Example:
        >>> report = analyzer.evaluate_direction(direction, decomposition, 0, dataset, target_kl=0.1, n_top=4)
        >>> report.step_length > 0.99 and report.step_cosine > 0.99
        True
        >>> report.summary()["scale"] == report.scale == report.to_dict()["best"]["scale"]
        True
    """

    component: int
    target: float | None
    best: Effect
    opposite: Effect | None
    random: Effect
    top_examples: list[int]
    other_examples: list[int]
    changed: list[dict[str, Any]]
    reached: bool
    labels: str = ""
    held_out: Measurement | None = None
    off_target: OffTarget | None = None
    step_length: float | None = None
    step_cosine: float | None = None
    tried: list[tuple[float, float]] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """The best step's length and sign, for `to_adapter` and `applied_to`."""
        return self.best.scale

    @property
    def ratio(self) -> float:
        """KL on the top examples over KL on the others, at the best step."""
        return self.best.ratio

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """The short form that a decomposition keeps."""
        return {
            "scale": self.best.scale,
            "target": self.target,
            "reached": self.reached,
            "kl_top": self.best.top,
            "kl_others": self.best.others,
            "kl_worst": self.best.other_worst,
            "worst_example": self.best.other_worst_example,
            "kl_searched": None if self.off_target is None else self.off_target.worst_kl,
            "ratio": self.best.ratio,
            "kl_random": self.random.top,
            "ratio_random": self.random.ratio,
            "top_flips": self.best.top_flips,
            "other_flips": self.best.other_flips,
        }

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_report

        return of_report(self)

    def __repr__(self) -> str:
        b = self.best
        what = "KL" if b.top_flips is not None else HALF_SQUARED
        return (
            f"PerturbationReport(component {self.component}: {what} {b.top:.3g} on top, {b.others:.3g} on others, "
            f"ratio {b.ratio:.3g} at scale {b.scale:.3g}{b._answers_changed}; random {self.random.ratio:.3g}"
            f"{self._missed})"
        )

    @property
    def _missed(self) -> str:
        """What is added where the step does not reach the target, although it is as long as the search goes."""
        return "" if self.reached or self.target is None else f"; does not reach the target of {self.target:.3g}"


def choose_examples(
    decomposition: Decomposition, component: int, n_top: int, n_others: int, seed: int
) -> tuple[list[int], list[int]]:
    """A component's top examples, and others on which it is not active, drawn at random.

    If a component is active everywhere, the others are the examples on which its share is smallest, with a warning.

    Raises:
        ValueError: if the component is active on no example, or all examples are among the top ones.
    """
    w = decomposition[component].coefficients
    total = decomposition.coefficients.sum(1)
    order = torch.argsort(w, descending=True)
    top = [i for i in order[:n_top].tolist() if w[i] > 0]
    if not top:
        raise ValueError(f"component {component} is not active on any example")
    share = w / total.clamp_min(torch.finfo(w.dtype).tiny)
    active = active_examples(decomposition.coefficients)[:, component]
    quiet = [i for i in range(len(w)) if not active[i] and i not in set(top)]
    if not quiet:
        quiet = sorted(set(range(len(w))) - set(top), key=lambda i: (float(share[i]), i))[:n_others]
        if not quiet:
            raise ValueError(f"all {len(w)} examples are top examples of component {component}; use a smaller n_top")
        logger.warning(
            "component %d is active on every example: the others are the examples on which its share is smallest, up "
            "to %.0f%% of an example's coefficients",
            component,
            100 * max(float(share[i]) for i in quiet),
        )
    drawn = torch.randperm(len(quiet), generator=torch.Generator().manual_seed(seed))[:n_others].tolist()
    return top, sorted(quiet[i] for i in drawn)
