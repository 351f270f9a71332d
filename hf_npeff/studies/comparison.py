"""NPEFF and the methods that it is compared with, fitted to the same examples of the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.activations import (
    Position,
    Site,
    activation_kmeans,
    activation_nmf,
    hidden_states,
    random_coefficients,
)
from hf_npeff.baselines.gradient_clustering import GradientClustering, prediction_gradients
from hf_npeff.baselines.method import Interventions, MethodResult, check_enough
from hf_npeff.baselines.row_dictionaries import (
    Readings,
    gradient_atoms,
    gradient_autoencoder,
    line_clusters,
    pef_dictionary,
    pef_nmf,
)
from hf_npeff.baselines.row_directions import RowDirections, row_interventions
from hf_npeff.baselines.sparse_autoencoder import SAEConfig, SparseAutoencoder
from hf_npeff.config import LiftRequest
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.fisher.heads import finds_last_by_padding
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.pefs.store import PEFs
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.measures import aurocs
from hf_npeff.studies.rival_settings import RivalsConfig
from hf_npeff.studies.settings import RIVALS, ComparisonConfig
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.lifting import plan


@dataclass
class Comparison:
    """Fitted methods.

    Attributes:
        methods: the result of each method.
        seeds: {method: the coefficients of its fits with further seeds}.
        pefs: the PEFs, if NPEFF is among the methods; otherwise None.
        pefs_seconds: the processor time for the PEFs; 0 if they were given.
        decompositions: NPEFF's decompositions, one for each seed.
    """

    methods: list[MethodResult]
    seeds: dict[str, list[Tensor]] = field(default_factory=dict)
    pefs: PEFs | None = None
    pefs_seconds: float = 0.0
    decompositions: list[Decomposition] = field(default_factory=list)

    @property
    def decomposition(self) -> Decomposition | None:
        """The first of NPEFF's."""
        return self.decompositions[0] if self.decompositions else None


def fit_methods(
    analyzer: NPEFFAnalyzer, dataset: Any, config: ComparisonConfig | None = None, *, pefs: PEFs | None = None
) -> Comparison:
    """Fit every method to the same examples.

    Args:
        analyzer: the analyzer of the model.
        dataset: as for `NPEFFAnalyzer.compute_pefs`.
        config: the settings.
        pefs: the PEFs of the same dataset, if they have been computed already; their time is then not counted.

    Raises:
        ValueError: if there are fewer examples than components.

    Example:
        >>> from hf_npeff.studies.settings import ComparisonConfig
        >>> config = ComparisonConfig(n_components=3, methods=["npeff"], n_restarts=2, seeds=1)
        >>> comparison = fit_methods(analyzer, dataset, config, pefs=pefs)
        >>> [method.name for method in comparison.methods]
        ['NPEFF']
    """
    config = config or ComparisonConfig()
    if hasattr(dataset, "__len__"):
        check_enough(len(dataset), config.n_components, "n_components")
    comparison = Comparison([], pefs=pefs)
    wanted = config.wanted
    if {"npeff", "gradient_clustering", *RIVALS} & set(wanted):
        _fit_gradients(analyzer, dataset, config, comparison)
    if {"sae", "kmeans", "nmf"} & set(wanted):
        _fit_activations(analyzer, dataset, config, comparison)
    if "random" in wanted:
        n = len(comparison.methods[0].coefficients) if comparison.methods else len(dataset)
        fits = [random_coefficients(n, config.n_components, seed=s) for s in _seeds(config)]
        first = next((m for m in comparison.methods if m.name == "NPEFF"), None)
        if first is not None and first.interventions is not None:
            fits[0] = replace(fits[0], interventions=partial(_random_directions, analyzer))
        _add(comparison, fits)
    return comparison


def _random_directions(analyzer: NPEFFAnalyzer, features: Sequence[int]) -> list[ParameterDirection]:
    """A random direction over the analysed parameters for each number."""
    like = analyzer.direction_of({name: torch.ones(shape) for name, shape in analyzer.shapes.items()}, {})
    return [like.random_like(j) for j in features]


def _seeds(config: ComparisonConfig) -> range:
    return range(config.seed, config.seed + config.seeds)


def _add(comparison: Comparison, fits: Sequence[MethodResult]) -> None:
    comparison.methods.append(fits[0])
    comparison.seeds[fits[0].name] = [fit.coefficients for fit in fits[1:]]


def _fit_gradients(analyzer: NPEFFAnalyzer, dataset: Any, config: ComparisonConfig, comparison: Comparison) -> None:
    started = time.process_time()
    pefs = comparison.pefs
    if pefs is None:
        pefs = comparison.pefs = analyzer.compute_pefs(dataset, batch_size=config.batch_size)
    comparison.pefs_seconds = time.process_time() - started
    if "npeff" in config.wanted:
        fits = []
        for seed in _seeds(config):
            started = time.process_time()
            decomposition = analyzer.decompose(
                pefs,
                config.n_components,
                power=config.power,
                balance=config.balance,
                n_restarts=config.n_restarts,
                seed=seed,
            )
            comparison.decompositions.append(decomposition)
            seconds = comparison.pefs_seconds + time.process_time() - started
            fits.append(MethodResult.of_decomposition(decomposition, seconds=seconds))
        kept = comparison.decomposition
        assert kept is not None

        lift = _lifting(analyzer, kept, pefs, dataset, config.batch_size)
        _add(comparison, [replace(fits[0], interventions=lift), *fits[1:]])
    if set(_ON_PEFS) & set(config.wanted):
        _fit_rivals(analyzer, dataset, pefs, config, comparison, comparison.pefs_seconds)
    if not {"gradient_clustering", "gradient_atoms", "gradient_autoencoder"} & set(config.wanted):
        return
    started = time.process_time()
    other, gradients = prediction_gradients(analyzer, dataset, like=pefs, batch_size=config.batch_size)
    to_gradients = time.process_time() - started
    if "gradient_clustering" in config.wanted:
        soft, hard = [], []
        for seed in _seeds(config):
            started = time.process_time()
            estimator = GradientClustering(config.n_components, n_restarts=config.n_restarts, seed=seed)
            clusters = estimator.fit(gradients)
            seconds = to_gradients + time.process_time() - started
            # Its directions are made selective, as those of NPEFF are
            switches = row_interventions(other, gradients, dataset, clusters.mixing, clusters.hard, config.batch_size)
            soft.append(replace(clusters.result(seconds=seconds), interventions=switches))
            hard.append(replace(clusters.result(hard=True, seconds=seconds), interventions=switches))
        _add(comparison, soft)
        _add(comparison, hard)
    _fit_rivals(other, dataset, gradients, config, comparison, to_gradients)


def _lifting(
    analyzer: NPEFFAnalyzer, decomposition: Decomposition, pefs: PEFs, dataset: Any, batch_size: int
) -> Interventions:
    """What switches components: selective directions, as `NPEFFAnalyzer.lift` makes them.

    Without a balance they are combinations of rows and nothing else, so they are lifted together with those of rivals.
    """
    if decomposition.scales is None and analyzer.for_decomposition(decomposition) is analyzer:

        def combinations(components: Sequence[int]) -> Tensor:
            plans = plan(decomposition, list(components), pefs, LiftRequest(), _gpu_of(analyzer))
            return torch.stack([each.coefficients for each in plans if each.coefficients is not None])

        return RowDirections(analyzer, pefs, dataset, combinations, batch_size)

    def lift(components: Sequence[int]) -> list[ParameterDirection]:
        directions: list[ParameterDirection] = analyzer.lift(
            decomposition, list(components), pefs, dataset, batch_size=batch_size
        )
        return directions

    return lift


def _gpu_of(analyzer: NPEFFAnalyzer) -> torch.device | None:
    return analyzer.device if analyzer.device.type == "cuda" else None


_OF_RIVALS = RivalsConfig()
_FITS: dict[str, tuple[str, str, Callable[[PEFs, ComparisonConfig, int], Readings]]] = {
    "line_clusters": (
        "gradient clustering, all rows",
        "alone",
        lambda rows, config, seed: line_clusters(rows, config.n_components, seed=seed, n_restarts=config.n_restarts),
    ),
    "pef_dictionary": (
        "dictionary learning on PEFs",
        "alone",
        lambda rows, config, seed: pef_dictionary(
            rows, config.n_components, alpha=_OF_RIVALS.dictionary_alpha, seed=seed
        ),
    ),
    "pef_nmf": ("NMF on PEFs", "competing", lambda rows, config, seed: pef_nmf(rows, config.n_components, seed=seed)),
    "gradient_atoms": (
        "Gradient Atoms",
        "alone",
        lambda rows, config, seed: gradient_atoms(
            rows, config.n_components, alpha=_OF_RIVALS.atoms_alpha, ridge=_OF_RIVALS.atoms_ridge, seed=seed
        ),
    ),
    "gradient_autoencoder": (
        "autoencoder of gradients",
        "alone",
        lambda rows, config, seed: gradient_autoencoder(
            rows, config.n_components, k=_OF_RIVALS.gradient_k, steps=_OF_RIVALS.sae_steps, seed=seed
        ),
    ),
}
"""{method: (its row, its reading, its fit)}. Settings, and the better reading of each, are those of seed 10 of the
planted cues, which no study measures (docs/studies/minimal_pairs/settings_planted_cues.json)."""
_ON_PEFS = ("line_clusters", "pef_dictionary", "pef_nmf")


def _fit_rivals(
    analyzer: NPEFFAnalyzer, dataset: Any, rows: PEFs, config: ComparisonConfig, comparison: Comparison, to_rows: float
) -> None:
    """The rivals on these rows: PEFs, or gradients, which have one row an example."""
    for name in (n for n in RIVALS if n in config.wanted and (n in _ON_PEFS) == (rows is comparison.pefs)):
        row, reading, fit = _FITS[name]
        fits = []
        for seed in _seeds(config):
            started = time.process_time()
            found = fit(rows, config, seed)
            assert found.mixing is not None
            seconds = to_rows + time.process_time() - started
            lift = row_interventions(analyzer, rows, dataset, found.mixing, found.competing, config.batch_size)
            fits.append(MethodResult(row, getattr(found, reading).float(), seconds, lift, {"reading": reading}))
        _add(comparison, fits)


def _fit_activations(analyzer: NPEFFAnalyzer, dataset: Any, config: ComparisonConfig, comparison: Comparison) -> None:
    started = time.process_time()
    site = Site(analyzer.model, config.layer, _position(analyzer, config.position))
    states = hidden_states(analyzer, dataset, site, batch_size=config.batch_size)
    to_states = time.process_time() - started
    r = config.n_components
    if "sae" in config.wanted:
        for expansion in dict.fromkeys((1, config.sae_expansion)):
            fits = []
            name = "SAE" if expansion == 1 else f"SAE × {expansion}"
            for seed in _seeds(config):
                started = time.process_time()
                sae = SparseAutoencoder.fit(states, _sae_config(config, r * expansion, seed))
                seconds = to_states + time.process_time() - started
                fits.append(sae.result(states, site=site, name=name, seconds=seconds))
            _add(comparison, fits)
    if "kmeans" in config.wanted:
        settings: dict[str, Any] = {"site": site, "seconds": to_states, "n_restarts": config.n_restarts}
        _add(comparison, [activation_kmeans(states, r, seed=seed, **settings) for seed in _seeds(config)])
    if "nmf" in config.wanted:
        factored = [activation_nmf(states, r, site=site, seconds=to_states, seed=seed) for seed in _seeds(config)]
        _add(comparison, factored)


def _sae_config(config: ComparisonConfig, features: int, seed: int) -> SAEConfig:
    k = min(config.sae_k, features)
    return SAEConfig(features, config.sae_kind, k, config.sae_l1, steps=config.sae_steps, seed=seed)


def _position(analyzer: NPEFFAnalyzer, position: str) -> Position:
    """The token that is read: the first for encoders with a classifier, the last for all other models."""
    if position == "first" or position == "last":
        return position  # type: ignore[return-value]
    decoder = finds_last_by_padding(analyzer.model) or traits_of(analyzer.head).vocabulary
    return "last" if decoder else "first"


def best_layer(
    analyzer: NPEFFAnalyzer, dataset: Any, attributes: Attributes, config: ComparisonConfig, *, choose: Tensor
) -> int:
    """The layer whose autoencoder finds the attributes best on the examples in `choose` (n,) bool.

    This chooses the layer for the activation methods. The measure is the mean AUROC of the best features on the half
    where features are chosen, so the other half is not used.
    """
    config_of: Any = analyzer.model.config
    depth = config_of.get_text_config().num_hidden_layers
    means = []
    for layer in range(depth):
        site = Site(analyzer.model, layer, _position(analyzer, config.position))
        states = hidden_states(analyzer, dataset, site, batch_size=config.batch_size)
        W = SparseAutoencoder.fit(states, _sae_config(config, config.n_components, config.seed)).encode(states)
        scores = []
        for a in range(len(attributes.names)):
            values = attributes.values[:, a]
            known = choose & ~values.isnan()
            if 0 < int((values[known] == 1).sum()) < int(known.sum()):
                scores.append(float(aurocs(W[known], values[known] == 1).max()))
        means.append(sum(scores) / max(len(scores), 1))
    return int(torch.tensor(means).argmax())
