"""What happens when the parameters move along a direction: KL on a component's examples, on others, and at random.

A component is selectively disrupted when predictions move on its top examples and nowhere else. Both signs are tried,
each at the step whose mean KL on the top examples reaches a target, always beside a random direction of equal norm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.adapters import check_scale
from hf_npeff.component import ACTIVE_SHARE
from hf_npeff.components import Decomposition
from hf_npeff.data import Example, batches_by_length
from hf_npeff.directions import ParameterDirection
from hf_npeff.fisher.distributions import Distribution
from hf_npeff.fisher.passes import FisherPass

logger = logging.getLogger(__name__)
_BOOTSTRAPS = 1000
_FLOOR = torch.finfo(torch.float32).eps
"""A KL below this is rounding."""


@dataclass
class Predictions:
    """What a model predicts for some examples, kept on the CPU.

    Attributes:
        logits: one (t_i, k) tensor an example, its own terms only.
        distribution: of every term.
    """

    logits: list[Tensor]
    distribution: type[Distribution]

    def kl_to(self, other: Predictions) -> Tensor:
        """KL(self ‖ other) of every example, summed over its terms, in nats, float64 (n,)."""
        pairs = zip(self.logits, other.logits, strict=True)
        return torch.stack([self.distribution(a).kl(self.distribution(b)).sum() for a, b in pairs])

    def answers(self) -> list[Tensor]:
        """The likeliest outcome of every term, an example each."""
        return [self.distribution(a).predictions()[0] for a in self.logits]


@torch.no_grad()
def predict(work: FisherPass, examples: Sequence[Example], batch_size: int) -> Predictions:
    """What the model predicts for the examples, in their order."""
    logits: dict[int, Tensor] = {}
    distribution: type[Distribution] | None = None
    size = 1 if work.one_at_a_time else batch_size
    for batch in batches_by_length([e.length for e in examples], size):
        outputs = work.outputs([examples[i] for i in batch])
        distribution = outputs.distribution
        for row, i in enumerate(batch):
            logits[i] = outputs.logits[row, outputs.valid[row]].detach().to("cpu", torch.float32)
    assert distribution is not None
    return Predictions([logits[i] for i in range(len(examples))], distribution)


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
        top_flips: share of the top examples whose likeliest outcome changes.
        other_flips: the same on the others.
        top_accuracy: before and after, where labels exist, else None.
        other_accuracy: the same on the others.
    """

    scale: float
    top: float
    others: float
    ratio: float
    interval: tuple[float, float]
    top_quantiles: tuple[float, float, float]
    other_quantiles: tuple[float, float, float]
    top_flips: float
    other_flips: float
    top_accuracy: tuple[float, float] | None = None
    other_accuracy: tuple[float, float] | None = None


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
    quiet = [i for i in range(len(w)) if float(share[i]) <= ACTIVE_SHARE and i not in set(top)]
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


def evaluate(
    work: FisherPass,
    direction: ParameterDirection,
    examples: Sequence[Example],
    top: Sequence[int],
    others: Sequence[int],
    *,
    component: int,
    target_kl: float,
    scale: float | None,
    batch_size: int,
    seed: int,
    labels: Sequence[int] | None,
    describe: Callable[[Tensor], list[str]],
    texts: Sequence[str | None],
) -> PerturbationReport:
    """Measure a direction.

    Args:
        work: the pass over the model.
        direction: unit norm.
        examples: all analysed ones.
        top: indices of the component's top examples.
        others: indices of the others.
        component: its number, for the report.
        target_kl: mean KL on the top examples that each sign's step is to reach.
        scale: a given step instead.
        batch_size: examples of a forward pass.
        seed: of the random direction and the bootstrap.
        labels: class of every example, or None.
        describe: predictions → text.
        texts: of every example.

    Raises:
        ValueError: if the target or the scale is out of range.
    """
    if not 0 < target_kl < float("inf"):
        raise ValueError(f"target_kl must be a positive number, but it is {target_kl!r}")
    top_set, other_set = [examples[i] for i in top], [examples[i] for i in others]
    before_top = predict(work, top_set, batch_size)
    before_others = predict(work, other_set, batch_size)

    tried: dict[float, Predictions] = {}

    def kl_on_top(step: float) -> float:
        with direction.applied_to(work.model, step):
            tried[step] = predict(work, top_set, batch_size)
        return float(before_top.kl_to(tried[step]).mean())

    def effect(along: ParameterDirection, step: float) -> tuple[Effect, Predictions, Predictions]:
        known = tried.get(step) if along is direction else None
        with along.applied_to(work.model, step):
            after_top = known or predict(work, top_set, batch_size)
            after_others = predict(work, other_set, batch_size)
        found = _effect(step, before_top, after_top, before_others, after_others, top, others, labels, seed)
        return found, after_top, after_others

    if scale is not None:
        found = {check_scale(scale): True}
    else:
        limit = _norm_of(work.model, direction)
        ahead, reached = find_scale(kl_on_top, target_kl, min(0.02, limit), limit)
        back, reached_back = find_scale(lambda s: kl_on_top(-s), target_kl, ahead, limit)
        found = {ahead: reached, -back: reached_back}
    measured = [effect(direction, step) for step in found]
    measured.sort(key=lambda m: (not found[m[0].scale], -m[0].ratio))
    best, after_top, after_others = measured[0]
    random = effect(direction.random_like(seed), abs(best.scale))[0]
    changed = []
    for indices, before, after, is_top in (
        (top, before_top, after_top, True),
        (others, before_others, after_others, False),
    ):
        for i, a, b in zip(indices, before.answers(), after.answers(), strict=True):
            if not torch.equal(a, b):
                words = [
                    describe(x if len(x) > 1 else x[:1])[0] if len(x) == 1 else "".join(describe(x)) for x in (a, b)
                ]
                row = {"index": i, "id": examples[i].id, "text": texts[i], "top": is_top}
                changed.append({**row, "before": words[0], "after": words[1]})
    return PerturbationReport(
        component,
        None if scale is not None else target_kl,
        best,
        measured[1][0] if len(measured) > 1 else None,
        random,
        list(top),
        list(others),
        changed,
        found[best.scale],
    )


def _norm_of(model: torch.nn.Module, direction: ParameterDirection) -> float:
    """‖θ‖ of the parameters that a direction moves: no step is longer than they are."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = (parameters[name].detach() for name in direction if name in parameters)
    squared = sum(float(torch.linalg.vector_norm(p.float(), dtype=torch.float64)) ** 2 for p in known)
    return squared**0.5 or 1.0


def find_scale(
    kl: Callable[[float], float], target: float, start: float = 0.02, limit: float = 64.0, rounds: int = 16
) -> tuple[float, bool]:
    """The step at which `kl` reaches `target` within 5%, by interpolation: it grows about as the square.

    Args:
        kl: mean KL at a step.
        target: what it is to be.
        start: the first step to try.
        limit: the longest step to try.
        rounds: steps to try.

    Returns:
        The step and True; the nearest step found and False where the target is out of reach.
    """
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    nearest, miss = start, math.inf
    step = min(start, limit)
    for number in range(rounds):
        value = kl(step)
        value = max(value, _FLOOR) if math.isfinite(value) else 1e6 * target
        if abs(math.log(value / target)) < miss:
            nearest, miss = step, abs(math.log(value / target))
        if abs(value - target) <= 0.05 * target or (value < target and step >= limit):
            break
        low, high = ((step, value), high) if value < target else (low, (step, value))
        if low is None or high is None:
            step = min(limit, step * min(max((target / value) ** 0.5, 0.1), 10.0) * (1.1 if high is None else 0.9))
            continue
        share = math.log(target / low[1]) / math.log(high[1] / low[1])
        share = 0.5 if number > rounds // 2 else min(max(share, 0.05), 0.95)
        step = low[0] * (high[0] / low[0]) ** share
    return nearest, miss <= 0.1


def _effect(
    step: float,
    before_top: Predictions,
    after_top: Predictions,
    before_others: Predictions,
    after_others: Predictions,
    top: Sequence[int],
    others: Sequence[int],
    labels: Sequence[int] | None,
    seed: int,
) -> Effect:
    a, b = before_top.kl_to(after_top), before_others.kl_to(after_others)
    generator = torch.Generator().manual_seed(seed)
    draws_a = a[torch.randint(len(a), (_BOOTSTRAPS, len(a)), generator=generator)].mean(1)
    draws_b = b[torch.randint(len(b), (_BOOTSTRAPS, len(b)), generator=generator)].mean(1)
    low, high = torch.quantile(
        (draws_a + _FLOOR) / (draws_b + _FLOOR), torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def quantiles(values: Tensor) -> tuple[float, float, float]:
        x, y, z = torch.quantile(values, points).tolist()
        return x, y, z

    def flips(x: Predictions, y: Predictions) -> float:
        changed = [not torch.equal(p, q) for p, q in zip(x.answers(), y.answers(), strict=True)]
        return sum(changed) / len(changed)

    def accuracy(x: Predictions, y: Predictions, indices: Sequence[int]) -> tuple[float, float] | None:
        if labels is None:
            return None
        right = [[int(p[0]) == labels[i] for p, i in zip(z.answers(), indices, strict=True)] for z in (x, y)]
        return sum(right[0]) / len(indices), sum(right[1]) / len(indices)

    return Effect(
        step,
        float(a.mean()),
        float(b.mean()),
        float((a.mean() + _FLOOR) / (b.mean() + _FLOOR)),
        (float(low), float(high)),
        quantiles(a),
        quantiles(b),
        flips(before_top, after_top),
        flips(before_others, after_others),
        accuracy(before_top, after_top, top),
        accuracy(before_others, after_others, others),
    )
