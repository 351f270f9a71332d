"""Undoes, after every pass, the changes that a forward pass leaves in a model.

Some models change themselves with their input: block-sparse attention that switches to full attention for good after a
short example, rotary frequencies that grow with the longest example so far. Without this, an example's result would
depend on the examples before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, buffers, submodules and hooks."""
_SMALL = 2**20
"""Buffers with more numbers than this are not copied; rotary frequencies and counters are far smaller."""


class ModelState:
    """A record of submodules, buffers, plain attributes and caches of every module of a model, and of its config.

    Caches are attributes that hold a tensor, and dictionaries. What a pass without gradients leaves there, such as
    LeViT's table of attention biases, would be a constant for the next pass.

    Parameters, hooks and modes are not recorded; the code that runs the model restores those.
    """

    def __init__(self, model: nn.Module):
        self._modules = [_ModuleState(module) for module in model.modules()]
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._configs = [(config, _plain(vars(config))) for config in configs.values() if hasattr(config, "__dict__")]

    def restore(self) -> bool:
        """Undo all changes since the record was made; return whether there were any."""
        changed = [module.restore() for module in self._modules]
        changed += [_restore_plain(vars(config), before) for config, before in self._configs]
        return any(changed)


class _ModuleState:
    def __init__(self, module: nn.Module):
        self._module = module
        self._children = dict(module._modules)
        self._buffers = dict(module._buffers)
        self._copies = {
            name: (buffer._version, buffer.clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and _can_change_in_place(buffer)
        }
        self._plain = _plain(vars(module))
        self._caches: dict[str, tuple[Any, dict[Any, Any] | None]] = {
            name: (value, None if value is None or isinstance(value, Tensor) else dict(value))
            for name, value in vars(module).items()
            if name not in _OF_MODULES and (value is None or isinstance(value, Tensor) or type(value) is dict)
        }

    def restore(self) -> bool:
        module, changed = self._module, False
        for now, before in ((module._modules, self._children), (module._buffers, self._buffers)):
            if now.keys() != before.keys() or any(now[name] is not before[name] for name in before):
                now.clear()
                now.update(before)  # type: ignore[arg-type]
                changed = True
        for name, (version, copy) in self._copies.items():
            buffer: Any = self._buffers[name]
            if buffer._version != version:
                changed |= not torch.equal(buffer, copy)
                with torch.no_grad():
                    buffer.copy_(copy)
                self._copies[name] = (buffer._version, copy)
        changed |= self._restore_caches(vars(module))
        return _restore_plain(vars(module), self._plain) or changed

    def _restore_caches(self, now: dict[str, Any]) -> bool:
        changed = False
        for name, (value, content) in self._caches.items():
            if name not in now or (now[name] is not value and not isinstance(now[name], Tensor | dict)):
                continue
            if now[name] is not value:
                now[name], changed = value, True
            if content is not None and (
                value.keys() != content.keys() or any(value[k] is not content[k] for k in value)
            ):
                value.clear()
                value.update(content)
                changed = True
        return changed


def _can_change_in_place(buffer: Tensor) -> bool:
    return buffer.device.type != "meta" and buffer.numel() <= _SMALL and not buffer.is_inference()


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, _PLAIN) and name != "training"}


def _restore_plain(now: dict[str, Any], before: dict[str, Any]) -> bool:
    changed = {
        name: value
        for name, value in before.items()
        if name in now and now[name] is not value and (type(now[name]) is not type(value) or now[name] != value)
    }
    now.update(changed)
    return bool(changed)
