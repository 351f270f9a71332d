"""One component of a decomposition: its top examples, and on how much of the data it is active."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.sharing.markdown import plain
from hf_npeff.sharing.protocols import DecompositionLike

ACTIVE_SHARE = 0.05
"""A component is active on an example if its coefficient is more than this share of the sum of the example's
coefficients.
Chosen: reports depend on it (on how many examples a component is active, which examples are the others), but no fit
    does."""
_REPR_EXAMPLES, _REPR_EXAMPLE = 3, 40
"""The number of examples in a repr, and the characters of each. Chosen: they fit into a line."""


def active_examples(coefficients: Tensor) -> Tensor:
    """(n, r) bool: on which examples each component is active, from W (n, r)."""
    return coefficients > ACTIVE_SHARE * coefficients.sum(1, keepdim=True)


def example_lines(
    shown: Sequence[Any], predictions: Sequence[Any] | None, as_text: Callable[[Any], str] = str
) -> list[str]:
    """Examples, each on a line, with the model's prediction if it is known.

    Args:
        shown: texts or ids.
        predictions: the model's predictions in words; None if they were not kept.
        as_text: value → text.
    """
    lines = [as_text(value) for value in shown]
    known = predictions or [None] * len(lines)
    return [line if p in (None, "") else f"{line} → {as_text(p)}" for line, p in zip(lines, known, strict=True)]


@dataclass(frozen=True)
class TopExamples:
    """The examples with a component's largest coefficients, descending.

    Attributes:
        indices: positions among the analysed examples.
        coefficients: the coefficient W of each.
        ids: their ids.
        texts: their texts if a text column was kept, otherwise None.
        columns: {name: values} of all kept columns.
    """

    indices: list[int]
    coefficients: list[float]
    ids: list[str]
    texts: list[str] | None
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.indices)

    def lines(self, as_text: Callable[[Any], str] = str) -> list[str]:
        """The examples, each on a line: its text or id, with the prediction if it was kept."""
        return example_lines(self.texts or self.ids, self.columns.get("prediction"), as_text)

    def __repr__(self) -> str:
        shown = ", ".join(plain(line, _REPR_EXAMPLE) for line in (self.texts or self.ids)[:_REPR_EXAMPLES])
        return f"TopExamples({len(self)}: {shown}{', …' if len(self) > _REPR_EXAMPLES else ''})"

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_top_examples

        return of_top_examples(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(len(self)):
            row = {name: values[i] for name, values in self.columns.items()}
            yield {"index": self.indices[i], "coefficient": self.coefficients[i], "id": self.ids[i], **row}


class Component:
    """One component: a pseudo-Fisher vector and the examples that it explains.

    Example:
        >>> component = decomposition[0]
        >>> top = component.top_examples(3)
        >>> [dataset[i]["text"] for i in top.indices] == top.texts
        True
    """

    def __init__(self, decomposition: DecompositionLike, index: int):
        self.decomposition = decomposition
        self.index = index

    @property
    def name(self) -> str | None:
        """The name that a person gave it, or None."""
        return self.decomposition.names.get(self.index)

    @property
    def label(self) -> str:
        """Its name, or its number."""
        return self.name or f"component {self.index}"

    @property
    def coefficients(self) -> Tensor:
        """(n,) W of every example."""
        return self.decomposition.coefficients[:, self.index]

    @property
    def pseudo_fisher(self) -> Tensor:
        """(d,) unit g."""
        return self.decomposition.pseudo_fishers[self.index]

    @property
    def stability(self) -> float:
        """The mean of its best |cosine| in other restarts with nearly the same loss; NaN with a single restart."""
        return float(self.decomposition.stability[self.index])

    @property
    def active(self) -> Tensor:
        """(n,) bool: the examples on which it is active."""
        return active_examples(self.decomposition.coefficients)[:, self.index]

    @property
    def active_share(self) -> float:
        """Share of the examples on which it is active."""
        return float(self.active.float().mean())

    def top_examples(self, k: int = 10) -> TopExamples:
        """The k examples with the largest coefficients.

        Raises:
            ValueError: if k is less than 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, but it is {k}")
        decomposition = self.decomposition
        values, order = torch.sort(self.coefficients, descending=True, stable=True)
        indices = order[:k].tolist()
        columns = {name: [v[i] for i in indices] for name, v in decomposition.columns.items()}
        texts = decomposition.texts
        return TopExamples(
            indices,
            values[:k].tolist(),
            [decomposition.example_ids[i] for i in indices],
            None if texts is None else [texts[i] for i in indices],
            columns,
        )

    def __repr__(self) -> str:
        summary = f"active on {self.active_share:.0%}, stability {self.stability:.2f}"
        return f"Component({self.index}, {self.label!r}, {summary})"

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_component

        return of_component(self)
