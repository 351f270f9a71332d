"""Combinations of unsketched rows, by sending the stored cotangents back again. Two ways give the same sums.

A few combinations: every combination of cotangents is sent back by itself, and no row is ever formed. Many of them:
every row of a batch is formed once, weight by weight, and added to all combinations. With T positions, n examples of c
rows and m combinations, and in multiplications for each number of a weight,

    one by one:    m · 2T              a gradient of a weight's output, and its product with the input
    from rows:     c · 2T + m · n c    the same for every row of cotangents, and the combinations of the products
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.gradients import CalledOnceForAll, MadeOneByOne, Receiver, backward_passes
from hf_npeff.fisher.parameters import gradients
from hf_npeff.fisher.routing import Routing

_GAIN = 2.0
"""How many times cheaper rows have to be, by the count above. Chosen: their products are smaller, so slower."""
_NUMBERS = 2**22
"""Numbers of rows that are formed at a time: bounds the memory, and stays in a cache on its way to the sums."""


class GradientSum(Receiver):
    """A receiver that adds up weight gradients Σ δᵀx over a batch, for the combination that is sent back.

    Sums are on the device of their weights, or on the CPU if the weights are not on the computing device.
    """

    def __init__(self, places: Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]], combinations: int):
        self.sums = [
            {name: torch.zeros(shape, device=device, dtype=dtype) for name, (shape, device, dtype) in places.items()}
            for _ in range(combinations)
        ]
        self._current = 0

    def before_backward(self, number: int) -> None:
        """Combination `number` is sent back next."""
        self._current = number

    def take_input(self, name: str, x: Tensor) -> Tensor:
        """The input, as it is."""
        return x

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add δᵀx, summed over examples and positions."""
        total = self.sums[self._current][name]
        rows, columns = delta.flatten(0, 1), saved.to(delta.dtype).flatten(0, 1)
        if total.device == delta.device and total.dtype == delta.dtype:
            total.addmm_(rows.mT, columns)
        else:
            total += (rows.mT @ columns).to(total.device, total.dtype)

    def take_routed_input(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """The input of fused experts, as it is."""
        return x

    def take_routed_gradient(self, name: str, saved: Tensor, delta: Tensor, routing: Routing) -> None:
        """Add δᵀx of every expert at its place."""
        total = self.sums[self._current][name].unflatten(0, (len(routing.counts), delta.shape[1]))
        for expert, rows in routing.segments():
            product = delta[rows].mT @ saved[rows].to(delta.dtype)
            total[expert] += product.to(total.device, total.dtype)


class RowSum(Receiver):
    """A receiver that forms the rows of single examples and adds them to all combinations at once.

    Sums are where those of `GradientSum` are. Fused experts are not supported.

    Attributes:
        mixing: (m, B, c), the coefficients of the present batch.
    """

    def __init__(self, places: Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]], combinations: int):
        self._sums = {
            name: torch.zeros(combinations, *shape, device=device, dtype=dtype)
            for name, (shape, device, dtype) in places.items()
        }
        self._combinations = combinations
        self._current = 0
        self.mixing = torch.zeros(combinations, 0, 0)

    def before_backward(self, number: int) -> None:
        """Row `number` of every example is sent back next."""
        self._current = number

    def take_input(self, name: str, x: Tensor) -> Tensor:
        """The input, as it is."""
        return x

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add the rows δᵀx of every example, times their coefficients."""
        total, saved = self._sums[name], saved.to(delta.dtype)
        mixing = self.mixing[:, :, self._current].to(total)
        step = max(1, _NUMBERS // (len(delta) * saved.shape[-1]))
        for start in range(0, delta.shape[-1], step):
            part = slice(start, start + step)
            rows = (delta[..., part].mT @ saved).flatten(1)
            total[:, part].view(len(total), -1).addmm_(mixing, rows.to(total.device, total.dtype))

    def finish(self) -> list[dict[str, Tensor]]:
        """{parameter: sum} of every combination; each has memory of its own, so that it can be freed alone."""
        sums: list[dict[str, Tensor]] = [{} for _ in range(self._combinations)]
        for name in list(self._sums):
            for combination, total in zip(sums, self._sums.pop(name), strict=True):
                combination[name] = total.clone()
        return sums


def place_of(weight: Tensor | None) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype in which the gradient of a weight is added up."""
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return torch.device("cpu"), torch.float32
    return weight.device, torch.promote_types(weight.dtype, torch.float32)


def lift_exact(
    forward: ForwardPass, examples: Sequence[Example], cotangents: Tensor, coefficients: Tensor, batch_size: int
) -> list[dict[str, Tensor]]:
    """Σ_i Σ_c coef_jic row_ic of unsketched rows, for several combinations j at once.

    Args:
        forward: the forward pass of the model that made the rows.
        examples: n of them, in the order of `cotangents`.
        cotangents: (n, c, t, s), as stored with the PEFs.
        coefficients: (m, n, c), of unscaled rows.
        batch_size: examples in a forward pass, which all combinations share.

    The memory is that of the combinations, m times all analysed weights, beside that of a backward pass.

    Returns:
        {parameter: matrix (out, in)} for every combination.
    """
    weights = bare_parameters(forward.model)
    places = {m.parameter: (m.shape, *place_of(weights.get(m.parameter))) for m in forward.maps}
    used = coefficients.abs().sum((0, 2)).nonzero()[:, 0].tolist()
    # Gradients keep their precision, whatever the size of norms, when the largest coefficient is 1; scale is free.
    coefficients = coefficients / coefficients.abs().amax((1, 2), keepdim=True).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    batches = [[used[i] for i in batch] for batch in forward.batches([examples[i] for i in used], batch_size)]
    summed = _summed_from_rows if _rows_are_cheaper(forward, [examples[i] for i in used], coefficients) else _summed
    try:
        sums = summed(forward, examples, cotangents, coefficients, batches, places)
    except CalledOnceForAll:
        if all(len(batch) == 1 for batch in batches):
            raise
        batches = [[i] for i in used]
        sums = summed(forward, examples, cotangents, coefficients, batches, places)
    _add_parameters(forward, examples, batches, cotangents, coefficients, sums)
    return [{name: total.cpu() for name, total in combination.items()} for combination in sums]


def _summed(
    forward: ForwardPass,
    examples: Sequence[Example],
    cotangents: Tensor,
    coefficients: Tensor,
    batches: Sequence[list[int]],
    places: Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]],
) -> list[dict[str, Tensor]]:
    """The combinations for the maps that hooks see."""
    receiver = GradientSum(places, len(coefficients))

    def entering(chosen: list[int], source: Tensor) -> Sequence[Tensor]:
        stored = cotangents[chosen].to(source.device).double()

        def of(j: int) -> Tensor:
            return torch.einsum("ic,icts->its", coefficients[j, chosen].to(stored.device), stored)

        return MadeOneByOne(len(coefficients), of)

    _send_back(forward, examples, batches, receiver, entering)
    return receiver.sums


def _send_back(
    forward: ForwardPass,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    receiver: GradientSum | RowSum,
    entering: Callable[[list[int], Tensor], Sequence[Tensor]],
) -> None:
    """One forward pass for each batch, and a backward pass for each cotangent that enters."""
    for indices in batches if forward.maps else ():
        source = forward.source_of([examples[i] for i in indices])
        backward_passes(forward.model, forward.maps, receiver, len(indices), source, partial(entering, indices))


def _rows_are_cheaper(forward: ForwardPass, used: Sequence[Example], coefficients: Tensor) -> bool:
    """Whether `_summed_from_rows` is the cheaper way to combinations (m, n, c) of the rows of some examples."""
    if forward.parameters or any(m.fused is not None for m in forward.maps):
        return False  # of these, autograd gives no rows of single examples, and hooks give them mixed
    m, _, c = coefficients.shape
    positions = sum(example.length for example in used)
    return _GAIN * (2 * c * positions + m * c * len(used)) < 2 * m * positions


def _summed_from_rows(
    forward: ForwardPass,
    examples: Sequence[Example],
    cotangents: Tensor,
    coefficients: Tensor,
    batches: Sequence[list[int]],
    places: Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]],
) -> list[dict[str, Tensor]]:
    """The same as `_summed`, with as many backward passes as an example has rows."""
    receiver = RowSum(places, len(coefficients))

    def entering(chosen: list[int], source: Tensor) -> Sequence[Tensor]:
        receiver.mixing = coefficients[:, chosen]
        return list(cotangents[chosen].to(source.device).unbind(1))

    _send_back(forward, examples, batches, receiver, entering)
    return receiver.finish()


def _add_parameters(
    forward: ForwardPass,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    cotangents: Tensor,
    coefficients: Tensor,
    sums: list[dict[str, Tensor]],
) -> None:
    """The same combinations for parameters that hooks do not see, by plain autograd."""
    names = list(forward.parameters)
    if not names:
        return
    weights = bare_parameters(forward.model)
    for total in sums:
        for name, shape in forward.parameters.items():
            device, dtype = place_of(weights.get(name))
            total[name] = torch.zeros(shape, device=device, dtype=dtype)
    for indices in batches:
        source = forward.source_of([examples[i] for i in indices])
        mixed = torch.einsum("jic,icts->jits", coefficients[:, indices], cotangents[indices].double())
        for j, each in enumerate(gradients(forward.model, names, source, mixed)):
            for name, gradient in zip(names, each, strict=True):
                into = sums[j][name]
                into += gradient.reshape(into.shape).to(into.device, into.dtype)
