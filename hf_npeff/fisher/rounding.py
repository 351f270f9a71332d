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
CASTS = {"to", "type", "char", "byte"}
"""Names of methods and functions; a cast counts where it goes from floating point to 8 bits, as quantisers do. Wider
integers made of activations are choices, such as which expert a token goes to: nothing is computed with them."""
_EIGHT_BITS = {"char", "byte"}


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
        undone: leave everything unrounded, also what is cast to 8 bits.

    Attributes:
        calls: in order.
    """

    def __init__(self, model: nn.Module, *, undone: bool = False):
        super().__init__()
        self.calls: list[Rounding] = []
        self._undone = undone
        self._names = {id(module): name for name, module in model.named_modules()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._rounds(getattr(func, "__name__", ""), args, kwargs or {}):
            x: Tensor = args[0]
            self.calls.append(Rounding(self._module(), func.__name__, float(x.detach().double().sum())))
            if self._undone:
                return x
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _rounds(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call makes floating point coarser."""
        if name not in _ROUNDS and name not in CASTS:
            return False
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.device.type == "meta":
            return False
        return name in _ROUNDS or _is_coarse(name, args, kwargs)

    def _module(self) -> str:
        """The innermost module whose forward pass is running."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            name = self._names.get(id(frame.f_locals.get("self"))) if "self" in frame.f_code.co_varnames else None
            if name is not None:
                return name
            frame = frame.f_back
        return ""


def _is_coarse(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a cast goes to integers or floating point of 8 bits."""
    if name in _EIGHT_BITS:
        return True
    given = [*args[1:], *kwargs.values()]
    types = [v if isinstance(v, torch.dtype) else v.dtype for v in given if isinstance(v, torch.dtype | Tensor)]
    return any(dtype != torch.bool and dtype.itemsize == 1 for dtype in types)


def moved(before: list[Rounding], after: list[Rounding]) -> list[Rounding]:
    """The calls whose input was another one in a second pass: rounded activations, not positions or weights."""
    return [b for b, a in zip(before, after, strict=False) if b.input != a.input]
