"""The oracles against each other: what every other test leans on has to stand by itself.

Each docstring names the oracle: a second definition, an identity, an invariant, or planted truth.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from tests import reference
from tests.planted import planted, recovered
from tests.reference import terms_of
from tests.tiny import CASES, FAMILIES, PAD, VOCABULARY, collate, task_of, tiny_batch, tiny_model, tiny_tokenizer

FLOAT64 = {"bert", "distilbert", "gpt2", "opt", "bart", "vit"}
"""Families whose every operation runs in float64; the others round something to float32."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int = 7, c: int = 3, d: int = 5, r: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random factors, W ≥ 0 and G that is not a solution of anything."""
    return normal(n, c, d, seed=seed), normal(n, r, seed=seed + 1).abs(), normal(r, d, seed=seed + 2)


# Fishers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "bernoulli", "gaussian"])
def test_the_output_hessian_is_the_covariance_of_the_score(kind: str) -> None:
    """Oracle: the definition, E_y[s sᵀ] with s = ∂log p(y)/∂logits by autograd; also ΣP(y) = 1 and E[s] = 0."""
    logits = normal(4).requires_grad_()
    mass, mean, covariance = 0.0, torch.zeros(4), torch.zeros(4, 4)
    for prob, y in reference.outcomes(logits, kind):
        (score,) = torch.autograd.grad(reference.log_probability(logits, kind, y), logits)
        mass, mean, covariance = mass + prob, mean + prob * score, covariance + prob * torch.outer(score, score)
    assert mass == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(mean, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(covariance, reference.output_hessian(logits, kind), atol=1e-12, rtol=0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("family", "task", "options", "positions"),
    [
        ("bert", "sequence-classification", {}, "last"),
        ("bert", "sequence-classification", {"num_labels": 2}, "last"),
        ("bert", "sequence-classification", {"problem_type": "multi_label_classification", "num_labels": 4}, "last"),
        ("bert", "sequence-classification", {"num_labels": 1}, "last"),
        ("gpt2", "sequence-classification", {"problem_type": "regression", "num_labels": 3}, "last"),
        ("bert", "token-classification", {}, [1, 2, 4]),
        ("bert", "question-answering", {}, "last"),
        ("roberta", "multiple-choice", {}, "last"),
        ("bert", "masked-lm", {}, [2]),
        ("gpt2", "causal-lm", {}, "last"),
        ("gpt2", "causal-lm", {"vocab_size": 12}, [0, 2]),
        ("gemma2", "causal-lm", {}, "last"),
        ("mamba", "causal-lm", {}, "last"),
        ("mixtral", "causal-lm", {}, "last"),
        ("t5", "seq2seq-lm", {"vocab_size": 12}, [0, 1]),
        ("vit", "image-classification", {}, "last"),
    ],
)
def test_two_definitions_of_the_fisher_agree(family: str, task: str, options: dict[str, Any], positions: Any) -> None:
    """Oracle: Σ_y p_y ∇log p_y ∇log p_yᵀ over all joint outcomes of the example, every parameter."""
    model = tiny_model(family, task, **options)
    batch = collate(tiny_batch(model, 1, seed=3, min_length=6, max_length=6), model)
    parameters = [name for name, _ in model.named_parameters()]
    terms = terms_of(task, positions)
    rows = reference.example_factor(model, batch, parameters, terms)
    by_labels = reference.label_rows(model, batch, parameters, terms)
    tolerance = 1e-10 if family in FLOAT64 else 1e-4
    assert reference.relative_error_of_factors(by_labels, rows) < tolerance
    assert rows.norm() > 1e-3


def test_dense_fishers_agree_with_their_factors() -> None:
    """Oracle: identity, AᵀA = Σ_t J_tᵀ S_t J_t, and the labels' definition as a matrix."""
    model = tiny_model("bert", "question-answering")
    batch = collate(tiny_batch(model, 1, seed=0), model)
    parameters = ["bert.encoder.layer.1.attention.output.dense.weight", "qa_outputs.weight"]
    arguments = (model, batch, parameters, terms_of("question-answering"))
    F = reference.example_fisher(*arguments)
    torch.testing.assert_close(reference.fisher_by_sampling_all_labels(*arguments), F, atol=1e-12, rtol=1e-9)
    A = reference.example_factor(*arguments)
    torch.testing.assert_close(A.T @ A, F, atol=1e-12, rtol=1e-9)
    # The logits of each of the two softmaxes have one direction that changes nothing.
    assert torch.linalg.matrix_rank(A, rtol=1e-6) == len(A) - 2


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_jacobian_agrees_with_finite_differences(family: str) -> None:
    """Oracle: central differences of the logits along a random direction of all parameters, and row layout."""
    model = tiny_model(family, "sequence-classification")
    batch = collate(tiny_batch(model, 1, seed=0), model)
    parameters = [name for name, _ in model.named_parameters()]
    J = reference.jacobian(model, batch, parameters, lambda model, batch: model(**batch).logits[0])
    direction, step = normal(J.shape[1]), 1e-5
    moved = []
    for sign in (1, -1):
        shifts = reference.split_row(sign * step * direction, model, parameters)
        tensors = {name: p + shifts[name] for name, p in model.named_parameters()}
        with torch.no_grad():
            moved.append(torch.func.functional_call(model, tensors, kwargs=batch).logits[0])
    difference = (moved[0] - moved[1]) / (2 * step)
    torch.testing.assert_close(J @ direction, difference, atol=1e-6, rtol=1e-6)


def test_the_jacobian_leaves_requires_grad_alone() -> None:
    """Oracle: invariant, an exception in the middle included."""
    model = tiny_model("bert")
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = [parameter.requires_grad for parameter in model.parameters()]
    batch = collate(tiny_batch(model, 1, seed=0), model)
    J = reference.jacobian(model, batch, ["classifier.bias"], lambda model, batch: model(**batch).logits[0])
    torch.testing.assert_close(J, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ZeroDivisionError):
        reference.jacobian(model, batch, ["classifier.bias"], lambda model, batch: 1 / 0)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counted_positions_are_those_of_the_labels() -> None:
    """Oracle: the model's own loss, the mean of −log p(label) over the counted positions."""
    for family, task in [("gpt2", "causal-lm"), ("bert", "masked-lm"), ("t5", "seq2seq-lm")]:
        model = tiny_model(family, task)
        for example in tiny_batch(model, 4, seed=1, labels=True):
            batch = collate([example], model)
            with torch.no_grad():
                terms = terms_of(task, "labels")(model, batch)
                loss = model(**batch).loss
            labels = [label for label in example["labels"] if label != -100]
            nll = [
                -reference.log_probability(t.logits, t.kind, torch.tensor(y))
                for t, y in zip(terms, labels, strict=True)
            ]
            assert sum(nll) / len(nll) == pytest.approx(loss.item(), rel=1e-5)


def test_masked_positions_are_found_with_and_without_labels() -> None:
    """Oracle: identity, labels sit exactly on the mask tokens."""
    model = tiny_model("bert", "masked-lm")
    for seed in range(5):
        with_labels, without = (collate(tiny_batch(model, 1, seed=seed, labels=flag), model) for flag in (True, False))
        pair = [terms_of("masked-lm")(model, batch) for batch in (with_labels, without)]
        assert 1 <= len(pair[0]) == len(pair[1]) <= 3
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a.logits, b.logits)


# Errors of approximation --------------------------------------------------------------------------------------------


def test_the_relative_error_of_factors_is_the_relative_error() -> None:
    """Oracle: identity, with p small enough to form both matrices; zero for a rotated factor."""
    B, A = normal(6, 20), normal(3, 20, seed=1)
    assert reference.relative_error_of_factors(B, A) == pytest.approx(reference.relative_error(B.T @ B, A), rel=1e-10)
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    assert reference.relative_error_of_factors(B, rotation @ B) < 1e-14


@pytest.mark.parametrize("c", [1, 2, 4])
def test_best_rank_is_the_best(c: int) -> None:
    """Oracle: Eckart–Young from the singular values; a thousand perturbed and random rivals of rank c are worse."""
    A = normal(6, 9)
    F = A.T @ A
    best = reference.best_rank(F, c)
    assert torch.linalg.matrix_rank(best) == c
    error = ((F - best).norm() / F.norm()).item()
    assert error == pytest.approx(reference.best_relative_error(A, c), rel=1e-9)
    values, vectors = torch.linalg.eigh(best)
    root = (values[-c:].sqrt() * vectors[:, -c:]).T
    for seed in range(500):
        assert reference.relative_error(F, root + 0.05 * normal(c, 9, seed=seed)) > error
        assert reference.relative_error(F, normal(c, 9, seed=seed)) > error


def test_inner_products_of_fishers_are_squared_inner_products_of_rows() -> None:
    """Oracle: identity, ⟨AᵀA, BᵀB⟩ = ‖A Bᵀ‖²; and `unit` makes the inner product with itself one."""
    A, B = normal(3, 8), normal(5, 8, seed=1)
    assert reference.inner(A, B) == pytest.approx((A @ B.T).square().sum().item(), rel=1e-12)
    assert reference.inner(reference.unit(A), reference.unit(A)) == pytest.approx(1, rel=1e-12)


# Decomposition ------------------------------------------------------------------------------------------------------


def test_the_loss_agrees_with_its_expansion() -> None:
    """Oracle: identity, L = Σ‖A_iA_iᵀ‖² − 2 Σ W_ij N_ij + ⟨WᵀW, (GGᵀ)∘(GGᵀ)⟩; also for factors of unequal length."""
    A, W, G = problem()
    N = torch.einsum("ncd,rd->ncr", A, G).square().sum(1)
    squares = torch.einsum("nad,nbd->nab", A, A).square().sum()
    expansion = squares - 2 * (W * N).sum() + ((W.T @ W) * (G @ G.T).square()).sum()
    assert reference.loss(A, W, G) == pytest.approx(expansion.item(), rel=1e-12)
    assert reference.loss(A, torch.zeros_like(W), G) == pytest.approx(reference.total(A), rel=1e-12)
    ragged = [A[0, :1], *(torch.cat([a, torch.zeros(2, 5)]) for a in A[1:])]
    first = reference.loss(A[:1], W[:1], G) - reference.loss([A[0, :1]], W[:1], G)
    assert reference.loss(ragged, W, G) == pytest.approx(expansion.item() - first, rel=1e-12)


def test_the_gradient_of_g_agrees_with_finite_differences() -> None:
    """Oracle: central differences in every entry of G, and the closed form 4[((WᵀW)∘(GGᵀ))G − Σ_i W_i∘(A_iG)ᵀA_i]."""
    A, W, G = problem()
    gradient = reference.gradient_G(A, W, G)
    step = 1e-5
    for j, a in itertools.product(range(G.shape[0]), range(G.shape[1])):
        ends = []
        for sign in (1, -1):
            moved = G.clone()
            moved[j, a] += sign * step
            ends.append(reference.loss(A, W, moved))
        assert gradient[j, a].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-4)
    pulled = torch.einsum("nr,ncr,ncd->rd", W, torch.einsum("ncd,rd->ncr", A, G), A)
    torch.testing.assert_close(gradient, 4 * (((W.T @ W) * (G @ G.T)) @ G - pulled))


def test_the_top_eigenvector_of_r_j_is_the_best_g_j() -> None:
    """Oracle: the gradient written with R_j (identity), and no random unit rival has a lower loss."""
    A, W, G = problem()
    G = torch.nn.functional.normalize(G, dim=1)
    gradient, M = reference.gradient_G(A, W, G), W.T @ W
    for j in range(len(G)):
        R = reference.residual_matrix(A, W, G, j)
        torch.testing.assert_close(gradient[j], -4 * (R @ G[j] - M[j, j] * G[j] * (G[j] @ G[j])))
        best = G.clone()
        best[j] = reference.top_eigenvector(R)
        lowest = reference.loss(A, W, best)
        for seed in range(20):
            rival = G.clone()
            rival[j] = torch.nn.functional.normalize(normal(G.shape[1], seed=seed), dim=0)
            assert reference.loss(A, W, rival) >= lowest


def test_nnls_coefficients_satisfy_the_optimality_conditions() -> None:
    """Oracle: W ≥ 0, slope ≥ 0 where W = 0, slope = 0 where W > 0 (KKT), slope = 2(W(GGᵀ)∘² − N)."""
    A, _, G = problem(n=20)
    W = reference.nnls_coefficients(A, G)
    N = torch.einsum("ncd,rd->ncr", A, G).square().sum(1)
    slope = 2 * (W @ (G @ G.T).square() - N)
    assert (W >= 0).all() and (W == 0).any() and (W > 0).any()
    assert (slope > -1e-8).all()
    assert (slope[W > 0].abs() < 1e-8).all()


def test_the_paper_step_is_its_closed_form_and_descends() -> None:
    """Oracle: W∘N / (W(GGᵀ)∘²) and the gradient's closed form; the loss falls at each half step (invariant)."""
    A, W, G = problem()
    N = torch.einsum("ncd,rd->ncr", A, G).square().sum(1)
    multiplied = reference.multiplicative_update_W(A, W, G)
    torch.testing.assert_close(multiplied, W * N / (W @ (G @ G.T).square()))
    assert (multiplied >= 0).all()
    before, eta = reference.loss(A, W, G), 1e-5
    W1, G1 = reference.reference_step(A, W, G, eta)
    pulled = torch.einsum("nr,ncr,ncd->rd", W1, torch.einsum("ncd,rd->ncr", A, G), A)
    torch.testing.assert_close(G1, G - 4 * eta * (((W1.T @ W1) * (G @ G.T)) @ G - pulled))
    assert reference.loss(A, W1, G1) < reference.loss(A, W1, G) < before


def test_nnls_and_many_multiplicative_updates_meet() -> None:
    """Oracle: two algorithms for one convex problem."""
    A, W, G = problem(n=3)
    for _ in range(3000):
        W = reference.multiplicative_update_W(A, W, G)
    exact = reference.loss(A, reference.nnls_coefficients(A, G), G)
    assert exact * (1 - 1e-12) <= reference.loss(A, W, G) <= exact * (1 + 1e-3)


def test_dense_fit_never_rises_and_finds_planted_directions() -> None:
    """Oracle: planted truth without noise; invariant: the loss never rises."""
    factors, truth, weights = planted(60, 2, 12, 4, overlap=0.3, noise=0.0, active=2, seed=0)
    W, G, losses = reference.dense_fit(factors, normal(4, 12, seed=5), 40)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 1e-6 * reference.total(factors)
    assert recovered(G, truth, threshold=0.9999) == 4
    matched = (truth @ G.T).abs().argmax(1)
    torch.testing.assert_close(W[:, matched], weights, atol=1e-3, rtol=0)


def test_lifting_returns_g_at_a_stationary_point_only() -> None:
    """Oracle: with no sketch the combination of rows is G itself (identity); at a random G it is not."""
    factors, _, _ = planted(40, 3, 8, 3, overlap=0.3, noise=0.7, active=2, seed=1)
    W, G, _ = reference.dense_fit(factors, normal(3, 8, seed=2), 150)
    assert reference.gradient_G(factors, W, G).norm() < 1e-6
    torch.testing.assert_close(reference.lift(factors, factors, W, G), G, atol=1e-6, rtol=0)
    other = torch.nn.functional.normalize(normal(3, 8, seed=3), dim=1)
    lifted = reference.lift(factors, factors, reference.nnls_coefficients(factors, other), other)
    assert (lifted - other).norm() > 0.1


def test_lifting_through_a_sketch_comes_close_to_the_unsketched_direction() -> None:
    """Oracle: planted truth in 400 dimensions, seen through 24; Pᵀg itself stays far."""
    rows, truth, _ = planted(40, 2, 400, 3, overlap=0.1, noise=0.1, active=2, seed=0)
    P = normal(24, 400, seed=9) / 24**0.5
    sketched = rows.double() @ P.T
    W, G, _ = reference.dense_fit(sketched, sketched[:3, 0], 60)
    lifted = torch.nn.functional.normalize(reference.lift(rows, sketched, W, G), dim=1)
    assert recovered(lifted, truth, threshold=0.95) == 3
    assert recovered(G @ P, truth, threshold=0.5) == 0


def test_reduced_problem_in_the_span_of_the_rows_is_the_same_problem() -> None:
    """Oracle: identity, loss, W and gradient norm are unchanged by an isometry of the rows."""
    A, W, G = problem(d=6)
    Q = torch.linalg.qr(normal(20, 6, seed=4)).Q
    assert reference.loss(A @ Q.T, W, G @ Q.T) == pytest.approx(reference.loss(A, W, G), rel=1e-10)
    torch.testing.assert_close(reference.gradient_G(A @ Q.T, W, G @ Q.T) @ Q, reference.gradient_G(A, W, G))
    torch.testing.assert_close(reference.nnls_coefficients(A @ Q.T, G @ Q.T), reference.nnls_coefficients(A, G))


# Sketches -----------------------------------------------------------------------------------------------------------


def test_a_sketch_is_read_column_by_column_and_its_adjoint_checked() -> None:
    """Oracle: a known matrix; a faulty adjoint must be caught."""
    P = normal(5, 11)
    torch.testing.assert_close(reference.dense_matrix(lambda a: P @ a, 11), P)
    assert reference.adjoint_gap(lambda a: P @ a, lambda b: P.T @ b, 11, 5) < 1e-14
    wrong = P.clone()
    wrong[2, 7] += 1
    assert reference.adjoint_gap(lambda a: P @ a, lambda b: wrong.T @ b, 11, 5) > 1e-3


# Measures -----------------------------------------------------------------------------------------------------------


def test_kl_is_its_definition() -> None:
    """Oracle: Σ over all outcomes of p(y)(log p − log q); torch's own formula for the Gaussian; KL(p ‖ p) = 0."""
    f, g = normal(4), normal(4, seed=1)
    for kind in ("softmax", "bernoulli"):
        by_outcomes = sum(
            prob * (reference.log_probability(f, kind, y) - reference.log_probability(g, kind, y)).item()
            for prob, y in reference.outcomes(f, kind)
        )
        assert reference.kl(f, g, kind) == pytest.approx(by_outcomes, rel=1e-12)
    normals = [torch.distributions.Normal(mean, torch.ones(4, dtype=torch.float64)) for mean in (f, g)]
    gaussian = torch.distributions.kl_divergence(*normals).sum().item()
    assert reference.kl(f, g, "gaussian") == pytest.approx(gaussian, rel=1e-12)
    assert all(reference.kl(f, f, kind) == 0 for kind in ("softmax", "bernoulli", "gaussian"))


def test_kl_is_half_the_fisher_quadratic_form_for_a_small_step() -> None:
    """Oracle: Taylor, KL(f ‖ f + δ) = ½ δᵀSδ + O(δ³)."""
    f, delta = normal(4), 1e-4 * normal(4, seed=1)
    for kind in ("softmax", "bernoulli", "gaussian"):
        quadratic = 0.5 * delta @ reference.output_hessian(f, kind) @ delta
        assert reference.kl(f, f + delta, kind) == pytest.approx(quadratic.item(), rel=1e-3)


def test_auroc_is_the_mann_whitney_statistic() -> None:
    """Oracle: scipy's U / (positives · negatives), with ties; and three cases by hand."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(6, (30,), generator=generator)
        positives = torch.rand(30, generator=generator) < 0.4
        u = scipy.stats.mannwhitneyu(scores[positives], scores[~positives]).statistic
        expected = u / (positives.sum() * (~positives).sum()).item()
        assert reference.auroc(scores, positives) == pytest.approx(expected, rel=1e-12)
    assert reference.auroc([1, 2, 3], [False, False, True]) == 1
    assert reference.auroc([1, 1, 1], [False, False, True]) == 0.5
    assert reference.auroc([3, 2, 1], [False, False, True]) == 0


# Planted problems ---------------------------------------------------------------------------------------------------


def test_planted_factors_are_what_they_say() -> None:
    """Oracle: F_i = Σ_j W_ij g_j g_jᵀ with no noise, unit norms, the asked-for cosines, every component used."""
    factors, truth, weights = planted(300, 3, 40, 10, overlap=0.3, noise=0.0, active=3, seed=0)
    assert factors.dtype == torch.float32 and factors.shape == (300, 3, 40)
    for A, w in zip(factors[:20], weights, strict=False):
        A = A.double()
        torch.testing.assert_close(A.T @ A, (truth.T * w) @ truth, atol=1e-6, rtol=0)
        assert reference.inner(A, A) == pytest.approx(1, abs=1e-5)
    cosines = truth @ truth.T
    torch.testing.assert_close(cosines, torch.full_like(cosines, 0.3).fill_diagonal_(1), atol=1e-9, rtol=0)
    assert ((weights > 0).sum(1) == 3).all() and ((weights > 0).sum(0) > 80).all()


def test_planted_noise_has_the_size_asked_for_and_seeds_decide() -> None:
    """Oracle: invariants; the truth explains all without noise, less with more."""
    explained = []
    for noise in (0.0, 0.3, 1.0):
        factors, truth, weights = planted(50, 4, 30, 6, overlap=0.2, noise=noise, active=2, seed=3)
        explained.append(1 - reference.loss(factors, weights, truth) / reference.total(factors))
    assert explained[0] > 1 - 1e-9 > explained[1] > explained[2] > 0
    again, _, _ = planted(50, 4, 30, 6, overlap=0.2, noise=1.0, active=2, seed=3)
    other, _, _ = planted(50, 4, 30, 6, overlap=0.2, noise=1.0, active=2, seed=4)
    assert torch.equal(factors, again) and not torch.equal(factors, other)


def test_recovered_counts_partners_once() -> None:
    """Oracle: planted; signs and scales do not count, one row cannot serve two truths, nor a far one any."""
    truth = torch.eye(4, 6, dtype=torch.float64)
    assert recovered(-3 * truth.flip(0), truth) == 4
    assert recovered(truth[:1].repeat(4, 1), truth) == 1
    assert recovered(truth[:2], truth) == 2
    assert recovered(torch.ones(4, 6), truth) == 0


# Tiny models --------------------------------------------------------------------------------------------------------


def single_terms(model: Any, example: dict[str, Any], task: str) -> list[reference.Term]:
    with torch.no_grad():
        return terms_of(task)(model, collate([example], model))


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_tiny_model_reads_its_batches(family: str, task: str) -> None:
    """Oracle: identity, a padded batch predicts what batches of one do; predictions are neither flat nor certain."""
    model = tiny_model(family, task)
    assert task_of(model) == task and not model.training
    examples = tiny_batch(model, 3, seed=1, labels=True)
    sides = ["right", "left"] if task == "causal-lm" else ["right"]
    accepts = family in ("gpt2", "gemma2", "llama", "phi", "gpt_neox")
    for side in sides:
        batch = collate(examples, model, side, position_ids=accepts and side == "left")
        with torch.no_grad():
            outputs = model(**batch)
        assert torch.isfinite(outputs.loss)
        for i, example in enumerate(examples):
            (*_, alone) = single_terms(model, example, task)
            logits = outputs.end_logits[i] if task == "question-answering" else outputs.logits[i]
            if task == "question-answering":
                together = logits[batch["attention_mask"][i] == 1]
            elif logits.dim() == 1:
                together = logits
            elif task == "causal-lm":
                together = logits[batch["attention_mask"][i].nonzero().max()]
            else:
                together = logits[(batch["labels"][i] != -100).nonzero().max()]
            tolerance = 1e-9 if family in FLOAT64 else 3e-5
            torch.testing.assert_close(together, alone.logits, atol=tolerance, rtol=tolerance)
    p = alone.logits.softmax(-1)
    share = -(p * p.log()).sum() / torch.tensor(float(len(p))).log()
    assert 0.05 < share < 0.9999
    assert (alone.logits.max() - alone.logits.min()) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_decided_by_their_seed(family: str) -> None:
    """Oracle: invariant; the global generator is left alone, and no bias and no norm is left at its plain value."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = dict(same.named_parameters())
    assert all(torch.equal(p, pairs[name]) for name, p in one.named_parameters())
    pairs = dict(other.named_parameters())
    assert not any(torch.equal(p, pairs[name]) for name, p in one.named_parameters())
    assert not any(((p == 0) | (p == 1)).any() for p in one.parameters())
    assert all(p.dtype == torch.float64 for p in one.parameters())
    assert tiny_model(family, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 40}),
        ("gemma3", {"sliding_window": 40}),
        ("mistral", {"sliding_window": 40}),
        ("modernbert", {"local_attention": 40}),
        ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("mixtral", {"num_experts_per_tok": 4}),
    ],
)
def test_the_peculiarities_of_a_family_are_active(family: str, options: dict[str, Any]) -> None:
    """Oracle: the same weights predict otherwise without them."""
    model, plain = tiny_model(family), tiny_model(family, **options)
    batch = collate(tiny_batch(model, 1, seed=0, min_length=9), model)
    with torch.no_grad():
        assert (model(**batch).logits - plain(**batch).logits).abs().max() > 1e-3


def test_plain_attention_agrees_with_gemma_2_own() -> None:
    """Oracle: the architecture's eager attention, where no position is padded."""
    ours, own = tiny_model("gemma2"), tiny_model("gemma2", attn_implementation="eager")
    batch = collate(tiny_batch(ours, 1, seed=0, min_length=9), ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, own(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "kind", "label"),
    [
        ({"problem_type": "multi_label_classification", "num_labels": 4}, "bernoulli", list),
        ({"problem_type": "regression", "num_labels": 2}, "gaussian", list),
        ({"num_labels": 1}, "gaussian", float),
        ({"num_labels": 5}, "softmax", int),
    ],
)
def test_problem_types_have_their_labels(options: dict[str, Any], kind: str, label: type) -> None:
    """Oracle: the model computes its loss from them."""
    model = tiny_model("bert", **options)
    examples = tiny_batch(model, 3, seed=0, labels=True)
    assert all(isinstance(example["labels"], label) for example in examples)
    assert torch.isfinite(model(**collate(examples, model)).loss)
    (term,) = terms_of("sequence-classification")(model, collate(examples[:1], model))
    assert (term.kind, len(term.logits)) == (kind, options["num_labels"])


def test_the_tokenizer_speaks_the_models_vocabulary() -> None:
    """Oracle: round trip; padding, pairs and chat as the strings say."""
    tokenizer = tiny_tokenizer(padding_side="left")
    assert tokenizer.is_fast and len(tokenizer) == VOCABULARY
    text = "the king is in paris"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == "the king is <unk> paris"
    assert tokenizer(["the cat", "the"], padding=True)["input_ids"][1][0] == PAD == tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("the cat", "the dog")["input_ids"]) == "the cat </s> the dog"
    messages = [{"role": "user", "content": "big ->"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.split() == ["<|user|>", "big", "->", "</s>", "<|assistant|>"]
    assert tokenizer.unk_token_id not in tokenizer(chat)["input_ids"]
    assert tiny_tokenizer(add_eos=True)("the cat")["input_ids"][-1] == tokenizer.eos_token_id
