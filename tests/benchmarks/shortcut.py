"""The table and the figure of docs/shortcut.md, from what examples/07_take_a_shortcut_out.py wrote.

    python -m tests.benchmarks.shortcut runs/shortcut/figures.json

It prints the tables, keeps the figures in docs/studies/shortcut.json and draws docs/figures/shortcut.svg, which follows
the reader's choice of light or dark.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
CELLS = ("misleads", "helps", "all")
TASKS = ("planted", "names")
"""Those of the example, in the order of the page."""
ORDER = (
    "as trained", "edit", "edit, rank 4", "last layer", "LEACE", "component", "autoencoder", "fine-tuned on 4",
    "fine-tuned on 16", "fine-tuned on 64", "fine-tuned on 256",
)  # fmt: skip
STYLE = (
    "text{font:12px sans-serif;fill:#222}.g{stroke:#ddd}.misleads{fill:#c8553d}.helps{fill:#1f5fa8}"
    "@media (prefers-color-scheme:dark){text{fill:#ddd}.g{stroke:#444}.misleads{fill:#f0876f}.helps{fill:#7fb2ea}}"
)
LEFT, RIGHT, ROW, LOWEST = 190, 640, 22, 0.2


Rows = dict[str, dict[str, list[float | None]]]
"""{what was tried: {cell: accuracy of every seed, None where it was not tried}}."""


def rows_of(seeds: dict[str, dict[str, Any]], split: str | None = None) -> Rows:
    """What was tried for any of the seeds; on the test, or on the split of that name."""
    scores = [
        {name: cells if split is None else cells.get(split, {}) for name, cells in measured(s)} for s in seeds.values()
    ]
    rows = {name: {cell: [s.get(name, {}).get(cell) for s in scores] for cell in CELLS} for name in ORDER}
    return {name: row for name, row in rows.items() if any(v is not None for values in row.values() for v in values)}


def measured(seed: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was tried for a seed, with its accuracies."""
    return [(name, seed[name]) for name in ORDER if name in seed]


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Every table of the page: of each task, and of the planted one on the split that was probed."""
    rows = {task: rows_of(figures[task]) for task in TASKS if task in figures}
    if "planted" in figures:
        rows["planted, same split"] = rows_of(figures["planted"], "same split")
    return {name: table(each) for name, each in rows.items() if each}


def table(rows: Rows) -> str:
    """Markdown: every seed's accuracy."""
    lines = ["| | misleads | helps | all |", "|---|---|---|---|"]
    for name, cells in rows.items():
        shown = [" / ".join("–" if value is None else f"{value:.3f}" for value in cells[cell]) for cell in CELLS]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def drawing(tasks: dict[str, Rows]) -> str:
    """One dot for every seed where the shortcut misleads and where it helps."""
    parts, y = [], 18

    def x(value: float) -> float:
        return LEFT + (max(value, LOWEST) - LOWEST) / (1 - LOWEST) * (RIGHT - LEFT)

    for task, rows in tasks.items():
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(task)}</text>')
        top = y + 6
        for name, cells in rows.items():
            y += ROW
            parts.append(f'<text x="20" y="{y}">{escape(name)}</text>')
            for cell in ("misleads", "helps"):
                parts += [
                    f'<circle class="{cell}" cx="{x(value):.1f}" cy="{y - 4}" r="4" fill-opacity=".75"/>'
                    for value in cells[cell]
                    if value is not None
                ]
        for tick in range(2, 11, 2):
            at = x(tick / 10)
            parts.insert(0, f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{y + 6}"/>')
            parts.append(f'<text x="{at:.1f}" y="{y + 20}" text-anchor="middle">{tick / 10:.1f}</text>')
        y += 46
    legend = "".join(
        f'<circle class="{cell}" cx="{LEFT + k * 190}" cy="{y - 14}" r="4"/>'
        f'<text x="{LEFT + 10 + k * 190}" y="{y - 10}">where the shortcut {cell}</text>'
        for k, cell in enumerate(("misleads", "helps"))
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 670 {y}" width="670" height="{y}">'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}{legend}</svg>\n"


def main() -> None:
    kept = DOCS / "studies" / "shortcut.json"
    figures = json.loads(kept.read_text(encoding="utf-8")) | json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name, lines in tables(figures).items():
        print(f"{name}\n\n{lines}\n")
    kept.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    drawn = drawing({task: rows_of(figures[task]) for task in TASKS if task in figures})
    (DOCS / "figures" / "shortcut.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
