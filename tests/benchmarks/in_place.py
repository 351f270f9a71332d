"""Measuring a component with moved weights, a step at a time, as this library did before: what benchmarks compare with.

Its directions were lifted whole, four at a time, with a backward pass each (`analyzer.lift_each` still does). The step
of one sign was searched for from .02 on, that of the other from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_npeff import ParameterDirection
from hf_npeff.data import Example
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.predictions import Predictions, predict

_FIRST, _ROUNDS = 0.02, 16
"""The first step that was tried, and how many there were at most."""


@dataclass(frozen=True)
class Watching:
    """The top examples and others of a component, and what is predicted for them before anything moves."""

    forward: ForwardPass
    groups: tuple[Sequence[Example], Sequence[Example]]
    before: tuple[Predictions, Predictions]
    batch_size: int

    @classmethod
    def of(cls, forward: ForwardPass, top: Sequence[Example], others: Sequence[Example], batch_size: int) -> Watching:
        """With the model as it is."""
        return cls(forward, (top, others), (predict(forward, top, batch_size), predict(forward, others, batch_size)),
                   batch_size)  # fmt: skip

    def kl(self, direction: ParameterDirection, step: float, which: int) -> float:
        """The mean KL on the top examples (0) or others (1) after a step."""
        with direction.applied_to(self.forward.model, step):
            after = predict(self.forward, self.groups[which], self.batch_size)
        return float(self.before[which].kl_to(after).mean())


def measured(
    watching: Watching, direction: ParameterDirection, target: float = 0.5
) -> dict[float, tuple[float, float]]:
    """{step of each sign: mean KL on top examples and on others}; a random direction is measured too."""
    limit = direction.norm_in(watching.forward.model)
    ahead = _found(lambda s: watching.kl(direction, s, 0), target, min(_FIRST, limit), limit)
    back = _found(lambda s: watching.kl(direction, -s, 0), target, ahead, limit)
    known = {ahead: target, -back: target}  # what the search has just seen there
    effects = {step: (kl, watching.kl(direction, step, 1)) for step, kl in known.items()}
    random = direction.random_like(0)
    for which in (0, 1):
        watching.kl(random, ahead, which)
    return effects


def _found(kl: Callable[[float], float], target: float, start: float, limit: float) -> float:
    """The step at which `kl` reaches a target within 5%, by interpolation."""
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    nearest, miss = start, math.inf
    step = min(start, limit)
    for number in range(_ROUNDS):
        value = kl(step)
        value = max(value, 1e-7) if math.isfinite(value) else 1e6 * target
        if abs(math.log(value / target)) < miss:
            nearest, miss = step, abs(math.log(value / target))
        if abs(value - target) <= 0.05 * target or (value < target and step >= limit):
            break
        low, high = ((step, value), high) if value < target else (low, (step, value))
        if low is None or high is None:
            step = min(limit, step * min(max((target / value) ** 0.5, 0.1), 10.0) * (1.1 if high is None else 0.9))
            continue
        share = math.log(target / low[1]) / math.log(high[1] / low[1])
        share = 0.5 if number > _ROUNDS // 2 else min(max(share, 0.05), 0.95)
        step = low[0] * (high[0] / low[0]) ** share
    return nearest
