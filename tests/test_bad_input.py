"""What cannot be analysed is refused by name, before anything expensive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hf_npeff import (
    NPEFF,
    NPEFFAnalyzer,
    UnsupportedModelError,
)
from tests import reference
from tests.analyses import analyzer_of
from tests.tiny import collate, tiny_batch, tiny_model, tiny_tokenizer


def test_an_empty_dataset_is_refused() -> None:
    """Oracle: the documented error for every empty shape."""
    analyzer = analyzer_of(tiny_model("bert"), tiny_tokenizer())
    for empty in ([], {"input_ids": torch.zeros(0, 3, dtype=torch.long)}, datasets.Dataset.from_dict({"text": []})):
        with pytest.raises(ValueError, match="empty"):
            analyzer.compute_pefs(empty)


def test_an_example_without_tokens_is_refused_by_its_id() -> None:
    """Oracle: the error names the example, before the model runs; a tokenizer that adds nothing makes none of ""."""
    analyzer = analyzer_of(tiny_model("llama"))
    for dataset in ([{"input_ids": [8, 9]}, {"input_ids": []}], {"input_ids": torch.zeros(2, 0, dtype=torch.long)}):
        with pytest.raises(ValueError, match=r"'[01]'"):
            analyzer.compute_pefs(dataset)


def test_an_iterable_without_max_examples_is_refused() -> None:
    """Oracle: the error says what to pass."""
    analyzer = analyzer_of(tiny_model("bert"), tiny_tokenizer())
    for dataset in (datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), iter(["a"])):
        with pytest.raises(ValueError, match="max_examples"):
            analyzer.compute_pefs(dataset)


def test_a_model_without_logits_is_refused() -> None:
    """Oracle: the error says what to load; for a body alone, and for a head that returns nothing."""
    import transformers

    body = transformers.AutoModel.from_config(tiny_model("bert").config)
    with pytest.raises(UnsupportedModelError, match="head"):
        NPEFFAnalyzer(body)
    with pytest.raises(UnsupportedModelError, match="logits"):
        NPEFFAnalyzer(body, task="sequence-classification").compute_pefs(tiny_batch(tiny_model("bert"), 2, seed=1))


def test_an_example_longer_than_the_positions_is_named_before_the_model_runs(tmp_path: Path) -> None:
    """Oracle: the error names the example and both lengths; nothing was written."""
    for family, limit in (("bert", 48), ("gpt2", 48), ("roberta", 47)):
        model = tiny_model(family, "sequence-classification")
        long = {"id": "the long one", "input_ids": [9] * (limit + 1)}
        with pytest.raises(ValueError, match=f"'the long one'.*{limit + 1}.*{limit}"):
            analyzer_of(model).compute_pefs([{"id": "fine", "input_ids": [9] * 4}, long], tmp_path / family)
        assert not (tmp_path / family).exists()
        analyzer_of(model).compute_pefs([{"id": "fine", "input_ids": [9] * limit}])


@pytest.mark.parametrize("where", [1, 60])
def test_nan_logits_name_the_example_and_what_was_computed_stays(tmp_path: Path, where: int) -> None:
    """Oracle: one poisoned embedding row; the shards before the example are whole."""
    model = tiny_model("bert", dtype=torch.float32)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[57] = float("nan")
    examples = [{"id": f"e{i}", "input_ids": [2, 10 + i % 40, 1]} for i in range(90)]
    examples[where]["input_ids"] = [2, 57, 1]
    analyzer = analyzer_of(model, target_modules=["query"], storage_dtype="float32")
    with pytest.raises(ValueError, match=rf"'e{where}'"):
        analyzer.compute_pefs(examples, tmp_path / "p", shard_size=20)
    if where == 60:
        assert len(list((tmp_path / "p").glob("pefs-*.safetensors"))) == 3


def test_exact_of_a_vocabulary_is_refused_with_the_way_out() -> None:
    """Oracle: the error says to use spectral."""
    model = tiny_model("gpt2", "causal-lm", vocab_size=1500)
    with pytest.raises(ValueError, match="spectral"):
        analyzer_of(model, output_factor="exact").compute_pefs(tiny_batch(model, 2, seed=1))


def test_a_rank_above_the_hidden_size_is_refused() -> None:
    """Oracle: the error names both numbers."""
    model = tiny_model("gpt2", "causal-lm", tie_word_embeddings=False)
    for target in ("all-linear", r".*(c_attn|lm_head)"):
        with pytest.raises(ValueError, match=r"rank=17.*16"):
            analyzer_of(model, rank=17, target_modules=target).compute_pefs(tiny_batch(model, 2, seed=1))


def test_labels_that_are_missing_are_missed_before_the_model_runs() -> None:
    """Oracle: the error names the first example without labels."""
    model = tiny_model("gpt2", "causal-lm")
    examples = tiny_batch(model, 3, seed=1, labels=True)
    del examples[1]["labels"]
    with pytest.raises(ValueError, match=r"positions='labels'.*'1'"):
        analyzer_of(model, positions="labels").compute_pefs(examples)
    examples[1]["labels"] = [-100] * len(examples[1]["input_ids"])
    with pytest.raises(ValueError, match="'1'"):
        analyzer_of(model, positions="labels").compute_pefs(examples)
    examples[1]["labels"][0] = examples[1]["input_ids"][0]  # which no token is before to predict
    with pytest.raises(ValueError, match=r"positions='labels'.*example '1'"):
        analyzer_of(model, positions="labels").compute_pefs(examples)


def test_text_without_a_tokenizer_and_unknown_columns_are_refused() -> None:
    """Oracle: the errors say what to pass and what there is."""
    analyzer = analyzer_of(tiny_model("bert"))
    with pytest.raises(ValueError, match="processing_class"):
        analyzer.compute_pefs(["the cat"])
    with pytest.raises(ValueError, match="colour"):
        analyzer.compute_pefs([{"input_ids": [1, 2]}], columns=["colour"])
    for wrong in (0, -1, 2.5, True, "many"):
        with pytest.raises(ValueError, match="batch_size"):
            analyzer.compute_pefs([{"input_ids": [1, 2]}], batch_size=wrong)
    with pytest.raises(ValueError, match="target_modules"):
        analyzer_of(tiny_model("bert"), target_modules=["nowhere"])
    with pytest.raises(ValueError, match="positions"):
        analyzer_of(tiny_model("bert"), positions="labels")


def test_what_is_no_model_no_config_and_no_token_is_named() -> None:
    """Oracle: the messages say what was expected and what to use."""
    model = tiny_model("llama", "causal-lm")
    with pytest.raises(ValueError, match=r"NPEFFAnalyzer\.from_pretrained"):
        NPEFFAnalyzer("org/model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FisherConfig"):
        NPEFFAnalyzer(model, fisher={"rank": 2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'1'.*input_ids.*100000.*58"):
        analyzer_of(model).compute_pefs([{"input_ids": [5, 6]}, {"input_ids": [5, 100_000]}])
    with pytest.raises(ValueError, match=r"PEFs\.from_factors"):
        NPEFF(2).fit(torch.zeros(3, 2, 4))  # type: ignore[arg-type]


def test_packed_documents_are_refused_by_a_model_that_takes_no_positions() -> None:
    """Oracle: Mamba takes no position_ids and reads on across documents; Llama's packed rows are tested elsewhere."""
    packed = {"id": "two", "input_ids": [9, 10, 11, 12], "position_ids": [0, 1, 0, 1]}
    with pytest.raises(ValueError, match=r"'two'.*position_ids"):
        NPEFFAnalyzer(tiny_model("mamba")).compute_pefs([packed])
    once = {**packed, "position_ids": [0, 1, 2, 3]}
    assert len(NPEFFAnalyzer(tiny_model("mamba", dtype=torch.float32)).compute_pefs([once])) == 1


def test_what_lies_outside_a_vocabulary_is_named_in_every_input_that_has_one() -> None:
    """Oracle: the messages name example and input; the model's own error says "index out of range"."""
    choices = {"input_ids": [[5, 6, 100_000], [5, 6, 7]]}
    with pytest.raises(ValueError, match=r"'0'.* input_ids.*100000"):
        analyzer_of(tiny_model("bert", "multiple-choice")).compute_pefs([choices])
    decoded = {"input_ids": [5, 6], "decoder_input_ids": [1, 100_000]}
    with pytest.raises(ValueError, match=r"'0'.*decoder_input_ids.*100000"):
        analyzer_of(tiny_model("t5", "seq2seq-lm")).compute_pefs([decoded])


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    """Oracle: the message says what it lacks; `nn.Linear` would be its own only module, without a name."""
    with pytest.raises(UnsupportedModelError, match="Linear"):
        NPEFFAnalyzer(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("place", ["/no/such/folder", "no/such/folder"])
def test_a_model_folder_that_is_not_there_is_called_so(place: str) -> None:
    """Oracle: the message names the folder and what was expected, before anything asks the Hub."""
    with pytest.raises(OSError, match=f"'{place}'"):
        NPEFFAnalyzer.from_pretrained(place)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_padding_that_a_model_does_not_bear_is_told_from_examples_that_it_does_not(on_error: Any) -> None:
    """Oracle: Gemma 2's own attention in float64, NaN wherever a padded position sees nothing, and each one alone.

    No example is skipped: all of them go one at a time, and their PEFs are those of a batch size of 1.
    """
    model = tiny_model("gemma2", "causal-lm", attn_implementation="eager")
    examples = tiny_batch(model, 4, seed=0, min_length=4, max_length=9)
    analyzer = analyzer_of(model, rank=2)
    together = analyzer.compute_pefs(examples, on_error=on_error)
    alone = analyzer.compute_pefs(examples, batch_size=1, on_error=on_error)
    assert len(together) == len(alone) == 4 and torch.equal(together.factors, alone.factors)


def test_experts_without_a_kernel_for_float64_are_named() -> None:
    """Oracle: Mixtral's grouped product, which torch has in float32 and narrower only; the message has the way out."""
    model = tiny_model("mixtral", "causal-lm", experts_implementation="grouped_mm")
    with pytest.raises(UnsupportedModelError, match=r"float64.*experts_implementation='eager'"):
        analyzer_of(model, rank=2).compute_pefs(tiny_batch(model, 2, seed=0))


def test_arguments_in_the_wrong_order_are_named() -> None:
    """Oracle: the messages say what was expected and what came."""
    model = tiny_model("llama", "causal-lm")
    examples = tiny_batch(model, 4, seed=0)
    analyzer = analyzer_of(model, rank=2)
    pefs = analyzer.compute_pefs(examples)
    decomposition = analyzer.decompose(pefs, 2, n_restarts=1)
    with pytest.raises(ValueError, match=r"Decomposition.*PEFs"):
        analyzer.lift(pefs, 0, decomposition, examples)  # type: ignore[arg-type]
    for misused in (decomposition.transform, lambda rows: NPEFF(2).fit(pefs, rows)):
        with pytest.raises(ValueError, match=r"PEFs.*Tensor"):
            misused(pefs.factors)  # type: ignore[arg-type]


def test_an_error_of_the_model_says_which_example_and_which_inputs() -> None:
    """Oracle: the error: the model's own words, the example and its inputs."""
    model = tiny_model("llama", dtype=torch.float32)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(KeyError("bbox")))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM fails.*input_ids.*'0'.*KeyError: 'bbox'"):
        analyzer_of(model).compute_pefs(tiny_batch(model, 2, seed=1), batch_size=1)


def test_a_default_device_that_is_not_the_cpu_is_refused() -> None:
    """Oracle: the error, where the analyzer is made and where it is used later."""
    model = tiny_model("llama", dtype=torch.float32)
    analyzer = analyzer_of(model)
    examples = tiny_batch(model, 2, seed=1)
    for call in (lambda: analyzer_of(model), lambda: analyzer.compute_pefs(examples), analyzer.weights):
        torch.set_default_device("meta")
        try:
            with pytest.raises(ValueError, match=r"set_default_device\(None\)"):
                call()
        finally:
            torch.set_default_device(None)


@pytest.mark.parametrize(
    ("task", "options", "examples"),
    [
        ("multiple-choice", {}, [{"input_ids": [[8, 9]]}, {"input_ids": [[8, 9], [9, 10]]}]),
        ("question-answering", {}, [{"input_ids": [8]}, {"input_ids": [8, 9, 10]}]),
        ("token-classification", {"num_labels": 1}, [{"input_ids": [8]}, {"input_ids": [8, 9]}]),
    ],
)
def test_an_example_with_one_class_has_a_fisher_of_zero(task: str, options: Any, examples: list[Any]) -> None:
    """Oracle: S = 0 of a single class; the norm of the other example from brute force, ‖JᵀSJ‖."""
    model = tiny_model("bert", task, dtype=torch.float64, **options)
    analyzer = analyzer_of(model, output_factor="exact", rank=8, sketch="identity", storage_dtype="float64")
    norms = analyzer.compute_pefs(examples).norms
    batch = collate([examples[1]], model)
    A = reference.example_factor(model, batch, [m.parameter for m in analyzer.maps], reference.terms_of(task))
    assert norms[0] == 0
    torch.testing.assert_close(norms[1], (A @ A.T).norm().to(norms), rtol=1e-6, atol=1e-12)
