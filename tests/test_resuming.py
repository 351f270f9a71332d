"""Runs that were cut short, damaged or begun with other settings go on, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import (
    CorruptStoreError,
    FisherConfig,
    FormatVersionError,
    IncompatibleSketchError,
    NPEFFAnalyzer,
    PEFs,
)
from hf_npeff.fisher.rows import RowMaker
from tests.analyses import analyzer_of, small
from tests.tiny import tiny_batch, tiny_model


class Counter:
    """Counts the examples that go through a backward pass, and may stop in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None):
        self.n = 0
        original = RowMaker.rows

        def rows(maker: RowMaker, examples: Any) -> Any:
            if maker.selftest is None:  # the self-test's own rows
                return original(maker, examples)
            if stop_after is not None and self.n >= stop_after:
                raise KeyboardInterrupt
            self.n += len(examples)
            return original(maker, examples)

        monkeypatch.setattr(RowMaker, "rows", rows)


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an uninterrupted run, bit for bit, and a count of the examples."""
    analyzer, examples = small()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counter(patch, stop_after=4)
        analyzer.compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    with pytest.raises(CorruptStoreError, match="run compute again"):
        PEFs.load(tmp_path / "p")
    counter = Counter(monkeypatch)
    resumed = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    assert counter.n == 3
    whole = analyzer.compute_pefs(examples, tmp_path / "q", shard_size=2, batch_size=2)
    assert torch.equal(resumed.factors, whole.factors)
    assert resumed.columns == whole.columns


def test_a_finished_run_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of the examples, zero; the files are not touched."""
    analyzer, examples = small()
    first = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.safetensors")}
    counter = Counter(monkeypatch)
    again = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3)
    assert counter.n == 0
    assert torch.equal(again.factors, first.factors)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.safetensors")}


@pytest.mark.parametrize("damage", ["delete", "alter", "truncate", "delete columns"])
def test_a_damaged_shard_alone_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Oracle: the undamaged store, and a count of the examples: those of one shard."""
    analyzer, examples = small()
    whole = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3).factors.clone()
    victim = tmp_path / "p" / ("pefs-00003.parquet" if damage == "delete columns" else "pefs-00003.safetensors")
    content = bytearray(victim.read_bytes())
    if damage.startswith("delete"):
        victim.unlink()
    elif damage == "alter":
        content[-5] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[:-8])
    with pytest.raises(CorruptStoreError, match="pefs-00003"):
        PEFs.load(tmp_path / "p")
    counter = Counter(monkeypatch)
    again = analyzer.compute_pefs(examples, tmp_path / "p", shard_size=3)
    assert counter.n == 3
    assert torch.equal(again.factors, whole)
    assert torch.equal(PEFs.load(tmp_path / "p").factors, whole)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (3, 100)])
@pytest.mark.parametrize("finished", [True, False])
def test_another_shard_size_still_ends_in_a_whole_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, finished: bool
) -> None:
    """Oracle: a run with that shard size from the start."""
    analyzer, examples = small()
    if finished:
        analyzer.compute_pefs(examples, tmp_path / "p", shard_size=first, batch_size=1)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Counter(patch, stop_after=5)
            analyzer.compute_pefs(examples, tmp_path / "p", shard_size=first, batch_size=1)
    analyzer.compute_pefs(examples, tmp_path / "p", shard_size=second, batch_size=1)
    whole = analyzer.compute_pefs(examples, batch_size=1)
    loaded = PEFs.load(tmp_path / "p")
    torch.testing.assert_close(loaded.factors, whole.factors)
    assert loaded.example_ids == whole.example_ids


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 1}, "rank"),
        ({"seed": 3}, "seed"),
        ({"sketch": "countsketch", "sketch_dim": 64}, "sketch"),
        ({"target_modules": ["key"]}, "target_modules"),
        ({"storage_dtype": "float32"}, "storage_dtype"),
        ({"output_factor": "spectral"}, "output_factor"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Oracle: the error names the setting and says what to do; the store stays as it was."""
    analyzer, examples = small()
    analyzer.compute_pefs(examples, tmp_path / "p")
    before = (tmp_path / "p" / "manifest.json").read_bytes()
    other = NPEFFAnalyzer(analyzer.model, fisher=FisherConfig(**{**analyzer.fisher.to_dict(), **change}))
    with pytest.raises(IncompatibleSketchError, match=named) as caught:
        other.compute_pefs(examples, tmp_path / "p")
    assert "resume=False" in str(caught.value)
    assert (tmp_path / "p" / "manifest.json").read_bytes() == before
    other.compute_pefs(examples, tmp_path / "p", resume=False)
    assert PEFs.load(tmp_path / "p").config.rank == other.fisher.rank


def test_resuming_with_other_data_or_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """Oracle: the error names the data set, or the model's task."""
    analyzer, examples = small()
    analyzer.compute_pefs(examples, tmp_path / "p")
    with pytest.raises(IncompatibleSketchError, match="dataset"):
        analyzer.compute_pefs(examples[:5], tmp_path / "p")
    with pytest.raises(IncompatibleSketchError, match="dataset"):
        analyzer.compute_pefs(examples[::-1], tmp_path / "p")
    other = NPEFFAnalyzer(tiny_model("bert", "token-classification"), fisher=analyzer.fisher)
    with pytest.raises(IncompatibleSketchError, match="model"):
        other.compute_pefs(examples, tmp_path / "p")


def test_auto_keeps_to_the_sketch_that_a_folder_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the fingerprint in config.json, though the second run measures nothing."""
    model = tiny_model("llama", "causal-lm", dtype=torch.float32)
    examples = tiny_batch(model, 6, seed=12)
    settings = {"sketch": "auto", "storage_limit": 2000, "sketch_tolerance": 0.5, "storage_dtype": "float32"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counter(patch, stop_after=2)
        analyzer_of(model, **settings).compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    pefs = analyzer_of(model, **settings).compute_pefs(examples, tmp_path / "p", shard_size=2, batch_size=2)
    assert len(pefs) == 6


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """Oracle: documented errors for a config.json that is no store's; the file stays."""
    analyzer, examples = small()
    for content, error in (
        ("{}", FormatVersionError),
        ('{"format_version": 1}', IncompatibleSketchError),
        ("[", CorruptStoreError),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(error):
            analyzer.compute_pefs(examples, tmp_path)
        assert (tmp_path / "config.json").read_text() == content
