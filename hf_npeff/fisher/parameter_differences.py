"""Are autograd's gradients of parameters the true ones? They are compared with central differences of the predictions.

`differences` does this for linear maps, by moving their outputs. Here the parameters that `FisherConfig(parameters=)`
names are moved themselves, all of them along a random direction u,

    (⟨v, z(θ + su)⟩ − ⟨v, z(θ − su)⟩) / 2s      is compared with      ⟨∇⟨v, z⟩, u⟩,

where u is as large as each parameter's own numbers. This detects a `detach` or a wrong backward pass between a
parameter and the prediction; code before the parameter does not matter.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.batching import percent, precision_of
from hf_npeff.fisher.differences import EXACT, in_common, relative
from hf_npeff.fisher.eigenpairs import HiddenMetric
from hf_npeff.fisher.foreign_parts import foreign_parts
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.parameters import gradients
from hf_npeff.fisher.rows import choose_cotangents

logger = logging.getLogger(__name__)
_LEAST = 1e-2
"""Size of a direction if a parameter is zero, as new biases are."""


def check_parameter_differences(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, example: Example
) -> None:
    """Compare gradients of parameters with differences, on one example; not possible in 16 bits.

    Raises:
        UnsupportedModelError: if the gradients are wrong, and some code of the model is not from transformers.
    """
    if (
        not forward.parameters
        or forward.fsdp.active
        or precision_of(forward.model) not in (torch.float32, torch.float64)
    ):
        return
    try:
        error = _Comparison(forward, config, metric, example).error()
    except NotFiniteError:
        return
    if error is None:
        return
    names = list(forward.parameters)
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    much = (
        f"autograd's gradients of {few} differ by {percent(error)} from what a small change of them does to the "
        "predictions (central differences of two sizes agree)"
    )
    if foreign := foreign_parts(forward):
        raise UnsupportedModelError(
            f"{much}. The gradient is cut or wrong after one of them: look for a detach, torch.no_grad or an autograd "
            f"function, for instance in {foreign[0]}, or leave the parameter out"
        )
    logger.warning("%s; this is transformers' own code. The rows are computed with the model's own backward pass", much)


class _Comparison:
    def __init__(self, forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, example: Example):
        self._forward, self._config, self._metric, self._example = forward, config, metric, example
        every = bare_parameters(forward.model)
        self._tensors = [every[name] for name in forward.parameters]
        self._generator = torch.Generator().manual_seed(config.seed)

    def error(self) -> float | None:
        """The relative difference if gradients are wrong; None if they are right, or if it cannot be decided."""
        v = self._cotangent()
        names = list(self._forward.parameters)
        (each,) = gradients(self._forward.model, names, self._forward.source_of([self._example]), v[None])
        directions = [self._direction() for _ in range(EXACT.slopes)]
        slopes = torch.tensor(
            [[sum(float((g.double() * u).sum()) for g, u in zip(each, d, strict=True)) for d in directions]],
            dtype=torch.float64,
        )
        before = None
        for size in EXACT.sizes:
            differences = torch.tensor([[self._difference(v, d, size) for d in directions]], dtype=torch.float64)
            if relative(slopes, differences) <= EXACT.tolerance:
                return None
            if before is not None:
                common, apart = in_common(slopes, before, differences)
                if common > EXACT.wrong and apart <= EXACT.agreement:
                    return common
            before = differences
        return None

    def _cotangent(self) -> Tensor:
        """The sum of the cotangents with random signs (1, t, s)."""
        with torch.no_grad():
            outputs = self._forward.outputs([self._example])
        V = choose_cotangents(self._config, self._metric, outputs, [self._example]).values
        signs = 2 * torch.randint(0, 2, V.shape[:3], generator=self._generator) - 1
        return (V * signs.to(V)[..., None]).sum(2)

    def _direction(self) -> list[Tensor]:
        """A random direction for each parameter, as large as its numbers."""
        drawn = (
            torch.randn(t.shape, generator=self._generator, dtype=torch.float64).to(t.device) for t in self._tensors
        )
        sizes = (max(float(t.double().square().mean().sqrt()), _LEAST) for t in self._tensors)
        return [u * size for u, size in zip(drawn, sizes, strict=True)]

    @torch.no_grad()
    def _difference(self, v: Tensor, direction: Sequence[Tensor], size: float) -> float:
        values = []
        for step in (size, -size):
            with _moved(self._tensors, direction, step):
                z = self._forward.outputs([self._example]).source.double()
            values.append(float(torch.where(v != 0, v.double() * z, 0.0).sum()))
        return (values[0] - values[1]) / (2 * size)


@contextlib.contextmanager
def _moved(tensors: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Iterator[None]:
    kept = [tensor.clone() for tensor in tensors]
    try:
        for tensor, u in zip(tensors, direction, strict=True):
            tensor.add_((step * u).to(tensor.dtype))
        yield
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)
