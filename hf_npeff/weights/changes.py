"""What two sets of weights differ by: two checkpoints, a model and its adapters, a merge.

The effective weights of a model are those of the bare model, plus what adapters of PEFT that act now add to them. PEFT
itself says what that is: each of its wrappers is merged into a float32 copy of its weight, the difference is taken, and
the weight is put back, so whatever PEFT can merge (LoRA, rsLoRA, DoRA, LoHa, OFT, …) is understood as PEFT means it.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.errors import IncompatibleWeightsError, UnsupportedModelError
from hf_npeff.fisher.bare_model import (
    acting_adapters,
    bare_module_names,
    base_of,
    is_wrapper,
    wrapped_by,
)
from hf_npeff.fisher.linear_layers import is_at_hand, is_linear
from hf_npeff.fisher.tasks import task_of
from hf_npeff.fisher.weights_hash import identity_of
from hf_npeff.pefs.weights_identity import difference as difference_of_identities
from hf_npeff.weights.layouts import Layout
from hf_npeff.weights.moved_weights import squared_norm

logger = logging.getLogger(__name__)
_NAMED = 5
"""Parameters that an error names. Chosen: enough to see what they are."""


def difference(before: nn.Module, after: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the effective weights of two models differ by.

    Where the types differ, the wider weights are first rounded to the narrower type, so that a copy in 16 bits differs
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
    old, new = _own_weights(before), _own_weights(after)
    _check_alike(old, new, before, after)
    added = [adapter_deltas(model) for model in (before, after)]
    deltas: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    rounded: set[str] = set()
    for name, weight in old.items():
        delta = _subtracted(new[name], weight, rounded)
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
        logger.info("weights of different types were compared in the narrower one: %s", ", ".join(sorted(rounded)))
    info = provenance(before) | {"method": "between", "after": _name(after)} | tied_weights(before, deltas)
    if buffers := _changed_buffers(before, after):
        logger.warning("buffers differ too, which a change of weights does not carry: %s", buffers[:_NAMED])
        info["buffers"] = buffers
    return deltas, info


def provenance(model: nn.Module) -> dict[str, Any]:
    """What a direction keeps of the model that it changes."""
    base: Any = base_of(model)
    return {
        "model": _name(model),
        "revision": getattr(getattr(base, "config", None), "_commit_hash", None),
        "weights": identity_of(model).to_dict(),
        "architecture": type(base).__name__,
        "module": type(base).__module__,
        "task": task_of(base) if hasattr(base, "config") else None,
    }


def _name(model: nn.Module) -> str:
    base: Any = base_of(model)
    return getattr(base, "name_or_path", None) or type(base).__name__


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """{name in the bare model: parameter}, a tied one under each of its names, without those that adapters add."""
    bare = bare_module_names(model)
    weights: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path in bare and not is_wrapper(module):
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    weights[f"{bare[path]}.{leaf}".removeprefix(".")] = parameter
    return weights


def _check_alike(old: Mapping[str, Tensor], new: Mapping[str, Tensor], before: nn.Module, after: nn.Module) -> None:
    """Refuse models whose weights cannot be subtracted."""
    away = [[name for name, weight in weights.items() if not is_at_hand(weight)] for weights in (old, new)]
    for names, others, model in ((away[0], away[1], before), (away[1], away[0], after)):
        if names and not others:
            raise UnsupportedModelError(
                f"{_name(model)} has weights that are quantised, offloaded or sharded ({', '.join(names[:_NAMED])}), "
                "and the other model has none: what they differ by would be mostly rounding; load both whole, in a "
                "type of floating point"
            )
        if names:
            raise UnsupportedModelError(
                f"{_name(model)} has weights that cannot be read ({', '.join(names[:_NAMED])}): they are quantised, "
                "offloaded or sharded; load the whole model, in a type of floating point"
            )
    kinds = [type(base_of(model)).__name__ for model in (before, after)]
    said = f"{_name(before)} ({kinds[0]}) and {_name(after)} ({kinds[1]})"
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
        raise ValueError(f"{said} have parameters of other shapes;{why} {dict(first)} (before, after)")


def _subtracted(new: Tensor, old: Tensor, rounded: set[str]) -> Tensor:
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


def _same(first: Tensor | None, second: Tensor) -> bool:
    return not bool(second.any()) if first is None else torch.equal(first, second)


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
    weights = _own_weights(model)
    tied = {name: places[id(weights[name])] for name in deltas if len(places.get(id(weights[name]), ())) > 1}
    among = sorted({place for group in tied.values() for place in group} & embeddings)
    return ({"tied": tied} if tied else {}) | ({"tied_embeddings": among} if among else {})


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


# Adapters


@torch.no_grad()
def adapter_deltas(model: nn.Module) -> dict[str, Tensor]:
    """{parameter in the bare model: float32 change} by the adapters of PEFT that act now; the model stays as it is.

    Raises:
        UnsupportedModelError: if a weight is quantised or offloaded, PEFT cannot merge an adapter, or one consists of
            virtual tokens.
    """
    if isinstance(getattr(model, "prompt_encoder", None), nn.ModuleDict) and "forward" not in vars(model):
        raise UnsupportedModelError("an adapter of virtual tokens (prompt or prefix tuning) changes no weight")
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
    """{parameter of the wrapped module: what merging adds to it}."""
    module = wrapped_by(wrapper)
    before = dict(module.named_parameters(recurse=False))
    if away := [leaf for leaf, parameter in before.items() if not is_at_hand(parameter)]:
        raise UnsupportedModelError(
            f"{path}.{away[0]} is quantised, offloaded or sharded, so that nothing can be merged into it; load the "
            "base model whole, in a type of floating point"
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
            warnings.simplefilter("ignore")  # that unmerging is inexact: the weight itself is put back below
            wrapper.unmerge()
    finally:
        for leaf, parameter in before.items():
            parameter.data = kept[leaf]
    return {leaf: delta for leaf, delta in changed.items() if bool(delta.any())}


@contextlib.contextmanager
def handed_back(model: nn.Module) -> Iterator[None]:
    """A model into which PEFT puts wrappers inside `with`; its modules, biases and settings are as before after it."""
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
    """What one adapter in a folder or on the Hub changes in a bare model that is at hand, which stays as it is.

    Args:
        base: the bare model.
        adapter: a folder, or an id on the Hub.
        **where: `revision`, `token`, `cache_dir` and `local_files_only` of the download.

    Raises:
        UnsupportedModelError: if PEFT cannot merge it.
        ValueError: if it does not fit the model: modules that this lacks, or of other shapes; or it changes nothing.
    """
    from peft import PeftModel  # takes a second

    if any(is_wrapper(module) for module in base.modules()):
        raise ValueError("base= is wrapped by PEFT already; give the bare model, or the wrapped one as the adapter")
    before = {name: weight.detach() for name, weight in _own_weights(base).items()}
    small = {name: weight.clone() for name, weight in before.items() if weight.dim() < 2}
    with handed_back(base):
        try:
            wrapped = PeftModel.from_pretrained(base, adapter, **where)
        except (RuntimeError, ValueError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines()][:3]  # PEFT lists every parameter
            raise ValueError(f"{adapter} is not an adapter of {_name(base)}: {' '.join(lines)}") from error
        deltas = adapter_deltas(wrapped)
        for name, weight in _own_weights(wrapped).items():  # copies under modules_to_save, and biases
            delta = _subtracted(weight, small.get(name, before[name]), set())
            if bool(delta.any()):
                deltas[name] = deltas[name] + delta if name in deltas else delta
        del wrapped
    if not deltas:
        raise ValueError(f"the adapter {adapter} changes nothing: all that it adds is zero")
    return deltas


# Sums of changes


def check_one_base(infos: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to add changes of different weights.

    Raises:
        IncompatibleWeightsError: if they were made for weights that are known to differ.
    """
    first = infos[0]
    for other in infos[1:]:
        if how := difference_of_identities(first.get("weights"), other.get("weights")):
            raise IncompatibleWeightsError(
                f"the two changes are of different weights ({first.get('model')} and {other.get('model')}: {how}), and "
                "their sum is a change of neither"
            )


def summed(
    parts: Sequence[tuple[float, Mapping[str, Tensor]]], layouts: Sequence[Mapping[str, Layout]]
) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """Σ weight·change; a parameter that one of them lacks is not changed by it.

    Raises:
        ValueError: if one has a parameter of another shape than another.
    """
    total: dict[str, Tensor] = {}
    kinds: dict[str, Layout] = {}
    for (weight, deltas), known in zip(parts, layouts, strict=True):
        for name, delta in deltas.items():
            if name in total and total[name].shape != delta.shape:
                raise ValueError(
                    f"{name} is {tuple(total[name].shape)} in one change and {tuple(delta.shape)} in the other: "
                    "they are of different models"
                )
            scaled = weight * delta.float()
            total[name] = total[name] + scaled.to(total[name].device) if name in total else scaled
            kinds.setdefault(name, known[name])
    return {name: delta for name, delta in total.items() if bool(delta.any())}, kinds


def outside(deltas: Mapping[str, Tensor], analysed: Mapping[str, Any]) -> dict[str, float]:
    """{parameter that is not analysed: its share of the change's norm, ‖Δ_name‖ / ‖Δ‖}, the largest first."""
    squares = {name: squared_norm(delta) for name, delta in deltas.items()}
    total = sum(squares.values())
    shares = {name: (value / total) ** 0.5 for name, value in squares.items() if name not in analysed}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def projected_out(deltas: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The change without its orthogonal projection on the span of some directions.

    Δ − V (VᵀV)⁺ VᵀΔ, with the directions as the columns of V; in parameters that a direction lacks it is 0.
    """
    grams = torch.tensor([[inner(a, b) for b in directions] for a in directions], dtype=torch.float64)
    along = torch.tensor([inner(direction, deltas) for direction in directions], dtype=torch.float64)
    weights = torch.linalg.pinv(grams, hermitian=True) @ along
    left = {name: delta.float() for name, delta in deltas.items()}
    for weight, direction in zip(weights.tolist(), directions, strict=True):
        for name, value in direction.items():
            step = -weight * value.float()
            left[name] = left[name] + step.to(left[name].device) if name in left else step
    return left


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """⟨first, second⟩ over the parameters that both have, in float64.

    Raises:
        ValueError: if one has another shape there.
    """
    total = 0.0
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        if a.shape != b.shape:
            raise ValueError(f"{name} is {tuple(a.shape)} in one and {tuple(b.shape)} in the other")
        total += float((a.double() * b.to(a.device).double()).sum())
    return total
