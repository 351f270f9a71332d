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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_npeff.baselines.activations import random_coefficients
from hf_npeff.baselines.method import MethodResult
from hf_npeff.demo import load_model
from hf_npeff.studies.detection import detection_accuracy
from hf_npeff.studies.fair import random_directions
from hf_npeff.studies.likelihood_rater import intruder_by_likelihood, rate_by_likelihood
from hf_npeff.studies.measures import bootstrap_interval
from hf_npeff.studies.pair_data import home_assistant_rows
from hf_npeff.studies.pair_methods import home_assistant_analyzer, of_rows, of_states, rows_and_states
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.ratings import RatingStudy
from hf_npeff.studies.result import markdown, number
from hf_npeff.studies.rival_settings import MinimalPairsConfig
from hf_npeff.studies.scripted_rater import intruder_by_words, intruders_found, rate_by_words
from hf_npeff.studies.settings import RatingsConfig

MODEL = "SmolLM2-135M-Instruct, by likelihoods"
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
    "random directions, alone",
    "random",
)
"""Each with the reading that was better on seed 10 of the planted cues; hidden states are those of the last layer."""
OF_THE_MODEL = (
    "NPEFF, power 0.25, alone",
    "gradient clustering, alone",
    "dictionary learning on PEFs, alone",
    "SAE, alone",
    "activations, k-means, alone",
    "random directions, alone",
    "random, draw 0",
)
"""Those that the language model rates, which takes seconds a task."""
RANDOM_DRAWS = 10
"""Of random coefficients. Sixteen tasks have a standard error of .04: one draw of them once scored .65."""
SENTENCES = 300
RATED = RatingsConfig(features=16)
"""All features of every method."""
INTRUDERS_OF = 8
"""Features of each method whose intruders the language model looks for: seven passes a task."""
READINGS = {
    "script": "detection, script",
    "intruder": "intruder, script",
    "model": "detection, model",
    "intruder, model": "intruder, model",
}
CONTROLS = {"script": "any", "lengths": "as many words", "labels": "the same labels"}
"""{reading: what the distractors of the script's tasks have in common with the members}."""


def fitted(seed: int, trained: bool) -> tuple[list[MethodResult], list[str], list[str]]:
    """Every method's features of the same sentences, the sentences, and their labels."""
    config = MinimalPairsConfig()
    every = home_assistant_rows(seed=seed)
    chosen = set(random.Random(seed).sample(range(len(every)), SENTENCES))
    rows = [every[i] for i in sorted(chosen)]
    texts = {row["text"] for row in rows}
    others = [row for row in every if row["text"] not in texts]
    analyzer = home_assistant_analyzer(others, config.rank, config.steps, seed, trained=trained)
    pefs, gradients, states = rows_and_states(analyzer, [{"text": row["text"]} for row in rows], "first", config)
    features = {**of_rows(pefs, gradients, config, seed)[0], **of_states(states, config, seed)}
    features["random directions, alone"] = [random_directions(pefs, config.n_components, seed).alone]
    found = [MethodResult(name, features[name][-1].float()) for name in METHODS[:-1]]
    for draw in range(RANDOM_DRAWS):
        W = random_coefficients(len(rows), config.n_components, seed=RANDOM_DRAWS * seed + draw).coefficients
        found.append(MethodResult(f"random, draw {draw}", W))
    return found, [row["text"] for row in rows], [str(row["targets"]) for row in rows]


def detections(study: RatingStudy, picked: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """{method: the detection accuracy of every task that was answered}; draws of random coefficients are one."""
    scores: dict[str, list[float]] = {}
    for task, chosen in picked.items():
        key = study.key[task]
        scores.setdefault(_row(key.method), []).append(detection_accuracy(key.members, chosen))
    return scores


def _row(method: str) -> str:
    return "random" if method.startswith("random, draw") else method


def _joined(scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {}
    for method, values in scores.items():
        rows.setdefault(_row(method), []).extend(values)
    return rows


def rated(seed: int, trained: bool) -> dict[str, Any]:
    """{reading: {method: scores}} of one model."""
    methods, texts, labels = fitted(seed, trained)
    study = RatingStudy.make(methods, texts, RATED)
    made: dict[str, Any] = {
        "script": detections(study, rate_by_words(study).picked),
        "intruder": _joined(intruders_found(study, intruder_by_words(study))),
    }
    for name, values in (("lengths", [len(text.split()) for text in texts]), ("labels", labels)):
        controlled = RatingStudy.make(methods, texts, RATED, alike=values)
        made[name] = detections(controlled, rate_by_words(controlled).picked)
    few = [m for m in methods if m.name in OF_THE_MODEL]
    some, fewer = (RatingStudy.make(few, texts, replace(RATED, features=n)) for n in (RATED.features, INTRUDERS_OF))
    model, tokenizer = load_model()
    model = model.float().eval()
    made["model"] = detections(some, rate_by_likelihood(some, model, tokenizer, MODEL).picked)
    made["intruder, model"] = _joined(intruders_found(fewer, intruder_by_likelihood(model, tokenizer), most=1))
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


def controls(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The script's detection with distractors that are like the members in length, or in their labels."""

    def cell(group: str, reading: str, method: str) -> str:
        scores = [score for part in parts[group] for score in part[reading].get(method, [])]
        if len(scores) < FEWEST:
            return "–"
        low, high = bootstrap_interval(torch.tensor(scores, dtype=torch.float64))
        return f"{number(_mean(scores), 2)} ({number(low, 2)}–{number(high, 2)}; {len(scores)})"

    header = ["method, reading", *(f"{name}{end}" for name in CONTROLS.values() for end in ("", ", random weights"))]
    body = [[m, *(cell(g, r, m) for r in CONTROLS for g in ("trained", "random weights"))] for m in METHODS]
    return markdown(header, body)


def page(kept: Mapping[str, Any]) -> str:
    """README.md from result.json."""
    parts = kept["parts"]
    seeds = len(parts["trained"])
    models = f"{seeds} fine-tuned models and as many" if seeds > 1 else "one fine-tuned model and one"
    return (
        "# Ratings by a script and by a small language model\n\n"
        f"Made by `python -m tests.benchmarks.rated`: {kept['sentences']} sentences of Home Assistant that MiniLM was "
        f"not fine-tuned on, {models} with random weights, {kept['rated']['features']} features of each method "
        f"({kept['intruders of']} for intruders by the language model). In brackets are 95% intervals, bootstraps over "
        f"tasks.\n\n{table(parts)}\n\n"
        "The same detection by the script, where distractors have as many words as the members, or exactly their "
        f"labels (in brackets also the number of tasks):\n\n{controls(parts)}\n\n{_READING}"
    )


FEWEST = 5
"""Tasks below which a cell is left empty: an interval of so few says nothing."""

_READING = """How to read it:

- **Detection**: six top examples of a feature are shown, and the rater picks those that belong among three further top
  examples and six of the lower half. The score is the mean of the share of members picked and of the share of others
  left; 0.5 is chance.
- **Intruder**: one of the lower half stands among the six shown, and the rater names it; 1 in 7 is chance.
- **Script** compares the words and letters that texts share (`hf_npeff.studies.rate_by_words`) and knows nothing else.
  It measures how alike a feature's examples look, not whether they are alike in what the model does.
- **Model** is SmolLM2-135M-Instruct, the demo's. It cannot answer in the form that `hf-npeff study ratings --rater`
  asks for (0 of 24 tasks), so it is read by likelihoods (`hf_npeff.studies.rate_by_likelihood`): it picks the texts
  that become likelier after the texts shown.
- **Random weights**: the same architecture before training, fitted and rated alike. What scores as high there is what
  the texts have in common, not what the model has learned.
- **Random directions** are random combinations of the rows, read like components: what they score comes from the rows
  and not from any decomposition. **Random** are coefficients drawn at random, in ten draws. One draw of 16 tasks has a
  standard error of .04; the first draw had .65 by chance in an earlier version of this page, which had no other.
- **Controls**: a feature whose examples all have one label leaves no distractors with that label, so most cells of
  *the same labels* are empty.
"""


def part_settings(seed: int, group: str) -> dict[str, Any]:
    """What the part of a seed, and of trained or random weights, depends on."""
    return {"seed": seed, "group": group, "methods": METHODS, "sentences": SENTENCES, "rated": asdict(RATED),
            "by the model": [INTRUDERS_OF, OF_THE_MODEL, MODEL], "random": RANDOM_DRAWS,
            "readings": [*READINGS, *CONTROLS]}  # fmt: skip


def main() -> None:
    """Fit, rate, keep, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args()
    parts: dict[str, list[dict[str, Any]]] = {"trained": [], "random weights": []}
    for seed in range(given.seeds):
        for group in parts:
            compute = partial(rated, seed, group == "trained")
            name = f"{group.replace(' ', '_')}-{seed}"
            parts[group].append(kept_part(given.output / "parts", name, part_settings(seed, group), compute))
    given.output.mkdir(parents=True, exist_ok=True)
    kept = {"sentences": SENTENCES, "rated": asdict(RATED), "intruders of": INTRUDERS_OF, "parts": parts}
    (given.output / "result.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (given.output / "README.md").write_text(page(kept), encoding="utf-8")
    print(page(kept))


if __name__ == "__main__":
    main()
