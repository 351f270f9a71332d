"""Where a model rounds its activations: the operations, in which modules, and the model as it would be without them.

Rounding is constant between its steps, so its gradient is zero, and differences over steps that are smaller say the
same. Only a model that does not round shows what has been lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ROUNDS = {"round", "round_", "floor", "floor_", "ceil", "ceil_", "trunc", "trunc_", "fix", "fix_"}
CASTS = {"to", "type", "type_as", "char", "byte", "short", "int", "long"}
"""Names of methods and functions; a cast counts where it goes from floating point to 8 bits. One to wider integers
counts where these become numbers of floating point again: else they are choices, such as a token's expert."""
_INTEGERS = {"char": torch.int8, "byte": torch.uint8, "short": torch.int16, "int": torch.int32, "long": torch.int64}
_NUMBERS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}
"""What makes floating point of integers by itself."""
_ARITHMETIC = {"mul", "div", "true_divide", "add", "sub", "rsub", "__rmul__", "__rtruediv__", "__radd__", "__rsub__"}
"""What makes it of integers together with floating point."""


@dataclass(frozen=True)
class Rounding:
    """One call of an operation that rounds.

    Attributes:
        module: the name of the module in whose forward pass it is; empty for the model itself.
        operation: its name.
        input: the sum of what was rounded, which tells whether it was the same in another pass.
    """

    module: str
    operation: str
    input: float


class Roundings(TorchFunctionMode):
    """Sees what Python code inside `with` rounds; with `undone`, gives it back unrounded.

    Args:
        model: whose modules are named.
        undone: leave everything unrounded, also what is cast to integers and read as numbers again.

    Attributes:
        calls: in order.
    """

    def __init__(self, model: nn.Module, *, undone: bool = False):
        super().__init__()
        self.calls: list[Rounding] = []
        self._undone = undone
        self._integers: dict[int, tuple[Tensor, Tensor, str]] = {}  # id → wide integers, what they were made of, how
        self._names = {id(module): name for name, module in model.named_modules()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self._rounds(name, args, kwargs):
            x: Tensor = args[0]
            if not self._is_wide(name, args, kwargs):
                self._keep(x, name)
                return x if self._undone else func(*args, **kwargs)
            integers = func(*args, **kwargs)
            self._integers[id(integers)] = integers, x, name
            return integers
        output = func(*args, **kwargs)
        if name not in _NUMBERS | _ARITHMETIC or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        sources = [self._integers.get(id(arg)) for arg in args]
        for source in filter(None, sources):
            self._keep(source[1], source[2])
        if not self._undone or not any(sources):
            return output
        return func(*(source[1] if source else arg for source, arg in zip(sources, args, strict=True)), **kwargs)

    def _keep(self, x: Tensor, name: str) -> None:
        self.calls.append(Rounding(self._module(), name, float(x.detach().double().sum())))

    @staticmethod
    def _rounds(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call makes floating point coarser."""
        if name not in _ROUNDS and name not in CASTS:
            return False
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.device.type == "meta":
            return False
        return name in _ROUNDS or _target(name, args, kwargs) is not None

    @staticmethod
    def _is_wide(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is a cast to integers of more than 8 bits."""
        dtype = _target(name, args, kwargs)
        return dtype is not None and dtype.itemsize > 1

    def _module(self) -> str:
        """The innermost module whose forward pass is running."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            name = self._names.get(id(frame.f_locals.get("self"))) if "self" in frame.f_code.co_varnames else None
            if name is not None:
                return name
            frame = frame.f_back
        return ""


def _target(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The type that a call casts to, of integers or of 8 bits; None of other types, and where nothing is cast."""
    if name in _INTEGERS:
        return _INTEGERS[name]
    if name not in CASTS:
        return None
    given = [*args[1:], *kwargs.values()]
    types = [v if isinstance(v, torch.dtype) else v.dtype for v in given if isinstance(v, torch.dtype | Tensor)]
    coarse = [d for d in types if d != torch.bool and (not d.is_floating_point or d.itemsize == 1)]
    return coarse[0] if coarse else None


def moved(before: list[Rounding], after: list[Rounding]) -> list[Rounding]:
    """The calls whose input was another one in a second pass: rounded activations, not positions or weights."""
    return [b for b, a in zip(before, after, strict=False) if b.input != a.input]
