"""What happens when the parameters move along a direction: KL on a component's examples, on others, and at random.

A component is selectively disrupted when predictions move on its top examples and nowhere else. Both signs are tried,
each at the step whose mean KL on the top examples reaches a target, always beside a random direction of equal norm.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import PerturbationRequest
from hf_npeff.data import Example
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.predictions import Predictions, predict
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.measurement import Measurement
from hf_npeff.weights.moved_weights import rounding_of
from hf_npeff.weights.off_target import OffTarget
from hf_npeff.weights.outcomes import Watched, label_column, watch
from hf_npeff.weights.steps import FLOOR, Steps, StepSearch, longest_step, predicted_step

logger = logging.getLogger(__name__)
_BOOTSTRAPS = 1000
"""Draws of an interval. Chosen: 25 of them lie beyond each end, which then varies by a few per cent of its width."""
_FIRST_STEP = 0.02
"""The first step to try where stored rows do not predict one: short beside the norm of any model's weights."""


@dataclass(frozen=True)
class Effect:
    """A step along one direction, measured.

    Attributes:
        scale: the step's length and sign.
        top: mean KL on the top examples, nats.
        others: mean KL on the others, nats.
        ratio: top / others.
        interval: 95% bootstrap interval of the ratio over examples.
        top_quantiles: 10%, 50% and 90% of the KL on the top examples.
        other_quantiles: the same on the others.
        top_flips: share of the top examples whose likeliest outcome changes; None for regression.
        other_flips: the same on the others.
        top_accuracy: before and after, over the examples with a label; None where there is none, and for regression.
            Of several labels an example, all have to be right; of tokens, each counts.
        other_accuracy: the same on the others.
        top_labelled: how many of the top examples have a label.
        other_labelled: the same of the others.
        top_absolute_error: mean |prediction − label| before and after, for regression with labels, else None.
        other_absolute_error: the same on the others.
        top_squared_error: mean (prediction − label)² before and after.
        other_squared_error: the same on the others.
        other_worst: the largest KL on one of the others.
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


@dataclass(frozen=True)
class PerturbationReport:
    """A direction's effect on a component's top examples and on others.

    Attributes:
        component: its number.
        target: the KL on the top examples that the steps were to reach, or None where the scale was given.
        best: the more selective of both signs.
        opposite: the other sign; None where a scale was given.
        random: a random direction of equal norm, at the best step's length.
        top_examples: indices of the top examples.
        other_examples: indices of the others.
        changed: answers before and after at the best step: index, id, text, before, after, whether it is a top example.
        reached: whether the target was reached.
        labels: over how many labels accuracies or errors are, or why there are none.
        held_out: the best step on other data, where it was asked for.
        off_target: the inputs that a search found the best step to move although they are not the component's, where
            it was asked for.
        step_length: the length of the best step as the weights' type rounds it, over the step's own: what `applied_to`
            and PEFT's `merge_and_unload` would take. What is measured here is the step without rounding wherever it is
            added in the activations. None where the weights cannot be moved: quantised, offloaded or sharded.
        step_cosine: the cosine of the rounded step with the step, likewise.

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
        """What a decomposition keeps of it."""
        return {
            "scale": self.best.scale,
            "kl_top": self.best.top,
            "kl_others": self.best.others,
            "kl_worst": self.best.other_worst,
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
        return (
            f"PerturbationReport(component {self.component}: KL {b.top:.3g} on top, {b.others:.3g} on others, ratio "
            f"{b.ratio:.3g} at scale {b.scale:.3g}; random {self.random.ratio:.3g})"
        )


def choose_examples(
    decomposition: Decomposition, component: int, n_top: int, n_others: int, seed: int
) -> tuple[list[int], list[int]]:
    """A component's top examples, and others on which it is not active, drawn at random.

    A component that is active everywhere is compared with the examples on which it carries the least, with a warning.

    Raises:
        ValueError: if the component is active on no example, or all examples are among the top ones.
    """
    w = decomposition[component].coefficients
    total = decomposition.coefficients.sum(1)
    order = torch.argsort(w, descending=True)
    top = [i for i in order[:n_top].tolist() if w[i] > 0]
    if not top:
        raise ValueError(f"component {component} is active on no example")
    share = w / total.clamp_min(torch.finfo(w.dtype).tiny)
    active = active_examples(decomposition.coefficients)[:, component]
    quiet = [i for i in range(len(w)) if not active[i] and i not in set(top)]
    if not quiet:
        quiet = sorted(set(range(len(w))) - set(top), key=lambda i: (float(share[i]), i))[:n_others]
        if not quiet:
            raise ValueError(f"all {len(w)} examples are top examples of component {component}; use a smaller n_top")
        logger.warning(
            "component %d is active on every example: the others are those on which it carries the least, up to %.0f%% "
            "of an example's coefficients",
            component,
            100 * max(float(share[i]) for i in quiet),
        )
    drawn = torch.randperm(len(quiet), generator=torch.Generator().manual_seed(seed))[:n_others].tolist()
    return top, sorted(quiet[i] for i in drawn)


class _Trial:
    """A direction, the examples that are watched, and what was predicted for the top ones at the steps taken so far."""

    def __init__(
        self,
        forward: ForwardPass,
        direction: ParameterDirection,
        top: Watched,
        others: Watched,
        request: PerturbationRequest,
    ):
        self.direction, self.top, self.others, self.request = direction, top, others, request
        self.steps = Steps(forward, direction, request.batch_size)
        self.limit = longest_step(direction, forward.model)
        self.tried: dict[float, Predictions] = {}

    def search(self, start: float | None) -> dict[float, bool]:
        """{step of each sign: whether it reaches the target}; the given one alone where the scale is.

        Args:
            start: the first step to try; None where nothing predicts one.
        """
        if self.request.scale is not None:
            return {float(self.request.scale): True}
        first = min(_FIRST_STEP if start is None else start, self.limit)
        searches = {sign: StepSearch(self.request.target_kl, first, self.limit) for sign in (1, -1)}
        while open_ones := {sign: search for sign, search in searches.items() if not search.done}:
            steps = [sign * search.step for sign, search in open_ones.items()]
            predicted = self.steps.predict([(self.top.examples, step) for step in steps])
            for search, step, after in zip(open_ones.values(), steps, predicted, strict=True):
                self.tried[step] = after
                search.tell(float(self.top.before.kl_to(after).mean()))
        return {sign * search.nearest: search.reached for sign, search in searches.items()}

    def effects(self, steps: Sequence[float]) -> list[tuple[Effect, Predictions, Predictions]]:
        """Steps, measured, each with what is predicted after it for the top examples and for the others."""
        missing = [step for step in steps if step not in self.tried]
        jobs = [(self.top.examples, step) for step in missing] + [(self.others.examples, step) for step in steps]
        predicted = self.steps.predict(jobs)
        self.tried |= dict(zip(missing, predicted, strict=False))
        pairs = zip(steps, predicted[len(missing) :], strict=True)
        return [self._effect(step, self.tried[step], after) for step, after in pairs]

    def random(self, step: float) -> Effect:
        """A random direction at a step."""
        random = self.steps.random(self.request.seed)
        return self._effect(step, *random.predict([(self.top.examples, step), (self.others.examples, step)]))[0]

    def _effect(
        self, step: float, after_top: Predictions, after_others: Predictions
    ) -> tuple[Effect, Predictions, Predictions]:
        return _effect(step, self.top, after_top, self.others, after_others, self.request.seed), after_top, after_others


def evaluate(
    forward: ForwardPass,
    direction: ParameterDirection,
    decomposition: Decomposition,
    component: int,
    examples: Sequence[Example],
    request: PerturbationRequest,
    rows: tuple[Sketch, PEFs] | None = None,
) -> PerturbationReport:
    """Measure a direction.

    Args:
        forward: the forward pass.
        direction: unit norm.
        decomposition: whose component is followed.
        component: its number.
        examples: all analysed ones, in the decomposition's order.
        request: how.
        rows: the sketch and the PEFs of the decomposition, which predict the first step to try.

    Raises:
        ValueError: if the component is active on no example, or all examples are among the top ones.
    """
    chosen = choose_examples(decomposition, component, request.n_top, request.n_others, request.seed)
    top, others = (_watch(forward, decomposition, examples, indices, request.batch_size) for indices in chosen)
    trial = _Trial(forward, direction, top, others, request)
    start = None
    if rows is not None and trial.steps.deltas is not None and request.scale is None:
        start = predicted_step(*rows, top.indices, trial.steps.deltas, request.target_kl)
    reached = trial.search(start)
    measured = trial.effects(list(reached))
    measured.sort(key=lambda m: (not reached[m[0].scale], -m[0].ratio))
    best, after_top, after_others = measured[0]
    rounded = rounding_of(forward.model, direction, best.scale)
    return PerturbationReport(
        component,
        None if request.scale is not None else request.target_kl,
        best,
        measured[1][0] if len(measured) > 1 else None,
        trial.random(abs(best.scale)),
        top.indices,
        others.indices,
        [
            *_changes(forward, decomposition, top, after_top, is_top=True),
            *_changes(forward, decomposition, others, after_others, is_top=False),
        ],
        reached[best.scale],
        _said_of_labels(top, others),
        step_length=None if rounded is None else rounded.length,
        step_cosine=None if rounded is None else rounded.cosine,
    )


def _said_of_labels(top: Watched, others: Watched) -> str:
    """Over how many labels accuracies or errors are, or why there are none."""
    counted = sum(watched.truth.labelled for watched in (top, others))
    if not counted:
        return f"nothing is compared with labels: {top.truth.why_none or 'the watched examples have none'}"
    what = "errors" if top.predicts_numbers else "accuracies"
    of = [f"{w.truth.labelled} of {len(w.indices)} {name}" for w, name in ((top, "top examples"), (others, "others"))]
    return f"{what} are over {' and '.join(of)}"


def _watch(
    forward: ForwardPass, decomposition: Decomposition, examples: Sequence[Example], indices: list[int], batch_size: int
) -> Watched:
    chosen, info = [examples[i] for i in indices], decomposition.info
    column = label_column(info, decomposition.columns)
    return watch(forward, info, column, (indices, chosen), predict(forward, chosen, batch_size))


def _changes(
    forward: ForwardPass, decomposition: Decomposition, watched: Watched, after: Predictions, *, is_top: bool
) -> list[dict[str, Any]]:
    """The answers that changed, as `PerturbationReport.changed` holds them."""
    assert forward.describe is not None
    texts = decomposition.texts
    changed = []
    answers = zip(watched.indices, watched.examples, watched.before.answers(), after.answers(), strict=True)
    for i, example, *both in answers:
        before, now = ("".join(forward.describe(answer)) for answer in both)
        if not torch.equal(*both) and not (watched.predicts_numbers and before == now):
            text = None if texts is None else texts[i]
            changed.append({"index": i, "id": example.id, "text": text, "top": is_top, "before": before, "after": now})
    return changed


def _effect(
    step: float, top: Watched, after_top: Predictions, others: Watched, after_others: Predictions, seed: int
) -> Effect:
    a, b = top.before.kl_to(after_top), others.before.kl_to(after_others)
    errors, other_errors = top.errors(after_top), others.errors(after_others)
    return Effect(
        step,
        float(a.mean()),
        float(b.mean()),
        float((a.mean() + FLOOR) / (b.mean() + FLOOR)),
        _ratio_interval(a, b, seed),
        _quantiles(a),
        _quantiles(b),
        top.flipped(after_top),
        others.flipped(after_others),
        top.accuracy(after_top),
        others.accuracy(after_others),
        top.truth.labelled,
        others.truth.labelled,
        errors[0],
        other_errors[0],
        errors[1],
        other_errors[1],
        float(b.max()),
    )


def _ratio_interval(a: Tensor, b: Tensor, seed: int) -> tuple[float, float]:
    """95% of the ratio of means, by drawing examples of both groups with replacement."""
    generator = torch.Generator().manual_seed(seed)
    draws_a = a[torch.randint(len(a), (_BOOTSTRAPS, len(a)), generator=generator)].mean(1)
    draws_b = b[torch.randint(len(b), (_BOOTSTRAPS, len(b)), generator=generator)].mean(1)
    ratios = (draws_a + FLOOR) / (draws_b + FLOOR)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    low, middle, high = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return low, middle, high
