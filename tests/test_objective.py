"""The loss and its pieces against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_npeff.decomposition import objective as o
from tests import reference


def problem(n: int = 7, c: int = 3, d: int = 5, r: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, c, d, generator=generator, dtype=torch.float64)
    W = torch.rand(n, r, generator=generator, dtype=torch.float64)
    return A, W, torch.randn(r, d, generator=generator, dtype=torch.float64)


def test_the_loss_is_the_squared_distance_of_dense_matrices() -> None:
    """Oracle: Σ_i ‖F_i − Σ_j W_ij g_j g_jᵀ‖² with every d×d matrix formed; G not of unit norm."""
    A, W, G = problem()
    N, H = o.energies(o.alignments(A, G)), o.overlaps(G)
    assert float(o.total_energy(A)) == pytest.approx(reference.total(A), rel=1e-12)
    assert float(o.loss_of(o.total_energy(A), W, N, H)) == pytest.approx(reference.loss(A, W, G), rel=1e-12)


def test_the_pull_gives_the_gradient_of_the_directions() -> None:
    """Oracle: the dense ∂L/∂G = 4[((WᵀW)∘(GGᵀ))G − C], and autograd of the loss."""
    A, W, G = problem()
    C = o.pull(A, o.alignments(A, G), W)
    gradient = 4 * (((W.T @ W) * (G @ G.T)) @ G - C)
    torch.testing.assert_close(gradient, reference.gradient_G(A, W, G), atol=1e-9, rtol=1e-9)
    G.requires_grad_()
    o.loss_of(o.total_energy(A), W, o.energies(o.alignments(A, G)), o.overlaps(G)).backward()
    assert G.grad is not None
    torch.testing.assert_close(G.grad, gradient, atol=1e-9, rtol=1e-9)


def test_the_loss_is_summed_in_float64() -> None:
    """Oracle: float64 sums of the same float32 pieces, of a nearly perfect fit; sums in float32 are 2e-7 off."""
    A, W, G = problem(n=200)
    G = torch.nn.functional.normalize(G, dim=1)
    A = W.sqrt()[:, :, None] * G  # F_i is exactly Σ_j W_ij g_j g_jᵀ
    total = o.total_energy(A)
    W = W * (1 + 1e-3)
    A32, W32, G32 = A.float(), W.float(), G.float()
    pieces = o.total_energy(A32), W32, o.energies(o.alignments(A32, G32)), o.overlaps(G32)
    loss = o.loss_of(*pieces)
    whole, weights, N, H = (piece.double() for piece in pieces)
    exact = float(whole - 2 * (weights * N).sum() + ((weights.T @ weights) * H).sum())
    assert loss.dtype == torch.float64
    assert abs(float(loss) - exact) / float(total) < 1e-7


def test_coefficients_are_the_nonnegative_least_squares() -> None:
    """Oracle: scipy's active-set method on the vectorised matrices; overlapping and repeated directions."""
    A, _, G = problem(n=20, r=6)
    G = torch.nn.functional.normalize(G, dim=1)
    W = o.nonnegative_coefficients(o.energies(o.alignments(A, G)), o.overlaps(G))
    expected = reference.nnls_coefficients(A, G)
    torch.testing.assert_close(W, expected, atol=1e-6, rtol=1e-6)
    assert (W >= 0).all()
    twice = torch.cat([G, G[:1]])
    W = o.nonnegative_coefficients(o.energies(o.alignments(A, twice)), o.overlaps(twice))
    assert reference.loss(A, W, twice) == pytest.approx(reference.loss(A, expected, G), rel=1e-8)


def test_a_sweep_of_coordinate_descent_never_raises_the_loss() -> None:
    """Oracle: the dense loss, from a random start."""
    A, W, G = problem(n=12, r=5)
    N, H = o.energies(o.alignments(A, G)), o.overlaps(G)
    before = reference.loss(A, W, G)
    given = W.clone()
    for _ in range(6):
        W = o.coordinate_descent(W, N, H, 1)
        after = reference.loss(A, W, G)
        assert after <= before * (1 + 1e-12)
        before = after
    assert torch.equal(given, problem(n=12, r=5)[1])  # the argument is not changed


def test_module_scales_are_mean_norms_of_the_blocks_own_fishers() -> None:
    """Oracle: the dense blocks."""
    A, _, _ = problem(d=6)
    blocks = [slice(0, 2), slice(2, 6)]
    norms = torch.arange(1.0, 8.0, dtype=torch.float64)
    for given in (None, norms):
        expected = [
            sum((a[:, b].T @ a[:, b]).norm() * (1 if given is None else norms[i]) for i, a in enumerate(A)) / len(A)
            for b in blocks
        ]
        torch.testing.assert_close(o.module_scales(A, blocks, given), torch.stack(expected))  # type: ignore[arg-type]


def test_blocks_of_columns_give_the_sweep_of_one_column_after_the_other() -> None:
    """Oracle: the textbook update, every column against the whole residual; more columns than a block holds."""
    generator = torch.Generator().manual_seed(0)
    N = torch.rand(30, 50, generator=generator, dtype=torch.float64)
    G = torch.nn.functional.normalize(torch.randn(50, 20, generator=generator, dtype=torch.float64), dim=1)
    H = (G @ G.T).square()
    W = torch.rand(30, 50, generator=generator, dtype=torch.float64)
    expected = W.clone()
    for _ in range(3):
        for j in range(50):
            gradient = expected @ H[:, j] - N[:, j]
            expected[:, j] = (expected[:, j] - gradient / H[j, j]).clamp_min(0)
    before = W.clone()
    torch.testing.assert_close(o.coordinate_descent(W, N, H, 3), expected, rtol=0, atol=1e-12)
    assert torch.equal(W, before)
