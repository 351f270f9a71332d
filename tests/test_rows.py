"""The rows of an analyzer on tiny models of real architectures: Fishers against brute force, end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_npeff import (
    UnsupportedModelError,
)
from hf_npeff.data import Examples
from hf_npeff.fisher.preparation import choose_metric, prepare
from tests import reference
from tests.analyses import analyzer_of, brute_force, errors, in_parameters
from tests.tiny import collate, tiny_batch, tiny_model

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


@pytest.mark.one_in(3)
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
    encoded = list(Examples(examples))
    with analyzer.forward_pass() as forward:
        maker = prepare(forward, analyzer.fisher, encoded)
        calls = []
        original = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k))
        rows = maker.rows(encoded)
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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(2)
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


@pytest.mark.parametrize("mixes", [False, True], ids=["apart", "mixing"])
def test_the_metric_of_the_parameters_is_that_of_one_direction_at_a_time(mixes: bool) -> None:
    """Oracle: the same texts alone. Where a batch mixes gradients, all texts are taken alone after it."""
    model = tiny_model("llama", "causal-lm", vocab_size=40, dtype=torch.float32)
    batches: list[int] = []

    def mean(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        batches.append(len(output))
        return output.mean(0, keepdim=True).expand_as(output) if mixes else output

    model.model.norm.register_forward_hook(mean)
    analyzer = analyzer_of(model, output_factor="spectral", rank=2, spectral_metric="parameters")
    with analyzer.forward_pass() as forward:
        _, together = choose_metric(forward, analyzer.fisher)
        # All 4 texts × 16 directions in a batch; alone: a text for the choice, one row for the check, and all if mixed.
        assert [n for n in batches if n > 1] == [64] and batches.count(1) == (6 if mixes else 2)
        forward.trials.one_at_a_time = True
        _, alone = choose_metric(forward, analyzer.fisher)
    assert together is not None and alone is not None
    torch.testing.assert_close(together.root, alone.root, rtol=1e-4, atol=1e-6)


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
    """Oracle: dense top-c eigenpairs of every term's M, their gradients by autograd, stacked, reduced by SVD.

    With c = 4 the Krylov space of the rows is the whole hidden space, so that the pairs are exact.
    """
    model = tiny_model(family, "causal-lm")
    examples = tiny_batch(model, 4, seed=7, labels=True)
    c = 4
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
