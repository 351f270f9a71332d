"""Dense deltas: a whole change of the weights, in hf_npeff's own format, which PEFT does not load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_npeff.config import check_scale
from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.files import FORMAT_VERSION, file_of, read_json, read_tensors
from hf_npeff.weights.adapter_folder import CONFIG, WEIGHTS
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.layouts import Layout


def dense(
    deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], *, scale: float, info: Mapping[str, Any]
) -> Adapter:
    """The whole delta, for `ParameterDirection.from_pretrained`.

    Raises:
        ValueError: if the scale is 0 or not finite.
    """
    scale = check_scale(scale)
    config = {
        "format_version": FORMAT_VERSION,
        "library_name": "hf_npeff",
        "kind": "delta",
        "base_model_name_or_path": info.get("model"),
        "revision": info.get("revision"),
        "scale": scale,
        "layouts": dict(layouts),
        "info": dict(info),
    }
    tensors = {name: value.float() * scale for name, value in deltas.items()}
    return Adapter("delta", tensors, config, 1.0, dict(layouts))


def load_delta(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """{parameter name: ΔW} and the config of a dense delta's folder.

    Raises:
        CorruptStoreError: if a file is missing, altered or foreign.
        FormatVersionError: if another version of the format wrote it.
    """
    folder = Path(directory)
    if read_json(folder / CONFIG, None).get("kind") != "delta":
        raise CorruptStoreError(f"{folder} does not have a dense delta; load PEFT's adapters with PeftModel")
    config = read_json(folder / CONFIG)
    return read_tensors(file_of(folder, WEIGHTS, config.get("sha256"))), config
