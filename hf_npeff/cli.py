"""The command line, `hf-npeff`, with a command for each stage. Heavy libraries are imported inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_npeff import __version__
from hf_npeff.commands import acting, changing, editing, exporting, looking, making, publishing, reporting, studying

app = typer.Typer(
    name="hf-npeff",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = (
    making.demo,
    making.compute,
    making.decompose,
    looking.components,
    looking.explain,
    looking.compare,
    acting.perturb,
    editing.edit,
    changing.diff,
    changing.explain_adapter,
    reporting.report,
    exporting.export,
    publishing.push,
)
for _command in _COMMANDS:  # in the order of the help
    app.command(_command.__name__.replace("_", "-"))(_command)
study = typer.Typer(no_args_is_help=True, help="Compare NPEFF with other methods, and study what it finds.")
for _study in studying.STUDIES:
    study.command(_study.__name__)(_study)
app.add_typer(study, name="study")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Which heuristics does a Hugging Face model use, on which inputs, and what if one is switched off?

    The usual order is `compute`, `decompose`, `components`, `perturb`, `report`, `push`; or `compute`, `edit`. `diff`
    and `explain-adapter` show what a change did. `demo` shows everything on a small model.
    """


def main() -> None:
    """The entry point of `hf-npeff` and of `python -m hf_npeff`."""
    app(prog_name="hf-npeff")
