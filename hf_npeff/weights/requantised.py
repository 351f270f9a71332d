"""Weights rounded as quantisers round them: how much of a change is left after merging it into 8 or 4 bits.

Merging rounds W + ΔW. So a change that is small compared with the rounding steps is partly rounded away, and other
entries are rounded in another direction than before: the change gets smaller, and noise is added. An adapter beside the
quantised base model does not change ΔW.

The number formats ("grids"), all with rounding to the nearest, for a weight (out, in):

    int8   each row w: ŵ = q a/127 with a = max |w|, q = round(127 w/a): bitsandbytes' LLM.int8, row by row
    Q8_0   each 32 numbers of a row: ŵ = d q with d = max |w|/127, kept in 16 bits, q = round(w/d): llama.cpp
    Q4_0   each 32 numbers of a row: ŵ = d (q − 8) with d = −w*/8, kept in 16 bits, w* the number of largest size,
           q = ⌊w/d + 8.5⌋, at most 15: llama.cpp
    nf4    each 64 numbers in the weight's order: ŵ = a c with a = max |w|, c the nearest of 16 quantiles of a normal
           distribution: bitsandbytes, without double quantisation
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_npeff.config import Quantisation
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.linear_maps import LinearMap, find_linear_maps
from hf_npeff.fisher.predictions import Predictions
from hf_npeff.weights.activations import LinearDelta

SCHEMES: tuple[Quantisation, ...] = get_args(Quantisation)
_BLOCK = 32
"""Numbers that share a scale in llama.cpp's Q8_0 and Q4_0."""
_NF4_BLOCK = 64
"""Numbers that share a scale in bitsandbytes' 4-bit layers, by default."""
# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 values of NF4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""


def rounded(weight: Tensor, scheme: Quantisation) -> Tensor:
    """A weight (out, in) after quantising and dequantising, in float32.

    Args:
        weight: the weight, in floating point.
        scheme: the number format.

    Raises:
        ValueError: if there is no such scheme, or the number of inputs does not fit Q8_0 or Q4_0.
    """
    W = weight.detach().float()
    if scheme not in SCHEMES:
        raise ValueError(f"quantise must be among {', '.join(SCHEMES)}, but one is {scheme!r}")
    if scheme == "int8":
        a = _not_zero(W.abs().amax(1, keepdim=True))
        return (W * (127 / a)).round() * (a / 127)
    if scheme == "nf4":
        return _nf4(W)
    if W.shape[1] % _BLOCK:
        raise ValueError(f"{scheme} needs a multiple of {_BLOCK} inputs, but a weight has {W.shape[1]}")
    blocks = W.unflatten(1, (-1, _BLOCK))
    if scheme == "Q8_0":
        d = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks / _not_zero(d)
        q = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves away from zero, as C's roundf has it
        return (q * d.half().float()).flatten(1)
    d = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    q = (blocks.double() / _not_zero(d).double() + 8.5).trunc().clamp(0, 15)
    return ((q - 8).float() * d.half().float()).flatten(1)


def _not_zero(scale: Tensor) -> Tensor:
    """Scales by which a block of zeros may be divided."""
    return torch.where(scale == 0, 1.0, scale)


def _nf4(W: Tensor) -> Tensor:
    flat = F.pad(W.flatten(), (0, -W.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    a = flat.abs().amax(1, keepdim=True)
    code = torch.tensor(_NF4, device=W.device)
    nearest = torch.bucketize(flat / _not_zero(a), (code[1:] + code[:-1]) / 2)
    return (code[nearest] * a).flatten()[: W.numel()].view_as(W)


def maps_to_round(model: nn.Module, changed: Sequence[str], schemes: Sequence[Quantisation]) -> list[LinearMap]:
    """The linear maps that a quantiser rounds: all except an output embedding, which is included if it is changed.

    Args:
        model: the model, in floating point.
        changed: the weights of linear maps that a change affects.
        schemes: the number formats.

    Raises:
        UnsupportedModelError: if weights are already quantised, offloaded or sharded.
        ValueError: if a scheme does not fit one of them.
    """
    usual = {m.parameter for m in find_linear_maps(model)} | set(changed)
    maps = [m for m in find_linear_maps(model, ".*") if m.parameter in usual]
    weights = bare_parameters(model)
    if away := [m.parameter for m in maps if m.parameter not in weights or not is_at_hand(weights[m.parameter])]:
        raise UnsupportedModelError(
            f"quantise= rounds floating-point weights, but {away[:3]} are already quantised, offloaded or sharded: "
            "load the model whole, in float32 or 16 bits. On a quantised model, measure() without quantise= measures "
            "the adapter beside it"
        )
    blocked = [scheme for scheme in schemes if scheme in ("Q8_0", "Q4_0")]
    if blocked and (odd := [m.parameter for m in maps if m.shape[1] % _BLOCK]):
        raise ValueError(f"{blocked[0]} needs a multiple of {_BLOCK} inputs, which {odd[:3]} do not have")
    return maps


@contextlib.contextmanager
def weights_rounded(
    model: nn.Module,
    maps: Sequence[LinearMap],
    scheme: Quantisation,
    deltas: Mapping[str, LinearDelta] | None = None,
    scale: float = 1.0,
) -> Iterator[None]:
    """The model with its linear maps rounded inside `with`; the weights are always restored bit for bit.

    Args:
        model: the model, in floating point.
        maps: the maps whose weights are rounded.
        scheme: the number format.
        deltas: {parameter: ΔW} that is merged before rounding; None rounds the weights as they are.
        scale: a factor for the change.
    """
    weights = bare_parameters(model)
    before = {m.parameter: weights[m.parameter].detach().clone() for m in maps}
    try:
        with torch.no_grad():
            for m in maps:
                matrix = m.as_matrix(before[m.parameter]).reshape(m.shape).float()
                if deltas is not None and m.parameter in deltas:
                    matrix = matrix + scale * deltas[m.parameter].matrix().to(matrix)
                weights[m.parameter].copy_(m.as_weight(rounded(matrix, scheme)))
        yield
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                weights[name].copy_(kept)


def kept_of(whole: tuple[Predictions, Predictions], left: tuple[Predictions, Predictions]) -> float:
    """The share of a change of predictions that is left after rounding, Σ ⟨Δ′, Δ⟩_S / Σ ⟨Δ, Δ⟩_S over all terms.

    Δ and Δ′ are the changes of the logits without and with rounding, and S is the Fisher at the logits before: ½ ⟨Δ,
    Δ⟩_S is the KL of a small Δ. Noise that is unrelated to Δ does not count.

    Args:
        whole: predictions before and after the change without rounding.
        left: predictions before and after the change with rounding.
    """
    inner = total = 0.0
    for a, b, c, d in zip(whole[0].logits, whole[1].logits, left[0].logits, left[1].logits, strict=True):
        change = torch.nan_to_num(b.double() - a.double())[..., None]  # −∞ − (−∞): no outcome of either
        other = torch.nan_to_num(d.double() - c.double())[..., None]
        weighted = whole[0].distribution(a.double()).hessian_times(change)
        inner, total = inner + float((weighted * other).sum()), total + float((weighted * change).sum())
    return inner / total if total > 0 else float("nan")
