"""One linear, seeded map P from gradients of the parameters to rows of d numbers, with E[PᵀP] = I.

A sketch has two stages, and its kind says which of them do something:

    sides      G (out, in)  →  P_out G P_inᵀ (k_out, k_in)      kronecker, two-stage
    placement  the numbers of all modules  →  one row of d
               side by side, each module its own block          identity, kronecker
               blocked countsketch, all modules summed          countsketch, two-stage

A side is a Haar-random semi-orthogonal matrix scaled by √(n/k), the identity where the dimension n is no larger than
the side k. Blocked countsketch cuts a module's m numbers into blocks of d, gives every number an independent sign,
shifts every block cyclically by a random offset, and adds the blocks up.

Everything random depends on (seed, parameter name, shape) alone and is drawn on the CPU, so a sketch is the same on
every device, in every process and for every batch (METHOD §2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hf_npeff.errors import FormatVersionError

Kind = Literal["kronecker", "countsketch", "two-stage", "identity"]
TWO_STAGE_SIDE = 128
_VERSION = 1


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(json.dumps([_VERSION, *key]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _side(n: int, k: int, generator: torch.Generator) -> Tensor | None:
    """(k, n) with orthogonal rows of length √(n/k), or None for the identity: E[PᵀP] = I by rotational symmetry."""
    if k >= n:
        return None
    basis, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return (basis.T * (n / k) ** 0.5).to(torch.float32).contiguous()


def _multiply_last(x: Tensor, side: Tensor | None) -> Tensor:
    return x if side is None else x @ side.to(x.device, x.dtype).T


@dataclass
class _Block:
    """One parameter's share of a sketch."""

    shape: tuple[int, int]
    sides: tuple[Tensor | None, Tensor | None]
    size: int
    start: int | None  # of its own slice of the row; None where the modules are summed
    signs: Tensor | None = None
    shifts: list[int] = field(default_factory=list)


class Sketch:
    """A fixed random linear map from {parameter name: (out, in) matrix} to rows of `dim` numbers.

    Args:
        shapes: (out, in) of every parameter under analysis, in a fixed order. A parameter that is not a matrix is
            flattened to (its first dimension, the rest).
        kind: "kronecker", "countsketch", "two-stage" or "identity".
        dim: the side of a module's block for "kronecker"; d for "countsketch" and "two-stage"; unused by "identity".
        seed: of everything random.

    Attributes:
        dim: d, the numbers of a row.
        blocks: {parameter name: slice of the row}, or None where modules are summed into one row.
        fingerprint: a hash of everything that fixes the map. Rows of different fingerprints must never meet.

    Raises:
        ValueError: if `kind` is unknown, `shapes` is empty or `dim` is missing.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], kind: Kind, dim: int | None = None, seed: int = 0):
        if kind not in ("kronecker", "countsketch", "two-stage", "identity"):
            raise ValueError(f"unknown kind of sketch {kind!r}")
        if not shapes:
            raise ValueError("a sketch needs at least one parameter; check target_modules")
        if kind == "identity":
            dim = None
        elif dim is None or dim < 1:
            raise ValueError(f"a {kind} sketch needs a positive dim, but it is {dim!r}")
        self.shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in shapes.items()}
        self.kind: Kind = kind
        self.setting = dim
        self.seed = seed
        self._summed = kind in ("countsketch", "two-stage")
        self._parts: dict[str, _Block] = {}
        start = 0
        for name, shape in self.shapes.items():
            part = self._make_block(name, shape, start)
            self._parts[name] = part
            start += part.size
        self.dim: int = dim if self._summed and dim is not None else start
        self.blocks: dict[str, slice] | None = None
        if not self._summed:
            self.blocks = {n: slice(b.start, (b.start or 0) + b.size) for n, b in self._parts.items()}

    def _make_block(self, name: str, shape: tuple[int, int], start: int) -> _Block:
        width = {"kronecker": self.setting, "two-stage": TWO_STAGE_SIDE}.get(self.kind)
        sides: tuple[Tensor | None, Tensor | None] = (None, None)
        if width is not None:
            sides = (
                _side(shape[0], width, _generator(self.seed, name, shape, width, "out")),
                _side(shape[1], width, _generator(self.seed, name, shape, width, "in")),
            )
        rows, columns = (n if side is None else side.shape[0] for n, side in zip(shape, sides, strict=True))
        block = _Block(shape, sides, rows * columns, None if self._summed else start)
        if self._summed:
            d = self.setting or 1
            generator = _generator(self.seed, name, shape, d, "count")
            n_blocks = -(-block.size // d)
            block.signs = torch.randint(0, 2, (n_blocks * d,), generator=generator, dtype=torch.int8) * 2 - 1
            block.shifts = torch.randint(0, d, (n_blocks,), generator=generator).tolist()
        return block

    @property
    def fingerprint(self) -> str:
        """Hex digest of (kind, dim, seed, parameter names and shapes, version of the random streams)."""
        return hashlib.sha256(json.dumps([_VERSION, self.to_dict()]).encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` rebuilds the sketch from, as JSON types."""
        shapes = [[name, list(shape)] for name, shape in self.shapes.items()]
        return {"kind": self.kind, "dim": self.setting, "seed": self.seed, "shapes": shapes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sketch:
        """The same map again.

        Raises:
            FormatVersionError: if `values` was not written by `to_dict`.
        """
        try:
            shapes = {str(name): (int(shape[0]), int(shape[1])) for name, shape in values["shapes"]}
            return cls(shapes, values["kind"], values["dim"], values["seed"])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise FormatVersionError(f"not the description of a sketch: {error!r}") from error

    def to(self, device: torch.device | str) -> Sketch:
        """The sketch itself, its random matrices moved to `device`."""
        for part in self._parts.values():
            part.sides = tuple(s if s is None else s.to(device) for s in part.sides)  # type: ignore[assignment]
            part.signs = part.signs if part.signs is None else part.signs.to(device)
        return self

    # The two halves that hooks call: inputs are projected once a forward pass, output gradients once a backward pass.

    def project_input(self, name: str, x: Tensor) -> Tensor:
        """P_in x: (…, in) → (…, k_in)."""
        return _multiply_last(x, self._parts[name].sides[1])

    def project_output(self, name: str, delta: Tensor) -> Tensor:
        """P_out δ: (…, out) → (…, k_out)."""
        return _multiply_last(delta, self._parts[name].sides[0])

    def new_rows(self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros to accumulate into with `add`; `finish` turns them into rows."""
        return torch.zeros(batch, self.dim * 2 if self._summed else self.dim, device=device, dtype=dtype)

    def add(self, rows: Tensor, name: str, values: Tensor) -> None:
        """Add the placement of projected gradients `values` (batch, k_out, k_in) to `rows`, in place."""
        part = self._parts[name]
        flat = values.reshape(len(values), -1).to(rows.dtype)
        if part.start is not None:
            rows[:, part.start : part.start + part.size] += flat
            return
        assert part.signs is not None
        d = self.dim
        for block, shift in enumerate(part.shifts):
            segment = flat[:, block * d : (block + 1) * d]
            width = segment.shape[1]
            signs = part.signs[block * d : block * d + width].to(rows.device, rows.dtype)
            rows[:, shift : shift + width].addcmul_(segment, signs)

    def finish(self, rows: Tensor) -> Tensor:
        """Accumulated rows (batch, ·) → (batch, d): what ran over the end wraps around."""
        return rows[:, : self.dim] + rows[:, self.dim :] if self._summed else rows

    def _deltas(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(deltas) != set(self.shapes):
            raise ValueError(f"expected the parameters {list(self.shapes)}, but got {list(deltas)}")
        wrong = {n: tuple(v.shape) for n, v in deltas.items() if tuple(v.shape[-2:]) != self.shapes[n]}
        if wrong:
            raise ValueError(
                f"matrices of these shapes (out, in) were expected, {self.shapes}, but these came: {wrong}"
            )
        return {name: deltas[name] for name in self.shapes}

    def apply(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """P a: {parameter name: (…, out, in)} → (…, d).

        Raises:
            ValueError: if the names or shapes are not the sketch's own.
        """
        deltas = self._deltas(deltas)
        first = next(iter(deltas.values()))
        lead = first.shape[:-2]
        flat = {name: v.reshape(-1, *v.shape[-2:]) for name, v in deltas.items()}
        dtype = torch.promote_types(first.dtype, torch.float32)
        rows = self.new_rows(next(iter(flat.values())).shape[0], device=first.device, dtype=dtype)
        for name, value in flat.items():
            value = self.project_input(name, value.to(dtype))
            self.add(rows, name, self.project_output(name, value.mT).mT)
        return self.finish(rows).reshape(*lead, self.dim)

    def adjoint(self, rows: Tensor) -> dict[str, Tensor]:
        """Pᵀ b: (…, d) → {parameter name: (…, out, in)}, with ⟨P a, b⟩ = ⟨a, Pᵀ b⟩.

        Raises:
            ValueError: if the rows do not have d numbers.
        """
        if rows.shape[-1] != self.dim:
            raise ValueError(f"rows of {self.dim} numbers were expected, but they have {rows.shape[-1]}")
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return {name: self._adjoint_of(part, rows) for name, part in self._parts.items()}

    def _adjoint_of(self, part: _Block, rows: Tensor) -> Tensor:
        if part.start is not None:
            flat = rows[..., part.start : part.start + part.size]
        else:
            assert part.signs is not None
            twice = torch.cat([rows, rows], -1)
            d = self.dim
            flat = torch.cat([twice[..., shift : shift + d] for shift in part.shifts], -1)
            flat = (flat * part.signs.to(rows.device, rows.dtype))[..., : part.size]
        outer, inner = part.sides
        k_out = part.shape[0] if outer is None else outer.shape[0]
        value = flat.reshape(*rows.shape[:-1], k_out, -1)
        if outer is not None:
            value = outer.to(value.device, value.dtype).T @ value
        return value if inner is None else value @ inner.to(value.device, value.dtype)
