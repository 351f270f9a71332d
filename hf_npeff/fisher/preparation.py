"""What has to be settled before rows are made: the metric, which maps hooks see, the sketch; and the self-test."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.batching import percent, precision_of, relative_change, row_tolerance
from hf_npeff.fisher.factors import HiddenMetric, resolve
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.gradients import CalledOnceForAll, Receiver, autograd_rows, backward_passes
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.linear_maps import LinearMap, find_linear_maps
from hf_npeff.fisher.metric import is_free, measure_metric, pilot_examples
from hf_npeff.fisher.parameters import left_out
from hf_npeff.fisher.rows import RowMaker, choose_cotangents
from hf_npeff.fisher.selftest import (
    KnownCotangents,
    SelfTest,
    candidates,
    exact_inner_products,
    off_diagonal_error,
    pef_inner_products,
)
from hf_npeff.pefs.sketches import Kind, Sketch

logger = logging.getLogger(__name__)
_EXAMPLES = 8
"""Examples of the self-test: 28 pairs, whose mean error the sketch is judged by."""
_TOKENS = 2048
"""Their tokens together, at most: the self-test's memory is bounded."""
_ROWS = 4
"""Rows of each that the sketch is measured on, at most: more would cost time and say the same."""
_AUTOGRAD_NUMBERS = 2**28
"""Weights that are differentiated densely at once: a gibibyte of gradients."""
_WRONG = 1e-2
"""Relative error above which a row is not the gradient of its example: far above rounding of 32 bits and more."""
_WRONG_IN_16_BITS = 1e-1
"""The same where the model computes in 16 bits."""
_LARGER_BY_BATCHING = 3
"""How many times its error alone a row may have in a batch before the batch is at fault, not rounding."""
_SIDE = 8
"""Of the Kronecker sketch in which rows are compared with autograd's."""
_BLOCK_THAT_MATTERS = 1e-3
"""A weight's share of a row's norm, below which its own error is rounding."""
_BLOCK_ERROR = 0.5
"""Relative error above which the row of one weight is wrong and not rounded, whatever the type."""
_NAMED = 6
"""Kinds of weights that a warning names, at most, the largest first."""
DEFAULT_DIMS = {"kronecker": 16, "countsketch": 16_384, "two-stage": 16_384, "identity": None}
"""What `sketch_dim` is by default."""


def prepare(
    forward: ForwardPass,
    config: FisherConfig,
    examples: Sequence[Example],
    *,
    sketch: Sketch | None = None,
    skip: bool = False,
) -> RowMaker:
    """Choose the metric and the sketch, where they are open, and run the self-test on the first examples.

    Maps that hooks do not see are left out of the result, with a warning.

    Args:
        forward: the forward pass; its `trials` learn where batches would change rows.
        config: rank, output factor, sketch.
        examples: the first ones.
        sketch: one that is given; it is used where it is of the parameters under analysis.
        skip: pass over examples that give NaN.

    Raises:
        NotFiniteError: if the model gives NaN; with `skip`, if it does for all of them.
        UnsupportedModelError: if the rows from the hooks are not the model's gradients.
        ValueError: if the config asks for a metric that this model and output factor do not have.
    """
    config, metric = choose_metric(forward, config)
    few = _first(forward, config, metric, examples, skip)
    pair = pair_of(few, forward.limits)
    rows = _check_batch(forward, config, metric, pair)
    rows.refuse_wrong(forward, pair[0])
    total = _size(forward.model, forward.maps)
    forward = forward.with_maps([m for m in forward.maps if m not in rows.unseen])
    if not forward.shapes:
        raise UnsupportedModelError(
            f"the model reads the weights of all {len(rows.unseen)} linear maps under analysis without calling their "
            f"modules ({', '.join(m.parameter for m in rows.unseen[:_NAMED])}), so hooks see none of them; name them "
            "in FisherConfig(parameters=...)"
        )
    _warn_of_what_is_left_out(forward, config, rows.unseen, total)
    if sketch is not None and sketch.shapes != forward.shapes:
        sketch = None
    sketch, measured, tried = _measured_sketch(forward, config, metric, few, sketch)
    covered = sum(a * b for a, b in forward.shapes.values()) / max(total, 1)
    left_out = tuple(m.parameter for m in rows.unseen)
    selftest = SelfTest(len(few), measured, rows.error, min(covered, 1.0), tried, left_out)
    tested = tuple(pair[:1] if forward.one_at_a_time else pair)
    return RowMaker(forward, config, sketch.to(forward.device), metric, selftest, tested)


# The metric -----------------------------------------------------------------------------------------------------------


def choose_metric(forward: ForwardPass, config: FisherConfig) -> tuple[FisherConfig, HiddenMetric | None]:
    """In which metric spectral rows are the best: the config with that settled, and the metric where it is measured.

    Raises:
        ValueError: if the config asks for the metric of the parameters, and rows do not enter at the hidden state
            of a causal language model.
    """
    wanted = config.spectral_metric
    usable = forward.traits.task == "causal-lm" and forward.traits.at_hidden
    # Linear weights may also be analysed as `parameters`: what is analysed decides, not how.
    others = find_linear_maps(forward.model) if usable and forward.parameters else []
    maps = [*forward.maps, *(m for m in others if m.parameter in forward.parameters)]
    pilots = pilot_examples(forward.model, config.seed) if usable and maps else []
    first = forward.outputs(pilots[:1]) if pilots else None
    usable = first is not None and resolve(config.output_factor, first, config.rank) == "spectral"
    if wanted == "parameters" and not usable:
        raise ValueError(
            "spectral_metric='parameters' is of spectral rows that enter at a causal language model's last hidden "
            "state; leave spectral_metric at 'auto' for this model and output factor"
        )
    if first is None or not usable or wanted == "hidden":
        return config, None
    if wanted == "auto":
        wanted = "parameters" if is_free(first.source.shape[-1]) else "hidden"
        config = replace(config, spectral_metric=wanted)
    if wanted == "hidden":
        return config, None
    return config, measure_metric(forward, maps, pilots, config.seed)


# The examples ---------------------------------------------------------------------------------------------------------


def _first(
    forward: ForwardPass,
    config: FisherConfig,
    metric: HiddenMetric | None,
    examples: Sequence[Example],
    skip: bool,
) -> list[Example]:
    """The examples of the self-test: the first ones that are short enough together."""
    narrow = Sketch(forward.shapes, "kronecker", 1).to(forward.device)
    trial = RowMaker(forward, config, narrow, metric)
    few: list[Example] = []
    for example in examples:
        if len(few) == _EXAMPLES:
            break
        fits = sum(e.length for e in few) + example.length <= _TOKENS
        if fits and not (skip and _is_not_finite(trial, example)):
            few.append(example)
    return few or [min(examples, key=lambda e: e.length)]


def _is_not_finite(maker: RowMaker, example: Example) -> bool:
    """Whether the model gives NaN, in its logits or in its rows."""
    try:
        maker.rows([example])
    except NotFiniteError:
        return True
    return False


# The rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowCheck:
    """What rows from the hooks are worth.

    Attributes:
        error: the relative error of a row; None where nothing could be checked, infinite where the row of a single
            weight that matters is wrong by more than half.
        unseen: maps that hooks do not see: their modules are not called, and yet their weights matter.
        worst: the weight whose share of the row is the furthest off.
    """

    error: float | None
    unseen: Sequence[LinearMap] = ()
    worst: str = ""

    @property
    def difference(self) -> str:
        """What is wrong, in words."""
        much = "altogether" if self.error == float("inf") else f"by {percent(self.error or 0.0)}"
        return f"the rows from hooks differ {much} from autograd's gradients, at {self.worst} the most"

    def refuse_wrong(self, forward: ForwardPass, example: Example) -> None:
        """Refuse rows that are not the model's gradients.

        Args:
            forward: that made them.
            example: whose row was compared.

        Raises:
            UnsupportedModelError: if the error is more than rounding; it names the worst weight, and says whether the
                model is random or autograd contradicts itself.
        """
        narrow = precision_of(forward.model) in (torch.float16, torch.bfloat16)
        tolerance = _WRONG_IN_16_BITS if narrow else _WRONG
        if self.error is None or self.error <= tolerance:
            return
        forward.check_repeatable(example)
        modules: list[str] = []
        for m in forward.maps:
            if m.parameter != self.worst:
                continue
            modules += m.modules
            if (change := _own_disagreement(forward, m, example)) > tolerance:
                raise UnsupportedModelError(
                    f"PyTorch's own gradient of {m.parameter} differs by {percent(change)} between a pass over one "
                    "example and a pass over the same example twice, so no row of this model can be told right from "
                    "wrong here. Batch normalisation does this to a single example on a CPU, where activations and "
                    "gradients lie in memory in different orders: analyse the model on a GPU"
                )
        raise UnsupportedModelError(
            f"{self.difference}: the weight is used in a way that hooks do not see. Leave it out with "
            f"exclude_modules={modules!r}, name it in parameters={[self.worst]!r}, or load the model in float32"
        )


def _own_disagreement(forward: ForwardPass, m: LinearMap, example: Example) -> float:
    """How far autograd's gradient of a weight for one example alone is from that in a batch of it twice, relative."""
    with torch.no_grad():
        source = forward.outputs([example]).source
    cotangent = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).to(source)
    alone = autograd_rows(forward.model, [m], forward.source_of([example]), cotangent)
    padding = torch.zeros_like(cotangent)
    twice = autograd_rows(forward.model, [m], forward.source_of([example] * 2), torch.cat([cotangent, padding]))
    return relative_change(twice[m.parameter], alone[m.parameter])


def pair_of(examples: Sequence[Example], limits: Sequence[int] = ()) -> list[Example]:
    """The shortest and the longest example, in this order, or two of one length; one where there is no other.

    Both lie on one side of each of the lengths `limits`: the side with the most examples.
    """
    sides: dict[int, list[Example]] = {}
    for example in sorted(examples, key=lambda example: example.length):
        sides.setdefault(sum(example.length > limit for limit in limits), []).append(example)
    side = max(sides.values(), key=len)
    return [side[0], side[-1]] if len(side) > 1 else side


def _check_batch(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, pair: Sequence[Example]
) -> RowCheck:
    """The check on a batch of two, or on one of them where batches are out of the question.

    Where the shorter example's row is right alone and not in the batch, examples go one at a time from then on.
    """
    if not forward.maps:
        return RowCheck(None)
    together: RowCheck | None = None
    reason = None
    if len(pair) > 1 and forward.batch_size(pair, 2) > 1:
        try:
            with forward.blaming_padding(pair):
                together = check_rows(forward, config, metric, pair)
        except CalledOnceForAll as error:
            reason = str(error)
        if together is not None and (together.error is None or together.error <= row_tolerance(forward.model)):
            return together
    alone = check_rows(forward, config, metric, pair[:1])
    if together is not None and together.error is not None and alone.error is not None:
        if together.error <= _LARGER_BY_BATCHING * alone.error:
            return together  # it is no better alone
        reason = f"{together.difference}, in a batch and not alone"
    if reason is not None:
        forward.refuse_batches(reason)
    return alone


def check_rows(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, few: Sequence[Example]
) -> RowCheck:
    """The largest row of the first example, as it would be stored of this batch, against autograd on it alone.

    As many maps as fit into memory beside the model are differentiated; an identity sketch would be as large as they,
    so both sides go through a small Kronecker sketch. Weights that are offloaded, quantised or sharded are not checked;
    where their modules are not called either, nobody can tell whether they matter, and they count as not seen.

    Args:
        forward: the forward pass.
        config: rank and output factor.
        metric: see `RowMaker`.
        few: a batch.
    """
    model, maps, single = forward.model, forward.maps, forward.source_of(few[:1])
    forward.fsdp.release()  # a weight that is whole for the moment is not at hand
    weights = bare_parameters(model)
    known = [m for m in maps if is_at_hand(weights.get(m.parameter))]
    ran = backward_passes(model, maps, Receiver(), len(few), forward.source_of(few), lambda _: ())
    unknown = [m for m in maps if m not in known and m.parameter not in ran]
    if not known:
        return RowCheck(None, unknown)
    silent = [m for m in known if m.parameter not in ran]
    checked = _differentiable(silent, [m for m in known if m.parameter in ran])
    called = forward.with_maps([m for m in checked if m not in silent], parameters={})
    sketch = Sketch(called.shapes, "kronecker", _SIDE, config.seed).to(forward.device)
    with forward.blaming_padding(few):
        stored = RowMaker(called, config, sketch, metric).rows(few)
    largest = int(stored["factors"][0].norm(dim=1).argmax())
    exact = autograd_rows(model, checked, single, stored["cotangents"][:1, largest])
    unseen = unknown + [m for m in silent if m in checked and bool((exact[m.parameter] != 0).any())]
    row = stored["factors"][0, largest].double() * stored["norms"][0].sqrt()
    error, worst = _row_error(sketch, row, exact)
    return RowCheck(error, unseen, worst)


def _differentiable(silent: Sequence[LinearMap], ran: Sequence[LinearMap]) -> list[LinearMap]:
    """The maps whose gradients fit into memory: those whose modules are not called first, then the smallest."""
    checked: list[LinearMap] = []
    used = 0
    for m in [*silent, *sorted(ran, key=lambda m: m.shape[0] * m.shape[1])]:
        used += m.shape[0] * m.shape[1]
        if used > _AUTOGRAD_NUMBERS and checked:
            break
        checked.append(m)
    return checked


def _row_error(sketch: Sketch, row: Tensor, exact: Mapping[str, Tensor]) -> tuple[float, str]:
    """Of a sketched row (d,) against autograd's gradients, relative, and the parameter that is the most wrong.

    Infinite where a weight's share is wrong.
    """
    if not sketch.shapes or sketch.blocks is None:
        return 0.0, ""
    wide = {name: exact[name][None].to(torch.promote_types(exact[name].dtype, torch.float32)) for name in sketch.shapes}
    truth = sketch.apply(wide)[0].to(row)
    norm, errors = truth.norm(), {name: (row[b] - truth[b]).norm() for name, b in sketch.blocks.items()}
    worst = max(errors, key=lambda name: float(errors[name].nan_to_num(float("inf"))))
    if norm == 0:
        return float(row.norm()), worst
    for name, block in sketch.blocks.items():
        part = truth[block].norm()
        if part > _BLOCK_THAT_MATTERS * norm and errors[name] > _BLOCK_ERROR * part:
            return float("inf"), name
    return float((row - truth).norm() / norm), worst


# The sketch -----------------------------------------------------------------------------------------------------------


def known_cotangents(
    forward: ForwardPass, config: FisherConfig, metric: HiddenMetric | None, examples: Sequence[Example]
) -> KnownCotangents:
    """A batch with the cotangents of all its terms together, one column after another."""
    with forward.blaming_padding(examples):
        outputs = forward.outputs(examples)
    chosen = choose_cotangents(config, metric, outputs, examples)
    return KnownCotangents(examples, chosen.values.transpose(1, 2))


def measure_sketches(
    forward: ForwardPass,
    config: FisherConfig,
    batches: Sequence[KnownCotangents],
    tries: Sequence[tuple[Kind, int | None]],
    seed: int,
    tolerance: float | None,
) -> tuple[Sketch, dict[str, float]]:
    """Measure sketches against unsketched rows; the first within `tolerance`, else the most faithful.

    Args:
        forward: the forward pass.
        config: rank and output factor.
        batches: of different examples, with the same c.
        tries: (kind, dim), cheapest first.
        seed: of the sketches.
        tolerance: stop at the first error at most this; None measures all.

    Returns:
        The sketch, and {"kind dim": error} of all that were measured.
    """
    gram = exact_inner_products(forward, batches)
    n = sum(len(batch.examples) for batch in batches)
    exact = pef_inner_products(gram, n)
    errors: dict[str, float] = {}
    best: tuple[float, Sketch] | None = None
    for kind, dim in tries:
        sketch = Sketch(forward.shapes, kind, dim, seed).to(forward.device)
        maker = RowMaker(forward, config, sketch)
        rows = torch.cat([maker.rows_of(batch.examples, batch.values) for batch in batches])
        flat = rows.flatten(0, 1).double()
        error = off_diagonal_error(pef_inner_products(flat @ flat.T, n), exact.to(flat.device))
        errors[_label(kind, dim)] = error
        if best is None or error < best[0]:
            best = (error, sketch)
        if tolerance is not None and error <= tolerance:
            best = (error, sketch)
            break
    assert best is not None
    return best[1], errors


def _label(kind: str, dim: int | None) -> str:
    return f"{kind} {dim}" if dim else kind


def _measured_sketch(
    forward: ForwardPass,
    config: FisherConfig,
    metric: HiddenMetric | None,
    few: Sequence[Example],
    sketch: Sketch | None,
) -> tuple[Sketch, float | None, dict[str, float]]:
    """The sketch as it is given, set or chosen; its error, None where one example cannot tell; those tried."""
    groups = [[few[i] for i in batch] for batch in forward.batches(few, len(few))]
    batches = [known_cotangents(forward, config, metric, group) for group in groups]
    narrowest = min(_ROWS, *(batch.values.shape[1] for batch in batches))
    batches = [batch.narrowed(narrowest) for batch in batches]
    tried: dict[str, float] = {}
    if sketch is None and config.sketch != "auto":
        sketch = Sketch(forward.shapes, config.sketch, config.sketch_dim or DEFAULT_DIMS[config.sketch], config.seed)
    elif sketch is None:
        tries = candidates(config, forward.shapes)
        if len(tries) == 1 or len(few) == 1:
            sketch = Sketch(forward.shapes, *tries[-1], seed=config.seed)
        else:
            sketch, tried = measure_sketches(forward, config, batches, tries, config.seed, config.sketch_tolerance)
    if sketch.kind == "identity":
        return sketch, 0.0, tried
    if len(few) == 1:
        return sketch, None, tried
    label = _label(sketch.kind, sketch.setting)
    if label not in tried:
        tried |= measure_sketches(forward, config, batches, [(sketch.kind, sketch.setting)], sketch.seed, None)[1]
    return sketch, tried[label], tried


# The share of the model -----------------------------------------------------------------------------------------------


def _size(model: nn.Module, maps: Sequence[LinearMap]) -> int:
    """Numbers in all weights, those of a 4-bit weight as it is used and not as it is packed."""
    weights = bare_parameters(model)
    sizes = {id(weight): weight.numel() for weight in weights.values()}
    sizes |= {id(weights.get(m.parameter, m)): m.shape[0] * m.shape[1] for m in maps}
    return sum(sizes.values())


def _warn_of_what_is_left_out(
    forward: ForwardPass, config: FisherConfig, unseen: Sequence[LinearMap], total: int
) -> None:
    if unseen:
        share = sum(m.shape[0] * m.shape[1] for m in unseen) / total
        logger.warning(
            "the model reads the weights of %s without calling these modules, so hooks do not see them: %.1f%% of "
            "the parameters are left out. Name them in FisherConfig(parameters=...) to analyse them",
            ", ".join(m.parameter for m in unseen),
            100 * share,
        )
    chosen = config.target_modules != "all-linear" or config.exclude_modules is not None
    if shares := left_out(forward.model, forward.shapes, chosen_by_hand=chosen):
        named = [f"{name} ({share:.1%})" for name, share in shares.items()]
        logger.warning(
            "%.1f%% of the parameters outside the embeddings are left out, because they are not the weight of a linear "
            "layer that computes x Wᵀ + b: %s%s. Name them in FisherConfig(parameters=...) to analyse them",
            100 * sum(shares.values()),
            ", ".join(named[:_NAMED]),
            f", and {len(named) - _NAMED} smaller ones" if len(named) > _NAMED else "",
        )
