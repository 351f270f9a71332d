"""What a selective direction is to move, and what it is to leave alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_npeff.weights.ridge_systems import gram, top_eigenvalue
from hf_npeff.weights.row_space import RowSpace

NONE_LEFT = (
    "no examples are left alone: what is to move is active on all of them. Give PEFs of other data as keep=, or use "
    "selective=False for a component's own direction"
)


@dataclass(frozen=True)
class Contrast:
    """What is to move and what is not, in the coordinates of a `RowSpace`.

    Attributes:
        space: the space of the rows that were decomposed.
        wanted: (n,) how much each of their examples is wanted to move: coefficients of the component, or 1 and 0.
        alone: (n,) bool, which of them are to be left alone.
        kept: (n', c', m), coordinates of further rows to be left alone, or None.
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
        """N, the examples to be left alone."""
        return int(self.alone.sum()) + (0 if self.kept is None else len(self.kept))

    def disturbance(self) -> Tensor:
        """M (m, m)."""
        total = gram(self.space.rows, self.alone)
        if self.kept is not None:
            total += gram(self.kept)
        return total / self.number

    def top(self) -> float:
        """The largest eigenvalue of M; 0 where nothing moves the examples to be left alone."""
        return top_eigenvalue(self.disturbance())

    def everything(self) -> Tensor:
        """XᵀX (m, m) of all examples, those that are to move among them, and of kept ones."""
        return self.space.gram if self.kept is None else self.space.gram + gram(self.kept)
