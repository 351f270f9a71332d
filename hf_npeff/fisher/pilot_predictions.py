"""A model's predictions for a few random texts, stored with PEFs, show whether two stores are of the same function.

`same_predictions` compares a model with a store on examples that both have. Two stores may have no example in common,
and there is no model when components are transferred. The predictions for the same random texts differ if a soft cap,
an activation function or a steering hook differs, even if all weights are the same.
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
    """As JSON types: `values`, the log-probability and the entropy of each text, or the outputs; and `tolerance`.

    None if the model does not take a text alone.
    """
    if not forward.traits.takes or "input_ids" not in forward.traits.takes:
        return None
    values: list[float] = []
    tolerance = 0.0
    try:
        pilots = pilot_examples(forward.model, _SEED)  # of one length, so that nothing is padded
        for batch in [[pilot] for pilot in pilots] if forward.one_at_a_time else [pilots]:
            outputs = forward.outputs(batch)
            predicted = predictions_of(outputs)
            names = ("log_probs", "entropies") if "entropies" in predicted else ("log_probs", "predictions")
            for i, valid in enumerate(outputs.valid):
                values += [float(predicted[name][i].double().sum()) for name in names if name in predicted]
                logits = outputs.logits[i][valid]
                scale = float(logits[logits.isfinite()].abs().amax().clamp(min=1.0))
                tolerance = max(tolerance, len(logits) * scale * logit_tolerance(forward.model))
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError, IndexError, RuntimeError):
        return None  # it needs another input besides a text, such as an image
    return {"values": values, "tolerance": tolerance}
