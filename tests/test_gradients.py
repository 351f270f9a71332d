"""Hooks on linear maps: sketched rows of per-example gradients against autograd's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.frozen import frozen
from hf_npeff.fisher.gradients import LinearHooks, RowCollector
from hf_npeff.fisher.linear_maps import find_linear_maps, without_parameters
from hf_npeff.fisher.parameters import find_parameters
from hf_npeff.pefs.sketches import Sketch
from tests.sweep.tiny_models import build
from tests.tiny import tiny_batch, tiny_model

B = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def initialised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=i))
    return model.double()


def hooked_rows(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, kind: str = "identity",
    dim: int | None = None, targets: str | Sequence[str] = "all-linear",
) -> tuple[Tensor, Sketch]:  # fmt: skip
    maps = find_linear_maps(model, targets)
    sketch = Sketch({m.parameter: m.shape for m in maps}, kind, dim, seed=1)  # type: ignore[arg-type]
    collector = RowCollector(sketch)
    with frozen(model), LinearHooks(model, maps, collector) as hooks:
        hooks.begin(len(x))
        source = forward(x)
        collector.start(len(x), x.device, x.dtype)
        hooks.backward(source, v, last=True)
        return collector.finish(), sketch


def autograd_deltas(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    v: Tensor,
    targets: str | Sequence[str] = "all-linear",
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Plain per-example gradients, one example at a time, as (out, in) matrices."""
    maps = find_linear_maps(model, targets)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    every = []
    for i in range(len(x)):
        weights = [parameters[m.parameter] for m in maps]
        gradients = torch.autograd.grad(forward(x[i : i + 1]), weights, v[i : i + 1], allow_unused=True)
        every.append(
            {
                m.parameter: m.as_matrix(torch.zeros_like(w) if g is None else g)
                for m, w, g in zip(maps, weights, gradients, strict=True)
            }
        )
    return every


def check(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, **options: Any) -> Tensor:
    rows, sketch = hooked_rows(model, forward, x, v, **options)
    targets = options.get("targets", "all-linear")
    expected = torch.stack([sketch.apply(d) for d in autograd_deltas(model, forward, x, v, targets)])
    torch.testing.assert_close(rows, expected, atol=1e-10 * float(expected.abs().max()), rtol=1e-7)
    return rows


class Stack(nn.Module):
    """Linear maps of both kinds, used in every unusual way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.again = nn.Linear(6, 6)
        self.conv = Conv1D(5, 6)
        self.tied = nn.Linear(5, 5)
        self.twin = nn.Linear(5, 5)
        self.twin.weight = self.tied.weight
        self.unused = nn.Linear(2, 2)
        self.dead_end = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(3):
            h = torch.tanh(self.again(h)) + h
        self.dead_end(h)
        h = self.conv(h)
        return self.twin(torch.tanh(self.tied(h))).sum(1)


@pytest.mark.parametrize(
    ("kind", "dim"), [("identity", None), ("kronecker", 3), ("countsketch", 17), ("two-stage", 23)]
)
def test_rows_are_the_sketch_of_autograds_gradients(kind: str, dim: int | None) -> None:
    """Oracle: P applied to autograd's gradient of every example alone.

    One module is called three times, two share a weight, one is never called, one leads nowhere, one is a Conv1D.
    """
    model = initialised(Stack())
    check(model, model, normal(B, 7, 4), normal(B, 5, seed=1), kind=kind, dim=dim)


def test_kronecker_rows_are_both_sides_of_the_gradient_to_1e_5_in_float32() -> None:
    """Oracle: P_out ∇W P_inᵀ of autograd's per-example gradient, module by module, relative error ≤ 1e-5."""
    model = initialised(Stack()).float()
    x, v = normal(B, 7, 4).float(), normal(B, 5, seed=1).float()
    rows, sketch = hooked_rows(model, model, x, v, kind="kronecker", dim=3)
    assert sketch.blocks is not None
    for i, deltas in enumerate(autograd_deltas(model, model, x, v)):
        for name, gradient in deltas.items():
            outer = sketch.project_output(name, torch.eye(gradient.shape[0])).T
            inner = sketch.project_input(name, torch.eye(gradient.shape[1])).T
            expected = (outer @ gradient @ inner.T).flatten()
            assert (rows[i, sketch.blocks[name]] - expected).norm() <= 1e-5 * expected.norm() + 1e-12


def test_tied_weights_are_one_parameter_with_all_its_modules() -> None:
    """Oracle: the model's own sharing."""
    maps = {m.parameter: m for m in find_linear_maps(Stack())}
    assert maps["tied.weight"].modules == ("tied", "twin")
    assert "twin.weight" not in maps
    assert maps["conv.weight"].transposed
    assert maps["conv.weight"].shape == (5, 6)


def test_an_unused_module_has_zero_rows() -> None:
    """Oracle: autograd says that nothing depends on it."""
    model = initialised(Stack())
    rows, sketch = hooked_rows(model, model, normal(B, 7, 4), normal(B, 5, seed=1))
    assert sketch.blocks is not None
    assert (rows[:, sketch.blocks["unused.weight"]] == 0).all()
    assert (rows[:, sketch.blocks["dead_end.weight"]] == 0).all()


@pytest.mark.parametrize("targets", [["conv"], ["first"], ["twin"], r"(tied|twin|first)"])
def test_part_of_the_modules_gives_that_part_of_the_rows(targets: Any) -> None:
    """Oracle: autograd by those weights. The backward pass may then end anywhere in the model."""
    model = initialised(Stack())
    check(model, model, normal(B, 7, 4), normal(B, 5, seed=1), targets=targets)


def test_flattened_tokens_and_activations_in_place_are_handled() -> None:
    """Oracle: autograd. A module sees (B·t, features); another's output is changed in place."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h += 1
            h = nn.functional.relu(h, inplace=True)
            return self.b(h.reshape(-1, 4)).reshape(len(x), -1, 2).sum(1)

    model = initialised(Flat())
    check(model, model, normal(B, 5, 4), normal(B, 2, seed=1))


def test_a_module_that_gets_its_input_by_name_is_seen() -> None:
    """Oracle: autograd."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x).sum(1)

    model = initialised(Named())
    check(model, model, normal(B, 5, 4), normal(B, 2, seed=1))


def test_rows_do_not_depend_on_the_order_or_company_of_examples() -> None:
    """Oracle: every example alone."""
    model = initialised(Stack())
    x, v = normal(5, 7, 4), normal(5, 5, seed=1)
    together, _ = hooked_rows(model, model, x, v, kind="two-stage", dim=23)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled, _ = hooked_rows(model, model, x[order], v[order], kind="two-stage", dim=23)
    torch.testing.assert_close(shuffled, together[order], atol=1e-12, rtol=1e-9)
    for i in range(5):
        alone, _ = hooked_rows(model, model, x[i : i + 1], v[i : i + 1], kind="two-stage", dim=23)
        torch.testing.assert_close(alone[0], together[i], atol=1e-12, rtol=1e-9)


def test_several_cotangents_go_through_one_forward_pass() -> None:
    """Oracle: one pass for each; the model runs once, and inputs are projected once."""
    model = initialised(Stack())
    x, V = normal(B, 7, 4), normal(2, B, 5, seed=1)
    maps = find_linear_maps(model)
    sketch = Sketch({m.parameter: m.shape for m in maps}, "identity")
    collector = RowCollector(sketch)
    projections = []
    original = collector.take_input
    collector.take_input = lambda name, x: projections.append(name) or original(name, x)  # type: ignore[method-assign,func-returns-value]
    with frozen(model), LinearHooks(model, maps, collector) as hooks:
        hooks.begin(B)
        source = model(x)
        for a in range(2):
            collector.start(B, x.device, x.dtype)
            hooks.backward(source, V[a], last=a == 1)
            rows = collector.finish()
            deltas = _alone(x, V[a])
            torch.testing.assert_close(rows, torch.stack([sketch.apply(d) for d in deltas]), atol=1e-10, rtol=1e-7)
    assert len(projections) == 8  # first, again ×3, dead_end, conv, tied, twin


def _alone(x: Tensor, v: Tensor) -> list[dict[str, Tensor]]:
    model = initialised(Stack())
    return autograd_deltas(model, model, x, v)


class Island(nn.Module):
    """Maps behind a constant that requires a gradient: MRA's attention is one where its kernels are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        constant = (torch.zeros_like(h) + 0.5).detach().requires_grad_()
        return self.last(torch.tanh(self.second(constant)) + h).sum(1)


def test_maps_behind_a_constant_that_requires_a_gradient_have_their_rows() -> None:
    """Oracle: autograd on every example alone; no path leads from the second map back to the first."""
    model = initialised(Island())
    check(model, model, normal(B, 7, 4), normal(B, 5, seed=1))


def test_embeddings_that_require_gradients_change_no_rows() -> None:
    """Oracle: autograd on every example alone (training in 8 bits leaves such embeddings behind)."""
    model = initialised(Stack())
    check(model, lambda x: model(x.clone().requires_grad_()), normal(B, 7, 4), normal(B, 5, seed=1))


class Reversible(torch.autograd.Function):
    """Runs a layer without gradients, and again in the backward pass, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.layer(x), delta)
        assert x.grad is not None
        return x.grad, None


def test_maps_inside_an_autograd_function_of_the_models_own_are_refused_by_name() -> None:
    """Oracle: autograd has no gradient of their weights either; maps outside have theirs, and that is checked."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Reversible.apply(self.first(x), self.hidden)).sum(1)  # type: ignore[no-untyped-call]

    model = initialised(Model())
    x, v = normal(B, 7, 4), normal(B, 5, seed=1)
    with pytest.raises(UnsupportedModelError, match=r"hidden .*Reversible.*exclude_modules"):
        hooked_rows(model, model, x, v)
    check(model, model, x, v, targets=["first", "last"])


def test_weight_gradients_are_never_formed() -> None:
    """Oracle: no parameter requires a gradient inside, and none has one after."""
    model = initialised(Stack())
    x = normal(B, 7, 4)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
    hooked_rows(model, model, x, normal(B, 5, seed=1))
    assert all(p.grad is None for p in model.parameters())


def test_routed_rows_are_refused() -> None:
    """Oracle: the error names the module and the way out; 5 rows cannot be those of 3 examples."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(x.reshape(-1, 4)[:5]).sum()[None, None].expand(len(x), 1)

    model = initialised(Routed())
    with pytest.raises(UnsupportedModelError, match=r"expert.*exclude_modules"):
        hooked_rows(model, model, normal(B, 7, 4), normal(B, 1))
    assert not model.expert._forward_hooks  # type: ignore[union-attr]


def test_targets_that_do_not_matter_are_refused() -> None:
    """Oracle: the output does not depend on them."""
    model = initialised(Stack())
    with pytest.raises(UnsupportedModelError, match="target_modules"):
        hooked_rows(model, model, normal(B, 7, 4), normal(B, 5), targets=["unused"])


# Which modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_all_linear_is_every_linear_map_but_the_output_embedding(family: str) -> None:
    """Oracle: the model's modules."""
    model = tiny_model(family, "causal-lm" if family != "bert" else "masked-lm")
    chosen = {name for m in find_linear_maps(model) for name in m.modules}
    embedding = model.get_output_embeddings()
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not embedding}
    assert chosen == expected


def test_target_modules_have_pefts_meaning() -> None:
    """Oracle: PEFT's own matching, for names, endings and regular expressions."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    model = tiny_model("llama", "causal-lm")
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for target in (["q_proj", "v_proj"], ["layers.0.mlp.up_proj"], ["proj"], r".*\.1\..*proj", r"q_proj", ["lm_head"]):
        expected = {n for n in linear if check_target_module_exists(LoraConfig(target_modules=target), n)}
        if expected:
            assert {n for m in find_linear_maps(model, target) for n in m.modules} == expected
        else:
            with pytest.raises(ValueError, match=f"target_modules=.*{re.escape(str(target))}"):
                find_linear_maps(model, target)
    kept = find_linear_maps(model, ["q_proj", "v_proj"], exclude_modules=r".*\.0\..*")
    assert {m.parameter for m in kept} == {
        "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"
    }  # fmt: skip


def test_all_linear_leaves_out_what_shares_an_input_embeddings_weight() -> None:
    """Oracle: the model's own sharing; LUKE's entities have an embedding and a decoder, of which no method tells."""
    model: Any = build("luke", "masked-lm").model
    assert model.entity_predictions.decoder.weight is model.luke.entity_embeddings.entity_embeddings.weight
    names = {module for m in find_linear_maps(model) for module in m.modules}
    assert "entity_predictions.transform.dense" in names
    assert "entity_predictions.decoder" not in names


def test_a_weight_that_is_also_the_input_embedding_is_refused_with_what_to_do() -> None:
    """Oracle: what the message advises works: the first leaves the head out, the second gives autograd's gradient."""
    model = tiny_model("qwen3", "causal-lm", tie_word_embeddings=True)
    maps = find_linear_maps(model, ["lm_head", "q_proj"])
    with pytest.raises(UnsupportedModelError) as refused:
        without_parameters(model, maps, {})
    assert "exclude_modules=['lm_head']" in str(refused.value)
    assert "parameters=['model.embed_tokens.weight']" in str(refused.value)
    kept = find_linear_maps(model, ["lm_head", "q_proj"], exclude_modules=["lm_head"])
    assert without_parameters(model, kept, {}) == kept
    assert without_parameters(model, maps, find_parameters(model, ["model.embed_tokens.weight"])) == kept


def test_a_broken_regular_expression_is_refused() -> None:
    """Oracle: a ValueError for either setting."""
    model = tiny_model("llama", "causal-lm")
    with pytest.raises(ValueError, match=r"target_modules.*\(q_proj"):
        find_linear_maps(model, "(q_proj")
    with pytest.raises(ValueError, match=r"exclude_modules.*\(q_proj"):
        find_linear_maps(model, "all-linear", exclude_modules="(q_proj")


def test_frozen_restores_modes_flags_and_generators_after_an_exception() -> None:
    """Oracle: what was there before."""
    model = tiny_model("gpt2", "causal-lm")
    model.train()
    model.transformer.h[0].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(KeyError), frozen(model):
        assert not any(m.training for m in model.modules())
        torch.rand(3)
        model(torch.tensor([tiny_batch(model, 1, seed=1)[0]["input_ids"]]))
        raise KeyError
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
