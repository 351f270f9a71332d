"""Do raters see what a feature's examples have in common? A script and a small language model, beside random weights.

`python -m tests.benchmarks.rated` writes docs/studies/ratings. The model is MiniLM, fine-tuned on sentences of Home
Assistant as for the minimal pairs, and the same architecture with random weights; the sentences that are rated were not
trained on. Models that are done are kept in the folder's `parts`. About two minutes of the processor each.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_npeff.baselines.activations import random_coefficients
from hf_npeff.baselines.method import MethodResult
from hf_npeff.demo import load_model
from hf_npeff.studies.detection import detection_accuracy
from hf_npeff.studies.measures import bootstrap_interval
from hf_npeff.studies.pair_data import home_assistant_rows
from hf_npeff.studies.pair_methods import home_assistant_analyzer, of_rows, of_states, rows_and_states
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.raters import LocalChat, rate
from hf_npeff.studies.ratings import RatingStudy
from hf_npeff.studies.result import markdown, number
from hf_npeff.studies.rival_settings import MinimalPairsConfig
from hf_npeff.studies.scripted_rater import intruder_by_words, intruders_found, rate_by_words
from hf_npeff.studies.settings import RatingsConfig

FOLDER = Path("docs/studies/ratings")
METHODS = (
    "NPEFF, power 0.25, alone",
    "gradient clustering, alone",
    "gradient clustering, all rows, alone",
    "Gradient Atoms, alone",
    "dictionary learning on PEFs, alone",
    "NMF on PEFs, competing",
    "autoencoder of gradients, alone",
    "SAE, alone",
    "activations, k-means, alone",
    "activations, NMF, alone",
    "random",
)
"""Each with the reading that was better on seed 10 of the planted cues; hidden states are those of the last layer."""
OF_THE_MODEL = ("NPEFF, power 0.25, alone", "gradient clustering, alone", "activations, k-means, alone", "random")
"""Those that the language model rates, which takes seconds a task."""
SENTENCES = 300
RATED = RatingsConfig(features=16)
"""All features of every method."""
BY_THE_MODEL = RatingsConfig(features=6)
READINGS = {"script": "detection, script", "intruder": "intruder, script", "model": "detection, model"}


def fitted(seed: int, trained: bool) -> tuple[list[MethodResult], list[str]]:
    """Every method's features of the same sentences, and the sentences."""
    config = MinimalPairsConfig()
    every = home_assistant_rows(seed=seed)
    chosen = set(random.Random(seed).sample(range(len(every)), SENTENCES))
    rows = [every[i] for i in sorted(chosen)]
    texts = {row["text"] for row in rows}
    others = [row for row in every if row["text"] not in texts]
    analyzer = home_assistant_analyzer(others, config.rank, config.steps, seed, trained=trained)
    pefs, gradients, states = rows_and_states(analyzer, [{"text": row["text"]} for row in rows], "first", config)
    features = {**of_rows(pefs, gradients, config, seed)[0], **of_states(states, config, seed)}
    features["random"] = [random_coefficients(len(rows), config.n_components, seed=seed).coefficients]
    return [MethodResult(name, features[name][-1].float()) for name in METHODS], [row["text"] for row in rows]


def detections(study: RatingStudy, picked: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """{method: the detection accuracy of every task that was answered}."""
    scores: dict[str, list[float]] = {}
    for task, chosen in picked.items():
        key = study.key[task]
        scores.setdefault(key.method, []).append(detection_accuracy(key.members, chosen))
    return scores


def rated(seed: int, trained: bool) -> dict[str, Any]:
    """{reading: {method: scores}} of one model, and how many tasks the language model answered."""
    methods, texts = fitted(seed, trained)
    study = RatingStudy.make(methods, texts, RATED)
    made: dict[str, Any] = {
        "script": detections(study, rate_by_words(study).picked),
        "intruder": intruders_found(study, intruder_by_words(study)),
    }
    some = RatingStudy.make([m for m in methods if m.name in OF_THE_MODEL], texts, BY_THE_MODEL)
    model, tokenizer = load_model()
    answers = rate(some, LocalChat(model.float(), tokenizer, name="SmolLM2-135M-Instruct", max_tokens=24), attempts=2)
    made["model"] = detections(some, answers.picked)
    made["answered"] = [len(answers.picked), len(some.tasks)]
    return made


def table(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row a method: means and intervals over tasks, and the same with random weights."""

    def cell(group: str, reading: str, method: str) -> str:
        scores = [score for part in parts[group] for score in part[reading].get(method, [])]
        if not scores:
            return "–"
        low, high = bootstrap_interval(torch.tensor(scores, dtype=torch.float64))
        return f"{number(sum(scores) / len(scores), 2)} ({number(low, 2)}–{number(high, 2)})"

    order = sorted(METHODS, key=lambda m: -_mean([s for part in parts["trained"] for s in part["script"].get(m, [])]))
    header = ["method, reading", *(f"{name}{end}" for name in READINGS.values() for end in ("", ", random weights"))]
    body = [[m, *(cell(g, r, m) for r in READINGS for g in ("trained", "random weights"))] for m in order]
    return markdown(header, body)


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def page(kept: Mapping[str, Any]) -> str:
    """README.md from result.json."""
    parts = kept["parts"]
    answered = [sum(part["answered"][i] for group in parts.values() for part in group) for i in (0, 1)]
    seeds = len(parts["trained"])
    models = f"{seeds} fine-tuned models and as many" if seeds > 1 else "one fine-tuned model and one"
    return (
        "# Ratings by a script and by a small language model\n\n"
        f"Made by `python -m tests.benchmarks.rated`: {kept['sentences']} sentences of Home Assistant that MiniLM was "
        f"not fine-tuned on, {models} with random weights, {kept['rated']['features']} features of each method. In "
        f"brackets are 95% intervals, bootstraps over tasks.\n\n{table(parts)}\n\n"
        f"{_READING.format(answered=answered[0], asked=answered[1])}"
    )


_READING = """How to read it:

- **Detection**: six top examples of a feature are shown, and the rater picks those that belong among three further top
  examples and six of the lower half. The score is the mean of the share of members picked and of the share of others
  left; 0.5 is chance.
- **Intruder**: one of the lower half stands among the six shown, and the rater names it; 1 in 7 is chance.
- **Script** compares the words and letters that texts share (`hf_npeff.studies.rate_by_words`) and knows nothing else.
  It measures how alike a feature's examples look, not whether they are alike in what the model does.
- **Model** is SmolLM2-135M-Instruct, the demo's, which answered {answered} of {asked} tasks in the form that was asked
  for. It is far too small to be a good rater; `hf-npeff study ratings --rater` takes a larger one.
- **Random weights**: the same architecture before training, fitted and rated alike. What scores as high there is what
  the texts have in common, not what the model has learned.
"""


def main() -> None:
    """Fit, rate, keep, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args()
    parts: dict[str, list[dict[str, Any]]] = {"trained": [], "random weights": []}
    for seed in range(given.seeds):
        for group in parts:
            settings = {"seed": seed, "group": group, "methods": METHODS, "sentences": SENTENCES,
                        "rated": asdict(RATED), "by the model": asdict(BY_THE_MODEL)}  # fmt: skip
            compute = partial(rated, seed, group == "trained")
            name = f"{group.replace(' ', '_')}-{seed}"
            parts[group].append(kept_part(given.output / "parts", name, settings, compute))
    given.output.mkdir(parents=True, exist_ok=True)
    kept = {"sentences": SENTENCES, "rated": asdict(RATED), "parts": parts}
    (given.output / "result.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (given.output / "README.md").write_text(page(kept), encoding="utf-8")
    print(page(kept))


if __name__ == "__main__":
    main()
