"""Which columns of a data set are read, how each kind is encoded, and what is refused. Oracle: the tokenizer itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hf_npeff.data import Examples
from hf_npeff.encoding.record import Encoded, ModelNeeds, Reading, shown_texts
from hf_npeff.encoding.shapes import encoded_as
from hf_npeff.encoding.values import is_medium
from tests.tiny import tiny_tokenizer

CLASSIFIER = ModelNeeds("sequence-classification", max_length=48)
CAUSAL = ModelNeeds("causal-lm", max_length=48)
ASKED = [{"role": "user", "content": "the cat sees"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "a dog"}]
TOOL = {"type": "function", "function": {"name": "sees", "parameters": {"type": "object"}}}


def tokenizer_with(before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """A tiny tokenizer that puts special tokens before and after every text."""
    made = tiny_tokenizer()
    tokens = [(token, made.convert_tokens_to_ids(token)) for token in {before, after, "</s>"} if token]
    single = f"{before} $A {after}".strip()
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{before} $A </s> $B {after}".strip(), special_tokens=tokens
    )
    return made


def inputs_of(rows: Any, needs: ModelNeeds = CLASSIFIER, tokenizer: Any = None, **reading: Any) -> list[dict[str, Any]]:
    examples = Examples(rows, tokenizer or tiny_tokenizer(), reading=Reading(**reading), needs=needs)
    return [example.inputs for example in examples]


def ids_of(rows: Any, needs: ModelNeeds = CLASSIFIER, tokenizer: Any = None, **reading: Any) -> list[Any]:
    return [inputs["input_ids"] for inputs in inputs_of(rows, needs, tokenizer, **reading)]


LONG, OTHER = "the cat sees the dog", "a dog sees the cat"


@pytest.mark.parametrize(
    "name", ["text", "sentence", "review", "content", "document", "comment", "tweet", "body", "some_unknown_name"]
)
def test_a_single_text_is_read_by_its_name_or_because_nothing_else_is_prose(name: str) -> None:
    """Oracle: the tokenizer on the text alone; ids, classes and numbers beside it change nothing."""
    rows = [{"id": f"a{i}", name: text, "label": i, "url": "x/y"} for i, text in enumerate((LONG, OTHER))]
    assert ids_of(rows) == [tiny_tokenizer()(text)["input_ids"] for text in (LONG, OTHER)]
    assert Examples(rows, tiny_tokenizer()).encoded.columns == (name,)


@pytest.mark.parametrize(
    "names",
    [
        ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text", "text_pair"),
        ("question", "sentence"), ("question", "passage"), ("question", "context"), ("query", "passage"),
        ("query", "document"), ("query", "response"), ("query", "text"), ("question", "answer"), ("claim", "evidence"),
        ("utterance_a", "utterance_b"), ("text_1", "text_2"), ("sentence_A", "sentence_B"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backwards", [False, True])
def test_both_texts_of_a_pair_are_read_in_their_order(names: tuple[str, str], backwards: bool) -> None:
    """Oracle: the tokenizer called with both, in the named order whatever the columns' order is."""
    row: dict[str, Any] = dict(zip(names, ("the cat", "a dog"), strict=True))
    row = dict(reversed(row.items())) if backwards else row
    assert ids_of([{"idx": 3, **row, "label": 1}]) == [tiny_tokenizer()("the cat", "a dog")["input_ids"]]


def test_columns_that_are_asked_for_are_read() -> None:
    """Oracle: the tokenizer; a dot reaches into dictionaries, and a translation's direction has to be named."""
    rows = [{"title": LONG, "words": "a b", "translation": {"en": "the cat", "de": "a dog"}}]
    known = tiny_tokenizer()
    assert ids_of(rows, text_column="words") == [known("a b")["input_ids"]]
    assert ids_of(rows, text_column="words", text_pair_column="title") == [known("a b", LONG)["input_ids"]]
    assert ids_of(rows, text_column="translation.de") == [known("a dog")["input_ids"]]
    found = inputs_of(
        rows,
        ModelNeeds("seq2seq-lm", "labels"),
        tiny_tokenizer(add_eos=True),
        text_column="translation.en",
        label_column="translation.de",
    )
    ends = tiny_tokenizer(add_eos=True)
    assert found[0]["input_ids"] == ends("the cat")["input_ids"]
    assert found[0]["labels"] == ends(text_target="a dog")["input_ids"]
    example = Examples(rows, known, reading=Reading(text_column="translation.de"))[0]
    assert example.columns["text"] == "a dog"


@pytest.mark.parametrize(
    ("row", "needs", "named"),
    [
        ({"id": "a b c d", "tokens_seen": 3}, CLASSIFIER, "no column"),
        ({"answer": LONG}, CLASSIFIER, "answer"),
        ({"title": LONG, "content": OTHER}, CLASSIFIER, "title"),
        ({"sentence": LONG, "review": OTHER}, CLASSIFIER, "review"),
        ({"id": "x", "translation": {"en": LONG, "de": OTHER}}, ModelNeeds("seq2seq-lm"), r"translation\.en"),
        ({"instruction": LONG, "input": OTHER, "output": "a"}, CAUSAL, "instruction"),
        ({"instruction": "a", "input": "b", "output": "a"}, CAUSAL, "instruction"),
        ({"premise": LONG, "hypothesis": OTHER}, CAUSAL, "hypothesis"),
        ({"question": LONG, "context": OTHER}, ModelNeeds("seq2seq-lm"), "context"),
        ({"question": LONG, "choices": ["a", "b"], "answer": 1}, CAUSAL, "choices"),
        ({"question": LONG, "options": {"text": ["a", "b"]}}, CLASSIFIER, "options"),
        ({"sentence1": LONG, "sentence2": OTHER, "sentence3": "a b c"}, CLASSIFIER, "sentence3"),
        ({"anchor": LONG, "positive": OTHER, "negative": "a b c d"}, CLASSIFIER, "negative"),
        ({"chosen": ANSWERED, "rejected": ANSWERED}, CAUSAL, "chosen"),
        ({"word": "cat", "definition": LONG}, CLASSIFIER, "word"),
        ({"instruction": LONG, "context": "", "response": OTHER}, CAUSAL, "context"),
        ({"document": LONG, "summary": OTHER, "label": 1}, CLASSIFIER, "summary"),
        ({"paragraph": LONG, "question": OTHER, "answer": "a b c", "label": 1}, CLASSIFIER, "answer"),
        ({"query": LONG, "passages": {"passage_text": [OTHER]}}, CLASSIFIER, "passages"),
        ({"dialog": [LONG, OTHER], "act": [1, 2]}, CLASSIFIER, "dialog"),
        ({"tokens": ["a"], "ner_tags": [1], "pos_tags": [2]}, ModelNeeds("token-classification"), "pos_tags"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused_with_the_columns(row: dict[str, Any], needs: ModelNeeds, named: str) -> None:
    """Oracle: the error names the columns and what to pass."""
    with pytest.raises(ValueError, match=named) as error:
        Examples([row], tiny_tokenizer(), needs=needs)
    assert "not clear which column to read" in str(error.value) and "_column=" in str(error.value)


def test_prose_beside_a_column_named_text_is_named_as_not_read() -> None:
    """Oracle: the record of what was read; a few words are no prose, classes and parts of the text no texts."""
    rows = [{"text": LONG, "note": OTHER, "topic": "pets"}]
    record = Examples(rows, tiny_tokenizer()).encoded
    assert record.columns == ("text",) and record.unread == ("note", "topic") and record.doubtful
    assert "not read: 'note', 'topic'" in str(record)
    rows = [{"text": f"{LONG} {i}", "topic": "pets", "word": "cat", "name": f"n{i}"} for i in range(9)]
    record = Examples(rows, tiny_tokenizer()).encoded
    assert record.unread == ("name",) and not record.doubtful  # a class comes again, and the word is in the text


@pytest.mark.parametrize("name", ["messages", "prompt", "conversation"])
def test_a_conversation_is_opened_for_the_assistant_or_its_last_message_continued(name: str) -> None:
    """Oracle: apply_chat_template, called by hand; a second turn of the assistant is never opened."""
    known = tiny_tokenizer()
    opened = known.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    continued = known.apply_chat_template(ANSWERED, continue_final_message=True, return_dict=True)["input_ids"]
    rows = [{name: messages, "answer": "a", "id": i} for i, messages in enumerate((ASKED, ANSWERED))]
    assert ids_of(rows, CAUSAL) == [opened, continued]
    assert known.convert_ids_to_tokens(continued)[-1] == "dog" and opened[-1] != continued[-1]
    whole = [known.apply_chat_template(r[name], return_dict=True)["input_ids"] for r in rows]
    assert ids_of(rows, CLASSIFIER) == whole


def test_conversations_in_the_other_schema_systems_and_tools_reach_the_template() -> None:
    """Oracle: the same conversation by hand; a template that writes its tools, with and without them."""
    known = tiny_tokenizer()
    shared = [{"from": "human", "value": "the cat sees"}, {"from": "gpt", "value": "a dog"}]
    assert ids_of([{"id": "7", "conversations": shared}], CAUSAL) == ids_of([{"messages": ANSWERED}], CAUSAL)
    with_system = [{"role": "system", "content": "one two"}, *ASKED]
    assert ids_of([{"system": "one two", "messages": ASKED}], CAUSAL) == ids_of([{"messages": with_system}], CAUSAL)
    known.chat_template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + known.chat_template
    expected = known.apply_chat_template(ASKED, tools=[TOOL], add_generation_prompt=True, return_dict=True)["input_ids"]
    for tools in ([TOOL], '[{"type": "function", "function": {"name": "sees", "parameters": null}}]'):
        assert ids_of([{"messages": ASKED, "tools": tools}], CAUSAL, known) == [expected]
    assert ids_of([{"messages": ASKED}], CAUSAL, known) != [expected]
    known.chat_template = "{{ messages[0].content + messages[0].nothing }}"
    with pytest.raises(ValueError, match="'0' cannot be encoded: the chat template does not accept"):
        ids_of([{"messages": ASKED}], CAUSAL, known)
    with pytest.raises(ValueError, match="martian"):
        ids_of([{"conversations": [{"from": "martian", "value": "a"}]}], CAUSAL)


def test_a_prompt_is_read_alone_unless_its_completion_is_what_is_predicted() -> None:
    """Oracle: the tokenizer on the prompt, and on both together with the prompt's tokens masked by hand."""
    known = tokenizer_with(before="<s>")
    row = {"prompt": "the cat", "completion": " sees a dog"}
    assert ids_of([row], CAUSAL, known) == [known("the cat")["input_ids"]]
    (found,) = inputs_of([row], ModelNeeds("causal-lm", "labels"), known)
    whole = known("the cat sees a dog")["input_ids"]
    assert found["input_ids"] == whole and found["labels"] == [-100] * 3 + whole[3:]
    (named,) = inputs_of([{"prompt": "the cat", "said": " sees"}], ModelNeeds("causal-lm", "labels"), known,
                         text_column="prompt", label_column="said")  # fmt: skip
    assert named["labels"] == [-100] * 3 + whole[3:4]
    talk = {"prompt": ASKED, "completion": ANSWERED[1:]}
    chat = known.apply_chat_template(ANSWERED, return_dict=True)["input_ids"]
    asked = known.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    for each in (talk, {"messages": ANSWERED}):
        (found,) = inputs_of([each], ModelNeeds("causal-lm", "labels"), known)
        assert found["input_ids"] == chat
        assert found["labels"] == [-100] * len(asked) + chat[len(asked) :]


def test_words_with_tags_are_aligned_to_the_first_tokens() -> None:
    """Oracle: word_ids walked by hand, with words of several tokens and special tokens around them."""
    known = tokenizer_with("<s>", "</s>")
    words = ["the", "cat sees", "a"]  # the tiny tokenizer splits at spaces: two tokens
    needs = ModelNeeds("token-classification", label_names={0: "O", 1: "B-PER", 2: "I-PER"})
    rows = [{"id": "0", "tokens": words, "ner_tags": [0, 2, 1]}]
    (found,) = inputs_of(rows, needs, known)
    encoding = known(words, is_split_into_words=True)
    places, expected, seen = encoding.word_ids(), [], set()
    for place in places:
        expected.append(-100 if place is None or place in seen else [0, 2, 1][place])
        seen.add(place)
    assert found["input_ids"] == encoding["input_ids"] and found["labels"] == expected == [-100, 0, 2, -100, 1, -100]
    (named,) = inputs_of([{"tokens": words, "tags": ["O", "I-PER", "B-PER"]}], needs, known)
    assert named["labels"] == expected
    tags = datasets.List(datasets.ClassLabel(names=["B-PER", "O", "I-PER"]))
    other_order = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    table = datasets.Dataset.from_dict({"tokens": [words], "ner_tags": [[1, 2, 0]]}, features=other_order)
    (renumbered,) = inputs_of(table, needs, known)
    assert renumbered["labels"] == expected


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"sent1": "the cat", "sent2": "a dog", "ending0": "one", "ending1": "two", "label": 1},
         [("the cat", "a dog one"), ("the cat", "a dog two")]),
        ({"question": "the cat", "choices": {"label": ["A", "B"], "text": ["one", "two"]}, "answerKey": "B"},
         [("the cat", "one"), ("the cat", "two")]),
        ({"premise": "the cat", "question": "a", "choice1": "one", "choice2": "two", "label": 0},
         [("the cat", "a one"), ("the cat", "a two")]),
        ({"article": "the cat", "question": "a dog", "options": ["one", "two", "three"], "answer": "C"},
         [("the cat", "a dog one"), ("the cat", "a dog two"), ("the cat", "a dog three")]),
        ({"context": "the cat", "question": "a", "answerA": "one", "answerB": "two", "label": "1"},
         [("the cat", "a one"), ("the cat", "a two")]),
    ],
)  # fmt: skip
def test_each_choice_is_encoded_with_what_it_belongs_to(row: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Oracle: the tokenizer on each pair, written out by hand."""
    assert ids_of([row], ModelNeeds("multiple-choice")) == [[tiny_tokenizer()(*pair)["input_ids"] for pair in pairs]]


def test_special_tokens_stand_once_and_a_causal_model_is_not_asked_what_follows_the_end() -> None:
    """Oracle: the ids written out; an encoder keeps its own, and a text's own end stays."""
    known = tokenizer_with("<s>", "</s>")
    a, bos, eos = (known.convert_tokens_to_ids(token) for token in ("cat", "<s>", "</s>"))
    assert ids_of(["cat", "<s> cat", "cat </s>"], CAUSAL, known) == [[bos, a], [bos, a], [bos, a, eos]]
    assert ids_of(["cat", "<s> cat", "<s> cat </s>"], CLASSIFIER, known) == [[bos, a, eos]] * 3
    record = Examples(["cat"], known, needs=CAUSAL).encoded
    assert "</s>, which the tokenizer appends, is removed" in str(record)
    assert not Examples(["cat"], known, needs=CLASSIFIER).encoded.notes


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", None])
def test_formats_of_datasets_give_the_same_examples(form: str | None) -> None:
    """Oracle: the records themselves; ids are those of the id column, as numbers of torch and NumPy too."""
    rows = [
        {"idx": 70 + i, "tokens": ["the", "cat"][: i + 1], "ner_tags": [0, 1][: i + 1], "x": i / 2} for i in range(2)
    ]
    needs = ModelNeeds("token-classification")
    table = datasets.Dataset.from_list(rows).with_format(form)
    plain, formatted = Examples(rows, tiny_tokenizer(), needs=needs), Examples(table, tiny_tokenizer(), needs=needs)
    assert formatted.ids == ["70", "71"]
    assert [(e.id, e.inputs, e.columns, e.content) for e in formatted] == [
        (e.id, e.inputs, e.columns, e.content) for e in plain
    ]
    stream = Examples(table.to_iterable_dataset(), tiny_tokenizer(), needs=needs, max_examples=2)
    assert [(e.id, e.content) for e in stream] == [(e.id, e.content) for e in plain]


def test_ids_of_tensors_in_a_list_are_ids() -> None:
    """Oracle: the numbers."""
    import numpy as np
    import torch

    rows = [{"id": torch.tensor(5), "input_ids": torch.tensor([8])}, {"id": np.int64(9), "input_ids": np.array([8])}]
    assert Examples(rows).ids == ["5", "9"]
    assert Examples({"id": np.array([5, 9]), "input_ids": torch.tensor([[8], [8]])}).ids == ["5", "9"]


def test_long_examples_are_cut_only_when_that_is_asked_for() -> None:
    """Oracle: the tokenizer with the same truncation; the record of the cut ones."""
    known = tokenizer_with("<s>", "</s>")
    for side in ("right", "left"):
        known.truncation_side = side
        rows = [{"sentence1": "the cat", "sentence2": LONG}, {"sentence1": "a", "sentence2": "b"}]
        expected = [known(*r.values(), truncation=True, max_length=6)["input_ids"] for r in rows]
        examples = Examples(rows, known, reading=Reading(truncation=True, max_length=6), needs=CLASSIFIER)
        assert [e.inputs["input_ids"] for e in examples] == expected
        assert [e.truncated for e in examples] == [True, False] and examples.encoded.max_length == 6
        assert ids_of([LONG], CAUSAL, known, truncation=True, max_length=4) == [
            known(LONG, truncation=True, max_length=5)["input_ids"][:-1]  # the end that is left off takes no room
        ]
    known.truncation_side = "left"
    cut = ids_of([{"messages": ASKED}], CAUSAL, known, truncation=True, max_length=3)
    assert cut == [known.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"][-3:]]


def test_misuse_of_columns_is_refused_before_anything_is_encoded() -> None:
    """Oracle: the documented errors."""
    rows = [{"text": LONG, "number": 3, "label": None, "inner": {"a": "b"}}]
    for reading, message in (
        ({"text_column": "nowhere"}, "text_column='nowhere' is not in the dataset"),
        ({"text_column": "number"}, "must have texts"),
        ({"text_column": "inner"}, r"inner\.a"),
        ({"text_column": "text", "text_pair_column": "number"}, "text_pair_column has a int"),
        ({"text_pair_column": "text"}, "text_column"),
        ({"label_column": "nowhere"}, "label_column='nowhere'"),
        ({"max_length": 4}, "truncation=True"),
        ({"truncation": True, "max_length": 0}, "positive whole number"),
        ({"truncation": True, "max_length": 49}, "more than the 48"),
        ({"text_column": 3}, "name of a column"),
        ({"truncation": "yes"}, "True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs_of(rows, **reading)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already encoded"):
        inputs_of([{"input_ids": [1, 2]}], truncation=True)
    with pytest.raises(ValueError, match="truncation_side"):
        inputs_of([{"messages": ASKED}], CAUSAL, truncation=True, max_length=3)
    with pytest.raises(ValueError, match="label_column='y'"):
        Examples([{"text": "a", "y": -1}, {"text": "b", "y": None}], tiny_tokenizer()).check_labelled("y")
    with pytest.raises(ValueError, match="processing_class"):
        Examples(["a"])


@pytest.mark.parametrize(
    "rows",
    [
        [{"review": LONG, "label": 1}],
        [{"question": "a", "sentence": "the cat", "label": 1}],
        [{"messages": ASKED}],
        [{"tokens": ["the", "cat"], "ner_tags": [0, 1]}],
    ],
)
def test_the_record_goes_through_json_reads_the_same_again_and_shows_the_texts(rows: list[Mapping[str, Any]]) -> None:
    """Oracle: equality with the record, with the inputs, and with the texts written out."""
    needs = ModelNeeds("token-classification" if "tokens" in rows[0] else "sequence-classification")
    examples = Examples(rows, tiny_tokenizer(), needs=needs)
    record = Encoded.from_dict(examples.encoded.to_dict())
    assert record == examples.encoded
    again = Examples(rows, tiny_tokenizer(), needs=needs, reading=record.reading)
    assert again.encoded == record and [e.content for e in again] == [e.content for e in examples]
    columns = {name: [value] for name, value in examples[0].columns.items()}
    shown = shown_texts(columns, {"dataset": {"encoded": record.to_dict()}})
    first = rows[0]
    assert shown == [
        first.get("review")
        or ("a | the cat" if "sentence" in first else "the cat" if "tokens" in first else None)
        or "user: the cat sees"
    ]


def test_a_record_of_a_file_is_checked() -> None:
    """Oracle: the documented error for what `to_dict` does not write."""
    from hf_npeff import CorruptStoreError

    texts = ({"columns": "text"}, {"columns": [1]}, {"more": 1}, {"target": 3}, {"max_length": "x"})
    for wrong in (3, {}, {"kind": "poem"}, *({"kind": "text", **more} for more in texts)):
        with pytest.raises(CorruptStoreError):
            Encoded.of({"dataset": {"encoded": wrong}})
    assert Encoded.of({"dataset": {"examples": 3}}) is None
    assert encoded_as([{"text": "a"}], Reading(), ModelNeeds()).columns == ("text",)


def test_encoded_examples_that_end_with_the_end_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: one warning, for causal models that are asked what comes last, and no other."""
    known = tiny_tokenizer()
    for rows, needs, warned in (
        ([{"input_ids": [8, 1]}], CAUSAL, 1),
        ([{"input_ids": [8, 9]}], CAUSAL, 0),
        ([{"input_ids": [8, 1]}], CLASSIFIER, 0),
        ([{"input_ids": [8, 1]}], ModelNeeds("causal-lm", "all"), 0),
    ):
        caplog.clear()
        Examples(rows, known, needs=needs)
        assert len(caplog.records) == warned and known.eos_token_id == 1


@pytest.mark.parametrize(
    ("beside", "task"),
    [
        ({"image": Image.new("RGB", (4, 4))}, "causal-lm"),
        ({"images": [Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4))]}, "causal-lm"),
        ({"photo": {"bytes": b"", "path": "a.png"}}, "seq2seq-lm"),
        ({"audio": {"array": [0.0, 0.5], "sampling_rate": 16000, "path": None}}, "seq2seq-lm"),
        ({"image": Image.new("RGB", (4, 4)), "mask": Image.new("L", (4, 4))}, "image-classification"),
    ],
)
def test_images_and_sounds_beside_a_text_are_refused_not_dropped(beside: Mapping[str, Any], task: str) -> None:
    """Oracle: the documented error, which names the columns; the text alone where it was asked for."""
    rows = [{"text": LONG, **beside}, {"text": OTHER, **beside}]
    with pytest.raises(ValueError, match=next(iter(beside))):
        ids_of(rows, ModelNeeds(task))
    assert ids_of(rows, ModelNeeds(task), text_column="text") == [
        tiny_tokenizer()(t)["input_ids"] for t in (LONG, OTHER)
    ]


@pytest.mark.parametrize(
    "beside", [{"path": "a.txt", "bytes": 1234}, {"sampling_rate": 16000, "seconds": 3.5}, {"path": "a.txt"}]
)
def test_data_about_files_is_no_image_and_no_sound(beside: Mapping[str, Any]) -> None:
    """Oracle: the text's own ids; what lies beside it holds neither bytes nor samples."""
    rows = [{"text": LONG, "file": beside}, {"text": OTHER, "file": beside}]
    assert ids_of(rows, ModelNeeds("sequence-classification")) == [
        tiny_tokenizer()(t)["input_ids"] for t in (LONG, OTHER)
    ]


@pytest.mark.parametrize(
    "feature",
    [{"bytes": b"", "path": None}, {"bytes": None, "path": "a.png"}, {"array": np.zeros(2), "sampling_rate": 8}],
)
@pytest.mark.parametrize("several", [False, True])
def test_images_and_sounds_are_known_in_every_form_that_datasets_gives(
    feature: Mapping[str, Any], several: bool
) -> None:
    """Oracle: the forms of its features Image and Audio, encoded and, for sounds, decoded; of one and of a list."""
    assert is_medium([feature, feature] if several else feature)


def test_one_column_of_images_is_read_for_image_classification() -> None:
    """Oracle: the record; what a processor makes of it is the processor's."""
    rows = [{"image": Image.new("RGB", (4, 4)), "caption": LONG, "label": 1}]
    record = encoded_as(rows, Reading(), ModelNeeds("image-classification"))
    assert (record.kind, record.columns, record.label_column) == ("image", ("image",), "label")
