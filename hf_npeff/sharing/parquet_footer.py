"""The footer of a Parquet file, read without pyarrow: its accessors abort the process where a field is missing.

Thrift's compact protocol (https://github.com/apache/thrift, doc/specs/thrift-compact-protocol.md) and the layout of
FileMetaData (https://github.com/apache/parquet-format): row groups are its field 4, the columns of a row group field 1,
the metadata of a column field 3, and the codec in there field 4.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

_TRUE, _FALSE, _I8, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DEPTH = 32
"""Structures within structures. Chosen: more than any footer needs; it bounds the recursion."""
_UNCOMPRESSED, _SNAPPY = 0, 1  # as in parquet.thrift, CompressionCodec


def has_known_codecs(path: Path) -> bool:
    """Whether every column of every row group is whole and uncompressed or in Snappy.

    Raises:
        ValueError: if the file does not end with a footer that can be read.
    """
    metadata = _Compact(_footer(path)).struct(0)
    groups = _of(metadata, 4, _LIST)
    columns = [_of(column, 3, _STRUCT) for group in groups for column in _of(group, 1, _LIST)]
    return all(_of(column, 4, _I32) in (_UNCOMPRESSED, _SNAPPY) for column in columns)


def _footer(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if len(end) < 8 or end[4:] != b"PAR1" or length > size - 12:
            raise ValueError("it does not end as a Parquet file does")
        file.seek(size - 8 - length)
        return file.read(length)


def _of(fields: Any, number: int, kind: int) -> Any:
    value = fields.get(number) if isinstance(fields, dict) else None
    if value is None or value[0] != kind:
        raise ValueError(f"its footer has no field {number} of the type {kind}")
    return value[1]


class _Compact:
    """A reader of Thrift's compact protocol; a struct is {field: (type, value)}."""

    def __init__(self, content: bytes):
        self.content = content
        self.at = 0

    def take(self, count: int) -> bytes:
        part = self.content[self.at : self.at + count]
        if len(part) < count:
            raise ValueError("its footer is cut off")
        self.at += count
        return part

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):  # Thrift: seven bits a byte, at most 64 bits
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number in its footer is too long")

    def integer(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int) -> dict[int, tuple[int, Any]]:
        fields: dict[int, tuple[int, Any]] = {}
        number = 0
        while head := self.take(1)[0]:
            kind = head & 0x0F
            number = number + (head >> 4) if head >> 4 else self.integer()
            fields[number] = (kind, kind == _TRUE if kind in (_TRUE, _FALSE) else self.value(kind, depth + 1))
        return fields

    def value(self, kind: int, depth: int) -> Any:
        if depth > _DEPTH:
            raise ValueError("its footer is nested too deeply")
        if kind in (_TRUE, _FALSE, _I8):  # in lists, truth values take a byte
            return self.take(1)[0]
        if kind in (_I16, _I32, _I64):
            return self.integer()
        if kind == _DOUBLE:
            return struct.unpack("<d", self.take(8))[0]
        if kind == _BINARY:
            return self.take(self.varint())
        if kind in (_LIST, _SET):
            head = self.take(1)[0]
            count = self.varint() if head >> 4 == 15 else head >> 4
            return [self.value(head & 0x0F, depth + 1) for _ in range(self._fitting(count))]
        if kind == _MAP:
            count = self._fitting(self.varint())
            kinds = self.take(1)[0] if count else 0
            return [(self.value(kinds >> 4, depth + 1), self.value(kinds & 0x0F, depth + 1)) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth)
        raise ValueError(f"its footer has a field of the unknown type {kind}")

    def _fitting(self, count: int) -> int:
        """Every element takes a byte at least."""
        if count > len(self.content) - self.at:
            raise ValueError("its footer is cut off")
        return count
