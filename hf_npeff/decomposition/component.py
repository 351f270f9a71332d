"""One component of a decomposition, as a person looks at it: its top examples, and how much of the data it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.sharing.markdown import plain
from hf_npeff.sharing.protocols import DecompositionLike

ACTIVE_SHARE = 0.05
"""A component is active on an example when it carries more than this share of its coefficients' sum. Chosen: what
people read depends on it (on how many examples a component is active, which are the others), no fit does."""
_REPR_EXAMPLES, _REPR_EXAMPLE = 3, 40
"""Examples of a repr, and characters of each. Chosen: a line holds them."""


def active_examples(coefficients: Tensor) -> Tensor:
    """(n, r) bool: on which examples each component is active, from W (n, r)."""
    return coefficients > ACTIVE_SHARE * coefficients.sum(1, keepdim=True)


def example_lines(
    shown: Sequence[Any], predictions: Sequence[Any] | None, as_text: Callable[[Any], str] = str
) -> list[str]:
    """Examples on a line each, with what the model predicts where that is known.

    Args:
        shown: texts or ids.
        predictions: the predictions of the model, for people; None where they were not kept.
        as_text: how a value is written.
    """
    lines = [as_text(value) for value in shown]
    known = predictions or [None] * len(lines)
    return [line if p in (None, "") else f"{line} → {as_text(p)}" for line, p in zip(lines, known, strict=True)]


@dataclass(frozen=True)
class TopExamples:
    """The examples with a component's largest coefficients, descending.

    Attributes:
        indices: positions among the analysed examples.
        coefficients: W of each.
        ids: their ids.
        texts: their text, where a text column was kept, else None.
        columns: {name: values} of everything kept.
    """

    indices: list[int]
    coefficients: list[float]
    ids: list[str]
    texts: list[str] | None
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.indices)

    def lines(self, as_text: Callable[[Any], str] = str) -> list[str]:
        """Each on a line, its text or id with the prediction where it was kept."""
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
        """What a person called it, or None."""
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
        """Mean best |cosine| with the components of other restarts of near-equal loss; NaN with one restart."""
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
