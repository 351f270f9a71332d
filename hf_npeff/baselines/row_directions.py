"""Directions in the weights of methods that work on rows: combinations of rows, made selective as components are.

Lifting a combination takes passes over all examples. Directions of several methods on the same rows are therefore
lifted together (`lifted_together`), which forms every row once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.gradient_clustering import lift_combinations
from hf_npeff.baselines.method import MethodResult
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
MEMORY = 2**31
"""The most bytes of directions that are lifted together. Chosen: fifty directions of a model with ten million weights,
and a tenth of the memory of a small machine with two such studies at a time."""


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


@dataclass(frozen=True)
class RowDirections:
    """The directions in the weights of a method's features, as combinations of rows; a call lifts some of them.

    Attributes:
        analyzer: the one that made the rows.
        pefs: the rows.
        dataset: the one that they came from.
        combinations: from k numbers of features to combinations (k, n, c) of unscaled rows.
        batch_size: how many examples a forward pass takes.
    """

    analyzer: NPEFFAnalyzer
    pefs: PEFs
    dataset: Any
    combinations: Callable[[Sequence[int]], Tensor]
    batch_size: int

    def __call__(self, features: Sequence[int]) -> list[ParameterDirection]:
        """Lift the directions of these features.

        Raises:
            IncompatibleWeightsError: if the weights of the model and the PEFs differ.
            ValueError: if the rows were made elsewhere, or the dataset is another.
        """
        return self.lift(self.combinations(features))

    def lift(self, combinations: Tensor) -> list[ParameterDirection]:
        """Lift combinations (k, n, c) of unscaled rows; raises what a call raises."""
        origin = {"method": "combination of rows"}
        return lift_combinations(self.analyzer, self.pefs, self.dataset, combinations, self.batch_size, origin)

    def same_rows(self, other: RowDirections) -> bool:
        """Whether the directions of both can be lifted in the same passes."""
        return (
            self.analyzer is other.analyzer
            and self.pefs is other.pefs
            and self.dataset is other.dataset
            and self.batch_size == other.batch_size
        )


def row_interventions(
    analyzer: NPEFFAnalyzer, pefs: PEFs, dataset: Any, mixing: Mixing, competing: Tensor, batch_size: int
) -> RowDirections:
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

    def selective(features: Sequence[int]) -> Tensor:
        return selective_combinations(pefs, mixing(features), active[:, list(features)])

    return RowDirections(analyzer, pefs, dataset, selective, batch_size)


def lifted_together(
    methods: Sequence[MethodResult], features: Sequence[Sequence[int]], memory: int = MEMORY
) -> list[MethodResult]:
    """The same methods, which lift these features in passes that all methods on the same rows share.

    Nothing is lifted before the first direction of a group of methods is asked for. A direction is kept until every
    method that lists it has had it once; after that it is lifted alone. Methods whose directions are not combinations
    of rows stay as they are.

    Args:
        methods: n results.
        features: n lists, the features of each method that will be asked for.
        memory: the most bytes of directions that are lifted together; those of a single method always are.
    """
    groups: list[_Group] = []
    made = []
    for method, wanted in zip(methods, features, strict=True):
        directions = method.interventions
        if not isinstance(directions, RowDirections):
            made.append(method)
            continue
        group = next((g for g in groups if g.has_room(directions, len(wanted), memory)), None)
        if group is None:
            groups.append(group := _Group(directions))
        group.wanted += [(directions, feature) for feature in dict.fromkeys(wanted)]
        made.append(replace(method, interventions=partial(group.lifted, directions)))
    return made


class _Group:
    """Features whose directions are lifted in the same passes.

    Attributes:
        wanted: every method's directions and each of its features; once for each method that asks for it.
    """

    def __init__(self, first: RowDirections):
        self.wanted: list[tuple[RowDirections, int]] = []
        self._first = first
        self._left: dict[tuple[int, int], int] | None = None
        self._kept: dict[tuple[int, int], ParameterDirection] = {}

    def has_room(self, directions: RowDirections, features: int, memory: int) -> bool:
        """Whether so many more features can be lifted in the same passes, and within so many bytes."""
        return self._first.same_rows(directions) and (len(self.wanted) + features) * self._bytes <= memory

    @cached_property
    def _bytes(self) -> int:
        shapes = self._first.pefs.sketch().shapes.values()
        return torch.finfo(torch.float32).bits // 8 * sum(rows * columns for rows, columns in shapes)

    def lifted(self, directions: RowDirections, features: Sequence[int]) -> list[ParameterDirection]:
        """What a call of `directions` returns; the first one lifts those of the whole group."""
        if self._left is None:
            self._lift()
        return [self._handed_out(directions, feature) for feature in features]

    def _lift(self) -> None:
        by_method: dict[int, tuple[RowDirections, list[int]]] = {}
        self._left = dict(Counter((id(directions), feature) for directions, feature in self.wanted))
        for directions, feature in self.wanted:
            features = by_method.setdefault(id(directions), (directions, []))[1]
            if feature not in features:
                features.append(feature)
        keys = [(key, feature) for key, (_, features) in by_method.items() for feature in features]
        combinations = torch.cat([directions.combinations(features) for directions, features in by_method.values()])
        self._kept = dict(zip(keys, self._first.lift(combinations), strict=True))

    def _handed_out(self, directions: RowDirections, feature: int) -> ParameterDirection:
        key = id(directions), feature
        assert self._left is not None
        if key not in self._kept:
            return directions([feature])[0]
        self._left[key] -= 1
        return self._kept[key] if self._left[key] else self._kept.pop(key)
