"""Predictions compared with labels: scores, and intervals of their means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.config import INTERVAL
from hf_npeff.fisher.predictions import Predictions

_BOOTSTRAPS = 1000
"""Draws of an interval. Chosen: 25 of them lie beyond each end."""


@dataclass(frozen=True)
class Score:
    """The score of an example's predictions.

    Attributes:
        right: share of its terms with the right answer, or None for numbers.
        loss: mean −log p(label) of its terms, in nats.
        log_odds: mean log p(label)/(1 − p(label)) of its terms, in nats; NaN for numbers.
        squared: mean squared error of numbers.
    """

    right: float | None
    loss: float
    log_odds: float = math.nan
    squared: float = math.nan


def score(predictions: Predictions, i: int, label: Any) -> Score | None:
    """The score of an example's predictions; None without a label, or if the label does not fit."""
    if label is None:
        return None
    logits = predictions.logits[i].double()
    wanted = torch.as_tensor(label)
    answers = predictions.distribution(logits).predictions()[0]
    if wanted.numel() != answers.numel():
        return None
    if predictions.distribution.name == "gaussian":
        squared = float((logits - wanted.reshape(logits.shape).double()).square().mean())
        return Score(None, squared / 2, squared=squared)
    wanted = wanted.reshape(answers.shape).long()
    right = float((answers == wanted).double().mean())
    if predictions.distribution.name == "softmax":
        loss = -logits.log_softmax(-1).gather(-1, wanted[:, None]).mean()
        others = logits.scatter(-1, wanted[:, None], float("-inf")).logsumexp(-1)
        odds = logits.gather(-1, wanted[:, None])[:, 0] - others  # 1 − p itself would round to 0
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted.double())
        odds = logits * (2 * wanted.double() - 1)
    return Score(right, float(loss), float(odds.mean()))


def interval(values: Tensor, seed: int) -> tuple[float, float]:
    """95% bootstrap interval of the mean of values (n,)."""
    generator = torch.Generator().manual_seed(seed)
    draws = values[torch.randint(len(values), (_BOOTSTRAPS, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(draws, torch.tensor(INTERVAL, dtype=values.dtype)).tolist()
    return low, high
