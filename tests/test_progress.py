"""What is said of work that takes long: which work, how much of it is done, and nothing of what is quick."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from hf_npeff import FisherConfig, NPEFFAnalyzer, progress
from hf_npeff.progress import current, training, working
from tests.tiny import tiny_batch, tiny_model

TOLD = re.compile(r"([^\r\n]*?): *(\d+)%\|[^|]*\| (\d+)/(\d+) \[")


@pytest.fixture
def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], dict[str, tuple[int, int]]]:
    """{what was going on: (done, total)} as it was last shown; every step is shown at once."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")

    def read() -> dict[str, tuple[int, int]]:
        shown = TOLD.findall(capsys.readouterr().err)
        return {what.strip(): (int(done), int(total)) for what, _, done, total in shown}

    return read


def test_long_work_is_told_and_short_work_is_not(told: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted counts; with the usual delay nothing is written."""
    with working("counting", 10) as outer:
        outer.later = 4
        current().expect(3)
        current().count(3)
        with working("something inside", 99):
            current().count(6)
    assert told() == {"counting": (9, 9)}
    monkeypatch.setattr(progress, "SECONDS", 5.0)
    with working("counting", 10):
        current().count(10)
    assert told() == {}
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")
    with working("counting", 10):
        current().count(10)
    assert told() == {}
    current().count(1)  # where nothing is going on, nothing happens


def test_training_counts_its_steps_unless_it_is_inside_another_operation(told: Callable[[], Any]) -> None:
    """Oracle: by hand. The steps are those of a range; inside another operation only that has a bar."""
    assert list(training("a toy", 3)) == [0, 1, 2]
    assert told() == {"training a toy": (3, 3)}
    with working("comparing", 1):
        assert list(training("a toy", 3)) == [0, 1, 2]
        current().count(1)
    assert told() == {"comparing": (1, 1)}


def test_every_operation_says_what_it_does_and_reaches_its_end(told: Callable[[], Any]) -> None:
    """Oracle: by hand. What each operation is called, and as many examples as it said it would read."""
    model = tiny_model("gpt2", "sequence-classification")
    data = tiny_batch(model, 12, seed=0)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="identity"))
    pefs = analyzer.compute_pefs(data, progress=False)
    found = analyzer.decompose(pefs, 3, n_restarts=1, max_iterations=300, progress=False)
    told()
    direction = analyzer.lift(found, 1, pefs, data)
    adapters = analyzer.lift_adapters(found, pefs, data, rank=2)
    analyzer.evaluate_adapters(adapters, found, data, pefs, n_top=3, n_others=4, search_rounds=1)
    analyzer.evaluate_direction(direction, found, 1, data, n_top=3, n_others=4)
    analyzer.measure(direction, data, scales=(0.1, 0.2), random=True)
    analyzer.off_target(direction, data, scale=0.1, rounds=1)
    analyzer.spare(direction, data)
    analyzer.token_alignments(found, pefs, data, [0], n_top=2)
    analyzer.edit(pefs, data, change={pefs.example_ids[0]: 0.1}, outcome=0)
    analyzer.explain_change(found, pefs, data, 0.1 * direction, take_out=1)
    shown = told()
    assert set(shown) == {
        "lifting component 1",
        "lifting 3 components to rank 2",
        "measuring 3 components",
        "searching for inputs off target",
        "measuring component 1",
        "measuring the change",
        "reading the data to spare",
        "aligning tokens",
        "editing",
        "explaining the change",
    }
    assert all(done == total for done, total in shown.values())
    assert shown["measuring the change"] == (5 * 12, 5 * 12)
