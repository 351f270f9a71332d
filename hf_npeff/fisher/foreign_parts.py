"""The parts of a model whose code is not transformers' own, where a wrong gradient may come from."""

from __future__ import annotations

from torch import nn

from hf_npeff.fisher.bare_model import base_of
from hf_npeff.fisher.experts import INTERCEPTIONS
from hf_npeff.fisher.forward import ForwardPass

_OWN = ("torch", "transformers", "peft", "accelerate")
"""Packages whose modules count as unchanged."""
_ATTENTIONS = {None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}


_REPLACED_BY_US = {"_hf_hook", "_original_forward", INTERCEPTIONS}
"""Attributes of modules whose forward pass Accelerate or this package has replaced."""


def foreign_parts(forward: ForwardPass) -> list[str]:
    """The parts of a model that are not transformers' own: other packages' modules, replaced passes, hooks."""
    parts: list[str] = []
    own_head = type(forward.head).__module__.startswith(__name__.split(".")[0])
    if not own_head:
        parts.append(f"the head {type(forward.head).__name__}")
    for name, module in forward.model.named_modules():
        kinds = type(module), type(module).forward
        foreign = any(kind.__module__.split(".")[0] not in _OWN for kind in kinds if kind.__module__)
        replaced = "forward" in vars(module) and not _REPLACED_BY_US & vars(module).keys()
        if foreign or replaced or _hooks_of_others(module):
            parts.append(f"{name or 'the model'}, a {type(module).__name__}")
    attention = getattr(getattr(base_of(forward.model), "config", None), "_attn_implementation", None)
    if attention not in _ATTENTIONS:
        parts.append(f"the attention {attention!r}")
    return parts


def _hooks_of_others(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    packages = (getattr(hook, "__module__", "").split(".")[0] for hook in hooks)
    return any(package not in (*_OWN, __name__.split(".")[0]) for package in packages)
