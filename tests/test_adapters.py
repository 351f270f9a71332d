"""Adapters against W + ΔW, through plain PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import WavLMConfig, WavLMForSequenceClassification

from hf_npeff import CorruptStoreError, ParameterDirection, UnsupportedModelError
from hf_npeff.weights.dense_delta import load_delta
from hf_npeff.weights.layouts import layout_of
from hf_npeff.weights.lora import low_rank
from tests.sweep.tiny_models import build
from tests.tiny import collate, tiny_batch, tiny_model

FAMILIES = [("llama", "causal-lm"), ("bert", "sequence-classification"), ("gpt2", "causal-lm")]
LINEAR = r"(q_proj|down_proj|query|value|output.dense|c_attn|c_fc|c_proj)\.weight"


def direction_of(model: Any, pattern: str = LINEAR, *, seed: int = 0, task: str | None = None) -> ParameterDirection:
    """A random direction over the parameters that match."""
    import re

    generator = torch.Generator().manual_seed(seed)
    names = [n for n, _ in model.named_parameters() if re.search(pattern + "$", n)]
    assert names
    shapes = dict(model.named_parameters())
    deltas = {n: torch.randn(shapes[n].shape, generator=generator) for n in names}
    info = {"model": "somebody/model", "revision": "a" * 40, "task": task, "component": 3, "method": "exact"}
    return ParameterDirection(deltas, {n: layout_of(model, n) for n in names}, info)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def setting(family: str, task: str) -> tuple[Any, dict[str, Tensor]]:
    model = tiny_model(family, task, dtype=torch.float32)
    return model, collate(tiny_batch(model, 3, seed=1), model)


@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_a_full_rank_lora_is_the_direction(family: str, task: str, tmp_path: Path) -> None:
    """Oracle: the model with W + ΔW; logits within 1e-5 under PeftModel, merged, at minus the scale, and unloaded."""
    model, inputs = setting(family, task)
    before = logits(model, inputs)
    direction = direction_of(model, task=task)
    truth = {}
    for scale in (0.7, -0.7):
        with direction.applied_to(model, scale):
            truth[scale] = logits(model, inputs)
        adapter = direction.to_adapter(rank=16, scale=scale)
        assert adapter.retained_energy == pytest.approx(1, abs=1e-5)
        adapter.save_pretrained(tmp_path / str(scale))
    assert (truth[0.7] - before).abs().max() > 0.01
    peft = PeftModel.from_pretrained(model, str(tmp_path / "0.7"), adapter_name="plus")
    assert (logits(peft, inputs) - truth[0.7]).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))
    peft.load_adapter(str(tmp_path / "-0.7"), adapter_name="minus")
    peft.set_adapter("minus")
    assert (logits(peft, inputs) - truth[-0.7]).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))
    peft.base_model.set_adapter(["plus", "minus"])
    assert (logits(peft, inputs) - before).abs().max() < 1e-4
    with peft.disable_adapter():
        assert torch.equal(logits(peft, inputs), before)
    peft.set_adapter("plus")
    for module in peft.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("plus", -1.0)
    assert (logits(peft, inputs) - truth[-0.7]).abs().max() < 1e-4
    for module in peft.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("plus", 1.0)
    merged = peft.merge_and_unload()
    assert (logits(merged, inputs) - truth[0.7]).abs().max() < 1e-4


def test_auto_peft_loads_an_adapter_with_its_base_model(tmp_path: Path) -> None:
    """Oracle: W + ΔW of the base model, which is saved beside it."""
    model, inputs = setting("llama", "causal-lm")
    model.save_pretrained(tmp_path / "base")
    direction = direction_of(model, task="causal-lm")
    direction.info |= {"model": str(tmp_path / "base"), "revision": None}
    direction.to_adapter(rank=16, scale=0.5).save_pretrained(tmp_path / "adapter")
    with direction.applied_to(model, 0.5):
        truth = logits(model, inputs)
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32)
    assert (logits(loaded, inputs) - truth).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "task", "pattern"),
    [
        ("bert", "sequence-classification", r"(query|output\.dense)\.(weight|bias)"),
        ("gpt2", "causal-lm", r"(c_attn|c_fc)\.(weight|bias)"),
        ("bert", "sequence-classification", r"(query\.weight|LayerNorm\.(weight|bias))"),
        ("llama", "causal-lm", r"(q_proj|layernorm)\.weight"),
        ("bert", "sequence-classification", r"(query|word_embeddings)\.weight"),
        ("llama", "causal-lm", r"(q_proj|embed_tokens)\.weight"),
    ],
)
def test_biases_norms_and_embeddings_go_along(family: str, task: str, pattern: str, tmp_path: Path) -> None:
    """Oracle: the model with θ + δ."""
    model, inputs = setting(family, task)
    direction = direction_of(model, pattern, task=task)
    with direction.applied_to(model, 0.6):
        truth = logits(model, inputs)
    before = logits(model, inputs)
    direction.to_adapter(rank=16, scale=0.6, model=model).save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(model, str(tmp_path))
    assert (truth - before).abs().max() > 1e-3
    assert (logits(peft, inputs) - truth).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


def test_rank_one_keeps_the_energy_that_it_reports(tmp_path: Path) -> None:
    """Oracle: ‖BA‖² / ‖ΔW‖² of the tensors in the file, which is the first squared singular value's share."""
    model, _ = setting("gpt2", "causal-lm")
    direction = direction_of(model)
    adapter = direction.to_adapter(rank=1, scale=2.0)
    adapter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = sum(
        float((tensors[name] @ tensors[name.replace("lora_B", "lora_A")]).square().sum())
        for name in tensors
        if "lora_B" in name
    )
    assert kept / 4 == pytest.approx(adapter.retained_energy, rel=1e-4)
    best = sum(float(torch.linalg.svdvals(v)[0] ** 2) for v in direction.values())
    assert adapter.retained_energy == pytest.approx(best, rel=1e-4)


def test_large_matrices_are_truncated_as_well_by_the_randomised_svd() -> None:
    """Oracle: a matrix of rank 2 plus noise, truncated by numpy-exact singular values; energies within 1%."""
    generator = torch.Generator().manual_seed(0)
    U, V = torch.randn(1100, 2, generator=generator), torch.randn(2, 1200, generator=generator)
    matrix = U @ V + 0.1 * torch.randn(1100, 1200, generator=generator)
    B, A, kept = low_rank(matrix, 2)
    assert B.shape == (1100, 2) and A.shape == (2, 1200)
    left = float((matrix - B @ A).square().sum() / matrix.square().sum())
    assert kept == pytest.approx(1 - left, abs=1e-3) and left < 0.01


def test_shira_carries_the_largest_entries(tmp_path: Path) -> None:
    """Oracle: W plus the delta with all but its r·(in + out) largest entries set to zero."""
    model, inputs = setting("llama", "causal-lm")
    direction = direction_of(model, r"(q_proj|down_proj)\.weight", task="causal-lm")
    adapter = direction.to_adapter(rank=2, scale=0.5, kind="shira")
    adapter.save_pretrained(tmp_path)
    sparse = {}
    for name, delta in direction.items():
        size = 2 * sum(delta.shape)
        threshold = delta.abs().flatten().topk(size).values[-1]
        sparse[name] = torch.where(delta.abs() >= threshold, delta, 0.0)
    norm = sum(float(v.square().sum()) for v in sparse.values()) ** 0.5
    assert adapter.retained_energy == pytest.approx(norm**2, rel=1e-5)
    with ParameterDirection(sparse, direction.layouts).applied_to(model, 0.5 * norm):
        truth = logits(model, inputs)
    peft = PeftModel.from_pretrained(model, str(tmp_path))
    assert (logits(peft, inputs) - truth).abs().max() < 1e-5
    with pytest.raises(ValueError, match="rank=16"):
        direction.to_adapter(rank=16, kind="shira")


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_a_dense_delta_comes_back(scale: float, tmp_path: Path) -> None:
    """Oracle: the direction and the scale that were saved."""
    model, inputs = setting("bert", "sequence-classification")
    direction = direction_of(model, r".*")
    direction.to_adapter(scale=scale, kind="delta").save_pretrained(tmp_path)
    deltas, _ = load_delta(tmp_path)
    torch.testing.assert_close(deltas, {n: scale * v for n, v in direction.items()})
    again = ParameterDirection.from_pretrained(tmp_path)
    assert again.info["scale"] == scale and again.layouts == direction.layouts
    with direction.applied_to(model, scale):
        truth = logits(model, inputs)
    with again.applied_to(model, again.info["scale"]):
        assert (logits(model, inputs) - truth).abs().max() < 1e-5


def test_the_card_says_what_an_adapter_disrupts(tmp_path: Path) -> None:
    """Oracle: the facts that went in."""
    model, _ = setting("llama", "causal-lm")
    adapter = direction_of(model, task="causal-lm").to_adapter(rank=2, scale=0.25)
    adapter.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for fact in ("library_name: peft", "somebody/model", "a" * 40, "0.25", "Component 3", "PeftModel"):
        assert fact in card
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/model" and config["revision"] == "a" * 40


# Bad input


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    """Oracle: the errors."""
    model, _ = setting("bert", "sequence-classification")
    direction = direction_of(model)
    for scale in (0.0, float("nan"), float("inf"), True, "1"):
        for kind in ("lora", "shira", "delta"):
            with pytest.raises(ValueError, match="scale"):
                direction.to_adapter(scale=scale, kind=kind)  # type: ignore[arg-type]
    for rank in (0, -1, 17, True, 1.5):
        with pytest.raises(ValueError, match="rank"):
            direction.to_adapter(rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind"):
        direction.to_adapter(kind="ia3")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="SHiRA"):
        direction_of(model, r"LayerNorm\.weight").to_adapter(kind="shira")
    with pytest.raises(ValueError, match=r"LayerNorm\.weight"):
        direction_of(model, r"(query|LayerNorm)\.weight").to_adapter()
    with pytest.raises(ValueError, match=r"key\.bias"):
        direction_of(model, r"(query\.weight|key\.bias)").to_adapter()


def test_a_folder_with_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    """Oracle: CorruptStoreError for every damage."""
    model, _ = setting("bert", "sequence-classification")
    direction = direction_of(model)
    direction.to_adapter().save_pretrained(tmp_path / "lora")
    with pytest.raises(CorruptStoreError, match="PeftModel"):
        ParameterDirection.from_pretrained(tmp_path / "lora")
    direction.to_adapter(kind="delta").save_pretrained(tmp_path / "delta")
    path = tmp_path / "delta" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(CorruptStoreError, match=r"adapter_model\.safetensors"):
        ParameterDirection.from_pretrained(tmp_path / "delta")
    path.unlink()
    with pytest.raises(CorruptStoreError, match=r"adapter_model\.safetensors"):
        ParameterDirection.from_pretrained(tmp_path / "delta")
    with pytest.raises(OSError):
        ParameterDirection.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["lora", "shira", "delta"])
def test_a_scaled_adapter_is_that_of_a_longer_change(kind: Any) -> None:
    """Oracle: the adapter of the longer change; the factors of a LoRA multiply to it."""
    direction = direction_of(tiny_model("llama", "causal-lm", dtype=torch.float32))
    short, long = (direction.to_adapter(rank=2, scale=scale, kind=kind) for scale in (0.5, -1.0))
    scaled = short.scaled(-2.0)
    assert (-2.0 * short).retained_energy == (-short).retained_energy == short.retained_energy
    assert (short * -2.0).about == scaled.about and repr(-2.0 * short) == repr(scaled)
    for name in direction:
        torch.testing.assert_close(scaled.delta(name), long.delta(name))
    assert scaled.about is not None and scaled.about.scale == -1.0
    assert short.delta(name).equal(direction.to_adapter(rank=2, scale=0.5, kind=kind).delta(name)), (
        "the first is as it was"
    )
    for wrong in (0.0, float("inf")):
        with pytest.raises(ValueError, match="scale"):
            short.scaled(wrong)
    if kind != "lora":
        with pytest.raises(UnsupportedModelError, match="factors"):
            short.factors()
        return
    for name, (B, A) in scaled.factors().items():
        torch.testing.assert_close(B @ A, long.delta(name))
    dense = ParameterDirection({n: long.delta(n) for n in direction}, direction.layouts, unit=False)
    assert scaled.energies() == pytest.approx(dense.energies())


def wavlm() -> tuple[Any, dict[str, Tensor]]:
    """A tiny classifier of sounds, and a sound."""
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8), num_labels=3,
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = WavLMForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, {"input_values": torch.randn(1, 800, generator=generator)}


@pytest.mark.parametrize(
    ("model_type", "task", "pattern"),
    [
        ("jamba", "causal-lm", r"dt_proj"),
        ("layoutlmv3", "sequence-classification", r"rel_pos_(x_|y_)?bias"),
        ("longcat_flash", "causal-lm", r"router\.classifier"),
        ("wavlm", "audio-classification", r"attention\.(q|k|v|out)_proj"),
    ],
)
def test_a_lora_that_peft_would_ignore_is_refused(model_type: str, task: str, pattern: str) -> None:
    """Oracle: PEFT, whose LoRA changes nothing on these layers, while the same change of the weights does."""
    if model_type == "wavlm":
        model, example = wavlm()
    else:
        tiny = build(model_type, task)
        model, example = tiny.model, {n: torch.as_tensor(v)[None] for n, v in tiny.examples[1].items()}
    model.config.use_cache = False  # with a cache, Jamba needs a layer of attention
    direction = direction_of(model, rf"{pattern}\.weight")
    with pytest.raises(UnsupportedModelError, match=pattern):
        direction.to_adapter(rank=2)
    before = logits(model, example)
    with direction.applied_to(model, 3.0):
        assert (logits(model, example) - before).abs().max() > 1e-4
    targets = [name.removesuffix(".weight") for name in direction]
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    torch.testing.assert_close(logits(wrapped.eval(), example), before, atol=1e-6, rtol=0)
