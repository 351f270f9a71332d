"""What was read goes with the PEFs: lifting reads the same again, and cards, pages and the command line show it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_npeff import NPEFF, Decomposition, FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.cli import app
from hf_npeff.encoding.record import Encoded, Reading
from hf_npeff.sharing.hub import text_columns
from tests.analyses import analyzer_of
from tests.tiny import MAX_POSITIONS, tiny_model, tiny_tokenizer

ROWS = [
    {
        "question": f"the cat {word}",
        "sentence": f"a dog sees {word} {word}",
        "note": f"one two three {word}",
        "label": i % 2,
    }
    for i, word in enumerate(("the", "a", "one", "two", "three", "dog"))
]


def fitted(analyzer: NPEFFAnalyzer, data: Any, **reading: Any) -> tuple[PEFs, Decomposition]:
    pefs = analyzer.compute_pefs(data, **reading)
    return pefs, NPEFF(2, n_restarts=1, max_iterations=20).fit(pefs)


def test_pefs_are_of_the_texts_that_were_asked_for() -> None:
    """Oracle: the PEFs of the same tokens, encoded by the tokenizer in the test."""
    model, known = tiny_model("bert", "sequence-classification"), tiny_tokenizer()
    asked = {"text_column": "note", "truncation": True, "max_length": 3}
    by_hand = [dict(known(row["note"], truncation=True, max_length=3)) for row in ROWS]
    pairs = [dict(known(row["question"], row["sentence"])) for row in ROWS]
    for reading, encoded in ((asked, by_hand), ({}, pairs)):
        found = analyzer_of(model, known, target_modules=["query"]).compute_pefs(ROWS, **reading)
        expected = analyzer_of(model, target_modules=["query"]).compute_pefs(encoded)
        assert torch.equal(found.factors, expected.factors) and found.content_hashes == expected.content_hashes


def test_lifting_and_new_texts_are_read_as_the_record_says(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: content hashes, which tell other columns and lengths apart; what is cut is counted."""
    model, known = tiny_model("bert", "sequence-classification"), tiny_tokenizer()
    analyzer = analyzer_of(model, known, target_modules=["query"])
    with caplog.at_level(logging.INFO, "hf_npeff"):
        pefs, decomposition = fitted(analyzer, ROWS, text_column="note", truncation=True, max_length=3)
    assert "read the text of 'note'" in caplog.text and "6 of 6 examples were cut to 3 tokens" in caplog.text
    assert pefs.info["dataset"]["truncated"] == 6 and pefs.texts == [row["note"] for row in ROWS]
    other = analyzer_of(model, known, target_modules=["query"])
    assert other.lift(decomposition, 0, pefs, ROWS).info["estimated_cosine"] > 0.99
    assert other.evaluate_direction(
        other.lift(decomposition, 0, pefs, ROWS[::-1]), decomposition, 0, ROWS, scale=0.1, n_top=2
    )
    new = other.compute_pefs(ROWS[:2], like=decomposition)
    assert new.content_hashes == pefs.content_hashes[:2]  # type: ignore[index]
    plain = other.compute_pefs(["a new text of five"], like=decomposition)
    assert Encoded.of(plain.info).max_length == 3 and plain.info["dataset"]["truncated"] == 1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="a different content"):
        other.reading = Reading(text_column="question")
        other.lift(decomposition, 0, pefs, ROWS)


def test_cards_pages_and_components_show_what_was_read(tmp_path: Path) -> None:
    """Oracle: the pairs, written out; neither is published unless that is asked for, however short it is."""
    analyzer = analyzer_of(tiny_model("bert", "sequence-classification"), tiny_tokenizer(), target_modules=["query"])
    rows = [{**row, "question": "the cat", "sentence": "a dog"} for row in ROWS for _ in range(3)]
    pefs, decomposition = fitted(analyzer, rows, text_column="question", text_pair_column="sentence")
    assert decomposition[0].top_examples(1).texts == ["the cat | a dog"]
    assert {"question", "sentence"} <= set(text_columns(decomposition.columns, decomposition.info))
    decomposition.save_pretrained(tmp_path / "found")
    card = (tmp_path / "found" / "README.md").read_text()
    assert "the cat" in card and "the pair" in card and "top examples" in card
    again = Decomposition.load(tmp_path / "found")
    assert again.texts == decomposition.texts and again.text_column == "question"
    from hf_npeff.report.data import Extras, gather

    page = gather(again, Extras(), texts=True, layout=None)
    assert page.facts["text"] == ["the cat | a dog"] * len(rows)
    assert gather(again, Extras(), texts=False, layout=None).facts["text"] is None
    pefs.save(tmp_path / "pefs")
    assert PEFs.load(tmp_path / "pefs").texts == pefs.texts


def test_examples_that_are_too_long_are_counted_and_cut_where_asked(tmp_path: Path) -> None:
    """Oracle: the count by hand; nothing was written."""
    analyzer = analyzer_of(tiny_model("bert", "sequence-classification"), tiny_tokenizer(), target_modules=["query"])
    rows = [{"id": f"r{i}", "text": "cat " * (40 + 5 * i)} for i in range(5)]
    with pytest.raises(ValueError, match=r"'r4' has 60 tokens.*48 positions: 3 of 5 examples.*truncation=True"):
        analyzer.compute_pefs(rows, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    cut = analyzer.compute_pefs(rows, truncation=True)
    assert cut.info["dataset"]["truncated"] == 3 and Encoded.of(cut.info).max_length == MAX_POSITIONS  # type: ignore[union-attr]
    assert analyzer.estimate(rows, truncation=True).tokens == pytest.approx((40 + 45 + 3 * 48) / 5)


def test_the_command_line_reads_the_columns_that_it_is_told(tmp_path: Path) -> None:
    """Oracle: the PEFs that Python computes with the same arguments."""
    model, known = tiny_model("bert", "sequence-classification"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    known.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    where = [str(tmp_path / "model"), str(tmp_path / "rows.jsonl")]
    options = ["--text-column", "note", "--label-column", "label", "--truncation", "--max-length", "3"]
    fisher = ["--sketch", "identity", "--target-modules", ".*query"]
    result = CliRunner().invoke(app, ["compute", *where, "-o", str(tmp_path / "pefs"), *options, *fisher])
    assert result.exit_code == 0, result.output
    assert "read the text of 'note'" in " ".join(result.output.split()) and "6 examples were cut" in result.output
    found = PEFs.load(tmp_path / "pefs")
    analyzer = NPEFFAnalyzer.from_pretrained(
        tmp_path / "model", fisher=FisherConfig(sketch="identity", target_modules=["query"])
    )
    expected = analyzer.compute_pefs(ROWS, text_column="note", label_column="label", truncation=True, max_length=3)
    assert found.content_hashes == expected.content_hashes and found.info["dataset"] == expected.info["dataset"]
    for wrong, said in ((["--text-column", "nowhere"], "not in the dataset"), (["--max-length", "3"], "truncation")):
        refused = CliRunner().invoke(app, ["compute", *where, "-o", str(tmp_path / "no"), *wrong, *fisher])
        assert refused.exit_code == 1 and said in refused.output
