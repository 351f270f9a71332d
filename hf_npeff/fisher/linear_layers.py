"""Which modules multiply by their weight and nothing else: x Wᵀ + b, whatever the class calls itself.

Hooks read a weight's gradient off a module's input and output, so what happens between the two must be that product.
`nn.Linear` and GPT-2's Conv1D have it as their own forward pass. Their subclasses may do something else (a router that
returns a tuple, a block-diagonal product), and some round their input, which has no derivative: both are found out by
calling them with random numbers. Weights that are quantised or offloaded cannot be compared with; their layers are
taken at their word, and a forward pass that cuts the gradient is noticed when it runs (`gradients.LinearHooks`).
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
"""Scales of the random inputs of a probe: what is linear near zero alone (a clamp) is not linear."""
_SAME = 1e-2
"""Relative difference of a probe from the product: rounding in bfloat16 is below it, another formula far above."""
_NEARLY_SAME = 0.3
"""The same for a layer that rounds its input: four bits stay below it."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module claims to be a linear map."""
    return isinstance(module, nn.Linear | Conv1D)


def is_at_hand(weight: Tensor | None) -> bool:
    """Whether autograd can differentiate a weight: it is there, and neither offloaded, quantised nor sharded.

    A quantised weight may say that it is floating point: torchao's, which are classes of tensors of their own, and
    those of 8 bits, for which PyTorch has no arithmetic.
    """
    return (
        weight is not None
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1
        and weight.device.type != "meta"
        and not is_sharded(weight)
        and not is_traceable_wrapper_subclass(weight)
    )


def is_computed(module: nn.Module) -> bool:
    """Whether a layer's weight is no parameter but made of others in every pass: masks, weight norm, parametrizations.

    A row of such a weight would be that of numbers which cannot be changed, some of them masked.
    """
    return isinstance(vars(module).get("weight"), Tensor) or "weight" in getattr(module, "parametrizations", ())


def behaviour(module: nn.Module) -> Behaviour:
    """What a linear map's forward pass is: x Wᵀ + b; that of a rounded x, so that no gradient reaches x; or neither."""
    if is_computed(module):
        logger.info("a %s is no linear map: its weight is made of other parameters", type(module).__name__)
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
    """How a module's output and its gradient compare with x Wᵀ + b for a random x (2, 3, in) of this scale."""
    weight = (module.weight.mT if isinstance(module, Conv1D) else module.weight).detach()
    generator = torch.Generator().manual_seed(0)
    # Two examples of three tokens: sizes that differ
    x = (scale * torch.randn(2, 3, weight.shape[1], generator=generator)).to(weight.device, weight.dtype)
    x.requires_grad_()
    training = module.training
    try:
        module.training = False
        with torch.random.fork_rng():
            output = module.forward(x)
    except Exception as error:  # whatever it needs, it is not x alone
        if is_out_of_memory(error):
            raise
        logger.info("a %s is no linear map: called with x alone, it fails: %r", type(module).__name__, error)
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
    if gradient is None or not _close(gradient, weight.sum(0).expand_as(x), _NEARLY_SAME):
        return "rounding"
    return "product" if _close(output, expected, _SAME) else "other"


def _close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((value - expected).norm() <= tolerance * expected.norm())
