"""The weights of a bare model, inside any wrappers: their names, which of them are tied, and differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.bare_model import bare_module_names, base_of, is_wrapper
from hf_npeff.fisher.linear_layers import is_linear

_AS_MERGED = 1e-3
"""Relative difference that two computations of the same change may have. Chosen: float32 rounds a merged weight by
6e-8, which is 6e-4 of a change that is a ten-thousandth as large."""


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
    """The name of a model in errors and records: its folder or id, otherwise its class."""
    base: Any = base_of(model)
    return getattr(base, "name_or_path", None) or type(base).__name__


def subtracted(new: Tensor, old: Tensor, rounded: set[str]) -> Tensor:
    """The difference new − old, in float32 or wider, on the device of the old one; of two dtypes in the coarser one.

    The coarser dtype is the one with the larger ε: of the two 16-bit types bfloat16.
    """
    wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    with torch.no_grad():
        there = new.detach().to(old.device)
        here = old.detach()
        if there.dtype != here.dtype:
            coarse = max(here.dtype, there.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            rounded.add(f"{here.dtype} and {there.dtype}")
            here, there = here.to(coarse), there.to(coarse)
        if wide == torch.float64:  # as directions are kept
            return (there.to(wide) - here.to(wide)).float()
        return there.to(wide) - here.to(wide)


def tied_weights(model: nn.Module, deltas: Iterable[str]) -> dict[str, Any]:
    """The modules that share a changed weight.

    Returns:
        `tied`, {parameter: names of the linear maps and embeddings that have it}, and `tied_embeddings`, those of them
        that are embeddings; neither if no weight is shared.
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


def each_once(model: nn.Module, deltas: Mapping[str, Tensor], also: Iterable[str] = ()) -> dict[str, Tensor]:
    """An adapter's changes, with a tied weight listed once, under its first name; otherwise it would change twice.

    Args:
        model: the bare model, or the one in PEFT's wrappers.
        deltas: {parameter: change}.
        also: names of a tied weight that are known to change in the same way although they are not among `deltas`.

    Raises:
        ValueError: if modules that share a weight are changed in different ways, which no change of the weight can do.
    """
    names: dict[int, list[str]] = {}
    for name, weight in own_weights(model).items():
        names.setdefault(id(weight), []).append(name)
    tied = {name: group for group in names.values() for name in group}
    also = set(also)
    kept: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        group = tied.get(name, [name])
        for other in group:
            if not (_alike(delta, deltas[other]) if other in deltas else other in also):
                raise ValueError(
                    f"{' and '.join(group)} are one tied weight, but the adapter changes {name} in another way than "
                    f"{other}, which no change of the weight can do. Untie the weights of the base model first "
                    "(tie_word_embeddings=False), or use an adapter that leaves them alone"
                )
        kept.setdefault(next(other for other in group if other in deltas), delta)
    return kept


def _alike(first: Tensor, second: Tensor) -> bool:
    apart = (first.double() - second.to(first.device).double()).norm()
    return bool(apart <= _AS_MERGED * first.double().norm())
