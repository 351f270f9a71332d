"""Rows that stay on disk: a solver reads a store of PEFs chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_npeff.config import Precision
from hf_npeff.decomposition.solvers import DenseRows, Rows, top_directions
from hf_npeff.pefs.store import PEFs


class ChunkedRows:
    """Rows read from a store in chunks of a bounded size, for PEFs that do not fit in memory.

    Args:
        pefs: the store.
        weighting: chunk → the rows (·, c, d) that are decomposed, on their device.
        chunk: how many examples a chunk has.
        precision: the precision of the products.
        dim: the length of the rows that are decomposed; None takes that of the store.
        total: Σ_i ‖F_i‖²; None computes it from the rows.
    """

    def __init__(
        self,
        pefs: PEFs,
        weighting: Callable[[PEFs], Tensor],
        chunk: int,
        precision: Precision = "float32",
        *,
        dim: int | None = None,
        total: Tensor | None = None,
    ):
        self.pefs = pefs
        self.weighting = weighting
        self.precision = precision
        self.chunk = chunk
        self.n = len(pefs)
        self.dim = pefs.dim if dim is None else dim
        self._total = total

    def _parts(self) -> Iterator[tuple[slice, DenseRows]]:
        for place, part in self.pefs.placed_chunks(self.chunk):
            yield place, DenseRows(self.weighting(part), self.precision)

    def total(self) -> Tensor:
        """See `Rows`."""
        if self._total is None:
            self._total = torch.stack([rows.total() for _, rows in self._parts()]).sum()
        return self._total

    def energies(self, G: Tensor) -> Tensor:
        """See `Rows`."""
        return torch.cat([rows.energies(G) for _, rows in self._parts()])

    def pull(self, G: Tensor, W: Tensor) -> Tensor:
        """See `Rows`."""
        C = torch.zeros_like(G)
        for where, rows in self._parts():
            C += rows.pull(G, W[where])
        return C

    def reduce(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return value

    def top_directions(self, indices: list[int]) -> Tensor:
        """See `Rows`."""
        return top_directions(self.weighting(self.pefs[indices]))

    def within(self, Q: Tensor) -> Rows:
        """See `Rows`. In memory if that takes at most half a chunk, otherwise computed from the store each time."""
        if 2 * self.n * len(Q) <= self.chunk * self.dim:
            return DenseRows(torch.cat([rows.within(Q).A for _, rows in self._parts()]), total=self.total())

        def coordinates(part: PEFs) -> Tensor:
            return DenseRows(self.weighting(part), self.precision).within(Q).A

        return ChunkedRows(self.pefs, coordinates, self.chunk, dim=len(Q), total=self.total())
