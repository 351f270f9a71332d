"""The certificate of a weight change: every number against one example at a time under moved weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch

from hf_npeff import FisherConfig, Measurement, NPEFFAnalyzer, ParameterDirection, UnsupportedModelError
from hf_npeff.fisher.distributions import Bernoulli, Softmax
from hf_npeff.fisher.predictions import Predictions
from hf_npeff.weights.layouts import layout_of
from hf_npeff.weights.measurement import cut
from hf_npeff.weights.scoring import score
from tests import reference
from tests.logged import warned_by
from tests.test_activations import direction_of
from tests.tiny import collate, tiny_batch, tiny_model


def rows_of(model: Any, n: int, *, seed: int = 3) -> list[dict[str, Any]]:
    """Examples with a label, some of them without, and a column of groups."""
    rows = tiny_batch(model, n, seed=seed)
    for i, row in enumerate(rows):
        row |= {"id": f"e{i}", "label": None if i == 0 else i % 3, "group": "ab"[i % 2], "words": f"example {i}"}
    return rows


def logits_of(model: Any, row: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**collate([{"input_ids": row["input_ids"]}], model)).logits[0]


@pytest.fixture(scope="module")
def bert() -> tuple[Any, list[dict[str, Any]], NPEFFAnalyzer, ParameterDirection]:
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    return model, rows_of(model, 14), NPEFFAnalyzer(model, fisher=FisherConfig(rank=2)), direction_of(model)


class Normed(torch.nn.Module):
    """A layer whose output is divided by the norms of its detached rows."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / self.inner.weight.detach().norm(dim=1)


def test_a_weight_that_is_also_read_detached_is_measured_in_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: reference.kl of logits with W and with W + ΔW in place, where ΔW is W itself, which the norm undoes."""
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    layer = model.bert.encoder.layer[0].intermediate
    layer.dense = Normed(layer.dense)
    name = "bert.encoder.layer.0.intermediate.dense.inner.weight"
    weight = model.get_parameter(name).detach()
    change = ParameterDirection({name: weight + 0.1}, {name: "linear"}, {}, unit=False)
    rows = rows_of(model, 4)
    before = [logits_of(model, row) for row in rows]
    with change.applied_to(model, 0.5):
        after = [logits_of(model, row) for row in rows]
    kl = sum(reference.kl(a, b) for a, b in zip(before, after, strict=True)) / len(rows)
    measured = NPEFFAnalyzer(model).measure(change, rows, scales=(0.5,), random=False)
    assert measured.at(0.5)["all"].kl == pytest.approx(kl, rel=1e-3)
    assert len(warned_by(caplog, "weights.measurement")) == 1


def test_every_number_is_the_oracles(bert: Any) -> None:
    """Oracle: reference.kl of logits, one example at a time, with W and with W + ΔW in place; counts by hand."""
    model, rows, analyzer, direction = bert
    measured = analyzer.measure(direction, rows, scales=(0.5, 1.5), by="group", both_signs=True, batch_size=5)
    assert [s.scale for s in measured.steps] == [0.5, -0.5, 1.5, -1.5, 0.5, 1.5]
    before = [logits_of(model, row) for row in rows]
    for step in measured.steps[:4]:
        with direction.applied_to(model, step.scale):
            after = [logits_of(model, row) for row in rows]
        kl = torch.tensor([reference.kl(a, b) for a, b in zip(before, after, strict=True)], dtype=torch.float64)
        for name, effect in step.groups.items():
            chosen = [i for i, row in enumerate(rows) if name in ("all", f"group={row['group']}")]
            assert effect.n == len(chosen)
            assert effect.kl == pytest.approx(float(kl[chosen].mean()), rel=1e-4, abs=1e-7)
            assert effect.quantiles["50%"] == pytest.approx(float(kl[chosen].quantile(0.5)), rel=1e-3, abs=1e-6)
            assert effect.quantiles["100%"] == pytest.approx(float(kl[chosen].max()), rel=1e-3, abs=1e-6)
            flips = [int(before[i].argmax() != after[i].argmax()) for i in chosen]
            assert effect.flips == pytest.approx(sum(flips) / len(flips))
            labelled = [i for i in chosen if rows[i]["label"] is not None]
            assert effect.labelled == len(labelled)
            for k, logits in enumerate((before, after)):
                right = [int(logits[i].argmax()) == rows[i]["label"] for i in labelled]
                assert effect.accuracy is not None and effect.accuracy[k] == pytest.approx(sum(right) / len(right))
                loss = [-float(logits[i].log_softmax(-1)[rows[i]["label"]]) for i in labelled]
                assert effect.loss is not None and effect.loss[k] == pytest.approx(sum(loss) / len(loss), rel=1e-4)
                odds = [math.log(math.exp(-x) / -math.expm1(-x)) for x in loss]
                assert effect.log_odds is not None
                assert effect.log_odds[k] == pytest.approx(sum(odds) / len(odds), rel=1e-3, abs=1e-6)
                said = Counter(f"LABEL_{int(logits[i].argmax())}" for i in chosen)
                for word, shares in effect.predicted.items():
                    assert shares[k] == pytest.approx(said[word] / len(chosen))
            order = [chosen[i] for i in kl[chosen].argsort(descending=True).tolist()][:5]
            assert [w["index"] for w in effect.worst] == order
            assert effect.worst[0]["text"] == f"example {order[0]}" and effect.worst[0]["id"] == f"e{order[0]}"
            low, high = effect.kl_interval
            assert low <= effect.kl <= high and effect.error is None


def test_a_change_cut_to_a_rank_is_what_its_adapter_does(bert: Any) -> None:
    """Oracle: the rank-2 adapter measured by itself; and a rank of all is the change itself."""
    _, rows, analyzer, direction = bert
    measured = analyzer.measure(direction, rows, scales=(0.5,), ranks=(2, None, 16), random=False)
    alone = analyzer.measure(direction.to_adapter(rank=2, scale=0.5), rows, random=False)
    assert measured.at(0.5, 2)["all"].kl == pytest.approx(alone.at()["all"].kl, rel=1e-4)
    assert measured.at(0.5, 16)["all"].kl == pytest.approx(measured.at(0.5)["all"].kl, rel=1e-4)
    again = analyzer.measure(direction.to_adapter(rank=4, scale=0.5), rows, ranks=(2,), random=False)
    assert again.at(1.0, 2)["all"].kl == pytest.approx(alone.at()["all"].kl, rel=1e-3)
    deltas = direction.linear_deltas()
    name = next(iter(deltas))
    U, S, Vh = torch.linalg.svd(deltas[name].matrix().double())
    best = U[:, :2] * S[:2] @ Vh[:2]
    assert (cut(deltas, 2)[name].matrix().double() - best).abs().max() < 1e-6


def test_a_random_change_of_equal_norm_stands_beside_it(bert: Any) -> None:
    """Invariant: one for every size; the same seed gives the same, another seed another."""
    _, rows, analyzer, direction = bert
    one, again, other = (
        analyzer.measure(direction, rows, scales=(0.5, -0.5), seed=seed).at(0.5, random=True) for seed in (0, 0, 1)
    )
    assert one == again and one["all"].kl != other["all"].kl


def test_what_is_not_linear_is_measured_with_moved_weights() -> None:
    """Oracle: reference.kl with moved norms, biases and embeddings; weights come back bit for bit."""
    model = tiny_model("gpt2", dtype=torch.float32)
    rows = tiny_batch(model, 5, seed=1)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2))
    direction = direction_of(model, r"(ln_1\.weight|c_fc\.bias|wpe\.weight)")
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    measured = analyzer.measure(direction, rows, scales=(2.0,))
    before = [logits_of(model, row)[-1] for row in rows]
    with direction.applied_to(model, 2.0):
        after = [logits_of(model, row)[-1] for row in rows]
    kl = sum(reference.kl(a, b) for a, b in zip(before, after, strict=True)) / len(rows)
    assert measured.at(2.0)["all"].kl == pytest.approx(float(kl), rel=1e-4)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    assert measured.at(2.0)["all"].accuracy is None


def test_a_regression_has_an_error_and_no_accuracy() -> None:
    """Oracle: root mean squares by hand; KL of unit Gaussians is half the squared distance."""
    model = tiny_model("bert", "sequence-classification", dtype=torch.float32, num_labels=1, problem_type="regression")
    rows = [{**row, "label": 0.5 * i} for i, row in enumerate(tiny_batch(model, 6, seed=1))]
    direction = direction_of(model)
    effect = NPEFFAnalyzer(model, fisher=FisherConfig(rank=1)).measure(direction, rows, scales=(1.0,)).at()["all"]
    before = torch.stack([logits_of(model, row)[0] for row in rows])
    with direction.applied_to(model, 1.0):
        after = torch.stack([logits_of(model, row)[0] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    assert effect.error == pytest.approx(
        [float((x - labels).square().mean().sqrt()) for x in (before, after)], rel=1e-4
    )
    assert effect.kl == pytest.approx(float((before - after).square().mean() / 2), rel=1e-3)
    assert effect.accuracy is None and effect.predicted == {}
    assert "error" in repr(effect) and "answers" not in repr(effect)


def test_tokens_of_a_language_model_have_accuracy_and_cross_entropy() -> None:
    """Oracle: log-softmax by hand at the labelled positions."""
    model = tiny_model("llama", dtype=torch.float32)
    rows = tiny_batch(model, 5, seed=1, labels=True)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=1, positions="labels"))
    direction = direction_of(model)
    effect = analyzer.measure(direction, rows, scales=(1.0,)).at()["all"]
    for k, scale in enumerate((None, 1.0)):
        losses = []
        for row in rows:
            if scale is None:
                logits = logits_of(model, row)
            else:
                with direction.applied_to(model, scale):
                    logits = logits_of(model, row)
            wanted = [(t, y) for t, y in enumerate(row["labels"]) if y != -100]
            losses.append(sum(-float(logits[t - 1].log_softmax(-1)[y]) for t, y in wanted) / len(wanted))
        assert effect.loss is not None and effect.loss[k] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_measurement_is_shown_in_a_line_a_table_and_a_figure(bert: Any) -> None:
    """Oracle: the numbers; a line for every group and kind; hostile values are escaped."""
    _, rows, analyzer, direction = bert
    rows = [{**row, "group": "<b>" if row["group"] == "a" else "b"} for row in rows]
    measured: Measurement = analyzer.measure(direction, rows, scales=(0.5, 1.0), by="group", both_signs=True)
    assert "\n" not in repr(measured) and f"KL {measured.at(0.5)['all'].kl:.3g}" in repr(measured)
    assert "accuracy" in repr(measured) and "6 steps" in repr(measured)
    assert json.loads(json.dumps(measured.to_dict()))["steps"][0]["groups"]["all"]["n"] == len(rows)
    html = measured._repr_html_()
    assert html.count("<tr>") == 1 + 6 * 3 + 1 + 5 and "group=&lt;b&gt;" in html and "<b>" + "b" not in html
    pytest.importorskip("plotly", reason="plotly is not installed")
    figure = measured.plot()
    assert len(figure.data) == 3 * 3
    assert list(figure.data[0].y) == [measured.at(s)["all"].kl for s in (0.5, 1.0)]
    with pytest.raises(ValueError, match="rank 7"):
        measured.plot(rank=7)


# Bad input


def test_what_cannot_be_measured_is_refused(bert: Any) -> None:
    """Oracle: the errors, before the model runs."""
    model, rows, analyzer, direction = bert
    for wrong in (
        {"scales": ()},
        {"ranks": ()},
        {"scales": (0.0,)},
        {"ranks": (0,)},
        {"batch_size": 0},
        {"worst": -1},
        {"by": "nothing"},
    ):
        with pytest.raises(ValueError):
            analyzer.measure(direction, rows, **wrong)
    many = [{**row, "group": str(i)} for i, row in enumerate(rows * 10)]
    with pytest.raises(ValueError, match="140 values"):
        analyzer.measure(direction, [{k: v for k, v in r.items() if k != "id"} for r in many], by="group")
    with pytest.raises(KeyError, match=r"0\.5"):
        analyzer.measure(direction, rows, scales=(0.5,)).at(0.25)
    name = "bert.embeddings.LayerNorm.weight"
    norm = ParameterDirection({name: torch.ones(16)}, {name: layout_of(model, name)})
    with pytest.raises(UnsupportedModelError, match="LayerNorm"):
        analyzer.measure(norm, rows, ranks=(1,))
    with pytest.raises(UnsupportedModelError, match="LayerNorm"):
        analyzer.measure(norm.to_adapter(kind="delta"), rows)
    other = tiny_model("gpt2", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\['[\w.]+'"):
        NPEFFAnalyzer(other).measure(direction, tiny_batch(other, 3, seed=1))


def test_log_odds_keep_their_digits_where_predictions_are_certain() -> None:
    """Oracle: differences of logits, for two classes, and the logits themselves, for two labels of yes or no."""
    sure = Predictions([torch.tensor([[-20.0, 40.0]])], Softmax)
    assert [score(sure, 0, y).log_odds for y in (1, 0)] == [60, -60]  # type: ignore[union-attr]
    several = Predictions([torch.tensor([[30.0, -50.0]])], Bernoulli)
    assert score(several, 0, [1, 0]).log_odds == pytest.approx((30 + 50) / 2)  # type: ignore[union-attr]
    assert score(several, 0, [0, 0]).log_odds == pytest.approx((-30 + 50) / 2)  # type: ignore[union-attr]
