"""Commands that say what changed between two models, or what an adapter changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data, read_decomposition
from hf_npeff.commands.options import Data, Output, Result, command, table
from hf_npeff.config import ChangeRequest, DecompositionConfig, FisherConfig

if TYPE_CHECKING:
    from hf_npeff.analyzer import NPEFFAnalyzer
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.pefs.store import PEFs
    from hf_npeff.weights.directions import ParameterDirection

_Decomposed = Annotated[
    str | None, typer.Option("--decomposition", help="A decomposition of the model before the change; give --pefs too.")
]
_PEFs = Annotated[str | None, typer.Option("--pefs", help="The PEFs of that decomposition.")]
_Page = Annotated[bool, typer.Option("--page/--no-page", help="Write a page to explore.")]
_Texts = Annotated[bool, typer.Option(help="Put the examples' texts into the report and the page.")]


@command
def diff(
    before: Annotated[str, typer.Argument(help="The model before the change: its id on the Hub, or its folder.")],
    after: Annotated[
        str,
        typer.Argument(
            help="The model after the change, or an adapter for the model before: an id on the Hub, or a folder."
        ),
    ],
    data: Data,
    output: Output,
    loading: ModelOptions,
    reading: DataOptions,
    explaining: ChangeRequest,
    fisher: FisherConfig,
    decomposing: DecompositionConfig,
    after_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the model after the change.")
    ] = None,
    decomposition: _Decomposed = None,
    pefs: _PEFs = None,
    page: _Page = True,
    texts: _Texts = True,
) -> Result:
    """Say what changed between two models: how much, on which inputs, through which components.

    The folder gets the change as a direction, change.json and a page. Unless they are given, it also gets the PEFs of
    the model before the change, and their decomposition.

    Examples:
    - `hf-npeff diff user/classifier runs/trained data.jsonl -o runs/diff`
    - `hf-npeff diff gpt2 user/gpt2-tuned prompts.txt --target-modules '.*mlp.*' --n-components 16 -o runs/diff`
    """
    from hf_npeff.models.change_ends import check_tokenizer
    from hf_npeff.weights.directions import ParameterDirection

    dataset, known = read_data(data, reading), _given(decomposition, pefs)
    analyzer = analyzer_for(before, loading, known[0] if known else fisher, reading)
    try:
        check_tokenizer(analyzer.processing_class, after, after_revision)
        change = ParameterDirection.between(
            analyzer.model, after, task=loading.task, dtype=loading.dtype, revisions=(None, after_revision)
        )
    except OSError as error:
        raise OSError(f"the model {after} cannot be loaded: {error}") from error
    components = known or _made(analyzer, dataset, decomposing, explaining, output)
    return _explained(analyzer, *components, dataset, change, explaining, output, page, texts)


@command
def explain_adapter(
    adapter: Annotated[str, typer.Argument(help="An adapter that PEFT can merge: its id on the Hub, or its folder.")],
    data: Data,
    output: Output,
    loading: ModelOptions,
    reading: DataOptions,
    explaining: ChangeRequest,
    fisher: FisherConfig,
    decomposing: DecompositionConfig,
    base: Annotated[str | None, typer.Option(help="The base model, if the adapter does not name it.")] = None,
    weight: Annotated[float, typer.Option(help="A factor for the adapter's change.")] = 1.0,
    decomposition: _Decomposed = None,
    pefs: _PEFs = None,
    page: _Page = True,
    texts: _Texts = True,
) -> Result:
    """Say what an adapter changes: how much, on which inputs, through which components.

    The folder gets the change as a direction, change.json and a page. Unless they are given, it also gets the PEFs of
    the base model and their decomposition. If change.json is in the adapter's folder, `hf-npeff push` adds to the
    adapter's card what it changes.

    Examples:
    - `hf-npeff explain-adapter user/some-lora prompts.jsonl -o runs/some-lora`
    - `hf-npeff explain-adapter runs/lora data.jsonl --base user/classifier --by label -o runs/explained`
    """
    from hf_npeff.models.change_ends import base_named_by
    from hf_npeff.weights.directions import ParameterDirection

    named, revision = base_named_by(adapter) if base is None else (base, None)
    pinned = {} if revision is None or loading.revision is not None else {"revision": revision}
    dataset, known = read_data(data, reading), _given(decomposition, pefs)
    loading = ModelOptions(**{**vars(loading), **pinned})
    analyzer = analyzer_for(named, loading, known[0] if known else fisher, reading)
    change = ParameterDirection.from_adapter({adapter: weight}, base=analyzer.model, check_base=base is None)
    components = known or _made(analyzer, dataset, decomposing, explaining, output)
    return _explained(analyzer, *components, dataset, change, explaining, output, page, texts)


def _given(decomposition: str | None, pefs: str | None) -> tuple[Decomposition, PEFs] | None:
    """The components of the model before the change and their PEFs, if they are given."""
    from hf_npeff.pefs.store import PEFs

    if (decomposition is None) != (pefs is None):
        raise typer.BadParameter("a decomposition and its PEFs go together: give both, or neither", param_hint="--pefs")
    if decomposition is None or pefs is None:
        return None
    return read_decomposition(decomposition), PEFs.from_pretrained(pefs)


def _made(
    analyzer: NPEFFAnalyzer, dataset: Any, decomposing: DecompositionConfig, explaining: ChangeRequest, output: Path
) -> tuple[Decomposition, PEFs]:
    """Compute the components of the model before the change and their PEFs, into the folder."""
    from huggingface_hub.utils import are_progress_bars_disabled

    from hf_npeff.decomposition.estimator import NPEFF

    pefs = analyzer.compute_pefs(dataset, output / "pefs", batch_size=explaining.batch_size)
    decomposition = NPEFF.from_config(decomposing, progress=not are_progress_bars_disabled()).fit(pefs)
    decomposition.save_pretrained(output / "components")
    return decomposition, pefs


def _explained(
    analyzer: NPEFFAnalyzer,
    decomposition: Decomposition,
    pefs: PEFs,
    dataset: Any,
    change: ParameterDirection,
    explaining: ChangeRequest,
    output: Path,
    page: bool,
    texts: bool,
) -> Result:
    """Explain the change, write the report, and show it."""
    from rich.console import Group

    from hf_npeff.report import change as shown

    report = analyzer.explain_change(decomposition, pefs, dataset, change, **vars(explaining))
    change.save_pretrained(output / "change")
    report.save(output, texts=texts)
    if page:
        decomposition.to_html(output / "report.html", change=report, layout=None, texts=texts, force=True)
    parts: list[Any] = [
        table(shown.headline(report), shown.COMPONENT_COLUMNS, shown.component_rows(report)),
        table("From before to after", shown.STEP_COLUMNS, shown.step_rows(report)),
    ]
    if report.changed:
        parts.append(table("Answers that changed", shown.ANSWER_COLUMNS, shown.answer_rows(report)))
    if common := shown.common_rows(report):
        parts.append(table("In common (automatic)", shown.COMMON_COLUMNS, common))
    parts += report.notes
    values = {"output": str(output), "mean_kl": report.mean_kl, **report.to_dict(texts=texts)}
    return Result(values, Group(*parts), {"revision": analyzer.revision})
