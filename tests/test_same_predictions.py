"""A store is of a model, not of its weights alone: what leaves every weight as it was may still change every number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.errors import IncompatibleWeightsError
from tests import tiny

TEXTS = ["the cat sees the dog", "a king is old .", "paris is not big", "one bird ate two fish and", "rome is old"]


def analyzer_of(model: Any) -> NPEFFAnalyzer:
    return NPEFFAnalyzer(model, tiny.tiny_tokenizer(), fisher=FisherConfig(rank=2))


def log_probabilities(model: Any) -> torch.Tensor:
    """The oracle: of the likeliest next token of every text, the model called directly."""
    with torch.no_grad():
        ids = [tiny.tiny_tokenizer()(text, return_tensors="pt")["input_ids"] for text in TEXTS]
        return torch.stack([model(input_ids=i).logits[0, -1].log_softmax(-1).amax() for i in ids])


def other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def steering(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + 1)


def other_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.original_inv_freq = model.model.rotary_emb.inv_freq / 4


def soft_cap(model: Any) -> None:
    model.config.final_logit_softcapping = 1.0


def window(model: Any) -> None:
    model.config.sliding_window = 2


def another_norm(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


CHANGES: list[tuple[str, Callable[[Any], None]]] = [
    ("llama", other_activation),
    ("llama", steering),
    ("llama", other_frequencies),
    ("gemma2", soft_cap),
    ("mistral", window),
    ("llama", another_norm),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("family", "change"), CHANGES, ids=[change.__name__ for _, change in CHANGES])
def test_a_store_of_a_model_that_computes_something_else_now_is_refused(
    family: str, change: Callable[[Any], None], tmp_path: Path
) -> None:
    """Oracle: the model called directly predicts something else, and each way on names one of the longest examples."""
    model = tiny.tiny_model(family, dtype=torch.float32)
    analyzer = analyzer_of(model)
    pefs = analyzer.compute_pefs(TEXTS, tmp_path)
    before, hashed = log_probabilities(model), analyzer.weights()
    change(model)
    assert (log_probabilities(model) - before).abs().max() > 1e-2
    later = analyzer_of(model)
    assert later.weights() == hashed  # which is why the hash of the weights says nothing
    ways: list[Callable[..., Any]] = [
        lambda **k: later.compute_pefs(TEXTS, tmp_path, **k),
        lambda **k: later.lift_examples(pefs, TEXTS, ["0"], ["1"], **k),
    ]
    for way in ways:
        with pytest.raises(IncompatibleWeightsError, match=r"for example '[03]', the log-probability was"):
            way()
    assert torch.equal(later.compute_pefs(TEXTS, tmp_path, check_weights=False).factors, pefs.factors)
    again = later.compute_pefs(TEXTS, tmp_path, resume=False)
    torch.testing.assert_close(again.log_probs, log_probabilities(model), atol=1e-4, rtol=0)


def test_components_are_not_lifted_from_a_model_that_a_hook_steers_now() -> None:
    """Oracle: the error of every call that replays cotangents; once the hook is gone, the same calls run."""
    model = tiny.tiny_model("llama", dtype=torch.float32)
    analyzer = analyzer_of(model)
    pefs = analyzer.compute_pefs(TEXTS)
    found = analyzer.decompose(pefs, 2, seed=0)
    calls: list[Callable[[], Any]] = [
        lambda: analyzer.lift(found, 0, pefs, TEXTS, selective=False),
        lambda: analyzer.lift_adapters(found, pefs, TEXTS, rank=1, selective=False),
        lambda: analyzer.token_alignments(found, pefs, TEXTS, [0], n_top=1),
    ]
    handle = model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    for call in calls:
        with pytest.raises(IncompatibleWeightsError, match="hooks"):
            call()
    handle.remove()
    for call in calls:
        assert call()


def test_an_interrupted_store_is_not_gone_on_with_under_a_hook(tmp_path: Path) -> None:
    """Oracle: the error; without the hook the same call finishes, with the numbers of a run that was not cut."""
    model = tiny.tiny_model("llama", dtype=torch.float32)
    whole = analyzer_of(model).compute_pefs(TEXTS)
    analyzer_of(model).compute_pefs(TEXTS, tmp_path, shard_size=2)
    (tmp_path / "manifest.json").unlink()
    for file in tmp_path.glob("pefs-00002.*"):
        file.unlink()
    handle = model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    entries = {"start": 0, "name": "pefs-00000", "examples": 2}
    _write_entry(tmp_path, entries)
    with pytest.raises(IncompatibleWeightsError, match="resume=False"):
        analyzer_of(model).compute_pefs(TEXTS, tmp_path, shard_size=2)
    handle.remove()
    rest = analyzer_of(model).compute_pefs(TEXTS, tmp_path, shard_size=2)
    torch.testing.assert_close(rest.log_probs, whole.log_probs, atol=1e-4, rtol=0)


def _write_entry(folder: Path, entry: dict[str, Any]) -> None:
    """What a run that was cut leaves of its first shard: its entry, which the manifest has taken over since."""
    from hf_npeff.sharing.files import sha256_of, write_json

    name = folder / entry["name"]
    hashes = {
        "sha256": sha256_of(name.with_suffix(".safetensors")),
        "columns_sha256": sha256_of(name.with_suffix(".parquet")),
    }
    write_json(name.with_suffix(".json"), entry | hashes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_change_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Oracle: the call goes on; another kind of attention and another batch size change numbers by rounding alone."""
    model = tiny.tiny_model("llama", dtype=dtype, attn_implementation="eager")
    before = analyzer_of(model).compute_pefs(TEXTS, tmp_path, batch_size=5)
    model.set_attn_implementation("sdpa")
    assert torch.equal(analyzer_of(model).compute_pefs(TEXTS, tmp_path, batch_size=1).factors, before.factors)


def test_a_regression_that_is_another_now_is_refused(tmp_path: Path) -> None:
    """Oracle: the numbers that the model gives directly differ, and all log-densities are the same."""
    model = tiny.tiny_model("bert", "sequence-classification", dtype=torch.float32, num_labels=1)
    analyzer_of(model).compute_pefs(TEXTS, tmp_path)
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    with pytest.raises(IncompatibleWeightsError, match="the value was"):
        analyzer_of(model).compute_pefs(TEXTS, tmp_path)


@pytest.mark.parametrize(("family", "change"), CHANGES[1:4:2], ids=["steering", "soft_cap"])
def test_components_are_transferred_to_another_function_with_a_warning(
    family: str, change: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the log: nothing of the same model, whatever the data, and one warning of the one that was changed."""
    model = tiny.tiny_model(family, dtype=torch.float32)
    analyzer = analyzer_of(model)
    found = analyzer.decompose(analyzer.compute_pefs(TEXTS), 2, seed=0)
    caplog.set_level("WARNING", logger="hf_npeff")
    found.transform(analyzer.compute_pefs(TEXTS[:3], like=found, batch_size=1))
    assert "different predictions" not in caplog.text
    change(model)
    found.transform(analyzer.compute_pefs(TEXTS[:3], like=found))
    assert caplog.text.count("different predictions") == 1
