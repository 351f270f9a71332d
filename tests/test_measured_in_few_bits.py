"""Adapters measured on weights of few bits: in bfloat16, in whole numbers, and packed two to a byte."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_npeff import NPEFFAnalyzer
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.perturbation import PerturbationReport
from tests.trigger_words import TrainedCase

SETTINGS: dict[str, Any] = {"n_top": 6, "n_others": 12, "batch_size": 16}


@pytest.fixture(scope="module")
def adapters(trained_case: TrainedCase) -> list[Adapter]:
    c = trained_case
    return c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, 2, [0, 1, 2])


class FewBitsLinear(nn.Linear):
    """A linear map whose weight is whole numbers with a scale a row; those of four bits lie two in a byte.

    Args:
        linear: The map to be rounded.
        bits: 8 or 4.
    """

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.bits, self.bias = bits, linear.bias
        most = 2 ** (bits - 1) - 1
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / most
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        if bits == 4:
            whole = ((whole[:, ::2] + 8) * 16 + whole[:, 1::2] + 8).to(torch.uint8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", scale)

    def values(self) -> Tensor:
        """The weight (out, in) that it multiplies with."""
        whole = self.weight
        if self.bits == 4:
            whole = torch.stack([whole // 16, whole % 16], -1).flatten(1).to(torch.int8) - 8
        return whole * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values(), self.bias)


def in_few_bits(model: nn.Module, bits: int) -> tuple[nn.Module, nn.Module]:
    """The model with the linear maps of its encoder in few bits, and with the weights that those multiply with."""
    rounded, exact = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layer." in name:
            few = FewBitsLinear(module, bits)
            rounded.set_submodule(name, few)
            exact.get_submodule(name).weight.data.copy_(few.values())
    return rounded, exact


def measured(c: TrainedCase, model: nn.Module, adapters: list[Adapter], **settings: Any) -> list[PerturbationReport]:
    analyzer = NPEFFAnalyzer(model, c.analyzer.processing_class, fisher=c.analyzer.fisher)
    return analyzer.evaluate_adapters(adapters, copy.deepcopy(c.decomposition), c.data, c.pefs, **SETTINGS, **settings)


def numbers(report: PerturbationReport) -> list[float]:
    """Without those of the other sign, whose step may end at the weights' norm, which is known of whole ones alone."""
    return [value for e in (report.best, report.random) for value in (e.scale, e.top, e.others)]


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_few_bits_are_measured_as_their_values(
    trained_case: TrainedCase, adapters: list[Adapter], bits: int
) -> None:
    """Oracle: the model with the dequantised weights; every step, KL and random control to 1e-4."""
    rounded, exact = in_few_bits(trained_case.analyzer.model, bits)
    before = {name: value.clone() for name, value in rounded.state_dict().items()}
    assert any(value.dtype in (torch.int8, torch.uint8) for value in before.values())
    for ours, truth in zip(
        measured(trained_case, rounded, adapters), measured(trained_case, exact, adapters), strict=True
    ):
        assert numbers(ours) == pytest.approx(numbers(truth), rel=1e-4, abs=1e-7)
        assert ours.step_length is None, "nothing is moved in place"
    assert all(torch.equal(value, before[name]) for name, value in rounded.state_dict().items())


def test_a_report_in_bfloat16_is_that_of_a_float32_copy(trained_case: TrainedCase, adapters: list[Adapter]) -> None:
    """Oracle: the same weights in float32, at the steps found there; KL to 3%, where it is not rounding of logits."""
    low = copy.deepcopy(trained_case.analyzer.model).to(torch.bfloat16)
    wide = copy.deepcopy(low).float()
    for number, truth in enumerate(measured(trained_case, wide, adapters)):
        (ours,) = measured(trained_case, low, adapters[number : number + 1], scale=truth.scale)
        assert ours.best.top == pytest.approx(truth.best.top, rel=0.03)
        assert ours.best.others == pytest.approx(truth.best.others, rel=0.03, abs=0.002)
