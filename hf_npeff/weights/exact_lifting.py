"""Combinations of unsketched rows, by replaying the cotangents that made them; no row is ever formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_npeff.data import Example, batches_by_length
from hf_npeff.fisher.gradients import CalledOnceForAll, LinearHooks
from hf_npeff.fisher.parameters import gradients
from hf_npeff.fisher.passes import FisherPass


class GradientSum:
    """A receiver that adds up weight gradients Σ δᵀx over a batch, for the combination that is being sent back.

    Sums lie beside their weights, or on the CPU where the weights are not on the device that computes.
    """

    def __init__(self, places: Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]], combinations: int):
        self.sums = [
            {name: torch.zeros(shape, device=device, dtype=dtype) for name, (shape, device, dtype) in places.items()}
            for _ in range(combinations)
        ]
        self.current = 0

    def take_input(self, name: str, x: Tensor) -> Tensor:
        """The input, as it is."""
        return x

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add δᵀx, summed over examples and positions."""
        total = self.sums[self.current][name]
        rows, columns = delta.flatten(0, 1), saved.to(delta.dtype).flatten(0, 1)
        if total.device == delta.device and total.dtype == delta.dtype:
            total.addmm_(rows.mT, columns)
        else:
            total += (rows.mT @ columns).to(total.device, total.dtype)


def _place(weight: Tensor | None) -> tuple[torch.device, torch.dtype]:
    """Where, and in which type, the gradient of a weight is added up."""
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return torch.device("cpu"), torch.float32
    return weight.device, torch.promote_types(weight.dtype, torch.float32)


def lift_exact(
    work: FisherPass, examples: Sequence[Example], cotangents: Tensor, coefficients: Tensor, batch_size: int
) -> list[dict[str, Tensor]]:
    """Σ_i Σ_c coef_jic row_ic before the sketch, for several combinations j at once.

    Args:
        work: the pass over the model that made the rows.
        examples: n of them, in the order of `cotangents`.
        cotangents: (n, c, t, s), as stored with the PEFs.
        coefficients: (m, n, c), of unscaled rows.
        batch_size: examples of a forward pass, which all combinations share.

    Returns:
        For every combination {parameter: matrix (out, in)}.
    """
    weights = dict(work.model.named_parameters(remove_duplicate=False))
    places = {m.parameter: (m.shape, *_place(weights.get(m.parameter))) for m in work.maps}
    used = coefficients.abs().sum((0, 2)).nonzero()[:, 0].tolist()
    size = work.batch_size(examples, batch_size)
    # Gradients keep their precision, whatever the size of norms, when the largest coefficient is 1; scale is free.
    coefficients = coefficients / coefficients.abs().amax((1, 2), keepdim=True).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    batches = [[used[i] for i in batch] for batch in batches_by_length([examples[i].length for i in used], size)]
    try:
        sums = _summed(work, examples, cotangents, coefficients, batches, places)
    except CalledOnceForAll:
        if size == 1:
            raise
        batches = [[i] for i in used]
        sums = _summed(work, examples, cotangents, coefficients, batches, places)
    _add_parameters(work, examples, batches, cotangents, coefficients, sums)
    return [{name: total.cpu() for name, total in one.items()} for one in sums]


def _summed(
    work: FisherPass,
    examples: Sequence[Example],
    cotangents: Tensor,
    coefficients: Tensor,
    batches: Sequence[list[int]],
    places: Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]],
) -> list[dict[str, Tensor]]:
    """The combinations for what hooks see."""
    receiver = GradientSum(places, len(coefficients))
    with LinearHooks(work.model, work.maps, receiver) as hooks:
        for indices in batches if work.maps else ():
            hooks.begin(len(indices))
            source = work.outputs([examples[i] for i in indices]).source
            stored = cotangents[indices].to(source.device).double()
            for j in range(len(coefficients)):
                receiver.current = j
                mixed = torch.einsum("ic,icts->its", coefficients[j, indices].to(source.device), stored)
                mixed = mixed[:, : source.shape[1], : source.shape[2]]  # stored for the longest example
                hooks.backward(source, mixed, last=j == len(coefficients) - 1)
    return receiver.sums


def _add_parameters(
    work: FisherPass,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    cotangents: Tensor,
    coefficients: Tensor,
    sums: list[dict[str, Tensor]],
) -> None:
    """The same combinations for parameters that hooks do not see, by plain autograd."""
    names = list(work.parameters)
    if not names:
        return
    weights = dict(work.model.named_parameters(remove_duplicate=False))
    for total in sums:
        for name, shape in work.parameters.items():
            device, dtype = _place(weights.get(name))
            total[name] = torch.zeros(shape, device=device, dtype=dtype)
    for indices in batches:
        with torch.no_grad():
            source = work.outputs([examples[i] for i in indices]).source
        stored = cotangents[indices].to(source.device).double()
        mixed = torch.einsum("jic,icts->jits", coefficients[:, indices].to(source.device), stored)
        mixed = mixed[:, :, : source.shape[1], : source.shape[2]]

        def forward(chosen: list[int] = indices) -> Tensor:
            return work.outputs([examples[i] for i in chosen]).source

        for j, found in enumerate(gradients(work.model, names, forward, mixed)):
            for name, gradient in zip(names, found, strict=True):
                into = sums[j][name]
                into += gradient.reshape(into.shape).to(into.device, into.dtype)
