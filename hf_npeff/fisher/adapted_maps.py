"""Do the gradients of weights inside PEFT's adapters follow what the adapter does with the weight?

A hook gives the gradient of a linear map as if its weight acted by its own product alone. Some adapters read the weight
in another way, of which neither hooks nor autograd know: HRA and SHiRA multiply with its detached values, and DoRA
divides by its norm, which it takes for constant. So every adapted layer is called alone on a few random examples, its
weight W is moved along a direction A, and

    (⟨R, y(W + sA)⟩ − ⟨R, y(W − sA)⟩) / 2s      is compared with      Σ δᵀ A x

for each example, with y the output of the layer in its adapters, R random, and x and δ the input of the map and the
gradient at its output. One A is W itself, which changes the norm alone; the other is random.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import acting_adapters, bare_module_names, is_wrapper, wrapped_by
from hf_npeff.fisher.linear_layers import is_at_hand, is_linear
from hf_npeff.fisher.memory import is_out_of_memory

logger = logging.getLogger(__name__)
_STEP = 0.25
"""The move of a weight, relative to its size. The output is linear in the weight unless the adapter reads it in another
way, so a large step has no error from curvature, and is far above the rounding of bfloat16 (.004 of an entry)."""
_EXAMPLES = 8
"""Random examples, of two tokens each: a chance agreement of all their slopes is less likely than one in a million."""
_TOLERANCE = 0.1
"""The largest relative difference of the slopes. Rounding is 1e-5 in float32 and .01 in bfloat16; for DoRA, HRA and
SHiRA the difference is about 1 along W."""
_NAMED = 4
"""The most layers that an error names."""
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, StopIteration)
"""Errors of a layer that needs other inputs besides the tokens, or whose weight is computed from other parameters."""


def check_adapted_maps(model: nn.Module, names: Iterable[str]) -> None:
    """Check linear maps inside PEFT's adapters that act; each of them is called a few times on a few tokens.

    Layers that cannot be called on tokens alone, and moved weights that are quantised, offloaded or sharded, are not
    checked, except that DoRA is known by its setting.

    Args:
        model: the model, in its wrappers.
        names: names of modules of the model; those that are not linear maps inside adapters are passed over.

    Raises:
        UnsupportedModelError: if an adapter depends on a weight in another way than the gradient says; the error names
            the layers.
    """
    modules = dict(model.named_modules())
    wrong: dict[str, str] = {}
    for name in names:
        around = _outermost(name, modules)
        if around is not None and (kind := _wrong(modules[around], modules[name])):
            wrong[name] = kind
    if not wrong:
        return
    bare = bare_module_names(model)
    shown = ", ".join(bare.get(name, name) for name in list(wrong)[:_NAMED])
    more = f" and {len(wrong) - _NAMED} others" if len(wrong) > _NAMED else ""
    raise UnsupportedModelError(
        f"{' and '.join(sorted(set(wrong.values())))} of PEFT reads the weights of {shown}{more} in a way that "
        "autograd does not follow (their detached values, or a norm that it takes for constant), so gradients do not "
        "say what a change of these weights does. Merge the adapter (model.merge_adapter() or "
        "model.merge_and_unload()), or leave these layers out with exclude_modules"
    )


def _outermost(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The name of the outermost adapter around a module, if an adapter around it acts."""
    parts = name.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    wrappers = [place for place in above if is_wrapper(modules[place])]
    return wrappers[0] if any(acting_adapters(modules[place]) for place in wrappers) else None


def _wrong(around: nn.Module, module: nn.Module) -> str:
    """The kind of adapter if it reads the module's weight otherwise; empty if it does not, or cannot be called."""
    inside: Any = wrapped_by(around)
    kind = _kind(around)
    if not is_linear(inside):
        return ""
    if not is_at_hand(getattr(module, "weight", None)) or not is_at_hand(inside.weight):
        return kind if kind == "DoRA" else ""
    training = {part: part.training for part in around.modules()}
    try:
        around.eval()
        with torch.random.fork_rng(), torch.enable_grad():
            return kind if _differs(around, module, inside) else ""
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        logger.info("an adapter %s is not checked: it fails on random tokens: %r", kind, error)
        return kind if kind == "DoRA" else ""
    finally:
        for part, mode in training.items():
            part.training = mode


def _kind(around: Any) -> str:
    """A name for the adapter."""
    dora = getattr(around, "use_dora", None) or {}
    if isinstance(dora, dict) and any(dora.get(name) for name in acting_adapters(around)):
        return "DoRA"
    return f"{type(around).__module__.split('.')[-2]}'s {type(around).__name__}"


def _differs(around: nn.Module, module: Any, inside: Any) -> bool:
    """Whether the slopes by a moved weight differ from those by the gradient."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    weight = inside.weight.detach()
    read = weight.shape[1] if isinstance(inside, nn.Linear) else weight.shape[0]  # Conv1D keeps (in, out)
    X = random(_EXAMPLES, 2, read).requires_grad_()
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0].detach(), output)))
    try:
        y = around(X)
    finally:
        hook.remove()
    R = random(*y.shape)
    used = [(x, output) for x, output in calls if output.requires_grad]
    deltas = torch.autograd.grad((R * y).sum(), [output for _, output in used], allow_unused=True) if used else ()
    W = module.weight.detach()
    name = next(name for name, parameter in around.named_parameters() if parameter is module.weight)
    size = W.float().square().mean().sqrt() or torch.tensor(1.0)  # a factor that an adapter begins with at zero
    for direction in (W.float(), torch.randn(W.shape, generator=generator).to(W.device) * size):
        A = direction if isinstance(module, nn.Linear) else direction.mT
        parts = [d.float() * (x.float() @ A.mT) for (x, _), d in zip(used, deltas, strict=True) if d is not None]
        by_gradient = sum((part.reshape(_EXAMPLES, -1).sum(1) for part in parts), torch.zeros(_EXAMPLES).to(W.device))
        with torch.no_grad():
            up, down = (
                functional_call(around, {name: (W.float() + s * _STEP * direction).to(W.dtype)}, (X.detach(),))
                for s in (1, -1)
            )
        moved = (R.float() * (up.float() - down.float())).reshape(_EXAMPLES, -1).sum(1) / (2 * _STEP)
        if (moved - by_gradient).norm() > _TOLERANCE * max(moved.norm(), by_gradient.norm()):
            return True
    return False
