"""One page over the fair readings of several data sets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_npeff.studies.fair import FairResult
from hf_npeff.studies.result import StudyResult, markdown, number

_PREDICTABLE = "predictable from the output"
_GROUPS = {
    "NPEFF": ("NPEFF", "NPEFF, power 0.5", "NPEFF, power 0.25"),
    "gradient clustering": ("gradient clustering",),
    "clustering of all rows": ("gradient clustering, all rows",),
    "Gradient Atoms": ("Gradient Atoms", "Gradient Atoms, not whitened"),
    "an autoencoder of gradients": ("autoencoder of gradients",),
    "NMF on PEFs": ("NMF on PEFs",),
    "dictionary learning on PEFs": ("dictionary learning on PEFs",),
    "SAE": ("SAE",),
    "k-means of hidden states": ("activations, k-means",),
    "NMF of hidden states": ("activations, NMF",),
    "random directions": ("random directions",),
}
"""Methods that are compared as one, by their best reading over the data sets."""


class FairOverview(StudyResult):
    """Fair readings of several data sets.

    Args:
        results: {data set: its result}.
        command: the command that made them.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, results: Mapping[str, FairResult], command: str):
        if not results:
            raise ValueError("a page needs the results of at least one data set")
        self.results = dict(results)
        self.command = command

    @classmethod
    def read(cls, path: Path) -> FairOverview:
        """Read the result.json that `write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls({k: FairResult.from_dict(v) for k, v in content["data"].items()}, content["command"])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        data = {name: result.to_dict() for name, result in self.results.items()}
        return {"study": "fair", "command": self.command, "data": data}

    def rows(self) -> list[str]:
        """The methods and readings, sorted by `mean`, the best first."""
        names = next(iter(self.results.values())).rows
        return sorted(names, key=lambda row: -self.mean(row))

    def mean(self, row: str) -> float:
        """The mean over the data sets of the mean AUROC on predictable attributes (on all, if none is)."""
        each = [r.mean(row, _PREDICTABLE if r.kinds()[_PREDICTABLE] else None) for r in self.results.values()]
        return statistics.mean(value for value in each if value is not None)

    def table(self) -> str:
        """A table with a row for each method and reading; every cell has the values of the data sets in their order."""
        body = []
        for row in self.rows():
            cells: list[list[float | None]] = []
            for result in self.results.values():
                values = [result.mean(row, kind) for kind in result.kinds()]
                values += [result.mean(row, None, "layer by attribute")]
                cells.append(values + [result.rows[row][k] for k in ("shuffled", "random weights", "stability")])
            body.append([row, *(" · ".join(number(v, 2) for v in column) for column in zip(*cells, strict=True))])
        header = ["method, reading", "predictable from the output", "not predictable", "all, layer by attribute",
                  "shuffled", "random weights", "stability"]  # fmt: skip
        return markdown(header, body)

    def curve(self) -> str:
        """The splitting curve of every data set."""
        body = []
        for name, result in self.results.items():
            for p in result.curve:
                figures = [number(p[k], 2) for k in ("explained", "coefficients", "alignments", "stability")]
                body.append([name.replace("_", " "), p["components"], p["distinct"], *figures])
        header = ["data", "components", "distinct", "explained", "AUROC, coefficients", "AUROC, alignments",
                  "stability"]  # fmt: skip
        return markdown(header, body)

    def draw(self, figure: Any) -> None:
        """Mean AUROC on predictable attributes and on the others, with a panel for each data set."""
        order = list(reversed(self.rows()))
        for panel, (name, result) in enumerate(self.results.items()):
            axes = figure.add_subplot(1, len(self.results), panel + 1)
            for place, row in enumerate(order):
                for kind, marker in zip(result.kinds(), ("o", "x"), strict=True):
                    value = result.mean(row, kind)
                    if value is not None:
                        color = "C0" if row.startswith("NPEFF") else "gray"
                        axes.plot([value], [place], marker, color=color, markersize=3)
            axes.set_yticks(range(len(order)), order if panel == 0 else [], fontsize=5)
            axes.set(title=name.replace("_", " "), xlabel="AUROC (dots: predictable from the output)", xlim=(0.4, 1.0))

    def verdict(self) -> str:
        """Which method is best, which place NPEFF has, and a table: by how much NPEFF is ahead of each other method."""
        order = self.rows()
        best: dict[str, str] = {}
        for row in reversed(order):  # so that the best of each stays
            best |= {label: row for label, methods in _GROUPS.items() if row.rpartition(", ")[0] in methods}
        ours = best.pop("NPEFF")
        sentences = (
            f"The best on attributes that can be predicted from the model's output is *{order[0]}*, with a mean AUROC "
            f"of {number(self.mean(order[0]), 2)} over the data sets. NPEFF's best reading is *{ours}*, with "
            f"{number(self.mean(ours), 2)}: place {order.index(ours) + 1} of {len(order)} methods and readings.\n\n"
            f"The table compares it with the best reading of every other method: the AUROC of NPEFF minus that of the "
            "other, the mean over the attributes with its 95% interval. NPEFF is ahead where the difference is bold "
            "and behind where it is in italics; elsewhere the interval contains 0."
        )
        compared = {name: result for name, result in self.results.items() if result.kinds()[_PREDICTABLE]}
        header = ["best reading", "AUROC"]
        header += [f"{n.replace('_', ' ')} ({len(r.kinds()[_PREDICTABLE])} attributes)" for n, r in compared.items()]
        body = [
            [row, number(self.mean(row), 2), *(_lead(result, ours, row) for result in compared.values())]
            for row in sorted(best.values(), key=order.index)
        ]
        return f"{sentences}\n\n{markdown(header, body)}"

    def page(self) -> str:
        """The page that `write` leaves as README.md."""
        reading = _READING.format(predictable_at=next(iter(self.results.values())).config.predictable_at)
        described = []
        for name, result in self.results.items():
            listed = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in result.kinds().items())
            described.append(f"- **{name.replace('_', ' ')}**, {result.facts['examples']} examples. {listed}.")
        return (
            "# Fair readings and controls\n\n![AUROC](figure.svg)\n\n"
            f"{self.verdict()}\n\nMade by `{self.command}`; every cell has the values on "
            f"{', '.join(name.replace('_', ' ') for name in self.results)}.\n\n{self.table()}\n\n"
            f"How NPEFF changes with the number of components:\n\n{self.curve()}\n\n{reading}\n"
            + "\n".join(described)
            + "\n"
        )


def _lead(result: FairResult, ours: str, other: str) -> str:
    """A row's lead over another on predictable attributes; bold if its 95% interval is above 0, italic if below."""
    mean, low, high = result.difference(ours, other, _PREDICTABLE)
    mark = "**" if low > 0 else "*" if high < 0 else ""
    return f"{mark}{number(mean, 2)}{mark} ({number(low, 2)} to {number(high, 2)})"


_READING = """How to read it:

- **Predictable from the output**: a logistic regression on the model's log-probabilities predicts the attribute with
  an AUROC of at least {predictable_at:g} on held-out examples. **Not predictable**: all other attributes. NPEFF sees
  how predictions depend on weights, so it claims to find only predictable attributes. A predictable attribute need not
  change the output. For attributes that do, see [minimal pairs](../minimal_pairs/README.md), where one factor is
  changed and the KL is measured.
- Features and layers are chosen on one half of the examples and measured on the other half. Hidden states are read at
  the layer that is best for all attributes; **layer by attribute** reads them at the best layer for each attribute.
- The best reading of each method is chosen on these same figures, for all methods alike. Intervals are bootstraps over
  the attributes of a data set. The attributes are not independent of each other, and there is one split and one
  fine-tuned model.
- A **competing** reading scores all features of an example together, so that they share what there is to explain. An
  **alone** reading scores every feature by itself.
- **Shuffled**: each example has the attributes of another one. **Random weights**: the same architecture before
  training, fitted and measured in the same way. A method that does nearly as well there has found a property of the
  data, not something that the model has learned. **Random directions** are random combinations of the rows, read in
  the same way as components.
- **Stability**: the mean |correlation| of matched features between two seeds. **Distinct**: the number of groups of
  components; two components with |cosine| of at least 0.9 are in the same group.
"""
