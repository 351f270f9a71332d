"""Data sets of per-example Fishers whose true components are known."""

from __future__ import annotations

import scipy.optimize
import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHUNK = 256


def planted(
    n: int, c: int, d: int, r: int, *, overlap: float, noise: float, active: int, seed: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PEF factors made of r planted directions, the directions, and how much of each is in each example.

    F_i = Σ_j W_ij g_j g_jᵀ + N_i: `active` components of each example have a weight uniform in [0.5, 1.5), the noise
    N_i is the Fisher of c normal rows with ‖N_i‖_F = `noise` × ‖the rest‖_F. F_i is then reduced to its best c rows
    and scaled to unit Frobenius norm, W_ij with it.

    Args:
        n: Examples.
        c: Rows kept of each.
        d: Their length.
        r: Planted components.
        overlap: The cosine of any two planted directions: exact while r < d, on average above.
        noise: 0 for none.
        active: Components of each example, at most r; every component is in about n·active/r examples.
        seed: The same seed gives the same data on the same device.
        device: Where everything is made and returned.

    Returns:
        Factors (n, c, d) in float32, directions (r, d) and weights (n, r) in float64. The weights are of the
        unreduced F_i: with no noise and `active` ≤ c they are exact.
    """
    generator = torch.Generator(device).manual_seed(seed)
    directions = _directions(r, d, overlap, generator)
    order = torch.cat([torch.randperm(r, generator=generator, device=device) for _ in range(-(-n * active // r) + 2)])
    weights = torch.zeros(n, r, dtype=torch.float64, device=device)
    factors = torch.empty(n, c, d, device=device)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        chosen = torch.stack([_distinct(order[i * active :][: 2 * r], active) for i in range(start, stop)])
        w = 0.5 + torch.rand(chosen.shape, generator=generator, dtype=torch.float64, device=device)
        rows = w.sqrt()[..., None] * directions[chosen]
        if noise:
            extra = torch.randn(stop - start, c, d, generator=generator, dtype=torch.float64, device=device)
            extra *= (noise * _fisher_norm(rows) / _fisher_norm(extra)).sqrt()[:, None, None]
            rows = torch.cat([rows, extra], 1)
        reduced = _reduce(rows, c)
        norm = _fisher_norm(reduced)
        factors[start:stop] = (reduced / norm.sqrt()[:, None, None]).float()
        weights[start:stop] = weights[start:stop].scatter(1, chosen, w / norm[:, None])
    return factors, directions, weights


def recovered(G: Tensor, truth: Tensor, threshold: float = 0.9) -> int:
    """Count the true directions with a partner of their own in G at |cosine| > threshold, by linear assignment."""
    cosines = (normalize(truth.double(), dim=1) @ normalize(G.double(), dim=1).T).abs()
    matched = cosines[scipy.optimize.linear_sum_assignment(cosines.numpy(), maximize=True)]
    return int((matched > threshold).sum())


def _directions(r: int, d: int, overlap: float, generator: torch.Generator) -> Tensor:
    """r unit vectors √overlap u_0 + √(1 − overlap) u_j, with u orthonormal where r < d and random otherwise."""
    u = torch.randn(r + 1, d, generator=generator, dtype=torch.float64, device=generator.device)
    u = torch.linalg.qr(u.T).Q.T if r < d else normalize(u, dim=1)
    return normalize(overlap**0.5 * u[:1] + (1 - overlap) ** 0.5 * u[1:], dim=1)


def _distinct(order: Tensor, count: int) -> Tensor:
    """The first `count` different entries of `order`."""
    return torch.tensor(list(dict.fromkeys(order.tolist()))[:count], device=order.device)


def _fisher_norm(rows: Tensor) -> Tensor:
    """‖AᵀA‖_F = ‖AAᵀ‖_F of every example."""
    return (rows @ rows.transpose(1, 2)).flatten(1).norm(dim=1)


def _reduce(rows: Tensor, c: int) -> Tensor:
    """The best c rows of every example, by eigenvectors of the rows' Gram matrix; zeros where there are fewer."""
    if rows.shape[1] > c:
        _, U = torch.linalg.eigh(rows @ rows.mT)
        return U[..., -c:].mT @ rows
    return torch.cat([rows, rows.new_zeros(len(rows), c - rows.shape[1], rows.shape[2])], 1)
