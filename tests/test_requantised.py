"""Merged into 8 and 4 bits: the grids, and what `measure(quantise=...)` says is left of a change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer, UnsupportedModelError
from hf_npeff.weights.requantised import SCHEMES, maps_to_round, rounded, weights_rounded
from tests import reference
from tests.test_activations import direction_of
from tests.tiny import collate, tiny_batch, tiny_model

WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
"""Q8_0 and Q4_0 have blocks of 32 inputs."""


def weight(seed: int = 0, *, rows: int = 5, inputs: int = 96) -> torch.Tensor:
    """Numbers of several sizes, a block of zeros among them, and ties."""
    W = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    W[1] *= 1e-3
    W[2, 32:64] = 0
    W[3] = (W[3] * 4).round() / 4
    return W


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_are_rounded_to_the_nearest_point_of_the_grid(scheme: Any) -> None:
    """Oracle: reference.on_grid, number by number. Ties may fall on the other side: at most half a step, rarely."""
    for seed in range(3):
        W = weight(seed)
        ours, truth = rounded(W, scheme), reference.on_grid(W, scheme).float()
        same = torch.isclose(ours, truth, rtol=1e-5, atol=1e-9)
        assert same.float().mean() > 0.97
        assert ((ours - W).abs() <= (truth - W).abs() + 1e-6).all()
        assert torch.equal(rounded(torch.zeros(2, 32), scheme), torch.zeros(2, 32))


@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_0"])
def test_llama_cpps_grids_are_those_of_its_own_package(scheme: Any) -> None:
    """Oracle: the package gguf, quantised and dequantised."""
    gguf = pytest.importorskip("gguf", reason="the oracle is the package gguf")
    kind = gguf.GGMLQuantizationType[scheme]
    for seed in range(5):
        W = weight(seed, rows=16, inputs=256)
        truth = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(W.numpy(), kind), kind))
        assert torch.equal(rounded(W, scheme), truth)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_the_other_grids_are_those_of_bitsandbytes(scheme: Any) -> None:
    """Oracle: the package bitsandbytes, quantised and dequantised."""
    functional = pytest.importorskip("bitsandbytes", reason="the oracle is the package bitsandbytes").functional
    for seed in range(3):
        # Blocks of 64 that run over the ends of rows are read back wrongly by bitsandbytes 0.50.2 on a CPU:
        # findings/bitsandbytes-nf4-on-a-cpu-reads-other-blocks-scales.sh.
        W = weight(seed, rows=16, inputs=128)
        if scheme == "nf4":
            truth = functional.dequantize_4bit(*functional.quantize_4bit(W, quant_type="nf4"))
        else:
            q, a, _ = functional.int8_vectorwise_quant(W.half())
            W = W.half().float()
            truth = q.float() * a[:, None] / 127
        same = torch.isclose(rounded(W, scheme), truth, rtol=1e-4, atol=1e-7)
        assert same.float().mean() > 0.999


def logits_of(model: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**collate([row], model)).logits[0, -1] for row in rows]


def quantised_by_hand(model: Any, names: list[str], scheme: str, deltas: Any = None) -> Any:
    other = copy.deepcopy(model)
    weights = dict(other.named_parameters())
    with torch.no_grad():
        for name in names:
            W = weights[name] + (0 if deltas is None else deltas.get(name, 0))
            weights[name].copy_(reference.on_grid(W, scheme))
    return other


@pytest.mark.parametrize("scheme", ["int8", "Q4_0", "nf4"])
def test_measured_numbers_are_those_of_models_rounded_by_hand(scheme: Any) -> None:
    """Oracle: copies of the model whose weights reference.on_grid has rounded, with and without W + ΔW; dense S."""
    model = tiny_model("llama", dtype=torch.float32, **WIDE)
    rows = tiny_batch(model, 6, seed=3)
    direction = direction_of(model)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2))
    kept_weights = {name: value.clone() for name, value in model.named_parameters()}
    measured = analyzer.measure(direction, rows, scales=(0.3,), random=False, quantise=(scheme,))
    assert all(torch.equal(value, kept_weights[name]) for name, value in model.named_parameters())

    names, deltas = list(analyzer.shapes), {name: 0.3 * delta for name, delta in direction.items()}
    base, merged = quantised_by_hand(model, names, scheme), quantised_by_hand(model, names, scheme, deltas)
    beside = copy.deepcopy(base)
    with torch.no_grad():
        for name, delta in deltas.items():
            dict(beside.named_parameters())[name].add_(delta)
    before, on_grid = logits_of(model, rows), logits_of(base, rows)
    with direction.applied_to(model, 0.3):
        after = logits_of(model, rows)
    assert [(s.quantised, s.merged) for s in measured.steps] == [(None, False), (scheme, False), (scheme, True)]
    for other, is_merged in ((beside, False), (merged, True)):
        step = measured.on_grid(scheme, merged=is_merged, scale=0.3)
        now = logits_of(other, rows)
        kl = sum(reference.kl(a, b) for a, b in zip(on_grid, now, strict=True)) / len(rows)
        assert step.groups["all"].kl == pytest.approx(kl, rel=1e-3)
        inner = total = 0.0
        for a, b, c, d in zip(before, after, on_grid, now, strict=True):
            S = reference.output_hessian(a, "softmax")
            inner += float((d - c).double() @ S @ (b - a).double())
            total += float((b - a).double() @ S @ (b - a).double())
        assert step.kept == pytest.approx(inner / total, rel=1e-2, abs=1e-3)
    assert measured.at(0.3)["all"].kl == measured.steps[0].groups["all"].kl
    assert f"merged into {scheme}" in repr(measured)


def test_eight_bits_keep_a_small_change_and_four_do_not() -> None:
    """Oracle: invariant. Beside the rounded model a change stays what it is; merged, less is left on a coarser grid."""
    model = tiny_model("llama", dtype=torch.float32, **WIDE)
    rows = tiny_batch(model, 8, seed=3)
    scale = 0.002 * float(model.model.layers[0].self_attn.q_proj.weight.detach().norm())
    measured = NPEFFAnalyzer(model).measure(direction_of(model), rows, scales=(scale,), random=False, quantise=SCHEMES)
    kept = {scheme: measured.on_grid(scheme, merged=True, scale=scale).kept for scheme in SCHEMES}
    beside = {scheme: measured.on_grid(scheme, merged=False, scale=scale).kept for scheme in SCHEMES}
    assert abs(beside["int8"] - 1) < 0.1 and abs(beside["Q8_0"] - 1) < 0.1
    noise = {s: abs(kept[s] - beside[s]) for s in SCHEMES}
    assert max(noise["int8"], noise["Q8_0"]) < min(noise["Q4_0"], noise["nf4"])


def test_what_cannot_be_rounded_is_refused_before_the_model_runs() -> None:
    """Oracle: what each error names."""
    model = tiny_model("llama", dtype=torch.float32)  # 16 inputs
    analyzer, rows = NPEFFAnalyzer(model), tiny_batch(model, 2, seed=3)
    direction = direction_of(model)
    with pytest.raises(ValueError, match=r"q_proj\.weight"):
        analyzer.measure(direction, rows, quantise=("Q4_0",))
    with pytest.raises(ValueError, match="'int3'"):
        analyzer.measure(direction, rows, quantise=("int3",))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="norm"):
        analyzer.measure(direction_of(model, r"(q_proj|norm)\.weight"), rows, quantise=("int8",))
    with pytest.raises(ValueError, match="97"):
        rounded(torch.ones(2, 97), "Q8_0")


def test_weights_come_back_after_an_exception() -> None:
    """Oracle: every bit before; a tied and a transposed weight among them."""
    model = tiny_model("gpt2", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    maps = maps_to_round(model, [], ("nf4",))
    with pytest.raises(RuntimeError, match="stop"), weights_rounded(model, maps, "nf4"):
        assert not torch.equal(model.transformer.h[0].attn.c_attn.weight, before["transformer.h.0.attn.c_attn.weight"])
        c_attn = before["transformer.h.0.attn.c_attn.weight"]
        torch.testing.assert_close(model.transformer.h[0].attn.c_attn.weight.T, rounded(c_attn.T, "nf4"))
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
