"""The folder of a decomposition: config.json, decomposition.safetensors and examples.parquet. Reading checks them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes

from hf_npeff.config import DecompositionConfig
from hf_npeff.errors import CorruptStoreError, FormatVersionError
from hf_npeff.pefs.manifest import check_info, check_width
from hf_npeff.sharing.files import FORMAT_VERSION, file_of, json_bytes, read_json, read_table, read_tensors, table_bytes
from hf_npeff.sharing.protocols import DecompositionLike

TENSORS, EXAMPLES = "decomposition.safetensors", "examples.parquet"
_ALWAYS = ("coefficients", "pseudo_fishers", "stability")
_ID = "example_id"


def contents_of(decomposition: DecompositionLike, columns: Sequence[str]) -> dict[str, bytes]:
    """{file name: content}; config.json, which has the checksums of the other files, is last.

    Args:
        decomposition: the decomposition.
        columns: the names of the columns that are written to examples.parquet beside the ids.
    """
    tensors = {name: getattr(decomposition, name).contiguous() for name in _ALWAYS}
    if decomposition.scales is not None:
        tensors["scales"] = decomposition.scales.contiguous()
    kept = {name: decomposition.columns[name] for name in columns}
    contents = {
        TENSORS: tensors_to_bytes(tensors),
        EXAMPLES: table_bytes({_ID: decomposition.example_ids, **kept}),
    }
    config = {
        "format_version": FORMAT_VERSION,
        "library_name": "hf_npeff",
        "n_components": len(decomposition),
        "n_examples": len(decomposition.example_ids),
        "decomposition": decomposition.config.to_dict(),
        "pefs": decomposition.info,
        "loss_history": decomposition.loss_history,
        "converged": decomposition.converged,
        "names": {str(j): name for j, name in sorted(decomposition.names.items())},
        "evaluations": {str(j): e for j, e in sorted(decomposition.evaluations.items())},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    return {**contents, "config.json": json_bytes(config)}


def read_folder(folder: Path) -> dict[str, Any]:
    """Read a folder and return the arguments of its `Decomposition`.

    Raises:
        CorruptStoreError: if files are missing, altered, or do not fit together.
        FormatVersionError: if they were written by another version of the format.
    """
    if not (folder / "config.json").exists():
        raise CorruptStoreError(f"{folder.absolute()} has no decomposition: config.json is missing")
    config = read_json(folder / "config.json")
    settings, sums = _settings_of(config, folder / "config.json")
    tensors_file, examples_file = (file_of(folder, name, sums.get(name)) for name in (TENSORS, EXAMPLES))
    n, r = config["n_examples"], config["n_components"]
    if any(not 0 <= j < r for j in (*settings["names"], *settings["evaluations"])):
        raise CorruptStoreError(f"{folder}: config.json names components that the decomposition does not have")
    tensors = _tensors_of(tensors_file, n, r)
    check_width(settings["info"], tensors["pseudo_fishers"].shape[1], folder)
    columns = read_table(examples_file)
    ids = columns.pop(_ID, [])
    if len(ids) != n or not all(isinstance(i, str) for i in ids):
        raise CorruptStoreError(f"{folder / EXAMPLES} does not have the {n} examples that config.json says")
    return {**tensors, **settings, "example_ids": ids, "columns": columns}


def _settings_of(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of the decomposition that are in config.json, and the checksums of the other files."""
    try:
        if not all(type(config[name]) is int and config[name] > 0 for name in ("n_examples", "n_components")):
            raise ValueError("n_examples and n_components are positive whole numbers")
        info = dict(config["pefs"])
        check_info(info, path)
        settings = {
            "config": DecompositionConfig.from_dict(config["decomposition"]),
            "info": info,
            "loss_history": [float(x) for x in config["loss_history"]],
            "converged": bool(config["converged"]),
            "names": {int(j): str(name) for j, name in config["names"].items()},
            "evaluations": {int(j): dict(e) for j, e in config["evaluations"].items()},
        }
        return settings, {str(k): str(v) for k, v in config["files"].items()}
    except (FormatVersionError, CorruptStoreError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptStoreError(f"{path} is not the config of a decomposition: {error!r}") from error


def _tensors_of(path: Path, n: int, r: int) -> dict[str, Any]:
    """W, G, stability and scales of n examples and r components."""
    tensors = read_tensors(path)
    if set(_ALWAYS) - set(tensors):
        raise CorruptStoreError(f"{path}: tensors are missing: {sorted(set(_ALWAYS) - set(tensors))}")
    G = tensors["pseudo_fishers"]
    expected = {"coefficients": (n, r), "pseudo_fishers": (r, *G.shape[1:]), "stability": (r,)}
    if "scales" in tensors:
        expected["scales"] = G.shape[1:]
    wrong = {name: tuple(tensors[name].shape) for name, s in expected.items() if tuple(tensors[name].shape) != s}
    if wrong or G.dim() != 2 or 0 in G.shape:
        raise CorruptStoreError(f"{path}: expected the shapes {expected}, but got {wrong or tuple(G.shape)}")
    for name in expected:
        t = tensors[name]
        if not t.is_floating_point() or t.dtype.itemsize < 2:
            raise CorruptStoreError(f"{path} has {name} as {t.dtype}")
        if name != "stability" and not bool((torch.isfinite(t) & ((t >= 0) | (name == "pseudo_fishers"))).all()):
            raise CorruptStoreError(f"{path} has {name} with numbers that are negative or not finite")
    # Copied: the rounding of products depends on the alignment of memory, and a run continued from here has to be
    # bit for bit the same.
    return {name: None if name not in tensors else tensors[name].clone() for name in (*_ALWAYS, "scales")}


def read_names(path: Path, key: str, r: int) -> dict[int, str]:
    """{component: name} of the names.json that a page saved.

    Args:
        path: the path of the file.
        key: the key of the decomposition that they are for.
        r: the number of its components.

    Raises:
        CorruptStoreError: if the file is missing or is not JSON.
        FormatVersionError: if it was written by another version of the format, or by another program.
        ValueError: if it belongs to another decomposition, or contains something else.
    """
    content = read_json(path)
    names = content.get("names")
    if content.get("kind") != "component names" or not isinstance(names, dict):
        raise ValueError(f"{path} has no names of components; the page's button 'Save names' writes such a file")
    if content.get("decomposition") != key:
        raise ValueError(f"{path} has the names of components of another decomposition")
    for number, name in names.items():
        if not (number.isdecimal() and int(number) < r and isinstance(name, str) and name.strip()):
            raise ValueError(f"{path}: expected component numbers below {r} and names, but found {number!r}: {name!r}")
    return {int(number): name.strip() for number, name in names.items()}
