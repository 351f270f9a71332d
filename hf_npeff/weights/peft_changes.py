"""The changes of a base model's weights by PEFT adapters.

PEFT itself computes them: each wrapper is merged into a float32 copy of its weight, the difference is taken, and the
weight is restored. So whatever PEFT can merge (LoRA, rsLoRA, DoRA, LoHa, OFT, …) has exactly PEFT's meaning.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import acting_adapters, bare_module_names, is_wrapper, wrapped_by
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.weights.adapter_folder import begins_elsewhere
from hf_npeff.weights.own_weights import name_of, own_weights, subtracted


@torch.no_grad()
def adapter_deltas(model: nn.Module) -> dict[str, Tensor]:
    """{parameter in the bare model: float32 change} by the active PEFT adapters; the model does not change.

    Raises:
        UnsupportedModelError: if a weight is quantised or offloaded, PEFT cannot merge an adapter, or an adapter
            consists of virtual tokens.
    """
    if isinstance(getattr(model, "prompt_encoder", None), nn.ModuleDict) and "forward" not in vars(model):
        raise UnsupportedModelError("an adapter of virtual tokens (prompt or prefix tuning) does not change any weight")
    bare = bare_module_names(model)
    names = {id(module): path for path, module in model.named_modules()}
    deltas: dict[str, Tensor] = {}
    inside: set[int] = set()
    for path, wrapper in model.named_modules():
        around: Any = wrapper
        if not is_wrapper(wrapper) or id(wrapper) in inside or not hasattr(around, "merge"):
            continue  # copies under modules_to_save are modules of the model as it runs now
        inside |= {id(module) for module in wrapper.modules() if module is not wrapper}
        adapters = acting_adapters(wrapper)
        if not adapters:
            continue
        for leaf, delta in _merged(path, around, adapters).items():
            module = names[id(wrapped_by(wrapper))]
            deltas[f"{bare[module]}.{leaf}"] = delta
    return deltas


def _merged(path: str, wrapper: Any, adapters: Sequence[str]) -> dict[str, Tensor]:
    """{parameter of the wrapped module: its change by merging}."""
    module = wrapped_by(wrapper)
    before = dict(module.named_parameters(recurse=False))
    if away := [leaf for leaf, parameter in before.items() if not is_at_hand(parameter)]:
        raise UnsupportedModelError(
            f"{path}.{away[0]} is quantised, offloaded or sharded, so nothing can be merged into it; load the base "
            "model whole, in a floating-point dtype"
        )
    kept = {leaf: parameter.data for leaf, parameter in before.items()}
    try:
        for leaf, parameter in before.items():
            parameter.data = kept[leaf].to(torch.promote_types(kept[leaf].dtype, torch.float32), copy=True)
        try:
            wrapper.merge(adapter_names=list(adapters))
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise UnsupportedModelError(f"PEFT cannot merge the adapter of {path}: {error}") from error
        now = dict(wrapped_by(wrapper).named_parameters(recurse=False))
        changed = {leaf: (now[leaf].data - kept[leaf].to(now[leaf].data)).float() for leaf in before}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that unmerging is inexact; the weight itself is restored below
            wrapper.unmerge()
    finally:
        for leaf, parameter in before.items():
            parameter.data = kept[leaf]
    return {leaf: delta for leaf, delta in changed.items() if bool(delta.any())}


@contextlib.contextmanager
def handed_back(model: nn.Module) -> Iterator[None]:
    """A model into which PEFT puts wrappers inside `with`; its modules, biases and settings are restored on exit."""
    modules = [(module, dict(module._modules), module.training, set(vars(module))) for module in model.modules()]
    wanted = {id(parameter): (parameter, parameter.requires_grad) for parameter in model.parameters()}
    small = [(p, p.detach().clone()) for p in model.parameters() if p.dim() < 2]  # biases, into which PEFT loads
    try:
        yield
    finally:
        for module, children, training, attributes in modules:
            module._modules = children
            module.training = training
            for name in set(vars(module)) - attributes:
                delattr(module, name)
        for parameter, requires_grad in wanted.values():
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for parameter, value in small:
                parameter.copy_(value)


def deltas_of_adapter(base: nn.Module, adapter: str, **where: Any) -> dict[str, Tensor]:
    """The changes of a loaded bare model by one adapter in a folder or on the Hub; the model does not change.

    Args:
        base: the bare model.
        adapter: a folder, or an id on the Hub.
        **where: `revision`, `token`, `cache_dir` and `local_files_only` for the download.

    Raises:
        UnsupportedModelError: if PEFT cannot merge it.
        ValueError: if the model lacks a module of the adapter or has one of another shape, or if it changes nothing.
    """
    from peft import PeftConfig, PeftModel  # takes a second

    if any(is_wrapper(module) for module in base.modules()):
        raise ValueError(
            "base= is already wrapped by PEFT; pass the bare model as base=, or the wrapped model as the adapter"
        )
    before = {name: weight.detach() for name, weight in own_weights(base).items()}
    small = {name: weight.clone() for name, weight in before.items() if weight.dim() < 2}
    with handed_back(base):
        try:
            # Weights that PEFT changes in place would be neither compared nor restored.
            own = begins_elsewhere(PeftConfig.from_pretrained(adapter, **where).to_dict())
            wrapped = PeftModel.from_pretrained(copy.deepcopy(base) if own else base, adapter, **where)
        except (RuntimeError, ValueError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines()][:3]  # PEFT lists every parameter
            raise ValueError(f"{adapter} is not an adapter of {name_of(base)}: {' '.join(lines)}") from error
        deltas = adapter_deltas(wrapped)
        for name, weight in own_weights(wrapped).items():  # copies under modules_to_save, and biases
            delta = subtracted(weight, small.get(name, before[name]), set())
            if bool(delta.any()):
                deltas[name] = deltas[name] + delta if name in deltas else delta
        del wrapped
    if not deltas:
        raise ValueError(f"the adapter {adapter} changes nothing: its changes are all zero")
    return deltas
