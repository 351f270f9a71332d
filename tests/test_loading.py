"""However a model is loaded or wrapped: 16 bits, adapters, checkpointing, offloading, quantisation, DDP."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor

from hf_npeff import NPEFFAnalyzer
from tests import reference, tiny
from tests.test_families import SMALL, analyzer_of, pair, worst_error


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma2"])
def test_a_model_in_bfloat16_comes_close_to_its_own_weights_in_float64(family: str) -> None:
    """Oracle: JᵀSJ in float64 of the rounded weights; bfloat16 has 8 bits, and errors of some percent are its own."""
    task = tiny.FAMILIES[family][0] if family != "bert" else "sequence-classification"
    model, exact = pair(family, task, std=0.15)
    model = model.to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    examples = tiny.tiny_batch(model, 3, seed=1)
    analyzer = analyzer_of(model)
    pefs = analyzer.compute_pefs(examples)
    assert pefs.factors.dtype == torch.float64 and model.dtype == torch.bfloat16
    assert worst_error(analyzer, exact, examples, reference.terms_of(task)) <= 0.1


def with_adapter(family: str, task: str) -> tuple[Any, Any]:
    models = []
    for model in pair(family, task):
        config = peft.LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
        )
        torch.manual_seed(0)
        models.append(peft.get_peft_model(model, config))
    models[1].load_state_dict(models[0].state_dict())
    return models[0].eval(), models[1].double().eval()


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
def test_under_an_adapter_the_base_weights_are_analysed_unless_the_adapter_is_named(family: str, task: str) -> None:
    """Oracle: JᵀSJ of the wrapped model with respect to the base's weights, then to lora_A and lora_B."""
    model, exact = with_adapter(family, task)
    examples = tiny.tiny_batch(model.get_base_model(), 3, seed=1)
    exact.config.dtype = torch.float64
    base = analyzer_of(model)
    names = {m.parameter for m in base.maps}
    assert not any("lora" in name for name in names)
    assert names <= set(dict(tiny.tiny_model(family, task).named_parameters())), "names of the bare model"
    adapter = analyzer_of(model, target_modules=r".*lora_[AB]\.default")
    assert {m.parameter.split(".")[-3] for m in adapter.maps} == {"lora_A", "lora_B"}
    oracle = wrapped(exact)
    for analyzer in (base, adapter):
        assert worst_error(analyzer, oracle, examples, reference.terms_of(task)) <= 1e-4


def wrapped(model: Any) -> Any:
    """The oracle reads a model's class, config and dtype, and names of weights; here they are those of its base."""

    def named_parameters(self: Any, *args: Any, **settings: Any) -> Any:
        for name, parameter in super(type(self), self).named_parameters(*args, **settings):
            bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield (name if "lora_" in name else bare), parameter

    methods = {"named_parameters": named_parameters}
    model.__class__ = type(type(model.get_base_model()).__name__, (type(model),), methods)
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Oracle: the same model without it; a model in training mode comes back in training mode."""
    plain = tiny.tiny_model("llama", vocab_size=SMALL)
    model = tiny.tiny_model("llama", vocab_size=SMALL)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    examples = tiny.tiny_batch(plain, 3, seed=1)
    ours, theirs = (analyzer_of(m).compute_pefs(examples) for m in (model, plain))
    torch.testing.assert_close(ours.factors, theirs.factors, rtol=0, atol=0)
    assert model.training and model.is_gradient_checkpointing
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm")])
def test_an_offloaded_model_gives_the_rows_of_one_in_memory(family: str, task: str, where: str, tmp_path: Path) -> None:
    """Oracle: the same model in memory. Weights come and go in every layer's forward pass."""
    plain = tiny.tiny_model(family, task, dtype=torch.float32, vocab_size=SMALL)
    model: Any = tiny.tiny_model(family, task, dtype=torch.float32, vocab_size=SMALL)
    device = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, device)
    elif where == "disk":
        accelerate.disk_offload(model, tmp_path, device)
    else:
        layers = {name.rsplit(".", 2)[0] for name, _ in model.named_parameters()}
        body = next(name for name in ("bert", "model") if hasattr(model, name))
        spread = {name: "cpu" for name, _ in model.named_children()} | {body: "disk"}
        assert layers
        model = accelerate.dispatch_model(model, spread, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    examples = tiny.tiny_batch(plain, 3, seed=1)
    assert any(p.device.type == "meta" for p in model.parameters())
    for factor in ("exact", "spectral"):
        rank = 2 if factor == "spectral" else 64
        ours, theirs = (analyzer_of(m, output_factor=factor, rank=rank).compute_pefs(examples) for m in (model, plain))
        torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-5, atol=0)
        for i in range(3):
            assert reference.relative_error_of_factors(theirs.factors[i], ours.factors[i]) <= 1e-5
    with pytest.raises(ValueError, match="offloaded"):
        analyzer_of(model, parameters=r".*embed.*")


class QuantisedLinear(torch.nn.Linear):
    """What 8-bit layers are to a hook: whole numbers for a weight, which autograd cannot differentiate."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype
        )
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = torch.nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_weights_of_whole_numbers_give_the_rows_of_their_rounded_values() -> None:
    """Oracle: the same model with the rounded weights in floating point."""
    model = tiny.tiny_model("llama", dtype=torch.float32, vocab_size=SMALL)
    rounded = tiny.tiny_model("llama", dtype=torch.float32, vocab_size=SMALL)
    for m, quantise in ((model, True), (rounded, False)):
        for layer in m.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        new = QuantisedLinear(child)
                        if quantise:
                            setattr(part, name, new)
                        else:
                            child.weight.data = new.weight.float() * new.scale
    examples = tiny.tiny_batch(rounded, 3, seed=1)
    ours, theirs = (analyzer_of(m).compute_pefs(examples) for m in (model, rounded))
    assert ours.info["selftest"]["row_error"] is None
    torch.testing.assert_close(ours.factors, theirs.factors, rtol=0, atol=1e-5)


def test_a_weight_that_cannot_be_checked_and_is_not_called_is_left_out_by_name() -> None:
    """Oracle: hooks never see it, and autograd cannot say whether it matters."""
    model = tiny.tiny_model("llama", dtype=torch.float32, vocab_size=SMALL)
    model.model.layers[0].mlp.spare = QuantisedLinear(torch.nn.Linear(4, 4))
    pefs = analyzer_of(model).compute_pefs(tiny.tiny_batch(model, 2, seed=1))
    assert pefs.info["selftest"]["left_out"] == ["model.layers.0.mlp.spare.weight"]


@pytest.mark.parametrize("prepared", [False, True])
def test_weights_of_whole_numbers_need_no_gradients_of_embeddings(prepared: bool) -> None:
    """Oracle: the same model without `enable_input_require_grads`, which training in 4 or 8 bits switches on."""
    model = tiny.tiny_model("llama", dtype=torch.float32, vocab_size=SMALL)
    examples = tiny.tiny_batch(model, 3, seed=1)
    before = analyzer_of(model).compute_pefs(examples)
    if prepared:
        model.enable_input_require_grads()
    after = analyzer_of(model).compute_pefs(examples)
    torch.testing.assert_close(after.factors, before.factors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_loaded_in_few_bits_has_the_rows_of_its_weights(bits: int, prepared: bool, tmp_path: Path) -> None:
    """Oracle: the same model dequantised; 8-bit layers round their inputs as well, so to 10% of an example's Fisher."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = {"hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2, "intermediate_size": 64}  # multiples of 64
    tiny.tiny_model("llama", dtype=torch.float32, std=0.1, **wide).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": device}, dtype=torch.float32
    )
    if prepared:
        model.enable_input_require_grads()
    examples = tiny.tiny_batch(model, 3, seed=1)
    settings: dict[str, Any] = {"rank": 4, "output_factor": "spectral", "storage_dtype": "float32"}
    analyzer = analyzer_of(model, **settings)
    pefs = analyzer.compute_pefs(examples)
    assert pefs.info["selftest"]["row_error"] is None and 0.5 < pefs.info["selftest"]["coverage"] < 1
    exact = analyzer_of(model.dequantize().float(), **settings).compute_pefs(examples)
    for i in range(3):
        A, B = (p.factors[i] * p.norms[i].sqrt() for p in (pefs, exact))
        assert reference.relative_error_of_factors(B, A) <= 0.1


def test_a_data_parallel_wrapper_is_taken_off() -> None:
    """Oracle: the model inside it, names and fingerprint included."""
    model = tiny.tiny_model("bert", dtype=torch.float32, vocab_size=SMALL)
    examples = tiny.tiny_batch(model, 3, seed=1)
    plain = analyzer_of(model)
    fisher, tokenizer = plain.fisher, plain.processing_class
    wrapped_up = NPEFFAnalyzer(torch.nn.DataParallel(model), tokenizer, fisher=fisher)
    ours, theirs = wrapped_up.compute_pefs(examples), plain.compute_pefs(examples)
    assert ours.fingerprint == theirs.fingerprint
    assert torch.equal(ours.factors, theirs.factors)


def trained_in_bfloat16(model: Any) -> Any:
    """The model as Accelerate leaves it: autocast around its forward pass, the weights still in float32."""
    # prepare_model does this with `model.forward`; an Accelerator would set the mixed precision of the whole process.
    forward = model.forward
    model._original_forward = forward
    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(forward.__func__), model)
    return model


@pytest.mark.parametrize("times", [1, 2])
def test_a_model_fresh_from_bfloat16_training_gives_the_rows_of_its_weights(times: int) -> None:
    """Oracle: the same weights without Accelerate's autocast around the forward pass, which is handed back."""
    plain, model = (tiny.tiny_model("llama", dtype=torch.float32, vocab_size=20) for _ in range(2))
    for _ in range(times):
        model = trained_in_bfloat16(model)
    wrapper = model.forward
    examples = tiny.tiny_batch(plain, 3, seed=1)
    with torch.no_grad():
        ids = torch.tensor([examples[0]["input_ids"]])
        assert not torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    pefs, expected = (NPEFFAnalyzer(m, tiny.tiny_tokenizer()).compute_pefs(examples) for m in (model, plain))
    assert torch.equal(pefs.norms, expected.norms)
    assert torch.equal(pefs.factors, expected.factors)
    assert model.forward is wrapper


def test_an_autocast_around_the_analysis_changes_no_row() -> None:
    """Oracle: the rows without it."""
    model = tiny.tiny_model("bert", dtype=torch.float32, vocab_size=20)
    examples = tiny.tiny_batch(model, 3, seed=1)
    expected = NPEFFAnalyzer(model, tiny.tiny_tokenizer()).compute_pefs(examples)
    with torch.autocast("cpu", torch.bfloat16):
        pefs = NPEFFAnalyzer(model, tiny.tiny_tokenizer()).compute_pefs(examples)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(pefs.norms, expected.norms)
    assert torch.equal(pefs.factors, expected.factors)
