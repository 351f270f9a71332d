"""Adapters for llama.cpp, read back with the gguf package; `make runtimes` runs llama.cpp itself.

Oracle of names and orders: `tests.runtimes.bases`, which writes base models index by index, and which llama.cpp agrees
with. What changes a base model's weight by ΔW must have the product of its factors change the base's tensor by ΔW.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_npeff import Adapter, ParameterDirection, UnsupportedModelError
from hf_npeff.cli import app
from hf_npeff.weights.gguf import ARCHITECTURES
from hf_npeff.weights.layouts import layout_of

gguf = pytest.importorskip("gguf", reason="writing and reading GGUF needs the package gguf")

from tests.runtimes.bases import FAMILIES, gguf_tensors, model_of  # noqa: E402

EVERY_LINEAR = r"\.(layers|h)\..*(proj|attn|fc|dense|dense_h_to_4h|dense_4h_to_h|query_key_value|c_attn)\.weight"


def direction_of(model: Any, pattern: str = EVERY_LINEAR, **info: Any) -> ParameterDirection:
    generator = torch.Generator().manual_seed(1)
    shapes = {n: p.shape for n, p in model.named_parameters() if re.search(pattern, n)}
    deltas = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return ParameterDirection(deltas, {n: layout_of(model, n) for n in deltas}, {"model": "a/model", **info})


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return settings, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_the_models_that_are_compared_are_the_ones_that_are_written() -> None:
    """Identity of the two lists."""
    assert set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_product_of_the_factors_is_the_change_of_the_bases_tensor(family: str, tmp_path: Path) -> None:
    """Oracle: the base's tensors in llama.cpp's order, of the model with W + ΔW minus those of the model with W."""
    model = model_of(family)
    direction = direction_of(model)
    adapter = direction.to_adapter(rank=4, scale=-0.7)
    adapter.to_gguf(tmp_path / "a.gguf", base=model.config)
    settings, tensors = read(tmp_path / "a.gguf")
    assert settings == {
        "general.architecture": ARCHITECTURES[family].name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    before = gguf_tensors(model)
    with torch.no_grad():
        for name in direction:
            model.get_parameter(name).add_(adapter.delta(name))
    changes = {name: value - before[name] for name, value in gguf_tensors(model).items()}
    changed = {name for name, change in changes.items() if np.abs(change).max() > 0}
    assert set(tensors) == {f"{name}.{factor}" for name in changed for factor in ("lora_a", "lora_b")}
    assert len(changed) == len(direction)
    for name in changed:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert A.dtype == B.dtype == np.float32 and A.shape[0] == B.shape[1] == 4
        np.testing.assert_allclose(B @ A, changes[name], atol=1e-6)  # of float32 sums W + ΔW near 1


@pytest.mark.parametrize(
    ("family", "pattern", "named"),
    [
        ("llama", r"(q_proj|layernorm)\.weight", "input_layernorm.weight (norm)"),
        ("qwen2", r"q_proj\.(weight|bias)", "q_proj.bias (bias)"),
        ("llama", "embed_tokens.weight", "embed_tokens.weight (embedding)"),
        ("gemma", "embed_tokens.weight", "embed_tokens.weight (embedding)"),
    ],
)
def test_what_llama_cpp_would_drop_or_refuse_is_refused_by_name(
    family: str, pattern: str, named: str, tmp_path: Path
) -> None:
    """Oracle: the part's name in the error, and no file."""
    model = model_of(family)
    adapter = direction_of(model, pattern).to_adapter(rank=1, model=model)
    with pytest.raises(UnsupportedModelError, match=re.escape(named)):
        adapter.to_gguf(tmp_path / "a.gguf", base=model.config)
    assert not list(tmp_path.iterdir())


def test_heads_that_share_the_embeddings_experts_and_unknown_types_are_refused(tmp_path: Path) -> None:
    """Oracle: what each error names; the one adapter that llama.cpp takes is the only file."""
    model = model_of("llama")
    head = direction_of(model, "lm_head.weight").to_adapter()
    head.to_gguf(tmp_path / "head.gguf", base=model.config)
    assert set(read(tmp_path / "head.gguf")[1]) == {"output.weight.lora_a", "output.weight.lora_b"}
    model.config.tie_word_embeddings = True
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        head.to_gguf(tmp_path / "a.gguf", base=model.config)
    inner = direction_of(model, "down_proj.weight")
    model.config.model_type = "opt"
    with pytest.raises(UnsupportedModelError, match="'opt'"):
        inner.to_adapter().to_gguf(tmp_path / "a.gguf", base=model.config)
    with pytest.raises(UnsupportedModelError, match="'shira'"):
        inner.to_adapter(kind="shira").to_gguf(tmp_path / "a.gguf", base=model.config)
    model.config.model_type = "llama"
    experts = {"model.layers.0.mlp.experts.0.down_proj.weight": torch.ones(64, 96)}
    odd = ParameterDirection(experts, dict.fromkeys(experts, "linear"))
    with pytest.raises(UnsupportedModelError, match=r"experts\.0\.down_proj"):
        odd.to_adapter().to_gguf(tmp_path / "a.gguf", base=model.config)
    with pytest.raises(ValueError, match=r"base=model\.config"):
        inner.to_adapter().to_gguf(tmp_path / "a.gguf", base=tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["head.gguf"]


def test_a_gguf_file_of_the_base_gives_heads_and_checks_names_and_shapes(tmp_path: Path) -> None:
    """Oracle: the file written from the config, byte for byte."""
    model, narrow = model_of("llama"), model_of("llama", intermediate_size=80)
    adapter = direction_of(model).to_adapter(rank=2)
    for name, of in (("base", model), ("narrow", narrow)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_block_count(2)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        for key, value in gguf_tensors(of).items():
            writer.add_tensor(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    adapter.to_gguf(tmp_path / "config.gguf", base=model.config)
    adapter.to_gguf(tmp_path / "file.gguf", base=tmp_path / "base.gguf")
    assert (tmp_path / "config.gguf").read_bytes() == (tmp_path / "file.gguf").read_bytes()
    with pytest.raises(ValueError, match=re.escape("(64, 80)")):
        adapter.to_gguf(tmp_path / "a.gguf", base=tmp_path / "narrow.gguf")


def test_a_saved_adapter_of_anybody_is_written_with_its_scale(tmp_path: Path) -> None:
    """Oracle: PEFT's own adapter with lora_alpha 6, rank 2 and rslora: its merged weights minus the base's."""
    from peft import LoraConfig, get_peft_model

    model = model_of("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "init_lora_weights": False}
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options))
    wrapped.save_pretrained(tmp_path / "peft")
    merged = dict(wrapped.merge_and_unload().named_parameters())
    adapter = Adapter.from_pretrained(tmp_path / "peft")
    assert adapter.config["lora_alpha"] == adapter.config["r"] == 2 and len(adapter.layouts) == 4
    for name in adapter.layouts:
        torch.testing.assert_close(adapter.delta(name), merged[name] - before[name], atol=1e-6, rtol=0)
    adapter.to_gguf(tmp_path / "a.gguf", base=model.config)
    assert read(tmp_path / "a.gguf")[0]["adapter.lora.alpha"] == 2


def test_the_command_writes_what_the_method_writes(tmp_path: Path) -> None:
    """Identity of the bytes."""
    model = model_of("llama")
    adapter = direction_of(model).to_adapter(rank=2)
    adapter.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "base")
    command = ["export", str(tmp_path / "adapter"), "--gguf", str(tmp_path / "command.gguf")]
    done = CliRunner().invoke(app, [*command, "--base", str(tmp_path / "base"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["rank"] == 2
    adapter.to_gguf(tmp_path / "method.gguf", base=model.config)
    assert (tmp_path / "command.gguf").read_bytes() == (tmp_path / "method.gguf").read_bytes()
