"""Which errors say that memory has run out: they are told apart from what a model does not take."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on a device or, as PyTorch's CPU allocator puts it, beside it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
