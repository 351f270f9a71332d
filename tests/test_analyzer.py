"""NPEFFAnalyzer: what is kept of a data set, the model as it comes back, progress, loading."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_npeff import (
    FisherConfig,
    NPEFFAnalyzer,
    UnsupportedModelError,
)
from hf_npeff.fisher.rows import RowMaker
from tests import reference
from tests.analyses import analyzer_of, brute_force, errors, in_parameters, small
from tests.tiny import tiny_batch, tiny_model, tiny_tokenizer

# What is kept --------------------------------------------------------------------------------------------------------


def test_predictions_log_probs_entropies_and_norms_are_the_models_own() -> None:
    """Oracle: the model run on every example alone, and ‖F‖ of brute force."""
    model = tiny_model("llama", "causal-lm")
    examples = tiny_batch(model, 7, seed=15)
    analyzer = analyzer_of(model, output_factor="exact")
    pefs = analyzer.compute_pefs(examples, batch_size=3)
    assert pefs.predictions is not None
    assert pefs.log_probs is not None
    assert pefs.entropies is not None
    for i, (example, B) in enumerate(zip(examples, brute_force(analyzer, examples), strict=True)):
        log_p = model(torch.tensor([example["input_ids"]])).logits[0, -1].log_softmax(-1).detach()
        assert float(pefs.entropies[i]) == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-6)
        assert pefs.predictions[i] == log_p.argmax()
        assert float(pefs.log_probs[i]) == pytest.approx(float(log_p.max().detach()), abs=1e-6)
        assert float(pefs.norms[i]) == pytest.approx(float((B @ B.T).norm()), rel=1e-6)
        unit = pefs.factors[i] @ pefs.factors[i].T
        assert float(unit.norm()) == pytest.approx(1, abs=1e-9)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("shard_size", [2, 100])
def test_results_are_in_the_data_sets_order(tmp_path: Path, batch_size: Any, shard_size: int) -> None:
    """Oracle: every example computed alone."""
    model = tiny_model("gpt2", "causal-lm")
    examples = [{**e, "note": f"n{i}"} for i, e in enumerate(tiny_batch(model, 7, seed=16))]
    analyzer = analyzer_of(model, rank=2, target_modules=["c_attn"])
    pefs = analyzer.compute_pefs(examples, tmp_path / "p", batch_size=batch_size, shard_size=shard_size)
    assert pefs.columns["note"] == [e["note"] for e in examples]
    assert pefs.example_ids == [str(i) for i in range(7)]
    rows = in_parameters(analyzer, pefs)
    for i, example in enumerate(examples):
        (alone,) = in_parameters(analyzer, analyzer.compute_pefs([example]))
        assert reference.relative_error_of_factors(alone, rows[i]) < 1e-7


def test_every_shape_of_dataset_gives_the_same_rows() -> None:
    """Oracle: the list of dictionaries, against strings, datasets, iterables, tensors and loaders of the texts."""
    model, tokenizer = tiny_model("llama", "causal-lm"), tiny_tokenizer()
    texts = ["the cat sees the dog", "a king", "paris is big and rome is old", "one two three"]
    analyzer = analyzer_of(model, tokenizer, rank=2, target_modules=["q_proj", "down_proj"])
    records = [{"text": text, "label": i} for i, text in enumerate(texts)]
    expected = analyzer.compute_pefs(records)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    hub = datasets.Dataset.from_list(records)
    left = tiny_tokenizer(padding_side="left")(texts, padding=True, return_tensors="pt")
    loader = DataLoader([{"input_ids": tokenizer(t)["input_ids"]} for t in texts], batch_size=2,
                        collate_fn=lambda rows: dict(tokenizer.pad(rows, return_tensors="pt")))  # fmt: skip
    for dataset, settings in [
        (texts, {}),
        (hub, {}),
        (hub.to_iterable_dataset(), {"max_examples": 10}),
        (iter(records), {"max_examples": 4}),
        (hub.to_list(), {}),
        (dict(encoded), {}),
        (encoded, {}),
        (dict(left), {}),
        (loader, {}),
        (hub.map(lambda r: dict(tokenizer(r["text"]))), {}),
        (hub.map(lambda r: dict(tokenizer(r["text"]))).with_format("torch"), {}),
    ]:
        pefs = analyzer.compute_pefs(dataset, **settings)
        difference = pefs.factors.mT @ pefs.factors - expected.factors.mT @ expected.factors
        assert difference.abs().max() < 1e-8
        torch.testing.assert_close(pefs.norms, expected.norms, rtol=1e-7, atol=0)


def test_messages_go_through_the_chat_template() -> None:
    """Oracle: the rendered template tokenised by hand."""
    model, tokenizer = tiny_model("llama", "causal-lm"), tiny_tokenizer()
    chats = [[{"role": "user", "content": "the cat"}], [{"role": "user", "content": "a big dog runs"}]]
    rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    analyzer = analyzer_of(model, tokenizer, rank=2, target_modules=["q_proj"])
    pefs = analyzer.compute_pefs([{"messages": c} for c in chats])
    expected = analyzer.compute_pefs(
        [{"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in rendered]
    )
    torch.testing.assert_close(pefs.norms, expected.norms)
    assert pefs.content_hashes == expected.content_hashes


def test_ids_and_columns_are_kept() -> None:
    """Oracle: the data set."""
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    records = [
        {"id": f"x{i}", "text": "the cat", "label": i, "score": 0.5 * i, "flag": i > 1, "extra": [1, 2]}
        for i in range(3)
    ]
    analyzer = analyzer_of(model, tokenizer, target_modules=["query"])
    pefs = analyzer.compute_pefs(records)
    assert pefs.example_ids == ["x0", "x1", "x2"]
    assert pefs.labels == [0, 1, 2]
    assert pefs.columns["score"] == [0, 0.5, 1]
    assert pefs.columns["flag"] == [False, False, True]
    assert "extra" not in pefs.columns
    assert analyzer.compute_pefs(records, columns=["label"]).columns.keys() == {
        "example_id", "content_hash", "label", "prediction"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_rows_are_stored_in_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    """Oracle: the float64 rows, rounded; norms stay float64."""
    model = tiny_model("bert")
    examples = tiny_batch(model, 3, seed=1)
    pefs = analyzer_of(model, storage_dtype=dtype).compute_pefs(examples, tmp_path / dtype)
    exact = analyzer_of(model).compute_pefs(examples)
    assert pefs.factors.dtype == getattr(torch, dtype)
    torch.testing.assert_close(
        pefs.factors.double(), exact.factors, atol=torch.finfo(pefs.factors.dtype).eps, rtol=1e-2
    )
    torch.testing.assert_close(pefs.norms, exact.norms)


# The model comes back ------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an analysis may not change, and the global generators."""
    return {
        "modes": {name: m.training for name, m in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad is None for name, p in model.named_parameters()},
        "values": {name: p.detach().clone().tolist() for name, p in model.state_dict().items()},
        "hooks": {
            name: [len(getattr(m, h)) for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, m in model.named_modules()
        },
        "config": model.config.to_dict(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


@pytest.mark.parametrize("failing", [None, "forward", "backward"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_model_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch, failing: str | None, family: str) -> None:
    """Oracle: a snapshot before: mode of each module, requires_grad, gradients, weights, hooks, config, generators."""
    model = tiny_model(family, "sequence-classification" if family == "bert" else "causal-lm")
    model.train()
    next(model.children()).eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    model.register_forward_hook(lambda module, args, output: None)
    examples = tiny_batch(model, 5, seed=1)
    analyzer = analyzer_of(model, sketch="kronecker", sketch_dim=4)
    before = snapshot(model)
    if failing is not None:
        original = RowMaker.rows if failing == "forward" else torch.autograd.grad
        calls = []

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > (1 if failing == "forward" else 20):
                raise RuntimeError("pulled the plug")
            return original(*args, **kwargs)

        if failing == "forward":
            monkeypatch.setattr(RowMaker, "rows", fail)
        else:
            monkeypatch.setattr(torch.autograd, "grad", fail)
        with pytest.raises(RuntimeError, match="plug"):
            analyzer.compute_pefs(examples * 5, batch_size=2)
        monkeypatch.undo()
    else:
        analyzer.compute_pefs(examples, batch_size=2)
    assert snapshot(model) == before


def test_it_works_without_gradients_switched_on() -> None:
    """Oracle: the rows of a call outside `torch.no_grad`."""
    analyzer, examples = small()
    expected = analyzer.compute_pefs(examples)
    with torch.no_grad():
        inside = analyzer.compute_pefs(examples)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside.factors, expected.factors)


# Progress ------------------------------------------------------------------------------------------------------------


def test_progress_goes_to_stderr_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: the captured streams, with bars on and off."""
    analyzer, examples = small()
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    analyzer.decompose(analyzer.compute_pefs(examples), 2, n_restarts=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "PEFs" in err
    assert "explained" in err
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    analyzer.decompose(analyzer.compute_pefs(examples), 2, n_restarts=2)
    assert capfd.readouterr() == ("", "")
    analyzer.compute_pefs(examples, progress=True)
    assert "PEFs" in capfd.readouterr().err
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    analyzer.compute_pefs(examples, progress=False)
    assert capfd.readouterr() == ("", "")


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm")])
def test_from_pretrained_finds_the_class_and_the_tokenizer(tmp_path: Path, family: str, task: str) -> None:
    """Oracle: the model that was saved, analysed directly."""
    model, tokenizer = tiny_model(family, task, dtype=torch.float32), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = FisherConfig(sketch="kronecker", sketch_dim=4)
    loaded = NPEFFAnalyzer.from_pretrained(tmp_path, fisher=config)
    assert type(loaded.model) is type(model)
    texts = ["the cat sees", "a dog"]
    direct = NPEFFAnalyzer(model, tokenizer, fisher=config).compute_pefs(texts)
    pefs = loaded.compute_pefs(texts)
    torch.testing.assert_close(pefs.factors, direct.factors)
    assert pefs.info["model"] == str(tmp_path)
    assert pefs.columns["text"] == texts
    assert all(isinstance(p, str) for p in pefs.columns["prediction"])


def test_from_pretrained_refuses_a_body_without_a_head(tmp_path: Path) -> None:
    """Oracle: the error lists the tasks; a task makes it load."""
    model = tiny_model("bert")
    model.bert.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="sequence-classification"):
        NPEFFAnalyzer.from_pretrained(tmp_path)
    assert NPEFFAnalyzer.from_pretrained(tmp_path, task="sequence-classification").head


def test_a_classifier_that_looks_for_padding_finds_its_own(tmp_path: Path) -> None:
    """Oracle: brute force on every example alone. The tokenizer pads with another token than the model's config."""
    model, tokenizer = tiny_model("gpt2", "sequence-classification"), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["the cat sees the dog", "a king", "paris is big and rome is old"]
    analyzer = analyzer_of(model, tokenizer, output_factor="exact")
    pefs = analyzer.compute_pefs(texts, batch_size=3)
    truth = brute_force(analyzer, [{"input_ids": tokenizer(t)["input_ids"]} for t in texts])
    assert max(errors(analyzer, pefs, truth)) <= 1e-6
