"""Commands that show components, explain new inputs with them, and compare two decompositions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data, read_decomposition
from hf_npeff.commands.options import (
    BatchSize,
    Data,
    DecompositionArgument,
    MaybeOutput,
    Model,
    Result,
    command,
    table,
    write_result,
)
from hf_npeff.config import BATCH_SIZE

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hf_npeff.decomposition.component import Component
    from hf_npeff.decomposition.decomposition import Decomposition

_ASSOCIATIONS = 3
"""How many associations of each component are listed with all components. Chosen: as many as its examples there."""


@command
def components(
    decomposition: DecompositionArgument,
    component: Annotated[int | None, typer.Option(help="Show only this component, with more of its examples.")] = None,
    top: Annotated[
        int | None, typer.Option(help="How many examples to show: 3 by default, or 20 for a single component.")
    ] = None,
    rename: Annotated[str | None, typer.Option(help="Name the component; the name is saved in the folder.")] = None,
    names: Annotated[Path | None, typer.Option(help="Use the names in a names.json that the page saved.")] = None,
    sort: Annotated[
        Literal["number", "active", "stability", "accuracy", "association"],
        typer.Option(
            help="The order: by number, most active, most stable, least accurate, or most certain association first."
        ),
    ] = "number",
    associated: Annotated[
        str | None, typer.Option(help="Show only components with an association that contains this text.")
    ] = None,
) -> Result:
    """Show components, the examples that they explain most of, and what these examples have in common.

    Associations are words and column values that a component's examples have more often than the others. Shuffled
    examples correct their p-values for all associations that were tried.

    Examples:
    - `hf-npeff components runs/components`
    - `hf-npeff components runs/components --component 3 --top 50`
    - `hf-npeff components runs/components --sort accuracy --associated not`
    - `hf-npeff components runs/components --component 3 --rename "past tense"`
    - `hf-npeff components runs/components --names names.json`
    """
    decomposed = read_decomposition(decomposition)
    if rename is not None:
        if component is None:
            raise typer.BadParameter("add --component to say which component gets the name", param_hint="--rename")
        decomposed.rename(component, rename)
    if names is not None:
        decomposed.rename(names)
    if rename is not None or names is not None:
        _save_again(decomposed, Path(decomposition))
    count = (3 if component is None else 20) if top is None else top  # chosen: a few of each, a page of one
    associations = _associations(decomposed)
    chosen = list(decomposed) if component is None else [decomposed[component]]
    if associated is not None:
        chosen = [each for each in chosen if _has(associations[each.index], associated)]
    chosen.sort(key=lambda each: _place(each, associations[each.index], sort))
    values = []
    for each in chosen:
        summary = {
            "index": each.index,
            "name": each.name,
            "active_share": each.active_share,
            "stability": each.stability,
            **{k: v for k, v in associations[each.index].items() if k != "component"},
        }
        evaluation = decomposed.evaluations.get(each.index)
        values.append({**summary, "evaluation": evaluation, "top": list(each.top_examples(count))})
    if component is None:
        n = len(decomposed.example_ids)
        title = f"{decomposition}: {decomposed.explained:.1%} of {n:,} examples' PEFs explained"
        rows = [_line(each, associations[each.index], count) for each in chosen]
        headers = ("component", "active", "stable", "right", "associated with (automatic)", "top examples")
        shown: Any = table(title, headers, rows)
    else:
        shown = _single(decomposed[component], associations[decomposed.index_of(component)], count)
    return Result({"explained": decomposed.explained, "components": values}, shown)


def _associations(decomposition: Decomposition) -> list[dict[str, Any]]:
    """The associations of every component as JSON types; there are none if neither texts nor columns were kept."""
    from hf_npeff.encoding.columns import described_by

    texts = decomposition.texts is not None
    if not described_by(decomposition.columns):
        return [{"associations": [], "accuracy": None, "error": None, "automatic_label": None} for _ in decomposition]
    components: list[dict[str, Any]] = decomposition.associations(texts=texts).to_dict()["components"]
    return components


def _has(associations: dict[str, Any], text: str) -> bool:
    features = [f for a in associations["associations"] for f in (a["feature"], *a["same"])]
    return any(text.casefold() in feature.casefold() for feature in features)


def _place(component: Component, associations: dict[str, Any], sort: str) -> tuple[float, int]:
    """The sort key of a component in a list."""
    first = next(iter(associations["associations"]), None)
    keys = {
        "number": 0.0,
        "active": -component.active_share,
        "stability": -component.stability if component.stability == component.stability else 1.0,
        "accuracy": associations["accuracy"][0] if associations["accuracy"] else 2.0,
        "association": first["log_p"] if first else 1.0,
    }
    return keys[sort], component.index


def _line(component: Component, associations: dict[str, Any], count: int) -> tuple[str, ...]:
    """A component's row in the list of all."""
    from hf_npeff.sharing.markdown import plain

    measured = f"{component.active_share:.0%}", f"{component.stability:.2f}", _score(associations)
    features = "\n".join(_association_line(a) for a in associations["associations"][:_ASSOCIATIONS]) or "–"
    return component.label, *measured, features, "\n".join(component.top_examples(count).lines(plain))


def _score(associations: dict[str, Any]) -> str:
    """The accuracy on a component's examples, and on the others in brackets; for regression, the error."""
    if (accuracy := associations["accuracy"]) is not None:
        return "{:.0%} (others {:.0%})".format(*accuracy)
    if (error := associations["error"]) is not None:
        return "error {:.3g} (others {:.3g})".format(*error)
    return "–"


def _association_line(association: dict[str, Any]) -> str:
    columns = [feature for feature in association["same"] if " = " in feature]  # not every word
    names = " and ".join([association["feature"], *columns])
    return f"{names} ({association['share']:.0%}, others {association['rest']:.0%})"


def _single(component: Component, associations: dict[str, Any], count: int) -> RenderableType:
    """One component: all of its associations, and more of its examples."""
    from rich.console import Group

    from hf_npeff.sharing.markdown import plain

    best = component.top_examples(count)
    label, active, stability, right, _, _ = _line(component, associations, 1)
    lines = zip(best.coefficients, best.ids, best.lines(plain), strict=True)
    title = f"{label}: active on {active}, stability {stability}, right on {right}"
    if (automatic := associations["automatic_label"]) is not None:
        title += f"; automatic label: {automatic}"
    shown = [table(title, ("weight", "id", "example"), [(f"{w:.3f}", i, text) for w, i, text in lines])]
    if associations["associations"]:
        rows = [
            (a["feature"], f"{a['share']:.0%}", f"{a['rest']:.0%}", f"{a['corrected']:.2g}", ", ".join(a["same"]))
            for a in associations["associations"]
        ]
        headers = ("associated with", "its examples", "others", "corrected p", "on the same examples")
        shown.append(table("What its examples have in common", headers, rows))
    return Group(*shown)


def _save_again(decomposition: Decomposition, folder: Path) -> None:
    """Write a decomposition back, and keep the licence and data sets of its card."""
    from hf_npeff.sharing.cards import said_on_card

    if not folder.is_dir():
        raise ValueError(
            f"{folder} is on the Hub, but names can only be saved in a folder: download it, rename there and push"
        )
    decomposition.save_pretrained(folder, **said_on_card(folder))


@command
def explain(
    decomposition: DecompositionArgument,
    model: Model,
    data: Data,
    loading: ModelOptions,
    reading: DataOptions,
    output: MaybeOutput = None,
    batch_size: BatchSize = BATCH_SIZE,
) -> Result:
    """Show which components of a decomposition the model uses on new inputs.

    With `--output`, the coefficients are written to coefficients.json.

    Examples:
    - `hf-npeff explain runs/components distilbert/distilgpt2 new.txt`
    - `hf-npeff explain user/npeff-distilgpt2 distilbert/distilgpt2 new.txt --json`
    """
    from hf_npeff.decomposition.component import example_lines
    from hf_npeff.sharing.markdown import plain

    decomposed = read_decomposition(decomposition)
    analyzer = analyzer_for(model, loading, decomposed, reading)
    pefs = analyzer.compute_pefs(read_data(data, reading), like=decomposed, batch_size=batch_size)
    coefficients = decomposed.transform(pefs).tolist()
    labels = [component.label for component in decomposed]
    texts = pefs.texts
    rows = []
    lines = example_lines(texts or pefs.example_ids, pefs.columns.get("prediction"), plain)
    for line, weights in zip(lines, coefficients, strict=True):
        leading = sorted(range(len(labels)), key=weights.__getitem__, reverse=True)[:3]
        total = sum(weights) or 1.0
        rows.append((line, ", ".join(f"{labels[j]} {weights[j] / total:.0%}" for j in leading if weights[j] > 0)))
    examples = [
        {"id": i, "text": None if texts is None else texts[at], "coefficients": weights}
        for at, (i, weights) in enumerate(zip(pefs.example_ids, coefficients, strict=True))
    ]
    values = {"components": labels, "examples": examples}
    if output is not None:
        write_result(output / "coefficients.json", values)
    return Result(values, table(decomposition, ("example", "components"), rows), {"revision": analyzer.revision})


_PARTNER = 0.5
"""The similarity below which a component has no partner, if no baseline of two fits of the same model is known."""


@command
def compare(
    first: DecompositionArgument,
    second: DecompositionArgument,
    pefs: Annotated[
        str | None,
        typer.Option(
            help="The PEFs of the first decomposition, which are fitted again to show how similar two fits are."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many examples of every component to show.")] = 2,
    output: MaybeOutput = None,
) -> Result:
    """Match the components of two decompositions, and show which have no partner.

    If both decompositions are of the same examples, components are compared by the correlation of their coefficients,
    otherwise by the cosine of their pseudo-Fishers, which needs the same sketch. A similarity says little by itself,
    because two fits of the same model from different starts differ too. With `--pefs` the first model's PEFs are fitted
    again, and the similarity of these two fits is shown for comparison. With `--output`, the matches are written to
    matches.json.

    Examples:
    - `hf-npeff compare runs/components runs/components-of-another-seed`
    - `hf-npeff compare runs/before/components runs/after/components --pefs runs/before/pefs`
    """
    from hf_npeff.decomposition.matching import baseline, matches, similarities
    from hf_npeff.pefs.store import PEFs

    a, b = read_decomposition(first), read_decomposition(second)
    measure, S = similarities(a, b)
    pairs = matches(S)
    same = None
    if pefs is not None:
        same = baseline(a, PEFs.from_pretrained(pefs), of_coefficients=measure.startswith("correlation"))
    least = _PARTNER if same is None else same.lowest
    close = [(i, j) for i, j, s in pairs if s >= least]
    alone = [sorted(set(range(len(d))) - {pair[at] for pair in close}) for at, d in enumerate((a, b))]
    values: dict[str, Any] = {
        "measure": measure,
        "pairs": [
            {
                "first": i,
                "first_label": a[i].label,
                "second": j,
                "second_label": b[j].label,
                "similarity": s,
                "same_model": None if same is None else same.similarity.get(i),
            }
            for i, j, s in pairs
        ],
        "mean": sum(s for *_, s in pairs) / len(pairs),
        "same_model_mean": None if same is None else sum(same.similarity.values()) / len(same.similarity),
        "least": least,
        "without_partner": {
            name: [{"component": j, "label": d[j].label, "top": _examples(d, j, top)} for j in numbers]
            for name, d, numbers in (("first", a, alone[0]), ("second", b, alone[1]))
        },
    }
    if output is not None:
        write_result(output / "matches.json", values)
    return Result(values, _matched(values, a, b, (first, second), top))


def _examples(decomposition: Decomposition, j: int, count: int) -> list[str]:
    from hf_npeff.sharing.markdown import plain

    return decomposition[j].top_examples(count).lines(plain) if count else []


def _matched(
    values: dict[str, Any], a: Decomposition, b: Decomposition, names: tuple[str, str], top: int
) -> RenderableType:
    """The table of pairs, and the components without a partner."""
    from rich.console import Group

    rows = []
    for pair in values["pairs"]:
        same = "" if pair["same_model"] is None else f"{pair['same_model']:.3f}"
        sides = [
            "\n".join([pair[f"{side}_label"], *_examples(d, pair[side], top)])
            for side, d in (("first", a), ("second", b))
        ]
        rows.append((*sides, f"{pair['similarity']:.3f}", same))
    mean = f"{values['measure']}, mean {values['mean']:.3f}"
    if values["same_model_mean"] is None:
        mean += "; two fits of one model differ too: --pefs says how much"
    else:
        mean += f"; two fits of the first model: mean {values['same_model_mean']:.3f}"
    parts: list[Any] = [table(mean, (*names, "similarity", "same model, other start"), rows)]
    for side, name in zip(("first", "second"), names, strict=True):
        if alone := values["without_partner"][side]:
            shown = [(each["label"], "\n".join(each["top"])) for each in alone]
            title = f"Components of {name} without a partner of similarity {values['least']:.2f} or more"
            parts.append(table(title, ("component", "top examples"), shown))
    return Group(*parts)
