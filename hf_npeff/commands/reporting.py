"""The command that writes the page for exploring components."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data, read_decomposition
from hf_npeff.commands.options import BatchSize, DecompositionArgument, Result, command
from hf_npeff.config import BATCH_SIZE, SHADED, LiftRequest

if TYPE_CHECKING:
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.weights.token_alignments import TokenAlignment


@dataclass
class _Measured:
    """Results on components that the decomposition does not have."""

    alignments: Sequence[TokenAlignment] = ()
    energies: dict[int, dict[str, float]] = field(default_factory=dict)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    adapters: dict[int, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """The results as arguments of `Decomposition.to_html`."""
        return {name: value for name, value in vars(self).items() if value}


@command
def report(
    decomposition: DecompositionArgument,
    loading: ModelOptions,
    reading: DataOptions,
    page: Annotated[
        Path | None,
        typer.Option("--page", "-o", help="The file to write; report.html in the decomposition's folder by default."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files without asking.")] = False,
    texts: Annotated[bool, typer.Option(help="Put the examples' texts into the page.")] = True,
    layout: Annotated[
        Literal["tsne", "pca", "none"],
        typer.Option("--map", help="How the map of examples is computed, if it is wanted."),
    ] = "tsne",
    title: Annotated[str | None, typer.Option(help="Title of the page; by default it has the model's name.")] = None,
    compare: Annotated[str | None, typer.Option(help="Another decomposition to compare with.")] = None,
    training: Annotated[
        Path | None, typer.Option(help="The output folder of a training run that had an NPEFFCallback.")
    ] = None,
    perturbation: Annotated[
        list[Path] | None,
        typer.Option(help="A folder written by `hf-npeff perturb`, with or without --all. Repeat for several."),
    ] = None,
    pefs: Annotated[str | None, typer.Option(help="The PEFs, to shade tokens; give --model and --data too.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's id on the Hub, or its folder.")] = None,
    data: Annotated[str | None, typer.Option(help="The data that was analysed.")] = None,
    modules: Annotated[
        bool, typer.Option("--modules", help="Lift every component, to show how it is spread over the modules.")
    ] = False,
    top: Annotated[int, typer.Option(help="How many top examples of each component to shade.")] = SHADED,
    batch_size: BatchSize = BATCH_SIZE,
    check_weights: Annotated[
        bool,
        typer.Option(
            help="Raise an error if the PEFs or the decomposition were made with other weights than the model has now."
        ),
    ] = LiftRequest.check_weights,
    space: Annotated[str | None, typer.Option(help="Push a static Space to this repository, user/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Push to a private Space only.")] = False,
    include_texts: Annotated[bool, typer.Option("--include-texts", help="Publish the texts in the Space too.")] = False,
) -> Result:
    """Write one self-contained HTML page for exploring components.

    With `--pefs`, `--model` and `--data`, the tokens of top examples are shaded by their contribution. With `--space`,
    a folder `space` is written beside the page and pushed, without texts unless you ask for them.

    Examples:
    - `hf-npeff report runs/components`
    - `hf-npeff report runs/components --perturbation runs/off-3 --compare runs/components-of-another-seed -o page.html`
    - `hf-npeff report runs/components --pefs runs/pefs --model distilbert/distilgpt2 --data prompts.txt`
    - `hf-npeff report runs/components --space user/components-of-distilgpt2`
    """
    _check_all_or_none({"--pefs": pefs, "--model": model, "--data": data}, needed=modules)
    folder = Path(decomposition) if Path(decomposition).is_dir() else Path()
    page = folder / "report.html" if page is None else page
    force = _may_write(page, space, force)
    decomposed = read_decomposition(decomposition)
    settings: dict[str, Any] = {"layout": None if layout == "none" else layout, "title": title}
    settings["compare"] = None if compare is None else read_decomposition(compare)
    settings["training"] = None if training is None else _checked_run(training, len(decomposed))
    measured, revision = _of_perturbations(perturbation or ()), None
    if pefs is not None and model is not None and data is not None:
        request = {"batch_size": batch_size, "check_weights": check_weights}
        revision = _measure(measured, decomposed, pefs, model, data, loading, reading, modules, top, request)
    decomposed.to_html(page, **settings, **measured.arguments(), texts=texts, force=force)
    public = texts and include_texts
    url = None if space is None else _publish(decomposed, page, space, measured, settings, public, private)
    return _written(page, url, revision)


def _check_all_or_none(given: Mapping[str, str | None], *, needed: bool) -> None:
    """Check that the options for running a model are given together, and that they are given if they are needed."""
    missing = [name for name, value in given.items() if value is None]
    if len(missing) in (1, 2) or (needed and missing):
        raise typer.BadParameter(
            f"--pefs, --model and --data go together: tokens and modules need all three, and {missing[0]} is missing"
        )


def _written(page: Path, url: str | None, revision: str | None) -> Result:
    """The result: the page and, if there is a `url`, the Space beside it."""
    size, space = page.stat().st_size, None if url is None else str(page.parent / "space")
    shown = f"{page}: {size / 1e6:.1f} MB; open it in a browser" + (
        "" if url is None else f"\n{space}: pushed to {url}"
    )
    values = {"page": str(page), "bytes": size, "space": space, "url": url}
    return Result(values, shown, {} if revision is None else {"revision": revision})


def _checked_run(folder: Path, r: int) -> Path:
    """The folder of a training run, after reading it once, so that errors in it show before any work."""
    from hf_npeff.report.training import read_run

    read_run(folder, r)
    return folder


def _publish(
    decomposition: Decomposition,
    beside: Path,
    repo: str,
    measured: _Measured,
    settings: dict[str, Any],
    texts: bool,
    private: bool,
) -> str:
    """Write the folder of a Space beside the page and push it, without the adapters, which are only on this disk."""
    from hf_npeff.report.page import push_space, write_space
    from hf_npeff.sharing.hub import is_hub_id

    place = beside.parent / "space"
    adapters = {j: where for j, where in measured.adapters.items() if is_hub_id(where)}
    public = replace(measured, adapters=adapters)
    with tempfile.TemporaryDirectory() as temporary:
        page = decomposition.to_html(Path(temporary) / "index.html", **settings, **public.arguments(), texts=texts)
        write_space(place, page, decomposition, settings["title"])
    return push_space(place, repo, private=private or None)


def _may_write(page: Path, space: str | None, force: bool) -> bool:
    """Ask whether to overwrite an existing page or folder of the Space; true if there is one and the answer is yes.

    Raises:
        FileExistsError: if nobody can be asked, or the answer is no.
        ValueError: if the Space's name is not valid.
    """
    from hf_npeff.report.page import check_free
    from hf_npeff.sharing.hub import is_hub_id

    if space is not None and not is_hub_id(space):
        raise ValueError(f"--space takes the name of a repository on the Hub, user/name, but it is {space!r}")
    paths = [page, *([page.parent / "space" / "index.html"] if space is not None else [])]
    taken = [path for path in paths if path.is_file()]
    if taken and not force and sys.stdin.isatty() and sys.stderr.isatty():
        force = typer.confirm(f"{taken[0]} exists. Overwrite it?", err=True)
    for path in paths:
        check_free(path, force)
    return force


def _of_perturbations(folders: Sequence[Path]) -> _Measured:
    """The results of `perturb`: reports, the energies of directions by module, and the adapters' places.

    Raises:
        OSError: if a folder was not written by `perturb`.
    """
    from hf_npeff.errors import CorruptStoreError
    from hf_npeff.sharing.files import read_json
    from hf_npeff.weights.directions import ParameterDirection
    from hf_npeff.weights.lifted_adapters import folder_of

    measured = _Measured()
    for folder in folders:
        if not (folder / "report.json").is_file():
            raise FileNotFoundError(f"{folder} has no report.json; give a folder that `hf-npeff perturb` wrote")
        content = read_json(folder / "report.json", None)
        several: Any = content.get("components")  # perturb --all
        for each in several if isinstance(several, list) else [content]:
            j: Any = each.get("component") if isinstance(each, dict) else None
            if not isinstance(j, int):
                raise CorruptStoreError(f"{folder / 'report.json'} is not the report of a component")
            measured.reports[j] = each
            adapter = folder / "adapter" if each is content else folder_of(folder, j)
            if adapter.is_dir():
                measured.adapters[j] = str(adapter)
        if not isinstance(several, list) and (folder / "direction").is_dir():
            measured.energies[content["component"]] = ParameterDirection.load(folder / "direction").energies()
    return measured


def _measure(
    measured: _Measured,
    decomposition: Decomposition,
    pefs: str,
    model: str,
    data: str,
    loading: ModelOptions,
    reading: DataOptions,
    modules: bool,
    top: int,
    request: dict[str, Any],
) -> str | None:
    """Run the model on top examples, and lift components if asked to; return the model's revision."""
    from hf_npeff.pefs.store import PEFs

    fishers, dataset = PEFs.from_pretrained(pefs), read_data(data, reading)
    analyzer = analyzer_for(model, loading, decomposition, reading)
    measured.alignments = analyzer.token_alignments(decomposition, fishers, dataset, n_top=top, **request)
    left = [j for j in range(len(decomposition)) if j not in measured.energies]
    if modules and left:
        for j, direction in analyzer.lift_each(decomposition, left, fishers, dataset, **request):
            measured.energies[j] = direction.energies()
    return analyzer.revision
