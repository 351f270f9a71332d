"""Layers that are no plain x Wᵀ + b, or cut the gradient: right, left out by name, or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from hf_npeff import FisherConfig, NPEFFAnalyzer, UnsupportedModelError
from hf_npeff.fisher.linear_layers import behaviour
from hf_npeff.fisher.linear_maps import find_linear_maps
from tests import reference, tiny
from tests.logged import warned_by
from tests.test_families import SMALL, analyzer_of, worst_error


def llama() -> Any:
    return tiny.tiny_model("llama", dtype=torch.float32, vocab_size=SMALL)


def replaced(cls: type[nn.Linear], where: str = "down_proj") -> Any:
    """A Llama whose second layer has linear layers of another class in one place, with the same weights."""
    model = llama()
    model.model.layers[1].mlp.get_submodule(where).__class__ = cls
    return model


class WrittenOut(nn.Linear):
    """The product in other words, as Falcon has it."""

    def forward(self, input: Tensor) -> Tensor:
        output = input @ self.weight.T
        return output if self.bias is None else output + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-8, 8)


class Returning2(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input), input  # type: ignore[return-value]


class Needing2(nn.Linear):
    def forward(self, input: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) + other


class RoundingInputs(nn.Linear):
    """Eight bits for every token, as dynamic quantisation has it: rounding has no derivative."""

    def forward(self, input: Tensor) -> Tensor:
        scale = input.detach().abs().amax(-1, keepdim=True) / 127
        return F.linear((input.detach() / scale).round() * scale, self.weight, self.bias)


class RoundingWithAScale(nn.Linear):
    """The same, but a gradient comes back through the scale: one of another network."""

    def forward(self, input: Tensor) -> Tensor:
        scale = input.abs().amax(-1, keepdim=True) / 127
        return F.linear((input / scale).round() * scale, self.weight, self.bias)


class StraightThrough(nn.Linear):
    """Rounded inputs with the gradient of unrounded ones: no cut."""

    def forward(self, input: Tensor) -> Tensor:
        scale = input.detach().abs().amax(-1, keepdim=True) / 127
        rounded = (input.detach() / scale).round() * scale
        return F.linear(input + (rounded - input).detach(), self.weight, self.bias)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (nn.Linear, "product"), (WrittenOut, "product"), (StraightThrough, "product"), (Scaled, "other"),
        (Clamped, "other"), (Returning2, "other"), (Needing2, "other"), (RoundingInputs, "rounding"),
        (RoundingWithAScale, "rounding"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_known_by_what_it_computes(cls: type[nn.Linear], expected: str, bias: bool) -> None:
    """Oracle: each class's formula, written above; what it is called is not looked at."""
    torch.manual_seed(0)
    layer = cls(16, 12, bias=bias)
    assert behaviour(layer) == expected
    assert layer.training


def test_a_forward_pass_of_its_own_that_is_the_product_is_analysed() -> None:
    """Oracle: JᵀSJ of each example alone, in the same precision."""
    model = replaced(WrittenOut)
    analyzer = analyzer_of(model)
    assert "model.layers.1.mlp.down_proj.weight" in {m.parameter for m in analyzer.maps}
    assert worst_error(analyzer, model, tiny.tiny_batch(model, 2, seed=1), reference.terms_of("causal-lm")) <= 1e-4


@pytest.mark.parametrize("cls", [Scaled, Clamped])
def test_another_forward_pass_is_left_out_by_name_and_the_rest_is_right(
    cls: type[nn.Linear], caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: JᵀSJ of each example alone, of the weights that are left; the share is a count of parameters."""
    model = replaced(cls)
    analyzer = analyzer_of(model)
    with caplog.at_level(logging.WARNING):
        error = worst_error(analyzer, model, tiny.tiny_batch(model, 2, seed=1), reference.terms_of("causal-lm"))
    assert error <= 1e-4
    assert "model.layers.1.mlp.down_proj.weight" not in {m.parameter for m in analyzer.maps}
    outside = {n: p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n}
    share = 100 * outside["model.layers.1.mlp.down_proj.weight"] / sum(outside.values())
    assert f"model.layers.*.mlp.down_proj.weight ({share:.1f}%)" in caplog.text


@pytest.mark.parametrize("cls", [RoundingInputs, RoundingWithAScale])
@pytest.mark.parametrize("exclude", [None, ["down_proj"]])
def test_rounded_inputs_are_refused_by_name_whether_or_not_the_layer_is_analysed(
    cls: type[nn.Linear], exclude: list[str] | None
) -> None:
    """Oracle: autograd on such a model is cut as well, so nothing but its derivative at that layer tells."""
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj.*weights"):
        analyzer_of(replaced(cls), exclude_modules=exclude)


def test_a_quantised_weight_that_cuts_the_gradient_is_refused_by_name_when_it_runs() -> None:
    """Oracle: a weight of whole numbers cannot be probed; its layer's output has no gradient where its input has."""

    class WholeNumbers(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input.detach(), self.weight.float() / 64, self.bias)

    model = replaced(WholeNumbers)
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter((64 * layer.weight.detach()).round().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj"):
        analyzer_of(model).compute_pefs(tiny.tiny_batch(model, 2, seed=1))


class WithIndexer(nn.Module):
    """Chooses half of the positions by scores that no gradient reaches, as sparse attention does."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner, self.scores = inner, nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            keep = (self.scores(x) > 0).to(x)
        return self.inner(x * (0.5 + keep))


def test_maps_that_are_called_without_gradients_are_passed_over() -> None:
    """Oracle: JᵀSJ of each example alone; the scores' own share is zero."""
    model = llama()
    model.model.layers[1].mlp = WithIndexer(model.model.layers[1].mlp, 16)
    model = model.eval()
    examples = tiny.tiny_batch(model, 3, seed=1)
    analyzer = analyzer_of(model)
    assert worst_error(analyzer, model, examples, reference.terms_of("causal-lm")) <= 1e-4
    assert "model.layers.1.mlp.scores.weight" in {m.parameter for m in analyzer.maps}


class ChangingInPlace(nn.Module):
    """Scales what a linear map returns in its own memory, as Longformer does with its queries."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y /= 3.0
        return y


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_that_is_changed_in_place_keeps_its_rows(bias: bool) -> None:
    """Oracle: JᵀSJ of each example alone."""
    model = llama()
    mlp = model.model.layers[1].mlp
    if bias:
        mlp.up_proj.bias = nn.Parameter(0.1 * torch.randn(24, generator=torch.Generator().manual_seed(0)))
    mlp.up_proj = ChangingInPlace(mlp.up_proj)
    examples = tiny.tiny_batch(model, 3, seed=1)
    assert worst_error(analyzer_of(model), model, examples, reference.terms_of("causal-lm")) <= 1e-4


class SequenceFirst(nn.Module):
    """Hands a linear map (positions, examples, features), as XLNet does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("lengths", [(8, 8), (4, 9)])
def test_positions_before_examples_are_noticed_and_examples_go_one_by_one(
    lengths: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: JᵀSJ of each example alone; where the length is a multiple of the batch, only the row check can tell."""
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.down_proj = SequenceFirst(mlp.down_proj)
    low, high = lengths
    examples = tiny.tiny_batch(model, 3, seed=1, min_length=low, max_length=high)
    with caplog.at_level(logging.WARNING):
        error = worst_error(analyzer_of(model), model, examples, reference.terms_of("causal-lm"))
    assert error <= 1e-4
    assert "down_proj" in caplog.text
    assert warned_by(caplog, "fisher.forward")


class Pretending(nn.Module):
    """Calls a linear map and multiplies by another multiple of its weight as well: hooks see half."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 2 * F.linear(x, self.inner.weight)


def test_rows_that_are_not_autograds_are_refused_with_the_weight_that_is_wrong() -> None:
    """Oracle: the only weight that is used outside its module."""
    model = llama()
    model.model.layers[1].mlp.down_proj = Pretending(model.model.layers[1].mlp.down_proj)
    with pytest.raises(UnsupportedModelError, match=r"most at model\.layers\.1\.mlp\.down_proj\.inner\.weight"):
        analyzer_of(model).compute_pefs(tiny.tiny_batch(model, 2, seed=1))


def test_what_is_left_out_is_told_by_its_share_whatever_its_shape(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: counts of parameters, of two-dimensional weights that no linear layer holds."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(0.2 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.w1.T) @ self.w1

    model = llama()
    model.model.layers[0].mlp = Stacked()
    outside = {n: p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n}
    share = 100 * 640 / sum(outside.values())
    with caplog.at_level(logging.WARNING):
        analyzer_of(model).compute_pefs(tiny.tiny_batch(model, 2, seed=1))
    assert f"model.layers.*.mlp.w1 ({share:.1f}%)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        analyzer_of(model, target_modules=["q_proj"], parameters=["w1"]).compute_pefs(tiny.tiny_batch(model, 2, seed=1))
    assert not warned_by(caplog, "fisher.preparation")
    assert find_linear_maps(model, ["q_proj"])


def _pruned(layer: nn.Linear) -> str:
    prune.random_unstructured(layer, "weight", 0.5)
    return "weight_orig"


def _normed(layer: nn.Linear) -> str:
    nn.utils.parametrizations.weight_norm(layer)
    return "parametrizations.weight.original1"


def _normed_as_before(layer: nn.Linear) -> str:
    nn.utils.weight_norm(layer)
    return "weight_v"


@pytest.mark.parametrize("change", [_pruned, _normed, _normed_as_before])
def test_weights_that_are_made_of_others_are_left_out_by_name_and_those_are_right(
    change: Callable[[nn.Linear], str], caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: autograd's gradient of the parameter that is there, zero where a mask hides it; nobody can move `weight`.

    The advice is followed: the parameter that the warning names is given in `parameters`.
    """
    model: Any = tiny.tiny_model("bert", "sequence-classification", dtype=torch.float32)
    name = f"bert.pooler.dense.{change(model.bert.pooler.dense)}"
    assert "bert.pooler.dense.weight" not in {m.parameter for m in find_linear_maps(model)}
    examples = tiny.tiny_batch(model, 3, seed=1)
    settings: dict[str, Any] = {"output_factor": "exact", "rank": 2, "sketch": "identity"}
    with caplog.at_level(logging.WARNING):
        NPEFFAnalyzer(model, fisher=FisherConfig(**settings)).compute_pefs(examples, progress=False)
    assert name in caplog.text
    fisher = FisherConfig(target_modules=[], parameters=[name], **settings)
    pefs = NPEFFAnalyzer(model, fisher=fisher).compute_pefs(examples, batch_size=3, progress=False)
    parameter = dict(model.named_parameters())[name]
    for i, example in enumerate(examples):
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        J = torch.stack([torch.autograd.grad(z, parameter, retain_graph=True)[0].flatten() for z in logits]).double()
        p = logits.detach().double().softmax(-1)
        truth = J.T @ (p.diag() - p.outer(p)) @ J
        A = pefs.factors[i].double() * pefs.norms[i].double().sqrt()
        assert (A.T @ A - truth).norm() <= 1e-4 * truth.norm()


def test_a_model_that_returns_tuples_is_refused_with_what_to_set() -> None:
    """Oracle: the setting that the error names."""
    model: Any = tiny.tiny_model("bert", "sequence-classification")
    examples = tiny.tiny_batch(model, 2, seed=1)
    model.config.return_dict = False
    with pytest.raises(UnsupportedModelError, match=r"config\.return_dict = True"):
        NPEFFAnalyzer(model).compute_pefs(examples, progress=False)
    model.config.return_dict = True
    assert len(NPEFFAnalyzer(model).compute_pefs(examples, progress=False)) == 2


def test_weights_that_share_memory_without_being_tied_are_refused() -> None:
    """Oracle: planted; tied as one parameter object the same model is analysed."""
    model = tiny.tiny_model("bert", "sequence-classification")
    first, second = (layer.attention.self.query for layer in model.bert.encoder.layer)
    second.weight.data = first.weight.data
    examples = tiny.tiny_batch(model, 2, seed=1)
    for targets in (["query"], ["layer.1.attention.self.query"]):
        with pytest.raises(UnsupportedModelError, match=r"layer\.0\.attention.*layer\.1\.attention.*same memory"):
            analyzer_of(model, target_modules=targets).compute_pefs(examples)
    second.weight = first.weight
    assert len(analyzer_of(model, target_modules=["query"]).compute_pefs(examples)) == 2
