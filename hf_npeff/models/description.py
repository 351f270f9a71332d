"""ModelDescription: information on a model that does not need running it, and names for its predictions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.encoding.labels import IGNORED, check_vectors, labels_in_words
from hf_npeff.encoding.record import Encoded
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.fisher.distributions import Bernoulli, Softmax
from hf_npeff.fisher.heads import TransformersHead
from hf_npeff.fisher.output_factors import rows_per_example
from hf_npeff.fisher.outputs import OutputHead, traits_of
from hf_npeff.weights.outcomes import labels_of

_UNNAMED = ("question-answering", "multiple-choice")
"""Tasks whose answers are no classes, although a config has LABEL_0 and LABEL_1 for every model."""


@dataclass(frozen=True)
class ModelDescription:
    """A model with its head, described without a forward pass.

    Attributes:
        model: a transformers model, PEFT-wrapped or not.
        head: the output head.
        processing_class: the processing class that decodes its tokens, or None.
        fisher: how PEFs are computed.
        revision: the model's commit, or None.
    """

    model: nn.Module
    head: OutputHead
    processing_class: Any
    fisher: FisherConfig
    revision: str | None

    def provenance(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The information on the model that is stored with all results.

        Args:
            weights: the identity of its current weights.

        Returns:
            Names, commit, weights, task, classes and versions.
        """
        base: Any = base_of(self.model)
        return {
            "model": getattr(base, "name_or_path", None) or type(base).__name__,
            "revision": self.revision,
            "weights": dict(weights),
            "architecture": type(base).__name__,
            "task": traits_of(self.head).task,
            "label_names": self.label_names,
            "versions": {name: _version(name) for name in ("hf_npeff", "torch", "transformers", "accelerate")},
        }

    def rows_per_example(self, choices: int | None = None) -> int:
        """c, the number of rows for each example, as far as it is known before the model runs.

        Args:
            choices: the number of choices in multiple choice, which are its classes.
        """
        config: Any = base_of(self.model).config
        traits = traits_of(self.head)
        k = getattr(self.head, "size", None) if traits.embeds else getattr(config, "num_labels", None)
        if traits.task == "multiple-choice":
            k = choices
        elif traits.vocabulary:
            k = getattr(config.get_text_config(), "vocab_size", None)
        if traits.task == "question-answering" or getattr(self.head, "several", True):
            k = None  # if classes are positions, or there are many terms, rows are reduced to `rank`
        return rows_per_example(self.fisher, getattr(self.head, "distribution", None), k)

    @property
    def label_names(self) -> dict[str, str] | None:
        """{number of a class: its name}; None for a language model or an embedding model."""
        base: Any = base_of(self.model)
        if traits_of(self.head).vocabulary or traits_of(self.head).embeds:
            return None
        return {
            str(number): str(name) for number, name in (getattr(base.config, "id2label", None) or {}).items()
        } or None

    def describe(self, predictions: Tensor) -> list[str]:
        """Predictions in words: tokens, names of classes or of the labels that apply, or numbers; empty for embeddings.

        Args:
            predictions: (n,), or (n, m) with the answers of several terms, for several labels 0 or 1 for each. In one
                dimension, whole numbers are classes, tokens, or numbers of labels.
        """
        traits = traits_of(self.head)
        if traits.embeds:
            return [""] * len(predictions)
        several_labels = getattr(self.head, "distribution", None) is Bernoulli

        def shown(value: Any) -> str:
            if isinstance(value, list):
                if several_labels:
                    return labels_in_words(value, self._class_names)
                return traits.between_terms.join(shown(v) for v in value if isinstance(v, float) or v >= 0)
            if isinstance(value, float):
                return f"{value:.3g}"
            if value < 0:
                return ""
            if traits.vocabulary:
                return self.processing_class.decode([value]) if hasattr(self.processing_class, "decode") else str(value)
            return str(self._class_names.get(value, value))

        return [shown(value) for value in predictions.tolist()]

    def in_words(self, answer: Tensor) -> str:
        """An example's answer, all its terms, in words.

        Args:
            answer: one of `Predictions.answers`.
        """
        return traits_of(self.head).between_terms.join(self.describe(answer))

    @property
    def _class_names(self) -> Mapping[int, str]:
        """{number of a class: its name}; none where answers are places in the input, or numbers of choices."""
        base: Any = base_of(self.model)
        return {} if traits_of(self.head).task in _UNNAMED else getattr(base.config, "id2label", None) or {}

    def check_problem_type(self, labels: Sequence[Any]) -> None:
        """Check that the config says what a classifier predicts, if labels are vectors.

        Args:
            labels: the labels of a few examples; None where there is none.

        Raises:
            ValueError: if it does not.
        """
        config: Any = base_of(self.model).config
        head = self.head
        if not isinstance(head, TransformersHead) or head.task != "sequence-classification":
            return
        if getattr(config, "problem_type", None) is None and head.distribution is Softmax:
            check_vectors(labels, int(config.num_labels))

    def truth_of(self, examples: Sequence[Example], encoded: Encoded) -> list[Any]:
        """The label of every example in the form of the model's predictions (classes, tokens or numbers), or None.

        Args:
            examples: all examples of a data set.
            encoded: the record of the columns that were read.
        """
        task = traits_of(self.head).task
        if self.fisher.positions == "labels" or task == "token-classification":
            tokens = [[token for token in e.inputs.get("labels", ()) if token != IGNORED] for e in examples]
            return [each if each and min(each) >= 0 else None for each in tokens]
        if encoded.label_column is None or traits_of(self.head).vocabulary or traits_of(self.head).embeds:
            return [None] * len(examples)
        info = {"label_names": self.label_names, "task": task, "dataset": {"encoded": encoded.to_dict()}}
        column = [e.columns.get(encoded.label_column) for e in examples]
        k = max((e.choices or 0 for e in examples), default=0) or int(getattr(base_of(self.model), "num_labels", 0))
        return labels_of(info, column, getattr(self.head, "distribution", Softmax).name, k).values


@functools.cache
def _version(name: str) -> str:
    """Of a package as it was when it was first asked for: its files are searched for every time."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
