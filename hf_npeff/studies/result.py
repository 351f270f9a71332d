"""What every study leaves behind: result.json, table.md and figure.svg."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_npeff.files import write_atomically


class StudyResult(ABC):
    """A study's outcome: numbers for machines, a table and a figure for people."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""

    @abstractmethod
    def table(self) -> str:
        """The table, in Markdown."""

    @abstractmethod
    def draw(self, figure: Any) -> None:
        """Draw on an empty `matplotlib.figure.Figure`."""

    def write(self, folder: Path) -> None:
        """Write result.json, table.md and figure.svg.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "result.json", text.encode())
        write_atomically(folder / "table.md", (self.table() + "\n").encode())
        self.save_figure(folder / "figure.svg")

    def save_figure(self, path: Path) -> None:
        """Write the figure; the same result gives the same file.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "figures are drawn by matplotlib, which is not installed; run pip install 'hf-npeff[eval]'",
                name="matplotlib",
            ) from error
        with matplotlib.rc_context({"svg.hashsalt": "hf_npeff", "font.size": 9}):
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            self.draw(figure)
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def model_name(info: Mapping[str, Any]) -> str:
    """The model of PEFs, without the path of a local folder."""
    name = str(info.get("model") or "rows made elsewhere")
    return Path(name).name if Path(name).is_absolute() else name


def finite(value: Any) -> Any:
    """A value as JSON has it: numbers that are none are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; bars in cells are escaped, so that no cell opens another."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A number for a cell; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"
