"""Watches a model's output embedding, and checks that the logits depend on its states in the expected way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.outputs import HeadJacobian

_SAME = {2: 2e-2, 4: 1e-3}
"""Largest relative difference of two gradients at the states, by the bytes of a number. Rounding is below 1e-2 in
bfloat16, and below 1e-3 in float32 if a GPU multiplies in TF32; an unexpected formula changes far more."""


class WatchedEmbedding:
    """A model's output embedding, which gets only the counted positions while it is watched.

    Args:
        embedding: the module.
        counted: its input → the states at the counted positions.
        first: watch its product before hooks of others change it; not possible if hooks of this package are on it,
            which the slope's backward pass must not reach.

    Attributes:
        hidden: the states that it got; None if it was not called, or not as expected.
        linear: its output for these states.
        why_not: what the model does instead, if `hidden` is None.
    """

    def __init__(self, embedding: nn.Module, counted: Callable[[Tensor], Tensor], first: bool):
        self._embedding, self._counted, self._first = embedding, counted, first
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self.hidden: Tensor | None = None
        self.linear: Tensor | None = None
        self.why_not = "reads the weight of its output embedding without calling it"  # as MobileBERT does

    def __enter__(self) -> WatchedEmbedding:
        self._handles = [
            self._embedding.register_forward_pre_hook(self._before),
            self._embedding.register_forward_hook(self._after, prepend=self._first),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != self._thread:  # another thread's prediction
            return args
        if args[0].dim() != 3:  # ProphetNet's, with a dimension of the tokens that it predicts at once
            self.why_not = f"calls its output embedding on states of {args[0].dim()} dimensions"
            return args
        self.hidden = self._counted(args[0])
        return (self.hidden, *args[1:])

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if threading.get_ident() != self._thread or self.hidden is None:
            return output
        # A tensor of its own: the slope's backward pass must not reach hooks on the embedding's output.
        if output.requires_grad:
            self.linear = output.view_as(output)
            return self.linear
        self.linear = output.detach().requires_grad_()
        return self.linear.clone()  # Chameleon changes its logits in place, which a leaf tensor does not allow


def is_jacobian(jacobian: HeadJacobian, logits: Tensor, states: Tensor, gather: Callable[[], None]) -> bool:
    """Whether J_headᵀu equals autograd's result for a random u.

    It does not if an embedding scales its product by learned numbers (nGPT's heads do), or if a model normalises its
    logits afterwards, because these are not a weight with a slope for every logit.

    Args:
        jacobian: the supposed J_head of N terms.
        logits: (B, t, k) with B·t = N, in the graph of `states`.
        states: (B, t, h), the input of the embedding.
        gather: gathers the weights again that FSDP2 has sharded after a pass.
    """
    generator = torch.Generator().manual_seed(0)
    of_logits, of_terms = (
        torch.randn(n, generator=generator).to(logits) for n in (logits.shape[-1], logits[..., 0].numel())
    )
    u = of_terms.view(*logits.shape[:-1], 1) * of_logits  # random in every term, but with few numbers to draw
    pulled: Tensor | None = torch.autograd.grad(logits, states, u, retain_graph=True, allow_unused=True)[0]
    if pulled is None:
        return False
    gather()
    expected = jacobian.pull(u.to(jacobian.weight.dtype).flatten(0, 1)[..., None])[..., 0]
    difference = (pulled.to(expected.dtype).flatten(0, 1) - expected).norm()
    return bool(difference <= _SAME[min(4, logits.dtype.itemsize, states.dtype.itemsize)] * expected.norm())


def has_path_beside(embedding: nn.Module, logits: Tensor, states: Tensor) -> bool:
    """Whether anything that requires a gradient reaches the logits without passing the states, except the embedding.

    A second head does, and so does a mechanism that copies from the prompt.
    """
    own = {id(parameter) for parameter in embedding.parameters()}
    end = states.grad_fn
    waiting: list[Any] = [logits.grad_fn]
    seen = {None, end}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not states and id(leaf) not in own:
            return True
        waiting.extend(source for source, _ in node.next_functions)
    return False
