"""Parts of a long study: each is computed once and kept in a file with its settings, and the next run reads it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_npeff.sharing.files import finite, write_atomically


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
    made_with = json.loads(json.dumps(settings))
    path = None if folder is None else folder / f"{name}.json"
    if path is not None and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("settings") == made_with:
            part: dict[str, Any] = kept["part"]
            return part
    started = time.process_time()
    made = compute()
    content = {"settings": made_with, "processor seconds": round(time.process_time() - started, 1), "part": made}
    text = json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    part = json.loads(text)["part"]
    return part
