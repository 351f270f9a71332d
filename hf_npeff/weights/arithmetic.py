"""Sums of weight changes, and the rest of a change when directions are taken out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from hf_npeff.config import check_scale
from hf_npeff.weights.change_sums import check_one_base, projected_out, summed
from hf_npeff.weights.layouts import Layout
from hf_npeff.weights.moved_weights import squared_norm

_Self = TypeVar("_Self", bound="DirectionArithmetic")


class DirectionArithmetic(Mapping[str, Tensor]):
    """Arithmetic of `ParameterDirection`: sums, multiples, projections.

    Attributes:
        layouts: {parameter: layout}, such as "linear" or "bias".
        info: how the change was made.
    """

    layouts: dict[str, Layout]
    info: dict[str, Any]

    def _changed(
        self: _Self, deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], info: Mapping[str, Any]
    ) -> _Self:
        """Another direction of the same kind, with its own length."""
        raise NotImplementedError

    @property
    def norm(self) -> float:
        """The norm over all parameters together."""
        return sum(map(squared_norm, self.values())) ** 0.5

    def _plus(self: _Self, weight: float, other: object, other_weight: float) -> _Self:
        if not isinstance(other, DirectionArithmetic):
            return NotImplemented
        check_one_base([self.info, other.info])
        deltas, layouts = summed([(weight, self), (other_weight, other)], [self.layouts, other.layouts])
        if not deltas:
            raise ValueError("the changes cancel: their sum is zero")
        return self._changed(deltas, layouts, {**self._origin(), "method": "sum"})

    def _origin(self) -> dict[str, Any]:
        """The information that a sum keeps."""
        kept = (
            "model",
            "revision",
            "weights",
            "architecture",
            "module",
            "task",
            "tied",
            "tied_embeddings",
            "fingerprint",
        )
        return {name: self.info[name] for name in kept if name in self.info}

    def __add__(self: _Self, other: object) -> _Self:
        """The sum, with its own length; a direction of unit norm counts with its length of 1.

        Raises:
            IncompatibleWeightsError: if the two are for weights that are known to differ.
            ValueError: if a parameter has different shapes in the two, or the sum is zero.
        """
        return self._plus(1.0, other, 1.0)

    def __sub__(self: _Self, other: object) -> _Self:
        """The difference, with its own length; see `__add__`."""
        return self._plus(1.0, other, -1.0)

    def __mul__(self: _Self, factor: object) -> _Self:
        """The change times a factor.

        Raises:
            ValueError: if the factor is zero or not finite.
        """
        if not isinstance(factor, int | float) or isinstance(factor, bool):
            return NotImplemented
        factor = check_scale(factor)
        return self._changed({n: factor * v for n, v in self.items()}, self.layouts, self.info)

    __rmul__ = __mul__

    def __neg__(self: _Self) -> _Self:
        """The opposite change."""
        return self * -1.0

    def without(self: _Self, directions: DirectionArithmetic | Sequence[DirectionArithmetic]) -> _Self:
        """The change minus its orthogonal projection on the span of some directions.

        Args:
            directions: the directions, for example lifted components.

        Raises:
            ValueError: if a parameter has different shapes, or nothing is left.

        Example:
            >>> change = direction + 0.5 * direction.random_like(seed=3)
            >>> abs(change.without(direction).cosine(direction)) < 1e-5
            True
        """
        chosen: list[DirectionArithmetic] = (
            [directions] if isinstance(directions, DirectionArithmetic) else list(directions)
        )
        if not chosen:
            return self
        left = projected_out(self, chosen)
        layouts = dict(self.layouts)
        for direction in chosen:
            layouts |= direction.layouts
        size = sum(map(squared_norm, left.values())) ** 0.5
        if size <= 1e-6 * self.norm:  # float32's rounding of the parts that cancel
            raise ValueError("nothing is left of the change without these directions")
        return self._changed(left, layouts, {**self._origin(), "method": "without"})

    def energies(self) -> dict[str, float]:
        """{parameter: its share of ‖Δ‖²}, the largest first; the square root times `norm` is the parameter's norm.

        Example:
            >>> round(sum(direction.energies().values()), 6)
            1.0
        """
        squares = {name: squared_norm(value) for name, value in self.items()}
        total = sum(squares.values())
        return dict(sorted(((n, v / total) for n, v in squares.items()), key=lambda item: -item[1]))
