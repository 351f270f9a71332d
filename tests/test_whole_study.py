"""`make study` and pages that are drawn from kept figures. Oracles: the committed files, made again; by hand."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff.studies.in_context import InContextResult
from hf_npeff.studies.pair_study import REFERENCE, MinimalPairsResult
from hf_npeff.studies.planted import PlantedResult
from tests.benchmarks import rated, study, whitening
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


def shown(value: float) -> str:
    """A figure as the text writes it: two digits, no zero before the point, a true minus."""
    return f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")


def test_the_claim_is_what_the_minimal_pairs_say() -> None:
    """Oracle: margins, and differences with intervals to the best reading of both methods, from the kept result."""
    result = MinimalPairsResult.from_dict(json.loads((STUDIES / "minimal_pairs" / "result.json").read_text("utf-8")))

    def ahead(data: str, method: str) -> list[str]:
        readings = [f"{method}, {way}" for way in ("competing", "alone")]
        readings += [f"{reading}, layer by attribute" for reading in readings]
        best = result.data[data]["differences"][next(name for name in result.methods(data) if name in readings)]
        ends = sorted(shown(abs(best[end])) for end in ("low", "high"))
        assert best["low"] * best["high"] > 0  # told apart
        return [shown(abs(best["margin"])) + (" above" if best["margin"] > 0 else " below"), *ends]

    def margin(data: str) -> list[str]:
        return [shown(result.data[data]["trained"][REFERENCE]["margin"])]

    both = {data: [*ahead(data, "gradient clustering"), *ahead(data, "SAE")] for data in result.data}
    expected = [*margin("home_assistant"), *both["home_assistant"], *both["word_relations"], *margin("word_relations")]
    expected += [*margin("planted_cues"), *both["planted_cues"]]
    text = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8").partition("| question |")[0]
    assert re.findall(r"−?\.\d\d(?: above| below)?", text) == expected


def test_figures_of_the_first_table_are_those_of_the_kept_results() -> None:
    """Oracle: means over seeds of the cues found, from the kept result."""
    text = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| Does it find planted heuristics?"))
    found = json.loads((STUDIES / "planted" / "result.json").read_text(encoding="utf-8"))["found"]
    mean = {name: sum(counts) / len(counts) for name, counts in found.items()}
    on_rows = ("NPEFF", "dictionary learning on PEFs", "NMF on PEFs", "gradient clustering, all rows")
    on_states = [name for name in mean if name.startswith(("SAE", "activations"))]
    single = max(v for name, v in mean.items() if name not in (*on_rows, *on_states, "random"))
    expected = [mean["NPEFF"], single, max(mean[name] for name in on_states), *(mean[name] for name in on_rows[1:])]
    assert re.findall(r"\d+\.\d", row) == [f"{value:.1f}" for value in expected]


def test_the_page_of_whitening_is_that_of_the_kept_results() -> None:
    """Identity: the committed README.md, made again from result.json."""
    folder = REPOSITORY / whitening.FOLDER
    kept = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert whitening.page(kept) == (folder / "README.md").read_text(encoding="utf-8")


def test_the_page_of_ratings_is_that_of_the_kept_results() -> None:
    """Identity: the committed README.md, made again from result.json; random coefficients are at chance."""
    folder = REPOSITORY / rated.FOLDER
    kept = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert rated.page(kept) == (folder / "README.md").read_text(encoding="utf-8")
    for part in (part for group in kept["parts"].values() for part in group):
        scores = torch.tensor(part["script"]["random"])
        assert abs(float(scores.mean()) - 0.5) < 4 * float(scores.std()) / len(scores) ** 0.5  # chance is one half


def test_seconds_of_parts_add_up(tmp_path: Path) -> None:
    """Oracle: by hand; a part that does not know its time is left out."""
    for name, part, seconds in (("a", "x", 60), ("a", "y", 120.0), ("b_c", "z", 30), ("b_c", "old", None)):
        path = tmp_path / name / "parts" / f"{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"part": {}} | ({} if seconds is None else {"processor seconds": seconds})))
    found = study.seconds_of_parts(tmp_path)
    assert found == {"a": {"x": 60, "y": 120}, "b_c": {"z": 30}}
    assert study.minutes(found) == "4 minutes of one core (a 3, b c 0)"


def test_what_is_left_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand. All parts are here but one; another has other settings; one of the two times is known.

    Settings of whitening's parts follow from its first.
    """
    monkeypatch.chdir(REPOSITORY)

    def keep(name: str, part: str, settings: Any, made: Any = None) -> None:
        (tmp_path / name / "parts").mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": settings, "part": made or {}})
        (tmp_path / name / "parts" / f"{part}.json").write_text(content, encoding="utf-8")

    whitened = json.loads((STUDIES / "whitening" / "result.json").read_text(encoding="utf-8"))
    nothing = study.parts_of_studies(tmp_path)
    assert [part for part, settings in nothing["whitening"].items() if settings is not None] == ["planted_cues-10"]
    keep("whitening", "planted_cues-10", nothing["whitening"]["planted_cues-10"], {"rows": whitened["tuned"]})
    every = study.parts_of_studies(tmp_path)
    for name, parts in every.items():
        for part, settings in parts.items():
            if part != "planted_cues-10":
                keep(name, part, settings)
    assert study.listing(tmp_path, {}).splitlines()[-1] == "left in all: 0.0 minutes of one core"
    (tmp_path / "planted" / "parts" / "seed-3.json").unlink()
    keep("planted", "seed-4", {**every["planted"]["seed-4"], "found_at": 0.8})  # type: ignore[dict-item]
    said = study.listing(tmp_path, {"planted": {"seed-0": 60, "seed-4": 90}}).splitlines()
    left = "left: seed-3; seed-4, of other settings (1.5 minutes of one core and 1 of unknown length)"
    assert f"planted: 3 of 5 parts are done; {left}" in said
    assert "ratings: 2 of 2 parts are done" in said and len(said) == len(every) + 1
    assert said[-1] == "left in all: 1.5 minutes of one core and 1 of unknown length"
    assert set(study.NAMES) | {"fair"} == set(every) | {"modular_addition", "in_context", "ablations"}
