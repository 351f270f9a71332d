"""The effective weight of a head, wherever it is: inside PEFT's wrappers, offloaded, or sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.bare_model import acting_adapters, is_wrapper, wrapped_by
from hf_npeff.fisher.fsdp import is_sharded


def inside(module: nn.Module) -> Any:
    """The module inside a PEFT wrapper, or the module itself."""
    return wrapped_by(module) if is_wrapper(module) else module


def weight_of(module: nn.Module, like: Tensor) -> Tensor | None:
    """The effective weight (k, h) of a head, wherever it is, with the dtype and device of its logits.

    It includes what PEFT's adapters add; None if an adapter does something other than adding.
    """
    linear = inside(module)
    weight = linear.weight
    if weight.device.type == "meta":  # offloaded by Accelerate
        weight = linear._hf_hook.weights_map["weight"]
    if is_sharded(weight):
        weight = weight.full_tensor()
    weight = weight.detach().to(like.device, like.dtype)
    around: Any = module
    acting = acting_adapters(module) if is_wrapper(module) else []
    if not acting or hasattr(around, "modules_to_save"):  # of those the inner module is the adapter's own
        return weight
    if hasattr(around, "token_adapter"):
        merged: Tensor = around.token_adapter.get_merged_weights(acting)
        return merged.detach().to(weight)
    known = getattr(around, "scaling", {})
    scaled_otherwise = getattr(around, "use_dora", None) or {}
    if not hasattr(around, "get_delta_weight") or any(scaled_otherwise.get(name) for name in acting):
        return None
    with torch.no_grad():
        for name in acting:
            if name in known:
                weight = weight + around.get_delta_weight(name).to(weight)
    return weight
