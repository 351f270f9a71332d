"""Data sets in any format → examples with stable ids, in order, encoded and padded for a model.

Accepted are `datasets.Dataset`, `datasets.IterableDataset`, lists of strings, lists of dictionaries, dictionaries of
tensors or lists, and DataLoaders. `hf_npeff.encoding` decides which columns are read, and how. Padding in tensors is
removed, and batches are padded on the right: at the positions that count, a model that respects its attention mask
predicts the same.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.encoding.column_names import IDS, MODEL_INPUTS
from hf_npeff.encoding.encoders import Encoder, Inputs
from hf_npeff.encoding.record import Encoded, ModelNeeds, Reading
from hf_npeff.encoding.shapes import SAMPLE, encoded_as
from hf_npeff.encoding.values import as_number_or_text, as_python, at
from hf_npeff.images import of_one_example
from hf_npeff.padding import (
    Batch,
    OfOneExample,
    PaddedLabels,
    is_nested,
    padded,
    shape_of,
    sides_of,
    without_padding,
)
from hf_npeff.records import records_of

_PROSE_WORDS = 3
"""The number of words from which a value may be a text to read: names and classes are mostly shorter."""


@dataclass(frozen=True)
class Example:
    """One encoded example.

    Attributes:
        id: the value of the data set's id column, otherwise the example's position.
        inputs: what the model receives, without padding and without a batch dimension.
        columns: strings, numbers and booleans that are kept with the results.
        content: hash of `inputs`.
        truncated: whether it was cut because `truncation` was set.
        text: the text that is shown for the example, or None if no text is kept.
    """

    id: str
    inputs: dict[str, Any]
    columns: dict[str, Any]
    content: str
    truncated: bool = False
    text: str | None = None

    @property
    def choices(self) -> int | None:
        """The number of its choices in multiple choice, otherwise None."""
        ids = self.inputs.get("input_ids")
        return len(ids) if isinstance(ids, list) and is_nested(ids) else None

    @property
    def length(self) -> int:
        """The number of tokens (the larger one of encoder and decoder), or 1 for inputs of a fixed size."""
        ids = self.inputs.get("input_ids")
        if ids is None:
            return 1
        while len(ids) and isinstance(ids[0], list):  # multiple choice: one list a choice
            ids = max(ids, key=len)
        return max(len(ids), len(self.inputs.get("decoder_input_ids", ())))

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of its inputs without the dimensions of tokens, in the order of the inputs' names."""
        return tuple(
            tuple(0 if size == self.length else size for size in shape_of(value))
            for _, value in sorted(self.inputs.items())
        )


class Examples(Sequence[Example]):
    """The examples of a data set, each encoded when it is read.

    Args:
        dataset: a data set in one of the formats that the module lists.
        processing_class: tokenizer, image processor or processor of the model; needed unless the data is encoded.
        max_examples: use only this many examples, the first ones; required for an IterableDataset.
        columns: names of the columns to keep with the results. None keeps every column of strings, numbers or booleans,
            the labels, and, if no column shows it, the text that was read.
        reading: which columns are read, and whether long examples are cut.
        needs: the properties of the model that decide how examples are encoded.

    Attributes:
        encoded: the record of which columns are read, and how.

    Raises:
        ValueError: if the data set is empty, is iterable without `max_examples`, lacks one of `columns` or a column
            that should be read, if it is not clear which columns to read, or if it has text and there is no processing
            class.
    """

    def __init__(
        self,
        dataset: Any,
        processing_class: Any = None,
        *,
        max_examples: int | None = None,
        columns: Sequence[str] | None = None,
        reading: Reading | None = None,
        needs: ModelNeeds | None = None,
    ):
        if max_examples is not None and max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, but it is {max_examples}")
        self._records = records_of(dataset, max_examples, (needs or ModelNeeds()).image_token)
        self._n = len(self._records) if max_examples is None else min(len(self._records), max_examples)
        if self._n == 0:
            raise ValueError("the dataset is empty: there are no examples to analyse")
        first = self._records[0]
        heavy = any(name in first for name in (*MODEL_INPUTS, "image", "img"))
        rows = [self._records[i] for i in range(1 if heavy else min(self._n, SAMPLE))]
        names = class_names(getattr(self._records, "features", None))
        record = encoded_as(rows, reading or Reading(), needs or ModelNeeds(), names)
        tensors = functools.partial(_tensor_inputs, task=(needs or ModelNeeds()).task)
        self._encoder = Encoder(record, processing_class, needs or ModelNeeds(), tensors)
        self.encoded: Encoded = self._encoder.record
        self._encoder.warn_of_end(rows)
        if columns is not None and (missing := [c for c in columns if c not in first]):
            raise ValueError(f"columns {missing} are not in the dataset; it has {sorted(first)}")
        self._columns = columns
        self._ids = self._ids_of(first)
        self._decided = set()
        if record.kind not in ("tensors", "image") and (reading is None or reading.text_column is None):
            self._decided = {name for row in rows for name, value in row.items() if value is not None}

    def _ids_of(self, first: Mapping[str, Any]) -> list[str]:
        for name in IDS:
            value = as_number_or_text(first.get(name))
            if isinstance(value, str | int) and not isinstance(value, bool):
                ids = [str(as_number_or_text(value)) for value in _column(self._records, name, self._n)]
                if len(set(ids)) == len(ids):
                    return ids
        return [str(i) for i in range(self._n)]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._n))]
        if not -self._n <= i < self._n:
            raise IndexError(f"example {i} of {self._n}")
        i %= self._n
        record = self._records[i]
        encoded = self._encode(record, i)
        inputs = {k: v for k, v in encoded.tensors.items() if v is not None}
        kept = self._kept(record, encoded.shown)
        shown = [str(kept[name]) for name in self.encoded.shown if kept.get(name) is not None]
        text = " | ".join(shown) if shown else None
        return Example(self._ids[i], inputs, kept, _content_of(inputs), encoded.truncated, text)

    def columns_of(self, i: int) -> dict[str, Any]:
        """The columns of an example that are kept with results; encoded only if none of its own shows its text."""
        record = self._records[i]
        if self._columns is None and any(name not in record for name in self.encoded.shown):
            return dict(self[i].columns)
        return self._kept(record, None)

    def _kept(self, record: Mapping[str, Any], text: str | None) -> dict[str, Any]:
        """The columns of a row, with a text that no column of it shows."""
        if self._columns is not None:
            return {name: _plain(record.get(name)) for name in self._columns}
        label = self.encoded.label_column
        kept = {name: _plain(v) for name, v in record.items() if _is_plain(v) or (name == label and _is_label(v))}
        made = [name for name in self.encoded.shown if name not in record]
        return {**kept, **dict.fromkeys(made, text)}

    def _encode(self, record: Mapping[str, Any], i: int) -> Inputs:
        self._check_decided(record, i)
        try:
            return self._encoder(record)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"example {self._ids[i]!r} cannot be encoded: {error}") from error

    def _check_decided(self, record: Mapping[str, Any], i: int) -> None:
        """Check that a row has no text in a column that was empty when it was decided which columns to read."""
        for name in record if self._decided else ():
            value = None if name in self._decided else as_python(record[name])
            if isinstance(value, str) and len(value.split()) >= _PROSE_WORDS:
                raise ValueError(
                    f"example {self._ids[i]!r} has text in the column {name!r}, which is empty in the first {SAMPLE} "
                    "rows, from which the columns to read were chosen: name the column to read with text_column="
                )

    def check_labelled(self, name: str) -> None:
        """Check that a column of labels has labels.

        Raises:
            ValueError: if all its values are missing or −1.
        """
        values = (as_python(at(self._records[i], name)) for i in range(self._n))
        if all(value in (None, [], -1) or value != value for value in values):
            raise ValueError(f"label_column={name!r} has no labels: all {self._n} values are missing or −1")

    def first_values(self, name: str, count: int) -> list[Any]:
        """A column's values of the first examples, read without encoding anything; None where a row lacks it."""
        rows = [self._records[i] for i in range(min(count, self._n))]
        return [as_python(at(row, name)) for row in rows]

    @property
    def ids(self) -> list[str]:
        """The ids in order, known without encoding anything."""
        return list(self._ids)


def class_names(features: Any) -> dict[str, list[str]]:
    """{column: names of its classes} of a data set of `datasets`, for single labels and for lists of them."""
    names = {}
    for column, feature in dict(features or {}).items():
        inner = getattr(getattr(feature, "feature", feature), "names", None)
        if inner:
            names[column] = list(inner)
    return names


def _column(records: Any, name: str, n: int) -> list[Any]:
    if isinstance(records, list):
        return [record.get(name) for record in records[:n]]
    return list(itertools.islice(records[name], n))


def _is_padded_on_the_left(record: Mapping[str, Any]) -> bool:
    """Whether real tokens follow padding, which changes the predictions of a model that counts positions from 0."""
    masks = [record.get(f"{side}attention_mask") for side in sides_of(record)]
    flat = [torch.as_tensor(mask) for mask in masks if mask is not None and not is_nested(mask)]
    return any(mask.dim() == 1 and bool((mask[1:] > mask[:-1]).any()) for mask in flat)


def _tensor_inputs(record: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
    if task not in (None, "multiple-choice"):
        record = of_one_example(record, image_classes=task == "image-classification")
    ids = as_python(record.get("input_ids"))
    if "input_ids" in record and (not isinstance(ids, list) or any(isinstance(each, str) for each in ids)):
        raise ValueError(f"input_ids must be the token ids of one example, but they are {str(ids)[:80]}")
    if _is_padded_on_the_left(record):
        record = without_padding(dict(record))
    inputs: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, OfOneExample):
            inputs[name] = value
            continue
        if isinstance(value, Tensor):
            value = value.tolist() if value.dim() and not value.is_floating_point() else value
        if isinstance(value, Tensor) and value.dim() == 0:
            continue  # a class label
        if isinstance(value, list | tuple | Tensor) and not (
            isinstance(value, list) and value and isinstance(value[0], str)
        ):
            inputs[name] = value
        elif hasattr(value, "dtype") and hasattr(value, "tolist") and bool(getattr(value, "ndim", False)):
            inputs[name] = value.tolist() if value.dtype.kind in "iub" else torch.as_tensor(value)
    return inputs


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(as_number_or_text(value), str | bool | int | float) or value is None


def _is_label(value: Any) -> bool:
    """Whether a value is a list of numbers or names, as in multi-label data."""
    value = as_python(value)
    return isinstance(value, list) and all(isinstance(each, str | int | float) for each in value)


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # of torch, and of NumPy
        return value.item()
    return value if _is_plain(value) else json.dumps(as_python(value), default=str)


def _content_of(inputs: Mapping[str, Any]) -> str:
    """Hash of all inputs of an example, the same for lists and tensors."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name].whole if isinstance(inputs[name], PaddedLabels) else inputs[name]
        value = value.tensor if isinstance(value, OfOneExample) else value
        if name == "special_tokens_mask" or (name.endswith("attention_mask") and _hides_nothing(value)):
            continue  # not an input of a model; and the mask that is made if an example has none
        digest.update(name.encode())
        numbers = _as_numbers(value)
        if numbers is None or not numbers.is_floating_point():
            digest.update(json.dumps(value if numbers is None else numbers.tolist()).encode())
            continue
        # Lists of numbers become float32 on their way to the model, and narrower types are exact in it.
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        digest.update(f"{numbers.dtype}{tuple(numbers.shape)}".encode())
        digest.update(numbers.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _hides_nothing(mask: Any) -> bool:
    if isinstance(mask, list | tuple):
        return all(map(_hides_nothing, mask))
    return bool((torch.as_tensor(mask) == 1).all())


def _as_numbers(value: Any) -> Tensor | None:
    """A list or a tensor as a tensor on the CPU; None if lists are ragged or do not hold numbers."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def batches_by_length(
    lengths: Sequence[int], batch_size: int, max_tokens: int | None = None, *, same_length: bool = False
) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that a lack of memory shows at once.

    Args:
        lengths: the number of tokens of every example.
        batch_size: the most examples in a batch.
        max_tokens: the most padded tokens in a batch (a single example may exceed it), or None.
        same_length: whether only examples of equal length share a batch, for models that cannot be padded.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda j: (-lengths[j], j)):
        width = lengths[batch[0]] if batch else lengths[i]
        full = len(batch) == batch_size or (max_tokens is not None and width * (len(batch) + 1) > max_tokens)
        if batch and (full or (same_length and lengths[i] != width)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def collate(
    examples: Sequence[Example],
    pad_token_id: int | None,
    device: torch.device | str,
    takes: Set[str] | None = None,
) -> Batch:
    """Examples → one batch, padded on the right.

    Args:
        examples: the examples of the batch.
        pad_token_id: the token id for padding.
        device: the device of the batch.
        takes: the inputs that the model takes; columns of lists with other names are left out. None keeps all.

    Returns:
        input_ids and other token columns (B, T) padded with the pad token (0 where there is none), 0 or −100 (labels);
        attention_mask (B, T), made if the examples have none; tensors of one shape stacked.

    Raises:
        ValueError: if the examples have different inputs, or tensors of different shapes.
    """
    inputs = [{n: v for n, v in e.inputs.items() if takes is None or n in takes} for e in examples]
    names = list(inputs[0])
    for example, own in zip(examples, inputs, strict=True):
        if set(own) != set(names):
            raise ValueError(
                f"example {example.id!r} has the inputs {sorted(own)}, but {examples[0].id!r} has {sorted(names)}"
            )
    batch = padded(inputs, pad_token_id, encoder_decoder=takes is not None and "decoder_input_ids" in takes)
    for name, value in batch.items():
        batch[name] = value.to(device)
    batch.real = None if batch.real is None else batch.real.to(device)
    batch.decoder_real = None if batch.decoder_real is None else batch.decoder_real.to(device)
    return batch
