"""Does a model still have the predictions that it had when PEFs were made? Its weights alone do not say so.

A changed config (a soft cap, a sliding window, the number of experts for each token), another activation function,
another base of the rotary frequencies or a hook that steers activations changes all gradients, but no weight. So a few
examples are run again, and the model's predictions are compared with the stored ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.errors import IncompatibleWeightsError
from hf_npeff.fisher.batching import logit_tolerance
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.rows import predictions_of

STORED = ("log_probs", "entropies", "predictions")
"""The stored columns on predictions."""
_LOOKED_AT = 32
"""The number of stored examples from which the ones to run again are chosen. Chosen: few enough to encode quickly."""
_RUN_AGAIN = 3
"""How many are run again, the longest ones, which use most windows and positions; a change affects nearly all."""
_ROUNDING_ON_A_GPU = 1e-3
"""Relative change of logits that may be rounding, for any type of the weights, because products may be in TF32."""


def places_to_compare(n: int) -> list[int]:
    """The places of some of n stored examples, evenly spread, from which `check_predictions` chooses."""
    return sorted({round(i * (n - 1) / max(1, _LOOKED_AT - 1)) for i in range(min(n, _LOOKED_AT))}) if n else []


def check_predictions(
    forward: ForwardPass, examples: Sequence[Example], stored: Mapping[str, Tensor | None], what: str, remedy: str
) -> None:
    """Check that a model still has the predictions that are stored with PEFs.

    Args:
        forward: a forward pass of the model as it is now.
        examples: some of the analysed examples.
        stored: their "predictions", "log_probs" and "entropies", an entry for each example, if they are stored.
        what: the object that they belong to, as the start of a sentence: "the PEFs in runs/pefs".
        remedy: what to do, in a sentence.

    Raises:
        IncompatibleWeightsError: if the prediction for one of the longest examples has changed.
    """
    kept = {name: values for name, values in stored.items() if values is not None}
    longest = sorted(range(len(examples)), key=lambda i: (-examples[i].length, i))[:_RUN_AGAIN]
    for i in longest if kept else ():
        now, tolerance = _now(forward, examples[i])
        before = {name: values[i] for name, values in kept.items()}
        if (how := _difference(before, now, tolerance)) is not None:
            raise IncompatibleWeightsError(
                f"{what} were made when the model had other predictions: for example {examples[i].id!r}, {how}. If its "
                "weights are the same, its config, its modules or hooks on them have changed (a hook that steers "
                f"activations, an activation function, positions). {remedy} check_weights=False skips this check."
            )


@torch.no_grad()
def _now(forward: ForwardPass, example: Example) -> tuple[Mapping[str, Tensor], float]:
    """The model's prediction for an example now, and the size of possible rounding."""
    try:
        outputs = forward.outputs([example])
    except NotFiniteError:
        return {}, 0.0
    logits = outputs.logits[outputs.valid]
    scale = float(logits[logits.isfinite()].abs().amax().clamp(min=1.0))
    least = 0.0 if forward.device.type == "cpu" else _ROUNDING_ON_A_GPU
    return predictions_of(outputs), scale * max(least, logit_tolerance(forward.model))


def _difference(before: Mapping[str, Tensor], now: Mapping[str, Tensor], tolerance: float) -> str | None:
    """How the predictions for an example differ, in words; None if they do not."""
    for name, noun in (
        ("log_probs", "the log-probability"),
        ("entropies", "the entropy"),
        ("predictions", "the value"),
    ):
        if name not in before or (name == "predictions" and not before[name].is_floating_point()):
            continue
        old, new = before[name].flatten().double(), _of_one(now, name)
        n = min(len(old), len(new))
        if not n or bool((old[n:] != 0).any()):  # terms beyond an example's own are zeros
            return f"{noun} has another shape"
        change = (old[:n] - new[:n]).abs()
        worst = int(change.argmax())
        if not bool(change[worst] <= tolerance):
            return f"{noun} was {float(old[worst]):.4g} and is now {float(new[worst]):.4g}"
    return None


def _of_one(now: Mapping[str, Any], name: str) -> Tensor:
    value = now.get(name)
    return torch.zeros(0, dtype=torch.float64) if value is None else value[0].flatten().double().cpu()
