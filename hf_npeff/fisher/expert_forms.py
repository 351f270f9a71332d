"""The supported forms of fused experts, each with a forward pass that exposes its products.

They are the forms of transformers' `use_experts_implementation` (Mixtral, OLMoE, Qwen, gpt-oss, DeepSeek, …),
which take tokens, experts' numbers and weights; LongCat's, some of whose experts return their input; Llama 4's,
which gives every token to every expert; DBRX's, in two dimensions; and JetMoE's, which gets its tokens sorted by
expert.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.experts import Experts, FusedWeight
from hf_npeff.fisher.routing import Routing, Tap

_TRIED_TOKENS = 3
"""Random tokens in a trial: few, because some implementations copy an expert's weights for every token."""
_TRIED_EXPERTS = 2
"""Experts for each of these tokens; all experts if a model has fewer."""


class RoutedExperts(Experts):
    """Experts called by forward(tokens (…, h), numbers of experts (T, k), weights (T, k)), as in transformers."""

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Tensor:
        """See `Experts.forward`."""
        hidden, index, weights = _in_order(self.module, args, kwargs)[:3]
        tokens = hidden.reshape(-1, hidden.shape[-1])
        slots = index.shape[-1]
        chosen, order = torch.sort(index.reshape(-1), stable=True)
        known = self.weights[-1].experts  # larger numbers mean no expert, or one without weights
        counts = torch.bincount(chosen, minlength=known)[:known].tolist()
        places = order[: sum(counts)]
        routing = Routing(counts, places, len(tokens), slots)
        shares = weights.reshape(-1)
        out = self._experts(tap, tokens[places // slots], routing)
        out = out * shares[places, None]
        width = out.shape[-1]
        laid = out.new_zeros(len(tokens) * slots, width).index_copy(0, places, out)
        if hasattr(self.module, "identity_expert") and len(places) < len(order):
            rest = order[len(places) :]
            laid = laid.index_copy(0, rest, (tokens[rest // slots] * shares[rest, None]).to(laid.dtype))
        total = laid.unflatten(0, (len(tokens), slots)).sum(1)
        return total.to(hidden.dtype).reshape(*hidden.shape[:-1], width)

    def _experts(self, tap: Tap, x: Tensor, routing: Routing) -> Tensor:
        module, bias = self.module, getattr(self.module, "has_bias", False)
        up, down = self.weights
        states = self._product(tap, up, x, routing, f"{up.name}_bias" if bias else "")
        if up.name == "up_proj":
            states = module.act_fn(states)
        elif hasattr(module, "_apply_gate"):
            states = module._apply_gate(states)
        else:
            gate, rest = states.chunk(2, dim=-1)
            states = module.act_fn(gate) * rest
        states = self._product(tap, down, states, routing, f"{down.name}_bias" if bias else "")
        return module.post_expert_norm(states) if getattr(module, "has_post_expert_norm", False) else states

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Experts.trial`."""
        x = self._random(generator, _TRIED_TOKENS, self.weights[0].into)
        known = self.weights[0].experts
        slots = min(_TRIED_EXPERTS, known)
        index = torch.stack([torch.randperm(known, generator=generator)[:slots] for _ in range(_TRIED_TOKENS)])
        weights = torch.rand(_TRIED_TOKENS, slots, generator=generator)
        return x, index.to(x.device), weights.to(x.device, x.dtype)


class DbrxExperts(RoutedExperts):
    """DBRX's experts: W₁, V₁ and W₂ᵀ of all experts stacked in one module."""

    def _experts(self, tap: Tap, x: Tensor, routing: Routing) -> Tensor:
        w1, v1, w2 = self.weights
        gate = self._product(tap, w1, x, routing)
        rest = self._product(tap, v1, x, routing)
        return self._product(tap, w2, self.module.mlp.activation_fn(gate) * rest, routing)

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Experts.trial`."""
        x, *others = super().trial(generator)
        return x[None], *others


class ExpertsOfAllTokens(Experts):
    """Llama 4's experts, forward(tokens (E·T, h)): every expert gets all tokens, those of others as zeros."""

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Tensor:
        """See `Experts.forward`."""
        (hidden,) = _in_order(self.module, args, kwargs)
        up, down = self.weights
        x = hidden.reshape(-1, up.into)
        tokens = len(x) // up.experts
        each = torch.arange(up.experts, device=x.device)[:, None]
        places = (torch.arange(tokens, device=x.device) * up.experts + each).flatten()
        routing = Routing([tokens] * up.experts, places, tokens, up.experts)
        gate, rest = self._product(tap, up, x, routing).chunk(2, dim=-1)
        return self._product(tap, down, rest * self.module.act_fn(gate), routing)

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Experts.trial`."""
        up = self.weights[0]
        return (self._random(generator, _TRIED_TOKENS * up.experts, up.into),)


class ExpertsOfSortedTokens(Experts):
    """JetMoE's experts, forward(rows sorted by expert, counts); the router says which tokens these are."""

    def __init__(self, module: Any, weights: tuple[FusedWeight, ...], router: nn.Module):
        super().__init__(module, weights)
        self._router: Any = router
        self._order: Tensor | None = None

    def watch(self) -> list[Any]:
        """See `Experts.watch`."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._order = output[0]

        return [self._router.register_forward_hook(keep)]

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Tensor:
        """See `Experts.forward`."""
        x, counts = _in_order(self.module, args, kwargs)
        order = self._order if self._order is not None else torch.arange(len(x), device=x.device)
        slots = self._router.top_k if self._order is not None else 1
        return self._product(tap, self.weights[0], x, Routing(list(counts), order, len(x) // slots, slots))

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """See `Experts.trial`."""
        weight = self.weights[0]
        counts = [_TRIED_TOKENS if e in (0, weight.experts - 1) else 0 for e in range(weight.experts)]
        return self._random(generator, sum(counts), weight.into), counts


def _in_order(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a forward pass, in the order of its parameters."""
    return list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]
