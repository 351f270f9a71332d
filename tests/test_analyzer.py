"""NPEFFAnalyzer on tiny models of real architectures: the per-example Fishers against brute force, end to end."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_npeff import (
    NPEFF,
    CorruptStoreError,
    FisherConfig,
    FormatVersionError,
    IncompatibleSketchError,
    NPEFFAnalyzer,
    PEFs,
    UnsupportedModelError,
)
from hf_npeff.fisher.passes import FisherPass
from tests import reference
from tests.reference import terms_of
from tests.tiny import collate, task_of, tiny_batch, tiny_model, tiny_tokenizer


def analyzer_of(model: Any, processing_class: Any = None, **settings: Any) -> NPEFFAnalyzer:
    """An unsketched float64 analyzer, the brute-force setting; `settings` override."""
    config = FisherConfig(**{"sketch": "identity", "storage_dtype": "float64", **settings})
    return NPEFFAnalyzer(model, processing_class, fisher=config)


def in_parameters(analyzer: NPEFFAnalyzer, pefs: PEFs) -> Tensor:
    """Unsketched rows (n, c, p) before scaling, laid out as `model.named_parameters()` would flatten them."""
    blocks = pefs.sketch().blocks
    assert blocks is not None
    A = pefs.factors.double() * pefs.norms.sqrt()[:, None, None]
    parts = [m.as_weight(A[..., blocks[m.parameter]].unflatten(-1, m.shape)).flatten(2) for m in analyzer.maps]
    return torch.cat(parts, -1)


def brute_force(analyzer: NPEFFAnalyzer, examples: Sequence[Any], positions: str = "last") -> list[Tensor]:
    """A (k·t × p) of every example by plain autograd, one example at a time and unpadded."""
    model: Any = analyzer.model
    names = [m.parameter for m in analyzer.maps]
    terms = terms_of(task_of(model), positions)
    return [reference.example_factor(model, collate([e], model), names, terms) for e in examples]


def errors(analyzer: NPEFFAnalyzer, pefs: PEFs, truth: Sequence[Tensor]) -> list[float]:
    rows = in_parameters(analyzer, pefs)
    return [reference.relative_error_of_factors(B, A) for B, A in zip(truth, rows, strict=True)]


EXACT = [
    ("bert", "sequence-classification", {}),
    ("bert", "sequence-classification", {"num_labels": 2}),
    ("bert", "sequence-classification", {"num_labels": 4, "problem_type": "multi_label_classification"}),
    ("bert", "sequence-classification", {"num_labels": 1}),
    ("bert", "sequence-classification", {"num_labels": 3, "problem_type": "regression"}),
    ("llama", "causal-lm", {}),
    ("llama", "sequence-classification", {}),
    ("gpt2", "causal-lm", {}),
    ("gpt2", "sequence-classification", {"num_labels": 2}),
]


@pytest.mark.parametrize(("family", "task", "options"), EXACT)
def test_exact_equals_brute_force_in_batches_of_one_and_seven(family: str, task: str, options: dict[str, Any]) -> None:
    """Oracle: brute-force autograd in float64 of every example alone, unpadded; relative Fisher error ≤ 1e-6.

    Seven examples of different lengths, so that a batch of seven is padded.
    """
    model = tiny_model(family, task, **options)
    examples = tiny_batch(model, 7, seed=1)
    analyzer = analyzer_of(model, output_factor="exact", rank=2)
    truth = brute_force(analyzer, examples)
    for batch_size in (1, 7):
        pefs = analyzer.compute_pefs(examples, batch_size=batch_size)
        assert max(errors(analyzer, pefs, truth)) <= 1e-6
    k = pefs.predictions.shape[-1] if options.get("problem_type") else model.config.num_labels
    k = model.config.vocab_size if task == "causal-lm" else k
    softmax = task == "causal-lm" or (k > 1 and "problem_type" not in options)
    assert pefs.rank == (k - 1 if softmax else k)


def test_a_binary_classifier_costs_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of the calls of `torch.autograd.grad`, one for each batch; the row is all of the Fisher."""
    model = tiny_model("bert", num_labels=2)
    examples = tiny_batch(model, 6, seed=2, min_length=6, max_length=6)
    analyzer = analyzer_of(model)
    with analyzer._at_work() as work:
        from hf_npeff.data import Examples

        encoded = list(Examples(examples))
        work.prepare(encoded)
        calls = []
        original = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k))
        rows = work.rows(encoded)
    assert len(calls) == 1
    assert rows["factors"].shape[1] == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tensors_give_the_rows_of_the_unpadded_examples(family: str, side: str) -> None:
    """Oracle: brute force on every example alone; a dictionary of tensors padded on either side, with a mask."""
    model = tiny_model(family, "causal-lm", vocab_size=14)
    examples = tiny_batch(model, 7, seed=3)
    padded = collate(examples, model, side, position_ids=True)
    analyzer = analyzer_of(model, output_factor="exact")
    truth = brute_force(analyzer, examples)
    for batch_size in (1, 7):
        pefs = analyzer.compute_pefs(padded, batch_size=batch_size)
        assert max(errors(analyzer, pefs, truth)) <= 1e-6


@pytest.mark.parametrize("std", [0.05, 0.6], ids=["flat", "peaked"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_spectral_is_within_a_quarter_of_the_best_at_the_hidden_state(family: str, std: float) -> None:
    """Oracle: the best rank-c factor of the dense M = J_headᵀ S J_head, c = 1, 2, 4, 8; gemma2's head is soft-capped.

    J_head is autograd's Jacobian of the logits by the hidden state that the output embedding read.
    """
    model = tiny_model(family, "causal-lm", std=std, dtype=torch.float64)
    examples = tiny_batch(model, 4, seed=4)
    for c in (1, 2, 4, 8):
        analyzer = analyzer_of(model, output_factor="spectral", rank=c, spectral_metric="hidden")
        pefs = analyzer.compute_pefs(examples, batch_size=4)
        assert pefs.cotangents is not None
        assert pefs.cotangents.shape == (4, c, 1, model.config.hidden_size)
        for i, example in enumerate(examples):
            J, S = head_jacobian(model, collate([example], model))
            exact = reference.factor(J, S)
            error = reference.relative_error_of_factors(exact, pefs.cotangents[i, :, 0])
            assert error <= 1.25 * reference.best_relative_error(exact, c) + 1e-6


@pytest.mark.parametrize("scale", [1.0, 50.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_spectral_is_within_a_quarter_of_the_best_in_the_parameters(family: str, scale: float) -> None:
    """Oracle: the best rank-c approximation of brute-force Fishers, c = 1, 2, 4, 8, on examples that are no pilots too.

    Weights are as small as transformers initialises them. The hidden state's own metric is measured beside it: on one
    of these models it has to be worse, or the test would not tell one from the other.
    """
    size = {"n_embd": 32} if family == "gpt2" else {"hidden_size": 32}
    model = tiny_model(family, "causal-lm", std=0.02, vocab_size=40, tie_word_embeddings=False, **size)
    with torch.no_grad():
        model.get_output_embeddings().weight *= scale
    examples = tiny_batch(model, 7, seed=4)
    truth = brute_force(analyzer_of(model), examples)
    for c in (1, 2, 4, 8):
        best = [reference.best_relative_error(A, c) for A in truth]
        analyzer = analyzer_of(model, output_factor="spectral", rank=c)
        pefs = analyzer.compute_pefs(examples, batch_size=7 if c < 8 else 1)
        assert pefs.info["fisher"]["spectral_metric"] == "parameters"
        for error, least in zip(errors(analyzer, pefs, truth), best, strict=True):
            assert error <= 1.25 * least + 1e-6
    if (family, scale) == ("llama", 1.0):
        own = analyzer_of(model, output_factor="spectral", rank=8, spectral_metric="hidden")
        ratios = [e / b for e, b in zip(errors(own, own.compute_pefs(examples), truth), best, strict=True)]
        assert max(ratios) > 1.25


def test_the_metric_of_the_parameters_is_refused_where_there_is_no_hidden_state() -> None:
    """Oracle: the message; a classifier's rows enter at its logits."""
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="spectral_metric='parameters'"):
        analyzer_of(model, spectral_metric="parameters").compute_pefs(tiny_batch(model, 2, seed=0))


def head_jacobian(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """J_head (k×h) and S (k×k) at the last position of one example, by autograd through the model's own head."""
    seen: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["hidden"] = args[0].detach().requires_grad_()
        return (seen["hidden"], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(enter)
    try:
        logits = model(**batch).logits[0, -1]
    finally:
        handle.remove()
    rows = [torch.autograd.grad(z, seen["hidden"], retain_graph=True)[0][0, -1] for z in logits]
    return torch.stack(rows), reference.output_hessian(logits, "softmax")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_spectral_rows_are_the_gradients_of_their_cotangents(family: str) -> None:
    """Oracle: autograd of ⟨cotangent, hidden state⟩ by the parameters, example by example."""
    model = tiny_model(family, "causal-lm")
    examples = tiny_batch(model, 3, seed=5)
    analyzer = analyzer_of(model, rank=2)
    pefs = analyzer.compute_pefs(examples, batch_size=3)
    assert pefs.config.output_factor == "auto"
    rows = in_parameters(analyzer, pefs)
    names = [m.parameter for m in analyzer.maps]
    assert pefs.cotangents is not None
    for i, example in enumerate(examples):
        for a in range(2):
            truth = hidden_gradient(model, collate([example], model), names, pefs.cotangents[i, a, 0])
            torch.testing.assert_close(rows[i, a], truth, atol=1e-5 * float(truth.abs().max()), rtol=1e-5)


def hidden_gradient(model: Any, batch: dict[str, Tensor], names: list[str], cotangent: Tensor) -> Tensor:
    seen: dict[str, Tensor] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["hidden"] = args[0]

    handle = model.get_output_embeddings().register_forward_pre_hook(look)
    try:
        model(**batch)
    finally:
        handle.remove()
    weights = [dict(model.named_parameters(remove_duplicate=False))[name] for name in names]
    gradients = torch.autograd.grad(seen["hidden"][0, -1] @ cotangent, weights)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("factor", ["spectral", "exact"])
def test_the_head_may_be_under_analysis(family: str, factor: str) -> None:
    """Oracle: brute force over all linear maps with lm_head for exact; spectral at the hidden state for spectral.

    Cotangents then enter at the logits; gemma2's are soft-capped.
    """
    model = tiny_model(family, "causal-lm", tie_word_embeddings=False)
    examples = tiny_batch(model, 3, seed=6)
    analyzer = analyzer_of(model, target_modules=r".*(_proj|lm_head)", output_factor=factor, rank=4)
    assert analyzer.maps[-1].modules == ("lm_head",)
    pefs = analyzer.compute_pefs(examples, batch_size=3)
    if factor == "exact":
        assert max(errors(analyzer, pefs, brute_force(analyzer, examples))) <= 1e-6
        return
    before_the_head = analyzer_of(
        model, target_modules=r".*_proj", output_factor="spectral", rank=4, spectral_metric="hidden"
    )
    same = in_parameters(before_the_head, before_the_head.compute_pefs(examples, batch_size=3))
    for with_head, without in zip(in_parameters(analyzer, pefs), same, strict=True):
        assert reference.relative_error_of_factors(without, with_head[:, : without.shape[1]]) <= 1e-6


def test_a_head_tied_to_the_input_embedding_is_refused_under_analysis() -> None:
    """Oracle: the weight's gradient has a part through the input embedding, which no hook of a linear map sees."""
    model = tiny_model("qwen3", "causal-lm")
    with pytest.raises(UnsupportedModelError, match="exclude_modules"):
        analyzer_of(model, target_modules=["lm_head", "q_proj"]).compute_pefs(tiny_batch(model, 3, seed=6))


@pytest.mark.parametrize(("family", "positions"), [("llama", "labels"), ("gpt2", "labels"), ("llama", "all")])
def test_a_sum_over_positions_is_reduced_to_the_best_rows(family: str, positions: str) -> None:
    """Oracle: the best rank-c error of brute force over all counted positions, met by exact factors.

    Batches of one and of four give the same Fishers, whatever the number of positions of the others in the batch.
    """
    model = tiny_model(family, "causal-lm", vocab_size=14)
    examples = tiny_batch(model, 4, seed=7, labels=True)
    counts = {sum(label != -100 for label in e["labels"]) for e in examples}
    assert {1, 3} <= counts  # a batch of one then has one term, another three
    c = 6
    analyzer = analyzer_of(model, positions=positions, output_factor="exact", rank=c)
    truth = brute_force(analyzer, examples, positions)
    best = [reference.best_relative_error(B, c) for B in truth]
    for batch_size in (1, 4):
        pefs = analyzer.compute_pefs(examples, batch_size=batch_size)
        assert pefs.factors.shape[:2] == (4, c)
        assert errors(analyzer, pefs, truth) == pytest.approx(best, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sum_of_spectral_rows_is_reduced_to_its_best_rows(family: str) -> None:
    """Oracle: dense top-c eigenpairs of every term's M, their gradients by autograd, stacked, reduced by SVD."""
    model = tiny_model(family, "causal-lm")
    examples = tiny_batch(model, 4, seed=7, labels=True)
    c = 3
    analyzer = analyzer_of(model, positions="labels", rank=c, spectral_metric="hidden")
    rows = in_parameters(analyzer, analyzer.compute_pefs(examples, batch_size=4))
    names = [m.parameter for m in analyzer.maps]
    for A, example in zip(rows, examples, strict=True):
        stacked = []
        for t, label in enumerate(example["labels"]):
            if label != -100:
                prefix = {"input_ids": example["input_ids"][:t]}
                J, S = head_jacobian(model, collate([prefix], model))
                values, vectors = torch.linalg.eigh(reference.fisher(J, S))
                for value, u in zip(values[-c:], vectors.T[-c:], strict=True):
                    gradient = hidden_gradient(model, collate([prefix], model), names, u)
                    stacked.append(value.clamp(min=0).sqrt() * gradient)
        B = torch.stack(stacked)
        error = reference.relative_error_of_factors(B, A)
        assert error == pytest.approx(reference.best_relative_error(B, c), rel=1e-3, abs=1e-5)


def test_the_mixed_cotangents_of_a_sum_make_its_rows() -> None:
    """Oracle: autograd of Σ_t ⟨cotangent_t, hidden_t⟩ by the parameters, for labelled positions."""
    model = tiny_model("llama", "causal-lm")
    examples = tiny_batch(model, 3, seed=8, labels=True)
    analyzer = analyzer_of(model, positions="labels", rank=3)
    pefs = analyzer.compute_pefs(examples, batch_size=3)
    rows = in_parameters(analyzer, pefs)
    names = [m.parameter for m in analyzer.maps]
    weights = [dict(model.named_parameters())[name] for name in names]
    assert pefs.cotangents is not None
    for i, example in enumerate(examples):
        seen: dict[str, Tensor] = {}
        handle = model.lm_head.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(hidden=a[0]))
        model(input_ids=torch.tensor([example["input_ids"]]))
        handle.remove()
        counted = [t - 1 for t, label in enumerate(example["labels"]) if label != -100]
        for a in range(3):
            V = pefs.cotangents[i, a, : len(counted)]
            gradients = torch.autograd.grad((seen["hidden"][0, counted] * V).sum(), weights, retain_graph=True)
            truth = torch.cat([g.flatten() for g in gradients])
            torch.testing.assert_close(rows[i, a], truth, atol=1e-5 * float(truth.abs().max()), rtol=1e-5)
            assert (pefs.cotangents[i, a, len(counted) :] == 0).all()


@pytest.mark.parametrize("factor", ["projection", "sampling"])
@pytest.mark.parametrize("positions", ["last", "labels"])
def test_random_factors_are_unbiased_end_to_end(factor: str, positions: str) -> None:
    """Oracle: statistical, E[⟨x, AᵀA x⟩] = ⟨x, F x⟩ of brute force for four fixed directions x.

    One example under 250 ids, so 250 seeds, of 4 rows each; every mean within 5 standard errors.
    """
    model = tiny_model("llama", "causal-lm")
    (example,) = tiny_batch(model, 1, seed=9, labels=True)
    analyzer = analyzer_of(model, output_factor=factor, positions=positions, rank=4, target_modules=["q_proj"])
    pefs = analyzer.compute_pefs([{**example, "id": f"copy {i}"} for i in range(250)], batch_size=64)
    (B,) = brute_force(analyzer, [example], positions)
    x = torch.randn(B.shape[1], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = (in_parameters(analyzer, pefs) @ x).square().sum(1)
    standard = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - (B @ x).square().sum(0)).abs() <= 5 * standard).all()


@pytest.mark.parametrize("factor", ["projection", "sampling", "spectral"])
def test_an_examples_rows_do_not_depend_on_its_batch(factor: str) -> None:
    """Oracle: batches of one; labelled positions, so that the terms of a batch are padded."""
    model = tiny_model("gpt2", "causal-lm")
    examples = tiny_batch(model, 7, seed=10, labels=True)
    analyzer = analyzer_of(model, output_factor=factor, positions="labels", rank=3, target_modules=["c_proj"])
    alone = in_parameters(analyzer, analyzer.compute_pefs(examples, batch_size=1))
    together = in_parameters(analyzer, analyzer.compute_pefs(examples, batch_size=7))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b.T @ b, a.T @ a, atol=1e-8 * float((a.T @ a).abs().max()), rtol=0)


# The self-test and the sketch ----------------------------------------------------------------------------------------


def test_the_self_test_is_kept_and_printed_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: coverage counted here, and the error of PEF inner products recomputed from brute-force rows."""
    model = tiny_model("llama", "causal-lm")
    examples = tiny_batch(model, 8, seed=11)
    analyzer = analyzer_of(model, sketch="kronecker", sketch_dim=6, rank=2)
    with caplog.at_level(logging.INFO):
        pefs = analyzer.compute_pefs(examples)
    lines = [r.getMessage() for r in caplog.records if "self-test" in r.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    kept = pefs.info["selftest"]
    covered = sum(p.numel() for n, p in model.named_parameters() if n in {m.parameter for m in analyzer.maps})
    assert kept["coverage"] == pytest.approx(covered / sum(p.numel() for p in model.parameters()))
    assert kept["row_error"] < 1e-5
    full = analyzer_of(model, rank=2).compute_pefs(examples).factors
    exact = torch.einsum("iap,jbp->iajb", full, full).square().sum((1, 3))
    sketched = torch.einsum("iap,jbp->iajb", pefs.factors, pefs.factors).square().sum((1, 3))
    off = ~torch.eye(8, dtype=torch.bool)
    truth = float((sketched - exact)[off].norm() / exact[off].norm())
    assert pefs.sketch_error == pytest.approx(truth, rel=1e-3)


def test_a_sketch_above_the_tolerance_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: a side of one number a module cannot be faithful; a generous tolerance does not warn."""
    model = tiny_model("llama", "causal-lm", dtype=torch.float32)
    examples = tiny_batch(model, 6, seed=12)
    analyzer_of(model, sketch="kronecker", sketch_dim=1, sketch_tolerance=1e9).compute_pefs(examples)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    analyzer_of(model, sketch="kronecker", sketch_dim=1, sketch_tolerance=1e-3).compute_pefs(examples)
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "tolerance" in r.getMessage()]


def test_auto_meets_the_tolerance_at_the_first_candidate_that_does() -> None:
    """Oracle: the measured errors that are kept: all but the last are above the tolerance."""
    model = tiny_model("llama", "causal-lm", dtype=torch.float32, hidden_size=32, intermediate_size=96)
    examples = tiny_batch(model, 8, seed=13)
    analyzer = analyzer_of(model, sketch="auto", sketch_tolerance=0.15, storage_dtype="float32")
    pefs = analyzer.compute_pefs(examples)
    tried = list(pefs.info["selftest"]["tried"].values())
    assert len(tried) >= 1
    assert all(error > 0.15 for error in tried[:-1])
    assert pefs.sketch_error == tried[-1] <= 0.15
    assert pefs.config.sketch != "auto"


def test_auto_keeps_every_number_of_a_small_model() -> None:
    """Oracle: fewer parameters than the identity's limit."""
    model = tiny_model("bert")
    pefs = analyzer_of(model, sketch="auto", target_modules=["query"]).compute_pefs(tiny_batch(model, 3, seed=1))
    assert pefs.config.sketch == "identity"
    assert pefs.sketch_error == 0


def test_a_flat_classifier_passes_the_self_test() -> None:
    """Oracle: brute force. A head of zeros predicts the uniform distribution, whose S has one eigenvalue repeated.

    Its eigenvectors are arbitrary, so an example in a batch and alone may have other rows of the same Fisher.
    """
    model = tiny_model("bert", num_labels=4, dtype=torch.float32)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-4)
        model.classifier.bias.zero_()
    examples = tiny_batch(model, 6, seed=14)
    analyzer = analyzer_of(model, rank=4)
    pefs = analyzer.compute_pefs(examples, batch_size=6)
    assert pefs.info["selftest"]["row_error"] < 1e-3
    assert max(errors(analyzer, pefs, brute_force(analyzer, examples))) < 1e-3


def test_wrong_rows_are_refused_by_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a model whose weight is also used behind the hooks' back."""
    model = tiny_model("bert")
    dense = model.bert.pooler.dense
    original = type(model.bert.pooler).forward

    def twice(self: Any, hidden: Tensor) -> Tensor:
        return original(self, hidden) + torch.nn.functional.linear(hidden[:, 0], dense.weight)

    monkeypatch.setattr(type(model.bert.pooler), "forward", twice)
    with pytest.raises(UnsupportedModelError, match="hooks"):
        analyzer_of(model).compute_pefs(tiny_batch(model, 3, seed=1))


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


# Resuming ------------------------------------------------------------------------------------------------------------


class Counter:
    """Counts the examples that go through a backward pass, and may stop in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None):
        self.n = 0
        original = FisherPass.rows

        def rows(work: FisherPass, examples: Any) -> Any:
            if stop_after is not None and self.n >= stop_after:
                raise KeyboardInterrupt
            self.n += len(examples)
            return original(work, examples)

        monkeypatch.setattr(FisherPass, "rows", rows)


def small(settings: dict[str, Any] | None = None) -> tuple[NPEFFAnalyzer, list[dict[str, Any]]]:
    model = tiny_model("bert")
    return analyzer_of(model, target_modules=["query"], **(settings or {})), tiny_batch(model, 7, seed=17)


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an uninterrupted run, bit for bit, and a count of the examples."""
    analyzer, examples = small()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counter(patch, stop_after=4)
        analyzer.compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    with pytest.raises(CorruptStoreError, match="manifest"):
        PEFs.load(tmp_path / "p")
    counter = Counter(monkeypatch)
    resumed = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    assert counter.n == 3
    whole = analyzer.compute_pefs(examples, tmp_path / "q", shard_size=2, batch_size=2)
    assert torch.equal(resumed.factors, whole.factors)
    assert resumed.columns == whole.columns


def test_a_finished_run_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of the examples, zero; the files are not touched."""
    analyzer, examples = small()
    first = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.safetensors")}
    counter = Counter(monkeypatch)
    again = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3)
    assert counter.n == 0
    assert torch.equal(again.factors, first.factors)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.safetensors")}


@pytest.mark.parametrize("damage", ["delete", "alter", "truncate", "delete columns"])
def test_a_damaged_shard_alone_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Oracle: the undamaged store, and a count of the examples: those of one shard."""
    analyzer, examples = small()
    whole = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3).factors.clone()
    victim = tmp_path / "p" / ("pefs-00003.parquet" if damage == "delete columns" else "pefs-00003.safetensors")
    content = bytearray(victim.read_bytes())
    if damage.startswith("delete"):
        victim.unlink()
    elif damage == "alter":
        content[-5] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[:-8])
    with pytest.raises(CorruptStoreError, match="pefs-00003"):
        PEFs.load(tmp_path / "p")
    counter = Counter(monkeypatch)
    again = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3)
    assert counter.n == 3
    assert torch.equal(again.factors, whole)
    assert torch.equal(PEFs.load(tmp_path / "p").factors, whole)


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (3, 100)])
@pytest.mark.parametrize("finished", [True, False])
def test_another_shard_size_still_ends_in_a_whole_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, finished: bool
) -> None:
    """Oracle: a run with that shard size from the start."""
    analyzer, examples = small()
    if finished:
        analyzer.compute_pefs(examples, tmp_path / "p", shard_size=first, batch_size=1)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Counter(patch, stop_after=5)
            analyzer.compute_pefs(examples, tmp_path / "p", shard_size=first, batch_size=1)
    analyzer.compute_pefs(examples, tmp_path / "p", shard_size=second, batch_size=1)
    whole = analyzer.compute_pefs(examples, batch_size=1)
    loaded = PEFs.load(tmp_path / "p")
    torch.testing.assert_close(loaded.factors, whole.factors)
    assert loaded.example_ids == whole.example_ids


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 1}, "rank"),
        ({"seed": 3}, "seed"),
        ({"sketch": "countsketch", "sketch_dim": 64}, "sketch"),
        ({"target_modules": ["key"]}, "target_modules"),
        ({"storage_dtype": "float32"}, "storage_dtype"),
        ({"output_factor": "spectral"}, "output_factor"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Oracle: the error names the setting and says what to do; the store stays as it was."""
    analyzer, examples = small()
    analyzer.compute_pefs(examples, tmp_path / "p")
    before = (tmp_path / "p" / "manifest.json").read_bytes()
    other = NPEFFAnalyzer(analyzer.model, fisher=FisherConfig(**{**analyzer.fisher.to_dict(), **change}))
    with pytest.raises(IncompatibleSketchError, match=named) as caught:
        other.compute_pefs(examples, tmp_path / "p")
    assert "resume=False" in str(caught.value)
    assert (tmp_path / "p" / "manifest.json").read_bytes() == before
    other.compute_pefs(examples, tmp_path / "p", resume=False)
    assert PEFs.load(tmp_path / "p").config.rank == other.fisher.rank


def test_resuming_with_other_data_or_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """Oracle: the error names the data set, or the model's task."""
    analyzer, examples = small()
    analyzer.compute_pefs(examples, tmp_path / "p")
    with pytest.raises(IncompatibleSketchError, match="dataset"):
        analyzer.compute_pefs(examples[:5], tmp_path / "p")
    with pytest.raises(IncompatibleSketchError, match="dataset"):
        analyzer.compute_pefs(examples[::-1], tmp_path / "p")
    other = NPEFFAnalyzer(tiny_model("bert", "token-classification"), fisher=analyzer.fisher)
    with pytest.raises(IncompatibleSketchError, match="model"):
        other.compute_pefs(examples, tmp_path / "p")


def test_auto_keeps_to_the_sketch_that_a_folder_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the fingerprint in config.json, though the second run measures nothing."""
    model = tiny_model("llama", "causal-lm", dtype=torch.float32)
    examples = tiny_batch(model, 6, seed=12)
    settings = {"sketch": "auto", "storage_limit": 2000, "sketch_tolerance": 0.5, "storage_dtype": "float32"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counter(patch, stop_after=2)
        analyzer_of(model, **settings).compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    pefs = analyzer_of(model, **settings).compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    assert len(pefs) == 6


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """Oracle: documented errors for a config.json that is no store's; the file stays."""
    analyzer, examples = small()
    for content, error in (
        ("{}", FormatVersionError),
        ('{"format_version": 1}', IncompatibleSketchError),
        ("[", CorruptStoreError),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(error):
            analyzer.compute_pefs(examples, tmp_path)
        assert (tmp_path / "config.json").read_text() == content


# Bad input -----------------------------------------------------------------------------------------------------------


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
        with pytest.raises(ValueError, match="has no tokens"):
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
        with pytest.raises(ValueError, match=f"'the long one' has {limit + 1} tokens.*{limit} positions"):
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
        with pytest.raises(ValueError, match="rank=17 exceeds the 16"):
            analyzer_of(model, rank=17, target_modules=target).compute_pefs(tiny_batch(model, 2, seed=1))


def test_labels_that_are_missing_are_missed_before_the_model_runs() -> None:
    """Oracle: the error names the first example without labels."""
    model = tiny_model("gpt2", "causal-lm")
    examples = tiny_batch(model, 3, seed=1, labels=True)
    del examples[1]["labels"]
    with pytest.raises(ValueError, match=r"'1'.*labels|labels.*'1'"):
        analyzer_of(model, positions="labels").compute_pefs(examples)
    examples[1]["labels"] = [-100] * len(examples[1]["input_ids"])
    with pytest.raises(ValueError, match="'1'"):
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
        original = FisherPass.rows if failing == "forward" else torch.autograd.grad
        calls = []

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > (1 if failing == "forward" else 20):
                raise RuntimeError("pulled the plug")
            return original(*args, **kwargs)

        if failing == "forward":
            monkeypatch.setattr(FisherPass, "rows", fail)
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


def test_what_is_no_model_no_config_and_no_token_is_named() -> None:
    """Oracle: the messages say what was expected and what to use."""
    model = tiny_model("llama", "causal-lm")
    with pytest.raises(ValueError, match=r"NPEFFAnalyzer\.from_pretrained"):
        NPEFFAnalyzer("org/model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FisherConfig"):
        NPEFFAnalyzer(model, fisher={"rank": 2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"example '1' has token ids from 5 to 100000.*vocabulary"):
        analyzer_of(model).compute_pefs([{"input_ids": [5, 6]}, {"input_ids": [5, 100_000]}])
    with pytest.raises(ValueError, match=r"PEFs\.from_factors"):
        NPEFF(2).fit(torch.zeros(3, 2, 4))  # type: ignore[arg-type]
