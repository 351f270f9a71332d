"""Finds the columns of a data set to read, by their names and contents, or raises an error that names the columns.

A column that may belong to the input is never silently left out: a second text, a question beside its choices, a
conversation beside a string. If the names do not settle it, `text_column` has to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_npeff.encoding.chat import is_conversation
from hf_npeff.encoding.column_names import (
    ANSWERS,
    BESIDE_CONVERSATIONS,
    CHOICES,
    CONTEXTS,
    CONVERSATIONS,
    FIRSTS,
    LABELS,
    MODEL_INPUTS,
    NUMBERED,
    NUMBERED_CHOICE,
    OTHER_IDS,
    OUTPUTS,
    PAIRS,
    PROMPTS,
    QUESTIONS,
    SECONDS,
    SYSTEMS,
    TAGS,
    TEXTS,
    WORDS,
)
from hf_npeff.encoding.record import MADE_TEXT, Encoded, ModelNeeds, Reading
from hf_npeff.encoding.values import as_python, at, has, is_medium, is_words

SAMPLE = 64
"""Rows whose contents are looked at: enough to tell prose from names, and read in no time."""
_PROSE_WORDS = 3
"""Words a value, on average, from which a column counts as prose: names and classes are mostly shorter."""
_PROSE_CHARACTERS = 8
"""The same in characters, for scripts that put no spaces between words. Chosen: some two make a word there."""
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese."""


def encoded_as(
    rows: Sequence[Mapping[str, Any]],
    reading: Reading,
    needs: ModelNeeds,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> Encoded:
    """What is read of a data set.

    Args:
        rows: its first ones.
        reading: what was asked for.
        needs: the needs of the model.
        class_names: {column: the data set's own names of its classes}.

    Raises:
        ValueError: if a column that was asked for is missing or holds no text, or if it is not clear what to read; the
            columns are named, and what to pass.
    """
    return _Shapes(rows, reading, needs, class_names or {}).record()


class _Shapes:
    """The columns of a few rows, by what they hold."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        reading: Reading,
        needs: ModelNeeds,
        class_names: Mapping[str, Sequence[str]],
    ):
        self.rows, self.reading, self.needs, self.class_names = rows, reading, needs, class_names
        self.first = {name: self._value(name) for name in dict.fromkeys(name for row in rows for name in row)}
        self.strings = [name for name, value in self.first.items() if isinstance(value, str)]
        self.conversations = [name for name, value in self.first.items() if is_conversation(value)]
        self.words = [n for n, v in self.first.items() if is_words(v) and n not in (*OUTPUTS, *CHOICES, *TAGS)]
        self.used: list[str] = []

    def _value(self, name: str) -> Any:
        """The first value of a column that is there."""
        values = (as_python(row.get(name)) for row in self.rows)
        return next((value for value in values if value is not None and value != []), None)

    def _values(self, name: str) -> list[str]:
        values = (as_python(row.get(name)) for row in self.rows)
        return [value for value in values if isinstance(value, str)]

    # What is read

    def record(self) -> Encoded:
        """The record, without what only the tokenizer tells."""
        self._check_asked_for()
        if self.reading.text_column is not None and self.needs.task != "multiple-choice":
            return self._asked_for(self.reading.text_column)
        if any(name in self.first for name in MODEL_INPUTS):
            if self.reading.truncation:
                raise ValueError(
                    "truncation=True cuts texts, but this data is already encoded: cut it when you encode it"
                )
            return self._made("tensors", (), shown=self._shown_beside())
        media = [name for name, value in self.first.items() if name in ("image", "img", "images") or is_medium(value)]
        if media:
            return self._of_media(media)
        if self.needs.task == "multiple-choice":
            return self._choices()
        return self._conversation() or self._words() or self._texts()

    def _of_media(self, media: Sequence[str]) -> Encoded:
        """One column of images for a model of images alone. What stands beside a text, the processor puts into it."""
        if self.needs.task in ("image-classification", None) and len(media) == 1:
            return self._made("image", (media[0],), shown=())
        raise ValueError(
            f"the columns {list(media)} have images or sounds. These are read from columns only for image "
            "classification, with one image for each example. Encode the examples with the processor, such as "
            "processor(text=..., "
            'images=..., return_tensors="pt"), and pass what it returns; or read only a text with text_column='
        )

    def _made(self, kind: Any, columns: Sequence[str], target: str | None = None, shown: Any = None) -> Encoded:
        columns = tuple(columns)
        if shown is None:
            everything = (*columns, *([target] if target is not None and kind == "completion" else []))
            shown = everything if all(name in self.strings for name in everything) else (self._free_name(),)
        label = self._label_column(kind) if target is None else None
        unread = () if kind == "tensors" else self._unread(columns, target, label)
        return Encoded(
            kind, columns, target, label,
            label_names=None if label is None or label not in self.class_names else tuple(self.class_names[label]),
            shown=tuple(shown), unread=unread, doubtful=self._is_doubtful(unread),
            truncation=self.reading.truncation, max_length=self.reading.max_length,
        )  # fmt: skip

    def _unread(self, columns: Sequence[str], target: str | None, label: str | None) -> tuple[str, ...]:
        """Columns of text that are neither read nor classes, nor what is read said again."""
        read = {*columns, target, label}
        names = [n for n in self.strings if not self._is_id(n) and not self._is_category(n)]
        names += [n for n in (*self.words, *self.conversations) if n in (*WORDS, *CONVERSATIONS)]
        names = [n for n in names if n not in read and not (self.needs.generates and n in OUTPUTS)]
        whole = [" ".join(_text_in(as_python(at(row, n))) for n in columns) for row in self.rows]
        again = (all(str(row.get(n) or "") in text for row, text in zip(self.rows, whole, strict=True)) for n in names)
        return tuple(n for n, is_again in zip(names, again, strict=True) if not is_again)

    def _is_doubtful(self, unread: Sequence[str]) -> bool:
        """Whether a column that nobody decided about may be more than an attribute."""
        if self.reading.text_column is not None:
            return False
        return any(name not in self.strings or self._is_prose(name) for name in unread)

    def _shown_beside(self) -> tuple[str, ...]:
        """The columns of text that came along with encoded data, where it is clear which they are."""
        try:
            shown = self._texts().shown
        except ValueError:
            return ()
        return tuple(name for name in shown if name in self.strings)

    def _free_name(self) -> str:
        return MADE_TEXT if MADE_TEXT not in self.first else "encoded_text"

    def _check_asked_for(self) -> None:
        for what in ("text_column", "text_pair_column", "label_column"):
            name = getattr(self.reading, what)
            if name is not None and not has(self.rows[0], name) and not any(has(row, name) for row in self.rows):
                raise ValueError(f"{what}={name!r} is not in the dataset; it has {sorted(self.first)}")

    def _asked_for(self, name: str) -> Encoded:
        value = next((v for v in (as_python(at(row, name)) for row in self.rows) if v is not None), None)
        second = self.reading.text_pair_column
        if second is not None:
            other = next((v for v in (as_python(at(row, second)) for row in self.rows) if v is not None), None)
            if not isinstance(value, str) or not isinstance(other, str):
                wrong = "text_column" if not isinstance(value, str) else "text_pair_column"
                raise ValueError(
                    f"a pair needs two texts, but {wrong} has {_held(other if isinstance(value, str) else value)}"
                )
            return self._made("pair", (name, second))
        if is_conversation(value):
            return self._of_conversation(name)
        if is_words(value):
            return self._made("words", (name,))
        if isinstance(value, str):
            return self._of_text(name)
        inner = [f"{name}.{key}" for key, v in value.items() if isinstance(v, str)] if isinstance(value, dict) else []
        reach = f"; name one of {inner}" if inner else ""
        raise ValueError(
            f"text_column={name!r} must have texts, conversations or words, but it has {_held(value)}{reach}"
        )

    # Conversations

    def _conversation(self) -> Encoded | None:
        columns = [name for name in self.conversations if name not in OUTPUTS]
        if not columns:
            if self.conversations:
                raise self._unclear(self.conversations, "the only conversations are in columns of answers")
            return None
        known = [name for name in CONVERSATIONS if name in columns]
        name = columns[0] if len(columns) == 1 else known[0] if len(known) == 1 else None
        if name is None:
            raise self._unclear(columns, "there are several columns of conversations")
        if about := [n for n in BESIDE_CONVERSATIONS if self.first.get(n)]:
            raise self._unclear([name, *about], "what the conversation is about stands beside it, and is not read")
        return self._of_conversation(name)

    def _of_conversation(self, name: str) -> Encoded:
        target = self._target(name)
        if target is not None and not is_conversation(self.first.get(target)):
            raise ValueError(f"{name!r} has conversations, so its target {target!r} must have them too")
        beside = [n for n in (*SYSTEMS, "tools", "documents", "chat_template_kwargs") if self.first.get(n)]
        return self._made("completion" if target else "chat", (name, *beside), target)

    def _target(self, name: str) -> str | None:
        """The column that a language model with positions='labels' is to predict."""
        if not self.needs.reads_targets:
            return None
        if self.reading.label_column is not None:
            holds = as_python(at(self.rows[0], self.reading.label_column))
            return self.reading.label_column if isinstance(holds, str) or is_conversation(holds) else None
        same = self.conversations if name in self.conversations else self.strings
        likely = ("completion",) if self.needs.continues else OUTPUTS
        targets = [column for column in likely if column in same and column != name]
        if len(targets) > 1:
            raise self._unclear(targets, "several columns may be what is to be predicted", "label_column")
        return targets[0] if targets else None

    # Words

    def _words(self) -> Encoded | None:
        known = [name for name in self.words if name in WORDS]
        tags = self.needs.task == "token-classification"
        texts = [name for name in self.strings if name in TEXTS]
        if known and (tags or not texts):
            if len(known) > 1 or (not tags and any(self._is_prose(n) for n in self.strings if not self._is_id(n))):
                raise self._unclear([*known, *self.strings], "there are words and other columns of text")
            return self._made("words", (known[0],))
        return None

    # Multiple choice

    def _choices(self) -> Encoded:
        name, second = self.reading.text_column, self.reading.text_pair_column
        choices = (second,) if second is not None else self._choice_columns()
        if not choices:
            raise self._unclear(list(self.first), "no column holds the choices", "text_pair_column")
        if name is not None:
            return self._made("choices", (name, *choices), shown=(self._free_name(),))
        if "sent1" in self.strings:  # SWAG: sent2 begins the sentence that the ending ends
            parts = [n for n in self.strings if n in ("sent1", "sent2")]
        else:
            context = next((n for n in CONTEXTS if n in self.strings), None)
            question = next((n for n in QUESTIONS if n in self.strings), None)
            parts = [n for n in (context, question) if n is not None]
        if not parts:
            raise self._unclear(self.strings, "no column holds what the choices belong to")
        others = [n for n in self.strings if n in TEXTS and n not in (*parts, *choices) and self._is_prose(n)]
        if others:
            raise self._unclear([*parts, *others], "there are several texts beside the choices")
        return self._made("choices", (*parts, *choices), shown=(self._free_name(),))

    def _choice_columns(self) -> tuple[str, ...]:
        """The one column with a list of choices, or the several with one each, in order."""
        for name in CHOICES:
            value = self.first.get(name)
            if is_words(value) or (isinstance(value, dict) and is_words(value.get("text"))):
                return (name,)
        numbered: dict[str, list[str]] = {}
        for name in self.strings:
            if matched := NUMBERED_CHOICE.fullmatch(name):
                numbered.setdefault(matched[1], []).append(name)
        return next((tuple(sorted(names)) for names in numbered.values() if len(names) > 1), ())

    # Texts

    def _texts(self) -> Encoded:
        choices = self._choice_columns()
        if choices not in ((), ("answers",)):  # `answers` hold what is right, not what there is to choose from
            raise self._unclear([*self.strings, *choices], "the choices belong to the text")
        systems = [n for n in SYSTEMS if self.needs.generates and self.first.get(n)]
        if systems and len(self.strings) > len(systems):
            raise self._unclear(self.strings, "there is a system prompt beside the text")
        if pair := self._pair():
            return self._of_pair(*pair)
        known = [name for name in self.strings if name in TEXTS]
        prose = [n for n in self.strings if n not in known and not self._is_id(n) and self._is_prose(n)]
        if self.needs.generates:  # that writes the others itself
            prose = [n for n in prose if n not in OUTPUTS]
        if len(known) > 1:
            known = self._leading(known)
        nested = [n for n in self.first if n.removesuffix("s") in SECONDS and n not in self.strings]
        if nested and known and known[0] in FIRSTS:
            raise self._unclear([*known, *nested], "what the text belongs to is nested")
        if len(known) == 1 and (not prose or known == ["text"]):  # the others are named in a warning
            return self._of_text(known[0])
        if len(known) + len(prose) > 1:
            raise self._unclear([*known, *prose], "several columns hold text")
        others = [n for n in self.strings if n not in prose and not self._is_id(n) and not self._is_category(n)]
        nested = [n for n, v in self.first.items() if isinstance(v, dict | list) and n not in self.strings]
        nested = [n for n in nested if n not in LABELS and not _holds_numbers(self.first[n])]
        if len(prose) == 1 and prose[0] not in OUTPUTS and not others and not nested:
            return self._of_text(prose[0])
        raise self._unclear(self.strings + nested, "no column is known to hold the text")

    def _leading(self, known: list[str]) -> list[str]:
        """Columns of text without those of the same few values; `text` alone where the others hold single words."""
        kept = [name for name in known if not self._is_category(name)] or known
        others = [name for name in kept if name != "text"]
        return ["text"] if "text" in kept and not any(map(self._is_prose, others)) else kept

    def _of_text(self, name: str) -> Encoded:
        target = self._target(name)
        if target is None or self.needs.task == "seq2seq-lm":
            return self._made("text", (name,), target)
        return self._made("completion", (name,), target)

    def _of_pair(self, first: str, second: str) -> Encoded:
        if self.needs.generates:
            others = [n for n in self.strings if n in TEXTS and n != first and not self._is_category(n)]
            if second in ANSWERS and not others:  # a language model is asked the first, and should say the second
                return self._of_text(first)
            raise self._unclear(
                [first, second, *others], "a language model reads one text, and it is not known how to join these"
            )
        if self.needs.embeds:
            raise self._unclear([first, second], "an embedding is of one text, and there are two")
        given = TEXTS if self.needs.task == "question-answering" else (*TEXTS, *OUTPUTS)
        others = [n for n in self.strings if n not in (first, second) and n in given and self._is_prose(n)]
        others += [n for n in self.strings if n not in (first, second) and n[:-1] == first[:-1] and n[-1].isalnum()]
        if self.needs.task == "sequence-classification" and any(name in self.first for name in LABELS):
            # With labels beside it an answer is judged, and not the truth.
            judged = [n for n in ANSWERS if n in self.strings and not self._is_category(n)]
            others += [n for n in judged if n not in (first, second, *others)]
        if others:
            raise self._unclear([first, second, *others], "more than two columns hold text")
        return self._made("pair", (first, second))

    def _pair(self) -> tuple[str, str] | None:
        strings = self.strings
        pairs = [pair for pair in PAIRS if set(pair) <= set(strings)] or self._numbered_pairs()
        if not pairs:
            pairs = [(a, b) for a in FIRSTS for b in SECONDS if a in strings and b in strings and a != b]
            if self.needs.generates:  # what a language model reads is called `text`, whatever stands beside it
                pairs = [(a, b) for a, b in pairs if b != "text" or self._is_prose(a)]
        if not pairs and not (self.needs.generates and "text" in strings):
            pairs = [(a, b) for a in PROMPTS for b in ANSWERS if a in strings and b in strings]
        if len(pairs) > 1:
            raise self._unclear(sorted({name for pair in pairs for name in pair}), "several pairs of texts are there")
        return pairs[0] if pairs else None

    def _numbered_pairs(self) -> list[tuple[str, str]]:
        """Columns whose names differ in their last character alone: 1 and 2, or a and b."""
        stems: dict[tuple[str, str], list[str]] = {}
        for name in self.strings:
            matched = NUMBERED.fullmatch(name)
            if matched and matched[1] and (matched[2] or matched[3] in "12" or matched[3] in "AB"):
                kind = "digits" if matched[3] in "12" else "letters" if matched[3] in "ab" else "capitals"
                stems.setdefault((matched[1] + matched[2], kind), []).append(name)
        return [(a, b) for a, b in (sorted(names) for names in stems.values() if len(names) == 2)]

    # What a column holds

    def _is_id(self, name: str) -> bool:
        return bool(OTHER_IDS.fullmatch(name)) or name in LABELS

    def _is_category(self, name: str) -> bool:
        """Whether the same few values come again and again."""
        values = self._values(name)
        # Chosen: eight rows at least, each value four times on average; only which column is read depends on it.
        return len(values) >= 8 and len(set(values)) * 4 <= len(values)

    def _is_prose(self, name: str) -> bool:
        values = self._values(name)
        if not values or self._is_category(name):
            return False
        words = sum(len(value.split()) for value in values) / len(values)
        unspaced = sum(len(_UNSPACED.findall(value)) for value in values) / len(values)
        return words >= _PROSE_WORDS or unspaced >= _PROSE_CHARACTERS

    # Labels

    def _label_column(self, kind: str) -> str | None:
        if self.reading.label_column is not None:
            return self.reading.label_column
        if self.needs.generates or self.needs.task == "masked-lm":
            return None
        if kind == "words":
            return self._tags()
        known = LABELS if kind != "choices" else (*LABELS, "answerKey", "answer", "gold")
        return next((name for name in known if name in self.first), None)

    def _tags(self) -> str | None:
        """The column with the tags of words, for a model that tags."""
        if self.needs.task != "token-classification":
            return next(
                (name for name in LABELS if name in self.first and not isinstance(self.first[name], list)), None
            )
        columns = [name for name in TAGS if isinstance(self.first.get(name), list)]
        if len(columns) > 1 and self.needs.label_names:
            ours = {name.lower() for name in self.needs.label_names.values()}
            columns = [n for n in columns if {name.lower() for name in self.class_names.get(n, ())} == ours] or columns
        if len(columns) > 1:
            raise self._unclear(columns, "several columns tag the words", "label_column")
        return columns[0] if columns else None

    def _unclear(self, names: Sequence[str], why: str, remedy: str = "text_column") -> ValueError:
        """The error that says what is unclear and what to pass."""
        columns = ", ".join(repr(name) for name in dict.fromkeys(names)) or "none"
        nested = [
            f"{n}.{key}"
            for n, v in self.first.items()
            if isinstance(v, dict)
            for key, s in v.items()
            if isinstance(s, str)
        ]
        reach = f" A dot reaches into dictionaries: {nested[:4]}." if nested and remedy == "text_column" else ""
        pair = ", and text_pair_column= the second of a pair" if remedy == "text_column" else ""
        return ValueError(
            f"it is not clear which column to read: {why} ({columns}; the dataset has {sorted(self.first)}). Pass "
            f"{remedy}= to name it{pair}, or use a data set with one column named 'text'.{reach}"
        )


def _text_in(value: Any) -> str:
    """All the text in a value, of a conversation what was said."""
    if isinstance(value, Mapping):
        return " ".join(map(_text_in, value.values()))
    return " ".join(map(_text_in, value)) if isinstance(value, list) else str(value)


def _held(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _holds_numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float | bool) or value in ([], None)
