"""Inner products of unsketched rows with weight changes, by sending back the stored cotangents again.

Row A_ic of an example is the gradient of ⟨v_ic, source⟩, Σ_t δ_t x_tᵀ for every linear map. Its inner product with a
change Δ is Σ_t δ_tᵀ (Δ x_t), summed over the maps. Δ x_t is computed in the forward pass, and no gradient of a weight
is formed. The product is the change of ⟨v_ic, source⟩ to first order, and ½ Σ_c ⟨A_ic, Δ⟩² is the KL of Δ to second
order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.gradients import CalledOnceForAll, Receiver, backward_passes
from hf_npeff.fisher.parameters import gradients

_RANK = 16
"""Rank of a random change. Its inner product with a matrix of rank 1, the worst case, has a kurtosis of 3 + 6/16 = 3.4
where a normal has 3; sums over several weights are nearer. Applying one costs a sixth of a matrix of 576 × 1,536."""


@dataclass(frozen=True)
class Factors:
    """A matrix BA that is never formed.

    Attributes:
        B: (out, q).
        A: (q, in).
    """

    B: Tensor
    A: Tensor

    def applied_to(self, x: Tensor) -> Tensor:
        """BA x of x (..., in): (..., out)."""
        return (x @ self.A.mT.to(x)) @ self.B.mT.to(x)

    def dense(self) -> Tensor:
        """BA (out, in)."""
        return self.B @ self.A


AnalysedChange = Mapping[str, Tensor | Factors]
"""{analysed parameter: its change, a matrix (out, in) for a linear map}."""


def random_change(like: Mapping[str, Tensor], norms: Mapping[str, float], seed: int) -> AnalysedChange:
    """A random change without a preferred direction, of the shapes of `like`, with a given norm in every weight.

    Large matrices are products of Gaussian factors: ⟨g, BA⟩ has mean 0 and variance ‖g‖² norm² / (out · in), which is
    that of a dense Gaussian.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor | Factors] = {}
    for name, matrix in like.items():
        each = norms[name] / math.sqrt(matrix.numel())
        if matrix.dim() == 2 and min(matrix.shape) > 2 * _RANK:
            B, A = (torch.randn(shape, generator=generator) for shape in ((len(matrix), _RANK), (_RANK, len(matrix.T))))
            drawn[name] = Factors(B * (each / math.sqrt(_RANK)), A)
        else:
            drawn[name] = torch.randn(matrix.shape, generator=generator) * each
    return drawn


class _Products(Receiver):
    """A receiver that takes the rows' inner products with changes."""

    def __init__(self, changes: Sequence[AnalysedChange]):
        self._changes = changes
        self.products = torch.zeros(0, 0, len(changes))
        self._row = 0

    def after_forward(self, source: Tensor, passes: int) -> None:
        """Make room for (B, c, m), in float64: sums over many maps cancel."""
        shape = len(source), passes, len(self._changes)
        self.products = torch.zeros(shape, dtype=torch.float64, device=source.device)

    def before_backward(self, number: int) -> None:
        """Row `number` of every example comes next."""
        self._row = number

    def take_input(self, name: str, x: Tensor) -> Tensor | None:
        """Δ x for every change, (B, m, t, out)."""
        here = [change.get(name) for change in self._changes]
        shown = next((each for each in here if each is not None), None)
        if shown is None:
            return None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        none = wide.new_zeros(*x.shape[:-1], len(shown.B if isinstance(shown, Factors) else shown))
        return torch.stack([none if each is None else _applied(each, wide) for each in here], dim=1)

    def take_gradient(self, name: str, saved: Tensor | None, delta: Tensor) -> None:
        """Add Σ_t δ_tᵀ (Δ x_t)."""
        if saved is not None:
            along = saved.flatten(2) @ delta.to(saved).flatten(1)[..., None]
            self.products[:, self._row] += along[..., 0].double()


def _applied(change: Tensor | Factors, x: Tensor) -> Tensor:
    return change.applied_to(x) if isinstance(change, Factors) else x @ change.mT.to(x)


def row_products(
    forward: ForwardPass,
    examples: Sequence[Example],
    cotangents: Tensor,
    changes: Sequence[AnalysedChange],
    batch_size: int,
) -> Tensor:
    """⟨A_ic, Δ_m⟩ of unscaled rows, float64 (n, c, m).

    Args:
        forward: the forward pass of the model that made the rows.
        examples: n of them, in the order of `cotangents`.
        cotangents: (n, c, t, s), as stored with the PEFs.
        changes: m of them; what the analysis does not cover is left out.
        batch_size: how many examples a forward pass takes.
    """
    n, c = cotangents.shape[:2]
    total = torch.zeros(n, c, len(changes), dtype=torch.float64)
    if any(m.parameter in change for change in changes for m in forward.maps):
        receiver = _Products(changes)
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
    """Add the products for maps that hooks see."""
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
    changes: Sequence[AnalysedChange],
    total: Tensor,
) -> None:
    """Add the products for parameters that hooks do not see, by plain autograd, one example at a time."""
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
                        value = change[name]
                        dense = value.dense() if isinstance(value, Factors) else value
                        total[i, row, m] += flat @ dense.double().flatten().cpu()
