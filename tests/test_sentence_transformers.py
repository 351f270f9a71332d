"""Embedding models: SentenceTransformer under analysis, its components switched off, its trainers.

The real package is an addition: without it, a stand-in of the same structure (`tests/embedders.py`) is tested alone.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_npeff import FisherConfig, NPEFFAnalyzer, NPEFFCallback, UnsupportedModelError
from tests import embedders, reference
from tests.embedders import embedder, real_embedder
from tests.tiny import WORDS, tiny_tokenizer

HAS_REAL = importlib.util.find_spec("sentence_transformers") is not None
needs_real = pytest.mark.skipif(not HAS_REAL, reason="needs the package sentence-transformers")
TEXTS = [
    " ".join(WORDS[j] for j in row[: 3 + i % 4])
    for i, row in enumerate(torch.randint(0, 40, (10, 6), generator=torch.Generator().manual_seed(0)).tolist())
]
EXACT: dict[str, Any] = {"rank": 16, "output_factor": "exact", "sketch": "identity", "storage_dtype": "float64"}
FEW: dict[str, Any] = {"rank": 4, "target_modules": r".*layer\.1\..*(query|dense)"}


def worst_error(model: Any, terms: Any, prompt: str = "", **settings: Any) -> float:
    """The largest relative error of a text's Fisher against the oracle, which sees each text alone in float64."""
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(**(EXACT | settings)))
    pefs = analyzer.compute_pefs(TEXTS[:3])
    exact = copy.deepcopy(model[0].model).double()
    errors = []
    for i, text in enumerate(TEXTS[:3]):
        batch = dict(tiny_tokenizer()([prompt + text], return_tensors="pt"))
        B = reference.example_factor(exact, batch, [m.parameter for m in analyzer.maps], terms)
        errors.append(reference.relative_error_of_factors(B, pefs.factors[i].double() * pefs.norms[i].sqrt()))
    return max(errors)


@pytest.mark.parametrize(
    ("family", "pooling", "normalised"),
    [("bert", "mean", True), ("bert", "cls", False), ("distilbert", "mean", False), ("qwen3", "lasttoken", True)],
)
def test_the_fisher_of_an_embedding_is_jacobian_squared(family: str, pooling: str, normalised: bool) -> None:
    """Oracle: JᵀJ, a row of J by autograd for every number of the embedding that is pooled and normalised by hand."""
    terms = reference.embedding_terms(pooling, normalised=normalised)
    assert worst_error(embedder(family, pooling, normalised=normalised), terms) <= 1e-4


@needs_real
@pytest.mark.parametrize(("pooling", "normalised"), [("mean", True), ("lasttoken", False)])
def test_the_fisher_of_the_real_package_is_jacobian_squared(pooling: str, normalised: bool, tmp_path: Path) -> None:
    """Oracle: as above."""
    terms = reference.embedding_terms(pooling, normalised=normalised)
    assert worst_error(real_embedder(tmp_path, pooling=pooling, normalised=normalised), terms) <= 1e-4


@pytest.mark.parametrize("include_prompt", [True, False])
def test_the_prompt_stands_before_every_text_and_is_pooled_as_the_model_says(include_prompt: bool) -> None:
    """Oracle: JᵀJ of the text with its prompt, whose tokens are pooled or left out by hand; `encode`."""
    model = embedder(include_prompt=include_prompt)
    model.default_prompt_name = "question"
    terms = reference.embedding_terms("mean", normalised=True, skipped=0 if include_prompt else 3)
    assert worst_error(model, terms, prompt="is not : ") <= 1e-4
    pefs = NPEFFAnalyzer(model, fisher=FisherConfig(**EXACT)).compute_pefs(TEXTS[:3])
    torch.testing.assert_close(pefs.predictions, model.encode(TEXTS[:3]), atol=1e-6, rtol=0)
    assert "'is not : '" in pefs.info["dataset"]["encoded"]["notes"][0]


def test_a_shortened_embedding_is_what_is_analysed() -> None:
    """Oracle: JᵀJ of the first numbers of the embedding, cut after it was normalised."""
    model = embedder()
    model.truncate_dim = 5
    assert worst_error(model, reference.embedding_terms("mean", normalised=True, kept=5)) <= 1e-4
    assert NPEFFAnalyzer(model).rows_per_example() == 4
    assert NPEFFAnalyzer(model, fisher=FisherConfig(rank=5)).rows_per_example() == 5


@needs_real
def test_rows_are_of_what_encode_gives(tmp_path: Path) -> None:
    """Oracle: sentence-transformers' `encode`, with a prompt and a shortened embedding."""
    model = real_embedder(tmp_path)
    model.default_prompt_name, model.truncate_dim = "question", 5
    pefs = NPEFFAnalyzer(model, fisher=FisherConfig(**EXACT)).compute_pefs(TEXTS)
    torch.testing.assert_close(pefs.predictions, torch.as_tensor(model.encode(TEXTS)), atol=1e-6, rtol=0)


@needs_real
def test_texts_go_through_the_chat_template_where_the_model_has_one(tmp_path: Path) -> None:
    """Oracle: sentence-transformers' `encode`, which renders every text as a message, the prompt as the system's."""
    model = real_embedder(tmp_path, "qwen3", "lasttoken", chat=True)
    assert "message" in model.modalities
    model.default_prompt_name = "question"
    pefs = NPEFFAnalyzer(model, fisher=FisherConfig(**EXACT)).compute_pefs(TEXTS)
    torch.testing.assert_close(pefs.predictions, torch.as_tensor(model.encode(TEXTS)), atol=1e-6, rtol=0)


def test_few_rows_are_nearly_the_best_ones() -> None:
    """Oracle: the best rank-4 matrix, from singular values. S = I prefers no direction; the metric of the weights does.

    Errors of 3 texts over the least possible ones: 1.10 on average in the metric, 2.6 in any four directions.
    """
    model = embedder(normalised=False)
    exact = copy.deepcopy(model[0].model).double()
    terms = reference.embedding_terms("mean", normalised=False)
    ratios: dict[str, list[float]] = {"parameters": [], "hidden": []}
    for metric, kept in ratios.items():
        config = FisherConfig(**(EXACT | {"rank": 4, "output_factor": "spectral", "spectral_metric": metric}))
        analyzer = NPEFFAnalyzer(model, fisher=config)
        pefs = analyzer.compute_pefs(TEXTS[:3])
        for i, text in enumerate(TEXTS[:3]):
            batch = dict(tiny_tokenizer()([text], return_tensors="pt"))
            B = reference.example_factor(exact, batch, [m.parameter for m in analyzer.maps], terms)
            A = pefs.factors[i].double() * pefs.norms[i].sqrt()
            kept.append(reference.relative_error_of_factors(B, A) / reference.best_relative_error(B, 4))
    means = {metric: sum(kept) / len(kept) for metric, kept in ratios.items()}
    assert 1 <= means["parameters"] < 1.5 and means["parameters"] < means["hidden"]


def test_the_divergence_is_half_the_squared_distance_and_one_minus_the_cosine() -> None:
    """Oracle: the embeddings before and after, by the model's own modules; cosines of unit vectors."""
    model = embedder()
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(**FEW))
    pefs = analyzer.compute_pefs(TEXTS)
    decomposition = analyzer.decompose(pefs, n_components=2)
    direction = analyzer.lift(decomposition, 0, pefs, TEXTS, selective=False)
    before = model.encode(TEXTS)
    with direction.applied_to(model, 0.5):
        after = model.encode(TEXTS)
    assert not torch.equal(before, after)
    measured = analyzer.measure(direction, TEXTS, scales=(0.5,))
    effect = measured.steps[0].groups["all"]
    assert effect.kl == pytest.approx(float((before - after).square().sum(1).mean() / 2), rel=1e-4)
    assert effect.kl == pytest.approx(float(1 - (before * after).sum(1).mean()), rel=1e-3)
    assert "half squared distance" in repr(measured) and "KL" not in repr(measured) and "answers" not in repr(measured)
    report = analyzer.evaluate_direction(direction, decomposition, 0, TEXTS, n_top=3)
    assert report.best.top_flips is None and report.best.top_accuracy is None and report.changed == []
    assert "half squared distance" in repr(report)
    assert "prediction" not in pefs.columns


def test_what_an_embedding_cannot_have_is_refused() -> None:
    """Oracle: what each error names."""
    model = embedder()
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(**FEW))
    pefs = analyzer.compute_pefs(TEXTS)
    labelled = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    with pytest.raises(UnsupportedModelError, match="embedding"):
        analyzer.edit(pefs, TEXTS, change={"0": 1.0})
    with pytest.raises(ValueError, match="positions='last'"):
        NPEFFAnalyzer(model, fisher=FisherConfig(positions="last"))
    with pytest.raises(ValueError, match="sentence1"):
        analyzer.compute_pefs([{"sentence1": text, "sentence2": text} for text in TEXTS])
    with pytest.raises(ValueError, match="20 positions"):
        analyzer.compute_pefs([" ".join(WORDS[:30])])
    cut = analyzer.compute_pefs([" ".join(WORDS[:30])], truncation=True)
    torch.testing.assert_close(cut.predictions, model.encode([" ".join(WORDS[:30])]), atol=1e-6, rtol=0)
    assert analyzer.compute_pefs(labelled).info["label_names"] is None  # classes are columns, and nothing is "right"


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder"])
def test_other_models_of_sentence_transformers_are_refused_by_name(kind: str) -> None:
    """Oracle: the name in the error."""
    other: Any = type(kind, (nn.Sequential,), {})(*embedder())
    with pytest.raises(UnsupportedModelError, match=kind):
        NPEFFAnalyzer(other)


def test_first_modules_that_are_no_transformer_of_texts_are_refused() -> None:
    """Oracle: what the error names: static embeddings, images, a model that runs elsewhere."""
    static = embedders.SentenceTransformer(nn.EmbeddingBag(10, 4))
    with pytest.raises(UnsupportedModelError, match="EmbeddingBag"):
        NPEFFAnalyzer(static)
    seeing: Any = embedder()
    seeing.modalities = ["text", "image"]
    with pytest.raises(UnsupportedModelError, match="image"):
        NPEFFAnalyzer(seeing)
    late = embedders.SentenceTransformer(nn.Identity(), *embedder())
    with pytest.raises(UnsupportedModelError, match="Identity"):
        NPEFFAnalyzer(late)


@needs_real
def test_a_static_embedding_of_the_real_package_is_refused() -> None:
    """Oracle: the name in the error."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=4)
    with pytest.raises(UnsupportedModelError, match="StaticEmbedding"):
        NPEFFAnalyzer(SentenceTransformer(modules=[static], device="cpu"))


def test_weights_have_the_names_of_the_transformer(tmp_path: Path) -> None:
    """Oracle: names of the transformer alone, so that PEFT loads the adapter around it; embeddings of W + ΔW."""
    from peft import PeftModel

    model = embedder()
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(**FEW))
    body = dict(model[0].model.named_parameters())
    assert set(analyzer.shapes) <= set(body)
    pefs = analyzer.compute_pefs(TEXTS)
    direction = analyzer.lift(analyzer.decompose(pefs, n_components=2), 0, pefs, TEXTS, selective=False)
    with direction.applied_to(model, 0.5):
        truth = model.encode(TEXTS)
    adapter = direction.to_adapter(16, 0.5)
    assert adapter.config["task_type"] == "FEATURE_EXTRACTION"
    assert adapter.loads_in == ["PEFT", "transformers", "sentence-transformers"]
    assert "SentenceTransformer(" in adapter.card() and "model.load_adapter(" in adapter.card()
    adapter.save_pretrained(tmp_path)
    own = analyzer.weights()
    model[0].model = PeftModel.from_pretrained(model[0].model, tmp_path)
    torch.testing.assert_close(model.encode(TEXTS), truth, atol=1e-5, rtol=0)
    around = NPEFFAnalyzer(model, fisher=FisherConfig(**FEW))
    assert around.shapes == analyzer.shapes and around.weights()["hash"] == own["hash"]


@needs_real
def test_an_adapter_loads_into_the_real_package_and_back(tmp_path: Path) -> None:
    """Oracle: embeddings of W + ΔW; those of a model that is loaded by the adapter's folder alone."""
    model = real_embedder(tmp_path)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(**FEW))
    pefs = analyzer.compute_pefs(TEXTS)
    direction = analyzer.lift(analyzer.decompose(pefs, n_components=2), 0, pefs, TEXTS, selective=False)
    before = torch.as_tensor(model.encode(TEXTS))
    with direction.applied_to(model, 0.5):
        truth = torch.as_tensor(model.encode(TEXTS))
    assert (truth - before).abs().max() > 0.01
    adapter = direction.to_adapter(16, 0.5)
    adapter.config["base_model_name_or_path"] = str(tmp_path / "model")
    adapter.save_pretrained(tmp_path / "adapter")
    model.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(torch.as_tensor(model.encode(TEXTS)), truth, atol=1e-5, rtol=0)
    again = NPEFFAnalyzer.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(torch.as_tensor(again.model.encode(TEXTS)), truth, atol=1e-5, rtol=0)
    assert again.head.traits.embeds
    plain = NPEFFAnalyzer.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(torch.as_tensor(plain.model.encode(TEXTS)), before, atol=1e-6, rtol=0)


def callback_of(**settings: Any) -> NPEFFCallback:
    return NPEFFCallback(
        [{"text": text} for text in TEXTS[:6]],
        every=1,
        n_components=2,
        n_restarts=1,
        fisher=FisherConfig(**FEW),
        **settings,
    )


@needs_real
def test_training_of_embeddings_stays_what_it_is(tmp_path: Path) -> None:
    """Oracle: sentence-transformers' Trainer without the callback, bit for bit; points at every step."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    given: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    given |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 1}
    trained = []
    for number, callback in enumerate((None, callback_of())):
        model = real_embedder(tmp_path / str(number))
        trainer = SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(str(tmp_path / f"out{number}"), **given),
            train_dataset=Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[] if callback is None else [callback],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained.append((losses, model.state_dict(), torch.get_rng_state()))
    assert callback is not None and [point["step"] for point in callback.history] == [1, 2, 3]
    assert len(trained[0][0]) == 3 and trained[0][0] == trained[1][0]
    assert all(torch.equal(value, trained[1][1][name]) for name, value in trained[0][1].items())
    assert torch.equal(trained[0][2], trained[1][2])
    assert callback.report_ is not None and callback.report_.mean_kl > 0


@pytest.mark.skipif(importlib.util.find_spec("setfit") is None, reason="needs the package setfit")
def test_setfit_hands_on_the_model_that_it_trains(tmp_path: Path) -> None:
    """SetFit's callbacks get an object that is no module as `model`. Oracle: steps in the history."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    body = real_embedder(tmp_path)
    from sklearn.linear_model import LogisticRegression

    model = SetFitModel(model_body=body, model_head=LogisticRegression(), labels=["a", "b"])
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=3, batch_size=4, report_to="none")
    data = Dataset.from_dict({"text": TEXTS, "label": [i % 2 for i in range(len(TEXTS))]})
    callback = callback_of()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert [point["step"] for point in callback.history] == [1, 2, 3]


def test_a_trainer_of_ones_own_loss_is_followed(tmp_path: Path) -> None:
    """transformers' Trainer around an embedding model. Oracle: steps in the history and the log."""
    from transformers import Trainer, TrainingArguments

    class Contrast(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            e = model({**inputs, "modality": "text"})["sentence_embedding"]
            return nn.functional.cross_entropy(10 * e @ e.T, torch.arange(len(e)))

    model = embedder()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    examples = [dict(tiny_tokenizer()(text)) for text in TEXTS]
    trainer = Contrast(model, arguments, train_dataset=examples, processing_class=model.tokenizer)
    callback = callback_of().attach(trainer)
    trainer.train()
    assert [point["step"] for point in callback.history] == [1, 2]
    assert sum("npeff/explained" in entry for entry in trainer.state.log_history) == 2
