"""Blocks below a change run once an example, and what is predicted is what whole passes predict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.predictions import predict
from hf_npeff.weights.requantised import maps_to_round, weights_rounded
from hf_npeff.weights.steps import SharedSteps
from tests.test_activations import direction_of, hooks_of
from tests.tiny import tiny_batch, tiny_model

LAST = {
    "llama": r"layers\.1\..*down_proj\.weight",
    "gpt2": r"h\.1\..*c_fc\.weight",
    "bert": r"layer\.1\.output\.dense\.weight",
    "vit": r"(layer|layers)\.1\..*query\.weight|layers?\.1\..*q_proj\.weight",
    "t5": r"decoder\.block\.1\..*wo\.weight",
    "albert": r"query\.weight",
}
TASKS = {
    "llama": "causal-lm",
    "gpt2": "causal-lm",
    "bert": "sequence-classification",
    "vit": "image-classification",
    "t5": "seq2seq-lm",
    "albert": "sequence-classification",
}


class _Counter:
    """How often the first block of a model computes: its attention or whatever else is in it runs."""

    def __init__(self, model: nn.Module):
        first = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
        inner = next(m for m in first.modules() if isinstance(m, nn.Linear | nn.LayerNorm) or "Conv1D" in str(type(m)))
        self.runs = 0
        self.handle = inner.register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.runs += 1


@pytest.mark.parametrize("family", sorted(LAST))
def test_steps_predict_what_whole_passes_predict_and_run_the_lower_blocks_once(family: str) -> None:
    """Oracle: moved weights, whole passes, one example at a time; a count of what the first block computes."""
    model = tiny_model(family, TASKS[family], dtype=torch.float32)
    examples = list(Examples(tiny_batch(model, 5, seed=1)))
    direction = direction_of(model, LAST[family])
    assert len(direction) == 1, list(direction)
    jobs = [(0, examples[:3], 1.5), (0, examples[2:], -2.0), (0, examples[:1], 3.0)]
    with NPEFFAnalyzer(model, fisher=FisherConfig(rank=1)).forward_pass() as forward:
        forward.batch_size(examples, 2)
        steps = SharedSteps(forward, [direction.linear_deltas()], 4)
        before = steps.unchanged(examples)
        steps.predict(jobs)  # which tries whether they can share, and whether the lower blocks can be left out
        counter, hooks = _Counter(model), hooks_of(model)
        found = steps.predict(jobs)
        # The blocks of T5 give a bias beside their states, and those of ALBERT share their weights: they run.
        assert (counter.runs == 0) == (family not in ("t5", "albert"))
        assert hooks_of(model) == hooks
        counter.handle.remove()
        assert not any("forward" in vars(module) for module in model.modules())
        for a, b in zip(before.logits, predict(forward, examples, 1).logits, strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
        moved = 0.0
        for (_, some, step), predictions in zip(jobs, found, strict=True):
            with direction.applied_to(model, step):
                truth = predict(forward, some, 1)
            for a, b in zip(predictions.logits, truth.logits, strict=True):
                assert (a - b).abs().max() < 1e-5 * b.abs().max()
            moved = max(moved, float(before.kl_to(predict(forward, examples, 1)).max()))


class _ReadsAnotherModule(nn.Module):
    """A last block that also reads what another module gives: where that is left out, it would be lost."""

    def __init__(self, inner: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._given: list[Tensor] = []
        other.register_forward_hook(lambda m, a, output: self._given.append(output))

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = self._given.pop()
        return self.inner(states + (other[0] if isinstance(other, tuple) else other), *args, **kwargs)


@pytest.mark.parametrize("part", ["", "attention"])  # a block that is left out, and one of its modules
def test_a_model_that_reads_a_lower_block_in_another_place_runs_whole(part: str) -> None:
    """Oracle: moved weights, whole passes."""
    model: Any = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    layers = model.bert.encoder.layer
    layers.insert(1, copy.deepcopy(layers[1]))
    layers[2] = _ReadsAnotherModule(layers[2], layers[0].get_submodule(part))
    examples = list(Examples(tiny_batch(model, 4, seed=1)))
    direction = direction_of(model, r"layer\.2\.inner\.output\.dense\.weight")
    with NPEFFAnalyzer(model, fisher=FisherConfig(rank=1)).forward_pass() as forward:
        steps = SharedSteps(forward, [direction.linear_deltas()], 1)
        for some, step in ((examples[:1], 1.0), (examples[1:2], 1.0), (examples[:1], -1.0), (examples[1:2], 2.0)):
            (found,) = steps.predict([(0, some, step)])
            with direction.applied_to(model, step):
                truth = predict(forward, some, 1)
            assert (found.logits[0] - truth.logits[0]).abs().max() < 1e-5 * truth.logits[0].abs().max()


def test_a_measurement_on_grids_does_not_take_states_of_other_weights() -> None:
    """Oracle: the change at one scale alone, and on a grid a model whose weights are rounded by hand, whole passes."""
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    rows = tiny_batch(model, 5, seed=1)
    direction = direction_of(model, LAST["bert"])
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=1))
    measured = analyzer.measure(direction, rows, scales=(1.0, 2.0, 3.0), random=False, quantise=("int8",))
    examples = list(Examples(rows))
    maps = maps_to_round(model, list(direction), ("int8",))
    with analyzer.forward_pass() as forward:
        before = predict(forward, examples, 1)
        for scale in (1.0, 2.0, 3.0):
            with direction.applied_to(model, scale):
                kl = before.kl_to(predict(forward, examples, 1))
            assert measured.at(scale)["all"].kl == pytest.approx(float(kl.mean()), rel=1e-3)
        with weights_rounded(model, maps, "int8"):
            rounded = predict(forward, examples, 1)
            with direction.applied_in_activations(model, 2.0):
                kl = rounded.kl_to(predict(forward, examples, 1))
    assert measured.on_grid("int8", merged=False, scale=2.0).groups["all"].kl == pytest.approx(
        float(kl.mean()), rel=1e-3
    )


def test_blocks_that_see_more_positions_than_tokens_give_what_whole_passes_give() -> None:
    """Oracle: moved weights, one example at a time; Longformer pads a batch to a multiple of its window."""
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attention_window=8, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    model = transformers.LongformerForSequenceClassification(config).eval()
    lengths = (5, 8, 16, 9, 20, 3)
    rows = [{"input_ids": [2 + (3 * i + k) % 37 for k in range(n)]} for i, n in enumerate(lengths)]
    examples = list(Examples(rows))
    direction = direction_of(model, r"layer\.1\.output\.dense\.weight")
    with NPEFFAnalyzer(model, fisher=FisherConfig(rank=1)).forward_pass() as forward:
        steps = SharedSteps(forward, [direction.linear_deltas()], 2)
        steps.unchanged(examples)
        for some in (examples, [examples[0], examples[5]], [examples[1], examples[2]], examples[::-1]):
            (found,) = steps.predict([(0, some, 2.0)])
            with direction.applied_to(model, 2.0):
                truth = predict(forward, some, 1)
            for a, b in zip(found.logits, truth.logits, strict=True):
                assert (a - b).abs().max() < 1e-5 * b.abs().max()
