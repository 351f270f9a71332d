"""Weight changes in the activations, against the model with W + ΔW."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_npeff import ParameterDirection, UnsupportedModelError
from hf_npeff.weights.activations import ChangedActivations, LinearDelta, changed_in_activations, random_like
from hf_npeff.weights.layouts import layout_of
from tests.sweep.tiny_models import build
from tests.tiny import collate, tiny_batch, tiny_model

LINEAR = r"(q_proj|down_proj|query|value|output\.dense|c_attn|c_fc|c_proj|fc1|out_lin)\.weight"
MODELS = [("llama", "causal-lm"), ("bert", "sequence-classification"), ("gpt2", "causal-lm"), ("opt", "causal-lm")]


def direction_of(model: nn.Module, pattern: str = LINEAR, *, seed: int = 0) -> ParameterDirection:
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in model.named_parameters() if re.search(pattern + "$", n)}
    deltas = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return ParameterDirection(deltas, {n: layout_of(model, n) for n in deltas}, {"component": 3})


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("family", "task"), MODELS)
def test_a_change_in_the_activations_is_the_change_of_the_weights(family: str, task: str) -> None:
    """Oracle: logits of the model with W + ΔW in float64; a direction, and its adapters."""
    model = tiny_model(family, task)
    inputs = collate(tiny_batch(model, 3, seed=1), model)
    direction = direction_of(model)
    before = logits(model, inputs)
    tolerance = 1e-9 if family != "llama" else 1e-6  # its norms are float32, whatever the weights are
    for scale in (0.7, -0.7):
        with direction.applied_to(model, scale):
            truth = logits(model, inputs)
        with direction.applied_in_activations(model, scale):
            assert (logits(model, inputs) - truth).abs().max() < tolerance * before.abs().max()
    assert (truth - before).abs().max() > 0.01
    kinds: tuple[Any, ...] = ("lora", "delta") if family == "gpt2" else ("lora", "shira", "delta")
    for kind in kinds:
        adapter = direction.to_adapter(rank=2, scale=0.7, kind=kind)
        deltas = {name: adapter.delta(name) for name in direction}
        for name, delta in deltas.items():
            assert delta.shape == direction[name].shape
        moved = ParameterDirection(deltas, direction.layouts)
        norm = sum(float(d.double().square().sum()) for d in deltas.values()) ** 0.5
        with moved.applied_to(model, -0.5 * norm):
            truth = logits(model, inputs)
        with adapter.applied_in_activations(model, -0.5):
            assert (logits(model, inputs) - truth).abs().max() < 1e-5 * before.abs().max()
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize(("family", "task"), MODELS)
def test_each_example_of_a_batch_has_its_change_its_sign_and_its_scale(family: str, task: str) -> None:
    """Oracle: one example at a time under W + ΔW of its own change; 0 leaves an example as it is."""
    model = tiny_model(family, task)
    examples = tiny_batch(model, 4, seed=2, min_length=6, max_length=6)
    directions = [direction_of(model, seed=0), direction_of(model, seed=1)]
    changes = [directions[0].linear_deltas(), directions[1].to_adapter(rank=16).linear_deltas()]
    numbers, scales = [1, 0, 1, 0], [0.5, -0.3, -0.8, 0.0]
    with ChangedActivations(model, changes) as changed:
        changed.assign(numbers, scales)
        together = logits(model, collate(examples, model))
    for i, example in enumerate(examples):
        alone = collate([example], model)
        truth = logits(model, alone)
        if scales[i]:
            with directions[numbers[i]].applied_to(model, scales[i]):
                truth = logits(model, alone)
        assert (together[i] - truth[0]).abs().max() < 1e-5 * truth.abs().max()


def test_a_change_of_only_some_weights_leaves_the_examples_of_the_others() -> None:
    """Oracle: as above; the two changes have no weight in common."""
    model = tiny_model("bert", "sequence-classification")
    examples = tiny_batch(model, 3, seed=2, min_length=6, max_length=6)
    directions = [direction_of(model, r"query\.weight"), direction_of(model, r"output\.dense\.weight")]
    with ChangedActivations(model, [d.linear_deltas() for d in directions]) as changed:
        changed.assign([0, 1, 1], [1.0, 1.0, -1.0])
        together = logits(model, collate(examples, model))
    for i, (number, scale) in enumerate(((0, 1.0), (1, 1.0), (1, -1.0))):
        with directions[number].applied_to(model, scale):
            truth = logits(model, collate([examples[i]], model))
        assert (together[i] - truth[0]).abs().max() < 1e-9 * truth.abs().max()


def test_tied_linear_maps_all_get_the_change() -> None:
    """Oracle: W + ΔW of ALBERT, whose layers share their weights, and of two maps tied by hand."""
    model = tiny_model("albert", "sequence-classification")
    layers = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention  # type: ignore[union-attr, index]
    layers.key.weight = layers.query.weight  # type: ignore[union-attr]
    inputs = collate(tiny_batch(model, 3, seed=1), model)
    direction = direction_of(model, r"query\.weight")
    with direction.applied_to(model, 0.7):
        truth = logits(model, inputs)
    with direction.applied_in_activations(model, 0.7):
        assert (logits(model, inputs) - truth).abs().max() < 1e-9


def test_no_hook_is_left_also_after_an_exception() -> None:
    """Oracle: a count of hooks, and the logits."""
    model = tiny_model("gpt2")
    inputs = collate(tiny_batch(model, 2, seed=1), model)
    before, hooks = logits(model, inputs), hooks_of(model)
    with pytest.raises(RuntimeError, match="in between"), direction_of(model).applied_in_activations(model, 0.7):
        assert hooks_of(model) > hooks
        raise RuntimeError("in between")
    assert hooks_of(model) == hooks and torch.equal(logits(model, inputs), before)


def test_a_small_step_in_bfloat16_is_the_step_and_moved_weights_are_not() -> None:
    """Oracle: the map in float32; what the bfloat16 weights round to has lost a good part of the step."""
    narrow = tiny_model("bert", "sequence-classification", dtype=torch.bfloat16)
    direction = direction_of(narrow)
    names = [name for name in direction if name.endswith("weight")]
    before = torch.cat([narrow.get_parameter(n).detach().float().flatten() for n in names])
    with direction.applied_to(narrow, 0.002):
        step = torch.cat([narrow.get_parameter(n).detach().float().flatten() for n in names]) - before
    wanted = torch.cat([direction[n].flatten() for n in names])
    assert float(step @ wanted / step.norm() / wanted.norm()) < 0.9
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = next(n for n in direction if n.endswith("layer.0.attention.self.query.weight"))
    module, delta = narrow.get_submodule(name.rpartition(".")[0]), direction[name]
    scale = 20.0
    with torch.no_grad(), direction.applied_in_activations(narrow, scale):
        got = module(x).float()
    truth = (
        x.float() @ (narrow.get_parameter(name).float() + scale * delta).mT
        + narrow.get_parameter(  # type: ignore[union-attr]
            name.replace("weight", "bias")
        ).float()
    )
    assert float((got - truth).norm() / truth.norm()) < 2**-8  # two roundings to 8 bits


def test_a_random_change_has_the_norm_and_the_ranks_of_the_given_one() -> None:
    """Oracle: dense norms."""
    model = tiny_model("gpt2")
    adapter = direction_of(model).to_adapter(rank=2, scale=0.3)
    given, drawn = adapter.linear_deltas(), random_like(adapter.linear_deltas(), seed=1)
    norms = [sum(float(d.matrix().double().square().sum()) for d in x.values()) for x in (given, drawn)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] == pytest.approx(sum(d.squared_norm for d in given.values()), rel=1e-5)
    assert all(torch.linalg.matrix_rank(d.matrix()) == 2 for d in drawn.values())
    assert {n: d.shape for n, d in given.items()} == {n: d.shape for n, d in drawn.items()}
    inner = sum(float((given[n].matrix() * drawn[n].matrix()).sum()) for n in given)
    assert abs(inner) < 0.3 * norms[0]


def test_an_adapter_says_what_it_is() -> None:
    """Oracle: the words."""
    adapter = direction_of(tiny_model("gpt2")).to_adapter(rank=2)
    shown = repr(adapter)
    assert "\n" not in shown and len(shown) < 120
    assert "component 3" in shown and "LoRA of rank 2" in shown and "keeps" in shown
    with pytest.raises(KeyError, match="nobody"):
        adapter.delta("nobody.weight")


# Bad input


class _ReadsWeights(nn.Module):
    """Calls one linear map, and reads the weight of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight


def test_a_weight_that_is_read_without_its_module_is_named_on_exit() -> None:
    """Oracle: the error; a module that ran is none."""
    model = _ReadsWeights()
    x, delta = torch.zeros(2, 4), LinearDelta(torch.ones(4, 4))
    with changed_in_activations(model, {"called.weight": delta}):
        model(x)
    with (
        pytest.raises(UnsupportedModelError, match=r"\bread\b.*applied_to"),
        changed_in_activations(model, {"called.weight": delta, "read.weight": delta}),
    ):
        model(x)
    with changed_in_activations(model, {"read.weight": delta}):
        pass  # nothing ran
    none = {"called.weight": delta, "read.weight": LinearDelta(torch.zeros(4, 4))}
    for change in (none, random_like(none)):  # what SigLIP's unused pooling gets, in which a weight is read
        with changed_in_activations(model, change):
            model(x)
    assert float(random_like(none)["called.weight"].squared_norm) == pytest.approx(float(delta.squared_norm))


@pytest.mark.parametrize(
    ("model_type", "kind", "idle"),
    [
        ("longformer", "masked-lm", "query_global"),
        ("led", "seq2seq-lm", "key_global"),
        ("luke", "masked-lm", "w2e_query"),
    ],
)
def test_weights_of_layers_that_do_not_run_for_these_inputs_change_nothing(
    model_type: str, kind: str, idle: str
) -> None:
    """Oracle: logits of the model with W + ΔW. No token has global attention, and no entity is marked in the text."""
    tiny = build(model_type, kind)
    model: Any = tiny.model
    example = {n: torch.as_tensor(v)[None] for n, v in tiny.examples[0].items()}
    direction = direction_of(model, rf"({idle}|\.(query|value))\.weight")
    others = ParameterDirection(
        {n: v for n, v in direction.items() if idle not in n}, {n: "linear" for n in direction if idle not in n}
    )
    before = logits(model, example)
    with others.applied_to(model, 0.5):
        truth = logits(model, example)
    assert (truth - before).abs().max() > 1e-3
    both = direction.norm / sum(float(direction[n].square().sum()) for n in others) ** 0.5
    with direction.applied_to(model, 0.5 * both):
        torch.testing.assert_close(logits(model, example), truth, atol=1e-5, rtol=0)
    kept = [dict(module._parameters) for module in model.modules()]
    with direction.applied_in_activations(model, 0.5 * both):
        torch.testing.assert_close(logits(model, example), truth, atol=1e-5, rtol=0)
    for module, own in zip(model.modules(), kept, strict=True):
        assert type(module._parameters) is dict and own == module._parameters


def test_what_is_no_linear_map_is_refused_by_name() -> None:
    """Oracle: the errors name the parameter and what to do."""
    model = tiny_model("gpt2", dtype=torch.float32)  # wte and lm_head are tied
    for pattern in (r"ln_1\.weight", r"c_fc\.bias", r"wpe\.weight"):
        direction = direction_of(model, pattern)
        with (
            pytest.raises(UnsupportedModelError, match=f"{pattern}.*applied_to"),
            direction.applied_in_activations(model),
        ):
            pass
    name = "lm_head.weight"
    shape = model.get_parameter(name).shape
    tied = ParameterDirection({name: torch.ones(shape)}, {name: "linear"})
    with pytest.raises(UnsupportedModelError, match="wte"), tied.applied_in_activations(model):
        pass
    direction = direction_of(model, r"c_fc\.weight")
    for scale in (0.0, float("nan")):
        with pytest.raises(ValueError, match="scale"), direction.applied_in_activations(model, scale):
            pass
    other = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\['[\w.]+'"), direction.applied_in_activations(other):
        pass
    name = next(iter(direction))
    wrong = ParameterDirection({name: torch.ones(3, 5)}, {name: "conv1d"})
    with pytest.raises(ValueError, match=r"\(out, in\)"), wrong.applied_in_activations(model):
        pass


def test_what_cannot_be_assigned_is_refused() -> None:
    """Oracle: the errors; a batch of another size, and a module that sees something else than examples."""
    model = _ReadsWeights()
    with ChangedActivations(model, [{"called.weight": LinearDelta(torch.ones(4, 4))}]) as changed:
        with pytest.raises(ValueError, match=r"2.*1"):
            changed.assign([0, 0], [1.0])
        with pytest.raises(IndexError):
            changed.assign([1], [1.0])
        changed.assign([0, 0], [1.0, -1.0])
        for rows, match in ((1, "once for the whole batch"), (3, "cannot be assigned to examples")):
            with pytest.raises(UnsupportedModelError, match=match):
                model(torch.zeros(rows, 4))
