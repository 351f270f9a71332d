"""Rivals of NPEFF that work on the same rows: line clustering, dictionary learning, NMF, autoencoders of gradients.

Each finds r directions and can be read in two ways, as every method here: *competing* coefficients, which add up to an
example together, and every feature *alone*, by its own inner product with the example. All work on points whose inner
products are those of the rows, so the number of parameters, or of a sketch's numbers, does not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.baselines.method import check_enough
from hf_npeff.baselines.row_directions import Mixing, combination_of, top_combination
from hf_npeff.baselines.sparse_autoencoder import SAEConfig, SparseAutoencoder
from hf_npeff.extras import load
from hf_npeff.pefs.store import PEFs

_ITERATIONS = 100
"""Passes of one start, at most. Chosen: line clustering of some hundred examples comes to rest in far fewer."""
_POWER_STEPS = 50
"""Steps towards the top eigenvector of a cluster. Chosen: with a warm start, a tenth of that is mostly enough."""
_DICTIONARY_STEPS = 200
"""Iterations of scikit-learn's alternation. Chosen: its tolerance ends most fits of some hundred examples earlier."""
_STATES = "dictionary learning"


@dataclass(frozen=True)
class Readings:
    """What a method says of n examples, read in two ways.

    Attributes:
        competing: (n, r), coefficients that make up an example together: what one feature takes, another lacks.
        alone: (n, r), every feature by itself.
        mixing: from numbers of features to their directions, as combinations of the rows that were decomposed, or None.
    """

    competing: Tensor
    alone: Tensor
    mixing: Mixing | None = None


def coordinates(gram: Tensor) -> Tensor:
    """Points (n, n) with these inner products (n, n), positive semi-definite up to rounding."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(0).sqrt()


def pef_inner_products(rows: Tensor) -> Tensor:
    """⟨F_i, F_j⟩ = ‖A_i A_jᵀ‖²_F of rows (n, c, d): (n, n)."""
    n, c, _ = rows.shape
    flat = rows.flatten(0, 1).to(torch.promote_types(rows.dtype, torch.float32))
    return (flat @ flat.T).square().reshape(n, c, n, c).sum((1, 3))


# Gradient clustering with several rows an example


def line_clusters(pefs: PEFs, r: int, *, seed: int = 0, n_restarts: int = 8) -> Readings:
    """Gradient clustering with all c rows of an example: lines μ_j that maximise Σ_ic max_j (A_ic · μ_j)².

    A row belongs to the line that takes most of it, so NPEFF's objective with every row given to one component whole.
    Competing: the squared norm of the example's rows in each cluster. Alone: ‖A_i μ_j‖².

    Args:
        pefs: n of them.
        r: the number of lines.
        seed: the seed of the starts, each from r rows drawn by their squared norm.
        n_restarts: independent starts, of which the best is kept.

    Raises:
        ValueError: if there are fewer rows that are not zero than lines.
    """
    rows = pefs.factors.flatten(0, 1).to(torch.promote_types(pefs.factors.dtype, torch.float32))
    X = coordinates(rows @ rows.T).float()
    mass = X.square().sum(1)
    check_enough(int((mass > 0).sum()), r, "the number of lines")
    best = max((_lines(X, mass, r, seed * 1009 + start) for start in range(n_restarts)), key=lambda C: _taken(X, C))
    n, c, _ = pefs.factors.shape
    inner = (X @ best.T).square()
    own = nn.functional.one_hot(inner.argmax(1), r) * mass[:, None]

    def mixing(features: Sequence[int]) -> Tensor:
        return combination_of(X, best[list(features)]).reshape(-1, n, c)

    return Readings(own.reshape(n, c, r).sum(1), inner.reshape(n, c, r).sum(1), mixing)


def _taken(X: Tensor, C: Tensor) -> float:
    return float((X @ C.T).square().amax(1).sum())


def _lines(X: Tensor, mass: Tensor, r: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    C = nn.functional.normalize(X[torch.multinomial(mass, r, generator=generator)], dim=1)
    before = torch.full((len(X),), -1)
    for _ in range(_ITERATIONS):
        taken, now = (X @ C.T).square().max(1)
        if torch.equal(now, before):
            break
        left = torch.argsort(mass - taken, descending=True)
        for j in range(r):
            part = X[now == j]
            if len(part):
                for _ in range(_POWER_STEPS):
                    C[j] = nn.functional.normalize(part.T @ (part @ C[j]), dim=0)
            else:  # an empty line starts again from the row that fits worst
                C[j], left = nn.functional.normalize(X[left[0]], dim=0), left[1:]
        before = now
    return C


# Dictionary learning and NMF


def _sparse_codes(points: Tensor, r: int, alpha: float, seed: int, positive: bool) -> tuple[Tensor, Tensor]:
    """Codes (n, r) and unit atoms (r, m) of scikit-learn's dictionary learning."""
    decomposition = load("sklearn.decomposition", _STATES)
    exceptions = load("sklearn.exceptions", _STATES)
    learner = decomposition.DictionaryLearning(
        r,
        alpha=alpha,
        max_iter=_DICTIONARY_STEPS,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        transform_alpha=alpha,
        positive_code=positive,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # of single codes; the alternation goes on
        codes = torch.from_numpy(learner.fit_transform(points.double().numpy()))
    return codes, nn.functional.normalize(torch.from_numpy(learner.components_).double(), dim=1)


def gradient_atoms(
    gradients: PEFs, r: int, *, alpha: float = 0.1, ridge: float | None = 0.1, seed: int = 0
) -> Readings:
    """Gradient Atoms (arXiv 2603.14665): dictionary learning on one whitened gradient an example.

    The published method whitens in an EK-FAC eigenspace. Here the gradients a_i are whitened by what the same examples
    tell of curvature, (Σ a aᵀ/n + λ I)^{-1/2} with λ a share of the mean eigenvalue, then brought to unit norm. An
    atom's sign is free; it is turned so that its large codes are positive. Its direction in the weights is the
    whitening times the atom: a step along the atom in whitened coordinates.

    Args:
        gradients: PEFs of one row, as `prediction_gradients` makes them.
        r: the number of atoms.
        alpha: weight of the L1 penalty.
        ridge: λ as a share of the mean of the eigenvalues that are not zero; None does not whiten.
        seed: the seed of the start.

    Raises:
        ValueError: if the PEFs have several rows, or there are fewer examples than atoms.
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    rows = _single_rows(gradients, r)
    points = nn.functional.normalize(whitened(rows, ridge), dim=1)
    codes, atoms = _sparse_codes(points, r, alpha, seed, positive=False)
    sign = torch.where(codes.pow(3).sum(0) < 0, -1.0, 1.0).double()

    def mixing(features: Sequence[int]) -> Tensor:
        return combination_of(rows, atoms[list(features)] @ whitening(rows, ridge))[..., None]

    return Readings((codes * sign).float(), (points @ atoms.T * sign).float(), mixing)


def whitened(points: Tensor, ridge: float | None) -> Tensor:
    """Points (n, m) times (Σ x xᵀ/n + λ I)^{-1/2}, λ = ridge times the mean of its eigenvalues that are not zero."""
    if ridge is None:
        return points
    U, S, Vh, roots = _whitening(points, ridge)
    return (U * (S * roots)) @ Vh


def whitening(points: Tensor, ridge: float | None) -> Tensor:
    """The matrix (m, m) of `whitened`: (Σ x xᵀ/n + λ I)^{-1/2} on the span of the points (n, m), and 0 beside it."""
    if ridge is None:
        return torch.eye(points.shape[1], dtype=torch.float64)
    _, _, Vh, roots = _whitening(points, ridge)
    return (Vh.T * roots) @ Vh


def _whitening(points: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(points.double(), full_matrices=False)
    eigenvalues = S.square() / len(points)
    kept = eigenvalues > eigenvalues.max() * torch.finfo(torch.float32).eps
    return U, S, Vh, torch.where(kept, (eigenvalues + ridge * eigenvalues[kept].mean()).rsqrt(), 0.0)


def _single_rows(gradients: PEFs, r: int) -> Tensor:
    if gradients.rank != 1:
        raise ValueError(
            f"this method takes one row for each example, but these PEFs have {gradients.rank}; make them with "
            "prediction_gradients"
        )
    check_enough(len(gradients), r, "the number of directions")
    rows = gradients.factors[:, 0].double()
    return coordinates(rows @ rows.T)


def pef_dictionary(pefs: PEFs, r: int, *, alpha: float = 0.1, seed: int = 0) -> Readings:
    """Dictionary learning on PEFs as points: F_i ≈ Σ_j w_ij D_j, w ≥ 0 and sparse, D_j any matrices of unit norm.

    An atom is a matrix. Its direction in the weights is the top eigenvector of Σ_i w_ij F_i.

    Args:
        pefs: n of them.
        r: the number of atoms.
        alpha: weight of the L1 penalty.
        seed: the seed of the start.

    Raises:
        ValueError: if there are fewer examples than atoms.
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    check_enough(len(pefs), r, "the number of atoms")
    points = coordinates(pef_inner_products(pefs.factors))
    codes, atoms = _sparse_codes(points, r, alpha, seed, positive=True)
    return Readings(codes.float(), (points @ atoms.T).float(), _top_mixing(pefs, codes))


def _top_mixing(pefs: PEFs, weights: Tensor) -> Mixing:
    return lambda features: torch.stack([top_combination(pefs.factors, weights[:, j]) for j in features])


def pef_nmf(pefs: PEFs, r: int, *, seed: int = 0) -> Readings:
    """NMF of the inner products of PEFs, which are never negative: ⟨F_i, F_j⟩ ≈ Σ_k w_ik h_kj.

    A component is a matrix. Its direction in the weights is the top eigenvector of Σ_i w_ik F_i.

    Args:
        pefs: n of them.
        r: the number of components.
        seed: the seed of the start.

    Raises:
        ValueError: if there are fewer examples than components.
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    check_enough(len(pefs), r, "the number of components")
    found = nonnegative_parts(pef_inner_products(pefs.factors), r, seed=seed)
    return replace(found, mixing=_top_mixing(pefs, found.competing))


def nonnegative_parts(X: Tensor, r: int, *, seed: int = 0) -> Readings:
    """NMF of X (n, m) ≥ 0: its coefficients, and the inner products with its unit parts."""
    decomposition = load("sklearn.decomposition", "NMF")
    # Chosen: beyond the 200 iterations of the default, so that the tolerance ends it
    model = decomposition.NMF(r, init="nndsvda", random_state=seed, max_iter=500, tol=1e-3)
    W = torch.from_numpy(model.fit_transform(X.double().clamp_min(0).numpy()))
    parts = nn.functional.normalize(torch.from_numpy(model.components_).double(), dim=1)
    return Readings(W.float(), (X.double() @ parts.T).float())


# Autoencoders


def gradient_autoencoder(gradients: PEFs, r: int, *, k: int = 4, steps: int = 1500, seed: int = 0) -> Readings:
    """A TopK autoencoder of gradients, after L3D (arXiv 2504.00194) without its low rank.

    L3D rebuilds gradients of a divergence from few directions an example. Here they are the gradients of log p(ŷ|x),
    and directions may have any rank. A feature's direction in the weights is its row of the decoder.

    Args:
        gradients: PEFs of one row, as `prediction_gradients` makes them.
        r: the number of directions.
        k: directions of an example.
        steps: the number of steps of training.
        seed: the seed of the start.

    Raises:
        ValueError: if the PEFs have several rows, or there are too few examples.
    """
    points = _single_rows(gradients, r).float()
    sae = SparseAutoencoder.fit(points, SAEConfig(r, k=min(k, r), steps=steps, seed=seed))

    def mixing(features: Sequence[int]) -> Tensor:
        return combination_of(points, sae.decoder[list(features)])[..., None]

    return replace(autoencoder_readings(sae, points), mixing=mixing)


def autoencoder_readings(sae: SparseAutoencoder, states: Tensor) -> Readings:
    """Features that TopK leaves, and what every feature would be without it."""
    z = (states.float() - sae.bias) * sae.scale @ sae.encoder.T + sae.encoder_bias
    return Readings(sae.encode(states), z)


def cluster_readings(soft: Tensor) -> Readings:
    """Assignments to the best of r clusters, and the cosines (n, r) that they are from."""
    return Readings(nn.functional.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype), soft)


def named(readings: dict[str, Readings]) -> dict[str, Any]:
    """{"method, competing": coefficients, "method, alone": coefficients}."""
    return {f"{name}, {way}": getattr(each, way) for name, each in readings.items() for way in ("competing", "alone")}
