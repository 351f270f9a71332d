"""Probes, diagnoses and tables over data sets. Oracles: planted truth, brute force, files made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import NPEFF, PEFs
from hf_npeff.baselines.row_dictionaries import coordinates, pef_inner_products
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.factors import FactorsConfig, first_half
from hf_npeff.studies.overview import differences, overview
from hf_npeff.studies.probes import by_kind, diagnose, linear_probes, over_data_sets

pytest.importorskip("sklearn", reason="the probes are scikit-learn's")


@pytest.mark.parametrize("m", [5, 300], ids=["fewer features than examples", "more features than examples"])
def test_a_probe_finds_what_is_linear_in_the_features_and_no_coin(m: int) -> None:
    """Oracle: planted: the side of a plane, and a coin (n = 100 measured, 4 standard errors)."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, m, generator=generator)
    X[:, 0] *= m**0.5
    columns = {"side": (X[:, 0] > 0).tolist(), "coin": (torch.rand(200, generator=generator) < 0.5).tolist()}
    found = linear_probes(X + 7, Attributes.from_columns(columns), choose=first_half(200, 0))
    assert found["side"] > 0.95 and abs(found["coin"] - 0.5) < 4 * 0.058


def test_a_probe_leaves_out_what_it_cannot_fit() -> None:
    """Oracle: by hand: two examples with it to choose on, none to measure on; NaN is not annotated."""
    choose = torch.arange(40) < 20
    columns: dict[str, Any] = {
        "two": [i < 2 for i in range(40)], "none": [i < 10 for i in range(40)],
        "some": [None if i % 5 == 0 else i % 2 == 0 for i in range(40)],
    }  # fmt: skip
    attributes = Attributes.from_columns(columns, min_count=1)
    X = torch.arange(40.0)[:, None] % 2
    assert linear_probes(X, attributes, choose=choose) == {"some": 1.0}
    with pytest.raises(ValueError, match=r"39.*40"):
        linear_probes(X[1:], attributes, choose=choose)


def test_inner_products_of_pefs_are_those_of_the_matrices() -> None:
    """Oracle: F = AᵀA, formed; and points with these inner products."""
    A = torch.randn(12, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F = (A.mT @ A).flatten(1)
    K = pef_inner_products(A)
    assert torch.allclose(K, F @ F.T)
    X = coordinates(K)
    assert torch.allclose(X @ X.T, K, atol=1e-9 * float(K.max()))


def test_a_diagnosis_tells_a_poor_representation_from_a_poor_feature() -> None:
    """Oracle: planted. PEFs hold both attributes as directions; hidden states hold `up` alone, and `probed` `odd`."""
    generator = torch.Generator().manual_seed(0)
    n = 120
    up, odd = torch.rand(n, generator=generator) < 0.5, torch.rand(n, generator=generator) < 0.5
    basis = torch.eye(8)
    rows = torch.stack([basis[up.long()], basis[2 + odd.long()]], 1) + 0.05 * torch.randn(n, 2, 8, generator=generator)
    pefs = PEFs.from_factors(rows)
    noise = torch.randn(n, 6, generator=generator)
    states = torch.cat([4 * up[:, None].float() + 0.1 * noise[:, :1], noise[:, 1:]], 1)
    attributes = Attributes.from_columns({"up": up.tolist(), "odd": odd.tolist()})
    other = {"other": odd[:, None].float() + 0.1 * noise[:, :1]}
    found = diagnose(states, pefs, NPEFF(4, n_restarts=2).fit(pefs), attributes, FactorsConfig(), probed=other)
    assert len(found) == 10 and all(set(scores) == {"up", "odd"} for scores in found.values())
    for label in ("probe of PEFs", "best of 4: NPEFF, coefficients W", "best of 4: NPEFF, alignments ‖A g‖²"):
        assert min(found[label].values()) > 0.9, label
    assert found["probe of activations"]["up"] > 0.9 > 0.7 > found["probe of activations"]["odd"]
    assert found["probe of other"]["odd"] > 0.9
    assert found["best of 4: k-means on activations, cosines"]["odd"] < 0.7


def test_means_by_kind_are_of_the_attributes_of_that_kind() -> None:
    """Oracle: by hand; a row without a kind has a dash."""
    table = by_kind({"a": {"x=1": 0.5, "x=2": 0.7, "y=1": 0.9}, "b": {"y=1": 0.4}}).splitlines()
    assert table[0] == "| AUROC | mean (3) | x (2) | y (1) |"
    assert table[2:] == ["| a | 0.700 | 0.600 | 0.900 |", "| b | 0.400 | – | 0.400 |"]
    table = over_data_sets({"one_set": {"a": {"x=1": 0.5, "y=1": 0.7}}, "two": {"b": {"y=1": 0.4}}}).splitlines()
    assert table[0] == "| mean AUROC | one set | two |"
    assert table[2:] == ["| a | 0.600 | – |", "| b | – | 0.400 |"]


def left_by_studies(folder: Path, auroc: float, method: str) -> Path:
    """The files of both studies, with what the table over data sets reads."""
    row = {"method": method, "mean_auroc": auroc, "attributes": [{"auroc": auroc}, {"auroc": 0.1}], "at_once": 1.5,
           "possible": 2, "purity": 0.25, "stability": None, "seconds": 12.4}  # fmt: skip
    for study, content in {
        "factors": {"methods": [row], "config": {"found_at": 0.9}},
        "selectivity": {
            "rows": [
                {"method": method, "moved": m, "top": 0.3, "others": o} for m, o in ((0.5, 0), (0.25, 0.3), (None, 0.9))
            ],
            "medians": {method: 3.14},
        },
    }.items():
        (folder / study).mkdir(parents=True)
        (folder / study / "result.json").write_text(json.dumps(content))
    return folder


def test_one_table_over_several_data_sets(tmp_path: Path) -> None:
    """Oracle: by hand; a method that one data set lacks has a dash there."""
    left = (("a", 0.95, "NPEFF"), ("b", 0.8, "NPEFF"), ("c", 0.5, "random"))
    folders = {name: left_by_studies(tmp_path / name, auroc, method) for name, auroc, method in left}
    table = overview(folders).splitlines()
    assert table[2] == (
        "| NPEFF | 0.950 · 0.800 · – | 1 of 2 · 0 of 2 · – | 1.50 of 2.00 · 1.50 of 2.00 · – | 0.25 · 0.25 · – "
        "| – · – · – | 3.1 · 3.1 · – | -0.10 · -0.10 · – | 38% · 38% · – | 12 · 12 · – |"
    )
    assert table[3].startswith("| random | – · – · 0.500 |")
    with pytest.raises(ValueError, match="at least one"):
        overview({})
    with pytest.raises(FileNotFoundError):
        overview({"d": tmp_path / "nothing"})


def test_differences_are_of_the_same_attributes_with_intervals(tmp_path: Path) -> None:
    """Oracle: by hand. Equal differences have an interval without width; a data set without a method has a dash."""
    for name, other in (("a", "SAE"), ("b", "SAE"), ("c", "random")):
        row = {"attributes": [{"attribute": "x", "auroc": 0.9}, {"attribute": "y", "auroc": 0.7}]}
        rival = {"attributes": [{"attribute": "y", "auroc": 0.6}, {"attribute": "x", "auroc": 0.8}]}
        switched = [
            {"method": method, "attribute": "x", "top": 0.3, "others": others}
            for method, others in (("NPEFF", 0.1), (other, 0.2 if name == "a" else 0.25))
        ]
        for study, content in {
            "factors": {"methods": [{"method": "NPEFF", **row}, {"method": other, **rival}]},
            "selectivity": {"rows": switched},
        }.items():
            (tmp_path / name / study).mkdir(parents=True)
            (tmp_path / name / study / "result.json").write_text(json.dumps(content))
    table = differences({name: tmp_path / name for name in "abc"}, "NPEFF").splitlines()
    assert table[0] == "| NPEFF is ahead of | AUROC, a | AUROC, b | AUROC, c | own minus others, nats |"
    equal = "0.100 (0.100 to 0.100)"
    assert table[2] == f"| SAE | {equal} | {equal} | – | 0.12 (0.10 to 0.15) |"  # two attributes: .10 and .15
    assert table[3] == f"| random | – | – | {equal} | 0.15 (0.15 to 0.15) |"
    with pytest.raises(ValueError, match="'magic'"):
        differences({"a": tmp_path / "a"}, "magic")


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    """Identity: the page that `make study` writes from the files of its last run, and the table in docs/studies.md."""
    from tests.test_docs import REPOSITORY, example

    folder = REPOSITORY / "docs" / "studies" / "comparison"
    page = example("04_fine_tune_and_compare").summary(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == page
    text = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")
    tables = [part for part in page.split("\n\n") if part.startswith("|")]
    tables.append((REPOSITORY / "docs" / "studies" / "planted" / "table.md").read_text(encoding="utf-8"))
    assert len(tables) == 4 and all(table.strip() in text for table in tables)
