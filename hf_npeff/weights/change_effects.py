"""The effects of a change on components: KL compared with random changes, cosines, growth.

The KL of a component is the mean over examples weighted by their coefficients, KL_j = Σ_i W_ij KL_i / Σ_i W_ij. A
component whose examples are sensitive has a large KL under any change, so it is compared with random changes of equal
norm. For these, KL_i = ½ Σ_c ⟨A_ic, δ⟩², where ⟨A_ic, δ⟩ is Gaussian with covariance AAᵀ‖δ‖²/p. The sketched rows give
this covariance up to the sketch's error: ⟨SA_ic, z⟩ with a normal z in the sketch. The p-value of a component is the
share of random changes that give it at least as large a share of the KL, KL_j / Σ_l KL_l, as the change does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_npeff.config import INTERVAL
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.lifting import combination

Growth = Literal["grew", "shrank", "appeared", "vanished", "stayed"]
_BOOTSTRAPS = 1000
"""Draws of an interval. Chosen: 25 of them lie beyond each end."""
_CHUNK = 256
"""Examples at a time: bounds the memory."""
RANDOM = 4
"""How many random changes a cosine is compared with for its p-value. An even number, so that Student's t has a closed
form. More would cost as much each and narrow the t less: 95% lie below 2.8 with 4, and below 2.3 with 8."""
_GONE = 0.05
"""A component has vanished below this share of its mean coefficient. Chosen: the same share as for being active."""


def weighted_means(W: Tensor, values: Tensor) -> Tensor:
    """Σ_i W_ij values_i / Σ_i W_ij of W (n, r) and values (n,) or (n, draws): (r,) or (r, draws); 0 without weights."""
    W = W.double()
    total = W.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    means = W.T @ values.double()
    return means / (total if values.dim() == 1 else total[:, None])


def one_after_another(W: Tensor, kl: Tensor) -> list[tuple[int, float]]:
    """All components, ordered by the KL that the components before them do not account for, and this KL.

    Two components of one behaviour would count the same examples' KL twice. So the share W_ij / Σ_l W_il of each chosen
    component is subtracted from every example, and the next component is the one with the largest mean of the rest,
    weighted by its W.

    Args:
        W: the coefficients (n, r).
        kl: the KL (n,) of the change.

    Returns:
        (component, remaining mean KL in nats) in order; the first one has its whole mean KL.
    """
    W = W.double()
    shares = W / W.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    left, chosen = kl.double().clone(), list[tuple[int, float]]()
    open_ = torch.ones(W.shape[1], dtype=torch.bool)
    for _ in range(W.shape[1]):
        means = weighted_means(W, left).masked_fill(~open_, -math.inf)
        j = int(means.argmax())
        chosen.append((j, float(means[j])))
        open_[j] = False
        left = left - shares[:, j] * kl
    return chosen


def bootstrap_counts(n: int, seed: int) -> Tensor:
    """(draws, n) how often each of n examples is in a sample of n with replacement, float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (_BOOTSTRAPS, n), generator=generator)
    return torch.zeros(_BOOTSTRAPS, n, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())


def intervals_of(values: Tensor) -> list[tuple[float, float]]:
    """95% of every column of (draws, r)."""
    ends = torch.quantile(values, torch.tensor(INTERVAL, dtype=values.dtype), dim=0)
    return [(low, high) for low, high in ends.T.tolist()]


def kl_intervals(W: Tensor, kl: Tensor, counts: Tensor) -> list[tuple[float, float]]:
    """95% bootstrap intervals of KL_j, over examples."""
    W = W.double()
    above, below = counts @ (W * kl.double()[:, None]), counts @ W
    return intervals_of(above / below.clamp_min(torch.finfo(torch.float64).tiny))


def random_kl(pefs: PEFs, draws: int, seed: int) -> Tensor:
    """KL (n, draws) that random changes make, to second order and up to one factor for all, from the sketched rows."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(pefs.dim, draws, generator=generator)
    kl = torch.zeros(len(pefs), draws)
    for here, chunk in pefs.placed_chunks(_CHUNK):
        rows = chunk.factors.float() @ z.to(chunk.factors.device)
        kl[here] = (rows.square().sum(1) / 2).cpu() * chunk.norms.float()[:, None].cpu()
    return kl


def kl_p_values(W: Tensor, kl: Tensor, null: Tensor) -> tuple[list[float], list[float]]:
    """The p-value of every component's share of the KL, and this share over the mean share under random changes.

    Args:
        W: the coefficients (n, r).
        kl: the KL (n,) of the change.
        null: the KL (n, draws) of random changes.
    """
    observed, random = weighted_means(W, kl), weighted_means(W, null)
    tiny = torch.finfo(torch.float64).tiny
    observed = observed / observed.sum().clamp_min(tiny)
    random = random / random.sum(0).clamp_min(tiny)
    p = (1 + (random >= observed[:, None]).sum(1)).double() / (1 + random.shape[1])
    return p.tolist(), (observed / random.mean(1).clamp_min(tiny)).tolist()


@dataclass(frozen=True)
class Cosines:
    """⟨g_j, Δ⟩ / (‖g_j‖ ‖Δ‖) of every component with a change.

    Attributes:
        values: (r,) with sign; the sign of a component has no meaning.
        stationary: (r,) cosine of each component with the combination of rows that represents it: near 1 if the
            decomposition converged.
    """

    values: list[float]
    stationary: list[float]


def cosines(decomposition: Decomposition, pefs: PEFs, products: Tensor, norm: float) -> list[Cosines]:
    """The exact cosine of every component, as exact lifting would give it, with several changes.

    Args:
        decomposition: the decomposition of `pefs`.
        pefs: the PEFs that were decomposed.
        products: ⟨A_ic, Δ_m⟩ of unscaled rows (n, c, m).
        norm: ‖Δ_m‖ of each change over the analysed weights.
    """
    coefficients, stationary = combination(decomposition, pefs)
    lifted = torch.zeros(len(decomposition), pefs.dim, dtype=torch.float64)
    for here, chunk in pefs.placed_chunks(_CHUNK):
        rows = chunk.factors.double() * chunk.norms.double().sqrt()[:, None, None]
        lifted += coefficients[:, here].flatten(1).to(rows.device).cpu() @ rows.flatten(0, 1).cpu()
    lengths = lifted.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    along = torch.einsum("jic,icm->jm", coefficients, products) / lengths[:, None]
    made = []
    for m in range(products.shape[-1]):
        values = (along[:, m] / norm).clamp(-1, 1) if norm else torch.zeros(len(along), dtype=torch.float64)
        made.append(Cosines(values.tolist(), stationary.tolist()))
    return made


def cosine_p(value: float, random: Sequence[float]) -> float:
    """Two-sided p-value of a cosine, compared with random changes that have the change's norm in every weight.

    The inner product of a random change with a component is normal with mean 0, and so is that of a change whose
    directions are unrelated to the component's. So the ratio of the cosine to the root mean square of four random ones
    is Student's t of 4 degrees of freedom, whose distribution function is 1/2 + 3/8 u (1 − u²/12) with
    u = t / √(1 + t²/4).

    Args:
        value: the cosine of the change.
        random: the cosines of four random changes.

    Raises:
        ValueError: if there are not four of them.
    """
    if len(random) != RANDOM:
        raise ValueError(f"expected the cosines of {RANDOM} random changes, but got {len(random)}")
    scale = math.sqrt(sum(x * x for x in random) / len(random))
    if scale == 0:
        return 1.0 if value == 0 else 0.0
    t = abs(value) / scale
    u = t / math.sqrt(1 + t * t / 4)
    return max(0.0, 1 - 0.75 * u * (1 - u * u / 12))


def growth(before: Tensor, after: Tensor, counts: Tensor) -> tuple[list[Growth], list[tuple[float, float]]]:
    """What became of every component, and the 95% interval of the change of its mean coefficient.

    Args:
        before: the coefficients W (n, r) of the examples' PEFs before the change.
        after: their coefficients after the change, for the same components.
        counts: the counts of the bootstrap, see `bootstrap_counts`.
    """
    difference = after.double() - before.double()
    intervals = intervals_of(counts @ difference / len(difference))
    old, new = before.double().mean(0).tolist(), after.double().mean(0).tolist()
    active = [active_examples(W).any(0).tolist() for W in (before, after)]
    kinds: list[Growth] = []
    for j, (low, high) in enumerate(intervals):
        if low <= 0 <= high:
            kinds.append("stayed")
        elif high < 0:
            kinds.append("vanished" if new[j] < _GONE * old[j] or not active[1][j] else "shrank")
        else:
            kinds.append("appeared" if old[j] < _GONE * new[j] or not active[0][j] else "grew")
    return kinds, intervals
