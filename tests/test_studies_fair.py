"""Fair readings and controls. Oracles: planted features, loops over attributes, connected groups by hand, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import PEFs
from hf_npeff.studies import fair
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.factors import FactorsConfig, first_half, run_factors
from hf_npeff.studies.fair import FairResult, distinct, found_by, measurable, random_directions, run_fair
from hf_npeff.studies.fair_page import FairOverview
from hf_npeff.studies.rival_settings import FairConfig
from tests.tiny import tiny_batch, tiny_model

pytest.importorskip("sklearn", reason="the methods are scikit-learn's")
pytest.importorskip("scipy", reason="features are matched by scipy")


def planted(n: int = 120) -> tuple[Attributes, torch.Tensor]:
    """Two attributes and features (n, 3) of which the first two are theirs."""
    generator = torch.Generator().manual_seed(0)
    has = torch.rand(n, 2, generator=generator) < 0.5
    noise = torch.rand(n, 3, generator=generator)
    W = torch.cat([has.float(), torch.zeros(n, 1)], 1) + 0.5 * noise
    return Attributes.from_columns({"a": has[:, 0].tolist(), "b": has[:, 1].tolist()}), W


def test_the_best_feature_of_one_layer_is_that_of_the_factors_study() -> None:
    """Oracle: `run_factors` on the same halves; a layer for each attribute where they differ."""
    from hf_npeff.baselines.method import MethodResult

    attributes, W = planted()
    noisy = W + torch.rand(W.shape, generator=torch.Generator().manual_seed(2))
    choose = first_half(len(W), 0)
    one, each, best = found_by([noisy], attributes, choose)
    measured = run_factors([MethodResult("w", noisy)], attributes, FactorsConfig()).methods[0]
    assert one == each == {s.attribute: pytest.approx(s.auroc) for s in measured.attributes} and best == 0
    noise = torch.rand(W.shape, generator=torch.Generator().manual_seed(1))
    first = torch.cat([W[:, :1], noise[:, 1:]], 1)
    second = torch.cat([noise[:, :1], W[:, 1:]], 1)
    one, each, _ = found_by([first, second], attributes, choose)
    assert each == {"a": 1, "b": 1} and min(one.values()) < 0.7


def test_what_is_too_rare_in_a_half_is_not_measured() -> None:
    """Oracle: by hand: four examples of the choosing half have it."""
    choose = torch.arange(40) < 20
    columns: dict[str, Any] = {"rare": [i < 4 or i > 30 for i in range(40)], "even": [i % 2 == 0 for i in range(40)]}
    assert measurable(Attributes.from_columns(columns, min_count=1), choose).names == ["even"]


def test_distinct_counts_groups_that_are_joined_by_near_pairs() -> None:
    """Oracle: by hand: three directions 20° apart are one group, although the outer two are 40° apart."""
    angles = torch.tensor([0.0, 20.0, 40.0, 90.0, 270.0]) * torch.pi / 180
    G = torch.stack([angles.cos(), angles.sin()], 1)
    assert distinct(G) == 2 and distinct(torch.eye(4)) == 4 and distinct(G, same=0.99) == 4


def test_random_directions_are_read_as_components() -> None:
    """Oracle: N = ‖A g‖² of the combinations, formed; W by non-negative least squares never negative."""
    rows = torch.randn(12, 2, 6, generator=torch.Generator().manual_seed(0))
    pefs = PEFs.from_factors(rows)
    read = random_directions(pefs, 3, 5)
    mixing = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    G = torch.nn.functional.normalize(mixing @ pefs.factors.reshape(24, 6).float(), dim=1)
    assert torch.allclose(read.alone, torch.einsum("ncd,rd->ncr", pefs.factors.float(), G).square().sum(1), atol=1e-5)
    assert float(read.competing.min()) >= 0


def test_every_method_has_its_controls_and_the_page_is_that_of_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what a row must hold; planted coefficients that know an attribute; identity through JSON."""
    pytest.importorskip("matplotlib", reason="it draws the figures")
    from hf_npeff import FisherConfig, NPEFFAnalyzer

    model = tiny_model("bert", dtype=torch.float32)
    dataset = tiny_batch(model, 40, seed=3)
    odd = [example["input_ids"][1] % 2 == 1 for example in dataset]
    with torch.no_grad():
        said = torch.stack([model(**{k: v[None] for k, v in _inputs(e).items()}).logits[0] for e in dataset])
    attributes = Attributes.from_columns({"odd": odd, "first": (said[:, 0] > said[:, 0].median()).tolist()})
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=4))
    known = torch.tensor(odd).float()[:, None]
    monkeypatch.setattr(fair, "of_states", lambda states, config, seed: {"planted, alone": [known.expand(-1, 4)] * 2})
    config = FairConfig(n_components=4, n_restarts=1, sae_steps=10, sizes=(2, 4, 500), layers=2)
    result = run_fair(analyzer, dataset, attributes, "first", config)
    row = result.rows["planted, alone"]
    assert row["attributes"]["odd"] == 1 and row["layer by attribute"]["odd"] == 1 and row["stability"] > 0
    assert row["random weights"] == pytest.approx(sum(row["attributes"].values()) / 2)
    assert "random directions, alone" in result.rows and result.rows["NPEFF, alone"]["layer by attribute"] is None
    assert result.output_auroc["first"] > 0.9 and "first" in result.kinds()["predictable from the output"]
    assert [p["components"] for p in result.curve] == [2, 4] and all(
        p["distinct"] <= p["components"] for p in result.curve
    )
    assert result.difference("planted, alone", "planted, alone", "predictable from the output") == (0, 0, 0)
    for name in ("SAE", "activations, k-means"):  # the page names them
        result.rows[f"{name}, alone"] = row
    page = FairOverview({"tiny": result}, "a command")
    page.write(tmp_path)
    again = FairOverview.read(tmp_path / "result.json")
    again.write(tmp_path / "again")
    assert all((tmp_path / n).read_text() == (tmp_path / "again" / n).read_text() for n in ("README.md", "result.json"))
    assert FairResult.from_dict(json.loads(json.dumps(result.to_dict()))).table() == result.table()
    with pytest.raises(ValueError, match="one data set"):
        FairOverview({}, "")


def test_the_kept_page_is_that_of_its_results(tmp_path: Path) -> None:
    """Identity: docs/studies/fair, written again from its result.json; docs/studies.md carries its first paragraph."""
    pytest.importorskip("matplotlib", reason="it draws the figures")
    from tests.test_docs import REPOSITORY

    folder = REPOSITORY / "docs" / "studies" / "fair"
    result = FairOverview.read(folder / "result.json")
    result.write(tmp_path)
    for name in ("README.md", "table.md", "result.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8"), name
    assert result.verdict() in (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")


def test_the_first_table_says_who_is_ahead_by_intervals() -> None:
    """Planted: differences of one sign on all attributes, of the other, and of both signs. Oracle: their intervals."""
    ours = {f"a{k}": 0.8 for k in range(8)}
    less, more = ({name: value + by for name, value in ours.items()} for by in (-0.1, 0.1))
    mixed = {name: value + (0.1 if k % 2 else -0.1) for k, (name, value) in enumerate(ours.items())}
    scores = {"NPEFF, alone": ours, "SAE, alone": less, "activations, NMF, alone": more}
    scores["NMF on PEFs, competing"] = mixed
    rows = {row: {"attributes": each} for row, each in scores.items()}
    result = FairResult(rows, dict.fromkeys(ours, 0.95), [], FairConfig(), {})
    said = FairOverview({"tiny": result}, "").verdict()
    assert "is *activations, NMF, alone*, with a mean AUROC of 0.90" in said and "place 2 of 4" in said
    leads = {row.split(" | ")[0].strip("| "): row.split(" | ")[2].strip("| ") for row in said.splitlines()[-3:]}
    assert leads["SAE, alone"] == "**0.10** (0.10 to 0.10)"
    assert leads["activations, NMF, alone"] == "*-0.10* (-0.10 to -0.10)"
    assert leads["NMF on PEFs, competing"].startswith("0.00 (-0.")


def _inputs(example: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(v) for k, v in example.items() if k in ("input_ids", "token_type_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"sizes": (8, 4)}, "sizes"), ({"predictable_at": 0.3}, "predictable_at"), ({"sae_steps": 0}, "sae_steps")],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], named: str) -> None:
    """Oracle: the error names the setting."""
    with pytest.raises(ValueError, match=named):
        FairConfig(**setting)
