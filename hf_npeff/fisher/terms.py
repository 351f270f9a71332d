"""Terms of sequences: the positions at which a model predicts, and the decoder inputs before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_npeff.encoding.labels import IGNORED
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.padding import Batch


def shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """The decoder inputs that predict labels (B, T): the start token, then the previous label at each position.

    Raises:
        UnsupportedModelError: if the model's config does not say how its decoder begins.
    """
    base: Any = base_of(model)
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        # Without padding: FSMT's decoder begins with the last of the labels, and padded ones end in −100.
        ends = up_to_the_last(labels != IGNORED).sum(1).clamp(min=1).tolist()
        alone = [
            base.prepare_decoder_input_ids_from_labels(labels=row[None, :n])[0]
            for row, n in zip(labels, ends, strict=True)
        ]
        pad = base.config.pad_token_id or 0
        read = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True, padding_value=pad)
        return F.pad(read, (0, labels.shape[1] - read.shape[1]), value=pad)
    start, pad = base.config.decoder_start_token_id, base.config.pad_token_id
    if start is None or pad is None:
        raise UnsupportedModelError(
            "the model's config names no decoder_start_token_id or pad_token_id, so its labels cannot be turned into "
            "decoder inputs; set them, or add a column decoder_input_ids"
        )
    read = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return read.masked_fill(read == IGNORED, pad)


class NothingMarkedError(ValueError):
    """Examples of a batch have no position at which something is predicted; `places` are their places in the batch."""

    def __init__(self, rule: str, places: list[int]) -> None:
        super().__init__(f"positions={rule!r} finds nothing to predict in the examples {places} of a batch")
        self.rule, self.places = rule, places


def up_to_the_last(counted: Tensor) -> Tensor:
    """(B, T): True up to the last True of each row."""
    return counted.long().flip(1).cummax(1).values.flip(1).bool()


def real_tokens(batch: Mapping[str, Tensor], ids: Tensor, decoder: bool) -> Tensor:
    """Which of the ids (B, T) are tokens and not padding, whatever masks the model takes."""
    if decoder and "decoder_input_ids" not in batch:
        return up_to_the_last(batch["labels"] != IGNORED) if "labels" in batch else torch.ones_like(ids).bool()
    if isinstance(batch, Batch):
        real = batch.decoder_real if decoder else batch.real
    else:
        real = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    return torch.ones_like(ids).bool() if real is None or real.shape != ids.shape else real.bool()


def gathered(values: Tensor, index: Tensor) -> Tensor:
    """(B, T, ·) at positions (B, t) → (B, t, ·)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def packed(counted: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """A mask (B, T) → the marked positions, packed to the left (B, t), and which entries are real.

    Raises:
        NothingMarkedError: if an example has no marked position; the message names the setting.
    """
    number = counted.sum(1)
    if bool((number == 0).any()):
        which = (number == 0).nonzero()[:, 0].tolist()
        raise NothingMarkedError(rule, which)
    t = int(number.max())
    order = torch.argsort(counted.to(torch.int8), dim=1, descending=True, stable=True)[:, :t]
    valid = torch.arange(t, device=counted.device)[None] < number[:, None]
    return torch.where(valid, order, order[:, :1]), valid
