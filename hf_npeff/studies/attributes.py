"""Annotations of examples as yes-or-no attributes. Methods never see them; they are used to measure the methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attributes:
    """Annotations of n examples as yes-or-no attributes.

    Attributes:
        names: the names of the a attributes: "column=value", or the name of a column of booleans.
        values: (n, a), 1 for yes, 0 for no, and NaN for "not annotated".
        excluded: {attribute or column: the reason why it is left out}.

    Example:
        >>> attributes = Attributes.from_columns({"animal": [True, False] * 12}, min_count=5)
        >>> attributes.names
        ['animal']
    """

    names: list[str]
    values: Tensor
    excluded: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, Sequence[Any]], names: Sequence[str] | None = None, *, min_count: int = 10
    ) -> Attributes:
        """Attributes from columns.

        A boolean column is one attribute. A column of strings or whole numbers has one attribute for each value. A
        column of lists does too; there, an example may have several values. None and NaN mean "not annotated".

        Args:
            columns: {name: n values}.
            names: which columns to use; None uses all.
            min_count: an attribute is excluded if fewer examples than this have it, or lack it.

        Raises:
            ValueError: if a column does not exist, columns differ in length, or a column holds values of another kind.
        """
        wanted = list(columns if names is None else names)
        if missing := [name for name in wanted if name not in columns]:
            raise ValueError(f"the columns {missing} do not exist; the columns are {sorted(columns)}")
        if len({len(columns[name]) for name in wanted}) > 1:
            raise ValueError(f"columns differ in length: { {name: len(columns[name]) for name in wanted} }")
        kept: dict[str, list[float]] = {}
        excluded: dict[str, str] = {}
        for name in wanted:
            attributes = _binary(name, list(columns[name]))
            if not attributes:
                excluded[name] = "no example is annotated"
            for attribute, values in attributes.items():
                have, lack = values.count(1.0), values.count(0.0)
                if min(have, lack) >= max(1, min_count):
                    kept[attribute] = values
                elif min(have, lack) == 0:
                    excluded[attribute] = f"one class only: {have} examples have it, {lack} lack it"
                else:
                    excluded[attribute] = f"{have} examples have it, {lack} lack it: fewer than {min_count}"
        n = len(columns[wanted[0]]) if wanted else 0
        matrix = torch.tensor(list(kept.values()), dtype=torch.float64).T if kept else torch.empty(n, 0)
        return cls(list(kept), matrix, excluded)

    @property
    def counts(self) -> Tensor:
        """(n,) how many attributes each example has."""
        return (self.values == 1).sum(1)

    @property
    def missing(self) -> dict[str, int]:
        """{attribute: how many examples are not annotated}, for the attributes that have such examples."""
        counts = self.values.isnan().sum(0).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}


def _binary(name: str, values: list[Any]) -> dict[str, list[float]]:
    """One column as attributes: {attribute: n of 1, 0, NaN}."""
    known = [v for v in values if not (v is None or (isinstance(v, float) and math.isnan(v)))]
    if not known:
        return {}
    nothing = [v is None or (isinstance(v, float) and math.isnan(v)) for v in values]
    if all(isinstance(v, bool) for v in known):
        return {name: [math.nan if no else float(v) for v, no in zip(values, nothing, strict=True)]}
    if all(isinstance(v, list | tuple | set | frozenset) for v in known):
        each = sorted({str(x) for v in known for x in v})
        sets = [set() if no else {str(x) for x in v} for v, no in zip(values, nothing, strict=True)]
        return {
            f"{name}={x}": [math.nan if no else float(x in s) for s, no in zip(sets, nothing, strict=True)]
            for x in each
        }
    if all(isinstance(v, str | int) and not isinstance(v, bool) for v in known):
        each = list(dict.fromkeys(map(str, known)))
        return {
            f"{name}={x}": [math.nan if no else float(str(v) == x) for v, no in zip(values, nothing, strict=True)]
            for x in each
        }
    kinds = sorted({type(v).__name__ for v in known})
    raise ValueError(
        f"the column {name!r} holds {kinds}, but attributes must be booleans, strings, whole numbers or lists"
    )
