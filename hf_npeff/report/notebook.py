"""Tables for Jupyter of what a person looks at in a notebook, with every text escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from hf_npeff.sharing.markdown import plain

if TYPE_CHECKING:
    from hf_npeff.analyzer import NPEFFAnalyzer
    from hf_npeff.decomposition.associations import Associations
    from hf_npeff.decomposition.component import Component, TopExamples
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.pefs.store import PEFs
    from hf_npeff.weights.adapters import Adapter
    from hf_npeff.weights.measurement import Measurement
    from hf_npeff.weights.off_target import OffTarget
    from hf_npeff.weights.perturbation import PerturbationReport

_ROWS, _EXAMPLES = 50, 10
"""The most components and examples of a table. Chosen: they fit on a screen."""
_SHOWN = 400
"""How many characters of a text are read. Chosen: more than a cell shows (160)."""
MEASURE_COLUMNS = (
    "step", "rank", "group", "n", "KL", "95%", "largest", "answers changed", "right before", "after", "log-odds",
)  # fmt: skip
EFFECT_COLUMNS = ("", "step", "KL on top", "KL on others", "ratio", "top answers changed", "others changed")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    """A table as HTML; cells are escaped, so that they show their text."""
    head = "".join(f'<th scope="col" style="text-align:left">{_cell(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left" dir="auto">{_cell(value)}</td>' for value in row) + "</tr>"
        for row in rows
    )
    after = f"<p>{_cell(note)}</p>" if note else ""
    return (
        f'<div class="hf-npeff"><p><b>{_cell(title)}</b></p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{after}</div>"
    )


def _cell(value: Any) -> str:
    return html.escape(plain(value, 160))  # chosen: two lines of a cell


def of_analyzer(analyzer: NPEFFAnalyzer) -> str:
    """The model, what of it is analysed, and the settings of its PEFs that are not the defaults."""
    shapes = analyzer.shapes
    rows = [
        ("device", str(analyzer.device)),
        ("analysed numbers", f"{sum(out * wide for out, wide in shapes.values()):,} in {len(shapes)} parameters"),
        ("settings", repr(analyzer.fisher)),
        *((name, "×".join(map(str, shape))) for name, shape in list(shapes.items())[:_ROWS]),
    ]
    more = f"and {len(shapes) - _ROWS} more parameters" if len(shapes) > _ROWS else ""
    return table(repr(analyzer), ("", ""), rows, more)


def of_pefs(pefs: PEFs) -> str:
    """What the rows are of, how large and how exact they are, and the columns beside them."""
    error = pefs.sketch_error
    rows = [
        ("size", f"{pefs.nbytes / 1e6:,.1f} MB, {pefs.dtype}"),
        ("error of inner products", "not measured" if error is None else f"{error:.2g}"),
        ("settings", repr(pefs.config) if pefs.info.get("fisher") else ""),
        ("columns", ", ".join(pefs.columns)),
        ("first example", (pefs.texts or pefs.example_ids)[0] if len(pefs) else ""),
    ]
    return table(repr(pefs), ("", ""), rows, "analyzer.decompose(pefs, n_components) finds what they have in common.")


def of_adapter(adapter: Adapter) -> str:
    """Where it loads, and its parameters; for a LoRA those with the largest shares of the change first."""
    shares = {name: f"{share:.1%}" for name, share in adapter.energies().items()} if adapter.kind == "lora" else {}
    names = [*shares, *(name for name in adapter.layouts if name not in shares)]
    rows = [("loads in", ", ".join(adapter.loads_in) or "–"), *((n, shares.get(n, "")) for n in names[:_ROWS])]
    more = f"and {len(names) - _ROWS} more parameters; " if len(names) > _ROWS else ""
    return table(repr(adapter), ("", "share of the squared norm"), rows, f"{more}save_pretrained(path) writes it.")


def of_config(config: Any) -> str:
    """Every setting, with its default where it has another value."""
    rows = []
    for setting in fields(config):
        value, usual = getattr(config, setting.name), setting.default
        rows.append((setting.name, repr(value), "" if usual is MISSING or value == usual else repr(usual)))
    return table(type(config).__name__, ("setting", "value", "default"), rows)


def of_decomposition(decomposition: Decomposition) -> str:
    """A row for each of the first components."""
    rows = []
    for component in list(decomposition)[:_ROWS]:
        top = component.top_examples(1)
        ratio = decomposition.evaluations.get(component.index, {}).get("ratio")
        rows.append(
            (
                component.index,
                component.name or "",
                f"{component.active_share:.0%}",
                f"{component.stability:.2f}",
                "" if ratio is None else f"{ratio:.3g}",
                top.lines(_last_part)[0] if len(top) else "",
            )
        )
    more = f"and {len(decomposition) - _ROWS} more components; " if len(decomposition) > _ROWS else ""
    header = ("", "name", "active", "stability", "KL ratio", "top example")
    return table(repr(decomposition), header, rows, f"{more}to_html(path) writes a page to explore.")


def of_component(component: Component) -> str:
    """The top examples of a component."""
    return of_top_examples(component.top_examples(_EXAMPLES), repr(component))


def of_top_examples(top: TopExamples, title: str | None = None) -> str:
    """Top examples, one in each row."""
    lines = top.lines(_last_part)
    rows = [(i, f"{w:.3f}", line) for i, w, line in zip(top.ids, top.coefficients, lines, strict=True)]
    return table(title or f"{len(top)} top examples", ("id", "coefficient", "example"), rows[:_ROWS])


def of_off_target(report: OffTarget) -> str:
    """The most moved inputs, and the inputs that the search report."""
    rows = [
        (f"{row['kl']:.3g}", "as it is", row["text"] or row["id"], row["before"], row["after"]) for row in report.worst
    ]
    for row in report.searched:
        how = f"{row['replaced']} tokens replaced" + (", the component's own" if row["own"] else "")
        rows.append((f"{row['kl']:.3g}", how, row["text"] or "", row["before"], row["after"]))
    return table(repr(report), ("KL", "", "input", "before", "after"), rows[:_ROWS])


def of_associations(associations: Associations) -> str:
    """What the first components' examples have in common."""
    rows = []
    for component in list(associations)[:_ROWS]:
        features = ", ".join(f"{a.feature} ({a.share:.0%}, others {a.rest:.0%})" for a in component.associations[:3])
        right = "–" if component.accuracy is None else f"{component.accuracy[0]:.0%}"
        rows.append((component.component, component.label or "–", right, features or "–"))
    header = ("", "automatic label", "right", "its examples have more often")
    return table(repr(associations), header, rows)


def effect_rows(report: PerturbationReport) -> list[tuple[str, ...]]:
    """A row of `EFFECT_COLUMNS` for every measured step."""
    effects = [("this step", report.best), ("the other sign", report.opposite), ("a random direction", report.random)]
    return [
        (
            name,
            *(f"{value:.3g}" for value in (e.scale, e.top, e.others, e.ratio)),
            *(_share(flips) for flips in (e.top_flips, e.other_flips)),
        )
        for name, e in effects
        if e is not None
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def of_report(report: PerturbationReport) -> str:
    """KL of every step, and the first answers that changed."""
    shown = table(repr(report), EFFECT_COLUMNS, effect_rows(report))
    if not report.changed:
        return shown
    answers = [
        ("top" if row["top"] else "other", row["text"] or row["id"], row["before"], row["after"])
        for row in report.changed[:_EXAMPLES]
    ]
    return shown + table("Answers", ("", "example", "before", "after"), answers)


def measure_rows(measurement: Measurement) -> list[tuple[str, ...]]:
    """A row of `MEASURE_COLUMNS` for every group at every step."""
    rows: list[tuple[str, ...]] = []
    for step in measurement.steps:
        size = f"{step.scale:.3g}" + (" (random change)" if step.random else "")
        if step.quantised is not None:
            size += f" {'merged into' if step.merged else 'beside'} {step.quantised}: {step.kept:.0%} kept"
        for group, e in step.groups.items():
            score = ("", "")
            odds = "" if e.log_odds is None else "{:+.2f} → {:+.2f}".format(*e.log_odds)
            if e.accuracy is not None:
                score = (f"{e.accuracy[0]:.3f}", f"{e.accuracy[1]:.3f}")
            elif e.error is not None:
                score = (f"error {e.error[0]:.3g}", f"error {e.error[1]:.3g}")
            spread = "{:.3g}–{:.3g}".format(*e.kl_interval)
            rank = "whole" if step.rank is None else str(step.rank)
            numbers = (str(e.n), f"{e.kl:.3g}", spread, f"{e.quantiles['100%']:.3g}", f"{e.flips:.1%}")
            rows.append((size, rank, group, *numbers, *score, odds))
    return rows


def of_measurement(measurement: Measurement) -> str:
    """Every group at every step, and the examples that the first step moves most."""
    shown = table(repr(measurement), MEASURE_COLUMNS, measure_rows(measurement))
    worst = next(iter(measurement.steps[0].groups.values())).worst
    rows = [(f"{w['kl']:.3g}", w["text"] or w["id"], w["before"], w["after"]) for w in worst]
    return shown + (table("Moved most", ("KL", "example", "before", "after"), rows) if rows else "")


def _last_part(value: object) -> str:
    """The end of a long text, since a prompt ends with its question."""
    return str(value)[-_SHOWN:]
