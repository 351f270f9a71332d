"""The factors and selectivity studies. Oracles: scikit-learn, brute force, planted coefficients and planted effects."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer, ParameterDirection
from hf_npeff.baselines import gradient_clustering
from hf_npeff.baselines.method import MethodResult
from hf_npeff.baselines.row_directions import RowDirections, lifted_together
from hf_npeff.fisher.predictions import predict
from hf_npeff.studies.comparison import fit_methods
from hf_npeff.studies.factors import Attributes, run_factors
from hf_npeff.studies.measures import (
    agreement,
    aurocs,
    average_precision,
    best_threshold,
    bootstrap_interval,
)
from hf_npeff.studies.result import markdown, ratio
from hf_npeff.studies.selectivity import draw_examples, run_selectivity
from hf_npeff.studies.settings import METHODS, RIVALS, ComparisonConfig, FactorsConfig, SelectivityConfig
from hf_npeff.weights.exact_lifting import lift_exact
from tests.tiny import tiny_batch, tiny_model


def draws(seed: int, n: int = 60, levels: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with ties, and positives."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (n,), generator=generator).double()
    return scores, torch.rand(n, generator=generator) < 0.3


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_scikit_learns(seed: int) -> None:
    """Oracle: scikit-learn, with ties."""
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positives = draws(seed)
    assert average_precision(scores, positives) == pytest.approx(
        metrics.average_precision_score(positives, scores), abs=1e-12
    )
    columns = torch.stack([scores, -scores, torch.rand(60, dtype=torch.float64)], 1)
    expected = [metrics.roc_auc_score(positives, c) for c in columns.T]
    assert aurocs(columns, positives).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_the_best_of_all(seed: int) -> None:
    """Oracle: every distinct score tried."""
    scores, positives = draws(seed)

    def youden(t: float) -> float:
        said = scores >= t
        return float(said[positives].double().mean() - said[~positives].double().mean())

    assert youden(best_threshold(scores, positives)) == pytest.approx(max(map(youden, scores.tolist())))


def test_agreement_is_one_for_a_permutation_and_small_for_noise() -> None:
    """Oracle: identity; by hand for two columns; statistical for noise (n = 2000, correlation below 4/√n)."""
    W = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0))
    assert agreement(W, 3 * W[:, [2, 0, 4, 1, 3]] + 1) == pytest.approx(1)
    assert agreement(W, torch.rand(2000, 5, generator=torch.Generator().manual_seed(1))) < 4 / 2000**0.5
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    corr = torch.corrcoef(torch.cat([a, b], 1).T)[:2, 2:].abs()
    by_hand = max(corr[0, 0] + corr[1, 1], corr[0, 1] + corr[1, 0]) / 2
    assert agreement(a, b) == pytest.approx(float(by_hand))
    with pytest.raises(ValueError, match=r"4.*2"):
        agreement(a, b[:2])


def test_the_bootstrap_covers_the_mean() -> None:
    """Oracle: ±1.96 standard errors of 400 coin flips, within a fifth of their width."""
    values = (torch.arange(400) % 4 == 0).double()
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(0.25 - half, abs=half / 5) and high == pytest.approx(0.25 + half, abs=half / 5)


class TestAttributes:
    def test_columns_become_yes_or_no_and_nothing_is_dropped_in_silence(self) -> None:
        """Oracle: by hand."""
        columns = {
            "kind": ["a", "b", "a", None, "a", "b"],
            "flag": [True, False, None, True, False, True],
            "tags": [["x", "y"], [], ["x"], ["y"], None, ["z"]],
            "same": [1, 1, 1, 1, 1, 1],
            "empty": [None] * 6,
        }
        made = Attributes.from_columns(columns, min_count=2)
        assert made.names == ["kind=a", "kind=b", "flag", "tags=x", "tags=y"]
        assert made.values[:, 0].nan_to_num(-1).tolist() == [1, 0, 1, -1, 1, 0]
        assert made.values[:, 3].nan_to_num(-1).tolist() == [1, 0, 1, 0, -1, 0]
        assert made.missing == {"kind=a": 1, "kind=b": 1, "flag": 1, "tags=x": 1, "tags=y": 1}
        assert "one class only" in made.excluded["same=1"] and "fewer than 2" in made.excluded["tags=z"]
        assert made.excluded["empty"] == "no example is annotated"
        assert made.counts.tolist() == [4, 1, 2, 2, 1, 2]

    def test_what_is_no_attribute_is_refused(self) -> None:
        """Oracle: the messages."""
        with pytest.raises(ValueError, match="'colour'"):
            Attributes.from_columns({"a": [1]}, ["colour"])
        with pytest.raises(ValueError, match="'a': 1, 'b': 2"):
            Attributes.from_columns({"a": [1], "b": [1, 2]})
        with pytest.raises(ValueError, match=r"'a'.*'float'"):
            Attributes.from_columns({"a": [0.5, 1.5]})


def planted_factors(n: int = 400, noise: float = 0.0) -> tuple[Attributes, torch.Tensor]:
    """Three overlapping attributes and coefficients whose columns 2, 0 and 1 are theirs."""
    generator = torch.Generator().manual_seed(0)
    has = torch.rand(n, 3, generator=generator) < 0.5
    columns = {f"f{a}": has[:, a].tolist() for a in range(3)}
    W = has[:, [1, 2, 0]].float() + noise * torch.rand(n, 3, generator=generator)
    return Attributes.from_columns(columns), W


class TestFactors:
    def test_planted_factors_are_found_all_at_once(self) -> None:
        """Oracle: planted truth: every column is an attribute."""
        attributes, W = planted_factors(noise=0.5)
        row = run_factors([MethodResult("planted", W, 1.5)], attributes).methods[0]
        assert [row.feature_of(f"f{a}") for a in range(3)] == [2, 0, 1]
        assert (row.mean_auroc, row.found, row.wrong, row.all_at_once, row.purity) == (1, 3, 0, 1, 1)
        assert row.at_once == row.possible > 2 and row.seconds == 1.5

    def test_features_are_chosen_on_one_half_and_measured_on_the_other(self) -> None:
        """Oracle: a feature that is perfect on the measuring half alone must not be chosen."""
        attributes, W = planted_factors()
        halves = run_factors([MethodResult("w", W)], attributes).halves
        cheat, honest = attributes.values[:, 0].clone(), attributes.values[:, 0].clone()
        noise = torch.rand(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        cheat[~halves], honest[halves] = noise[~halves], noise[halves]
        both = MethodResult("both", torch.stack([cheat, honest], 1))
        row = run_factors([both], attributes).methods[0]
        assert row.feature_of("f0") == 1 and row.attributes[0].auroc < 0.7

    def test_only_examples_with_several_attributes_count_where_asked(self) -> None:
        """Oracle: coefficients that are right for those and wrong for the rest."""
        attributes, W = planted_factors()
        W[attributes.counts < 2] = 1 - W[attributes.counts < 2]
        method = [MethodResult("w", W)]
        assert run_factors(method, attributes, FactorsConfig(at_least=2)).methods[0].mean_auroc == 1
        assert run_factors(method, attributes).methods[0].mean_auroc < 1

    def test_what_cannot_be_measured_is_reported(self) -> None:
        """Oracle: the reasons in the result, its table and its JSON."""
        n = 60
        columns: dict[str, Any] = {
            "good": [i % 2 == 0 for i in range(n)], "rare": [i < 3 for i in range(n)], "always": [True] * n,
            "partly": [None if i < 10 else i % 2 == 0 for i in range(n)],
        }  # fmt: skip
        W = torch.tensor([[float(i % 2 == 0)] for i in range(n)])
        result = run_factors([MethodResult("w", W)], Attributes.from_columns(columns, min_count=2))
        assert set(result.excluded) == {"rare", "always"} and result.missing == {"partly": 10}
        assert "fewer than 5" in result.excluded["rare"] and "one class" in result.excluded["always"]
        assert all(word in result.table() for word in ("rare", "always", "partly 10"))
        assert json.loads(json.dumps(result.to_dict()))["missing"] == {"partly": 10}
        assert [s.attribute for s in result.methods[0].attributes] == ["good", "partly"]

    def test_stability_is_the_agreement_of_seeds(self) -> None:
        """Oracle: `agreement`, and none for one seed."""
        attributes, W = planted_factors(noise=0.5)
        other = torch.rand_like(W)
        methods = [MethodResult("a", W), MethodResult("b", W)]
        rows = run_factors(methods, attributes, seeds={"a": [W[:, [1, 0, 2]], other]}).methods
        assert rows[0].stability == pytest.approx((1 + agreement(W, other)) / 2) and math.isnan(rows[1].stability)

    def test_bad_input_is_refused(self) -> None:
        """Oracle: the messages."""
        attributes, W = planted_factors()
        with pytest.raises(ValueError, match="'a', 'a'"):
            run_factors([MethodResult("a", W), MethodResult("a", W)], attributes)
        with pytest.raises(ValueError, match=r"399.*400"):
            run_factors([MethodResult("a", W[1:])], attributes)
        with pytest.raises(ValueError, match="'f0'"):
            run_factors([MethodResult("a", W)], attributes, FactorsConfig(min_count=300))

    def test_a_result_is_written_as_json_table_and_figure(self, tmp_path: Path) -> None:
        """Oracle: the files, read back; the same result gives the same figure."""
        pytest.importorskip("matplotlib", reason="it draws the figures")
        attributes, W = planted_factors(noise=0.5)
        result = run_factors([MethodResult("a | b", W)], attributes)
        result.write(tmp_path / "one")
        result.write(tmp_path / "two")
        assert json.loads((tmp_path / "one" / "result.json").read_text())["methods"][0]["seconds"] is None
        assert "a \\| b" in (tmp_path / "one" / "table.md").read_text()
        figures = [(tmp_path / name / "figure.svg").read_bytes() for name in ("one", "two")]
        assert figures[0] == figures[1] and b"<svg" in figures[0]


def test_a_ratio_to_a_rounding_error_is_only_called_large() -> None:
    """Oracle: by hand."""
    assert [ratio(value) for value in (None, 3.14, 9999.9, 10_000.0, 2.5e6)] == [
        "–", "3.1", "9999.9", "> 10,000", "> 10,000"
    ]  # fmt: skip


def test_cells_cannot_open_other_cells() -> None:
    """Oracle: by hand."""
    assert markdown(["a", "b"], [["x|y", "1\n2"]]).splitlines()[-1] == "| x\\|y | 1 2 |"


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """Every method on a tiny classifier whose examples are annotated by their first word."""
    pytest.importorskip("sklearn", reason="k-means and NMF are scikit-learn's")
    model = tiny_model("bert", dtype=torch.float32)
    dataset = tiny_batch(model, 80, seed=3)
    for example in dataset:
        example["even"] = example["input_ids"][1] % 2 == 0
        example["long"] = len(example["input_ids"]) > 6
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(sketch="kronecker", sketch_dim=8))
    config = ComparisonConfig(4, n_restarts=2, sae_expansion=2, sae_steps=100, seeds=2, batch_size=32)
    found = fit_methods(analyzer, dataset, config)
    columns = {name: [e[name] for e in dataset] for name in ("even", "long")}
    attributes = Attributes.from_columns(columns)
    factors = run_factors(found.methods, attributes, seeds=found.seeds)
    return {"analyzer": analyzer, "dataset": dataset, "found": found, "attributes": attributes, "factors": factors}


def test_every_method_is_a_row(compared: dict[str, Any]) -> None:
    """Oracle: names, sizes, and what a row must hold."""
    rows = {row.method: row for row in compared["factors"].methods}
    assert list(rows) == ["NPEFF", "gradient clustering, soft", "gradient clustering, hard", "SAE", "SAE × 2",
                          "activations, k-means", "activations, NMF", "random"]  # fmt: skip
    assert {row.features for name, row in rows.items() if name != "SAE × 2"} == {4} and rows["SAE × 2"].features == 8
    assert all(0 <= row.stability <= 1.0001 and row.seconds >= 0 for row in rows.values())
    assert compared["factors"].facts["NPEFF"]["explained"] > 0
    with pytest.raises(ValueError, match="'magic'"):
        ComparisonConfig(methods=("magic",))


def test_selectivity_brings_every_method_to_the_same_kl_on_the_same_examples(compared: dict[str, Any]) -> None:
    """Oracle: the definition, and a random direction, whose ratio is near 1 on a random model's examples."""
    config = SelectivityConfig(target_kl=0.01, n_top=12, n_others=20)
    methods = compared["found"].methods
    before = [p.clone() for p in compared["analyzer"].model.parameters()]
    result = run_selectivity(compared["analyzer"], methods, compared["dataset"], compared["attributes"],
                             compared["factors"], config)  # fmt: skip
    assert result.methods == [m.name for m in methods] and not result.excluded
    for row in result.rows:
        assert row.ratio == pytest.approx(row.top / row.others, rel=1e-2)
        assert not row.reached or row.top == pytest.approx(0.01, rel=0.12)
        assert (row.ablated is None) == (row.method.startswith(("NPEFF", "gradient", "random")))
    assert sum(row.reached for row in result.rows) > len(result.rows) // 2
    assert all(torch.equal(a, b) for a, b in zip(before, compared["analyzer"].model.parameters(), strict=True))
    assert result.table().count("\n") >= 5 and set(result.medians()) <= set(result.methods)
    mine = [row.top - row.others for row in result.rows if row.method == "random"]
    assert result.own_minus_others()["random"] == pytest.approx(sum(mine) / len(mine))


def test_the_sign_is_chosen_on_examples_that_are_not_measured(compared: dict[str, Any]) -> None:
    """Oracle: bisection of both signs on the half on which features are chosen; here the other half says otherwise."""
    config = SelectivityConfig(target_kl=0.003, n_top=12, n_others=20, batch_size=64)
    analyzer, halves = compared["analyzer"], compared["factors"].halves
    method = next(m for m in compared["found"].methods if m.name == "NPEFF")
    rows = run_selectivity(analyzer, [method], compared["dataset"], compared["attributes"], compared["factors"], config)
    examples = analyzer.read(compared["dataset"])[:]

    def kl(direction: Any, scale: float, group: list[int]) -> float:
        chosen = [examples[i] for i in group]
        with analyzer.forward_pass() as forward:
            before = predict(forward, chosen, 64)
            with direction.applied_to(forward.model, scale):
                return float(before.kl_to(predict(forward, chosen, 64)).mean())

    def better(direction: Any, values: Tensor, half: Tensor, drawn: SelectivityConfig) -> float:
        top, others = draw_examples(values, half, drawn)
        ratios = {}
        for sign in (1.0, -1.0):
            low, high = 0.0, 8.0
            for _ in range(14):
                middle = (low + high) / 2
                low, high = (middle, high) if kl(direction, sign * middle, top) < 0.003 else (low, middle)
            ratios[sign] = kl(direction, sign * low, top) / kl(direction, sign * low, others)
        return max(ratios, key=ratios.__getitem__)

    assert rows.rows and all(row.reached for row in rows.rows)
    for row in rows.rows:
        values = compared["attributes"].values[:, compared["attributes"].names.index(row.attribute)]
        direction = method.interventions([row.feature])[0]  # type: ignore[misc]
        assert math.copysign(1, row.scale) == better(direction, values, ~halves, config.for_signs)


def test_directions_lifted_together_are_those_lifted_alone(
    compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every method's own lifting, and the public one of components; two sets of rows take two liftings."""
    analyzer, dataset, found = compared["analyzer"], compared["dataset"], compared["found"]
    config = replace(ComparisonConfig(4, n_restarts=1, seeds=1, batch_size=32), methods=(*METHODS, *RIVALS))
    methods = fit_methods(analyzer, dataset, config, pefs=found.pefs).methods
    on_rows = [m for m in methods if isinstance(m.interventions, RowDirections)]
    assert len(on_rows) == 8  # NPEFF, both of gradient clustering, five rivals
    wanted = [[0, 2] if i % 2 else [1, 0] for i in range(len(methods))]
    alone = {m.name: m.interventions(features) for m, features in zip(methods, wanted, strict=True)}  # type: ignore[misc]
    lifted: list[int] = []

    def counted(*given: Any, **more: Any) -> Any:
        lifted.append(len(given[3]))
        return lift_exact(*given, **more)

    monkeypatch.setattr(gradient_clustering, "lift_exact", counted)
    one = 4 * sum(rows * columns for rows, columns in analyzer.shapes.values())
    for memory, most in ((10**9, 8), (4 * one, 4), (0, 2)):
        lifted.clear()
        for method, features in zip(lifted_together(methods, wanted, memory), wanted, strict=True):
            for one_direction, expected in zip(method.interventions(features), alone[method.name], strict=True):  # type: ignore[misc]
                if isinstance(expected, ParameterDirection):
                    for name in expected:
                        assert torch.allclose(one_direction[name], expected[name], atol=1e-6)
        assert max(lifted) <= most, lifted
        assert memory < 10**9 or len(lifted) == 2


def test_methods_without_interventions_are_reported(compared: dict[str, Any]) -> None:
    """Oracle: the result."""
    bare = MethodResult("NPEFF", compared["found"].methods[0].coefficients)
    result = run_selectivity(compared["analyzer"], [bare], compared["dataset"], compared["attributes"],
                             compared["factors"])  # fmt: skip
    assert result.rows == [] and result.excluded == {"NPEFF": "it has no interventions"}
    with pytest.raises(ValueError, match=r"3.*80"):
        run_selectivity(compared["analyzer"], [bare], compared["dataset"][:3], compared["attributes"],
                        compared["factors"])  # fmt: skip
