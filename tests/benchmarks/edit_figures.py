"""The table and the figure of docs/languages.md, from what examples/05_take_a_language_out.py wrote.

    python -m tests.benchmarks.edit_figures runs/language/figures.json

It prints the table, keeps the figures in docs/studies/languages.json and draws docs/figures/languages.svg: SVG by hand,
so that one file has the colours of a light page and of a dark one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT = DOCS / "studies" / "languages.json"
_LABELS, _WIDTH, _ROW, _TOP = 230, 480, 26, 46
_STYLE = """\
text{font:12px system-ui,sans-serif;fill:#24292f}.axis{stroke:#d0d7de}.s0{fill:#0969da;stroke:#0969da}
.s1{fill:#bc4c00;stroke:#bc4c00}.s2{fill:#1a7f37;stroke:#1a7f37}.s3{fill:#8250df;stroke:#8250df}
.s4{fill:#6e7781;stroke:#6e7781}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.axis{stroke:#3d444d}.s0{fill:#58a6ff;stroke:#58a6ff}
.s1{fill:#f0883e;stroke:#f0883e}.s2{fill:#3fb950;stroke:#3fb950}.s3{fill:#bc8cff;stroke:#bc8cff}
.s4{fill:#9198a1;stroke:#9198a1}}"""


def dots(rows: Mapping[str, Mapping[str, float]], series: Sequence[str], ticks: Sequence[float], title: str) -> str:
    """An SVG with a line a row and a dot a value; values beyond the axis lie on its end."""

    def place(value: float) -> float:
        return _LABELS + _WIDTH * min(max((value - ticks[0]) / (ticks[-1] - ticks[0]), 0.0), 1.0)

    height = _TOP + _ROW * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LABELS + _WIDTH + 30} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
    ]
    x = 12
    for i, name in enumerate(series):
        parts.append(f'<circle class="s{i}" cx="{x}" cy="14" r="5"/><text x="{x + 10}" y="18">{escape(name)}</text>')
        x += 40 + 7 * len(name)  # about the width of a letter
    bottom = _TOP + _ROW * len(rows)
    for tick in ticks:
        x = place(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{_TOP - 14}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_LABELS + _WIDTH / 2}" y="{bottom + 33}" text-anchor="middle">{escape(title)}</text>')
    for row, (label, values) in enumerate(rows.items()):
        y = _TOP + _ROW * row
        parts.append(f'<text x="{_LABELS - 12}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line class="axis" x1="{_LABELS}" y1="{y}" x2="{_LABELS + _WIDTH}" y2="{y}"/>')
        for i, name in enumerate(series):
            if name in values:
                parts.append(f'<circle class="s{i}" cx="{place(values[name]):.1f}" cy="{y}" r="5" fill-opacity=".75"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def languages(figures: Mapping[str, Any]) -> str:
    """Gains of German, of Dutch, of the most changed of the other four languages, and of English news."""
    rows = {}
    for method, found in figures["methods"].items():
        gains = dict(found["gains"])
        shown = {name: gains.pop(name) for name in ("German", "Dutch", "English news")}
        rows[method] = shown | {"worst of the other four": max(gains.values())}
    series = ("German", "worst of the other four", "Dutch", "English news")
    return dots(rows, series, (0, 1, 2, 3, 4, 5, 6, 7), "change of cross-entropy on held-out articles, nats a token")


def table(figures: Mapping[str, Any]) -> str:
    """Markdown: cross-entropy before, and the gains of every method."""
    columns = list(figures["before"])
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        "| before (nats) | " + " | ".join(f"{figures['before'][name]:.2f}" for name in columns) + " |",
    ]
    for method, found in figures["methods"].items():
        lines.append(f"| {method} | " + " | ".join(f"{found['gains'][name]:+.2f}" for name in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Keep the figures, print the table, draw the figure."""
    figures = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    KEPT.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (DOCS / "figures" / "languages.svg").write_text(languages(figures), encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
