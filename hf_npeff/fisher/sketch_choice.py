"""Chooses the sketch: a given one, the one that is set, or the cheapest that is accurate enough."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.fisher.eigenpairs import HiddenMetric
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.rows import RowMaker, choose_cotangents
from hf_npeff.fisher.selftest import (
    KnownCotangents,
    candidates,
    exact_inner_products,
    off_diagonal_error,
    pef_inner_products,
)
from hf_npeff.pefs.sketches import Kind, Sketch

_ROWS = 4
"""The most rows of each example for measuring a sketch: more would cost time and give the same result."""
DEFAULT_DIMS = {"kronecker": 16, "countsketch": 16_384, "two-stage": 16_384, "identity": None}
"""The default of `sketch_dim`."""


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
    """Compare sketches with unsketched rows; return the first within `tolerance`, otherwise the most accurate.

    Args:
        forward: the forward pass.
        config: rank and output factor.
        batches: batches of different examples, with the same c.
        tries: the sketches to try as (kind, dim), cheapest first.
        seed: the seed of the sketches.
        tolerance: stop at the first error at most this; None measures all.

    Returns:
        The sketch, and {"kind dim": error} of all that were measured.
    """
    gram, captures = exact_inner_products(forward, batches)
    n = sum(len(batch.examples) for batch in batches)
    exact = pef_inner_products(gram, n)
    errors: dict[str, float] = {}
    best: tuple[float, Sketch] | None = None
    for kind, dim in tries:
        sketch = Sketch(forward.shapes, kind, dim, seed).to(forward.device)
        if captures is not None and all(captured.inputs for captured in captures):
            rows = torch.cat([captured.rows(sketch, batches[0].values.shape[1]) for captured in captures])
        else:
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


def chosen_sketch(
    forward: ForwardPass,
    config: FisherConfig,
    metric: HiddenMetric | None,
    few: Sequence[Example],
    sketch: Sketch | None,
) -> tuple[Sketch, float | None, dict[str, float]]:
    """The sketch that is given, set or chosen; its error, None if there is only one example; the sketches tried."""
    groups = [[few[i] for i in batch] for batch in forward.batches(few, len(few))]

    @functools.cache
    def batches() -> list[KnownCotangents]:
        known = [known_cotangents(forward, config, metric, group) for group in groups]
        narrowest = min(_ROWS, *(batch.values.shape[1] for batch in known))
        return [batch.narrowed(narrowest) for batch in known]

    tried: dict[str, float] = {}
    if sketch is None and config.sketch != "auto":
        sketch = Sketch(forward.shapes, config.sketch, config.sketch_dim or DEFAULT_DIMS[config.sketch], config.seed)
    elif sketch is None:
        tries = candidates(config, forward.shapes)
        if len(tries) == 1 or len(few) == 1:
            sketch = Sketch(forward.shapes, *tries[-1], seed=config.seed)
        else:
            sketch, tried = measure_sketches(forward, config, batches(), tries, config.seed, config.sketch_tolerance)
    if sketch.kind == "identity":
        return sketch, 0.0, tried
    if len(few) == 1:
        return sketch, None, tried
    label = _label(sketch.kind, sketch.setting)
    if label not in tried:
        tried |= measure_sketches(forward, config, batches(), [(sketch.kind, sketch.setting)], sketch.seed, None)[1]
    return sketch, tried[label], tried
