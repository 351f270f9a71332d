"""The effects of a weight change on any data: KL, answers, accuracy, by group and step size, beside a random change.

This needs neither a decomposition nor analysed data. Every step is one forward pass over the data. A change of linear
maps is added in the activations; otherwise the weights are changed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_npeff.config import MeasureRequest, Quantisation
from hf_npeff.data import Example
from hf_npeff.fisher.distributions import HALF_SQUARED
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.linear_maps import LinearMap
from hf_npeff.fisher.outputs import Outputs
from hf_npeff.fisher.predictions import Predictions, predict
from hf_npeff.fisher.unchanged_blocks import UnchangedBlocks
from hf_npeff.progress import working
from hf_npeff.weights.activations import ChangedActivations, LinearDelta, changed_in_activations, random_like
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.beside_modules import acts_otherwise
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.layouts import LINEAR_LAYOUTS
from hf_npeff.weights.lora import low_rank
from hf_npeff.weights.requantised import kept_of, maps_to_round, weights_rounded
from hf_npeff.weights.scoring import Score, interval, score

if TYPE_CHECKING:
    import plotly.graph_objects as go

logger = logging.getLogger(__name__)
Change: TypeAlias = ParameterDirection | Adapter
ALL = "all"
"""The group of all examples."""
_QUANTILES = (0.1, 0.5, 0.9, 0.99)
"""The quantiles of the KL over a group's examples."""
_MOST_GROUPS = 100
"""More groups than this are refused: a column of texts or numbers was probably named by mistake."""
_MOST_OUTCOMES = 20
"""For how many outcomes the share of the predictions is kept; a vocabulary has tens of thousands."""


@dataclass(frozen=True)
class GroupEffect:
    """The effect of a step on a group of examples; KL is KL(before ‖ after), in nats, summed over an example's terms.

    Attributes:
        n: the number of examples.
        kl: mean KL.
        kl_interval: 95% bootstrap interval of the mean KL, over examples.
        quantiles: {"10%", "50%", "90%", "99%": KL}, and "100%", the largest.
        flips: share of the examples with an answer that changes.
        flips_interval: 95% bootstrap interval of this share.
        labelled: the number of examples with a label; the next five fields use only these.
        accuracy: share of right answers before and after; None without class labels. An example with several labels or
            terms counts by the share of them that is right (in `evaluate_direction` all labels have to be right at
            once, and tokens count one by one).
        gain_interval: 95% bootstrap interval of accuracy after − before.
        loss: mean −log p(label) before and after, in nats for each term; None without class labels.
        log_odds: mean log p(label)/(1 − p(label)) before and after, in nats for each term. It shows a shift of a group
            even if no answer changes. None without class labels.
        error: root mean squared error before and after, for a regression; otherwise None.
        predicted: {outcome: its share of all answers before and after}, for the most frequent outcomes.
        worst: the examples with the largest KL: index, id, text, kl, before, after.
    """

    n: int
    kl: float
    kl_interval: tuple[float, float]
    quantiles: dict[str, float]
    flips: float
    flips_interval: tuple[float, float]
    labelled: int = 0
    accuracy: tuple[float, float] | None = None
    gain_interval: tuple[float, float] | None = None
    loss: tuple[float, float] | None = None
    log_odds: tuple[float, float] | None = None
    error: tuple[float, float] | None = None
    predicted: dict[str, tuple[float, float]] = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        numbers = not self.predicted  # which all move
        parts = [f"{HALF_SQUARED if numbers else 'KL'} {self.kl:.3g} on {self.n} examples"]
        if not numbers:
            parts.append(f"answers changed {self.flips:.0%}")
        if self.accuracy is not None:
            parts.append("accuracy {:.3f} → {:.3f}".format(*self.accuracy))
        if self.error is not None:
            parts.append("error {:.3g} → {:.3g}".format(*self.error))
        return f"GroupEffect({', '.join(parts)})"


@dataclass(frozen=True)
class Step:
    """The measurement of one step.

    Attributes:
        scale: the step's size and sign.
        rank: the rank to which every weight's change was truncated, or None for the change as it is.
        random: whether it was a random change of equal norm instead.
        groups: {group: effect}; "all" has all examples.
        quantised: the format to which the base model was rounded; effects are relative to the rounded model. None for
            the model as it is.
        merged: whether the change was merged into the base model before rounding; otherwise it was added beside it.
        kept: the share of the change of the predictions that is left after rounding (see `requantised.kept_of`).
    """

    scale: float
    rank: int | None
    random: bool
    groups: dict[str, GroupEffect]
    quantised: Quantisation | None = None
    merged: bool = False
    kept: float | None = None

    def __repr__(self) -> str:
        what = "random change" if self.random else f"rank {self.rank}" if self.rank is not None else "whole change"
        if self.quantised is not None:
            what += f" {'merged into' if self.merged else 'beside'} {self.quantised}"
        return f"Step({what} at scale {self.scale:.3g}: {self.groups[ALL]}, {len(self.groups)} groups)"


@dataclass(frozen=True)
class Measurement:
    """The effects of a weight change on a data set.

    Attributes:
        change: the measured change, in words.
        by: the column that makes the groups, or None.
        n: the number of examples.
        steps: every scale at every rank; then random changes of equal norm, at the first rank; then, also at the first
            rank, the change for every number format of `quantise`, beside the base model and merged into it.

    Example:
        >>> measured = analyzer.measure(direction, dataset, scales=(0.2, 0.4), ranks=(None, 2))
        >>> [(step.scale, step.rank, step.random) for step in measured.steps][:3]
        [(0.2, None, False), (0.4, None, False), (0.2, 2, False)]
        >>> measured.at(0.4)["all"].kl > measured.at(0.4, random=True)["all"].kl
        True
        >>> sorted(measured.to_dict())
        ['by', 'change', 'n', 'steps']
        >>> figure = measured.plot()
    """

    change: str
    by: str | None
    n: int
    steps: list[Step]

    def at(self, scale: float = 1.0, rank: int | None = None, *, random: bool = False) -> dict[str, GroupEffect]:
        """{group: effect} of one step on the model as it is.

        Raises:
            KeyError: if the step was not measured.
        """
        for step in self.steps:
            if (step.scale, step.rank, step.random, step.quantised) == (scale, rank, random, None):
                return step.groups
        known = [(s.scale, s.rank, s.random) for s in self.steps if s.quantised is None]
        raise KeyError(f"(scale, rank, random) = {(scale, rank, random)} was not measured; these were: {known}")

    def on_grid(self, scheme: Quantisation, *, merged: bool, scale: float = 1.0) -> Step:
        """One step on a base model that was rounded to a number format.

        Args:
            scheme: one of `quantise`.
            merged: whether the change was merged before rounding, or added beside the rounded model.
            scale: the scale of the step.

        Raises:
            KeyError: if the step was not measured.
        """
        for step in self.steps:
            if (step.quantised, step.merged, step.scale) == (scheme, merged, scale):
                return step
        known = [(s.quantised, s.merged, s.scale) for s in self.steps if s.quantised is not None]
        raise KeyError(f"(scheme, merged, scale) = {(scheme, merged, scale)} was not measured; these were: {known}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def plot(self, rank: int | None = None) -> go.Figure:
        """KL by step size, a line for each group, dashed for a random change; see `report.plots.doses`."""
        from hf_npeff.report.plots import doses

        return doses(self, rank)

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_measurement

        return of_measurement(self)

    def __repr__(self) -> str:
        step = next(s for s in self.steps if not s.random)
        effect = step.groups[ALL]
        numbers = not effect.predicted  # which all move
        parts = [
            f"{HALF_SQUARED} {effect.kl:.3g}" if numbers else f"KL {effect.kl:.3g}, answers changed {effect.flips:.0%}"
        ]
        if effect.accuracy is not None:
            parts.append("accuracy {:.3f} → {:.3f}".format(*effect.accuracy))
        if effect.error is not None:
            parts.append("error {:.3g} → {:.3g}".format(*effect.error))
        left = {s.quantised: s.kept for s in reversed(self.steps) if s.merged and s.kept is not None}
        parts += [f"merged into {scheme} {kept:.0%} is kept" for scheme, kept in reversed(left.items())]
        more = f", {len(self.steps)} steps" if len(self.steps) > 1 else ""
        return f"Measurement({', '.join(parts)} at scale {step.scale:.3g}, {self.n} examples{more})"


def check_groups(examples: Sequence[Example], by: str | None) -> dict[str, list[int]]:
    """{group: its examples}, in the order of their values; all of them first.

    Raises:
        ValueError: if there is no such column, or it has too many values.
    """
    groups: dict[str, list[int]] = {ALL: list(range(len(examples)))}
    if by is None:
        return groups
    if by not in examples[0].columns:
        raise ValueError(f"by={by!r} is not a column of the data, which has {sorted(examples[0].columns)}")
    values = [None if (v := example.columns.get(by)) != v else v for example in examples]  # NaN is no value
    if (count := len(set(values))) > _MOST_GROUPS:
        raise ValueError(f"the column {by!r} has {count} values; by= needs a column with at most {_MOST_GROUPS}")
    for value in sorted(set(values), key=lambda v: (str(type(v)), v if v is not None else 0)):
        groups[f"{by}={value}"] = [i for i, each in enumerate(values) if each == value and type(each) is type(value)]
    return groups


def cut(deltas: Mapping[str, LinearDelta], rank: int | None) -> dict[str, LinearDelta]:
    """The best approximation of every weight's change at a rank; a change of that rank or less is returned as it is."""
    if rank is None:
        return dict(deltas)
    shorter = {}
    for name, delta in deltas.items():
        if delta.experts > 1:  # each expert's change has the rank, as in an adapter
            parts = [B @ A for B, A, _ in (low_rank(part, rank) for part in delta.matrix().chunk(delta.experts))]
            shorter[name] = LinearDelta(torch.cat(parts), experts=delta.experts)
            continue
        known = min(delta.shape) if delta.right is None else delta.right.shape[0]
        shorter[name] = delta if known <= rank else LinearDelta(*low_rank(delta.matrix(), rank)[:2])
    return shorter


def applied(model: nn.Module, what: Change | Mapping[str, LinearDelta], scale: float) -> AbstractContextManager[Any]:
    """The changed model inside `with`: in the activations if possible, otherwise with changed weights."""
    if isinstance(what, Adapter):
        return what.applied_in_activations(model, scale)
    if isinstance(what, ParameterDirection):
        return what.applied_to(model, scale)
    return changed_in_activations(model, what, scale)


def is_linear(change: Change) -> bool:
    """Whether a change concerns only weights of linear maps."""
    return all(layout in LINEAR_LAYOUTS for layout in change.layouts.values())


def measure(
    forward: ForwardPass,
    change: Change,
    examples: Sequence[Example],
    truth: Sequence[Any],
    request: MeasureRequest,
) -> Measurement:
    """Measure a change.

    Args:
        forward: the forward pass.
        change: a direction, or an adapter of linear maps.
        examples: examples of any data.
        truth: the label of each, in the form of `Predictions.answers`, or None.
        request: the settings.

    Raises:
        UnsupportedModelError: if an adapter, or a direction that is truncated or rounded, changes anything other than
            linear maps; or if weights that should be rounded are already quantised.
        ValueError: if there is no column `by`, the model lacks a parameter or has one of another shape, or a number
            format does not fit a weight.
    """
    groups = check_groups(examples, request.by)
    whole: Any = change
    cutting = any(rank is not None for rank in request.ranks)
    if is_linear(change) or isinstance(change, Adapter) or cutting or request.quantise:
        whole = change.linear_deltas()
    whole_change = not (cutting or request.quantise) and whole is not change
    if (
        isinstance(change, ParameterDirection)
        and whole_change
        and acts_otherwise(forward, change, whole, examples[0], request.steps[0])
    ):
        logger.warning(
            "the model uses some of the changed weights otherwise than by calling their layers, so the change is "
            "measured in the weights themselves; an adapter around the layers would be another change"
        )
        whole = change
    maps = maps_to_round(forward.model, list(whole), request.quantise) if request.quantise else []
    variants = {rank: whole if rank is None else cut(whole, rank) for rank in request.ranks}
    sizes = list(dict.fromkeys(abs(scale) for scale in request.steps)) if request.random else []
    passes = 1 + len(variants) * len(request.steps) + len(sizes)
    if request.quantise:  # as it is, then for every number format beside the base model and merged into it
        passes += len(request.steps) + len(request.quantise) * (1 + 2 * len(request.steps))
    outputs_of = None
    if not isinstance(whole, ParameterDirection):
        outputs_of = UnchangedBlocks(forward, ChangedActivations(forward.model, [whole]).modules).outputs
    with working("measuring the change", passes * len(examples)):
        before = predict(forward, examples, request.batch_size, outputs_of=outputs_of)
        watching = _Watching(forward, examples, truth, groups, before, request, outputs_of)
        steps = [
            Step(scale, rank, False, watching.effects(what, scale))
            for rank, what in variants.items()
            for scale in request.steps
        ]
        if sizes:
            first = request.ranks[0]
            other: Any = variants[first]
            other = random_like(other, request.seed) if isinstance(other, dict) else other.random_like(request.seed)
            steps += [Step(size, first, True, watching.effects(other, size)) for size in sizes]
        if request.quantise:
            steps += watching.on_grids(maps, variants[request.ranks[0]], request.ranks[0])
    return Measurement(repr(change), request.by, len(examples), steps)


class _Watching:
    """The examples and the model's own predictions, for comparison."""

    def __init__(
        self,
        forward: ForwardPass,
        examples: Sequence[Example],
        truth: Sequence[Any],
        groups: Mapping[str, list[int]],
        before: Predictions,
        request: MeasureRequest,
        outputs_of: Callable[[Sequence[Example]], Outputs] | None = None,
    ):
        self.forward, self.examples, self.truth, self.groups = forward, examples, truth, groups
        self.before, self.request, self._outputs_of = before, request, outputs_of
        self.answered = self._answers_of(before)
        self.scores = [score(before, i, label) for i, label in enumerate(truth)]

    def _answers_of(self, predictions: Predictions) -> list[list[str]]:
        """The answer to every term of every example, in words."""
        assert self.forward.describe is not None
        return [self.forward.describe(answer) for answer in predictions.answers()]

    def on_grids(self, maps: Sequence[LinearMap], deltas: Mapping[str, LinearDelta], rank: int | None) -> list[Step]:
        """The change on a rounded base model: beside it, and merged into it before rounding."""
        steps = []
        whole = {scale: self._predicted(deltas, scale) for scale in self.request.steps}
        model, around = self.forward.model, (self.forward, self.examples, self.truth, self.groups)
        for scheme in self.request.quantise:
            with weights_rounded(model, maps, scheme):
                before = predict(self.forward, self.examples, self.request.batch_size)
                beside = {scale: self._predicted(deltas, scale, rounded=True) for scale in self.request.steps}
            watching = _Watching(*around, before, self.request)
            for scale in self.request.steps:
                with weights_rounded(model, maps, scheme, deltas, scale):
                    merged = predict(self.forward, self.examples, self.request.batch_size)
                for is_merged, after in ((False, beside[scale]), (True, merged)):
                    kept = kept_of((self.before, whole[scale]), (before, after))
                    groups = watching.compared(after)
                    steps.append(Step(scale, rank, False, groups, quantised=scheme, merged=is_merged, kept=kept))
        return steps

    def _predicted(self, what: Any, scale: float, *, rounded: bool = False) -> Predictions:
        """The predictions after a step; a rounded model changes in all blocks, also in those below the change."""
        outputs_of = None if rounded else self._outputs_of
        with applied(self.forward.model, what, scale):
            return predict(self.forward, self.examples, self.request.batch_size, outputs_of=outputs_of)

    def effects(self, what: Any, scale: float) -> dict[str, GroupEffect]:
        """The effect of a step on every group."""
        return self.compared(self._predicted(what, scale))

    def compared(self, after: Predictions) -> dict[str, GroupEffect]:
        """The effect on every group, from the predictions after a step."""
        kl, answered = self.before.kl_to(after), self._answers_of(after)
        pairs = zip(self.before.answers(), after.answers(), strict=True)
        flipped = torch.tensor([not torch.equal(a, b) for a, b in pairs], dtype=torch.float64)
        scores = [score(after, i, label) for i, label in enumerate(self.truth)]
        return {
            name: self._effect(indices, kl[indices], flipped[indices], answered, scores)
            for name, indices in self.groups.items()
        }

    def _effect(
        self, indices: list[int], kl: Tensor, flipped: Tensor, answered: list[list[str]], scores: list[Score | None]
    ) -> GroupEffect:
        seed = self.request.seed
        labelled = [i for i in indices if self.scores[i] is not None]
        pairs = [(self.scores[i], scores[i]) for i in labelled]
        quantiles = torch.quantile(kl, torch.tensor([*_QUANTILES, 1.0], dtype=torch.float64)).tolist()
        names = [f"{share:.0%}" for share in (*_QUANTILES, 1.0)]
        outcomes: dict[str, Any] = {}
        if pairs and all(a.right is not None for a, _ in pairs):  # type: ignore[union-attr]
            right = torch.tensor([[a.right, b.right] for a, b in pairs], dtype=torch.float64)  # type: ignore[union-attr]
            outcomes["accuracy"] = tuple(right.mean(0).tolist())
            outcomes["gain_interval"] = interval(right[:, 1] - right[:, 0], seed)
            loss = torch.tensor([[a.loss, b.loss] for a, b in pairs], dtype=torch.float64)  # type: ignore[union-attr]
            outcomes["loss"] = tuple(loss.mean(0).tolist())
            odds = torch.tensor([[a.log_odds, b.log_odds] for a, b in pairs], dtype=torch.float64)  # type: ignore[union-attr]
            outcomes["log_odds"] = tuple(odds.mean(0).tolist())
        elif pairs:
            squared = torch.tensor([[a.squared, b.squared] for a, b in pairs], dtype=torch.float64)  # type: ignore[union-attr]
            outcomes["error"] = tuple(squared.mean(0).sqrt().tolist())
        return GroupEffect(
            len(indices),
            float(kl.mean()),
            interval(kl, seed),
            dict(zip(names, quantiles, strict=True)),
            float(flipped.mean()),
            interval(flipped, seed),
            len(labelled),
            predicted=self._shares(indices, answered),
            worst=self._worst(indices, kl, answered),
            **outcomes,
        )

    def _shares(self, indices: list[int], answered: list[list[str]]) -> dict[str, tuple[float, float]]:
        if self.before.distribution.name == "gaussian":
            return {}
        counts = [Counter(word for i in indices for word in words[i]) for words in (self.answered, answered)]
        totals = [sum(count.values()) or 1 for count in counts]
        shares = {w: (counts[0][w] / totals[0], counts[1][w] / totals[1]) for w in counts[0] | counts[1]}
        return dict(sorted(shares.items(), key=lambda item: -max(item[1]))[:_MOST_OUTCOMES])

    def _worst(self, indices: list[int], kl: Tensor, answered: list[list[str]]) -> list[dict[str, Any]]:
        order = torch.argsort(kl, descending=True)[: self.request.worst].tolist()
        joined = self.forward.traits.between_terms.join
        return [
            {
                "index": (i := indices[place]),
                "id": self.examples[i].id,
                "text": text_of(self.examples[i]),
                "kl": float(kl[place]),
                "before": joined(self.answered[i]),
                "after": joined(answered[i]),
            }
            for place in order
        ]


def text_of(example: Example) -> str | None:
    """The text that is shown for an example: the text that was read, otherwise its longest text column, or None."""
    if example.text is not None:
        return example.text
    texts = [value for value in example.columns.values() if isinstance(value, str)]
    return max(texts, key=len, default=None)
