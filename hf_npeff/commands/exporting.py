"""The command that writes an adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_npeff.commands.options import Result, command


@command
def export(
    adapter: Annotated[str, typer.Argument(help="A LoRA adapter: a folder, or a repository on the Hub.")],
    gguf: Annotated[Path, typer.Option(help="The file to write, for llama.cpp and programs that use it.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model: an id, a folder, or a GGUF file. By default the model that the adapter names."
        ),
    ] = None,
) -> Result:
    """Write an adapter for llama.cpp: a GGUF file to load beside a GGUF file of the base model.

    Examples:
    - `hf-npeff export runs/off-3/adapter --gguf runs/off-3.gguf`
    - `hf-npeff export user/distilgpt2-without-3 --gguf off-3.gguf --base distilgpt2-F16.gguf`
    """
    from hf_npeff.weights.adapters import Adapter

    loaded = Adapter.from_pretrained(adapter)
    loaded.to_gguf(gguf, base)
    values = {"gguf": str(gguf), "rank": loaded.config["r"], "parameters": len(loaded.layouts)}
    return Result(values, f"{gguf}: rank {loaded.config['r']}, {len(loaded.layouts)} weights")
