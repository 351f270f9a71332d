"""Labels are compared with predictions only where they are labels, and as the classes that they name."""

from __future__ import annotations

import contextlib
from typing import Any

import datasets
import pytest
import torch

from hf_npeff import NPEFF, PerturbationReport
from hf_npeff.data import Examples
from hf_npeff.encoding.columns import columns_of, correctness, with_label_names
from hf_npeff.encoding.labels import Truth, class_numbers, truth_of
from hf_npeff.weights.perturbation import PerturbationReport as Report
from tests.analyses import analyzer_of
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ["the cat sees", "a dog", "one two three", "the dog sees a cat", "two", "a cat", "three one", "dog the a"]
SENTIMENT = {0: "NEGATIVE", 1: "POSITIVE"}


@pytest.mark.parametrize(
    ("column", "data_names", "model_names", "expected"),
    [
        ([0, 1, -1, None, 2], None, None, [0, 1, None, None, None]),
        ([0.0, float("nan"), 1.0, 0.5], None, None, [0, None, 1, None]),
        (["positive", "Negative ", "neutral", "LABEL_1"], None, SENTIMENT, [1, 0, None, None]),
        (["LABEL_1", "LABEL_0", "1"], None, {0: "LABEL_0", 1: "LABEL_1"}, [1, 0, 1]),
        ([0, 1], ["positive", "negative"], SENTIMENT, [1, 0]),
        ([0, 1, -1], ["pos", "neg"], SENTIMENT, [1, 0, None]),
        ([0, 1], ["no", "yes"], SENTIMENT, [0, 1]),
        ([0, 1, 2], ["no", "yes", "perhaps"], SENTIMENT, [None, None, None]),
        ([0, 1], ["entailment", "not_entailment"], {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, [2, None]),
        ([True, False, None], None, {0: "False", 1: "True"}, [1, 0, None]),
        ([True, False], None, None, [1, 0]),
    ],
)  # fmt: skip
def test_labels_are_the_classes_that_they_name(
    column: list[Any], data_names: list[str] | None, model_names: dict[int, str] | None, expected: list[int | None]
) -> None:
    """Oracle: written by hand."""
    k = 2 if model_names is None else len(model_names)
    truth = truth_of(column, "softmax", k, data_names, model_names)
    assert truth.values == expected and truth.labelled == sum(v is not None for v in expected)
    assert (truth.why_none is None) == (truth.labelled > 0)


def test_classes_that_cannot_be_matched_are_said() -> None:
    """Oracle: the reasons that the docstring gives."""
    assert "3 classes" in class_numbers(["a", "b", "c"], None, 2)
    assert "are not the model's" in class_numbers(["no", "yes", "perhaps"], SENTIMENT, 2)
    assert "twice" in class_numbers(["pos", "positive"], SENTIMENT, 2)
    assert class_numbers(["anger", "joy", "fear"], {0: "joy", 1: "anger", 2: "dread"}, 3) == [1, 0, 2]


def test_several_labels_and_numbers() -> None:
    """Oracle: written by hand; lists of classes where the lists are no 0 or 1 a label, and JSON as stores keep it."""
    assert truth_of(["[1, 0, 1]", [0, 0, 0], None], "bernoulli", 3).values == [[1, 0, 1], [0, 0, 0], None]
    assert truth_of([[2], [0, 1], []], "bernoulli", 3).values == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    named = truth_of([["b"], ["a", "c"], ["z"]], "bernoulli", 3, None, {0: "a", 1: "b", 2: "c"})
    assert named.values == [[0, 1, 0], [1, 0, 1], None]
    assert truth_of([[0, 1]], "bernoulli", 2, ["b", "a"], {0: "a", 1: "b"}).values == [[1, 1]]
    assert truth_of([1, 0.5, -1, None, "x"], "gaussian", 1).values == [[1.0], [0.5], [-1.0], None, None]
    assert truth_of(["[1, 2.5]"], "gaussian", 2) == Truth([[1.0, 2.5]])
    assert truth_of(["x"], "gaussian", 1).why_none == "the labels are not numbers"


def report_of(task: str, data: Any, family: str = "bert", **config: Any) -> tuple[PerturbationReport, Any, Any]:
    """A report of a tiny model on all of the data, the model and the direction."""
    model = tiny_model(family, task, **config)
    analyzer = analyzer_of(
        model, tiny_tokenizer(), sketch="identity", target_modules=[r"query"] if family == "bert" else "all-linear"
    )
    pefs = analyzer.compute_pefs(data)
    decomposition = NPEFF(2, n_restarts=1, max_iterations=20).fit(pefs)
    direction = analyzer.lift(decomposition, 0, pefs, data)
    report = analyzer.evaluate_direction(direction, decomposition, 0, data, scale=0.7, n_top=4, n_others=4)
    return report, model, direction


def logits_of(model: Any, indices: list[int], direction: Any, scale: float) -> torch.Tensor:
    """Oracle: the model itself, one text at a time, with θ + scale·direction."""
    with torch.no_grad(), direction.applied_to(model, scale) if scale else contextlib.nullcontext():
        found = [model(**tiny_tokenizer()(TEXTS[i], return_tensors="pt")).logits[0] for i in indices]
    return torch.stack(found)


def test_accuracy_is_over_the_labelled_examples_by_the_names_of_their_classes() -> None:
    """Oracle: the model's own classes by name, counted by hand; some labels are −1, numbers are in another order."""
    names = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    labels = [0, 1, -1, 2, 0, 1, 2, -1]
    classes = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": classes})
    data = datasets.Dataset.from_dict({"sentence": TEXTS, "label": labels}, features=features)
    report, model, direction = report_of("sequence-classification", data, id2label=names, num_labels=3)
    order = {0: 2, 1: 1, 2: 0}
    for indices, accuracy, labelled in (
        (report.top_examples, report.best.top_accuracy, report.best.top_labelled),
        (report.other_examples, report.best.other_accuracy, report.best.other_labelled),
    ):
        known = [i for i in indices if labels[i] >= 0]
        right = [
            sum(
                int(x.argmax()) == order[labels[i]]
                for x, i in zip(logits_of(model, known, direction, s), known, strict=True)
            )
            for s in (0.0, report.scale)
        ]
        assert labelled == len(known)
        assert accuracy == (None if not known else pytest.approx(tuple(n / len(known) for n in right)))
    n = report.best.top_labelled
    assert f"{n} of {len(report.top_examples)} top examples" in report.labels


@pytest.mark.parametrize("kind", ["iterable", "loader", "subset", "subset in a loader"])
def test_names_of_classes_are_found_below_what_a_data_set_is_read_through(kind: str) -> None:
    """Oracle: the features of the data set; a list of the same rows has none, and numbers are all there is."""
    classes = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": classes})
    data: Any = datasets.Dataset.from_dict({"sentence": TEXTS, "label": [0, 1, 2] * 2 + [0, 1]}, features=features)
    read = {
        "iterable": data.to_iterable_dataset,
        "loader": lambda: torch.utils.data.DataLoader(data, batch_size=3),
        "subset": lambda: torch.utils.data.Subset(data, range(4)),
        "subset in a loader": lambda: torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(4))),
    }[kind]()
    assert Examples(read, tiny_tokenizer(), max_examples=4).encoded.label_names == tuple(classes.names)
    assert Examples(list(data), tiny_tokenizer(), max_examples=4).encoded.label_names is None


def test_regression_has_errors_and_no_flips() -> None:
    """Oracle: the model's own numbers, one text at a time."""
    truth = [0.1 * i - 0.3 for i in range(len(TEXTS))]
    data = [{"text": text, "score": value} for text, value in zip(TEXTS, truth, strict=True)]
    model = tiny_model("bert", "sequence-classification", num_labels=1)
    analyzer = analyzer_of(model, tiny_tokenizer(), sketch="identity", target_modules=["query"])
    pefs = analyzer.compute_pefs(data, label_column="score")
    decomposition = NPEFF(2, n_restarts=1, max_iterations=20).fit(pefs)
    direction = analyzer.lift(decomposition, 0, pefs, data)
    report = analyzer.evaluate_direction(direction, decomposition, 0, data, scale=0.7, n_top=4, n_others=4)
    assert report.best.top_flips is None and report.best.other_flips is None and report.best.top_accuracy is None
    moved = [
        logits_of(model, report.top_examples, direction, scale)[:, 0].double()
        - torch.tensor([truth[i] for i in report.top_examples], dtype=torch.float64)
        for scale in (0.0, report.scale)
    ]
    assert report.best.top_absolute_error == pytest.approx(tuple(float(m.abs().mean()) for m in moved), rel=1e-5)
    assert report.best.top_squared_error == pytest.approx(tuple(float(m.square().mean()) for m in moved), rel=1e-5)
    assert report.summary()["top_flips"] is None and "errors are over 4 of 4 top" in report.labels
    assert isinstance(report._repr_html_(), str)


def test_several_labels_are_right_together_or_not() -> None:
    """Oracle: the model's own signs, one text at a time."""
    labels = [[i % 2, 0, (i // 2) % 2] for i in range(len(TEXTS))]
    data = [{"text": text, "labels": value} for text, value in zip(TEXTS, labels, strict=True)]
    settings = {"num_labels": 3, "problem_type": "multi_label_classification"}
    report, model, direction = report_of("sequence-classification", data, **settings)
    expected = []
    for scale in (0.0, report.scale):
        signs = logits_of(model, report.top_examples, direction, scale) > 0
        right = [s.int().tolist() == labels[i] for s, i in zip(signs, report.top_examples, strict=True)]
        expected.append(sum(right) / len(right))
    assert report.best.top_accuracy == pytest.approx(tuple(expected))


@pytest.mark.parametrize("name", ["labels", "topics"])
def test_vectors_of_labels_need_a_problem_type(name: str) -> None:
    """Oracle: transformers, whose loss for such labels makes the same model one of independent labels."""
    model = tiny_model("bert", num_labels=3, dtype=torch.float32)
    data = [{"text": text, name: [1.0, 0.0, float(i % 2)]} for i, text in enumerate(TEXTS)]
    analyzer = analyzer_of(model, tiny_tokenizer(), rank=3, storage_dtype="float32")
    with pytest.raises(ValueError, match=r"problem_type.*multi_label_classification"):
        analyzer.compute_pefs(data, label_column=name)
    before = analyzer.compute_pefs([{"text": text} for text in TEXTS])
    model(torch.tensor([[9, 10, 11]]), labels=torch.tensor([data[0][name]]))
    assert model.config.problem_type == "multi_label_classification"
    after = analyzer_of(model, tiny_tokenizer(), rank=3, storage_dtype="float32").compute_pefs(data, label_column=name)
    assert not torch.allclose(after.norms, before.norms, rtol=0.1)
    model.config.problem_type = "single_label_classification"
    softmax = analyzer_of(model, tiny_tokenizer(), rank=3, storage_dtype="float32")
    assert torch.equal(softmax.compute_pefs(data, label_column=name).norms, before.norms)


def test_tagged_words_are_right_token_by_token() -> None:
    """Oracle: the model's own tags of the first tokens, one text at a time; a tag that is no class is no label."""
    words = [text.split() for text in TEXTS]
    tags = [[(i + j) % 4 for j in range(len(text))] for i, text in enumerate(words)]  # the model has three
    data = [{"tokens": text, "ner_tags": tag} for text, tag in zip(words, tags, strict=True)]
    report, model, direction = report_of("token-classification", data, num_labels=3)
    expected = []
    for scale in (0.0, report.scale):
        right = total = 0
        for i in report.top_examples:
            found = logits_of(model, [i], direction, scale)[0].argmax(-1).tolist()
            right += sum(a == b for a, b in zip(found, tags[i], strict=True) if b < 3)
            total += sum(b < 3 for b in tags[i])
        expected.append(right / total)
    assert report.best.top_accuracy == pytest.approx(tuple(expected))


def test_a_language_models_tokens_are_not_compared_with_classes() -> None:
    """Oracle: no accuracy, and the reason."""
    data = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    report, _, _ = report_of("causal-lm", data, "llama")
    assert isinstance(report, Report) and report.best.top_accuracy is None and report.best.top_labelled == 0
    assert "not classes" in report.labels


def test_what_the_page_calls_right() -> None:
    """Oracle: written by hand; by name for classifiers, and a class's number is no token of a language model."""
    info = {"task": "sequence-classification", "dataset": {"encoded": {
        "kind": "text", "columns": ["text"], "label_column": "y", "label_names": ["pos", "neg"]}}}  # fmt: skip
    columns = {"y": [0, 1, 1, -1], "prediction": ["POSITIVE", "NEGATIVE", "POSITIVE", "NEGATIVE"]}
    column = correctness(columns, {"0": "NEGATIVE", "1": "POSITIVE"}, info)
    assert column is not None and column.data is not None
    assert [column.values[code] for code in column.data] == ["right", "right", "wrong", None]
    assert correctness({"label": [0, 1], "prediction": ["0", "1"]}, None, {"task": "causal-lm"}) is None
    asked = correctness({"answer": ["Oslo", "Rome"], "prediction": [" Os", "x"]}, None, {"task": "causal-lm"})
    assert asked is not None and asked.data is not None and [asked.values[c] for c in asked.data] == ["right", "wrong"]


def test_several_labels_are_right_if_all_of_them_are() -> None:
    """Oracle: written by hand; JSON, as stores keep lists. Predictions that do not name labels say nothing."""
    names = {"0": "work", "1": "money", "2": "home"}
    columns = {"labels": ["[1, 0, 1]", "[0, 0, 0]", "[0, 1, 0]"], "prediction": ["work, home", "no label", "home"]}
    column = correctness(columns, names, {"task": "sequence-classification"})
    assert column is not None and column.data is not None
    assert [column.values[code] for code in column.data] == ["right", "right", "wrong"]
    earlier = {**columns, "prediction": ["1, 0, 1", "0, 0, 0", "0, 0, 1"]}
    assert correctness(earlier, names, {"task": "sequence-classification"}) is None


@pytest.mark.parametrize(
    ("task", "settings", "predictions", "expected"),
    [
        (
            "sequence-classification",
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [[1, 0, 1], [0, 0, 0]],
            ["work, home", "no label"],
        ),
        ("sequence-classification", {"num_labels": 3}, [2, 0], ["home", "work"]),
        ("token-classification", {"num_labels": 3}, [[0, 2, -1], [1, 1, 0]], ["work, home", "money, money, work"]),
        ("sequence-classification", {"num_labels": 2, "problem_type": "regression"}, [[-1.0, 0.5]], ["-1, 0.5"]),
        ("question-answering", {}, [[0, 1], [1, 12]], ["0, 1", "1, 12"]),
        ("multiple-choice", {}, [1, 2], ["1", "2"]),
    ],
)  # fmt: skip
def test_predictions_are_shown_by_the_names_of_classes_and_labels(
    task: str, settings: dict[str, Any], predictions: list[Any], expected: list[str]
) -> None:
    """Oracle: written by hand. A place in a text and the number of a choice are no classes."""
    model = tiny_model("bert", task, **settings)
    model.config.id2label = {0: "work", 1: "money", 2: "home"}
    assert analyzer_of(model, tiny_tokenizer()).describe(torch.tensor(predictions)) == expected


def test_changed_answers_of_several_labels_are_shown_by_name() -> None:
    """Oracle: the model's own signs, one text at a time."""
    data = [{"text": text, "labels": [i % 2, 0, (i // 2) % 2]} for i, text in enumerate(TEXTS)]
    settings = {"num_labels": 3, "problem_type": "multi_label_classification"}
    report, model, direction = report_of("sequence-classification", data, **settings)
    assert report.changed
    for row in report.changed:
        for name, scale in (("before", 0.0), ("after", report.scale)):
            signs = (logits_of(model, [row["index"]], direction, scale) > 0)[0].tolist()
            assert row[name] == (", ".join(f"LABEL_{j}" for j in range(3) if signs[j]) or "no label")


def test_columns_of_labels_are_shown_by_name_where_there_are_names() -> None:
    """Oracle: by hand. Names of the data set before the model's; placeholders and other tasks stay as they are."""
    info = {"task": "sequence-classification", "label_names": {"0": "NEGATIVE", "1": "POSITIVE"}}
    columns = {"y": [0, 1], "label": [0, 1, 1, -1], "prediction": ["POSITIVE"] * 4}
    assert with_label_names(columns, info)["label"] == ["NEGATIVE", "POSITIVE", "POSITIVE", -1]
    shown = next(column for column in columns_of(columns, info["label_names"], info) if column.name == "label")
    assert set(shown.values) == {"NEGATIVE", "POSITIVE", "-1"}
    record = {"kind": "text", "columns": ["text"], "label_column": "y", "label_names": ["pos", "neg"]}
    own = {**info, "dataset": {"encoded": record}}
    assert with_label_names(columns, own)["y"] == ["pos", "neg"] and with_label_names(columns, own)["label"][0] == 0
    for other in ({"task": "causal-lm"}, {"label_names": {"0": "LABEL_0", "1": "LABEL_1"}}):
        assert with_label_names(columns, {**info, **other}) == columns


def test_a_class_that_is_never_predicted_is_wrong_where_classes_have_no_names() -> None:
    """Oracle: by hand. A store without the model's names; label 2 was never predicted."""
    columns = {"prediction": ["LABEL_0", "LABEL_1", "LABEL_0"], "label": [0, 1, 2]}
    column = correctness(columns, None, {"task": "sequence-classification"})
    assert column is not None and column.data is not None
    assert [column.values[code] for code in column.data] == ["right", "right", "wrong"]


def test_digits_are_numbers_of_classes_unless_the_classes_names_have_digits() -> None:
    """Oracle: by hand."""
    assert truth_of(["1", "0", " 1 ", "2"], "softmax", 2, None, {0: "neg", 1: "pos"}).values == [1, 0, 1, None]
    stars = {i: f"{i + 1} stars" for i in range(5)}
    assert truth_of(["1", "5"], "softmax", 5, None, stars).values == [None, None]
    assert truth_of(["2 stars", "5 stars"], "softmax", 5, None, stars).values == [1, 4]


def test_labels_that_count_from_one_are_no_numbers_of_classes() -> None:
    """Oracle: by hand. With a label 0 among them they count from 0; names say what numbers do not."""
    assert "subtract 1" in str(truth_of([1, 3, 2, -1], "softmax", 3).why_none)
    assert truth_of([1, 3, 0], "softmax", 3).values == [1, None, 0]
    assert "0 and 1" in str(truth_of([1, -1.0, None], "softmax", 2).why_none)
    assert truth_of([1, -1, 0], "softmax", 2).values == [1, None, 0]
    assert truth_of([1, 2, None], "softmax", 3).values == [1, 2, None]
    stars = {i: f"{i + 1} stars" for i in range(5)}
    assert "'1 stars'" in str(truth_of([1, 4], "softmax", 5, None, stars).why_none)
    assert truth_of([0, 4], "softmax", 5, None, stars).values == [0, 4]
    assert truth_of([0, 3], "softmax", 5, list(stars.values()), stars).values == [0, 3]
