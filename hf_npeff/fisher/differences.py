"""Are autograd's gradients the model's true gradients? They are compared with central differences of its predictions.

After a `detach`, `torch.no_grad`, rounded activations or a custom function with a wrong backward pass, rows from hooks
and from autograd agree, but both are wrong. So every analysed map is moved a little along random directions
(`nudges`), and

    (⟨v, z(s)⟩ − ⟨v, z(−s)⟩) / 2s      is compared with      Σ σ (x·a)(δ·b),

where z is the model's output, v a sum of the cotangents with random signs, and s the relative change of every map's
output. The directions are random, so parameters without any gradient count like all others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.fisher.batching import percent, precision_of
from hf_npeff.fisher.eigenpairs import HiddenMetric
from hf_npeff.fisher.foreign_parts import foreign_parts
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.gradients import backward_passes
from hf_npeff.fisher.nudges import Directions, Nudges, Slopes
from hf_npeff.fisher.outputs import Outputs
from hf_npeff.fisher.rounding import CASTS, Rounding, Roundings, moved
from hf_npeff.fisher.rows import choose_cotangents
from hf_npeff.fisher.weight_reads import check_weight_reads

logger = logging.getLogger(__name__)
_LOST_BY_ROUNDING = 0.25
"""Largest relative difference between the gradients of a model that rounds and those without rounding. Rounding to 8
bits changes them by a few percent and to 4 bits by up to .2, because activations move; a gradient that stops at the
rounding misses more."""
_COARSE = (0.1, 0.05, 0.02)
"""Relative changes larger than the rounding steps of 4 to 8 bits, so that differences do not see the rounding."""
_ALWAYS_LOSES = {"round", "round_"} | CASTS
"""Operations whose result replaces their input; `floor` may also be there for the remainder x − ⌊x⌋."""
_AT_ONCE = 512
"""The most tokens of all copies in a pass. With more, the work of several passes is more than their overhead."""
_SHARE = 0.1
"""A block or a map is named if it has this share of the whole difference."""
_NAMED = 6
"""The most modules that a message lists one by one."""


@dataclass(frozen=True)
class Steps:
    """The steps of the comparison, and its tolerances.

    Attributes:
        sizes: relative changes of the maps' outputs, tried in this order until differences agree with gradients.
        slopes: how many slopes are compared, over the examples and directions.
        tolerance: relative difference from the gradients that may be rounding and curvature.
        wrong: gradients are wrong if the differences at two sizes share a larger relative deviation from them than
            this; rounding errors are not shared.
        agreement: how much differences at the two sizes may differ, as a share of their deviation from the gradients.
    """

    sizes: tuple[float, ...]
    slopes: int
    tolerance: float
    wrong: float
    agreement: float


EXACT = Steps((1e-3, 2e-4, 4e-5), 4, 1e-2, 2e-2, 0.25)
"""For 32 bits and more. The error from rounding (1e-7 to 1e-6 of the output, over 2s) and from curvature (s² to 100 s²
for the tiny random models of the sweep) are both below 1e-3 for s = 1e-3 (measured: 7e-5 at the median, 3e-4 for nine
of ten). Smaller steps are for models with kinks, whose error falls like √s, and for routers, which must not choose
another expert; at 4e-5 rounding is 3e-3. One random direction misses a missing part of the gradient with a chance of a
few percent, four of them with a chance of one in a million."""
_IN_16_BITS = {
    torch.float16: Steps((1e-2, 2e-2), 8, 5e-2, 0.1, 1.0),
    torch.bfloat16: Steps((3e-2, 2e-2), 8, 0.15, 0.2, 1.0),
}
"""Rounding is 1e-3 and 1e-2 of a model's output, so steps are as large as curvature allows. For correct tiny models the
difference is .01 to .05 in float16 and .05 to .1 in bfloat16, of which two sizes share .03 and .06. For models that
stop the gradient at the middle of three layers it is .3 to .5."""


@dataclass(frozen=True)
class DifferenceCheck:
    """The result of comparing gradients with central differences.

    Attributes:
        error: the relative difference of the slopes; None if there was no usable comparison.
        note: why there was none, what the gradients lack, or why uses of weights outside their modules, of which
            gradients may know nothing, were not looked for; empty if all agrees.
    """

    error: float | None
    note: str = ""


@dataclass
class _Slopes:
    """Slopes (B, K) along the directions, in float64.

    Attributes:
        gradient: the slopes by autograd.
        by_map: {parameter: its part of the slopes}.
        v: the cotangent.
        source: the source (B, t, s) of the pass.
        calls: the rounding operations of the pass.
    """

    gradient: Tensor
    by_map: dict[str, Tensor]
    v: Tensor
    source: Tensor
    calls: list[Rounding] = field(default_factory=list)

    def part(self, names: Collection[str]) -> Tensor:
        """The slopes of these parameters only."""
        parts = [value for name, value in self.by_map.items() if name in names]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(self.gradient)

    def distance_from(self, other: _Slopes) -> float:
        """The relative distance from other slopes, over all maps and examples; a map without a gradient has zeros."""
        names, none = self.by_map.keys() | other.by_map.keys(), torch.zeros_like(self.gradient)
        own, others = (torch.stack([s.by_map.get(name, none) for name in names]) for s in (self, other))
        return _rms(own - others) / max(_rms(others), math.ulp(0.0))


def check_differences(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, pair: Sequence[Example]
) -> DifferenceCheck:
    """Compare gradients with differences, on the examples of the row check.

    This takes one forward and one backward pass over them, and one forward pass over copies of short examples or four
    passes over long ones; more if these do not agree.

    Args:
        forward: the forward pass.
        config: the output factor, whose cotangents are used, and the seed.
        metric: see `RowMaker`.
        pair: the examples; where they must not share a batch, the first is used alone.

    Raises:
        UnsupportedModelError: if the gradients are not the model's true gradients, unless transformers' own code is
            written so; the error names the modules.
    """
    if not forward.maps:
        return DifferenceCheck(None, "no linear map is analysed")
    few = pair[:1] if forward.one_at_a_time else pair
    test = _Test(forward, config, metric, few)
    try:
        return test.run()
    except NotFiniteError as error:
        return DifferenceCheck(None, f"{error.reason} after a small change of the weights")


class _Test:
    """One comparison; see `check_differences`."""

    def __init__(self, forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, few: Sequence[Example]):
        self._forward, self._config, self._metric, self._few = forward, config, metric, few
        self._steps = _IN_16_BITS.get(precision_of(forward.model), EXACT)
        directions = Directions(forward.maps, max(1, self._steps.slopes // len(few)), config.seed)
        self._directions, self._nudges = directions, Nudges(forward.model, directions)
        self._unrounded = False

    def run(self) -> DifferenceCheck:
        """The result.

        Raises:
            UnsupportedModelError: see `check_differences`.
        """
        with self._nudges:
            slopes = self._slopes()
            rounded = self._rounded(slopes)
            result = self._without_rounding(slopes, rounded) if rounded else self._compared(slopes)
            unchecked = check_weight_reads(self._forward, self._nudges, self._few, slopes.source, slopes.v)
        if not unchecked:
            return result
        note = f"it was not checked whether weights are used outside their modules: {unchecked}"
        return DifferenceCheck(result.error, f"{result.note}. {note}" if result.note else note)

    # Passes -----------------------------------------------------------------------------------------------------------

    def _watching(self) -> Roundings:
        return Roundings(self._forward.model, undone=self._unrounded)

    def _slopes(self) -> _Slopes:
        """The slopes by autograd, in a pass that also measures σ if it is not known."""
        forward, few, slopes = self._forward, self._few, Slopes(self._directions)
        outputs: list[Outputs] = []
        chosen: list[Tensor] = []

        def source() -> Tensor:
            with self._watching() as watched:
                outputs.append(forward.outputs(few))
            calls.extend(watched.calls)
            return outputs[0].source

        def entering(source: Tensor) -> list[Tensor]:
            V = choose_cotangents(self._config, self._metric, outputs[0], few).values
            generator = torch.Generator().manual_seed(self._config.seed)
            signs = 2 * torch.randint(0, 2, V.shape[:3], generator=generator) - 1
            chosen.append((V * signs.to(V)[..., None]).sum(2))
            return chosen

        calls: list[Rounding] = []
        self._nudges.rest()
        backward_passes(forward.model, forward.maps, slopes, len(few), source, entering)
        sizes = self._nudges.sizes()
        by_map = {name: value.cpu() * sizes[name] for name, value in slopes.by_map.items()}
        source_now = outputs[0].source.detach()
        return _Slopes(torch.stack(list(by_map.values())).sum(0), by_map, chosen[0].double(), source_now, calls)

    @torch.no_grad()
    def _value(self, v: Tensor, direction: int, size: float, names: Collection[str] | None) -> Tensor:
        """⟨v, z⟩ (B,) of the nudged model."""
        self._nudges.at(direction, size, names)
        with self._watching() if self._unrounded else contextlib.nullcontext():
            z = self._forward.outputs(self._few).source.double()
        return torch.where(v != 0, v * z, 0.0).flatten(1).sum(1).cpu()

    def _differences(self, v: Tensor, size: float, names: Collection[str] | None = None) -> Tensor:
        """Central differences (B, K)."""
        columns = []
        for k in range(self._directions.count):
            up, down = (self._value(v, k, signed, names) for signed in (size, -size))
            columns.append((up - down) / (2 * size))
        return torch.stack(columns, 1)

    @torch.no_grad()
    def _differences_at_once(self, v: Tensor, size: float) -> Tensor | None:
        """Central differences (B, K) from one pass over copies of the examples; None if the model does not take them.

        They are used only if they agree with the gradients, because in some models copies influence each other.
        """
        steps = [(k, signed) for k in range(self._directions.count) for signed in (size, -size)]
        copies = [*self._few] * len(steps)
        alone = self._forward.one_at_a_time or self._forward.fsdp.active or self._unrounded
        if alone or sum(example.length for example in copies) > _AT_ONCE:
            return None
        self._nudges.at_each(steps)
        try:
            z = self._forward.outputs(copies).source.double().unflatten(0, (len(steps), -1))
        except (RuntimeError, ValueError, UnsupportedModelError):
            return None  # the examples alone will show why
        if z.shape[1:] != v.shape:
            return None
        values = torch.where(v != 0, v * z, 0.0).flatten(2).sum(2).T.cpu()
        return (values[:, 0::2] - values[:, 1::2]) / (2 * size)

    # What they say ----------------------------------------------------------------------------------------------------

    def _rounded(self, slopes: _Slopes) -> list[Rounding]:
        """The calls that round what depends on the maps."""
        if not slopes.calls:
            return []
        with self._watching() as watched:
            self._value(slopes.v, 0, self._steps.sizes[0], None)
        return moved(slopes.calls, watched.calls)

    def _compared(self, slopes: _Slopes) -> DifferenceCheck:
        """Compare gradients with differences, at one size after another."""
        steps, errors, before = self._steps, [], None
        for size in steps.sizes:
            at_once = self._differences_at_once(slopes.v, size)
            if at_once is not None and (error := relative(slopes.gradient, at_once)) <= steps.tolerance:
                return DifferenceCheck(error)
        for size in steps.sizes:
            differences = self._differences(slopes.v, size)
            errors.append(relative(slopes.gradient, differences))
            if self._is_true(errors[-1] <= steps.tolerance):
                return DifferenceCheck(errors[-1])
            if before is not None:
                common, apart = in_common(slopes.gradient, before, differences)
                if self._is_true(common > steps.wrong and apart <= steps.agreement):
                    return self._wrong(slopes, size, common)
            before = differences
        return DifferenceCheck(
            None,
            f"differences from {percent(min(errors))} to {percent(max(errors))} that do not converge with smaller "
            "steps, as in models that route or round",
        )

    def _is_true(self, statement: bool) -> bool:
        """Whether it is true in any of the processes that share a model, so that all of them do the same."""
        return bool(self._forward.fsdp.most(int(statement)))

    def _without_rounding(self, slopes: _Slopes, rounded: Sequence[Rounding]) -> DifferenceCheck:
        """How much of the gradients is lost by the model's rounding, and whether the rest is right."""
        where = ", ".join(dict.fromkeys(f"{call.module or 'the model'} ({call.operation})" for call in rounded))
        self._unrounded = True
        try:
            smooth = self._slopes()
        except (RuntimeError, TypeError, ValueError, UnsupportedModelError) as error:
            note = f"activations are rounded in {where}, and the model fails without the rounding: {error}"
            return DifferenceCheck(None, note)
        lost = slopes.distance_from(smooth)
        plain = all(call.operation in _ALWAYS_LOSES for call in rounded)
        if self._is_true(lost > _LOST_BY_ROUNDING and (plain or self._seen_in_coarse_steps(slopes, smooth))):
            raise UnsupportedModelError(
                f"activations are rounded in {where}, which stops the gradient: autograd's gradients differ by "
                f"{percent(lost)} from those without rounding. Load the model without quantised activations, or give "
                "the rounding a backward pass (a straight-through estimator)"
            )
        result = self._compared(smooth)
        note = f"activations are rounded in {where}; the differences were computed without the rounding"
        return DifferenceCheck(result.error, f"{note}. {result.note}" if result.note else note)

    def _seen_in_coarse_steps(self, slopes: _Slopes, smooth: _Slopes) -> bool:
        """Whether differences over steps larger than the rounding agree with the gradients without rounding."""
        self._unrounded = False
        coarse = torch.stack([self._differences(slopes.v, size) for size in _COARSE])
        self._unrounded = True
        return _rms(coarse - smooth.gradient) < _rms(coarse - slopes.gradient)

    # Whose difference it is -------------------------------------------------------------------------------------------

    def _wrong(self, slopes: _Slopes, size: float, error: float) -> DifferenceCheck:
        """Warn if transformers' own code is written so; otherwise raise an error.

        Raises:
            UnsupportedModelError: if some code is not from transformers.
        """
        much = (
            f"autograd's gradients differ by {percent(error)} from what a small change of the linear maps does to the "
            "predictions (central differences of two sizes agree)"
        )
        foreign = foreign_parts(self._forward)
        if not foreign:
            name = type(base_of(self._forward.model)).__name__
            note = f"transformers' own code of {name} stops or replaces gradients: {much}"
            logger.warning("%s. The rows are computed with the model's own backward pass", note)
            return DifferenceCheck(error, note)
        affected, last = self._affected(slopes, size)
        every = {m.parameter: m.modules for m in self._forward.maps}
        leave = "" if affected >= every.keys() else f", or leave out {_excluded(every, affected)}"
        raise UnsupportedModelError(
            f"{much}. The gradient is cut or wrong after {last}, the last map that has a part in the difference: look "
            "there for a detach, torch.no_grad or an autograd function whose backward pass is missing or wrong (code "
            f"that is not from transformers: {', '.join(foreign[:_NAMED])}). Correct that{leave}"
        )

    def _affected(self, slopes: _Slopes, size: float) -> tuple[set[str], str]:
        """The parameters whose gradients are wrong, by whole blocks except in the last; and the last one's module."""
        missing = _rms(self._differences(slopes.v, size) - slopes.gradient)

        def is_wrong(names: Collection[str]) -> bool:
            difference = self._differences(slopes.v, size, names) - slopes.part(names)
            own = _rms(difference)
            return self._is_true(own > _SHARE * missing / math.sqrt(len(blocks)))

        blocks: dict[str, list[str]] = {}
        modules = {m.parameter: m.modules[-1] for m in self._forward.maps}
        for name in modules:
            blocks.setdefault(_block(name), []).append(name)
        wrong = [block for block, names in blocks.items() if is_wrong(names)] or list(blocks)
        inside = [name for name in blocks[wrong[-1]] if is_wrong([name])] or blocks[wrong[-1]]
        before = {name for block in wrong[:-1] for name in blocks[block]}
        return before | set(inside), modules[inside[-1]]


def _block(parameter: str) -> str:
    """The numbered layer that a parameter is in, or the part outside numbered layers."""
    match = re.match(r"(?:.*?\.)?\d+\.", parameter)
    return match.group().rstrip(".") if match else ""


def _excluded(modules: Mapping[str, Sequence[str]], affected: Collection[str]) -> str:
    """The setting that leaves out these parameters: modules, or for many of them a regular expression of blocks."""
    names = [name for parameter in affected for name in modules[parameter]]
    if len(names) <= _NAMED:
        return f"everything before it, with exclude_modules={sorted(names)!r}"
    blocks = {_block(parameter) for parameter in affected}
    whole = {b for b in blocks if b and all(p in affected for p in modules if _block(p) == b)}
    single = [name for p in affected if _block(p) not in whole for name in modules[p]]
    patterns = [*(re.escape(block) + r"\..*" for block in sorted(whole)), *map(re.escape, sorted(single))]
    return f"everything before it, with exclude_modules={'|'.join(patterns)!r}"


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def relative(gradient: Tensor, differences: Tensor) -> float:
    """The difference of two slopes, relative to the larger one; a missing gradient has a difference of 1."""
    size = max(_rms(gradient), _rms(differences))
    return _rms(gradient - differences) / size if size else 0.0


def in_common(gradient: Tensor, first: Tensor, second: Tensor) -> tuple[float, float]:
    """The relative deviation from a gradient that two differences share, and their distance as a share of it."""
    a, b = first - gradient, second - gradient
    shared = math.sqrt(max(float((a * b).mean()), 0.0))
    size = max(_rms(gradient), math.sqrt(max(float((first * second).mean()), 0.0)))
    return (shared / size if size else 0.0), (_rms(a - b) / shared if shared else math.inf)
