"""`make study` and pages that are drawn from kept figures. Oracles: the committed files, made again; by hand."""

import json
import shutil
from pathlib import Path

import pytest

from hf_npeff.studies.in_context import InContextResult
from hf_npeff.studies.planted import PlantedResult
from tests.benchmarks import study, whitening
from tests.test_docs import REPOSITORY

STUDIES = REPOSITORY / "docs" / "studies"


def test_every_study_with_figures_in_the_page_is_called() -> None:
    """Oracle: the folders of docs/studies; each is written by the command of its name, two of them beside another."""
    folders = {path.name for path in STUDIES.iterdir() if path.is_dir()}
    assert folders - {"fair"} <= set(study.NAMES)  # which is written by the comparison's command
    assert all(study.commands(name, [], gpu) for name in study.NAMES for gpu in (False, True))
    said = " ".join(study.commands("comparison", ["--data", "first_names"], gpu=False)[0])
    assert "--data first_names" in said and "docs/studies/fair" in said
    assert "--redraw" in study.commands("ablations", [], gpu=False)[0]
    assert "cuda" in study.commands("in_context", [], gpu=True)[0]


@pytest.mark.parametrize("name", ["ablations"])
def test_a_study_is_drawn_again_from_what_is_kept(tmp_path: Path, name: str) -> None:
    """Identity: table and result of the committed folder, written again from its result.json."""
    pytest.importorskip("matplotlib", reason="it draws the figures")
    (tmp_path / name).mkdir()
    shutil.copy(STUDIES / name / "result.json", tmp_path / name)
    study.redraw(name, tmp_path)
    for file in ("result.json", "table.md"):
        assert (tmp_path / name / file).read_text(encoding="utf-8") == (STUDIES / name / file).read_text(
            encoding="utf-8"
        )


def test_tables_are_those_of_the_kept_results() -> None:
    """Identity: the committed tables, made again from result.json."""
    for name, reader in (("planted", PlantedResult), ("in_context", InContextResult)):
        result = reader.from_dict(json.loads((STUDIES / name / "result.json").read_text(encoding="utf-8")))
        assert result.table() + "\n" == (STUDIES / name / "table.md").read_text(encoding="utf-8")


def test_the_page_of_whitening_is_that_of_the_kept_results() -> None:
    """Identity: the committed README.md, made again from result.json."""
    folder = REPOSITORY / whitening.FOLDER
    kept = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert whitening.page(kept) == (folder / "README.md").read_text(encoding="utf-8")


def test_seconds_of_parts_add_up(tmp_path: Path) -> None:
    """Oracle: by hand; a part that does not know its time is left out."""
    for name, part, seconds in (("a", "x", 60), ("a", "y", 120.0), ("b_c", "z", 30), ("b_c", "old", None)):
        path = tmp_path / name / "parts" / f"{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"part": {}} | ({} if seconds is None else {"processor seconds": seconds})))
    found = study.seconds_of_parts(tmp_path)
    assert found == {"a": {"x": 60, "y": 120}, "b_c": {"z": 30}}
    assert study.minutes(found) == "4 minutes of one core (a 3, b c 0)"
