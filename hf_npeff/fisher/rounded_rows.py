"""Finds examples whose rows are rounding and nothing else; they get the zero PEF of an example without a gradient.

Some gradients are zero in exact arithmetic: attention over a single token does not depend on the token's query. What is
computed is the rounding of sums that cancel, and at unit norm it would count as much as any other example.

A gradient is linear in its cotangent, and its rounding is not. So the rows are computed again from three times their
cotangents: of true rows, a third of the result is the same up to rounding, and of rounding it is other rounding. Only
examples that affect their prediction far less than another one are computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_npeff.data import Example
from hf_npeff.fisher.batching import precision_of, relative_change
from hf_npeff.fisher.forward import NotFiniteError
from hf_npeff.fisher.rows import RowMaker

logger = logging.getLogger(__name__)
_FACTOR = 3.0
"""Not a power of two, which would change no rounding."""
_MOSTLY_ROUNDING = 0.5
"""The relative change from which rows are rounding. Two independent roundings differ by 1.4 of their size, and true
rows by a few roundings."""
_ROUNDINGS, _LARGEST = 1000, 2e-2
"""Examples are computed again if they affect the prediction by so many roundings of the largest effect so far, or less,
and at most by this share of it. Rounding is off by some ten of the roundings of the example's own terms; a hundred
times as many are chosen, because computing a few more again costs little."""
_NAMED = 5
"""The most examples that the warning names."""


class RoundedRows:
    """Takes the rows out of batches that are rounding, and remembers their examples.

    Args:
        maker: the maker of the rows.
    """

    def __init__(self, maker: RowMaker):
        self._maker = maker
        self._share = doubtful_share(maker.forward.model)
        self._largest = 0.0  # so far: batches begin with the longest examples, and short ones are rounding
        self._found: dict[str, None] = {}

    def take_out(self, examples: Sequence[Example], rows: dict[str, Tensor]) -> None:
        """Set the factors and norms of examples to zero if they are rounding.

        Args:
            examples: the examples of a batch.
            rows: their tensors, as `RowMaker.rows` returns them; changed in place.
        """
        if self._maker.forward.fsdp.active:  # processes that share a model make the same passes
            return
        sizes, real = sensitivities(rows), rows["norms"] > 0
        self._largest = max([self._largest, *sizes[real].tolist()])
        for i in (real & (sizes <= self._share * self._largest)).nonzero()[:, 0].tolist():
            if self._are_rounding(examples[i], rows, i):
                rows["factors"][i] = 0
                rows["norms"][i] = 0
                self._found[examples[i].id] = None

    def warn(self) -> None:
        """Warn of the examples whose rows were rounding, if there are any."""
        if self._found:
            few = ", ".join(map(repr, list(self._found)[:_NAMED])) + (", …" if len(self._found) > _NAMED else "")
            logger.warning(
                "the gradients of examples %s (%d in all) are rounding alone, because the predictions do not depend "
                "on the analysed weights: their PEFs are zero, and no component describes them",
                few,
                len(self._found),
            )

    def _are_rounding(self, example: Example, rows: Mapping[str, Tensor], place: int) -> bool:
        """Whether other rounding changes an example's rows altogether."""
        stored = rows["factors"][place].double() * rows["norms"][place].sqrt()
        try:
            again = self._maker.rows_of([example], _FACTOR * rows["cotangents"][place : place + 1])[0]
        except NotFiniteError:
            return False
        return relative_change(again.to(stored) / _FACTOR, stored) > _MOSTLY_ROUNDING


def doubtful_share(model: nn.Module) -> float:
    """The share of another example's sensitivity up to which an example's rows may be rounding."""
    # Models of float64 may compute a softmax in float32.
    eps = max(torch.finfo(dtype).eps for dtype in (precision_of(model), torch.float32))
    return min(_ROUNDINGS * eps, _LARGEST)


def sensitivities(rows: Mapping[str, Tensor]) -> Tensor:
    """(B,): how far outputs move with the analysed weights, √‖AAᵀ‖ / ‖V‖ for the cotangents V; 0 where these are."""
    sizes = rows["cotangents"].double().flatten(1).norm(dim=1)
    return torch.where(sizes > 0, rows["norms"].sqrt() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0)
