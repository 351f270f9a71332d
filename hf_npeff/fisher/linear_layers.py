"""Finds the modules that compute x Wᵀ + b and nothing else, whatever their class is called.

Hooks derive a weight's gradient from a module's input and output gradient, so the module must compute exactly this
product, as `nn.Linear` and GPT-2's Conv1D do. Their subclasses may do something else (a router that returns a tuple, a
block-diagonal product), and some round their input, which has no derivative. Both are detected by calling them with
random numbers. Layers whose weights are quantised or offloaded cannot be checked and are accepted as they are; if one
of them cuts the gradient, this is noticed when it runs (`gradients.LinearHooks`).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from hf_npeff.fisher.fsdp import is_sharded
from hf_npeff.fisher.memory import is_out_of_memory

logger = logging.getLogger(__name__)
Behaviour = Literal["product", "rounding", "other"]
_PROBES = (1.0, 30.0)
"""Scales of the random inputs of a probe; a clamp, for example, is linear only near zero."""
_SAME = 1e-2
"""Relative difference of a probe from the product: rounding in bfloat16 is below it, another formula far above."""
_NEARLY_SAME = 0.3
"""The same for a layer that rounds its input; rounding to four bits stays below it."""
_CUT = 0.7
"""The relative difference of a gradient from that of the product at which it is cut. Chosen: no gradient at all is off
by 1, one through the scale of the rounding alone nearly so, and one of a small part beside the product by little."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module's class says that it is a linear map."""
    return isinstance(module, nn.Linear | Conv1D)


def is_at_hand(weight: Tensor | None) -> bool:
    """Whether autograd can differentiate a weight: it is neither offloaded, quantised nor sharded.

    Some quantised weights have a floating-point dtype: torchao's, which are tensor subclasses, and those of 8 bits, for
    which PyTorch has no arithmetic.
    """
    return (
        weight is not None
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1
        and weight.device.type != "meta"
        and not is_sharded(weight)
        and not is_traceable_wrapper_subclass(weight)
    )


def packed_size(module: nn.Module) -> int:
    """The entries of the weight of a quantised layer that is no linear layer of PyTorch's; 0 for any other module.

    Such layers (of GPTQ, AWQ, HQQ, BitNet) keep whole numbers with several entries of the weight in each, often in
    buffers, so that the model's parameters do not tell their size.
    """
    sides = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if is_linear(module) or not all(isinstance(side, int) for side in sides):
        return 0
    held = [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]
    packed = any(value.dim() > 1 and not value.is_floating_point() and value.dtype != torch.bool for value in held)
    return sides[0] * sides[1] if packed else 0  # type: ignore[operator]


def is_computed(module: nn.Module) -> bool:
    """Whether a layer's weight is computed from other parameters in every pass: masks, weight norm, parametrizations.

    A row of such a weight would be about numbers that cannot be changed, some of them masked.
    """
    return isinstance(vars(module).get("weight"), Tensor) or "weight" in getattr(module, "parametrizations", ())


def behaviour(module: nn.Module) -> Behaviour:
    """What a layer computes: x Wᵀ + b; the same for a rounded x, so that no gradient reaches x; or something else."""
    if is_computed(module):
        logger.info("a %s is not a linear map: its weight is computed from other parameters", type(module).__name__)
        return "other"
    own_forward = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # Accelerate's calls the original one
    if not own_forward and type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return "product"
    if not is_at_hand(getattr(module, "weight", None)):
        return "product"
    kinds = {_probed(module, scale) for scale in _PROBES}
    return kinds.pop() if len(kinds) == 1 else "rounding" if kinds == {"product", "rounding"} else "other"


@torch.enable_grad()
def _probed(module: Any, scale: float) -> Behaviour:
    """Compare a module's output and its gradient with x Wᵀ + b for a random x (2, 3, in) of this scale."""
    weight = (module.weight.mT if isinstance(module, Conv1D) else module.weight).detach()
    generator = torch.Generator().manual_seed(0)
    # Two examples of three tokens, so that the two sizes differ
    x = (scale * torch.randn(2, 3, weight.shape[1], generator=generator)).to(weight.device, weight.dtype)
    x.requires_grad_()
    training = module.training
    try:
        module.training = False
        with torch.random.fork_rng():
            output = module.forward(x)
    except Exception as error:  # it needs other inputs besides x
        if is_out_of_memory(error):
            raise
        logger.info("a %s is not a linear map: it fails when called with only x: %r", type(module).__name__, error)
        return "other"
    finally:
        module.training = training
    bias = None if module.bias is None else module.bias.detach()
    expected = F.linear(x.detach(), weight, bias)
    if not isinstance(output, Tensor) or output.shape != expected.shape or not _close(output, expected, _NEARLY_SAME):
        return "other"
    gradient = None
    if output.requires_grad:
        (gradient,) = torch.autograd.grad(output.sum(), x, allow_unused=True)
    through = weight.sum(0).expand_as(x)
    if gradient is None or not _close(gradient, through, _CUT):
        return "rounding"
    return "product" if _close(output, expected, _SAME) and _close(gradient, through, _NEARLY_SAME) else "other"


def _close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((value - expected).norm() <= tolerance * expected.norm())
