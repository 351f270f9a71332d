"""A decomposition with all that its components are lifted from."""

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
    """What components are lifted from.

    Attributes:
        decomposition: whose components they are.
        pefs: those that were decomposed.
        examples: theirs, in their order.
        weights: the model's, as a change's `info` names them.
        known: a sketch that need not be rebuilt where it is that of `pefs`.
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
        """Those of the rows, (n, c, t, s).

        Raises:
            ValueError: if the rows were made elsewhere.
        """
        if self.pefs.cotangents is None:
            raise ValueError(
                "these PEFs hold no cotangents (their rows were made elsewhere), so no pass can be replayed"
            )
        return self.pefs.cotangents


def check_decomposed(decomposition: Decomposition, pefs: PEFs) -> None:
    """Refuse PEFs that are not those of a decomposition.

    Raises:
        IncompatibleSketchError: if they are of another sketch.
        ValueError: if they are of other examples, or no PEFs.
    """
    check_same_sketch(decomposition, pefs)
    if pefs.example_ids != decomposition.example_ids:
        raise ValueError("these PEFs are not those of the decomposition: their example ids differ")
