"""Fused experts: many linear maps in one parameter, applied to tokens that a router sends to a few of them.

A mixture of experts keeps its weights W_e in one tensor, as (E, out, in) or (E, in, out), and multiplies each token
only by those of its k experts. There is no module call for a single W_e, so hooks on modules cannot see its product.
Here the call of the experts is replaced by a forward pass that computes the same and exposes every product x ↦ W_e x:
its inputs, its outputs, and the example and expert of each row (`routing.Routing`).

All W_e of a parameter count as one linear map with the weight (E·out, in), in which they are stacked. The gradient
of an example's output is then Σ over its rows of (δ placed at expert e) xᵀ.

`expert_forms` has the supported forward passes, and `expert_search` finds the modules that they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_npeff.fisher.routing import Routing, Tap, multiplied_by_expert


@dataclass(frozen=True)
class FusedWeight:
    """One parameter that holds the weights of E experts.

    Attributes:
        name: its name in its module, for instance "gate_up_proj".
        experts: the number of experts, E.
        out: the size of an expert's output.
        into: the size of an expert's input.
        transposed: whether every expert's weights are stored as (in, out).
        flat: whether the parameter is a matrix in which the experts' weights are stacked.
    """

    name: str
    experts: int
    out: int
    into: int
    transposed: bool = False
    flat: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(E·out, in)."""
        return self.experts * self.out, self.into

    def by_expert(self, weight: Tensor) -> Tensor:
        """The parameter, or a tensor of its shape → (E, out, in)."""
        parts = weight.reshape(self.experts, -1, weight.shape[-1])
        return parts.mT if self.transposed else parts

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(E·out, in) → shaped like the parameter."""
        parts = matrix.reshape(self.experts, self.out, self.into)
        parts = parts.mT if self.transposed else parts
        return parts.flatten(0, 1) if self.flat else parts


@dataclass
class Experts:
    """A module with fused experts, and the forward pass that exposes their products.

    Attributes:
        module: the module, with its own forward pass.
        weights: its fused parameters.
    """

    module: Any
    weights: tuple[FusedWeight, ...]

    def intercept(self, tap: Tap, wanted: Callable[[], bool]) -> Interception:
        """From now on run `forward` for the module's wanted calls; `remove` undoes this.

        Args:
            tap: called with every product.
            wanted: whether a call is wanted; the module's own forward pass runs for the others.
        """
        return Interception(self, tap, wanted)

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        """Compute the same as the module's own forward pass, by products that the tap sees."""
        raise NotImplementedError

    def watch(self) -> list[Any]:
        """Hooks that the forward pass needs on other modules."""
        return []

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """Random arguments for a forward pass; the first is the one to differentiate."""
        raise NotImplementedError

    def part(self, weight: FusedWeight) -> Tensor:
        """(E, out, in) of a fused parameter."""
        return weight.by_expert(self.tensor(weight))

    def tensor(self, weight: FusedWeight) -> Any:
        """A fused parameter."""
        tensor: Any = self.module
        for name in weight.name.split("."):
            tensor = getattr(tensor, name)
        return tensor

    def _product(self, tap: Tap, weight: FusedWeight, x: Tensor, routing: Routing, bias: str = "") -> Tensor:
        result = multiplied_by_expert(x, self.part(weight), routing.counts)
        if bias:
            result = result + getattr(self.module, bias)[routing.experts]
        unused = weight.experts - len(routing.counts)  # numbers of experts that have no other weights
        return tap(weight.name, x, replace(routing, counts=routing.counts + [0] * unused), result)

    def _random(self, generator: torch.Generator, tokens: int, width: int) -> Tensor:
        x, part = torch.randn(tokens, width, generator=generator), self.part(self.weights[0])
        return x.to(part.device, part.dtype)


class Interception:
    """Replaces a module's forward pass by that of its `Experts`, until `remove`.

    If a module has several, their taps see each product one after another, as hooks of a module would.
    """

    def __init__(self, experts: Experts, tap: Tap, wanted: Callable[[], bool]):
        self._module = experts.module
        self._tap, self._wanted = tap, wanted
        self._handles = experts.watch()
        own = vars(self._module)
        self._all: list[Interception] = own.setdefault(INTERCEPTIONS, [])
        self._all.append(self)
        if len(self._all) == 1:
            # Where Accelerate moves weights between devices, its own forward pass stays around this one.
            place = "_old_forward" if hasattr(self._module, "_hf_hook") else "forward"
            own[_REPLACED] = place, own.get(place)
            setattr(self._module, place, _forward(experts, self._all, getattr(self._module, place)))

    def remove(self) -> None:
        """Remove the tap; without any tap left, the module's own forward pass is restored."""
        for handle in self._handles:
            handle.remove()
        self._all.remove(self)
        own = vars(self._module)
        if not self._all:
            place, before = own.pop(_REPLACED)
            del own[INTERCEPTIONS]
            if before is None:
                delattr(self._module, place)
            else:
                setattr(self._module, place, before)

    @property
    def active(self) -> bool:
        """Whether the tap should see the current call."""
        return self._wanted()

    def __call__(self, name: str, x: Tensor, routing: Routing, output: Tensor) -> Tensor:
        """The tensor that is used instead of a product."""
        return self._tap(name, x, routing, output)


INTERCEPTIONS, _REPLACED = "_npeff_interceptions", "_npeff_replaced"
"""Attributes of a module whose forward pass is replaced: the replacement, and the original."""


def _forward(experts: Experts, interceptions: Sequence[Interception], own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        taps = [each for each in interceptions if each.active]

        def through(name: str, x: Tensor, routing: Routing, output: Tensor) -> Tensor:
            for tap in taps:
                output = tap(name, x, routing, output)
            return output

        return experts.forward(through, *args, **kwargs) if taps else own(*args, **kwargs)

    return forward
