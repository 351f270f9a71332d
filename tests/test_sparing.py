"""Changes that leave what layers give on some inputs as it is: against dense solutions and moved models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_npeff import FisherConfig, NPEFFAnalyzer, ParameterDirection, UnsupportedModelError
from hf_npeff.decomposition.component import active_examples
from hf_npeff.weights.lora import low_rank
from tests import reference
from tests.test_measurement import logits_of
from tests.tiny import tiny_batch, tiny_model

FAMILIES = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["gate_proj", "up_proj"]}


def case(family: str) -> tuple[Any, list[dict[str, Any]], NPEFFAnalyzer, ParameterDirection]:
    """A tiny model, data of several lengths, and a random direction in two kinds of its linear maps."""
    model = tiny_model(family, dtype=torch.float32)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(target_modules=FAMILIES[family]))
    generator = torch.Generator().manual_seed(1)
    deltas = {m.parameter: torch.randn(m.shape, generator=generator) for m in analyzer.maps}
    return model, tiny_batch(model, 12, seed=5), analyzer, analyzer.direction_of(deltas, {"component": 0})


def read_by(model: Any, rows: list[dict[str, Any]], direction: ParameterDirection) -> dict[str, Tensor]:
    """What every map of a direction reads, (tokens, in), one example at a time, so without padding."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in direction}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in direction
    ]
    for row in rows:
        logits_of(model, row)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in inputs.items()}


def matrices(model: Any, direction: ParameterDirection) -> dict[str, Tensor]:
    """(out, in) of every weight's change."""
    flipped = {n for n in direction if isinstance(model.get_submodule(n.removesuffix(".weight")), Conv1D)}
    return {name: (value.mT if name in flipped else value).double() for name, value in direction.items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_spared_change_is_the_dense_solution_of_its_equations(family: str) -> None:
    """Oracle: reference.spare on inputs that hooks saw one example at a time; batches of four are padded."""
    model, rows, analyzer, direction = case(family)
    assert len({len(row["input_ids"]) for row in rows}) > 2
    truth = reference.spare(matrices(model, direction), read_by(model, rows, direction), 0.1)
    spared = analyzer.spare(direction, rows, ridge=0.1, batch_size=4)
    for name, value in matrices(model, spared).items():
        assert (value - truth[name]).norm() < 1e-4, name
    assert spared.layouts == direction.layouts and spared.norm == pytest.approx(1, abs=1e-5)
    assert spared.info["spared"]["cosine"] == pytest.approx(spared.cosine(direction), abs=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("longest", [6, 7])
def test_a_decoders_padding_is_left_out_also_where_both_sides_are_equally_long(family: str, longest: int) -> None:
    """Oracle: one example at a time, without padding; the encoder's side of the batch is seven tokens long."""
    analyzer = NPEFFAnalyzer(tiny_model(family, dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {side: torch.randint(5, 20, (n,), generator=generator).tolist() for side, n in sides.items()}
        for sides in ({"input_ids": 7, "labels": 3}, {"input_ids": 4, "labels": longest}, {"input_ids": 7, "labels": 5})
    ]
    deltas = {m.parameter: torch.randn(m.shape, generator=generator) for m in analyzer.maps}
    direction = analyzer.direction_of(deltas, {})
    together, alone = (analyzer.spare(direction, rows, ridge=0.1, batch_size=size) for size in (4, 1))
    assert together.info["spared"]["tokens"] == alone.info["spared"]["tokens"] == 18
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-4 * float(value.abs().max()), rtol=1e-3)


def test_a_spared_change_disturbs_layers_least_for_what_it_keeps() -> None:
    """Oracle: the objective itself, at the change and around it; what is said of the disturbance is measured."""
    model, rows, analyzer, direction = case("bert")
    spared, inputs = analyzer.spare(direction, rows, ridge=0.01), read_by(model, rows, direction)
    given, least = matrices(model, direction), matrices(model, spared)

    def disturbed(change: dict[str, Tensor], ridge: float = 0.0) -> float:
        moments = {n: x.double().T @ x.double() / len(x) for n, x in inputs.items()}
        return sum(
            float(((d @ (moments[n] + ridge * torch.diag(moments[n].diagonal()))) * d).sum()) for n, d in change.items()
        )

    def objective(change: dict[str, Tensor]) -> float:
        return sum(float((given[n] * d).sum()) for n, d in change.items()) ** 2 / disturbed(change, 0.01)

    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        steps = {n: torch.randn(d.shape, generator=generator, dtype=d.dtype) for n, d in least.items()}
        assert objective({n: d + 0.003 * steps[n] for n, d in least.items()}) < objective(least)
    assert spared.info["spared"]["disturbed"] == pytest.approx(disturbed(least) / disturbed(given), rel=1e-3)
    assert spared.info["spared"]["disturbed"] < 0.1
    assert spared.info["spared"]["tokens"] == sum(len(row["input_ids"]) for row in rows)


def test_what_is_spared_stays_as_it_is_at_a_long_step() -> None:
    """Identity: fewer tokens than inputs leave changes that they do not see; other inputs move, and a plain step both.

    The direction moves one layer only, so that what comes before it is the same.
    """
    model, rows, analyzer, direction = case("llama")
    last = max(direction)
    direction = ParameterDirection({last: direction[last]}, {last: direction.layouts[last]}, direction.info)
    few = rows[:1]
    assert len(few[0]["input_ids"]) < direction[last].shape[1]
    spared = analyzer.spare(direction, few, ridge=1e-6)
    before = [logits_of(model, row) for row in rows]

    def moved(change: ParameterDirection) -> list[float]:
        with change.applied_to(model, 10.0):
            return [float((logits_of(model, row) - b).abs().max()) for row, b in zip(rows, before, strict=True)]

    assert moved(spared)[0] < 1e-3 * max(moved(spared)[1:])
    assert moved(direction)[0] > 0.1 * max(moved(direction)[1:])


def test_a_rank_is_cut_where_it_disturbs_least() -> None:
    """Oracle: the truncated SVD in the metric by its symmetric root; worse there is the plain SVD of the change."""
    model, rows, analyzer, direction = case("bert")
    whole, cut = analyzer.spare(direction, rows, ridge=0.1), analyzer.spare(direction, rows, ridge=0.1, rank=2)
    inputs = read_by(model, rows, direction)
    full, low = matrices(model, whole), matrices(model, cut)
    for name, x in inputs.items():
        C = x.double().T @ x.double() / len(x)
        values, vectors = torch.linalg.eigh(C + 0.1 * torch.diag(C.diagonal()))
        root = vectors * values.sqrt() @ vectors.T
        U, S, Vh = torch.linalg.svd(full[name] @ root)
        best = U[:, :2] * S[:2] @ Vh[:2] @ torch.linalg.inv(root)
        scaled = low[name] * float((low[name] * best).sum() / low[name].square().sum())
        assert (scaled - best).norm() < 1e-4 * best.norm()
        plain = torch.mm(*low_rank(full[name], 2)[:2]).double()
        assert ((full[name] - best) @ root).norm() < ((full[name] - plain) @ root).norm()
        assert torch.linalg.matrix_rank(low[name], atol=1e-5) == 2
    assert cut.to_adapter(rank=2).retained_energy > 0.9999


def test_components_spare_what_they_are_not_active_on_in_one_pass() -> None:
    """Oracle: one direction after the other, with the examples that it leaves alone given as a data set."""
    _, rows, analyzer, _ = case("bert")
    rows = [{"id": f"e{i}", **row} for i, row in enumerate(rows)]
    pefs = analyzer.compute_pefs(rows, progress=False)
    decomposition = analyzer.decompose(pefs, 6, n_restarts=1, progress=False)
    W = decomposition.coefficients
    active = active_examples(W)
    components = [j for j in range(6) if 0 < int(active[:, j].sum()) < len(rows)][:2]
    assert len(components) == 2 and not torch.equal(active[:, components[0]], active[:, components[1]])
    directions = analyzer.lift(decomposition, components, pefs, rows, selective=False)
    together = analyzer.spare(directions, rows[::-1], decomposition=decomposition, rank=[None, 2], batch_size=5)
    for j, direction, spared, rank in zip(components, directions, together, (None, 2), strict=True):
        quiet = [row for row, own in zip(rows, active[:, j].tolist(), strict=True) if not own]
        alone = analyzer.spare(direction, quiet, rank=rank)
        assert spared.cosine(alone) == pytest.approx(1, abs=1e-4)
        assert spared.info["spared"]["tokens"] == alone.info["spared"]["tokens"]
        assert spared.info["component"] == j


def test_a_change_of_a_length_of_its_own_becomes_a_unit_direction() -> None:
    """Identity: whatever the length, the same direction, and no scale that was of the change before."""
    _, rows, analyzer, direction = case("bert")
    long = ParameterDirection({n: 3 * v for n, v in direction.items()}, direction.layouts, direction.info, unit=False)
    spared = analyzer.spare(long, rows)
    assert "natural_scale" in long.info and "natural_scale" not in spared.info
    assert spared.cosine(analyzer.spare(direction, rows)) == pytest.approx(1, abs=1e-6)


def test_what_cannot_be_spared_is_refused() -> None:
    """Oracle: the errors."""
    model, rows, analyzer, direction = case("bert")
    for settings in ({"ridge": 0.0}, {"ridge": float("nan")}, {"rank": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            analyzer.spare(direction, rows, **settings)
    name = "bert.embeddings.word_embeddings.weight"
    embedding = ParameterDirection({name: torch.ones_like(model.get_parameter(name))}, {name: "embedding"})
    with pytest.raises(UnsupportedModelError, match="word_embeddings"):
        analyzer.spare(embedding, rows)
    pefs = analyzer.compute_pefs(rows, progress=False)
    decomposition = analyzer.decompose(pefs, 1, n_restarts=1, progress=False)
    with pytest.raises(ValueError, match=r"\[0\]"):
        analyzer.spare(direction, rows, decomposition=decomposition)
    with pytest.raises(ValueError, match="ParameterDirection"):
        analyzer.spare(direction.random_like(), rows, decomposition=decomposition)
    with pytest.raises(ValueError, match="decomposition="):
        analyzer.spare(direction, rows, decomposition=decomposition, max_examples=2)
    with pytest.raises(ValueError, match="the same weights"):
        analyzer.spare([], rows)
    with pytest.raises(ValueError, match="2 ranks"):
        analyzer.spare(direction, rows, rank=[1, 2])
    other = ParameterDirection({"nowhere.weight": torch.ones(2, 2)}, {"nowhere.weight": "linear"})
    with pytest.raises(ValueError, match="nowhere"):
        analyzer.spare(other, rows)
