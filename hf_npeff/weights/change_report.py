"""ChangeReport: what a weight change did, on which examples, through which components."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_npeff.decomposition.associations import Association
from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.files import FORMAT_VERSION, finite, json_bytes, read_json, write_atomically
from hf_npeff.weights.change_effects import Growth

REPORT_FILE = "change.json"


@dataclass(frozen=True)
class ComponentChange:
    """What a change did to one component.

    Attributes:
        component: its number; those that were added for what the others do not explain follow the decomposition's own.
        label: its name, or its number.
        automatic_label: what its examples have in common, or None.
        kl: mean KL of the examples weighted by their coefficients, in nats; None of an added component.
        kl_interval: 95% bootstrap interval of that, over examples.
        kl_over_random: its part of the KL of all components over its part where random weights change.
        p: share of random changes of equal norm that give it as large a part of the KL; 1 / (draws + 1) is the least.
        cosine: |cosine| of the change with the lifted component, exact; None of an added component.
        cosine_random: the same of a random change of equal norm.
        cosine_shuffled: the same of the change with the numbers of every weight shuffled.
        cosine_p: two-sided p-value of the cosine against random changes with the norm of the change in every weight.
        before: mean coefficient of the examples' PEFs before the change; None where no PEFs were computed after it.
        after: the same after it, with the same components.
        growth: "grew", "shrank", "appeared", "vanished" or "stayed": after − before with a 95% interval off zero.
        growth_interval: that interval.
        top: the texts, or ids, of its first examples, of an added component those after the change.
        new: whether it was added.
        kl_left: mean KL of its examples that the components before it in the report do not carry: each takes its share
            W_ij / Σ_l W_il of every example; None of an added component.
    """

    component: int
    label: str
    automatic_label: str | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    kl_over_random: float | None = None
    p: float | None = None
    cosine: float | None = None
    cosine_random: float | None = None
    cosine_shuffled: float | None = None
    cosine_p: float | None = None
    before: float | None = None
    after: float | None = None
    growth: Growth | None = None
    growth_interval: tuple[float, float] | None = None
    top: list[str] = field(default_factory=list)
    new: bool = False
    kl_left: float | None = None

    def __repr__(self) -> str:
        kl = "" if self.kl is None else f", KL {self.kl:.3g}"
        growth = "" if self.growth is None else f", {self.growth}"
        return f"ComponentChange({self.component}, {self.label[:60]!r}{kl}{growth})"


@dataclass(frozen=True)
class ChangedGroup:
    """Examples that a change treats alike, and what they have in common.

    Attributes:
        name: "most changed" (the quarter with the largest KL), "moved towards" an outcome (the quarter at an end of the
            direction in which predictions moved most unlike each other), or "changed and not explained" (the quarter
            with the largest KL that no component explains).
        examples: how many.
        associations: what they have more often than all others, the most certain first; p-values are corrected for all
            groups together.
    """

    name: str
    examples: int
    associations: list[Association] = field(default_factory=list)

    def __repr__(self) -> str:
        first = f", {self.associations[0].feature!r}" if self.associations else ""
        return f"ChangedGroup({self.name!r}, {self.examples} examples{first})"


@dataclass(frozen=True)
class ChangeStep:
    """The model part of the way, or all the way without a component.

    Attributes:
        scale: the part of the change.
        without: the component that was taken out of the change, or None.
        kl: mean KL from the model before, in nats.
        kl_interval: 95% bootstrap interval of that.
        flips: share of the examples with an answer that changes; None for regression.
        accuracy: {group: share of right answers}, "all" among them; empty without labels of classes.
        error: {group: mean squared error} of a regression.
        n: {group: examples with a label}.
    """

    scale: float
    without: int | None
    kl: float
    kl_interval: tuple[float, float]
    flips: float | None
    accuracy: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        without = "" if self.without is None else f" without component {self.without}"
        return f"ChangeStep({self.scale:.0%} of the change{without}, KL {self.kl:.3g})"


@dataclass(frozen=True)
class ChangeReport:
    """What a weight change did, on which examples, through which components.

    Attributes:
        change: where the change came from: method, model, the other end or the adapters.
        n: examples.
        norm: ‖Δ‖ over all that changed; None where the change itself was not at hand.
        modules: {parameter: share of ‖Δ‖²}, the largest first.
        outside: {changed parameter that is not analysed: its share of the norm}, the largest first.
        kl: the kl of every example between both models, in nats, in the decomposition's order.
        kl_interval: 95% bootstrap interval of its mean.
        predicted: the same to second order from the rows, ½ Σ_c ⟨A_ic, Δ⟩²; empty where the change was not at hand.
        components: a `ComponentChange` each: first that with the largest mean KL, then always that with the largest
            `kl_left`, so that two components of one behaviour do not stand before another behaviour; added ones last.
        changed: examples whose answer changed, the largest KL first: index, id, text, before, after, kl, component (the
            one that carries most of it).
        unexplained: examples with the largest KL that no component explains: the same, with `explained`, the share of
            the example's PEF that all components explain together.
        associations: what groups of examples have in common against the rest, the most certain over all groups first, a
            feature once.
        curve: the way from before (scale 0) to after (1).
        without: the whole change with single components taken out.
        by: the column that makes groups of the curve, or None.
        explained: share of the examples' PEFs that the components explain before, and after; None where no PEFs were
            computed after the change.
        notes: what has to be known to read this, a sentence each.
        groups: the most changed examples, those that moved one way and the other, and those that no component explains,
            each with what they have in common.

    Example:
        >>> report = analyzer.explain_change(decomposition, pefs, dataset, 0.3 * direction)
        >>> len(report.kl), len(report.curve), report.components[0].kl >= report.components[1].kl
        (24, 5, True)
        >>> report.save("runs/report")
        >>> ChangeReport.load("runs/report").mean_kl == report.mean_kl
        True
    """

    change: dict[str, Any]
    n: int
    norm: float | None
    modules: dict[str, float]
    outside: dict[str, float]
    kl: list[float]
    kl_interval: tuple[float, float]
    predicted: list[float]
    components: list[ComponentChange]
    changed: list[dict[str, Any]]
    unexplained: list[dict[str, Any]]
    associations: list[Association]
    curve: list[ChangeStep]
    without: list[ChangeStep]
    by: str | None = None
    explained: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    groups: list[ChangedGroup] = field(default_factory=list)

    @property
    def mean_kl(self) -> float:
        """Mean KL of the examples, in nats."""
        return sum(self.kl) / len(self.kl)

    def to_dict(self, *, texts: bool = True) -> dict[str, Any]:
        """As JSON types.

        Args:
            texts: whether texts of examples, and words of them, go along.
        """
        values = asdict(self)
        if not texts:
            for name in ("changed", "unexplained"):
                values[name] = [{k: v for k, v in row.items() if k != "text"} for row in values[name]]
            for each in values["components"]:
                each["top"], each["automatic_label"] = [], None
            values["associations"] = []
            for each in values["groups"]:
                each["associations"] = []
        return values

    def save(self, folder: str | os.PathLike[str], *, texts: bool = True) -> None:
        """Write change.json, with which `push` tells on a card what an adapter changes.

        Args:
            folder: made where it is missing.
            texts: whether texts of examples go along.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"format_version": FORMAT_VERSION, "library_name": "hf_npeff", "kind": "change report"}
        write_atomically(Path(folder) / REPORT_FILE, json_bytes(finite({**content, **self.to_dict(texts=texts)})))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ChangeReport:
        """Read what `save` wrote.

        Raises:
            CorruptStoreError: if it is missing or not a change report.
            FormatVersionError: if another version of the format wrote it.
        """
        path = Path(folder) / REPORT_FILE
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: object = "this") -> ChangeReport:
        """The report that `to_dict` gave.

        Raises:
            CorruptStoreError: if it is none.
        """
        about = ("format_version", "library_name", "kind")
        kept = {name: value for name, value in values.items() if name not in about}
        try:
            for name, kind in (("components", ComponentChange), ("curve", ChangeStep), ("without", ChangeStep)):
                kept[name] = [kind(**_with_tuples(each)) for each in kept[name]]
            kept["associations"] = _associations(kept["associations"])
            groups = kept.get("groups", [])  # reports of earlier versions have none
            kept["groups"] = [ChangedGroup(**{**g, "associations": _associations(g["associations"])}) for g in groups]
            report = cls(**_with_tuples(kept))
            if len(report.kl) != report.n or not all(isinstance(x, int | float) for x in report.kl):
                raise ValueError("kl is not a number for every example")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CorruptStoreError(f"{path} is not a change report: {error}") from error
        return report

    def __repr__(self) -> str:
        parts = [f"KL {self.mean_kl:.3g} on {self.n} examples", f"{len(self.changed)} answers changed"]
        if self.components:
            first = self.components[0]
            parts.append(f"most on {first.label}" + (f" ({first.automatic_label})" if first.automatic_label else ""))
        return f"ChangeReport({', '.join(parts)})"

    def _repr_html_(self) -> str:
        from hf_npeff.report.change import of_change

        return of_change(self)


def _associations(values: Sequence[Mapping[str, Any]]) -> list[Association]:
    return [Association(**{**each, "same": tuple(each["same"])}) for each in values]


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs of numbers, which JSON holds as lists."""
    pairs = ("kl_interval", "growth_interval", "explained")
    return {k: tuple(v) if k in pairs and isinstance(v, list) else v for k, v in values.items()}
