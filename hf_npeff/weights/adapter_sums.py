"""The exact sum of LoRA adapters as one LoRA: factors side by side, so that the rank is the sum of the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.weights.adapter_folder import PREFIX
from hf_npeff.weights.layouts import Layout

_SUMMED = ("linear", "conv1d", "embedding", "bias")


def stacked(
    tensors: Sequence[Mapping[str, Tensor]], ranks: Sequence[int], layouts: Sequence[Mapping[str, Layout]]
) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """[B₁ B₂ …] and [A₁; A₂; …] of every module that an adapter changes, with zeros for others; sums of biases.

    Args:
        tensors: the tensors of each adapter, with B already multiplied by its scale.
        ranks: the rank r of each adapter.
        layouts: the layouts of each adapter.

    Raises:
        UnsupportedModelError: if one changes norms, which PEFT stores whole, or fused experts.
        ValueError: if a parameter has different shapes in two adapters.
    """
    together: dict[str, Layout] = {name: layout for each in layouts for name, layout in each.items()}
    if wrong := [f"{name} ({layout})" for name, layout in together.items() if layout not in _SUMMED]:
        raise UnsupportedModelError(
            f"{wrong[0]} cannot be summed from adapters: add the directions (a + b) and make one adapter of the sum"
        )
    summed: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for each in tensors for key in each):
        given = [each.get(key) for each in tensors]
        some = next(value for value in given if value is not None)
        if key.endswith(".bias"):
            shapes = {value.shape for value in given if value is not None}
        else:
            dim = 1 if key.removesuffix(".weight").endswith("B") else 0
            given = [_empty(some, rank, dim) if v is None else v for v, rank in zip(given, ranks, strict=True)]
            shapes = {value.select(dim, 0).shape for value in given if value is not None}
        if len(shapes) > 1:
            raise ValueError(
                f"{key.removeprefix(PREFIX)} has different shapes in the adapters: are they for different models?"
            )
        known = [value for value in given if value is not None]
        summed[key] = torch.stack(known).sum(0) if key.endswith(".bias") else torch.cat(known, dim)
    return summed, together


def _empty(like: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = rank
    return like.new_zeros(shape)


def sum_config(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """adapter_config.json of the sum.

    Raises:
        ValueError: if the adapters name different base models or commits.
    """
    for name in ("base_model_name_or_path", "revision"):
        if len({str(config.get(name)) for config in configs}) > 1:
            raise ValueError(f"the adapters are for different base models: {name} is {[c.get(name) for c in configs]}")
    rank = sum(config["r"] for config in configs)
    targets = dict.fromkeys(target for config in configs for target in config.get("target_modules") or ())
    return {
        **configs[0],
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
        "lora_bias": any(config.get("lora_bias") for config in configs),
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
    }
