"""Biases, norms, embeddings and fused experts, by autograd through the same sketch; and what it says of the hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_npeff import NPEFF, FisherConfig, NPEFFAnalyzer, ParameterDirection, UnsupportedModelError
from hf_npeff.fisher.parameters import find_parameters, gradients
from hf_npeff.weights.layouts import layouts_of
from tests import reference, tiny
from tests.test_families import SMALL, analyzer_of, pair, worst_error


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("family", "task", "parameters"),
    [
        ("bert", "sequence-classification", r".*(bias|LayerNorm\.weight)"),
        ("bert", "masked-lm", r".*word_embeddings\.weight"),
        ("gpt2", "causal-lm", r".*(wte|wpe|ln_f).*"),
        ("qwen3", "causal-lm", r"model\.embed_tokens\.weight"),
        ("gemma2", "causal-lm", r".*(norm|embed_tokens).*"),
        ("mixtral", "causal-lm", r".*mlp\.gate\.weight"),
        ("mamba", "causal-lm", r".*(dt_proj|A_log|conv1d|\.D).*"),
        ("t5", "seq2seq-lm", r".*(relative_attention_bias|layer_norm).*"),
        ("vit", "image-classification", r".*(embeddings|layernorm).*"),
    ],
)
def test_other_parameters_equal_brute_force(family: str, task: str, parameters: str) -> None:
    """Oracle: JᵀSJ over all linear weights and the named parameters, tied ones differentiated in both places."""
    model, exact = pair(family, task)
    examples = tiny.tiny_batch(model, 3, seed=1)
    analyzer = analyzer_of(model, parameters=parameters, positions="labels" if task == "seq2seq-lm" else "auto")
    assert analyzer.parameters
    assert worst_error(analyzer, exact, examples, reference.terms_of(task)) <= 1e-4


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sketch", ["identity", "kronecker", "countsketch", "two-stage"])
@pytest.mark.parametrize("family", ["bert", "llama", "phi"])
def test_hooks_and_autograd_give_the_same_rows_for_the_same_weights(family: str, sketch: str) -> None:
    """Oracle: the weights of the linear maps, named as parameters, so that no hook is involved."""
    model = tiny.tiny_model(family, dtype=torch.float32, vocab_size=SMALL)
    examples = tiny.tiny_batch(model, 4, seed=2)
    settings: dict[str, Any] = {"sketch": sketch, "sketch_dim": {"kronecker": 8, "identity": None}.get(sketch, 2048)}
    hooks = NPEFFAnalyzer(model, tiny.tiny_tokenizer(), fisher=FisherConfig(**settings))
    names = tuple(m.parameter for m in hooks.maps)
    other = FisherConfig(target_modules=(), parameters=names, **settings)
    autograd = NPEFFAnalyzer(model, tiny.tiny_tokenizer(), fisher=other)
    assert not autograd.maps
    a, b = hooks.compute_pefs(examples), autograd.compute_pefs(examples)
    assert a.fingerprint == b.fingerprint
    torch.testing.assert_close(a.norms, b.norms, rtol=1e-5, atol=0)
    for i in range(4):
        assert reference.relative_error_of_factors(a.factors[i], b.factors[i]) <= 1e-5


def test_a_parameter_that_is_named_is_not_hooked_as_well() -> None:
    """Oracle: brute force counts every weight once."""
    model, exact = pair("bert", "sequence-classification")
    analyzer = analyzer_of(model, parameters=("query.weight", "classifier.weight"))
    assert len(analyzer.parameters) == 3
    assert not set(analyzer.parameters) & {m.parameter for m in analyzer.maps}
    examples = tiny.tiny_batch(model, 2, seed=3)
    assert worst_error(analyzer, exact, examples, reference.terms_of("sequence-classification")) <= 1e-4


def test_the_measured_sketch_error_counts_other_parameters() -> None:
    """Oracle: inner products of the PEFs of an identity sketch, against those of the sketch, over pairs of examples."""
    model = tiny.tiny_model("bert", dtype=torch.float32, vocab_size=SMALL, num_labels=2)
    examples = tiny.tiny_batch(model, 6, seed=4)
    of: dict[str, Any] = {"parameters": r".*(bias|embeddings\.weight)", "rank": 1}
    exact = analyzer_of(model, **of).compute_pefs(examples)
    rough = analyzer_of(model, **(of | {"sketch": "countsketch", "sketch_dim": 256})).compute_pefs(examples)
    K, K_hat = ((p.factors[:, 0] @ p.factors[:, 0].T).square() for p in (exact, rough))
    off = ~torch.eye(6, dtype=torch.bool)
    assert rough.sketch_error == pytest.approx(float((K_hat - K)[off].norm() / K[off].norm()), rel=1e-3)


def test_unknown_parameters_are_refused_with_close_matches() -> None:
    """Oracle: the model's own names."""
    model = tiny.tiny_model("bert")
    with pytest.raises(ValueError, match=r"'classifier\.bais'.*'classifier\.bias'"):
        NPEFFAnalyzer(model, fisher=FisherConfig(parameters=["classifier.bais"]))
    with pytest.raises(ValueError, match="parameters='nothing'"):
        NPEFFAnalyzer(model, fisher=FisherConfig(parameters="nothing"))
    with pytest.raises(ValueError, match=r"parameters='\('"):
        NPEFFAnalyzer(model, fisher=FisherConfig(parameters="("))


def test_names_endings_and_ties_find_the_same_parameter() -> None:
    """Oracle: Qwen3's tied head shares its tensor with the embedding; it is listed once, under its first name."""
    model = tiny.tiny_model("qwen3")
    by_tie = find_parameters(model, ["lm_head.weight"])
    assert by_tie == find_parameters(model, ["embed_tokens.weight"]) == find_parameters(model, r"model\.embed_tokens.*")
    assert list(by_tie) == ["model.embed_tokens.weight"]


class Remembering(nn.Module):
    """Adds a bias that it keeps while it predicts, as LeViT keeps its attention biases."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner, self.own = inner, nn.Parameter(torch.linspace(-1, 1, width))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        super().train(mode)
        self.kept = {} if mode else self.kept
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.inner(x) + self.own
        if "own" not in self.kept:
            self.kept["own"] = self.own * 1.0
        return self.inner(x) + self.kept["own"]


def test_a_bias_that_is_kept_while_predicting_has_its_gradient_and_its_effect() -> None:
    """Oracle: the same model with the bias in its linear layer, where nothing keeps it."""
    plain, model = (tiny.tiny_model("bert", "sequence-classification") for _ in range(2))
    examples, layer, width = tiny.tiny_batch(model, 4, seed=1), "bert.encoder.layer.0.intermediate.dense", 24
    with torch.no_grad():
        plain.get_submodule(layer).bias += torch.linspace(-1, 1, width)
    holder = model.bert.encoder.layer[0].intermediate
    holder.dense = Remembering(holder.dense, width)
    model(input_ids=torch.tensor([[9, 10]]))  # which keeps the bias, with its graph
    results = []
    for each, name in ((model, f"{layer}.own"), (plain, f"{layer}.bias")):
        analyzer = analyzer_of(each, target_modules=[], parameters=[name], sketch="identity")
        pefs = analyzer.compute_pefs(examples)
        change = ParameterDirection({name: torch.linspace(1, 2, width)}, {name: "other"}, {}, unit=False)
        measured = analyzer.measure(change, examples, random=False).at(1.0)["all"].kl
        with change.applied_to(each):
            moved = each(input_ids=torch.tensor([[9, 10]])).logits
        results.append((pefs.norms.double(), torch.tensor([measured]), moved))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert float(results[0][0].min()) > 0


def test_a_weight_that_is_read_without_its_module_makes_no_adapter() -> None:
    """Oracle: PEFT, whose LoRA around Mamba's dt_proj does nothing, because nothing calls it; in_proj is called."""
    model = tiny.tiny_model("mamba")
    examples = tiny.tiny_batch(model, 6, seed=1)
    analyzer = analyzer_of(model, target_modules=[], parameters=["dt_proj.weight", "0.mixer.in_proj.weight"])
    pefs = analyzer.compute_pefs(examples)
    names = {f"backbone.layers.{i}.mixer.dt_proj.weight" for i in range(2)}
    assert set(pefs.info["selftest"]["used_otherwise"]) == names
    decomposition = NPEFF(2, n_restarts=1, max_iterations=5).fit(pefs)
    for again in (analyzer, NPEFFAnalyzer(model)):
        direction = again.lift(decomposition, 0, pefs, examples, selective=False)
        assert {name for name, layout in direction.layouts.items() if layout == "other"} == names
        with pytest.raises(UnsupportedModelError, match=r"dt_proj.*kind='delta'"):
            direction.to_adapter(rank=1)
    assert {name for name, layout in layouts_of(model, pefs.sketch().shapes).items() if layout == "other"} == names


def test_gradients_leaves_the_model_frozen_when_the_forward_pass_raises() -> None:
    """Oracle: requires_grad of every parameter, before and after."""
    model = tiny.tiny_model("bert").requires_grad_(False)

    def fails() -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        next(gradients(model, ["classifier.bias"], fails, torch.zeros(1, 1)))
    assert not any(p.requires_grad for p in model.parameters())
