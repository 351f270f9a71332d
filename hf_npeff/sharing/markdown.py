"""Values as Markdown, YAML and Python code for cards. What users bring is escaped, so that it shows as plain text."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

CELL, TITLE = 120, 80
"""Characters of a table's cell, and of a value within a title. Chosen: two lines, and one."""


def plain(value: object, length: int = CELL) -> str:
    """A value on one line: white space joined, invisible characters dropped, cut to `length` characters."""
    spaced = "".join(" " if c.isspace() else c for c in str(value))
    visible = "".join(c for c in spaced if unicodedata.category(c)[0] != "C")
    text = " ".join(visible.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def escaped(value: object, length: int = CELL) -> str:
    """A value as Markdown that shows exactly its text: no markup, table cell, link, mention, formula or HTML in it."""
    text = re.sub(r"([\\`*{}\[\]|#~!$^]|(?<!\w)_|_(?!\w))", r"\\\1", plain(value, length))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"(?i)(://|@|www(?=\.))", _not_linked, text)
    text = re.sub(r"^([-+=])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def _not_linked(match: re.Match[str]) -> str:
    """Readers make links of bare addresses, some even after escaping; an empty comment inside keeps them from it."""
    return f"{match[0][0]}<!-- -->{match[0][1:]}" if match[0] != "@" else "@<!-- -->"


def literal(value: str) -> str:
    """A string in Python code."""
    return json.dumps(value) if value.isascii() else ascii(value)


def front_matter(values: Mapping[str, Any]) -> str:
    """The metadata of a card between its lines of dashes; empty values are left out."""
    kept = {name: value for name, value in values.items() if value not in (None, "", [], ())}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def percent(share: float | None) -> str:
    """A share for people."""
    return "an unknown share" if share is None or not math.isfinite(share) else f"{share:.1%}"


def number(value: object) -> str:
    """A number to three digits; a dash if there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Lines of a table whose cells are Markdown already."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
