"""A model's answers for some examples before and after its weights change, compared with labels if there are any.

Accuracy is the share of right answers among those with a label: the class of single-label classifiers and of multiple
choice, all labels of an example at once (exact match) of multi-label ones, and tokens of token classifiers. A
regression head has errors instead, and no flips, because every number changes. A language model's tokens are not
classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.encoding.labels import IGNORED, NO_CLASS, Truth, truth_of
from hf_npeff.encoding.record import Encoded
from hf_npeff.fisher.distributions import Gaussian
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.kept_columns import check_columns
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.fisher.predictions import Predictions

_CLASSES = ("sequence-classification", "image-classification", "multiple-choice")


@dataclass(frozen=True)
class Watched:
    """Examples whose predictions are compared before and after a change.

    Attributes:
        indices: their indices among all analysed examples.
        examples: the examples.
        before: the model's predictions for them before the change.
        truth: their labels, if there are any.
    """

    indices: list[int]
    examples: list[Example]
    before: Predictions
    truth: Truth

    @property
    def predicts_numbers(self) -> bool:
        """Whether the model predicts numbers."""
        return self.before.distribution is Gaussian

    def flips(self, after: Predictions) -> list[bool]:
        """Whether the likeliest outcome of every example has changed."""
        return [not torch.equal(a, b) for a, b in zip(self.before.answers(), after.answers(), strict=True)]

    def flipped(self, after: Predictions) -> float | None:
        """The share of examples whose likeliest outcome has changed; None for regression."""
        flips = self.flips(after)
        return None if self.predicts_numbers else sum(flips) / len(flips)

    def accuracy(self, after: Predictions) -> tuple[float, float] | None:
        """The accuracy before and after, over labelled examples; None without labels, and for regression."""
        if self.predicts_numbers or not self.truth.labelled:
            return None
        return _accuracy(self.before, self.truth), _accuracy(after, self.truth)

    def errors(self, after: Predictions) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        """The mean absolute and squared error, before and after, for regression with labels; otherwise None."""
        if not self.predicts_numbers or not self.truth.labelled:
            return None, None
        before, now = (_differences(predicted, self.truth) for predicted in (self.before, after))
        absolute = float(before.abs().mean()), float(now.abs().mean())
        return absolute, (float(before.square().mean()), float(now.square().mean()))


def watch(
    forward: ForwardPass,
    info: Mapping[str, Any],
    column: Sequence[Any] | None,
    watched: tuple[list[int], list[Example]],
    before: Predictions,
) -> Watched:
    """Examples with their predictions and labels.

    Args:
        forward: the forward pass.
        info: the `info` of the PEFs or the decomposition: the task, and names of classes.
        column: the labels of all analysed examples, or None.
        watched: the indices of the watched examples, and the examples.
        before: the model's predictions for them.
    """
    indices, examples = watched
    task = info.get("task")
    if task == "token-classification":
        return Watched(indices, examples, before, _tags(examples, before))
    if traits_of(forward.head).vocabulary:
        why = "a language model's tokens are not classes"
    elif traits_of(forward.head).embeds:
        why = "an embedding is not a class"
    elif column is None:
        why = "the data has no labels"
    elif any(len(logits) != 1 for logits in before.logits):
        why = "an example has several answers"
    else:
        why = None
    if why is not None or column is None:
        return Watched(indices, examples, before, Truth([None] * len(examples), why))
    truth = labels_of(info, column, before.distribution.name, max(logits.shape[-1] for logits in before.logits))
    return Watched(indices, examples, before, Truth([truth.values[i] for i in indices], truth.why_none))


def labels_of(info: Mapping[str, Any], column: Sequence[Any], distribution: str, k: int) -> Truth:
    """A column of labels as the model's classes or numbers.

    Args:
        info: the `info` of the PEFs or the decomposition: the task, and names of classes.
        column: the labels.
        distribution: the distribution of the model's output: "softmax", "bernoulli" or "gaussian".
        k: the number of its classes, labels, choices or numbers.
    """
    values = _letters(column) if info.get("task") == "multiple-choice" else column
    record = Encoded.of(info)
    names = {int(number): str(name) for number, name in (info.get("label_names") or {}).items()}
    return truth_of(values, distribution, k, None if record is None else record.label_names, names)


def label_column(info: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> Sequence[Any] | None:
    """The stored labels, from the column that was read as labels; None if there are none."""
    name = _name_of_labels(info, columns)
    return None if name is None else columns[name]


def check_labels(info: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], examples: Sequence[Example]) -> None:
    """Check that a data set has the labels that are stored, with which predictions are going to be compared.

    Args:
        info: the `info` of the decomposition.
        columns: its columns.
        examples: the examples of the data set at hand, in the decomposition's order.

    Raises:
        ValueError: if labels differ.
    """
    name = _name_of_labels(info, columns)
    check_columns([] if name is None else [name], columns, examples)


def _name_of_labels(info: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> str | None:
    record = Encoded.of(info)
    if record is not None:
        return record.label_column if record.label_column in columns else None
    usual = ("label", "labels") if info.get("task") in _CLASSES else ()
    return next((name for name in usual if name in columns), None)


def _letters(column: Sequence[Any]) -> list[Any]:
    """Letters as answers of multiple choice: A is 0. Digits are not used, because some data sets count from 1."""
    letters = (isinstance(value, str) and len(value) == 1 and "A" <= value <= "Z" for value in column)
    return [
        ord(value) - ord("A") if is_letter else None if isinstance(value, str) else value
        for value, is_letter in zip(column, letters, strict=True)
    ]


def _tags(examples: Sequence[Example], before: Predictions) -> Truth:
    """The tags of the counted tokens of every example; tags that are not classes are ignored."""
    values: list[Any] = []
    for example, logits in zip(examples, before.logits, strict=True):
        labels = list(example.inputs.get("labels", ()))
        if len(labels) != len(logits):
            labels = [label for label in labels if label != IGNORED]
        k = logits.shape[-1]
        tags = [int(label) if 0 <= label < k else NO_CLASS for label in labels]
        values.append(tags if len(tags) == len(logits) and any(tag != NO_CLASS for tag in tags) else None)
    return Truth(values, None if any(v is not None for v in values) else "the tokens have no labels")


def _accuracy(predicted: Predictions, truth: Truth) -> float:
    right = total = 0
    for answer, label in zip(predicted.answers(), truth.values, strict=True):
        if label is None:
            continue
        if isinstance(label, list) and answer.dim() == 1:  # tokens
            pairs = [(a, b) for a, b in zip(answer.tolist(), label, strict=True) if b != NO_CLASS]
            right, total = right + sum(a == b for a, b in pairs), total + len(pairs)
        else:
            right, total = right + (answer[0].tolist() == label), total + 1
    return right / total


def _differences(predicted: Predictions, truth: Truth) -> Tensor:
    """Predicted minus true numbers of the labelled examples, float64."""
    pairs = zip(predicted.answers(), truth.values, strict=True)
    known = [(answer[0].double(), true) for answer, true in pairs if true is not None]
    differences = [answer - torch.tensor(true, dtype=torch.float64) for answer, true in known]
    return torch.cat(differences)
