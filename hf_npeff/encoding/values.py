"""Single values of a data set's rows: from tensors, arrays and nested dictionaries to Python's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_python(value: Any) -> Any:
    """Numbers and lists of Python instead of NumPy's and torch's; everything else as it is."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        value = value.tolist()
    if isinstance(value, tuple):
        value = list(value)
    return value


def as_number_or_text(value: Any) -> Any:
    """A number of NumPy or torch without dimensions as Python's; everything else as it is."""
    if hasattr(value, "item") and hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def has(record: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a column, or what a dot reaches in a column of dictionaries."""
    return name in record or at(record, name) is not None


def at(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column; a dot in the name reaches into dictionaries. None where it is not there."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def is_words(value: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def is_medium(value: Any) -> bool:
    """Whether it is an image or a sound, or a list of such, as the library datasets holds them, decoded or not.

    Data about a file, such as its path and how many bytes it has, or a sampling rate alone, is none.
    """
    if isinstance(value, list):
        return bool(value) and all(map(is_medium, value))
    if isinstance(value, Mapping):
        if "sampling_rate" in value:
            return any(isinstance(part, list | bytes) or hasattr(part, "dtype") for part in value.values())
        kinds = {"bytes": bytes | bytearray | None, "path": str | None}
        return all(name in value and isinstance(value[name], kind) for name, kind in kinds.items())
    return any(kind.__module__.split(".")[0] in ("PIL", "torchcodec") for kind in type(value).__mro__)
