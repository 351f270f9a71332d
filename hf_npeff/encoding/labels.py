"""Which classes of a model the labels of a data set are: by name if both have names, otherwise by number.

A label that is missing, −1 or not a class of the model counts as no label: nothing is compared with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_GENERIC = re.compile(r"label_?\d+", re.IGNORECASE)
"""transformers' own names of classes that have none."""
_DIGITS = re.compile(r"[0-9]+")
_SHORTEST_PREFIX = 3
"""The least number of letters of a name that is short for another, such as "neg" for "negative"."""
IGNORED = -100
"""The label of a position that does not count, as in transformers."""
NO_CLASS = -1
"""Stands for a label that is not a class of the model."""
NO_LABEL = "no label"
"""The answer of a model of several labels where none applies."""


def is_placeholder(name: str) -> bool:
    """Whether it is transformers' placeholder for the name of a class, such as "LABEL_0"."""
    return _GENERIC.fullmatch(name) is not None


@dataclass(frozen=True)
class Truth:
    """Labels that can be compared with predictions.

    Attributes:
        values: the values of each example: a class; 0 or 1 for each of k labels, in a list (multi-label); k numbers,
            in a list (regression); None where there is no label.
        why_none: why nothing can be compared, or None.
    """

    values: list[Any]
    why_none: str | None = None

    @property
    def labelled(self) -> int:
        """Examples with a label."""
        return sum(value is not None for value in self.values)


def truth_of(
    column: Sequence[Any],
    distribution: str,
    k: int,
    data_names: Sequence[str] | None = None,
    model_names: Mapping[int, str] | None = None,
) -> Truth:
    """Labels as a model's classes, or as numbers for regression.

    Args:
        column: the column of the data set: numbers, names, lists, or lists as JSON.
        distribution: what the model predicts: "softmax", "bernoulli" or "gaussian".
        k: the number of its classes, labels or numbers.
        data_names: the names of the data set's classes.
        model_names: {number: name} of the model's classes.
    """
    values = [_unpacked(value) for value in column]
    if distribution == "gaussian":
        numbers = [_real(value, k) for value in values]
        return Truth(numbers, None if any(v is not None for v in numbers) else "the labels are not numbers")
    numbering = class_numbers(data_names, model_names, k)
    if isinstance(numbering, str):
        return Truth([None] * len(values), numbering)
    if distribution == "softmax" and data_names is None and (why := _why_from_one(values, model_names, k)):
        return Truth([None] * len(values), why)
    if distribution == "bernoulli":
        return _multi_label(values, k, data_names, numbering, model_names)
    classes = [_class(value, numbering, model_names, k) for value in values]
    if any(value is not None for value in classes):
        return Truth(classes)
    return Truth(classes, "none of the labels is a class of the model")


def check_vectors(column: Sequence[Any], k: int) -> None:
    """Check that labels are not vectors of k numbers, for a classifier whose config does not say what it predicts.

    transformers takes the same labels for k independent ones: it sets `problem_type` in the config with the first loss,
    and the model then predicts something else than a distribution over k classes.

    Raises:
        ValueError: if they are.
    """
    for value in map(_unpacked, column):
        if isinstance(value, list) and len(value) == k > 1 and all(isinstance(x, int | float) for x in value):
            raise ValueError(
                f"the labels are vectors of {k} numbers, such as {value}, and the model's config does not say what "
                "they are: set model.config.problem_type to 'multi_label_classification' (each is predicted by "
                "itself), 'single_label_classification' (one class of all) or 'regression'"
            )


def _why_from_one(values: Sequence[Any], model_names: Mapping[int, str] | None, k: int) -> str | None:
    """Why whole numbers cannot be class numbers: they count from 1, seem to, or are signs. None if they can."""
    real = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if k == 2 and set(real) == {-1, 1}:
        return "the labels are -1 and 1, and -1 usually stands for a missing label: write 0 and 1"
    numbers = [int(v) for v in real if float(v).is_integer() and v >= 0]
    if not numbers or min(numbers) == 0:
        return None
    if max(numbers) == k:
        return f"the labels go from {min(numbers)} to {k}, but classes are counted from 0: subtract 1"
    digits = [_DIGITS.findall(str(name)) for _, name in sorted((model_names or {}).items())]
    if digits == [[str(i + 1)] for i in range(k)]:
        low = min(numbers)
        return (
            f"it is not clear whether the label {low} is the class {(model_names or {})[low - 1]!r} or class number "
            f"{low}, counted from 0: use names as labels, or a ClassLabel feature"
        )
    return None


def class_numbers(
    data_names: Sequence[str] | None, model_names: Mapping[int, str] | None, k: int
) -> list[int | None] | str:
    """The model's class for every class of the data set, by name where both have names.

    Names are compared without case and punctuation; one may be short for the other ("neg", "negative"). If no name
    matches and both have equally many classes, the numbers are used.

    Returns:
        A class or None for each of the data set's classes; and the reason if nothing can be matched.
    """
    if data_names is None:
        return list(range(k))
    if not _named(model_names):
        if len(data_names) == k:
            return list(range(k))
        return f"the data set has {len(data_names)} classes, and the model has {k} classes without names"
    numbers = [number_of_name(name, model_names or {}) for name in data_names]
    if all(number is None for number in numbers):
        if len(data_names) == k:
            return list(range(k))
        return f"the data set's classes {_few(data_names)} are not the model's {_few((model_names or {}).values())}"
    chosen = [number for number in numbers if number is not None]
    if len(set(chosen)) < len(chosen):  # two names of the data set are short for one of the model's
        return f"the data set's classes {_few(data_names)} fit the model's {_few((model_names or {}).values())} twice"
    left = sorted(set(range(k)) - set(chosen))
    if len(data_names) == k and len(left) == 1:
        numbers[numbers.index(None)] = left[0]
    return numbers


def number_of_name(name: str, model_names: Mapping[int, str]) -> int | None:
    """The class of the model with this name, or the only class that it abbreviates or that abbreviates it."""
    wanted = _simple(name)
    known = {number: _simple(each) for number, each in model_names.items()}
    same = [number for number, each in known.items() if each == wanted]
    if not same and len(wanted) >= _SHORTEST_PREFIX:
        same = [
            number
            for number, each in known.items()
            if len(each) >= _SHORTEST_PREFIX and (each.startswith(wanted) or wanted.startswith(each))
        ]
    return same[0] if len(same) == 1 else None


def numbers_of_tags(
    tags: Sequence[Any], data_names: Sequence[str] | None, model_names: Mapping[int, str] | None
) -> list[int]:
    """The model's classes of a row's tags; `NO_CLASS` for a tag that is none of them."""
    k = len(model_names) if model_names else 1 + max((t for t in tags if isinstance(t, int)), default=0)
    numbering = class_numbers(data_names, model_names, k)
    if isinstance(numbering, str):
        return [NO_CLASS] * len(tags)
    numbers = (_class(tag, numbering, model_names, k) for tag in tags)
    return [NO_CLASS if number is None else number for number in numbers]


def labels_in_words(applies: Sequence[int], names: Mapping[int, str]) -> str:
    """The labels that apply, by name where there is one, with a comma between them.

    Args:
        applies: 1 for each label that does.
        names: {number of a label: its name}.
    """
    return ", ".join(str(names.get(j, j)) for j, value in enumerate(applies) if value == 1) or NO_LABEL


def _multi_label(
    values: Sequence[Any],
    k: int,
    data_names: Sequence[str] | None,
    numbering: Sequence[int | None],
    model_names: Mapping[int, str] | None,
) -> Truth:
    """0 or 1 for each of k labels, from as many numbers or from lists of classes."""
    lists = [value for value in values if isinstance(value, list)]
    dense = data_names is None and all(len(v) == k and all(x in (0, 1) for x in v) for v in lists)
    numbers: list[Any] = []
    for value in values:
        if not isinstance(value, list):
            numbers.append(None)
        elif dense:
            numbers.append([int(x) for x in value])
        else:
            classes = [_class(x, numbering, model_names, k) for x in value]
            known = None not in classes
            numbers.append([int(j in classes) for j in range(k)] if known else None)
    none = all(value is None for value in numbers)
    return Truth(numbers, "a multi-label model needs a list of labels for each example" if none else None)


def _class(value: Any, numbering: Sequence[int | None], model_names: Mapping[int, str] | None, k: int) -> int | None:
    """The model's class for one label, or None if it is not a label."""
    if isinstance(value, bool):
        by_name = number_of_name(str(value), model_names or {}) if _named(model_names) else None
        return by_name if by_name is not None else int(value) if k == 2 else None
    if isinstance(value, float) and value.is_integer():  # pandas turns whole numbers into these where some are missing
        value = int(value)
    if isinstance(value, int):
        number = numbering[value] if 0 <= value < len(numbering) else None
        return number if number is not None and 0 <= number < k else None
    if not isinstance(value, str):
        return None
    named = number_of_name(value, model_names or {})
    if named is not None:
        return named
    # Digits are a class's number where the model has no names for its classes, or names without digits: of "1 star" to
    # "5 stars" the number 1 would be the second.
    if value.strip().isdecimal() and not (_named(model_names) and _digits_in(model_names)):
        return _class(int(value), numbering, model_names, k)
    return None


def _digits_in(names: Mapping[int, str] | None) -> bool:
    return any(c.isdigit() for name in (names or {}).values() for c in str(name))


def _real(value: Any, k: int) -> list[float] | None:
    """The k numbers that a regression head should predict, or None if they are missing."""
    values = value if isinstance(value, list) else [value]
    numbers = [float(x) for x in values if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)]
    return numbers if len(numbers) == len(values) == k else None


def _unpacked(value: Any) -> Any:
    """A list from the JSON in which a store keeps it."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _named(names: Mapping[int, str] | None) -> bool:
    return bool(names) and not all(is_placeholder(str(name)) for name in (names or {}).values())


def _simple(name: object) -> str:
    return "".join(c for c in str(name).lower() if c.isalnum())


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")
