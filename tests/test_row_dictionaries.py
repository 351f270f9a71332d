"""Rivals on the same rows. Oracles: naive loops, dense matrices, scikit-learn on dense points, planted directions."""

from collections.abc import Callable

import pytest
import torch

from hf_npeff import PEFs
from hf_npeff.baselines.row_dictionaries import (
    Readings,
    autoencoder_readings,
    cluster_readings,
    coordinates,
    gradient_atoms,
    gradient_autoencoder,
    line_clusters,
    named,
    pef_dictionary,
    pef_inner_products,
    pef_nmf,
    whitened,
)
from hf_npeff.baselines.sparse_autoencoder import SAEConfig, SparseAutoencoder
from hf_npeff.studies.measures import aurocs
from tests import reference

pytest.importorskip("sklearn", reason="dictionary learning and NMF are scikit-learn's")


def planted_rows(n: int = 90, c: int = 2, d: int = 12, noise: float = 0.05) -> tuple[PEFs, torch.Tensor]:
    """Rows along one or two of three orthogonal directions with random signs; and who has which (n, 3)."""
    generator = torch.Generator().manual_seed(0)
    has = torch.rand(n, 3, generator=generator) < 0.5
    has[~has.any(1), 0] = True
    rows = torch.zeros(n, c, d)
    for i in range(n):
        for place, j in enumerate(has[i].nonzero()[:c, 0].tolist()):
            rows[i, place, j] = 1.0 if torch.rand(1, generator=generator) < 0.5 else -1.0
        has[i] = rows[i].abs().sum(0)[:3] > 0
    return PEFs.from_factors(rows + noise * torch.randn(n, c, d, generator=generator)), has


def single_rows(n: int = 80, d: int = 12) -> tuple[PEFs, torch.Tensor]:
    """One row an example, the sum of the directions that it has; and who has which (n, 3)."""
    generator = torch.Generator().manual_seed(1)
    has = torch.rand(n, 3, generator=generator) < 0.4
    has[~has.any(1), 1] = True
    rows = has.float() @ torch.eye(3, d) + 0.05 * torch.randn(n, d, generator=generator)
    return PEFs.from_factors(rows[:, None]), has


def best_aurocs(W: torch.Tensor, has: torch.Tensor) -> list[float]:
    """Every attribute's best feature."""
    return [float(aurocs(W, has[:, a]).max()) for a in range(has.shape[1])]


METHODS: dict[str, Callable[[], tuple[Readings, torch.Tensor]]] = {
    "lines": lambda: (line_clusters(planted_rows()[0], 3), planted_rows()[1]),
    "dictionary": lambda: (pef_dictionary(planted_rows()[0], 4, alpha=0.05), planted_rows()[1]),
    "nmf": lambda: (pef_nmf(planted_rows()[0], 3), planted_rows()[1]),
    "atoms": lambda: (gradient_atoms(single_rows()[0], 3, alpha=0.05), single_rows()[1]),
    "autoencoder": lambda: (gradient_autoencoder(single_rows()[0], 4, k=2, steps=200), single_rows()[1]),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_rival_finds_planted_directions_in_one_of_its_readings(name: str) -> None:
    """Oracle: planted truth, whose three directions are orthogonal and lie under noise of a twentieth."""
    readings, has = METHODS[name]()
    assert readings.competing.shape == readings.alone.shape and len(readings.alone) == len(has)
    competing, alone = (best_aurocs(W, has) for W in (readings.competing, readings.alone))
    best = [max(pair) for pair in zip(competing, alone, strict=True)]
    assert min(best) > 0.9, best


def test_line_clusters_are_those_of_a_naive_loop() -> None:
    """Oracle: Lloyd's iteration on dense rows with eigenvectors from eigh, from many starts; the same objective."""
    pefs, _ = planted_rows(n=30, noise=0.3)
    single = PEFs.from_factors(pefs.factors.flatten(0, 1)[:, None])
    found = line_clusters(single, 3, n_restarts=20)
    best = max(naive_of(single.factors[:, 0].double(), seed) for seed in range(20))
    assert float(found.alone.amax(1).sum()) == pytest.approx(best, rel=1e-3)
    of_examples = line_clusters(pefs, 3).competing  # every row in one cluster
    assert torch.allclose(of_examples.sum(1), pefs.factors.square().sum((1, 2)), atol=1e-5)


def naive_of(rows: torch.Tensor, seed: int) -> float:
    """The objective that Lloyd's iteration on dense rows ends at, from one start."""
    C = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:3]].clone()
    C = C / C.norm(dim=1, keepdim=True)
    for _ in range(60):
        own = (rows @ C.T).square().argmax(1)
        for j in range(3):
            part = rows[own == j]
            if len(part):
                C[j] = torch.linalg.eigh(part.T @ part)[1][:, -1]
    return float((rows @ C.T).square().amax(1).sum())


def test_whitened_points_have_the_second_moment_that_the_ridge_leaves() -> None:
    """Oracle: the dense (Σ x xᵀ/n + λ I)^{-1/2} by eigh."""
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 7.0)
    C = X.T @ X / 40
    values, vectors = torch.linalg.eigh(C)
    ridge = 0.1 * values.mean()
    dense = X @ vectors @ torch.diag((values + ridge) ** -0.5) @ vectors.T
    assert torch.allclose(whitened(X, 0.1), dense, atol=1e-9)
    assert whitened(X, None) is X


def combined(readings: Readings, pefs: PEFs, features: list[int]) -> torch.Tensor:
    """Directions (k, d) of features, from the rows themselves."""
    assert readings.mixing is not None
    return readings.mixing(features).flatten(1) @ pefs.factors.flatten(0, 1).double()


def test_directions_are_what_the_features_read() -> None:
    """Oracle: inner products of dense rows with the dense direction, squared and summed, are the readings alone."""
    pefs, _ = planted_rows(n=30, noise=0.3)
    lines = line_clusters(pefs, 3)
    inner = torch.einsum("ncd,kd->nkc", pefs.factors.double(), combined(lines, pefs, [2, 0]))
    assert torch.allclose(inner.square().sum(2), lines.alone[:, [2, 0]].double(), atol=1e-4)
    gradients, _ = single_rows()
    rows = gradients.factors[:, 0].double()
    for ridge in (None, 0.1):
        atoms = gradient_atoms(gradients, 3, alpha=0.05, ridge=ridge)
        lengths = whitened(rows, ridge).norm(dim=1, keepdim=True)
        assert torch.allclose((rows @ combined(atoms, gradients, [0, 1, 2]).T / lengths).abs(),
                              atoms.alone.double().abs(), atol=1e-4)  # fmt: skip
    sae = SparseAutoencoder.fit(coordinates(rows @ rows.T).float(), SAEConfig(4, k=2, steps=200))
    directions = combined(gradient_autoencoder(gradients, 4, k=2, steps=200), gradients, [3])
    expected = coordinates(rows @ rows.T) @ sae.decoder[3].double()
    assert torch.allclose(rows @ directions[0], expected, atol=1e-3)


def test_a_matrix_is_moved_along_its_top_eigenvector() -> None:
    """Oracle: eigh of the dense Σ w F, for both methods whose features are matrices."""
    pefs, _ = planted_rows(n=20, noise=0.3)
    for found in (pef_nmf(pefs, 2), pef_dictionary(pefs, 2, alpha=0.05)):
        weights = found.competing[:, 1].clamp_min(0).double()
        F = torch.einsum("n,nca,ncb->ab", weights, pefs.factors.double(), pefs.factors.double())
        (direction,) = combined(found, pefs, [1])
        cosine = torch.nn.functional.cosine_similarity(direction, torch.linalg.eigh(F)[1][:, -1], dim=0)
        assert float(cosine.abs()) > 1 - 1e-6


def test_points_stand_for_the_rows_in_dictionary_learning() -> None:
    """Oracle: scikit-learn on the dense PEF matrices: the same codes, since all that counts is inner products."""
    from sklearn.decomposition import DictionaryLearning

    pefs, _ = planted_rows(n=25, d=4)
    F = (pefs.factors.mT @ pefs.factors).flatten(1).double()
    learner = DictionaryLearning(3, alpha=0.05, max_iter=200, fit_algorithm="cd", transform_algorithm="lasso_cd",
                                 transform_alpha=0.05, positive_code=True, random_state=0)  # fmt: skip
    dense = torch.from_numpy(learner.fit_transform(F.numpy()))
    ours = pef_dictionary(pefs, 3, alpha=0.05).competing.double()
    assert torch.allclose(ours, dense, atol=1e-2)
    X = coordinates(pef_inner_products(pefs.factors))
    assert torch.allclose(X @ X.T, F @ F.T, atol=1e-5)


@pytest.mark.parametrize("ridge", [None, 0.5])
def test_atoms_are_those_of_dense_whitened_gradients(ridge: float | None) -> None:
    """Oracle: the dense (Σ a aᵀ/n + λ I)^{-1/2} by eigh, unit rows, and scikit-learn on them; signs are free."""
    from sklearn.decomposition import DictionaryLearning

    gradients, _ = single_rows(n=30, d=6)
    rows = gradients.factors[:, 0].double()
    if ridge is not None:
        values, vectors = torch.linalg.eigh(rows.T @ rows / 30)
        rows = rows @ vectors @ torch.diag((values + ridge * values.mean()) ** -0.5) @ vectors.T
    rows = rows / rows.norm(dim=1, keepdim=True)
    learner = DictionaryLearning(3, alpha=0.05, max_iter=200, fit_algorithm="cd", transform_algorithm="lasso_cd",
                                 transform_alpha=0.05, random_state=0)  # fmt: skip
    dense = torch.from_numpy(learner.fit_transform(rows.numpy()))
    ours = gradient_atoms(gradients, 3, alpha=0.05, ridge=ridge).competing.double()
    assert torch.allclose(ours.abs(), dense.abs(), atol=1e-2)


def test_an_autoencoder_of_gradients_is_trained_as_written_down() -> None:
    """Oracle: Adam example by example in float64, with gradients by hand, from the same start and batches."""
    gradients, _ = single_rows(n=30, d=6)
    points = coordinates(gradients.factors[:, 0].double() @ gradients.factors[:, 0].double().T)
    generator = torch.Generator().manual_seed(3)
    train = points[torch.randperm(30, generator=generator)[3:]]  # a tenth is held out
    centre = train.mean(0)
    scale = (train.shape[1] / (train - centre).square().sum(1).mean()) ** 0.5
    start = torch.nn.functional.normalize(torch.randn(5, 30, generator=generator), dim=1).double()
    steps = 10
    batches = [torch.randint(27, (27,), generator=generator).tolist() for _ in range(steps)]
    rates = [2e-3] * 9 + [1e-3]  # falling to 0 over the last fifth, which is two steps
    sae = reference.train_autoencoder((train - centre) * scale, start, batches, 2, rates)
    both = [sae.features((x - centre) * scale, 2) for x in points]
    found = gradient_autoencoder(gradients, 5, k=2, steps=steps, seed=3)
    untrained = start @ ((points - centre) * scale).T
    assert float((untrained.T - torch.stack([z for _, z in both])).abs().max()) > 0.02
    assert torch.allclose(found.competing.double(), torch.stack([f for f, _ in both]), atol=1e-4)
    assert torch.allclose(found.alone.double(), torch.stack([z for _, z in both]), atol=1e-4)
    assert found.mixing is not None
    directions = found.mixing(range(5))[..., 0] @ points  # what of the decoder lies in the span of the points
    kept = points.square().sum(0) > points.square().sum(0).max() * 1e-6
    assert torch.allclose(directions, torch.where(kept, sae.D, 0.0), atol=1e-4)


def test_nmf_reaches_the_loss_of_naive_updates() -> None:
    """Oracle: multiplicative updates on dense inner products, from ten starts; the parts are refitted by NNLS."""
    optimize = pytest.importorskip("scipy.optimize")
    pefs, _ = planted_rows(n=24, d=6)
    F = (pefs.factors.mT @ pefs.factors).flatten(1).double()
    X = F @ F.T

    def loss(W: torch.Tensor) -> float:
        parts = [torch.from_numpy(optimize.nnls(W.double().numpy(), column.numpy())[0]) for column in X.T]
        return float((X - W.double() @ torch.stack(parts, dim=1)).norm())

    def naive(seed: int) -> torch.Tensor:
        W, H = torch.rand(2, 24, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(300):
            H = H * (X.T @ W) / (H @ W.T @ W)
            W = W * (X @ H) / (W @ H.T @ H)
        return W

    best = min(loss(naive(seed)) for seed in range(10))
    assert loss(pef_nmf(pefs, 3).competing) < 1.02 * best < 0.5 * float(X.norm())


def test_readings_are_the_definitions() -> None:
    """Oracle: by hand for clusters; the largest k of the features before TopK for autoencoders."""
    soft = torch.tensor([[0.1, 0.9], [0.8, -0.2]])
    assert cluster_readings(soft).competing.tolist() == [[0, 1], [1, 0]] and cluster_readings(soft).alone is soft
    states = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    sae = SparseAutoencoder.fit(states, SAEConfig(6, k=2, steps=30))
    read = autoencoder_readings(sae, states)
    top = read.alone.relu().topk(2, dim=1)
    assert torch.allclose(torch.zeros_like(read.alone).scatter(1, top.indices, top.values), read.competing, atol=1e-5)
    assert list(named({"a": read})) == ["a, competing", "a, alone"]


def test_atoms_are_turned_to_their_large_codes() -> None:
    """Oracle: the definition."""
    codes = gradient_atoms(single_rows()[0], 3, alpha=0.05).competing
    assert bool((codes.pow(3).sum(0) >= 0).all())


def test_bad_input_is_refused() -> None:
    """Oracle: what the errors name."""
    pefs, _ = planted_rows(n=10)
    with pytest.raises(ValueError, match="prediction_gradients"):
        gradient_atoms(pefs, 2)
    for method in (pef_dictionary, pef_nmf):
        with pytest.raises(ValueError, match="11"):
            method(pefs, 11)
    with pytest.raises(ValueError, match="21"):
        line_clusters(pefs, 21)
