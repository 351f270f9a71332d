"""Files that survive accidents: complete or absent, checked when they are read, with nothing that executes on load.

Files are not trusted: memory is bounded by the size of the file, and anything that these functions do not write raises
a `CorruptStoreError`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_npeff.errors import CorruptStoreError, FormatVersionError
from hf_npeff.sharing.parquet_footer import has_known_codecs

FORMAT_VERSION = 1
"""The format version of every config.json. Files with another version are refused."""
_JSON_MARK = "\x00json:"
_JSON_LIMIT = 2**26
"""Bytes of a JSON file: far above any that is written here."""
_TABLE_LIMIT, _TABLE_RATIO = 2**28, 100
"""Bytes of a table in memory: so many, and so many times the file's size. Chosen: far above what columns of ids and
texts need, and little beside a machine's memory, which a small file must not fill."""
_TABLE_TYPES = (pa.null(), pa.bool_(), pa.int64(), pa.float64(), pa.string())


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary name beside `path`, flush it to the disk, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_new(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _write_new(path: Path, content: bytes) -> None:
    """Write a new file. Anything that already has the name, such as a link, is removed and never followed."""
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush renames to the disk, in the order in which they were made, if the file system can."""
    with contextlib.suppress(OSError):  # some cannot; the rename has happened all the same
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace files that belong together; the last is their index, which holds the SHA-256 of the others.

    The others are written to hidden names first. Until the index is renamed the old files count, and from then on the
    new ones, whether or not a crash kept them from their names: `file_of` finds them.
    """
    *others, index = contents
    waiting = {name: _waiting(folder, name, hashlib.sha256(contents[name]).hexdigest()) for name in others}
    try:
        for name, path in waiting.items():
            _write_new(path, contents[name])
        write_atomically(folder / index, contents[index])
    except BaseException:
        with contextlib.suppress(OSError):
            if not (folder / index).is_file() or (folder / index).read_bytes() != contents[index]:
                for path in waiting.values():
                    path.unlink(missing_ok=True)
        raise
    for name, path in waiting.items():
        os.replace(path, folder / name)
    _flush_folder(folder)
    for name in contents:  # left by runs that were killed
        for pattern in ("*.new", "*.tmp"):
            for path in folder.glob(f".{glob.escape(name)}.{pattern}"):
                path.unlink(missing_ok=True)


def _waiting(folder: Path, name: str, digest: str) -> Path:
    return folder / f".{name}.{digest[:16]}.new"


def file_of(folder: Path, name: str, digest: object) -> Path:
    """The file that an index of `write_together` names, under its own name or still under its hidden one.

    Raises:
        CorruptStoreError: if there is none with that SHA-256.
    """
    path = folder / name
    if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
        for candidate in (path, _waiting(folder, name, digest), path):  # it may be renamed in the meantime
            if candidate.is_file() and sha256_of(candidate) == digest:
                return candidate
    if not path.is_file():
        raise CorruptStoreError(f"{path} is missing")
    raise CorruptStoreError(f"{path} was altered: its SHA-256 differs from the recorded one")


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


def finite(value: Any) -> Any:
    """A value as JSON has it, for reports that may hold NaN: NaN and infinities become null, keys strings."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def _not_json(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} cannot be written to a JSON file")


def read_json(path: Path, format_version: int | None = FORMAT_VERSION) -> dict[str, Any]:
    """Read a JSON object and check its `format_version`.

    Raises:
        CorruptStoreError: if the file is missing or not a JSON object.
        FormatVersionError: if it was written by another version of the format, or by another library.
    """
    values = _json_of(_content(path), path)
    if not isinstance(values, dict):
        raise CorruptStoreError(f"{path} should have a JSON object, but has a {type(values).__name__}")
    if format_version is not None and "format_version" not in values:
        raise FormatVersionError(f"{path} was not written by hf_npeff: it has no format_version")
    if format_version is not None and values["format_version"] != format_version:
        raise FormatVersionError(
            f"{path} has format_version {values['format_version']!r}, but this version of hf_npeff reads "
            f"{format_version}"
        )
    return values


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    Raises:
        CorruptStoreError: if the file is missing, or a line is not a JSON object.
    """
    records = [_json_of(line, path) for line in _content(path).splitlines() if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise CorruptStoreError(f"{path} should have one JSON object on each line")
    return records


def _content(path: Path) -> bytes:
    """The bytes of a regular file of ordinary size. Pipes and devices are refused, since they may never end."""
    try:
        if not path.is_file():
            raise CorruptStoreError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
        if (size := path.stat().st_size) > _JSON_LIMIT:
            raise CorruptStoreError(
                f"{path} has {size:,} bytes, more than the {_JSON_LIMIT:,} that such a file of hf_npeff may have"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error}") from error


def _json_of(content: bytes, path: Path) -> Any:
    """Parse JSON, and refuse what could be read in two ways: a name that occurs twice, NaN, an infinite number."""
    try:
        return json.loads(
            content, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite, parse_int=_whole
        )
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("an object has one name twice")
    return unique


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > 20:  # more digits than 64 bits have
        raise ValueError(f"{text[:20]}… is too large a number")
    return int(text)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):  # bounds the memory
            digest.update(piece)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped.

    Raises:
        CorruptStoreError: if the file is missing, truncated or not safetensors.
    """
    try:
        if not path.is_file():
            raise CorruptStoreError(f"{path} is missing")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_JSON_LIMIT, path.stat().st_size - 8):
                raise CorruptStoreError(f"{path} cannot be read: its header is said to have {length:,} bytes")
            _json_of(file.read(length), path)
        with safe_open(str(path), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error}") from error


def table_bytes(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """The content of a Parquet file; a column of mixed types, of lists or of dictionaries is kept as JSON.

    Raises:
        ValueError: if a column holds what JSON has no type for.
    """
    buffer = pa.BufferOutputStream()
    arrays = {name: _column_array(name, values) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), buffer, compression="snappy")
    return bytes(buffer.getvalue().to_pybytes())


def read_table(path: Path) -> dict[str, list[Any]]:
    """The columns that `table_bytes` was given.

    Equal texts are one object, so a file cannot unfold into much more than its own size.

    Raises:
        CorruptStoreError: if the file is missing, truncated, not Parquet, or not as `table_bytes` writes it.
    """
    try:
        if not path.is_file():
            raise CorruptStoreError(f"{path} is missing")
        schema = pq.read_schema(path)
        texts = [name for name, kind in zip(schema.names, schema.types, strict=True) if kind == pa.string()]
        with pq.ParquetFile(path, read_dictionary=texts, pre_buffer=False) as file:
            _check_table(file, schema, path)
            table = file.read(use_threads=False)
        return {name: _plain_column(table.column(name)) for name in table.column_names}
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptStoreError(f"{path} cannot be read: {error}") from error


def _check_table(file: pq.ParquetFile, schema: pa.Schema, path: Path) -> None:
    """Refuse what `table_bytes` does not write, before unpacking: other types, codecs or sizes; duplicate names."""
    if len(set(schema.names)) != len(schema.names) or any(kind not in _TABLE_TYPES for kind in schema.types):
        raise CorruptStoreError(f"{path} has columns that were not written by hf_npeff: {str(schema)[:300]}")
    metadata = file.metadata
    most = _TABLE_LIMIT + _TABLE_RATIO * path.stat().st_size
    if metadata.num_rows < 0 or metadata.num_rows * metadata.num_columns * 8 > most:  # eight bytes a value, about
        raise CorruptStoreError(f"{path} claims {metadata.num_rows:,} rows of {metadata.num_columns:,} columns")
    if not has_known_codecs(path):
        raise CorruptStoreError(f"{path} has a compression that hf_npeff does not use")


def _column_array(name: str, values: Sequence[Any]) -> pa.Array:
    try:
        if any(isinstance(value, str) and value.startswith(_JSON_MARK) for value in values):
            raise TypeError("a text looks like the mark")
        if len({type(value) for value in values if value is not None}) > 1:
            raise TypeError("Arrow would make them one type: True a 1, and 1 a 1.0")
        array = pa.array(list(values))
        if array.type not in _TABLE_TYPES:
            raise TypeError(f"{array.type} is kept as JSON")
        return array
    except (pa.ArrowException, OverflowError, TypeError, ValueError):  # mixed types in one column, lone surrogates
        try:
            return pa.array([_JSON_MARK + json.dumps(value) for value in values])
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"the column {name!r} cannot be stored: {error}; columns may have text, numbers, booleans, None, and "
                "lists or dictionaries of these"
            ) from error


def _plain_column(column: pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_dictionary(column.type):
        return column.to_pylist()
    values: list[Any] = []
    for chunk in column.chunks:
        known = [*chunk.dictionary.to_pylist(), None]
        values += [known[i] for i in pc.fill_null(chunk.indices, len(known) - 1).to_pylist()]
    if values and all(isinstance(v, str) and v.startswith(_JSON_MARK) for v in values):
        return [json.loads(v[len(_JSON_MARK) :], object_pairs_hook=_once) for v in values]
    return values
