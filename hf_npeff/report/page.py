"""One self-contained HTML file of a decomposition, and the folder of a static Space that shows it."""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

from hf_npeff import __version__
from hf_npeff.report.data import Extras, PageData, gather
from hf_npeff.report.examples import Layout
from hf_npeff.report.pack import pack
from hf_npeff.sharing.files import write_atomically
from hf_npeff.sharing.hub import is_hub_id, push_folder, shown_model

if TYPE_CHECKING:
    from hf_npeff.decomposition.decomposition import Decomposition

_FILES = Path(__file__).parent / "page_files"
_SCRIPTS = (
    "data", "dom", "charts", "list", "names", "worth", "overview", "shading", "panels", "certificate", "effect",
    "component", "example", "map", "comparison", "training", "change", "about", "main",
)  # fmt: skip


def render(data: PageData, title: str) -> str:
    """The page as HTML.

    Its content security policy allows the script and the style that are in it, by their hashes, and no request at all.

    Args:
        data: what it holds.
        title: the title of the page; any text.
    """
    script = "\n".join((_FILES / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    style = (_FILES / "style.css").read_text(encoding="utf-8")
    assert "</script" not in script and "</style" not in style
    template = Template((_FILES / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(_line(title)),
        brand=html.escape(_line(title).rpartition("/")[2]),
        version=__version__,
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        data=pack(data.facts, data.arrays),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _line(text: str) -> str:
    """On one line, without what HTML cannot hold."""
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())


def title_of(decomposition: Decomposition) -> str:
    """By the model's name."""
    model = decomposition.info.get("model")
    return "Components" if model is None else f"Components of {shown_model(model)}"


def write(
    decomposition: Decomposition,
    path: str | os.PathLike[str],
    *,
    extras: Extras | None = None,
    texts: bool = True,
    layout: Layout | None = "tsne",
    title: str | None = None,
    force: bool = False,
) -> Path:
    """Write the page of a decomposition as one HTML file.

    Args:
        decomposition: what it shows.
        path: the path of the file.
        extras: further results on the decomposition.
        texts: whether the page has texts.
        layout: how the map of examples is computed; None leaves it out.
        title: the title of the page; by default it has the model's name.
        force: overwrite an existing file.

    Returns:
        The path.

    Raises:
        FileExistsError: if `path` exists and `force` is not set.
        IsADirectoryError: if `path` is a folder.
        ModuleNotFoundError: if the map needs scikit-learn, which is not installed.
        ValueError: if the extras do not fit the decomposition.
    """
    target = Path(path).expanduser()
    check_free(target, force)
    data = gather(decomposition, extras or Extras(), texts=texts, layout=layout)
    content = render(data, title or title_of(decomposition)).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)
    return target


def check_free(path: Path, force: bool) -> None:
    """Check that a path is free, or may be overwritten.

    Raises:
        FileExistsError: if it exists and `force` is false.
        IsADirectoryError: if it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file to write, such as {path / 'index.html'}")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another path, or overwrite it with force=True (--force)")


def write_space(folder: Path, page: Path, decomposition: Decomposition, title: str | None = None) -> None:
    """The folder of a static Space: the page as index.html, and README.md with what the Hub reads of it.

    Args:
        folder: the folder; it is created if it is missing.
        page: the written page.
        decomposition: for the model's name.
        title: the title of the Space.
    """
    model = decomposition.info.get("model")
    settings: dict[str, Any] = {
        "title": _line(title or title_of(decomposition))[:80],
        "emoji": "🧭",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "static",
        "pinned": False,
        "tags": ["npeff", "interpretability"],
    }
    if model is not None and is_hub_id(model):
        settings["models"] = [model]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", page.read_bytes())
    write_atomically(folder / "README.md", _space_card(settings).encode())


def _space_card(settings: Mapping[str, Any]) -> str:
    header = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\nThe components of a model, found with hf_npeff; everything is in index.html.\n"


def push_space(folder: Path, repo_id: str, **where: Any) -> str:
    """Publish such a folder as a static Space.

    Args:
        folder: from `write_space`.
        repo_id: user/name.
        **where: arguments of `hub.push_folder`.

    Returns:
        The address of the commit.

    Raises:
        OSError: if the upload is refused or the Hub cannot be reached.
        ValueError: if the id is malformed.
    """
    where.setdefault("commit_message", "Upload components")
    return push_folder(folder, repo_id, repo_type="space", **where)
