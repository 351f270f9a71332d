"""Inputs that a change moves although it was not meant for them: the pool, and the search from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer, OffTarget
from tests import reference
from tests.test_activations import direction_of
from tests.test_measurement import logits_of
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture(scope="module")
def bert() -> tuple[Any, list[dict[str, Any]], NPEFFAnalyzer]:
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    return model, tiny_batch(model, 10, seed=3), NPEFFAnalyzer(model, fisher=FisherConfig(rank=2))


def kl_of(model: Any, direction: Any, scale: float, ids: list[int]) -> float:
    before = logits_of(model, {"input_ids": ids})
    with direction.applied_to(model, scale):
        return float(reference.kl(before, logits_of(model, {"input_ids": ids})))


def test_the_pools_worst_and_what_the_search_ends_at_are_what_they_are_said_to_be(bert: Any) -> None:
    """Oracle: reference.kl, one input at a time under moved weights; the search never ends below where it began."""
    model, rows, analyzer = bert
    direction = direction_of(model)
    found: OffTarget = analyzer.off_target(direction, rows, scale=0.5, worst=3, rounds=3, starts=2, candidates=5)
    kls = torch.tensor([kl_of(model, direction, 0.5, row["input_ids"]) for row in rows])
    assert found.n == 10 and found.mean == pytest.approx(float(kls.mean()), rel=1e-3)
    assert [row["index"] for row in found.worst] == kls.argsort(descending=True)[:3].tolist()
    assert [row["kl"] for row in found.worst] == pytest.approx(kls.sort(descending=True).values[:3].tolist(), rel=1e-3)
    assert (
        found.tried == 3 * 2 * 5
        and [row["index"] for row in found.searched] == kls.argsort(descending=True)[:2].tolist()
    )
    pool = {token for row in rows for token in row["input_ids"]}
    for row in found.searched:
        start = rows[row["index"]]["input_ids"]
        assert row["kl"] == pytest.approx(kl_of(model, direction, 0.5, row["input_ids"]), rel=1e-3)
        assert row["kl"] >= row["kl_start"] == pytest.approx(float(kls[row["index"]]), rel=1e-3)
        assert row["replaced"] == sum(a != b for a, b in zip(start, row["input_ids"], strict=True)) <= 3
        assert set(row["input_ids"]) <= pool
    assert max(row["replaced"] for row in found.searched) > 0
    assert found.worst_kl == max(row["kl"] for row in found.searched) > found.worst[0]["kl"]
    assert "\n" not in repr(found) and "30 others" in repr(found)


def test_the_search_is_seeded(bert: Any) -> None:
    """Invariant: one seed, one result."""
    model, rows, analyzer = bert
    one, again, other = (
        analyzer.off_target(direction_of(model), rows, scale=0.5, rounds=2, starts=2, seed=seed).searched
        for seed in (0, 0, 1)
    )
    assert one == again and one != other


def test_a_components_own_inputs_are_no_failure(bert: Any) -> None:
    """Oracle: the decomposition's transform of the pool, by its shares."""
    model, rows, analyzer = bert
    pefs = analyzer.compute_pefs(rows, progress=False)
    decomposition = analyzer.decompose(pefs, 6, n_restarts=1, progress=False)
    W = decomposition.transform(pefs)
    shares = W / W.sum(1, keepdim=True)
    every = shares > 0.05
    component = int(every.sum(0).argmin())
    active = every[:, component]
    assert 0 < int(active.sum()) < len(rows)
    found = analyzer.off_target(
        direction_of(model), rows, scale=0.5, decomposition=decomposition, component=component, rounds=1, candidates=2
    )
    assert found.n == int((~active).sum())
    assert all(row["own"] in (True, False) for row in found.searched)
    own = OffTarget(0.5, 1, 0.1, [{"kl": 0.1}], [{"kl": 5.0, "own": True}, {"kl": 0.2, "own": False}], 2)
    assert own.worst_kl == 0.2


# Bad input


def test_what_cannot_be_searched_is_refused(bert: Any) -> None:
    """Oracle: the errors."""
    model, rows, analyzer = bert
    direction = direction_of(model)
    for wrong in ({"scale": 0.0}, {"rounds": -1}, {"starts": 0}, {"candidates": 0}, {"worst": 0}, {"component": 1}):
        with pytest.raises(ValueError):
            analyzer.off_target(direction, rows, **wrong)
    vit = tiny_model("vit", dtype=torch.float32)
    images = tiny_batch(vit, 3, seed=1)
    change = direction_of(vit, r"mlp\.fc1\.weight|intermediate\.dense\.weight")
    with pytest.raises(ValueError, match="rounds=0"):
        NPEFFAnalyzer(vit).off_target(change, images)
    assert NPEFFAnalyzer(vit).off_target(change, images, rounds=0).searched == []
