"""Compressed sensing, the paper's method to get from the sketch to the weights: the sparse x with Px ≈ g."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_npeff.pefs.sketches import Sketch

_Operator = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def sparse_preimage(sketch: Sketch, g: Tensor, solver: str) -> dict[str, Tensor]:
    """The sparse direction whose sketch is g (d,): {parameter: matrix}.

    Args:
        sketch: the sketch P.
        g: the sketch that the direction should have.
        solver: "iht", with d/8 nonzero entries, or "fista".
    """
    operator, unflatten = flat_operator(sketch)
    p = sum(a * b for a, b in sketch.shapes.values())
    if solver == "fista":
        return unflatten(fista(operator, g, p))
    # d/8 nonzero entries: d numbers determine k of p if d ≳ 2k log(p/k). Chosen: 30 rounds, which bound the time.
    return unflatten(iterative_hard_thresholding(operator, g, p, max(1, min(p, sketch.dim // 8)), iterations=30))


def flat_operator(
    sketch: Sketch, dtype: torch.dtype = torch.float32
) -> tuple[_Operator, Callable[[Tensor], dict[str, Tensor]]]:
    """A sketch as functions of one flat vector of p numbers, and a function from it to {parameter: matrix}."""
    sizes = [a * b for a, b in sketch.shapes.values()]

    def unflatten(x: Tensor) -> dict[str, Tensor]:
        parts = torch.split(x, sizes)
        return {n: v.reshape(s) for (n, s), v in zip(sketch.shapes.items(), parts, strict=True)}

    def apply(x: Tensor) -> Tensor:
        return sketch.apply({n: v[None] for n, v in unflatten(x).items()})[0]

    def adjoint(y: Tensor) -> Tensor:
        return torch.cat([v.flatten() for v in sketch.adjoint(y.to(dtype)).values()])

    return (apply, adjoint), unflatten


def _operator_norm(operator: _Operator, p: int, rounds: int = 12) -> float:
    """‖P‖² by power iteration."""
    apply, adjoint = operator
    x = torch.randn(p, generator=torch.Generator().manual_seed(0))
    value = 1.0
    for _ in range(rounds):
        x = adjoint(apply(x / x.norm()))
        value = float(x.norm())
    return value


def iterative_hard_thresholding(operator: _Operator, y: Tensor, p: int, nonzero: int, iterations: int = 100) -> Tensor:
    """The `nonzero`-sparse x with Px ≈ y: normalised iterative hard thresholding (Blumensath & Davies 2010).

    The step is the exact line search on the current support, halved while it would overshoot.

    Args:
        operator: P and its adjoint.
        y: (d,).
        p: the number of unknowns.
        nonzero: the number of entries that x keeps.
        iterations: the most iterations.

    Raises:
        ValueError: if `nonzero` is not between 1 and p.
    """
    if not 1 <= nonzero <= p:
        raise ValueError(f"nonzero must be between 1 and {p}, but it is {nonzero}")
    apply, adjoint = operator
    x = torch.zeros(p, dtype=y.dtype)
    support = torch.topk(adjoint(y).abs(), nonzero).indices
    residual = y.clone()
    for _ in range(iterations):
        gradient = adjoint(residual).to(y.dtype)
        on_support = torch.zeros_like(gradient)
        on_support[support] = gradient[support]
        image = apply(on_support)
        step = float(on_support.square().sum() / image.square().sum().clamp_min(1e-30))  # no division by 0 where g is 0
        for _ in range(20):  # halvings: a millionth of the first step
            moved = x + step * gradient
            new_support = torch.topk(moved.abs(), nonzero).indices
            new = torch.zeros_like(x)
            new[new_support] = moved[new_support]
            change = new - x
            bound = float(change.square().sum() / apply(change).square().sum().clamp_min(1e-30))
            # Blumensath & Davies 2010, c = 0.01
            if step <= 0.99 * bound or set(new_support.tolist()) == set(support.tolist()):
                break
            step /= 2
        done = float((new - x).norm()) <= 1e-7 * float(x.norm().clamp_min(1e-30))  # float32's rounding
        x, support = new, new_support
        residual = y - apply(x)
        if done:
            break
    return x


def fista(operator: _Operator, y: Tensor, p: int, penalty: float | None = None, iterations: int = 200) -> Tensor:
    """The x that minimises ½‖Px − y‖² + λ‖x‖₁ by FISTA (Beck & Teboulle 2009).

    Args:
        operator: P and its adjoint.
        y: (d,).
        p: the number of unknowns.
        penalty: λ; None uses a hundredth of the smallest λ for which x is 0.
        iterations: the number of steps.
    """
    apply, adjoint = operator
    smoothness = _operator_norm(operator, p) * 1.02  # power iteration comes from below
    start = adjoint(y).to(y.dtype)
    # Usual for the lasso: a hundredth of the penalty that gives 0
    λ = float(start.abs().max()) / 100 if penalty is None else penalty
    x = z = torch.zeros(p, dtype=y.dtype)
    t = 1.0
    for _ in range(iterations):
        moved = z - adjoint(apply(z) - y).to(y.dtype) / smoothness
        new = torch.nn.functional.softshrink(moved, λ / smoothness)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z = new + (t - 1) / t_new * (new - x)
        x, t = new, t_new
    return x
