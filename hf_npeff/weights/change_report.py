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
        component: the number of the component; components that were added for what the others do not explain come after
            the decomposition's own.
        label: its name, or its number.
        automatic_label: what its examples have in common, or None.
        kl: mean KL of the examples weighted by their coefficients, in nats; None for an added component.
        kl_interval: 95% bootstrap interval of this KL, over examples.
        kl_over_random: its share of the KL of all components, over its share under random changes.
        p: share of random changes of equal norm that give it at least as large a share of the KL; the smallest possible
            value is 1 / (draws + 1).
        cosine: |cosine| of the change with the lifted component, exact; None for an added component.
        cosine_random: the same for a random change of equal norm.
        cosine_shuffled: the same for the change with the entries of every weight shuffled.
        cosine_p: two-sided p-value of the cosine, compared with random changes that have the change's norm in every
            weight.
        before: mean coefficient of the examples' PEFs before the change; None if no PEFs were computed after it.
        after: mean coefficient after the change, for the same components.
        growth: "grew", "shrank", "appeared" or "vanished" if the 95% interval of after − before does not contain zero,
            otherwise "stayed".
        growth_interval: this interval.
        top: the texts, or ids, of its first examples; for an added component, of those after the change.
        new: whether it was added.
        kl_left: mean KL of its examples after subtracting, from every example, the shares W_ij / Σ_l W_il of the
            components before it in the report; None for an added component.
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
    """A group of examples with similar effects of the change, and what they have in common.

    Attributes:
        name: "most changed" (the quarter with the largest KL), "moved towards" an outcome (the quarter at one end of
            the direction along which the changes of predictions differ most), or "changed and not explained" (the
            quarter with the largest KL that no component explains).
        examples: how many examples the group has.
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
    """The model with a part of the change, or with the whole change without one component.

    Attributes:
        scale: the part of the change, 1 for the whole.
        without: the component that was taken out of the change, or None.
        kl: mean KL from the model before the change, in nats.
        kl_interval: 95% bootstrap interval of this KL.
        flips: share of the examples with an answer that changes; None for regression.
        accuracy: {group: share of right answers}, "all" among them; empty without labels of classes.
        error: {group: mean squared error} of a regression.
        n: {group: number of examples with a label}.
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
        change: the source of the change: method, model, and the other model or the adapters.
        n: the number of examples.
        norm: ‖Δ‖ over all changed parameters; None if the change itself was not available.
        modules: {parameter: share of ‖Δ‖²}, the largest first.
        outside: {changed parameter that is not analysed: its share of the norm}, the largest first.
        kl: the KL between the two models on every example, in nats, in the decomposition's order.
        kl_interval: 95% bootstrap interval of the mean KL.
        predicted: the KL to second order from the rows, ½ Σ_c ⟨A_ic, Δ⟩²; empty if the change was not available.
        components: a `ComponentChange` for each component. The first has the largest mean KL, and each next one the
            largest `kl_left`, so that two components of one behaviour do not both come before another behaviour. Added
            components come last.
        changed: examples whose answer changed, the largest KL first: index, id, text, before, after, kl, component (the
            component with the largest share of the example).
        unexplained: examples with the largest KL that no component explains: the same fields, and `explained`, the
            share of the example's PEF that all components explain together.
        associations: what the groups of examples have in common, the most certain over all groups first, each feature
            once.
        curve: the steps from before (scale 0) to after the change (1).
        without: the whole change with single components taken out.
        by: the column that makes groups of the curve, or None.
        explained: share of the examples' PEFs that the components explain, before and after; None if no PEFs were
            computed after the change.
        notes: notes for reading the report, a sentence each.
        groups: the most changed examples, those that moved one way, those that moved the other way, and those that no
            component explains, each group with what it has in common.

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
            texts: whether texts of examples, and words from them, are included.
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
        """Write change.json, from which `push` adds to a card what an adapter changes.

        Args:
            folder: the folder; it is created if it is missing.
            texts: whether texts of examples are included.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"format_version": FORMAT_VERSION, "library_name": "hf_npeff", "kind": "change report"}
        write_atomically(Path(folder) / REPORT_FILE, json_bytes(finite({**content, **self.to_dict(texts=texts)})))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ChangeReport:
        """Read what `save` wrote.

        Raises:
            CorruptStoreError: if the file is missing or not a change report.
            FormatVersionError: if another version of the format wrote it.
        """
        path = Path(folder) / REPORT_FILE
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: object = "this") -> ChangeReport:
        """The report from the result of `to_dict`.

        Raises:
            CorruptStoreError: if it is not a change report.
        """
        about = ("format_version", "library_name", "kind")
        kept = {name: value for name, value in values.items() if name not in about}
        try:
            for name, kind in (("components", ComponentChange), ("curve", ChangeStep), ("without", ChangeStep)):
                kept[name] = [kind(**_with_tuples(each)) for each in kept[name]]
            kept["associations"] = _associations(kept["associations"])
            groups = kept.get("groups", [])  # reports of earlier versions do not have it
            kept["groups"] = [ChangedGroup(**{**g, "associations": _associations(g["associations"])}) for g in groups]
            report = cls(**_with_tuples(kept))
            if len(report.kl) != report.n or not all(isinstance(x, int | float) for x in report.kl):
                raise ValueError("kl is not a list of one number for each example")
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
