"""SHiRA adapters: the largest entries of every linear weight's delta, with the names that PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import check_scale
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.weights.adapter_folder import PREFIX
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.layouts import Layout
from hf_npeff.weights.peft_config import check_rank, peft_config, retained


def shira(
    deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], *, rank: int, scale: float, info: Mapping[str, Any]
) -> Adapter:
    """A sparse SHiRA adapter: the r·(in + out) largest entries of every linear weight's delta.

    Args:
        deltas: {parameter name: ΔW (out, in)}.
        layouts: the layouts, which all have to be "linear", because PEFT's SHiRA supports nothing else.
        rank: r, PEFT's measure for the number of entries in a module.
        scale: a factor for the deltas.
        info: `model`, `revision` and `task`.

    Raises:
        UnsupportedModelError: if a parameter is not a linear map's weight.
        ValueError: if the rank or the scale is out of range.
    """
    scale = check_scale(scale)
    check_rank(rank)
    if wrong := [n for n in deltas if layouts[n] != "linear"]:
        raise UnsupportedModelError(f"SHiRA supports only nn.Linear weights, not {wrong[:3]}; use LoRA or kind='delta'")
    tensors: dict[str, Tensor] = {}
    kept: dict[str, float] = {}
    targets = []
    for name, delta in deltas.items():
        module = name.rpartition(".")[0]
        flat = delta.flatten().float()
        size = rank * sum(delta.shape)
        if size > flat.numel():
            raise ValueError(
                f"rank={rank} needs {size} entries of {name}, which has only {flat.numel()}; use a smaller rank or LoRA"
            )
        where = torch.topk(flat.abs(), size).indices.sort().values
        tensors[f"{PREFIX}{module}.shira_weight"] = flat[where] * scale
        rows, columns = where // delta.shape[1], where % delta.shape[1]
        tensors[f"{PREFIX}{module}.shira_indices"] = torch.stack([rows, columns]).to(torch.int32)
        energy = float(flat.double().square().sum())
        kept[name] = float(flat[where].double().square().sum()) / energy if energy else 1.0
        targets.append(module)
    config = {**peft_config("SHIRA", info, rank, targets), "mask_type": "random"}
    shapes = {name: (delta.shape[0], delta.shape[1]) for name, delta in deltas.items()}
    return Adapter("shira", tensors, config, retained(deltas, kept), dict(layouts), kept, shapes=shapes)
