"""Which examples may share a batch: tried, because models differ in what padding and company do to an example.

Transformers hide padding from attention, but a Fourier transform or a convolution over the tokens mixes it in, some
models choose their weights by the longest example of a batch, and some take no mask at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_npeff.data import Example
from hf_npeff.fisher.bare_model import base_of

_LOGITS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How much logits may differ by rounding, relative, by the type that the model computes in. Measured between batches
and single examples: 1e-6 in float32 and 1e-2 in bfloat16; norms that are computed in float32 bound float64's."""
_ROWS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""The same of rows: gradients have gone through the model twice."""


def precision_of(model: nn.Module) -> torch.dtype:
    """The narrowest type of floating point among a model's weights."""
    types = {p.dtype for p in model.parameters() if p.dtype in _LOGITS}
    return min(types, key=lambda dtype: -torch.finfo(dtype).eps, default=torch.float32)


def logit_tolerance(model: nn.Module) -> float:
    """Relative change of logits that is put down to rounding."""
    return _LOGITS[precision_of(model)]


def row_tolerance(model: nn.Module) -> float:
    """Relative change of a row that is put down to rounding."""
    return _ROWS[precision_of(model)]


TRIED_TOGETHER = 6
"""Examples of different lengths in a trial: what pooling over pairs of tokens does, for one, depends on parity."""
_ALWAYS = 3
"""Trials before one that was as wide stands for a batch."""


_T = TypeVar("_T")


@dataclass
class BatchTrials:
    """What is known of the batches that a model takes.

    Attributes:
        one_at_a_time: whether a trial has shown that examples must not share one.
        agreeing: (shortest, longest, names of inputs) of trials in which examples predicted the same as alone.
    """

    one_at_a_time: bool = False
    agreeing: list[tuple[int, int, frozenset[str]]] = field(default_factory=list)

    def covers(self, examples: Sequence[Example]) -> bool:
        """Whether trials were as wide as this batch: what holds for the shortest and longest holds between them."""
        low, high, names = span_of(examples)
        wide = any(a <= low and high <= b and names == known for a, b, known in self.agreeing)
        same = (low, high, names) in self.agreeing
        return same or (wide and len(self.agreeing) >= _ALWAYS)


def spread(values: Sequence[_T], count: int) -> list[_T]:
    """At most `count` of these values, the first and the last among them, evenly between."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def span_of(examples: Sequence[Example]) -> tuple[int, int, frozenset[str]]:
    """The lengths of the shortest and the longest example, and the names of the inputs."""
    lengths = [example.length for example in examples]
    return min(lengths), max(lengths), frozenset(examples[0].inputs)


def relative_change(together: Tensor, alone: Tensor) -> float:
    """‖together − alone‖ / ‖alone‖ over what is finite; infinite where the shapes or the finite places differ."""
    if together.shape != alone.shape or not torch.equal(together.isfinite(), alone.isfinite()):
        return float("inf")
    together, alone = together[together.isfinite()].double(), alone[alone.isfinite()].double()
    return float((together - alone).norm() / alone.norm().clamp_min(torch.finfo(torch.float32).tiny))


def percent(change: float) -> str:
    """A relative change for people."""
    return f"{100 * change:.1f}%" if change >= 1e-3 else f"{100 * change:.1g}%"


def length_limits(model: nn.Module) -> list[int]:
    """Lengths at which rotary embeddings change: the longest example of a batch would decide for all.

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
    low, high, _ = span_of(examples)
    return any(low <= limit < high for limit in limits)
