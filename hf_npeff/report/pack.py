"""Facts and arrays as one string of base64 that a page can carry.

Inside is gzip over: the length of the facts (uint32), the facts as JSON in ASCII, and the arrays, each beginning at a
multiple of 8 bytes, little-endian. The facts say every array's type, shape and place. The alphabet of base64 cannot
close the element that it lies in, and ASCII JSON keeps any string that Python can hold, lone surrogates included.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_npeff.sharing.files import finite

_TYPES = {"uint8": "|u1", "int8": "|i1", "uint16": "<u2", "uint32": "<u4", "float32": "<f4"}


def pack(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Facts and arrays as base64; the same input gives the same string.

    Raises:
        TypeError: if an array is of a type that a page does not read.
    """
    described, parts, at = {}, [], 0
    for name, array in arrays.items():
        if str(array.dtype) not in _TYPES:
            raise TypeError(f"the array {name} is of {array.dtype}; a page reads {', '.join(_TYPES)}")
        content = np.ascontiguousarray(array).astype(_TYPES[str(array.dtype)], copy=False).tobytes()
        described[name] = {"type": str(array.dtype), "shape": list(array.shape), "at": at}
        padding = -len(content) % 8  # JavaScript wants arrays of 64 bits to begin there
        parts += [content, bytes(padding)]
        at += len(content) + padding
    text = json.dumps(finite({**facts, "arrays": described}), allow_nan=False, separators=(",", ":")).encode("ascii")
    text += b" " * (-(len(text) + 4) % 8)
    whole = b"".join([len(text).to_bytes(4, "little"), text, *parts])
    # gzip's usual level; time 0, so that equal pages are equal bytes.
    return base64.b64encode(gzip.compress(whole, compresslevel=6, mtime=0)).decode("ascii")


def quantised(values: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative numbers as uint16 of their largest, and the largest: an error of at most 1/131,070 of it.

    Args:
        values: any shape.
        axis: along which one largest value is taken; None takes one for all.
    """
    largest = np.asarray(values.max(axis=axis) if values.size else np.zeros(()), dtype=np.float32)
    safe = np.where(largest > 0, largest, 1.0)
    scaled = values / (safe if axis is None else np.expand_dims(safe, axis))
    return np.rint(np.clip(scaled, 0, 1) * 65535).astype(np.uint16), largest  # 16 bits
