"""The command that publishes results: decompositions, PEFs, directions, adapters."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_npeff.commands.inputs import read_decomposition
from hf_npeff.commands.options import Result, command

_PUBLISHED = {
    "direction": ("direction.safetensors", "config.json", "README.md"),
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "README.md"),
}


@command
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a decomposition, PEFs, a direction, an adapter, or several adapters.")
    ],
    repo: Annotated[
        str, typer.Argument(help="The repository on the Hub, user/name; it is created if it does not exist.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one, and push only to a private one.")
    ] = False,
    include_texts: Annotated[bool, typer.Option("--include-texts", help="Publish the examples' texts too.")] = False,
    components: Annotated[
        str | None,
        typer.Option(
            help="Which adapters of a folder of several to push: all, or numbers such as 0,3,7; all by default."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit's title.")] = None,
    explained: Annotated[
        Path | None,
        typer.Option(help="A folder written by explain-adapter or diff; the adapter's card then says what it changes."),
    ] = None,
) -> Result:
    """Publish a folder on the Hub. The examples' texts are not uploaded unless you ask for it.

    The card of an adapter says what the adapter changes if --explained is given, or if the folder has a change.json.

    Examples:
    - `hf-npeff push runs/components user/npeff-distilgpt2`
    - `hf-npeff push runs/off-3/adapter user/distilgpt2-without-3 --private`
    - `hf-npeff push runs/adapters user/distilgpt2-components --components all`
    - `hf-npeff push runs/lora user/some-lora --explained runs/some-lora`
    """
    from hf_npeff.pefs.store import PEFs
    from hf_npeff.sharing.cards import said_on_card
    from hf_npeff.sharing.hub import no_folder, push_folder
    from hf_npeff.weights.gallery import INDEX, copy_gallery

    if not folder.is_dir():
        raise FileNotFoundError(no_folder(str(folder)))
    if explained is not None and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"--explained is for the card of an adapter, and {folder} has none")
    where: dict[str, Any] = {"private": private or None, "revision": revision, "create_pr": create_pr}
    where["commit_message"] = message
    contents: dict[str, Any] = {"include_texts": include_texts, **said_on_card(folder)}
    if (folder / INDEX).is_file():
        with tempfile.TemporaryDirectory() as published:
            copy_gallery(folder, Path(published), repo, _numbers(components), **said_on_card(folder))
            url = push_folder(published, repo, delete_patterns=["component-*/*"], **where)
        return Result({"kind": "adapters", "url": url}, url)
    if components is not None:
        raise ValueError(
            f"--components chooses among several adapters, and {folder} is not a folder of several adapters ({INDEX} "
            "is missing)"
        )
    if (folder / "decomposition.safetensors").is_file():
        kind, url = "decomposition", read_decomposition(str(folder)).push_to_hub(repo, **where, **contents)
    elif (folder / "manifest.json").is_file():
        kind, url = "pefs", PEFs.from_pretrained(folder).push_to_hub(repo, **where, **contents)
    else:
        kind, url = _push_change(folder, repo, explained, include_texts, where)
    return Result({"kind": kind, "url": url}, url)


def _push_change(
    folder: Path, repo: str, explained: Path | None, include_texts: bool, where: Mapping[str, Any]
) -> tuple[str, str]:
    """Publish a direction or an adapter; return which of the two it is, and its address.

    Raises:
        ValueError: if the folder has neither.
    """
    from hf_npeff.sharing.cards import point_card_to
    from hf_npeff.sharing.hub import push_folder

    kind = next((name for name, files in _PUBLISHED.items() if (folder / files[0]).is_file()), "")
    if not kind:
        raise ValueError(f"{folder} has no decomposition, PEFs, direction or adapter")
    with tempfile.TemporaryDirectory() as published:
        for path in filter(Path.is_file, (folder / name for name in _PUBLISHED[kind])):
            shutil.copy(path, published)
        point_card_to(Path(published), repo)
        if (report := _report_of(folder, explained)) is not None:
            _tell_change(Path(published), folder, report, include_texts)
        return kind, push_folder(published, repo, **where)


def _report_of(folder: Path, explained: Path | None) -> Path | None:
    """The file of the report on a change; None if there is no report.

    Raises:
        FileNotFoundError: if a folder was named that has none.
    """
    from hf_npeff.weights.change_report import REPORT_FILE

    if explained is not None and not (explained / REPORT_FILE).is_file():
        raise FileNotFoundError(f"{explained} has no {REPORT_FILE}; give a folder that explain-adapter or diff wrote")
    place = folder if explained is None else explained
    return place / REPORT_FILE if (place / REPORT_FILE).is_file() else None


def _tell_change(published: Path, folder: Path, report: Path, texts: bool) -> None:
    """Add a section on what the adapter changes to its card."""
    from hf_npeff.sharing.change_cards import add_change_section, change_section
    from hf_npeff.sharing.files import read_json
    from hf_npeff.weights.change_report import ChangeReport

    changed = ChangeReport.load(report.parent)
    base = read_json(folder / "adapter_config.json", None).get("base_model_name_or_path")
    add_change_section(published, change_section(changed.to_dict(), texts=texts), base)


def _numbers(components: str | None) -> list[int] | None:
    """Component numbers as the option gives them; None for all."""
    if components is None or components == "all":
        return None
    try:
        return [int(number) for number in components.split(",")]
    except ValueError:
        raise ValueError(f"--components takes all, or numbers such as 0,3,7, not {components!r}") from None
