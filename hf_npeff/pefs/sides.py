"""The sides of a sketch: seeded maps P from n numbers to k with E[PᵀP] = I; a gradient gets two, P_out G P_inᵀ.

    rotated    a Haar-random semi-orthogonal matrix, scaled by √(n/k)
    folded     blocks of k numbers, each with random signs, turned cyclically by a random offset, added up

Folding keeps inner products as well as a rotation does: in the mean over the draws ⟨Pa, Pb⟩ of unit a and b has a
variance of at most (1 + ⟨a, b⟩² − 2 Σ aᵢ²bᵢ²) / k, of which the last term is what few massive numbers are spared. It
reads every number once where a rotation multiplies it k times. The offsets are random, since activations that are
massive at one place of many heads or groups, a whole block apart, would otherwise meet in one sum in every example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Side(Protocol):
    """A map from n numbers to k.

    Attributes:
        size: k.
    """

    size: int

    def times(self, x: Tensor, start: int = 0) -> Tensor:
        """P x for x (…, w), which are the numbers from `start` on, the others being zero: (…, k)."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Pᵀ y: (…, k) → (…, n)."""

    def to(self, device: torch.device | str) -> Side:
        """The same on another device."""


class RotatedSide:
    """Rows of a random orthogonal basis, of length √(n/k): E[PᵀP] = I by rotational symmetry."""

    def __init__(self, n: int, k: int, generator: torch.Generator):
        basis, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
        self.size = k
        self._matrix = (basis.T * (n / k) ** 0.5).to(torch.float32).contiguous()
        self._columns: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def times(self, x: Tensor, start: int = 0) -> Tensor:
        """See `Side`."""
        key = x.device, x.dtype
        if key not in self._columns:  # turned into the type of x once
            self._columns[key] = self._matrix.to(x.device, x.dtype).T
        return x @ self._columns[key][start : start + x.shape[-1]]

    def adjoint(self, y: Tensor) -> Tensor:
        """See `Side`."""
        return y @ self._matrix.to(y.device, y.dtype)

    def to(self, device: torch.device | str) -> RotatedSide:
        """See `Side`."""
        self._matrix = self._matrix.to(device)
        self._columns.clear()
        return self


class FoldedSide:
    """A countsketch of blocks: PᵀP has ones on its diagonal, and ±1 where two numbers meet, of mean zero."""

    def __init__(self, n: int, k: int, generator: torch.Generator):
        self.size = k
        self._signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8).float() * 2 - 1
        self._turns: Sequence[int] = torch.randint(0, k, (-(-n // k),), generator=generator).tolist()
        self._columns: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def times(self, x: Tensor, start: int = 0) -> Tensor:
        """See `Side`. Sums are in 32 bits or more."""
        if x.device.type != "cpu":
            return x @ self._dense(x)[start : start + x.shape[-1]]
        k, stop = self.size, start + x.shape[-1]
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(len(flat), 2 * k, dtype=wide)
        for block in range(start // k, -(-stop // k)):
            first, last = max(start, block * k), min(stop, (block + 1) * k)
            place = self._turns[block] + first - block * k
            part = flat[:, first - start : last - start].to(wide)
            total[:, place : place + last - first].addcmul_(part, self._signs[first:last].to(wide))
        return (total[:, :k] + total[:, k:]).to(x.dtype).reshape(*x.shape[:-1], k)

    def _dense(self, x: Tensor) -> Tensor:
        """Pᵀ (n, k), in the type of x: a GPU multiplies by it sooner than it starts a kernel for every block."""
        key = x.device, x.dtype
        if key not in self._columns:
            unit = torch.eye(self.size, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
            self._columns[key] = self.adjoint(unit).T.to(x.dtype)
        return self._columns[key]

    def adjoint(self, y: Tensor) -> Tensor:
        """See `Side`."""
        twice = torch.cat([y, y], -1)
        blocks = torch.cat([twice[..., turn : turn + self.size] for turn in self._turns], -1)
        return blocks[..., : len(self._signs)] * self._signs.to(y.device, y.dtype)

    def to(self, device: torch.device | str) -> FoldedSide:
        """See `Side`: the signs go where they are needed when they are."""
        self._columns.clear()
        return self
