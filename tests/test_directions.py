"""A direction in parameter space: unit norm, applied and taken back bit for bit, kept in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from hf_npeff import CorruptStoreError, FormatVersionError, ParameterDirection, UnsupportedModelError
from hf_npeff.weights.layouts import layout_of
from tests.tiny import tiny_model


def direction_for(model: Any, seed: int = 0) -> ParameterDirection:
    generator = torch.Generator().manual_seed(seed)
    deltas = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    return ParameterDirection(deltas, {n: layout_of(model, n) for n in deltas}, {"component": 2, "method": "exact"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_model_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    """Oracle: a copy of every parameter, after nested use, and after exceptions at any depth."""
    model = tiny_model("gpt2", dtype=dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    one, two = direction_for(model), direction_for(model, 1)

    def unchanged() -> bool:
        return all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    with one.applied_to(model, 3.0) as inside:
        assert inside is model and not unchanged()
        half = {n: p.detach().clone() for n, p in model.named_parameters()}
        with two.applied_to(model, -5.0):
            assert not all(torch.equal(p, half[n]) for n, p in model.named_parameters())
        assert all(torch.equal(p, half[n]) for n, p in model.named_parameters())
    assert unchanged()
    with pytest.raises(RuntimeError, match="inside"), one.applied_to(model, 1.0), two.applied_to(model, 1.0):
        raise RuntimeError("inside")
    assert unchanged()
    assert [p.requires_grad for p in model.parameters()] == [True] * len(before)


def test_the_step_is_scale_times_the_unit_direction() -> None:
    """Oracle: θ + scale·δ/‖δ‖ of every parameter."""
    model = tiny_model("bert", dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    direction = direction_for(model)
    norm = math.sqrt(sum(float(v.double().square().sum()) for v in direction.values()))
    assert direction.norm == pytest.approx(norm) == pytest.approx(1, abs=1e-6)
    with direction.applied_to(model, -2.5):
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[n] - 2.5 * direction[n].double())


def test_the_norm_of_the_parameters_that_a_direction_moves() -> None:
    """Oracle: the sum of squares, entry by entry; 1 where all are zero."""
    model = tiny_model("gpt2", dtype=torch.float32)
    weight = dict(model.named_parameters())["transformer.h.0.mlp.c_fc.weight"]
    deltas = {"transformer.h.0.mlp.c_fc.weight": torch.ones_like(weight)}
    direction = ParameterDirection(deltas, dict.fromkeys(deltas, "conv1d"))
    assert direction.norm_in(model) == pytest.approx(math.sqrt(sum(x * x for x in weight.flatten().tolist())))
    torch.nn.init.zeros_(weight)
    assert direction.norm_in(model) == 1


def test_random_directions_are_seeded_of_unit_norm_and_nearly_orthogonal() -> None:
    """Oracle: cosines; a Gaussian one has a cosine of about 1/√p with any other."""
    direction = direction_for(tiny_model("bert"))
    one, same, other = direction.random_like(7), direction.random_like(7), direction.random_like(8)
    assert one.cosine(same) == pytest.approx(1, abs=1e-6)
    p = sum(v.numel() for v in direction.values())
    assert abs(one.cosine(other)) < 5 / math.sqrt(p) and abs(one.cosine(direction)) < 5 / math.sqrt(p)
    assert one.norm == pytest.approx(1, abs=1e-6)
    assert direction.cosine({n: -3 * v for n, v in direction.items()}) == pytest.approx(-1, abs=1e-6)
    name = next(iter(direction))
    still = ParameterDirection({n: v * (n != name) for n, v in direction.items()}, direction.layouts)
    drawn = still.random_like(7)
    assert not bool(drawn[name].any()) and drawn.norm == pytest.approx(1)  # a weight that stays the same does so here


def test_a_folder_gives_the_direction_back(tmp_path: Path) -> None:
    """Oracle: the direction that was saved; a subfolder of a folder too."""
    direction = direction_for(tiny_model("bert"))
    direction.save_pretrained(tmp_path / "a")
    for again in (
        ParameterDirection.from_pretrained(tmp_path / "a"),
        ParameterDirection.from_pretrained(tmp_path, subfolder="a"),
    ):
        assert again.info == direction.info and again.layouts == direction.layouts and list(again) == list(direction)
        assert again.cosine(direction) == pytest.approx(1, abs=1e-6)
    assert "component 2" in repr(direction) and "Component 2" in (tmp_path / "a" / "README.md").read_text()


# Bad input


def test_bad_directions_scales_and_models_are_refused() -> None:
    """Oracle: the errors; the model is untouched after each."""
    model = tiny_model("bert", dtype=torch.float32)
    direction = direction_for(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for scale in (0, 0.0, float("nan"), float("inf"), -float("inf"), True, "2", None):
        with pytest.raises(ValueError, match="scale"), direction.applied_to(model, scale):  # type: ignore[arg-type]
            pass
    with (
        pytest.raises(ValueError, match=r"'bert\.embeddings\.word_embeddings\.weight'"),
        direction.applied_to(tiny_model("gpt2"), 1.0),
    ):
        pass
    wider = tiny_model("bert", hidden_size=32)
    with (
        pytest.raises(ValueError, match=r"'bert\.embeddings\.word_embeddings\.weight': \(58, 32\)"),
        direction.applied_to(wider, 1.0),
    ):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for deltas in (
        {},
        {"a": torch.zeros(2)},
        {"a": torch.tensor([1.0, float("nan")])},
        {"a": torch.tensor([math.inf])},
    ):
        with pytest.raises(ValueError):
            ParameterDirection(deltas, dict.fromkeys(deltas, "linear"))
    with pytest.raises(ValueError, match="layout"):
        ParameterDirection({"a": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="different parameters"):
        direction.cosine({"a": torch.ones(2)})


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    """Oracle: CorruptStoreError for every damage, FormatVersionError for another version, OSError for no folder."""
    direction = direction_for(tiny_model("bert"))

    def fresh(name: str) -> Path:
        direction.save_pretrained(tmp_path / name)
        return tmp_path / name

    damaged = fresh("bytes") / "direction.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (fresh("missing") / "direction.safetensors").unlink()
    (fresh("config") / "config.json").unlink()
    config = fresh("layouts") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layouts": {"a": "linear"}}))
    for name in ("bytes", "missing", "config", "layouts"):
        with pytest.raises(CorruptStoreError):
            ParameterDirection.from_pretrained(tmp_path / name)
    config = fresh("version") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 99}))
    with pytest.raises(FormatVersionError):
        ParameterDirection.from_pretrained(tmp_path / "version")
    with pytest.raises(OSError):
        ParameterDirection.from_pretrained(tmp_path / "nothing here")


def test_a_step_that_16_bits_round_away_is_told(caplog: Any) -> None:
    """Oracle: the weights before and after, subtracted in float64."""
    model = tiny_model("bert", dtype=torch.bfloat16)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    weight = dict(model.named_parameters())[name]
    given = ParameterDirection({name: torch.randn(weight.shape)}, {name: "linear"})
    before = weight.detach().double()
    for scale, told in ((1e-2, True), (10.0, False)):
        caplog.clear()
        with given.applied_to(model, scale):
            taken = weight.detach().double() - before
        cosine = float((taken * given[name].double()).sum() / taken.norm() / given[name].double().norm())
        assert (cosine < 0.99) == told
        assert (f"{100 * float(taken.norm()) / scale:.0f}% of its length" in caplog.text) == told
        assert (f"a cosine of {cosine:.2f}" in caplog.text) == told
    assert torch.equal(weight.double(), before)


def test_weights_to_which_nothing_can_be_added_are_refused(tmp_path: Any) -> None:
    """Oracle: the error, and the weights as they were; of whole numbers, and offloaded by Accelerate."""
    model = tiny_model("bert", dtype=torch.float32)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    given = ParameterDirection({name: torch.randn(24, 16)}, {name: "linear"})
    module = model.bert.encoder.layer[0].intermediate.dense
    module.weight = torch.nn.Parameter((10 * module.weight).to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="applied_in_activations"), given.applied_to(model, 1.0):
        pass
    offloaded = cpu_offload(tiny_model("bert", dtype=torch.float32), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="applied_in_activations"), given.applied_to(offloaded, 1.0):
        pass
