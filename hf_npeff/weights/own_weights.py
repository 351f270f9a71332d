"""The weights of a bare model, whatever wraps it: their names, which of them are tied, and what two differ by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.bare_model import bare_module_names, base_of, is_wrapper
from hf_npeff.fisher.linear_layers import is_linear


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """{name in the bare model: parameter}, a tied one under each of its names, without those that adapters add."""
    bare = bare_module_names(model)
    weights: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path in bare and not is_wrapper(module):
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    weights[f"{bare[path]}.{leaf}".removeprefix(".")] = parameter
    return weights


def name_of(model: nn.Module) -> str:
    """What a model is called in errors and records: its folder or id, else its class."""
    base: Any = base_of(model)
    return getattr(base, "name_or_path", None) or type(base).__name__


def subtracted(new: Tensor, old: Tensor, rounded: set[str]) -> Tensor:
    """The difference new − old, in float32 or wider, on the device of the old one; of two types in the narrower one."""
    wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    with torch.no_grad():
        there = new.detach().to(old.device)
        here = old.detach()
        if there.dtype != here.dtype:
            narrow = there.dtype if there.dtype.itemsize <= here.dtype.itemsize else here.dtype
            rounded.add(f"{here.dtype} and {there.dtype}")
            here, there = here.to(narrow), there.to(narrow)
        if wide == torch.float64:  # as directions are kept
            return (there.to(wide) - here.to(wide)).float()
        return there.to(wide) - here.to(wide)


def tied_weights(model: nn.Module, deltas: Iterable[str]) -> dict[str, Any]:
    """Which modules share a changed weight, where several do.

    Returns:
        `tied`, {parameter: names of the linear maps and embeddings that have it}, and `tied_embeddings`, those of them
        that are embeddings; neither where no weight is shared.
    """
    bare = bare_module_names(model)
    places: dict[int, list[str]] = {}
    embeddings: set[str] = set()
    for path, module in model.named_modules():
        if path in bare and (is_linear(module) or isinstance(module, nn.Embedding)) and not is_wrapper(module):
            weight: Any = getattr(module, "weight", None)
            places.setdefault(id(weight), []).append(bare[path])
            embeddings |= {bare[path]} if isinstance(module, nn.Embedding) else set()
    weights = own_weights(model)
    tied = {name: places[id(weights[name])] for name in deltas if len(places.get(id(weights[name]), ())) > 1}
    among = sorted({place for group in tied.values() for place in group} & embeddings)
    return ({"tied": tied} if tied else {}) | ({"tied_embeddings": among} if among else {})
