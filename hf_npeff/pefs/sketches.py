"""One linear, seeded map P from gradients of the parameters to rows of d numbers, with E[PᵀP] = I.

A sketch has two stages, and its kind says which of them do something:

    sides      G (out, in)  →  P_out G P_inᵀ (k_out, k_in)      kronecker, two-stage
    placement  the numbers of all modules  →  one row of d
               side by side, each module its own block          identity, kronecker
               blocked countsketch, all modules summed          countsketch, two-stage

A side is a random rotation or a fold (see `sides`), the identity where the dimension n is no larger than the side k.
Blocked countsketch cuts a module's m numbers into blocks of d, gives every number an independent sign,
shifts every block cyclically by a random offset, and adds the blocks up.

Everything random depends on (seed, parameter name, shape) alone and is drawn on the CPU, so a sketch is the same on
every device, in every process and for every batch (METHOD §2).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hf_npeff.errors import FormatVersionError
from hf_npeff.pefs.sides import FoldedSide, RotatedSide, Side

Sides = Literal["rotated", "folded"]
_SIDES: dict[Sides, Callable[[int, int, torch.Generator], Side]] = {"rotated": RotatedSide, "folded": FoldedSide}
Kind = Literal["kronecker", "countsketch", "two-stage", "identity"]
TWO_STAGE_SIDE = 128
"""Side of a module's block after the first stage. Chosen: the second stage has 128² numbers of a module to place, not
out·in; the self-test measures the error of both together."""
_VERSION = 1
"""Goes into the fingerprint: rows of other formulas for signs and places must never meet."""
_FEW_SIGNS = 2**20
"""So many signs are kept as numbers of 32 bits, ready to multiply with; more of them as 8 bits."""
_FEW_BLOCKS = 8
"""So many blocks are added one by one on a GPU as well."""
_AT_ONCE = 2**20
"""So many numbers of a batch's gradients are placed at a time on a CPU: they stay in its cache, in the same memory."""
_AT_ONCE_ELSEWHERE = 2**28
"""The same on a GPU: a gibibyte. All of a dense layer is less; the weights of many experts together are more."""


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(json.dumps([_VERSION, *key]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass
class _Block:
    """One parameter's share of a sketch; what is random in it is drawn when it is first used."""

    shape: tuple[int, int]
    size: int
    start: int | None  # of its own slice of the row; None where the modules are summed
    drawn: bool = False
    sides: tuple[Side | None, Side | None] = (None, None)
    signs: Tensor | None = None
    shifts: list[int] = field(default_factory=list)
    turns: Tensor | None = None  # the shifts, beside the signs


class Sketch:
    """A fixed random linear map from {parameter name: (out, in) matrix} to rows of `dim` numbers.

    Args:
        shapes: (out, in) of every parameter under analysis, in a fixed order. A parameter that is not a matrix is
            flattened to (its first dimension, the rest).
        kind: "kronecker", "countsketch", "two-stage" or "identity".
        dim: the side of a module's block for "kronecker"; d for "countsketch" and "two-stage"; unused by "identity".
        seed: the seed of all random numbers.
        sides: what the sides are, "rotated" or "folded"; None takes "folded" for "two-stage", whose sides are long
            enough for the one draw to be like the mean of them, and "rotated" for "kronecker".

    Attributes:
        dim: d, the numbers of a row.
        blocks: {parameter name: slice of the row}, or None where modules are summed into one row.
        fingerprint: a hash of everything that fixes the map. Rows of different fingerprints must never meet.

    Raises:
        ValueError: if `kind` is unknown, `shapes` is empty or `dim` is missing, or there are no such sides.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        kind: Kind,
        dim: int | None = None,
        seed: int = 0,
        sides: Sides | None = None,
    ):
        if kind not in ("kronecker", "countsketch", "two-stage", "identity"):
            raise ValueError(f"unknown kind of sketch {kind!r}")
        if not shapes:
            raise ValueError("a sketch needs at least one parameter; check target_modules")
        if kind == "identity":
            dim = None
        elif dim is None or dim < 1:
            raise ValueError(f"a {kind} sketch needs a positive dim, but it is {dim!r}")
        if sides not in (None, *_SIDES):
            raise ValueError(f"unknown sides of a sketch {sides!r}; they are one of {', '.join(_SIDES)}")
        self.sides: Sides = sides or ("folded" if kind == "two-stage" else "rotated")
        self.shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in shapes.items()}
        self.kind: Kind = kind
        self.setting = dim
        self.seed = seed
        self._summed = kind in ("countsketch", "two-stage")
        self._device: torch.device | str = "cpu"
        self._parts: dict[str, _Block] = {}
        start = 0
        for name, shape in self.shapes.items():
            width = self._width
            rows, columns = shape if width is None else (min(shape[0], width), min(shape[1], width))
            self._parts[name] = _Block(shape, rows * columns, None if self._summed else start)
            start += rows * columns
        self.dim: int = dim if self._summed and dim is not None else start
        self.blocks: dict[str, slice] | None = None
        if not self._summed:
            self.blocks = {n: slice(b.start, (b.start or 0) + b.size) for n, b in self._parts.items()}

    @property
    def adds_entries(self) -> bool:
        """Whether every entry of a gradient goes into one number of the row, and so looks like others that do."""
        return self.kind == "countsketch" or self.sides == "folded"

    @property
    def _width(self) -> int | None:
        """The most numbers that a side leaves, or None where there are no sides."""
        return {"kronecker": self.setting, "two-stage": TWO_STAGE_SIDE}.get(self.kind)

    def _part(self, name: str) -> _Block:
        """A parameter's share, drawn: a mere description of a sketch takes no memory, whatever shapes it claims."""
        part = self._parts[name]
        if part.drawn:
            return part
        shape, width = part.shape, self._width
        if width is not None:
            part.sides = self._side(name, shape, 0, width), self._side(name, shape, 1, width)
        if self._summed:
            d = self.setting or 1
            generator = _generator(self.seed, name, shape, d, "count")
            n_blocks = -(-part.size // d)
            part.signs = torch.randint(0, 2, (n_blocks * d,), generator=generator, dtype=torch.int8) * 2 - 1
            if len(part.signs) <= _FEW_SIGNS:
                part.signs = part.signs.float()
            part.turns = torch.randint(0, d, (n_blocks,), generator=generator)
            part.shifts = part.turns.tolist()
        part.drawn = True
        return self._moved(part)

    def _side(self, name: str, shape: tuple[int, int], which: int, k: int) -> Side | None:
        """One of a parameter's sides, None for the identity."""
        if k >= shape[which]:
            return None
        return _SIDES[self.sides](shape[which], k, _generator(self.seed, name, shape, k, ("out", "in")[which]))

    def _moved(self, part: _Block) -> _Block:
        part.sides = tuple(s if s is None else s.to(self._device) for s in part.sides)  # type: ignore[assignment]
        part.signs = part.signs if part.signs is None else part.signs.to(self._device)
        part.turns = part.turns if part.turns is None else part.turns.to(self._device)
        return part

    @property
    def fingerprint(self) -> str:
        """Hex digest of (kind, dim, seed, parameter names and shapes, version of the random streams)."""
        return hashlib.sha256(json.dumps([_VERSION, self.to_dict()]).encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` rebuilds the sketch from, as JSON types."""
        shapes = [[name, list(shape)] for name, shape in self.shapes.items()]
        folded = {"sides": self.sides} if self.sides == "folded" else {}  # what says nothing of its sides is rotated
        return {"kind": self.kind, "dim": self.setting, "seed": self.seed, **folded, "shapes": shapes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sketch:
        """The same map again.

        Raises:
            FormatVersionError: if `values` was not written by `to_dict`.
        """
        try:
            shapes = {str(name): (shape[0], shape[1]) for name, shape in values["shapes"]}
            numbers = [values["seed"], *(n for shape in shapes.values() for n in shape)]
            if not all(isinstance(n, int) and n >= 0 for n in numbers) or not isinstance(values["dim"], int | None):
                raise ValueError("shapes, dim and seed are whole numbers")
            return cls(shapes, values["kind"], values["dim"], values["seed"], values.get("sides", "rotated"))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise FormatVersionError(f"not the description of a sketch: {error!r}") from error

    def to(self, device: torch.device | str) -> Sketch:
        """The sketch itself, its random matrices moved to `device`."""
        self._device = device
        for part in self._parts.values():
            self._moved(part)
        return self

    # The two halves that hooks call: inputs are projected once a forward pass, output gradients once a backward pass.

    def project_input(self, name: str, x: Tensor) -> Tensor:
        """P_in x: (…, in) → (…, k_in)."""
        side = self._part(name).sides[1]
        return x if side is None else side.times(x)

    def project_output(self, name: str, delta: Tensor) -> Tensor:
        """P_out δ: (…, out) → (…, k_out)."""
        side = self._part(name).sides[0]
        return delta if side is None else side.times(delta)

    def has_output_side(self, name: str) -> bool:
        """Whether `project_output` shortens anything."""
        return self._part(name).sides[0] is not None

    def project_output_by_expert(self, name: str, delta: Tensor, counts: Sequence[int]) -> Tensor:
        """P_out δ of fused experts, where there is such a side: δ at the place of its expert, and zero elsewhere.

        Args:
            name: the name of a parameter of shape (E·out, in).
            delta: (S, out), sorted by expert.
            counts: rows of every expert, E numbers that sum to S.

        Returns:
            (S, k_out).
        """
        side, out = self._part(name).sides[0], delta.shape[1]
        assert side is not None
        result = delta.new_empty(len(delta), side.size)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                result[start : start + count] = side.times(delta[start : start + count], expert * out)
            start += count
        return result

    def new_rows(self, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros to accumulate into with `add`; `finish` turns them into rows."""
        return torch.zeros(batch, self.dim * 2 if self._summed else self.dim, device=device, dtype=dtype)

    def slices(self, name: str, batch: int, device: torch.device) -> list[slice]:
        """Rows of a projected gradient (batch, k_out, k_in) that `add` may be given one after another.

        Where modules are summed these are whole blocks of d, about `_AT_ONCE` numbers of them, on a GPU
        `_AT_ONCE_ELSEWHERE`; elsewhere all at once.
        """
        part = self._part(name)
        outer, inner = part.sides
        k_out = part.shape[0] if outer is None else outer.size
        k_in = part.shape[1] if inner is None else inner.size
        whole_blocks = self.dim // math.gcd(self.dim, k_in)
        at_once = _AT_ONCE if device.type == "cpu" else _AT_ONCE_ELSEWHERE
        step = max(1, at_once // (batch * k_in * whole_blocks)) * whole_blocks
        if part.start is not None:
            step = k_out
        return [slice(start, min(start + step, k_out)) for start in range(0, k_out, step)]

    def add(self, rows: Tensor, name: str, values: Tensor, first: int = 0) -> None:
        """Add the placement of projected gradients to `rows`, in place.

        Args:
            rows: (batch, ·), as `new_rows` made them.
            name: the name of the parameter.
            values: (batch, k_out, k_in), or one of its `slices`.
            first: where that slice starts.
        """
        part = self._part(name)
        flat = values.flatten(1)
        if part.start is not None:
            rows[:, part.start : part.start + part.size].add_(flat)
            return
        assert part.signs is not None and part.turns is not None
        d = self.dim
        before = first * values.shape[2]
        if rows.is_cuda and len(part.shifts) > _FEW_BLOCKS:
            signs, turns = part.signs[before:], part.turns[before // d : -(-(before + flat.shape[1]) // d)]
            rows[:, :d].add_(_shifted_sum(flat, signs, turns, d, rows.dtype))
            return
        flat = flat.to(rows.dtype)
        for start in range(0, flat.shape[1], d):
            segment = flat[:, start : start + d]
            width = segment.shape[1]
            signs = part.signs[before + start : before + start + width].to(rows.device, rows.dtype)
            shift = part.shifts[(before + start) // d]
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

    def apply_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """`apply` of products BA in their factors {parameter name: (B (out, q), A (q, in))}: (d,).

        Raises:
            ValueError: if the names or shapes are not the sketch's own.
        """
        shapes = {name: (len(B), A.shape[1]) for name, (B, A) in factors.items()}
        if shapes != self.shapes:
            raise ValueError(
                f"factors of matrices of these shapes (out, in) were expected, {self.shapes}, not {shapes}"
            )
        first = next(iter(factors.values()))[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        rows = self.new_rows(1, device=first.device, dtype=dtype)
        for name in self.shapes:
            B, A = (factor.to(first.device, dtype) for factor in factors[name])
            self.add(rows, name, (self.project_output(name, B.T).T @ self.project_input(name, A))[None])
        return self.finish(rows)[0]

    def adjoint(self, rows: Tensor) -> dict[str, Tensor]:
        """Pᵀ b: (…, d) → {parameter name: (…, out, in)}, with ⟨P a, b⟩ = ⟨a, Pᵀ b⟩.

        Raises:
            ValueError: if the rows do not have d numbers.
        """
        if rows.shape[-1] != self.dim:
            raise ValueError(f"rows of {self.dim} numbers were expected, but they have {rows.shape[-1]}")
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return {name: self._adjoint_of(name, rows) for name in self._parts}

    def placement_adjoint(self, name: str, rows: Tensor) -> Tensor:
        """The adjoint of `add` and `finish` for one parameter: (…, d) → (…, k_out, k_in).

        ⟨P(δ xᵀ), b⟩ = (P_out δ)ᵀ M (P_in x) with M what comes out for b: Pᵀb seen through the sides.
        """
        part = self._part(name)
        if part.start is not None:
            flat = rows[..., part.start : part.start + part.size]
        else:
            assert part.signs is not None
            twice = torch.cat([rows, rows], -1)
            d = self.dim
            flat = torch.cat([twice[..., shift : shift + d] for shift in part.shifts], -1)
            flat = (flat * part.signs.to(rows.device, rows.dtype))[..., : part.size]
        outer = part.sides[0]
        return flat.reshape(*rows.shape[:-1], part.shape[0] if outer is None else outer.size, -1)

    def _adjoint_of(self, name: str, rows: Tensor) -> Tensor:
        value = self.placement_adjoint(name, rows)
        outer, inner = self._part(name).sides
        if outer is not None:
            value = outer.adjoint(value.mT).mT
        return value if inner is None else inner.adjoint(value)


def _shifted_sum(flat: Tensor, signs: Tensor, turns: Tensor, d: int, dtype: torch.dtype, together: int = 64) -> Tensor:
    """Σ over blocks of d of `flat` (batch, m), signed and turned by their shifts: (batch, d), many blocks a kernel.

    On a GPU a kernel for each block would cost more than its work; sums are gathered, not scattered, and so come out
    the same every time.
    """
    total = flat.new_zeros(len(flat), d, dtype=dtype)
    places = torch.arange(d, device=flat.device)
    turns = turns.to(flat.device)
    for start in range(0, len(turns), together):
        stop = min(start + together, len(turns))
        part = flat[:, start * d : stop * d] * signs[start * d : min(stop * d, flat.shape[1])].to(flat.device)
        part = torch.nn.functional.pad(part, (0, (stop - start) * d - part.shape[1])).unflatten(1, (-1, d))
        index = (places - turns[start:stop, None]) % d
        total += part.gather(2, index.expand(len(flat), -1, -1)).sum(1, dtype=dtype)
    return total
