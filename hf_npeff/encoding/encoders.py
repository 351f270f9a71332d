"""From one row of a data set to the model's inputs, according to the record of what is read.

The tokenizer is called in the usual way. Then three things are corrected. A causal language model does not read the
end-of-sequence token that some tokenizers append. A text that was rendered with its special tokens does not get them
twice. A text that is too long is cut only if that was asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_npeff.encoding.chat import as_lines, conversation_of, is_conversation, messages_of, turn_of
from hf_npeff.encoding.embedding_texts import EmbeddingTexts
from hf_npeff.encoding.labels import IGNORED, numbers_of_tags
from hf_npeff.encoding.pictures import in_colours
from hf_npeff.encoding.record import Encoded, ModelNeeds
from hf_npeff.encoding.values import as_python, at, is_words

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The encoded inputs of a row.

    Attributes:
        tensors: the model's inputs, without padding.
        shown: a text for people to read, if no column of the row shows what was encoded.
        truncated: whether the row was truncated.
    """

    tensors: dict[str, Any]
    shown: str | None = None
    truncated: bool = False


class Encoder:
    """Encodes rows of a data set by the record of what is read.

    Args:
        record: the record of what is read; `self.record` adds what only the tokenizer knows.
        processing_class: the tokenizer, image processor or processor.
        needs: the needs of the model.
        tensors: the function that makes inputs from data that are already encoded.

    Raises:
        ValueError: if there is no processing class and something has to be encoded, max_length is more than the model
            takes, or a conversation would be cut at its end, where the model continues.
    """

    def __init__(
        self,
        record: Encoded,
        processing_class: Any,
        needs: ModelNeeds,
        tensors: Callable[[Mapping[str, Any]], dict[str, Any]],
    ):
        self.needs, self.processor = needs, processing_class
        self._tensors = tensors
        if record.kind != "tensors" and processing_class is None:
            raise ValueError(
                f"the column {record.columns[0]!r} has to be encoded: pass processing_class (the model's tokenizer)"
            )
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.limit = self._limit(record) if record.truncation else None
        self.around: tuple[list[int], list[int]] = ([], [])
        if record.kind in ("text", "pair", "words", "completion"):
            self.around = special_tokens_around(self.tokenizer)
        self.record = replace(record, max_length=self.limit, notes=tuple(self._notes(record)))

    def _limit(self, record: Encoded) -> int:
        most = self.needs.max_length
        own = getattr(self.tokenizer, "model_max_length", None)
        if most is None and isinstance(own, int) and own < 1_000_000:  # tokenizers say 1e30 where they know none
            most = own
        if record.max_length is not None and most is not None and record.max_length > most:
            raise ValueError(f"max_length={record.max_length} is more than the {most} tokens that the model takes")
        limit = record.max_length if record.max_length is not None else most
        if limit is None:
            raise ValueError("truncation=True needs max_length=, because the model has no limit of its own")
        chat = record.kind == "chat" and self.needs.continues
        if chat and getattr(self.tokenizer, "truncation_side", "right") != "left":
            raise ValueError(
                "a conversation would be cut at its end, where the model continues: set tokenizer.truncation_side = "
                "'left', or shorten the conversations"
            )
        return limit

    def _notes(self, record: Encoded) -> list[str]:
        notes = []
        if record.kind == "chat" and self.needs.continues:
            notes.append("the assistant's turn is opened, or its last message continued")
        if self.needs.continues and self.around[1] and record.kind in ("text", "pair", "words", "completion"):
            tokens = " ".join(map(str, self.tokenizer.convert_ids_to_tokens(self.around[1])))
            notes.append(f"{tokens}, which the tokenizer appends, is removed")
        if isinstance(self.tokenizer, EmbeddingTexts) and self.tokenizer.prompt:
            notes.append(f"the prompt {self.tokenizer.prompt!r} comes before every text")
        return notes

    def warn_of_end(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Warn if encoded data end with the end-of-sequence token: a causal model then predicts what follows it."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        asked = self.record.kind == "tensors" and self.needs.continues and self.needs.positions in ("auto", "last")
        last = [as_python(row.get("input_ids")) for row in rows] if asked and end is not None else []
        if last and all(isinstance(ids, list) and ids and ids[-1] == end for ids in last):
            logger.warning(
                "the examples end with %s, so the analysed prediction is what follows the end; remove it if the model "
                "should continue the text",
                self.tokenizer.convert_ids_to_tokens(end),
            )

    def __call__(self, row: Mapping[str, Any]) -> Inputs:
        """The inputs of a row.

        Raises:
            ValueError, TypeError, KeyError: if it cannot be encoded; `Examples` says which row it was.
        """
        return getattr(self, f"_of_{self.record.kind}")(row)

    # Kinds

    def _of_tensors(self, row: Mapping[str, Any]) -> Inputs:
        return Inputs(self._tensors(row))

    def _of_image(self, row: Mapping[str, Any]) -> Inputs:
        image = in_colours(row[self.record.columns[0]], self.processor)
        encoded = self.processor(images=image, return_tensors="pt")
        return Inputs({name: value[0] for name, value in encoded.items()})

    def _of_text(self, row: Mapping[str, Any]) -> Inputs:
        return self._texts(row)

    def _of_pair(self, row: Mapping[str, Any]) -> Inputs:
        return self._texts(row)

    def _texts(self, row: Mapping[str, Any]) -> Inputs:
        texts = [text_at(row, name) for name in self.record.columns]
        tensors, truncated = self._tokens(*texts)
        if self.record.target is not None:
            target = text_at(row, self.record.target)
            targets, cut = self._cut_by_tokenizer(self.tokenizer(text_target=target), text_target=target)
            tensors["labels"], truncated = list(targets["input_ids"]), truncated or cut
        elif (labels := self._given_labels(row)) is not None:
            tensors["labels"] = labels
        return Inputs(tensors, " | ".join(texts), truncated)

    def _given_labels(self, row: Mapping[str, Any]) -> list[Any] | None:
        """Token labels that came with a text, which positions='labels' reads."""
        labels = as_python(row.get("labels"))
        wanted = (
            self.needs.task is None or self.needs.generates or self.needs.task in ("masked-lm", "token-classification")
        )
        return list(labels) if wanted and isinstance(labels, list) else None

    def _of_words(self, row: Mapping[str, Any]) -> Inputs:
        words = as_python(at(row, self.record.columns[0]))
        if not is_words(words):
            raise ValueError(f"the column {self.record.columns[0]!r} must have words, but it has {str(words)[:80]!r}")
        if self.record.label_column is None or self.needs.task != "token-classification":
            tensors, truncated = self._tokens(" ".join(words))
            return Inputs(tensors, " ".join(words), truncated)
        encoding = self.tokenizer(words, is_split_into_words=True)
        self._check_apart(words, encoding)
        tensors, truncated = self._cut_by_tokenizer(encoding, words, is_split_into_words=True)
        given = as_python(at(row, self.record.label_column))
        if given is not None:
            tensors["labels"] = self._labels_of_words(given, words, tensors)
        tensors.pop("_word_ids", None)
        return Inputs(tensors, " ".join(words), truncated)

    def _check_apart(self, words: Sequence[str], encoding: Any) -> None:
        """Refuse a tokenizer that runs words together, as those of byte-level BPE do by default."""
        if len(words) < 2 or not hasattr(self.tokenizer, "decode"):
            return
        text = self.tokenizer.decode(encoding["input_ids"], skip_special_tokens=True)
        if not any(c.isspace() for c in text.strip()) and all(word.isascii() for word in words):
            raise ValueError(
                f"the tokenizer runs the words together ({text[:40]!r}); load it with add_prefix_space=True"
            )

    def _labels_of_words(self, given: Any, words: Sequence[str], tensors: dict[str, Any]) -> list[int]:
        """The tag of each word at its first token; other tokens do not count."""
        places = tensors.get("_word_ids")
        if places is None:
            raise ValueError("tags of words need a fast tokenizer, which knows the words of its tokens")
        if len(given) != len(words):
            raise ValueError(f"there are {len(words)} words and {len(given)} tags")
        tags = numbers_of_tags(given, self.record.label_names, self.needs.label_names)
        before = [None, *places[:-1]]
        return [IGNORED if w is None or w == b else tags[w] for w, b in zip(places, before, strict=True)]

    def _of_choices(self, row: Mapping[str, Any]) -> Inputs:
        *parts, options = self._parts_and_options(row)
        first, begun = parts[0], " ".join(parts[1:])
        pairs = [(first, f"{begun} {option}".strip()) for option in options]
        encoded = [self._tokens(*pair) for pair in pairs]
        tensors = {name: [tensors_of_choice[name] for tensors_of_choice, _ in encoded] for name in encoded[0][0]}
        return Inputs(tensors, " | ".join([*parts, *options]), any(cut for _, cut in encoded))

    def _parts_and_options(self, row: Mapping[str, Any]) -> list[Any]:
        columns = list(self.record.columns)
        last = as_python(at(row, columns[-1]))
        if isinstance(last, Mapping):
            last = as_python(last.get("text"))
        if is_words(last):
            return [*(text_at(row, name) for name in columns[:-1]), last]
        stem = columns[-1].rstrip("0123456789ABCDE_ ")
        options = [name for name in columns if name != stem and name.rstrip("0123456789ABCDE_ ") == stem]
        parts = [text_at(row, name) for name in columns if name not in options]
        return [*parts, [text_at(row, name) for name in options]]

    def _of_chat(self, row: Mapping[str, Any]) -> Inputs:
        messages, arguments = conversation_of(row, self.record.columns)
        turn = turn_of(messages, self.needs)
        answered = self.needs.continues and self.needs.positions == "labels" and messages[-1]["role"] == "assistant"
        if answered:
            return self._completed(messages[:-1], messages[-1:], arguments)
        tensors, truncated = self._sliced(self._rendered(messages, arguments, **turn))
        if (labels := self._given_labels(row)) is not None:
            tensors["labels"] = labels
        return Inputs(tensors, as_lines(messages), truncated)

    def _of_completion(self, row: Mapping[str, Any]) -> Inputs:
        assert self.record.target is not None
        completion = as_python(at(row, self.record.target))
        if is_conversation(as_python(at(row, self.record.columns[0]))):
            messages, arguments = conversation_of(row, self.record.columns)
            answer = (
                [{"role": "assistant", "content": completion}]
                if isinstance(completion, str)
                else messages_of(completion)
            )
            return self._completed(messages, answer, arguments)
        prompt, completion = text_at(row, self.record.columns[0]), text_at(row, self.record.target)
        whole, asked = (self._without_appended(dict(self.tokenizer(text))) for text in (prompt + completion, prompt))
        whole, asked = self._once(whole, prompt, completion), self._once(asked, prompt)
        tensors, truncated = self._sliced(self._with_labels(whole, asked["input_ids"]))
        return Inputs(tensors, None, truncated)

    # Conversations

    def _completed(self, messages: Sequence[Any], answer: Sequence[Any], arguments: Mapping[str, Any]) -> Inputs:
        """A conversation and its answer, whose tokens are the labels."""
        if not messages:
            raise ValueError("the conversation has no message before the answer")
        whole = self._rendered([*messages, *answer], arguments)
        asked = self._rendered(messages, arguments, add_generation_prompt=True)
        tensors, truncated = self._sliced(self._with_labels(whole, asked["input_ids"]))
        return Inputs(tensors, as_lines([*messages, *answer]), truncated)

    def _rendered(self, messages: Sequence[Any], arguments: Mapping[str, Any], **turn: bool) -> dict[str, Any]:
        own = getattr(self.processor, "chat_template", None)
        if self.tokenizer is not self.processor and own is not None and "chat_template" not in arguments:
            arguments = {**arguments, "chat_template": own}
        settings: dict[str, Any] = {"tokenize": True, "return_dict": True, **turn, **arguments}
        try:
            return dict(self.tokenizer.apply_chat_template(list(messages), **settings))
        except Exception as error:  # jinja2's, which comes with transformers' chat templates and is not imported here
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise ValueError(f"the chat template does not accept the conversation: {error}") from error

    @staticmethod
    def _with_labels(whole: dict[str, Any], asked: Sequence[int]) -> dict[str, Any]:
        """Labels for the tokens after the prompt; a token that crosses the border belongs to the answer."""
        ids = list(whole["input_ids"])
        same = 0
        while same < min(len(ids), len(asked)) and ids[same] == asked[same]:
            same += 1
        return {**whole, "labels": [IGNORED] * same + ids[same:]}

    # Tokens

    def _tokens(self, *texts: str) -> tuple[dict[str, Any], bool]:
        tensors, truncated = self._cut_by_tokenizer(self.tokenizer(*texts), *texts)
        tensors.pop("_word_ids", None)
        return self._without_appended(self._once(tensors, *texts)), truncated

    def _cut_by_tokenizer(self, encoding: Any, *texts: Any, **how: Any) -> tuple[dict[str, Any], bool]:
        """Encode again with truncation what is too long; of a pair, the longer text is cut."""
        truncated = False
        if self.limit is not None:
            room = self.limit + (len(self.around[1]) if self.needs.continues and "text_target" not in how else 0)
            truncated = len(encoding["input_ids"]) > room
            if truncated:
                encoding = self.tokenizer(*texts, truncation=True, max_length=room, **how)
        tensors = dict(encoding)
        if how.get("is_split_into_words") and getattr(encoding, "is_fast", False):
            tensors["_word_ids"] = list(encoding.word_ids())
        return tensors, truncated

    def _sliced(self, tensors: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Cut tokens on the tokenizer's truncation side."""
        if self.limit is None or len(tensors["input_ids"]) <= self.limit:
            return tensors, False
        left = getattr(self.tokenizer, "truncation_side", "right") == "left"
        return _part(tensors, slice(-self.limit, None) if left else slice(self.limit)), True

    def _once(self, tensors: dict[str, Any], *texts: str) -> dict[str, Any]:
        """Remove special tokens that an end has twice because the text was rendered with them."""
        before, after = self.around
        ids, start, stop = list(tensors["input_ids"]), 0, len(tensors["input_ids"])
        if (
            before
            and ids[len(before) : 2 * len(before)] == before
            and self._spells(texts[0].lstrip(), before, "starts")
        ):
            start = len(before)
        n = len(after)
        twice = after and ids[-2 * n : -n] == after and not self.needs.continues  # there the appended one goes anyway
        if twice and self._spells(texts[-1].rstrip(), after, "ends"):
            stop -= n
        return tensors if (start, stop) == (0, len(ids)) else _part(tensors, slice(start, stop))

    def _spells(self, text: str, tokens: Sequence[int], end: str) -> bool:
        token = self.tokenizer.convert_ids_to_tokens(tokens[0])
        return text.startswith(token) if end == "starts" else text.endswith(token)

    def _without_appended(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Remove the end token that a tokenizer appends, so that a causal model does not predict what follows it."""
        after = self.around[1]
        ids = list(tensors["input_ids"])
        if not self.needs.continues or not after or ids[-len(after) :] != after:
            return tensors
        return _part(tensors, slice(0, len(ids) - len(after)))


def _part(tensors: Mapping[str, Any], which: slice) -> dict[str, Any]:
    """The same part of everything that has a value for each token."""
    n = len(tensors["input_ids"])
    return {k: v[which] if isinstance(v, list) and len(v) == n else v for k, v in tensors.items()}


def text_at(row: Mapping[str, Any], name: str) -> str:
    """The text in a column.

    Raises:
        ValueError: if the value is not a text.
    """
    value = as_python(at(row, name))
    if not isinstance(value, str):
        raise ValueError(
            f"the column {name!r} must have text, but it has {type(value).__name__}; leave the example out, or name "
            "another column with text_column="
        )
    return value


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after every text."""
    try:
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(tokenizer("a")["input_ids"])
    except TypeError:  # a callable of somebody's own that knows no special tokens
        return [], []
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
