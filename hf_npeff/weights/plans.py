"""Plans of components to lift, before the model is run; made selective if that is wanted."""

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
    """A component to lift.

    Attributes:
        component: the number of the component.
        target: (d,) float64 of unit norm, the wanted direction in the coordinates of the decomposition.
        coefficients: (n, c), the combination of unscaled rows; None if no rows are combined.
        info: information for the direction's `info`.
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
        plans: the plans, with coefficients.
        pefs: the PEFs that were decomposed.
        request: ridge, other PEFs to leave alone, memory. If `selective` is None, a component without examples to leave
            alone stays as it is, with a warning.
        scales: D of the metric in which ‖δ‖ is small, for the metric form of a balanced decomposition; otherwise None.
        device: the device for the computation; None uses that of the rows.

    Raises:
        IncompatibleSketchError: if `keep` has another sketch or other weights.
        ValueError: if a component has no examples to leave alone and `selective` is True.
    """
    if request.keep is not None:
        check_kept(pefs, request.keep)
    W = decomposition.coefficients.double()
    active = (W / W.sum(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)) > ACTIVE_SHARE
    # Choosing a ridge by holding examples out needs two of them.
    enough = 2 if request.selective is None and request.ridge == "auto" else 1
    left_alone = len(active) - active.sum(0)
    busy = {p.component for p in plans if request.keep is None and int(left_alone[p.component]) < enough}
    if busy and request.selective is None:
        logger.warning(
            "the components %s are active on every example, or on all but one, so there are too few examples to leave "
            "alone: these components are lifted plainly, not selectively. Pass PEFs of other data as keep=, or use "
            "more components",
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
    """Check that PEFs to leave alone have the same weights and sketch.

    Raises:
        IncompatibleSketchError: if they have another sketch or model.
        IncompatibleWeightsError: if they have other weights.
    """
    check_same_sketch(pefs, kept, "PEFs")
    remedy = "Compute those of `keep` with the same model: analyzer.compute_pefs(other_data, like=pefs)."
    for name in ("model", "revision"):
        ours, theirs = pefs.info.get(name), kept.info.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise IncompatibleSketchError(
                f"`keep` has PEFs of another model: its {name} is {theirs!r}, not {ours!r}. {remedy}"
            )
    check_same_weights(kept.info.get("weights"), pefs.info.get("weights"), "the PEFs of `keep`", remedy)
