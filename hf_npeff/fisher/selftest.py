"""The self-test: are the rows right, how much of the model do they cover, and how large is the sketch's error?

Measured on the first examples, before anything expensive starts:

    rows       sketched rows of two examples from the hooks, in one batch, against plain autograd, one at a time
    coverage   the share of the model's parameters that is analysed
    error      ‖K̂ − K‖ / ‖K‖ over pairs of different examples, K_ij = ⟨F_i, F_j⟩ of unit-norm PEFs, sketched and not

This module computes these results and the inner products K; `preparation.prepare` runs the self-test.

The unsketched inner products need no gradient: ⟨δ_aᵀx_a, δ_bᵀx_b⟩ = Σ_ts ⟨δ_at, δ_bs⟩⟨x_at, x_bs⟩, module by module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.gradients import Receiver, RowCollector, backward_passes
from hf_npeff.fisher.linear_maps import LinearMap
from hf_npeff.fisher.parameters import gradients
from hf_npeff.fisher.routing import Routing
from hf_npeff.pefs.sketches import Kind, Sketch

logger = logging.getLogger(__name__)
_CAPTURE_BYTES = 2**30
"""The most memory for captured inputs and gradients of modules at once: little compared with a model."""
_CAPTURE_TOKENS = 2048
"""The most tokens of the self-test's examples (see `preparation`), for inputs whose positions are not known to be
tokens."""
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
"""Inputs of which every position is a token."""


@dataclass(frozen=True)
class SelfTest:
    """The results of the self-test.

    Attributes:
        examples: the number of examples that it used.
        sketch_error: the relative error of the inner products of PEFs, from the sketch.
        row_error: largest relative error of a row from the hooks, or None if it was not checked.
        coverage: share of the model's parameters that is analysed.
        tried: {sketch: error} of every sketch that "auto" measured.
        left_out: target modules whose weights the model reads without calling the module, so hooks do not see them.
        difference_error: relative difference of autograd's gradients from central differences of the predictions, or
            None if no comparison was possible (see `differences`).
        difference_note: why no comparison was possible, what the gradients lack, or why it was not checked whether
            weights are used outside their modules (see `weight_reads`); empty if all agrees.
        used_otherwise: weights of linear maps among `parameters` that the model uses otherwise than by calling their
            modules, so that an adapter around the modules is another change than that of the weight.

    A store's `selftest` also has `later`: the results of repeated checks of rows (see `Rechecks`).
    """

    examples: int
    sketch_error: float | None
    row_error: float | None
    coverage: float
    tried: dict[str, float]
    left_out: tuple[str, ...] = ()
    difference_error: float | None = None
    difference_note: str = ""
    used_otherwise: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "left_out": list(self.left_out), "used_otherwise": list(self.used_otherwise)}

    def line(self, sketch: Sketch) -> str:
        """The results in one line."""
        error = "not measured" if self.sketch_error is None else f"{self.sketch_error:.3f}"
        rows = "not checked" if self.row_error is None else f"{self.row_error:.1e}"
        gradients = "not checked" if self.difference_error is None else f"{self.difference_error:.1e}"
        if self.difference_note:
            gradients += f" ({self.difference_note})"
        return (
            f"self-test on {self.examples} examples: error of rows against autograd {rows}, of gradients against "
            f"finite differences {gradients}; {self.coverage:.1%} of the parameters analysed; {sketch.kind} sketch of "
            f"{sketch.dim:,} numbers, error of PEF inner products {error}"
        )

    def log(self, sketch: Sketch, tolerance: float) -> None:
        """Log the result, and warn if the sketch is less accurate than the tolerance."""
        logger.info("%s", self.line(sketch))
        if self.sketch_error is not None and self.sketch_error > tolerance:
            logger.warning(
                "the sketch's error in PEF inner products is %.3f, above the tolerance %.3g: raise sketch_dim or "
                "storage_limit, or use sketch='countsketch'",
                self.sketch_error,
                tolerance,
            )


@dataclass(frozen=True)
class KnownCotangents:
    """A batch of examples with fixed cotangents, which do not depend on the sketch.

    Attributes:
        examples: the B examples.
        values: the cotangents (B, c, t, s).
    """

    examples: Sequence[Example]
    values: Tensor

    def narrowed(self, columns: int) -> KnownCotangents:
        """The same batch with only the first c cotangents."""
        return KnownCotangents(self.examples, self.values[:, :columns])


class Captured(Receiver):
    """A receiver that keeps inputs and output gradients of one batch, for a few modules, in their own type."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.deltas: dict[str, list[list[Tensor]]] = {}  # [call][cotangent]
        self.experts: dict[str, list[Tensor]] = {}

    def take_input(self, name: str, x: Tensor) -> int:
        """See `Receiver`."""
        calls = self.inputs.setdefault(name, [])
        calls.append(x)
        self.deltas.setdefault(name, []).append([])
        return len(calls) - 1

    def take_gradient(self, name: str, saved: int, delta: Tensor) -> None:
        """See `Receiver`."""
        self.deltas[name][saved].append(delta)

    def take_routed_input(self, name: str, x: Tensor, routing: Routing) -> int:
        """See `Receiver`."""
        number = self.take_input(name, routing.by_example(x))
        self.experts.setdefault(name, []).append(routing.by_example(routing.experts[:, None])[..., 0])
        return number

    def take_routed_gradient(self, name: str, saved: int, delta: Tensor, routing: Routing) -> None:
        """See `Receiver`."""
        self.take_gradient(name, saved, routing.by_example(delta))

    def rows(self, sketch: Sketch, passes: int) -> Tensor:
        """The sketched rows (B, passes, d), as `RowCollector` makes them in the passes themselves.

        Args:
            sketch: a sketch of these maps, none of which are fused experts.
            passes: the number of backward passes.
        """
        collector = RowCollector(sketch)
        first = next(x for calls in self.inputs.values() for x in calls)
        collector.after_forward(first, passes)
        inputs = {name: [collector.take_input(name, x) for x in calls] for name, calls in self.inputs.items()}
        for number in range(passes):
            collector.before_backward(number)
            for name, calls in self.deltas.items():
                for saved, deltas in zip(inputs[name], calls, strict=True):
                    if deltas:
                        collector.take_gradient(name, saved, deltas[number])
            collector.after_backward(number)
        return collector.rows

    def tensors(self, name: str) -> MapTensors | None:
        """The tensors of one map; several calls of a module are joined along the positions."""
        pairs = zip(self.inputs[name], self.deltas[name], strict=True)
        calls = [(x.float(), torch.stack(d, 1).float()) for x, d in pairs if d]
        if not calls:
            return None
        experts = [e for e, d in zip(self.experts.get(name, []), self.deltas[name], strict=False) if d]
        return MapTensors(
            torch.cat([x for x, _ in calls], 1),
            torch.cat([d for _, d in calls], 2),
            torch.cat(experts, 1) if experts else None,
        )


@dataclass(frozen=True)
class MapTensors:
    """The inputs and output gradients of one map, which make up its gradient rows.

    Attributes:
        x: the inputs (B, T, in).
        delta: the output gradients (B, c, T, out).
        experts: (B, T), the expert of every position for fused experts; None for other maps.
    """

    x: Tensor
    delta: Tensor
    experts: Tensor | None = None

    def gram(self) -> Tensor:
        """Inner products (B·c, B·c) of the unsketched rows, float64."""
        return exact_gram(self.x, self.delta) if self.experts is None else self._gram_of_experts(self.experts)

    def _gram_of_experts(self, experts: Tensor) -> Tensor:
        """Σ over experts of Σ_ts ⟨δ_at, δ_bs⟩⟨x_at, x_bs⟩, with t and s among the expert's rows."""
        B, c, T, out = self.delta.shape
        x, delta = self.x.flatten(0, 1), self.delta.transpose(1, 2).reshape(B * T, c, out)
        owners = F.one_hot(torch.arange(B, device=x.device).repeat_interleave(T), B).to(x.dtype)
        used, flat = (delta != 0).flatten(1).any(1), experts.flatten()
        gram = x.new_zeros(B, c, B, c, dtype=torch.float64)
        for expert in flat[used].unique().tolist():
            rows = (used & (flat == expert)).nonzero()[:, 0]
            inputs, own = x[rows] @ x[rows].T, owners[rows]
            for a in range(c):
                for b in range(c):
                    pairs = inputs * (delta[rows, a] @ delta[rows, b].T)
                    gram[:, a, :, b] += own.T @ pairs @ own
        return gram.reshape(B * c, B * c)


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
    """The sketches that "auto" tries, cheapest first: kronecker within the storage limit, two-stage, countsketch."""
    total = sum(a * b for a, b in shapes.values())
    # Rows this short need no sketch. Chosen: the default d of a countsketch.
    if total <= min(config.storage_limit, 16_384):
        return [("identity", None)]

    def size(side: int) -> int:
        return sum(min(a, side) * min(b, side) for a, b in shapes.values())

    # Powers of two: each step about halves the squared error and costs about twice as much.
    sides = [side for side in (8, 16, 32, 64, 128) if size(side) <= config.storage_limit]
    dims = [d for d in (4096, 8192, 16_384, 32_768, 65_536) if d <= config.storage_limit] or [config.storage_limit]
    tries: list[tuple[Kind, int | None]] = [("kronecker", side) for side in sides]
    return tries + [("two-stage", d) for d in dims] + [("countsketch", d) for d in dims]


def exact_inner_products(
    forward: ForwardPass, batches: Sequence[KnownCotangents]
) -> tuple[Tensor, list[Captured] | None]:
    """Inner products (n·c, n·c) of all unsketched rows, with a bounded number of captured modules and gradients.

    Args:
        forward: the forward pass.
        batches: batches of n examples in all, with the same c.

    Returns:
        The inner products; and what was captured of every batch, if one pass over each captured all that makes up the
        rows, so that no further pass is needed to sketch them.

    Raises:
        UnsupportedModelError: if no analysed module runs.
    """
    groups = _groups(forward.maps, _tokens(forward, batches))
    captures: list[Captured] = []
    grams: list[Tensor] = []
    for group in groups:
        captures = [_captured(forward, group, batch) for batch in batches]
        grams += _grams_of_maps(group, captures, batches)
    whole = len(groups) == 1 and not forward.parameters and not any(captured.experts for captured in captures)
    for name, shape in forward.parameters.items():
        rows_at_once = sum(batch.values.shape[0] * batch.values.shape[1] for batch in batches)
        # Four bytes a number; four times as long for one parameter
        if rows_at_once * shape[0] * shape[1] * 4 > 4 * _CAPTURE_BYTES:
            logger.info("%s is too large to be included in the measured error of the sketch", name)
            continue
        rows = []
        for batch in batches:
            for i, example in enumerate(batch.examples):
                V = batch.values[i : i + 1].transpose(0, 1)
                each = gradients(forward.model, [name], forward.source_of([example]), V)
                rows += [gradient.flatten().float() for (gradient,) in each]
        stacked = torch.stack(rows)
        grams.append((stacked @ stacked.T).double())
    if not grams:
        raise UnsupportedModelError("none of the target modules ran in a forward pass; check target_modules")
    return torch.stack([gram.to(grams[0].device) for gram in grams]).sum(0), captures if whole else None


def _tokens(forward: ForwardPass, batches: Sequence[KnownCotangents]) -> int:
    """The tokens of all batches with their padding, at most `_CAPTURE_TOKENS`, which stands for unknown positions.

    Processes that share a model capture equally many modules in a pass.
    """
    examples = [example for batch in batches for example in batch.examples]
    texts = all(set(example.inputs) <= _TEXT_INPUTS and example.choices is None for example in examples)
    if not texts or forward.fsdp.active:
        return _CAPTURE_TOKENS
    padded = sum(len(batch.examples) * max(example.length for example in batch.examples) for batch in batches)
    return min(max(padded, 1), _CAPTURE_TOKENS)


def _groups(maps: Sequence[LinearMap], tokens: int) -> list[list[LinearMap]]:
    """Maps whose inputs and output gradients fit into `_CAPTURE_BYTES` together."""
    groups: list[list[LinearMap]] = []
    used = 0
    for m in maps:
        cost = m.numbers_of_a_token * 4 * max(1, len(m.modules))
        if not groups or used + cost > _CAPTURE_BYTES / tokens:
            groups.append([])
            used = 0
        groups[-1].append(m)
        used += cost
    return groups


def _captured(forward: ForwardPass, group: Sequence[LinearMap], batch: KnownCotangents) -> Captured:
    """The inputs and output gradients of a batch."""
    captured = Captured()
    values = list(batch.values.unbind(1))
    source = forward.source_of(batch.examples)
    backward_passes(forward.model, group, captured, len(values[0]), source, lambda _: values)
    return captured


def _grams_of_maps(
    group: Sequence[LinearMap], captures: Sequence[Captured], batches: Sequence[KnownCotangents]
) -> Iterator[Tensor]:
    """Inner products (n·c, n·c) of the rows of each of these maps that runs."""
    for m in group:
        pairs = [c.tensors(m.parameter) if m.parameter in c.inputs else None for c in captures]
        if any(pair is not None for pair in pairs):
            yield _joined(pairs, batches).gram()


def _joined(pairs: Sequence[MapTensors | None], batches: Sequence[KnownCotangents]) -> MapTensors:
    """The tensors of all batches, padded with zeros; zeros if a module did not run."""
    first = next(pair for pair in pairs if pair is not None)
    T = max(pair.x.shape[1] for pair in pairs if pair is not None)
    xs, deltas, experts = [], [], []
    for pair, batch in zip(pairs, batches, strict=True):
        B, c = batch.values.shape[:2]
        x = first.x.new_zeros(B, 0, first.x.shape[-1]) if pair is None else pair.x
        delta = first.delta.new_zeros(B, c, 0, first.delta.shape[-1]) if pair is None else pair.delta
        xs.append(F.pad(x, (0, 0, 0, T - x.shape[1])))
        deltas.append(F.pad(delta, (0, 0, 0, T - delta.shape[2])))
        if first.experts is not None:
            own = first.experts.new_zeros(B, 0) if pair is None or pair.experts is None else pair.experts
            experts.append(F.pad(own, (0, T - own.shape[1])))
    return MapTensors(torch.cat(xs), torch.cat(deltas), torch.cat(experts) if experts else None)
