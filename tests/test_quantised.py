"""Models in few bits by the packages that make them: right against their dequantised weights, or refused by name.

Each test is skipped where its package is missing. Versions that were seen are in docs/models.md.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_npeff import ParameterDirection, UnsupportedModelError
from hf_npeff.fisher.weights_hash import identity_of
from tests import reference, tiny
from tests.logged import warned_by
from tests.test_families import SMALL, analyzer_of

WIDE = {
    "vocab_size": SMALL, "hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2, "intermediate_size": 128,
    "pad_token_id": 0,
}  # fmt: skip
"""Multiples of the groups that schemes round together."""
SETTINGS: dict[str, Any] = {"rank": 3}


def plain(dtype: torch.dtype = torch.float32) -> Any:
    return tiny.tiny_model("llama", dtype=dtype, std=0.1, **WIDE)


def saved() -> str:
    folder = tempfile.mkdtemp()
    plain().save_pretrained(folder)
    return folder


def worst(model: Any, exact: Any) -> float:
    """The largest relative error of an example's Fisher, against the one of a model with plain weights."""
    examples = tiny.tiny_batch(exact, 3, seed=2)
    found, wanted = (analyzer_of(m, **SETTINGS).compute_pefs(examples, progress=False) for m in (model, exact))
    assert len(found.sketch().shapes) == len(wanted.sketch().shapes) == 14
    rows = [[p.factors[i].double() * p.norms[i].sqrt() for p in (wanted, found)] for i in range(3)]
    return max(reference.relative_error_of_factors(*pair) for pair in rows)


def with_weights(model: Any, weight_of: Callable[[Any], Tensor]) -> Any:
    """The plain model with the weights that a quantised one multiplies with."""
    exact = plain()
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, module in exact.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(weight_of(layers[name]).float())
    return exact


def as_run(layer: Any) -> Tensor:
    """W of x Wᵀ, by running a layer on the identity."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=torch.float32)).T  # type: ignore[no-any-return]


def refuses(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.\d"):
        analyzer_of(model, **SETTINGS).compute_pefs(tiny.tiny_batch(plain(), 2, seed=2), progress=False)


@pytest.mark.parametrize("scheme", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchaos_weights_alone_have_the_rows_of_their_values(scheme: str) -> None:
    """Oracle: the same weights dequantised by torchao."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = plain()
    quantization.quantize_(model.model, getattr(quantization, scheme)())
    assert worst(model, with_weights(model, lambda layer: layer.weight.dequantize())) <= 1e-5


def test_torchaos_layers_that_quantise_their_inputs_are_refused() -> None:
    """Oracle: the error names the first module that cuts the gradient."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = plain()
    quantization.quantize_(model.model, quantization.Int8DynamicActivationInt8WeightConfig())
    refuses(model)


def compressed(scheme: str, dtype: torch.dtype) -> Any:
    """A checkpoint of compressed-tensors, scales by smallest and largest weights, as transformers loads it."""
    q = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    scales = importlib.import_module("compressed_tensors.quantization.utils")
    compressors = importlib.import_module("compressed_tensors.compressors")
    model = plain()
    preset = q.preset_name_to_scheme(scheme, ["Linear"])
    if preset.weights.group_size == 128:
        preset.weights.group_size = 32
    config = q.QuantizationConfig(config_groups={"group_0": preset}, ignore=["lm_head"])
    q.apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        wanted, W = module.quantization_scheme.weights, module.weight.detach()
        groups = W.unflatten(1, (-1, wanted.group_size)) if wanted.group_size else W[:, None]
        more = {}
        if hasattr(module, "weight_global_scale"):
            more["global_scale"] = scales.generate_gparam(W.min().reshape(1), W.max().reshape(1))
            module.weight_global_scale.data.copy_(more["global_scale"])
        low, high = groups.amin(-1), groups.amax(-1)
        if module.weight_scale.numel() == 1:
            low, high = W.amin().reshape(1), W.amax().reshape(1)
        scale, zero = scales.calculate_qparams(low, high, wanted, **more)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        module.quantization_status = q.QuantizationStatus.FROZEN
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(("scheme", "dtype", "bound"), [
    ("W4A16", torch.float32, 1e-5), ("W8A16", torch.float32, 1e-5), ("NVFP4A16", torch.bfloat16, 0.1),
])  # fmt: skip
def test_packed_weights_of_compressed_tensors_have_the_rows_of_their_values(
    scheme: str, dtype: torch.dtype, bound: float
) -> None:
    """Oracle: the same weights as the layers run them, on the identity; NVFP4 unpacks to bfloat16, so to 10%.

    The rows come first: a packed layer has no weight before its first forward pass.
    """
    model = compressed(scheme, dtype)
    examples = tiny.tiny_batch(plain(), 3, seed=2)
    found = analyzer_of(model, **SETTINGS).compute_pefs(examples, progress=False)
    exact = with_weights(model, lambda m: m(torch.eye(m.in_features, dtype=dtype)).detach().T)
    wanted = analyzer_of(exact, **SETTINGS).compute_pefs(examples, progress=False)
    assert len(found.sketch().shapes) == 14
    for i in range(3):
        A, B = (p.factors[i].double() * p.norms[i].sqrt() for p in (found, wanted))
        assert reference.relative_error_of_factors(B, A) <= bound


@pytest.mark.parametrize("scheme", ["W8A8", "FP8", "FP8_DYNAMIC"])
def test_layers_of_compressed_tensors_that_quantise_their_inputs_are_refused(scheme: str) -> None:
    """Oracle: the error names the first module that cuts the gradient."""
    refuses(compressed(scheme, torch.float32))


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4, scales too"])
def test_bitsandbytes_of_four_bits_have_the_rows_of_their_values(kind: str, predicted: bool) -> None:
    """Oracle: the weights as bitsandbytes dequantises them, read before anything is predicted.

    On some CPUs a prediction packs the weights and rounds their scales to bfloat16, with which the model goes on.
    """
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind[:3], bnb_4bit_use_double_quant="," in kind,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved(), quantization_config=config, dtype=torch.float32, device_map={"": device}
    )
    exact = with_weights(model, lambda m: functional.dequantize_4bit(m.weight.data, m.weight.quant_state))
    if predicted:
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]], device=device))
    assert worst(model, exact) <= (0.03 if predicted else 1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_the_same_after_a_prediction_and_others_with_other_scales(bits: int) -> None:
    """Oracle: a weight times 1.25 has the same integers; a prediction in 8 bits moves scales from tensor to layer."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    identities = []
    for factor in (1.0, 1.25):
        base = plain()
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight *= factor
        folder = tempfile.mkdtemp()
        base.save_pretrained(folder)
        config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        )
        identities.append(identity_of(model))
        if bits == 8:  # a prediction in 4 bits packs the weights on some CPUs
            with torch.no_grad():
                model(torch.tensor([[5, 6, 7]], device=model.device))
        assert identity_of(model) == identities[-1]
    assert identities[0].hash != identities[1].hash


def test_quantos_weights_have_the_rows_of_their_values() -> None:
    """Oracle: the weights as quanto's layers run them, on the identity."""
    pytest.importorskip("optimum.quanto", reason="quanto is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved(), quantization_config=transformers.QuantoConfig(weights="int8"), dtype=torch.float32
    )
    assert worst(model, with_weights(model, as_run)) <= 1e-5


class Packed(torch.nn.Module):
    """A layer as GPTQ and AWQ (buffers) or HQQ (a dictionary beside a parameter) have them: no nn.Linear, no weight."""

    def __init__(self, layer: torch.nn.Linear, *, in_buffers: bool):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        whole = (layer.weight.detach() / scale).round().to(torch.int8) + 8
        packed = (whole[:, ::2] + 16 * whole[:, 1::2]).to(torch.uint8)
        if in_buffers:
            self.register_buffer("qweight", packed)
            self.register_buffer("scales", scale)
        else:
            self.W_q = torch.nn.Parameter(packed, requires_grad=False)
            self.meta = {"nbits": 4, "scale": scale, "more": {"zero": torch.full((1,), 8.0)}}
            self.bias = torch.zeros(self.out_features)

    def values(self) -> Tensor:
        packed, scale = (self.qweight, self.scales) if hasattr(self, "qweight") else (self.W_q, self.meta["scale"])
        whole = torch.stack([packed % 16, packed // 16], -1).flatten(1)
        return (whole.to(torch.float32) - 8) * scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.values())


def packed_model(*, in_buffers: bool = True) -> Any:
    """A model whose MLPs are packed and whose attention is not."""
    model = plain()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name), in_buffers=in_buffers))
    return model


@pytest.mark.parametrize("in_buffers", [True, False])
def test_packed_layers_that_are_no_linear_layers_are_named_with_their_share(in_buffers: bool, caplog: Any) -> None:
    """Oracle: the sizes of the plain model's weights; rows of the other layers beside the unpacked values."""
    model, exact = packed_model(in_buffers=in_buffers), plain()
    with torch.no_grad():
        for layer, unpacked in zip(model.model.layers, exact.model.layers, strict=True):
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(unpacked.mlp, name).weight.copy_(getattr(layer.mlp, name).values())
    examples = tiny.tiny_batch(exact, 3, seed=2)
    found = analyzer_of(model, **SETTINGS).compute_pefs(examples, progress=False)
    sizes = {name: weight.numel() for name, weight in exact.named_parameters()}
    inside = {name: size for name, size in sizes.items() if "embed" not in name and "lm_head" not in name}
    share = sum(size for name, size in inside.items() if ".mlp." in name) / sum(inside.values())
    (warning,) = [r for r in warned_by(caplog, "fisher.preparation") if "floating point" in r.getMessage()]
    assert "model.layers.*.mlp.up_proj (quantised)" in warning.getMessage()
    assert warning.args[0] == pytest.approx(100 * share, abs=1.0)
    analysed = sum(sizes[name] for name in found.sketch().shapes)
    assert found.info["selftest"]["coverage"] == pytest.approx(analysed / sum(sizes.values()), rel=1e-3)
    wanted = analyzer_of(exact, target_modules=r".*self_attn.*", **SETTINGS).compute_pefs(examples, progress=False)
    assert list(found.sketch().shapes) == list(wanted.sketch().shapes)
    for i in range(3):
        A, B = (p.factors[i].double() * p.norms[i].sqrt() for p in (found, wanted))
        assert reference.relative_error_of_factors(B, A) <= 1e-5


def test_a_change_of_a_packed_layer_is_refused_with_what_to_do() -> None:
    """Oracle: the layer's name; the same change is measured on the model in floating point."""
    name = "model.layers.1.mlp.up_proj.weight"
    change = ParameterDirection({name: torch.ones(128, 64)}, {name: "linear"})
    examples = tiny.tiny_batch(plain(), 2, seed=2)
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*floating point"):
        analyzer_of(packed_model()).measure(change, examples, random=False)
    assert analyzer_of(plain()).measure(change, examples, random=False).at(1.0)["all"].kl > 0


def test_scales_in_a_dictionary_belong_to_the_weights() -> None:
    """Oracle: a weight of other scale has the same packed numbers and predicts otherwise."""
    identities = []
    for factor in (1.0, 1.25):
        model = packed_model(in_buffers=False)
        model.model.layers[0].mlp.up_proj.meta["scale"] *= factor
        identities.append(identity_of(model))
    assert None not in {each.hash for each in identities} and identities[0].hash != identities[1].hash
    for change in ("zero", "bias"):
        model = packed_model(in_buffers=False)
        layer = model.model.layers[0].mlp.up_proj
        (layer.meta["more"]["zero"] if change == "zero" else layer.bias).add_(1)
        assert identity_of(model).hash != identities[0].hash
