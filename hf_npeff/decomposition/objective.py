"""The objective of NPEFF and its pieces, as pure functions of a few small matrices.

    L(W, G) = Σ_i ‖F_i − Σ_j W_ij g_j g_jᵀ‖²_F
            = Σ_i ‖A_iA_iᵀ‖²_F − 2 Σ_ij W_ij N_ij + ⟨WᵀW, H⟩,     N_ij = ‖A_i g_j‖²,  H = (GGᵀ)∘(GGᵀ)

No d×d matrix is formed. The terms cancel, so sums over examples are taken in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 32
"""How many columns of W a sweep updates as one block. Chosen by speed; the result of a sweep does not depend on it."""


def total_energy(A: Tensor) -> Tensor:
    """Σ_i ‖A_iA_iᵀ‖²_F of rows A (n, c, d), float64."""
    return (A @ A.mT).double().square().sum()


def alignments(A: Tensor, G: Tensor) -> Tensor:
    """B_icj = ⟨A_ic, g_j⟩: (n, c, r)."""
    return A @ G.T


def energies(B: Tensor) -> Tensor:
    """N_ij = ‖A_i g_j‖² from alignments (n, c, r): (n, r)."""
    return B.square().sum(1)


def overlaps(G: Tensor) -> Tensor:
    """H = (GGᵀ)∘(GGᵀ): ⟨g_j g_jᵀ, g_l g_lᵀ⟩ (r, r)."""
    return (G @ G.T).square()


def loss_of(total: Tensor, W: Tensor, N: Tensor, H: Tensor) -> Tensor:
    """L, computed from its pieces in float64."""
    gain = (W * N).sum(0, dtype=torch.float64).sum()
    return total - 2 * gain + ((W.T @ W).double() * H.double()).sum()


def pull(A: Tensor, B: Tensor, W: Tensor) -> Tensor:
    """C_j = Σ_i Σ_c W_ij ⟨A_ic, g_j⟩ A_ic: (r, d)."""
    weighted = (W[:, None] * B).to(A.dtype)
    return weighted.flatten(0, 1).T @ A.flatten(0, 1)


def coordinate_descent(W: Tensor, N: Tensor, H: Tensor, sweeps: int, tolerance: float = 0.0) -> Tensor:
    """Sweeps of HALS for min_{W ≥ 0} L: each column of W in turn is set to its minimum, given the others.

    Columns are updated in blocks. The effect of the columns outside a block is one matrix product; the effect of those
    inside is a product with a vector for each. It stops early when a sweep changes no entry by more than `tolerance`
    times the largest entry.
    """
    V = W.T.contiguous()  # a column of W is contiguous
    diagonal = H.diagonal().clamp_min(torch.finfo(H.dtype).tiny)[:, None]
    target, coupling = N.T / diagonal, (H / diagonal).fill_diagonal_(0)
    blocks = []
    for start in range(0, len(V), _BLOCK):
        where = slice(start, start + _BLOCK)
        outside, inside = coupling[where].clone(), coupling[where, where].unbind()
        outside[:, where] = 0
        blocks.append((V[where], target[where], outside, inside))
    for _ in range(sweeps):
        largest = torch.zeros((), device=W.device, dtype=W.dtype)
        for block, wanted, outside, inside in blocks:
            before = block.clone() if tolerance else block
            left = torch.addmm(wanted, outside, V, alpha=-1)
            for column, others, own in zip(block.unbind(), inside, left.unbind(), strict=True):
                torch.clamp_min(torch.addmv(own, block.T, others, alpha=-1), 0, out=column)
            if tolerance:
                largest = torch.maximum(largest, (block - before).abs().max())
        if tolerance and largest <= tolerance * V.max().clamp_min(torch.finfo(W.dtype).tiny):
            break
    return V.T.contiguous()


def nonnegative_coefficients(N: Tensor, H: Tensor) -> Tensor:
    """The W (n, r) ≥ 0 that minimises L for fixed G, in float64 and to convergence. `transform` returns it."""
    N, H = N.double(), H.double()
    # To convergence in float64. The number of sweeps only bounds the time if components are almost equal.
    return coordinate_descent(torch.zeros_like(N), N, H, sweeps=5000, tolerance=1e-10)


def module_scales(A: Tensor, blocks: list[slice], norms: Tensor | None = None) -> Tensor:
    """Mean Frobenius norm of every block's own PEF over the examples: (number of blocks,), float64."""
    total = torch.zeros(len(blocks), dtype=torch.float64)
    for b, block in enumerate(blocks):
        part = A[..., block]
        norm = (part @ part.mT).double().flatten(1).norm(dim=1)
        total[b] = (norm if norms is None else norm * norms).mean()
    return total
