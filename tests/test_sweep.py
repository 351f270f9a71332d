"""A fixed share of the model types of transformers by brute force, with one head each; what the pages say of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import warm_processes
from tests.sweep import table
from tests.sweep.judge import RAW, UNBUILT, WRONG
from tests.sweep.run import cases_in_share, in_share
from tests.sweep.tiny_models import every_case

ROOT = Path(__file__).parents[1]
SHARE, WIDE_SHARE = 9, 3
"""One model type in so many is judged, and with --wide. Chosen: half a minute of one core, and two; `make sweep` takes
all, with all heads, in five minutes of two."""


def test_no_model_type_of_a_fixed_share_is_silently_wrong_or_fails_without_words(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Oracle: JᵀSJ of each example alone by autograd, the model called directly (tests/sweep/judge.py).

    In a process of its own, which forks for every type. What cannot be built tells nothing; most can.
    """
    path = tmp_path / "results.jsonl"
    of = WIDE_SHARE if pytestconfig.getoption("--wide") else SHARE
    command = ["-m", "tests.sweep.run", "--one-in", str(of), "--right-only", "--jobs", "1", "--results", path]
    done = warm_processes.run(command, timeout=900)
    assert done.returncode == 0, done.stderr
    results = table.read(path)
    bad = {key: r.get("message", "") for key, r in results.items() if r["outcome"] in (RAW, WRONG)}
    assert bad == {}
    assert set(results) == set(cases_in_share(of))
    assert {model_type for model_type, _ in results} == {name for name, _ in every_case() if in_share(name, of)}
    assert sum(r["outcome"] != UNBUILT for r in results.values()) >= 0.85 * len(results)


@pytest.mark.parametrize(("name", "written"), [("docs/models.md", table.page), ("README.md", table.sentence)])
def test_pages_say_what_the_last_whole_sweep_found(name: str, written: object) -> None:
    """Oracle: the kept results. `make sweep` renews them, `python -m tests.sweep.table` the pages."""
    results = table.read(table.KEPT)
    parts = (ROOT / name).read_text().split(table.MARK)
    assert len(parts) == 3
    assert parts[1].strip() == written(results), "run `python -m tests.sweep.table`"  # type: ignore[operator]
