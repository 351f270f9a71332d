"""The weights of a bare model, whatever wraps it: their names, which of them are tied, and what two differ by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.bare_model import bare_module_names, base_of, is_wrapper
from hf_npeff.fisher.linear_layers import is_linear

_AS_MERGED = 1e-3
"""Share of a change that two ways to it may differ by. Chosen: float32 rounds a merged weight by 6e-8, which is 6e-4 of
a change a ten-thousandth as large."""


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
    """The difference new − old, in float32 or wider, on the device of the old one; of two types in the coarser one.

    The coarser type is the one with the larger ε: of two of 16 bits bfloat16, in which a copy in float16 is the same.
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


def each_once(model: nn.Module, deltas: Mapping[str, Tensor], also: Iterable[str] = ()) -> dict[str, Tensor]:
    """What an adapter changes, with a tied weight once, under the first of its names: under two it would move twice.

    Args:
        model: the bare model, or the one in PEFT's wrappers.
        deltas: {parameter: change}.
        also: names of a tied weight that are known to change in the same way although they are not among `deltas`.

    Raises:
        ValueError: if the modules that share a weight are not changed alike: the weight itself can only move in all of
            them.
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
                    f"{' and '.join(group)} are one tied weight, and the adapter changes {name} otherwise than "
                    f"{other}; no change of the weight does the same. Untie the weights of the base model first "
                    "(tie_word_embeddings=False), or use an adapter that leaves them alone"
                )
        kept.setdefault(next(other for other in group if other in deltas), delta)
    return kept


def _alike(first: Tensor, second: Tensor) -> bool:
    apart = (first.double() - second.to(first.device).double()).norm()
    return bool(apart <= _AS_MERGED * first.double().norm())
