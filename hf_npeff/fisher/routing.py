"""Rows that a router sends to experts: the expert and example of each, and the products with each W_e."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Routing:
    """The expert and the example of every row of a product; rows are sorted by expert.

    Attributes:
        counts: the number of rows of every expert, E numbers.
        places: (S,), the place of every row among all pairs of a token and one of its experts, token by token.
        tokens: the number of tokens of the whole batch.
        slots: k, the most experts of a token.
        batch: the number of examples of the batch, which have equally many tokens.
    """

    counts: list[int]
    places: Tensor
    tokens: int
    slots: int
    batch: int = 1

    @property
    def width(self) -> int:
        """The number of pairs of a token and an expert in an example."""
        return self.tokens * self.slots // self.batch

    @property
    def examples(self) -> Tensor:
        """(S,), of every row."""
        return self.places // self.width

    @property
    def experts(self) -> Tensor:
        """(S,), of every row."""
        counts = torch.tensor(self.counts, device=self.places.device)
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.places.device), counts)

    def segments(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, each with its rows."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def by_example(self, rows: Tensor) -> Tensor:
        """(S, n) → (B, t·k, n), token after token; zero where a token has fewer than k experts."""
        laid = rows.new_zeros(self.batch * self.width, rows.shape[-1]).index_copy_(0, self.places, rows)
        return laid.unflatten(0, (self.batch, self.width))

    def embedded(self, rows: Tensor) -> Tensor:
        """Output gradients (S, out) → (B, t·k, E·out), each at the place of its expert."""
        wide = rows.new_zeros(self.batch * self.width, len(self.counts), rows.shape[-1])
        wide[self.places, self.experts] = rows
        return wide.flatten(1).unflatten(0, (self.batch, self.width))


class RowsByExpert:
    """The rows of an expert by example: x (B, m, in) and δ (B, m, out), m the most rows of an example.

    Args:
        routing: the routing of the rows.
        x: (S, in), sorted by expert.
        delta: (S, out), sorted likewise.
    """

    def __init__(self, routing: Routing, x: Tensor, delta: Tensor):
        self._segments = dict(routing.segments())
        self._examples, self._batch = routing.examples, routing.batch
        self._x, self._delta = x, delta
        self._last: tuple[int, tuple[Tensor, Tensor]] | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The rows of an expert; the last result is cached."""
        if self._last is None or self._last[0] != expert:
            rows = self._segments[expert]
            x, delta = self._x[rows], self._delta[rows]
            if self._batch == 1:
                laid = x[None], delta[None]
            else:
                examples, order = self._examples[rows].sort()
                x, delta = x[order], delta[order]
                counts = torch.bincount(examples, minlength=self._batch)
                places = torch.arange(len(examples), device=x.device) - (counts.cumsum(0) - counts)[examples]
                shape = self._batch, int(counts.max())
                laid = x.new_zeros(*shape, x.shape[1]), delta.new_zeros(*shape, delta.shape[1])
                laid[0][examples, places], laid[1][examples, places] = x, delta
            self._last = expert, laid
        return self._last[1]


Tap = Callable[[str, Tensor, Routing, Tensor], Tensor]
"""A function called with a product, (name of the parameter, x (S, in), routing, W_e x (S, out)) → the tensor to use."""


def product_by_expert(x: Tensor, parts: Tensor, counts: Sequence[int]) -> Tensor:
    """X (S, n), sorted by expert, times each expert's matrix (E, m, n): (S, m), without a graph."""
    result = x.new_empty(len(x), parts.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(x[start : start + count], parts[expert].mT, out=result[start : start + count])
        start += count
    return result


class _Product(torch.autograd.Function):
    """`product_by_expert` with a gradient only for x, because the weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(parts)
        ctx.counts = counts
        return product_by_expert(x, parts, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (parts,) = ctx.saved_tensors
        return product_by_expert(gradients[0].contiguous(), parts.mT, ctx.counts), None, None


def multiplied_by_expert(x: Tensor, parts: Tensor, counts: list[int]) -> Tensor:
    """W_e x for x (S, in) sorted by expert and parts (E, out, in): (S, out)."""
    x = x.to(parts.dtype)
    if parts.requires_grad and torch.is_grad_enabled():
        pieces = x.split(counts)
        return torch.cat([F.linear(piece, parts[e]) for e, piece in enumerate(pieces)])
    result: Tensor = _Product.apply(x, parts, counts)
    return result
