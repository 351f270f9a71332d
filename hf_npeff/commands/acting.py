"""Commands that act: move the weights along a component, publish what was found."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data, read_decomposition
from hf_npeff.commands.options import (
    Data,
    DecompositionArgument,
    Model,
    Output,
    PEFsArgument,
    Result,
    command,
    table,
    write_result,
)
from hf_npeff.config import LiftRequest, PerturbationRequest

if TYPE_CHECKING:
    from hf_npeff.analyzer import NPEFFAnalyzer
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.pefs.store import PEFs

RANK = 4
"""Of the adapters of --all, as `lift_adapters` has it."""


@command
def perturb(
    decomposition: DecompositionArgument,
    pefs: PEFsArgument,
    model: Model,
    data: Data,
    output: Output,
    loading: ModelOptions,
    reading: DataOptions,
    lifting: LiftRequest,
    measuring: PerturbationRequest,
    component: Annotated[int | None, typer.Option(help="Component number.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All components at once, from one pass over the data: a folder each.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the adapter's matrices; by default 1, and 4 of --all.")
    ] = None,
    kind: Annotated[Literal["lora", "shira", "delta"], typer.Option(help="Kind of adapter.")] = "lora",
    keep: Annotated[
        str | None, typer.Option(help="PEFs of other data to be left alone: a folder, or a repository on the Hub.")
    ] = None,
    spare: Annotated[
        bool,
        typer.Option(
            "--spare",
            help="Spare what layers give on the examples that are left alone, cut to the adapter's rank with that.",
        ),
    ] = False,
    evaluate_on: Annotated[
        str | None, typer.Option("--eval", help="Other data, never analysed, on which the step is measured too.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Column of that data whose values make groups.")] = None,
) -> Result:
    """Switch a component off: lift it to the weights, measure the step, and write it as an adapter.

    The folder gets `direction`, `adapter` (which PEFT loads) and report.json; with --all a folder component-N for each,
    which PEFT loads, adapters.json and a card. PEFs and data are those of the decomposition.

    Examples:
    - `hf-npeff perturb runs/components runs/pefs distilbert/distilgpt2 prompts.txt --component 3 -o runs/off-3`
    - `hf-npeff perturb runs/components runs/pefs org/model a.jsonl --component 3 --spare --search-rounds 8 -o runs/off`
    - `hf-npeff perturb runs/components runs/pefs org/model a.jsonl --all -o runs/adapters`
    """
    if everything == (component is not None):
        raise ValueError("give either --component, a number, or --all")
    if everything:
        alone = {"--kind": kind != "lora", "--spare": spare, "--eval": evaluate_on is not None, "--by": by is not None}
        if given := [name for name, is_given in alone.items() if is_given]:
            raise ValueError(f"{given[0]} is of a single component, and goes with --component")
        opened = _opened(decomposition, pefs, model, data, loading, reading, keep)
        return _perturbed_at_once(*opened, output, lifting, measuring, RANK if rank is None else rank)
    rank = 1 if rank is None else rank
    from rich.console import Group

    from hf_npeff.report.notebook import EFFECT_COLUMNS, MEASURE_COLUMNS, effect_rows, measure_rows

    analyzer, components, fishers, dataset, left_alone = _opened(
        decomposition, pefs, model, data, loading, reading, keep
    )
    assert component is not None
    component = components.index_of(component)
    direction = analyzer.lift(components, component, fishers, dataset, **{**vars(lifting), "keep": left_alone})
    if spare:
        direction = analyzer.spare(
            direction,
            dataset,
            decomposition=components,
            rank=rank if kind == "lora" else None,
            batch_size=lifting.batch_size,
        )
    held_out = None if evaluate_on is None else read_data(evaluate_on, reading)
    report = analyzer.evaluate_direction(
        direction, components, component, dataset, **vars(measuring), held_out=held_out, by=by
    )
    about: dict[str, Any] = {"report": report, "decomposition": components}
    adapter = direction.to_adapter(rank, report.scale, kind=kind, model=analyzer.model, **about)
    direction.save_pretrained(output / "direction", **about)
    adapter.save_pretrained(output / "adapter")
    write_result(output / "report.json", report.to_dict())
    kept = adapter.retained_energy
    values = {"output": str(output), "retained_energy": kept, "loads_in": adapter.loads_in, **report.to_dict()}
    title = f"{components[component].label}: in {output}; the adapter keeps {kept:.0%} of the direction"
    shown: list[Any] = [table(title, EFFECT_COLUMNS, effect_rows(report))]
    if report.off_target is not None:
        shown.append(str(report.off_target))
    if report.held_out is not None:
        shown.append(table(f"On {evaluate_on}", MEASURE_COLUMNS, measure_rows(report.held_out)))
    return Result(values, Group(*shown), {"revision": analyzer.revision})


def _opened(
    decomposition: str, pefs: str, model: str, data: str, loading: ModelOptions, reading: DataOptions, keep: str | None
) -> tuple[NPEFFAnalyzer, Decomposition, PEFs, Any, PEFs | None]:
    """What components are lifted with: model, decomposition, its PEFs and data, and what is to be left alone."""
    from hf_npeff.pefs.store import PEFs

    components = read_decomposition(decomposition)
    fishers, dataset = PEFs.from_pretrained(pefs), read_data(data, reading)
    analyzer = analyzer_for(model, loading, components, reading)
    return analyzer, components, fishers, dataset, None if keep is None else PEFs.from_pretrained(keep)


def _perturbed_at_once(
    analyzer: NPEFFAnalyzer,
    components: Decomposition,
    fishers: PEFs,
    dataset: Any,
    left_alone: PEFs | None,
    output: Path,
    lifting: LiftRequest,
    measuring: PerturbationRequest,
    rank: int,
) -> Result:
    """All components as adapters of the steps that were measured, in a folder each."""
    from dataclasses import replace

    from hf_npeff.report.notebook import EFFECT_COLUMNS, effect_rows
    from hf_npeff.weights.direction_folder import facts_of
    from hf_npeff.weights.gallery import save_gallery

    if lifting.method != "exact":
        raise ValueError(f"--all lifts with --method exact, not {lifting.method}")
    named = ("form", "semi_orthogonal", "top_examples", "ridge", "memory_budget", "batch_size", "check_weights")
    settings = {name: getattr(lifting, name) for name in named}
    adapters = analyzer.lift_adapters(
        components, fishers, dataset, rank, selective=lifting.selective, keep=left_alone, **settings
    )
    reports = analyzer.evaluate_adapters(adapters, components, dataset, fishers, **vars(measuring))
    measured = []
    for adapter, report in zip(adapters, reports, strict=True):
        about = facts_of(adapter.info, report, components, False)
        measured.append(replace(adapter.scaled(report.scale), about=about))
    save_gallery(measured, output, reports)
    values = [report.to_dict() for report in reports]
    write_result(output / "report.json", {"components": values})
    shown = [
        table(f"{components[r.component].label}; keeps {a.kept}", EFFECT_COLUMNS, effect_rows(r))
        for a, r in zip(adapters, reports, strict=True)
    ]
    from rich.console import Group

    return Result({"output": str(output), "components": values}, Group(*shown), {"revision": analyzer.revision})


_PUBLISHED = {
    "direction": ("direction.safetensors", "config.json", "README.md"),
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "README.md"),
}


@command
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a decomposition, PEFs, a direction, an adapter, or several adapters.")
    ],
    repo: Annotated[str, typer.Argument(help="The repository on the Hub, user/name; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Only in a private repository.")] = False,
    include_texts: Annotated[bool, typer.Option("--include-texts", help="Publish the examples' texts too.")] = False,
    components: Annotated[
        str | None, typer.Option(help="Which of several adapters: all, or numbers such as 0,3,7; all by default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit's title.")] = None,
    explained: Annotated[
        Path | None,
        typer.Option(help="Of an adapter: the folder that explain-adapter or diff wrote, for its card."),
    ] = None,
) -> Result:
    """Publish a folder on the Hub. Texts stay here unless they are asked for.

    The card of an adapter that was explained says what it changes: with --explained, or where change.json lies in the
    folder.

    Examples:
    - `hf-npeff push runs/components user/npeff-distilgpt2`
    - `hf-npeff push runs/off-3/adapter user/distilgpt2-without-3 --private`
    - `hf-npeff push runs/adapters user/distilgpt2-components --components all`
    - `hf-npeff push runs/lora user/some-lora --explained runs/some-lora`
    """
    from hf_npeff.pefs.store import PEFs
    from hf_npeff.sharing.cards import point_card_to, said_on_card
    from hf_npeff.sharing.hub import push_folder
    from hf_npeff.weights.gallery import INDEX, copy_gallery

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if explained is not None and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"--explained is for the card of an adapter, and {folder} holds none")
    where: dict[str, Any] = {"private": private or None, "revision": revision, "create_pr": create_pr}
    where["commit_message"] = message
    contents: dict[str, Any] = {"include_texts": include_texts, **said_on_card(folder)}
    if (folder / INDEX).is_file():
        with tempfile.TemporaryDirectory() as published:
            copy_gallery(folder, Path(published), repo, _numbers(components), **said_on_card(folder))
            url = push_folder(published, repo, delete_patterns=["component-*/*"], **where)
        return Result({"kind": "adapters", "url": url}, url)
    if components is not None:
        raise ValueError(f"--components is of several adapters, and {folder} does not hold such ({INDEX} is missing)")
    if (folder / "decomposition.safetensors").is_file():
        kind, url = "decomposition", read_decomposition(str(folder)).push_to_hub(repo, **where, **contents)
    elif (folder / "manifest.json").is_file():
        kind, url = "pefs", PEFs.from_pretrained(folder).push_to_hub(repo, **where, **contents)
    else:
        kind = next((name for name, files in _PUBLISHED.items() if (folder / files[0]).is_file()), "")
        if not kind:
            raise ValueError(f"{folder} holds no decomposition, PEFs, direction or adapter")
        with tempfile.TemporaryDirectory() as published:
            for path in filter(Path.is_file, (folder / name for name in _PUBLISHED[kind])):
                shutil.copy(path, published)
            point_card_to(Path(published), repo)
            if (report := _report_of(folder, explained)) is not None:
                _tell_change(Path(published), folder, report, include_texts)
            url = push_folder(published, repo, **where)
    return Result({"kind": kind, "url": url}, url)


def _report_of(folder: Path, explained: Path | None) -> Path | None:
    """Where the report on a change lies; None where nothing was explained.

    Raises:
        FileNotFoundError: if a folder was named that holds none.
    """
    from hf_npeff.weights.change_report import REPORT_FILE

    if explained is not None and not (explained / REPORT_FILE).is_file():
        raise FileNotFoundError(f"{explained} holds no {REPORT_FILE}; explain-adapter and diff write one")
    place = folder if explained is None else explained
    return place / REPORT_FILE if (place / REPORT_FILE).is_file() else None


def _tell_change(published: Path, folder: Path, report: Path, texts: bool) -> None:
    """Put what the adapter changes into its card."""
    from hf_npeff.sharing.change_cards import add_change_section, change_section
    from hf_npeff.sharing.files import read_json
    from hf_npeff.weights.change_report import ChangeReport

    found = ChangeReport.load(report.parent)
    base = read_json(folder / "adapter_config.json", None).get("base_model_name_or_path")
    add_change_section(published, change_section(found.to_dict(), texts=texts), base)


def _numbers(components: str | None) -> list[int] | None:
    """Component numbers as the option gives them; None for all."""
    if components is None or components == "all":
        return None
    try:
        return [int(number) for number in components.split(",")]
    except ValueError:
        raise ValueError(f"--components takes all, or numbers such as 0,3,7, not {components!r}") from None
