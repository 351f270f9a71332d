"""Does a changed weight do the same as its change added to the outputs of its modules?

It does not if a module of one's own reads the weight in another place too, or normalises it. Then only a change of the
weight itself shows what the change does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.fisher.bare_model import named_weights
from hf_npeff.fisher.batching import logit_tolerance
from hf_npeff.fisher.foreign_parts import foreign_parts
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.weight_reads import Change, MovedReads, can_be_moved
from hf_npeff.weights.activations import LinearDelta, changed_in_activations

_APART = 0.05
"""The share of the change of the logits by which the two may differ, beside rounding. Chosen: the intervals of a
measurement are wider."""


@torch.no_grad()
def acts_otherwise(
    forward: ForwardPass,
    deltas: Mapping[str, Tensor],
    in_activations: Mapping[str, LinearDelta],
    example: Example,
    scale: float,
) -> bool:
    """Whether a change of weights moves an example's logits otherwise than the same change in the activations.

    This is tried only if some code of the model is not from transformers, and all changed weights can be read.

    Args:
        forward: the forward pass.
        deltas: {parameter: change}, shaped like the parameters.
        in_activations: the same change, for the activations.
        example: an example.
        scale: the step.

    Raises:
        UnsupportedModelError: if a changed module never runs although the module around it does.
    """
    weights = named_weights(forward.model)
    if forward.fsdp.active or not foreign_parts(forward) or not all(can_be_moved(weights.get(n)) for n in deltas):
        return False

    def logits() -> Tensor:
        outputs = forward.outputs([example])
        return outputs.logits[outputs.valid].double()

    before = logits()
    with changed_in_activations(forward.model, in_activations, scale):
        beside = logits()
    with MovedReads([Change(weights[n].detach(), _added(weights[n], deltas[n], scale)) for n in deltas]):
        inside = logits()
    change = max(float((each - before).nan_to_num(0, 0, 0).norm()) for each in (beside, inside))
    rounding = logit_tolerance(forward.model) * float(before[before.isfinite()].norm())
    return float((beside - inside).nan_to_num(0, 0, 0).norm()) > _APART * change + rounding


def _added(weight: Tensor, delta: Tensor, scale: float) -> Callable[[], Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return lambda: torch.empty_like(weight).copy_(weight.to(wide) + scale * delta.to(weight.device, wide))
