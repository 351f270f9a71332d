"""One table over the results of several data sets, from the files that the studies wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_npeff.studies.result import markdown, number

_COLUMNS = ("mean AUROC", "found", "at once", "purity", "stability", "KL ratio", "own minus others", "moved", "seconds")


def overview(folders: Mapping[str, Path]) -> str:
    """A table with a row for each method; every cell has the values on the data sets, in their order.

    Args:
        folders: {data set: folder with factors/result.json and selectivity/result.json}.

    Raises:
        ValueError: if there are no data sets.
        FileNotFoundError: if a study has not been run.
    """
    if not folders:
        raise ValueError("the table needs at least one data set")
    cells = [_cells(folder) for folder in folders.values()]
    methods = dict.fromkeys(name for row in cells for name in row)
    rows = []
    for method in methods:
        columns = [[row[method][i] if method in row else "–" for row in cells] for i in range(len(_COLUMNS))]
        rows.append([method, *(" · ".join(column) for column in columns)])
    return markdown(["method", *_COLUMNS], rows)


def _cells(folder: Path) -> dict[str, list[str]]:
    """{method: a cell for every column} of one data set."""
    scores, selectivity = (_result(folder / study) for study in ("factors", "selectivity"))
    return {row["method"]: _row(row, scores, selectivity) for row in scores["methods"]}


def _row(row: Mapping[str, Any], scores: Mapping[str, Any], selectivity: Mapping[str, Any]) -> list[str]:
    found_at = scores["config"]["found_at"]
    n_found = sum(score["auroc"] >= found_at for score in row["attributes"])
    switched = [r for r in selectivity["rows"] if r["method"] == row["method"]]
    moved = [r["moved"] for r in switched if r["moved"] is not None]
    own = statistics.mean(r["top"] - r["others"] for r in switched) if switched else None
    return [
        number(row["mean_auroc"]),
        f"{n_found} of {len(row['attributes'])}",
        f"{number(row['at_once'], 2)} of {number(row['possible'], 2)}",
        number(row["purity"], 2),
        number(row["stability"], 2),
        number(selectivity["medians"].get(row["method"]), 1),
        number(own, 2),
        f"{statistics.median(moved):.0%}" if moved else "–",
        number(row["seconds"], 0),
    ]


def _result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return content
