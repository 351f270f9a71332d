"""The start-up self-test: are the rows right, how much of the model do they cover, and what does the sketch cost?

Measured on the first examples, before anything expensive starts:

    rows       sketched rows of two examples from the hooks, in one batch, against plain autograd, one at a time
    coverage   the share of the model's parameters under analysis
    error      ‖K̂ − K‖ / ‖K‖ over pairs of different examples, K_ij = ⟨F_i, F_j⟩ of unit-norm PEFs, sketched and not

The unsketched inner products need no gradient: ⟨δ_aᵀx_a, δ_bᵀx_b⟩ = Σ_ts ⟨δ_at, δ_bs⟩⟨x_at, x_bs⟩, module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.config import FisherConfig
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.gradients import LinearHooks, LinearMap, RowCollector, autograd_rows
from hf_npeff.fisher.sketches import Kind, Sketch

ROW_TOLERANCE = 1e-2
_CAPTURE_BYTES = 2**30
_AUTOGRAD_NUMBERS = 2**28


@dataclass(frozen=True)
class SelfTest:
    """What the self-test measured.

    Attributes:
        examples: how many it used.
        sketch_error: see the module.
        row_error: largest relative error of a row from the hooks, or None where it was not checked.
        coverage: share of the model's parameters under analysis.
        tried: {sketch: error} of every sketch that "auto" measured.
    """

    examples: int
    sketch_error: float | None
    row_error: float | None
    coverage: float
    tried: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def line(self, sketch: Sketch) -> str:
        """One line for people."""
        error = "not measured" if self.sketch_error is None else f"{self.sketch_error:.3f}"
        rows = "not checked" if self.row_error is None else f"{self.row_error:.1e}"
        return (
            f"self-test on {self.examples} examples: rows against autograd {rows}, {self.coverage:.1%} of the parameters, "
            f"{sketch.kind} sketch of {sketch.dim:,} numbers, error of PEF inner products {error}"
        )


class Captured:
    """A receiver that keeps inputs and output gradients of one batch, for a few modules."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.deltas: dict[str, list[list[Tensor]]] = {}  # [call][cotangent]

    def take_input(self, name: str, x: Tensor) -> int:
        calls = self.inputs.setdefault(name, [])
        calls.append(x.float())
        self.deltas.setdefault(name, []).append([])
        return len(calls) - 1

    def take_gradient(self, name: str, saved: int, delta: Tensor) -> None:
        self.deltas[name][saved].append(delta.float())

    def tensors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """x (B, T, in) and δ (B, c, T, out), several calls of a module joined along the positions."""
        calls = [(x, torch.stack(d, 1)) for x, d in zip(self.inputs[name], self.deltas[name], strict=True) if d]
        if not calls:
            return None
        return torch.cat([x for x, _ in calls], 1), torch.cat([d for _, d in calls], 2)


def exact_gram(x: Tensor, delta: Tensor) -> Tensor:
    """Inner products (B·c, B·c) of the unsketched gradient rows of one linear map, float64."""
    B, c, T, out = delta.shape
    if T * T * B * c * (B + c) * 4 < B * c * x.shape[-1] * out:
        inputs = torch.einsum("ati,bsi->abts", x, x)
        gram = x.new_zeros(B, c, B, c, dtype=torch.float64)
        for a in range(B):
            outputs = torch.einsum("cto,bdso->cbdts", delta[a], delta)
            gram[a] = torch.einsum("cbdts,bts->cbd", outputs, inputs[a])
        return gram.reshape(B * c, B * c)
    rows = torch.einsum("bcto,bti->bcoi", delta, x).reshape(B * c, -1)
    return (rows @ rows.T).double()


def pef_inner_products(gram: Tensor, n: int) -> Tensor:
    """⟨F_i, F_j⟩ (n, n) of unit-norm PEFs from the inner products of their rows (n·c, n·c): ‖A_i A_jᵀ‖²_F, scaled."""
    c = len(gram) // n
    K = gram.double().square().reshape(n, c, n, c).sum((1, 3))
    norms = K.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    return K / norms[:, None] / norms


def off_diagonal_error(sketched: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error over pairs of different examples."""
    off = ~torch.eye(len(exact), dtype=torch.bool, device=exact.device)
    reference = exact[off].norm()
    return float((sketched[off] - exact[off]).norm() / reference) if reference > 0 else 0.0


def candidates(config: FisherConfig, shapes: Mapping[str, tuple[int, int]]) -> list[tuple[Kind, int | None]]:
    """What "auto" tries, cheapest first: sides of modules within the storage limit, two stages, exact countsketch."""
    total = sum(a * b for a, b in shapes.values())
    if total <= min(config.storage_limit, 16_384):
        return [("identity", None)]

    def size(side: int) -> int:
        return sum(min(a, side) * min(b, side) for a, b in shapes.values())

    sides = [side for side in (8, 16, 32, 64, 128) if size(side) <= config.storage_limit]
    dims = [d for d in (4096, 8192, 16_384, 32_768, 65_536) if d <= config.storage_limit] or [config.storage_limit]
    tries: list[tuple[Kind, int | None]] = [("kronecker", side) for side in sides]
    return tries + [("two-stage", d) for d in dims] + [("countsketch", d) for d in dims]


def measure_sketches(
    model: nn.Module,
    maps: Sequence[LinearMap],
    run: Callable[[], tuple[Tensor, Tensor]],
    tries: Sequence[tuple[Kind, int | None]],
    seed: int,
    tolerance: float | None,
) -> tuple[Sketch, dict[str, float]]:
    """Measure sketches against unsketched rows; the first within `tolerance`, else the most faithful.

    Args:
        model: frozen.
        maps: the linear maps under analysis.
        run: a forward pass over B examples that returns the source and cotangents (B, c, …) that enter there.
        tries: (kind, dim), cheapest first.
        seed: of the sketches.
        tolerance: stop at the first error at most this; None measures all.

    Returns:
        The sketch, and {"kind dim": error} of all that were measured.
    """
    shapes = {m.parameter: m.shape for m in maps}
    exact: Tensor | None = None
    errors: dict[str, float] = {}
    best: tuple[float, Sketch] | None = None
    for kind, dim in tries:
        sketch = Sketch(shapes, kind, dim, seed)
        rows, gram, n = _sketched_rows(model, maps, run, sketch, with_exact=exact is None)
        exact = gram if exact is None else exact
        assert exact is not None
        flat = rows.flatten(0, 1).double()
        error = off_diagonal_error(pef_inner_products(flat @ flat.T, n), pef_inner_products(exact, n))
        errors[f"{kind} {dim}" if dim else kind] = error
        if best is None or error < best[0]:
            best = (error, sketch)
        if tolerance is not None and error <= tolerance:
            best = (error, sketch)
            break
    assert best is not None
    return best[1], errors


def _sketched_rows(
    model: nn.Module,
    maps: Sequence[LinearMap],
    run: Callable[[], tuple[Tensor, Tensor]],
    sketch: Sketch,
    *,
    with_exact: bool,
) -> tuple[Tensor, Tensor | None, int]:
    """Rows (B, c, d) of `sketch`, and the exact Gram matrix of the rows, with a bounded number of captured modules."""
    if not with_exact:
        return collect_rows(model, maps, run, sketch), None, _batch_of(run)
    gram: Tensor | None = None
    groups: list[list[LinearMap]] = [[]]
    used = 0
    for m in maps:
        cost = sum(m.shape) * 4 * max(1, len(m.modules))
        if used + cost > _CAPTURE_BYTES / 2048 and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(m)
        used += cost
    for group in groups:
        captured = Captured()
        with LinearHooks(model, group, captured) as hooks:
            _backward_all(hooks, run)
        for m in group:
            if m.parameter in captured.inputs and (pair := captured.tensors(m.parameter)) is not None:
                part = exact_gram(*pair)
                gram = part if gram is None else gram + part
    if gram is None:
        raise UnsupportedModelError("none of the target modules ran in a forward pass; check target_modules")
    rows = collect_rows(model, maps, run, sketch)
    return rows, gram.to(rows.device), len(rows)


def _batch_of(run: Callable[[], tuple[Tensor, Tensor]]) -> int:
    return run.keywords["n"] if hasattr(run, "keywords") else len(run()[1])


def _backward_all(hooks: LinearHooks, run: Callable[[], tuple[Tensor, Tensor]]) -> int:
    hooks.begin(_batch_of(run))
    source, V = run()
    c = V.shape[1]
    for i in range(c):
        hooks.backward(source, V[:, i], last=i == c - 1)
    return c


def collect_rows(
    model: nn.Module, maps: Sequence[LinearMap], run: Callable[[], tuple[Tensor, Tensor]], sketch: Sketch
) -> Tensor:
    """Sketched rows (B, c, d) of one batch."""
    collector = RowCollector(sketch)
    with LinearHooks(model, maps, collector) as hooks:
        hooks.begin(_batch_of(run))
        source, V = run()
        sketch.to(source.device)
        rows = []
        for i in range(V.shape[1]):
            collector.start(len(source), source.device, source.dtype)
            hooks.backward(source, V[:, i], last=i == V.shape[1] - 1)
            rows.append(collector.finish())
    return torch.stack(rows, 1)


def row_error(
    model: nn.Module,
    maps: Sequence[LinearMap],
    pair: Callable[[], tuple[Tensor, Tensor]],
    single: Callable[[], tuple[Tensor, Tensor]],
    seed: int,
) -> float:
    """Relative error of the first row of an example, from the hooks in a batch, against autograd on it alone.

    As many maps as fit into memory beside the model are differentiated; an identity sketch would be as large as they,
    so both sides go through a small Kronecker sketch.

    Args:
        model: frozen.
        maps: the linear maps under analysis.
        pair: a forward pass over a batch whose last example is the one of `single`.
        single: a forward pass over that example alone.
        seed: of the small sketch.
    """
    checked, used = [], 0
    for m in sorted(maps, key=lambda m: m.shape[0] * m.shape[1]):
        used += m.shape[0] * m.shape[1]
        if used > _AUTOGRAD_NUMBERS and checked:
            break
        checked.append(m)
    checked = [m for m in maps if m in checked]
    sketch = Sketch({m.parameter: m.shape for m in checked}, "kronecker", 8, seed)
    hooked = collect_rows(model, checked, pair, sketch)[-1, 0]

    def first() -> tuple[Tensor, Tensor]:
        source, V = single()
        return source, V[:, 0]

    truth = sketch.apply({k: v[None].float() for k, v in autograd_rows(model, checked, first).items()})[0]
    norm = truth.norm()
    difference = min((hooked - truth).norm(), (hooked + truth).norm())  # an eigenvector's sign is free
    return float(difference / norm) if norm > 0 else float(hooked.norm())
