"""How far an edit's effect reaches: the KL of what it should move, and of what it should leave alone.

An edit names one outcome of some examples. Beside it lie the other examples, and on the same examples the rest of the
prediction. For an outcome y of a softmax the KL has two parts,

    KL(p ‖ q) = KL of "y or not y"  +  (1 − p_y) KL(p without y ‖ q without y)

and for yes-or-no labels and for numbers it is a sum over them, of which one is the outcome's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_npeff.fisher.distributions import Bernoulli, Distribution, Gaussian, Softmax
from hf_npeff.fisher.predictions import Predictions

_HARDLY = 0.01
"""A mean KL, in nats, that is hardly a change, as the guide says: below it nothing counts as disturbed."""


@dataclass(frozen=True)
class Reach:
    """Mean KL(before ‖ after), in nats, by what should move and what should not.

    Attributes:
        moved: of the outcomes that should change, alone.
        beside: of the rest of the prediction on the same examples: other labels, other numbers, or how the other
            classes share what the outcome leaves them.
        others: of the examples that should stay the same; None if there are none.
        limited: whether `beside` is of predictions of their own, other labels or numbers, and so has to be small. The
            other classes of a softmax are part of the prediction that should change.
    """

    moved: float
    beside: float
    others: float | None
    limited: bool

    @property
    def kept(self) -> float:
        """The larger mean KL of the two things that should stay the same."""
        return max(self.beside if self.limited else 0.0, self.others or 0.0)

    @property
    def disturbs(self) -> bool:
        """Whether what should stay the same moves further than what should change."""
        return self.kept > max(_HARDLY, self.moved)

    @classmethod
    def of(cls, before: Predictions, after: Predictions, outcomes: Sequence[int], moving: Tensor) -> Reach:
        """Measure predictions.

        Args:
            before: of n examples before the change.
            after: of the same examples after it.
            outcomes: the number of each example's outcome.
            moving: (n,) bool, whether the outcome of an example should change; true for at least one.
        """
        kl, own = before.kl_to(after), _of_outcomes(before, after, outcomes)
        beside = (kl - own).clamp_min(0)  # a difference of two rounded sums
        return cls(
            float(own[moving].mean()),
            float(beside[moving].mean()),
            None if bool(moving.all()) else float(kl[~moving].mean()),
            before.distribution is not Softmax,
        )


def odds(logits: Tensor, chosen: Tensor, kind: type[Distribution]) -> Tensor:
    """Log-odds (…,) of the outcomes that `chosen` (…, k) marks, one in each row of logits (…, k), float64 in and out.

    For a regression it is the predicted number.
    """
    own = logits.masked_select(chosen).view(logits.shape[:-1])
    return own - logits.masked_fill(chosen, float("-inf")).logsumexp(-1) if kind is Softmax else own


def _of_outcomes(before: Predictions, after: Predictions, outcomes: Sequence[int]) -> Tensor:
    """KL (n,) of each example's outcome alone, summed over terms: of its log-odds as yes or no, or of its number."""
    kind: type[Distribution] = Gaussian if before.distribution is Gaussian else Bernoulli
    found = []
    for y, *logits in zip(outcomes, before.logits, after.logits, strict=True):
        chosen = (torch.arange(logits[0].shape[-1]) == y).expand_as(logits[0])
        a, b = (kind(odds(each.double(), chosen, before.distribution)[:, None]) for each in logits)
        found.append(a.kl(b).sum())
    return torch.stack(found)
