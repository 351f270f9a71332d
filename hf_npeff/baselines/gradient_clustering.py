"""Gradient clustering: spherical k-means on sketched gradients of log p(ŷ|x), one factor for each example.

The rows come from the same hooks, sketch and loop as PEFs: an output head whose only "sample" is the prediction ŷ,
under the `sampling` output factor of one row, has the row ∇log p(ŷ|x). A centroid is a known combination of rows,
Σ a_i/‖a_i‖ over its cluster, so it lifts exactly, by one backward pass with the stored cotangents, and perturbs like a
component.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.method import MethodResult, check_enough
from hf_npeff.config import BATCH_SIZE
from hf_npeff.errors import IncompatibleSketchError
from hf_npeff.extras import load
from hf_npeff.fisher.distributions import Bernoulli, Distribution, Gaussian
from hf_npeff.fisher.outputs import HeadTraits, Outputs, traits_of
from hf_npeff.pefs.store import PEFs
from hf_npeff.pefs.weights_identity import check_same_weights
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.exact_lifting import lift_exact
from hf_npeff.weights.lifting import align


@functools.cache
def _certain(kind: type[Distribution]) -> type[Distribution]:
    """The distribution with its likeliest outcome for every sample: scores are ∇log p(ŷ) by the logits."""
    if issubclass(kind, Gaussian):
        raise ValueError(
            "the gradient of log p(ŷ|x) is zero for regression, whose prediction is the mode: gradient clustering "
            "needs classes, labels or tokens"
        )

    class Certain(kind):  # type: ignore[valid-type,misc]
        def scores(self, c: int, generator: torch.Generator, index: int) -> Tensor:
            own = self.logits[index]
            y = (own > 0)[:, None] if issubclass(kind, Bernoulli) else own.argmax(-1, keepdim=True)
            return self.score(index, y).expand(-1, c)

    return Certain


class PredictionHead:
    """An output head whose samples are always the prediction ŷ; everything else is the head's that it wraps."""

    def __init__(self, head: Any):
        self.head = head

    @property
    def traits(self) -> HeadTraits:
        """Those of the head that it wraps."""
        return traits_of(self.head)

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """See `OutputHead`."""
        outputs = self.head.outputs(model, batch)
        return dataclasses.replace(outputs, distribution=_certain(outputs.distribution))


def prediction_gradients(
    analyzer: NPEFFAnalyzer, dataset: Any, *, like: PEFs | None = None, **arguments: Any
) -> tuple[NPEFFAnalyzer, PEFs]:
    """The sketched gradient of log p(ŷ|x) of every example, as PEFs of one row.

    Args:
        analyzer: the analyzer of the model.
        dataset: as for `NPEFFAnalyzer.compute_pefs`.
        like: PEFs whose sketch is used; by default the analyzer's own settings choose one.
        **arguments: arguments of `NPEFFAnalyzer.compute_pefs`.

    Returns:
        The analyzer that made them, which lifts them too, and the PEFs: `factors` (n, 1, d) unit rows, signs kept.

    Raises:
        ValueError: if the model predicts numbers, whose log-likelihood has no gradient at the prediction.
        IncompatibleSketchError: if the model does not have the parameters of `like`.

    Example:
        >>> gradients_analyzer, gradients = prediction_gradients(analyzer, dataset, like=pefs)
        >>> gradients.rank, gradients.dim == pefs.dim
        (1, True)
    """
    settings = analyzer.fisher if like is None else like.config
    config = dataclasses.replace(settings, rank=1, output_factor="sampling", spectral_metric="auto")
    other = analyzer.with_fisher(config, PredictionHead(analyzer.head))
    pefs = other.compute_pefs(dataset, **arguments)
    if like is not None and pefs.fingerprint != like.fingerprint:
        raise IncompatibleSketchError(
            f"the gradients' sketch {pefs.fingerprint} is not that of like=, {like.fingerprint}: the model has other "
            "parameters under analysis"
        )
    return other, pefs


class GradientClustering:
    """Spherical k-means: unit centroids μ_j that maximise Σ_i max_j ⟨a_i, μ_j⟩ over unit rows a_i.

    scikit-learn's k-means gives each start, spherical steps (centroids back to unit norm) finish it, the best is kept.

    Args:
        n_clusters: r.
        n_restarts: independent starts.
        max_iterations: spherical steps of one start.
        seed: the seed of the starts.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> gradients_analyzer, gradients = prediction_gradients(analyzer, dataset)
        >>> clusters = GradientClustering(n_clusters=3, n_restarts=2).fit(gradients)
        >>> clusters.assignments.shape
        torch.Size([24])
    """

    def __init__(self, n_clusters: int = 16, *, n_restarts: int = 10, max_iterations: int = 100, seed: int = 0):
        if min(n_clusters, n_restarts, max_iterations) < 1:
            raise ValueError("n_clusters, n_restarts and max_iterations must be at least 1")
        self.n_clusters = n_clusters
        self.n_restarts = n_restarts
        self.max_iterations = max_iterations
        self.seed = seed

    def fit(self, gradients: PEFs) -> GradientClusters:
        """Cluster gradients, PEFs of one row each; zero gradients belong to no cluster.

        Raises:
            ValueError: if the PEFs have several rows, or there are fewer non-zero gradients than clusters.
            ModuleNotFoundError: if scikit-learn is not installed.
        """
        if gradients.rank != 1:
            raise ValueError(
                f"gradient clustering takes one row for each example, but these PEFs have {gradients.rank}; make them "
                "with prediction_gradients"
            )
        rows = gradients.factors[:, 0].to(torch.promote_types(gradients.factors.dtype, torch.float32))
        some = rows.norm(dim=1) > 0
        X = rows[some]
        check_enough(len(X), self.n_clusters, "n_clusters")
        centroids = max((self._start(X, restart) for restart in range(self.n_restarts)), key=lambda C: _objective(X, C))
        soft = rows @ centroids.T
        assignments = torch.where(some, soft.argmax(1), -1)
        order = torch.argsort(
            torch.bincount(assignments[some], minlength=self.n_clusters), descending=True, stable=True
        )
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        assignments = torch.where(some, place[assignments.clamp_min(0)], -1)
        return GradientClusters(centroids[order], soft[:, order], assignments, gradients)

    def _start(self, X: Tensor, restart: int) -> Tensor:
        fitted = (
            load("sklearn.cluster", "k-means")
            # A prime: no two seeds share a start
            .KMeans(self.n_clusters, n_init=1, random_state=self.seed * 1009 + restart)
            .fit(X.numpy())
        )
        C = nn.functional.normalize(torch.from_numpy(fitted.cluster_centers_).to(X.dtype), dim=1)
        before = torch.full((len(X),), -1)
        for _ in range(self.max_iterations):
            cosines, now = (X @ C.T).max(1)
            if torch.equal(now, before):
                break
            sums = torch.zeros_like(C).index_add_(0, now, X)
            empty = sums.norm(dim=1) == 0
            worst = torch.argsort(cosines)[: int(empty.sum())]
            sums[empty] = X[worst]  # an empty cluster starts again from the examples that fit worst
            C, before = nn.functional.normalize(sums, dim=1), now
        return C


def _objective(X: Tensor, C: Tensor) -> float:
    return float((X @ C.T).amax(1).sum())


class GradientClusters:
    """Clusters of gradients.

    Attributes:
        centroids: (r, d) unit rows, the largest cluster first.
        soft: (n, r), cosine of every gradient with every centroid; 0 for a zero gradient.
        assignments: (n,), the cluster of every example; −1 for a zero gradient.
        gradients: what was clustered.
    """

    def __init__(self, centroids: Tensor, soft: Tensor, assignments: Tensor, gradients: PEFs):
        self.centroids = centroids
        self.soft = soft
        self.assignments = assignments
        self.gradients = gradients

    @property
    def hard(self) -> Tensor:
        """(n, r), 1 for an example's own cluster."""
        return (self.assignments[:, None] == torch.arange(len(self.centroids))).to(self.soft.dtype)

    @property
    def excluded(self) -> list[str]:
        """Ids of the examples whose gradient is zero, which belong to no cluster."""
        return [self.gradients.example_ids[i] for i in (self.assignments < 0).nonzero()[:, 0].tolist()]

    def mixing(self, clusters: Sequence[int]) -> Tensor:
        """(k, n, 1): centroids of clusters as combinations of unit gradients, up to their length."""
        return self.hard.double().T[list(clusters), :, None]

    def combination(self) -> Tensor:
        """(r, n, 1): centroids as combinations of the *unscaled* gradients, Σ_{i in j} a_i/‖a_i‖."""
        norms = self.gradients.norms.double().sqrt()  # ‖aᵀa‖_F = ‖a‖²
        weights = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
        return (self.hard.double() * weights[:, None]).T[..., None]

    def lift(
        self,
        analyzer: NPEFFAnalyzer,
        clusters: Sequence[int],
        dataset: Any,
        *,
        batch_size: int = BATCH_SIZE,
        check_weights: bool = True,
    ) -> list[ParameterDirection]:
        """Centroids as unit directions in the parameters, exactly.

        Args:
            analyzer: the one that `prediction_gradients` returned with the gradients.
            clusters: their numbers.
            dataset: the one the gradients came from.
            batch_size: how many examples a forward pass takes.
            check_weights: refuse gradients of other weights than the model has now.

        Raises:
            IncompatibleWeightsError: if the model's weights have changed since then.
            IndexError: if a cluster does not exist.
            ValueError: if the dataset is another, or the gradients were made elsewhere.
        """
        if bad := [j for j in clusters if not 0 <= j < len(self.centroids)]:
            raise IndexError(f"there are {len(self.centroids)} clusters, numbered from 0; {bad} do not exist")
        chosen = self.combination()[list(clusters)]
        origin = {"method": "centroid"}
        return lift_combinations(analyzer, self.gradients, dataset, chosen, batch_size, origin, check_weights)

    def result(
        self,
        analyzer: NPEFFAnalyzer | None = None,
        dataset: Any = None,
        *,
        hard: bool = False,
        seconds: float = float("nan"),
        batch_size: int = BATCH_SIZE,
    ) -> MethodResult:
        """The clusters as a row; with an analyzer and the dataset, centroids can be lifted."""

        def lifted(clusters: Sequence[int]) -> list[ParameterDirection]:
            assert analyzer is not None
            return self.lift(analyzer, clusters, dataset, batch_size=batch_size)

        sizes = torch.bincount(self.assignments[self.assignments >= 0], minlength=len(self.centroids)).tolist()
        name = f"gradient clustering, {'hard' if hard else 'soft'}"
        diagnostics = {"sizes": sizes, "zero_gradients": self.excluded}
        return MethodResult(
            name, self.hard if hard else self.soft, seconds, None if analyzer is None else lifted, diagnostics
        )


def lift_combinations(
    analyzer: NPEFFAnalyzer,
    pefs: PEFs,
    dataset: Any,
    coefficients: Tensor,
    batch_size: int,
    origin: Mapping[str, Any],
    check_weights: bool = True,
) -> list[ParameterDirection]:
    """Combinations (m, n, c) of unscaled rows as unit directions in the parameters.

    Raises:
        IncompatibleWeightsError: if the weights of the model and the PEFs differ, and `check_weights` is true.
        ValueError: if the rows were made elsewhere, or the dataset is another.
    """
    if pefs.cotangents is None:
        raise ValueError("these rows were made elsewhere and hold no cotangents, so they cannot be lifted")
    weights = analyzer.weights()
    remedy = "Give the model those weights again, or cluster the gradients of those that it has."
    check_same_weights(pefs.info.get("weights") if check_weights else weights, weights, "these PEFs", remedy)
    examples = align(analyzer.read(dataset, like=pefs.info), pefs.example_ids, pefs.content_hashes)
    if check_weights:
        analyzer.check_predictions(pefs, examples)
    with analyzer.forward_pass() as forward:
        lifted = lift_exact(forward, examples, pefs.cotangents, coefficients, batch_size)
    return [analyzer.direction_of(matrices, {**origin, "weights": weights}) for matrices in lifted]


def gradient_clustering(
    analyzer: NPEFFAnalyzer,
    dataset: Any,
    n_clusters: int,
    *,
    like: PEFs | None = None,
    seed: int = 0,
    n_restarts: int = 10,
    batch_size: int = BATCH_SIZE,
) -> list[MethodResult]:
    """Gradients, clusters, and both rows of the table: soft and hard assignments."""
    started = time.process_time()
    other, gradients = prediction_gradients(analyzer, dataset, like=like, batch_size=batch_size)
    clusters = GradientClustering(n_clusters, seed=seed, n_restarts=n_restarts).fit(gradients)
    seconds = time.process_time() - started
    settings: dict[str, Any] = {"seconds": seconds, "batch_size": batch_size}
    return [clusters.result(other, dataset, hard=hard, **settings) for hard in (False, True)]
