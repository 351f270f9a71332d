"""Does a model give the same logits in every pass over an example, and with its cache as without?

Predictions here keep no cache of keys and values, and people's calls mostly do. The two agree, except where two layers
write into one place of the cache. Models of an encoder and a decoder are called with labels, and then keep none either.
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
"""Passes over an example of a model that draws random numbers: one that leaves one of two layers out with a chance of a
tenth gives the same in all of them in one of 800 runs."""


def check_repeatable(
    model: nn.Module,
    device: torch.device,
    logits: Callable[[], Tensor],
    *,
    with_cache: bool,
    failures: tuple[type[Exception], ...],
) -> None:
    """Refuse a model that draws random numbers where it predicts, or whose cache changes its predictions.

    Where a pass moves no generator, it draws none; where one is moved, many passes are compared, since a layer that is
    left out now and then changes few of them.

    Args:
        model: what `logits` calls with `use_cache=False`, where it takes that.
        device: the model's.
        logits: a pass over one example.
        with_cache: whether people call the model with a cache of keys and values.
        failures: what a pass raises that fails. Where the model fails with its cache alone, nothing is compared.

    Raises:
        UnsupportedModelError: if two passes give different logits.
    """
    before = _random_states(device)
    first = logits()
    moved = _random_states(device) != before
    change = 0.0
    with contextlib.suppress(*failures), _cache_by_default(model) if with_cache else contextlib.nullcontext():
        change = relative_change(logits(), first)
    differs = change > logit_tolerance(model)
    for _ in range(_PASSES if moved else int(differs)):
        if (again := relative_change(logits(), first)) > logit_tolerance(model):
            raise UnsupportedModelError(
                f"the model gives other logits in every pass over the same example (by {percent(again)}): it draws "
                "random numbers where it predicts. Load it with a setting that fixes them, such as Reformer's hash_seed"
            )
    if differs:
        raise UnsupportedModelError(
            f"the model's logits change by {percent(change)} with its cache of keys and values, which it keeps by "
            "default: two layers write into one place of the cache, as one that comes twice does. Give every layer its "
            "own layer_idx, or set model.config.use_cache=False to use and to analyse the model without a cache"
        )


@contextlib.contextmanager
def _cache_by_default(model: nn.Module) -> Iterator[None]:
    """Inside `with`, the model decides itself whether it keeps keys and values, as where people call it."""

    def left_out(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "use_cache"}

    handle = model.register_forward_pre_hook(left_out, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _random_states(device: torch.device) -> tuple[bytes | int, ...]:
    """Of the generators that a model may draw from: PyTorch's, of the CPU and of the device, Python's and NumPy's."""
    states: list[bytes | int] = [torch.get_rng_state().numpy().tobytes(), hash(random.getstate())]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    numbers = np.random.get_state()
    return (*states, numbers[1].tobytes(), int(numbers[2]))  # type: ignore[index]
