"""Which examples may share a batch: this is tried, since padding and other examples change some models' predictions.

Attention masks hide padding, but a Fourier transform or a convolution over the tokens mixes it in, some models choose
their weights by the longest example of a batch, and some take no mask at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hf_npeff.data import Example
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.padding import is_packed

_LOGITS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative difference of logits that may be rounding, for the number type of the model. Measured between batches
and single examples: 1e-6 in float32 and 1e-2 in bfloat16; norms that are computed in float32 bound float64's."""
_ROWS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""The same for rows, which are larger because gradients pass through the model twice."""


def precision_of(model: nn.Module) -> torch.dtype:
    """The narrowest floating-point type among a model's weights."""
    types = {p.dtype for p in model.parameters() if p.dtype in _LOGITS}
    return min(types, key=lambda dtype: -torch.finfo(dtype).eps, default=torch.float32)


def logit_tolerance(model: nn.Module) -> float:
    """The relative change of logits that may be rounding."""
    return _LOGITS[precision_of(model)]


def row_tolerance(model: nn.Module) -> float:
    """The relative change of a row that may be rounding."""
    return _ROWS[precision_of(model)]


TRIED_TOGETHER = 6
"""Examples of different lengths in a trial; more than two, because pooling over pairs of tokens depends on parity."""
_ALWAYS = 3
"""After this many trials, a batch that is no wider than one of them is not tried."""


_T = TypeVar("_T")


@dataclass
class BatchTrials:
    """The results of trials of batches with a model.

    Attributes:
        one_at_a_time: whether a trial has shown that examples must not share a batch.
        agreeing: spans of the trials in which examples had the same predictions as alone.
        image_layout_is_known: whether it was tried out how images without a description enter the model.
        images_joined: whether the images of all examples are joined instead of stacked by example.
        getting_some_tokens: {names of inputs: whether an analysed map gets only some of the tokens of such an example}.
    """

    one_at_a_time: bool = False
    agreeing: list[Span] = field(default_factory=list)
    image_layout_is_known: bool = False
    images_joined: bool = False
    getting_some_tokens: dict[frozenset[str], bool] = field(default_factory=dict)

    def covers(self, examples: Sequence[Example]) -> bool:
        """Whether trials were at least as wide as this batch; their result then holds for it too."""
        own = span_of(examples)
        wide = any(own.is_within(other) for other in self.agreeing)
        return own in self.agreeing or (wide and len(self.agreeing) >= _ALWAYS)


def spread(values: Sequence[_T], count: int) -> list[_T]:
    """At most `count` of these values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


class Span(NamedTuple):
    """The properties of a batch that decide whether a trial of another batch holds for it too.

    Attributes:
        shortest: the number of tokens of its shortest example.
        longest: the number of tokens of its longest example.
        names: the names of its inputs.
        sizes: the sizes of other inputs than tokens, such as images, of each example, if they differ between examples.
    """

    shortest: int
    longest: int
    names: frozenset[str]
    sizes: frozenset[tuple[tuple[int, ...], ...]]

    def is_within(self, other: Span) -> bool:
        """Whether the other span is at least as wide; if images differ here, they have to differ there as well."""
        mixed = bool(other.sizes) or not self.sizes
        return other.shortest <= self.shortest and self.longest <= other.longest and self.names == other.names and mixed


def span_of(examples: Sequence[Example]) -> Span:
    """The span of a batch whose examples have inputs of the same names."""
    lengths = [example.length for example in examples]
    sizes = frozenset(example.sizes for example in examples)
    names = frozenset(examples[0].inputs)
    return Span(min(lengths), max(lengths), names, sizes if len(sizes) > 1 else frozenset())


def alike(examples: Sequence[Example], takes: Set[str] | None) -> list[list[int]]:
    """Groups of the places of examples that have inputs of the same names and equally many choices, as a batch needs.

    Documents packed into one sequence are kept apart by a batch without a mask. There transformers would also cut a
    text whose positions have gaps, so such examples form groups of their own.

    Args:
        examples: any examples.
        takes: the inputs that the model takes; others do not count. None counts all.
    """
    groups: dict[tuple[frozenset[str], int | None, bool], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(kind_of(example, takes), []).append(i)
    return list(groups.values())


def kind_of(example: Example, takes: Set[str] | None = None) -> tuple[frozenset[str], int | None, bool]:
    """What the examples of a batch have in common: names of inputs, number of choices, and whether they are packed.

    Args:
        example: an example.
        takes: as for `alike`.
    """
    names = frozenset(name for name in example.inputs if takes is None or name in takes)
    return names, example.choices, "position_ids" in names and is_packed([example.inputs])


def relative_change(together: Tensor, alone: Tensor) -> float:
    """‖together − alone‖ / ‖alone‖ over finite numbers; infinite if shapes or places of finite numbers differ."""
    if together.shape != alone.shape or not torch.equal(together.isfinite(), alone.isfinite()):
        return float("inf")
    together, alone = together[together.isfinite()].double(), alone[alone.isfinite()].double()
    return float((together - alone).norm() / alone.norm().clamp_min(torch.finfo(torch.float32).tiny))


def percent(change: float) -> str:
    """A relative change as a percentage."""
    # A tenth of a percent: below that one digit
    return f"{100 * change:.1f}%" if change >= 1e-3 else f"{100 * change:.1g}%"


def length_limits(model: nn.Module) -> list[int]:
    """Lengths beyond which rotary embeddings change; the longest example of a batch would decide for all.

    "longrope" has other factors beyond the length that the model was first trained on, "dynamic" grows from there.
    """
    config: Any = getattr(base_of(model), "config", None)
    if config is None:
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    limits = set()
    for settings in _settings(given):
        kind = settings.get("rope_type", settings.get("type"))
        if kind in ("longrope", "su", "dynamic"):
            own = [
                settings.get("original_max_position_embeddings"),
                getattr(text, "original_max_position_embeddings", None),
            ]
            limit = next((n for n in own if n), getattr(text, "max_position_embeddings", None))
            limits |= {int(limit)} if limit else set()
    return sorted(limits)


def _settings(given: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary embeddings, one for all layers or one for each type of layer."""
    if isinstance(given, Mapping):
        if "rope_type" in given or "type" in given:
            yield given
        else:
            for value in given.values():
                yield from _settings(value)


def straddles(examples: Sequence[Example], limits: Sequence[int]) -> bool:
    """Whether some examples are within one of these lengths, and others beyond it."""
    lengths = [example.length for example in examples]
    low, high = min(lengths), max(lengths)
    return any(low <= limit < high for limit in limits)
