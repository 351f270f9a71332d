"""Rows of PEFs whitened by curvature: by K-FAC, module by module, or by the whole Fisher of the same examples.

NPEFF compares PEFs by ⟨F_i, F_j⟩, in which directions that move every example count most. In whitened coordinates
θ̃ = F^½ θ, with F the mean PEF of all examples, every direction moves the examples together alike. K-FAC (Martens and
Grosse, arXiv 1503.05671) takes the F of a module as L ⊗ R / tr L, here with L = mean of Σ_c DDᵀ and R = mean of Σ_c DᵀD
over the examples' rows D (p, q) of that module, so that a row becomes √(tr L) (L + λ_L)^{-1/2} D (R + λ_R)^{-1/2}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_npeff.pefs.store import PEFs


def kfac_whitened(pefs: PEFs, ridge: float) -> PEFs:
    """PEFs whose rows are whitened by K-FAC, module by module, at unit norm.

    Args:
        pefs: n of them, with a block of numbers for every module.
        ridge: λ of each side, as a share of the mean eigenvalue of L and of R.

    Raises:
        ValueError: if the ridge is not positive, or the modules share their numbers.
    """
    sketch = pefs.sketch() if pefs.info.get("sketch") is not None else None
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, but it is {ridge}")
    if sketch is None or sketch.blocks is None:
        raise ValueError(
            "K-FAC needs a block of numbers for every module; compute the PEFs with sketch='kronecker' or 'identity'"
        )
    lengths = pefs.norms.double().sqrt()
    made = torch.zeros(pefs.factors.shape)
    for name, block in sketch.blocks.items():
        sides = sketch.shapes[name]
        most = sketch.setting if sketch.kind == "kronecker" and sketch.setting is not None else max(sides)
        p, q = (min(side, most) for side in sides)
        D = pefs.factors[..., block].reshape(len(pefs), -1, p, q).double() * lengths[:, None, None, None]
        L = torch.einsum("ncpq,ncrq->pr", D, D) / len(pefs)
        R = torch.einsum("ncpq,ncpr->qr", D, D) / len(pefs)
        trace = float(L.trace())
        if trace > 0:
            D = trace**0.5 * (_inverse_root(L, ridge) @ D @ _inverse_root(R, ridge))
        made[..., block] = D.flatten(2).float()
    return PEFs.from_factors(made)


def _inverse_root(M: Tensor, ridge: float) -> Tensor:
    """(M + λI)^{-1/2} of M (k, k), with λ a share of its mean eigenvalue."""
    values, vectors = torch.linalg.eigh(M)
    return (vectors / (values.clamp_min(0) + ridge * values.mean()).sqrt()) @ vectors.T


def fully_whitened(pefs: PEFs, ridge: float) -> PEFs:
    """PEFs whose rows are whitened by the mean PEF F of the same examples, (F + λI)^{-1/2}, at unit norm.

    Args:
        pefs: n of them.
        ridge: λ as a share of the mean of F's eigenvalues that are not rounding.

    Raises:
        ValueError: if the ridge is not positive.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, but it is {ridge}")
    lengths = pefs.norms.double().sqrt()
    rows = (pefs.factors.double() * lengths[:, None, None]).flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows @ rows.T / len(pefs))  # those of F, on the span of the rows
    kept = values > values.max() * 1e-6  # below, eigenvalues of float32 rows are rounding
    values, vectors = values[kept], vectors[:, kept]
    # Rows in the coordinates of F's eigenvectors are vectors · √(n · values)
    made = vectors * (len(pefs) * values / (values + ridge * values.mean())).sqrt()
    return PEFs.from_factors(made.reshape(*pefs.factors.shape[:2], -1).float())
