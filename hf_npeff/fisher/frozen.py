"""A model that is frozen while it is analysed, and restored afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.undisturbed import undisturbed


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, with no parameter requiring a gradient; restored on exit, also after an exception.

    Modes, requires_grad and the state of the random generators are restored; callers remove their own forward hooks.
    Nothing is cast inside: neither by an active autocast, nor by the one that Accelerate leaves around the forward
    pass of a model that it trained in mixed precision. So rows are computed with the weights in their own type.
    """
    with undisturbed(model):  # first, so that a model that another thread has frozen is not taken for the original
        yield from _frozen(model)


def _frozen(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    switched = [_Switched(module) for module in model.modules() if switches(module)]
    try:
        with torch.random.fork_rng(), torch.enable_grad(), _uncast(model), _unpacked(model):
            forget_caches(model)
            model.eval()
            for parameter, _ in required:
                parameter.requires_grad_(False)
            yield
    finally:
        for each in switched:
            each.restore()
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


# Modules that do more than note their mode ----------------------------------------------------------------------------


def switches(module: nn.Module) -> bool:
    """Whether a module's own `train` does more than note the mode, such as merging weights or emptying a cache."""
    train = type(module).train
    return train is not nn.Module.train and not (isinstance(module, PreTrainedModel) and train is PreTrainedModel.train)


def forget_caches(model: nn.Module) -> None:
    """Make modules that keep tensors in a dictionary while they predict forget them; modes are as before.

    LeViT keeps its attention biases, whatever becomes of its parameters, until `train(True)` is called.
    """
    kept = [module for module in model.modules() if switches(module) and _has_cache(module)]
    modes = [(part, part.training) for module in kept for part in module.modules()]
    for module in kept:
        module.train(True)
    for part, mode in modes:
        part.training = mode


def _has_cache(module: nn.Module) -> bool:
    own = (value for name, value in vars(module).items() if not name.startswith("_") and type(value) is dict and value)
    return any(all(isinstance(entry, torch.Tensor) for entry in value.values()) for value in own)


class _Switched:
    """A module whose own `train` changes it, with its mode and copies of its own tensors."""

    def __init__(self, module: nn.Module):
        self._module, self._mode = module, module.training
        tensors = [*module._parameters.values(), *module._buffers.values()]
        self._tensors = [(t, t.detach().clone()) for t in tensors if t is not None and is_at_hand(t)]

    def restore(self) -> None:
        """Switch back by the module's own `train`, and undo what its arithmetic rounded."""
        if self._module.training != self._mode:
            self._module.train(self._mode)
        with torch.no_grad():
            for tensor, copy in self._tensors:
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)


_PACKS = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' 4-bit layers: whether the layer packs its weight when it predicts."""
_ROUNDED = 0.03
"""Largest relative change of a layer's output by unpacking: packing rounds the weight's scales to bfloat16, and its
kernel computes in bfloat16. Scales in a wrong order change the output by .2 and more."""


@contextlib.contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    """Inside `with`, 4-bit weights of bitsandbytes are unpacked, as in training, so that a backward pass works.

    On CPUs with AVX-512 for bfloat16, a layer whose input requires no gradient packs its weight and keeps it packed.
    After exit the layers pack again with their next prediction.

    Raises:
        UnsupportedModelError: if a packed weight does not unpack exactly.
    """
    layers = {name: module for name, module in model.named_modules() if getattr(module, _PACKS, False)}
    try:
        for name, layer in layers.items():
            _unpack(name, layer)
            setattr(layer, _PACKS, False)
        yield
    finally:
        for layer in layers.values():
            setattr(layer, _PACKS, True)


@torch.no_grad()
def _unpack(name: str, layer: Any) -> None:
    """Unpack a layer's weight by reading its state, which bitsandbytes keeps in the original form."""
    state = getattr(layer.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    layer.state_dict()
    state = layer.weight.quant_state
    if state.absmax.dim() == 2:  # transposed for the kernels, which bitsandbytes 0.50 does not undo
        state.absmax = state.absmax.T.flatten().float()
    setattr(layer, _PACKS, False)
    if not (layer(x) - before).norm() <= _ROUNDED * before.norm():
        raise UnsupportedModelError(
            f"bitsandbytes has packed {name} for predictions and does not unpack it exactly: load the model again, and "
            "analyse it before it makes any prediction"
        )


@contextlib.contextmanager
def _uncast(model: nn.Module) -> Iterator[None]:
    """Without autocast inside `with`: active ones are off, and Accelerate's is removed and restored on exit.

    Accelerate keeps the wrapped forward pass as `_original_forward`, which is not the model's own if the model was
    prepared more than once. So the class's forward pass is used, except for a model that moves weights between devices.
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
