"""Models whose weights FSDP2 shards over processes, which have to run every pass together.

Every module gathers its weights before it runs, forwards and backwards. So all processes have to run the same number of
passes, each on batches of its own. The weights of the head are read between the two passes and are gathered for this.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.processes import Processes


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is now only this process's shard."""
    return type(weight.data).__name__ == "DTensor"


def _fsdp_modules(model: nn.Module) -> list[Any]:
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class FSDPModel:
    """Keeps the processes of a model that FSDP2 shards in step; for any other model it does nothing.

    Attributes:
        active: whether FSDP2 shards the model's weights.

    Args:
        model: any model.

    Raises:
        UnsupportedModelError: if weights are sharded in another way than by FSDP2.
    """

    def __init__(self, model: nn.Module):
        self._modules = _fsdp_modules(model)
        self.active = bool(self._modules)
        self._near_head = self._modules[:1]
        # Only processes that have met share tensors out. Looking at every parameter takes as long as a tiny model does.
        together = dist.is_available() and dist.is_initialized()
        pieces = [p.data for p in model.parameters() if is_sharded(p)] if together else []
        by_tensor = any(sum(placement.is_shard() for placement in p.placements) > 1 for p in pieces)  # type: ignore[attr-defined]
        if by_tensor or (pieces and not self.active):
            raise UnsupportedModelError(
                "the model's weights are sharded by tensor parallelism, so inputs and output gradients are split over "
                "processes; shard it only with FSDP2 (fully_shard), load the whole model in every process, or use one "
                "process with device_map"
            )

    def watch_head(self, *heads: nn.Module | None) -> None:
        """Name the modules whose weights are read outside the passes."""
        wanted = {id(head) for head in heads if head is not None}
        around = [m for m in self._modules[1:] if any(id(part) in wanted for part in m.modules())]
        self._near_head = self._modules[:1] + around

    def gather_head(self, source: Tensor | None = None) -> None:
        """Gather the weights around the head: now, and again whenever a backward pass enters at `source`.

        FSDP2 gathers a module's weights when a gradient reaches its output, but a cotangent that enters at the last
        hidden state does not pass the output of the outermost module.
        """
        for module in self._near_head:
            module.unshard()
        if self.active and source is not None and source.requires_grad:
            source.register_hook(lambda _: self.gather_head())

    def release(self) -> None:
        """Shard the weights again, as they were."""
        for module in self._modules:
            module.reshard()

    def most(self, count: int) -> int:
        """The largest of all processes' counts; this process's own count if the model is not sharded."""
        return Processes.current().largest(count) if self.active else count
