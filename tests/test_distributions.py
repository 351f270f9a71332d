"""What a head predicts: distributions, their Fishers, and which positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_npeff import FisherConfig, NPEFFAnalyzer, OutputHead, Outputs, UnsupportedModelError
from hf_npeff.fisher.distributions import Bernoulli, Gaussian, Softmax
from hf_npeff.fisher.heads import head_of
from hf_npeff.fisher.outputs import HeadJacobian
from hf_npeff.fisher.tasks import task_of_class
from tests import reference
from tests.tiny import CASES, collate, tiny_batch, tiny_model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DISTRIBUTIONS = {"softmax": Softmax, "bernoulli": Bernoulli, "gaussian": Gaussian}
KINDS = list(DISTRIBUTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_eigenpairs_rebuild_the_output_hessian(kind: str) -> None:
    """Oracle: the dense S; eigenvalues descend, and are as many as its rank."""
    logits = 3 * normal(4, 5)
    distribution = DISTRIBUTIONS[kind](logits)
    values, vectors = distribution.eigen()
    assert values.shape == (4, distribution.rows_of_exact())
    assert (values.diff(dim=1) <= 1e-12).all()
    for i in range(4):
        S = reference.output_hessian(logits[i], kind)
        torch.testing.assert_close((vectors[i] * values[i]) @ vectors[i].T, S, atol=1e-12, rtol=0)
        assert distribution.rows_of_exact() == int(torch.linalg.matrix_rank(S))


@pytest.mark.parametrize("gap", [8.0, 14.0, 20.0])
def test_products_with_the_hessian_of_certain_predictions_lose_nothing_in_float32(gap: float) -> None:
    """Oracle: the dense S of the same logits in float64; 1 − p of the likeliest class is 3e-4 to 4e-9 here."""
    logits = normal(3, 5)
    logits[:, 2] += gap
    logits = logits.float()
    distribution, V = Softmax(logits), normal(3, 5, 4, seed=1).float()
    signs = V.sign()
    values, vectors = distribution.eigen()
    scores = distribution.score(0, torch.tensor([2, 1]))
    for i in range(3):
        p, S = logits[i].double().softmax(-1), reference.output_hessian(logits[i], "softmax")
        root = p.sqrt().diag() - p[:, None] * p.sqrt()[None]
        pairs = [
            (distribution.hessian_times(V)[i], S @ V[i].double()),
            (distribution.sqrt_times(signs)[i], root @ signs[i].double()),
            ((vectors[i] * values[i]) @ vectors[i].T, S),
        ]
        if i == 0:
            pairs.append((scores[:, 0], torch.eye(5)[2].double() - p))
        for ours, expected in pairs:
            assert float((ours - expected).norm() / expected.norm()) < 1e-5


def test_the_hessian_of_a_prediction_that_is_certain_to_the_last_digit_is_not_zero() -> None:
    """Oracle: two classes, S = σ(x)σ(−x) (1, −1)ᵀ(1, −1), whose factor σ(−50) = 2e-22 is lost in 1 − p."""
    values, vectors = Softmax(torch.tensor([[50.0, 0.0]])).eigen()
    expected = torch.sigmoid(torch.tensor(-50.0, dtype=torch.float64)) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close((vectors[0] * values[0]) @ vectors[0].T, expected.float(), atol=0, rtol=1e-5)
    ours = Bernoulli(torch.tensor([[20.0]])).score(0, torch.ones(1, 1))
    torch.testing.assert_close(ours, torch.sigmoid(torch.tensor([[-20.0]])), atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_the_expected_difference_of_log_probabilities(kind: str) -> None:
    """Oracle: the sum over outcomes; zero of itself."""
    a, b = normal(3, 4), normal(3, 4, seed=1)
    p, q = DISTRIBUTIONS[kind](a), DISTRIBUTIONS[kind](b)
    expected = [reference.kl(x, y, kind) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(p.kl(q), torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-10)
    assert (p.kl(p) == 0).all()


def test_kl_of_certain_and_masked_predictions_is_finite() -> None:
    """Oracle: by hand; a class of logit −∞ in both has no part."""
    a = torch.tensor([[0.0, 1.0, -torch.inf], [500.0, 0.0, 0.0]])
    assert torch.isfinite(Softmax(a).kl(Softmax(a + torch.tensor([1.0, 0.0, 0.0])))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_the_likeliest_outcome_and_its_log_probability(kind: str) -> None:
    """Oracle: every outcome tried (softmax, Bernoulli); the density at the mean (Gaussian)."""
    logits = normal(5, 3)
    best, log_prob = DISTRIBUTIONS[kind](logits).predictions()
    for i in range(5):
        if kind == "gaussian":
            truth = torch.distributions.Normal(logits[i], 1.0).log_prob(logits[i]).sum()
            assert torch.equal(best[i], logits[i])
        else:
            prob, y = max(reference.outcomes(logits[i], kind), key=lambda pair: pair[0])
            truth = torch.tensor(prob, dtype=torch.float64).log()
            assert best[i].tolist() == y.tolist()
        assert float(log_prob[i]) == pytest.approx(float(truth), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_average_to_zero_and_have_the_output_hessian_as_covariance(kind: str) -> None:
    """Oracle: statistical, 40,000 samples; every entry within 5 standard errors."""
    logits = normal(1, 3)
    s = DISTRIBUTIONS[kind](logits).scores(40_000, torch.Generator().manual_seed(0), 0)
    assert s.shape == (3, 40_000)
    products = s[:, None] * s[None]
    for samples, expected in ((s, torch.zeros(3)), (products, reference.output_hessian(logits[0], kind))):
        standard = samples.std(-1) / 200
        assert ((samples.mean(-1) - expected).abs() <= 5 * standard + 1e-12).all()


def test_the_heads_jacobian_is_two_thin_products() -> None:
    """Oracle: the dense diag(f′) U."""
    U, slope, Q, Y = normal(6, 3), normal(2, 6, seed=1), normal(2, 3, 4, seed=2), normal(2, 6, 4, seed=3)
    for s in (None, slope):
        head = HeadJacobian(U, s)
        for i in range(2):
            J = U if s is None else s[i, :, None] * U
            torch.testing.assert_close(head.push(Q)[i], J @ Q[i])
            torch.testing.assert_close(head.pull(Y)[i], J.T @ Y[i])


@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_class_name_tells_the_task(family: str, task: str) -> None:
    """Oracle: the list of families and tasks."""
    assert task_of_class(type(tiny_model(family, task)).__name__) == task


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"num_labels": 3}, "softmax"),
        ({"num_labels": 1}, "gaussian"),
        ({"num_labels": 3, "problem_type": "regression"}, "gaussian"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "bernoulli"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "softmax"),
    ],
)
def test_the_config_tells_the_distribution(options: dict[str, Any], kind: str) -> None:
    """Oracle: transformers' own rule for problem_type."""
    model = tiny_model("bert", **options)
    outputs = head_of(model, None, "auto", set()).outputs(model, collate(tiny_batch(model, 2, seed=1), model))
    assert outputs.distribution.name == kind


@pytest.mark.parametrize(("positions", "several"), [("last", False), ("labels", True), ("all", True)])
def test_the_counted_positions_are_those_of_the_rule(positions: str, several: bool) -> None:
    """Oracle: the model's logits at the positions that the reference counts, example by example."""
    model = tiny_model("gpt2", "causal-lm")
    examples = tiny_batch(model, 4, seed=2, labels=True)
    outputs = head_of(model, None, positions, set()).outputs(model, collate(examples, model))
    assert outputs.several == several
    for i, example in enumerate(examples):
        terms = reference.terms_of("causal-lm", positions)(model, collate([example], model))
        found = outputs.logits[i][outputs.valid[i]]
        assert len(found) == len(terms)
        for logits, term in zip(found, terms, strict=True):
            torch.testing.assert_close(logits, term.logits.detach(), atol=1e-9, rtol=1e-7)


def test_the_output_embedding_sees_the_counted_positions_only() -> None:
    """Oracle: the shape that the embedding's own hook sees."""
    model = tiny_model("llama", "causal-lm")
    seen = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    head_of(model, None, "last", set()).outputs(model, collate(tiny_batch(model, 3, seed=1), model))
    assert seen == [(3, 1, 16)]


def test_a_soft_capped_head_has_the_slope_of_its_cap() -> None:
    """Oracle: 1 − tanh², from the logits; a plain head has none."""
    model = tiny_model("gemma2", "causal-lm")
    outputs = head_of(model, None, "last", set()).outputs(model, collate(tiny_batch(model, 3, seed=1), model))
    assert outputs.jacobian is not None
    assert outputs.jacobian.slope is not None
    cap = model.config.final_logit_softcapping
    expected = 1 - (outputs.logits[:, 0] / cap).square()
    torch.testing.assert_close(outputs.jacobian.slope, expected, atol=1e-6, rtol=1e-5)
    plain = tiny_model("llama", "causal-lm")
    outputs = head_of(plain, None, "last", set()).outputs(plain, collate(tiny_batch(plain, 3, seed=1), plain))
    assert outputs.jacobian is not None
    assert outputs.jacobian.slope is None


def test_a_head_of_ones_own_needs_one_method() -> None:
    """Oracle: brute force over a model that transformers does not know."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = tiny_model("bert").config
            self.body, self.out = nn.Embedding(60, 6), nn.Linear(6, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = (self.body(input_ids) * attention_mask[..., None]).sum(1)
            return self.out(h)

    class OwnHead:
        def outputs(self, model: nn.Module, batch: Any) -> Outputs:
            z = model(batch["input_ids"], batch["attention_mask"])[:, None]
            return Outputs(z, z.detach(), torch.ones(z.shape[:2], dtype=torch.bool), Softmax)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Own().double()
    assert isinstance(OwnHead(), OutputHead)
    config = FisherConfig(sketch="identity", storage_dtype="float64")
    examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    pefs = NPEFFAnalyzer(model, fisher=config, task=OwnHead()).compute_pefs(examples)
    for i, example in enumerate(examples):
        ids = torch.tensor([example["input_ids"]])
        J = torch.autograd.functional.jacobian(
            lambda w, ids=ids: nn.functional.linear(model.body(ids).sum(1), w.view(3, 6), model.out.bias)[0],
            model.out.weight.detach().flatten(),
        )
        S = reference.output_hessian(model(ids, torch.ones_like(ids))[0], "softmax")
        A = pefs.factors[i] * pefs.norms[i].sqrt()
        assert reference.relative_error(reference.fisher(J, S), A) < 1e-9


def test_what_makes_no_sense_is_refused() -> None:
    """Oracle: the documented errors."""
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="positions='all'"):
        head_of(model, None, "all", set())
    with pytest.raises(ValueError, match="positions='last'"):
        head_of(tiny_model("bert", "masked-lm"), None, "last", set())
    with pytest.raises(UnsupportedModelError, match="OutputHead"):
        head_of(model.bert, None, "auto", set())
    with pytest.raises(UnsupportedModelError, match="juggling"):
        head_of(model, "juggling", "auto", set())
    with pytest.raises(ValueError, match="outputs"):
        head_of(model, object(), "auto", set())  # type: ignore[arg-type]
    causal = tiny_model("gpt2", "causal-lm")
    with pytest.raises(ValueError, match="labels"):
        head_of(causal, None, "labels", set()).outputs(causal, collate(tiny_batch(causal, 2, seed=1), causal))
