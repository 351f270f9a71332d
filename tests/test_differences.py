"""Gradients beside central differences: cuts and wrong backward passes outside linear maps are refused by name."""

from __future__ import annotations

import logging
import re
from ast import literal_eval
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs, UnsupportedModelError
from hf_npeff.fisher.linear_maps import find_linear_maps
from hf_npeff.fisher.nudges import Directions, Nudges
from hf_npeff.fisher.weight_reads import MovedReads, moved
from hf_npeff.weights.activations import LinearDelta
from tests.sweep.tiny_models import build
from tests.tiny import tiny_batch, tiny_model


def analysed(model: Any, **settings: Any) -> PEFs:
    fisher = FisherConfig(rank=3, output_factor="exact", positions="last", sketch="identity", **settings)
    return NPEFFAnalyzer(model, fisher=fisher).compute_pefs(tiny_batch(model, 3, seed=1), progress=False)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("llama", "sequence-classification", dtype=dtype, num_hidden_layers=3)


class Around(nn.Module):
    """A module whose forward pass is somebody's own, as quantisers and research code wrap them."""

    def __init__(self, inner: Any, forward: Callable[..., Any]):
        super().__init__()
        self.inner = inner
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.inner, *args, **kwargs)


class WrongSlope(torch.autograd.Function):
    """SiLU whose backward pass forgets a term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return delta * ctx.saved_tensors[0].sigmoid()


class NoSlope(torch.autograd.Function):
    """SiLU whose backward pass gives zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return torch.zeros_like(delta)


class Halved(torch.autograd.Function):
    """The identity, with half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return 0.5 * delta


def in_8_bits(x: Tensor) -> Tensor:
    scale = x.detach().abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8).to(x.dtype) * scale


class StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return in_8_bits(x)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return delta


def without_gradients(inner: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return inner(*args, **kwargs)


def rounded(inner: Any, x: Tensor) -> Tensor:
    y = inner(x)
    scale = y.detach().abs().max() / 127
    return torch.round(y / scale) * scale


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "detach in a norm": ("post_attention_layernorm", lambda inner, x: inner(x.detach()), "self_attn.o_proj"),
    "attention under no_grad": ("self_attn", without_gradients, "self_attn.inner.o_proj"),
    "detach in a residual": ("mlp", lambda inner, x: inner(x) + (0.3 * x).detach(), "self_attn.o_proj"),
    "wrong backward pass": ("mlp.act_fn", lambda _, x: WrongSlope.apply(x), "mlp.gate_proj"),
    "missing backward pass": ("mlp.act_fn", lambda _, x: NoSlope.apply(x), "mlp.gate_proj"),
    "scaled gradient": ("mlp", lambda inner, x: Halved.apply(inner(x)), "mlp.inner.down_proj"),
    "rounded activations": ("mlp.act_fn", rounded, "mlp.act_fn"),
    "activations of 8 bits": ("post_attention_layernorm", lambda n, x: n(in_8_bits(x)), "post_attention_layernorm"),
    "floating point of 8 bits": (
        "post_attention_layernorm", lambda n, x: n(x.detach().to(torch.float8_e4m3fn).to(x.dtype)),
        "self_attn.o_proj",
    ),
    "integers read back": ("mlp.act_fn", lambda inner, x: (inner(x) * 64).int().float() / 64, "mlp.act_fn"),
    "integers times a scale": ("mlp.act_fn", lambda inner, x: (inner(x) * 64).to(torch.int64) * 0.015625, "mlp.act_fn"),
}  # fmt: skip
"""Fault → the module of the middle layer that it is put around, its forward pass, what the error has to name."""


def faulty(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model = llama(dtype)
    path, forward, _ = FAULTS[kind]
    parent, _, name = f"model.layers.1.{path}".rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, name, Around(getattr(holder, name), forward))
    return model


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", FAULTS)
def test_gradients_that_are_cut_or_wrong_outside_linear_maps_are_refused_by_name(kind: str) -> None:
    """Oracle: the fault is planted. Autograd is consistent with itself, so the rows are what autograd says."""
    with pytest.raises(UnsupportedModelError, match=rf"model\.layers\.1\.{re.escape(FAULTS[kind][2])}\b"):
        analysed(faulty(kind))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["detach in a norm", "scaled gradient", "activations of 8 bits"])
def test_large_cuts_are_noticed_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """Oracle: the planted fault."""
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\."):
        analysed(faulty(kind, dtype))


@pytest.mark.parametrize("kind", ["detach in a norm", "missing backward pass"])
def test_what_the_error_leaves_out_leaves_rows_that_are_right(kind: str) -> None:
    """Oracle: the same maps of the model without the fault, which does nothing to what comes behind it."""
    with pytest.raises(UnsupportedModelError) as refused:
        analysed(faulty(kind))
    advice = re.search(r"exclude_modules=(.*)$", str(refused.value))
    assert advice
    faulty_pefs = analysed(faulty(kind), exclude_modules=literal_eval(advice[1]))
    names = list(faulty_pefs.sketch().shapes)
    assert "model.layers.1.mlp.down_proj.weight" in names
    sound = analysed(llama(), target_modules=[name.removesuffix(".weight") for name in names])
    assert list(sound.sketch().shapes) == names
    torch.testing.assert_close(faulty_pefs.factors, sound.factors, atol=1e-5, rtol=1e-4)
    assert faulty_pefs.info["selftest"]["difference_error"] < 1e-2


@pytest.mark.parametrize("by", ["detach", "function"])
def test_rounding_with_a_straight_through_gradient_is_taken(by: str) -> None:
    """Oracle: its gradient is that of the model that does not round, up to what 8 bits change."""
    model = llama()
    layer = model.model.layers[1]
    through: dict[str, Callable[[Tensor], Tensor]] = {
        "detach": lambda x: x + (in_8_bits(x) - x).detach(), "function": StraightThrough.apply,
    }  # fmt: skip
    layer.post_attention_layernorm = Around(layer.post_attention_layernorm, lambda n, x: n(through[by](x)))
    tested = analysed(model).info["selftest"]
    assert tested["difference_error"] < 1e-2
    assert "model.layers.1.post_attention_layernorm (round)" in tested["difference_note"]


@pytest.mark.parametrize(
    ("family", "dtype", "error"),
    [("llama", torch.float32, 1e-3), ("llama", torch.float64, 1e-3), ("gpt2", torch.float32, 1e-3),
     ("bert", torch.float32, 1e-3), ("t5", torch.float32, 1e-2), ("llama", torch.bfloat16, 0.15)],
)  # fmt: skip
def test_gradients_of_a_sound_model_agree_with_differences(
    family: str, dtype: torch.dtype, error: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: transformers' models compute what their backward passes say; the agreement is kept and printed."""
    model = tiny_model(family, "sequence-classification", dtype=dtype)
    with caplog.at_level(logging.INFO):
        tested = analysed(model).info["selftest"]
    assert 0 < tested["difference_error"] < error
    assert tested["difference_note"] == ""
    (line,) = [r.getMessage() for r in caplog.records if "self-test" in r.getMessage()]
    assert f"of gradients against finite differences {tested['difference_error']:.1e}" in line
    assert not any(module._forward_hooks for module in model.modules())


def beside(inner: Any, x: Tensor) -> Tensor:
    return inner(x) + 0.3 * F.linear(x, inner.weight.data)


def divided(inner: Any, x: Tensor) -> Tensor:
    return inner(x) / inner.weight.detach().norm(dim=1)


def by_size(inner: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        size = inner.weight.square().mean()
    return inner(x) * size


class FirstCopy(nn.Linear):
    """A layer that multiplies with its weight, and with a copy that it made when it was first called."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "copy"):
            self.copy = self.weight.detach().clone()
        return F.linear(x, self.weight + (self.copy - self.weight).detach(), self.bias)


class RoundedWeight(nn.Linear):
    """A layer in quantisation-aware training, whose gradient passes straight through the rounding."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().max() / 127
        return F.linear(x, self.weight + ((self.weight / scale).round() * scale - self.weight).detach(), self.bias)


def of_class(kind: type[nn.Linear], layer: Any) -> nn.Linear:
    other = kind(layer.in_features, layer.out_features, bias=layer.bias is not None)
    other.load_state_dict(layer.state_dict())
    return other


READS: dict[str, Callable[[Any], Any]] = {
    "beside the call": lambda layer: Around(layer, beside),
    "its rows' norms": lambda layer: Around(layer, divided),
    "its size": lambda layer: Around(layer, by_size),
    "a copy": lambda layer: of_class(FirstCopy, layer),
}
"""Uses of a weight that neither hooks nor autograd know of."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", READS)
def test_weights_that_are_read_detached_are_refused_by_name(kind: str) -> None:
    """Oracle: the fault is planted. Without these layers rows are those of the model as it predicts."""
    model = llama()
    model.model.layers[1].mlp.up_proj = READS[kind](model.model.layers[1].mlp.up_proj)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(
        UnsupportedModelError, match=r"the weights of (model\.layers\.1\.mlp\.up_proj\S*) have"
    ) as refused:
        analysed(model)
    advice = re.search(r"exclude_modules=(.*)$", str(refused.value))
    assert advice
    assert analysed(model, exclude_modules=literal_eval(advice[1])).info["selftest"]["difference_error"] < 1e-2
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_weights_that_are_read_detached_in_bfloat16_are_refused() -> None:
    """Oracle: the planted fault, in every layer, because small ones are within rounding."""
    model = llama(torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.up_proj = Around(layer.mlp.up_proj, divided)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj"):
        analysed(model)


class OnlyItsOwn(nn.Linear):
    """A layer that guards its weight: with another one it stops, or gives NaN."""

    guarded: Tensor
    stops = True

    def forward(self, x: Tensor) -> Tensor:
        if torch.equal(self.weight, self.guarded):
            return super().forward(x)
        if self.stops:
            raise RuntimeError("another weight")
        return super().forward(x) * float("nan")


@pytest.mark.parametrize(("stops", "said"), [(True, "another weight"), (False, "with changed weights")])
def test_uses_of_weights_that_cannot_be_looked_for_are_in_the_record(stops: bool, said: str) -> None:
    """Oracle: the layer is planted; it is the same function, so rows are those of the plain layer."""
    model = llama()
    layer: Any = of_class(OnlyItsOwn, model.model.layers[1].mlp.up_proj)
    layer.guarded, layer.stops = layer.weight.detach().clone(), stops
    model.model.layers[1].mlp.up_proj = layer
    pefs = analysed(model)
    tested = pefs.info["selftest"]
    assert "not checked whether weights are used outside" in tested["difference_note"]
    assert said in tested["difference_note"]
    assert tested["difference_error"] < 1e-2
    assert torch.equal(pefs.factors, analysed(llama()).factors)


def test_weights_that_are_rounded_in_every_pass_are_taken() -> None:
    """Oracle: the same model with the weight in 8 bits."""
    model, plain = llama(), llama()
    model.model.layers[1].mlp.up_proj = of_class(RoundedWeight, model.model.layers[1].mlp.up_proj)
    weight = plain.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        scale = weight.abs().max() / 127
        weight.copy_((weight / scale).round() * scale)
    torch.testing.assert_close(analysed(model).factors, analysed(plain).factors, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_reads_that_are_moved_are_a_change_of_the_weights(family: str) -> None:
    """Oracle: the change written into the weights, and the nudge that amounts to it, in float64."""
    model = tiny_model(family, "causal-lm", dtype=torch.float64)
    maps, ids = find_linear_maps(model), torch.arange(5, 12)[None]
    weights = dict(model.named_parameters())
    with torch.no_grad(), Nudges(model, Directions(maps, 1, seed=3)) as nudges:
        model(input_ids=ids)
        nudges.at_stretched(0.01, {m.parameter: m.as_matrix(weights[m.parameter]) for m in maps})
        nudged = model(input_ids=ids).logits
        nudges.rest()
        with MovedReads([moved(weights[m.parameter], m, nudges, 0.01) for m in maps]):
            read = model(input_ids=ids).logits
        for m in maps:
            weight = weights[m.parameter]
            weight += m.as_weight(nudges.change_of_weight(m.parameter, 0.01, m.as_matrix(weight)))
    written = model(input_ids=ids).logits
    torch.testing.assert_close(read, written, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(nudged, written, atol=1e-9, rtol=1e-9)


def test_a_model_of_transformers_that_replaces_its_gradient_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: YOSO's attention draws hash codes forwards, and estimates the gradient of their expectation."""
    tiny = build("yoso", "token-classification")
    fisher = FisherConfig(rank=3, output_factor="exact", sketch="identity")
    pefs = NPEFFAnalyzer(tiny.model, fisher=fisher).compute_pefs(tiny.examples, batch_size=1, progress=False)
    texts = [r.getMessage() for r in caplog.records if "stops or replaces gradients" in r.getMessage()]
    assert len(texts) == 1
    assert texts[0].startswith("transformers' own code of YosoForTokenClassification")
    assert pefs.info["selftest"]["difference_error"] > 1e-2
    assert pefs.info["selftest"]["difference_note"] in texts[0]


def test_differences_that_do_not_settle_are_said_to_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: a planted switch that changes its mind at every step; no size of step is small enough."""
    model = llama()
    layer = model.model.layers[1]
    layer.mlp = Around(layer.mlp, lambda inner, x: torch.where(torch.sin(1e7 * x) > 0, inner(x), 0.9 * inner(x)))
    with caplog.at_level(logging.INFO):
        tested = analysed(model).info["selftest"]
    assert tested["difference_error"] is None
    assert "do not converge" in tested["difference_note"]
    assert "of gradients against finite differences not checked (" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_nudge_is_a_change_of_the_weights(family: str) -> None:
    """Oracle: σ·s·b aᵀ written into the weights, of linear layers, of Conv1D and of fused experts, in float64."""
    model = tiny_model(family, "causal-lm", dtype=torch.float64)
    maps = find_linear_maps(model)
    ids = torch.arange(5, 12)[None]
    directions = Directions(maps, 2, seed=3)
    with torch.no_grad(), Nudges(model, directions) as nudges:
        model(input_ids=ids)
        nudges.at(1, 0.01)
        moved = model(input_ids=ids).logits
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for m in maps:
            a, b = (t.double()[:, 1] for t in directions.of(m.parameter, ids.double()))
            delta = LinearDelta(0.01 * nudges.sizes()[m.parameter][1] * b[:, None], a[None]).matrix()
            weight = weights[m.parameter]
            weight += m.fused.as_weight(delta) if m.fused else (delta.mT if m.transposed else delta)
    torch.testing.assert_close(moved, model(input_ids=ids).logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_copies_in_a_pass_are_nudged_like_the_examples_alone(family: str) -> None:
    """Oracle: a pass for every step, of linear layers, Conv1D, fused experts and flattened batches, in float64."""
    model = tiny_model(family, "causal-lm", dtype=torch.float64)
    ids, steps = torch.tensor([[5, 6, 7], [9, 8, 12]]), [(1, 0.01), (0, -0.02), (1, -0.01)]
    with torch.no_grad(), Nudges(model, Directions(find_linear_maps(model), 2, seed=3)) as nudges:
        unmoved = model(input_ids=ids).logits
        nudges.at_each(steps)
        together = model(input_ids=ids.repeat(3, 1)).logits
        for copy, step in zip(together.chunk(3), steps, strict=True):
            nudges.at(*step)
            torch.testing.assert_close(copy, model(input_ids=ids).logits, atol=1e-9, rtol=1e-9)
            assert float((copy - unmoved).norm() / unmoved.norm()) > 1e-3


@pytest.mark.parametrize("at", ["behind", "nowhere"])
def test_gradients_of_parameters_are_compared_with_differences(at: str) -> None:
    """Oracle: where the model is cut on purpose; an analysis of parameters alone asks no linear map."""
    model = tiny_model("llama", dtype=torch.float32)
    names = ["model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"]
    config = FisherConfig(rank=2, target_modules=[], parameters=names)
    if at == "behind":
        layer, forward = model.model.layers[0].mlp, model.model.layers[0].mlp.forward
        layer.forward = lambda x: forward(x).detach()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    analyzer, examples = NPEFFAnalyzer(model, fisher=config), tiny_batch(model, 3, seed=1)
    if at == "behind":
        with pytest.raises(UnsupportedModelError, match=r"input_layernorm.*detach.*layers\.0\.mlp"):
            analyzer.compute_pefs(examples)
    else:
        assert len(analyzer.compute_pefs(examples)) == 3
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
