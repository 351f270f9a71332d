"""NPEFF: fit, transform and expand, with restarts, balancing, stopping and chunks."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_npeff import NPEFF, DecompositionConfig, FisherConfig, IncompatibleSketchError, NPEFFAnalyzer, PEFs
from hf_npeff.decomposition import estimator
from tests import reference
from tests.logged import warned_by
from tests.planted import planted, recovered
from tests.tiny import tiny_batch, tiny_model


def planted_pefs(n: int = 120, c: int = 3, d: int = 24, r: int = 5, **changes: Any) -> tuple[PEFs, Tensor]:
    settings = {"overlap": 0.2, "noise": 0.3, "active": 2, "seed": 0, **changes}
    A, truth, _ = planted(n, c, d, r, **settings)
    return PEFs.from_factors(A, text=[f"example {i}" for i in range(n)]), truth


def relative_loss(pefs: PEFs, W: Tensor, G: Tensor) -> float:
    return reference.loss(pefs.factors, W, G) / reference.total(pefs.factors)


def test_fit_finds_what_was_planted() -> None:
    """Oracle: planted truth, and the dense loss; W ≥ 0, unit rows, one finite stability for each component."""
    pefs, truth = planted_pefs()
    found = NPEFF(5, n_restarts=5).fit(pefs)
    assert recovered(found.pseudo_fishers, truth, 0.95) == 5
    assert (found.coefficients >= 0).all()
    torch.testing.assert_close(found.pseudo_fishers.norm(dim=1), torch.ones(5))
    assert found.explained == pytest.approx(1 - relative_loss(pefs, found.coefficients, found.pseudo_fishers), abs=1e-5)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(found.loss_history))
    assert found.stability.shape == (5,)
    assert ((found.stability > 0.9) & (found.stability <= 1 + 1e-5)).all()
    weights = found.coefficients.sum(0)
    assert torch.equal(weights, weights.sort(descending=True).values)
    assert found.example_ids == pefs.example_ids
    assert found.columns["text"] == pefs.columns["text"]


def test_the_same_seed_gives_the_same_bits() -> None:
    """Oracle: bitwise equality of two fits; the callers' global generator plays no part."""
    pefs, _ = planted_pefs()
    torch.manual_seed(1)
    first = NPEFF(4, n_restarts=3, seed=5).fit(pefs)
    torch.manual_seed(2)
    second = NPEFF(4, n_restarts=3, seed=5).fit(pefs)
    assert torch.equal(first.coefficients, second.coefficients)
    assert torch.equal(first.pseudo_fishers, second.pseudo_fishers)
    assert first.loss_history == second.loss_history


def test_transform_of_the_training_pefs_reproduces_the_coefficients() -> None:
    """Oracle: the coefficients of the fit, and NNLS of the dense problem; for shards as for one tensor."""
    pefs, _ = planted_pefs(n=40)
    model = NPEFF(4, n_restarts=2)
    found = model.fit(pefs)
    assert torch.equal(model.transform(pefs), found.coefficients)
    torch.testing.assert_close(found.transform(PEFs.concatenate([pefs[:7], pefs[7:]])), found.coefficients)
    expected = reference.nnls_coefficients(pefs.factors, found.pseudo_fishers)
    torch.testing.assert_close(found.coefficients.double(), expected, atol=1e-5, rtol=1e-4)
    assert found.transform(pefs[:0]).shape == (0, 4)


def test_the_best_restart_is_kept() -> None:
    """Oracle: every restart's last loss as the callback saw it."""
    pefs, _ = planted_pefs(noise=1.0)
    last: dict[int, float] = {}
    found = NPEFF(5, n_restarts=6, callbacks=[lambda i, _, loss: last.__setitem__(i, loss)]).fit(pefs)
    assert set(last) == set(range(6))
    assert found.loss_history[-1] <= min(last.values()) + 1e-6


def test_stability_tells_a_component_that_every_restart_finds() -> None:
    """Oracle: a hand-made set of fits; the mean of the best |cosine| over fits of near-equal loss."""
    eye = torch.eye(4)
    W = torch.ones(3, 2)
    best = estimator.Fit(W, eye[:2], [0.1], True)
    same = estimator.Fit(W, torch.stack([-eye[1], eye[2]]), [0.105], True)
    far = estimator.Fit(W, eye[2:], [0.9], True)
    torch.testing.assert_close(estimator._stability(best, [same, far]), torch.tensor([0.0, 1.0]))
    assert estimator._stability(best, []).isnan().all()


def test_one_restart_has_no_stability() -> None:
    """Oracle: NaN is what the documentation says."""
    pefs, _ = planted_pefs()
    assert NPEFF(3, n_restarts=1).fit(pefs).stability.isnan().all()


def test_expand_never_worsens_the_loss_and_keeps_what_was_fixed() -> None:
    """Oracle: the dense loss before and after; with joint=False the old rows to the bit, in their order, with names."""
    pefs, _ = planted_pefs(noise=0.1)
    for joint in (False, True):
        model = NPEFF(3, n_restarts=4)
        old = model.fit(pefs)
        old.rename(1, "kept")
        before = relative_loss(pefs, old.coefficients, old.pseudo_fishers)
        new = model.expand(pefs, 2, joint=joint)
        assert len(new) == 5
        assert relative_loss(pefs, new.coefficients, new.pseudo_fishers) < before
        assert new.config.n_components == 5
        assert new.names == {1: "kept"}
        torch.testing.assert_close(new.pseudo_fishers.norm(dim=1), torch.ones(5))
        if not joint:
            assert torch.equal(new.pseudo_fishers[:3], old.pseudo_fishers)
        assert len(new.stability) == 5
        assert model.decomposition_ is new


def test_expand_passes_over_zero_pefs_and_takes_more_than_there_are_examples() -> None:
    """Oracle: unit rows and a loss that does not rise."""
    A = planted_pefs(n=6)[0].factors.clone()
    A[2:] = 0
    pefs = PEFs.from_factors(A)
    model = NPEFF(2, n_restarts=1)
    old = model.fit(pefs)
    new = model.expand(pefs, 5)
    torch.testing.assert_close(new.pseudo_fishers.norm(dim=1), torch.ones(7))
    assert new.loss_history[-1] <= old.loss_history[-1] + 1e-6


def test_refit_goes_on_from_the_last_components_which_keep_their_numbers() -> None:
    """Oracle: planted truth in two halves of the examples; `transform` where nothing moves; the dense loss."""
    pefs, _ = planted_pefs()
    model = NPEFF(5, n_restarts=5)
    old = model.fit(pefs[:60])
    old.rename(2, "a name")
    other = pefs[60:]
    still = model.refit(other, move=False)
    assert torch.equal(still.pseudo_fishers, old.pseudo_fishers)
    assert torch.equal(still.coefficients, old.transform(other))
    assert still.names == {2: "a name"} and torch.equal(still.stability, old.stability)
    assert still.explained == pytest.approx(
        1 - relative_loss(other, still.coefficients, still.pseudo_fishers), abs=1e-5
    )
    moved = model.refit(other)
    assert moved.explained > still.explained + 1e-4
    assert float((moved.pseudo_fishers * old.pseudo_fishers).sum(1).abs().min()) > 0.9
    assert moved.names == {2: "a name"} and model.decomposition_ is moved
    with pytest.raises(ValueError, match="fit"):
        NPEFF(5).refit(pefs)
    with pytest.raises(ValueError, match="zero"):
        model.refit(PEFs.from_factors(torch.zeros(4, 3, 24)))
    with pytest.raises(IncompatibleSketchError):
        model.refit(PEFs.from_factors(torch.rand(4, 3, 23)))


def test_gram_space_is_used_where_rows_are_long_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the direct iteration from the same seeds: loss to 1e-5, |cosine| above 0.999."""
    pefs, _ = planted_pefs(n=30, d=300)
    inside = NPEFF(4, n_restarts=3, tolerance=0, max_iterations=150).fit(pefs)
    monkeypatch.setattr(estimator, "GRAM_LIMIT", 0)
    monkeypatch.setattr(estimator, "gram_space", None)
    direct = NPEFF(4, n_restarts=3, tolerance=0, max_iterations=150).fit(pefs)
    assert abs(inside.loss_history[-1] - direct.loss_history[-1]) < 1e-5
    cosines = (inside.pseudo_fishers * direct.pseudo_fishers).sum(1).abs()
    assert (cosines > 0.999).all()


def test_chunks_within_a_memory_budget_give_the_same_result(tmp_path: Path) -> None:
    """Oracle: the fit in memory; rows come from two shards on disk, which are never joined."""
    pefs, _ = planted_pefs()
    PEFs.concatenate([pefs[:50], pefs[50:]]).save(tmp_path / "p")
    stored = PEFs.load(tmp_path / "p")
    whole = NPEFF(4, n_restarts=2).fit(pefs)
    chunked = NPEFF(4, n_restarts=2, memory_budget=pefs.nbytes // 5).fit(stored)
    assert "factors" not in stored._shards.joined
    assert abs(whole.loss_history[-1] - chunked.loss_history[-1]) < 1e-5
    assert ((whole.pseudo_fishers * chunked.pseudo_fishers).sum(1).abs() > 0.999).all()


def test_validation_stops_a_start_that_no_longer_explains_held_out_pefs() -> None:
    """Oracle: the held-out loss, computed densely: no worse than that of a fit that went on; fewer iterations."""
    pefs, _ = planted_pefs(n=30, noise=2.0, r=8)
    held_out = planted_pefs(n=60, noise=2.0, r=8, seed=1)[0]
    seen: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"n_restarts": 1, "max_iterations": 95, "tolerance": 0}
    stopped = NPEFF(8, callbacks=[lambda i, n, _: seen.append((i, n))], **settings).fit(pefs, held_out)
    went_on = NPEFF(8, **settings).fit(pefs)
    assert [n for _, n in seen] == list(range(len(seen)))
    assert len(seen) <= 95
    losses = [relative_loss(held_out, d.transform(held_out), d.pseudo_fishers) for d in (stopped, went_on)]
    assert losses[0] <= losses[1] + 1e-6


def test_the_iteration_limit_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the log; a fit that converges says nothing."""
    pefs, _ = planted_pefs()
    NPEFF(3, n_restarts=1, max_iterations=2, tolerance=0).fit(pefs)
    (warning,) = warned_by(caplog, "decomposition.estimator")
    assert warning.args == (2, 0)
    caplog.clear()
    NPEFF(3, n_restarts=1, tolerance=1e-3).fit(pefs)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_callback_may_stop_a_start() -> None:
    """Oracle: the iterations it saw."""
    pefs, _ = planted_pefs()
    seen: list[tuple[int, int]] = []
    NPEFF(3, n_restarts=2, callbacks=[lambda i, n, _: seen.append((i, n)) or n == 2]).fit(pefs)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_balanced_modules_have_equal_mean_norms() -> None:
    """Oracle: the dense blocks of the balanced, unscaled rows of a tiny model; W is that of the balanced problem."""
    model = tiny_model("bert")
    config = FisherConfig(sketch="identity", storage_dtype="float64", target_modules=["query"])
    pefs = NPEFFAnalyzer(model, fisher=config).compute_pefs(tiny_batch(model, 12, seed=1))
    found = NPEFF(3, balance="module", n_restarts=2).fit(pefs)
    assert found.scales is not None
    blocks = pefs.sketch().blocks
    assert blocks is not None
    A = pefs.factors * pefs.norms.sqrt()[:, None, None] * found.scales.double()
    norms = torch.stack([torch.stack([(a[:, b] @ a[:, b].T).norm() for a in A]).mean() for b in blocks.values()])
    torch.testing.assert_close(norms / norms.mean(), torch.ones(len(blocks)).double(), rtol=1e-5, atol=0)
    unit = PEFs.from_factors(A)
    expected = reference.nnls_coefficients(unit.factors, found.pseudo_fishers)
    torch.testing.assert_close(found.coefficients.double(), expected, atol=1e-4, rtol=1e-3)


def test_the_reference_solver_can_be_asked_for() -> None:
    """Oracle: planted truth."""
    pefs, truth = planted_pefs(noise=0.1)
    found = NPEFF(5, solver="reference", learning_rate=5e-3, n_restarts=5, max_iterations=400).fit(pefs)
    assert recovered(found.pseudo_fishers, truth) >= 4
    assert found.config.solver == "reference"


def test_a_config_makes_the_same_estimator() -> None:
    """Oracle: the config."""
    config = DecompositionConfig(n_components=3, balance="none", n_restarts=2, seed=4, tolerance=1e-4)
    assert NPEFF.from_config(config).config == config


def test_misuse_is_refused_before_work_starts() -> None:
    """Oracle: the documented errors; the callback is never called."""
    pefs, _ = planted_pefs(n=4)

    def never(*_: Any) -> None:
        raise AssertionError("work started")

    with pytest.raises(ValueError, match=r"n_components=13.*12"):
        NPEFF(13, callbacks=[never]).fit(pefs)
    with pytest.raises(ValueError, match="zero"):
        NPEFF(2, callbacks=[never]).fit(PEFs.from_factors(torch.zeros(3, 2, 4)))
    with pytest.raises(ValueError, match="balance='none'"):
        NPEFF(2, balance="module", callbacks=[never]).fit(pefs)
    other = PEFs.from_factors(torch.ones(3, 2, 7))
    with pytest.raises(IncompatibleSketchError):
        NPEFF(2, callbacks=[never]).fit(pefs, other)
    with pytest.raises(ValueError, match="block_power"):
        NPEFF(2, solver="reference", callbacks=[never]).fit(pefs, pefs)
    with pytest.raises(ValueError, match="memory_budget"):
        NPEFF(2, solver="reference", memory_budget=10, callbacks=[never]).fit(pefs)
    for unfitted in (lambda: NPEFF(2).transform(pefs), lambda: NPEFF(2).expand(pefs, 1)):
        with pytest.raises(ValueError, match="fit"):
            unfitted()
    fitted = NPEFF(2, n_restarts=1)
    fitted.fit(pefs)
    for n_new in (0, 11):
        with pytest.raises(ValueError, match=r"n_new.*10"):
            fitted.expand(pefs, n_new)
    for call in (lambda: fitted.transform(other), lambda: fitted.expand(other, 1)):
        with pytest.raises(IncompatibleSketchError):
            call()


def test_bfloat16_products_end_near_the_loss_of_float32_ones() -> None:
    """Oracle: the dense loss of what was found, against the fit in float32, in memory and in chunks."""
    pefs, truth = planted_pefs(n=200, d=32)
    exact = NPEFF(5, n_restarts=3).fit(pefs)
    for budget in (None, 50 * 3 * 32 * 4):
        found = NPEFF(5, n_restarts=3, precision="bfloat16", memory_budget=budget).fit(pefs)
        loss = relative_loss(pefs, found.coefficients, found.pseudo_fishers)
        assert found.explained == pytest.approx(1 - loss, abs=1e-5)  # reported in float32, whatever the products were
        assert loss <= relative_loss(pefs, exact.coefficients, exact.pseudo_fishers) * 1.01
        assert recovered(found.pseudo_fishers, truth, 0.95) == 5


def test_a_device_is_used_and_what_it_cannot_do_is_refused() -> None:
    """Oracle: bitwise equality with the default; TF32 is a format of CUDA devices."""
    pefs, _ = planted_pefs()
    there = NPEFF(4, n_restarts=2, device="cpu").fit(pefs)
    assert torch.equal(there.coefficients, NPEFF(4, n_restarts=2).fit(pefs).coefficients)
    with pytest.raises(ValueError, match="precision='tf32'"):
        NPEFF(4, precision="tf32").fit(pefs)
    with pytest.raises(ValueError, match="precision='bfloat16'"):
        NPEFF(4, precision="bfloat16", solver="reference")
