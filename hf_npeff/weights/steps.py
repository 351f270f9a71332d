"""Steps along a weight change: several in one forward pass, and the search for the step with a wanted KL."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.batching import relative_change
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.parameters import is_at_hand
from hf_npeff.fisher.predictions import Predictions, predict
from hf_npeff.fisher.unchanged_blocks import UnchangedBlocks
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.activations import ChangedActivations, LinearDelta
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.layouts import LINEAR_LAYOUTS

logger = logging.getLogger(__name__)
FLOOR = torch.finfo(torch.float32).eps
"""A KL below this is rounding."""
_DIRECT = 2
"""The number of steps of a search that aim at the target itself. Simulated on 4,000 curves (quadratic, saturating,
growing faster, wavy) from a first step that is off by a quarter: 2.7 steps to the target, and 3.0 if all steps aim a
tenth beyond it."""
_TRIED = 2
"""Examples for each of two steps, to find out whether steps can share a forward pass."""
LONGEST = 64.0
"""The longest step if the norm of the weights is not known, because none of them can be read."""

Job = tuple[Sequence[Example], float]
"""Examples, and the step at which to predict them."""
NumberedJob = tuple[int, Sequence[Example], float]
"""The same, with the number of one of several changes."""


class SharedSteps:
    """A model's predictions after steps along several changes, added in the activations.

    All examples of a call share their forward passes, each with its own change and step, unless the model's predictions
    would then differ from those for each job alone. Blocks below all changes run once for every example.

    Args:
        forward: the forward pass.
        changes: {parameter: delta} of each change.
        batch_size: the number of examples in a forward pass.

    Attributes:
        shared: whether jobs share forward passes; None if it was not tried yet.

    Raises:
        UnsupportedModelError: if a parameter is not only the weight of linear maps.
        ValueError: if the model lacks a parameter, or has one of another shape.
    """

    def __init__(self, forward: ForwardPass, changes: Sequence[Mapping[str, LinearDelta]], batch_size: int):
        self._forward, self._batch_size = forward, batch_size
        self._changed = ChangedActivations(forward.model, changes)
        self._blocks = UnchangedBlocks(forward, self._changed.modules)
        self.shared: bool | None = False if forward.one_at_a_time else None

    def predict(self, jobs: Sequence[NumberedJob]) -> list[Predictions]:
        """What is predicted for the examples of every job, after its step.

        Raises:
            UnsupportedModelError: if the model reads a weight that is changed without calling its module.
        """
        with self._changed as changed:
            if len(jobs) > 1 and self.shared is None:
                self.shared = self._can_share(changed, jobs)
            if len(jobs) > 1 and self.shared:
                return self._together(changed, jobs)
            return [self._alone(changed, *job) for job in jobs]

    def unchanged(self, examples: Sequence[Example]) -> Predictions:
        """Predict with the assigned changes; outside `predict`, with the unchanged model."""
        return predict(self._forward, examples, self._batch_size, outputs_of=self._blocks.outputs)

    def _alone(self, changed: ChangedActivations, number: int, examples: Sequence[Example], step: float) -> Predictions:
        changed.assign_all(number, step)
        return self.unchanged(examples)

    def _together(self, changed: ChangedActivations, jobs: Sequence[NumberedJob]) -> list[Predictions]:
        examples = [example for _, some, _ in jobs for example in some]
        steps = [(number, step) for number, some, step in jobs for _ in some]

        def assign(batch: Sequence[int]) -> None:
            changed.assign([steps[i][0] for i in batch], [steps[i][1] for i in batch])

        outputs = self._blocks.outputs
        every = predict(self._forward, examples, self._batch_size, before_batch=assign, outputs_of=outputs)
        groups, start = [], 0
        for _, some, _ in jobs:
            groups.append(Predictions(every.logits[start : start + len(some)], every.distribution))
            start += len(some)
        return groups

    def _can_share(self, changed: ChangedActivations, jobs: Sequence[NumberedJob]) -> bool:
        """Whether steps in one batch give the same predictions as each alone; routed experts may mix examples."""
        few = [(number, examples[:_TRIED], step) for number, examples, step in (jobs[0], jobs[-1])]
        try:
            together = self._together(changed, few)
        except UnsupportedModelError as error:
            logger.info("every step has its own forward passes: %s", error)
            return False
        alone = [self._alone(changed, *job) for job in few]
        for a, b in zip(together, alone, strict=True):
            for x, y in zip(a.logits, b.logits, strict=True):
                if relative_change(x, y) > self._forward.tolerance:
                    logger.info("every step has its own forward passes: in one batch the predictions differ")
                    return False
        return True


class Steps:
    """A model's predictions after steps along one direction.

    A direction that changes only linear maps is added in the activations (see `SharedSteps`). Any other direction
    changes the weights.

    Args:
        forward: the forward pass.
        direction: the direction, of unit norm.
        batch_size: the number of examples in a forward pass.
    """

    def __init__(self, forward: ForwardPass, direction: ParameterDirection, batch_size: int):
        self._forward, self._direction, self._batch_size = forward, direction, batch_size
        linear = all(layout in LINEAR_LAYOUTS for layout in direction.layouts.values())
        self.deltas: dict[str, LinearDelta] | None = direction.linear_deltas() if linear else None
        self._shared = None if self.deltas is None else SharedSteps(forward, [self.deltas], batch_size)

    def random(self, seed: int) -> Steps:
        """The same for a random direction of equal norm."""
        other = Steps(self._forward, self._direction.random_like(seed), self._batch_size)
        if other._shared is not None and self._shared is not None:
            other._shared.shared = self._shared.shared
        return other

    def unchanged(self, examples: Sequence[Example]) -> Predictions:
        """The predictions of the unchanged model."""
        if self._shared is not None:
            return self._shared.unchanged(examples)
        return predict(self._forward, examples, self._batch_size)

    def predict(self, jobs: Sequence[Job]) -> list[Predictions]:
        """What is predicted for the examples of every job, after its step.

        Raises:
            UnsupportedModelError: if the model reads a weight that is changed without calling its module.
        """
        if self._shared is not None:
            return self._shared.predict([(0, *job) for job in jobs])
        predictions = []
        for examples, step in jobs:
            with self._direction.applied_to(self._forward.model, step):
                predictions.append(predict(self._forward, examples, self._batch_size))
        return predictions


def longest_step(direction: ParameterDirection, model: nn.Module) -> float:
    """‖θ‖ of the readable parameters that a unit direction changes: the longest sensible step."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    at_hand = all(name in parameters and is_at_hand(parameters[name]) for name in direction)
    return direction.norm_in(model) if at_hand else LONGEST


def predicted_step(
    sketch: Sketch, pefs: PEFs, indices: Sequence[int], deltas: Mapping[str, LinearDelta], target: float
) -> float | None:
    """The step at which the stored rows predict a mean KL: KL_i ≈ ½ step² Σ_c ⟨A_ic, δ⟩².

    Args:
        sketch: the sketch of the PEFs.
        pefs: the rows A_ic.
        indices: the indices of the examples.
        deltas: δ.
        target: mean KL, in nats.

    Returns:
        The step; None if the rows predict no KL, or δ has other parameters than the rows.
    """
    if set(deltas) != set(sketch.shapes):
        return None
    if all(delta.right is not None for delta in deltas.values()):
        along = sketch.apply_factors({n: (d.left, d.right) for n, d in deltas.items() if d.right is not None}).cpu()
    else:
        along = sketch.apply({name: deltas[name].matrix().float() for name in sketch.shapes}).cpu()
    few = pefs[list(indices)]
    slopes = few.factors.cpu().float() @ along.float()
    kl = float(0.5 * (few.norms.cpu().float() * slopes.square().sum(1)).mean())
    return math.sqrt(target / kl) if math.isfinite(kl) and kl > FLOOR * target else None


class StepSearch:
    """Searches the step at which the KL is within 5% of a target, by interpolation: KL is about quadratic in the step.

    Try `step`, pass the KL to `tell`, and repeat until it is `done`.

    Args:
        target: the wanted KL.
        start: the first step to try.
        limit: the longest step to try.
        rounds: the most steps to try.

    Attributes:
        step: the step to try next.
        nearest: the step with the KL nearest to the target.
        done: whether the search has ended.
    """

    def __init__(self, target: float, start: float = 0.02, limit: float = 64.0, rounds: int = 16):
        self.step = min(start, limit)
        self.nearest = start
        self.done = False
        self._target, self._limit, self._rounds = target, limit, rounds
        self._miss, self._number = math.inf, 0
        self._low: tuple[float, float] | None = None
        self._high: tuple[float, float] | None = None
        self._last: tuple[float, float] | None = None

    @property
    def reached(self) -> bool:
        """Whether the nearest step is close enough to the target."""
        return self._miss <= 0.1  # within about 10% counts as reached

    def tell(self, value: float) -> None:
        """Record the KL at `step`."""
        target, step = self._target, self.step
        value = max(value, FLOOR) if math.isfinite(value) else 1e6 * target  # far too long a step
        if abs(math.log(value / target)) < self._miss:
            self.nearest, self._miss = step, abs(math.log(value / target))
        late = self._number > self._rounds // 2
        self._number += 1
        # Within 5%: intervals over 16 examples are several times as wide.
        if abs(value - target) <= 0.05 * target or (value < target and step >= self._limit):
            self.done = True
            return
        self.done = self._number >= self._rounds
        if value < target:
            self._low = (step, value)
        else:
            self._high = (step, value)
        low, high = self._low, self._high
        if low is None or high is None:
            # KL grows with the square of a short step, and after that with the power of the last two steps. If this
            # approaches slowly, aiming a tenth beyond brackets the target.
            power = 2.0
            if self._last is not None and self._last[0] != step:
                power = min(max(math.log(value / self._last[1]) / math.log(step / self._last[0]), 0.5), 6.0)
            beyond = 1.0 if self._number <= _DIRECT else 1.1 if high is None else 0.9
            self._last = step, value
            self.step = min(self._limit, step * min(max((target / value) ** (1 / power), 0.1), 10.0) * beyond)
            return
        share = math.log(target / low[1]) / math.log(high[1] / low[1])
        # Interpolated away from the ends, then bisected: KL may jump, and interpolation would stay at one end.
        share = 0.5 if late else min(max(share, 0.05), 0.95)
        self.step = low[0] * (high[0] / low[0]) ** share


def find_scale(
    kl: Callable[[float], float], target: float, start: float = 0.02, limit: float = 64.0, rounds: int = 16
) -> tuple[float, bool]:
    """The step at which `kl` reaches `target`; see `StepSearch`.

    Returns:
        The step and True; or the nearest step and False if the target was not reached.
    """
    search = StepSearch(target, start, limit, rounds)
    while not search.done:
        search.tell(kl(search.step))
    return search.nearest, search.reached
