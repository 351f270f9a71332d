"""The norm of a PEF, from its rows alone."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, c, d) scaled to ‖AAᵀ‖_F = 1, and the norms before, float64 (n,). Zero stays zero."""
    scale = rows.abs().amax((1, 2)).double()
    safe = torch.where(scale > 0, scale, 1.0)
    # In float64 where that is cheap (32 MB); beyond, the scale alone keeps squares from over- and underflow.
    A = (rows.double() / safe[:, None, None]) if rows.numel() < 2**22 else rows / safe[:, None, None].to(rows.dtype)
    gram = (A @ A.mT).double()
    norms = gram.flatten(1).norm(dim=1)
    unit = A / torch.where(norms > 0, norms, 1.0).sqrt()[:, None, None].to(A.dtype)
    return unit.to(rows.dtype), norms * scale**2
