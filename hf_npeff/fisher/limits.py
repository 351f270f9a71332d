"""The limits of a model's inputs: its vocabulary, its number of positions, and the labels that the settings need."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_npeff.data import Example
from hf_npeff.encoding.labels import IGNORED
from hf_npeff.fisher.bare_model import base_of, is_sentence_transformer
from hf_npeff.padding import is_nested, is_packed, shape_of

logger = logging.getLogger(__name__)


@dataclass
class ModelLimits:
    """The limits that an example has to meet, checked before the model runs.

    Attributes:
        vocabulary: {input: the number of ids of its embedding}; inputs without an embedding are not listed.
        positions: the most tokens, or None.
        needs_labels: whether every example needs labels for its tokens.
        labels_by_token: whether these labels belong to the tokens of the input, not to those of a decoder.
        padding: the padding token, and how many of it at an end, without an attention mask, are padding: a padding
            token that is also another special token may end a text once. None if there is no padding token.
        takes_positions: whether the model takes position ids.
        truncated: how many of the checked examples had been cut.
    """

    vocabulary: Mapping[str, int]
    positions: int | None
    needs_labels: bool
    labels_by_token: bool = False
    padding: tuple[int, int] | None = None
    takes_positions: bool = True
    truncated: int = 0

    @classmethod
    def of(cls, model: nn.Module, *, needs_labels: bool) -> ModelLimits:
        """The limits of a transformers model."""
        base: Any = base_of(model)
        decoder = base.get_decoder() if getattr(base.config, "is_encoder_decoder", False) else None
        vocabularies = {"input_ids": _vocabulary(base), "decoder_input_ids": _vocabulary(decoder)}
        vocabulary = {name: size for name, size in vocabularies.items() if size is not None}
        # A SentenceTransformer cuts texts earlier than its transformer has to.
        given = getattr(model, "max_seq_length", None) if is_sentence_transformer(model) else None
        limits = [limit for limit in (_positions(base), given) if limit is not None]
        by_token = needs_labels and decoder is None
        positions = min(limits, default=None)
        named = "position_ids" in inspect.signature(base.forward).parameters  # others are not passed on
        return cls(vocabulary, positions, needs_labels, by_token, _padding(base.config), named)

    def checked(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples, each checked as it is read; examples that are too long are counted and refused at the end.

        Raises:
            ValueError: see `check`; and if examples have more tokens than the model has positions.
        """
        n, long, longest = 0, 0, None
        for example in examples:
            self.check(example)
            n, self.truncated = n + 1, self.truncated + example.truncated
            if self.positions is not None and example.length > self.positions:
                long += 1
                longest = example if longest is None or example.length > longest.length else longest
            yield example
        if longest is not None:
            raise ValueError(
                f"example {longest.id!r} has {longest.length} tokens, and the model has {self.positions} positions: "
                f"{long:,} of {n:,} examples are too long, and this is the longest. Pass truncation=True to cut texts "
                "(max_length= to how many tokens), or leave long examples out"
            )

    def tell_truncated(self, n: int, max_length: int | None) -> None:
        """Warn how many of n examples were cut."""
        if self.truncated:
            logger.warning("%d of %d examples were cut to %s tokens", self.truncated, n, max_length)

    def check(self, example: Example) -> None:
        """Check that the model can take an example, without regard to its length.

        Raises:
            ValueError: if it has no tokens, ids outside the model's vocabulary, inputs that do not fit its tokens,
                padding without a mask, documents packed into one although the model takes no positions, or no labels
                although they are needed.
        """
        if example.length == 0:
            raise ValueError(f"example {example.id!r} has no tokens, so there is nothing to predict from; leave it out")
        self._check_tokens(example)
        for name, size in self.vocabulary.items():
            ids = _flat(example.inputs.get(name, ()))
            if ids and not 0 <= min(ids) <= max(ids) < size:
                raise ValueError(
                    f"example {example.id!r} has {name} from {min(ids)} to {max(ids)}, but the model's vocabulary has "
                    f"{size} ids; encode it with the model's own tokenizer"
                )
        if not self.needs_labels:
            return
        if "labels" not in example.inputs:
            raise ValueError(
                f"positions='labels' needs token labels, and example {example.id!r} has none; add a `labels` "
                "column (−100 where nothing is counted), or name the text to predict with label_column="
            )
        if all(label == IGNORED for label in example.inputs["labels"]):
            raise ValueError(
                f"positions='labels' finds nothing to predict in example {example.id!r}: all its labels are −100"
            )

    def _check_tokens(self, example: Example) -> None:
        """Check that a text's mask, positions and labels fit its tokens."""
        ids, mask = example.inputs.get("input_ids"), example.inputs.get("attention_mask")
        if not isinstance(ids, list) or is_nested(ids):
            return
        if any(isinstance(token, float) for token in ids):
            raise ValueError(f"example {example.id!r} has input_ids that are not whole numbers: {str(ids)[:80]}")
        names = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
        by_token = [name for name in names if shape_of(example.inputs.get(name)) not in ((), (len(ids),))]
        by_token = [name for name in by_token if len(shape_of(example.inputs[name])) == 1]
        if self.labels_by_token and len(example.inputs.get("labels", ids)) != len(ids):
            by_token.append("labels")
        if by_token:
            name = by_token[0]
            raise ValueError(
                f"example {example.id!r} has {len(ids)} input_ids and {len(example.inputs[name])} {name}: there has to "
                "be one for each token"
            )
        if not self.takes_positions and is_packed([example.inputs]):
            raise ValueError(
                f"the position_ids of example {example.id!r} begin again, so it is several documents in one sequence, "
                "but the model takes no position_ids and would read them as one text: make an example of each document"
            )
        if mask is not None and len(shape_of(mask)) == 1 and not any(mask):
            raise ValueError(f"the attention mask of example {example.id!r} hides all its tokens; leave it out")
        if mask is None and self.padding is not None:
            token, count = self.padding
            if ids[-count:] == [token] * count or ids[:count] == [token] * count:
                raise ValueError(
                    f"example {example.id!r} begins or ends with {count} of the padding token {token} and has no "
                    "attention_mask, so the model would read padding as text: add attention_mask (1 at every token "
                    "that counts, 0 at padding), or leave the padding out"
                )


def _flat(ids: Any) -> list[int]:
    """The token ids of an example, of all its choices together if it has several."""
    return [i for each in ids for i in (_flat(each) if isinstance(each, list) else [each])]


def _padding(config: Any) -> tuple[int, int] | None:
    """See `ModelLimits.padding`."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    token = getattr(text, "pad_token_id", None)
    if not isinstance(token, int):
        return None
    names = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
    others = [getattr(text, name, None) for name in names]
    flat = [i for other in others for i in (other if isinstance(other, list) else [other])]
    return token, 2 if token in flat else 1


def _vocabulary(model: Any) -> int | None:
    """The number of tokens of the input embedding; None if there is none."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


def _positions(model: Any) -> int | None:
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit <= 0:  # XLNet's way to say that there is no limit
        return None
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        if limit is not None and isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
            limit = positions.num_embeddings - positions.padding_idx - 1  # RoBERTa counts from the one after padding
    return limit
