"""Replaces an example's cotangents by fewer ones for the same combinations, which saves backward passes.

For r combinations Σ_ic β_jic A_ic, an example needs no more rows than the rank of the matrix β_·i (r × c). With N_i the
diagonal of the norms of its rows and β_·i N_i = U S Vᵀ, the leading k columns V_k of V leave

    β_·i A_i ≈ (β_·i N_i V_k) (V_kᵀ N_i⁻¹ A_i),

and V_kᵀ N_i⁻¹ A_i are the rows of the cotangents V_kᵀ N_i⁻¹ v_i, because rows are linear in cotangents. The loss is
measured in the sketch, over all examples together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.row_space import combined_rows, unscaled_rows

ROUNDING, ESTIMATED = 1e-5, 1.4e-2
"""The largest loss of a combination, as a share of its norm: no more than rounding, or, if the result is an estimate
anyway, a cosine of .9999, a tenth of the loss of cuts from thin sums. Measured on a MiniLM with four rows: three leave
.99995 of 64 plain components, and .3 of the least of 64 selective ones."""


def with_fewer_cotangents(
    pefs: PEFs, cotangents: Tensor, coefficients: Tensor, tolerance: float = ROUNDING
) -> tuple[Tensor, Tensor]:
    """Cotangents and coefficients of the same combinations, with as few rows of every example as possible.

    Args:
        pefs: n examples of c rows.
        cotangents: (n, c, t, s), those of the rows.
        coefficients: (r, n, c) float64, of unscaled rows.
        tolerance: the largest loss of each combination, as a share of its norm.

    Returns:
        (n, k, t, s) and (r, n, k); the inputs themselves if k is c.
    """
    like = torch.empty(0, dtype=torch.float32, device=pefs.device)
    norms = torch.cat([A.norm(dim=-1).double().cpu() for A in unscaled_rows(pefs, None, like)])
    _, _, Vh = torch.linalg.svd((coefficients * norms).transpose(0, 1), full_matrices=False)  # (n, min(r, c), c)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    target = None
    into, back = norms[..., None] * Vh.mT, Vh * inverse[:, None]
    k, most = min(Vh.shape[1], pefs.rank), pefs.rank
    while k > 1:
        # β of the unscaled rows again, without the directions beyond k − 1
        left = (coefficients.transpose(0, 1) @ into[..., : k - 1] @ back[:, : k - 1]).transpose(0, 1)
        target = combined_rows(pefs, coefficients, None, like) if target is None else target
        lost = (target - combined_rows(pefs, left, None, like)).norm(dim=1)
        if bool((lost > tolerance * target.norm(dim=1)).any()):
            break
        k -= 1
    if k == most:
        return cotangents, coefficients
    wide = torch.promote_types(cotangents.dtype, torch.float32)
    mixing = back[:, :k].to(cotangents.device, wide)
    mixed = torch.einsum("nkc,ncts->nkts", mixing, cotangents.to(wide))
    return mixed, (coefficients.transpose(0, 1) @ into[..., :k]).transpose(0, 1)
