"""Links between the repository's pages lead to files and headings that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them: lower case, no punctuation, hyphens for blanks, numbered repeats."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        repeats = sum(name == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", name) is not None for name in found)
        found.add(f"{anchor}-{repeats}" if anchor in found else anchor)
    return found


def broken_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        other = page.parent / path if path else page
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in headings(other)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """Oracle: the file system, and the headings of the page that a link names."""
    assert list(broken_links(page)) == []


def test_a_link_that_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    """Planted: a missing file and a missing heading, beside links that are right."""
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# The α of `x`, [y](z)\n```\n# no heading\n```\n## Twice\n## Twice\n", encoding="utf-8")
    right = "[a](other.md#the-α-of-x-y) [b](other.md#twice-1) [c](https://x.y/#z) [d](other.md)"
    page.write_text(f"{right} [e](gone.md) [f](other.md#no-heading) [g](#gone)\n", encoding="utf-8")
    assert list(broken_links(page)) == ["gone.md", "other.md#no-heading", "#gone"]
