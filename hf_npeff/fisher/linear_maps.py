"""The analysed linear maps: the weights that `target_modules` chooses, and the modules that apply each of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_module_names, bare_name, bare_parameters, base_of, is_wrapper
from hf_npeff.fisher.expert_search import find_experts
from hf_npeff.fisher.experts import FusedWeight
from hf_npeff.fisher.linear_layers import Behaviour, behaviour, is_linear

CUT = (
    "{name} cuts the gradient: {how}, so the rows of all layers before it would be wrong. Layers that quantise their "
    "inputs do this (activations in 8 bits, integer or floating point). Load the model with a scheme that quantises "
    "only weights, or dequantised"
)


_USUAL_SLOTS = 8
"""Experts for each token that memory is planned for: Qwen3-MoE, OLMoE and DeepSeek V3 have 8, Mixtral 2, gpt-oss 4."""


@dataclass(frozen=True)
class LinearMap:
    """One analysed weight and the modules that apply it (several for a tied weight).

    Attributes:
        parameter: the weight's name in the bare model.
        modules: names of the modules, in the model as it is.
        shape: (out, in).
        transposed: whether the weight is stored as (in, out), as in GPT-2's Conv1D.
        fused: for fused experts, the fused parameter: the weights W_e are stacked to (E·out, in). `modules` is then the
            module that is called for the experts.
    """

    parameter: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    transposed: bool = False
    fused: FusedWeight | None = None

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight → (…, out, in); for fused experts, of a single expert."""
        if self.fused is not None:
            return self.fused.by_expert(weight).reshape(self.shape)
        return weight.mT if self.transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(…, out, in) → shaped like the weight; for fused experts, of a single expert."""
        if self.fused is not None:
            return self.fused.as_weight(matrix)
        return matrix.mT if self.transposed else matrix

    @property
    def numbers_of_a_token(self) -> int:
        """The numbers of inputs and outputs of a token at the map, for fused experts at the usual number of experts."""
        if self.fused is None:
            return sum(self.shape)
        return (self.fused.out + self.fused.into) * min(self.fused.experts, _USUAL_SLOTS)


def shapes_of(
    maps: Iterable[LinearMap], parameters: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, tuple[int, int]]:
    """{parameter: (out, in)} of linear maps and other parameters."""
    return {m.parameter: m.shape for m in maps} | dict(parameters or {})


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list has names or name endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _identity(module: nn.Module) -> int:
    """The identity of a weight; a weight that the first forward pass unpacks is identified by its module until then."""
    return id(getattr(module, "weight", module))


def _behaviours(model: nn.Module) -> dict[nn.Module, Behaviour]:
    """What every linear layer computes, whether it is analysed or not.

    Raises:
        UnsupportedModelError: if one rounds its input, so that no gradient reaches the layers before it.
    """
    behaviours: dict[nn.Module, Behaviour] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            behaviours[module] = behaviour(module)
            if behaviours[module] == "rounding":
                raise UnsupportedModelError(CUT.format(name=name, how="it rounds its input"))
    return behaviours


def find_linear_maps(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
) -> list[LinearMap]:
    """The analysed linear maps, in the model's order; `target_modules` has the same meaning as in PEFT.

    They are nn.Linear, Conv1D, and fused experts (`expert_search.find_experts`), which have the names of their
    parameters ("…experts.down_proj") and are left out by that name or the module's.

    Modules that share a weight are one map; naming one of them includes the others. "all-linear" leaves out a language
    model's output embedding, maps that share an input embedding's weight, the vision tower of a model that takes
    images, and the parts of a loaded PEFT adapter. Inside PEFT's wrappers, modules and weights have the names of the
    bare model. An empty list chooses none.

    Modules that do not compute x Wᵀ + b are left out, and so are those whose weight is computed from other parameters
    in every pass, as with pruning and weight norm (`linear_layers.behaviour`).

    Raises:
        ValueError: if nothing matches, or a regular expression is not valid.
        UnsupportedModelError: if a linear map rounds its input, or no chosen module computes x Wᵀ + b.
    """
    bare = bare_module_names(model)
    linear = [(n, m) for n, m in model.named_modules() if is_linear(m) and not is_wrapper(m)]
    fused = _fused_maps(model, bare) if len(target_modules) else []
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        skip = _beside_the_language_model(model)
        chosen = [(n, m) for n, m in linear if n in bare and id(m) not in skip]
        fused = [(m, held) for m, held in fused if m.modules[0] in bare and id(held) not in skip]
    else:
        chosen = [(n, m) for n, m in linear if _is_named(n, bare, target_modules, "target_modules")]
        fused = [(m, held) for m, held in fused if _is_named(m.parameter, bare, target_modules, "target_modules")]
    if exclude_modules is not None:
        chosen = [(n, m) for n, m in chosen if not _is_named(n, bare, exclude_modules, "exclude_modules")]
        fused = [
            (m, held) for m, held in fused
            if not any(_is_named(n, bare, exclude_modules, "exclude_modules") for n in (m.parameter, *m.modules))
        ]  # fmt: skip
    if not chosen and not fused and len(target_modules):
        known = [bare.get(n, n) for n, _ in linear]
        raise ValueError(
            f"target_modules={target_modules!r} (exclude_modules={exclude_modules!r}) matches none of the model's "
            f"{len(known)} linear maps, for instance {known[:8]}"
        )
    behaviours = _behaviours(model)
    candidates, chosen = chosen, [(n, m) for n, m in chosen if behaviours[m] == "product"]
    if candidates and not chosen and not fused:
        raise UnsupportedModelError(
            f"none of the {len(candidates)} chosen linear layers computes x Wᵀ + b, so hooks cannot give their "
            f"rows (for instance {candidates[0][0]}, a {type(candidates[0][1]).__name__} computes something else). "
            "This happens with weights that are quantised again in every pass: load the model as it was saved. It also "
            "happens with weights that pruning, weight norm or a parametrization computes from others: make them "
            "permanent (torch.nn.utils.prune.remove, parametrize.remove_parametrizations), or name those in "
            "`parameters`"
        )
    weights, names = {_identity(m) for _, m in chosen}, {n for n, _ in chosen}
    # A tied weight's gradient is the sum over all its modules.
    chosen += [(n, m) for n, m in linear if n not in names and _identity(m) in weights]
    first_name: dict[int, str] = {}
    maps: dict[str, LinearMap] = {}
    for name, module in chosen:
        transposed = isinstance(module, Conv1D)
        parameter = first_name.setdefault(_identity(module), bare_name(f"{name}.weight", bare))
        if transposed:
            shape = (int(module.weight.shape[1]), int(module.weight.shape[0]))
        else:
            shape = (module.out_features, module.in_features)  # a quantised weight has another shape
        before = maps[parameter].modules if parameter in maps else ()
        maps[parameter] = LinearMap(parameter, (*before, name), shape, transposed)
    return _in_the_models_order(model, [*maps.values(), *(m for m, _ in fused)])


def _fused_maps(model: nn.Module, bare: dict[str, str]) -> list[tuple[LinearMap, nn.Module]]:
    """The maps of all fused experts, each with the module that is called for them."""
    return [
        (LinearMap(bare_name(f"{name}.{weight.name}", bare), (name,), weight.shape, fused=weight), experts.module)
        for name, experts in find_experts(model).items()
        for weight in experts.weights
    ]


def _in_the_models_order(model: nn.Module, maps: list[LinearMap]) -> list[LinearMap]:
    if all(m.fused is None for m in maps):
        return maps
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(maps, key=lambda m: place[m.modules[0]])


def _is_named(name: str, bare: Mapping[str, str], targets: str | Sequence[str], setting: str) -> bool:
    """Whether a setting names a module, by its name in the bare model or inside PEFT's wrappers."""
    try:
        return any(_matches(known, targets) for known in {name, bare.get(name, name)})
    except re.error as error:
        raise ValueError(f"{setting} {targets!r} is not a regular expression: {error}") from error


def _beside_the_language_model(model: nn.Module) -> set[int]:
    """Modules of a language model that "all-linear" leaves out: its output embedding, and those that embed images."""
    base: Any = base_of(model)
    embedding = getattr(base, "get_output_embeddings", lambda: None)()
    skip = set() if embedding is None else {id(part) for part in embedding.modules()}
    # A map that shares an input embedding's weight predicts tokens too, even if the model does not say so (BLIP's
    # decoder).
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    skip |= {id(m) for m in model.modules() if is_linear(m) and _identity(m) in embedded}
    return skip | _beside_the_decoder(base)


def _beside_the_decoder(base: Any) -> set[int]:
    """Modules beside the language model in a decoder-only model that also takes images or sound."""
    config: Any = getattr(base, "config", None)
    if hasattr(config, "get_text_config") and not getattr(config, "is_encoder_decoder", False):
        decoder = base.get_decoder() if config.get_text_config() is not config else None
        if decoder is not None and decoder is not base:
            return {id(part) for part in base.modules()} - {id(part) for part in decoder.modules()}
    return set()


def sees_images(model: nn.Module, maps: Sequence[LinearMap]) -> bool:
    """Whether some of the maps process images or sound, of which examples may have different amounts."""
    base: Any = base_of(model)
    embedding = getattr(base, "get_output_embeddings", lambda: None)()
    beside = _beside_the_decoder(base) - (
        {id(part) for part in embedding.modules()} if embedding is not None else set()
    )
    modules = dict(model.named_modules()) if beside else {}
    return any(id(modules[name]) in beside for m in maps for name in m.modules if name in modules)


def by_hooks(
    model: nn.Module, maps: Sequence[LinearMap], parameters: Mapping[str, tuple[int, int]]
) -> tuple[list[LinearMap], dict[str, tuple[int, int]]]:
    """The maps, with fused experts that `parameters` names and hooks can analyse; and the remaining parameters."""
    fused = [m for m, _ in _fused_maps(model, bare_module_names(model))] if parameters else []
    named = {m.parameter: m for m in fused if m.parameter in parameters}
    left = {name: shape for name, shape in parameters.items() if name not in named}
    known = {m.parameter for m in maps}
    return _in_the_models_order(model, [*maps, *(m for n, m in named.items() if n not in known)]), left


def without_parameters(
    model: nn.Module, maps: Sequence[LinearMap], parameters: Mapping[str, tuple[int, int]]
) -> list[LinearMap]:
    """The maps whose weights are not already differentiated by autograd under one of their names.

    Raises:
        UnsupportedModelError: if a map's weight is also used elsewhere, for example as the input embedding.
    """
    weights = bare_parameters(model)
    named = {id(weights[name]) for name in parameters}
    left = [m for m in maps if id(weights.get(m.parameter)) not in named]
    fused = {id(weights.get(m.parameter)) for m in maps if m.fused is not None}
    elsewhere = {
        id(parameter): name
        for prefix, module in model.named_modules()
        if not is_linear(module)
        for name, parameter in module.named_parameters(prefix, recurse=False)
        if id(parameter) not in fused
    }
    for m in left:
        if other := elsewhere.get(id(weights.get(m.parameter))):
            raise UnsupportedModelError(
                f"{m.parameter} is the same weight as {other}, but hooks see only its use in {m.modules[0]}. "
                f"Leave it out with exclude_modules=[{m.modules[0]!r}], or name it in parameters=[{other!r}]: autograd "
                "sees all of its gradient"
            )
    return left
