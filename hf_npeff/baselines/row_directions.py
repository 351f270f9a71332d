"""Directions in the weights of methods that work on rows: combinations of rows, made selective as components are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.gradient_clustering import lift_combinations
from hf_npeff.baselines.method import Interventions
from hf_npeff.decomposition.component import active_examples
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.row_space import row_space
from hf_npeff.weights.selective import selective_together

Mixing = Callable[[Sequence[int]], Tensor]
"""From k numbers of features to their directions (k, n, c), as combinations of rows of PEFs of unit norm."""

_ROUNDING = 1e-6
"""Share of the largest eigenvalue of a Gram matrix of float32 rows below which an eigenvalue is rounding."""


def combination_of(points: Tensor, directions: Tensor) -> Tensor:
    """β (k, n) with β X = directions (k, m), for points X (n, m) with orthogonal columns, as `coordinates` makes them.

    Columns that are rounding are left out.
    """
    lengths = points.double().square().sum(0)
    kept = lengths > lengths.max() * _ROUNDING
    return (directions.double() * torch.where(kept, 1 / lengths.clamp_min(1e-300), 0.0)) @ points.double().T


def top_combination(rows: Tensor, weights: Tensor) -> Tensor:
    """The top eigenvector of Σ_i w_i A_iᵀA_i as a combination (n, c) of the rows A (n, c, d); its length is free.

    Args:
        rows: (n, c, d).
        weights: (n,); those below 0 count as 0.

    Raises:
        ValueError: if no example has a weight.
    """
    used = weights > 0
    if not bool(used.any()):
        raise ValueError("a direction needs examples with a positive coefficient, but this feature has none")
    A = rows[used].to(torch.promote_types(rows.dtype, torch.float32)) * weights[used].sqrt().to(rows)[:, None, None]
    flat = A.flatten(0, 1)
    # With M = √w A and u the top eigenvector of MMᵀ, Mᵀu is that of MᵀM
    u = torch.linalg.eigh((flat @ flat.T).double())[1][:, -1].reshape(A.shape[:2])
    mixing = torch.zeros(rows.shape[:2], dtype=torch.float64)
    mixing[used] = u * weights[used].double().sqrt()[:, None]
    return mixing


def unscaled(pefs: PEFs, mixing: Tensor) -> Tensor:
    """Combinations (k, n, c) of rows of unit PEFs as combinations of unscaled rows."""
    lengths = pefs.norms.double().sqrt()
    return mixing.double() * torch.where(lengths > 0, 1 / lengths.clamp_min(1e-300), 0.0)[None, :, None]


def selective_combinations(pefs: PEFs, mixing: Tensor, competing: Tensor) -> Tensor:
    """Directions made selective as `lift` makes components: (O + λI)⁻¹ v, with O the mean PEF of examples without it.

    An example has a feature if the feature's share of its competing coefficients is that of an active component. A
    feature that (almost) every example has stays as it is.

    Args:
        pefs: the rows, n of them.
        mixing: the directions v (k, n, c), as combinations of rows of unit PEFs.
        competing: (n, k) bool, who has each feature.

    Returns:
        (k, n, c), combinations of unscaled rows.
    """
    beta = unscaled(pefs, mixing)
    # Choosing a ridge by holding examples out needs two to leave alone
    able = [j for j in range(len(beta)) if int((~competing[:, j]).sum()) >= 2]
    if able:
        space = row_space(pefs, inside=beta[able])
        contrasts = [Contrast(space, competing[:, j].double(), ~competing[:, j]) for j in able]
        for j, (made, _, _) in zip(able, selective_together(contrasts, beta[able], "auto"), strict=True):
            beta[j] = made
    return beta


def row_interventions(
    analyzer: NPEFFAnalyzer, pefs: PEFs, dataset: Any, mixing: Mixing, competing: Tensor, batch_size: int
) -> Interventions:
    """What switches the features of a method on rows.

    Args:
        analyzer: the one that made the rows.
        pefs: the rows.
        dataset: the one that they came from.
        mixing: the features' directions.
        competing: (n, r), the features' competing coefficients.
        batch_size: how many examples a forward pass takes.
    """
    active = active_examples(competing.double().clamp_min(0))

    def lifted(features: Sequence[int]) -> list[ParameterDirection]:
        rows = selective_combinations(pefs, mixing(features), active[:, list(features)])
        return lift_combinations(analyzer, pefs, dataset, rows, batch_size, {"method": "combination of rows"})

    return lifted
