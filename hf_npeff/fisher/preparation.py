"""Preparation before rows are computed: the metric, the maps that hooks see, the sketch, and the self-test."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.adapted_maps import check_adapted_maps
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.differences import check_differences
from hf_npeff.fisher.eigenpairs import HiddenMetric
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.gradients import NoneRan
from hf_npeff.fisher.linear_layers import packed_size
from hf_npeff.fisher.linear_maps import LinearMap, find_linear_maps
from hf_npeff.fisher.metric import is_free, measure_metric, pilot_examples
from hf_npeff.fisher.output_factors import resolve
from hf_npeff.fisher.outputs import Outputs
from hf_npeff.fisher.parameter_differences import check_parameter_differences
from hf_npeff.fisher.parameters import PACKED, left_out
from hf_npeff.fisher.row_check import check_batch, is_telling, pair_of, used_otherwise
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.fisher.selftest import (
    SelfTest,
)
from hf_npeff.fisher.shared_memory import check_memory
from hf_npeff.fisher.sketch_choice import chosen_sketch
from hf_npeff.pefs.sketches import Sketch

logger = logging.getLogger(__name__)
_EXAMPLES = 8
"""The number of examples in the self-test. Their 28 pairs have a mean error by which the sketch is judged."""
_TOKENS = 2048
"""The most tokens of these examples together, which bounds the self-test's memory. Chosen: some paragraphs of text."""
_NAMED = 6
"""The most kinds of weights that a warning names, the largest first. Chosen: as many as fit in a line."""


def prepare(
    forward: ForwardPass,
    config: FisherConfig,
    examples: Sequence[Example],
    *,
    sketch: Sketch | None = None,
    skip: bool = False,
) -> RowMaker:
    """Choose the metric and the sketch, unless they are set, and run the self-test on the first examples.

    Maps that hooks do not see are left out of the result, with a warning.

    Args:
        forward: the forward pass; its `trials` record whether batches change rows.
        config: rank, output factor, sketch.
        examples: the first examples.
        sketch: a given sketch; it is used if it fits the analysed parameters.
        skip: whether to skip examples that give NaN.

    Raises:
        NotFiniteError: if the model gives NaN; with `skip`, only if it does for all examples.
        UnsupportedModelError: if the rows from the hooks differ from autograd's gradients, or these from the true ones.
        ValueError: if the config sets a metric that this model and output factor do not have.
    """
    check_memory(forward.model, forward.shapes)
    check_adapted_maps(forward.model, (name for m in forward.maps for name in m.modules))
    with contextlib.suppress(NotFiniteError):  # the error below names the example
        forward.check_repeatable(min(examples, key=lambda example: example.length))
    config, metric = choose_metric(forward, config)
    few = _first(forward, config, metric, examples, skip)
    pair = pair_of(few, forward.limits)
    rows = check_batch(forward, config, metric, pair)
    left = few
    # The gradient of queries of a single token, for instance, is zero and says nothing of the model.
    while not is_telling(forward, rows.sensitivities):
        left = [example for example in left if example is not pair[0]]
        pair = pair_of(left, forward.limits)
        rows = check_batch(forward, config, metric, pair)
    row_error = rows.accepted_error(forward, pair[0])
    differences = check_differences(forward, config, metric, pair)
    check_parameter_differences(forward, config, metric, pair[0])
    total = _size(forward.model, forward.maps)
    forward = forward.with_maps([m for m in forward.maps if m not in rows.unseen])
    if not forward.shapes:
        raise UnsupportedModelError(
            f"the model reads the weights of all {len(rows.unseen)} analysed linear maps without calling their modules "
            f"({', '.join(m.parameter for m in rows.unseen[:_NAMED])}), so hooks see none of them; name them in "
            "FisherConfig(parameters=...)"
        )
    _warn_of_what_is_left_out(forward, config, rows.unseen, total)
    if sketch is not None and sketch.shapes != forward.shapes:
        sketch = None
    sketch, measured, tried = chosen_sketch(forward, config, metric, few, sketch)
    covered = sum(a * b for a, b in forward.shapes.values()) / max(total, 1)
    left_out = tuple(m.parameter for m in rows.unseen)
    otherwise = used_otherwise(forward, config, metric, pair[0])
    selftest = SelfTest(
        len(few),
        measured,
        row_error,
        min(covered, 1.0),
        tried,
        left_out,
        differences.error,
        differences.note,
        otherwise,
    )
    tested = tuple(pair[:1] if forward.one_at_a_time else pair)
    return RowMaker(forward, config, sketch.to(forward.device), metric, selftest, tested)


# The metric -----------------------------------------------------------------------------------------------------------


def choose_metric(forward: ForwardPass, config: FisherConfig) -> tuple[FisherConfig, HiddenMetric | None]:
    """Choose the metric of spectral rows: return the config with it set, and the metric if it was measured.

    Raises:
        ValueError: if the config sets the metric of the parameters, but cotangents do not enter at the hidden state
            of a causal language model or at an embedding.
    """
    wanted, embeds = config.spectral_metric, forward.traits.embeds
    usable = embeds or (forward.traits.task == "causal-lm" and forward.traits.at_hidden)
    # Linear weights may also be analysed as `parameters`; both count.
    others = find_linear_maps(forward.model) if usable and forward.parameters else []
    maps = [*forward.maps, *(m for m in others if m.parameter in forward.parameters)]
    pilots = pilot_examples(forward.model, config.seed) if usable and maps else []
    first = _outputs_of_text(forward, pilots[0]) if pilots else None
    usable = first is not None and resolve(config.output_factor, first, config.rank) == "spectral"
    if wanted == "parameters" and not usable:
        raise ValueError(
            "spectral_metric='parameters' is for spectral rows of a causal language model or an embedding model; leave "
            "spectral_metric at 'auto' for this model and output factor"
        )
    if first is None or not usable or wanted == "hidden":
        return config, None
    if wanted == "auto":
        wanted = "parameters" if embeds or is_free(first.source.shape[-1]) else "hidden"
        config = replace(config, spectral_metric=wanted)
    if wanted == "hidden":
        return config, None
    try:
        metric = measure_metric(forward, maps, pilots, config.seed, first.source.shape[-1])
    except NoneRan:  # weights that a model reads without calling their modules, named in `parameters`
        return replace(config, spectral_metric="hidden"), None
    return config, metric if embeds or len(metric.root) == first.source.shape[-1] else None


def _outputs_of_text(forward: ForwardPass, text: Example) -> Outputs | None:
    """The model's outputs for a text alone; None if it needs another input as well, such as an image."""
    try:
        return forward.outputs([text])
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        logger.info(
            "the model does not take a text alone (%s), so its rows are chosen in the metric of the hidden state", error
        )
        return None


# The examples ---------------------------------------------------------------------------------------------------------


def _first(
    forward: ForwardPass,
    config: FisherConfig,
    metric: HiddenMetric | None,
    examples: Sequence[Example],
    skip: bool,
) -> list[Example]:
    """The examples of the self-test: the first ones, as many as are short enough together."""
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


# The share of the model -----------------------------------------------------------------------------------------------


def _size(model: nn.Module, maps: Sequence[LinearMap]) -> int:
    """The number of entries of all weights; those of a 4-bit weight count as used, not as packed."""
    weights = bare_parameters(model)
    sizes = {id(weight): weight.numel() for weight in weights.values()}
    sizes |= {id(weights.get(m.parameter, m)): m.shape[0] * m.shape[1] for m in maps}
    for module in model.modules():
        if packed := packed_size(module):
            sizes |= dict.fromkeys(map(id, module.parameters(recurse=False)), 0) | {id(module): packed}
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
            "layer that computes x Wᵀ + b: %s%s. %s to analyse them",
            100 * sum(shares.values()),
            ", ".join(named[:_NAMED]),
            f", and {len(named) - _NAMED} smaller ones" if len(named) > _NAMED else "",
            _to_analyse(shares),
        )


def _to_analyse(names: Collection[str]) -> str:
    """What to do so that these weights are analysed."""
    ways = {name.endswith(PACKED) for name in names}
    parts = ["load the model in floating point"] if True in ways else []
    parts += ["name them in FisherConfig(parameters=...)"] if False in ways else []
    text = ", or ".join(parts)
    return text[0].upper() + text[1:]
