"""Makes a `ChangeReport` from predictions, rows and coefficients before and after a change, without running a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import AssociationRequest, ChangeRequest
from hf_npeff.data import Example
from hf_npeff.decomposition.associations import associate
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.objective import overlaps
from hf_npeff.encoding.columns import described_by
from hf_npeff.fisher.predictions import Predictions
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights import change_effects as effects
from hf_npeff.weights.change_report import ChangeReport, ChangeStep, ComponentChange
from hf_npeff.weights.change_sums import outside
from hf_npeff.weights.changed_groups import changed_groups, most_certain
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.displacement import displacement
from hf_npeff.weights.scoring import interval, score

_MODULES = 20
"""How many parameters are listed with their share of the change. Chosen: as many as a person reads."""
_TOP = 5
"""How many examples of a component are shown. Chosen: few enough to read at a glance."""
_STATIONARY = 0.8
"""The least cosine of a component with the combination of rows that represents it, as in `lifting`."""
_BENT = 2.0
"""If the ratio of the measured KL to the second-order KL, or its inverse, is above this, a note says so."""
_NOTED = 0.1
"""If more than this share of the norm is outside the analysis, a note says so."""


@dataclass(frozen=True)
class Watched:
    """The examples, their predictions before the change, and their labels.

    Attributes:
        examples: the n examples.
        truth: the label of each, in the form of `Predictions.answers`, or None.
        groups: {group: its examples}, including "all".
        before: predictions of the model before the change.
        in_words: an example's answer, as `Predictions.answers` has it → the answer in words.
        seed: the seed of the bootstrap.
    """

    examples: list[Example]
    truth: list[Any]
    groups: dict[str, list[int]]
    before: Predictions
    in_words: Callable[[Tensor], str]
    seed: int

    def step(self, scale: float, without: int | None, after: Predictions | None) -> ChangeStep:
        """A point of the curve; the model before the change if there are no later predictions."""
        now = self.before if after is None else after
        kl = self.before.kl_to(now)
        flips = self.flips(now)
        scores = [score(now, i, label) for i, label in enumerate(self.truth)]
        known = {name: [s for i in members if (s := scores[i]) is not None] for name, members in self.groups.items()}
        known = {name: kept for name, kept in known.items() if kept}
        is_regression = self.before.distribution.name == "gaussian"
        return ChangeStep(
            scale,
            without,
            float(kl.mean()),
            interval(kl, self.seed),
            None if is_regression else float(flips.double().mean()),
            {} if is_regression else {name: _mean([s.right for s in kept]) for name, kept in known.items()},
            {name: _mean([s.squared for s in kept]) for name, kept in known.items()} if is_regression else {},
            {name: len(kept) for name, kept in known.items()},
        )

    def flips(self, after: Predictions) -> Tensor:
        """(n,) whether an example has an answer that changes."""
        pairs = zip(self.before.answers(), after.answers(), strict=True)
        return torch.tensor([not torch.equal(a, b) for a, b in pairs])


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


@dataclass(frozen=True)
class Seen:
    """The results of running the model.

    Attributes:
        after: {scale: predictions}, including scale 1.
        products: inner products (n, c, m) of unscaled rows with the change, a random one of equal norm, the shuffled
            change, and random ones with its norm in every weight; None if the change itself is not available.
        norm: the norm of each of these changes over the analysed weights.
        analysed: names of the analysed parameters.
    """

    after: dict[float, Predictions]
    products: Tensor | None
    norm: float
    analysed: list[str]


@dataclass(frozen=True)
class Grown:
    """Coefficients of the same examples before and after the change.

    Attributes:
        before: W (n, r) before the change.
        after: W (n, r) after the change, for the same components.
        before_expanded: (n, r + m) before the change, with m added components; None if none were added.
        after_expanded: (n, r + m) after the change.
    """

    before: Tensor
    after: Tensor
    before_expanded: Tensor | None
    after_expanded: Tensor | None


def shuffled(matrices: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The matrices with the entries of each in a random order, which keeps norms but not directions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)
        for name, value in matrices.items()
    }


def explained_change(
    decomposition: Decomposition,
    pefs: PEFs,
    change: ParameterDirection | None,
    watched: Watched,
    seen: Seen,
    grown: Grown | None,
    request: ChangeRequest,
    origin: Mapping[str, Any] | None = None,
) -> Explanation:
    """The analysis of a change, without the steps in which components are taken out of it.

    Args:
        decomposition: the decomposition of `pefs`.
        pefs: the PEFs of the model before the change.
        change: the change; None if it is not available, as between two points of a training run.
        watched: the examples, before the change.
        seen: the results of running the model.
        grown: coefficients before and after the change.
        request: the settings.
        origin: the source of the change, if the change itself is not available.
    """
    explanation = Explanation(decomposition, change, watched, seen, grown, request, origin=dict(origin or {}))
    explanation.measure(pefs)
    return explanation


@dataclass
class Explanation:
    """The analysis from which a report is made."""

    decomposition: Decomposition
    change: ParameterDirection | None
    watched: Watched
    seen: Seen
    grown: Grown | None
    request: ChangeRequest
    kl: Tensor = field(default_factory=lambda: torch.zeros(0))
    components: list[ComponentChange] = field(default_factory=list)
    without: list[ChangeStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    def measure(self, pefs: PEFs) -> None:
        """KL, cosines and growth of every component."""
        self.kl = self.watched.before.kl_to(self.seen.after[1.0])
        W = self.decomposition.coefficients
        counts = effects.bootstrap_counts(len(W), self.request.seed)
        means, intervals = effects.weighted_means(W, self.kl).tolist(), effects.kl_intervals(W, self.kl, counts)
        null = effects.random_kl(pefs, self.request.draws, self.request.seed)
        p, over_random = effects.kl_p_values(W, self.kl, null)
        cosines = self._cosines(pefs)
        grown, before, after = self._growth(counts)
        labels = self._labels_of(W)
        self.components = [
            ComponentChange(
                j,
                self.decomposition[j].label,
                labels[j],
                means[j],
                intervals[j],
                over_random[j],
                p[j],
                *cosines[j],
                None if before is None else before[j],
                None if after is None else after[j],
                grown[j][0] if grown else None,
                grown[j][1] if grown else None,
                self._top(W[:, j]),
            )
            for j in range(len(W.T))
        ]
        order = effects.one_after_another(W, self.kl)
        self.components = [dataclasses.replace(self.components[j], kl_left=left) for j, left in order]
        self.components += self._new(counts)
        self._note_size()

    def _cosines(self, pefs: PEFs) -> list[tuple[Any, Any, Any, Any]]:
        """|cosine| of every component with the change, a random and a shuffled one, and the p-value of the first."""
        if self.seen.products is None:
            return [(None, None, None, None)] * len(self.decomposition)
        ours, random, mixed, *null = effects.cosines(self.decomposition, pefs, self.seen.products, self.seen.norm)
        if far := [j for j, cosine in enumerate(ours.stationary) if cosine < _STATIONARY]:
            self.notes.append(
                f"The components {far} are not at a stationary point, so their cosines are those of other directions; "
                "decompose with larger max_iterations."
            )
        rows = []
        for j, value in enumerate(ours.values):
            p = effects.cosine_p(value, [each.values[j] for each in null])
            rows.append((abs(value), abs(random.values[j]), abs(mixed.values[j]), p))
        return rows

    def _growth(self, counts: Tensor) -> tuple[list[tuple[Any, Any]], list[float] | None, list[float] | None]:
        if self.grown is None:
            return [], None, None
        kinds, intervals = effects.growth(self.grown.before, self.grown.after, counts)
        means = [W.double().mean(0).tolist() for W in (self.grown.before, self.grown.after)]
        return list(zip(kinds, intervals, strict=True)), means[0], means[1]

    def _new(self, counts: Tensor) -> list[ComponentChange]:
        """The components that were added for what the others do not explain after the change."""
        if self.grown is None or self.grown.before_expanded is None or self.grown.after_expanded is None:
            return []
        r = len(self.decomposition)
        before, after = self.grown.before_expanded[:, r:], self.grown.after_expanded[:, r:]
        kinds, intervals = effects.growth(before, after, counts)
        labels = self._labels_of(after)
        return [
            ComponentChange(
                r + k,
                f"added component {r + k}",
                labels[k],
                before=float(before[:, k].double().mean()),
                after=float(after[:, k].double().mean()),
                growth=kinds[k],
                growth_interval=intervals[k],
                top=self._top(after[:, k]),
                new=True,
            )
            for k in range(before.shape[1])
        ]

    def _labels_of(self, W: Tensor) -> list[str | None]:
        """Automatic labels of components with the coefficients W (n, r), if columns or texts were kept."""
        about = self.decomposition.columns, self.decomposition.info
        if not described_by(self.decomposition.columns):
            return [None] * W.shape[1]
        texts = self.decomposition.texts is not None
        return [each.label for each in associate(W, *about, AssociationRequest(), texts=texts)]

    def _top(self, coefficients: Tensor) -> list[str]:
        shown = self.decomposition.texts or self.decomposition.example_ids
        order = torch.sort(coefficients, descending=True, stable=True).indices[:_TOP].tolist()
        return [str(shown[i]) for i in order if coefficients[i] > 0]

    def _note_size(self) -> None:
        if self.change is None:
            return
        left_out = outside(self.change, dict.fromkeys(self.seen.analysed))
        share = sum(value**2 for value in left_out.values()) ** 0.5
        if share >= _NOTED:
            self.notes.append(
                f"{share:.0%} of the norm of the change is outside the analysis ({len(left_out)} parameters): KL and "
                "answers are those of the whole change, cosines are those of the analysed part."
            )
        predicted = float(self._predicted().mean())
        measured = float(self.kl.mean())
        if predicted > 0 and not 1 / _BENT <= measured / predicted <= _BENT:
            self.notes.append(
                f"The mean KL is {measured:.3g}, but {predicted:.3g} to second order: the change is too large for the "
                "linear approximation, or too much of it is outside the analysis. Cosines only say its direction."
            )

    def _predicted(self) -> Tensor:
        if self.seen.products is None:
            return torch.zeros(0)
        return self.seen.products[..., 0].square().sum(1) / 2

    def most_changed(self, count: int) -> list[int]:
        """The first components in the report's order."""
        return [each.component for each in self.components if not each.new][:count]

    def add_without(self, j: int, after: Predictions | None) -> None:
        """Add the predictions for the change without component j; None if nothing is left of the change."""
        self.without.append(self.watched.step(1.0, j, after))

    def report(self) -> ChangeReport:
        """The report."""
        after = self.seen.after[1.0]
        steps = [self.watched.step(0.0, None, None)]
        steps += [self.watched.step(scale, None, predicted) for scale, predicted in sorted(self.seen.after.items())]
        shares = _explained_shares(self.decomposition.coefficients, self.decomposition.pseudo_fishers)
        moved = displacement(self.watched.before, after)
        about = self.decomposition.columns, self.decomposition.info
        groups = changed_groups(self.kl, shares, moved, self._end, *about, self.request.seed)
        return ChangeReport(
            *self._about(),
            self.kl.tolist(),
            interval(self.kl, self.request.seed),
            self._predicted().tolist(),
            self.components,
            self._changed(after),
            self._unexplained(after, shares),
            most_certain(groups),
            steps,
            self.without,
            self.request.by,
            self._explained(),
            self.notes,
            groups,
        )

    def _end(self, outcome: int, sign: int) -> str:
        """The name of one end of the direction, by the outcome that examples there moved towards."""
        if self.watched.before.distribution.name == "gaussian":
            return "moved one way" if sign > 0 else "moved the other way"
        return f"moved towards {self.watched.in_words(torch.tensor([outcome]))!r}"

    def _about(self) -> tuple[dict[str, Any], int, float | None, dict[str, float], dict[str, float]]:
        """The report's fields on the change itself: source, examples, norm, modules, the part not analysed."""
        if self.change is None:
            return dict(self.origin), len(self.kl), None, {}, {}
        info = self.change.info
        kept = ("method", "model", "revision", "after", "after_revision", "adapters", "natural_scale")
        return (
            {name: info[name] for name in kept if info.get(name) is not None},
            len(self.kl),
            self.change.norm,
            dict(list(self.change.energies().items())[:_MODULES]),
            outside(self.change, dict.fromkeys(self.seen.analysed)),
        )

    def _row(self, i: int, answers: tuple[list[Tensor], list[Tensor]]) -> dict[str, Any]:
        """An example, its answers, and the component with the largest share of it."""
        texts, W = self.decomposition.texts, self.decomposition.coefficients
        before, after = (self.watched.in_words(each[i]) for each in answers)
        return {
            "index": i,
            "id": self.decomposition.example_ids[i],
            "text": None if texts is None else texts[i],
            "before": before,
            "after": after,
            "kl": float(self.kl[i]),
            "component": int(W[i].argmax()) if bool((W[i] > 0).any()) else None,
        }

    def _changed(self, after: Predictions) -> list[dict[str, Any]]:
        answers = self.watched.before.answers(), after.answers()
        if self.watched.before.distribution.name == "gaussian":
            return []  # every number moves
        flipped = self.watched.flips(after).nonzero()[:, 0]
        order = flipped[torch.argsort(self.kl[flipped], descending=True, stable=True)].tolist()
        return [self._row(i, answers) for i in order]

    def _unexplained(self, after: Predictions, shares: Tensor) -> list[dict[str, Any]]:
        answers = self.watched.before.answers(), after.answers()
        order = torch.argsort(self.kl * (1 - shares), descending=True, stable=True)[: self.request.examples].tolist()
        return [{**self._row(i, answers), "explained": float(shares[i])} for i in order]

    def _explained(self) -> tuple[float, float] | None:
        if self.grown is None:
            return None
        G = self.decomposition.pseudo_fishers
        before, after = (float(_explained_shares(W, G).mean()) for W in (self.grown.before, self.grown.after))
        return before, after


def _explained_shares(W: Tensor, G: Tensor) -> Tensor:
    """(n,) the share of each unit PEF that the components explain, wᵀHw at the minimum over w ≥ 0."""
    W, H = W.double(), overlaps(G.double())
    return (W * (W @ H)).sum(1).clamp(0, 1)
