"""What a model predicts for a few texts of random tokens, kept with PEFs: whether two stores are of one function.

`same_predictions` compares a model with a store by examples that both have. Two stores have none in common, and no
model is there where components are transferred; the same random texts, run for each, tell a soft cap, an activation
function or a hook that steers, where every weight is the same.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_npeff.fisher.batching import logit_tolerance
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.metric import pilot_examples
from hf_npeff.fisher.rows import predictions_of

_SEED = 0
"""The same texts for every store, whatever its settings."""


@torch.no_grad()
def pilot_predictions(forward: ForwardPass) -> dict[str, Any] | None:
    """As JSON types: `values`, of each text the log-probability and the entropy, or the numbers; and `tolerance`.

    None where the model does not take a text alone.
    """
    if not forward.traits.takes or "input_ids" not in forward.traits.takes:
        return None
    values: list[float] = []
    tolerance = 0.0
    try:
        for pilot in pilot_examples(forward.model, _SEED):
            outputs = forward.outputs([pilot])
            found = predictions_of(outputs)
            names = ("log_probs", "entropies") if "entropies" in found else ("log_probs", "predictions")
            values += [float(found[name].double().sum()) for name in names if name in found]
            logits = outputs.logits[outputs.valid]
            scale = float(logits[logits.isfinite()].abs().amax().clamp(min=1.0))
            tolerance = max(tolerance, len(logits) * scale * logit_tolerance(forward.model))
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError, IndexError, RuntimeError):
        return None  # it needs something else beside a text, such as an image
    return {"values": values, "tolerance": tolerance}
