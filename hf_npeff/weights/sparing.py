"""Changes that leave the outputs of layers on some inputs alone, for steps of any length.

A linear map with input x returns (W + δ) x, so a change adds δx. If δx is zero for every token of an input, in every
changed map, the model's prediction for this input does not change, however long the step is. With the second moments
C = E[xxᵀ] of a map's inputs on the examples to spare, the mean of ‖δx‖² is tr(δ C δᵀ). The change that keeps most of a
given change δ₀ for the smallest such mean is

    maximise ⟨δ₀, δ⟩² / Σ_m tr(δ_m C̃_m δ_mᵀ),   C̃ = C + λ diag(C)      ⇒      δ_m ∝ δ₀_m C̃_m⁻¹

λ diag(C) accounts for the finite number of tokens. It has the scale of every input, so one neuron with enormous
activations does not outweigh the others. Selective directions (selective.py) spare predictions, to second order at the
present weights; this spares activations, to all orders. Both can be used one after the other.

For rank ρ, δ is the best approximation in the same metric: with C̃ = LLᵀ, the minimum of ‖(δ − δ_ρ) L‖ over rank ρ is
the truncated SVD of δL, times L⁻¹.
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
"""Every input gets at least this share of the mean of diag(C), because one that is always zero would make C̃
singular."""


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of the inputs of linear maps.

    Attributes:
        moments: {parameter: C (in, in)}, the mean of xxᵀ over the tokens of all examples.
        tokens: {parameter: number of tokens}.
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
    """Second moments of the inputs of linear maps on some examples, without padding; several sets share the passes.

    Every set consists of all examples without the ones that it leaves out, and its sums are computed in this way too.

    Args:
        forward: the forward pass.
        examples: the examples.
        parameters: the weights of the maps, with a change of each.
        batch_size: the number of examples in a forward pass.
        left_out: (n, b) bool, the examples that each set leaves out; None is one set of all.

    Raises:
        UnsupportedModelError: if a parameter is not only the weight of linear maps.
        ValueError: if the model lacks a parameter, or one of the maps reads no token of a set.
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
    """Batches, with the places of their tokens: of the encoder and, if there is one, of the decoder.

    The size of an input shows which of the two it belongs to. If both have equally many places but different padding,
    every example gets a batch of its own, which has no padding.
    """
    for places in forward.batches(examples, batch_size, trials=False):
        masks = _masks_of(forward, [examples[i] for i in places])
        if len(masks) == 2 and masks[0].numel() == masks[1].numel() and not torch.equal(*masks):
            yield from (([i], _masks_of(forward, [examples[i]])) for i in places)
        else:
            yield places, masks


def _masks_of(forward: ForwardPass, batch: Sequence[Example]) -> list[Tensor]:
    """The places of a batch's tokens, (B, t) bool; a decoder without ids reads its labels, shifted by one."""
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
            raise ValueError(f"{name} reads no token of the examples to spare, so it is not known how to spare them")
        total = every.totals[name]
        total = total - sums.totals[name] if name in sums.totals else total
        moments[name] = total / tokens[name]
    return SecondMoments(moments, tokens)


class _Sums:
    """Sums of xxᵀ for every parameter, and the numbers of tokens."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._batch = 0
        self._masks: Sequence[Tensor] = ()
        self._chosen: Tensor | None = None
        self._last: tuple[Tensor, Tensor, int] | None = None

    def begin(self, batch: int, masks: Sequence[Tensor], chosen: Tensor | None) -> None:
        """Announce a forward pass with tokens at these places; only these of its examples count (None: all)."""
        self._batch, self._masks, self._chosen = batch, masks, chosen

    def end(self) -> None:
        """End the forward pass and free its tensors."""
        self._last = None

    def add(self, parameter: str, x: Tensor) -> None:
        """Add the inputs of a map, (B, t, in) or flattened."""
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
        """(N, in): the inputs at the tokens of the examples that count; all inputs if they have no dimension of tokens.

        Raises:
            UnsupportedModelError: if inputs cannot be assigned to examples, and not all examples count.
        """
        flat = x.reshape(-1, x.shape[-1])
        real = next((m.flatten() for m in self._masks if m.numel() == len(flat)), None)
        if self._chosen is not None:
            if len(flat) % self._batch:
                raise UnsupportedModelError(
                    f"inputs of shape {tuple(x.shape)} cannot be assigned to the {self._batch} examples of a batch; "
                    "use batch_size=1"
                )
            own = self._chosen.repeat_interleave(len(flat) // self._batch)
            real = own if real is None else own & real
        return flat if real is None else flat[real.to(flat.device)]


@contextlib.contextmanager
def _watched(model: nn.Module, places: Mapping[str, str], every: _Sums, without: Sequence[_Sums]) -> Iterator[None]:
    """Inside `with`, the inputs of the modules {path: parameter} are added to the sums."""
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
    """The change that keeps most of another for a given effect on the outputs of layers on the inputs to spare.

    Args:
        deltas: {parameter: δ₀ (out, in)}.
        moments: the moments of the inputs.
        ridge: λ.
        rank: the rank to which every weight's change is truncated; None does not truncate.

    Returns:
        {parameter: δ (out, in)} of unit norm in total, and entries for `info`: the cosine with δ₀, and the mean of
        ‖δx‖² over that of ‖δ₀x‖² at equal norm.
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
    """δ₀ C̃⁻¹ (out, in), truncated to a rank in the metric of C̃."""
    diagonal = C.diagonal().clamp_min(_UNSEEN * float(C.diagonal().mean()))
    L = torch.linalg.cholesky(C + torch.diag(ridge * diagonal + (diagonal - C.diagonal())))
    half = torch.linalg.solve_triangular(L, given.T, upper=False).T  # δ₀ L⁻ᵀ = δ L
    if rank is not None and rank < min(half.shape):
        left, right, _ = low_rank(half, rank)
        half = left.double() @ right.double()
    return torch.linalg.solve_triangular(L.T, half.T, upper=True).T  # half L⁻¹
