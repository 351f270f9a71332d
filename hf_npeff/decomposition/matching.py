"""Which components of two decompositions correspond."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.pefs.store import PEFs, check_same_sketch


def similarities(first: Decomposition, second: Decomposition) -> tuple[str, Tensor]:
    """The name of the measure, and the similarity (r, r′) of every pair of components.

    If the decompositions share examples (by content if it is known, otherwise by id), the measure is the correlation of
    coefficients; otherwise it is the |cosine| of pseudo-Fishers.

    Raises:
        ValueError: if they share neither two examples nor the sketch.
    """
    keys = [d.columns.get("content_hash", d.example_ids) for d in (first, second)]
    places = [{key: i for i, key in enumerate(k)} for k in keys]
    shared = [key for key in places[0] if key in places[1]]
    if len(shared) > 1:
        indices = [[at[key] for key in shared] for at in places]
        W = [d.coefficients[where].double() for d, where in zip((first, second), indices, strict=True)]
        unit = [torch.nn.functional.normalize(w - w.mean(0), dim=0) for w in W]
        return f"correlation of coefficients over {len(shared)} examples", unit[0].T @ unit[1]
    if first.fingerprint == second.fingerprint:
        return "cosine of pseudo-Fishers", (first.pseudo_fishers.double() @ second.pseudo_fishers.double().T).abs()
    raise ValueError("the two decompositions share neither examples nor the sketch, so they cannot be compared")


@dataclass(frozen=True)
class Baseline:
    """The similarity of two fits of the same rows from different starts, as a baseline for a comparison.

    Attributes:
        similarity: {component: the similarity with its match in the other fit}, by the measure of the comparison.
        explained: the share that the other fit explains.
        lowest: the 5% quantile of the similarities.
    """

    similarity: dict[int, float]
    explained: float
    lowest: float


def baseline(decomposition: Decomposition, pefs: PEFs, *, of_coefficients: bool) -> Baseline:
    """Fit the rows of a decomposition again from another start, and match the two.

    Args:
        decomposition: the decomposition of `pefs`.
        pefs: the PEFs that were decomposed.
        of_coefficients: whether to compare coefficients; otherwise pseudo-Fishers are compared.

    Raises:
        IncompatibleSketchError: if the PEFs have another sketch.
        ValueError: if they are of other examples.
    """
    check_same_sketch(decomposition, pefs)
    if pefs.example_ids != decomposition.example_ids:
        raise ValueError("these PEFs are not those of the decomposition: their example ids differ")
    config = decomposition.config
    again = NPEFF.from_config(replace(config, seed=config.seed + 1)).fit(pefs)
    if of_coefficients:
        _, S = similarities(decomposition, again)
    else:
        S = (decomposition.pseudo_fishers.double() @ again.pseudo_fishers.double().T).abs()
    similarity = {i: s for i, _, s in matches(S)}
    lowest = float(torch.quantile(torch.tensor(list(similarity.values()), dtype=torch.float64), 0.05))
    return Baseline(similarity, again.explained, lowest)


def matches(S: Tensor) -> list[tuple[int, int, float]]:
    """Match components one to one: (the first's component, the second's, similarity), the most similar first.

    The sum of similarities is the largest possible. Without scipy, pairs are matched greedily, the most similar first.

    Args:
        S: (r, r′), the similarity of every pair.
    """
    return sorted(((i, j, float(S[i, j])) for i, j in _assignment(S)), key=lambda pair: -pair[2])


def _assignment(S: Tensor) -> list[tuple[int, int]]:
    if find_spec("scipy") is not None:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(S.numpy(), maximize=True)
        return list(zip(rows.tolist(), columns.tolist(), strict=True))
    pairs, left = [], S.clone()
    for _ in range(min(S.shape)):
        i, j = divmod(int(left.argmax()), S.shape[1])
        pairs.append((i, j))
        left[i], left[:, j] = -math.inf, -math.inf
    return pairs
