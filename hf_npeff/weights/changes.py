"""What two sets of weights differ by: two checkpoints, a model and its adapters, a merge.

The effective weights of a model are those of the bare model, plus what adapters of PEFT that act now add to them.
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
"""Parameters that an error names. Chosen: enough to see what they are."""


def difference(before: nn.Module, after: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the effective weights of two models differ by.

    Where the types differ, the finer weights are first rounded to the coarser type, so that a copy in 16 bits differs
    by nothing. A tied weight comes once, under its first name in `before`.

    Args:
        before: a model of transformers, in PEFT's wrappers or not.
        after: one of the same architecture.

    Returns:
        {parameter: float32 change} of the parameters that differ, and what is known of the change, as a direction's
        `info` holds it: the provenance of `before`, tied weights, buffers that differ too.

    Raises:
        UnsupportedModelError: if weights are quantised, offloaded or sharded, or an adapter is one that PEFT cannot
            merge.
        ValueError: if the parameters or their shapes differ, a tied weight became two, or nothing differs.
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
                    f"{known} and {name} are one tied weight before, and changed differently after: no change of the "
                    "first model makes the second; untie its weights first (tie_word_embeddings=False)"
                )
            continue
        if bool(delta.any()):
            deltas[name] = delta
    if not deltas:
        raise ValueError("the two models have the same weights" + (", to rounding" if rounded else "") + ": no change")
    if rounded:
        logger.info("weights of different types were compared in the coarser one: %s", ", ".join(sorted(rounded)))
    info = provenance(before) | {"method": "between", "after": name_of(after)} | tied_weights(before, deltas)
    if buffers := _changed_buffers(before, after):
        logger.warning("buffers differ too, which a change of weights does not carry: %s", buffers[:_NAMED])
        info["buffers"] = buffers
    return deltas, info


def provenance(model: nn.Module) -> dict[str, Any]:
    """What a direction keeps of the model that it changes."""
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
    """Refuse models whose weights cannot be subtracted."""
    away = [[name for name, weight in weights.items() if not is_at_hand(weight)] for weights in (old, new)]
    for names, others, model in ((away[0], away[1], before), (away[1], away[0], after)):
        if names and not others:
            raise UnsupportedModelError(
                f"{name_of(model)} has weights that are quantised, offloaded or sharded ({', '.join(names[:_NAMED])}), "
                "and the other model has none: what they differ by would be mostly rounding; load both whole, in a "
                "type of floating point"
            )
        if names:
            raise UnsupportedModelError(
                f"{name_of(model)} has weights that cannot be read ({', '.join(names[:_NAMED])}): they are quantised, "
                "offloaded or sharded; load the whole model, in a type of floating point"
            )
    kinds = [type(base_of(model)).__name__ for model in (before, after)]
    said = f"{name_of(before)} ({kinds[0]}) and {name_of(after)} ({kinds[1]})"
    if only := sorted(old.keys() ^ new.keys()):
        raise ValueError(
            f"{said} have other parameters, {len(only)} of which only one has, for instance {only[:_NAMED]}: a change "
            "is between two models of one architecture"
        )
    shapes = {n: (tuple(w.shape), tuple(new[n].shape)) for n, w in old.items() if w.shape != new[n].shape}
    if shapes:
        first = list(shapes.items())[:_NAMED]
        vocabulary = all(a[1:] == b[1:] and len(a) == 2 for a, b in shapes.values())
        why = " their vocabularies, or numbers of classes, differ:" if vocabulary else ""
        raise ValueError(f"{said} have parameters of different shapes;{why} {dict(first)} (before, after)")


def _same(first: Tensor | None, second: Tensor) -> bool:
    return not bool(second.any()) if first is None else torch.equal(first, second)


def _changed_buffers(before: nn.Module, after: nn.Module) -> list[str]:
    """Names of buffers that are saved with the models, and differ."""
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
