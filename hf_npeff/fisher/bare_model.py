"""The bare model inside PEFT's, torch.compile's and data-parallel wrappers, and the names of its weights.

A sketch depends on the names of parameters, and adapters are loaded onto the bare model. So parameters have the names
of the bare model, and the rows of a wrapped model fit those of the same model merged or unwrapped.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether a model is a SentenceTransformer: a transformers model followed by pooling, whose output is a vector.

    It is recognised by the name of its class, so the package sentence-transformers need not be installed.
    """
    return isinstance(model, nn.Sequential) and any(c.__name__ == "SentenceTransformer" for c in type(model).__mro__)


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's, torch.compile's or a data-parallel wrapper, or a SentenceTransformer."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(getattr(model, "module", None), nn.Module):  # data-parallel wrappers
            model = model.module  # type: ignore[assignment]
        elif is_sentence_transformer(model):
            return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
        else:
            return model


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a PEFT wrapper around a module of the model, which also has the adapter's weights."""
    # Attributes of PEFT's BaseTunerLayer and AuxiliaryTrainingWrapper; importing peft here would take a second.
    return hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters")


def acting_adapters(wrapper: nn.Module) -> list[str]:
    """Names of the adapters that change a wrapper's output now: neither disabled nor merged into its weight."""
    around: Any = wrapper
    if around.disable_adapters:
        return []
    return [name for name in around.active_adapters if name not in around.merged_adapters]


def wrapped_by(wrapper: nn.Module) -> nn.Module:
    """The module that runs in the wrapper's place, without the adapters' additions."""
    around: Any = wrapper
    if hasattr(
        around, "modules_to_save"
    ):  # a whole copy for each adapter; the active one runs in place of the original
        copies = [name for name in acting_adapters(wrapper) if name in around.modules_to_save]
        inside: nn.Module = around.modules_to_save[copies[0]] if copies else around.original_module
    elif hasattr(around, "token_adapter"):
        inside = around.token_adapter.base_layer
    else:
        inside = around.base_layer
    return wrapped_by(inside) if is_wrapper(inside) else inside  # several methods may be put around one another


def bare_module_names(model: nn.Module) -> dict[str, str]:
    """{name in `model.named_modules()`: name in the bare model}, without modules that adapters add.

    A module that runs in place of another (a copy under `modules_to_save`) has the name of the one it replaces.
    """
    base = base_of(model)
    modules = dict(model.named_modules())
    start = next(name for name, module in modules.items() if module is base)
    wrappers: dict[int, str] = {}  # of several wrappers around one module, the outermost comes first and gets the name
    for name, module in modules.items():
        if is_wrapper(module):
            wrappers.setdefault(id(wrapped_by(module)), name)
    bare = {start: ""}
    added: set[str] = set()
    for name, module in modules.items():
        if name == start or not _is_below(name, start):
            continue
        parent, _, leaf = name.rpartition(".")
        if id(module) in wrappers:
            bare[name] = bare[wrappers[id(module)]]
        elif parent in added or is_wrapper(modules[parent]):
            added.add(name)
        elif leaf == "_orig_mod":
            bare[name] = bare[parent]
        else:
            bare[name] = f"{bare[parent]}.{leaf}".removeprefix(".")
    return bare


def _is_below(name: str, start: str) -> bool:
    return not start or name.startswith(f"{start}.")


def bare_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter}, a tied one under each of its names.

    Parameters of the bare model have their names in the bare model; parameters of adapters have their names in
    `model`.
    """
    bare = bare_module_names(model)
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters[bare_name(name, bare)] = parameter
    return parameters


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """`bare_parameters`, each also under its name in `model`, which directions of older versions use."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **bare_parameters(model)}


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{name in the bare model: the module that runs there}, without PEFT's wrappers."""
    modules = dict(model.named_modules())
    return {bare: modules[name] for name, bare in bare_module_names(model).items() if not is_wrapper(modules[name])}


def bare_name(name: str, modules: dict[str, str]) -> str:
    """A parameter's name in the bare model; a parameter of an adapter keeps its name.

    Args:
        name: the parameter's name in the model.
        modules: the result of `bare_module_names`.
    """
    path, _, leaf = name.rpartition(".")
    return f"{modules[path]}.{leaf}".removeprefix(".") if path in modules else name
