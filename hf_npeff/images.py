"""The outputs of processors for texts with images, and for images and sound, as the inputs of single examples.

Models for texts with images take the images of all examples of a batch in one tensor: (images, channels, height,
width), or (patches, numbers) with a table of the images' grids. Only the placeholders in the texts say which images
belong to which text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.padding import TOKEN_COLUMNS, OfOneExample, is_array, is_beside_tokens, shape_of, sides_of


def of_one_example(row: Mapping[str, Any], *, image_classes: bool = False) -> dict[str, Any]:
    """Remove the batch dimension from a row with a batch of one example, as processors return it with `return_tensors`.

    Inputs that have an entry for every token lose the dimension; images, their sizes and grids keep it, as the model
    needs them.

    Args:
        row: the row; without a batch dimension it is returned as it is, except for tables of images (`image_grid_thw`),
            which models take without a dimension of examples.
        image_classes: whether the model takes a single image, (1, channels, height, width).
    """
    ids, mask = row.get("input_ids"), row.get("attention_mask")
    first = next((row[name] for name in ("input_ids", "input_values", "input_features") if name in row), None)
    sound = ids is None and first is not None and (shape_of(mask)[:1] == (1,) and len(shape_of(mask)) == 2)
    sound = sound or (ids is None and shape_of(first)[:1] == (1,) and len(shape_of(first)) in (2, 3))
    picture = image_classes and ids is None and len(shape_of(row.get("pixel_values"))) >= 4
    picture = picture and shape_of(row["pixel_values"])[0] == 1
    if not (len(shape_of(ids)) == 2 and shape_of(ids)[0] == 1) and not sound and not picture:
        return _with_tables(row)
    tokens = {shape_of(row[f"{side}input_ids"])[-1] for side in sides_of(row) if f"{side}input_ids" in row}
    inside: dict[str, Any] = {}
    for name, value in row.items():
        shape = shape_of(value)
        of_tokens = name in TOKEN_COLUMNS or (not is_beside_tokens(name) and bool(tokens & {*shape[1:2]}))
        if shape[:1] == (1,) and (ids is None or of_tokens):
            inside[name] = value[0]
        else:
            images = ids is not None and hasattr(value, "dtype") and len(shape) > 0
            inside[name] = OfOneExample(torch.as_tensor(value)) if images else value
    return inside


def _with_tables(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the grids of its images, one or several, as a table, and with their patches."""
    inputs = dict(row)
    for name in [name for name in row if name.endswith("_grid_thw") and is_array(row[name])]:
        grids = torch.as_tensor(row[name])
        inputs[name] = OfOneExample(grids[None] if grids.dim() == 1 else grids)
        pixels = "pixel_values" if name.startswith("image") else "pixel_values_videos"
        if len(shape_of(row.get(pixels))) == 2:
            inputs[pixels] = OfOneExample(torch.as_tensor(row[pixels]))
    return inputs


def with_images_joined(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of an example, with images in the form of a model that joins the images of a batch."""
    joined = dict(inputs)
    for name, value in inputs.items():
        if is_beside_tokens(name) and isinstance(value, Tensor | list) and is_array(value):
            tensor = torch.as_tensor(value)
            is_single = tensor.dim() == (3 if name.startswith("pixel_values") else 1)
            joined[name] = OfOneExample(tensor[None] if is_single else tensor)
    return joined


def rows_with_images(columns: Mapping[str, Any], image_token: int | None) -> list[dict[str, Any]] | None:
    """The rows of a batch that a processor returned for texts with images; None if it has no joined images.

    Args:
        columns: its tensors, padded.
        image_token: the id of the placeholder token for a part of an image.

    Raises:
        ValueError: if it is not clear which images belong to which text.
    """
    n = len(columns.get("input_ids", ()))
    pixels = columns.get("pixel_values")
    if pixels is None or n == 0:
        return None
    if len(shape_of(pixels)) > 4 and len(pixels) == n:
        return _rows_without_padding_images(columns) if "pixel_attention_mask" in columns else None
    beside = {name: torch.as_tensor(columns[name]) for name in columns if is_beside_tokens(name)}
    placeholders = _placeholders(columns, image_token)
    if not any(placeholders) and {len(tensor) for tensor in beside.values()} == {n}:
        return None  # nothing in the texts stands for images: they are by example
    grids, sizes = beside.get("image_grid_thw"), beside.get("image_sizes")
    weights = [1] * len(pixels)
    if grids is not None:
        weights = grids.prod(1).tolist()
    elif sizes is not None:
        weights = sizes.prod(1).tolist()
    counts = _images_of_texts(weights, placeholders)
    wrong = {
        name: len(tensor)
        for name, tensor in beside.items()
        if len(tensor) != (sum(weights) if grids is not None and name == "pixel_values" else len(weights))
    }
    if counts is None or wrong:
        raise ValueError(
            f"it is not clear which of the {len(weights)} images belong to which of the {n} texts of this batch "
            f"(inputs {sorted(beside)}): call the processor for one example at a time, and pass a list of what it "
            "returns"
        )
    rows: list[dict[str, Any]] = []
    start = 0
    for i, count in enumerate(counts):
        row = {name: value[i] for name, value in columns.items() if name not in beside}
        for name, tensor in beside.items() if count else ():
            places = slice(start, start + count)
            if grids is not None and name == "pixel_values":
                places = slice(sum(weights[:start]), sum(weights[: start + count]))
            row[name] = OfOneExample(tensor[places])
        rows.append(row)
        start += count
    return rows


def _rows_without_padding_images(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch (B, images, …) that was padded to the largest number of images."""
    shown = torch.as_tensor(columns["pixel_attention_mask"]).flatten(2).any(2).sum(1)
    rows = []
    for i, count in enumerate(shown.tolist()):
        row = {name: value[i] for name, value in columns.items() if not name.startswith("pixel_")}
        for name in [name for name in columns if name.startswith("pixel_")] if count else ():
            row[name] = OfOneExample(torch.as_tensor(columns[name])[i : i + 1, :count])
        rows.append(row)
    return rows


def _placeholders(columns: Mapping[str, Any], image_token: int | None) -> list[int]:
    """The number of image placeholders in each text, if it is known."""
    marked: Tensor
    if image_token is not None:
        marked = torch.as_tensor(columns["input_ids"]) == image_token
    else:
        marked = torch.as_tensor(columns.get("mm_token_type_ids", columns["input_ids"])) == 1
        marked &= torch.tensor("mm_token_type_ids" in columns)
    return [int(count) for count in marked.flatten(1).sum(1)]


def _images_of_texts(weights: Sequence[int], placeholders: Sequence[int]) -> list[int] | None:
    """The number of images of each text, in order, if an image has placeholders in proportion to its weight."""
    if sum(placeholders) == 0:
        return None
    counts, at = [], 0
    for wanted in placeholders:
        first, used = at, 0
        while at < len(weights) and used * sum(placeholders) < wanted * sum(weights):
            used += weights[at]
            at += 1
        if used * sum(placeholders) != wanted * sum(weights):
            return None
        counts.append(at - first)
    return counts if at == len(weights) else None
