"""Classification and question answering as prompts to a causal language model, from published data sets.

A task is a file in `studies/task_files`. It has the data set's id on the Hub, a template whose fields are columns of
the data set, and a verbaliser, which gives the word for each class. Any causal language model can be analysed on any
task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import yaml

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.records import records_of
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.comparison import fit_methods
from hf_npeff.studies.factors import FactorsResult, run_factors
from hf_npeff.studies.result import StudyResult, markdown, number
from hf_npeff.studies.settings import ComparisonConfig, FactorsConfig

_FIELDS = {"dataset", "subset", "split", "template", "label", "verbaliser", "answers", "columns"}


@dataclass(frozen=True)
class PromptTask:
    """A task: how rows of a data set become prompts, and which answers are right.

    Attributes:
        name: the name of its file.
        dataset: the data set's id on the Hub.
        template: the template of the prompt, with the data set's columns in braces.
        subset: the data set's configuration, or None.
        split: the split of the data set.
        label: the column of the class, or None.
        verbaliser: the word for each class, or "names" for the data set's own class names.
        answers: the column of accepted answers, for a data set without classes; a dot leads into a dictionary.
        columns: {attribute: column}, the annotated columns for the factors; numbers of classes are replaced by names.

    Raises:
        ValueError: if the task has neither a label with a verbaliser nor answers, or has both.
    """

    name: str
    dataset: str
    template: str
    subset: str | None = None
    split: str = "validation"
    label: str | None = None
    verbaliser: Sequence[str] | str | None = None
    answers: str | None = None
    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if (self.label is None) != (self.verbaliser is None) or (self.label is None) == (self.answers is None):
            raise ValueError(f"the task {self.name} needs either a label with a verbaliser, or answers, and not both")

    @property
    def fields(self) -> list[str]:
        """The columns that are used in the template."""
        return re.findall(r"\{(\w+)\}", self.template)


def task_names() -> list[str]:
    """The names of the tasks."""
    folder = files("hf_npeff.studies").joinpath("task_files")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_task(name: str) -> PromptTask:
    """The task of a name.

    Raises:
        ValueError: if no task has that name, or its file has unknown settings.

    Example:
        >>> task = load_task("sst2")
        >>> task.dataset
        'stanfordnlp/sst2'
    """
    if name not in task_names():
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(task_names())}")
    text = files("hf_npeff.studies").joinpath(f"task_files/{name}.yaml").read_text(encoding="utf-8")
    return read_task(name, text)


def read_task(name: str, text: str) -> PromptTask:
    """Read a task from the text of its file.

    Raises:
        ValueError: if a setting is missing or unknown.
    """
    content = yaml.safe_load(text)
    if not isinstance(content, dict) or set(content) - _FIELDS or not {"dataset", "template"} <= set(content):
        raise ValueError(f"the task {name} must have `dataset` and `template`, and may have only {sorted(_FIELDS)}")
    return PromptTask(name, **content)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a task.

    Attributes:
        rows: rows with `text`, `answers` (the accepted ones, each with its leading space) and the annotated columns.
        excluded: {reason: how many rows were left out}.
    """

    rows: list[dict[str, Any]]
    excluded: dict[str, int]


def make_prompts(task: PromptTask, dataset: Any = None, *, max_examples: int | None = None) -> Prompts:
    """Make the prompts of a task.

    Args:
        task: the task.
        dataset: rows in the data set's own schema; None loads them from the Hub.
        max_examples: use only this many rows, the first ones that can be used.

    Raises:
        ValueError: if a column is missing, a class has no word, or no row can be used.
        OSError: if the data set cannot be loaded.

    Example:
        >>> rows = [{"sentence": "the happy cat", "label": 1}, {"sentence": "the sad dog", "label": 0}]
        >>> make_prompts(load_task("sst2"), rows).rows[0]["answers"]
        [' positive']
    """
    if dataset is None:
        import datasets

        dataset = datasets.load_dataset(task.dataset, task.subset, split=task.split)
    words = _words(task, dataset)
    rows: list[dict[str, Any]] = []
    excluded: dict[str, int] = {}
    for record in records_of(dataset, None):
        if max_examples is not None and len(rows) == max_examples:
            break
        if missing := [f for f in [*task.fields, *filter(None, [task.label])] if f not in record]:
            raise ValueError(f"{task.dataset} does not have the columns {missing}; it has {sorted(record)}")
        row = _row(task, record, words)
        if isinstance(row, str):
            excluded[row] = excluded.get(row, 0) + 1
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"no row of {task.dataset} can be used: {excluded}")
    return Prompts(rows, excluded)


def _words(task: PromptTask, dataset: Any) -> list[str] | None:
    if task.verbaliser != "names":
        return None if task.verbaliser is None else list(task.verbaliser)
    names = getattr(getattr(dataset, "features", {}).get(task.label), "names", None) if task.label else None
    return None if names is None else [str(name).replace("_", " ") for name in names]


def _row(task: PromptTask, record: Mapping[str, Any], words: list[str] | None) -> dict[str, Any] | str:
    """The prompt of a row, or the reason why there is none."""
    text = task.template.format(**{name: record[name] for name in task.fields})
    row: dict[str, Any] = {"text": text}
    if task.label is None:
        value: Any = record
        for part in str(task.answers).split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not value:
            return "no accepted answer"
        return {**row, "answers": [f" {answer}" for answer in value]}
    label = record[task.label]
    if label is None or label == -1:
        return "no label"
    if isinstance(label, str):
        word = label.replace("_", " ")
    elif words is None:
        raise ValueError(f"the classes of {task.dataset} are numbers without names; list their words in the verbaliser")
    elif not 0 <= label < len(words):
        raise ValueError(f"{task.dataset} has a class {label}, but the verbaliser has {len(words)} words")
    else:
        word = words[label]
    kept = {name: word if column == task.label else record[column] for name, column in (task.columns or {}).items()}
    return {**row, "answers": [f" {word}"], **kept}


@dataclass
class TaskResult(StudyResult):
    """The outcome of `run_task`.

    Attributes:
        task: the name of the task.
        examples: how many prompts there are.
        excluded: {reason: how many rows were left out}.
        accuracy: the share of prompts whose most likely next token begins an accepted answer.
        decomposition: the decomposition of the prompts.
        factors: the scores of the annotated columns, or None if none can be measured.
        reason: the reason why there are no factors.
    """

    task: PromptTask
    examples: int
    excluded: dict[str, int]
    accuracy: float
    decomposition: Decomposition
    factors: FactorsResult | None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the decomposition's tensors, as JSON types."""
        return {
            "study": "tasks",
            "task": asdict(self.task),
            "examples": self.examples,
            "excluded": self.excluded,
            "accuracy": self.accuracy,
            "explained": self.decomposition.explained,
            "stability": self.decomposition.stability.tolist(),
            "factors": self.factors.to_dict() if self.factors else None,
            "reason": self.reason,
        }

    def table(self) -> str:
        """A table with a row for each component and its top examples, then the factors."""
        rows = []
        for component in self.decomposition:
            top = component.top_examples(3)  # chosen: a row of a table
            shown = " / ".join(text[-60:] for text in top.texts or top.ids)
            rows.append([component.index, f"{component.active_share:.0%}", number(component.stability, 2), shown])
        lines = [markdown(["component", "active", "stability", "ends of its top prompts"], rows), ""]
        lines.append(f"{self.examples} prompts, accuracy {self.accuracy:.3f}.")
        lines += [f"{count} rows left out: {why}." for why, count in self.excluded.items()]
        lines += ["", self.factors.table() if self.factors else f"No factors: {self.reason}."]
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """The factors if there are any, otherwise the mean coefficient of each component."""
        if self.factors is not None:
            self.factors.draw(figure)
            return
        axes = figure.add_subplot()
        axes.bar(range(len(self.decomposition)), self.decomposition.coefficients.mean(0).tolist())
        axes.set(xlabel="component", ylabel="mean coefficient")


def run_task(
    analyzer: NPEFFAnalyzer,
    prompts: Prompts,
    task: PromptTask,
    config: ComparisonConfig | None = None,
    factors: FactorsConfig | None = None,
) -> TaskResult:
    """Compute PEFs of a task's prompts, decompose them, and measure how the components match the annotated columns.

    Args:
        analyzer: the analyzer of a causal language model.
        prompts: the prompts, from `make_prompts`.
        task: the task of the prompts.
        config: the settings of the decomposition and of the methods that it is compared with.
        factors: the settings for measuring the columns.

    Raises:
        ValueError: if the model predicts no tokens, or there are fewer prompts than components.

    Example:
        >>> from hf_npeff.studies.settings import ComparisonConfig
        >>> task = load_task("sst2")
        >>> rows = [{"sentence": row["text"], "label": int(row["animal"])} for row in dataset]
        >>> config = ComparisonConfig(3, methods="npeff", n_restarts=1)
        >>> result = run_task(analyzer, make_prompts(task, rows), task, config)
    """
    if traits_of(analyzer.head).task != "causal-lm":
        raise ValueError("prompts need a causal language model; load one with task='causal-lm'")
    config = config or ComparisonConfig(methods=("npeff",))
    compared = fit_methods(analyzer, [{"text": row["text"]} for row in prompts.rows], config)
    if compared.decomposition is None or compared.pefs is None:
        raise ValueError("the study of a task needs NPEFF's components: keep npeff among the methods")
    columns = {name: [row[name] for row in prompts.rows] for name in (task.columns or {})}
    reason, measured = None, None
    if columns:
        attributes = Attributes.from_columns(columns)
        try:
            measured = run_factors(compared.methods, attributes, factors, seeds=compared.seeds)
        except ValueError as error:
            reason = str(error)
    else:
        reason = "the task has no annotated columns"
    accuracy = first_token_accuracy(analyzer, compared.pefs.predictions, [row["answers"] for row in prompts.rows])
    return TaskResult(task, len(prompts.rows), prompts.excluded, accuracy, compared.decomposition, measured, reason)


def first_token_accuracy(analyzer: NPEFFAnalyzer, predictions: Any, answers: Sequence[Sequence[str]]) -> float:
    """The share of predictions (n,) that are the first token of an accepted answer."""
    right = [
        int(token) in {first_token(analyzer.processing_class, answer) for answer in accepted}
        for token, accepted in zip(predictions.tolist(), answers, strict=True)
    ]
    return sum(right) / len(right)


def first_token(tokenizer: Any, answer: str) -> int:
    """The first token of an answer, without what the tokenizer puts before a text.

    Raises:
        ValueError: if the answer has no token.
    """
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the answer {answer!r} has no token")
    return int(ids[0])
