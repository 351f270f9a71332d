"""The start-up self-test: are the rows right, how much of the model do they cover, and what does the sketch cost?

Measured on the first examples, before anything expensive starts:

    rows       sketched rows of two examples from the hooks, in one batch, against plain autograd, one at a time
    coverage   the share of the model's parameters under analysis
    error      ‖K̂ − K‖ / ‖K‖ over pairs of different examples, K_ij = ⟨F_i, F_j⟩ of unit-norm PEFs, sketched and not

The unsketched inner products need no gradient: ⟨δ_aᵀx_a, δ_bᵀx_b⟩ = Σ_ts ⟨δ_at, δ_bs⟩⟨x_at, x_bs⟩, module by module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_npeff.config import FisherConfig
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.gradients import LinearHooks, LinearMap, RowCollector, autograd_rows
from hf_npeff.fisher.parameters import gradients, is_at_hand, sketched_rows
from hf_npeff.pefs.sketches import Kind, Sketch

logger = logging.getLogger(__name__)
ROW_TOLERANCE = 1e-2
ROW_TOLERANCE_16_BIT = 1e-1
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
        left_out: target modules whose weights the model reads without calling the module: hooks do not see them.
    """

    examples: int
    sketch_error: float | None
    row_error: float | None
    coverage: float
    tried: dict[str, float]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "left_out": list(self.left_out)}

    def line(self, sketch: Sketch) -> str:
        """One line for people."""
        error = "not measured" if self.sketch_error is None else f"{self.sketch_error:.3f}"
        rows = "not checked" if self.row_error is None else f"{self.row_error:.1e}"
        return (
            f"self-test on {self.examples} examples: rows against autograd {rows}, {self.coverage:.1%} of the "
            f"parameters, {sketch.kind} sketch of {sketch.dim:,} numbers, error of PEF inner products {error}"
        )

    def log(self, sketch: Sketch, tolerance: float) -> None:
        """Tell people the result, and warn where the sketch is not as accurate as was asked for."""
        logger.info("%s", self.line(sketch))
        if self.sketch_error is not None and self.sketch_error > tolerance:
            logger.warning(
                "the sketch's error in PEF inner products is %.3f, above the tolerance %.3g: raise sketch_dim or "
                "storage_limit, or use sketch='countsketch'",
                self.sketch_error,
                tolerance,
            )


@dataclass(frozen=True)
class Run:
    """A forward pass over B examples that can be repeated, with cotangents that stay the same.

    Attributes:
        forward: the pass; it returns the source (B, t, s).
        values: cotangents (B, c, t', s') with t' ≥ t and s' ≥ s; beyond the source they are zero.
        singles: the same over each of the examples alone.
    """

    forward: Callable[[], Tensor]
    values: Tensor
    singles: tuple[Run, ...] = ()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Source (B, t, s) and cotangents (B, c, t, s)."""
        source = self.forward()
        return source, self.values[..., : source.shape[1], : source.shape[2]]


class Captured:
    """A receiver that keeps inputs and output gradients of one batch, for a few modules."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.deltas: dict[str, list[list[Tensor]]] = {}  # [call][cotangent]

    def take_input(self, name: str, x: Tensor) -> int:
        """See `Receiver`."""
        calls = self.inputs.setdefault(name, [])
        calls.append(x.float())
        self.deltas.setdefault(name, []).append([])
        return len(calls) - 1

    def take_gradient(self, name: str, saved: int, delta: Tensor) -> None:
        """See `Receiver`."""
        self.deltas[name][saved].append(delta.float())

    def tensors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The inputs x (B, T, in) and δ (B, c, T, out), several calls of a module joined along the positions."""
        calls = [(x, torch.stack(d, 1)) for x, d in zip(self.inputs[name], self.deltas[name], strict=True) if d]
        if not calls:
            return None
        return torch.cat([x for x, _ in calls], 1), torch.cat([d for _, d in calls], 2)


def exact_gram(x: Tensor, delta: Tensor) -> Tensor:
    """Inner products (B·c, B·c) of the unsketched gradient rows of one linear map, float64."""
    B, c, T, out = delta.shape
    n_in, rows_of_T, all_rows = x.shape[-1], B * c * T, B * c
    if rows_of_T**2 * out + (B * T) ** 2 * n_in < rows_of_T * out * n_in + all_rows**2 * out * n_in:
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
    parameters: Mapping[str, tuple[int, int]],
    runs: Sequence[Run],
    tries: Sequence[tuple[Kind, int | None]],
    seed: int,
    tolerance: float | None,
) -> tuple[Sketch, dict[str, float]]:
    """Measure sketches against unsketched rows; the first within `tolerance`, else the most faithful.

    Args:
        model: frozen.
        maps: the linear maps under analysis.
        parameters: the other parameters under analysis.
        runs: forward passes over different examples.
        tries: (kind, dim), cheapest first.
        seed: of the sketches.
        tolerance: stop at the first error at most this; None measures all.

    Returns:
        The sketch, and {"kind dim": error} of all that were measured.
    """
    shapes = {m.parameter: m.shape for m in maps} | dict(parameters)
    gram = _exact_rows_gram(model, maps, parameters, runs)
    n = sum(len(run.values) for run in runs)
    exact = pef_inner_products(gram, n)
    errors: dict[str, float] = {}
    best: tuple[float, Sketch] | None = None
    for kind, dim in tries:
        sketch = Sketch(shapes, kind, dim, seed)
        rows = torch.cat([collect_rows(model, maps, parameters, run, sketch) for run in runs])
        flat = rows.flatten(0, 1).double()
        error = off_diagonal_error(pef_inner_products(flat @ flat.T, n), exact.to(flat.device))
        errors[f"{kind} {dim}" if dim else kind] = error
        if best is None or error < best[0]:
            best = (error, sketch)
        if tolerance is not None and error <= tolerance:
            best = (error, sketch)
            break
    assert best is not None
    return best[1], errors


def _exact_rows_gram(
    model: nn.Module, maps: Sequence[LinearMap], parameters: Mapping[str, tuple[int, int]], runs: Sequence[Run]
) -> Tensor:
    """Inner products (n·c, n·c) of all unsketched rows, with a bounded number of captured modules and gradients."""
    grams = []
    groups: list[list[LinearMap]] = [[]]
    used = 0
    for m in maps:
        cost = sum(m.shape) * 4 * max(1, len(m.modules))
        if used + cost > _CAPTURE_BYTES / 2048 and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(m)
        used += cost
    for group in groups if maps else []:
        captures = []
        for run in runs:
            captured = Captured()
            with LinearHooks(model, group, captured) as hooks:
                hooks.begin(len(run.values))
                source, V = run()
                for i in range(V.shape[1]):
                    hooks.backward(source, V[:, i], last=i == V.shape[1] - 1)
            captures.append(captured)
        for m in group:
            pairs = [c.tensors(m.parameter) if m.parameter in c.inputs else None for c in captures]
            if any(pair is not None for pair in pairs):
                grams.append(exact_gram(*_joined(pairs, runs)))
    for name, shape in parameters.items():
        singles = [single for run in runs for single in run.singles]
        if len(singles) * singles[0].values.shape[1] * shape[0] * shape[1] * 4 > 4 * _CAPTURE_BYTES:
            logger.info("%s is too large to be part of the sketch's measured error", name)
            continue
        rows = []
        for single in singles:
            V = single()[1].transpose(0, 1)
            rows += [g.flatten().float() for (g,) in gradients(model, [name], single.forward, V)]
        stacked = torch.stack(rows)
        grams.append((stacked @ stacked.T).double())
    if not grams:
        raise UnsupportedModelError("none of the target modules ran in a forward pass; check target_modules")
    return torch.stack([gram.to(grams[0].device) for gram in grams]).sum(0)


def _joined(pairs: Sequence[tuple[Tensor, Tensor] | None], runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """Inputs x (n, T, in) and δ (n, c, T, out) of all runs, padded with zeros; zeros where a module did not run."""
    x0, d0 = next(pair for pair in pairs if pair is not None)
    T = max(pair[0].shape[1] for pair in pairs if pair is not None)
    xs, deltas = [], []
    for pair, run in zip(pairs, runs, strict=True):
        B, c = run.values.shape[:2]
        x, delta = pair or (x0.new_zeros(B, 0, x0.shape[-1]), d0.new_zeros(B, c, 0, d0.shape[-1]))
        xs.append(F.pad(x, (0, 0, 0, T - x.shape[1])))
        deltas.append(F.pad(delta, (0, 0, 0, T - delta.shape[2])))
    return torch.cat(xs), torch.cat(deltas)


def collect_rows(
    model: nn.Module, maps: Sequence[LinearMap], parameters: Mapping[str, tuple[int, int]], run: Run, sketch: Sketch
) -> Tensor:
    """Sketched rows (B, c, d) of one batch."""
    sketch.to(run.values.device)
    rows = run.values.new_zeros(*run.values.shape[:2], sketch.dim)
    if maps:
        collector = RowCollector(sketch)
        with LinearHooks(model, maps, collector) as hooks:
            hooks.begin(len(run.values))
            source, V = run()
            for i in range(V.shape[1]):
                collector.start(len(source), source.device, source.dtype)
                hooks.backward(source, V[:, i], last=i == V.shape[1] - 1)
                rows[:, i] = collector.finish()
    if parameters:
        for e, single in enumerate(run.singles):
            rows[e] += sketched_rows(model, parameters, sketch, single.forward, single()[1].transpose(0, 1))
    return rows


def check_rows(
    model: nn.Module, maps: Sequence[LinearMap], run: Run, seed: int
) -> tuple[float | None, list[LinearMap]]:
    """The first row of the last example, from the hooks in a batch, against autograd on that example alone.

    As many maps as fit into memory beside the model are differentiated; an identity sketch would be as large as they,
    so both sides go through a small Kronecker sketch. Weights that are offloaded, quantised or sharded are not checked;
    where their modules are not called either, nobody can tell whether they matter, and they count as not seen.

    Args:
        model: frozen.
        maps: the linear maps under analysis.
        run: a forward pass over a batch.
        seed: of the small sketch.

    Returns:
        The relative error, None where nothing could be checked, infinite where the row of a single weight that
        matters is wrong by more than half; and the maps that hooks do not see: their modules are not called, and yet
        their weights matter.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    known = [m for m in maps if is_at_hand(weights[m.parameter])]
    with LinearHooks(model, maps, Captured()) as hooks:
        hooks.begin(len(run.values))
        run.forward()
        ran = set(hooks.ran)
    unknown = [m for m in maps if m not in known and m.parameter not in ran]
    if not known:
        return None, unknown
    silent = [m for m in known if m.parameter not in ran]
    checked = _differentiable(silent, [m for m in known if m.parameter in ran])
    single = run.singles[-1]
    exact = autograd_rows(model, checked, single.forward, single()[1][:, 0])
    unseen = unknown + [m for m in silent if m in checked and bool((exact[m.parameter] != 0).any())]
    checked = [m for m in maps if m in checked and m not in unseen]
    return _row_error(model, checked, run, exact, seed), unseen


def _differentiable(silent: Sequence[LinearMap], ran: Sequence[LinearMap]) -> list[LinearMap]:
    """The maps whose gradients fit into memory: those whose modules are not called first, then the smallest."""
    checked: list[LinearMap] = []
    used = 0
    for m in [*silent, *sorted(ran, key=lambda m: m.shape[0] * m.shape[1])]:
        used += m.shape[0] * m.shape[1]
        if used > _AUTOGRAD_NUMBERS and checked:
            break
        checked.append(m)
    return checked


def _row_error(model: nn.Module, maps: Sequence[LinearMap], run: Run, exact: Mapping[str, Tensor], seed: int) -> float:
    """Of the last example's first row, from hooks on these maps, relative; `exact` is autograd's."""
    if not maps:
        return 0.0
    sketch = Sketch({m.parameter: m.shape for m in maps}, "kronecker", 8, seed).to(run.values.device)
    first = Run(run.forward, run.values[:, :1])
    hooked = collect_rows(model, maps, {}, first, sketch)[-1, 0]
    truth = sketch.apply({m.parameter: exact[m.parameter][None].float() for m in maps})[0].to(hooked)
    norm = truth.norm()
    if norm == 0:
        return float(hooked.norm())
    assert sketch.blocks is not None
    for block in sketch.blocks.values():
        part = truth[block].norm()
        if part > 1e-3 * norm and (hooked[block] - truth[block]).norm() > 0.5 * part:
            return float("inf")
    return float((hooked - truth).norm() / norm)
