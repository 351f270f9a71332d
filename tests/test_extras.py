"""What needs a library of an extra says so, and which one, before anything is computed.

Oracle: the message. A library is taken away by putting None in its place in `sys.modules`, as Python's manual says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_npeff import NPEFF, Adapter, PEFs, extras
from hf_npeff.baselines import GradientClustering, activation_kmeans, activation_nmf
from hf_npeff.cli import app
from hf_npeff.report import plots
from hf_npeff.studies.detection import krippendorff_alpha
from hf_npeff.studies.measures import agreement

ROWS = PEFs.from_factors(torch.randn(20, 1, 6, generator=torch.Generator().manual_seed(0)))


def without(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)


CALLS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "a figure": ("plotly", "viz", lambda: plots.overview(NPEFF(2, n_restarts=1).fit(ROWS))),
    "k-means": ("sklearn", "eval", lambda: activation_kmeans(torch.randn(9, 4), 2)),
    "NMF": ("sklearn", "eval", lambda: activation_nmf(torch.randn(9, 4), 2)),
    "clustering": ("sklearn", "eval", lambda: GradientClustering(2).fit(ROWS)),
    "agreement": ("scipy", "eval", lambda: agreement(torch.rand(9, 2), torch.rand(9, 2))),
    "alpha": ("krippendorff", "eval", lambda: krippendorff_alpha([[1.0, 2.0], [1.0, 2.0]])),
    "an adapter as GGUF": ("gguf", "gguf", lambda: Adapter("lora", {}, {}, 1.0, {}).to_gguf("a.gguf")),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_function_names_the_extra(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, extra, function = CALLS[call]
    without(monkeypatch, library)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'hf-npeff\[{extra}\]'") as caught:
        function()
    assert caught.value.name == library


@pytest.mark.parametrize("library", ["sklearn", "scipy", "matplotlib"])
def test_a_study_names_it_before_it_reads_anything(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model and the data do not exist, and the message is of the library."""
    without(monkeypatch, library)
    for words in (["planted"], ["factors", "no/model", "no.jsonl", "--attributes", "a"]):
        result = CliRunner().invoke(app, ["study", *words, "--output", str(tmp_path / "out")])
        assert result.exit_code == 1 and "pip install 'hf-npeff[eval]'" in result.output
    assert not (tmp_path / "out").exists()


def test_the_extras_bring_what_the_messages_say() -> None:
    """Identity with pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, extra in extras._EXTRAS.values():
        assert any(line.startswith(name) for line in project["optional-dependencies"][extra])
    assert any(line.startswith("scikit-learn") for line in project["optional-dependencies"]["viz"])
