"""Does whitening by curvature help NPEFF? Rows as they are, balanced by module, whitened by K-FAC, and whitened whole.

`python -m tests.benchmarks.whitening` writes docs/studies/whitening: planted cues (the task of docs/studies.md with
fewer sentences; seeds 0 and 1) and first names (MiniLM fine-tuned as in examples/04). Ridges are the best of a grid
on seed 10 of the planted cues. Parts that are done are kept in the folder's `parts`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_npeff import NPEFF, FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.baselines.row_dictionaries import coordinates
from hf_npeff.decomposition.weighting import balance_scales
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.factors import first_half
from hf_npeff.studies.fair import found_by, measurable
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.planted import TARGETS, planted_model, planted_sentences
from hf_npeff.studies.result import markdown, number
from hf_npeff.studies.settings import PlantedConfig
from hf_npeff.studies.whitening import fully_whitened, kfac_whitened

FOLDER = Path("docs/studies/whitening")
TUNED_ON, SEEDS = 10, (0, 1)
RIDGES = (0.01, 0.1, 1.0, 10.0)
POWERS = (1.0, 0.5, 0.25)
SENTENCES = 300
RESTARTS = 4
WAYS = ("as they are", "balanced by module", "whitened by K-FAC", "whitened whole")
ALL_RIDGES = dict.fromkeys(WAYS[2:], RIDGES)


def as_points(pefs: PEFs) -> PEFs:
    """The same PEFs in coordinates of the span of their rows: exact, and of fewer numbers."""
    rows = pefs.factors.flatten(0, 1)
    if rows.shape[1] <= len(rows):
        return pefs
    return PEFs.from_factors(coordinates(rows @ rows.T).float().reshape(*pefs.factors.shape[:2], -1))


def weighted(pefs: PEFs, ridges: Mapping[str, Sequence[float]]) -> dict[str, PEFs]:
    """{way, with its ridge: the PEFs}, in coordinates."""
    lengths = pefs.norms.sqrt()[:, None, None]
    made = {WAYS[0]: pefs, WAYS[1]: PEFs.from_factors(pefs.factors * lengths * balance_scales(pefs))}
    for way, whitened in ((WAYS[2], kfac_whitened), (WAYS[3], fully_whitened)):
        made |= {f"{way}, ridge {ridge:g}": whitened(pefs, ridge) for ridge in ridges[way]}
    return {name: as_points(each) for name, each in made.items()}


def planted(seed: int) -> tuple[PEFs, Attributes, Tensor, int]:
    """PEFs of planted sentences, their cues, who is chosen on, and the number of components."""
    config = PlantedConfig(seed=seed, n=SENTENCES)
    rows = planted_sentences(config, config.n, seed=3000 + seed)
    fisher = FisherConfig(rank=config.most, target_modules=TARGETS, sketch="identity", seed=seed)
    analyzer = NPEFFAnalyzer(planted_model(config)[0], fisher=fisher)
    pefs = analyzer.compute_pefs([{"input_ids": row["input_ids"]} for row in rows], batch_size=64)
    attributes = Attributes.from_columns({"cue": [row["cues"] for row in rows]})
    return pefs, attributes, first_half(config.n, seed), 16


def first_names() -> tuple[PEFs, Attributes, Tensor, int]:
    """The same of first names."""
    from tests.test_docs import example

    task = example("04_fine_tune_and_compare").prepare("first_names", Path("runs/downloads"), 200, 300)
    analyzer = task.analyzer.with_fisher(FisherConfig(rank=4, sketch="kronecker", sketch_dim=32))
    pefs = analyzer.compute_pefs(task.dataset, batch_size=32)
    return pefs, task.attributes, first_half(len(task.dataset), 0), 24


def measured(data: str, seed: int, ridges: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """{way: {power: [mean AUROC of coefficients, of alignments]}}."""
    pefs, attributes, choose, r = first_names() if data == "first names" else planted(seed)
    known = measurable(attributes, choose)
    rows: dict[str, Any] = {}
    for way, weights in weighted(pefs, ridges).items():
        rows[way] = {}
        for power in POWERS:
            W, N = NPEFF(r, n_restarts=RESTARTS, power=power, seed=seed).fit(weights).explain(weights)
            rows[way][f"{power:g}"] = [statistics.mean(found_by([X], known, choose)[0].values()) for X in (W, N)]
    return {"rows": rows, "sketch error": pefs.sketch_error}


def best_ridges(tuned: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each whitening's ridge with the best mean of all its figures on the tuning copy."""
    found = {}
    for way in WAYS[2:]:
        score = {ridge: _mean(tuned["rows"][f"{way}, ridge {ridge:g}"]) for ridge in RIDGES}
        found[way] = [max(score, key=score.__getitem__)]
    return found


def _mean(powers: Mapping[str, Sequence[float]]) -> float:
    return statistics.mean(value for both in powers.values() for value in both)


def page(kept: Mapping[str, Any]) -> str:
    """README.md from result.json."""
    parts, ridges = kept["parts"], kept["ridges"]

    def cell(data: str, way: str, power: str, reading: int) -> str:
        values = [part["rows"][way][power][reading] for part in parts[data]]
        ends = f" ({number(min(values))}–{number(max(values))})" if len(values) > 1 else ""
        return number(statistics.mean(values)) + ends

    rows = list(parts["planted cues"][0]["rows"])
    tables = []
    for data in parts:
        header = ["rows", *(f"γ = {p:g}, {way}" for p in POWERS for way in ("W", "alone"))]
        body = [[way, *(cell(data, way, f"{p:g}", i) for p in POWERS for i in (0, 1))] for way in rows]
        tables.append(f"{data}:\n\n{markdown(header, body)}")
    best = {d: {way: max(statistics.mean(part["rows"][way][f"{p:g}"][i] for part in parts[d])
                         for p in POWERS for i in (0, 1)) for way in rows} for d in parts}  # fmt: skip
    said = "; ".join(f"{d}: " + ", ".join(f"{way} {number(best[d][way])}" for way in rows) for d in parts)
    chosen = " and ".join(f"{values[0]:g} ({way})" for way, values in ridges.items())
    return (
        "# Whitening by curvature\n\n"
        "Mean AUROC of each cue's or attribute's best feature, with the best γ and reading of each kind of rows: "
        f"{said}.\n\n"
        f"Made by `python -m tests.benchmarks.whitening`. NPEFF on PEFs as they are, with modules balanced "
        '(`balance="module"`), whitened by K-FAC module by module, and whitened by the whole Fisher of the same '
        f"examples (`hf_npeff/studies/whitening.py`). Ridges, as shares of the mean eigenvalue, are the best of "
        f"{', '.join(f'{r:g}' for r in RIDGES)} on seed {TUNED_ON} of the planted cues: {chosen}. W: "
        f"coefficients; alone: alignments. Planted cues: {len(parts['planted cues'])} models, mean and range; first "
        f"names: one model, sketch error {number(parts['first names'][0]['sketch error'], 2)}.\n\n"
        + "\n\n".join(tables)
        + "\n"
    )


def part_settings(data: str, seed: int, ridges: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What the part of a data set and a seed depends on."""
    return {"data": data, "seed": seed, "ridges": ridges, "powers": POWERS, "sentences": SENTENCES}


def main() -> None:
    """Choose the ridges, measure, keep, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    folder = parser.parse_args().output

    def part(data: str, seed: int, ridges: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        name, compute = f"{data.replace(' ', '_')}-{seed}", partial(measured, data, seed, ridges)
        return kept_part(folder / "parts", name, part_settings(data, seed, ridges), compute)

    tuned = part("planted cues", TUNED_ON, ALL_RIDGES)
    ridges = best_ridges(tuned)
    parts = {"planted cues": [part("planted cues", seed, ridges) for seed in SEEDS],
             "first names": [part("first names", 0, ridges)]}  # fmt: skip
    kept = {"ridges": ridges, "tuned": tuned["rows"], "parts": parts}
    (folder / "result.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(page(kept), encoding="utf-8")
    print(page(kept))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
