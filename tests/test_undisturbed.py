"""Compiled models, torch.inference_mode and several threads: right rows, or an error that names it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_npeff import NPEFFAnalyzer, ParameterDirection, UnsupportedModelError
from tests import reference
from tests.analyses import analyzer_of, in_parameters
from tests.tiny import VOCABULARY, tiny_batch, tiny_model


def layers(model: Any) -> Any:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def forward_alone(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("compiled", [whole, in_place, forward_alone, layers])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_compiled_model_has_the_rows_of_the_model(compiled: Any, used_before: bool) -> None:
    """Oracle: the same model without torch.compile, bit for bit; afterwards it is compiled as it was."""
    plain = tiny_model("llama")
    model = compiled(copy.deepcopy(plain))
    data = tiny_batch(plain, 4, seed=1)
    expected = analyzer_of(plain).compute_pefs(data)
    ids = torch.tensor([data[0]["input_ids"]])
    if used_before:  # code that was compiled before hooks were there does not call them
        model(ids)
    analyzer = analyzer_of(model)
    ours = analyzer.compute_pefs(data)
    assert ours.fingerprint == expected.fingerprint and torch.equal(ours.factors, expected.factors)
    assert ours.info["weights"] == expected.info["weights"]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


class Merging(nn.Linear):
    """A layer with an adapter that it merges into its weight to predict, as loralib's."""

    def __init__(self, layer: Any):
        super().__init__(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        self.load_state_dict(layer.state_dict())
        self.adapter = nn.Parameter(0.1 * torch.randn_like(self.weight))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.adapter.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x @ self.adapter.T


def test_a_layer_that_merges_for_predictions_comes_back_as_it_was() -> None:
    """Oracle: its weight, bit for bit, and that its adapter is trained on."""
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    model.classifier, examples = Merging(model.classifier), tiny_batch(model, 2, seed=1)
    before = model.train().classifier.weight.detach().clone()
    analyzer_of(model, target_modules=["query"], sketch="kronecker", sketch_dim=4).compute_pefs(examples)
    assert model.classifier.training and not model.classifier.merged
    assert torch.equal(model.classifier.weight, before)


class Halving(nn.Linear):
    """A layer that lets half of the gradient through, which no forward pass shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.5 * x + 0.5 * x.detach())


def test_a_layer_that_lets_a_part_of_the_gradient_through_is_refused() -> None:
    """Oracle: the rows of the layers before it would be half as long."""
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    halving = Halving(model.classifier.in_features, model.classifier.out_features)
    halving.load_state_dict(model.classifier.state_dict())
    model.classifier = halving
    with pytest.raises(UnsupportedModelError):
        analyzer_of(model, target_modules=["query"]).compute_pefs(tiny_batch(model, 2, seed=1))


def test_inference_mode_is_lifted_or_named() -> None:
    """Oracle: the rows outside of it; weights that were made in it have no gradients to give."""
    model = tiny_model("bert")
    data = tiny_batch(model, 4, seed=1)
    expected = analyzer_of(model).compute_pefs(data)
    with torch.inference_mode():
        ours = analyzer_of(model).compute_pefs(data)
        made = tiny_model("bert")
    assert torch.equal(ours.factors, expected.factors)
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        analyzer_of(made).compute_pefs(data)


class Encoder(transformers.PreTrainedModel):
    """A classifier of PyTorch's own encoder layers, as people write it."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: transformers.PretrainedConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.classifier = nn.Linear(16, 3)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.encoder(self.embedding(input_ids), src_key_padding_mask=mask == 0)
        return SequenceClassifierOutput(logits=self.classifier(x[:, 0]))


class EncoderForSequenceClassification(Encoder):
    pass


def test_pytorchs_own_encoder_has_the_rows_and_the_effects_of_its_layers() -> None:
    """Oracle: brute force, one example at a time; the KL when the weights are moved. The switch is as it was."""
    torch.manual_seed(0)
    config = transformers.PretrainedConfig(num_labels=3, architectures=["EncoderForSequenceClassification"])
    model = EncoderForSequenceClassification(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    data = tiny_batch(tiny_model("bert"), 4, seed=1)
    analyzer = analyzer_of(model, rank=3, exclude_modules=["out_proj"])
    pefs = analyzer.compute_pefs(data)
    assert torch.backends.mha.get_fastpath_enabled()
    model.eval()
    names = [m.parameter for m in analyzer.maps]
    assert len(names) == 5
    terms = reference.terms_of("sequence-classification")
    for example, rows in zip(data, in_parameters(analyzer, pefs), strict=True):
        inputs = {"input_ids": torch.tensor([example["input_ids"]])}
        truth = reference.example_factor(model, inputs, names, terms)
        assert reference.relative_error_of_factors(truth, rows) < 1e-6
    change = ParameterDirection({names[0]: torch.ones(24, 16)}, {names[0]: "linear"})
    (measured,) = analyzer.measure(change, data, scales=(0.05,), random=False).at(0.05).values()

    def logits() -> list[Tensor]:
        with torch.no_grad():
            return [model(torch.tensor([example["input_ids"]])).logits[0] for example in data]

    before = logits()
    with change.applied_to(model, 0.05):
        after = logits()
    divergence = sum(reference.kl(p, q) for p, q in zip(before, after, strict=True)) / len(data)
    assert measured.kl == pytest.approx(divergence, rel=1e-5)


def test_two_threads_on_one_model_wait_for_one_another_and_predictions_go_on() -> None:
    """Oracle: one thread alone, bit for bit; what a third thread predicts meanwhile; the model is as it came."""
    model = tiny_model("llama").train()
    batches = [tiny_batch(model, 6, seed=seed) for seed in (1, 2)]
    expected = [analyzer_of(model).compute_pefs(data).factors for data in batches]
    ids = torch.tensor([batches[0][0]["input_ids"]])
    with torch.no_grad():
        alone = model(ids).logits
    found: dict[int, Any] = {}
    wrong: list[BaseException] = []
    stop = threading.Event()

    def analyse(number: int) -> None:
        try:
            found[number] = analyzer_of(model).compute_pefs(batches[number]).factors
        except BaseException as error:
            wrong.append(error)

    def predict() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.allclose(model(ids).logits, alone):
                    wrong.append(AssertionError("another thread's prediction changed"))

    threads = [threading.Thread(target=analyse, args=(number,)) for number in range(2)]
    watcher = threading.Thread(target=predict)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert not wrong
    for number in range(2):
        assert torch.equal(found[number], expected[number])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert isinstance(NPEFFAnalyzer(model).model, type(model))
