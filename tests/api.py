"""Pages that are made from the code: docs/api.md, every public name, and the table of files in ARCHITECTURE.md.

python -m tests.api     renews both; tests/test_docs.py compares them with the code
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import hf_npeff

REPOSITORY = Path(__file__).resolve().parent.parent
MARK = "<!-- files -->\n"
HEAD = """# Reference

Everything that `hf_npeff` exports, made from the docstrings by `python -m tests.api`. The letters in shapes are those
of [ARCHITECTURE.md](../ARCHITECTURE.md). The examples after `>>>` are run by the tests. They share a tiny `model` with
its `tokenizer`, `dataset`, `analyzer`, `pefs`, `decomposition` and `direction`.
"""
WIDTH = 100
"""A signature that is longer has one parameter a line."""
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")
LISTS = ("Args", "Attributes", "Raises")


def pages() -> dict[Path, str]:
    """{path: the text that it should have}."""
    architecture = REPOSITORY / "ARCHITECTURE.md"
    before, _, after = architecture.read_text(encoding="utf-8").split(MARK)
    return {
        REPOSITORY / "docs" / "api.md": api_page(),
        architecture: before + MARK + table_of_files() + MARK + after,
    }


def table_of_files() -> str:
    """Each module of the package with the first sentence of its docstring, a table for each folder."""
    package = REPOSITORY / "hf_npeff"
    folders = [package, *sorted(path.parent for path in package.glob("*/__init__.py"))]
    tables = []
    for folder in folders:
        rows = [f"| `{folder.relative_to(REPOSITORY).as_posix()}/` | {summary(folder / '__init__.py')} |", "|---|---|"]
        paths = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        tables.append(
            "\n".join([*rows, *(f"| `{path.relative_to(package).as_posix()}` | {summary(path)} |" for path in paths)])
        )
    return "\n" + "\n\n".join(tables) + "\n\n"


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, in a cell."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return sentence_of(docstring).replace("|", "\\|")


def api_page() -> str:
    """The text of docs/api.md."""
    values = {name: getattr(hf_npeff, name) for name in hf_npeff.__all__}
    index = [f"- [`{name}`](#{name.lower()}): {first_sentence(value)}" for name, value in values.items()]
    shown: dict[Any, str] = {}
    parts = [HEAD, "\n".join(index)]
    for name, value in values.items():
        parts += [f"## {name}", fenced(heading(name, value)), *rendered(docstring(value))]
        for member, function in members(value) if inspect.isclass(value) else ():
            full = f"{name}.{member}"
            parts += [f"### {full}", fenced(heading(member, function))]
            original = getattr(function, "__func__", function)
            if original in shown:
                parts.append(f"As [`{shown[original]}`](#{anchor(shown[original])}).")
            else:
                parts += rendered(docstring(function))
                shown[original] = full
        if properties := [f"- {line}" for line in property_lines(value)]:
            parts += [f"### Properties of {name}", "\n".join(properties)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def docstring(value: Any) -> str:
    """The docstring as it is written, without a base class's in its place."""
    return inspect.cleandoc(value.__doc__ or "")


def first_sentence(value: Any) -> str:
    """Of the docstring."""
    return sentence_of(docstring(value))


def sentence_of(text: str) -> str:
    """The first sentence of a docstring."""
    paragraph = text.split("\n\n")[0].replace("\n", " ")
    return escaped(re.split(r"(?<=[.?!]) (?=[A-Z])", paragraph)[0])


def anchor(title: str) -> str:
    """The address that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def fenced(code: str, language: str = "text") -> str:
    """A block of code. Signatures are not marked as Python: nothing in them can be run."""
    return f"```{language}\n{code}\n```"


# Signatures -----------------------------------------------------------------------------------------------------------


def heading(name: str, value: Any) -> str:
    """`name(parameters) -> result`; an error class's bases instead."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"
    if inspect.isclass(value) and getattr(value, "_is_protocol", False):
        return f"class {name}(Protocol)"
    prefix = "class " if inspect.isclass(value) else ""
    signature = inspect.signature(value)
    words = list(parameters(signature))
    result = (
        "" if prefix or signature.return_annotation is signature.empty else f" -> {of(signature.return_annotation)}"
    )
    line = f"{prefix}{name}({', '.join(words)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{prefix}{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def parameters(signature: inspect.Signature) -> Iterator[str]:
    """Each parameter as it is written, with the bare `/` and `*` between them."""
    values = [each for each in signature.parameters.values() if each.name != "self"]
    starred = False
    for each in values:
        if each.kind is each.KEYWORD_ONLY and not starred:
            yield "*"
        starred |= each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        mark = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        annotation = "" if each.annotation is each.empty else f": {of(each.annotation)}"
        default = "" if each.default is each.empty else f"{' = ' if annotation else '='}{shown_default(each.default)}"
        yield f"{mark}{each.name}{annotation}{default}"


def of(annotation: Any) -> str:
    """An annotation as it is written in the source, where annotations are not evaluated."""
    if annotation is None or annotation is type(None):
        return "None"
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def shown_default(value: Any) -> str:
    """A default; a factory's is said with three dots, since it is another object every time."""
    if dataclasses._HAS_DEFAULT_FACTORY is value:  # type: ignore[attr-defined]
        return "..."
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # in double quotes, as in the source
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


# Members --------------------------------------------------------------------------------------------------------------


def members(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods that the package wrote, in the order of the source, inherited ones last; no hook of Trainer's."""
    seen: set[str] = set()
    for base in (base for base in cls.__mro__ if base.__module__.startswith("hf_npeff")):
        for name, value in vars(base).items():
            method = inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))
            if method and not name.startswith("_") and name not in seen and not hasattr(TrainerCallback, name):
                seen.add(name)
                yield name, getattr(cls, name)


def property_lines(cls: Any) -> Iterator[str]:
    """A line for each public property that the package wrote."""
    for base in (base for base in getattr(cls, "__mro__", ()) if base.__module__.startswith("hf_npeff")):
        for name, value in vars(base).items():
            if isinstance(value, property) and not name.startswith("_") and getattr(cls, name) is value:
                result = inspect.signature(value.fget).return_annotation if value.fget else inspect.Signature.empty
                kind = "" if result is inspect.Signature.empty else f" (`{of(result)}`)"
                text = docstring(value).replace("\n", " ")
                yield f"`{name}`{kind}: {escaped(text)}"


# Docstrings -----------------------------------------------------------------------------------------------------------


def rendered(text: str) -> Iterator[str]:
    """Markdown of a docstring in Google's style, a block at a time."""
    for title, body in sections(text):
        if title == "Example":
            yield fenced(body, "pycon")
        elif title in LISTS:
            items = re.split(r"\n(?=\S)", body)
            yield f"**{title}**"
            yield "\n".join(f"- {item_of(item)}" for item in items)
        elif title:
            yield f"**{title}** {escaped(body)}"
        else:
            yield escaped(body)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, body without its indent) of each section; a title of "" for what stands before the first."""
    titles = "|".join(SECTIONS)
    parts = re.split(rf"^({titles}):\n", text, flags=re.MULTILINE)
    if parts[0].strip():
        yield "", parts[0].strip()
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        yield title, inspect.cleandoc("\n" + body)


def item_of(item: str) -> str:
    """`name`: what it is, of an entry of Args, Attributes or Raises."""
    name, _, text = " ".join(line.strip() for line in item.splitlines()).partition(": ")
    return f"`{name}`: {escaped(text)}"


def escaped(text: str) -> str:
    """What is not code keeps its angle brackets and asterisks."""
    pieces = re.split(r"(`+[^`]*`+)", text)
    return "".join(p if i % 2 else re.sub(r"([<*])", r"\\\1", p) for i, p in enumerate(pieces))


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
