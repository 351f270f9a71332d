"""Components that are to be lifted, as they are known before the model is run; made selective where that is wanted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_npeff.config import LiftRequest
from hf_npeff.decomposition.component import ACTIVE_SHARE
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.errors import IncompatibleSketchError
from hf_npeff.pefs.store import PEFs, check_same_sketch
from hf_npeff.pefs.weights_identity import check_same_weights
from hf_npeff.weights.contrast import NONE_LEFT, Contrast
from hf_npeff.weights.row_space import combined_rows, row_space
from hf_npeff.weights.selective import selective_together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A component that is to be lifted.

    Attributes:
        component: its number.
        target: (d,) float64 of unit norm, in the coordinates of the decomposition: what is wanted.
        coefficients: (n, c) of unscaled rows, whose combination it is; None where no rows are combined.
        info: what is known of it so far, for the direction's `info`.
    """

    component: int
    target: Tensor
    coefficients: Tensor | None
    info: dict[str, Any]


def made_selective(
    decomposition: Decomposition,
    plans: Sequence[Plan],
    pefs: PEFs,
    request: LiftRequest,
    scales: Tensor | None,
    device: torch.device | None,
) -> list[Plan]:
    """The plans of components, made selective.

    Args:
        decomposition: the decomposition of `pefs`.
        plans: with coefficients.
        pefs: those that were decomposed.
        request: ridge, what else to keep, memory. Where `selective` is None, a component that leaves nothing alone
            stays as it is, with a warning.
        scales: D of the metric in which ‖δ‖ is small, for the metric form of a balanced decomposition; else None.
        device: where it is computed; None takes that of the rows.

    Raises:
        IncompatibleSketchError: if `keep` is of another sketch or other weights.
        ValueError: if a component leaves nothing alone and `selective` is True.
    """
    if request.keep is not None:
        check_kept(pefs, request.keep)
    W = decomposition.coefficients.double()
    active = (W / W.sum(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)) > ACTIVE_SHARE
    # Left open, a ridge that is chosen by holding examples out needs two of them.
    enough = 2 if request.selective is None and request.ridge == "auto" else 1
    left_alone = len(active) - active.sum(0)
    busy = {p.component for p in plans if request.keep is None and int(left_alone[p.component]) < enough}
    if busy and request.selective is None:
        logger.warning(
            "the components %s are active on every example, or on all but one, so that too few are left alone: they "
            "are lifted as they are, not selectively; give other data as keep=, or more components",
            sorted(busy),
        )
    elif busy:
        raise ValueError(NONE_LEFT)
    chosen = [p for p in plans if p.component not in busy]
    if not chosen:
        return list(plans)
    beta = torch.stack([p.coefficients for p in chosen if p.coefficients is not None])
    space = row_space(pefs, scales=scales, inside=beta, memory_budget=request.memory_budget, device=device)
    kept = None if request.keep is None else space.coordinates(request.keep)
    back = decomposition.scales if scales is None else None
    at = space.rows.device
    contrasts = [Contrast(space, W[:, p.component].to(at), ~active[:, p.component].to(at), kept) for p in chosen]
    solved = selective_together(contrasts, beta, request.ridge)
    solutions = torch.stack([solution for solution, _, _ in solved])
    directions = combined_rows(pefs, solutions, scales, space.rows).cpu()
    if back is not None:
        directions = directions * back.double()
    made = {
        p.component: Plan(p.component, normalize(g, dim=0), solution.cpu(), p.info | description)
        for p, g, (solution, _, description) in zip(chosen, directions, solved, strict=True)
    }
    return [made.get(p.component, p) for p in plans]


def check_kept(pefs: PEFs, kept: PEFs) -> None:
    """Refuse PEFs to be left alone that do not belong to the same weights and sketch.

    Raises:
        IncompatibleSketchError: if they are of another sketch or model.
        IncompatibleWeightsError: if they are of other weights.
    """
    check_same_sketch(pefs, kept, "PEFs")
    remedy = "Compute those of `keep` with the same model: analyzer.compute_pefs(other_data, like=pefs)."
    for name in ("model", "revision"):
        ours, theirs = pefs.info.get(name), kept.info.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise IncompatibleSketchError(
                f"`keep` holds PEFs of another model: {name} {theirs!r}, and here it is {ours!r}. {remedy}"
            )
    check_same_weights(kept.info.get("weights"), pefs.info.get("weights"), "the PEFs of `keep`", remedy)
