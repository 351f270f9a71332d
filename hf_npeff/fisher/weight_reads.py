"""Does a model use the analysed weights in the products of their modules alone?

The gradient of a linear map's weight is that of its module's product. A module that reads the same weight elsewhere is
compared with autograd (`row_check`). But if it reads it detached (`weight.detach()`, `.data`, under `no_grad`), or
computes with a copy that it made earlier, neither hooks nor autograd know: the rows agree with each other, and a
change of the weight does something else. So one pass in which every analysed map's output is nudged (`nudges`) is
compared with one in which every read of their weights gives the weights with the same change, W + s (σ b aᵀ ± W). The
± W changes the norms of weights, which random directions hardly do. Both are the same function unless a weight is used
in another way, so they differ by rounding, however large the step is.

No weight is written: `MovedReads` hands out changed copies, one at a time, to the operations of this thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_parameters, base_of
from hf_npeff.fisher.batching import percent, precision_of
from hf_npeff.fisher.foreign_parts import foreign_parts
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.linear_maps import LinearMap
from hf_npeff.fisher.memory import is_out_of_memory
from hf_npeff.fisher.nudges import Nudges

_STEP, _STEP_IN_16_BITS = 0.05, 0.3
"""Relative change of every map's output, far above rounding (1e-6 of the output, and 1e-2 in 16 bits)."""
_TOLERANCE, _TOLERANCE_IN_16_BITS = 2e-3, 0.2
"""The largest relative difference of the two passes' changes that is rounding."""
_APART = (0.01, 0.2)
"""Two further steps, in 32 bits and more, that tell another use of a weight from a weight that is rounded again in
every pass, as in quantisation-aware training."""
_GROWS = 3
"""With another use of a weight, the difference as a share of the change is at the smaller step at most twice that at
the larger one (of tiny Llamas, with 24 planted uses), and with rounding to 8 bits 4 to 33 times."""
_AMPLIFIED = 16
"""By how many roundings a nudge is changed, to see what the model makes of rounding; a pass has more than one."""
_BY_CHANCE = 0.1
"""If this share of a difference comes from rounding alone, the difference says nothing. Chosen: a smooth model makes
2e-6 of the 16 roundings, a thousandth of the smallest difference that counts."""
_LARGEST = 2**28
"""Weights with more entries are not moved, because a changed copy of one takes a gibibyte."""
_checked: set[int] = set()
"""Code whose uses of weights were found to be as they should, so that the next model that runs it is not checked."""
_NAMED = 6
"""The most modules that the error names."""


@dataclass(frozen=True)
class Change:
    """A weight, and a function that returns it changed, with its own strides."""

    weight: Tensor
    changed: Callable[[], Tensor]


@dataclass(frozen=True)
class _Uses:
    """How an operation uses its arguments.

    Attributes:
        is_view: whether it returns a view of its input, without writing into it.
        written: the places and names of the arguments that it writes into.
    """

    is_view: bool
    written: frozenset[int | str]

    @classmethod
    def of(cls, func: Any) -> _Uses:
        schema = getattr(func, "_schema", None)
        if schema is None:
            return cls(False, frozenset())
        writes = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        is_view = any(value.alias_info and not value.alias_info.is_write for value in schema.returns)
        return cls(is_view, frozenset(key for pair in writes for key in pair))


class MovedReads(TorchDispatchMode):
    """Inside `with`, every operation of this thread that reads one of these weights, or a view of it, reads it changed.

    Args:
        changes: the weights, each dense in its memory.
    """

    supports_higher_order_operators = True

    def __init__(self, changes: Sequence[Change]):
        super().__init__()
        self._in_storage: dict[int, list[Change]] = {}
        for change in changes:
            self._in_storage.setdefault(change.weight.untyped_storage()._cdata, []).append(change)
        self._uses: dict[Any, _Uses] = {}
        self._last: tuple[Change, Tensor] | None = None  # experts of one weight are read one after another

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        uses = self._uses.get(func)
        if uses is None:
            uses = self._uses[func] = _Uses.of(func)
        if uses.is_view:  # what reads the view will be given the changed weight
            return func(*args, **kwargs)
        changed = [value if i in uses.written else self._moved(value) for i, value in enumerate(args)]
        if kwargs:
            kwargs = {n: value if n in uses.written else self._moved(value) for n, value in kwargs.items()}
        return func(*changed, **kwargs)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)(map(self._moved, value)) if type(value) in (list, tuple) else value
        if value.layout is not torch.strided or value.is_meta:
            return value
        try:
            changes = self._in_storage.get(value.untyped_storage()._cdata, ())
        except (RuntimeError, NotImplementedError):  # a subclass without a storage
            return value
        for change in changes:
            offset = value.storage_offset() - change.weight.storage_offset()
            if 0 <= offset < change.weight.numel() and value.dtype == change.weight.dtype:
                return self._changed(change).as_strided(value.size(), value.stride(), offset)
        return value

    def _changed(self, change: Change) -> Tensor:
        if self._last is None or self._last[0] is not change:
            self._last = None  # before the next one is made
            self._last = change, change.changed()
        return self._last[1]


def check_weight_reads(forward: ForwardPass, nudges: Nudges, few: Sequence[Example], source: Tensor, v: Tensor) -> str:
    """Compare a pass with nudged outputs and a pass with changed weights.

    Weights that are quantised, offloaded or sharded are not moved.

    Args:
        forward: the forward pass.
        nudges: the nudges, entered and measured.
        few: the examples.
        source: the unchanged source (B, t, s) of these examples.
        v: a cotangent (B, t, s); only positions where it is not zero are compared.

    Returns:
        Why the comparison was not made, or of which weights it was not; empty if it was made of all.

    Raises:
        UnsupportedModelError: if the passes differ; the error names the modules.
    """
    if forward.fsdp.active:  # processes have to make the same passes, and sharded weights are not moved
        return "the weights are sharded"
    code = _own_code(forward)
    if code in _checked:
        return ""
    comparison = _Comparison(forward, nudges, few, source, (v != 0).any(-1, keepdim=True))
    try:
        error, wrong = comparison.error_and_maps()
    except NotFiniteError as not_finite:
        return f"{not_finite.reason} with changed weights"
    except (RuntimeError, ValueError, UnsupportedModelError) as failure:
        if is_out_of_memory(failure):
            raise
        return f"the model fails with changed weights: {failure!r}"
    if not wrong:
        if unmoved := comparison.unmoved:
            return f"{unmoved} of {len(forward.maps)} weights are quantised, offloaded or too large to be changed"
        _checked.update(() if code is None else [code])
        return ""
    if comparison.amplified() > _BY_CHANCE * error:
        return "rounding alone changes the predictions by a tenth of the difference or more"
    modules = [name for m in forward.maps if m.parameter in wrong for name in m.modules]
    more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
    raise UnsupportedModelError(
        f"the weights of {', '.join(modules[:_NAMED])}{more} have an effect that gradients do not show: a small change "
        f"of them changes the predictions by {percent(error)} otherwise than the same change of what the modules give. "
        "The model reads these weights detached (weight.detach(), weight.data, torch.no_grad) beside calling the "
        "modules, or computes with a copy that it made earlier. Let gradients pass through every use of them, or leave "
        f"them out with exclude_modules={modules!r}"
    )


def _own_code(forward: ForwardPass) -> int | None:
    """A number for the code that a model runs and its settings; None if some of the code is not transformers' own."""
    if foreign_parts(forward):
        return None
    kinds = frozenset((type(module), type(module).forward) for module in forward.model.modules())
    settings = repr(getattr(base_of(forward.model), "config", None))
    return hash((kinds, settings, tuple(forward.shapes), precision_of(forward.model)))


class _Comparison:
    def __init__(self, forward: ForwardPass, nudges: Nudges, few: Sequence[Example], source: Tensor, counted: Tensor):
        self._forward, self._nudges, self._few, self._counted = forward, nudges, few, counted
        self._source = source.double()
        weights = bare_parameters(forward.model)
        sizes = nudges.sizes()
        self._maps = {m.parameter: m for m in forward.maps if m.parameter in sizes}
        self._weights = {name: weights[name] for name in self._maps if can_be_moved(weights.get(name))}
        self.unmoved = len(self._maps) - len(self._weights)

    def error_and_maps(self) -> tuple[float, set[str]]:
        """The relative difference, and the parameters that cause it; none if it is rounding."""
        narrow = precision_of(self._forward.model) in (torch.float16, torch.bfloat16)
        step, tolerance = (_STEP_IN_16_BITS, _TOLERANCE_IN_16_BITS) if narrow else (_STEP, _TOLERANCE)
        if not self._weights:
            return 0.0, set()
        error, change = self._error(step, self._weights)
        if error <= tolerance * change:
            return error, set()
        if not narrow:
            near, far = (self._error(size, self._weights) for size in _APART)
            if near[0] * far[1] > _GROWS * far[0] * near[1]:
                return error, set()
        each = {name: self._error(step, [name])[0] for name in self._weights}
        least = max(each.values()) / 2
        return error / change, {name for name, own in each.items() if own >= least}

    @torch.no_grad()
    def amplified(self) -> float:
        """The relative difference of two passes whose nudges differ by rounding; 0 in 16 bits, where it is never small.

        Of a smooth model it is that rounding. A model that jumps has jumped elsewhere.
        """
        precision = precision_of(self._forward.model)
        if precision in (torch.float16, torch.bfloat16):
            return 0.0
        matrices = {n: self._maps[n].as_matrix(w.detach()) for n, w in self._weights.items()}
        changes = []
        try:
            for factor in (1.0, 1.0 + _AMPLIFIED * torch.finfo(precision).eps):
                self._nudges.at_stretched(factor * _STEP, matrices)
                changes.append(self._change())
        finally:
            self._nudges.rest()
        a, b = changes
        return float((a - b).norm()) / max(float(a.norm()), torch.finfo(torch.float64).tiny)

    @torch.no_grad()
    def _error(self, step: float, names: Collection[str]) -> tuple[float, float]:
        """The difference of the two passes, and the size of the larger change."""
        self._nudges.at_stretched(step, {n: self._maps[n].as_matrix(self._weights[n].detach()) for n in names})
        try:
            nudged = self._change()
        finally:
            self._nudges.rest()
        with MovedReads([moved(self._weights[name], self._maps[name], self._nudges, step) for name in names]):
            read = self._change()
        return float((read - nudged).norm()), max(float(read.norm()), float(nudged.norm()))

    def _change(self) -> Tensor:
        """The change of the source at the counted positions; 0 where it is infinite, as excluded outcomes are."""
        change = self._forward.outputs(self._few).source.double() - self._source
        return torch.where(self._counted & change.isfinite(), change, 0.0)


def moved(weight: Tensor, linear_map: LinearMap, nudges: Nudges, step: float) -> Change:
    """The change of a map's weight that `nudges.at_stretched(step)` amounts to."""
    weight = weight.detach()

    def changed() -> Tensor:
        matrix = nudges.change_of_weight(linear_map.parameter, step, linear_map.as_matrix(weight))
        wide = weight.to(matrix.dtype) + linear_map.as_weight(matrix).to(weight.device)
        return torch.empty_like(weight).copy_(wide)  # with the weight's strides

    return Change(weight, changed)


def can_be_moved(weight: Tensor | None) -> bool:
    """Whether `MovedReads` can hand out a weight changed: it is at hand, dense in its memory, and not too large."""
    if weight is None or not is_at_hand(weight) or weight.numel() > _LARGEST:
        return False
    return weight.is_contiguous() or weight.mT.is_contiguous()
