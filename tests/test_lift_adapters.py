"""Components as low-rank adapters from one pass, against the best cuts of exact lifting and dense oracles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hf_npeff import (
    CorruptStoreError,
    FisherConfig,
    IncompatibleWeightsError,
    NPEFFAnalyzer,
    PEFs,
)
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.fewer_cotangents import with_fewer_cotangents
from hf_npeff.weights.low_rank import sizes_of
from hf_npeff.weights.thin_sums import Bases, Cut, ThinSums, basis_of
from tests.test_lifting import fit
from tests.tiny import tiny_batch, tiny_model
from tests.trigger_words import TrainedCase, trained, trained_case


@pytest.fixture(scope="module")
def wide_case() -> TrainedCase:
    """A trained BERT whose weights are larger than thin sums of them."""
    return trained_case(n=60, model=trained(hidden=128, steps=100))


def best_cut(direction: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The best approximation of every weight's change, by a whole SVD."""
    cut = {}
    for name, delta in direction.items():
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        cut[name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return cut


def cosine(adapter: Adapter, truth: Mapping[str, Tensor]) -> float:
    """Over all weights together."""
    inner = sum(float((adapter.delta(n).double() * t).sum()) for n, t in truth.items())
    norms = [sum(float(v.double().square().sum()) for v in each) for each in
             ([adapter.delta(n) for n in truth], truth.values())]  # fmt: skip
    return inner / (norms[0] * norms[1]) ** 0.5


def squared(deltas: Mapping[str, Tensor]) -> float:
    return sum(float(v.double().square().sum()) for v in deltas.values())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize(("rank", "passes", "median", "least"), [(4, 1, 0.98, 0.95), (2, 2, 0.999, 0.99)])
def test_adapters_are_the_best_cuts_of_exact_lifting(
    wide_case: TrainedCase, selective: bool, rank: int, passes: int, median: float, least: float
) -> None:
    """Oracle: a whole SVD of every weight of `lift`'s directions; their energy, and their sketch."""
    c = wide_case
    directions = c.analyzer.lift(c.decomposition, range(6), c.pefs, c.data, selective=selective)
    adapters = c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, rank, selective=selective, passes=passes)
    cosines = []
    for j, (adapter, direction) in enumerate(zip(adapters, directions, strict=True)):
        truth = best_cut(direction, rank)
        cosines.append(cosine(adapter, truth))
        assert adapter.retained_energy == pytest.approx(squared(truth), abs=0.03)
        assert adapter.is_estimate and f"keeps {adapter.kept}" in repr(adapter) and adapter.kept.startswith("about ")
        assert "| about " in adapter.card()
        length = squared({n: adapter.delta(n) for n in direction}) ** 0.5
        assert length == pytest.approx(squared(truth) ** 0.5, abs=0.05), "a part of the unit direction"
        assert adapter.info["component"] == j and adapter.info.get("ridge") == direction.info.get("ridge")
        assert adapter.info["estimated_cosine"] == pytest.approx(adapter.retained_energy**0.5, abs=0.05)
    assert float(torch.tensor(cosines).median()) >= median and min(cosines) >= least
    for name, share in adapters[0].retained_by_weight.items():
        truth_share = float(best_cut({name: directions[0][name]}, rank)[name].square().sum()) / float(
            directions[0][name].double().square().sum()
        )
        assert share == pytest.approx(truth_share, abs=0.1), name


def thin_sums(D: Tensor, rank: int, sample: Tensor | None = None) -> Cut:
    """Matrices (r, out, in), each given as sums of single entries' gradients, through thin sums of a rank."""
    r, out, into = D.shape
    k, s = sizes_of(rank)
    generator = torch.Generator().manual_seed(1)
    seen = D.sum(0) if sample is None else sample
    sides = (
        seen @ torch.randn(into, s, generator=generator).double(),
        seen.T @ torch.randn(out, s, generator=generator).double(),
    )
    (left, p), (right, q) = (basis_of(side, k, s, 12, generator) for side in sides)
    cpu = torch.device("cpu")
    sums = ThinSums({"w": ((out, into), cpu, torch.float64)}, {"w": Bases(left, right, k, (p, q))}, r)
    for i in range(r):  # examples of 5 tokens whose gradients add up to D_i
        U, S, Vh = torch.linalg.svd(D[i], full_matrices=False)
        for start in range(0, len(S), 5):
            part = slice(start, start + 5)
            sums.begin(torch.eye(r, dtype=torch.float64)[:, i : i + 1, None])
            x = sums.take_input("w", Vh[None, part])
            sums.before_backward(0)
            sums.take_gradient("w", x, (U[:, part] * S[part]).T[None])
    return sums.take("w", rank)


def low_rank_matrices(r: int, out: int, into: int, rank: int, noise: float = 0.0) -> Tensor:
    """(r, out, in) in float64, and a share of noise in their squared norms."""
    generator = torch.Generator().manual_seed(0)
    B, A, E = (
        torch.randn(r, *shape, generator=generator).double() for shape in ((out, rank), (rank, into), (out, into))
    )
    D = B @ A
    return D + E * (noise * D.square().sum((1, 2)) / E.square().sum((1, 2))).sqrt()[:, None, None]


@pytest.mark.parametrize(("out", "into"), [(200, 150), (60, 300), (52, 400), (400, 20)])
@pytest.mark.parametrize("blind", [False, True])
def test_matrices_of_low_rank_come_back_whole(out: int, into: int, blind: bool) -> None:
    """Identity in float64: rank 3 through thin sums of rank 4; also where the sample shows none of them."""
    D = low_rank_matrices(3, out, into, 3)
    cut = thin_sums(D, 4, low_rank_matrices(1, out, into, 5)[0].roll(7, 0) if blind else None)
    found = cut.left * cut.values[:, None] @ cut.right.mT
    assert (found - D).norm() < 1e-9 * D.norm()
    assert cut.energy == pytest.approx(D.square().sum((1, 2)), rel=1e-9)


def test_what_is_left_out_is_estimated() -> None:
    """Statistical, 24 matrices of 200 × 150, a fifth of their energy noise: ‖D‖² to 15% each, its mean to 3%."""
    D = low_rank_matrices(24, 200, 150, 3, noise=0.25)
    ratios = thin_sums(D, 4).energy / D.square().sum((1, 2))
    assert (ratios - 1).abs().max() < 0.15 and abs(float(ratios.mean()) - 1) < 0.03


def test_the_energy_of_a_cut_is_what_it_explains() -> None:
    """Statistical, 24 matrices of 200 × 150 whose singular values fall as i^−.7; oracle: ‖D‖² − ‖D − cut‖².

    Of a best cut the two are equal; an estimated cut may not have more energy than it explains, nor a third less.
    Estimated by pseudo-inverses alone it has a fifth more.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(24, n, 100, generator=generator).double())[0] for n in (200, 150))
    D = (left / torch.arange(1, 101) ** 0.7) @ right.mT
    cut = thin_sums(D, 4)
    made = cut.left * cut.values[:, None] @ cut.right.mT
    explained = D.square().sum((1, 2)) - (D - made).square().sum((1, 2))
    assert 2 / 3 < float(made.square().sum() / explained.sum()) < 1.02


def test_a_batch_is_sent_back_no_oftener_than_there_are_rows_or_components(
    wide_case: TrainedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a count of backward passes: c a batch or one a component, and one for each batch of the sample."""
    from hf_npeff.fisher import gradients

    c = wide_case
    calls: list[int] = []
    original = gradients.LinearHooks.backward
    monkeypatch.setattr(
        gradients.LinearHooks, "backward", lambda self, *a, **k: calls.append(1) or original(self, *a, **k)
    )
    counts = []
    for components in ([0], [0, 1, 2, 3, 4, 5]):
        calls.clear()
        c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, components=components)
        counts.append(len(calls))
    batches = -(-60 // 8)
    assert counts[0] == 2 * batches and counts[1] <= (c.pefs.rank + 1) * batches


@pytest.mark.parametrize(("components", "share"), [(2, 1.0), (12, 1.0), (12, 0.0)])
def test_fewer_cotangents_make_the_same_combinations(components: int, share: float) -> None:
    """Oracle: combinations of the rows, which are linear in their cotangents: here rows are cotangents, times a matrix.

    Two components need two rows of an example's four, exactly; of twelve, those whose coefficients span two dimensions
    (share 0) need two, and others all four.
    """
    generator = torch.Generator().manual_seed(0)
    n, c, s = 9, 4, 40
    cotangents = torch.randn(n, c, 1, s, generator=generator)
    cotangents[3, 2] = 0
    jacobian = torch.randn(s, 64, generator=generator)
    inside = torch.randn(n, 2, c, generator=generator)
    spans = torch.einsum("rnk,nkc->rnc", torch.randn(components, n, 2, generator=generator), inside).double()
    beta = spans + share * torch.randn(components, n, c, generator=generator).double()
    pefs = PEFs.from_factors(cotangents[:, :, 0] @ jacobian)
    mixed, coefficients = with_fewer_cotangents(pefs, cotangents, beta)
    assert mixed.shape[1] == coefficients.shape[2] == (4 if (components, share) == (12, 1.0) else 2)
    truth = torch.einsum("rnc,ncd->rd", beta, (cotangents[:, :, 0] @ jacobian).double())
    found = torch.einsum("rnc,ncd->rd", coefficients, (mixed[:, :, 0] @ jacobian).double())
    assert ((found - truth).norm(dim=1) < 1e-5 * truth.norm(dim=1)).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("family", "task", "settings", "fitting"),
    [
        ("bert", "sequence-classification", {}, {}),
        ("bert", "sequence-classification", {"output_factor": "projection"}, {"power": 0.5}),
        ("gpt2", "causal-lm", {"output_factor": "spectral"}, {}),
        ("gpt2", "causal-lm", {"output_factor": "sampling", "positions": "all"}, {"power": 0.25}),
        ("albert", "sequence-classification", {}, {}),  # a weight that several layers share
        ("deberta-v2", "sequence-classification", {}, {}),  # a module runs once for a whole batch
    ],
)
def test_tiny_models_lift_to_the_cut_of_dense_combinations(
    family: str, task: str, settings: dict[str, Any], fitting: dict[str, Any]
) -> None:
    """Oracle: the best cut of dense lifting in float64 by `lift`, which test_lifting compares with brute force."""
    model = tiny_model(family, task)
    data = [{"id": f"e{i}", **e} for i, e in enumerate(tiny_batch(model, 12, seed=4))]
    fisher = FisherConfig(rank=2, sketch="identity", storage_dtype="float64", **settings)
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(data, batch_size=4)
    found = fit(analyzer, pefs, 2, **fitting)
    directions = analyzer.lift(found, [0, 1], pefs, data, selective=False)
    for adapter, direction in zip(
        analyzer.lift_adapters(found, pefs, data, 1, selective=False, batch_size=4), directions, strict=True
    ):
        truth = best_cut(direction, 1)
        assert cosine(adapter, truth) > 1 - 1e-6
        assert squared({n: adapter.delta(n) for n in direction}) == pytest.approx(squared(truth), rel=1e-5)
        assert adapter.retained_energy == pytest.approx(squared(truth), rel=1e-5)


def test_biases_and_norms_come_whole(tmp_path: Path) -> None:
    """Oracle: `lift`'s direction; PEFT loads the adapter, and the model with it gives what W + ΔW gives."""
    model = tiny_model("bert", "sequence-classification")
    data = [{"id": f"e{i}", **e} for i, e in enumerate(tiny_batch(model, 12, seed=4))]
    fisher = FisherConfig(
        rank=2, sketch="identity", storage_dtype="float64", parameters=r".*(query\.bias|LayerNorm\.(weight|bias))",
        target_modules=r".*query",
    )  # fmt: skip
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    found = fit(analyzer, pefs, 2)
    direction = analyzer.lift(found, 1, pefs, data, selective=False)
    (adapter,) = analyzer.lift_adapters(found, pefs, data, 16, [1], selective=False)
    assert cosine(adapter, {n: d.double() for n, d in direction.items() if "LayerNorm" not in n}) > 1 - 1e-6
    assert adapter.retained_energy == pytest.approx(1, abs=1e-6)
    inputs = {"input_ids": torch.tensor([data[0]["input_ids"]])}
    with torch.no_grad():
        with direction.applied_to(model, 1.0):
            truth = model(**inputs).logits
        adapter.save_pretrained(tmp_path / "a")
        moved = PeftModel.from_pretrained(model, tmp_path / "a")(**inputs).logits
    assert (moved - truth).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["kronecker", "identity"])
def test_balanced_components_become_adapters_in_both_forms(kind: Any) -> None:
    """Oracle: the best cuts of `lift`'s directions of either form."""
    model = tiny_model("bert", dtype=torch.float32)
    data = tiny_batch(model, 20, seed=1)
    fisher = FisherConfig(rank=2, sketch=kind, sketch_dim=8 if kind != "identity" else None)
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    found = fit(analyzer, pefs, balance="module")
    for form in ("plain", "auto"):
        direction = analyzer.lift(found, 0, pefs, data, form=form, selective=False)  # type: ignore[arg-type]
        (adapter,) = analyzer.lift_adapters(found, pefs, data, 2, [0], False, form=form)  # type: ignore[arg-type]
        assert cosine(adapter, best_cut(direction, 2)) > 1 - 1e-4
        assert adapter.info["form"] == direction.info["form"]


def test_adapters_are_written_as_they_are_finished_and_not_lifted_again(
    wide_case: TrainedCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an accident after two adapters, and a run that goes on: equal to one that was not disturbed."""
    from hf_npeff.models import adapted_model

    c = wide_case
    whole = c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, output_dir=tmp_path / "whole")
    saved: list[int] = []
    original = adapted_model.save_lifted

    def dies(adapter: Adapter, folder: Path, settings: str) -> None:
        if len(saved) == 2:
            raise OSError("the disk is full")
        saved.append(1)
        original(adapter, folder, settings)

    with monkeypatch.context() as patch:
        patch.setattr(adapted_model, "save_lifted", dies)
        with pytest.raises(OSError, match="full"):
            c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, output_dir=tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*/adapter_model.safetensors"))) == 2
    again = c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, output_dir=tmp_path / "again")
    for j, (a, b) in enumerate(zip(whole, again, strict=True)):
        assert a.info["component"] == b.info["component"] == j
        assert all(torch.allclose(a.tensors[n], b.tensors[n], atol=1e-5) for n in a.tensors)
        assert a.retained_by_weight == pytest.approx(b.retained_by_weight, abs=1e-4)
        assert (tmp_path / "again" / f"component-{j}" / "README.md").read_text().startswith("---")
    model = c.analyzer.model
    with torch.no_grad():
        ids = torch.tensor([c.data[0]["input_ids"]])
        with whole[3].applied_in_activations(model):
            truth = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(model, tmp_path / "again", subfolder="component-3")
        assert (loaded(input_ids=ids).logits - truth).abs().max() < 1e-5
        loaded.unload()
    with monkeypatch.context() as patch:  # nothing is left to do
        patch.setattr(adapted_model, "lift_to_adapters", None)
        c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, output_dir=tmp_path / "again")
    with pytest.raises(ValueError, match="component-0"):
        c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, 2, output_dir=tmp_path / "again")
    path = tmp_path / "again" / "component-1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptStoreError, match="component-1"):
        c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, output_dir=tmp_path / "again")
    record = tmp_path / "again" / "component-2" / "lifted.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "layouts": {"a": "b"}}))
    with pytest.raises(CorruptStoreError, match="component-2"):
        c.analyzer.lift_adapters(c.decomposition, c.pefs, c.data, components=[2], output_dir=tmp_path / "again")


def test_what_lift_refuses_is_refused(wide_case: TrainedCase) -> None:
    """Oracle: the errors; other weights, another model's rows, ids, components, ranks."""
    c = wide_case
    lift = c.analyzer.lift_adapters
    for missing in (6, -7):
        with pytest.raises(IndexError, match="6"):
            lift(c.decomposition, c.pefs, c.data, components=[missing])
    with pytest.raises(ValueError, match="no components"):
        lift(c.decomposition, c.pefs, c.data, components=[])
    with pytest.raises(ValueError, match="'e0'"):
        lift(c.decomposition, c.pefs, c.data[1:])
    for wrong in ({"rank": 0}, {"rank": 129}, {"passes": 3}, {"batch_size": 0}, {"form": "metric"}, {"ridge": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lift(c.decomposition, c.pefs, c.data, **wrong)  # type: ignore[arg-type]
    other = NPEFFAnalyzer(trained(seed=1, hidden=128, steps=0), fisher=c.analyzer.fisher)
    with pytest.raises(IncompatibleWeightsError, match="weights"):
        other.lift_adapters(c.decomposition, c.pefs, c.data)
    with pytest.raises(ValueError, match="component 0"):
        other.lift_adapters(c.decomposition, c.pefs, c.data, check_weights=False)
    with pytest.raises(ValueError, match="cotangents"):
        lift(c.decomposition, _without_cotangents(c.pefs), c.data)


def _without_cotangents(pefs: PEFs) -> PEFs:
    return PEFs({"factors": pefs.factors, "norms": pefs.norms}, pefs.columns, pefs.info)
