"""Changes that leave what layers give on some inputs as it is, at steps of any length.

A linear map W with the inputs x gives (W + δ) x: a change adds δx. Where δx is zero for every token of an input, in
every map that is changed, the model predicts for it what it did, however long the step. With the second moments
C = E[xxᵀ] of a map's inputs on the examples to be spared, the mean of ‖δx‖² is tr(δ C δᵀ), and what keeps most of a
given change δ₀ for the least of that is

    maximise ⟨δ₀, δ⟩² / Σ_m tr(δ_m C̃_m δ_mᵀ),   C̃ = C + λ diag(C)      ⇒      δ_m ∝ δ₀_m C̃_m⁻¹

λ diag(C) stands for what a finite number of tokens does not show; it has the scale of every input, so that one neuron
with enormous activations does not outweigh the others. Selective directions (selective.py) spare predictions, to second
order at the weights as they are; this spares activations, to all orders. One after the other, both are used.

Cut to rank ρ, δ is the best approximation in the same metric: with C̃ = LLᵀ, min over rank ρ of ‖(δ − δ_ρ) L‖ is the
truncated SVD of δL, times L⁻¹.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.data import Example
from hf_npeff.encoding.labels import IGNORED
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.weights.activations import LinearDelta, check_linear
from hf_npeff.weights.lora import low_rank

_UNSEEN = 1e-6
"""Share of the mean of diag(C) that every input has at least: one that is always zero would make C̃ singular."""


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of the inputs of linear maps.

    Attributes:
        moments: {parameter: C (in, in)}, the mean of xxᵀ over the tokens of all examples.
        tokens: {parameter: how many}.
    """

    moments: dict[str, Tensor]
    tokens: dict[str, int]


@torch.no_grad()
def second_moments(
    forward: ForwardPass,
    examples: Sequence[Example],
    parameters: Mapping[str, LinearDelta],
    batch_size: int,
    left_out: Tensor | None = None,
) -> list[SecondMoments]:
    """Second moments of what linear maps read on some examples, padding left out; several sets share the passes.

    Every set is all examples less those that it leaves out, and so are its sums: few examples are added up twice.

    Args:
        forward: the forward pass.
        examples: whose tokens are counted.
        parameters: the weights of the maps, with a change of each.
        batch_size: examples of a forward pass.
        left_out: (n, b) bool, which examples each set leaves out; None is one set of all.

    Raises:
        UnsupportedModelError: if a parameter is not the weight of linear maps alone.
        ValueError: if the model lacks a parameter, or a set has no token that one of its maps reads.
    """
    out = torch.zeros(len(examples), 1, dtype=torch.bool) if left_out is None else left_out.cpu()
    every, without = _Sums(), [_Sums() for _ in range(out.shape[1])]
    with _watched(forward.model, check_linear(forward.model, parameters), every, without):
        for places, masks in _told_apart(forward, examples, batch_size):
            batch = [examples[i] for i in places]
            every.begin(len(batch), masks, None)
            for sums, column in zip(without, out.T, strict=True):
                sums.begin(len(batch), masks, column[places])
            forward.outputs(batch)
            for sums in (every, *without):
                sums.end()
    return [_difference(every, sums, parameters) for sums in without]


def _told_apart(
    forward: ForwardPass, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Batches, and where their tokens are: of the encoder, and of the decoder where there is one.

    Which of the two an input belongs to is told by its size. Where the two have as many places and other padding, every
    example gets a batch of its own, which has no padding.
    """
    for places in forward.batches(examples, batch_size, trials=False):
        masks = _masks_of(forward, [examples[i] for i in places])
        if len(masks) == 2 and masks[0].numel() == masks[1].numel() and not torch.equal(*masks):
            yield from (([i], _masks_of(forward, [examples[i]])) for i in places)
        else:
            yield places, masks


def _masks_of(forward: ForwardPass, batch: Sequence[Example]) -> list[Tensor]:
    """Where the tokens of a batch are, (B, t) bool; a decoder without ids of its own reads its labels, one later."""
    inputs = forward.batch(batch, "cpu")
    decoder, labels = inputs.decoder_real, inputs.get("labels")
    reads_labels = getattr(getattr(forward.model, "config", None), "is_encoder_decoder", False) and decoder is None
    if reads_labels and labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        decoder = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0  # up to the last that counts; padding follows
    return [mask for mask in (inputs.real, decoder) if mask is not None]


def _difference(every: _Sums, sums: _Sums, parameters: Mapping[str, LinearDelta]) -> SecondMoments:
    moments, tokens = {}, {}
    for name in parameters:
        tokens[name] = every.tokens.get(name, 0) - sums.tokens.get(name, 0)
        if not tokens[name]:
            raise ValueError(f"{name} reads no token of the examples to be spared, so it is not known what spares them")
        total = every.totals[name]
        total = total - sums.totals[name] if name in sums.totals else total
        moments[name] = total / tokens[name]
    return SecondMoments(moments, tokens)


class _Sums:
    """Sums of xxᵀ for every parameter, and of how many tokens."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._batch = 0
        self._masks: Sequence[Tensor] = ()
        self._chosen: Tensor | None = None
        self._last: tuple[Tensor, Tensor, int] | None = None

    def begin(self, batch: int, masks: Sequence[Tensor], chosen: Tensor | None) -> None:
        """The next forward pass has tokens at these places, and these of its examples (None: all) are counted."""
        self._batch, self._masks, self._chosen = batch, masks, chosen

    def end(self) -> None:
        """The forward pass is over, and its tensors may go."""
        self._last = None

    def add(self, parameter: str, x: Tensor) -> None:
        """What a map read, (B, t, in) or flattened."""
        if self._chosen is not None and not bool(self._chosen.any()):
            return
        if self._last is None or self._last[0] is not x:  # an MLP's gate and up read the same tensor
            tokens = self._tokens(x)
            wide = tokens.to(torch.promote_types(x.dtype, torch.float32))
            self._last = x, wide.T @ wide, len(tokens)
        _, product, count = self._last
        total = self.totals.setdefault(parameter, torch.zeros_like(product))
        total += product.to(total.device)
        self.tokens[parameter] = self.tokens.get(parameter, 0) + count

    def _tokens(self, x: Tensor) -> Tensor:
        """(N, in): the inputs at the tokens of the examples that count; all places where they are not one a token.

        Raises:
            UnsupportedModelError: if inputs cannot be given to examples, and not all examples count.
        """
        flat = x.reshape(-1, x.shape[-1])
        real = next((m.flatten() for m in self._masks if m.numel() == len(flat)), None)
        if self._chosen is not None:
            if len(flat) % self._batch:
                raise UnsupportedModelError(
                    f"inputs of shape {tuple(x.shape)} cannot be given to the {self._batch} examples of a batch; use "
                    "batch_size=1"
                )
            own = self._chosen.repeat_interleave(len(flat) // self._batch)
            real = own if real is None else own & real
        return flat if real is None else flat[real.to(flat.device)]


@contextlib.contextmanager
def _watched(model: nn.Module, places: Mapping[str, str], every: _Sums, without: Sequence[_Sums]) -> Iterator[None]:
    """Inside `with`, the sums see what the modules {path: parameter} read."""
    modules = dict(model.named_modules())

    def hook_of(parameter: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for sums in (every, *without):
                sums.add(parameter, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [modules[path].register_forward_pre_hook(hook_of(p), with_kwargs=True) for path, p in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spared(
    deltas: Mapping[str, LinearDelta], moments: SecondMoments, ridge: float, rank: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A change that keeps most of another for what it adds to the outputs of layers on inputs to be spared.

    Args:
        deltas: {parameter: δ₀ (out, in)}.
        moments: the moments of the inputs.
        ridge: λ.
        rank: what every weight's change is cut to; None leaves it whole.

    Returns:
        {parameter: δ (out, in)} of unit norm in all, and what is kept of it: the cosine with δ₀, and the mean of ‖δx‖²
        over that of ‖δ₀x‖² at equal norm.
    """
    result: dict[str, Tensor] = {}
    inner = squared = before = after = norm = 0.0
    for name, delta in deltas.items():
        given = delta.matrix().detach().cpu().double()
        C = moments.moments[name].cpu().double()
        change = _least(given, C, ridge, rank)
        inner, squared, norm = (
            inner + float((given * change).sum()),
            squared + float(change.square().sum()),
            norm + float(given.square().sum()),
        )
        before, after = before + float(((given @ C) * given).sum()), after + float(((change @ C) * change).sum())
        result[name] = change
    for name in result:
        result[name] = (result[name] / squared**0.5).float()
    disturbed = (after / squared) / (before / norm) if before > 0 else 1.0
    info = {
        "spared": {
            "tokens": max(moments.tokens.values()),
            "ridge": ridge,
            "rank": rank,
            "cosine": inner / (squared * norm) ** 0.5,
            "disturbed": disturbed,
        }
    }
    return result, info


def _least(given: Tensor, C: Tensor, ridge: float, rank: int | None) -> Tensor:
    """δ₀ C̃⁻¹ (out, in), cut to a rank in the metric of C̃."""
    diagonal = C.diagonal().clamp_min(_UNSEEN * float(C.diagonal().mean()))
    L = torch.linalg.cholesky(C + torch.diag(ridge * diagonal + (diagonal - C.diagonal())))
    half = torch.linalg.solve_triangular(L, given.T, upper=False).T  # δ₀ L⁻ᵀ = δ L
    if rank is not None and rank < min(half.shape):
        left, right, _ = low_rank(half, rank)
        half = left.double() @ right.double()
    return torch.linalg.solve_triangular(L.T, half.T, upper=True).T  # half L⁻¹
