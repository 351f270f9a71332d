"""Finds the fused experts of a model, by their parameters and arguments, and checks them.

For random tokens, the forward pass of the supported form (`expert_forms`) must give the same as the module's own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_npeff.fisher.expert_forms import DbrxExperts, ExpertsOfAllTokens, ExpertsOfSortedTokens, RoutedExperts
from hf_npeff.fisher.experts import INTERCEPTIONS, Experts, FusedWeight
from hf_npeff.fisher.fsdp import is_sharded
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.memory import is_out_of_memory

logger = logging.getLogger(__name__)

_SCALES = (1.0, 30.0)
"""Scales of a trial's tokens, as in `linear_layers`: large ones reveal a limit on the experts' outputs."""
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of a trial's output that may be rounding, by type; `_SAME_IN_16_BITS` for shorter types."""
_SAME_IN_16_BITS = 3e-2
"""Chosen: some units in the last of bfloat16's 8 bits (4e-3), which a sum over hidden units collects."""


def find_experts(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Experts]:
    """{name of the module: its fused experts}, in the model's order.

    Modules whose forward pass gives another result for random tokens are left out, and so are quantised ones. Modules
    with offloaded or sharded weights cannot be checked and are accepted as they are.

    Args:
        model: any module.
        names: modules that were found before and need not be checked again; None finds all.
    """
    by_name: dict[str, Experts] = {}
    for parent, module in model.named_modules():
        for suffix, experts in _candidates(module):
            name = f"{parent}.{suffix}".strip(".")
            if _is_the_same(name, experts) if names is None else name in names:
                by_name[name] = experts
    return by_name


def _candidates(module: Any) -> Iterator[tuple[str, Experts]]:
    """Experts that a module may have, with the path to the module that is called for them."""
    if hasattr(module, "router") and all(hasattr(module, n) for n in ("input_linear", "output_linear")):
        for name in ("input_linear", "output_linear"):
            inside = getattr(module, name)
            weight = getattr(inside, "weight", None)
            if _arguments(inside) == 2 and (fused := _fused("weight", weight)) is not None:
                yield name, ExpertsOfSortedTokens(inside, (fused,), module.router)
        return
    mlp = getattr(module, "mlp", None)
    if all(isinstance(getattr(mlp, n, None), nn.Parameter) for n in ("w1", "v1", "w2")) and _arguments(module) == 3:
        number = getattr(module, "num_experts", 0)
        names = ("w1", "v1", "w2")
        parts = [_fused(f"mlp.{n}", getattr(mlp, n), number, transposed=n == "w2") for n in names]
        if None not in parts:
            yield "", DbrxExperts(module, tuple(p for p in parts if p is not None))
        return
    up = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    tensors = getattr(module, up, None), getattr(module, "down_proj", None)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return
    arguments = _arguments(module)
    transposed = bool(getattr(module, "is_transposed", arguments == 1))
    pair = [_fused(n, t, transposed=transposed) for n, t in zip((up, "down_proj"), tensors, strict=True)]
    if None not in pair and arguments in (1, 3) and not getattr(module, "_is_expert_parallel", False):
        weights = tuple(p for p in pair if p is not None)
        yield "", (ExpertsOfAllTokens if arguments == 1 else RoutedExperts)(module, weights)


def _fused(name: str, tensor: Any, experts: int = 0, *, transposed: bool = False) -> FusedWeight | None:
    """The description of a tensor with three dimensions, or with two if the number of experts is known."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or _is_quantised(tensor):
        return None
    if tensor.dim() == 2 and experts and tensor.shape[0] % experts == 0:
        rows, columns = tensor.shape[0] // experts, tensor.shape[1]
    elif tensor.dim() == 3:
        experts, rows, columns = tensor.shape
    else:
        return None
    out, into = (columns, rows) if transposed else (rows, columns)
    return FusedWeight(name, int(experts), int(out), int(into), transposed, tensor.dim() == 2)


def _is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is quantised: a torchao class, or 8 bits with scales beside them."""
    return not is_sharded(tensor) and (tensor.dtype.itemsize == 1 or is_traceable_wrapper_subclass(tensor))


def _arguments(module: Any) -> int:
    """The number of arguments of a module's forward pass; 0 if it is variable."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return 0
    return 0 if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) else len(parameters)


def _is_the_same(name: str, experts: Experts) -> bool:
    """Whether random tokens get the same output and gradient from the module and from `experts`."""
    if INTERCEPTIONS in vars(experts.module):
        return True  # it was checked before, and somebody may have changed its output since
    if not all(is_at_hand(experts.tensor(weight)) for weight in experts.weights):
        return True
    try:
        difference = next(filter(None, (_difference(experts, scale) for scale in _SCALES)), None)
    except Exception as error:  # it is called in some other way
        if is_out_of_memory(error):
            raise
        difference = repr(error)
    if difference is not None:
        logger.info(
            "%s (%s) looks like fused experts but is not; for random tokens: %s",
            name or "the model",
            type(experts.module).__name__,
            difference,
        )
    return difference is None


@torch.enable_grad()
def _difference(experts: Experts, scale: float) -> str | None:
    """The difference between the module and `experts` in the output or the gradient for random tokens of this scale."""
    module = experts.module
    first, *others = experts.trial(torch.Generator().manual_seed(0))
    results = []
    training = module.training
    try:
        module.training = False
        with torch.random.fork_rng():
            for forward in (module.forward, lambda *values: experts.forward(lambda n, x, r, out: out, *values)):
                x = (scale * first).requires_grad_()
                output = forward(x, *others)
                weights = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape)
                (gradient,) = torch.autograd.grad((output * weights).sum(), x)
                results.append((output.detach(), gradient))
    finally:
        module.training = training
    if scale > 1 and not all(bool(value.isfinite().all()) for value in results[0]):
        return None  # beyond the range of the type there is nothing to compare
    tolerance = _SAME.get(first.dtype, _SAME_IN_16_BITS)
    for what, own, other in zip(("output", "gradient"), *results, strict=True):
        if own.shape != other.shape:
            return f"its {what} has the shape {tuple(own.shape)}, not {tuple(other.shape)}"
        if not bool((own - other).norm() <= tolerance * own.norm()):
            return f"its {what} differs by {float((own - other).norm() / own.norm()):.2g} of its norm"
    return None
