"""Which modules' weights are read while a model runs, whether the modules are called or not."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn


class ParameterReads:
    """Inside `with`, notes the modules whose `weight` is read, as `module.weight`; no weight and no class is changed.

    Lists of a model's parameters do not count as reads.

    Args:
        modules: {name: module}.

    Attributes:
        modules: see above.
        read: the names of the modules whose weight was read.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.read: set[str] = set()
        self.modules = modules
        self._own: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ParameterReads:
        for name, module in self.modules.items():
            self._own[name] = own = module._parameters
            vars(module)["_parameters"] = _Watched(own, name, self.read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, module in self.modules.items():
            own, now = self._own.pop(name), dict(module._parameters.items())
            own.clear()
            own.update(now)  # Accelerate puts other tensors into it
            vars(module)["_parameters"] = own


class _Watched(dict[str, Any]):
    """A module's parameters, which notes when its weight is taken out by name."""

    def __init__(self, own: Mapping[str, Any], name: str, read: set[str]):
        super().__init__(own)
        self._name, self._read = name, read

    def __getitem__(self, key: str) -> Any:
        if key == "weight":
            self._read.add(self._name)
        return super().__getitem__(key)
