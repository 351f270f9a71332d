"""Weights moved in place: checked before, rounded to their type, and brought back bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import named_weights
from hf_npeff.fisher.fsdp import FSDPModel
from hf_npeff.fisher.linear_layers import is_at_hand

logger = logging.getLogger(__name__)

_ROUNDED = 0.99
"""Below this cosine more than a fiftieth of the squared length of a step, 1 − .99², is what rounding made of it."""


class RoundedStep:
    """A step that was wanted in weights of 16 bits, and the one that was taken, which rounding makes another."""

    def __init__(self) -> None:
        self._wanted, self._taken, self._inner = 0.0, 0.0, 0.0

    def add(self, wanted: Tensor, taken: Tensor) -> None:
        """Add one parameter's share."""
        self._wanted += squared_norm(wanted)
        self._taken += squared_norm(taken)
        self._inner += float((wanted.double() * taken.double()).sum())

    @property
    def length(self) -> float:
        """Of the step that was taken, over that of the one that was wanted; 1 where none was wanted."""
        return (self._taken / self._wanted) ** 0.5 if self._wanted else 1.0

    @property
    def cosine(self) -> float:
        """Between the two; 1 where none was wanted, 0 where none was taken."""
        if not self._wanted:
            return 1.0
        return self._inner / (self._taken * self._wanted) ** 0.5 if self._taken else 0.0

    def tell(self) -> None:
        """Warn where the step that was taken points elsewhere."""
        if self.cosine < _ROUNDED:
            logger.warning(
                "weights of 16 bits round the step: %.0f%% of its length are taken, at a cosine of %.2f with it. Load "
                "the model in float32, or use applied_in_activations",
                100 * self.length,
                self.cosine,
            )


def squared_norm(value: Tensor) -> float:
    """‖value‖², summed in float64 or wider."""
    return float(torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float64))) ** 2


@contextlib.contextmanager
def weights_moved(model: nn.Module, deltas: Mapping[str, Tensor], scale: float) -> Iterator[None]:
    """θ + scale·deltas inside `with`; the parameters come back bit for bit, exceptions included.

    Args:
        model: whose parameters are moved.
        deltas: {parameter: change}, shaped like the parameters.
        scale: the step.

    Raises:
        UnsupportedModelError: if weights are sharded over processes, quantised or offloaded.
        ValueError: if the model lacks a parameter or has one of another shape.
    """
    if FSDPModel(model).active:
        raise UnsupportedModelError(
            "the model's weights are sharded over processes; load the whole model in one process to move them"
        )
    parameters = named_weights(model)
    if missing := [name for name in deltas if name not in parameters]:
        raise ValueError(f"the model has no parameters named {missing[:3]}; is it the one the direction was made for?")
    wrong = {
        name: tuple(parameters[name].shape) for name, value in deltas.items() if parameters[name].shape != value.shape
    }
    if wrong:
        raise ValueError(
            f"the model's parameters have other shapes than the direction's: {dict(list(wrong.items())[:3])}"
        )
    if away := [name for name in deltas if not is_at_hand(parameters[name])]:
        raise UnsupportedModelError(
            f"nothing can be added to {away[:3]}: they are quantised or offloaded. Use applied_in_activations, or "
            "load the model whole, in a type of floating point"
        )
    before = {name: parameters[name].detach().clone() for name in deltas}
    step = RoundedStep()
    try:
        with torch.no_grad():
            for name, delta in deltas.items():
                weight: Tensor = parameters[name]
                wide = torch.promote_types(weight.dtype, torch.float32)
                wanted = scale * delta.to(weight.device, wide)
                weight.copy_(weight.to(wide) + wanted)
                if weight.dtype != wide:
                    step.add(wanted, weight.to(wide) - before[name].to(wide))
        step.tell()
        yield
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                parameters[name].copy_(kept)


@torch.no_grad()
def rounding_of(model: nn.Module, deltas: Mapping[str, Tensor], scale: float) -> RoundedStep | None:
    """What rounding would make of a step in the weights, without taking it; None where the weights cannot be moved.

    Args:
        model: whose parameters would be moved.
        deltas: {parameter: change}, shaped like the parameters.
        scale: the step.
    """
    parameters = named_weights(model)
    if FSDPModel(model).active or not all(n in parameters and is_at_hand(parameters[n]) for n in deltas):
        return None
    step = RoundedStep()
    for name, delta in deltas.items():
        weight: Tensor = parameters[name]
        # Wider than the weight, so that the rounding of 32 bits is seen as well.
        before = weight.double()
        wanted = scale * delta.to(weight.device).double()
        step.add(wanted, (before + wanted).to(weight.dtype).double() - before)
    return step
