"""Hooks that users leave on a model: what they make of an output is the model's, not that of the layer's weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_npeff import ParameterDirection
from hf_npeff.errors import UnsupportedModelError
from tests import reference, tiny
from tests.test_families import analyzer_of, pair, worst_error


def doubled(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


def rectified(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, output: output.relu())


def halved_input(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def temperature(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output / 0.7)


def normalised(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output.log_softmax(-1))


HOOKS: list[Callable[[Any], None]] = [doubled, rectified, halved_input, temperature, normalised]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("hook", HOOKS, ids=[hook.__name__ for hook in HOOKS])
def test_fishers_of_a_model_with_hooks_equal_brute_force(hook: Callable[[Any], None]) -> None:
    """Oracle: JᵀSJ by autograd of the model with the same hooks, on each example alone, in float64."""
    model, exact = pair("llama", "causal-lm")
    hook(model), hook(exact)
    examples = tiny.tiny_batch(model, 3, seed=1)
    terms = reference.terms_of("causal-lm")
    assert worst_error(analyzer_of(model), exact, examples, terms) <= 1e-4
    if hook is not normalised:  # whose rows enter at the logits, where 16 of them are not all
        assert worst_error(analyzer_of(model, rank=16, output_factor="spectral"), exact, examples, terms) <= 1e-4


@pytest.mark.parametrize("positions", ["last", "all"])
def test_rows_of_logits_that_a_hook_mixes_are_chosen_at_the_logits(positions: str) -> None:
    """Oracle: brute force; the head's weight is no part of the Jacobian then, whatever position predicts."""
    model, exact = pair("llama", "causal-lm")
    for each in (model, exact):
        each.lm_head.register_forward_hook(lambda module, args, output: output - output.roll(1, -1))
    examples = tiny.tiny_batch(model, 3, seed=1)
    analyzer = analyzer_of(model, rank=20 if positions == "last" else 200, output_factor="exact", positions=positions)
    assert worst_error(analyzer, exact, examples, reference.terms_of("causal-lm", positions)) <= 1e-4


def test_a_change_in_the_activations_comes_before_what_a_hook_makes_of_them() -> None:
    """Oracle: the logits of the model called directly after the same change of the weight in place."""
    model = tiny.tiny_model("llama", dtype=torch.float64)
    doubled(model)
    rectified(model)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    weights = dict(model.named_parameters())
    deltas = {n: torch.randn(weights[n].shape, generator=generator, dtype=torch.float64) for n in names}
    direction = analyzer_of(model).direction_of(deltas, {})
    ids = torch.tensor([[8, 9, 10, 11]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with direction.applied_in_activations(model, 0.5):
            measured = model(input_ids=ids).logits
        for name, delta in direction.items():
            weights[name].add_(0.5 * delta.to(torch.float64))
        moved = model(input_ids=ids).logits
    assert isinstance(direction, ParameterDirection) and (moved - before).abs().max() > 1e-2
    torch.testing.assert_close(measured, moved, atol=1e-6, rtol=0)


def test_gradients_that_a_backward_hook_changes_are_refused() -> None:
    """Oracle: the error; the hook is not transformers' own, and its gradients are not those of the predictions."""
    model = tiny.tiny_model("llama", dtype=torch.float32)
    model.model.layers[1].register_full_backward_hook(
        lambda module, into, out: tuple(3 * g for g in into if g is not None)
    )
    with pytest.raises(UnsupportedModelError, match=r"autograd's gradients differ"):
        analyzer_of(model).compute_pefs(tiny.tiny_batch(model, 3, seed=1))
