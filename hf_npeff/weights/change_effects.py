"""What a change does to components: KL by component with a null of random changes, cosines, what grew and what shrank.

KL of a component is the mean over examples weighted by their coefficients, KL_j = Σ_i W_ij KL_i / Σ_i W_ij. A component
whose examples are sensitive has a large one whatever changed, so it is compared with random changes of equal norm. For
those KL_i = ½ Σ_c ⟨A_ic, δ⟩² with ⟨A_ic, δ⟩ Gaussian of covariance AAᵀ‖δ‖²/p, which the sketched rows give: with a
normal z in the sketch, ⟨SA_ic, z⟩ has it to the sketch's error. The p-value of a component is the share of random
changes that give it as large a part of the KL, KL_j / Σ_l KL_l, as this one does.
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
"""Random changes that the p-value of a cosine comes from. Even, for a t in closed form; each more costs as much as it
narrows the t less: of 4, 2.8 is beyond 95%, of 8, 2.3."""
_GONE = 0.05
"""Share of its mean coefficient below which a component is gone. Chosen: as where it counts as active."""


def weighted_means(W: Tensor, values: Tensor) -> Tensor:
    """Σ_i W_ij values_i / Σ_i W_ij of W (n, r) and values (n,) or (n, draws): (r,) or (r, draws); 0 without weights."""
    W = W.double()
    total = W.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    means = W.T @ values.double()
    return means / (total if values.dim() == 1 else total[:, None])


def one_after_another(W: Tensor, kl: Tensor) -> list[tuple[int, float]]:
    """All components in the order in which they carry most of what those before them do not, and how much that is.

    Two components of one behaviour have the same examples' KL twice. So from every example the share W_ij / Σ_l W_il of
    each chosen component is taken, and the next one is that with the largest mean of what is left, weighted by its W.

    Args:
        W: (n, r).
        kl: (n,) of the change.

    Returns:
        (component, mean KL left to it, in nats), the first with its whole mean KL.
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
    """Of every component the share of random changes that give it as large a part of the KL, and its part over theirs.

    Args:
        W: (n, r).
        kl: (n,) of the change.
        null: (n, draws) of random changes.
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
        values: (r,) signed; the sign of a component means nothing.
        stationary: (r,) cosine of each component with the combination of rows that it is taken for: near 1 if the
            decomposition converged.
    """

    values: list[float]
    stationary: list[float]


def cosines(decomposition: Decomposition, pefs: PEFs, products: Tensor, norm: float) -> list[Cosines]:
    """The exact cosine of every component, as exact lifting would give it, with several changes.

    Args:
        decomposition: the decomposition of `pefs`.
        pefs: those that were decomposed.
        products: ⟨A_ic, Δ_m⟩ of unscaled rows (n, c, m).
        norm: ‖Δ_m‖ over what is analysed, of each of them.
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
    """Two-sided p-value of a cosine against those of random changes with the norm of the change in every weight.

    The inner product of such a change with a component is normal with mean 0, as that of the change is where its
    directions are none of the component's. So the ratio of the cosine to the root mean square of four random ones is
    Student's t of 4 degrees of freedom, whose distribution function is 1/2 + 3/8 u (1 − u²/12) with
    u = t / √(1 + t²/4).

    Args:
        value: of the change.
        random: of four random changes.

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
    """What became of every component, and the 95% interval of its mean coefficient after less before.

    Args:
        before: W (n, r) of the examples' PEFs before.
        after: the same after, with the same components.
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
