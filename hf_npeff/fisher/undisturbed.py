"""Makes sure that one thread at a time analyses a model, uncompiled and with autograd."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import base_of

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_of_all = threading.Lock()
_unfused_now: dict[str, Any] = {"analyses": 0, "before": True}
"""How many analyses have PyTorch's fused attention switched off, and what it was before the first; one switch for all
threads."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """One thread at a time inside `with`; others wait. Compiled modules run uncompiled meanwhile.

    An analysis needs hooks, and compiled code does not call hooks that were added later. The same is true of the fused
    kernels that torch.nn.TransformerEncoder and MultiheadAttention predict with, so these are off meanwhile. An
    inference mode around the analysis is suspended.

    Raises:
        UnsupportedModelError: if the weights were made under `torch.inference_mode`, which autograd cannot use, or a
            compiled model cannot be run uncompiled.
    """
    check_default_device()
    with _lock_of(model), torch.inference_mode(False), _as_written(model), _unfused(model):
        if made := next((name for name, p in model.named_parameters() if p.is_inference()), None):
            raise UnsupportedModelError(
                f"{made} was made under torch.inference_mode, so no gradient can pass through it; load the model "
                "outside of it (torch.no_grad is fine)"
            )
        yield


def check_default_device() -> None:
    """Check that PyTorch's default device is the CPU, on which random numbers are drawn and masks are made.

    Raises:
        ValueError: if it is another device.
    """
    device = torch.get_default_device()
    if device.type != "cpu":
        raise ValueError(
            f"PyTorch makes new tensors on {str(device)!r} (torch.set_default_device, or a torch.device in a with "
            "statement), and an analysis makes its own on the CPU: call torch.set_default_device(None) once the model "
            "is loaded; the model stays on its device and runs there"
        )


def _lock_of(model: nn.Module) -> Any:
    with _locks_of_all:
        return _locks.setdefault(base_of(model), threading.RLock())


def _is_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")  # torch.compile(model.forward), put in its place
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or "_orig_mod" in module._modules
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


def _as_written(model: nn.Module) -> Any:
    if not any(map(_is_compiled, model.modules())):
        return contextlib.nullcontext()
    if not hasattr(torch.compiler, "set_stance"):  # before PyTorch 2.6
        raise UnsupportedModelError(
            "the model is compiled, and this version of PyTorch cannot run it as it was written; load it without "
            "torch.compile"
        )
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Without PyTorch's own fused encoder kernels inside `with`, for a model that could use them.

    They are used where nothing requires a gradient, call no hooks, and pass nested tensors on where tokens are padded.
    """
    if not any(isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in model.modules()):
        yield
        return
    with _locks_of_all:
        if _unfused_now["analyses"] == 0:
            _unfused_now["before"] = torch.backends.mha.get_fastpath_enabled()
        _unfused_now["analyses"] += 1
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _locks_of_all:
            _unfused_now["analyses"] -= 1
            if _unfused_now["analyses"] == 0:
                torch.backends.mha.set_fastpath_enabled(_unfused_now["before"])
