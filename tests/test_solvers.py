"""block_power and the reference, against dense oracles and planted truth."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_npeff.decomposition import solvers
from hf_npeff.decomposition.chunks import ChunkedRows
from hf_npeff.decomposition.objective import alignments, coordinate_descent, energies, overlaps
from hf_npeff.decomposition.solvers import (
    DenseRows,
    block_power,
    gram_space,
    top_directions,
)  # fmt: skip
from hf_npeff.decomposition.solvers import (
    reference as paper,
)
from hf_npeff.decomposition.starts import solve, start_from_examples, start_from_surplus
from hf_npeff.pefs.store import PEFs
from tests import reference
from tests.planted import planted, recovered


def rows_of(overlap: float = 0.3, noise: float = 0.5, **changes: int) -> tuple[Tensor, Tensor]:
    sizes = {"n": 300, "c": 3, "d": 24, "r": 8, "active": 2, "seed": 0, **changes}
    A, truth, _ = planted(overlap=overlap, noise=noise, **sizes)  # type: ignore[arg-type]
    return A, truth


def start(A: Tensor, r: int, seed: int = 0) -> Tensor:
    return start_from_examples(DenseRows(A), r, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("noise", "overlap"), [(0.0, 0.0), (1.0, 0.3), (0.3, 0.8)])
@pytest.mark.parametrize("random_start", [False, True])
def test_the_loss_never_rises(dtype: torch.dtype, noise: float, overlap: float, random_start: bool) -> None:
    """Oracle: the invariant, over every iteration, and the dense loss at the end; W ≥ 0, rows of G of unit norm."""
    A = rows_of(overlap, noise, n=60)[0].to(dtype)
    G = start(A, 8)
    if random_start:
        noise_start = torch.randn(G.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        G = torch.nn.functional.normalize(noise_start, dim=1)
    fit = block_power(DenseRows(A), G, max_iterations=80, tolerance=0)
    assert all(b <= a for a, b in itertools.pairwise(fit.losses))
    assert (fit.W >= 0).all()
    torch.testing.assert_close(fit.G.norm(dim=1), torch.ones(8, dtype=dtype))
    dense = reference.loss(A, fit.W, fit.G) / reference.total(A)
    assert fit.losses[-1] == pytest.approx(dense, abs=1e-5 if dtype == torch.float32 else 1e-9)


def test_the_same_seed_gives_the_same_result() -> None:
    """Oracle: bitwise equality; another seed starts elsewhere."""
    A, _ = rows_of()
    fits = [block_power(DenseRows(A), start(A, 8, seed), max_iterations=30, tolerance=0) for seed in (3, 3, 4)]
    assert torch.equal(fits[0].G, fits[1].G)
    assert torch.equal(fits[0].W, fits[1].W)
    assert fits[0].losses == fits[1].losses
    assert not torch.equal(start(A, 8, 3), start(A, 8, 4))


def test_a_planted_problem_is_solved() -> None:
    """Oracle: planted truth; without noise all directions are found and nothing is left unexplained."""
    A, truth = rows_of(0.0, 0.0)
    fits = [block_power(DenseRows(A), start(A, 8, seed), max_iterations=300, tolerance=1e-8) for seed in range(5)]
    best = min(fits, key=lambda fit: fit.losses[-1])
    assert recovered(best.G, truth, 0.99) == 8
    assert best.losses[-1] < 1e-3


def test_it_ends_no_worse_than_the_reference_at_its_best_learning_rate() -> None:
    """Oracle: the paper's algorithm with five learning rates on one noisy, overlapping planted problem."""
    A, truth = rows_of(0.3, 1.0, n=300, c=4, d=48, r=10, active=3)
    ours = block_power(DenseRows(A), start(A, 10), max_iterations=300, tolerance=1e-6)
    losses = []
    for rate in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3):
        try:
            generator = torch.Generator().manual_seed(0)
            fit = paper(DenseRows(A), 10, generator, learning_rate=rate, max_iterations=300, tolerance=1e-6)
        except FloatingPointError:
            continue
        losses.append(fit.losses[-1])
    assert len(losses) >= 3
    assert ours.losses[-1] <= min(losses) * (1 + 1e-4)
    assert recovered(ours.G, truth) >= 9


def test_a_fixed_point_of_exact_coordinate_descent_is_kept() -> None:
    """Oracle: the dense solver's end, from NNLS and dense eigenproblems: block_power does not leave it."""
    A = rows_of(n=20, d=8, r=3, seed=2)[0].double()
    W, G, losses = reference.dense_fit(A, start(A, 3), 60)
    fit = block_power(DenseRows(A), G, W=W, max_iterations=20, tolerance=0)
    total = reference.total(A)
    assert fit.losses[-1] <= losses[-1] / total + 1e-12
    assert ((fit.G * G).sum(1).abs() > 0.99).all()


def test_rows_that_are_fixed_stay_as_they_are() -> None:
    """Oracle: bitwise equality of the fixed rows; the others move and the loss falls."""
    A, _ = rows_of()
    G = start(A, 8)
    fit = block_power(DenseRows(A), G, fixed=5, max_iterations=20, tolerance=0)
    assert torch.equal(fit.G[:5], G[:5])
    assert not torch.equal(fit.G[5:], G[5:])
    assert fit.losses[-1] < fit.losses[0]


def test_a_start_may_be_stopped_and_stops_when_nothing_improves() -> None:
    """Oracle: the number of iterations reported."""
    A, _ = rows_of()
    calls: list[int] = []
    fit = block_power(
        DenseRows(A), start(A, 8), max_iterations=50, tolerance=0, progress=lambda i, _: calls.append(i) or i == 3
    )
    assert calls == [0, 1, 2, 3]
    assert len(fit.losses) == 5
    early = block_power(DenseRows(A), start(A, 8), max_iterations=500, tolerance=1e-3)
    assert early.converged
    assert len(early.losses) < 200
    assert not block_power(DenseRows(A), start(A, 8), max_iterations=2, tolerance=0).converged


def test_dead_components_are_revived_from_real_examples_even_among_zero_pefs() -> None:
    """Oracle: planted truth. Two starting rows lie outside the data's span; a third of the PEFs are zero."""
    A, truth = rows_of(0.0, 0.0, r=4, active=1)
    A = torch.cat([A, torch.zeros(3, len(A), A.shape[2]).permute(1, 0, 2)], 2)  # 24 columns that no row uses
    A[::3] = 0
    G = torch.zeros(4, A.shape[2])
    G[:2, : truth.shape[1]] = truth[:2].float()
    G[2, -1] = G[3, -2] = 1
    fit = block_power(DenseRows(A), G, max_iterations=200, tolerance=1e-9)
    assert recovered(fit.G[:, : truth.shape[1]], truth, 0.99) == 4
    assert all(b <= a for a, b in itertools.pairwise(fit.losses))


def test_starts_are_unit_rows_even_with_zero_pefs_and_more_rows_than_examples() -> None:
    """Oracle: norms."""
    A, _ = rows_of(n=5)
    A[0] = 0
    G = start(A, 12)
    torch.testing.assert_close(G.norm(dim=1), torch.ones(12))


def test_a_surplus_start_leaves_no_planted_direction_out() -> None:
    """Oracle: planted truth, 24 directions, from each of eight seeds; from two of them a direct start misses one."""
    A, truth = rows_of(0.0, 0.5, n=400, d=64, r=24)
    for seed in range(8):
        rows = DenseRows(A)
        G, W = start_from_surplus(rows, 24, torch.Generator().manual_seed(seed))
        assert G.shape == (24, 64)
        assert W is not None and W.shape == (400, 24)
        fit = block_power(rows, G, W=W, max_iterations=300, tolerance=1e-5)
        assert recovered(fit.G, truth) == 24


def test_a_surplus_start_needs_examples_for_it() -> None:
    """Oracle: identity. With no more examples than components it is the direct start."""
    A, _ = rows_of(n=8)
    G, W = start_from_surplus(DenseRows(A), 8, torch.Generator().manual_seed(0))
    assert W is None
    assert torch.equal(G, start(A, 8))


@pytest.mark.parametrize("overlap", [0.0, 0.6])
def test_a_whole_start_through_the_subspace_finds_planted_directions_and_its_loss_never_rises(overlap: float) -> None:
    """Oracle: planted truth in four times as many dimensions as the subspace; the dense loss of what is returned."""
    A, truth = rows_of(overlap, 0.5, n=300, c=4, d=256, r=12)
    heard: list[tuple[int, float]] = []
    fit = solve(
        DenseRows(A), 12, torch.Generator().manual_seed(0), max_iterations=300, tolerance=1e-6,
        progress=lambda i, loss: bool(heard.append((i, loss))),
    )  # fmt: skip
    assert recovered(fit.G, truth) == 12
    assert fit.losses[-1] == pytest.approx(reference.loss(A, fit.W, fit.G) / reference.total(A), abs=1e-5)
    assert all(b <= a for a, b in itertools.pairwise(fit.losses))
    assert [i for i, _ in heard] == list(range(len(heard)))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(loss for _, loss in heard))


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_whole_start_keeps_to_its_limit_and_can_be_stopped_in_either_part(limit: int) -> None:
    """Oracle: the number of iterations; dimensions and dense loss of what is returned."""
    A, _ = rows_of(0.6, 1.0, n=300, c=4, d=256, r=12)
    settings: dict[str, Any] = {"max_iterations": limit, "tolerance": 0.0}
    limited = solve(DenseRows(A), 12, torch.Generator().manual_seed(0), **settings)
    calls: list[int] = []
    settings = {"max_iterations": 50, "tolerance": 0.0}
    stopped = solve(
        DenseRows(A), 12, torch.Generator().manual_seed(0), **settings,
        progress=lambda i, _: calls.append(i) or i == limit - 1,
    )  # fmt: skip
    assert calls == list(range(limit))
    assert len(limited.losses) == len(stopped.losses) == limit + 1
    assert (limited.converged, stopped.converged) == (False, True)
    for fit in (limited, stopped):
        assert fit.G.shape == (12, 256)
        assert fit.losses[-1] == pytest.approx(reference.loss(A, fit.W, fit.G) / reference.total(A), abs=1e-5)


def test_the_loss_in_a_subspace_is_that_of_the_whole_rows() -> None:
    """Oracle: the dense loss of the lifted components."""
    A, _ = rows_of(n=40, d=60, r=5)
    Q = torch.linalg.qr(torch.randn(60, 20, generator=torch.Generator().manual_seed(0)))[0].T
    rows = DenseRows(A).within(Q)
    fit = block_power(
        rows, start_from_examples(rows, 5, torch.Generator().manual_seed(0)), max_iterations=5, tolerance=0
    )
    assert (rows.n, rows.dim) == (40, 20)
    assert fit.losses[-1] == pytest.approx(reference.loss(A, fit.W, fit.G @ Q) / reference.total(A), abs=1e-5)


@pytest.mark.parametrize("budget", [3, 30])
def test_chunks_give_the_same_subspace_in_memory_or_from_the_store(budget: int) -> None:
    """Oracle: rows held whole; chunks of 3 examples leave no room for coordinates, chunks of 30 do."""
    A, _ = rows_of(n=40, c=3, d=60, r=5)
    pefs = PEFs.from_factors(A)
    chunked = ChunkedRows(pefs, lambda part: part.factors, budget)
    G = start(A, 20)
    Q = torch.linalg.qr(G.T)[0].T
    whole, inside = DenseRows(pefs.factors).within(Q), chunked.within(Q)
    assert isinstance(inside, DenseRows if budget == 30 else ChunkedRows)
    assert (inside.n, inside.dim) == (40, 20)
    G = torch.nn.functional.normalize(torch.randn(4, 20, generator=torch.Generator().manual_seed(0)), dim=1)
    N = whole.energies(G)
    torch.testing.assert_close(inside.energies(G), N)
    torch.testing.assert_close(inside.pull(G, N), whole.pull(G, N))
    torch.testing.assert_close(inside.total(), whole.total())
    torch.testing.assert_close(inside.top_directions([3]).abs(), whole.top_directions([3]).abs(), atol=1e-5, rtol=1e-4)


def test_one_step_is_that_of_alternating_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: numpy's least squares for h_j in Σ_j W_ij g_j h_jᵀ ≈ F_i, every F_i dense, W as after the first sweep."""
    monkeypatch.setattr(solvers, "_DAMPING", 0.0)
    A = rows_of(0.6, 0.2, n=30, d=8, r=3, seed=1)[0].double()
    G = start(A, 3)
    first = block_power(DenseRows(A), G, max_iterations=0, tolerance=0)
    W = coordinate_descent(first.W, energies(alignments(A, G)), overlaps(G), 1)
    design = torch.einsum("ij,ja->iaj", W, G).reshape(-1, 3)
    solution = np.linalg.lstsq(design.numpy(), (A.mT @ A).reshape(-1, 8).numpy(), rcond=None)[0]
    fit = block_power(DenseRows(A), G, W=first.W, max_iterations=1, tolerance=0)
    assert fit.losses[1] < fit.losses[0]
    torch.testing.assert_close(
        fit.G, torch.nn.functional.normalize(torch.from_numpy(solution), dim=1), atol=1e-6, rtol=0
    )


def test_top_directions_are_the_top_eigenvectors() -> None:
    """Oracle: eigh of the dense F_i; up to sign."""
    A = rows_of(n=10)[0].double()
    for g, a in zip(top_directions(A), A, strict=True):
        assert abs(float(g @ reference.top_eigenvector(a.T @ a))) == pytest.approx(1, abs=1e-9)


def test_the_reference_takes_the_papers_steps() -> None:
    """Oracle: the dense multiplicative update and gradient step, one joint step after the warm-up."""
    A = rows_of(n=12, d=8, r=3)[0].double()
    rate, states = 1e-3, []
    for iterations in (0, 1):
        generator = torch.Generator().manual_seed(7)
        fit = paper(DenseRows(A), 3, generator, learning_rate=rate, max_iterations=iterations, tolerance=0)
        states.append((fit.W, fit.G, fit.losses))
    generator = torch.Generator().manual_seed(7)
    W = torch.rand(12, 3, generator=generator).double()
    G = (torch.randn(3, 8, generator=generator) * (2 / 24) ** 0.5).double()
    for _ in range(10):
        G = G - rate * reference.gradient_G(A, W, G)
    W1, G1 = reference.reference_step(A, W, G, rate)
    for (w, g, losses), (expected_W, expected_G) in zip(states, ((W, G), (W1, G1)), strict=True):
        norms = expected_G.norm(dim=1)
        torch.testing.assert_close(g, expected_G / norms[:, None], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(w, expected_W * norms.square(), atol=1e-9, rtol=1e-9)
        loss = reference.loss(A, expected_W, expected_G) / reference.total(A)
        assert losses[-1] == pytest.approx(loss, rel=1e-9)


def test_the_reference_says_when_its_learning_rate_is_too_high() -> None:
    """Oracle: the documented error, which names the rate."""
    A, _ = rows_of()
    with pytest.raises(FloatingPointError, match="learning_rate=10"):
        paper(DenseRows(A), 8, torch.Generator(), learning_rate=10, max_iterations=100, tolerance=0)


def test_gram_space_and_direct_iteration_agree_from_the_same_start() -> None:
    """Oracle: the direct iteration. Relative loss to 1e-5, |cosine| of every component above 0.999; n·c < d."""
    A, _ = rows_of(n=40, c=3, d=400, r=6)
    X, to_rows = gram_space(A)
    assert X.shape[2] <= 120
    torch.testing.assert_close(
        X.flatten(0, 1) @ X.flatten(0, 1).T, A.flatten(0, 1) @ A.flatten(0, 1).T, atol=1e-5, rtol=0
    )
    indices = [0, 7, 13, 21, 30, 39]
    direct = block_power(DenseRows(A), top_directions(A[indices]), max_iterations=150, tolerance=0)
    signs = torch.ones(6)
    inside = block_power(DenseRows(X), top_directions(X[indices]), max_iterations=150, tolerance=0)
    assert abs(direct.losses[-1] - inside.losses[-1]) < 1e-5
    G = to_rows(inside.G)
    torch.testing.assert_close(G.norm(dim=1), signs)
    assert ((G * direct.G).sum(1).abs() > 0.999).all()
    dense = reference.loss(A, inside.W, G) / reference.total(A)
    assert dense == pytest.approx(inside.losses[-1], abs=1e-5)


def test_gram_space_drops_repeated_rows() -> None:
    """Oracle: the rank of the rows."""
    A, _ = rows_of(n=10, c=3, d=60)
    X, _ = gram_space(torch.cat([A, A]))
    assert X.shape[2] <= 30
