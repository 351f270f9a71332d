"""Minimal pairs: if one factor of an example changes, does the feature of that factor move, and no other feature?

Half of the bases is used to assign a feature to each attribute, one to one. The other half is measured, on pairs of
examples that differ in exactly one factor. A pair's margin is (right − wrong) / (right + wrong). "Right" is how far the
attribute's own feature rises. "Wrong" is how far another feature moves, for the one that moves most. Both are in units
of each feature's standard deviation over the examples. The margin is 1 if no other feature moves, 0 if another moves as
far, and −1 if the right feature does not rise. Then the two halves change places.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import INTERVAL
from hf_npeff.extras import load
from hf_npeff.studies.measures import aurocs
from hf_npeff.studies.pair_data import Pair


@dataclass(frozen=True)
class Margin:
    """The margin of one pair under one method.

    Attributes:
        attribute: the attribute that the first example has and the second lacks.
        base: the base that both share.
        margin: (right − wrong) / (right + wrong), as the module's docstring defines it.
        hit: whether the right feature moves further than every other feature.
    """

    attribute: str
    base: str
    margin: float
    hit: bool


def assigned(W: Tensor, have: Tensor, choose: Tensor) -> tuple[list[int], list[float]]:
    """A feature for each attribute, one to one, with the largest sum of AUROCs on `choose`; and these AUROCs.

    Args:
        W: (n, r) coefficients.
        have: (n, a) bool.
        choose: (n,) bool; if all of these examples have an attribute, or all lack it, its AUROC counts as 0.5.

    Raises:
        ValueError: if there are more attributes than features.
        ModuleNotFoundError: if scipy is not installed.
    """
    if have.shape[1] > W.shape[1]:
        raise ValueError(f"{have.shape[1]} attributes need as many features of their own, but there are {W.shape[1]}")
    here = have[choose]
    table = torch.full((have.shape[1], W.shape[1]), 0.5, dtype=torch.float64)
    for a in range(have.shape[1]):
        if 0 < int(here[:, a].sum()) < len(here):
            table[a] = aurocs(W[choose], here[:, a])
    optimize = load("scipy.optimize", "matching one to one")
    rows, columns = optimize.linear_sum_assignment(table.numpy(), maximize=True)
    assert list(rows) == list(range(have.shape[1]))
    return [int(j) for j in columns], table[torch.from_numpy(rows), torch.from_numpy(columns)].tolist()


def margin_of(change: Tensor, right: int, apart: Sequence[int]) -> tuple[float, bool]:
    """A pair's margin, and whether the right feature moves furthest.

    Args:
        change: (r,) how far every feature moves from the second example to the first, in units of its standard
            deviation.
        right: the number of the feature that should rise.
        apart: features that do not count as wrong, because they belong to the attribute of the second example.
    """
    others = torch.ones(len(change), dtype=torch.bool)
    others[[right, *apart]] = False
    rises = max(float(change[right]), 0.0)
    wrong = float(change[others].abs().max()) if bool(others.any()) else 0.0
    return ((rises - wrong) / (rises + wrong) if rises > 0 else -1.0), rises > wrong


def pair_margins(
    layers: Sequence[Tensor], have: Tensor, names: Sequence[str], pairs: Sequence[Pair], bases: Sequence[str], seed: int
) -> dict[str, list[Margin]]:
    """Every pair's margin, read at one layer and at a layer for each attribute.

    Returns:
        {"one layer": margins at the best layer for all attributes, "layer by attribute": margins at the best layer
        for each}.

    Args:
        layers: coefficients (n, r), a tensor for each layer. With one layer both results are the same.
        have: (n, a) bool.
        names: the names of the a attributes.
        pairs: the pairs.
        bases: the base of every example.
        seed: the seed of the halves.
    """
    scale = [W.double().std(0) for W in layers]
    margins: dict[str, list[Margin]] = {"one layer": [], "layer by attribute": []}
    for choose, measured in folds(bases, have, seed):
        chosen = [assigned(W, have, choose) for W in layers]
        best = max(range(len(layers)), key=lambda i: sum(chosen[i][1]))
        each = [max(range(len(layers)), key=lambda i: chosen[i][1][a]) for a in range(len(names))]
        for pair in pairs:
            if pair.base not in measured:
                continue
            a = names.index(pair.attribute)
            for way, layer in (("one layer", best), ("layer by attribute", each[a])):
                features = chosen[layer][0]
                apart = [] if pair.instead is None else [features[names.index(pair.instead)]]
                moved = (layers[layer][pair.has] - layers[layer][pair.lacks]).double()
                change = torch.where(scale[layer] > 0, moved / scale[layer].clamp_min(1e-300), 0.0)
                margins[way].append(Margin(pair.attribute, pair.base, *margin_of(change, features[a], apart)))
    return margins


def folds(bases: Sequence[str], have: Tensor, seed: int) -> list[tuple[Tensor, set[str]]]:
    """Two folds. Bases with the same attributes are divided evenly between them.

    Returns:
        For each fold, (n,) bool for the examples on which features are chosen, and the bases that are measured.

    Args:
        bases: the base of every example.
        have: (n, a) bool.
        seed: the seed of the order within bases of the same attributes.
    """
    each = sorted(set(bases))
    ranks = torch.randperm(len(each), generator=torch.Generator().manual_seed(seed)).tolist()
    some = {base: have[[b == base for b in bases]].any(0).tolist() for base in each}
    order = sorted(each, key=lambda base: (some[base], ranks[each.index(base)]))
    halves = [set(order[0::2]), set(order[1::2])]
    return [(torch.tensor([base in halves[1 - fold] for base in bases]), halves[fold]) for fold in (0, 1)]


def summary(margins: Sequence[Margin], *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The mean margin and its interval, the share of hits, and every attribute's mean; attributes count equally.

    The interval is a percentile bootstrap of the mean over attributes. Whole bases are drawn with replacement, because
    the pairs of a base share examples.

    Args:
        margins: the margins of one method, at least one; bases of different seeds need different names.
        draws: the number of bootstrap samples.
        seed: the seed of the bootstrap samples.

    Raises:
        ValueError: if there are none.
    """
    if not margins:
        raise ValueError("a summary needs at least one pair")
    names = sorted({m.attribute for m in margins})
    bases = sorted({m.base for m in margins})
    place_of = {base: i * len(names) for i, base in enumerate(bases)}
    column_of = {name: i for i, name in enumerate(names)}
    totals = [[0.0] * (len(bases) * len(names)) for _ in range(3)]
    for m in margins:
        place = place_of[m.base] + column_of[m.attribute]
        for total, value in zip(totals, (m.margin, m.hit, 1.0), strict=True):
            total[place] += value
    sums, hits, counts = torch.tensor(totals, dtype=torch.float64).reshape(3, len(bases), len(names))
    weights = _drawn(len(bases), draws, seed)
    means = (weights @ sums) / (weights @ counts)  # an attribute that no drawn base has is left out of that draw
    low, high = torch.quantile(means.nanmean(1), torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    by_attribute = (sums.sum(0) / counts.sum(0)).tolist()
    return {
        "margin": statistics.mean(by_attribute),
        "low": low,
        "high": high,
        "hits": statistics.mean((hits.sum(0) / counts.sum(0)).tolist()),
        "pairs": len(margins),
        "attributes": dict(zip(names, by_attribute, strict=True)),
    }


@functools.lru_cache(maxsize=8)  # every method of a study is asked about the same bases
def _drawn(n: int, draws: int, seed: int) -> Tensor:
    """How often each of n bases is in each bootstrap sample (draws, n)."""
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws, n, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def shuffled(have: Tensor, seed: int) -> Tensor:
    """The attributes (n, a), permuted over the examples. In this control no feature can be about an attribute."""
    return have[torch.randperm(len(have), generator=torch.Generator().manual_seed(seed))]


def divergences(predictions: Any, pairs: Sequence[Pair]) -> Mapping[str, float]:
    """{factor: the mean KL, in nats, between the model's predictions for the two examples of a pair}."""
    of_factor: dict[str, list[float]] = {}
    for pair in pairs:
        p, q = (predictions.distribution(predictions.logits[i]) for i in (pair.has, pair.lacks))
        of_factor.setdefault(pair.attribute.split("=")[0], []).append(float(p.kl(q).sum()))
    return {name: statistics.mean(values) for name, values in of_factor.items()}
