"""Groups of examples with similar effects of a change: most changed, moved one way or the other, not explained."""

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
"""Examples above this quantile make a group. Chosen: a quarter and three quarters leave enough examples in both."""


def changed_groups(
    kl: Tensor,
    explained: Tensor,
    moved: Displacement | None,
    end: Callable[[int, int], str],
    columns: Mapping[str, Sequence[Any]],
    info: Mapping[str, Any],
    seed: int,
) -> list[ChangedGroup]:
    """The groups of examples with similar effects of a change, with what they have in common.

    Args:
        kl: (n,) the KL of every example.
        explained: (n,) share of every example's PEF that components explain.
        moved: the direction in which predictions moved, or None.
        end: (the outcome that becomes likelier at one end of this direction, the sign of the scores) → the group's
            name.
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
