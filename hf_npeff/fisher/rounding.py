"""Finds where a model rounds its activations (operations and modules), and runs the model without the rounding.

Rounding is constant between its steps, so its gradient is zero, and smaller finite differences are zero too. Only the
model without rounding shows what the gradient has lost.
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
"""Names of methods and functions. A cast from floating point to 8 bits counts as rounding. A cast to wider integers
counts if they become floating point again; otherwise they are choices, such as a token's expert."""
_INTEGERS = {"char": torch.int8, "byte": torch.uint8, "short": torch.int16, "int": torch.int32, "long": torch.int64}
_NUMBERS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}
"""Operations that turn integers into floating point by themselves."""
_ARITHMETIC = {"mul", "div", "true_divide", "add", "sub", "rsub", "__rmul__", "__rtruediv__", "__radd__", "__rsub__"}
"""Operations that turn integers into floating point in combination with floating point."""
_TO_NUMBERS = _NUMBERS | _ARITHMETIC
"""All operations after which integers may be floating point."""


@dataclass(frozen=True)
class Rounding:
    """One call of a rounding operation.

    Attributes:
        module: the name of the module whose forward pass calls it; empty for the model itself.
        operation: the operation's name.
        input: the sum of its input, which shows whether the input was the same in another pass.
    """

    module: str
    operation: str
    input: float


class Roundings(TorchFunctionMode):
    """Records the rounding operations that Python code calls inside `with`; with `undone`, skips the rounding.

    Args:
        model: the model, for the names of its modules.
        undone: whether to skip all rounding, including casts to integers and back.

    Attributes:
        calls: the recorded calls, in order.
    """

    def __init__(self, model: nn.Module, *, undone: bool = False):
        super().__init__()
        self.calls: list[Rounding] = []
        self._undone = undone
        self._integers: dict[int, tuple[Tensor, Tensor, str]] = {}  # id → wide integers, their source, the operation
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
        if not self._integers or name not in _TO_NUMBERS:
            return output
        if not isinstance(output, Tensor) or not output.is_floating_point():
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
        """Whether a call rounds floating-point numbers."""
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
    """The integer or 8-bit type that a call casts to; None for other types, and if the call does not cast."""
    if name in _INTEGERS:
        return _INTEGERS[name]
    if name not in CASTS:
        return None
    given = [*args[1:], *kwargs.values()]
    types = [v if isinstance(v, torch.dtype) else v.dtype for v in given if isinstance(v, torch.dtype | Tensor)]
    coarse = [d for d in types if d != torch.bool and (not d.is_floating_point or d.itemsize == 1)]
    return coarse[0] if coarse else None


def moved(before: list[Rounding], after: list[Rounding]) -> list[Rounding]:
    """The calls whose input changed in a second pass, so that they round activations, not positions or weights."""
    return [b for b, a in zip(before, after, strict=False) if b.input != a.input]
