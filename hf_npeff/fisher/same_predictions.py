"""Does a model still predict what it predicted when PEFs were made? Its weights alone do not tell.

A changed config (another soft cap, a sliding window, another number of experts a token), another activation function,
another base of the rotary frequencies or a hook that steers activations leaves every weight as it was, and all
gradients are others. So a few examples are run again, and what the model predicts is compared with what is stored.
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
"""What a store holds of predictions."""
_LOOKED_AT = 32
"""Stored examples among which those that are run again are found. Chosen: encoded in no time."""
_RUN_AGAIN = 3
"""The longest of them, which see most of a model's windows and positions: a change of a model changes nearly all."""
_ROUNDING_ON_A_GPU = 1e-3
"""Relative change of logits that may be rounding there, whatever the type of the weights: products may be in TF32."""


def places_to_compare(n: int) -> list[int]:
    """The places of some of n stored examples, evenly spread, among which `check_predictions` finds its own."""
    return sorted({round(i * (n - 1) / max(1, _LOOKED_AT - 1)) for i in range(min(n, _LOOKED_AT))}) if n else []


def check_predictions(
    forward: ForwardPass, examples: Sequence[Example], stored: Mapping[str, Tensor | None], what: str, remedy: str
) -> None:
    """Refuse PEFs of a model that predicts something else now, although its weights are the same.

    Args:
        forward: a pass over the model as it is now.
        examples: some that were analysed.
        stored: their "predictions", "log_probs" and "entropies", an entry an example, as far as they are there.
        what: they are of, to begin a sentence: "the PEFs in runs/pefs".
        remedy: what to do, in a sentence.

    Raises:
        IncompatibleWeightsError: if the model predicts something else for one of the longest of them.
    """
    kept = {name: values for name, values in stored.items() if values is not None}
    longest = sorted(range(len(examples)), key=lambda i: (-examples[i].length, i))[:_RUN_AGAIN]
    for i in longest if kept else ():
        now, tolerance = _now(forward, examples[i])
        before = {name: values[i] for name, values in kept.items()}
        if (how := _difference(before, now, tolerance)) is not None:
            raise IncompatibleWeightsError(
                f"{what} were made when the model predicted something else: of example {examples[i].id!r} {how}. "
                "Where its weights are the same, its config, its modules or hooks on them have changed (a hook that "
                f"steers activations, an activation function, positions). {remedy} check_weights=False goes on all the "
                "same."
            )


@torch.no_grad()
def _now(forward: ForwardPass, example: Example) -> tuple[Mapping[str, Tensor], float]:
    """What the model predicts for an example now, and how much of that may be rounding."""
    try:
        outputs = forward.outputs([example])
    except NotFiniteError:
        return {}, 0.0
    logits = outputs.logits[outputs.valid]
    scale = float(logits[logits.isfinite()].abs().amax().clamp(min=1.0))
    least = 0.0 if forward.device.type == "cpu" else _ROUNDING_ON_A_GPU
    return predictions_of(outputs), scale * max(least, logit_tolerance(forward.model))


def _difference(before: Mapping[str, Tensor], now: Mapping[str, Tensor], tolerance: float) -> str | None:
    """How predictions of an example differ, in words; None where they do not."""
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
            return f"{noun} was {float(old[worst]):.4g}, and is {float(new[worst]):.4g}"
    return None


def _of_one(now: Mapping[str, Any], name: str) -> Tensor:
    value = now.get(name)
    return torch.zeros(0, dtype=torch.float64) if value is None else value[0].flatten().double().cpu()
