"""A direction's folder: direction.safetensors and config.json, checked when read; and the facts for its card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from hf_npeff.config import check_scale
from hf_npeff.decomposition.component import example_lines
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.record import shown_texts
from hf_npeff.errors import CorruptStoreError
from hf_npeff.pefs.weights_identity import check_identity, shown
from hf_npeff.sharing.direction_cards import DirectionFacts
from hf_npeff.sharing.files import FORMAT_VERSION, file_of, json_bytes, read_json, read_tensors, write_together
from hf_npeff.sharing.hub import LIBRARY, text_columns
from hf_npeff.sharing.protocols import ReportLike
from hf_npeff.weights.dense_delta import load_delta
from hf_npeff.weights.layouts import Layout

DIRECTION_FILE = "direction.safetensors"


def write_direction(
    folder: Path, deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], info: Mapping[str, Any]
) -> None:
    """Write direction.safetensors and config.json, both or neither."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in deltas.items()}
    content = tensors_to_bytes(tensors)
    config = {
        "format_version": FORMAT_VERSION,
        "library_name": LIBRARY,
        "layouts": dict(layouts),
        "info": dict(info),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_together(folder, {DIRECTION_FILE: content, "config.json": json_bytes(config)})


def read_direction(folder: Path) -> tuple[dict[str, Tensor], dict[str, Layout], dict[str, Any]]:
    """The deltas, layouts and info of a direction, or of a dense delta, whose scale is then `info["scale"]`.

    Raises:
        CorruptStoreError: if a file is missing, altered or foreign.
        FormatVersionError: if another version of the format wrote it.
    """
    if (folder / "adapter_config.json").is_file():
        deltas, config = load_delta(folder)
        try:
            scale = check_scale(config.get("scale"))  # type: ignore[arg-type]
            layouts, info = _checked(deltas, config.get("layouts"), config.get("info"))
            shorter = {name: deltas[name] / scale for name in layouts}
            return shorter, layouts, {**info, "scale": scale}
        except (TypeError, ValueError) as error:
            raise CorruptStoreError(
                f"{folder / 'adapter_config.json'} is not the config of a dense delta: {error!r}"
            ) from error
    config = read_json(folder / "config.json")
    tensors = read_tensors(file_of(folder, DIRECTION_FILE, config.get("sha256")))
    try:
        layouts, info = _checked(tensors, config.get("layouts"), config.get("info"))
        return {name: tensors[name] for name in layouts}, layouts, info
    except (TypeError, ValueError) as error:
        raise CorruptStoreError(f"{folder / 'config.json'} does not fit {DIRECTION_FILE}: {error}") from error


def _checked(tensors: Mapping[str, Tensor], layouts: Any, info: Any) -> tuple[dict[str, Layout], dict[str, Any]]:
    """The layouts and the description of a direction that was read.

    Raises:
        ValueError: if they do not fit the tensors, or a value has the wrong type.
    """
    if not isinstance(layouts, dict) or not isinstance(info, dict) or set(layouts) != set(tensors):
        raise ValueError("the parameters in config.json are not those in the file")
    if wrong := [name for name, layout in layouts.items() if layout not in get_args(Layout)]:
        raise ValueError(f"unknown layout {layouts[wrong[0]]!r}")
    if wrong := [name for name, t in tensors.items() if not t.is_floating_point() or t.dtype.itemsize < 2]:
        raise ValueError(f"{wrong[0]!r} is of the type {tensors[wrong[0]].dtype}")
    texts = ("model", "revision", "architecture", "module", "task", "method", "fingerprint")
    if wrong := [name for name in texts if not isinstance(info.get(name), str | None)]:
        raise ValueError(f"{wrong[0]} is {info[wrong[0]]!r}")
    check_identity(info.get("weights"))
    tied = info.get("tied", {})
    if not isinstance(tied, dict) or not all(
        isinstance(places, list) and all(isinstance(place, str) for place in places) for places in tied.values()
    ):
        raise ValueError(f"tied is {tied!r:.200}")
    embeddings = info.get("tied_embeddings", [])
    if not isinstance(embeddings, list) or not all(isinstance(place, str) for place in embeddings):
        raise ValueError(f"tied_embeddings is {embeddings!r:.200}")
    component = info.get("component")
    if component is not None and (not isinstance(component, int) or isinstance(component, bool) or component < 0):
        raise ValueError(f"component is {component!r}")
    return layouts, info


def facts_of(
    info: Mapping[str, Any], report: ReportLike | None, decomposition: Decomposition | None, include_texts: bool
) -> DirectionFacts:
    """The facts on a direction for its card.

    Args:
        info: the `info` of the direction.
        report: the result of `evaluate_direction`.
        decomposition: the decomposition whose top examples are shown.
        include_texts: whether their texts are shown; otherwise ids and predictions are.
    """
    component = info.get("component")
    about = DirectionFacts(
        base_model=str(info.get("model") or "unknown"),
        revision=info.get("revision"),
        component=component,
        lift=_made(info),
        weights=shown(info.get("weights")),
    )
    if decomposition is not None and component is not None:
        lines = _lines_of(decomposition, component, include_texts)
        tested, stability = decomposition.info.get("selftest") or {}, decomposition[component].stability
        about = replace(
            about,
            name=decomposition[component].name,
            top_examples=lines,
            stability=stability,
            coverage=tested.get("coverage"),
            sketch_error=tested.get("sketch_error"),
        )
    if report is not None:
        summary: dict[str, Any] = report.summary()
        names = ("scale", "kl_top", "kl_others", "kl_worst", "kl_searched", "kl_random", "ratio", "top_flips",
                 "other_flips")  # fmt: skip
        about = replace(about, **{name: summary[name] for name in names}, measured="the whole direction")
        missed = summary.get("target") if summary.get("reached") is False else None
        about = replace(about, measured_scale=about.scale, target_missed=missed)
        if decomposition is not None and (worst := summary.get("worst_example")) is not None:
            about = replace(about, worst=_shown(decomposition, include_texts, [worst])[0])
    return about


def _made(info: Mapping[str, Any]) -> str | None:
    """How a direction was made, in words."""
    method = info.get("method")
    if method is None or not info.get("selective"):
        return method
    ridge = info.get("ridge")
    shown_ridge = f", ridge {ridge:.1g}" if isinstance(ridge, int | float) else ""
    return f"{method}, selective against {info.get('left_alone')} examples{shown_ridge}"


def _lines_of(decomposition: Decomposition, component: int, include_texts: bool) -> list[str]:
    """A component's top examples for a card: texts if they may be shown, otherwise ids, with the predictions."""
    return _shown(decomposition, include_texts, decomposition[component].top_examples(10).indices)  # what a card lists


def _shown(decomposition: Decomposition, include_texts: bool, indices: Sequence[int]) -> list[str]:
    """Examples, each on a line, without texts unless they may be shown."""
    private = () if include_texts else text_columns(decomposition.columns, decomposition.info)
    kept = {name: [values[i] for i in indices] for name, values in decomposition.columns.items() if name not in private}
    ids = [decomposition.example_ids[i] for i in indices]
    return example_lines(shown_texts(kept, decomposition.info) or ids, kept.get("prediction"))
