"""Are rows from hooks the gradients of their examples? They are compared with autograd, alone and in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_modules, bare_parameters
from hf_npeff.fisher.batching import kind_of, percent, precision_of, relative_change, row_tolerance
from hf_npeff.fisher.eigenpairs import HiddenMetric
from hf_npeff.fisher.forward import ForwardPass, PaddingError
from hf_npeff.fisher.gradients import CalledOnceForAll, NoneRan, autograd_rows
from hf_npeff.fisher.linear_layers import is_at_hand, is_linear
from hf_npeff.fisher.linear_maps import LinearMap, find_linear_maps, shapes_of
from hf_npeff.fisher.parameters import gradients
from hf_npeff.fisher.rounded_rows import doubtful_share, sensitivities
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.pefs.sketches import Sketch

_AUTOGRAD_NUMBERS = 2**28
"""The most entries of weights that are differentiated densely at once: a gibibyte of gradients."""
_WRONG = 1e-2
"""Relative error above which a row is not the gradient of its example: far above rounding of 32 bits and more."""
_WRONG_IN_16_BITS = 1e-1
"""The same for a model in 16 bits."""
_LARGER_BY_BATCHING = 3
"""If a row's error in a batch is more than this many times its error alone, the batch is at fault, not rounding."""
_SIDE = 8
"""The side of the Kronecker sketch in which rows are compared with autograd's."""
_ROUNDINGS, _LARGEST_ROUNDING = 64, 1e-2
"""A gradient of so many roundings of the model's largest, and at most this share of it, is rounding. Chosen: a sum of a
few thousand rounded terms is off by some ten roundings, and a gradient that matters is far larger."""
_BLOCK_THAT_MATTERS = 1e-3
"""If a weight's share of a row's norm is below this, its own error counts as rounding."""
_BLOCK_ERROR = 0.5
"""Relative error above which the row of one weight is wrong and not rounded, whatever the type."""


@dataclass(frozen=True)
class RowCheck:
    """The result of comparing rows from the hooks with autograd.

    Attributes:
        error: the relative error of a row; None if nothing could be checked, infinite if the row of a single
            weight that matters is wrong by more than half.
        unseen: maps that hooks do not see: their modules are not called, although their weights matter.
        worst: the weight whose part of the row has the largest error.
        cotangent: that of the compared row, (1, t, s); None if nothing was compared.
        size: the larger one of the norms of the row, in the check's sketch, and of autograd's gradient.
        sensitivities: how far each example of the batch moves its outputs; empty if nothing was compared.
    """

    error: float | None
    unseen: Sequence[LinearMap] = ()
    worst: str = ""
    cotangent: Tensor | None = None
    size: float = float("inf")
    sensitivities: tuple[float, ...] = ()

    @property
    def difference(self) -> str:
        """The difference in words, for messages."""
        much = "altogether" if self.error == float("inf") else f"by {percent(self.error or 0.0)}"
        return f"the rows from hooks differ {much} from autograd's gradients, most at {self.worst}"

    def accepted_error(self, forward: ForwardPass, example: Example) -> float | None:
        """The error if it is no more than rounding; None if nothing could be checked.

        Args:
            forward: the forward pass that made the rows.
            example: the example whose row was compared. Its row and its gradient may be rounding and nothing else, as
                those of a query are where attention sees a single token; then there is nothing to check.

        Raises:
            UnsupportedModelError: if the error is more than rounding; it names the worst weight, and says whether the
                model is random or autograd is inconsistent.
        """
        narrow = precision_of(forward.model) in (torch.float16, torch.bfloat16)
        tolerance = _WRONG_IN_16_BITS if narrow else _WRONG
        if self.error is None or self.error <= tolerance:
            return self.error
        if self.cotangent is not None and self.size <= _rounding(forward, example, self.cotangent):
            return None
        forward.check_repeatable(example)
        modules: list[str] = []
        for m in forward.maps:
            if m.parameter != self.worst:
                continue
            modules += m.modules
            if (change := _own_disagreement(forward, m, example)) > tolerance:
                raise UnsupportedModelError(
                    f"PyTorch's own gradient of {m.parameter} differs by {percent(change)} between a pass over one "
                    "example and a pass over the same example twice, so the rows of this model cannot be checked here. "
                    "This happens with batch normalisation of a single example on a CPU, where activations and "
                    "gradients have different memory layouts: analyse the model on a GPU"
                )
        raise UnsupportedModelError(
            f"{self.difference}: the weight is used in a way that hooks do not see. Leave it out with "
            f"exclude_modules={modules!r}, name it in parameters={[self.worst]!r}, or load the model in float32"
        )


def _rounding(forward: ForwardPass, example: Example, cotangent: Tensor) -> float:
    """The norm up to which a gradient is rounding beside those of the model's other weights; 0 if it has no others."""
    analysed = {m.parameter for m in forward.maps}
    weights = {
        name: weight
        for name, weight in bare_parameters(forward.model).items()
        if name not in analysed and is_at_hand(weight)
    }
    names, used = [], 0
    for name in sorted(weights, key=lambda name: weights[name].numel()):
        used += weights[name].numel()
        if used > _AUTOGRAD_NUMBERS:
            break
        names.append(name)
    if not names:
        return 0.0
    (found,) = gradients(forward.model, names, forward.source_of([example]), cotangent[None])
    share = min(_ROUNDINGS * torch.finfo(precision_of(forward.model)).eps, _LARGEST_ROUNDING)
    return share * max(float(gradient.double().norm()) for gradient in found)


def _own_disagreement(forward: ForwardPass, m: LinearMap, example: Example) -> float:
    """The relative difference of autograd's gradients for one example alone and for a batch that has it twice."""
    with torch.no_grad():
        source = forward.outputs([example]).source
    cotangent = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).to(source)
    alone = autograd_rows(forward.model, [m], forward.source_of([example]), cotangent)
    padding = torch.zeros_like(cotangent)
    twice = autograd_rows(forward.model, [m], forward.source_of([example] * 2), torch.cat([cotangent, padding]))
    return relative_change(twice[m.parameter], alone[m.parameter])


def pair_of(examples: Sequence[Example], limits: Sequence[int] = ()) -> list[Example]:
    """The shortest and the longest example, in this order, or two of one length; one if there is no other.

    Both are of one kind, as the examples of a batch are, with lengths on the same side of each of `limits`. They are
    chosen from the largest group of such examples.
    """
    sides: dict[tuple[object, ...], list[Example]] = {}
    for example in sorted(examples, key=lambda example: example.length):
        side = sum(example.length > limit for limit in limits)
        sides.setdefault((*kind_of(example), side), []).append(example)
    most = max(sides.values(), key=len)
    return [most[0], most[-1]] if len(most) > 1 else most


def check_batch(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, pair: Sequence[Example]
) -> RowCheck:
    """Check rows in a batch of two examples, or of one if the model does not take batches.

    If the shorter example's row is right alone but not in the batch, examples are run one at a time from then on. If it
    may be rounding, nothing follows from it (see `is_telling`).
    """
    if not forward.maps:
        return RowCheck(None)
    together: RowCheck | None = None
    reason = None
    if len(pair) > 1 and forward.batch_size(pair, 2) > 1:
        try:
            with forward.blaming_padding(pair):
                together = check_rows(forward, config, metric, pair)
        except (CalledOnceForAll, PaddingError) as error:
            reason = str(error)
        if together is not None and not is_telling(forward, together.sensitivities):
            return together
        if together is not None and (together.error is None or together.error <= row_tolerance(forward.model)):
            return together
    alone = check_rows(forward, config, metric, pair[:1])
    if together is None and len(pair) > 1:
        other = check_rows(forward, config, metric, pair[1:])
        alone = replace(alone, sensitivities=alone.sensitivities + other.sensitivities)
    if together is not None and together.error is not None and alone.error is not None:
        if together.error <= _LARGER_BY_BATCHING * alone.error:
            return together  # it is no better alone
        reason = f"{together.difference}, in a batch but not alone"
    if reason is not None:
        forward.refuse_batches(reason)
    return alone


def is_telling(forward: ForwardPass, sizes: Sequence[float]) -> bool:
    """Whether the first of these sensitivities is as large beside the others as those of rows that are no rounding."""
    return not any(sizes) or sizes[0] > doubtful_share(forward.model) * max(sizes)


def check_rows(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, few: Sequence[Example]
) -> RowCheck:
    """Compare the largest row of the first example, as stored for this batch, with autograd on the example alone.

    As many maps as fit into memory beside the model are differentiated. Both rows go through a small Kronecker sketch,
    because an identity sketch would be as large as the weights. Offloaded, quantised or sharded weights are not
    checked; if their modules are not called either, it is unknown whether they matter, and they count as not seen.

    Args:
        forward: the forward pass.
        config: rank and output factor.
        metric: see `RowMaker`.
        few: a batch.
    """
    model, maps = forward.model, forward.maps
    forward.fsdp.release()  # a sharded weight that is gathered for the moment does not count
    weights = bare_parameters(model)
    known = [m for m in maps if is_at_hand(weights.get(m.parameter))]
    sketch = Sketch(shapes_of(maps), "kronecker", _SIDE, config.seed).to(forward.device)
    with forward.blaming_padding(few):
        try:
            stored, ran = RowMaker(forward.with_maps(maps, {}), config, sketch, metric).rows_and_calls(few)
        except NoneRan:
            stored, ran = RowMaker(forward.with_maps([], {}), config, sketch, metric).rows_and_calls(few)
    unknown = [m for m in maps if m not in known and m.parameter not in ran]
    if not known:
        return RowCheck(None, unknown)
    silent = [m for m in known if m.parameter not in ran]
    checked = _differentiable(silent, [m for m in known if m.parameter in ran])
    called = [m.parameter for m in checked if m.parameter in ran]
    rows = _parts_of(sketch, stored["factors"][0].double(), called) * stored["norms"][0].sqrt()
    largest = int(rows.norm(dim=1).argmax())
    exact = autograd_rows(model, checked, forward.source_of(few[:1]), stored["cotangents"][:1, largest])
    unseen = unknown + [m for m in silent if m in checked and bool((exact[m.parameter] != 0).any())]
    truth = {name: exact[name] for name in called}
    error, worst = _row_error(sketch, rows[largest], truth)
    size = max(float(rows[largest].norm()), sum(float(g.double().square().sum()) for g in truth.values()) ** 0.5)
    sizes = tuple(sensitivities(stored).tolist())
    return RowCheck(error, unseen, worst, stored["cotangents"][:1, largest], size, sizes)


def used_otherwise(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, example: Example
) -> tuple[str, ...]:
    """The weights of linear maps among `parameters` that a model uses otherwise than by calling their modules.

    Autograd gives their gradients, but an adapter that PEFT puts around the modules does not change all of their use.
    """
    modules = bare_modules(forward.model) if forward.parameters else {}
    places = {n: n.rpartition(".") for n in forward.parameters if not n.endswith("bias")}
    names = {n: path for n, (path, _, _) in places.items() if path in modules and is_linear(modules[path])}
    if not names or forward.fsdp.active:
        return ()
    try:
        named = [m for m in find_linear_maps(forward.model, sorted(names.values())) if m.parameter in names]
    except UnsupportedModelError:  # none of them computes x Wᵀ + b
        named = []
    wrong = [name for name in names if name not in {m.parameter for m in named}]
    if not named:
        return tuple(wrong)
    sketch = Sketch(shapes_of(named), "kronecker", _SIDE, config.seed).to(forward.device)
    try:
        stored, ran = RowMaker(forward.with_maps(named, {}), config, sketch, metric).rows_and_calls([example])
    except (NoneRan, CalledOnceForAll):
        return tuple(names)
    rows = stored["factors"][0].double() * stored["norms"][0].sqrt()
    largest = int(rows.norm(dim=1).argmax())
    exact = autograd_rows(forward.model, named, forward.source_of([example]), stored["cotangents"][:1, largest])
    for m in named:
        error, _ = _row_error(sketch, rows[largest], {m.parameter: exact[m.parameter]})
        if m.parameter not in ran or error > _WRONG_IN_16_BITS:
            wrong.append(m.parameter)
    return tuple(wrong)


def _parts_of(sketch: Sketch, rows: Tensor, names: Sequence[str]) -> Tensor:
    """Rows (c, d) with only the parts of these parameters, and zeros elsewhere."""
    assert sketch.blocks is not None  # of a Kronecker sketch
    parts = torch.zeros_like(rows)
    for name in names:
        parts[:, sketch.blocks[name]] = rows[:, sketch.blocks[name]]
    return parts


def _differentiable(silent: Sequence[LinearMap], ran: Sequence[LinearMap]) -> list[LinearMap]:
    """The maps whose gradients fit into memory: first those whose modules are not called, then the smallest."""
    checked: list[LinearMap] = []
    used = 0
    for m in [*silent, *sorted(ran, key=lambda m: m.shape[0] * m.shape[1])]:
        used += m.shape[0] * m.shape[1]
        if used > _AUTOGRAD_NUMBERS and checked:
            break
        checked.append(m)
    return checked


def _row_error(sketch: Sketch, row: Tensor, exact: Mapping[str, Tensor]) -> tuple[float, str]:
    """The relative error of a sketched row (d,) compared with autograd, and the parameter with the largest error.

    It is infinite if the part of a single weight is wrong.
    """
    if not exact or sketch.blocks is None:
        return 0.0, ""
    sketched = sketch.new_rows(1, device=row.device, dtype=torch.promote_types(row.dtype, torch.float32))
    for name, gradient in exact.items():
        value = gradient[None].to(row.device, torch.promote_types(gradient.dtype, torch.float32))
        part = sketch.project_output(name, sketch.project_input(name, value).mT).mT
        sketch.add(sketched, name, part.to(sketched))
    truth = sketch.finish(sketched)[0].to(row)
    blocks = {name: sketch.blocks[name] for name in exact}
    norm, errors = truth.norm(), {name: (row[b] - truth[b]).norm() for name, b in blocks.items()}
    worst = max(errors, key=lambda name: float(errors[name].nan_to_num(float("inf"))))
    if norm == 0:
        return float(row.norm()), worst
    for name, block in blocks.items():
        part = truth[block].norm()
        if part > _BLOCK_THAT_MATTERS * norm and errors[name] > _BLOCK_ERROR * part:
            return float("inf"), name
    return float((row - truth).norm() / norm), worst
