"""The metric that the parameters give the last hidden state, in which the spectral rows are chosen.

With Z = ∂z/∂θ (h×p) an example's Fisher is F = Zᵀ M Z, M = J_headᵀ S J_head, and for any rows V of cotangents

    ‖F − Zᵀ VᵀV Z‖_F = ‖C^½ (M − VᵀV) C^½‖_F,     C = Z Zᵀ   (h×h)

so the best c cotangents are V = √λ uᵀ C^(−½) for the top c eigenpairs (λ, u) of C^½ M C^½. Those of M itself are the
best only if C is a multiple of the identity. Examples share most of their C (the final normalisation, the residual
stream and the layers are the same). So one C serves for all: its mean over a few examples, each at unit trace, shrunk
by 0.2 towards the identity because examples do not share all of it.

For an embedding model the source is the embedding itself, and S = I prefers no direction of it. The best rows are then
the top eigenvectors of C alone, so C is always measured.

The few examples are texts of random tokens, made from the seed. So an example's rows depend only on the model, the
config and the example, whatever data set it is in. Each text costs h backward passes, once. Many of them run together,
as a batch of copies of one text, each with its own direction.

Measured on Llama- and GPT-2-like models as transformers initialises them (h = 32, 64; c = 1 to 8), the largest error
over the best possible was 1.54 in the hidden state's own metric, 1.17 in this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.fisher.batching import relative_change, row_tolerance
from hf_npeff.fisher.eigenpairs import HiddenMetric
from hf_npeff.fisher.forward import ForwardPass, ModelFailsError
from hf_npeff.fisher.gradients import CalledOnceForAll, MadeOneByOne, RowCollector, backward_passes
from hf_npeff.fisher.linear_maps import LinearMap, shapes_of
from hf_npeff.fisher.memory import is_out_of_memory
from hf_npeff.pefs.sketches import Sketch

_PILOTS = 4
"""The number of texts: their Cs hardly differ, and each costs h backward passes."""
_PILOT_TOKENS = 16
"""Tokens of a text: enough for attention to have something to look at."""
_FREE = 256
"""The largest hidden size for which the metric is measured by default, with h backward passes over each pilot text."""
_IDENTITY_LIMIT = 65_536
"""Parameters up to which inner products of rows are taken without a sketch: h rows of them fit anywhere."""
_COPIES = 64
"""Copies of a pilot in a batch, each with its own direction, at most: half the tokens of the self-test's examples."""
_SIDE = 16
"""The size of the Kronecker sketch that is used for more parameters."""


def is_free(h: int) -> bool:
    """Whether h backward passes over the pilots are few enough to measure the metric by default."""
    return h <= _FREE


def pilot_examples(model: Any, seed: int) -> list[Example]:
    """Texts of random tokens of a language model's vocabulary."""
    vocabulary = base_of(model).get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (_PILOTS, _PILOT_TOKENS), generator=generator).tolist()
    ones = [1] * _PILOT_TOKENS
    return [
        Example(f"pilot {i}", {"input_ids": row, "attention_mask": ones, "labels": row}, {}, "")
        for i, row in enumerate(ids)
    ]


def measure_metric(
    forward: ForwardPass, maps: Sequence[LinearMap], pilots: Sequence[Example], seed: int, width: int
) -> HiddenMetric:
    """The mean metric of a few examples, from the rows of every direction of the hidden state.

    Args:
        forward: a forward pass whose source is the last hidden state (B, t, h), of which the last position is used, or
            the embedding (B, 1, k).
        maps: the analysed linear maps.
        pilots: the examples.
        seed: the seed of the sketch in which inner products of rows are computed; ⟨Pa, Pb⟩ is ⟨a, b⟩ on average.
        width: h, or k for an embedding.
    """
    shapes = shapes_of(maps)
    small = sum(a * b for a, b in shapes.values()) <= _IDENTITY_LIMIT
    sketch = Sketch(shapes, "identity") if small else Sketch(shapes, "kronecker", _SIDE, seed)
    sketch.to(forward.device)
    together = 1 if forward.one_at_a_time else min(_COPIES, width)
    at_once = 1 if together == 1 else _COPIES // together
    total = None
    for start in range(0, len(pilots), at_once):
        few, rows = pilots[start : start + at_once], None
        if together > 1:
            rows = _rows_in_batches(forward, maps, sketch, few, together, check=start == 0)
        if rows is None:
            together = 1
            rows = torch.cat([_rows_of_directions(forward, maps, sketch, [pilot]) for pilot in few])
        for of_pilot in rows:
            C = (of_pilot @ of_pilot.T).double()
            C = C / C.diagonal().sum().clamp_min(torch.finfo(C.dtype).tiny)
            total = C if total is None else total + C
    assert total is not None
    return HiddenMetric.of(total)


def _rows_in_batches(
    forward: ForwardPass,
    maps: Sequence[LinearMap],
    sketch: Sketch,
    pilots: Sequence[Example],
    together: int,
    *,
    check: bool,
) -> Tensor | None:
    """The rows from batches of copies; None if the model or memory allows none, or a copy gets other rows.

    For the last of these, `check` has one row compared with that of its text alone.
    """
    try:
        rows = _rows_of_directions(forward, maps, sketch, pilots, together)
    except (UnsupportedModelError, RuntimeError) as error:
        if isinstance(error, (CalledOnceForAll, ModelFailsError)) or is_out_of_memory(error):
            return None
        raise
    if check:
        middle = rows.shape[1] // 2
        alone = _rows_of_directions(forward, maps, sketch, pilots[-1:], only=middle)
        differs = relative_change(rows[-1, middle], alone[0, 0]) > row_tolerance(forward.model)
        if forward.fsdp.most(int(differs)):  # processes that share a model go on alike
            return None
    return rows


def _rows_of_directions(
    forward: ForwardPass,
    maps: Sequence[LinearMap],
    sketch: Sketch,
    pilots: Sequence[Example],
    together: int = 1,
    only: int | None = None,
) -> Tensor:
    """The sketched rows (P, h, d) of directions of the last position's source, so many of them in a backward pass.

    Args:
        forward: see `measure_metric`, like `maps`.
        maps: the linear maps.
        sketch: the sketch of these maps.
        pilots: P examples of the same length.
        together: copies of each in a batch.
        only: a single direction; None: all.
    """
    collector = RowCollector(sketch)
    directions = range(0)

    def entering(source: Tensor) -> MadeOneByOne:
        nonlocal directions
        directions = range(source.shape[-1]) if only is None else range(only, only + 1)

        def along(number: int) -> Tensor:
            cotangent = torch.zeros_like(source)
            for copy, direction in enumerate(directions[number * together : (number + 1) * together]):
                cotangent[copy::together, -1, direction] = 1
            return cotangent

        return MadeOneByOne(-(-len(directions) // together), along)

    copies = [pilot for pilot in pilots for _ in range(together)]
    backward_passes(forward.model, maps, collector, len(copies), forward.source_of(copies), entering)
    by_pilot = collector.rows.unflatten(0, (len(pilots), together))  # (P, copies, passes, d)
    return by_pilot.transpose(1, 2).flatten(1, 2)[:, : len(directions)]
