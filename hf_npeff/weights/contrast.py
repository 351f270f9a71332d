"""The examples that a selective direction should move, and those that it should leave alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_npeff.weights.ridge_systems import gram, top_eigenvalue
from hf_npeff.weights.row_space import RowSpace

NONE_LEFT = (
    "there are no examples to leave alone, because the component is active on all of them. Pass PEFs of other data as "
    "keep=, or use selective=False for the component's own direction"
)


@dataclass(frozen=True)
class Contrast:
    """The examples to move and the examples to leave alone, in the coordinates of a `RowSpace`.

    Attributes:
        space: the space of the rows that were decomposed.
        wanted: (n,) how much each example should move: the component's coefficients, or 1 and 0.
        alone: (n,) bool, the examples to leave alone.
        kept: (n', c', m), the coordinates of other data's rows to leave alone, or None.
    """

    space: RowSpace
    wanted: Tensor
    alone: Tensor
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.number:
            raise ValueError(NONE_LEFT)

    @property
    def number(self) -> int:
        """N, the number of examples to leave alone."""
        return int(self.alone.sum()) + (0 if self.kept is None else len(self.kept))

    def disturbance(self) -> Tensor:
        """M (m, m)."""
        total = gram(self.space.rows, self.alone)
        if self.kept is not None:
            total += gram(self.kept)
        return total / self.number

    def top(self) -> float:
        """The largest eigenvalue of M; 0 if nothing moves the examples to leave alone."""
        return top_eigenvalue(self.disturbance())

    def everything(self) -> Tensor:
        """XᵀX (m, m) over all examples, including those to move, and the kept rows of other data."""
        return self.space.gram if self.kept is None else self.space.gram + gram(self.kept)
