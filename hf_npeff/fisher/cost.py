"""The cost of an analysis, computed from sizes before anything starts; the formulas are in docs/cost.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_npeff.config import GRAM_LIMIT
from hf_npeff.fisher.linear_maps import LinearMap
from hf_npeff.pefs.sketches import TWO_STAGE_SIDE, Kind

AT_MOST = ", at most"
"""Behind the kind of a sketch that "auto" has not chosen yet."""
_COLUMN_BYTES = 64
"""Bytes of an example's id, hash and prediction: an estimate, small compared with its rows."""


@dataclass(frozen=True)
class Estimate:
    """FLOPs and bytes of an analysis.

    Attributes:
        n: the number of examples.
        tokens: the number of tokens of an example, on average.
        c: the number of rows of an example.
        d: the number of numbers in a row.
        p: the number of analysed parameters.
        r: the number of components.
        sketch: the kind of the sketch; with "at most" if "auto" has not chosen yet.
        forward: FLOPs of the forward passes.
        backward: FLOPs of the c backward passes for each example, which form no weight gradients.
        sketching: FLOPs that the sketch adds to these.
        iteration: FLOPs of one iteration of the decomposition.
        disk: bytes of the store on disk.
        fit_memory: bytes of memory that a fit needs without memory_budget.
    """

    n: int
    tokens: float
    c: int
    d: int
    p: int
    r: int
    sketch: str
    forward: float
    backward: float
    sketching: float
    iteration: float
    disk: int
    fit_memory: int

    @property
    def flops(self) -> float:
        """FLOPs for computing all PEFs."""
        return self.forward + self.backward + self.sketching

    def __repr__(self) -> str:
        most = "at most " if self.sketch.endswith(AT_MOST) else ""
        return (
            f"Estimate({_flops(self.flops)} for {self.n:,} examples, {most}{_bytes(self.disk)} on disk; "
            "print() shows all)"
        )

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in self.rows)

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import table

        return table(repr(self), ("", ""), self.rows)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The lines of the printed table: (name, value)."""
        most = "at most " if self.sketch.endswith(AT_MOST) else ""  # the sketch that "auto" chooses may be smaller
        return [
            ("examples n", f"{self.n:,} of {self.tokens:.0f} tokens"),
            ("rows of an example c", f"{self.c}"),
            ("numbers in a row d", f"{self.d:,} ({self.sketch})"),
            ("analysed parameters p", f"{self.p:,}"),
            ("forward passes", _flops(self.forward)),
            ("backward passes", _flops(self.backward)),
            ("sketches", _flops(self.sketching)),
            ("PEFs, altogether", _flops(self.flops)),
            ("store on disk", most + _bytes(self.disk)),
            (f"one iteration with {self.r} components", most + _flops(self.iteration)),
            ("memory of a fit, without memory_budget", most + _bytes(self.fit_memory)),
        ]


def numbers_of(kind: Kind, dim: int | None, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The d of a sketch without making it, because a large model's random signs alone take p bytes."""
    if dim is not None and kind in ("countsketch", "two-stage"):
        return dim
    side = dim if kind == "kronecker" and dim is not None else None
    return sum(min(a, side or a) * min(b, side or b) for a, b in shapes.values())


def estimate(
    maps: Sequence[LinearMap],
    parameters: int,
    shapes: Mapping[str, tuple[int, int]],
    kind: Kind,
    dim: int | None,
    *,
    chosen: bool,
    n: int,
    tokens: float,
    c: int,
    r: int,
    source: int,
    storage_bytes: int,
) -> Estimate:
    """Count multiplications and additions of the linear maps; attention and norms are left out.

    Args:
        maps: the analysed linear maps.
        parameters: the number of all parameters that a forward pass multiplies with.
        shapes: the shapes of all analysed parameters.
        kind: the kind of the sketch, or the largest kind that "auto" may choose.
        dim: the sketch's setting.
        chosen: whether the sketch is already chosen.
        n: the number of examples.
        tokens: the number of tokens of an example, on average.
        c: the number of rows of an example.
        r: the number of components.
        source: the number of numbers in a cotangent.
        storage_bytes: the bytes of a number on disk.
    """
    forward = 2.0 * parameters * tokens * n
    sketching = 0.0
    for m in maps:
        out, into = m.shape
        side = dim if kind == "kronecker" and dim else TWO_STAGE_SIDE if kind == "two-stage" else max(out, into)
        k_out, k_in = min(out, side), min(into, side)
        folded = kind == "two-stage"  # every number is read once, not multiplied k times
        once = 2 * tokens * into * (1 if folded else k_in) * (k_in < into)
        each = 2 * tokens * out * (1 if folded else k_out) * (k_out < out) + 2 * tokens * k_out * k_in
        sketching += n * (once + c * (each + 2 * k_out * k_in * (kind in ("countsketch", "two-stage"))))
    d = numbers_of(kind, dim, shapes)
    rows_in_gram_space = n * c if n * c < d and n * c <= GRAM_LIMIT else d
    return Estimate(
        n, tokens, c, d, sum(a * b for a, b in shapes.values()), r,
        kind if chosen else kind + AT_MOST,
        forward=forward,
        backward=c * forward,
        sketching=sketching,
        iteration=2 * 2.0 * n * c * rows_in_gram_space * r,
        disk=n * (c * d * storage_bytes + c * source * 4 + _COLUMN_BYTES),
        fit_memory=n * c * d * 4 + n * c * r * 4,
    )  # fmt: skip


def _flops(value: float) -> str:
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}FLOP"
    return f"{value:.0f} FLOP"


def _bytes(value: float) -> str:
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} B"
