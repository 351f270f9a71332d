"""Columns that are kept beside PEFs, such as labels: a data set's own may have changed since, which no PEF shows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hf_npeff.data import Example, Examples
from hf_npeff.pefs.shards import ID, StoreWriter

logger = logging.getLogger(__name__)
CONTENT = "content_hash"
"""The column of the hashes of what the model is given."""


def renew_columns(writer: StoreWriter, examples: Examples, done: Mapping[int, int]) -> None:
    """Take the data set's present columns over into the finished shards of a store, and warn of changed values.

    PEFs do not depend on them. A column that the data set no longer has stays as it is.

    Args:
        writer: the writer of the store, whose shards have the contents of these examples.
        examples: all examples.
        done: {first example: examples that were looked at} of the finished shards.
    """
    ids, filled = examples.ids, set(writer.filled())
    changed: set[str] = set()
    added: set[str] = set()
    for start in sorted(filled & done.keys()):
        _, stored = writer.shard(start)
        places = {ids[i]: i for i in range(start, start + done[start])}
        rows = [examples.columns_of(places[name]) for name in stored[ID]]
        names = {name for row in rows for name in row} - {ID, CONTENT}
        now = {name: [row.get(name) for row in rows] for name in sorted(names)}
        new = {name: values for name, values in now.items() if name not in stored}
        other = {name: values for name, values in now.items() if name in stored and differing(stored[name], values)}
        if new or other:
            writer.write_columns(start, {**stored, **new, **other})
        added, changed = added | new.keys(), changed | other.keys()
    if changed:
        logger.warning(
            "the data set has other values now in %s than when the PEFs in %s were computed. The PEFs do not depend on "
            "them and are kept, with the present values; decompose again, because a decomposition has the old ones",
            ", ".join(map(repr, sorted(changed))),
            writer.folder,
        )
    elif added:
        logger.info("new columns are kept with the PEFs in %s: %s", writer.folder, ", ".join(sorted(added)))


def check_columns(names: Sequence[str], kept: Mapping[str, Sequence[Any]], examples: Sequence[Example]) -> None:
    """Check that a data set has the values that are kept, in the columns that are about to be used.

    Args:
        names: the columns; those that are not kept, or that an example does not have, are not compared.
        kept: {column: n values} of PEFs or of a decomposition.
        examples: the n examples of the data set at hand, in the same order.

    Raises:
        ValueError: if values differ.
    """
    for name in names:
        pairs = [(a, e.columns[name]) for a, e in zip(kept.get(name, ()), examples, strict=False) if name in e.columns]
        if places := differing([a for a, _ in pairs], [b for _, b in pairs]):
            old, new = pairs[places[0]]
            raise ValueError(
                f"the column {name!r} has other values in this data set than are kept with the PEFs, for {len(places)} "
                f"of {len(pairs)} examples (first {old!r}, now {new!r}): call compute_pefs again, which with its old "
                "output_dir only renews the columns, and decompose again; or pass the data set as it was"
            )


def differing(first: Sequence[Any], second: Sequence[Any]) -> list[int]:
    """The places at which two columns have different values; text that a number is written as is that number."""
    return [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if not _same(a, b)]


def _same(a: Any, b: Any) -> bool:
    if _is_missing(a) or _is_missing(b):
        return _is_missing(a) and _is_missing(b)
    return bool(a == b) or str(a) == str(b)


def _is_missing(value: Any) -> bool:
    return value is None or value != value
