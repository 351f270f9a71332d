"""Files that survive accidents: whole or not there, checked when they are read, nothing that executes on load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_npeff.errors import CorruptStoreError, FormatVersionError

FORMAT_VERSION = 1


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary name beside `path`, flush it to the disk, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json_bytes(values))


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """The content of a JSON file.

    Raises:
        TypeError: if a value has no JSON type.
        ValueError: if a number is NaN or infinite.
    """
    return (json.dumps(values, indent=2, allow_nan=False, default=_not_json) + "\n").encode()


def _not_json(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} cannot be written to a JSON file")


def read_json(path: Path, format_version: int | None = FORMAT_VERSION) -> dict[str, Any]:
    """Read a JSON object and check its `format_version`.

    Raises:
        CorruptStoreError: if the file is missing or not a JSON object.
        FormatVersionError: if it was written by another version of the format, or by another library.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CorruptStoreError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CorruptStoreError(f"{path} should hold a JSON object, but holds a {type(values).__name__}")
    if format_version is not None and "format_version" not in values:
        raise FormatVersionError(f"{path} was not written by hf_npeff: it has no format_version")
    if format_version is not None and values["format_version"] != format_version:
        raise FormatVersionError(
            f"{path} has format_version {values['format_version']!r}, and this hf_npeff reads {format_version}"
        )
    return values


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped.

    Raises:
        CorruptStoreError: if the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error}") from error
