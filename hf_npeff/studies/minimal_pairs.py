"""Several factors by minimal pairs: where one factor changes, does the one feature move that is for it, and no other?

Every attribute gets a feature of its own, one to one, on half of the bases. On pairs of the other half that differ in
exactly one factor, features are asked how far they move. A pair's margin is (right − wrong) / (right + wrong): right is
how far the attribute's own feature rises, wrong how far the feature moves that moves most of all others, in units of
each feature's spread over the examples. It is 1 where nothing else moves, 0 where another moves as far, −1 where the
right one does not rise, also where nothing moves. Then the halves change places.
"""

from __future__ import annotations

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
    """One pair, as one method sees it.

    Attributes:
        attribute: what the first example has and the second lacks.
        base: what both share.
        margin: see the module.
        hit: whether the right feature moves further than every other.
    """

    attribute: str
    base: str
    margin: float
    hit: bool


def assigned(W: Tensor, have: Tensor, choose: Tensor) -> tuple[list[int], list[float]]:
    """A feature for every attribute, one to one, so that the sum of AUROCs on `choose` is largest; and their AUROCs.

    Args:
        W: (n, r) coefficients.
        have: (n, a) bool.
        choose: (n,) bool; attributes of one class there count as AUROC 0.5 with every feature.

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
    """A pair's margin from how far every feature moves (r,), and whether the right one moves furthest.

    Args:
        change: of the second example to the first, in units of each feature's spread.
        right: the number of the feature that should rise.
        apart: features that are not counted as wrong, because the other example's value is theirs.
    """
    others = torch.ones(len(change), dtype=torch.bool)
    others[[right, *apart]] = False
    rises = max(float(change[right]), 0.0)
    wrong = float(change[others].abs().max()) if bool(others.any()) else 0.0
    return ((rises - wrong) / (rises + wrong) if rises > 0 else -1.0), rises > wrong


def pair_margins(
    layers: Sequence[Tensor], have: Tensor, names: Sequence[str], pairs: Sequence[Pair], bases: Sequence[str], seed: int
) -> dict[str, list[Margin]]:
    """Every pair's margin: {"one layer": the layer that is best for all, "layer by attribute": the best for each}.

    Args:
        layers: coefficients (n, r), a tensor a layer; where there is one, both results are the same.
        have: (n, a) bool.
        names: the a attributes.
        pairs: the pairs.
        bases: the base of every example.
        seed: the seed of the halves.
    """
    scale = [W.double().std(0) for W in layers]
    found: dict[str, list[Margin]] = {"one layer": [], "layer by attribute": []}
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
                found[way].append(Margin(pair.attribute, pair.base, *margin_of(change, features[a], apart)))
    return found


def folds(bases: Sequence[str], have: Tensor, seed: int) -> list[tuple[Tensor, set[str]]]:
    """Twice: who is chosen on (n,) bool, and the bases that are measured; bases of the same attributes are halved.

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

    The interval is a percentile bootstrap of the mean over attributes, whole bases drawn with replacement, since the
    pairs of a base share examples.

    Args:
        margins: of one method, at least one; bases of several seeds need names of their own.
        draws: bootstrap samples.
        seed: the seed of the samples.

    Raises:
        ValueError: if there are none.
    """
    if not margins:
        raise ValueError("a summary needs at least one pair")
    names = sorted({m.attribute for m in margins})
    bases = sorted({m.base for m in margins})
    sums, hits, counts = (torch.zeros(len(bases), len(names), dtype=torch.float64) for _ in range(3))
    for m in margins:
        place = bases.index(m.base), names.index(m.attribute)
        sums[place] += m.margin
        hits[place] += m.hit
        counts[place] += 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(bases), (draws, len(bases)), generator=generator)
    weights = torch.zeros(draws, len(bases), dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
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


def shuffled(have: Tensor, seed: int) -> Tensor:
    """The attributes (n, a) of other examples: the control in which a feature cannot be about an attribute."""
    return have[torch.randperm(len(have), generator=torch.Generator().manual_seed(seed))]


def divergences(predictions: Any, pairs: Sequence[Pair]) -> Mapping[str, float]:
    """{factor: mean KL in nats between what the model predicts for the two examples of its pairs}."""
    of_factor: dict[str, list[float]] = {}
    for pair in pairs:
        p, q = (predictions.distribution(predictions.logits[i]) for i in (pair.has, pair.lacks))
        of_factor.setdefault(pair.attribute.split("=")[0], []).append(float(p.kl(q).sum()))
    return {name: statistics.mean(values) for name, values in of_factor.items()}
