"""Commands from functions, options from dataclasses: the parts that all commands of `hf-npeff` share.

A parameter of a command that is annotated with a dataclass becomes one option for each field, described by the field's
line in the class's docstring. Every command takes `--config`, `--json` and `--debug`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import click
import typer
import yaml

from hf_npeff import __version__
from hf_npeff.errors import NPEFFError

if TYPE_CHECKING:
    from rich.console import RenderableType


_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_NEVER_REPLAYED = ("trust_remote_code",)
"""Not replayed: a run.yaml may be somebody else's, and they must not decide whose code is run."""
_CLEAR = (NPEFFError, ValueError, OSError, IndexError, ModuleNotFoundError)
"""Errors whose message is shown in one line, with exit code 1."""


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Attributes:
        values: the values that --json prints.
        shown: the text that is printed otherwise.
        pinned: settings that run.yaml records more precisely than they were given, such as a commit.
    """

    values: dict[str, Any]
    shown: RenderableType
    pinned: dict[str, Any] = field(default_factory=dict)


# Arguments that several commands take

Model = Annotated[str, typer.Argument(help="The model's id on the Hub, or its folder.")]
Data = Annotated[str, typer.Argument(help="A file (.jsonl, .csv, .parquet, .txt), or a data set's id on the Hub.")]
PEFsArgument = Annotated[str, typer.Argument(help="PEFs: a folder, or a repository on the Hub.")]
DecompositionArgument = Annotated[str, typer.Argument(help="A decomposition: a folder, or a repository on the Hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
MaybeOutput = Annotated[Path | None, typer.Option("--output", "-o", help="A folder to write.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="PEFs of other data whose predictions should stay the same: a folder, or a repository on the Hub."
    ),
]
AdapterKind = Annotated[Literal["lora", "shira", "delta"], typer.Option(help="Kind of adapter.")]
BatchSize = Annotated[int, typer.Option(help="How many examples a forward pass takes.")]


# From functions to commands


def attribute_docs(cls: type) -> dict[str, str]:
    """{field: its text in the `Attributes:` section of the class or a base class}."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        entries = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", section, re.MULTILINE)
        docs |= {name: " ".join(text.split()) for name, text in entries}
    return docs


def option_fields(cls: type) -> list[Field[Any]]:
    """The fields of a dataclass that are options of the command line."""
    return [field for field in fields(cls) if field.metadata.get("option", True)]


def _number_or_word(hint: Any) -> Callable[[Any], Any] | None:
    """A parser for options that may be a number or one of some words; None for other options."""
    kinds = get_args(hint)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    number = next((kind for kind in kinds if kind in (int, float)), None)
    if not words or number is None:
        return None

    def parse(value: Any) -> Any:
        if value is None or value in words:
            return value
        try:
            return number(value)
        except ValueError:
            called = "a whole number" if number is int else "a number"
            raise typer.BadParameter(f"expected {called} or {' or '.join(words)}, but got {value!r}") from None

    parse.__name__ = " or ".join([{int: "integer", float: "number"}[number], *words])  # shown in the help
    return parse


def _options_of(cls: type) -> Iterator[inspect.Parameter]:
    docs, hints = attribute_docs(cls), get_type_hints(cls)
    kind: Any
    panel = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0].rstrip(".")
    for setting in option_fields(cls):
        kind, default, text = hints[setting.name], setting.default, docs[setting.name]
        parse = _number_or_word(kind)
        if kind in (tuple[int, ...], tuple[float, ...]):
            kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[arg-type,misc]
            text += " Repeat the option for a list."
        elif tuple[str, ...] in get_args(kind):
            kind, default = list[str] | None, None if default is None else [default]
            text += " Repeat the option for a list."
        if re.match(r"\w\w", text):  # else a symbol comes first
            text = text[0].upper() + text[1:]
        if parse is not None:
            kind = Any
        described = Annotated[kind, typer.Option(help=text, rich_help_panel=panel, parser=parse)]
        yield inspect.Parameter(setting.name, _BY_NAME, default=default, annotation=described)


def _gathered(cls: type, values: dict[str, Any]) -> Any:
    """An object of the dataclass, from the options of its fields."""
    given = {setting.name: values[setting.name] for setting in option_fields(cls)}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = value[0] if len(value) == 1 and not _is_tuple(cls, name) else tuple(value) or None
    return cls(**given)


def _is_tuple(cls: type, name: str) -> bool:
    """Whether a field is a tuple, possibly an optional one."""
    return get_type_hints(cls)[name] == tuple[float, ...]


def _replay(context: typer.Context, path: Path | None) -> Path | None:
    """Use the settings of a run.yaml as the defaults of this command; options on the command line override them."""
    if path is None or context.resilient_parsing:
        return path
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        command, settings = content["command"], dict(content["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} is not a run.yaml written by hf-npeff ({type(error).__name__})") from error
    # A run.yaml may name the function, with underscores, of a command whose name has dashes.
    if str(command).replace("_", "-") != str(context.info_name).replace("_", "-"):
        raise typer.BadParameter(
            f"{path} was written by the command {command!r}; run `hf-npeff {command} --config {path}`"
        )
    if unknown := sorted(set(settings) - {parameter.name for parameter in context.command.params}):
        raise typer.BadParameter(f"{path} has settings that {command} does not have: {', '.join(map(str, unknown))}")
    context.default_map = {name: value for name, value in settings.items() if name not in _NEVER_REPLAYED}
    return path


_COMMON = {
    "config": (
        Annotated[
            Path | None,
            typer.Option(
                help="Use the settings of an earlier run, from its run.yaml.", is_eager=True, callback=_replay
            ),
        ],
        None,
    ),
    "as_json": (Annotated[bool, typer.Option("--json", help="Print JSON.")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")], False),
}


def command(function: Callable[..., Result | None]) -> Callable[..., None]:
    """Make a function a command; its docstring is the help.

    The returned `Result` is printed. If the function has an `output`, run.yaml is written there with all settings.
    Dataclasses that have a field with the same name, such as `seed`, share one option.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            groups[parameter.name] = kind
            known = {option.name for option in parameters}
            parameters += [option for option in _options_of(kind) if option.name not in known]
        else:
            parameters.append(parameter.replace(kind=_BY_NAME))
    for name, (kind, default) in _COMMON.items():
        parameters.append(inspect.Parameter(name, _BY_NAME, default=default, annotation=kind))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        as_json, debug = values.pop("as_json"), values.pop("debug")
        del values["config"]
        settings = dict(values)
        try:
            grouped = {name: _gathered(cls, values) for name, cls in groups.items()}
            for name in {option.name for cls in groups.values() for option in option_fields(cls)}:
                del values[name]
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = function(**values, **grouped)
            if result is None or os.environ.get("RANK", "0") != "0":
                return
            if settings.get("output") is not None and not settings.get("dry_run"):
                _write_run(settings["output"], _name_of_command(function), {**settings, **result.pinned})
        except _CLEAR as error:
            if debug:
                traceback.print_exc()
            else:
                typer.echo(f"error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            raise typer.Exit(1) from None
        _show(result, as_json)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _name_of_command(function: Callable[..., Any]) -> str:
    """The name of the command, which is compared when its run.yaml is replayed."""
    context = click.get_current_context(silent=True)
    return context.info_name if context is not None and context.info_name else function.__name__


def _write_run(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    kept = {k: v for k, v in settings.items() if v is not None and k not in _NEVER_REPLAYED}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}
    content = {"hf_npeff": __version__, "command": name, "settings": plain}
    _write(folder / "run.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _show(result: Result, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(_json(result.values))
    else:
        Console(markup=False, highlight=False).print(result.shown)


def _json(values: Mapping[str, Any]) -> str:
    from hf_npeff.sharing.files import finite

    return json.dumps(finite(values), indent=2, ensure_ascii=False)


def write_result(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file completely or not at all."""
    _write(path, _json(values) + "\n")


def _write(path: Path, text: str) -> None:
    from hf_npeff.sharing.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> RenderableType:
    """A table of plain text; markup in cells is shown as it is."""
    from rich.table import Table
    from rich.text import Text

    from hf_npeff.sharing.markdown import plain

    made = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        # A cell of any sensible length is shown whole
        made.add_row(*(Text("\n".join(plain(line, 10_000) for line in str(cell).split("\n"))) for cell in row))
    return made
