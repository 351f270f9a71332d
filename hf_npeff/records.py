"""Data sets in any format → rows: a dictionary for each example, in order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch.utils.data import DataLoader

from hf_npeff.encoding.chat import is_single_message
from hf_npeff.encoding.values import as_python
from hf_npeff.images import rows_with_images
from hf_npeff.padding import without_padding


class RecordsWithFeatures(list[Any]):
    """Records of a data set of `datasets` that was read through something else, with its features.

    Attributes:
        features: the data set's features, which have the names of its classes.
    """

    def __init__(self, records: Sequence[Any], features: Any):
        super().__init__(records)
        self.features = features


def records_of(dataset: Any, max_examples: int | None, image_token: int | None = None) -> Any:
    """Any data set → a sequence of dictionaries, with `features` if it, or the data set below it, has any.

    Raises:
        ValueError: if the format is unknown, or it has no length and `max_examples` is not given.
    """
    records = _records_of(dataset, max_examples, image_token)
    features = features_of(dataset)
    return RecordsWithFeatures(records, features) if features and isinstance(records, list) else records


def features_of(dataset: Any) -> Any:
    """The features of a data set of `datasets`, also below a DataLoader or a torch `Subset`; None if there are none."""
    while dataset is not None:
        features = getattr(dataset, "features", None)
        if isinstance(features, Mapping):
            return features
        dataset = getattr(dataset, "dataset", None)
    return None


def _records_of(dataset: Any, max_examples: int | None, image_token: int | None) -> Any:
    """`records_of`, without features."""
    if hasattr(dataset, "encoded") and hasattr(dataset, "ids"):
        raise ValueError("expected a dataset, got Examples; pass the data set that they were made from")
    if isinstance(dataset, str):
        raise ValueError("expected a dataset, got one string; put texts in a list")
    if isinstance(dataset, Set):
        raise ValueError("a set has no fixed order; put its texts in a list")
    if isinstance(dataset, Mapping) and dataset and all(hasattr(split, "column_names") for split in dataset.values()):
        raise ValueError(f"expected one dataset, got the splits {list(dataset)}: pass one of them, by its name")
    if isinstance(dataset, DataLoader):
        return _unbatched(dataset, max_examples, image_token)
    if isinstance(dataset, Mapping):
        return _rows_of_columns(dataset, image_token)
    dataset = _rows_of_frame(_without_format(dataset))
    if hasattr(dataset, "column_names") and hasattr(dataset, "__len__"):
        return dataset
    if isinstance(dataset, Sequence):
        return _checked([_as_record(r, i) for i, r in enumerate(dataset)])
    if hasattr(dataset, "__iter__"):
        if max_examples is None:
            raise ValueError(
                "an iterable dataset has no length: pass max_examples, or, if the call does not take it, a list of the "
                "examples: list(dataset.take(n))"
            )
        return _checked([_as_record(r, i) for i, r in enumerate(itertools.islice(iter(dataset), max_examples))])
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):  # a torch map-style dataset
        return _checked([_as_record(dataset[i], i) for i in range(len(dataset))])
    raise ValueError(
        f"expected a datasets.Dataset, a list of strings or dictionaries, a dictionary of tensors or a DataLoader, "
        f"but got {type(dataset).__name__}"
    )


def _rows_of_frame(dataset: Any) -> Any:
    """The rows of a pandas or polars table, the values of a series or an array; anything else is returned as it is.

    Iterating over a table would give the names of its columns.
    """
    if hasattr(dataset, "iterrows") and hasattr(dataset, "to_dict"):
        return [{str(name): value for name, value in row.items()} for row in dataset.to_dict("records")]
    if hasattr(dataset, "iter_rows") and hasattr(dataset, "to_dicts"):
        return dataset.to_dicts()
    return dataset.tolist() if hasattr(dataset, "tolist") and hasattr(dataset, "dtype") else dataset


def _checked(records: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Check that the records are not the messages of a single conversation, and return them.

    Raises:
        ValueError: if they are.
    """
    if records and all(is_single_message(record) for record in records):
        raise ValueError(
            "the examples are single messages, each with a role and its content: put the messages of a conversation "
            "together, one dictionary {'messages': [...]} for each example, or pass only the texts"
        )
    return records


_FORMATS = ("numpy", "torch", "pandas", "arrow", "polars", "jax", "tensorflow")


def _without_format(dataset: Any) -> Any:
    """A data set of `datasets` that returns Python's own types, whatever format was set; transforms are kept."""
    if not hasattr(dataset, "with_format"):
        return dataset
    known = getattr(dataset, "format", None)
    if known is None:  # an IterableDataset does not say, and has no transforms
        return dataset.with_format(None)
    if known["type"] not in _FORMATS:
        return dataset
    return dataset.with_format(None, columns=known["columns"])


def _as_record(record: Any, i: int) -> Mapping[str, Any]:
    if isinstance(record, str):
        return {"text": record}
    if not isinstance(record, Mapping):
        name = type(record).__name__
        raise ValueError(
            f"example {i} is a {name}; expected a string or a dictionary: {{'input_ids': ids}} of token ids, "
            "{'messages': messages} of a conversation, {'text': first, 'text_pair': second} of a pair"
        )
    return record


def _rows_of_columns(columns: Mapping[str, Any], image_token: int | None) -> list[dict[str, Any]]:
    """A dictionary of tensors or lists, with or without padding → its rows without padding."""
    if with_images := rows_with_images(columns, image_token):
        return [without_padding(row) for row in with_images]
    for name, values in columns.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise ValueError(
                f"a dictionary is read as columns with one value for each example, but {name!r} is a single "
                f"{type(values).__name__}; put a single example in a list"
            )
    if (first := _single_tokens(columns)) is not None:
        raise ValueError(
            "a dictionary is read as columns with one value for each example, but 'input_ids' has single tokens, the "
            f"first of them {first!r}; put a single example in a list"
        )
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the columns of a dictionary need to have the same length, but they have {lengths}")
    rows = []
    for i in range(next(iter(lengths.values()))):
        rows.append(without_padding({name: values[i] for name, values in columns.items()}))
    return rows


def _single_tokens(columns: Mapping[str, Any]) -> Any:
    """The first token, if a column of input ids has tokens where it should have lists of tokens; otherwise None."""
    first = next(iter(as_python(columns.get("input_ids", ()))), None)
    return first if isinstance(first, int | float) else None


def _unbatched(loader: DataLoader[Any], max_examples: int | None, image_token: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in loader:
        if not isinstance(batch, Mapping):
            raise ValueError(f"a DataLoader must give dictionaries of tensors, but it gave {type(batch).__name__}")
        rows += _rows_of_columns(batch, image_token)
        if max_examples is not None and len(rows) >= max_examples:
            break
    return rows
