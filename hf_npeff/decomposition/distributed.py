"""Rows of examples that are divided among processes. All processes have the same G and the same sums."""

from __future__ import annotations

from torch import Tensor

from hf_npeff.decomposition.solvers import Rows
from hf_npeff.processes import Processes


class ShardedRows:
    """`Rows` of which this process holds a contiguous share.

    Args:
        local: the rows of this process's share.
        n: the number of examples of all processes together.
        processes: the processes.
        like: a tensor with the dtype and device of the rows.
    """

    def __init__(self, local: Rows, n: int, processes: Processes, like: Tensor):
        self.like = like.new_zeros(())
        self.local = local
        self.n = n
        self.dim = local.dim
        self.processes = processes
        self.share = processes.share(n)

    def total(self) -> Tensor:
        """See `Rows`."""
        return self.reduce(self.local.total())

    def energies(self, G: Tensor) -> Tensor:
        """See `Rows`."""
        return self.local.energies(G)

    def pull(self, G: Tensor, W: Tensor) -> Tensor:
        """See `Rows`."""
        return self.reduce(self.local.pull(G, W))

    def reduce(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return self.processes.sum(value)

    def gather(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return self.processes.gather(value, self.n)

    def top_directions(self, indices: list[int]) -> Tensor:
        """See `Rows`."""
        directions = self.like.new_zeros(len(indices), self.dim)
        mine = [(place, i - self.share.start) for place, i in enumerate(indices) if i in self.share]
        if mine:
            directions[[place for place, _ in mine]] = self.local.top_directions([i for _, i in mine]).to(directions)
        return self.reduce(directions)

    def within(self, Q: Tensor) -> ShardedRows:
        """See `Rows`."""
        return ShardedRows(self.local.within(Q), self.n, self.processes, self.like)
