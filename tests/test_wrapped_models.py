"""Models inside PEFT's wrappers: names, heads and rows are those of the same model with the adapter merged by PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from hf_npeff import FisherConfig, IncompatibleSketchError, NPEFFAnalyzer, ParameterDirection
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.outputs import traits_of
from tests import reference
from tests.analyses import analyzer_of, in_parameters
from tests.logged import warned_by
from tests.tiny import collate, task_of, tiny_batch, tiny_model


def wrapped(model: Any, config: peft.PeftConfig) -> Any:
    """A model with an adapter that does something, what it saves whole included."""
    outside = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in outside.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return outside.eval()


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], **settings})


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "not touched": ("llama", {}),
    "LoRA": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA alone": ("llama", {"target_modules": ["lm_head"]}),
    "saved whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "trainable tokens, tied": ("qwen3", {"trainable_token_indices": [9, 10, 14]}),
    "soft-capped, LoRA": ("gemma2", {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("head", HEADS)
def test_rows_of_a_wrapped_model_are_those_of_the_merged_one(head: str) -> None:
    """Oracle: PEFT's merge_and_unload, its rows by brute force, one example at a time."""
    family, settings = HEADS[head]
    options = {} if "tied" in head else {"tie_word_embeddings": False}  # merging moves all that share a weight
    model = wrapped(tiny_model(family, vocab_size=20, **options), lora(**settings))
    merged = copy.deepcopy(model).merge_and_unload().eval()
    data = tiny_batch(merged, 2, seed=3)
    ids = torch.tensor([data[0]["input_ids"]])
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, atol=1e-6, rtol=0)
    analyzer, plain = analyzer_of(model, rank=3), analyzer_of(merged, rank=3)
    assert traits_of(analyzer.head).at_hidden, "cotangents of h numbers"
    names = [m.parameter for m in analyzer.maps]
    assert names == [m.parameter for m in plain.maps] and not any("lm_head" in name for name in names)
    exact = analyzer_of(model, rank=20, output_factor="exact").compute_pefs(data)
    for example, rows in zip(data, in_parameters(analyzer, exact), strict=True):
        truth = reference.example_factor(merged, collate([example], merged), names, reference.terms_of("causal-lm"))
        assert reference.relative_error_of_factors(truth, rows) < 1e-5  # their norms compute in float32
    ours, theirs = analyzer.compute_pefs(data), plain.compute_pefs(data)
    assert ours.fingerprint == theirs.fingerprint
    for i in range(len(data)):
        torch.testing.assert_close(ours.gram(i), theirs.gram(i), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["classifier"]}, {"target_modules": ["query", "classifier"]}])
def test_a_classifier_that_an_adapter_holds_is_the_head(settings: dict[str, Any]) -> None:
    """Oracle: the merged model by brute force; the spectral rows, which its head's weight chooses, are the same."""
    model = wrapped(tiny_model("bert", num_labels=5), lora(**{"target_modules": ["query"], **settings}))
    merged = copy.deepcopy(model).merge_and_unload().eval()
    data = tiny_batch(merged, 4, seed=3)
    analyzer, plain = analyzer_of(model, rank=2), analyzer_of(merged, rank=2)
    names = [m.parameter for m in analyzer.maps]
    assert names == [m.parameter for m in plain.maps] and "classifier.weight" in names
    exact = analyzer_of(model, rank=8).compute_pefs(data)
    terms = reference.terms_of(task_of(merged))
    for example, rows in zip(data, in_parameters(analyzer, exact), strict=True):
        truth = reference.example_factor(merged, collate([example], merged), names, terms)
        assert reference.relative_error_of_factors(truth, rows) < 1e-9
    torch.testing.assert_close(analyzer.compute_pefs(data).norms, plain.compute_pefs(data).norms, rtol=1e-9, atol=0)


def test_a_head_under_dora_is_read_at_its_logits(caplog: Any) -> None:
    """Oracle: the wrapped model by brute force; DoRA's norm, which PEFT holds fixed, makes no row of the merged one."""
    model = wrapped(tiny_model("llama"), lora(target_modules=["lm_head"], use_dora=True))
    data = tiny_batch(tiny_model("llama"), 3, seed=3)
    analyzer = analyzer_of(model, rank=64)
    exact = analyzer.compute_pefs(data)
    assert warned_by(caplog, "fisher.heads")
    actual = {id(p): name for name, p in model.named_parameters()}
    names = [actual[id(bare_parameters(model)[m.parameter])] for m in analyzer.maps]
    for example, rows in zip(data, in_parameters(analyzer, exact), strict=True):
        batch = {"input_ids": torch.tensor([example["input_ids"]])}
        truth = reference.example_factor(model, batch, names, reference.terms_of("causal-lm"))
        assert reference.relative_error_of_factors(truth, rows) < 1e-5


def test_what_is_made_of_a_wrapped_model_fits_the_merged_and_the_bare_one(tmp_path: Path) -> None:
    """Oracle: PEFT loads the adapter onto the bare base, and predicts what the moved weights do."""
    bare = tiny_model("llama")
    model = wrapped(copy.deepcopy(bare), lora(modules_to_save=["lm_head"]))
    data = tiny_batch(bare, 8, seed=4)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=8))
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 2, max_iterations=300, progress=False)
    merged = NPEFFAnalyzer(copy.deepcopy(model).merge_and_unload().eval())
    W = found.transform(merged.compute_pefs(data, like=found), check_weights=False)
    torch.testing.assert_close(W, found.transform(pefs), atol=1e-3, rtol=1e-3)
    direction = analyzer.lift(found, 0, pefs, data)
    assert set(direction) <= {name for name, _ in bare.named_parameters()} and set(direction.layouts.values()) == {
        "linear"
    }
    direction.to_adapter(rank=16, scale=0.5).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    ids = torch.tensor([data[0]["input_ids"]])
    with direction.applied_to(bare, 0.5), torch.no_grad():
        moved = bare(ids).logits
    torch.testing.assert_close(loaded(ids).logits, moved, atol=1e-5, rtol=0)
    before = model(ids).logits
    with direction.applied_to(model, 0.5), torch.no_grad():
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)
    report = analyzer.evaluate_direction(direction, found, 0, data, scale=0.2, n_top=2)
    assert report.best.top > 0


def test_named_modules_and_parameters_may_be_named_as_in_the_bare_model_or_as_they_are() -> None:
    """Oracle: the names of the bare model, and those of PEFT's."""
    model = wrapped(tiny_model("llama"), lora())
    for target in ("model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj.base_layer"):
        analyzer = analyzer_of(model, target_modules=[target], parameters=["model.norm.weight"])
        assert [m.parameter for m in analyzer.maps] == ["model.layers.0.self_attn.q_proj.weight"]
        assert list(analyzer.parameters) == ["model.norm.weight"]
    parts = analyzer_of(model, target_modules=["lora_A.default"])
    assert all("lora_A" in m.parameter for m in parts.maps) and len(parts.maps) == 6
    older = "base_model.model.model.norm.weight"
    direction = ParameterDirection({older: torch.ones(16)}, {older: "norm"})
    before = model.get_base_model().model.norm.weight.clone()
    with direction.applied_to(model, 1.0):  # as older versions named it
        assert not torch.equal(model.get_base_model().model.norm.weight, before)


def test_sketches_of_wrapped_names_are_refused_with_the_reason() -> None:
    """Oracle: the message."""
    model = wrapped(tiny_model("llama"), lora())
    data = tiny_batch(tiny_model("llama"), 3, seed=3)
    pefs = analyzer_of(model, target_modules=["q_proj"]).compute_pefs(data)
    shapes = pefs.info["sketch"]["shapes"]
    pefs.info["sketch"]["shapes"] = [[f"base_model.model.{n[:-7]}.base_layer.weight", s] for n, s in shapes]
    with pytest.raises(IncompatibleSketchError, match="like="):
        analyzer_of(model).with_settings_of(pefs)


def test_an_adapter_of_a_tied_linear_weight_moves_all_of_its_modules(tmp_path: Path) -> None:
    """Oracle: the moved weight itself, against the adapter as PEFT loads it onto the tied model."""
    model = tiny_model("bert", dtype=torch.float32)
    first, second = (model.bert.encoder.layer[i].intermediate.dense for i in (0, 1))
    second.weight = first.weight
    analyzer = analyzer_of(model, target_modules=["bert.encoder.layer.0.intermediate.dense"])
    (tied,) = analyzer.maps
    assert len(tied.modules) == 2
    generator = torch.Generator().manual_seed(1)
    made = analyzer.direction_of({tied.parameter: torch.randn(24, 16, generator=generator)}, {})
    made.save_pretrained(tmp_path / "direction")
    direction = ParameterDirection.load(tmp_path / "direction")
    adapter = direction.to_adapter(rank=16, scale=2.0)
    assert adapter.retained_energy > 1 - 1e-6
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    ids = torch.tensor([[9, 10, 11, 3]])
    with torch.no_grad():
        before = model(ids).logits
        with direction.applied_to(model, 2.0):
            moved = model(ids).logits
        assert float((moved - before).norm() / before.norm()) > 0.01
        torch.testing.assert_close(loaded(ids).logits, moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "task", "name", "places"),
    [
        ("qwen3", "causal-lm", "model.embed_tokens.weight", 2),
        ("gpt2", "causal-lm", "transformer.wte.weight", 2),
        ("bert", "masked-lm", "bert.embeddings.word_embeddings.weight", 2),
        ("t5", "seq2seq-lm", "shared.weight", 4),
        ("bart", "seq2seq-lm", "model.shared.weight", 4),
    ],
)
def test_an_adapter_of_a_tied_embedding_acts_in_all_places_that_share_it(
    family: str, task: str, name: str, places: int, tmp_path: Path
) -> None:
    """Oracle: W + ΔW in the model itself, by `applied_to`, against the adapter as PEFT loads it onto a fresh model.

    Encoder-decoders share the weight between both inputs and the head.
    """
    options = {"tie_word_embeddings": True} if family != "bart" else {}
    model = tiny_model(family, task, dtype=torch.float32, **options)
    examples = tiny_batch(model, 1, seed=0)
    batch = collate(examples, model)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(target_modules=(), parameters=(name,)))
    generator = torch.Generator().manual_seed(0)
    weight = model.get_parameter(name)
    made = analyzer.direction_of({name: torch.randn(weight.shape, generator=generator)}, {"model": "tiny"})
    made.save_pretrained(tmp_path / "direction")
    direction = ParameterDirection.load(tmp_path / "direction")
    base = model(**batch).logits.detach()
    with direction.applied_to(model, 3.0):
        wanted = model(**batch).logits.detach()
    adapter = direction.to_adapter(rank=min(weight.shape), scale=3.0)
    assert len(adapter.config["target_modules"]) == places
    adapter.save_pretrained(tmp_path / "lora")
    fresh = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "lora")).eval()
    error = (fresh(**batch).logits - wanted).norm()
    assert error <= 1e-4 * (wanted - base).norm()
    torch.testing.assert_close(adapter.delta(name), 3.0 * direction[name], rtol=1e-4, atol=1e-5)
