"""Row weighting: from stored PEFs to the rows that are decomposed, by balance, matrix power and unit norm."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_npeff.decomposition.objective import module_scales
from hf_npeff.pefs.norms import normalise
from hf_npeff.pefs.store import PEFs


def mixing_of(A: Tensor, scales: Tensor | None, power: float = 1.0) -> Tensor:
    """T (n, c, c), in float64: T (A∘D) are the rows that are decomposed, with Gram matrix F^γ at unit Frobenius norm.

    With K = (A∘D)(A∘D)ᵀ = UΛUᵀ and F = (A∘D)ᵀ(A∘D), the rows UΛ^((γ−1)/2)Uᵀ (A∘D) have the matrix power F^γ as their
    Gram matrix, whatever rotation of the rows was stored. Eigenvalues below rounding are left out.
    """
    scaled = A if scales is None else A * scales.to(A)
    scale = scaled.abs().amax((1, 2), keepdim=True).double()
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = scaled / scale.to(A.dtype)
    K = (scaled @ scaled.mT).double()
    if power == 1:
        norm = K.flatten(1).norm(dim=1)
        unit = torch.eye(A.shape[1], dtype=torch.float64, device=A.device)
        return unit / torch.where(norm > 0, norm, 1.0).sqrt()[:, None, None] / scale
    values, U = torch.linalg.eigh((K + K.mT) / 2)
    kept = (
        values > values[:, -1:] * 1e-6
    )  # smaller eigenvalues of float32 rows are rounding errors, which γ < 1 would enlarge
    safe = torch.where(kept, values, 1.0)
    norm = torch.where(kept, safe.pow(2 * power), 0.0).sum(1).sqrt()
    scales = torch.where(kept, safe.pow((power - 1) / 2), 0.0) / torch.where(norm > 0, norm, 1.0).sqrt()[:, None]
    return (U * scales[:, None]) @ U.mT / scale


def balanced(A: Tensor, scales: Tensor | None, power: float = 1.0) -> Tensor:
    """The rows (n, c, d) that are decomposed, in float32 or wider: those of A∘D with power γ, at unit norm."""
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    if power != 1:
        scaled = A if scales is None else A * scales.to(A)
        return mixing_of(A, scales, power).to(A.dtype) @ scaled
    return A if scales is None else normalise(A * scales.to(A))[0]


def balance_scales(pefs: PEFs) -> Tensor:
    """(d,) the factors D, which divide every module's block by the square root of its mean PEF norm over the examples.

    The PEF of a block is A_bᵀA_b of the unscaled rows; zero blocks have scale 0. D is scaled so that its largest entry
    is 1, since only ratios matter.

    Raises:
        ValueError: if the sketch adds up the numbers of all modules, so that modules cannot be separated.
    """
    blocks = pefs.sketch().blocks if pefs.info.get("sketch") is not None else None
    if blocks is None:
        raise ValueError(
            "balance='module' needs separate numbers for every module; compute the PEFs with sketch='kronecker' or "
            "'identity' (a countsketch adds the modules up), or use balance='none'"
        )
    order = list(blocks.values())
    total = torch.zeros(len(order), dtype=torch.float64)
    n = 0
    for chunk in pefs.chunks(256):  # bounds the memory; sums are of float64
        A = chunk.factors.to(torch.promote_types(chunk.factors.dtype, torch.float32))
        total += module_scales(A, order, chunk.norms) * len(chunk)
        n += len(chunk)
    mean = total / n
    scale = torch.where(mean > 0, mean.clamp_min(torch.finfo(torch.float64).tiny) ** -0.5, 0.0)
    scale = scale / scale.max().clamp_min(torch.finfo(torch.float64).tiny)
    D = torch.zeros(pefs.dim)
    for value, block in zip(scale.tolist(), order, strict=True):
        D[block] = value
    return D
