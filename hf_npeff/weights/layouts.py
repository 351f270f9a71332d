"""What parameters are to PEFT: weights of linear maps, of fused experts and of embeddings, biases, norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_module_names, bare_modules, bare_name
from hf_npeff.fisher.expert_search import find_experts
from hf_npeff.weights.activations import LinearDelta

Layout = Literal["linear", "conv1d", "experts", "experts-transposed", "embedding", "bias", "norm", "other"]
"""What a parameter is to PEFT."""
LINEAR_LAYOUTS: tuple[Layout, ...] = ("linear", "conv1d", "experts", "experts-transposed")
"""Of weights that multiply inputs and nothing else: those of fused experts are (E, out, in), or (E, in, out)."""

STORED_WHOLE: tuple[Layout, ...] = ("norm", "other")
"""Of parameters whose new value a LoRA of PEFT holds (`modules_to_save`), not what is added to it."""


def layout_of(model: nn.Module, parameter: str) -> Layout:
    """What a parameter, by its name in the bare model, is to PEFT."""
    return layouts_of(model, [parameter])[parameter]


def layouts_of(model: nn.Module, parameters: Iterable[str]) -> dict[str, Layout]:
    """`layout_of` several parameters."""
    modules = bare_modules(model)
    places = {name: name.rpartition(".") for name in parameters}
    # What an adapter adds has no place in the bare model.
    layouts = {n: _layout(modules.get(p) or model.get_submodule(p), leaf) for n, (p, _, leaf) in places.items()}
    if "other" in layouts.values():
        layouts |= {n: layout for n, layout in _layouts_of_experts(model).items() if n in layouts}
    return layouts


def _layouts_of_experts(model: nn.Module) -> dict[str, Layout]:
    """Of the parameters of fused experts that hold a matrix for each.

    PEFT takes a module's word for it that they are transposed, and knows nothing of those that do not give it.
    """
    bare = bare_module_names(model)
    layouts: dict[str, Layout] = {}
    for path, experts in find_experts(model).items():
        for weight in experts.weights:
            if not weight.flat and weight.transposed == getattr(experts.module, "is_transposed", False):
                name = bare_name(f"{path}.{weight.name}", bare)
                layouts[name] = "experts-transposed" if weight.transposed else "experts"
    return layouts


def _layout(module: nn.Module, leaf: str) -> Layout:
    if leaf == "bias" and isinstance(module, nn.Linear | Conv1D):
        return "bias"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def as_linear_delta(value: Tensor, layout: Layout) -> LinearDelta:
    """A weight's ΔW, shaped like the weight, as one of (out, in); those of experts lie one below the other."""
    value = value if layout in ("linear", "experts") else value.mT
    return LinearDelta(value.flatten(0, -2), experts=len(value) if layout.startswith("experts") else 1)


def place_of_experts(parameter: str, layouts: Mapping[str, Layout]) -> str:
    """The module of PEFT's that carries a fused parameter: those of one module wrap each other, the last outermost."""
    module = parameter.rpartition(".")[0]
    beside = [n for n in layouts if n.rpartition(".")[0] == module and layouts[n].startswith("experts")]
    beside.sort(key=lambda n: n.endswith(".down_proj"))  # as transformers' experts define them
    return module + ".base_layer" * (len(beside) - 1 - beside.index(parameter))


def check_all_linear(layouts: Mapping[str, Layout]) -> None:
    """Refuse a change of anything but linear maps' weights, where it is to be added in the activations.

    Raises:
        UnsupportedModelError: if a parameter is something else.
    """
    if wrong := [f"{name} ({layout})" for name, layout in layouts.items() if layout not in LINEAR_LAYOUTS]:
        raise UnsupportedModelError(
            f"{', '.join(wrong[:3])} cannot be changed in the activations, only the weights of linear maps can; use "
            "ParameterDirection.applied_to, which moves the weights themselves, or load the adapter with PEFT"
        )
