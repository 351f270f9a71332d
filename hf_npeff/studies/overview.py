"""One table over the results of several data sets, from the files that the studies wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_npeff.studies.measures import bootstrap_interval
from hf_npeff.studies.result import markdown, number, ratio

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


def differences(folders: Mapping[str, Path], ours: str) -> str:
    """A table of how far one method is ahead of each other one, with 95% intervals.

    The mean AUROC is compared on the attributes of each data set, *own minus others* on the switched attributes of all
    data sets together, with attributes paired. A method that a data set lacks has a dash there. Intervals are
    bootstraps over attributes.

    Args:
        folders: as in `overview`.
        ours: the name of the method that is compared with the others.

    Raises:
        ValueError: if a data set lacks that method.
        FileNotFoundError: if a study has not been run.
    """
    aurocs, own = zip(*(_by_attribute(folder) for folder in folders.values()), strict=True)
    if any(ours not in scores for scores in (*aurocs, *own)):
        raise ValueError(f"{ours!r} is to be compared with the others, but a data set lacks it")
    rows = []
    for method in dict.fromkeys(name for scores in aurocs for name in scores if name != ours):
        cells = [_ahead([scores], ours, method, 3) for scores in aurocs]
        cells.append(_ahead([scores for scores in own if method in scores], ours, method, 2))
        rows.append([method, *cells])
    names = [f"AUROC, {name.replace('_', ' ')}" for name in folders]
    return markdown([f"{ours} is ahead of", *names, "own minus others, nats"], rows)


def _by_attribute(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """{method: {attribute: AUROC}} and {method: {attribute: own minus others}} of one data set."""
    scores, selectivity = (_result(folder / study) for study in ("factors", "selectivity"))
    found = {row["method"]: {a["attribute"]: a["auroc"] for a in row["attributes"]} for row in scores["methods"]}
    own: dict[str, dict[str, float]] = {}
    for row in selectivity["rows"]:
        own.setdefault(row["method"], {})[row["attribute"]] = row["top"] - row["others"]
    return found, own


def _ahead(scores: Sequence[Mapping[str, Mapping[str, float]]], ours: str, other: str, digits: int) -> str:
    values = [each[ours][a] - b for each in scores if other in each for a, b in each[other].items()]
    if not values:
        return number(None)
    low, high = bootstrap_interval(torch.tensor(values, dtype=torch.float64))
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


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
        ratio(selectivity["medians"].get(row["method"])),
        number(own, 2),
        f"{statistics.median(moved):.0%}" if moved else "–",
        number(row["seconds"], 0),
    ]


def _result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return content
