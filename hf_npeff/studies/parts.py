"""Parts of a long study: each is computed once and kept in a file with its settings, and the next run reads it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_npeff.sharing.files import finite, write_atomically


def read_part(folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A part that is kept, as `kept_part` returns it; None if its file is missing or has other settings."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept.get("settings") != json.loads(json.dumps(settings)):
        return None
    part: dict[str, Any] = kept["part"]
    return part


def kept_part(
    folder: Path | None, name: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A part of a study. It is read from its file if that has the same settings; otherwise it is computed and kept.

    The file also has the processor seconds that the part took, of all threads.

    Args:
        folder: the folder of the parts, or None to keep nothing.
        name: the name of the part, which names its file.
        settings: everything that the part depends on, as JSON types.
        compute: the function that computes the part, as JSON types.

    Returns:
        The part as it is read from JSON: tuples become lists, and numbers that are not finite become None.
    """
    kept = None if folder is None else read_part(folder, name, settings)
    if kept is not None:
        return kept
    started = time.process_time()
    made = compute()
    content = {"settings": settings, "processor seconds": round(time.process_time() - started, 1), "part": made}
    text = json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.json", text.encode())
    part: dict[str, Any] = json.loads(text)["part"]
    return part
