"""A decomposition with the data that lifting its components needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs, check_same_sketch


@dataclass(frozen=True)
class Decomposed:
    """The data from which components are lifted.

    Attributes:
        decomposition: the decomposition.
        pefs: the PEFs that were decomposed.
        examples: the examples of the PEFs, in their order.
        weights: the identity of the model's weights, as in a change's `info`.
        known: an existing sketch, used if it is that of `pefs`.
    """

    decomposition: Decomposition
    pefs: PEFs
    examples: Sequence[Example]
    weights: Mapping[str, Any]
    known: Sketch | None = None

    def sketch(self) -> Sketch:
        """The sketch of the PEFs."""
        is_known = self.known is not None and self.known.fingerprint == self.pefs.fingerprint
        return self.known if is_known and self.known is not None else self.pefs.sketch()

    def cotangents(self) -> Tensor:
        """The cotangents of the rows, (n, c, t, s).

        Raises:
            ValueError: if the rows were made elsewhere.
        """
        if self.pefs.cotangents is None:
            raise ValueError(
                "these PEFs have no cotangents (their rows were not made by hf_npeff), so no backward pass can be "
                "repeated"
            )
        return self.pefs.cotangents


def check_decomposed(decomposition: Decomposition, pefs: PEFs) -> None:
    """Check that PEFs are those of a decomposition.

    Raises:
        IncompatibleSketchError: if they have another sketch.
        ValueError: if they are of other examples, or are not PEFs.
    """
    check_same_sketch(decomposition, pefs)
    if pefs.example_ids != decomposition.example_ids:
        raise ValueError("these PEFs are not those of the decomposition: their example ids differ")
