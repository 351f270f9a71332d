"""Columns kept beside the examples, by what they hold: categories, numbers, or texts to read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hf_npeff.encoding.labels import is_placeholder, labels_in_words, truth_of
from hf_npeff.encoding.record import Encoded

MOST_CATEGORIES = 2000
"""The most different strings of a column of categories. Chosen: lists of the page stay usable, for example with
words."""
_FEW_NUMBERS = 12
"""The most different whole numbers of a column of categories. Chosen: so many colours can be distinguished."""
_LONGEST_CATEGORY = 80
"""The most characters of a category; longer strings are texts. Chosen: a legend has room for them."""
INTERNAL = ("content_hash", "example_id")
"""Columns that hf_npeff adds and the data set does not have."""
_TRUTH = ("label", "labels", "answer", "target")
_CLASSES = ("sequence-classification", "image-classification")
_LANGUAGE = ("causal-lm", "seq2seq-lm", "masked-lm")
CORRECT = "prediction correct"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: the name of the column.
        kind: "category" (`values` and a code an example), "number" (`data` are floats, NaN where there is none) or
            "text" (`values` has a string or None an example).
        values: see `kind`; None stands for a missing value.
        data: (n,) codes into `values`, or numbers.
    """

    name: str
    kind: Literal["category", "number", "text"]
    values: list[str | None]
    data: np.ndarray | None = None


def described_by(columns: Iterable[str]) -> list[str]:
    """The names of the columns that describe the examples: all but those that hf_npeff adds."""
    return [name for name in columns if name not in INTERNAL]


def shown(value: Any) -> str | None:
    """A value as text; None for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        # Whole numbers that float64 represents exactly
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def as_column(name: str, values: Sequence[Any]) -> Column:
    """A column by its content: numbers with many values, a few values that repeat, or texts.

    Values of mixed types are distinguished by how they are written.
    """
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    missing = sum(v is None for v in values)
    if numbers and len(numbers) + missing == len(values) and len(set(numbers)) > _FEW_NUMBERS:
        data = np.array([math.nan if v is None else float(v) for v in values], dtype=np.float32)
        return Column(name, "number", [], data)
    texts = [shown(v) for v in values]
    counts = Counter(texts)
    few = len(counts) <= MOST_CATEGORIES and all(t is None or len(t) <= _LONGEST_CATEGORY for t in counts)
    # Chosen: at most two thirds of them differ
    again = len(counts) <= _FEW_NUMBERS or 3 * len(counts) <= 2 * len(texts) or name == "prediction"
    if not (few and again):
        return Column(name, "text", texts)
    order = _in_order(counts, bool(numbers) and len(numbers) + missing == len(values))
    place = {text: code for code, text in enumerate(order)}
    codes = np.array([place[text] for text in texts], dtype=np.uint16)
    return Column(name, "category", list(order), codes)


def _in_order(counts: Counter[str | None], numeric: bool) -> list[str | None]:
    """Numbers by size, other values by how often they occur; a missing value last."""
    known = [text for text in counts if text is not None]
    if numeric:
        known.sort(key=float)
    else:
        known.sort(key=lambda text: (-counts[text], text))
    return [*known, *([None] if None in counts else [])]


def correctness(
    columns: Mapping[str, Sequence[Any]],
    label_names: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Column | None:
    """Whether each prediction is right; None if the columns do not show it.

    The truth is the column that was read as labels, else label, labels, answer or target. Classes are matched as
    `hf_npeff.encoding.labels` says: by name where both have names; −1, missing and other labels are none. A predicted
    token is right where the answer begins with it, since an answer may have several; numbers of classes are no tokens.

    Args:
        columns: {name: values}.
        label_names: {number of a class: its name}, where the model has names for them.
        info: the `info` of the PEFs or the decomposition: its task, and the record of what was read.
    """
    info = info or {}
    predictions = columns.get("prediction")
    record, task = Encoded.of(info), info.get("task")
    known = (record.label_column, record.target) if record is not None else ()
    name = next((name for name in (*known, *_TRUTH) if name in columns), None)
    if predictions is None or name is None or task == "token-classification":
        return None
    truth: Sequence[Any] = columns[name]
    if task in _CLASSES:
        return _class_correctness(predictions, truth, label_names, None if record is None else record.label_names)
    if task in _LANGUAGE and name in ("label", "labels"):
        truth = [value if isinstance(value, str) else None for value in truth]
    named = {str(k): str(v) for k, v in (label_names or {}).items()}
    first_tokens = "answer" in columns or "target" in columns
    right: list[bool | None] = []
    for predicted, true in zip(predictions, truth, strict=True):
        a, b = (shown(predicted) or "").strip(), (shown(true) or "").strip()
        if not a or not b or (isinstance(true, int) and true < 0):  # −1 stands for no label
            right.append(None)
        else:
            same = a in (b, f"LABEL_{b}", named.get(b)) or named.get(a) == b
            right.append(same or (first_tokens and not isinstance(true, int | bool) and b.startswith(a)))
    return _correct(right)


def _class_correctness(
    predictions: Sequence[Any],
    truth: Sequence[Any],
    label_names: Mapping[str, str] | None,
    data_names: Sequence[str] | None,
) -> Column | None:
    names = {int(number): str(name) for number, name in (label_names or {}).items()} or _placeholders(
        predictions, truth
    )
    number_of = {str(number): number for number in names} | {name: number for number, name in names.items()}
    if not names:
        return None
    predicted: list[Any] = [number_of.get(str(value)) for value in predictions]
    true = truth_of(truth, "softmax", len(names), data_names, names).values
    if all(value is None for value in true):  # lists, if a model of several labels
        predicted = [str(value) for value in predictions]
        several = truth_of(truth, "bernoulli", len(names), data_names, names).values
        true = [None if value is None else labels_in_words(value, names) for value in several]
    if any(value is None for value in predicted):
        return None  # numbers of a regression
    return _correct([None if b is None else a == b for a, b in zip(predicted, true, strict=True)])


def _placeholders(predictions: Sequence[Any], truth: Sequence[Any]) -> dict[int, str]:
    """{n: "LABEL_n"}, transformers' names for classes without one, where all predictions are such; else nothing.

    They end in the largest class that was predicted or is a label, so that a class that is never predicted is wrong.
    """
    numbers = [re.fullmatch(r"LABEL_([0-9]+)", str(value)) for value in predictions]
    if not numbers or None in numbers:
        return {}
    labels = [value for value in truth if isinstance(value, int) and not isinstance(value, bool)]
    last = max([int(matched[1]) for matched in numbers if matched is not None] + labels)
    return {n: f"LABEL_{n}" for n in range(last + 1)}


def _correct(right: Sequence[bool | None]) -> Column | None:
    if not any(right):  # nothing in common: most likely two ways of writing the classes
        return None
    words: list[str | None] = [None if r is None else "right" if r else "wrong" for r in right]
    values: list[str | None] = [word for word in ("right", "wrong", None) if word in words]
    return Column(CORRECT, "category", values, np.array([values.index(word) for word in words], dtype=np.uint16))


def with_label_names(columns: Mapping[str, Sequence[Any]], info: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
    """The columns, with the names of classes in place of their numbers in the column of labels, where they are known.

    The data set's own names come before the model's; transformers' placeholders (LABEL_0) are no names.

    Args:
        columns: {name: values}.
        info: the `info` of the PEFs or the decomposition: its task, the names, and the record of what was read.
    """
    name, names = label_names_of(columns, info)
    return columns if not names else {**columns, name: [_named(value, names) for value in columns[name]]}


def label_names_of(columns: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[str, dict[int, str]]:
    """The column of labels, and the names of its numbers; no names where they are not known. See `with_label_names`."""
    record = Encoded.of(info)
    known = record.label_column if record is not None else None
    name = known if known in columns else next((each for each in ("label", "labels") if each in columns), None)
    if name is None or info.get("task") not in _CLASSES:
        return "", {}
    names = dict(enumerate(record.label_names or ())) if record is not None else {}
    names = names or {int(number): str(word) for number, word in (info.get("label_names") or {}).items()}
    if len(names) < 2 or all(is_placeholder(word) for word in names.values()):  # one name: a regression's
        return name, {}
    return name, names


def _named(value: Any, names: Mapping[int, str]) -> Any:
    """The name of a class for its number; any other value as it is."""
    return names.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def columns_of(
    columns: Mapping[str, Sequence[Any]],
    label_names: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> list[Column]:
    """Every column that is shown, with the derived `prediction correct`; those that can colour a map come first."""
    named = with_label_names(columns, info or {})
    kept = [as_column(name, values) for name, values in named.items() if name not in INTERNAL]
    correct = None if CORRECT in columns else correctness(columns, label_names, info)
    if correct is not None:
        kept.append(correct)
    rank = {"category": 0, "number": 1, "text": 2}
    return sorted(kept, key=lambda column: rank[column.kind])
