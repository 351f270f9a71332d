"""The direction in which predictions moved: the one along which the changes of examples differ most.

KL says how far a prediction moved, but not in which direction. A model that has learned a cue moves examples with the
cue one way and those without it the other way, equally far. Let Δ_i be the change of the logits of example i, summed
over its terms, Δ̄ the mean over examples, and S the Fisher of the average prediction with respect to its logits. The
first principal direction d of Δ_i − Δ̄ in the metric of S gives every example a score, ⟨Δ_i − Δ̄, d⟩ in that metric.
The vector S d is how the probabilities of the average prediction change along d; its largest and its smallest number
name the two ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_npeff.fisher.predictions import Predictions

_ITERATIONS = 100
"""Steps of the power iteration. Chosen: if the first direction has 1.1 times the variance of the second one, what is
left of the second is below 10⁻⁸; if they are closer, any direction between them is as good."""


@dataclass(frozen=True)
class Displacement:
    """The direction in which every example's prediction moved.

    Attributes:
        scores: (n,) along the first direction, float64; their mean is 0.
        share: the direction's share of the variance of all displacements.
        rises: the outcome that becomes likelier with a positive score.
        falls: the outcome that becomes likelier with a negative score.
    """

    scores: Tensor
    share: float
    rises: int
    falls: int


def displacement(before: Predictions, after: Predictions) -> Displacement | None:
    """The first principal direction of the changes of predictions.

    Args:
        before: predictions for n examples before a change.
        after: predictions for them after it.

    Returns:
        The direction; None if examples have different sets of outcomes (for instance places in their own text), or all
        moved in the same way.
    """
    if len({logits.shape[-1] for logits in before.logits}) != 1:
        return None
    pairs = zip(before.logits, after.logits, strict=True)
    # Classes that cannot be have −inf in both.
    moved = torch.stack([(b - a).nan_to_num(0.0, 0.0, 0.0).sum(0) for a, b in pairs])
    moved -= moved.mean(0)
    average = before.distribution.averaged(before.logits)
    weighted = average.hessian_times(moved.T[None])[0]  # S Δᵀ (k, n)
    energies = (moved.T * weighted).sum(0).double()
    total = float(energies.sum())
    if not total > 0:
        return None
    scores = weighted.T @ moved[int(energies.argmax())]  # from the example that moved farthest
    for _ in range(_ITERATIONS):
        scores = weighted.T @ (moved.T @ (scores / scores.norm()))
    rise = weighted @ scores
    variance = float(scores.norm())  # of K s / ‖s‖, K the displacements' products: K's largest eigenvalue
    unit = scores.double() / scores.double().norm()
    return Displacement(unit * variance**0.5, min(variance / total, 1.0), int(rise.argmax()), int(rise.argmin()))
