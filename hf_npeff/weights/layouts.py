"""The kinds of parameters that PEFT distinguishes: linear maps, fused experts, embeddings, biases, norms."""

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
"""The kind of a parameter for PEFT."""
LINEAR_LAYOUTS: tuple[Layout, ...] = ("linear", "conv1d", "experts", "experts-transposed")
"""Layouts of weights that only multiply inputs; those of fused experts are (E, out, in) or (E, in, out)."""

STORED_WHOLE: tuple[Layout, ...] = ("norm", "other")
"""Layouts of parameters for which PEFT's LoRA stores the new value (`modules_to_save`) instead of the change."""


_BIASES = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
_READ_WITHOUT_CALLING = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LayoutLMv2Encoder": _BIASES,
    "LayoutLMv3Encoder": _BIASES,
    "LongcatFlashTopkRouter": ("classifier",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""{class of transformers: its linear layers whose weight it reads without calling them}, so that an adapter around them
does nothing (findings/peft-lora-on-mambas-dt-proj-does-nothing.sh)."""


def layout_of(model: nn.Module, parameter: str) -> Layout:
    """The layout of a parameter, by its name in the bare model."""
    return layouts_of(model, [parameter])[parameter]


def layouts_of(model: nn.Module, parameters: Iterable[str]) -> dict[str, Layout]:
    """`layout_of` several parameters."""
    modules = bare_modules(model)
    places = {name: name.rpartition(".") for name in parameters}
    # Parameters of adapters are not in the bare model.
    layouts = {n: _layout(modules.get(p) or model.get_submodule(p), leaf) for n, (p, _, leaf) in places.items()}
    for name, (path, _, leaf) in places.items():
        around, _, own = path.rpartition(".")
        if leaf == "weight" and own in _READ_WITHOUT_CALLING.get(type(modules.get(around)).__name__, ()):
            layouts[name] = "other"
    if "other" in layouts.values():
        layouts |= {n: layout for n, layout in _layouts_of_experts(model).items() if n in layouts}
    return layouts


def _layouts_of_experts(model: nn.Module) -> dict[str, Layout]:
    """The layouts of fused experts' parameters that have a matrix for each expert.

    PEFT reads from a module's attribute whether they are transposed, and does not support modules without it.
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
    """A weight's ΔW, shaped like the weight, as (out, in); those of experts are stacked."""
    value = value if layout in ("linear", "experts") else value.mT
    return LinearDelta(value.flatten(0, -2), experts=len(value) if layout.startswith("experts") else 1)


def place_of_experts(parameter: str, layouts: Mapping[str, Layout]) -> str:
    """The PEFT module for a fused parameter; those for several parameters of one module are nested."""
    module = parameter.rpartition(".")[0]
    beside = [n for n in layouts if n.rpartition(".")[0] == module and layouts[n].startswith("experts")]
    beside.sort(key=lambda n: n.endswith(".down_proj"))  # nested in this order, the last outermost
    return module + ".base_layer" * (len(beside) - 1 - beside.index(parameter))


def check_all_linear(layouts: Mapping[str, Layout]) -> None:
    """Check that a change can be added in the activations, because it changes only weights of linear maps.

    Raises:
        UnsupportedModelError: if a parameter is something else.
    """
    if wrong := [f"{name} ({layout})" for name, layout in layouts.items() if layout not in LINEAR_LAYOUTS]:
        raise UnsupportedModelError(
            f"{', '.join(wrong[:3])} cannot be changed in the activations, only the weights of linear maps can; use "
            "ParameterDirection.applied_to, which changes the weights themselves, or load the adapter with PEFT"
        )
