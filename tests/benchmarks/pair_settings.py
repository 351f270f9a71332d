"""Settings of single methods in the study of minimal pairs, chosen on seed 10, which the study does not measure.

`python -m tests.benchmarks.pair_settings planted_cues` (or `home_assistant`) trains the model of that seed, fits every
method with every setting of its grid, and writes mean margins to docs/studies/minimal_pairs/settings_planted_cues.json.
NPEFF has a grid as the others have. One and three minutes of one core.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hf_npeff import NPEFF, FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.baselines.activations import activation_kmeans
from hf_npeff.baselines.row_dictionaries import (
    Readings,
    autoencoder_readings,
    cluster_readings,
    gradient_atoms,
    gradient_autoencoder,
    line_clusters,
    nonnegative_parts,
    pef_dictionary,
    pef_nmf,
)
from hf_npeff.baselines.sparse_autoencoder import SAEConfig, SparseAutoencoder
from hf_npeff.studies.minimal_pairs import pair_margins, summary
from hf_npeff.studies.pair_data import attributes_of, cue_rows, home_assistant_rows, minimal_pairs, with_bases
from hf_npeff.studies.pair_methods import home_assistant_analyzer, rows_and_states
from hf_npeff.studies.planted import TARGETS, planted_model
from hf_npeff.studies.rival_settings import MinimalPairsConfig
from hf_npeff.studies.settings import PlantedConfig

SEED = 10
FOLDER = Path("docs/studies/minimal_pairs")


def truncated(pefs: PEFs, c: int) -> PEFs:
    """The best c rows of every PEF."""
    _, S, Vh = torch.linalg.svd(pefs.factors.float(), full_matrices=False)
    return PEFs.from_factors(S[:, :c, None] * Vh[:, :c])


def grid(
    pefs: PEFs, gradients: PEFs, states: list[torch.Tensor], r: int, steps: int
) -> Iterator[tuple[str, dict[str, Any], Callable[[], list[Readings]]]]:
    """(method, setting, what fits it, a reading a layer)."""

    def npeff(power: float, c: int) -> list[Readings]:
        rows = truncated(pefs, c)
        return [Readings(*NPEFF(r, power=power, n_restarts=4, seed=SEED).fit(rows).explain(rows))]

    for power in (1.0, 0.5, 0.25):
        for c in (4, pefs.rank):
            yield "NPEFF", {"power": power, "rank": c}, lambda p=power, c=c: npeff(p, c)
    for c in (1, 4):
        yield "line clusters", {"rank": c}, lambda c=c: [line_clusters(truncated(pefs, c), r, seed=SEED, n_restarts=4)]
    for alpha in (0.03, 0.1, 0.3):
        for ridge in (0.01, 0.1, 1.0, None):
            yield (
                "Gradient Atoms",
                {"alpha": alpha, "ridge": ridge},
                lambda a=alpha, b=ridge: [gradient_atoms(gradients, r, alpha=a, ridge=b, seed=SEED)],
            )
    for alpha in (0.03, 0.1, 0.3):
        yield (
            "dictionary learning on PEFs",
            {"alpha": alpha},
            lambda a=alpha: [pef_dictionary(truncated(pefs, 4), r, alpha=a, seed=SEED)],
        )
    yield "NMF on PEFs", {}, lambda: [pef_nmf(truncated(pefs, 4), r, seed=SEED)]
    for k in (2, 4):
        yield (
            "autoencoder of gradients",
            {"k": k},
            lambda k=k: [gradient_autoencoder(gradients, r, k=k, steps=steps, seed=SEED)],
        )
    for k in (2, 4):
        yield (
            "SAE",
            {"k": k},
            lambda k=k: [
                autoencoder_readings(SparseAutoencoder.fit(X, SAEConfig(r, k=k, steps=steps, seed=SEED)), X)
                for X in states
            ],
        )
    yield (
        "activations, k-means",
        {},
        lambda: [cluster_readings(activation_kmeans(X, r, seed=SEED, n_restarts=4).coefficients) for X in states],
    )
    yield (
        "activations, NMF",
        {},
        lambda: [nonnegative_parts(torch.cat([X.clamp_min(0), (-X).clamp_min(0)], 1), r, seed=SEED) for X in states],
    )


def task_of(data: str, config: MinimalPairsConfig) -> tuple[NPEFFAnalyzer, list[dict[str, Any]], list[dict[str, Any]]]:
    """The model of the seed with one row a label kept, the rows, and what the model reads of them."""
    if data == "planted_cues":
        task = PlantedConfig(seed=SEED)
        rows = cue_rows(task, config.sentences, seed=4000 + SEED)
        fisher = FisherConfig(rank=task.labels, target_modules=TARGETS, seed=SEED)
        analyzer = NPEFFAnalyzer(planted_model(task)[0], fisher=fisher)
        return analyzer, rows, [{"input_ids": row["input_ids"]} for row in rows]
    every = home_assistant_rows(seed=SEED)
    rows = with_bases(every, config.per_attribute, seed=SEED)
    texts = {row["text"] for row in rows}
    others = [row for row in every if row["text"] not in texts]
    analyzer = home_assistant_analyzer(others, len(rows[0]["targets"]), config.steps, SEED)
    return analyzer, rows, [{"text": row["text"]} for row in rows]


def main() -> None:
    torch.set_num_threads(1)
    data, config = sys.argv[1], MinimalPairsConfig()
    analyzer, rows, dataset = task_of(data, config)
    pefs, gradients, states = rows_and_states(analyzer, dataset, "first", config)
    print(f"{time.process_time():.0f} s: rows {tuple(pefs.factors.shape)}", flush=True)
    factors, bases = [row["factors"] for row in rows], [row["base"] for row in rows]
    (names, have), pairs = attributes_of(factors), minimal_pairs(factors, bases)
    kept = []
    for method, setting, fit in grid(pefs, gradients, states, config.n_components, config.sae_steps):
        layers = fit()
        point: dict[str, Any] = {"method": method, **setting}
        for way in ("competing", "alone"):
            margins = pair_margins([getattr(each, way) for each in layers], have, names, pairs, bases, SEED)
            for how, found in margins.items():
                if how == "one layer" or len(layers) > 1:
                    point[way if how == "one layer" else f"{way}, {how}"] = round(summary(found)["margin"], 3)
        kept.append(point)
        print(f"{time.process_time():.0f} s: {point}", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"seed": SEED, "data": data, "margins": kept}, indent=1)
    (FOLDER / f"settings_{data}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
