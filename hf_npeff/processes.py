"""Several processes on one task: which of them this is, the share of each, and sums over all.

Every process gets a contiguous share of the examples. A fit exchanges only r×r and r×d numbers, and n numbers when a
start is chosen. Every process gets the same bits of a sum, so all of them take the same branches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_npeff.errors import NPEFFError


class _Sliceable(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, which: slice, /) -> Any: ...


_Values = TypeVar("_Values", bound=_Sliceable)


def on_cpu() -> bool:
    """Whether processes have only CPUs; Accelerate needs to know, or its processes do not find each other."""
    return not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()))


class Processes:
    """The processes of a run and their collective operations; by default only this process.

    Args:
        index: the number of this process, from 0.
        count: the number of processes.
        barrier: a function that waits for all processes.
    """

    def __init__(self, index: int = 0, count: int = 1, barrier: Callable[[], None] = lambda: None) -> None:
        self.index = index
        self.count = count
        self._barrier = barrier

    @classmethod
    def current(cls) -> Processes:
        """The processes that `torchrun` started; a process group is made if there is none yet."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            PartialState(cpu=on_cpu())
        return cls(dist.get_rank(), dist.get_world_size(), dist.barrier) if dist.is_initialized() else cls()

    @classmethod
    def of(cls, accelerator: Any) -> Processes:
        """The processes of an `accelerate.Accelerator` or `PartialState`."""
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)

    def meet(self, advice: str = "") -> None:
        """Wait for the other processes.

        Args:
            advice: advice that the error adds to the reason.

        Raises:
            NPEFFError: if another process never comes.
        """
        try:
            self._barrier()
        except RuntimeError as error:  # torch.distributed's errors, time-outs among them
            raise NPEFFError(
                f"another process died, or did not answer within the time-out of the process group{advice}"
            ) from error

    def share(self, n: int, index: int | None = None) -> range:
        """The contiguous share of n examples of this process, or of process `index`; sizes differ by one at most."""
        index = self.index if index is None else index
        return range(n * index // self.count, n * (index + 1) // self.count)

    def share_of(self, values: _Values) -> _Values:
        """This process's share of PEFs or of the rows of a tensor."""
        share = self.share(len(values))
        return values if self.count == 1 else values[share.start : share.stop]

    @staticmethod
    def _carrier(value: Tensor) -> Tensor:
        device = (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )
        return value.detach().to(device).clone().contiguous()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, the same on all."""
        if self.count == 1:
            return value
        carrier = self._carrier(value)
        dist.all_reduce(carrier)
        return carrier.to(value.device)

    def largest(self, value: int) -> int:
        """The largest of the processes' numbers, the same on all."""
        if self.count == 1:
            return value
        carrier = self._carrier(torch.tensor(value))
        dist.all_reduce(carrier, dist.ReduceOp.MAX)
        return int(carrier)

    def first(self, value: Tensor) -> Tensor:
        """The tensor of the first process; the others pass one of the same dtype, device and number of dimensions."""
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
        sizes = [len(self.share(n, index)) for index in range(self.count)]
        padded = value.new_zeros(max(sizes), *value.shape[1:])
        padded[: len(value)] = value
        carrier = self._carrier(padded)
        parts = [torch.empty_like(carrier) for _ in sizes]
        dist.all_gather(parts, carrier)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(value.device)
