"""The columns that are asked for, a model's needs, and the record of what was read of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from hf_npeff.config import is_count
from hf_npeff.encoding.values import has
from hf_npeff.errors import CorruptStoreError

Kind = Literal["tensors", "image", "text", "pair", "choices", "chat", "completion", "words"]
MADE_TEXT = "text"
"""The column that is made for people where no column of the data set shows what was read, such as of a conversation."""
USUAL_TEXTS = (
    "text", "prompt", "sentence", "sentence1", "premise", "question", "query", "review", "content", "document",
    "comment", "tweet", "body", "article",
)  # fmt: skip
"""The columns that show an example where there is no record: rows made elsewhere, and data that came encoded."""


@dataclass(frozen=True)
class Reading:
    """Which columns of a data set are read, and how long an example may become.

    Attributes:
        text_column: the column to read: texts, conversations or lists of words; "translation.en" is an entry of a
            column of dictionaries. By default it is found by names and contents.
        text_pair_column: the column with the second text of a pair; for multiple choice, the column of choices. By
            default it is found, unless text_column is given.
        label_column: the column of classes, numbers to predict or tags of words; with positions="labels", the text that
            a sequence-to-sequence or causal language model should predict. By default it is found by name.
        truncation: cut examples that are longer than max_length; otherwise they raise an error.
        max_length: the most tokens of an example with truncation; by default the model's maximum.

    Raises:
        ValueError: if a setting has a wrong type, or max_length is given without truncation.
    """

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    truncation: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("text_column", "text_pair_column", "label_column"):
            value = getattr(self, name)
            if not isinstance(value, str | None) or value == "":
                raise ValueError(f"{name} must be the name of a column, but it is {value!r}")
        if not isinstance(self.truncation, bool):
            raise ValueError(f"truncation must be True or False, but it is {self.truncation!r}")
        if self.max_length is not None and not is_count(self.max_length):
            raise ValueError(f"max_length must be a positive whole number, but it is {self.max_length!r}")
        if self.max_length is not None and not self.truncation:
            raise ValueError("max_length cuts examples only with truncation=True: pass both, or neither")
        if self.text_pair_column is not None and self.text_column is None:
            raise ValueError("text_pair_column names the second text: name the first with text_column")
        if self.text_column is not None and self.text_column == self.text_pair_column:
            raise ValueError(f"text_column and text_pair_column are both {self.text_column!r}")

    def within(self, row: Mapping[str, Any]) -> Reading:
        """These settings without the columns that a row does not have."""
        texts = [name for name in (self.text_column, self.text_pair_column) if name is not None]
        first, second = (self.text_column, self.text_pair_column) if all(has(row, n) for n in texts) else (None, None)
        label = self.label_column if self.label_column is not None and has(row, self.label_column) else None
        return Reading(first, second, label, self.truncation, self.max_length)

    def or_of(self, other: Reading) -> Reading:
        """These settings; unset ones come from `other`."""
        if self.truncation or not other.truncation:
            length = {"truncation": self.truncation, "max_length": self.max_length}
        else:
            length = {"truncation": True, "max_length": other.max_length}
        mine = self if self.text_column is not None else other
        label = self.label_column if self.label_column is not None else other.label_column
        return Reading(mine.text_column, mine.text_pair_column, label, **length)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ModelNeeds:
    """The properties of a model that decide how its examples are encoded.

    Attributes:
        task: such as "causal-lm"; None where it is not known.
        positions: `FisherConfig.positions`.
        max_length: the most tokens that it has positions for, or None.
        label_names: {number of a class: its name}, or None.
        image_token: the id that stands for a part of an image in a text, or None.
    """

    task: str | None = None
    positions: str = "auto"
    max_length: int | None = None
    label_names: Mapping[int, str] | None = None
    image_token: int | None = None

    @property
    def continues(self) -> bool:
        """Whether it is a causal language model, which goes on where the text ends."""
        return self.task == "causal-lm"

    @property
    def embeds(self) -> bool:
        """Whether it turns a text into a vector."""
        return self.task == "feature-extraction"

    @property
    def generates(self) -> bool:
        """Whether it writes a text, so that a second text may be its answer."""
        return self.task in ("causal-lm", "seq2seq-lm")

    @property
    def reads_targets(self) -> bool:
        """Whether the text to predict is read too."""
        return self.generates and self.positions in ("labels", "all")


@dataclass(frozen=True)
class Encoded:
    """The record of what was read; it is stored with the PEFs, so that later calls read the same.

    Attributes:
        kind: what an example is: "tensors" came encoded; "text", a "pair" of texts; "choices", one text with each of
            several others; "chat", a conversation; "completion", a prompt and what completes it; "words" with tags.
        columns: what is read, in order; a dot reaches into dictionaries.
        target: the column with the text to predict, where it is read.
        label_column: the column of class labels, numbers to predict or tags, where there is one.
        label_names: the data set's own names of the classes, where it has them.
        shown: the columns beside the PEFs that show an example to people, in order.
        unread: columns of text that are not read and are not classes.
        doubtful: whether there is prose among them, of which people are warned.
        truncation: whether long examples are cut.
        max_length: to how many tokens, or None.
        notes: what else was done, a sentence each, such as which special tokens were left off.
    """

    kind: Kind
    columns: tuple[str, ...] = ()
    target: str | None = None
    label_column: str | None = None
    label_names: tuple[str, ...] | None = None
    shown: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    doubtful: bool = False
    truncation: bool = False
    max_length: int | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: object) -> Encoded:
        """The record that `to_dict` gave.

        Raises:
            CorruptStoreError: if it cannot be read.
        """
        known = {setting.name for setting in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known or values.get("kind") not in get_args(Kind):
            raise CorruptStoreError(f"expected a record of what was encoded, but found {str(values)[:200]}")
        lists = {name: values.get(name) for name in ("columns", "label_names", "shown", "unread", "notes")}
        for name, value in lists.items():
            if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise CorruptStoreError(f"the record of what was encoded has {name} {str(value)[:200]}")
        for name in ("target", "label_column"):
            if not isinstance(values.get(name), str | None):
                raise CorruptStoreError(f"the record of what was encoded has {name} {str(values[name])[:200]}")
        length = values.get("max_length")
        flags = (values.get("truncation", False), values.get("doubtful", False))
        if not all(isinstance(flag, bool) for flag in flags) or not (length is None or is_count(length)):
            raise CorruptStoreError(f"the record of what was encoded has max_length {str(length)[:200]}")
        return cls(**{**values, **{name: tuple(v) for name, v in lists.items() if v is not None}})

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Encoded | None:
        """The record of PEFs with this `info`, or of a decomposition of them; None where there is none.

        Raises:
            CorruptStoreError: if there is something else in its place.
        """
        dataset = info.get("dataset")
        values = dataset.get("encoded") if isinstance(dataset, Mapping) else None
        return None if values is None else cls.from_dict(values)

    @property
    def reading(self) -> Reading:
        """What has to be asked for to read the same columns again, of data that has them."""
        length = {"truncation": self.truncation, "max_length": self.max_length}
        if self.kind in ("text", "pair", "words") or (self.kind in ("chat", "completion") and self.columns):
            second = self.columns[1] if self.kind == "pair" else None
            label = self.target if self.target is not None else self.label_column
            return Reading(self.columns[0], second, label, **length)  # type: ignore[arg-type]
        return Reading(label_column=self.label_column, **length)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The record in a line."""
        names = [repr(name) for name in self.columns]
        what = {
            "tensors": "inputs that came encoded",
            "image": f"the images of {', '.join(names)}",
            "text": f"the text of {', '.join(names)}",
            "pair": f"the pair {' and '.join(names)}",
            "choices": f"each choice of {names[-1] if names else ''} with {' and '.join(names[:-1])}",
            "chat": f"the conversation in {names[0] if names else ''}, through the chat template",
            "completion": f"{names[0] if names else ''} and its completion in {self.target!r}",
            "words": f"the words of {', '.join(names)}",
        }[self.kind]
        if self.kind == "chat" and len(names) > 1:
            what += f" with {' and '.join(names[1:])}"
        if self.kind == "text" and self.target is not None:
            what += f", with the text to predict in {self.target!r}"
        parts = [f"read {what}"]
        if self.label_column is not None:
            parts.append(f"labels in {self.label_column!r}")
        if self.truncation:
            parts.append("cut where it is longer than " + (f"{self.max_length} tokens" if self.max_length else "fits"))
        parts += self.notes
        if self.unread:
            parts.append(f"not read: {', '.join(map(repr, self.unread))}")
        return "; ".join(parts)


def shown_columns(columns: Mapping[str, Sequence[Any]], info: Mapping[str, Any]) -> tuple[str, ...]:
    """The kept columns that show an example to people, in order; none where no text was kept.

    Args:
        columns: {name: values} kept beside the rows.
        info: the `info` of the PEFs, or of a decomposition of them: its record of what was encoded is followed.
            Without one, the first column with a usual name is taken.
    """
    record = Encoded.of(info)
    if record is not None and record.shown:
        return tuple(name for name in record.shown if name in columns)
    return next(((name,) for name in USUAL_TEXTS if name in columns), ())


def shown_texts(columns: Mapping[str, Sequence[Any]], info: Mapping[str, Any]) -> list[str] | None:
    """What shows each example to people: its text, or the texts that were read together with " | " between them.

    Args:
        columns: see `shown_columns`.
        info: see `shown_columns`.

    Returns:
        A text an example, or None where no text was kept.
    """
    names = shown_columns(columns, info)
    if not names:
        return None
    if len(names) == 1:
        return list(columns[names[0]])
    rows = zip(*(columns[name] for name in names), strict=True)
    return [" | ".join(str(value) for value in row if value is not None) for row in rows]
