"""Inner products of unsketched rows with weight changes, by replaying the cotangents that made them.

Row A_ic of an example is the gradient of ⟨v_ic, source⟩, Σ_t δ_t x_tᵀ for every linear map. Its inner product with a
change Δ is Σ_t δ_tᵀ (Δ x_t) summed over the maps: Δ x_t comes with the forward pass, and no gradient of a weight is
formed. To first order it is the change of ⟨v_ic, source⟩, and ½ Σ_c ⟨A_ic, Δ⟩² is the KL that Δ makes, to second order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.gradients import CalledOnceForAll, Receiver, backward_passes
from hf_npeff.fisher.parameters import gradients


class _Products(Receiver):
    """A receiver that takes the rows' inner products with changes, {map: (m, out, in)}."""

    def __init__(self, changes: Mapping[str, Tensor], count: int):
        self._changes = changes
        self._count = count
        self.products = torch.zeros(0, 0, count)
        self._row = 0

    def after_forward(self, source: Tensor, passes: int) -> None:
        """Make room for (B, c, m), in float64: sums over many maps cancel."""
        self.products = torch.zeros(len(source), passes, self._count, dtype=torch.float64, device=source.device)

    def before_backward(self, number: int) -> None:
        """Row `number` of every example comes next."""
        self._row = number

    def take_input(self, name: str, x: Tensor) -> Tensor | None:
        """Δ x for every change, (m, B, t, out)."""
        if name not in self._changes:
            return None
        changes = self._changes[name].to(x.device)
        wide = x.to(torch.promote_types(x.dtype, changes.dtype))
        return torch.stack([wide @ change.mT.to(wide) for change in changes])

    def take_gradient(self, name: str, saved: Tensor | None, delta: Tensor) -> None:
        """Add Σ_t δ_tᵀ (Δ x_t)."""
        if saved is not None:
            wide = delta.to(saved)
            self.products[:, self._row] += (saved * wide).sum((2, 3)).mT.double()


def row_products(
    forward: ForwardPass,
    examples: Sequence[Example],
    cotangents: Tensor,
    changes: Sequence[Mapping[str, Tensor]],
    batch_size: int,
) -> Tensor:
    """⟨A_ic, Δ_m⟩ of unscaled rows, float64 (n, c, m).

    Args:
        forward: the forward pass of the model that made the rows.
        examples: n of them, in the order of `cotangents`.
        cotangents: (n, c, t, s), as stored with the PEFs.
        changes: m of them, {parameter: matrix (out, in)}; what the analysis does not cover is left out.
        batch_size: examples of a forward pass.
    """
    n, c = cotangents.shape[:2]
    total = torch.zeros(n, c, len(changes), dtype=torch.float64)
    changed = {m.parameter: m.shape for m in forward.maps if any(m.parameter in change for change in changes)}
    stacked = {
        name: torch.stack([change[name] if name in change else torch.zeros(shape) for change in changes])
        for name, shape in changed.items()
    }
    if stacked:
        receiver = _Products(stacked, len(changes))
        batches = list(forward.batches(examples, batch_size))
        try:
            _add_maps(forward, examples, cotangents, receiver, batches, total)
        except CalledOnceForAll:
            if all(len(batch) == 1 for batch in batches):
                raise
            total.zero_()
            _add_maps(forward, examples, cotangents, receiver, [[i] for i in range(n)], total)
    _add_parameters(forward, examples, cotangents, changes, total)
    return total


def _add_maps(
    forward: ForwardPass,
    examples: Sequence[Example],
    cotangents: Tensor,
    receiver: _Products,
    batches: Sequence[list[int]],
    total: Tensor,
) -> None:
    """The share of what hooks see."""
    for indices in batches:

        def entering(source: Tensor, chosen: list[int] = indices) -> Sequence[Tensor]:
            return list(cotangents[chosen].to(source.device).transpose(0, 1))

        source = forward.source_of([examples[i] for i in indices])
        backward_passes(forward.model, forward.maps, receiver, len(indices), source, entering)
        total[indices] += receiver.products.to(total)


def _add_parameters(
    forward: ForwardPass,
    examples: Sequence[Example],
    cotangents: Tensor,
    changes: Sequence[Mapping[str, Tensor]],
    total: Tensor,
) -> None:
    """The share of parameters that hooks do not see, by plain autograd, one example at a time."""
    names = [name for name in forward.parameters if any(name in change for change in changes)]
    if not names:
        return
    for i, example in enumerate(examples):
        source = forward.source_of([example])
        for row, each in enumerate(gradients(forward.model, names, source, cotangents[i][:, None])):
            for name, gradient in zip(names, each, strict=True):
                flat = gradient.double().flatten().cpu()
                for m, change in enumerate(changes):
                    if name in change:
                        total[i, row, m] += flat @ change[name].double().flatten().cpu()
