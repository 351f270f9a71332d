"""Data as people have it: tables, single examples, messages, padding without a mask, columns that begin empty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer
from tests import tiny

TEXTS = ["the cat sees the dog", "a king is old .", "paris is not big"]


def analyzer_of(family: str = "llama", task: str | None = None, positions: Any = "auto") -> NPEFFAnalyzer:
    model = tiny.tiny_model(family, task, dtype=torch.float32)
    return NPEFFAnalyzer(model, tiny.tiny_tokenizer(), fisher=FisherConfig(rank=2, positions=positions))


def ids_of(dataset: Any, **settings: Any) -> list[Any]:
    return [example.inputs["input_ids"] for example in analyzer_of(**settings).read(dataset)]


def tables() -> list[Any]:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": TEXTS, "label": [0, 1, 2]}, index=[7, 3, 5])
    return [frame, frame["text"], np.array(TEXTS), np.array(TEXTS, dtype=object)]


@pytest.mark.parametrize("number", range(4))
def test_tables_and_arrays_are_read_row_by_row(number: int) -> None:
    """Oracle: the tokens of the same texts in a list. Iterating over a table gives the names of its columns instead."""
    assert ids_of(tables()[number]) == ids_of(TEXTS)


CONVERSATION = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
DOCUMENTS = [{"text": TEXTS[0], "label": 0}]
UNREADABLE: list[tuple[Any, str]] = [
    ({"text": "cat"}, "'text' is a single str"),
    ({"text": TEXTS, "label": 1}, "'label' is a single int"),
    (dict(tiny.tiny_tokenizer()("the cat")), "single tokens"),
    (CONVERSATION, "single messages"),
    ([CONVERSATION], "'messages'"),
    ([("the cat", "a dog")], "text_pair"),
    (set(TEXTS), "no fixed order"),
    ([{"input_ids": ["the", "cat"]}], "token ids of one example"),
    ([{"messages": CONVERSATION, "context": "the old king"}], "context"),
    ([{"system_prompt": "you are good", "question": "who is old ?", "response": "the king"}], "system_prompt"),
    (
        [{"instruction": TEXTS[0], "output": "a"}, {"instruction": TEXTS[1], "input": TEXTS[2], "output": "b"}],
        "'input'",
    ),
]


@pytest.mark.parametrize(("dataset", "named"), UNREADABLE, ids=[named for _, named in UNREADABLE])
def test_data_that_would_be_read_as_something_else_is_refused(dataset: Any, named: str) -> None:
    """Oracle: the error, which names what is there and what to pass."""
    with pytest.raises(ValueError, match=named):
        ids_of(dataset)


def test_a_dictionary_of_splits_is_refused_by_their_names() -> None:
    """Oracle: the error."""
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": TEXTS})
    with pytest.raises(ValueError, match="train"):
        ids_of({"train": train, "test": train})


def test_a_judged_answer_belongs_to_what_a_classifier_reads() -> None:
    """Oracle: the error; as the truth, without labels beside it, an answer is none of the input."""
    rows = [{"paragraph": TEXTS[i % 3], "question": "who is old ?", "answer": f"king {i}"} for i in range(9)]
    settings = {"family": "bert", "task": "sequence-classification"}
    with pytest.raises(ValueError, match="answer"):
        ids_of([row | {"label": 0} for row in rows], **settings)
    assert len(ids_of(rows, **settings)) == 9


def test_a_system_prompt_of_its_own_column_is_the_system_message() -> None:
    """Oracle: the tokens of the same conversation with the system message in it."""
    whole = [{"messages": [{"role": "system", "content": "you are good"}, *CONVERSATION]}]
    assert ids_of([{"messages": CONVERSATION, "system_prompt": "you are good"}]) == ids_of(whole)


def test_a_column_that_begins_empty_is_not_left_out_later() -> None:
    """Oracle: the error, where the text comes after the rows by which it was decided what to read."""
    empty: list[dict[str, Any]] = [{"instruction": TEXTS[0], "input": None, "output": "a"} for _ in range(70)]
    assert len(ids_of(empty)) == 70
    with pytest.raises(ValueError, match=r"'70'.*'input'"):
        ids_of([*empty, {"instruction": TEXTS[0], "input": TEXTS[1], "output": "a"}])


BAD_TOKENS: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": [8, 9, 10], "attention_mask": [1, 1]}, "3 input_ids and 2 attention_mask"),
    ({"input_ids": [8, 9, 10], "labels": [9, 10]}, "3 input_ids and 2 labels"),
    ({"input_ids": [8, 9, 10], "labels": [8, 9, 10], "attention_mask": [0, 0, 0]}, "hides all"),
    ({"input_ids": [8.0, 9.0], "labels": [8, 9]}, "not whole numbers"),
    ({"input_ids": [8, 9, tiny.PAD], "labels": [8, 9, -100]}, "attention_mask"),
    ({"input_ids": [tiny.PAD, 8, 9], "labels": [-100, 8, 9]}, "attention_mask"),
]


@pytest.mark.parametrize(("example", "named"), BAD_TOKENS)
def test_tokens_whose_mask_or_labels_do_not_fit_are_refused(example: dict[str, Any], named: str) -> None:
    """Oracle: the error names the example."""
    with pytest.raises(ValueError, match=named) as caught:
        analyzer_of(positions="labels").compute_pefs([example])
    assert "'0'" in str(caught.value)


def test_padding_with_its_mask_and_a_text_that_ends_with_its_end_are_taken() -> None:
    """Oracle: the norms of the same tokens without padding; a mask of ones takes the padding token for text."""
    analyzer = analyzer_of()
    plain = analyzer.compute_pefs([{"input_ids": [8, 9]}, {"input_ids": [8, 9, tiny.EOS]}]).norms
    masked = [
        {"input_ids": [8, 9, tiny.PAD], "attention_mask": [1, 1, 0]},
        {"input_ids": [8, 9, tiny.EOS], "attention_mask": [1, 1, 1]},
        {"input_ids": [8, 9, tiny.PAD], "attention_mask": [1, 1, 1]},
    ]
    norms = analyzer.compute_pefs(masked).norms
    torch.testing.assert_close(norms[:2], plain, rtol=1e-4, atol=0)
    assert (norms[2] - plain[0]).abs() > 1e-2 * plain[0]
