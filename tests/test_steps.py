"""Steps along a change: several in one forward pass, the one that stored rows predict, and the search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.predictions import predict
from hf_npeff.weights.steps import Steps, StepSearch, longest_step, predicted_step
from tests.test_activations import direction_of
from tests.tiny import tiny_batch, tiny_model


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
def test_steps_that_share_forward_passes_are_the_steps(family: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: moved weights, a step at a time; and a count of forward passes, of which sharing needs fewer."""
    model = tiny_model(family, task)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=1))
    examples = list(Examples(tiny_batch(model, 5, seed=1)))
    direction = direction_of(model)
    jobs = [(examples[:3], 0.5), (examples[2:], -0.8), (examples[:2], 1.5)]
    with analyzer.forward_pass() as forward:
        forward.batch_size(examples, 2)
        steps = Steps(forward, direction, 16)
        steps.predict(jobs)  # which tries whether they can share
        calls: list[int] = []
        original = ForwardPass.outputs
        monkeypatch.setattr(ForwardPass, "outputs", lambda self, b: calls.append(len(b)) or original(self, b))
        found = steps.predict(jobs)
        assert calls == [8]
        for (some, step), predictions in zip(jobs, found, strict=True):
            with direction.applied_to(model, step):
                truth = predict(forward, some, 16)
            for a, b in zip(predictions.logits, truth.logits, strict=True):
                assert (a - b).abs().max() < 1e-5 * b.abs().max()


class _MixesExamples(nn.Module):
    """A linear map that sees the examples of a batch in another order: what steps in one batch would get wrong."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flip(0)).flip(0)


def test_steps_of_a_model_that_mixes_examples_have_passes_of_their_own() -> None:
    """Oracle: moved weights, a step at a time."""
    model: Any = tiny_model("bert", "sequence-classification")
    layer = model.bert.encoder.layer[0].intermediate
    layer.dense = _MixesExamples(layer.dense)
    direction = direction_of(model, r"intermediate\.dense\.inner\.weight")
    examples = list(Examples(tiny_batch(model, 4, seed=1)))
    jobs = [(examples[:2], 3.0), (examples[2:], -3.0)]
    with NPEFFAnalyzer(model, fisher=FisherConfig(rank=1)).forward_pass() as forward:
        found = Steps(forward, direction, 16).predict(jobs)
        for (some, step), predictions in zip(jobs, found, strict=True):
            with direction.applied_to(model, step):
                truth = predict(forward, some, 16)
            for a, b in zip(predictions.logits, truth.logits, strict=True):
                assert (a - b).abs().max() < 1e-6 * b.abs().max()


def test_stored_rows_predict_the_step_for_a_small_kl() -> None:
    """Oracle: the KL measured at that step, float64, all rows of the softmax, no sketch."""
    model = tiny_model("bert", "sequence-classification")
    rows = tiny_batch(model, 6, seed=1)
    fisher = FisherConfig(rank=2, output_factor="exact", sketch="identity", storage_dtype="float32")
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(rows, progress=False)
    lifted = analyzer.lift(analyzer.decompose(pefs, 2, progress=False), 0, pefs, rows)
    step = predicted_step(pefs.sketch(), pefs, [0, 2, 5], lifted.linear_deltas(), 1e-4)
    assert step is not None
    chosen = [rows[i] for i in (0, 2, 5)]
    measured = analyzer.measure(lifted, chosen, scales=(step,), random=False)
    assert measured.at(step)["all"].kl == pytest.approx(1e-4, rel=0.05)
    assert predicted_step(pefs.sketch(), pefs, [0], direction_of(model).linear_deltas(), 0.1) is None


def test_a_search_ends_at_the_target_or_at_the_limit() -> None:
    """Oracle: KL = step², by hand; a KL that stays below ends at the longest step, and one of no number in between."""
    search = StepSearch(0.25, start=0.01, limit=10.0)
    tried = []
    while not search.done:
        tried.append(search.step)
        search.tell(search.step**2)
    assert search.reached and search.nearest == pytest.approx(0.5, rel=0.03) and len(tried) <= 6
    flat = StepSearch(0.25, limit=2.0)
    while not flat.done:
        flat.tell(0.0)
    assert flat.step == 2.0 and not flat.reached
    broken = StepSearch(0.25, limit=2.0, rounds=3)
    while not broken.done:
        broken.tell(float("nan"))
    assert not broken.reached


def test_the_longest_step_is_the_norm_of_what_moves() -> None:
    """Oracle: the norm by hand; a fixed one where the weights are not at hand."""
    model = tiny_model("bert", "sequence-classification")
    direction = direction_of(model)
    squared = sum(float(model.get_parameter(n).detach().square().sum()) for n in direction)
    assert longest_step(direction, model) == pytest.approx(squared**0.5)
    assert longest_step(direction, model.to("meta")) == 64.0  # type: ignore[arg-type]
    assert torch.is_grad_enabled()
