"""The parts that the sections of docs/benchmarks.md are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.benchmarks.measure import kept


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def image(path: str, text: str) -> str:
    return f"![{text}]({path})"


def machine_of(*names: str) -> str:
    found = dict.fromkeys(record["machine"] for name in names if (record := kept(name)))
    return "\n".join(f"*{line}*" for line in found)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:,.{digits}f}"
