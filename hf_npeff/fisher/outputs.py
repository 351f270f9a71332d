"""Outputs: a model's predictions for a batch, and where cotangents enter; the protocol for output heads."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from hf_npeff.fisher.distributions import Distribution


@dataclass
class HeadJacobian:
    """J_head (k×h) of every term, as two thin products: logits = f(U z), J_head = diag(f′(U z)) U.

    Attributes:
        weight: U (k, h), or (N, k, h) where terms have rows of their own.
        slope: f′ (N, k), or None if f is the identity.
    """

    weight: Tensor
    slope: Tensor | None = None

    def push(self, Q: Tensor) -> Tensor:
        """J_head Q: (N, h, m) → (N, k, m)."""
        Y = _as_one_product(Q.mT, self.weight.mT).mT
        return Y if self.slope is None else self.slope[..., None] * Y

    def pull(self, Y: Tensor) -> Tensor:
        """J_headᵀ Y: (N, k, m) → (N, h, m)."""
        Y = Y if self.slope is None else self.slope[..., None] * Y
        return _as_one_product(Y.mT, self.weight).mT


def _as_one_product(a: Tensor, b: Tensor) -> Tensor:
    """The product (N, m, n) of a (N, m, l) and b (l, n) or (N, l, n).

    With strides that do not fit, `a @ b` would copy b for every one of the N and multiply separately.
    """
    return a @ b if b.dim() == 3 else (a.reshape(-1, a.shape[-1]) @ b).unflatten(0, a.shape[:2])


@dataclass
class Outputs:
    """The result of a forward pass: B examples with up to t terms (single predictions) each.

    Attributes:
        source: (B, t, s), the tensor in the autograd graph at which cotangents enter: the logits (s = k), or the hidden
            state that the output embedding reads (s = h).
        logits: (B, t, k), detached, float32 or wider.
        valid: (B, t) bool; False for missing terms of examples that have fewer than t.
        distribution: the distribution of every term.
        jacobian: J_head, or None if it is unknown; the identity is used then.
        at_hidden: whether `source` is the hidden state.
        several: whether examples of the data set may have several terms; the rows are then reduced to `rank` in every
            batch, even if its examples have a single term each.

    Example:
        >>> from hf_npeff.fisher.distributions import Softmax
        >>> logits = torch.tensor([[[0.0, 1.0, 2.0]]], requires_grad=True)  # one example, one term, three classes
        >>> outputs = Outputs(logits, logits.detach(), torch.ones(1, 1, dtype=torch.bool), Softmax)
        >>> outputs.distribution(outputs.logits[0]).predictions()[0]
        tensor([2])
    """

    source: Tensor
    logits: Tensor
    valid: Tensor
    distribution: type[Distribution]
    jacobian: HeadJacobian | None = None
    at_hidden: bool = False
    several: bool = False

    def __repr__(self) -> str:
        shape = tuple(self.logits.shape)
        return f"Outputs(logits {shape}, source {tuple(self.source.shape)}, {self.distribution.name})"


@dataclass(frozen=True)
class HeadTraits:
    """The properties of a head that are known before it runs; the defaults are for custom heads.

    Attributes:
        task: the task's name, or the head's class.
        takes: names of the inputs that it uses; others are left out. None uses all.
        at_hidden: whether cotangents enter at the hidden state that the output embedding reads.
        vocabulary: whether it predicts tokens.
        weights: modules whose weights are read outside the forward pass.
        embeds: whether it predicts an embedding, which cannot be shown in words.
    """

    task: str
    takes: Set[str] | None = None
    at_hidden: bool = False
    vocabulary: bool = False
    weights: tuple[nn.Module, ...] = ()
    embeds: bool = False

    @property
    def between_terms(self) -> str:
        """What stands between the answers of an example's terms: nothing between tokens, which bring their spaces."""
        return "" if self.vocabulary else ", "


@runtime_checkable
class OutputHead(Protocol):
    """The protocol to implement for a head that hf_npeff does not know; pass the object as `task=`.

    `outputs` runs the model on a batch (a dict of tensors on the model's device) and returns its predictions.
    Cotangents enter at `Outputs.source`, so `source` must be in the autograd graph that the call builds. A head may
    have an attribute `traits`, a `HeadTraits`; without it the defaults are used (see `traits_of`).

    Example:
        >>> from hf_npeff.fisher.distributions import Softmax
        >>> class LastToken:
        ...     def outputs(self, model, batch):
        ...         logits = model(**batch).logits[:, -1:]
        ...         valid = torch.ones(logits.shape[:2], dtype=torch.bool)
        ...         return Outputs(logits, logits.detach(), valid, Softmax)
        >>> analyzer = NPEFFAnalyzer(model, tokenizer, task=LastToken())
        >>> len(analyzer.compute_pefs(["the cat sees the dog", "the dog sees the cat"]))
        2
    """

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """Run the model on a batch."""


def traits_of(head: OutputHead) -> HeadTraits:
    """A head's own traits, or the defaults, with its class as the task."""
    traits: HeadTraits | None = getattr(head, "traits", None)
    return traits if traits is not None else HeadTraits(type(head).__name__)
