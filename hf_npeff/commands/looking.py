"""Commands that show components: what they are, which of them new inputs use, how two decompositions compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_npeff.commands.options import (
    BatchSize,
    Data,
    DataOptions,
    DecompositionArgument,
    MaybeOutput,
    Model,
    ModelOptions,
    Result,
    analyzer_for,
    command,
    read_data,
    read_decomposition,
    table,
    write_result,
)
from hf_npeff.config import BATCH_SIZE

if TYPE_CHECKING:
    from hf_npeff.decomposition.decomposition import Decomposition


@command
def components(
    decomposition: DecompositionArgument,
    component: Annotated[int | None, typer.Option(help="Only this one, with more of its examples.")] = None,
    top: Annotated[int | None, typer.Option(help="Examples to show: 3, or 20 of a single component.")] = None,
    rename: Annotated[str | None, typer.Option(help="Name the component, in its folder.")] = None,
    names: Annotated[Path | None, typer.Option(help="Take over the names.json that a page saved.")] = None,
) -> Result:
    """Show components and the examples that they explain most of.

    Examples:
    - `hf-npeff components runs/components`
    - `hf-npeff components runs/components --component 3 --top 50`
    - `hf-npeff components runs/components --component 3 --rename "past tense"`
    - `hf-npeff components runs/components --names names.json`
    """
    from hf_npeff.sharing.markdown import plain

    decomposed = read_decomposition(decomposition)
    if rename is not None:
        if component is None:
            raise typer.BadParameter("which one? add --component", param_hint="--rename")
        decomposed.rename(component, rename)
    if names is not None:
        decomposed.rename(names)
    if rename is not None or names is not None:
        _save_again(decomposed, Path(decomposition))
    count = (3 if component is None else 20) if top is None else top
    values, rows, lines = [], [], []
    for each in decomposed if component is None else [decomposed[component]]:
        best = each.top_examples(count)
        summary = {
            "index": each.index,
            "name": each.name,
            "active_share": each.active_share,
            "stability": each.stability,
        }
        values.append({**summary, "evaluation": decomposed.evaluations.get(each.index), "top": list(best)})
        texts = best.lines(plain)
        rows.append((each.label, f"{each.active_share:.0%}", f"{each.stability:.2f}", "\n".join(texts)))
        lines = [(f"{w:.3f}", i, text) for w, i, text in zip(best.coefficients, best.ids, texts, strict=True)]
    if component is None:
        n = len(decomposed.example_ids)
        title = f"{decomposition}: {decomposed.explained:.1%} of {n:,} examples' PEFs explained"
        shown = table(title, ("component", "active", "stable", "top examples"), rows)
    else:
        title = "{}: active on {}, stability {}".format(*rows[0])
        shown = table(title, ("weight", "id", "example"), lines)
    return Result({"explained": decomposed.explained, "components": values}, shown)


def _save_again(decomposition: Decomposition, folder: Path) -> None:
    """Write a decomposition back, with what its card says of licence and data sets."""
    from hf_npeff.sharing.cards import said_on_card

    if not folder.is_dir():
        raise ValueError(f"{folder} is on the Hub, and names are kept in a folder: download it, rename there and push")
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
    """Say which known components the model uses on new inputs.

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


@command
def compare(first: DecompositionArgument, second: DecompositionArgument, output: MaybeOutput = None) -> Result:
    """Match the components of two decompositions.

    Of the same examples they are compared by the correlation of their coefficients, otherwise by the cosine of their
    pseudo-Fishers, which needs the same sketch. With `--output`, the matches are written to matches.json.

    Example: `hf-npeff compare runs/components runs/components-of-another-seed`
    """
    from hf_npeff.decomposition.matching import matches, similarities

    a, b = read_decomposition(first), read_decomposition(second)
    measure, S = similarities(a, b)
    pairs = matches(S)
    values = {
        "measure": measure,
        "pairs": [
            {"first": i, "first_label": a[i].label, "second": j, "second_label": b[j].label, "similarity": s}
            for i, j, s in pairs
        ],
        "mean": sum(s for *_, s in pairs) / len(pairs),
    }
    if output is not None:
        write_result(output / "matches.json", values)
    rows = [(a[i].label, b[j].label, f"{s:.3f}") for i, j, s in pairs]
    return Result(values, table(f"{measure}, mean {values['mean']:.3f}", (first, second, "similarity"), rows))
