"""What every study writes: result.json, table.md, figure.svg, and for some studies a page."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_npeff.extras import load
from hf_npeff.sharing.files import finite, write_atomically
from hf_npeff.sharing.hub import shown_model

LARGE_RATIO = 10_000
"""From here on a KL ratio is only called large: the KL on others is a rounding error. Figures' axes end here."""


class StudyResult(ABC):
    """The result of a study: numbers for machines, a table and a figure for people."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""

    @abstractmethod
    def table(self) -> str:
        """The table, in Markdown."""

    @abstractmethod
    def draw(self, figure: Any) -> None:
        """Draw on an empty `matplotlib.figure.Figure`."""

    def page(self) -> str:
        """A page with the figure and the table, in Markdown; empty if the study has none."""
        return ""

    def write(self, folder: Path) -> None:
        """Write result.json, table.md and figure.svg, and README.md if there is a page.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "result.json", text.encode())
        write_atomically(folder / "table.md", (self.table() + "\n").encode())
        self.save_figure(folder / "figure.svg")
        if page := self.page():
            write_atomically(folder / "README.md", page.encode())

    def save_figure(self, path: Path) -> None:
        """Write the figure. The same result always gives the same file.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        matplotlib = load("matplotlib", "a study's figure")
        drawing = load("matplotlib.figure", "a study's figure")
        with matplotlib.rc_context({"svg.hashsalt": "hf_npeff", "font.size": 9}):
            figure = drawing.Figure(figsize=(8, 4.5), layout="constrained")  # inches: a page's width at 16:9
            self.draw(figure)
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def model_name(info: Mapping[str, Any]) -> str:
    """The name of the PEFs' model, without the path if it is a local folder."""
    model = info.get("model")
    return "rows made elsewhere" if model is None else shown_model(model)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; vertical bars in cells are escaped."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A number as the text of a cell; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: a cell of −0.00 would look like a loss


def ratio(value: float | None) -> str:
    """A KL ratio as the text of a cell. Where the KL on others is a rounding error, it is only known to be large."""
    return f"> {LARGE_RATIO:,.0f}" if value is not None and value >= LARGE_RATIO else number(value, 1)
