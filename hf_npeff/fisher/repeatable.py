"""Does a model give the same logits in every pass over an example, and with its cache as without?

An analysis uses no cache of keys and values, but most other calls do. The two agree, unless two layers write into the
same place of the cache. Encoder-decoder models are called with labels, and then use no cache either.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.batching import logit_tolerance, percent, relative_change

_PASSES = 32
"""Passes over an example by which random models are recognised: a model that skips one of two layers with a chance of a
tenth gives the same result in all of them in one of 800 runs."""


def check_repeatable(
    model: nn.Module,
    device: torch.device,
    logits: Callable[[], Tensor],
    *,
    with_cache: bool,
    failures: tuple[type[Exception], ...],
) -> None:
    """Check that a model draws no random numbers when it predicts, and that its cache does not change its predictions.

    If a pass moves no random generator, the model draws none. Otherwise many passes are compared, because a layer that
    is skipped now and then changes few of them.

    Args:
        model: the model that `logits` calls, with `use_cache=False` if it takes that.
        device: the model's device.
        logits: a pass over one example.
        with_cache: whether the model is usually called with a cache of keys and values.
        failures: the errors of a failing pass. If the model fails only with its cache, two passes
            without it are compared.

    Raises:
        UnsupportedModelError: if two passes give different logits.
    """
    before = _random_states(device)
    first = logits()
    moved = _random_states(device) != before
    second: Tensor | None = None
    if with_cache:
        with contextlib.suppress(*failures), _cache_by_default(model):
            second = logits()
    change = relative_change(logits() if second is None else second, first)
    differs = change > logit_tolerance(model)
    for _ in range(_PASSES if moved else int(differs)):
        if (again := relative_change(logits(), first)) > logit_tolerance(model):
            raise UnsupportedModelError(
                f"the model's logits differ between passes over the same example (by {percent(again)}), because it "
                "draws random numbers when it predicts. Load it with a setting that fixes them, such as Reformer's "
                "hash_seed"
            )
    if differs:
        raise UnsupportedModelError(
            f"the model's logits change by {percent(change)} with its cache of keys and values, which it keeps by "
            "default: two layers write into the same place of the cache, for example because one layer is used twice. "
            "Give every layer its own layer_idx, or set model.config.use_cache=False to use and to analyse the model "
            "without a cache"
        )


@contextlib.contextmanager
def _cache_by_default(model: nn.Module) -> Iterator[None]:
    """Inside `with`, the model itself decides whether it keeps keys and values, as in usual calls."""

    def left_out(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "use_cache"}

    handle = model.register_forward_pre_hook(left_out, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _random_states(device: torch.device) -> tuple[bytes | int, ...]:
    """The states of the random generators that a model may use: PyTorch's (CPU and device), Python's and NumPy's."""
    states: list[bytes | int] = [torch.get_rng_state().numpy().tobytes(), hash(random.getstate())]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    numbers = np.random.get_state()
    return (*states, numbers[1].tobytes(), int(numbers[2]))  # type: ignore[index]
