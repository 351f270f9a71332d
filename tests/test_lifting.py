"""From components to directions in the parameters, against dense oracles and a decomposition without a sketch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hf_npeff import (
    FisherConfig,
    IncompatibleSketchError,
    IncompatibleWeightsError,
    NPEFFAnalyzer,
    ParameterDirection,
    PEFs,
)
from hf_npeff.config import LiftRequest
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.weights.compressed_sensing import fista, flat_operator, iterative_hard_thresholding
from hf_npeff.weights.exact_lifting import _rows_are_cheaper, lift_exact
from hf_npeff.weights.lifting import combination, semi_orthogonal
from tests import reference
from tests.tiny import tiny_batch, tiny_model
from tests.trigger_words import TrainedCase, continued

METHODS = ("exact", "adjoint", "iht", "fista")


@pytest.fixture(scope="module")
def tiny_case() -> tuple[NPEFFAnalyzer, list[Any], PEFs]:
    """A tiny BERT in float64 whose PEFs are not sketched, biases and norms among them."""
    model = tiny_model("bert")
    data = [{"id": f"e{i}", **e} for i, e in enumerate(tiny_batch(model, 14, seed=0))]
    fisher = FisherConfig(rank=2, sketch="identity", storage_dtype="float64", parameters=r".*(bias|LayerNorm.weight)")
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    return analyzer, data, analyzer.compute_pefs(data)


def fit(analyzer: NPEFFAnalyzer, pefs: PEFs, r: int = 3, **settings: Any) -> Any:
    return analyzer.decompose(
        pefs, r, **{"n_restarts": 3, "max_iterations": 3000, "tolerance": 1e-10, "progress": False, **settings}
    )


def as_row(analyzer: NPEFFAnalyzer, direction: ParameterDirection, pefs: PEFs) -> Tensor:
    """A direction laid out as the rows of an identity sketch are: (p,)."""
    maps = {m.parameter: m for m in analyzer.maps}
    parts = [maps[n].as_matrix(direction[n]) if n in maps else direction[n] for n in pefs.sketch().shapes]
    return torch.cat([p.double().flatten() for p in parts])


def cosines(found: TrainedCase, truth: dict[str, Tensor]) -> dict[str, list[float]]:
    """{method: |cosine| of every component to the truth}; ĝ and −ĝ are one component."""
    wanted = list(range(len(found.decomposition)))
    result = {}
    for method in METHODS:
        solver = method if method in ("iht", "fista") else "iht"
        how = "compressed_sensing" if method in ("iht", "fista") else method
        lifted = found.analyzer.lift(
            found.decomposition,
            wanted,
            found.pefs,
            found.data,
            method=how,
            solver=solver,  # type: ignore[arg-type]
            selective=False,
        )
        result[method] = [
            abs(d.cosine({name: truth[name][j] for name in d})) for j, d in zip(wanted, lifted, strict=True)
        ]
    return result


def table(measured: dict[str, list[float]]) -> str:
    """Median and minimum of every method."""
    lines = ["method   median  minimum"]
    for method, values in measured.items():
        lines.append(f"{method:8} {float(torch.tensor(values).median()):.4f}   {min(values):.4f}")
    return "\n".join(lines)


# Exact lifting


def test_exact_lifting_equals_the_dense_combination_of_rows(tiny_case: tuple[NPEFFAnalyzer, list[Any], PEFs]) -> None:
    """Oracle: reference.lift on the stored rows, biases and norms included; cosine ≥ 1 − 1e-9."""
    analyzer, data, pefs = tiny_case
    found = fit(analyzer, pefs)
    truth = reference.lift(pefs.factors, pefs.factors, found.coefficients, found.pseudo_fishers)
    lifted = analyzer.lift(found, [0, 1, 2], pefs, data, batch_size=4, selective=False)
    for j, direction in enumerate(lifted):
        assert float(cosine_similarity(as_row(analyzer, direction, pefs), truth[j], dim=0)) > 1 - 1e-9
        assert direction.norm == pytest.approx(1, abs=1e-6)
        assert any("LayerNorm" in name for name in direction) and any(name.endswith("bias") for name in direction)


def test_the_combination_is_the_oracles(tiny_case: tuple[NPEFFAnalyzer, list[Any], PEFs]) -> None:
    """Oracle: reference.lifting_coefficients, divided by the square root of each PEF's norm."""
    analyzer, _, pefs = tiny_case
    found = fit(analyzer, pefs)
    coefficients, at_hand = combination(found, pefs)
    truth = reference.lifting_coefficients(pefs.factors, found.coefficients, found.pseudo_fishers)
    torch.testing.assert_close(coefficients, truth / pefs.norms.double().sqrt()[None, :, None], rtol=1e-5, atol=1e-9)
    assert at_hand.min() > 0.9999


def test_exact_lifting_of_a_trained_model_is_nearly_the_unsketched_component(
    trained_case: TrainedCase, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the decomposition continued without a sketch from the same coefficients, by dense eigenproblems."""
    shapes = trained_case.pefs.sketch().shapes.values()
    analysed = sum(a * b for a, b in shapes)
    assert analysed >= 50_000 and analysed >= 50 * trained_case.pefs.dim
    measured = cosines(trained_case, continued(trained_case))
    with capsys.disabled():
        print(f"\n{table(measured)}")
    exact = torch.tensor(measured["exact"])
    assert exact.median() >= 0.995 and exact.min() >= 0.97
    assert max(max(measured[method]) for method in ("adjoint", "iht", "fista")) < 0.5


def test_the_sketch_of_an_exactly_lifted_direction_is_the_component(trained_case: TrainedCase) -> None:
    """Oracle: the sketch applied to the direction; cosine ≥ 0.999 with g, as it reports itself."""
    c = trained_case
    for j, direction in enumerate(c.analyzer.lift(c.decomposition, [0, 3, 5], c.pefs, c.data, selective=False)):
        g = c.decomposition[[0, 3, 5][j]].pseudo_fisher
        again = c.pefs.sketch().apply({n: direction[n] for n in c.pefs.sketch().shapes})
        cosine = float(cosine_similarity(again, g, dim=0))
        assert cosine >= 0.999
        assert direction.info["estimated_cosine"] == pytest.approx(cosine, abs=1e-5)


def test_components_share_the_forward_pass_and_are_those_lifted_alone(trained_case: TrainedCase) -> None:
    """Oracle: single lifts, and a count of the model's forward calls, without those that compare predictions first."""
    c = trained_case
    calls: list[int] = []
    settings: dict[str, Any] = {"selective": False, "check_weights": False}
    handle = c.analyzer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        single = [c.analyzer.lift(c.decomposition, j, c.pefs, c.data, **settings) for j in (1, 2)]
        alone = len(calls) // 2
        calls.clear()
        together = c.analyzer.lift(c.decomposition, [1, 2], c.pefs, c.data, **settings)
    finally:
        handle.remove()
    assert len(calls) == alone == len(c.data) // 8
    for one, other in zip(single, together, strict=True):
        assert one.cosine(other) > 1 - 1e-6


def test_lifting_a_few_at_a_time_is_lifting_together(tiny_case: tuple[NPEFFAnalyzer, list[Any], PEFs]) -> None:
    """Identity of `lift_each` with `lift`, in the order asked for; more components than share passes."""
    analyzer, examples, pefs = tiny_case
    decomposition = fit(analyzer, pefs, 5)
    wanted = [4, 0, 2, 1, 3]
    each = list(analyzer.lift_each(decomposition, wanted, pefs, examples, selective=False))
    assert [j for j, _ in each] == wanted
    together = analyzer.lift(decomposition, wanted, pefs, examples, selective=False)
    assert all(one.cosine(other) == pytest.approx(1, abs=1e-5) for (_, one), other in zip(each, together, strict=True))


def test_top_examples_lift_from_a_few_and_report_the_share_of_the_weight(trained_case: TrainedCase) -> None:
    """Oracle: Σ coef² of unit rows over the examples with the largest W, from reference.lifting_coefficients."""
    c = trained_case
    d = c.decomposition
    coefficients = reference.lifting_coefficients(c.pefs.factors, d.coefficients, d.pseudo_fishers)
    energy = coefficients.square().sum(2)
    order = d.coefficients[:, 0].argsort(descending=True)
    whole = c.analyzer.lift(d, 0, c.pefs, c.data, selective=False)
    before = 0.0
    for k in (4, 20, 80):
        few = c.analyzer.lift(d, 0, c.pefs, c.data, top_examples=k)
        share = float(energy[0, order[:k]].sum() / energy[0].sum())
        assert few.info["weight_share"] == pytest.approx(share, rel=1e-3)
        assert few.info["top_examples"] == k and share > before
        before = share
    assert few.cosine(whole) > 1 - 1e-6 and before == pytest.approx(1)


@pytest.mark.parametrize("kind", ["kronecker", "identity"])
def test_balanced_components_lift_in_both_forms(kind: Any) -> None:
    """Oracle: D times the sketch of the plain form is g; the metric form is the plain one times D² in every module."""
    model = tiny_model("bert", dtype=torch.float32)
    data = tiny_batch(model, 20, seed=1)
    analyzer = NPEFFAnalyzer(
        model, fisher=FisherConfig(rank=2, sketch=kind, sketch_dim=8 if kind != "identity" else None)
    )
    pefs = analyzer.compute_pefs(data)
    found = fit(analyzer, pefs, balance="module")
    sketch, D = pefs.sketch(), found.scales
    assert D is not None and sketch.blocks is not None
    plain = analyzer.lift(found, 0, pefs, data, form="plain", selective=False)
    metric = analyzer.lift(found, 0, pefs, data, selective=False)
    g = found[0].pseudo_fisher
    assert float(cosine_similarity(sketch.apply({n: plain[n] for n in sketch.shapes}) * D, g, dim=0)) > 0.999
    assert plain.info["form"] == "plain" and metric.info["form"] == "metric"
    expected = {n: plain[n] * D[sketch.blocks[n].start] ** 2 for n in sketch.shapes}
    assert metric.cosine(expected) > 1 - 1e-5


def test_semi_orthogonal_lifting_takes_out_the_components_nearly_orthogonal_to_it(trained_case: TrainedCase) -> None:
    """Oracle: the projection of g on the others by dense least squares; the sketch is orthogonal to them."""
    c = trained_case
    G = c.decomposition.pseudo_fishers.double()
    others = [l for l in range(1, len(G)) if abs(float(G[l] @ G[0])) < 0.3]
    assert others
    Q, _ = torch.linalg.qr(G[others].T)
    truth = G[0] - Q @ (Q.T @ G[0])
    torch.testing.assert_close(semi_orthogonal(c.decomposition, 0) @ G, truth, rtol=1e-6, atol=1e-8)
    direction = c.analyzer.lift(c.decomposition, 0, c.pefs, c.data, semi_orthogonal=True)
    again = c.pefs.sketch().apply({n: direction[n] for n in c.pefs.sketch().shapes}).double()
    assert float(cosine_similarity(again, truth, dim=0)) > 0.999
    assert (G[others] @ again / again.norm()).abs().max() < 0.01


# Compressed sensing


ADDING = ("countsketch", "two-stage")


@pytest.mark.parametrize("solver", ["iht", "fista"])
@pytest.mark.parametrize(("kind", "dim", "side"), [("kronecker", 40, 64), ("two-stage", 1024, 160)])
def test_compressed_sensing_recovers_a_sparse_direction(solver: str, kind: Any, dim: int, side: int) -> None:
    """Oracle: the planted direction of 12 entries; its support and cosine ≥ 0.99.

    Sides that are rotations spread an entry over many numbers, as theory wants. A countsketch alone, or after folded
    sides, does not: all entries of a bucket look the same, and lifting warns.
    """
    sketch = Sketch({"a": (side, side), "b": (side // 2, side)}, kind, dim, seed=3, sides="rotated")
    assert not sketch.adds_entries and all(Sketch(sketch.shapes, k, dim).adds_entries for k in ADDING)  # type: ignore[arg-type]
    operator, unflatten = flat_operator(sketch)
    generator = torch.Generator().manual_seed(0)
    p = side * side * 3 // 2
    truth = torch.zeros(p)
    support = torch.randperm(p, generator=generator)[:12]
    truth[support] = torch.randn(12, generator=generator).sign() * (1 + torch.rand(12, generator=generator))
    y = sketch.apply(unflatten(truth))
    if solver == "iht":
        x = iterative_hard_thresholding(operator, y, p, 12)
    else:
        x = fista(operator, y, p, iterations=500)
    assert set(x.abs().topk(12).indices.tolist()) == set(support.tolist())
    assert float(cosine_similarity(x, truth, dim=0)) >= 0.99


# Bad input


def test_lifting_refuses_what_does_not_belong_together(
    trained_case: TrainedCase, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the errors that the documentation promises; a dataset in another order is realigned by id."""
    c = trained_case
    d = c.decomposition
    for missing in (6, -7):
        with pytest.raises(IndexError, match="6"):
            c.analyzer.lift(d, missing, c.pefs, c.data, selective=False)
    with pytest.raises(ValueError, match="components"):
        c.analyzer.lift(d, [], c.pefs, c.data, selective=False)
    shuffled = c.analyzer.lift(d, 0, c.pefs, c.data[::-1], selective=False)
    assert shuffled.cosine(c.analyzer.lift(d, 0, c.pefs, c.data, selective=False)) > 1 - 1e-6
    with pytest.raises(ValueError, match="'e0'"):
        c.analyzer.lift(d, 0, c.pefs, c.data[1:], selective=False)
    changed = [{**c.data[0], "input_ids": c.data[1]["input_ids"]}, *c.data[1:]]
    with pytest.raises(ValueError, match="'e0'"):
        c.analyzer.lift(d, 0, c.pefs, changed, selective=False)
    rough = c.analyzer.decompose(c.pefs, 6, n_restarts=1, max_iterations=1, progress=False)
    rough.pseudo_fishers = torch.nn.functional.normalize(torch.randn(rough.pseudo_fishers.shape), dim=1)
    with pytest.raises(ValueError, match=r"\[0\].*tolerance"):
        c.analyzer.lift(rough, 0, c.pefs, c.data, selective=False)
    other = NPEFFAnalyzer(c.analyzer.model, fisher=FisherConfig(rank=2, sketch="countsketch", sketch_dim=512))
    with pytest.raises(IncompatibleSketchError):
        c.analyzer.lift(d, 0, other.compute_pefs(c.data), c.data, selective=False)
    with pytest.raises(IncompatibleSketchError, match=r"classifier\.weight|bert\."):
        NPEFFAnalyzer(tiny_model("bert", dtype=torch.float32)).lift(d, 0, c.pefs, c.data)
    with caplog.at_level(logging.WARNING):
        c.analyzer.lift(d, 0, c.pefs, c.data, top_examples=1)
    newcomer = NPEFFAnalyzer(c.analyzer.model)
    assert newcomer.lift(d, 0, c.pefs, c.data, selective=False).cosine(shuffled) > 1 - 1e-6


def test_another_commit_of_the_model_is_refused(trained_case: TrainedCase) -> None:
    """Oracle: the error, for lifting and for evaluating."""
    c = trained_case
    direction = c.analyzer.lift(c.decomposition, 0, c.pefs, c.data, selective=False)
    c.decomposition.info["revision"], direction.info["revision"] = "a" * 40, "a" * 40
    c.analyzer.revision = "b" * 40
    try:
        with pytest.raises(IncompatibleSketchError, match=r"a{40}.*b{40}"):
            c.analyzer.lift(c.decomposition, 0, c.pefs, c.data, selective=False)
        with pytest.raises(ValueError, match=r"a{40}.*b{40}"):
            c.analyzer.evaluate_direction(direction, c.decomposition, 0, c.data)
    finally:
        c.decomposition.info["revision"] = c.analyzer.revision = None


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "magic"},
        {"top_examples": 0},
        {"top_examples": 3, "method": "adjoint"},
        {"form": "round"},
        {"solver": "lasso"},
        {"batch_size": 0},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    """Oracle: the error."""
    with pytest.raises(ValueError):
        LiftRequest(**wrong)
    with pytest.raises(ValueError, match=r"nonzero.*4"):
        iterative_hard_thresholding((lambda x: x, lambda x: x), torch.ones(3), 3, 4)


def test_the_metric_form_needs_a_balanced_decomposition(tiny_case: tuple[NPEFFAnalyzer, list[Any], PEFs]) -> None:
    """Oracle: the message; without balancing there is no metric."""
    analyzer, data, pefs = tiny_case
    with pytest.raises(ValueError, match="form='metric'"):
        analyzer.lift(fit(analyzer, pefs), 0, pefs, data, form="metric", selective=False)


def test_components_of_a_power_lift_exactly(tiny_case: tuple[NPEFFAnalyzer, list[Any], PEFs]) -> None:
    """Oracle: identity. The sketch of the lifted direction is the component, and W of the training PEFs comes back."""
    analyzer, data, pefs = tiny_case
    found = fit(analyzer, pefs, power=0.5, max_iterations=3000, tolerance=1e-10)
    assert torch.equal(found.transform(pefs), found.coefficients)
    for direction in analyzer.lift(found, range(len(found)), pefs, data, selective=False):
        assert direction.info["estimated_cosine"] > 0.999


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("family", "task", "parameters"),
    [
        ("bert", "question-answering", None),  # as many classes as tokens: cotangents of other widths in other batches
        ("bert", "question-answering", r".*LayerNorm.weight"),
        ("deberta-v2", "sequence-classification", None),  # a module runs once for a whole batch
        ("llama", "causal-lm", None),
    ],
)
def test_every_kind_of_model_lifts_in_batches(family: str, task: str, parameters: str | None) -> None:
    """Oracle: reference.lift on the stored unsketched rows; examples differ in length."""
    model = tiny_model(family, task)
    data = [{"id": f"e{i}", **e} for i, e in enumerate(tiny_batch(model, 9, seed=3))]
    assert len({len(e["input_ids"]) for e in data}) > 1
    fisher = FisherConfig(rank=2, sketch="identity", storage_dtype="float64", parameters=parameters)
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(data, batch_size=4)
    found = fit(analyzer, pefs, 2)
    truth = reference.lift(pefs.factors, pefs.factors, found.coefficients, found.pseudo_fishers)
    for j, direction in enumerate(analyzer.lift(found, [0, 1], pefs, data, batch_size=4, selective=False)):
        assert float(cosine_similarity(as_row(analyzer, direction, pefs), truth[j], dim=0)) > 1 - 1e-9


def test_a_dataset_without_ids_may_come_in_another_order_and_another_models_weights_are_refused() -> None:
    """Oracle: the direction of the first order; the message."""
    model = tiny_model("bert")
    data = tiny_batch(model, 12, seed=5)
    assert len({tuple(e["input_ids"]) for e in data}) == 12
    fisher = FisherConfig(rank=2, sketch="identity", storage_dtype="float64")
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    found = fit(analyzer, pefs, 2)
    first, again = (analyzer.lift(found, 0, pefs, order, selective=False) for order in (data, data[::-1]))
    assert first.cosine(again) > 1 - 1e-9
    with pytest.raises(ValueError, match="'0', '1', '2'"):
        analyzer.lift(found, 0, pefs, [*data[1:], {"input_ids": [5, 6, 7]}], selective=False)
    other = NPEFFAnalyzer(tiny_model("bert", seed=1), fisher=fisher)
    with pytest.raises(IncompatibleWeightsError, match="weights"):
        other.lift(found, 0, pefs, data, selective=False)
    with pytest.raises(ValueError, match="component 0"):
        other.lift(found, 0, pefs, data, check_weights=False, selective=False)


@pytest.mark.parametrize("family", ["bert", "gpt2", "albert"])
def test_many_combinations_are_those_that_are_sent_back_one_by_one(family: str) -> None:
    """Oracle: the same combinations, few enough at a time to be sent back; one has no example, others lack some."""
    model = tiny_model(family)
    data = tiny_batch(model, 9, seed=0)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=4))
    pefs = analyzer.compute_pefs(data)
    assert pefs.cotangents is not None
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(40, 9, 2, generator=generator, dtype=torch.float64)
    coefficients[3:20, 4], coefficients[:, 7], coefficients[5] = 0, 0, 0
    with analyzer.forward_pass() as forward:
        examples = analyzer.read(data)[:]
        used = [example for i, example in enumerate(examples) if i != 7]
        assert _rows_are_cheaper(forward, used, coefficients)
        assert not _rows_are_cheaper(forward, used, coefficients[:2])
        together = lift_exact(forward, examples, pefs.cotangents, coefficients, 4)
        for j in range(len(coefficients)):
            (alone,) = lift_exact(forward, examples, pefs.cotangents, coefficients[j : j + 1], 4)
            for name, expected in alone.items():
                assert torch.allclose(together[j][name], expected, rtol=1e-9, atol=1e-12), name
    assert not any(bool(value.any()) for value in together[5].values())
