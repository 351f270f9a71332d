"""Padding: removed from single examples and added to batches, along every dimension of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_npeff.encoding.labels import IGNORED

TOKEN_COLUMNS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "labels",
    "decoder_input_ids", "decoder_attention_mask",
)  # fmt: skip
"""Inputs with one number for every token; they are padded to the longest of a batch, whatever their own length."""
_OTHER_TOKENS = ("_input_ids", "_attention_mask", "_token_type_ids")
"""Endings of the names of such inputs for a second text, such as InstructBLIP's question for its Q-Former."""
_NOT_OF_TOKENS = ("pixel_", "image_", "input_features", "input_values", "audio_", "video_")
"""Beginnings of the names of inputs without a dimension of tokens, even if a size equals the number of tokens."""
_AXES_AND_TEXT = 4
"""Position ids of this many rows begin with the text's own, from which transformers finds packed documents."""


class PaddedLabels(list[int]):
    """Labels for each token of an example whose inputs were padded to the same width; labels at padding are removed.

    In an encoder-decoder labels belong to the decoder, and the padding of the inputs says nothing about them. In any
    other model they belong to the inputs. Only code that has the model knows which of the two it is.

    Attributes:
        whole: the labels as they were given, with those at padding.
    """

    def __init__(self, labels: Sequence[int], kept: slice):
        super().__init__(labels[kept])
        self.whole = list(labels)


@dataclass(frozen=True)
class OfOneExample:
    """An input as the model takes it for a single example: its first dimension counts examples, images or patches.

    The inputs of a batch are joined along this dimension, and padded with zeros along the others.
    """

    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)


class Batch(dict[str, Tensor]):
    """The inputs of a batch by name, and which of their positions are tokens.

    Attributes:
        real: (B, T) bool, False at padding and at tokens that the attention mask hides; None if there are no ids.
        decoder_real: the same for the decoder's input ids.
    """

    real: Tensor | None = None
    decoder_real: Tensor | None = None


def without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a padded data set without its padding: from the first to the last token that its attention mask shows.

    Hidden tokens between these are not padding and stay.
    """
    sides = sides_of(row)
    for side in sides:
        mask, ids = row.get(f"{side}attention_mask"), row.get(f"{side}input_ids")
        if mask is None or ids is None or torch.as_tensor(mask).dim() != 1 or len(ids) != len(mask):
            continue
        shown = torch.as_tensor(mask).bool().nonzero()[:, 0]
        kept = slice(int(shown[0]), int(shown[-1]) + 1) if len(shown) else slice(0, 0)
        others = tuple(other for other in sides if other and other != side)
        for name in [name for name in row if name.startswith(side) and not name.startswith(others)]:
            if name == "labels" and is_array(row[name]) and torch.as_tensor(row[name]).shape == (len(mask),):
                labels = torch.as_tensor(row[name])
                outside = bool((labels != IGNORED).sum() > (labels[kept] != IGNORED).sum())
                row[name] = PaddedLabels(labels.tolist(), kept) if outside else labels[kept]
            elif name != "labels":
                row[name] = _cut(row[name], name, len(mask), kept)
    return row


def sides_of(names: Iterable[str]) -> list[str]:
    """The prefixes of the `input_ids` of each text: none, "decoder_", or one such as InstructBLIP's "qformer_"."""
    return ["", *sorted(name.removesuffix("input_ids") for name in names if name.endswith(_OTHER_TOKENS[0]))]


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor, an array or nested lists; () for anything else."""
    value = value.tensor if isinstance(value, OfOneExample) else value
    if isinstance(value, list | tuple):
        return (len(value), *shape_of(value[0])) if len(value) else (0,)
    return tuple(getattr(value, "shape", ()))


def is_array(value: Any) -> bool:
    """Whether a value is a tensor, an array, or a list of numbers or of lists of them."""
    while isinstance(value, list | tuple):
        if not len(value):
            return False
        value = value[0]
    return isinstance(value, int | float | Tensor) or (hasattr(value, "dtype") and value.dtype.kind in "iufb")


def is_beside_tokens(name: str) -> bool:
    """Whether an input has no dimension of tokens.

    Some masks of images have one: the positions of images (KOSMOS-2), the images that a token sees (IDEFICS).
    """
    return name.startswith(_NOT_OF_TOKENS) and not (name.startswith("image_") and name.endswith("_mask"))


def _cut(value: Any, name: str, length: int, kept: slice) -> Any:
    """Cut an input along the tokens: in its first dimension, or in the last two of a mask over pairs of tokens."""
    if is_beside_tokens(name) or not is_array(value):
        return value
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError):  # ragged: no entry for every token
        return value
    if tensor.dim() >= 2 and tensor.shape[-2:] == (length, length) and name.endswith("mask"):
        return tensor[..., kept, kept]
    if name == "position_ids" and tensor.dim() == 2 and tensor.shape[1] == length:
        return tensor[:, kept]  # rows of axes
    return tensor[kept] if tensor.dim() and len(tensor) == length else value


def padded(values: Sequence[Mapping[str, Any]], pad_token_id: int | None, *, encoder_decoder: bool) -> Batch:
    """Inputs of examples → one batch on the CPU, padded on the right.

    Args:
        values: {name: input} of every example, with the same names.
        pad_token_id: the token id for padding; None pads with 0.
        encoder_decoder: whether `labels` belong to a decoder with input ids of its own.

    Returns:
        Ids are padded with the pad token, labels with −100, masks that are added to scores with the lowest number, and
        everything else with 0. If the examples have no mask, a mask of ones is made, unless their position ids start
        again within an example: these are documents packed into one sequence, which transformers separates only without
        a mask.

    Raises:
        ValueError: if inputs with different shapes cannot be padded to the same one.
    """
    batch = Batch()
    for name in values[0]:
        column = [example[name] for example in values]
        if name == "labels":
            column = [_labels_of(labels, encoder_decoder, "decoder_input_ids" in values[0]) for labels in column]
        ids = [example.get("decoder_input_ids" if name.startswith("decoder_") else "input_ids") for example in values]
        if name == "position_ids" and all(_of_axes(own, _tokens(of)) for own, of in zip(column, ids, strict=True)):
            each = [torch.as_tensor(own).T for own in column]
            batch[name] = torch.nn.utils.rnn.pad_sequence(each, batch_first=True).permute(2, 0, 1)
            continue
        fill = {"input_ids": pad_token_id or 0, "decoder_input_ids": pad_token_id or 0, "labels": IGNORED}.get(name, 0)
        batch[name] = _stacked(column, fill, name, [_tokens(own) for own in ids])
    for side in sides_of(batch):
        if f"{side}input_ids" not in batch:
            continue
        ones = [_ones_like(example[f"{side}input_ids"]) for example in values]
        real = _stacked(ones, 0, "input_ids", [_tokens(own) for own in ones])
        mask = batch.get(f"{side}attention_mask")
        if mask is None and not (side == "" and is_packed(values)):
            batch[f"{side}attention_mask"] = real
        shown = real.bool() if mask is None or mask.shape != real.shape else real.bool() & mask.bool()
        if side == "decoder_":
            batch.decoder_real = shown
        elif side == "":
            batch.real = shown
    return batch


def _joined(tensors: Sequence[Tensor], name: str) -> Tensor:
    """Tensors joined along their first dimension, and padded with zeros along the others."""
    if len({tensor.dim() for tensor in tensors}) > 1:
        raise ValueError(f"the inputs {name!r} have different numbers of dimensions: {[t.dim() for t in tensors][:4]}")
    wide = [max(size) for size in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padding = [
        [n for w, size in reversed([*zip(wide, tensor.shape[1:], strict=True)]) for n in (0, w - size)]
        for tensor in tensors
    ]
    return torch.cat([F.pad(tensor, by) for tensor, by in zip(tensors, padding, strict=True)])


def _is_of_other_tokens(name: str, value: Tensor) -> bool:
    return name.endswith(_OTHER_TOKENS) and not name.startswith(_NOT_OF_TOKENS) and not value.is_floating_point()


def _labels_of(labels: Any, encoder_decoder: bool, aligned: bool) -> Any:
    """Labels as the model uses them; a decoder's labels end with the last one that counts, unless its ids are given."""
    if not encoder_decoder:
        return labels
    labels = labels.whole if isinstance(labels, PaddedLabels) else labels
    if aligned or not is_array(labels) or torch.as_tensor(labels).dim() != 1:
        return labels
    counted = (torch.as_tensor(labels) != IGNORED).nonzero()[:, 0]
    return list(labels[: int(counted[-1]) + 1]) if len(counted) else labels


def _of_axes(positions: Any, tokens: int | None) -> bool:
    """Whether position ids have a row for every axis (time, height, width, and possibly the text's own before them).

    Qwen-VL's models take them as (axes, B, T).
    """
    if tokens is None or not is_array(positions):
        return False
    try:
        shape = torch.as_tensor(positions).shape
    except (TypeError, ValueError):  # ragged
        return False
    return len(shape) == 2 and shape[1] == tokens


def is_packed(values: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the position ids of an example start again within it: it is several documents in one sequence."""
    for example in values:
        positions = example.get("position_ids")
        steps = torch.as_tensor([] if positions is None else positions)
        if steps.dim() == 2 and len(steps) == _AXES_AND_TEXT:
            steps = steps[0]
        if steps.dim() == 1 and bool((steps[1:] <= steps[:-1]).any()):
            return True
    return False


def _tokens(ids: Any) -> int | None:
    """The number of tokens of an example; None if it has no ids, or several choices."""
    return None if ids is None or is_nested(ids) else len(ids)


def _ones_like(value: Any) -> Any:
    return [_ones_like(v) for v in value] if is_nested(value) else [1] * len(value)


def is_nested(value: Any) -> bool:
    """Whether a value is a list of lists, like the ids of several choices."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def _stacked(values: Sequence[Any], fill: int, name: str, tokens: Sequence[int | None]) -> Tensor:
    """(B, …): the inputs of one name, padded along dimensions that are the examples' numbers of tokens."""
    if name in TOKEN_COLUMNS and is_nested(values[0]) and tokens[0] is None:  # multiple choice: (choices, tokens)
        width = max(len(row) for value in values for row in value)
        return torch.tensor([[list(row) + [fill] * (width - len(row)) for row in value] for value in values])
    if isinstance(values[0], OfOneExample):
        return _joined([value.tensor for value in values], name)
    if name == "position_ids" and tokens[0] is not None and len(shape_of(values[0])) == 2:
        # Those of several dimensions (of time, height and width) come first in the models that take them.
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(v).T for v in values]).permute(2, 1, 0)
    tensor_of = {key: torch.as_tensor(value) for key, value in {id(value): value for value in values}.items()}
    tensors = [tensor_of[id(value)] for value in values]  # copies of one example share a tensor
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    if tensors[0].dim() == 1 and (name in TOKEN_COLUMNS or _is_of_other_tokens(name, tensors[0])):
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
    sizes = list(zip(*shapes, strict=True)) if len({len(shape) for shape in shapes}) == 1 else []
    along = [[tensor.shape[d] for tensor in tensors] == list(tokens) for d in range(len(sizes))]
    if not sizes or not all(of_tokens or len(set(size)) == 1 for size, of_tokens in zip(sizes, along, strict=True)):
        raise ValueError(
            f"the inputs {name!r} have different shapes: {sorted(shapes)[:4]}; give them the same shape, or remove the "
            "column"
        )
    wide = [max(size) for size in sizes]
    additive = tensors[0].is_floating_point() and name.endswith("mask")
    filler = torch.finfo(tensors[0].dtype).min if additive else fill
    short = [[w - n for w, n in zip(wide, tensor.shape, strict=True)] for tensor in tensors]
    return torch.stack(
        [
            F.pad(tensor, [n for missing in reversed(by) for n in (0, missing)], value=filler)
            for tensor, by in zip(tensors, short, strict=True)
        ]
    )
