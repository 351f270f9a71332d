"""Gradient clustering, sparse autoencoders and activation rows.

Oracles: autograd's own gradients, exhaustive search, planted dictionaries, transformers' own hidden states.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from hf_npeff import FisherConfig, IncompatibleSketchError, NPEFFAnalyzer, PEFs
from hf_npeff.baselines.activations import (
    FeatureAblation,
    Site,
    activation_kmeans,
    activation_nmf,
    hidden_states,
    random_coefficients,
)
from hf_npeff.baselines.gradient_clustering import GradientClustering, gradient_clustering, prediction_gradients
from hf_npeff.baselines.method import MethodResult, load_methods, save_methods
from hf_npeff.baselines.sparse_autoencoder import (
    SAEConfig,
    SparseAutoencoder,
    sparse_autoencoder,
)
from hf_npeff.errors import CorruptStoreError, UnsupportedModelError
from hf_npeff.studies.measures import auroc
from tests.tiny import collate, tiny_batch, tiny_model

pytest.importorskip("sklearn", reason="k-means and NMF are scikit-learn's")


def analyzer_of(family: str, task: str, **settings: Any) -> tuple[NPEFFAnalyzer, list[dict[str, Any]]]:
    overrides = settings.pop("model", {})
    model = tiny_model(family, task, dtype=torch.float32, **overrides)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(**{"sketch": "identity", "rank": 2} | settings))
    return analyzer, tiny_batch(model, 12, seed=1)


def gradients_by_autograd(analyzer: NPEFFAnalyzer, dataset: list[dict[str, Any]]) -> torch.Tensor:
    """∇ log p(ŷ|x) by the weights under analysis, an example at a time, in the analyzer's order of parameters."""
    model, rows = analyzer.model, []
    names = [m.parameter for m in analyzer.maps]
    weights = [dict(model.named_parameters())[name].requires_grad_() for name in names]
    for example in dataset:
        logits = model(**collate([example], model)).logits[0]
        logits = logits[-1] if logits.dim() == 2 else logits
        if model.config.problem_type == "multi_label_classification":
            signs = torch.where(logits > 0, 1.0, -1.0)
            log_p = torch.nn.functional.logsigmoid(signs * logits).sum()
        else:
            log_p = logits.log_softmax(-1).max()
        found = torch.autograd.grad(log_p, weights, allow_unused=True)
        parts = [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]
        maps = {m.parameter: m for m in analyzer.maps}
        rows.append(torch.cat([maps[n].as_matrix(g).flatten() for n, g in zip(names, parts, strict=True)]))
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(rows)


CASES = [
    ("bert", "sequence-classification", {}),
    ("bert", "sequence-classification", {"problem_type": "multi_label_classification"}),
    ("gpt2", "causal-lm", {}),
    ("llama", "causal-lm", {}),
]


@pytest.mark.parametrize(("family", "task", "overrides"), CASES)
def test_rows_are_the_gradients_of_the_predictions_log_probability(family: str, task: str, overrides: Any) -> None:
    """Oracle: autograd, with its sign."""
    analyzer, dataset = analyzer_of(family, task, model=overrides)
    other, gradients = prediction_gradients(analyzer, dataset)
    rows = gradients.factors[:, 0] * gradients.norms.sqrt()[:, None].float()
    truth = gradients_by_autograd(other, dataset)
    assert torch.allclose(rows, truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max()))


def test_gradients_share_the_sketch_of_the_pefs_and_another_model_is_refused() -> None:
    """Oracle: fingerprints."""
    analyzer, dataset = analyzer_of("bert", "sequence-classification", sketch="kronecker", sketch_dim=8)
    pefs = analyzer.compute_pefs(dataset)
    _, gradients = prediction_gradients(analyzer, dataset, like=pefs)
    assert gradients.fingerprint == pefs.fingerprint and gradients.rank == 1
    elsewhere, dataset = analyzer_of("gpt2", "causal-lm")
    with pytest.raises(IncompatibleSketchError, match="like="):
        prediction_gradients(elsewhere, dataset, like=pefs)


def test_regression_has_no_gradient_to_cluster() -> None:
    """Oracle: the mode of a Gaussian is its mean."""
    analyzer, dataset = analyzer_of("bert", "sequence-classification", model={"problem_type": "regression"})
    with pytest.raises(ValueError, match="regression"):
        prediction_gradients(analyzer, dataset)


@pytest.mark.parametrize("seed", range(3))
def test_spherical_k_means_reaches_the_best_partition(seed: int) -> None:
    """Oracle: exhaustive search. With unit centroids the objective of a partition is Σ_j ‖Σ_{i in j} a_i‖."""
    rows = normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)
    clusters = GradientClustering(3, n_restarts=30).fit(PEFs.from_factors(rows))
    best = max(
        sum(rows[[i for i in range(8) if labels[i] == j]].sum(0).norm().item() for j in range(3))
        for labels in itertools.product(range(3), repeat=8)
    )
    assert float(clusters.soft.amax(1).sum()) == pytest.approx(best, rel=1e-6)
    assert torch.allclose(clusters.centroids.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(clusters.soft.argmax(1), clusters.assignments) and torch.equal(
        clusters.hard.argmax(1), clusters.assignments
    )
    assert torch.bincount(clusters.assignments).diff().le(0).all()  # the largest first


def test_opposite_gradients_are_different_clusters_and_a_zero_one_belongs_to_none() -> None:
    """Oracle: planted ±u; a Fisher would not tell them apart."""
    u, v = torch.eye(6)[0], torch.eye(6)[1]
    rows = torch.stack([u, u, -u, -u, v, v, torch.zeros(6)])
    clusters = GradientClustering(3).fit(PEFs.from_factors(rows))
    assert clusters.assignments[-1] == -1 and clusters.excluded == ["6"] and not clusters.hard[-1].any()
    groups = clusters.assignments[:6].reshape(3, 2)
    assert torch.equal(groups[:, 0], groups[:, 1]) and len(set(groups[:, 0].tolist())) == 3
    with pytest.raises(ValueError, match=r"n_clusters=7.*6"):
        GradientClustering(7).fit(PEFs.from_factors(rows))
    with pytest.raises(ValueError, match="prediction_gradients"):
        GradientClustering(2).fit(PEFs.from_factors(torch.rand(5, 2, 3)))


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
def test_a_centroid_lifts_to_the_sum_of_its_unit_gradients(family: str, task: str) -> None:
    """Oracle: autograd's gradients, scaled and added up; the clusters come from a sketch."""
    analyzer, dataset = analyzer_of(family, task, sketch="countsketch", sketch_dim=256)
    other, gradients = prediction_gradients(analyzer, dataset)
    clusters = GradientClustering(3).fit(gradients)
    truth = gradients_by_autograd(other, dataset)
    # rows are scaled by their norm in the sketch, the only one known
    truth = truth / gradients.norms.sqrt()[:, None].float()
    for j, direction in enumerate(clusters.lift(other, [0, 1, 2], dataset)):
        expected = truth[clusters.assignments == j].sum(0)
        maps = {m.parameter: m for m in other.maps}
        flat = torch.cat(
            [maps[name].as_matrix(direction[name]).flatten() for name in (m.parameter for m in other.maps)]
        )
        assert float(cosine_similarity(flat, expected, dim=0)) > 1 - 1e-5
        assert direction.norm == pytest.approx(1, abs=1e-5)
    with pytest.raises(IndexError, match=r"3.*\[3\]"):
        clusters.lift(other, [3], dataset)


def test_gradient_clustering_gives_two_rows_that_can_be_applied() -> None:
    """Oracle: the weights come back, and differ inside."""
    analyzer, dataset = analyzer_of("bert", "sequence-classification")
    soft, hard = gradient_clustering(analyzer, dataset, 2, n_restarts=2)
    assert soft.name.endswith("soft") and set(hard.coefficients.unique().tolist()) == {0.0, 1.0}
    assert soft.interventions is not None and soft.seconds > 0
    (direction,) = soft.interventions([1])
    name, weight = next((n, p) for n, p in analyzer.model.named_parameters() if n in direction)  # type: ignore[operator]
    before = weight.clone()
    with direction.applied_to(analyzer.model, 0.5):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before), name


@pytest.mark.parametrize(("family", "task", "position"), [
    ("bert", "sequence-classification", "first"), ("bert", "sequence-classification", "last"),
    ("gpt2", "causal-lm", "last"), ("llama", "causal-lm", "last"),
])  # fmt: skip
def test_states_are_those_that_transformers_reports(family: str, task: str, position: Any) -> None:
    """Oracle: `output_hidden_states` of single examples; here they run padded, in batches."""
    analyzer, dataset = analyzer_of(family, task)
    states = hidden_states(analyzer, dataset, Site(analyzer.model, 0, position), batch_size=5)
    for example, state in zip(dataset, states, strict=True):
        with torch.no_grad():
            out = analyzer.model(**collate([example], analyzer.model), output_hidden_states=True)
        assert torch.allclose(state, out.hidden_states[1][0, 0 if position == "first" else -1], atol=1e-5)


def test_an_ablation_takes_the_feature_out_and_leaves_no_hook() -> None:
    """Oracle: the state that the next layer gets, and the model's logits before and after."""
    analyzer, dataset = analyzer_of("bert", "sequence-classification")
    model, site = analyzer.model, Site(analyzer.model, 0, "first")
    batch = collate(dataset, model)
    direction = normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0)
    ablation = FeatureAblation(site, lambda h: (h @ direction)[:, None] * direction)
    entering: list[torch.Tensor] = []
    handle = model.bert.encoder.layer[1].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        before = model(**batch)
        with ablation.applied_to(model, 1.0):
            within = model(**batch)
        with ablation.applied_to(model, 1e-9):
            barely = model(**batch)
        after = model(**batch)
    handle.remove()
    old, new = entering[:2]
    assert torch.allclose(new[:, 0] @ direction, torch.zeros(len(dataset)), atol=1e-5)
    assert torch.equal(old[:, 1:], new[:, 1:]) and not torch.equal(before.logits, within.logits)
    assert torch.equal(before.logits, after.logits) and torch.allclose(barely.logits, after.logits, atol=1e-6)
    with pytest.raises(ValueError, match="another model"), ablation.applied_to(tiny_model("bert"), 1.0):
        pass


def test_layers_that_do_not_exist_are_refused() -> None:
    """Oracle: the messages."""
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=r"2.*layer 2"):
        Site(model, 2)
    with pytest.raises(ValueError, match=r"'encoder\.nowhere'"):
        Site(model, "encoder.nowhere")
    with pytest.raises(ValueError, match="position"):
        Site(model, 0, "middle")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"encoder\.block, decoder\.block"):
        Site(tiny_model("t5"), 0)
    assert Site(model, -1).name == "bert.encoder.layer.1"


def sparse_states(n: int, h: int, m: int, active: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States that are sums of a few planted unit atoms, off centre, and the atoms."""
    generator = torch.Generator().manual_seed(seed)
    atoms = normalize(torch.randn(m, h, generator=generator), dim=1)
    codes = torch.zeros(n, m)
    for i in range(n):
        chosen = torch.randperm(m, generator=generator)[:active]
        codes[i, chosen] = 1 + torch.rand(active, generator=generator)
    return codes @ atoms * 7 + 3, atoms


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "settings", [{"k": 2}, {"kind": "l1", "l1": 0.2, "learning_rate": 1e-2}, {"k": 2, "tied": True}]
)
def test_an_autoencoder_finds_a_planted_dictionary(settings: Any) -> None:
    """Oracle: planted atoms; the variance unexplained is computed by hand on the held-out examples."""
    states, atoms = sparse_states(2000, 24, 20, 2, seed=0)
    config = SAEConfig(n_features=40, **{"steps": 1500, "learning_rate": 5e-3} | settings)
    sae = SparseAutoencoder.fit(states, config)
    found = (atoms @ sae.decoder.T).amax(1)
    assert float((found > 0.9).double().mean()) >= 0.9
    assert sae.fvu < 0.1
    assert torch.allclose(sae.decoder.norm(dim=1), torch.ones(40), atol=1e-5)
    assert settings.get("tied") is None or torch.equal(sae.encoder, sae.decoder)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    test = states[order[:200]]
    rebuilt = sae.encode(test) @ sae.decoder / sae.scale + sae.bias
    by_hand = ((test - rebuilt) ** 2).sum() / ((test - test.mean(0)) ** 2).sum()
    assert sae.fvu == pytest.approx(float(by_hand), rel=1e-5)
    if config.kind == "topk":
        assert int((sae.encode(test) > 0).sum(1).max()) <= 2
    total = sum(sae.contribution(test, j) for j in range(40))
    assert torch.allclose(total + sae.bias, sae.decode(sae.encode(test)), atol=1e-4)


def test_dead_features_are_revived() -> None:
    """Oracle: the same training without revival leaves more of them dead."""
    states, _ = sparse_states(1500, 16, 40, 1, seed=1)
    shared = {"n_features": 40, "k": 1, "steps": 900, "learning_rate": 1e-2}
    without = SparseAutoencoder.fit(states, SAEConfig(revive_every=0, **shared))  # type: ignore[arg-type]
    revived = SparseAutoencoder.fit(states, SAEConfig(revive_every=100, **shared))  # type: ignore[arg-type]
    assert without.revived == 0 < revived.revived
    assert len(revived.dead) < len(without.dead)
    alive = (revived.encode(states) > 0).any(0)
    assert revived.dead == (~alive).nonzero()[:, 0].tolist()


def test_bad_autoencoder_input_is_refused() -> None:
    """Oracle: the messages."""
    with pytest.raises(ValueError, match=r"n_features=3.*4"):
        SAEConfig(n_features=3, k=4)
    with pytest.raises(ValueError, match=r"10.*\(5, 3\)"):
        SparseAutoencoder.fit(torch.rand(5, 3))
    with pytest.raises(ValueError, match="not finite"):
        SparseAutoencoder.fit(torch.full((20, 3), torch.nan))
    with pytest.raises(ValueError, match="equal"):
        SparseAutoencoder.fit(torch.ones(20, 3))


def test_an_autoencoder_of_a_model_ablates_its_features() -> None:
    """Oracle: at scale 1 the state loses exactly the feature's contribution."""
    analyzer, dataset = analyzer_of("gpt2", "causal-lm")
    result = sparse_autoencoder(analyzer, dataset, SAEConfig(n_features=6, k=2, steps=50), layer=0)
    assert result.coefficients.shape == (12, 6) and result.interventions is not None
    assert result.facts["k"] == 2 and result.facts["fvu"] > 0
    site = Site(analyzer.model, 0, "last")
    states = hidden_states(analyzer, dataset, site)
    feature = int(result.coefficients.sum(0).argmax())
    (ablation,) = result.interventions([feature])
    with ablation.applied_to(analyzer.model, 1.0):
        after = hidden_states(analyzer, dataset, site)
    assert torch.allclose(states - after, ablation.contribution(states), atol=1e-4)  # type: ignore[attr-defined]
    assert float((states - after).abs().sum()) > 0
    with pytest.raises(IndexError, match=r"6.*\[6\]"):
        result.interventions([6])


def test_sanity_rows_find_planted_groups_and_random_ones_do_not() -> None:
    """Oracle: planted clusters of states; the floor is statistical (n = 600, three standard errors)."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(600) % 3
    states = torch.randn(3, 10, generator=generator)[groups] * 3 + torch.randn(600, 10, generator=generator) + 5
    for result in (activation_kmeans(states, 3, n_restarts=3), activation_nmf(states, 3)):
        scores = [max(auroc(result.coefficients[:, j], groups == g) for j in range(3)) for g in range(3)]
        assert min(scores) > (0.99 if "k-means" in result.name else 0.8), result.name
    floor = random_coefficients(600, 3)
    assert all(abs(auroc(floor.coefficients[:, j], groups == 0) - 0.5) < 3 * 0.025 for j in range(3))
    for fit in (activation_kmeans, activation_nmf):
        with pytest.raises(ValueError, match=r"n_(clusters|components)=5.*4"):
            fit(states[:4], 5)


def test_a_methods_coefficients_must_be_numbers() -> None:
    """Oracle: the messages."""
    with pytest.raises(ValueError, match=r"floating-point \(n, r\)"):
        MethodResult("x", torch.ones(3))
    with pytest.raises(ValueError, match=r"x: 1.*NaN"):
        MethodResult("x", torch.tensor([[0.0], [torch.nan]]))


def test_methods_are_kept_for_ratings(tmp_path: Path) -> None:
    """Oracle: what was written is read back; files that do not fit are refused."""
    methods = [MethodResult("a / b", torch.rand(4, 2)), MethodResult("c", torch.rand(4, 3))]
    save_methods(tmp_path, methods, ["x", "y", "z", "\u2028"])
    read = load_methods(tmp_path)
    assert read is not None and [m.name for m in read[0]] == ["a / b", "c"] and read[1] == ["x", "y", "z", "\u2028"]
    assert all(torch.equal(m.coefficients, n.coefficients) for m, n in zip(methods, read[0], strict=True))
    assert load_methods(tmp_path / "nothing") is None
    with pytest.raises(ValueError, match=r"'a / b', 'c'.*3"):
        save_methods(tmp_path, methods, ["x", "y", "z"])
    save_methods(tmp_path / "other", methods[:1], ["x", "y", "z", "w"])
    (tmp_path / "methods.json").write_bytes((tmp_path / "other" / "methods.json").read_bytes())
    with pytest.raises(CorruptStoreError, match=r"coefficients\.safetensors.*methods\.json"):
        load_methods(tmp_path)


def test_the_folder_offers_its_public_names() -> None:
    """Oracle: `__all__`, name by name, here and in the studies."""
    import hf_npeff.baselines
    import hf_npeff.studies

    for folder in (hf_npeff.baselines, hf_npeff.studies):
        assert all(callable(getattr(folder, name)) for name in folder.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            folder.nothing  # noqa: B018
