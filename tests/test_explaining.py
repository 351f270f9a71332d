"""What a change did: inner products by brute force, cosines by dense lifting, KL by the models' own predictions."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import (
    ChangeReport,
    CorruptStoreError,
    Decomposition,
    FisherConfig,
    IncompatibleWeightsError,
    NPEFFAnalyzer,
    ParameterDirection,
    PEFs,
    UnsupportedModelError,
)
from hf_npeff.fisher.distributions import Bernoulli, Distribution, Gaussian, Softmax
from hf_npeff.fisher.predictions import Predictions
from hf_npeff.weights.change_effects import (
    bootstrap_counts,
    cosine_p,
    growth,
    kl_p_values,
    one_after_another,
    random_kl,
    weighted_means,
)
from hf_npeff.weights.changed_groups import changed_groups, most_certain
from hf_npeff.weights.displacement import displacement
from hf_npeff.weights.row_products import Factors, random_change, row_products
from tests.analyses import analyzer_of, brute_force, in_parameters
from tests.tiny import WORDS, tiny_batch, tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"steps": (), "take_out": 0, "growth": False}


@cache
def world(balance: str = "none") -> tuple[NPEFFAnalyzer, PEFs, Decomposition, list[dict[str, Any]]]:
    """A tiny language model, texts, PEFs without a sketch and four components. Nothing of it may be changed."""
    model = tiny_model("gpt2", dtype=torch.float32)
    picked = torch.randint(0, len(WORDS), (36, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"text": " ".join(WORDS[j] for j in row), "odd": i % 2} for i, row in enumerate(picked)]
    analyzer = NPEFFAnalyzer(
        model, tiny_tokenizer(), fisher=FisherConfig(rank=4, sketch="identity", target_modules=".*mlp.*")
    )
    pefs = analyzer.compute_pefs(data, progress=False)
    return analyzer, pefs, analyzer.decompose(pefs, n_components=4, n_restarts=2, balance=balance, progress=False), data


def change_by(seed: int = 0, size: float = 0.3, names: str = "mlp") -> ParameterDirection:
    """A random change of the world's model."""
    analyzer = world()[0]
    after = copy.deepcopy(analyzer.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if names in name:
                parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return ParameterDirection.between(analyzer.model, after)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_products_are_those_of_the_rows_themselves(family: str) -> None:
    """Oracle: each example's unsketched rows by plain autograd, and their inner products with the change."""
    model = tiny_model(family)
    data = tiny_batch(model, 3, seed=5)
    analyzer = analyzer_of(model, rank=2)
    pefs = analyzer.compute_pefs(data)
    rows = in_parameters(analyzer, pefs)
    generator = torch.Generator().manual_seed(3)
    changes = [
        {m.parameter: torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in analyzer.maps[start:]}
        for start in (0, 1)
    ]
    assert pefs.cotangents is not None
    examples = list(analyzer.read(data))
    with analyzer.forward_pass() as forward:
        products = row_products(forward, examples, pefs.cotangents, changes, 2)
    for m, change in enumerate(changes):
        dense = [
            (each.as_weight(change[each.parameter]) if each.parameter in change else torch.zeros_like(
                model.get_parameter(each.parameter))).flatten()
            for each in analyzer.maps
        ]  # fmt: skip
        expected = rows @ torch.cat(dense)
        torch.testing.assert_close(products[..., m], expected, rtol=1e-6, atol=1e-9)
    exact = brute_force(analyzer, data)  # and the rows are those of the model: their Fisher is
    assert len(exact) == 3


def test_products_with_factors_are_those_with_their_product() -> None:
    """Oracle: BA formed, and given as a matrix; one parameter is in neither, one in one of the changes alone."""
    analyzer, pefs, _, data = world()
    generator = torch.Generator().manual_seed(4)
    first, second = analyzer.maps[:2]
    drawn = {
        m.parameter: Factors(*(torch.randn(s, generator=generator) for s in ((m.shape[0], 3), (3, m.shape[1]))))
        for m in (first, second)
    }
    dense = {name: factors.dense() for name, factors in drawn.items()}
    one = {first.parameter: drawn[first.parameter]}
    assert pefs.cotangents is not None
    with analyzer.forward_pass() as forward:
        changes = [drawn, dense, one, {first.parameter: dense[first.parameter]}]
        products = row_products(forward, list(analyzer.read(data)), pefs.cotangents, changes, 5)
    torch.testing.assert_close(products[..., 0], products[..., 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(products[..., 2], products[..., 3], rtol=1e-4, atol=1e-5)
    assert float((products[..., 0] - products[..., 2]).abs().max()) > 0.1


def test_a_random_change_has_the_norms_and_no_preferred_direction() -> None:
    """Oracle: a Gaussian's inner product with a unit vector, mean 0 and variance norm²/p: 600 draws, 4 standard errors.

    The vector is of rank 1, which is the farthest from a Gaussian.
    """
    u, v = (torch.nn.functional.normalize(torch.arange(1.0, n + 1), dim=0) for n in (40, 48))
    like, norms = {"large": torch.outer(u, v), "vector": u}, {"large": 3.0, "vector": 0.5}
    drawn = [random_change(like, norms, seed) for seed in range(600)]
    for name, unit in like.items():
        dense = [d[name].dense() if isinstance(d[name], Factors) else d[name] for d in drawn]
        along = torch.stack([(each * unit).sum() for each in dense]) * unit.numel() ** 0.5 / norms[name]
        lengths = torch.stack([each.norm() for each in dense])
        assert abs(float(along.mean())) < 4 / 600**0.5
        assert abs(float(along.square().mean()) - 1) < 4 * (2.4 / 600) ** 0.5
        assert float(lengths.square().mean().sqrt()) == pytest.approx(norms[name], rel=0.05)


def test_products_with_norms_are_those_of_autograd() -> None:
    """Oracle: the same rows without a sketch, where norms and biases are analysed too."""
    model = tiny_model("gpt2")
    data = tiny_batch(model, 2, seed=5)
    names = ["transformer.ln_f.weight", "transformer.h.0.ln_1.bias"]
    analyzer = analyzer_of(model, rank=2, target_modules=["c_fc"], parameters=names)
    pefs = analyzer.compute_pefs(data)
    blocks = pefs.sketch().blocks
    assert blocks is not None and pefs.cotangents is not None
    A = pefs.factors.double() * pefs.norms.sqrt()[:, None, None]
    change = {n: torch.randn(shape, dtype=torch.float64) for n, shape in analyzer.shapes.items()}
    expected = sum(A[..., blocks[n]] @ change[n].flatten() for n in change)
    with analyzer.forward_pass() as forward:
        products = row_products(forward, list(analyzer.read(data)), pefs.cotangents, [change], 2)
    torch.testing.assert_close(products[..., 0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("balance", ["none", "module"])
def test_cosines_are_those_of_the_lifted_components(balance: str) -> None:
    """Oracle: every component lifted densely, and the cosine of the two as vectors."""
    analyzer, pefs, decomposition, data = world(balance)
    change = change_by()
    report = analyzer.explain_change(decomposition, pefs, data, change, **QUICK)
    lifted = analyzer.lift(decomposition, range(4), pefs, data, selective=False, form="plain")
    for each in report.components:
        direction = lifted[each.component]
        inner = sum(float((direction[n] * change[n]).sum()) for n in direction)
        norm = sum(float(change[n].square().sum()) for n in direction) ** 0.5
        assert each.cosine == pytest.approx(abs(inner) / norm / direction.norm, abs=1e-4)


def test_the_kl_of_every_example_is_that_of_both_models() -> None:
    """Oracle: both models run by transformers, one text at a time, and the softmax's KL written out."""
    analyzer, pefs, decomposition, data = world()
    change = change_by(names="c_")  # attention too: the analysis covers less than what changed
    after = copy.deepcopy(analyzer.model)
    with torch.no_grad():
        for name, delta in change.items():
            after.get_parameter(name).add_(delta)
    report = analyzer.explain_change(decomposition, pefs, data, change, **QUICK)
    for i in (0, 7, 20):
        ids = torch.tensor([tiny_tokenizer()(data[i]["text"])["input_ids"]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (analyzer.model, after))
        assert report.kl[i] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert report.outside and set(report.outside).isdisjoint(analyzer.shapes)
    assert any("outside the analysis" in note for note in report.notes)
    W = decomposition.coefficients.double()
    kl = torch.tensor(report.kl, dtype=torch.float64)
    for each in report.components:
        assert each.kl == pytest.approx(float((W[:, each.component] * kl).sum() / W[:, each.component].sum()))
        assert each.kl_interval is not None and each.kl_interval[0] <= each.kl <= each.kl_interval[1]


def test_a_small_changes_kl_is_what_the_rows_predict() -> None:
    """Oracle: ½ Σ_c ⟨A_ic, Δ⟩² of exact rows against the measured KL, to second order."""
    analyzer, _, _, data = world()
    exact = analyzer.with_fisher(FisherConfig(sketch="identity", output_factor="exact", target_modules=".*mlp.*"))
    pefs = exact.compute_pefs(data, progress=False)
    decomposition = exact.decompose(pefs, n_components=2, n_restarts=1, progress=False)
    report = exact.explain_change(decomposition, pefs, data, change_by(size=0.003, names="mlp.c_fc.weight"), **QUICK)
    measured, predicted = (torch.tensor(x, dtype=torch.float64) for x in (report.kl, report.predicted))
    assert float((measured - predicted).norm() / measured.norm()) < 0.05
    assert report.notes == []


def test_the_component_that_was_moved_comes_first_and_without_it_nothing_is_left() -> None:
    """Oracle: a change along one lifted component has a cosine of 1 with it; taken out, the model is as before."""
    analyzer, pefs, decomposition, data = world()
    for j in range(4):
        change = 0.5 * analyzer.lift(decomposition, j, pefs, data, selective=False, form="plain")
        report = analyzer.explain_change(decomposition, pefs, data, change, growth=False, steps=(0.5,), take_out=[j])
        best = max(report.components, key=lambda each: each.cosine or 0)
        assert best.component == j and best.cosine == pytest.approx(1, abs=1e-5) and (best.cosine_p or 0) < 1e-3
        assert [step.scale for step in report.curve] == [0, 0.5, 1] and report.curve[0].kl == 0
        assert 0 < report.curve[1].kl < report.curve[2].kl
        assert report.without[0].without == j and report.without[0].kl < 1e-6 * report.curve[2].kl


def test_the_order_of_the_data_changes_nothing_and_a_component_that_is_not_there_is_refused_first() -> None:
    """Oracle: the data in the order of the PEFs; components counted from the end are those from the start."""
    analyzer, pefs, decomposition, data = world()
    change, settings = change_by(), {"steps": (), "growth": False, "by": "odd", "draws": 20}
    straight, turned = (
        analyzer.explain_change(decomposition, pefs, rows, change, take_out=wanted, **settings)
        for rows, wanted in ((data, [1, 3]), (data[::-1], [1, -1]))
    )
    assert turned.to_dict() == straight.to_dict() and [step.without for step in turned.without] == [1, 3]

    def runs(*_: Any) -> None:
        raise AssertionError("the model runs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParameterDirection, "applied_to", runs)
        with pytest.raises(IndexError, match="4"):
            analyzer.explain_change(decomposition, pefs, data, change, take_out=[4], **settings)


def test_a_random_change_ranks_nothing() -> None:
    """Oracle: p-values of random changes are uniform: 120 changes of one component each, so that the share below .1
    and below .5 is within 3 standard deviations (.027 and .046 each), and so for the cosines'."""
    analyzer, pefs, decomposition, data = world()
    change = change_by()
    null = random_kl(pefs, 199, 0)
    assert pefs.cotangents is not None
    examples = analyzer.examples_of(decomposition, data, pefs)
    rows = in_parameters(analyzer, pefs).double()
    p_kl, p_cosine = [], []
    for seed in range(120):
        tau = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
        kl = (rows @ tau).square().sum(1) / 2
        p, _ = kl_p_values(decomposition.coefficients, kl, null)
        p_kl.append(p[seed % 4])
    for seed in range(12):
        random = change.random_like(seed)
        report = analyzer.explain_change(decomposition, pefs, data, 0.01 * random, **QUICK, draws=20)
        p_cosine += [each.cosine_p or 0.0 for each in report.components]
    assert len(examples) == 36
    for values in (p_kl, p_cosine):
        for level in (0.1, 0.5):
            share = sum(v <= level for v in values) / len(values)
            assert abs(share - level) < 3 * (level * (1 - level) / len(values)) ** 0.5 + 0.01, (level, share)


def test_the_p_value_of_a_cosine_is_students() -> None:
    """Oracle: scipy's distribution of t with 4 degrees of freedom."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for t in (0.0, 0.3, 1.0, 2.5, 8.0):
        assert cosine_p(t, [1.0, -1.0, 1.0, 1.0]) == pytest.approx(2 * stats.t.sf(t, 4), abs=1e-12)


def test_what_became_of_planted_coefficients() -> None:
    """Oracle: coefficients that double, halve, begin, end and stay with noise."""
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(200, 5, generator=generator)
    after = before.clone()
    after[:, 0] *= 2
    after[:, 1] /= 2
    before[:, 2], after[:, 3] = 0.0, 0.0
    noise = torch.randn(200, generator=generator)
    after[:, 4] += 0.01 * (noise - noise.mean())
    kinds, intervals = growth(before, after, bootstrap_counts(200, 0))
    assert kinds == ["grew", "shrank", "appeared", "vanished", "stayed"]
    assert intervals[0][0] < float((after - before)[:, 0].mean()) < intervals[0][1]
    assert weighted_means(before, torch.ones(200)).tolist() == pytest.approx([1, 1, 0, 1, 1])


def test_growth_is_that_of_pefs_of_the_changed_model() -> None:
    """Oracle: PEFs of a copy with the changed weights, and their coefficients; the model is handed back."""
    analyzer, pefs, decomposition, data = world()
    change = change_by(seed=4, size=0.5)
    before = {name: value.clone() for name, value in analyzer.model.state_dict().items()}
    report = analyzer.explain_change(decomposition, pefs, data, change, steps=(), take_out=0, n_new=2)
    assert all(torch.equal(value, before[name]) for name, value in analyzer.model.state_dict().items())
    after = copy.deepcopy(analyzer.model)
    with torch.no_grad():
        for name, delta in change.items():
            after.get_parameter(name).add_(delta)
    other = NPEFFAnalyzer(after, tiny_tokenizer()).compute_pefs(data, like=decomposition, progress=False)
    W = decomposition.transform(other, check_weights=False)
    own = [each for each in report.components if not each.new]
    for each in own:
        assert each.after == pytest.approx(float(W[:, each.component].mean()), rel=1e-3, abs=1e-5)
    added = [each for each in report.components if each.new]
    assert [each.component for each in added] == [4, 5] and all(each.kl is None and each.top for each in added)
    assert report.explained is not None and 0 < report.explained[1] < 1


def test_answers_that_changed_and_groups_are_counted() -> None:
    """Oracle: predictions of both models, and the column's groups; a classifier's accuracy by hand."""
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    data = [{**row, "label": i % 3, "cue": i % 2} for i, row in enumerate(tiny_batch(model, 24, seed=2))]
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(sketch="identity", target_modules=["query", "dense"]))
    pefs = analyzer.compute_pefs(data, progress=False)
    decomposition = analyzer.decompose(pefs, n_components=3, n_restarts=1, progress=False)
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.bert.encoder.layer[0].intermediate.dense.weight.mul_(-1)
    change = ParameterDirection.between(model, after)
    report = analyzer.explain_change(decomposition, pefs, data, change, by="cue", growth=False, take_out=0)

    def answers(which: Any) -> list[int]:
        with torch.no_grad():
            return [int(which(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) for row in data]

    old, new = answers(model), answers(after)
    assert sorted(row["index"] for row in report.changed) == [i for i in range(24) if old[i] != new[i]]
    last = report.curve[-1]
    right = [a == row["label"] for a, row in zip(new, data, strict=True)]
    assert last.accuracy["all"] == pytest.approx(sum(right) / 24)
    assert last.accuracy["cue=1"] == pytest.approx(sum(right[1::2]) / 12) and last.n["cue=1"] == 12
    assert report.by == "cue" and last.flips == len(report.changed) / 24


def test_blocks_below_the_change_run_once_and_the_way_is_that_of_the_models() -> None:
    """Oracle: the model with half of the change run one text at a time; calls of each block are counted."""
    analyzer, pefs, decomposition, data = world()
    change = change_by(names="h.1.mlp")
    calls = [0, 0]

    def count(block: int) -> Any:
        def seen(*_: Any) -> None:
            calls[block] += 1

        return seen

    model = analyzer.model
    handles = [model.transformer.h[k].attn.register_forward_hook(count(k)) for k in (0, 1)]
    try:
        report = analyzer.explain_change(
            decomposition, pefs, data, change, steps=(0.25, 0.5, 0.75), take_out=0, growth=False
        )
    finally:
        for handle in handles:
            handle.remove()
    assert calls[0] < calls[1]
    half = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in change.items():
            half.get_parameter(name).add_(0.5 * delta)
    kl = []
    for row in data:
        ids = torch.tensor([tiny_tokenizer()(row["text"])["input_ids"]])
        with torch.no_grad():
            p, q = (each(ids).logits[0, -1].double().log_softmax(-1) for each in (model, half))
        kl.append(float((p.exp() * (p - q)).sum()))
    assert report.curve[2].scale == 0.5 and report.curve[2].kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)


def test_two_components_of_one_behaviour_do_not_stand_before_another_one() -> None:
    """Planted: components 0 and 2 share the examples that changed most, 1 has others. Oracle: sums by loops."""
    W = torch.tensor([[1.0, 0.0, 0.9], [0.8, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.1]])
    kl = torch.tensor([5.0, 4.8, 3.0, 2.5], dtype=torch.float64)
    assert weighted_means(W, kl).argsort(descending=True).tolist() == [0, 2, 1]
    order = one_after_another(W, kl)
    assert [j for j, _ in order] == [0, 1, 2]
    left, taken = kl.tolist(), []
    for j, mean in order:
        w = W[:, j].double().tolist()
        assert mean == pytest.approx(sum(a * b for a, b in zip(w, left, strict=True)) / sum(w))
        taken.append(j)
        left = [
            k * (1 - sum(float(row[t]) for t in taken) / float(row.sum()))
            for k, row in zip(kl.tolist(), W, strict=True)
        ]
    assert left == pytest.approx([0.0] * 4, abs=1e-6)


def test_the_ends_of_the_direction_are_told_apart_where_kl_is_alike() -> None:
    """Planted: half of the examples have a cue and move from class 0 to class 2, the others back.

    Oracle: KL is the same for all, so its quarter knows nothing; the direction has every example on its cue's side, and
    the same scores as the eigenvector of all inner products.
    """
    generator = torch.Generator().manual_seed(0)
    n, cue = 60, torch.arange(60) % 2 == 0
    step = torch.tensor([[-0.4, 0.0, 0.4]])
    noise = 0.02 * torch.randn(n, 3, generator=generator)
    before = torch.zeros(n, 3)
    after = before + torch.where(cue[:, None], step, -step) + noise
    a, b = (Predictions([row[None] for row in z], Softmax) for z in (before, after))
    moved = displacement(a, b)
    assert moved is not None and {moved.rises, moved.falls} == {0, 2}
    sign = 1 if moved.rises == 2 else -1
    assert torch.equal(sign * moved.scores > 0, cue)
    centred = (after - before - (after - before).mean(0)).double()
    S = torch.eye(3, dtype=torch.float64) / 3 - torch.full((3, 3), 1 / 9, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(centred @ S @ centred.T)
    expected = vectors[:, -1] * values[-1].sqrt()
    expected *= (expected @ moved.scores).sign()
    torch.testing.assert_close(moved.scores, expected, rtol=1e-3, atol=1e-5)
    assert moved.share == pytest.approx(float(values[-1] / values.sum()), rel=1e-3)

    texts = [f"{'zebra ' if here else ''}{WORDS[i % 7]} {WORDS[i % 5]}" for i, here in enumerate(cue.tolist())]
    info = {"text_columns": ["text"]}
    groups = changed_groups(
        a.kl_to(b), torch.ones(n), moved, lambda outcome, sign: f"towards {outcome}", {"text": texts}, info, 0
    )
    assert [group.name for group in groups[1:3]] == [f"towards {moved.rises}", f"towards {moved.falls}"]
    assert all("zebra" not in each.feature for each in groups[0].associations)
    assert "zebra" in most_certain(groups)[0].feature and groups[1].examples == 15


def test_outcomes_of_one_examples_own_have_no_direction_in_common() -> None:
    """A place in a text is another outcome in every text; and where all moved alike, no direction is first."""
    before = [torch.zeros(1, 3), torch.zeros(1, 4)]
    assert displacement(Predictions(before, Softmax), Predictions(before, Softmax)) is None
    alike = [torch.zeros(1, 3)] * 4
    assert (
        displacement(Predictions(alike, Softmax), Predictions([z + torch.arange(3.0) for z in alike], Softmax)) is None
    )


@pytest.mark.parametrize("kind", [Softmax, Bernoulli, Gaussian])
def test_an_averaged_distribution_expects_the_mean_of_all_expectations(kind: type[Distribution]) -> None:
    """Oracle: expectations of every term, by their formulas, and their mean."""
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(t, 3, generator=generator) for t in (1, 4, 2)]
    expect = {Softmax: lambda z: z.softmax(-1), Bernoulli: torch.sigmoid, Gaussian: lambda z: z}[kind]
    averaged = kind.averaged(logits).logits
    torch.testing.assert_close(expect(averaged), expect(torch.cat(logits)).mean(0, keepdim=True))


def test_reports_are_kept_with_and_without_texts(tmp_path: Path) -> None:
    """Oracle: what comes back is equal; without texts none of their words is in the file."""
    analyzer, pefs, decomposition, data = world()
    report = analyzer.explain_change(decomposition, pefs, data, change_by(size=0.6), **QUICK)
    assert report.changed and report.changed[0]["text"] in {row["text"] for row in data}
    report.save(tmp_path / "with")
    assert ChangeReport.load(tmp_path / "with") == report
    assert "KL" in repr(report) and "<table" in report._repr_html_()
    report.save(tmp_path / "without", texts=False)
    content = (tmp_path / "without" / "change.json").read_text()
    assert not any(row["text"] in content for row in data)
    values = json.loads(content)
    for broken in (
        {**values, "kl": values["kl"][1:]},
        {**values, "components": [{"component": 0}]},
        {**values, "x": 1},
    ):
        (tmp_path / "without" / "change.json").write_text(json.dumps(broken))
        with pytest.raises(CorruptStoreError, match=r"change\.json"):
            ChangeReport.load(tmp_path / "without")


def test_an_adapter_is_explained_as_its_direction() -> None:
    """Oracle: the report of the direction that the adapter holds; one of other weights is refused."""
    analyzer, pefs, decomposition, data = world()
    lifted = analyzer.lift(decomposition, 1, pefs, data, selective=False)
    adapter = lifted.to_adapter(rank=16, scale=0.3)
    report = analyzer.explain_change(decomposition, pefs, data, adapter, **QUICK)
    again = analyzer.explain_change(decomposition, pefs, data, 0.3 * lifted, **QUICK)
    assert report.kl == pytest.approx(again.kl, rel=1e-3, abs=1e-7)
    assert adapter.weights is not None
    elsewhere = dataclasses.replace(adapter, weights="0" * len(adapter.weights))
    with pytest.raises(IncompatibleWeightsError, match="000"):
        analyzer.explain_change(decomposition, pefs, data, elsewhere, **QUICK)
    analyzer.explain_change(decomposition, pefs, data, elsewhere, check_weights=False, **QUICK)


def test_what_cannot_be_explained_is_refused() -> None:
    """Oracle: the error's class, and what it names."""
    analyzer, pefs, decomposition, data = world()
    change = change_by()

    def explain(what: Any = change, of: NPEFFAnalyzer = analyzer, **settings: Any) -> None:
        of.explain_change(decomposition, pefs, data, what, **{**QUICK, **settings})

    other = NPEFFAnalyzer(tiny_model("gpt2", dtype=torch.float32, seed=1), tiny_tokenizer())
    with pytest.raises(IncompatibleWeightsError, match="other weights"):
        explain(of=other)
    elsewhere = copy.deepcopy(change)
    elsewhere.info["weights"] = other.weights()
    with pytest.raises(IncompatibleWeightsError, match="check_weights=False"):
        explain(elsewhere)
    explain(elsewhere, check_weights=False)
    with pytest.raises(ValueError, match=r"\['[\w.]+'"):
        explain(ParameterDirection({"nothing.weight": torch.ones(2, 2)}, {"nothing.weight": "linear"}))
    name = "transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(ValueError, match=r"different shapes.*c_fc"):
        explain(ParameterDirection({name: torch.ones(2, 2)}, {name: "conv1d"}))
    with pytest.raises(ValueError, match="is analysed"):
        explain(change_by(names="ln_f"))
    with pytest.raises(ValueError, match="not a column"):
        explain(by="nothing")
    with pytest.raises(ValueError, match="draws"):
        explain(draws=3)
    quantised = NPEFFAnalyzer(copy.deepcopy(analyzer.model), tiny_tokenizer(), fisher=analyzer.fisher)
    weight = torch.nn.Parameter(quantised.model.get_parameter(name).detach().to("meta"))
    quantised.model.transformer.h[0].mlp.c_fc.weight = weight
    with pytest.raises(UnsupportedModelError, match="growth=False"):
        explain(of=quantised, growth=True, check_weights=False)
