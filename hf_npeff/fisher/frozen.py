"""A model that is frozen while it is analysed, and handed back as it came."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from hf_npeff.fisher.undisturbed import undisturbed


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with no parameter requiring a gradient; as it was on exit, exceptions included.

    Modes, requires_grad and the state of the random generators come back; forward hooks are the callers' own. Nothing
    is cast meanwhile: neither by an autocast that is active, nor by the one that Accelerate leaves around the forward
    pass of a model that it trained in mixed precision. Rows are those of the weights in their own type.
    """
    with undisturbed(model):  # first: what another thread has frozen is not how the model came
        yield from _frozen(model)


def _frozen(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng(), torch.enable_grad(), _uncast(model):
            model.eval()
            for parameter, _ in required:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _uncast(model: nn.Module) -> Iterator[None]:
    """No autocast inside: off where it is active, and Accelerate's taken off the forward pass, put back on exit.

    Accelerate keeps the forward pass that it wraps as `_original_forward`, the last of several where a model was
    prepared more than once; so the class's own is taken, but for a model whose pass moves weights between devices.
    """
    wrapped = [(m, vars(m)["forward"]) for m in model.modules() if {"_original_forward", "forward"} <= vars(m).keys()]
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for module, _ in wrapped:
                if hasattr(module, "_hf_hook"):
                    module.forward = vars(module)["_original_forward"]
                else:
                    del module.forward
            yield
        finally:
            for module, forward in wrapped:
                module.forward = forward
