"""Output factors: which rows stand for an example's Fisher at the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_npeff.fisher import eigenpairs
from hf_npeff.fisher.distributions import Bernoulli, Gaussian, Softmax
from hf_npeff.fisher.eigenpairs import HiddenMetric, likely_tokens, top_eigenpairs
from hf_npeff.fisher.output_factors import cotangents, reduce_rows, resolve, seeds_of
from hf_npeff.fisher.outputs import HeadJacobian, Outputs
from tests import reference

DISTRIBUTIONS = {"softmax": Softmax, "bernoulli": Bernoulli, "gaussian": Gaussian}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_of(
    logits: Tensor,
    kind: str = "softmax",
    weight: Tensor | None = None,
    slope: Tensor | None = None,
    hidden: bool = False,
) -> Outputs:
    """Outputs of (B, t, k) logits; `hidden` puts the source at the hidden state."""
    B, t, _ = logits.shape
    source = torch.zeros(B, t, weight.shape[1], dtype=logits.dtype) if hidden and weight is not None else logits
    head = None if weight is None else HeadJacobian(weight, None if slope is None else slope.flatten(0, 1))
    return Outputs(source, logits, torch.ones(B, t, dtype=torch.bool), DISTRIBUTIONS[kind], head, hidden)


def head_factor(weight: Tensor, logits: Tensor, slope: Tensor | None = None) -> Tensor:
    """B with BᵀB = JᵀSJ (h×h) for one example, dense."""
    J = weight if slope is None else slope[:, None] * weight
    return reference.factor(J, reference.output_hessian(logits, "softmax"))


@pytest.mark.parametrize("kind", ["softmax", "bernoulli", "gaussian"])
def test_exact_is_a_factor_of_the_output_hessian(kind: str) -> None:
    """Oracle: the dense S (k×k); k − 1 rows for softmax, k for the others."""
    logits = normal(3, 1, 5)
    V, joint = cotangents(outputs_of(logits, kind), "exact", 2, [0, 1, 2])
    assert joint
    assert V.shape == (3, 1, 4 if kind == "softmax" else 5, 5)
    for i in range(3):
        S = reference.output_hessian(logits[i, 0], kind)
        torch.testing.assert_close(V[i, 0].T @ V[i, 0], S, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["softmax", "bernoulli", "gaussian"])
def test_the_distributions_multiply_by_s_and_by_its_root(kind: str) -> None:
    """Oracle: the dense S; B·I must satisfy BBᵀ = S."""
    logits = normal(2, 4)
    distribution = DISTRIBUTIONS[kind](logits)
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    for i in range(2):
        S = reference.output_hessian(logits[i], kind)
        B = distribution.sqrt_times(eye)[i]
        torch.testing.assert_close(distribution.hessian_times(eye)[i], S, atol=1e-13, rtol=0)
        torch.testing.assert_close(B @ B.T, S, atol=1e-13, rtol=0)


@pytest.mark.parametrize("sharpness", [0.02, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("c", [1, 2, 4, 8])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("at_hidden", [True, False])
def test_spectral_is_within_a_quarter_of_the_best(
    sharpness: float, c: int, soft_cap: float | None, at_hidden: bool
) -> None:
    """Oracle: the best rank-c approximation of the dense JᵀSJ; k = 300, h = 24, with and without a soft-capped head.

    At the logits the cotangents are pulled through J here as the model would.
    """
    weight, hidden = normal(300, 24, seed=1), normal(3, 1, 24, seed=2) * sharpness
    logits, slope = hidden @ weight.T, None
    if soft_cap is not None:
        slope = 1 - (logits / soft_cap).tanh().square()
        logits = soft_cap * (logits / soft_cap).tanh()
    outputs = outputs_of(logits, weight=weight, slope=slope, hidden=at_hidden)
    V, _ = cotangents(outputs, "spectral", c, [0, 1, 2])
    for i in range(3):
        own_slope = None if slope is None else slope[i, 0]
        rows = V[i, 0] if at_hidden else V[i, 0] @ (weight if own_slope is None else own_slope[:, None] * weight)
        exact = head_factor(weight, logits[i, 0], own_slope)
        error = reference.relative_error_of_factors(exact, rows)
        assert error <= 1.25 * reference.best_relative_error(exact, c)


def test_spectral_without_a_known_head_takes_the_eigenvectors_of_s() -> None:
    """Oracle: the best rank-c approximation of the dense S."""
    logits = 2 * normal(4, 1, 40)
    V, _ = cotangents(outputs_of(logits), "spectral", 3, [0] * 4)
    for i in range(4):
        exact = reference.factor(torch.eye(40, dtype=torch.float64), reference.output_hessian(logits[i, 0], "softmax"))
        best = reference.best_relative_error(exact, 3)
        assert reference.relative_error_of_factors(exact, V[i, 0]) <= 1.01 * best


@pytest.mark.parametrize("certain", [50.0, 400.0])
def test_a_certain_prediction_gives_rows_of_nearly_zero_and_no_nan(certain: float) -> None:
    """Oracle: the Fisher of a certain prediction is 0; every number is finite, in float32 as well."""
    weight = normal(50, 8, seed=1).float()
    logits = torch.zeros(1, 1, 50)
    logits[..., 3] = certain
    for hidden in (True, False):
        for factor in ("spectral", "exact", "projection", "sampling"):
            V, _ = cotangents(outputs_of(logits, weight=weight, hidden=hidden), factor, 3, [0])  # type: ignore[arg-type]
            assert torch.isfinite(V).all()
            assert V.abs().max() < 1e-3


def test_eigenpairs_are_those_of_the_dense_matrix() -> None:
    """Oracle: eigh of the dense JᵀSJ; also when c is all of h."""
    weight, logits = normal(60, 6, seed=3), normal(2, 60, seed=4)
    for c in (2, 6):
        values, vectors = top_eigenpairs(DISTRIBUTIONS["softmax"](logits), HeadJacobian(weight), c)
        for i in range(2):
            B = head_factor(weight, logits[i])
            torch.testing.assert_close(values[i], torch.linalg.eigvalsh(B.T @ B).flip(0)[:c], atol=1e-9, rtol=1e-6)
            torch.testing.assert_close(vectors[i].T @ vectors[i], torch.eye(c).double(), atol=1e-9, rtol=0)


def of_many_tokens(kind: str) -> tuple[Tensor, Tensor]:
    """The rows (4,200 × 24) of a head and logits (3, 4,200) of a kind of distribution."""
    weight, logits = normal(4200, 24, seed=6), normal(3, 4200, seed=7)
    if kind == "of words":  # as in text, the tenth word has a tenth of the first one's probability
        logits = logits - 2 * torch.arange(1.0, 4201).log()
    elif kind == "of few":
        logits[:, 5:] -= 60
    elif kind == "almost certain":
        logits = logits - 2 * torch.arange(1.0, 4201).log()
        logits[:, 9] = 30
    elif kind == "at a tiny temperature":
        logits = logits * 1e4
    elif kind == "tied":
        logits = torch.zeros_like(logits)
        logits[:, ::7] = 3
    elif kind == "flat":
        logits = logits * 1e-3
    return weight, logits


@pytest.mark.parametrize("soft_cap", [False, True])
@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize(
    ("kind", "suffice"),
    [
        ("of words", True), ("of few", True), ("almost certain", True), ("at a tiny temperature", True),
        ("tied", False), ("flat", False),
    ],
)  # fmt: skip
def test_likely_tokens_give_the_eigenpairs_of_all_or_are_not_relied_on(
    kind: str, suffice: bool, c: int, soft_cap: bool
) -> None:
    """Oracle: the dense M. Error ≤ 1.25 × the best; the likely tokens suffice where others hardly count, else not."""
    weight, logits = of_many_tokens(kind)
    slope = normal(3, 4200, seed=8).abs() + 0.1 if soft_cap else None
    head, likely = HeadJacobian(weight, slope), likely_tokens(4200, c)
    assert likely is not None
    values, vectors = top_eigenpairs(Softmax(logits), head, c)
    _, _, certain = eigenpairs._by_likely(Softmax(logits), head, c, 3, None, likely)
    assert certain.tolist() == [suffice] * 3
    for i in range(3):
        M = reference.hidden_hessian(weight, logits[i], None if slope is None else slope[i])
        truth = torch.linalg.eigvalsh(M).flip(0)
        made = (vectors[i] * values[i]) @ vectors[i].T
        assert (M - made).norm() <= 1.25 * truth[c:].norm() + 1e-9 * truth[0]
        left = vectors[i].T @ M @ vectors[i] - values[i].diag()
        assert left.norm() <= 1e-8 * truth[0], "what is left of M is exact"


def test_likely_tokens_serve_any_metric_and_each_example_for_itself() -> None:
    """Oracle: the dense C^½MC^½, error ≤ 1.25 × the best; a flat example beside one changes nothing."""
    weight, words = of_many_tokens("of words")
    logits = torch.cat([words[:2], of_many_tokens("flat")[1][:1]])
    root = normal(24, 24, seed=9)
    metric = HiddenMetric.of(root @ root.T)
    values, vectors = top_eigenpairs(Softmax(logits), HeadJacobian(weight), 2, metric=metric)
    for i in range(3):
        M = metric.root @ reference.hidden_hessian(weight, logits[i]) @ metric.root
        truth = torch.linalg.eigvalsh(M).flip(0)
        made = (vectors[i] * values[i]) @ vectors[i].T
        assert (M - made).norm() <= 1.25 * truth[2:].norm()
        alone = top_eigenpairs(Softmax(logits[i : i + 1]), HeadJacobian(weight), 2, metric=metric)
        torch.testing.assert_close(values[i], alone[0][0], rtol=1e-9, atol=0)
        torch.testing.assert_close(made, (alone[1][0] * alone[0][0]) @ alone[1][0].T, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factor", ["projection", "sampling"])
@pytest.mark.parametrize("kind", ["softmax", "bernoulli", "gaussian"])
@pytest.mark.parametrize("hidden", [False, True])
def test_random_factors_are_unbiased(factor: Any, kind: str, hidden: bool) -> None:
    """Oracle: statistical, E[AᵀA] = JᵀSJ. 20,000 rows over 2,000 seeds; every entry within 5 standard errors."""
    n = 2000
    weight = normal(4, 3, seed=1)
    logits = normal(1, 1, 4, seed=5)
    V, joint = cotangents(outputs_of(logits.expand(n, 1, 4), kind, weight, hidden=hidden), factor, 10, range(n))
    assert joint
    samples = V[:, 0].mT @ V[:, 0]
    S = reference.output_hessian(logits[0, 0], kind)
    expected = reference.fisher(weight, S) if hidden else S
    standard = samples.std(0) / n**0.5
    assert ((samples.mean(0) - expected).abs() <= 5 * standard + 1e-9).all()


@pytest.mark.parametrize("factor", ["projection", "sampling"])
def test_random_factors_of_several_terms_are_unbiased(factor: Any) -> None:
    """Oracle: statistical, E[aᵀa] is block-diagonal, S_t on the diagonal: what a sum over terms needs.

    4,000 examples of two terms; every entry within 5 standard errors.
    """
    n = 4000
    logits = normal(1, 2, 3, seed=6)
    V, joint = cotangents(outputs_of(logits.expand(n, 2, 3)), factor, 1, range(n))
    assert joint
    rows = V[:, :, 0].flatten(1)
    samples = rows[:, :, None] * rows[:, None]
    expected = torch.block_diag(*(reference.output_hessian(z, "softmax") for z in logits[0]))
    assert ((samples.mean(0) - expected).abs() <= 5 * samples.std(0) / n**0.5 + 1e-9).all()


@pytest.mark.parametrize("factor", ["projection", "sampling"])
def test_random_factors_depend_on_the_seed_alone(factor: Any) -> None:
    """Oracle: the same example alone, in a batch, and with more padding behind it gives the same rows."""
    logits = normal(3, 4, 20)
    valid = torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])
    outputs = outputs_of(logits)
    outputs.valid = valid
    together, _ = cotangents(outputs, factor, 3, seeds_of(["a", "b", "c"], 0))
    for i, name in enumerate("abc"):
        t = int(valid[i].sum())
        alone, _ = cotangents(outputs_of(logits[i : i + 1, :t]), factor, 3, seeds_of([name], 0))
        torch.testing.assert_close(together[i, :t], alone[0], atol=1e-12, rtol=0)
        assert (together[i, t:] == 0).all()
    assert seeds_of(["a"], 0) != seeds_of(["a"], 1)


def test_reduction_keeps_the_best_rows_and_the_cotangents_that_make_them() -> None:
    """Oracle: the best rank-c error from singular values; rows remade from the mixed cotangents by a linear map."""
    B, t, per_term, s, d, c = 2, 3, 2, 5, 30, 4
    V = normal(B, t, per_term, s)
    linear = normal(t, s, d, seed=1)  # a backward pass is linear in what enters at each term
    rows = torch.einsum("btas,tsd->btad", V, linear).flatten(1, 2)
    reduced, mixed = reduce_rows(rows, V, c)
    assert reduced.shape == (B, c, d)
    remade = torch.einsum("btcs,tsd->bcd", mixed, linear)
    torch.testing.assert_close(remade, reduced, atol=1e-10, rtol=0)
    for i in range(B):
        error = reference.relative_error_of_factors(rows[i], reduced[i])
        assert error == pytest.approx(reference.best_relative_error(rows[i], c), rel=1e-6)


def test_reduction_to_more_rows_than_there_are_adds_zeros() -> None:
    """Oracle: the Fisher is kept, to rounding."""
    V = normal(2, 1, 2, 5)
    rows = normal(2, 2, 7, seed=1)
    reduced, mixed = reduce_rows(rows, V, 5)
    assert reduced.shape == (2, 5, 7)
    assert mixed.shape == (2, 1, 5, 5)
    torch.testing.assert_close(reduced.mT @ reduced, rows.mT @ rows, atol=1e-12, rtol=0)


def test_auto_is_exact_where_that_is_cheap_and_spectral_elsewhere() -> None:
    """Oracle: the rule, k − 1 ≤ rank."""
    weight = normal(9, 6)
    outputs = outputs_of(normal(1, 1, 9), weight=weight, hidden=True)
    assert resolve("auto", outputs, 4) == "spectral"
    assert resolve("auto", outputs_of(normal(1, 1, 5)), 4) == "exact"
    assert resolve("auto", outputs_of(normal(1, 1, 5), "bernoulli"), 4) == "spectral"
    assert resolve("sampling", outputs, 4) == "sampling"


def test_what_cannot_be_done_is_refused() -> None:
    """Oracle: the documented errors, which say what to use."""
    big = outputs_of(normal(1, 1, 1100), weight=normal(1100, 6), hidden=True)
    with pytest.raises(ValueError, match="output_factor='spectral'"):
        resolve("exact", big, 4)
    with pytest.raises(ValueError, match=r"rank=7.*6"):
        resolve("spectral", big, 7)
    at_logits = outputs_of(normal(1, 1, 1100), weight=normal(1100, 6))
    with pytest.raises(ValueError, match=r"rank=7.*6"):
        resolve("auto", at_logits, 7)
