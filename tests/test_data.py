"""Datasets in any shape become ordered, encoded, length-batched examples with stable ids."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_npeff.data import Example, Examples, batches_by_length, collate
from tests.tiny import PAD, tiny_tokenizer

TEXTS = ["the cat sees", "a", "one two three :"]


def ids_of(examples: Examples) -> list[list[int]]:
    return [list(map(int, e.inputs["input_ids"])) for e in examples]


def encoded() -> list[list[int]]:
    return [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_came_with_tensors_is_taken_off(side: str) -> None:
    """Oracle: the texts tokenised one by one; labels and positions lose the same places."""
    batch = dict(tiny_tokenizer(padding_side=side)(TEXTS, padding=True, return_tensors="pt"))
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    examples = Examples(batch)
    assert ids_of(examples) == encoded()
    for example in examples:
        assert list(example.inputs["labels"]) == list(example.inputs["input_ids"])
        assert list(example.inputs["position_ids"]) == list(range(len(example.inputs["input_ids"])))


@pytest.mark.parametrize("form", ["tensors", "lists", "dataset", "torch dataset"])
def test_padding_on_the_left_of_records_is_taken_off(form: str) -> None:
    """Oracle: the texts encoded one by one. Kept, it would move the positions that BERT and GPT-2 count."""
    batch = tiny_tokenizer(padding_side="left")(TEXTS, padding="max_length", max_length=9, return_tensors="pt")
    records: Any = [{name: value[i] for name, value in batch.items()} for i in range(len(TEXTS))]
    if form != "tensors":
        records = [{name: value.tolist() for name, value in record.items()} for record in records]
    if "dataset" in form:
        records = datasets.Dataset.from_list(records).with_format("torch" if form.startswith("torch") else None)
    found, alone = Examples(records), Examples(TEXTS, tiny_tokenizer())
    assert [e.inputs["input_ids"] for e in found] == [e.inputs["input_ids"] for e in alone]
    assert [e.content for e in found] == [e.content for e in alone]


def test_strings_dictionaries_datasets_and_loaders_are_the_same() -> None:
    """Oracle: the texts tokenised one by one."""
    tokenizer = tiny_tokenizer()
    records = [{"text": t, "label": i} for i, t in enumerate(TEXTS)]
    hub = datasets.Dataset.from_list(records)
    for dataset, settings in (
        (TEXTS, {}),
        (tuple(TEXTS), {}),
        (records, {}),
        ({"text": TEXTS, "label": [0, 1, 2]}, {}),
        (hub, {}),
        (hub.to_iterable_dataset(), {"max_examples": 3}),
        (iter(TEXTS), {"max_examples": 7}),
        (DataLoader(hub, batch_size=2), {}),  # type: ignore[arg-type]
    ):
        examples = Examples(dataset, tokenizer, **settings)  # type: ignore[arg-type]
        assert ids_of(examples) == encoded()
        assert examples.ids == ["0", "1", "2"]


def test_pairs_of_texts_are_encoded_together() -> None:
    """Oracle: the tokenizer called with both."""
    tokenizer = tiny_tokenizer()
    records = [{"premise": "the cat", "hypothesis": "a dog", "label": 1}]
    assert ids_of(Examples(records, tokenizer)) == [tokenizer("the cat", "a dog")["input_ids"]]


def test_only_as_many_as_asked_for() -> None:
    """Oracle: the length; an iterable is not read further."""
    read = []

    def endless() -> Any:
        i = 0
        while True:
            read.append(i)
            yield {"input_ids": [i]}
            i += 1

    examples = Examples(endless(), max_examples=3)
    assert len(examples) == 3
    assert len(read) <= 4
    assert len(Examples(TEXTS, tiny_tokenizer(), max_examples=2)) == 2
    assert [e.id for e in examples[1:]] == ["1", "2"]
    assert examples[-1].id == "2"
    with pytest.raises(IndexError):
        examples[3]


@pytest.mark.parametrize("name", ["id", "example_id", "idx", "guid"])
def test_ids_come_from_the_id_column(name: str) -> None:
    """Oracle: the column, as strings; positions where it repeats itself."""
    assert Examples([{"text": "a", name: 7}, {"text": "a", name: 5}], tiny_tokenizer()).ids == ["7", "5"]
    assert Examples([{"text": "a", name: 7}, {"text": "a", name: 7}], tiny_tokenizer()).ids == ["0", "1"]


def test_columns_of_strings_numbers_and_booleans_are_kept() -> None:
    """Oracle: the record; numbers of numpy and torch become Python's; nested values are kept only when named."""
    record = {
        "input_ids": [1, 2], "s": "x", "i": 1, "f": 0.5, "b": True, "n": None, "list": [1, 2],
        "np": np.int64(3), "t": torch.tensor(4), "np_f": np.float32(0.5),
    }  # fmt: skip
    columns = Examples([record])[0].columns
    assert {k: columns[k] for k in ("s", "i", "f", "b", "n")} == {"s": "x", "i": 1, "f": 0.5, "b": True, "n": None}
    assert columns["t"] == 4
    assert "list" not in columns
    assert Examples([record], columns=["list", "np"])[0].columns == {"list": "[1, 2]", "np": 3}


def test_a_column_that_some_records_lack_is_none_there() -> None:
    """Oracle: the records."""
    examples = Examples([{"input_ids": [1], "a": 1}, {"input_ids": [2]}], columns=["a"])
    assert [e.columns for e in examples] == [{"a": 1}, {"a": None}]


def test_the_content_hash_tells_inputs_apart_and_nothing_else() -> None:
    """Oracle: equal inputs in several shapes, and inputs that differ."""
    tokenizer = tiny_tokenizer()
    a = Examples(["the cat"], tokenizer)[0].content
    left = dict(tiny_tokenizer(padding_side="left")(["the cat", "a b c d"], padding=True, return_tensors="pt"))
    assert Examples(left)[0].content == a
    assert Examples([{"text": "the cat", "id": "x", "label": 3}], tokenizer)[0].content == a
    assert Examples(["the dog"], tokenizer)[0].content != a


def test_batches_cover_every_example_once_longest_first() -> None:
    """Oracle: the definition, over random lengths."""
    lengths = torch.randint(1, 30, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    for size, tokens, same in ((5, None, False), (5, 60, False), (100, None, True), (1, None, False)):
        batches = list(batches_by_length(lengths, size, tokens, same_length=same))
        assert sorted(i for b in batches for i in b) == list(range(57))
        assert all(len(b) <= size for b in batches)
        longest = [max(lengths[i] for i in b) for b in batches]
        assert longest == sorted(longest, reverse=True)
        if tokens is not None:
            assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= tokens for b in batches)
        if same:
            assert all(len({lengths[i] for i in b}) == 1 for b in batches)


def test_collate_pads_on_the_right_with_a_mask() -> None:
    """Oracle: written by hand."""
    examples = [Example("0", {"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {}, "a"),
                Example("1", {"input_ids": [8], "labels": [4]}, {}, "b")]  # fmt: skip
    batch = collate(examples, 9, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert collate(examples[1:], None, "cpu")["input_ids"].tolist() == [[8]]
    assert PAD == 0


def test_images_are_stacked() -> None:
    """Oracle: torch.stack."""
    images = torch.randn(3, 3, 4, 4)
    batch = collate(list(Examples({"pixel_values": images})), None, "cpu")
    assert torch.equal(batch["pixel_values"], images)


def test_misuse_is_refused_with_a_way_out() -> None:
    """Oracle: the documented errors."""
    tokenizer = tiny_tokenizer()
    for wrong, message in (
        ([], "empty"),
        ("one string", "list"),
        ([1, 2], "dictionary"),
        ({"text": ["a"], "label": [1, 2]}, "'text': 1, 'label': 2"),
        ([{"a": "x", "b": "y"}], r"\['a', 'b'\]"),
        ([{"label": 1}], r"\['label'\]"),
        (5, "datasets.Dataset"),
        (Examples(TEXTS, tokenizer), "Examples"),
        (DataLoader([[1]], batch_size=1), "DataLoader"),  # type: ignore[list-item]
    ):
        with pytest.raises(ValueError, match=message):
            Examples(wrong, tokenizer)
    for wrong_number in (0, -1):
        with pytest.raises(ValueError, match="max_examples"):
            Examples(TEXTS, tokenizer, max_examples=wrong_number)
    with pytest.raises(ValueError, match=r"'1'.*'text'.*NoneType"):
        Examples([{"text": "a"}, {"text": None}], tokenizer)[1]
    with pytest.raises(ValueError, match=r"'1'.*'labels'.*'0'"):
        collate(list(Examples([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}])), 0, "cpu")
    with pytest.raises(ValueError, match="'pixel_values'"):
        collate(list(Examples([{"pixel_values": torch.ones(1, 2)}, {"pixel_values": torch.ones(2, 2)}])), 0, "cpu")
