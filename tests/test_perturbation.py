"""What a step along a component does: KL against the oracle, the target reached, random directions, bad input."""

from __future__ import annotations

import copy
import logging
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_npeff import (
    NPEFF,
    Decomposition,
    DecompositionConfig,
    FisherConfig,
    NPEFFAnalyzer,
    ParameterDirection,
    PerturbationReport,
    data,
)
from hf_npeff.weights.perturbation import choose_examples
from hf_npeff.weights.steps import find_scale
from tests import reference
from tests.logged import warned_by
from tests.tiny import tiny_batch, tiny_model
from tests.trigger_words import TrainedCase


@pytest.fixture(scope="module")
def direction(trained_case: TrainedCase) -> ParameterDirection:
    c = trained_case
    found: ParameterDirection = c.analyzer.lift(c.decomposition, 0, c.pefs, c.data, selective=False)
    return found


@pytest.fixture(scope="module")
def report(trained_case: TrainedCase, direction: ParameterDirection) -> PerturbationReport:
    c = trained_case
    return c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, n_top=8, n_others=24)


def test_kl_flips_and_accuracy_are_the_oracles(
    trained_case: TrainedCase, direction: ParameterDirection, report: PerturbationReport
) -> None:
    """Oracle: one example at a time, reference.kl of the logits with θ and with θ + scale·direction."""
    c, model = trained_case, trained_case.analyzer.model

    def run(i: int) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([c.data[i]["input_ids"]])).logits[0]

    for indices, mean, flips, accuracy, quantiles in (
        (
            report.top_examples,
            report.best.top,
            report.best.top_flips,
            report.best.top_accuracy,
            report.best.top_quantiles,
        ),
        (
            report.other_examples,
            report.best.others,
            report.best.other_flips,
            report.best.other_accuracy,
            report.best.other_quantiles,
        ),
    ):
        before = [run(i) for i in indices]
        with direction.applied_to(model, report.scale):
            after = [run(i) for i in indices]
        kls = torch.tensor([reference.kl(a, b) for a, b in zip(before, after, strict=True)], dtype=torch.float64)
        assert mean == pytest.approx(float(kls.mean()), rel=1e-3, abs=1e-6)
        assert quantiles[1] == pytest.approx(float(kls.quantile(0.5)), rel=1e-3, abs=1e-6)
        changed = [int(a.argmax() != b.argmax()) for a, b in zip(before, after, strict=True)]
        assert flips == pytest.approx(sum(changed) / len(changed))
        right = [
            sum(int(x.argmax()) == c.data[i]["label"] for x, i in zip(logits, indices, strict=True)) / len(indices)
            for logits in (before, after)
        ]
        assert accuracy == pytest.approx(tuple(right))
        shown = [row["index"] for row in report.changed if row["top"] == (indices is report.top_examples)]
        assert shown == [i for i, flipped in zip(indices, changed, strict=True) if flipped]
    assert report.ratio == pytest.approx(report.best.top / report.best.others, rel=1e-3)


def test_the_best_sign_reaches_the_target_and_the_other_is_reported(
    report: PerturbationReport, trained_case: TrainedCase, direction: ParameterDirection
) -> None:
    """Oracle: the target, within 10%; the other sign only makes a sure model surer, and stops at the weights' norm."""
    assert report.reached and report.target == 0.5
    assert report.opposite is not None and report.best.scale * report.opposite.scale < 0
    assert report.best.top == pytest.approx(0.5, rel=0.1)
    weights = dict(trained_case.analyzer.model.named_parameters())
    longest = sum(float(weights[n].double().square().sum()) for n in direction) ** 0.5
    assert abs(report.opposite.scale) <= longest * 1.001
    assert report.best.ratio >= report.opposite.ratio


def test_a_component_is_selective_and_a_random_direction_of_equal_norm_is_not(report: PerturbationReport) -> None:
    """Oracle: the planted triggers: ratio ≥ 10, and a random direction's between 1/5 and 5 with a far smaller KL."""
    assert report.ratio >= 10
    assert abs(report.random.scale) == pytest.approx(abs(report.scale))
    assert report.random.top < 0.1 * report.best.top and report.random.ratio < 5


def test_the_bootstrap_interval_holds_the_ratio(report: PerturbationReport) -> None:
    """Oracle: order of the numbers, and that the same seed gives the same interval."""
    low, high = report.best.interval
    assert 0 < low <= report.ratio <= high < math.inf


def test_a_given_scale_is_used_and_the_order_of_the_data_does_not_matter(
    trained_case: TrainedCase, direction: ParameterDirection
) -> None:
    """Oracle: the report of the data in its own order; the model is untouched."""
    c = trained_case
    before = {n: p.detach().clone() for n, p in c.analyzer.model.named_parameters()}
    settings: dict[str, Any] = {"scale": -0.4, "n_top": 6, "n_others": 10, "batch_size": 4}
    one = c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, **settings)
    other = c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data[::-1], **settings)
    assert one.to_dict() == other.to_dict()
    assert one.scale == -0.4 and one.opposite is None and one.target is None
    assert all(torch.equal(p, before[n]) for n, p in c.analyzer.model.named_parameters())


def test_adapters_are_measured_together_as_each_is_with_moved_weights(trained_case: TrainedCase) -> None:
    """Oracle: ΔW added to the weights, one adapter at a time; KL of both signs to 1e-4, answers, the target."""
    c = trained_case
    settings: dict[str, Any] = {"n_top": 6, "n_others": 12, "batch_size": 16}
    adapters = c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, 2)
    reports = c.analyzer.evaluate_adapters(adapters, c.decomposition, c.data, c.pefs, **settings)
    model = c.analyzer.model

    def logits(indices: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([c.data[i]["input_ids"] for i in indices])).logits.double()

    for j, (adapter, report) in enumerate(zip(adapters, reports, strict=True)):
        assert report.component == j and report.reached and report.opposite is not None
        assert report.best.top == pytest.approx(0.5, rel=0.051)
        before = [logits(indices).log_softmax(-1) for indices in (report.top_examples, report.other_examples)]
        moved = ParameterDirection({n: adapter.delta(n) for n in adapter.layouts}, adapter.layouts, unit=False)
        for effect in (report.best, report.opposite):
            with moved.applied_to(model, effect.scale):
                after = [logits(indices).log_softmax(-1) for indices in (report.top_examples, report.other_examples)]
            kl = [float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(before, after, strict=True)]
            assert (effect.top, effect.others) == pytest.approx(kl, rel=1e-4, abs=1e-7)
            flips = (before[0].argmax(-1) != after[0].argmax(-1)).double().mean()
            assert effect.top_flips == pytest.approx(float(flips))
        assert c.decomposition.evaluations[j] == report.summary()
    together = c.analyzer.evaluate_components(c.decomposition, c.pefs, c.data, [3], rank=2, **settings)
    assert together[0].scale == pytest.approx(reports[3].scale, rel=0.05)
    with pytest.raises(ValueError, match="lift_adapters"):
        c.analyzer.evaluate_adapters([], c.decomposition, c.data)
    with pytest.raises(ValueError, match="lift_adapters"):
        c.analyzer.evaluate_adapters([moved.to_adapter(1)], c.decomposition, c.data)


def test_evaluating_components_gives_a_report_each_and_the_decomposition_keeps_them(trained_case: TrainedCase) -> None:
    """Oracle: single lifts and evaluations."""
    c = trained_case
    settings: dict[str, Any] = {"n_top": 6, "n_others": 12}
    reports = c.analyzer.evaluate_components(
        c.decomposition, c.pefs, c.data, [1, 4], rank=None, lift={"selective": False}, **settings
    )
    lifted = c.analyzer.lift(c.decomposition, 4, c.pefs, c.data, selective=False)
    alone = c.analyzer.evaluate_direction(lifted, c.decomposition, 4, c.data, scale=reports[1].scale, **settings)
    assert [r.component for r in reports] == [1, 4] and all(r.reached for r in reports)
    assert reports[1].best.top == pytest.approx(0.5, rel=0.051)  # the search ends within 5% of the target
    assert reports[1].best.top == pytest.approx(alone.best.top, rel=1e-4)
    assert reports[1].random.others == pytest.approx(alone.random.others, rel=1e-4)
    assert c.decomposition.evaluations[4] == reports[1].summary()
    card = (
        c.analyzer.lift(c.decomposition, 4, c.pefs, c.data, selective=False)
        .to_adapter(scale=alone.scale, report=alone, decomposition=c.decomposition)
        .card()
    )
    assert c.decomposition[4].top_examples(1).ids[0] in card and "Ratio" in card


def test_predictions_are_measured_where_the_components_were_analysed() -> None:
    """Oracle: an analyzer that has the decomposition's settings; another, of the same model, measures the same."""
    model = tiny_model("gpt2", "causal-lm", dtype=torch.float32)
    rows = tiny_batch(model, 16, seed=3)
    fisher = FisherConfig(rank=2, positions="all", sketch="countsketch", sketch_dim=256)
    same, other = NPEFFAnalyzer(model, fisher=fisher), NPEFFAnalyzer(model)
    pefs = same.compute_pefs(rows, progress=False)
    found = NPEFF(3, n_restarts=1, progress=False).fit(pefs)
    direction = same.lift(found, 1, pefs, rows, selective=False)
    (adapter,) = same.lift_adapters(found, pefs, rows, 2, [1], selective=False)
    settings: dict[str, Any] = {"n_top": 4, "n_others": 6, "scale": 0.3}

    def measured(analyzer: NPEFFAnalyzer) -> list[Any]:
        alone = analyzer.evaluate_direction(direction, found, 1, rows, held_out=rows, **settings)
        (adapted,) = analyzer.evaluate_adapters([adapter], found, rows, **settings)
        whole, lifted = (
            analyzer.evaluate_components(found, pefs, rows, [1], rank=r, lift={"selective": False}, **settings)[0]
            for r in (None, 2)
        )
        pool = analyzer.off_target(direction, rows[:6], decomposition=found, component=1, rounds=0)
        assert alone.held_out is not None
        group = alone.held_out.to_dict()["steps"][0]["groups"]["all"]
        return [*(r.best.top for r in (alone, adapted, whole, lifted)), group["kl"], pool.to_dict()]

    assert measured(other) == measured(same)
    last = NPEFFAnalyzer(model).measure(direction, rows, scales=(0.3,)).to_dict()["steps"][0]["groups"]["all"]
    assert last["kl"] != pytest.approx(measured(same)[4], rel=0.05), "the last token alone is another question"


def test_the_best_step_is_measured_on_held_out_data_by_group(
    trained_case: TrainedCase, direction: ParameterDirection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `measure` of that step; the worst of the others is the largest of their KLs; cards name it.

    A column that is missing is noticed before the search for a step.
    """
    c = trained_case
    held_out = [{**row, "id": f"h{i}", "group": "ab"[i % 2]} for i, row in enumerate(c.data[40:52])]
    settings: dict[str, Any] = {"scale": -0.4, "n_top": 4, "n_others": 8}
    report = c.analyzer.evaluate_direction(
        direction, c.decomposition, 0, c.data, held_out=held_out, by="group", **settings
    )
    assert report.held_out == c.analyzer.measure(direction, held_out, scales=(-0.4,), by="group")
    assert set(report.held_out.at(-0.4)) == {"all", "group=a", "group=b"}
    others = c.analyzer.measure(direction, [c.data[i] for i in report.other_examples], scales=(-0.4,), random=False)
    worst = others.at(-0.4)["all"].quantiles["100%"]
    assert report.best.other_worst == pytest.approx(worst, rel=1e-4, abs=1e-7)
    assert report.summary()["kl_worst"] == report.best.other_worst
    card = direction.to_adapter(scale=-0.4, report=report, decomposition=c.decomposition).card()
    assert "the worst of the other examples" in card
    with pytest.raises(ValueError, match="held_out"):
        c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, by="group", **settings)
    monkeypatch.setattr("hf_npeff.models.measured_model.evaluate", lambda *_: pytest.fail("the search began"))
    with pytest.raises(ValueError, match="shelf"):
        c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, held_out=held_out, by="shelf", **settings)


def test_a_search_from_the_others_is_on_report_and_card(
    trained_case: TrainedCase, direction: ParameterDirection
) -> None:
    """Oracle: `off_target` on the report's other examples with the same settings; no rounds, no search."""
    c = trained_case
    settings: dict[str, Any] = {"scale": -0.4, "n_top": 4, "n_others": 6, "seed": 3}
    report = c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, search_rounds=2, **settings)
    pool = [c.data[i] for i in report.other_examples]
    alone = c.analyzer.off_target(
        direction, pool, scale=-0.4, rounds=2, seed=3, decomposition=c.decomposition, component=0
    )
    assert report.off_target is not None and report.off_target.tried == alone.tried > 0
    assert report.off_target.searched == alone.searched
    assert report.off_target.worst_kl >= report.best.other_worst - 1e-6 > 0
    assert report.summary()["kl_searched"] == report.off_target.worst_kl
    assert report.to_dict()["off_target"]["tried"] == alone.tried
    card = direction.to_adapter(scale=-0.4, report=report, decomposition=c.decomposition).card()
    assert "a search that replaces tokens" in card and "Step of this measurement" not in card
    twice = direction.to_adapter(scale=-0.8, report=report, decomposition=c.decomposition).card()
    assert re.search(r"\| Step \| \S*0\.8 \|\n\| Step of this measurement \| \S*0\.4, which is not", twice)
    missed = replace(report, target=0.5, reached=False)
    assert "does not reach the target of 0.5" in repr(missed) and "target" not in repr(report)
    assert "should have reached" in direction.to_adapter(scale=-0.4, report=missed).card()
    plain = c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, **settings)
    assert plain.off_target is None and plain.summary()["kl_searched"] is None
    assert "a search" not in direction.to_adapter(scale=-0.4, report=plain).card()
    reports = c.analyzer.evaluate_components(
        c.decomposition, c.pefs, c.data, [0], lift={"selective": False}, search_rounds=2, **settings
    )
    assert reports[0].off_target.tried == alone.tried


def test_an_adapter_is_measured_as_the_change_that_it_is(
    trained_case: TrainedCase, direction: ParameterDirection
) -> None:
    """Oracle: the direction that it was made of, at its scale; an adapter of a lower rank is measured as it is cut."""
    c = trained_case
    settings: dict[str, Any] = {"n_top": 4, "n_others": 8}
    whole = direction.to_adapter(rank=min(min(v.shape) for v in direction.values()), scale=-0.4)
    by_adapter = c.analyzer.evaluate_direction(whole, c.decomposition, 0, c.data, scale=1.0, **settings)
    by_direction = c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, scale=-0.4, **settings)
    assert by_adapter.best.top == pytest.approx(by_direction.best.top, rel=1e-3)
    assert by_adapter.best.others == pytest.approx(by_direction.best.others, rel=1e-3)
    cut = direction.to_adapter(rank=1, scale=0.1)
    report = c.analyzer.evaluate_direction(cut, c.decomposition, 0, c.data, **settings)
    assert report.reached and report.best.top == pytest.approx(0.5, rel=0.06)
    measured = c.analyzer.measure(cut, [c.data[i] for i in report.top_examples], scales=(report.scale,), random=False)
    assert measured.at(report.scale)["all"].kl == pytest.approx(report.best.top, rel=1e-3)


def test_a_data_set_is_encoded_once_for_all_components(
    trained_case: TrainedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a count of examples made; six components are lifted in two groups and measured one by one."""
    c, made, original = trained_case, [], data._content_of
    monkeypatch.setattr("hf_npeff.data._content_of", lambda inputs: made.append(1) or original(inputs))
    reports = c.analyzer.evaluate_components(c.decomposition, c.pefs, c.data, scale=0.1, n_top=2, n_others=2)
    assert len(reports) == len(c.decomposition) > 4 and len(made) == len(c.data)


def test_lifting_many_a_few_at_a_time_gives_what_lifting_together_gives(trained_case: TrainedCase) -> None:
    """Oracle: `lift` of all components in one pass."""
    c = trained_case
    together = c.analyzer.lift(c.decomposition, range(len(c.decomposition)), c.pefs, c.data, selective=False)
    numbers, apart = zip(
        *c.analyzer.lift_each(c.decomposition, [2, 0, 1, 4, 3], c.pefs, c.data, selective=False), strict=True
    )
    assert numbers == (2, 0, 1, 4, 3)
    assert all(direction.cosine(together[j]) > 1 - 1e-6 for j, direction in zip(numbers, apart, strict=True))


def test_tops_are_the_largest_coefficients_and_others_are_inactive(trained_case: TrainedCase) -> None:
    """Oracle: sorting, and the share of each example's coefficients."""
    d: Decomposition = trained_case.decomposition
    top, others = choose_examples(d, 2, 7, 20, 0)
    W = d.coefficients
    assert top == W[:, 2].argsort(descending=True)[:7].tolist()
    assert not set(top) & set(others) and len(others) == 20
    assert all(float(W[i, 2] / W[i].sum()) <= 0.05 for i in others)


def test_a_component_active_everywhere_is_compared_with_where_it_carries_least(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Oracle: sorting by the share of each example's coefficients; no others at all is an error."""
    W = torch.tensor([[0.9, 0.1], [0.8, 0.4], [0.6, 0.9], [0.5, 0.1], [0.4, 0.2], [0.3, 0.9]])
    d = Decomposition(W, torch.eye(2), config=DecompositionConfig(2), info={}, example_ids=list("abcdef"))
    with caplog.at_level(logging.WARNING):
        top, others = choose_examples(d, 0, 2, 2, 0)
    assert (top, sorted(others)) == ([0, 1], [2, 5])
    assert len(warned_by(caplog, "weights.perturbation")) == 1
    with pytest.raises(ValueError, match="n_top"):
        choose_examples(d, 0, 6, 2, 0)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e6])
def test_the_scale_is_found_within_five_percent_in_a_few_steps(power: float, factor: float) -> None:
    """Oracle: KL = factor·step^power, solved by hand."""
    calls: list[float] = []

    def kl(step: float) -> float:
        calls.append(step)
        return factor * step**power

    step, reached = find_scale(kl, 0.5, limit=1e6)
    assert reached and factor * step**power == pytest.approx(0.5, rel=0.051)
    assert len(calls) <= 10
    step, reached = find_scale(lambda s: min(s, 0.1), 0.5, limit=100.0)
    assert not reached and step <= 100


# Bad input


def test_what_cannot_be_evaluated_is_refused(trained_case: TrainedCase, direction: ParameterDirection) -> None:
    """Oracle: the errors."""
    c = trained_case

    def evaluate(component: int = 0, data: Any = None, **settings: Any) -> Any:
        return c.analyzer.evaluate_direction(direction, c.decomposition, component, data or c.data, **settings)

    with pytest.raises(IndexError):
        evaluate(6)
    for wrong in ({"target_kl": 0}, {"target_kl": math.nan}, {"n_top": 0}, {"n_others": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            evaluate(**wrong)
    for scale in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            evaluate(scale=scale)
    with pytest.raises(ValueError, match="'e79'"):
        evaluate(data=c.data[:-1])
    with pytest.raises(ValueError, match="'e79'"):
        evaluate(data=[*c.data[:-1], {**c.data[-1], "input_ids": c.data[0]["input_ids"]}])
    other = tiny_model("bert", dtype=torch.float32)
    analyzer = NPEFFAnalyzer(other, fisher=FisherConfig(rank=1))
    found = analyzer.decompose(analyzer.compute_pefs(tiny_batch(other, 12, seed=0)), 2, progress=False, n_restarts=1)
    with pytest.raises(ValueError):
        analyzer.evaluate_direction(direction, found, 0, tiny_batch(other, 12, seed=0))


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 0.9999), (torch.bfloat16, 0.0)])
def test_a_report_says_what_rounding_makes_of_the_step(
    trained_case: TrainedCase, direction: ParameterDirection, dtype: torch.dtype, worst: float
) -> None:
    """Oracle: weights in their type before and after `applied_to`, by subtraction in float64; none where quantised."""
    c = trained_case
    model = copy.deepcopy(c.analyzer.model).to(dtype)
    analyzer = NPEFFAnalyzer(model, c.analyzer.processing_class, fisher=c.analyzer.fisher)
    report = analyzer.evaluate_direction(direction, c.decomposition, 0, c.data, scale=0.05, n_top=4, n_others=4)
    names = list(direction)
    before = torch.cat([model.get_parameter(n).detach().double().flatten() for n in names])
    with direction.applied_to(model, 0.05):
        taken = torch.cat([model.get_parameter(n).detach().double().flatten() for n in names]) - before
    wanted = 0.05 * torch.cat([direction[n].double().flatten() for n in names])
    assert report.step_length is not None and report.step_cosine is not None
    assert report.step_length == pytest.approx(float(taken.norm() / wanted.norm()), rel=1e-3)
    assert report.step_cosine == pytest.approx(float(taken @ wanted / taken.norm() / wanted.norm()), rel=1e-3)
    assert worst <= report.step_cosine and (dtype == torch.float32) == (report.step_cosine > 0.999)
    assert report.to_dict()["step_cosine"] == report.step_cosine
