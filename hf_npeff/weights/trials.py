"""Trials of changes: steps of both signs until a KL is reached, their effects, and those of random changes.

A trial asks for predictions and gets them, so several trials share the same forward passes, in which each example of a
batch has its own change, sign and scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.config import INTERVAL, PerturbationRequest
from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.predictions import Predictions
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs
from hf_npeff.progress import current, working
from hf_npeff.weights.activations import LinearDelta, random_like
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.moved_weights import rounding_of
from hf_npeff.weights.outcomes import Watched, label_column, watch
from hf_npeff.weights.perturbation import Effect, PerturbationReport, choose_examples
from hf_npeff.weights.steps import FLOOR, LONGEST, SharedSteps, Steps, StepSearch, longest_step, predicted_step

_QUANTILES = (0.1, 0.5, 0.9)
"""The quantiles of the KL of single examples for the report."""
_BOOTSTRAPS = 1000
"""Draws of an interval. Chosen: 25 of them lie beyond each end, which then varies by a few per cent of its width."""
_USUAL_ROUNDS = 3
"""Rounds of a search for the step of each sign; seen on language models and classifiers, for the estimate of time."""
_FIRST_STEP = 0.02
"""The first step to try where stored rows do not predict one: short beside the norm of any model's weights."""


@dataclass(frozen=True)
class _Wanted:
    """Examples, the step at which to predict them, and whether the step is along a random change instead."""

    examples: Sequence[Example]
    step: float
    random: bool = False


class _Trial:
    """The measurement of one change: the watched examples, and the predictions at the steps so far.

    It does not run the model: `measuring` yields jobs, and is sent the predictions for them.
    """

    def __init__(self, component: int, top: Watched, others: Watched, request: PerturbationRequest, limit: float):
        self.component, self.top, self.others, self.request = component, top, others, request
        self.limit = limit
        self.tried: dict[float, Predictions] = {}
        self.reached: dict[float, bool] = {}
        self.measured: list[tuple[Effect, Predictions, Predictions]] = []
        self.random: Effect | None = None

    @property
    def left(self) -> int:
        """About how many examples still have to be predicted."""
        top, others = len(self.top.examples), len(self.others.examples)
        if self.random is not None:
            return 0
        if self.measured:
            return top + others
        searching = 0 if self.reached else 2 * top
        return searching + max(len(self.reached), 2) * others + top + others

    def measuring(self, start: float | None) -> Generator[list[_Wanted], list[Predictions], None]:
        """The search of both signs, their effects, and a random change at the best step.

        Args:
            start: the first step to try; None if no step is predicted.
        """
        yield from self._searching(start)
        steps = list(self.reached)
        missing = [step for step in steps if step not in self.tried]
        jobs = [_Wanted(self.top.examples, step) for step in missing]
        predicted = yield jobs + [_Wanted(self.others.examples, step) for step in steps]
        self.tried |= dict(zip(missing, predicted, strict=False))
        for step, after in zip(steps, predicted[len(missing) :], strict=True):
            self.measured.append((self._effect(step, self.tried[step], after), self.tried[step], after))
        self.measured.sort(key=lambda m: (not self.reached[m[0].scale], -m[0].ratio))
        step = abs(self.measured[0][0].scale)
        both = yield [_Wanted(watched.examples, step, random=True) for watched in (self.top, self.others)]
        self.random = self._effect(step, *both)

    def _searching(self, start: float | None) -> Generator[list[_Wanted], list[Predictions], None]:
        """The step of each sign at which the target is reached; only the given step if a scale was given."""
        if self.request.scale is not None:
            self.reached = {float(self.request.scale): True}
            return
        first = min(_FIRST_STEP if start is None else start, self.limit)
        searches = {sign: StepSearch(self.request.target_kl, first, self.limit) for sign in (1, -1)}
        while open_ones := {sign: search for sign, search in searches.items() if not search.done}:
            steps = [sign * search.step for sign, search in open_ones.items()]
            predicted = yield [_Wanted(self.top.examples, step) for step in steps]
            for search, step, after in zip(open_ones.values(), steps, predicted, strict=True):
                self.tried[step] = after
                search.tell(float(self.top.before.kl_to(after).mean()))
        self.reached = {sign * search.nearest: search.reached for sign, search in searches.items()}

    def _effect(self, step: float, after_top: Predictions, after_others: Predictions) -> Effect:
        return _effect(step, self.top, after_top, self.others, after_others, self.request.seed)

    def report(
        self, forward: ForwardPass, decomposition: Decomposition, direction: ParameterDirection | None
    ) -> PerturbationReport:
        """The report of the measurement."""
        best, after_top, after_others = self.measured[0]
        rounded = None if direction is None else rounding_of(forward.model, direction, best.scale)
        assert self.random is not None
        return PerturbationReport(
            self.component,
            None if self.request.scale is not None else self.request.target_kl,
            best,
            self.measured[1][0] if len(self.measured) > 1 else None,
            self.random,
            self.top.indices,
            self.others.indices,
            [
                *_changes(forward, decomposition, self.top, after_top, is_top=True),
                *_changes(forward, decomposition, self.others, after_others, is_top=False),
            ],
            self.reached[best.scale],
            _said_of_labels(self.top, self.others),
            step_length=None if rounded is None else rounded.length,
            step_cosine=None if rounded is None else rounded.cosine,
            tried=[(step, float(self.top.before.kl_to(self.tried[step]).mean())) for step in sorted(self.tried)],
        )


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
        direction: the direction, of unit norm.
        decomposition: the decomposition.
        component: the number of the component.
        examples: all analysed examples, in the decomposition's order.
        request: the settings.
        rows: the sketch and the PEFs of the decomposition, which predict the first step to try.

    Raises:
        ValueError: if the component is active on no example, or all examples are among the top ones.
    """
    with working(f"measuring component {component}", examples_read(1, request)):
        return _evaluated(forward, direction, decomposition, component, examples, request, rows)


def examples_read(components: int, request: PerturbationRequest) -> int:
    """About how many examples the model reads to measure components."""
    rounds = 1 if request.scale is not None else 2 * _USUAL_ROUNDS
    signs = 1 if request.scale is not None else 2
    return components * ((2 + rounds) * request.n_top + (2 + signs) * request.n_others)


def _evaluated(
    forward: ForwardPass,
    direction: ParameterDirection,
    decomposition: Decomposition,
    component: int,
    examples: Sequence[Example],
    request: PerturbationRequest,
    rows: tuple[Sketch, PEFs] | None,
) -> PerturbationReport:
    steps = Steps(forward, direction, request.batch_size)
    ((top, others),) = _watched(forward, steps, decomposition, [component], examples, request)
    trial = _Trial(component, top, others, request, longest_step(direction, forward.model))
    start = None
    if rows is not None and steps.deltas is not None and request.scale is None:
        start = predicted_step(*rows, top.indices, steps.deltas, request.target_kl)
    running = trial.measuring(start)
    jobs = next(running)
    with contextlib.suppress(StopIteration):
        while True:
            current().expect(trial.left)
            along = steps.random(request.seed) if jobs[0].random else steps
            jobs = running.send(along.predict([(job.examples, job.step) for job in jobs]))
    return trial.report(forward, decomposition, direction)


def evaluate_together(
    forward: ForwardPass,
    changes: Sequence[Mapping[str, LinearDelta]],
    decomposition: Decomposition,
    components: Sequence[int],
    examples: Sequence[Example],
    request: PerturbationRequest,
    rows: tuple[Sketch, PEFs] | None = None,
) -> list[PerturbationReport]:
    """Measure several changes of linear maps; their searches take turns, and share forward passes.

    Args:
        forward: the forward pass.
        changes: {parameter: delta} of each.
        decomposition: the decomposition.
        components: the numbers of the components, one for each change.
        examples: all analysed examples, in the decomposition's order.
        request: the settings.
        rows: the sketch and the PEFs of the decomposition, which predict the first steps to try.

    Raises:
        ValueError: if a component is active on no example, or all examples are among its top ones.
    """
    drawn = [random_like(change, request.seed) for change in changes]
    steps = SharedSteps(forward, [*changes, *drawn], request.batch_size)
    watched = _watched(forward, steps, decomposition, components, examples, request)
    size = _size_of(forward.model, changes[0])
    trials, running, wanted = [], {}, {}
    for number, (component, change, (top, others)) in enumerate(zip(components, changes, watched, strict=True)):
        norm = sum(delta.squared_norm for delta in change.values()) ** 0.5
        start = None
        if rows is not None and request.scale is None:
            start = predicted_step(*rows, top.indices, change, request.target_kl)
        trials.append(_Trial(component, top, others, request, LONGEST if size is None else size / norm))
        running[number] = trials[-1].measuring(start)
        wanted[number] = next(running[number])
    while wanted:
        current().expect(sum(trial.left for trial in trials))
        jobs = [
            (number + len(changes) * job.random, job.examples, job.step)
            for number, some in wanted.items()
            for job in some
        ]
        predicted = iter(steps.predict(jobs))
        answers = {number: [next(predicted) for _ in some] for number, some in wanted.items()}
        wanted = {}
        for number, after in answers.items():
            with contextlib.suppress(StopIteration):
                wanted[number] = running[number].send(after)
    return [trial.report(forward, decomposition, None) for trial in trials]


def _size_of(model: nn.Module, change: Mapping[str, LinearDelta]) -> float | None:
    """‖θ‖ of the parameters that a change affects; None if one cannot be read."""
    parameters = bare_parameters(model)
    if not all(name in parameters and is_at_hand(parameters[name]) for name in change):
        return None
    weights = [parameters[name].detach() for name in change]
    norms = (torch.linalg.vector_norm(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights)
    return sum(float(norm) ** 2 for norm in norms) ** 0.5


def _watched(
    forward: ForwardPass,
    steps: SharedSteps | Steps,
    decomposition: Decomposition,
    components: Sequence[int],
    examples: Sequence[Example],
    request: PerturbationRequest,
) -> list[tuple[Watched, Watched]]:
    """The top examples and the others of every component, each example predicted once."""
    chosen = [choose_examples(decomposition, j, request.n_top, request.n_others, request.seed) for j in components]
    needed = sorted({i for both in chosen for indices in both for i in indices})
    before = steps.unchanged([examples[i] for i in needed])
    at = {i: place for place, i in enumerate(needed)}
    column = label_column(decomposition.info, decomposition.columns)

    def watching(indices: list[int]) -> Watched:
        mine = Predictions([before.logits[at[i]] for i in indices], before.distribution)
        return watch(forward, decomposition.info, column, (indices, [examples[i] for i in indices]), mine)

    return [(watching(top), watching(others)) for top, others in chosen]


def _said_of_labels(top: Watched, others: Watched) -> str:
    """A sentence on the number of labels behind accuracies or errors, or why there are none."""
    counted = sum(watched.truth.labelled for watched in (top, others))
    if not counted:
        return f"nothing is compared with labels: {top.truth.why_none or 'the watched examples have none'}"
    what = "errors" if top.predicts_numbers else "accuracies"
    of = [f"{w.truth.labelled} of {len(w.indices)} {name}" for w, name in ((top, "top examples"), (others, "others"))]
    return f"{what} are over {' and '.join(of)}"


def _changes(
    forward: ForwardPass, decomposition: Decomposition, watched: Watched, after: Predictions, *, is_top: bool
) -> list[dict[str, Any]]:
    """The answers that changed, as `PerturbationReport.changed` holds them."""
    texts = decomposition.texts
    changed = []
    answers = zip(watched.indices, watched.examples, watched.before.answers(), after.answers(), strict=True)
    for i, example, *both in answers:
        before, now = (forward.in_words(answer) for answer in both)
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
        others.indices[int(b.argmax())],
    )


def _ratio_interval(a: Tensor, b: Tensor, seed: int) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of means, by drawing examples of both groups."""
    generator = torch.Generator().manual_seed(seed)
    draws_a = a[torch.randint(len(a), (_BOOTSTRAPS, len(a)), generator=generator)].mean(1)
    draws_b = b[torch.randint(len(b), (_BOOTSTRAPS, len(b)), generator=generator)].mean(1)
    ratios = (draws_a + FLOOR) / (draws_b + FLOOR)
    low, high = torch.quantile(ratios, torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, high


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    low, middle, high = torch.quantile(values, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return low, middle, high
