"""Arithmetic of weight changes, {parameter: ΔW}: sums, inner products, projections, the part not analysed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.errors import IncompatibleWeightsError
from hf_npeff.pefs.weights_identity import difference
from hf_npeff.weights.layouts import Layout
from hf_npeff.weights.moved_weights import squared_norm


def check_one_base(infos: Sequence[Mapping[str, Any]]) -> None:
    """Check that two changes are for the same weights, so that they can be added.

    Raises:
        IncompatibleWeightsError: if they were made for weights that are known to differ.
    """
    first = infos[0]
    for other in infos[1:]:
        if how := difference(first.get("weights"), other.get("weights")):
            raise IncompatibleWeightsError(
                f"the two changes are for different weights ({first.get('model')} and {other.get('model')}: {how}), so "
                "they cannot be added"
            )


def summed(
    parts: Sequence[tuple[float, Mapping[str, Tensor]]], layouts: Sequence[Mapping[str, Layout]]
) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """Σ weight·change; a change that lacks a parameter does not change it.

    Raises:
        ValueError: if a parameter has different shapes in two changes.
    """
    total: dict[str, Tensor] = {}
    kinds: dict[str, Layout] = {}
    for (weight, deltas), known in zip(parts, layouts, strict=True):
        for name, delta in deltas.items():
            if name in total and total[name].shape != delta.shape:
                raise ValueError(
                    f"{name} is {tuple(total[name].shape)} in one change and {tuple(delta.shape)} in the other: they "
                    "are for different models"
                )
            scaled = weight * delta.float()
            total[name] = total[name] + scaled.to(total[name].device) if name in total else scaled
            kinds.setdefault(name, known[name])
    return {name: delta for name, delta in total.items() if bool(delta.any())}, kinds


def outside(deltas: Mapping[str, Tensor], analysed: Mapping[str, Any]) -> dict[str, float]:
    """{parameter that is not analysed: its share of the change's norm, ‖Δ_name‖ / ‖Δ‖}, the largest first."""
    squares = {name: squared_norm(delta) for name, delta in deltas.items()}
    total = sum(squares.values())
    shares = {name: (value / total) ** 0.5 for name, value in squares.items() if name not in analysed}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def projected_out(deltas: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The change without its orthogonal projection on the span of some directions.

    Δ − V (VᵀV)⁺ VᵀΔ, with the directions as the columns of V; in parameters that a direction lacks it is 0.
    """
    grams = torch.tensor([[inner(a, b) for b in directions] for a in directions], dtype=torch.float64)
    along = torch.tensor([inner(direction, deltas) for direction in directions], dtype=torch.float64)
    weights = torch.linalg.pinv(grams, hermitian=True) @ along
    left = {name: delta.float() for name, delta in deltas.items()}
    for weight, direction in zip(weights.tolist(), directions, strict=True):
        for name, value in direction.items():
            step = -weight * value.float()
            left[name] = left[name] + step.to(left[name].device) if name in left else step
    return left


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """⟨first, second⟩ over the parameters that both have, in float64.

    Raises:
        ValueError: if a parameter has different shapes.
    """
    total = 0.0
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        if a.shape != b.shape:
            raise ValueError(f"{name} is {tuple(a.shape)} in one and {tuple(b.shape)} in the other")
        total += float((a.double() * b.to(a.device).double()).sum())
    return total
