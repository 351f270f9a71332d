"""The difference of two sets of weights: two checkpoints, a model and its adapters, a merge.

The effective weights of a model are those of the bare model plus the changes by active PEFT adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_module_names, base_of, is_wrapper
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.tasks import task_of
from hf_npeff.fisher.weights_hash import identity_of
from hf_npeff.weights.own_weights import name_of, own_weights, subtracted, tied_weights
from hf_npeff.weights.peft_changes import adapter_deltas

logger = logging.getLogger(__name__)
_NAMED = 5
"""How many parameters an error names. Chosen: enough to recognise them."""


def difference(before: nn.Module, after: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The difference of the effective weights of two models.

    If the dtypes differ, the finer weights are first rounded to the coarser dtype, so a copy in 16 bits does not
    differ. A tied weight is listed once, under its first name in `before`.

    Args:
        before: a transformers model, with or without PEFT's wrappers.
        after: a model of the same architecture.

    Returns:
        {parameter: float32 change} of the parameters that differ, and the change's `info` for a direction: the
        provenance of `before`, tied weights, buffers that also differ.

    Raises:
        UnsupportedModelError: if weights are quantised, offloaded or sharded, or an adapter is one that PEFT cannot
            merge.
        ValueError: if the names or shapes of parameters differ, a tied weight became two weights, or nothing differs.
    """
    old, new = own_weights(before), own_weights(after)
    _check_alike(old, new, before, after)
    added = [adapter_deltas(model) for model in (before, after)]
    deltas: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    rounded: set[str] = set()
    for name, weight in old.items():
        delta = subtracted(new[name], weight, rounded)
        for sign, more in ((-1, added[0]), (1, added[1])):
            if name in more:
                delta = delta + sign * more[name].to(delta.device)
        known = first.setdefault(id(weight), name)
        if known != name:
            if not _same(deltas.get(known), delta):
                raise ValueError(
                    f"{known} and {name} are one tied weight in the model before and differ in the model after, so no "
                    "change of the first model's weights gives the second; untie the first model's weights "
                    "(tie_word_embeddings=False)"
                )
            continue
        if bool(delta.any()):
            deltas[name] = delta
    if not deltas:
        raise ValueError("the two models have the same weights" + (", to rounding" if rounded else "") + ": no change")
    if rounded:
        logger.info("weights of different dtypes were compared in the coarser one: %s", ", ".join(sorted(rounded)))
    info = provenance(before) | {"method": "between", "after": name_of(after)} | tied_weights(before, deltas)
    if buffers := _changed_buffers(before, after):
        logger.warning("buffers also differ, and a change of weights does not include them: %s", buffers[:_NAMED])
        info["buffers"] = buffers
    return deltas, info


def provenance(model: nn.Module) -> dict[str, Any]:
    """The information on the changed model that a direction keeps."""
    base: Any = base_of(model)
    return {
        "model": name_of(model),
        "revision": getattr(getattr(base, "config", None), "_commit_hash", None),
        "weights": identity_of(model).to_dict(),
        "architecture": type(base).__name__,
        "module": type(base).__module__,
        "task": task_of(base) if hasattr(base, "config") else None,
    }


def _check_alike(old: Mapping[str, Tensor], new: Mapping[str, Tensor], before: nn.Module, after: nn.Module) -> None:
    """Check that two models' weights can be subtracted."""
    away = [[name for name, weight in weights.items() if not is_at_hand(weight)] for weights in (old, new)]
    for names, others, model in ((away[0], away[1], before), (away[1], away[0], after)):
        if names and not others:
            raise UnsupportedModelError(
                f"{name_of(model)} has weights that are quantised, offloaded or sharded ({', '.join(names[:_NAMED])}), "
                "and the other model's are not: the difference would be mostly rounding; load both models whole, in a "
                "floating-point dtype"
            )
        if names:
            raise UnsupportedModelError(
                f"{name_of(model)} has weights that cannot be read ({', '.join(names[:_NAMED])}), because they are "
                "quantised, offloaded or sharded; load the whole model, in a floating-point dtype"
            )
    kinds = [type(base_of(model)).__name__ for model in (before, after)]
    models = f"{name_of(before)} ({kinds[0]}) and {name_of(after)} ({kinds[1]})"
    if only := sorted(old.keys() ^ new.keys()):
        raise ValueError(
            f"{models} have different parameters: {len(only)} exist in only one of them, such as {only[:_NAMED]}. A "
            "change needs two models of the same architecture"
        )
    shapes = {n: (tuple(w.shape), tuple(new[n].shape)) for n, w in old.items() if w.shape != new[n].shape}
    if shapes:
        first = list(shapes.items())[:_NAMED]
        vocabulary = all(a[1:] == b[1:] and len(a) == 2 for a, b in shapes.values())
        why = " their vocabularies, or numbers of classes, differ:" if vocabulary else ""
        raise ValueError(f"{models} have parameters of different shapes;{why} {dict(first)} (before, after)")


def _same(first: Tensor | None, second: Tensor) -> bool:
    return not bool(second.any()) if first is None else torch.equal(first, second)


def _changed_buffers(before: nn.Module, after: nn.Module) -> list[str]:
    """Names of saved buffers that differ between the models."""
    kept = [_own_buffers(model) for model in (before, after)]
    return [
        name
        for name, value in kept[0].items()
        if name in kept[1] and (value.shape != kept[1][name].shape or not torch.equal(value, kept[1][name].to(value)))
    ]


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    bare = bare_module_names(model)
    return {
        f"{bare[path]}.{leaf}": value
        for path, module in model.named_modules()
        if path in bare and not is_wrapper(module)
        for leaf, value in module._buffers.items()
        if value is not None and leaf not in module._non_persistent_buffers_set
    }
