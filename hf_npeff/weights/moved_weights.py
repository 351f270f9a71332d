"""Weights changed in place: checked before, rounded to their dtype, and restored bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import named_weights
from hf_npeff.fisher.frozen import forget_caches
from hf_npeff.fisher.fsdp import FSDPModel
from hf_npeff.fisher.linear_layers import is_at_hand

logger = logging.getLogger(__name__)

_ROUNDED = 0.99
"""Below this cosine, more than a fiftieth of the squared length of a step, 1 − .99², is rounding."""


class RoundedStep:
    """A wanted step in weights of 16 bits, and the step after rounding."""

    def __init__(self) -> None:
        self._wanted, self._taken, self._inner = 0.0, 0.0, 0.0

    def add(self, wanted: Tensor, taken: Tensor) -> None:
        """Add the part of one parameter."""
        self._wanted += squared_norm(wanted)
        self._taken += squared_norm(taken)
        self._inner += float((wanted.double() * taken.double()).sum())

    @property
    def length(self) -> float:
        """The length of the rounded step over that of the wanted one; 1 if the wanted one is zero."""
        return (self._taken / self._wanted) ** 0.5 if self._wanted else 1.0

    @property
    def cosine(self) -> float:
        """The cosine between the two; 1 if the wanted step is zero, 0 if only the rounded one is."""
        if not self._wanted:
            return 1.0
        return self._inner / (self._taken * self._wanted) ** 0.5 if self._taken else 0.0

    def tell(self) -> None:
        """Warn if the rounded step points in another direction."""
        if self.cosine < _ROUNDED:
            logger.warning(
                "weights of 16 bits round the step: it keeps %.0f%% of its length, at a cosine of %.2f with the wanted "
                "step. Load the model in float32, or use applied_in_activations",
                100 * self.length,
                self.cosine,
            )


def squared_norm(value: Tensor) -> float:
    """‖value‖², summed in float64 or wider."""
    return float(torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float64))) ** 2


@contextlib.contextmanager
def weights_moved(model: nn.Module, deltas: Mapping[str, Tensor], scale: float) -> Iterator[None]:
    """θ + scale·deltas inside `with`; the parameters are restored bit for bit, also after an exception.

    Args:
        model: the model whose parameters change.
        deltas: {parameter: change}, shaped like the parameters.
        scale: the step.

    Raises:
        UnsupportedModelError: if weights are sharded over processes, quantised or offloaded.
        ValueError: if the model lacks a parameter or has one of another shape.
    """
    if FSDPModel(model).active:
        raise UnsupportedModelError(
            "the model's weights are sharded over processes; load the whole model in one process to change them"
        )
    parameters = named_weights(model)
    if missing := [name for name in deltas if name not in parameters]:
        raise ValueError(f"the model has no parameters named {missing[:3]}; is it the one the direction was made for?")
    wrong = {
        name: tuple(parameters[name].shape) for name, value in deltas.items() if parameters[name].shape != value.shape
    }
    if wrong:
        raise ValueError(
            f"the model's parameters have different shapes from the direction's: {dict(list(wrong.items())[:3])}"
        )
    if away := [name for name in deltas if not is_at_hand(parameters[name])]:
        raise UnsupportedModelError(
            f"nothing can be added to {away[:3]}, because they are quantised or offloaded. Use applied_in_activations, "
            "or load the model whole, in a floating-point dtype"
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
        forget_caches(model)
        yield
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                parameters[name].copy_(kept)
        forget_caches(model)


@torch.no_grad()
def rounding_of(model: nn.Module, deltas: Mapping[str, Tensor], scale: float) -> RoundedStep | None:
    """The effect of rounding on a step in the weights, without making the step; None if the weights cannot be changed.

    Args:
        model: the model whose parameters would change.
        deltas: {parameter: change}, shaped like the parameters.
        scale: the step.
    """
    parameters = named_weights(model)
    if FSDPModel(model).active or not all(n in parameters and is_at_hand(parameters[n]) for n in deltas):
        return None
    step = RoundedStep()
    for name, delta in deltas.items():
        weight: Tensor = parameters[name]
        # wider than the weight, so that rounding to 32 bits shows as well
        before = weight.double()
        wanted = scale * delta.to(weight.device).double()
        step.add(wanted, (before + wanted).to(weight.dtype).double() - before)
    return step
