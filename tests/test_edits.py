"""Edits by target: against dense solutions, plain autograd and finite differences, without a sketch and in float64."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributions as D
from torch import Tensor

from hf_npeff import (
    FisherConfig,
    IncompatibleSketchError,
    IncompatibleWeightsError,
    NPEFFAnalyzer,
    ParameterDirection,
    PEFs,
)
from hf_npeff.config import EditRequest
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.distributions import Bernoulli, Distribution, Gaussian, Softmax
from hf_npeff.fisher.predictions import Predictions
from hf_npeff.weights import edits
from hf_npeff.weights import ridge as ridge_of
from hf_npeff.weights.editing import warn_of_what_is_not_reached
from hf_npeff.weights.edits import Functionals, Length, NoStepError, Shown, changes_by_id, largest_step, removal
from hf_npeff.weights.log_odds import Naming, outcomes_of, warn_of_other_spelling
from hf_npeff.weights.reach import Reach
from hf_npeff.weights.row_space import unscaled_rows
from tests import reference
from tests.logged import warned_by
from tests.tiny import collate, task_of, tiny_batch, tiny_model, tiny_tokenizer

Made = tuple[NPEFFAnalyzer, list[dict[str, Any]], PEFs]


def made(family: str = "bert", task: str | None = None, *, n: int = 12, rank: int = 2, **overrides: Any) -> Made:
    """A tiny model in float64, its data with a cue and labels, and PEFs without a sketch."""
    model = tiny_model(family, task, **overrides)
    data = [{"id": f"e{i}", "cue": i % 3 == 0, "label": i % 2, **e} for i, e in enumerate(tiny_batch(model, n, seed=0))]
    for example in data:
        if task == "causal-lm":
            example.pop("labels", None)
    weights = {"gpt2": ["c_fc"], "distilbert": ["lin1"]}.get(family, ["query", "value"])
    fisher = FisherConfig(rank=rank, sketch="identity", storage_dtype="float64", target_modules=weights)
    analyzer = NPEFFAnalyzer(model, tiny_tokenizer(), fisher=fisher)
    return analyzer, data, analyzer.compute_pefs(data)


@pytest.fixture(scope="module")
def binary() -> Made:
    return made(num_labels=2, rank=1)


@pytest.fixture(scope="module")
def divided() -> Made:
    """As `binary`, but the model answers either class on some of the examples, so that rows have both signs."""
    analyzer, data, _ = made(num_labels=2, rank=1)
    model: Any = analyzer.model
    with torch.no_grad():
        model.classifier.bias[1] -= log_odds(analyzer, data, 1)[0].mean()
    return analyzer, data, analyzer.compute_pefs(data)


def raw(pefs: PEFs) -> Tensor:
    return torch.cat(list(unscaled_rows(pefs, None)))


def as_row(analyzer: NPEFFAnalyzer, direction: ParameterDirection, pefs: PEFs) -> Tensor:
    maps = {m.parameter: m for m in analyzer.maps}
    return torch.cat([maps[n].as_matrix(direction[n]).double().flatten() for n in pefs.sketch().shapes])


def log_odds(analyzer: NPEFFAnalyzer, data: list[dict[str, Any]], y: int) -> tuple[Tensor, Tensor]:
    """Values (n,) and gradients (n, p) of all examples, one at a time by plain autograd."""
    model: Any = analyzer.model
    names = [m.parameter for m in analyzer.maps]
    maps = {m.parameter: m for m in analyzer.maps}
    found = []
    for example in data:
        batch = collate([{k: v for k, v in example.items() if k not in ("id", "cue", "label")}], model)
        value, row = reference.log_odds_of(model, batch, names, reference.terms_of(task_of(model)), y)
        pieces = reference.split_row(row, model, names)
        found.append((value, torch.cat([maps[n].as_matrix(pieces[n]).flatten() for n in names])))
    return torch.tensor([v for v, _ in found], dtype=torch.float64), torch.stack([g for _, g in found])


# The solution


@pytest.mark.parametrize("kept", [False, True])
def test_an_edit_is_the_dense_solution_of_its_equations(divided: Made, kept: bool) -> None:
    """Oracle: reference.edit with targets s_i Δ_i, row_i = s_i ∇log-odds by autograd; relative difference ≤ 1e-8."""
    analyzer, data, pefs = divided
    other = analyzer.compute_pefs(
        [{"id": f"k{i}", **e} for i, e in enumerate(tiny_batch(analyzer.model, 5, seed=7))], like=pefs
    )  # type: ignore[arg-type]
    change = {"e1": 0.02, "e4": -0.01}
    _, gradients = log_odds(analyzer, data, 1)
    A = raw(pefs)
    signs = (A[:, 0] * gradients).sum(1) / gradients.square().sum(1)
    assert torch.allclose(A[:, 0], signs[:, None] * gradients, atol=1e-9)  # LAPACK chooses the signs
    wanted = torch.tensor([change.get(f"e{i}", 0.0) for i in range(len(data))], dtype=torch.float64)
    truth = reference.edit(A, (signs * wanted)[:, None], 1e-2, raw(other) if kept else None)
    direction = analyzer.edit(pefs, data, change=change, ridge=1e-2, keep=other if kept else None)
    assert (as_row(analyzer, direction, pefs) - truth).norm() < 1e-8 * truth.norm()
    assert direction.info["steps"] == [1.0] and direction.info["expressible"] == pytest.approx(1)
    for name, told in direction.info["changes"].items():
        assert told["predicted"] == pytest.approx(float(gradients[int(name[1:])] @ truth), rel=1e-6)


@pytest.mark.parametrize("outcome", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_log_odds_of_either_class_move_the_way_that_is_asked_for(binary: Made, outcome: int, sign: int) -> None:
    """Oracle: log-odds of the changed model by plain autograd's forward pass; within 20% of what was predicted."""
    analyzer, data, pefs = binary
    before, _ = log_odds(analyzer, data, outcome)
    direction = analyzer.edit(pefs, data, change={"e2": sign * 0.05, "e3": sign * 0.05}, outcome=outcome, ridge=1e-4)
    with direction.applied_to(analyzer.model):
        after, _ = log_odds(analyzer, data, outcome)
    moved = after - before
    for i in (2, 3):
        told = direction.info["changes"][f"e{i}"]
        assert float(moved[i]) == pytest.approx(told["realised"], abs=1e-5)
        assert float(moved[i]) == pytest.approx(told["predicted"], rel=0.2) and sign * float(moved[i]) > 0.03
    assert moved[4:].abs().max() < 0.02


KINDS: list[tuple[str, str, dict[str, Any], int | str | None]] = [
    ("bert", "sequence-classification", {"num_labels": 4, "rank": 3}, 2),
    ("bert", "sequence-classification", {"num_labels": 4, "rank": 3}, "LABEL_1"),
    ("bert", "sequence-classification", {"num_labels": 3, "problem_type": "multi_label_classification", "rank": 3}, 1),
    ("bert", "sequence-classification", {"num_labels": 1, "rank": 1}, None),
    ("bert", "sequence-classification", {"num_labels": 2, "problem_type": "regression", "rank": 2}, 1),
    ("gpt2", "causal-lm", {"rank": 16}, "king"),
]


@pytest.mark.parametrize(("family", "task", "settings", "outcome"), KINDS)
def test_predicted_changes_are_those_of_finite_differences(
    family: str, task: str, settings: dict[str, Any], outcome: int | str | None
) -> None:
    """Oracle: central differences of the log-odds at steps of 1e-3 of the change; within 1%, for every kind."""
    analyzer, data, pefs = made(family, task, **settings)
    direction = analyzer.edit(pefs, data, change={"e0": 0.05, "e5": -0.05}, outcome=outcome, ridge=1e-3)
    names = {"LABEL_1": 1, None: 0, "king": analyzer.processing_class("king", add_special_tokens=False)["input_ids"][0]}
    y = names.get(outcome, outcome)  # type: ignore[arg-type, call-overload]
    values = []
    for step in (1e-3, -1e-3):
        with direction.applied_to(analyzer.model, step):
            values.append(log_odds(analyzer, data, y)[0])
    slopes = (values[0] - values[1]) / 2e-3
    assert direction.info["expressible"] == pytest.approx(1, abs=1e-6)
    for name, told in direction.info["changes"].items():
        assert float(slopes[int(name[1:])]) == pytest.approx(told["predicted"] / direction.info["steps"][0], rel=0.01)


def test_masked_language_models_move_the_mean_over_their_masks() -> None:
    """Oracle: realised log-odds of the token by plain autograd's forward pass, as the info says them."""
    analyzer, data, pefs = made("bert", "masked-lm", n=8, rank=16)
    token = int(analyzer.processing_class("dog", add_special_tokens=False)["input_ids"][0])
    before, _ = log_odds(analyzer, data, token)
    direction = analyzer.edit(pefs, data, change={"e1": 0.1}, outcome="dog", ridge=1e-6)
    with direction.applied_to(analyzer.model):
        after, _ = log_odds(analyzer, data, token)
    assert float((after - before)[1]) == pytest.approx(direction.info["changes"]["e1"]["realised"], abs=1e-4)
    assert float((after - before)[1]) == pytest.approx(direction.info["changes"]["e1"]["predicted"], rel=0.3)
    assert float((after - before)[1]) > 0.02


# Taking a column out


def test_removing_a_column_leaves_label_means_where_they_were(binary: Made) -> None:
    """Oracle: means over the examples, by label and by label and cue, of what is wanted and of what the model shows."""
    analyzer, data, pefs = binary
    before, _ = log_odds(analyzer, data, 1)
    cue = before > before.median()
    data = [{**example, "cue": bool(own)} for example, own in zip(data, cue, strict=True)]
    pefs = pefs[:]
    pefs.columns["cue"] = cue.tolist()
    wanted = removal("cue", "label", pefs.columns, before)
    for label in (0, 1):
        mine = torch.tensor([e["label"] == label for e in data])
        assert float(wanted.changes[mine].mean()) == pytest.approx(0, abs=1e-12)
        moved = before + wanted.changes
        assert float(moved[mine & cue].mean()) == pytest.approx(float(moved[mine & ~cue].mean()), abs=1e-12)
    direction = analyzer.edit(pefs, data, remove="cue", ridge=1e-6)
    with direction.applied_to(analyzer.model):
        after, _ = log_odds(analyzer, data, 1)
    for label in (0, 1):
        mine = torch.tensor([e["label"] == label for e in data])
        gap = [float(values[mine & cue].mean() - values[mine & ~cue].mean()) for values in (before, after)]
        assert abs(gap[1]) < 0.6 * abs(gap[0])
        assert abs(float((after - before)[mine].mean())) < 0.25 * abs(gap[0])
    assert set(direction.info["changes"]) == {f"cue={c}, label={y}" for c in (True, False) for y in (0, 1)}


def test_half_is_moved_from_each_side_where_both_are_as_many() -> None:
    """Oracle: the definition, on numbers chosen by hand; a third value moves to the same mean."""
    values = torch.tensor([0.0, 0.0, 4.0, 4.0, 1.0, 7.0], dtype=torch.float64)
    columns: dict[str, Any] = {"cue": [0, 0, 1, 1, 0, 1], "label": ["a", "a", "a", "a", "b", "b"]}
    assert removal("cue", "label", columns, values).changes.tolist() == [2, 2, -2, -2, 3, -3]
    assert removal("cue", None, columns, values).changes.tolist()[:2] == [pytest.approx(16 / 6 - 1 / 3)] * 2
    several = {**columns, "label": [[0, 1]] * 4 + [[1, 1]] * 2}
    assert removal("cue", "label", several, values).changes.tolist() == [2, 2, -2, -2, 3, -3]


def test_towards_the_highest_the_others_get_its_distribution_rank_by_rank() -> None:
    """Oracle: quantiles by hand; the highest value is found within each label, and its examples stay."""
    values = torch.tensor([4.0, 0.0, 2.0, 10.0, 12.0, 11.0, 5.0, 5.0, 1.0], dtype=torch.float64)
    columns: dict[str, Any] = {"cue": [0, 0, 0, 1, 1, 1, 0, 0, 1], "label": ["a"] * 6 + ["b"] * 3}
    wanted = removal("cue", "label", columns, values, "highest")
    # Of 10, 11 and 12 the quantiles at 1/6, 1/2 and 5/6, at places 1/3, 1 and 5/3 between them.
    moved = [12 - 1 / 3, 10 + 1 / 3, 11, 10, 12, 11, 5, 5, 5]
    assert (values + wanted.changes).tolist() == pytest.approx(moved)
    assert wanted.names == ["cue=0, label=a", "cue=1, label=a", "cue=0, label=b", "cue=1, label=b"]
    assert wanted.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_an_edit_towards_the_highest_moves_only_the_other_side(binary: Made) -> None:
    """Oracle: log-odds of each example's label by plain autograd's forward pass, before and after."""
    analyzer, data, pefs = binary
    signs = torch.tensor([2.0 * e["label"] - 1 for e in data], dtype=torch.float64)
    before = signs * log_odds(analyzer, data, 1)[0]
    pefs = pefs[:]
    one = signs > 0
    cue = torch.where(one, before > before[one].median(), before > before[~one].median())
    data = [{**example, "cue": bool(own)} for example, own in zip(data, cue, strict=True)]
    pefs.columns["cue"] = cue.tolist()
    direction = analyzer.edit(pefs, data, remove="cue", outcome="label", towards="highest", ridge=1e-6, iterations=2)
    with direction.applied_to(analyzer.model):
        after = signs * log_odds(analyzer, data, 1)[0]
    assert direction.info["towards"] == "highest" and len(direction.info["changes"]) == 4
    assert direction.info["outcome"] == "what the column 'label' names"
    for label in (one, ~one):
        gap, left = (float(values[label & cue].mean() - values[label & ~cue].mean()) for values in (before, after))
        assert gap > 0 and abs(left) < 0.5 * gap
        assert float((after - before)[label & cue].abs().mean()) < 0.3 * gap


@pytest.mark.parametrize("column", ["label", "wanted"])
def test_a_column_of_classes_moves_the_classes_of_these_names(column: str) -> None:
    """Oracle: plain autograd's forward pass. The data set numbers its classes in another order than the model."""
    analyzer, data, _ = made(num_labels=3, rank=2, id2label={0: "contradiction", 1: "neutral", 2: "entailment"})
    classes = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    rows = [{"id": e["id"], "input_ids": list(e["input_ids"]), column: 2 * (i % 2)} for i, e in enumerate(data)]
    dataset = datasets.Dataset.from_list(rows).cast_column(column, classes)
    pefs = analyzer.compute_pefs(dataset)
    before, after = [], []
    direction = analyzer.edit(pefs, dataset, change={"e2": 0.1, "e3": 0.1}, outcome=column, ridge=1e-4)
    for moved, scale in ((before, 0.0), (after, 1.0)):
        with direction.applied_to(analyzer.model) if scale else contextlib.nullcontext():
            moved += [float(log_odds(analyzer, data[i : i + 1], y)[0]) for i, y in ((2, 2), (3, 0))]
    for a, b in zip(before, after, strict=True):
        assert b - a == pytest.approx(0.1, rel=0.2)


def test_labels_that_count_from_one_are_no_outcomes(binary: Made) -> None:
    """Oracle: planted: 1 and 2 of a model with the classes 0 and 1; class 1 would be the second for one, 2 for none."""
    analyzer, data, pefs = binary
    pefs = pefs[:]
    pefs.columns["grade"] = [1 + e["label"] for e in data]
    with pytest.raises(ValueError, match=r"'grade'.*counted from 0"):
        analyzer.edit(pefs, data, change={"e1": 0.1}, outcome="grade")


# Steps


def test_an_edit_that_ends_early_says_so(binary: Made, caplog: pytest.LogCaptureFixture) -> None:
    """Where no further step does as predicted, what is reached stays, and people are told how many were taken."""
    analyzer, data, pefs = binary
    told = analyzer.edit(pefs, data, change={"e1": 3.0, "e6": -3.0}, ridge=1e-6, iterations=8).info
    ended = [record.args for record in warned_by(caplog, "models.edited_model")]
    assert [args[:2] for args in ended] == [(len(told["steps"]), 8)]  # type: ignore[index]


def test_a_ridge_of_cross_validation_that_the_model_refutes_is_raised(
    binary: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the edits with the same ridges given, of which all but the last are refused."""
    analyzer, data, pefs = binary
    change = {"e1": 30.0, "e6": -30.0}
    monkeypatch.setattr(edits, "_held_out_errors", lambda *_: {ridge: ridge for ridge in ridge_of.RIDGES})
    made_by_auto = analyzer.edit(pefs, data, change=change).info
    assert made_by_auto["refused_ridges"] and made_by_auto["refused_ridges"][0] == min(ridge_of.RIDGES)
    for ridge in made_by_auto["refused_ridges"]:
        with pytest.raises(edits.NoStepError):
            analyzer.edit(pefs, data, change=change, ridge=ridge)
    given = analyzer.edit(pefs, data, change=change, ridge=made_by_auto["ridge"]).info
    assert given["changes"] == made_by_auto["changes"] and given["refused_ridges"] == []
    realised = [given["changes"][name]["realised"] for name in change]
    assert given["reached"] == pytest.approx((realised[0] - realised[1]) / 60) and given["reached"] < 0.5
    told = [record.args for record in warned_by(caplog, "weights.editing")]
    assert [args[0] for args in told] == [100 * given["reached"]] * 2  # type: ignore[index]
    assert all("iterations=8" in args[-1] for args in told)  # type: ignore[index]


@pytest.mark.parametrize(
    ("steps", "iterations", "expressible", "disturbing", "named", "not_named"),
    [
        ([0.25], 1, 1.0, 0.5, {"iterations=8", "a larger ridge"}, {"smaller ridge", "rank"}),
        (
            [0.25],
            1,
            1.0,
            None,
            {"iterations=8"},
            {"ridge", "rank"},
        ),  # a cut step: a smaller ridge would make it longer still
        ([1.0] * 6, 6, 1.0, None, {"iterations=12", "ridge"}, {"rank"}),
        ([1.0, 1.0], 8, 0.6, None, {"a smaller ridge", "rank"}, {"iterations="}),  # it ended early
    ],
)
def test_what_to_try_is_what_was_not_tried(
    steps: list[float], iterations: int, expressible: float, disturbing: float | None, named: set[str],
    not_named: set[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Oracle: by hand, what can reach more after an edit with these steps."""
    info = {"reached": 0.1, "ridge": 1e-3, "steps": steps, "expressible": expressible, "disturbing": disturbing}
    warn_of_what_is_not_reached(info, iterations)
    (record,) = warned_by(caplog, "weights.editing")
    advice = record.getMessage().partition("Try ")[2]
    assert all(word in advice for word in named) and not any(word in advice for word in not_named)
    warn_of_what_is_not_reached({**info, "reached": 0.6}, iterations)
    assert len(warned_by(caplog, "weights.editing")) == 1


def test_iterations_come_nearer_to_what_is_wanted(binary: Made) -> None:
    """Oracle: realised changes against the wanted ones; the second solution starts at the new weights."""
    analyzer, data, pefs = binary
    change = {"e1": 1.5, "e6": -1.5}
    missed = []
    for iterations in (1, 3):
        told = analyzer.edit(pefs, data, change=change, ridge=1e-4, iterations=iterations).info
        missed.append(sum((t["realised"] - t["wanted"]) ** 2 for t in told["changes"].values()))
        assert 1 <= len(told["steps"]) <= iterations
    assert missed[1] < 0.5 * missed[0]


@pytest.mark.parametrize("outcome", ["king", "answer", " king", 1])
def test_a_likelier_spelling_of_an_outcome_is_warned_of(outcome: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: a tokenizer of two tokens, with and without a space, and planted probabilities of both."""
    tokens = {"king": 1, " king": 2}
    encode = {text: [number] for text, number in tokens.items()}
    naming = Naming({"answer": ["king"] * 3}, None, lambda text: encode[text])
    logits = [torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 5.0, 2.0]])]
    numbers = outcomes_of(outcome, naming, 3, Softmax, 3)
    warn_of_other_spelling(outcome, naming, numbers, Predictions(logits, Softmax))
    warned = warned_by(caplog, "weights.log_odds")
    if outcome in (" king", 1):  # the likelier one for most, and a token that is named by its number
        assert warned == []
        return
    (record,) = warned
    assert record.args is not None and record.args[:3] == (2, 3, "with") and record.args[-1] == " king"
    likely = logits[0].double().softmax(-1)[0]
    assert record.args[3] == pytest.approx(float(likely[1])) and record.args[5] == pytest.approx(float(likely[2]))


UNMOVED = Reach(moved=0.0, beside=0.0, others=None, limited=False)


def test_the_largest_step_that_does_what_was_predicted_is_taken() -> None:
    """Oracle: a response that saturates; the errors of the steps by hand."""
    wanted = changes_by_id({"a": 1.0}, ["a", "b"])
    predicted = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def shown(limit: float) -> Any:
        return lambda step: Shown(torch.tensor([min(step, limit), 0.0], dtype=torch.float64), UNMOVED)

    assert largest_step(wanted, predicted, shown(2.0)) == Length(1.0, {"0.25": 0, "0.5": 0, "1": 0})
    length = largest_step(wanted, predicted, shown(0.4))
    errors = {"0.25": 0, "0.5": pytest.approx(0.2), "1": pytest.approx(0.6)}
    assert length.step == 0.5 and length.errors == errors and length.disturbing is None
    with pytest.raises(ValueError, match=r"differs .*%.*ridge"):
        largest_step(wanted, predicted, lambda step: Shown(torch.tensor([-step, 0.0]), UNMOVED))


def test_a_step_that_moves_what_should_stay_the_same_further_is_refused() -> None:
    """Oracle: by hand, when KL of what stays is more than that of what moves, and more than a hundredth of a nat."""
    wanted = changes_by_id({"a": 1.0}, ["a", "b"])
    predicted = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def shown(others: float) -> Any:  # the KL of others grows with the fourth power of the step, that of "a" squared
        return lambda step: Shown(step * predicted, Reach(0.4 * step**2, 9.0, others * step**4, limited=False))

    assert largest_step(wanted, predicted, shown(0.3)) == Length(1.0, {"0.25": 0, "0.5": 0, "1": 0})
    assert largest_step(wanted, predicted, shown(1.5)) == Length(0.5, {"0.25": 0, "0.5": 0, "1": 0}, disturbing=1.0)
    with pytest.raises(NoStepError, match=r"leaves alone.*other examples is 0\.039 nats.*change is 0\.025.*to 0\.1"):
        largest_step(wanted, predicted, shown(10.0), ridge=0.01)
    small = Reach(moved=1e-4, beside=9e-3, others=8e-3, limited=True)
    assert not small.disturbs and replace(small, beside=0.02).disturbs
    assert not replace(small, beside=0.02, limited=False).disturbs and replace(small, others=0.02).disturbs


@pytest.mark.parametrize("kind", [Softmax, Bernoulli, Gaussian])
def test_the_kl_of_an_edit_has_a_part_of_its_outcome_and_a_part_beside_it(kind: type[Distribution]) -> None:
    """Oracle: torch.distributions, for two examples of two terms that move and one of a single term that stays."""
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(t, 4, generator=generator) for t in (2, 2, 1)]
    after = [logits + torch.randn(logits.shape, generator=generator) for logits in before]
    outcomes = [1, 3, 0]
    own, rest = [], []
    for y, *pair in zip(outcomes, before, after, strict=True):
        a, b = (logits.double() for logits in pair)
        without = [k for k in range(4) if k != y]
        if kind is Softmax:
            p, q = (D.Categorical(logits=logits).probs for logits in (a, b))
            outcome = D.kl_divergence(D.Bernoulli(p[:, y]), D.Bernoulli(q[:, y]))
            share = D.kl_divergence(D.Categorical(logits=a[:, without]), D.Categorical(logits=b[:, without]))
            beside = (1 - p[:, y]) * share
        else:
            each = {Bernoulli: lambda f: D.Bernoulli(logits=f), Gaussian: lambda f: D.Normal(f, 1.0)}[kind]
            parts = D.kl_divergence(each(a), each(b))
            outcome, beside = parts[:, y], parts[:, without].sum(-1)
        own.append(float(outcome.sum()))
        rest.append(float(beside.sum()))
    moving = torch.tensor([True, True, False])
    reach = Reach.of(Predictions(before, kind), Predictions(after, kind), outcomes, moving)
    assert reach.moved == pytest.approx((own[0] + own[1]) / 2) and reach.beside == pytest.approx(
        (rest[0] + rest[1]) / 2
    )
    assert reach.others == pytest.approx(own[2] + rest[2]) and reach.limited is (kind is not Softmax)
    assert Reach.of(Predictions(before, kind), Predictions(after, kind), outcomes, moving | True).others is None


def test_an_edit_keeps_its_length_in_files_and_adapters(binary: Made, tmp_path: Path) -> None:
    """Identities: it comes back from a folder as long as it was, a random one is as long, a full LoRA adds it."""
    analyzer, data, pefs = binary
    direction = analyzer.edit(pefs, data, change={"e1": 0.1}, ridge=1e-2)
    assert direction.norm != pytest.approx(1, rel=1e-2) and direction.info["natural_scale"] == 1
    direction.save_pretrained(tmp_path / "direction")
    again = ParameterDirection.load(tmp_path / "direction")
    direction.to_adapter(kind="delta").save_pretrained(tmp_path / "delta")
    for other in (again, ParameterDirection.load(tmp_path / "delta")):
        assert all(torch.allclose(other[name].double(), value.double(), rtol=1e-5) for name, value in direction.items())
    assert direction.random_like().norm == pytest.approx(direction.norm, rel=1e-5)
    name = next(iter(direction))
    lora = direction.to_adapter(rank=16)
    A, B = (
        next(v for k, v in lora.tensors.items() if name.removesuffix(".weight") in k and f"lora_{x}" in k) for x in "AB"
    )
    torch.testing.assert_close((B @ A).double(), direction[name].double(), rtol=1e-4, atol=1e-7)


def test_cotangents_write_gradients_of_log_odds_at_least_kl() -> None:
    """Identity: with V Vᵀ = S of a softmax, t_i = V e_y Δ: the logit of y moves, the others stay."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(0)
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
    V = (vectors * values.clamp_min(0).sqrt())[:, 1:].T
    y = 3
    u = torch.nn.functional.one_hot(torch.tensor(y), 5) - p.index_fill(0, torch.tensor([y]), 0) / (1 - p[y])
    functionals = Functionals.of(u[None, None].double(), V[None, :, None])
    assert float(functionals.expressed) == pytest.approx(1)
    torch.testing.assert_close(functionals.targets(torch.tensor([0.7]).double())[0], 0.7 * V[:, y])
    assert float(functionals.read(0.7 * V[None, :, y])) == pytest.approx(0.7)


# Bad input


def test_what_is_not_clear_is_refused_before_anything_is_computed(binary: Made) -> None:
    """Oracle: the errors that the documentation promises."""
    analyzer, data, pefs = binary
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "either"),
        ({"change": {"e1": 1.0}, "remove": "cue"}, "both"),
        ({"change": {}}, "at least one"),
        ({"change": {"e99": 1.0}}, "not among"),
        ({"change": {"e1": float("nan")}}, "finite"),
        ({"change": {"e1": 0.0}}, "all changes are 0"),
        ({"change": {"e1": 1.0}, "outcome": 2}, "does not exist"),
        ({"change": {"e1": 1.0}, "outcome": "elephant"}, "neither a class"),
        ({"remove": "colour"}, "no column"),
        ({"remove": "cue", "given": "topic"}, "no column"),
        ({"remove": "cue", "ridge": -1}, "ridge"),
        ({"remove": "cue", "iterations": 0}, "iterations"),
        ({"remove": "cue", "towards": "lowest"}, "towards"),
        ({"remove": "content_hash"}, "few values"),
    ]
    for settings, words in wrong:
        with pytest.raises(ValueError, match=words):
            analyzer.edit(pefs, data, **settings)
    with pytest.raises(ValueError, match="no influence to take out"):
        removal("cue", None, {"cue": [i % 3 for i in range(12)]}, torch.full((12,), 0.5, dtype=torch.float64), "mean")
    for columns, words in (({"cue": [1] * 12}, "a single value"), ({"cue": [None, 0] * 6}, "no value")):
        with pytest.raises(ValueError, match=words):
            removal("cue", None, columns, torch.zeros(12))
    scores = [i / 7 for i in range(12)]
    with pytest.raises(ValueError, match=r"12 values in 12 examples: give given=None"):
        removal("cue", "label", {"cue": [0, 1] * 6, "label": scores}, torch.arange(12.0))
    with pytest.raises(ValueError, match=r"'label'.*'cue'"):
        removal(
            "cue",
            "label",
            {"cue": [0, 1], "label": [0, 1]} | {"cue": [0, 0, 1, 1], "label": [0, 0, 1, 1]},
            torch.zeros(4),
        )
    with pytest.raises(ValueError, match="e0"):
        analyzer.edit(pefs, data[1:], change={"e1": 1.0})
    with pytest.raises(IncompatibleSketchError):
        analyzer.edit(pefs, data, remove="cue", keep=PEFs.from_factors(torch.randn(4, 2, 8)))
    with pytest.raises(ValueError, match="not made by hf_npeff"):
        analyzer.edit(PEFs.from_factors(torch.randn(4, 2, 8)), data, change={"0": 1.0})
    with pytest.raises(ValueError, match=r"%.*ridge"):
        analyzer.edit(pefs, data, change={"e1": 1e4}, ridge=1e-8)
    assert EditRequest(remove="cue").given == "label"


def test_pefs_to_keep_of_other_weights_are_refused(binary: Made) -> None:
    """Oracle: the error, for rows that the same model made before one of its numbers moved; whatever takes `keep`."""
    analyzer, data, pefs = binary
    other = [{"id": f"k{i}", **e} for i, e in enumerate(tiny_batch(analyzer.model, 4, seed=7))]
    weight = dict(analyzer.model.named_parameters())[analyzer.maps[0].parameter]
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-3
    try:
        kept = analyzer.compute_pefs(other, like=pefs)  # type: ignore[arg-type]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    found = analyzer.decompose(pefs, 3, n_restarts=1, max_iterations=3000, tolerance=1e-10, progress=False)
    for call in (
        lambda: analyzer.edit(pefs, data, remove="cue", keep=kept),
        lambda: analyzer.lift_examples(pefs, data, ["e1", "e2"], keep=kept),
        lambda: analyzer.lift(found, 0, pefs, data, selective=True, ridge=0.01, keep=kept),
    ):
        with pytest.raises(IncompatibleWeightsError, match="keep"):
            call()


def test_a_change_that_rows_hardly_express_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the share by least squares with one stored cotangent of a four-class softmax, in the warning too."""
    analyzer, data, pefs = made(num_labels=4, rank=1)
    with caplog.at_level(logging.WARNING, logger="hf_npeff"):
        shares = []
        for outcome in range(4):
            try:
                shares.append(
                    analyzer.edit(pefs, data, change={"e1": 0.01}, outcome=outcome, ridge=1e-2).info["expressible"]
                )
            except ValueError as error:
                assert "no step" in str(error)
    assert pefs.cotangents is not None
    v = pefs.cotangents[1, 0, 0].double()
    told = [record.getMessage() for record in caplog.records if "express" in record.getMessage()]
    assert told and all(0 < share < 1 for share in shares) and float(v.norm()) > 0


def test_models_that_point_at_places_are_refused() -> None:
    """Oracle: the error, for question answering."""
    model = tiny_model("bert", "question-answering")
    data = [{"id": f"e{i}", **e} for i, e in enumerate(tiny_batch(model, 4, seed=0))]
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="identity", target_modules=["query"]))
    pefs = analyzer.compute_pefs(data)
    with pytest.raises(UnsupportedModelError, match="input"):
        analyzer.edit(pefs, data, change={"e1": 1.0}, outcome=0)
