"""Columns beside PEFs: renewed when a run goes on with other ones, and refused where a data set contradicts them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import NPEFFAnalyzer, PEFs
from hf_npeff.fisher.kept_columns import differing
from tests.analyses import small
from tests.test_resuming import Counter


def labelled(labels: list[int], **columns: list[Any]) -> tuple[NPEFFAnalyzer, list[dict[str, Any]]]:
    """The analyzer and the seven examples of `small`, with labels and other columns."""
    analyzer, examples = small({"rank": 2})
    rows = [{**example, "label": label} for example, label in zip(examples, labels, strict=True)]
    return analyzer, [{**row, **{name: v[i] for name, v in columns.items()}} for i, row in enumerate(rows)]


OLD, NEW = [0, 1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_goes_on_has_the_columns_of_the_present_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finished: bool
) -> None:
    """Oracle: the columns of a run from the start; the rows of finished shards are not computed again."""
    analyzer, before = labelled(OLD)
    _, now = labelled(NEW, place=list("abcdefg"))
    if finished:
        analyzer.compute_pefs(before, tmp_path / "p", shard_size=2, batch_size=2)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Counter(patch, stop_after=4)
            analyzer.compute_pefs(before, tmp_path / "p", shard_size=2, batch_size=2)
    counter = Counter(monkeypatch)
    with caplog.at_level(logging.WARNING):
        resumed = analyzer.compute_pefs(now, tmp_path / "p", shard_size=2, batch_size=2)
    assert counter.n == (0 if finished else 3)
    assert "'label'" in caplog.text
    whole = analyzer.compute_pefs(now, shard_size=2, batch_size=2)
    assert resumed.columns == whole.columns == PEFs.load(tmp_path / "p").columns
    assert torch.equal(resumed.factors, whole.factors)


def test_the_same_columns_are_not_written_again_and_lost_ones_stay(tmp_path: Path) -> None:
    """Oracle: the columns of the first run, and the times of the files."""
    analyzer, rows = labelled(OLD, score=[0.5, float("nan"), None, 1.0, 2.0, 3.0, 4.0])
    analyzer.compute_pefs(rows, tmp_path / "p", shard_size=3)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.parquet")}
    names = PEFs.load(tmp_path / "p").columns.keys()
    analyzer.compute_pefs(rows, tmp_path / "p", shard_size=3)
    fewer = analyzer.compute_pefs(rows, tmp_path / "p", columns=["label"])
    assert first == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").glob("*.parquet")}
    assert fewer.columns.keys() == names >= {"label", "score"}


def test_values_are_compared_whatever_they_are_written_as() -> None:
    """Oracle: by hand."""
    assert differing([1, "1", None, float("nan"), True, "[0, 1]"], [1.0, 1, float("nan"), None, 1, "[0, 1]"]) == []
    assert differing([1, "a", None, 0.5, True], [2, "b", 0, None, False]) == [0, 1, 2, 3, 4]


def test_an_edit_and_an_evaluation_refuse_labels_that_changed_since(tmp_path: Path) -> None:
    """Oracle: the error names the column; with renewed PEFs, the wanted class is that of the present label."""
    analyzer, before = labelled(OLD)
    _, now = labelled(NEW)
    pefs = analyzer.compute_pefs(before, tmp_path / "p")
    found = analyzer.decompose(pefs, n_components=2, n_restarts=1)
    wanted = {pefs.example_ids[2]: 0.01}
    direction = analyzer.lift(found, 0, pefs, now)  # which no label matters to
    with pytest.raises(ValueError, match=r"'label'.* 2 of 7"):
        analyzer.edit(pefs, now, change=wanted, outcome="label", ridge=0.1)
    with pytest.raises(ValueError, match=r"'label'.* 2 of 7"):
        analyzer.evaluate_direction(direction, found, 0, now, scale=0.1)
    with pytest.raises(ValueError, match=r"'label'.* 2 of 7"):
        analyzer.evaluate_components(found, pefs, now, scale=0.1)
    renewed = analyzer.compute_pefs(now, tmp_path / "p")
    example = analyzer.read(now)[2]

    def log_odds(label: int) -> float:
        with analyzer.forward_pass() as forward, torch.no_grad():
            logits = forward.outputs([example]).logits[0, 0].double()
        return float(logits[label] - torch.logsumexp(logits[[k for k in range(len(logits)) if k != label]], 0))

    edit = analyzer.edit(renewed, now, change=wanted, outcome="label", ridge=1e-6)
    old = log_odds(NEW[2])
    with edit.applied_to(analyzer.model):
        assert log_odds(NEW[2]) - old == pytest.approx(edit.info["changes"][pefs.example_ids[2]]["realised"], abs=1e-6)
        assert log_odds(NEW[2]) > old
