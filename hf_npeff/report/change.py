"""Tables of a change report, for terminals and notebooks: components, changed answers, and steps of the change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_npeff.report.notebook import table

if TYPE_CHECKING:
    from hf_npeff.weights.change_report import ChangeReport

COMPONENT_COLUMNS = (
    "component",
    "automatic label",
    "KL",
    "95%",
    "left to it",
    "over random",
    "p",
    "|cosine|",
    "random",
    "shuffled",
    "became",
)
STEP_COLUMNS = ("step", "without", "KL", "95%", "answers changed", "right")
ANSWER_COLUMNS = ("KL", "component", "example", "before", "after")
COMMON_COLUMNS = ("examples", "have", "of them", "of the others", "corrected p")
_ROWS = 16
"""The most components and answers of a table. Chosen: they fit on a screen."""

_COMMON = 5
"""The most associations of a group. Chosen: the most certain ones suffice, and four groups fit on a screen."""


def component_rows(report: ChangeReport) -> list[tuple[str, ...]]:
    """A row of `COMPONENT_COLUMNS` for every component, in the order of the report."""
    rows = []
    for each in report.components:
        interval = "–" if each.kl_interval is None else "{:.3g}–{:.3g}".format(*each.kl_interval)
        became = "–" if each.growth is None else f"{each.growth} ({_number(each.before)} → {_number(each.after)})"
        numbers = [each.kl, each.kl_left, each.kl_over_random, each.p]
        numbers += [each.cosine, each.cosine_random, each.cosine_shuffled]
        kl, left, ratio, p, *cosines = map(_number, numbers)
        rows.append((each.label, each.automatic_label or "–", kl, interval, left, ratio, p, *cosines, became))
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def step_rows(report: ChangeReport) -> list[tuple[str, ...]]:
    """A row of `STEP_COLUMNS` for every step of the change, and for the change without single components."""
    labels = {each.component: each.label for each in report.components}
    rows: list[tuple[str, ...]] = []
    for step in (*report.curve, *report.without):
        taken = "" if step.without is None else labels.get(step.without, str(step.without))
        right = ", ".join(f"{name} {value:.3f}" for name, value in step.accuracy.items())
        right = right or ", ".join(f"{name} error {value:.3g}" for name, value in step.error.items()) or "–"
        flips = "–" if step.flips is None else f"{step.flips:.1%}"
        rows.append(
            (f"{step.scale:g}", taken, _number(step.kl), "{:.3g}–{:.3g}".format(*step.kl_interval), flips, right)
        )
    return rows


def answer_rows(report: ChangeReport, *, unexplained: bool = False, count: int = _ROWS) -> list[tuple[str, ...]]:
    """A row of `ANSWER_COLUMNS` for examples whose answer changed, or for changed ones that no component explains."""
    rows = report.unexplained if unexplained else report.changed
    return [
        (f"{row['kl']:.3g}", "–" if row["component"] is None else str(row["component"]), row.get("text") or row["id"],
         row["before"], row["after"])
        for row in rows[:count]
    ]  # fmt: skip


def common_rows(report: ChangeReport) -> list[tuple[str, ...]]:
    """A row of `COMMON_COLUMNS` for each association of a group of examples, a few for each group."""
    return [
        (group.name, a.feature, f"{a.share:.0%}", f"{a.rest:.0%}", f"{a.corrected:.2g}")
        for group in report.groups
        for a in group.associations[:_COMMON]
    ]


def headline(report: ChangeReport) -> str:
    """The change in one line."""
    low, high = report.kl_interval
    what = report.change.get("after") or ", ".join(report.change.get("adapters") or ()) or report.change.get("method")
    return (
        f"{what or 'a change'} of {report.change.get('model') or 'the model'}: mean KL {report.mean_kl:.3g} "
        f"({low:.3g}–{high:.3g}) on {report.n:,} examples, {len(report.changed):,} answers changed"
        + ("" if report.norm is None else f", norm {report.norm:.3g}")
    )


def of_change(report: ChangeReport) -> str:
    """Tables of a report, as HTML."""
    parts = [table(headline(report), COMPONENT_COLUMNS, component_rows(report)[:_ROWS], " ".join(report.notes))]
    parts.append(table("From before to after", STEP_COLUMNS, step_rows(report)))
    if report.changed:
        parts.append(table("Answers that changed", ANSWER_COLUMNS, answer_rows(report)))
    if common := common_rows(report):
        parts.append(table("In common (automatic)", COMMON_COLUMNS, common))
    return "".join(parts)
