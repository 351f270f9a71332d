"""Examples shared out over processes: each holds its own rows and coefficients, and all agree on G and on every sum.

Only sums of r×r and r×d numbers travel, and n numbers when a start is chosen. A sum arrives the same on every process,
so all of them take the same branches.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_npeff.decomposition.solvers import Rows
from hf_npeff.fisher.compute import share_of
from hf_npeff.pefs.store import PEFs

_Values = TypeVar("_Values", PEFs, Tensor)


def on_cpu() -> bool:
    """Whether processes have nothing but CPUs: Accelerate has to be told, or it starts as many lone processes."""
    return not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()))


class Processes:
    """The processes of a `torchrun`, and what they do together.

    Args:
        alone: leave the others out of it.

    Attributes:
        index: of this one.
        count: how many there are.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.index, self.count = 0, 1
        if alone or not dist.is_available():
            return
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            PartialState(cpu=on_cpu())
        if dist.is_initialized():
            self.index, self.count = dist.get_rank(), dist.get_world_size()

    def share_of(self, values: _Values) -> _Values:
        """This process's contiguous share of PEFs or of the rows of a tensor."""
        share = share_of(len(values), self.index, self.count)
        return values if self.count == 1 else values[share.start : share.stop]

    @staticmethod
    def _carrier(value: Tensor) -> Tensor:
        device = (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )
        return value.detach().to(device).clone().contiguous()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, the same on each."""
        if self.count == 1:
            return value
        carrier = self._carrier(value)
        dist.all_reduce(carrier)
        return carrier.to(value.device)

    def first(self, value: Tensor) -> Tensor:
        """What the first process has, of any shape; the others' values tell only dtype, device and dimensions."""
        if self.count == 1:
            return value
        shape = self._carrier(torch.tensor(value.shape))
        dist.broadcast(shape, 0)
        carrier = self._carrier(value if self.index == 0 else value.new_zeros(shape.tolist()))
        dist.broadcast(carrier, 0)
        return carrier.to(value.device)

    def gather(self, value: Tensor, n: int) -> Tensor:
        """The shares (n_i, …) of all processes, one after the other: (n, …)."""
        if self.count == 1:
            return value
        sizes = [len(share_of(n, i, self.count)) for i in range(self.count)]
        padded = value.new_zeros(max(sizes), *value.shape[1:])
        padded[: len(value)] = value
        carrier = self._carrier(padded)
        parts = [torch.empty_like(carrier) for _ in sizes]
        dist.all_gather(parts, carrier)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(value.device)


class ShardedRows:
    """`Rows` of which this process holds a contiguous share.

    Args:
        local: the rows of the share.
        n: examples of all processes.
        processes: all of them.
        like: a tensor with the dtype and device of the rows.
    """

    def __init__(self, local: Rows, n: int, processes: Processes, like: Tensor):
        self.like = like.new_zeros(())
        self.local = local
        self.n = n
        self.dim = local.dim
        self.processes = processes
        self.share = share_of(n, processes.index, processes.count)

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
