"""Groups of examples that a change treats alike: the most changed, those that moved one way, those unexplained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import AssociationRequest
from hf_npeff.decomposition.associations import Association, in_common
from hf_npeff.weights.change_report import ChangedGroup
from hf_npeff.weights.displacement import Displacement

_AT_THE_END = 0.75
"""Quantile above which examples make a group. Chosen: a quarter against three leaves enough of both."""


def changed_groups(
    kl: Tensor,
    explained: Tensor,
    moved: Displacement | None,
    end: Callable[[int, int], str],
    columns: Mapping[str, Sequence[Any]],
    info: Mapping[str, Any],
    seed: int,
) -> list[ChangedGroup]:
    """Examples that a change treats alike, with what they have in common.

    Args:
        kl: (n,) of every example.
        explained: (n,) share of every example's PEF that components explain.
        moved: which way predictions moved, or None.
        end: the name of an end of that, from the outcome that becomes likelier there and the sign of the scores.
        columns: {name: n values}.
        info: the `info` of the decomposition.
        seed: the seed of the shuffles that correct p-values.
    """
    scores = {"most changed": kl}
    if moved is not None:
        scores |= {end(moved.rises, 1): moved.scores, end(moved.falls, -1): -moved.scores}
    scores["changed and not explained"] = kl * (1 - explained)
    members = torch.stack([each > torch.quantile(each, _AT_THE_END) for each in scores.values()], 1)
    common = in_common(members, columns, info, AssociationRequest(seed=seed))
    return [ChangedGroup(*each) for each in zip(scores, members.sum(0).tolist(), common, strict=True)]


def most_certain(groups: Sequence[ChangedGroup]) -> list[Association]:
    """The associations of all groups, the most certain first, each feature once."""
    first: dict[str, Association] = {}
    for each in sorted((each for group in groups for each in group.associations), key=lambda each: each.log_p):
        first.setdefault(each.feature, each)
    return list(first.values())
