"""The self-test of an analyzer, and the sketch that it measures or chooses."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_npeff import (
    UnsupportedModelError,
)
from hf_npeff.data import Example, Examples
from hf_npeff.fisher.row_check import RowCheck, pair_of
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.fisher.selftest import exact_inner_products
from hf_npeff.fisher.sketch_choice import known_cotangents
from hf_npeff.pefs.sketches import Sketch
from tests.analyses import analyzer_of, brute_force, errors
from tests.tiny import tiny_batch, tiny_model


def test_the_self_test_is_kept_and_printed_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: coverage counted here, and the error of PEF inner products recomputed from brute-force rows."""
    model = tiny_model("llama", "causal-lm")
    examples = tiny_batch(model, 8, seed=11)
    analyzer = analyzer_of(model, sketch="kronecker", sketch_dim=6, rank=2)
    with caplog.at_level(logging.INFO):
        pefs = analyzer.compute_pefs(examples)
    lines = [r.getMessage() for r in caplog.records if "self-test" in r.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    kept = pefs.info["selftest"]
    covered = sum(p.numel() for n, p in model.named_parameters() if n in {m.parameter for m in analyzer.maps})
    assert kept["coverage"] == pytest.approx(covered / sum(p.numel() for p in model.parameters()))
    assert kept["row_error"] < 1e-5
    full = analyzer_of(model, rank=2).compute_pefs(examples).factors
    exact = torch.einsum("iap,jbp->iajb", full, full).square().sum((1, 3))
    sketched = torch.einsum("iap,jbp->iajb", pefs.factors, pefs.factors).square().sum((1, 3))
    off = ~torch.eye(8, dtype=torch.bool)
    truth = float((sketched - exact)[off].norm() / exact[off].norm())
    assert pefs.sketch_error == pytest.approx(truth, rel=1e-3)


def test_a_sketch_above_the_tolerance_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: a side of one number a module cannot be faithful; a generous tolerance does not warn."""
    model = tiny_model("llama", "causal-lm", dtype=torch.float32)
    examples = tiny_batch(model, 6, seed=12)
    analyzer_of(model, sketch="kronecker", sketch_dim=1, sketch_tolerance=1e9).compute_pefs(examples)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    analyzer_of(model, sketch="kronecker", sketch_dim=1, sketch_tolerance=1e-3).compute_pefs(examples)
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "tolerance" in r.getMessage()]


def test_auto_meets_the_tolerance_at_the_first_candidate_that_does() -> None:
    """Oracle: the measured errors that are kept: all but the last are above the tolerance."""
    model = tiny_model("llama", "causal-lm", dtype=torch.float32, hidden_size=32, intermediate_size=96)
    examples = tiny_batch(model, 8, seed=13)
    analyzer = analyzer_of(model, sketch="auto", sketch_tolerance=0.15, storage_dtype="float32")
    pefs = analyzer.compute_pefs(examples)
    tried = list(pefs.info["selftest"]["tried"].values())
    assert len(tried) >= 1
    assert all(error > 0.15 for error in tried[:-1])
    assert pefs.sketch_error == tried[-1] <= 0.15
    assert pefs.config.sketch != "auto"


def test_auto_keeps_every_number_of_a_small_model() -> None:
    """Oracle: fewer parameters than the identity's limit."""
    model = tiny_model("bert")
    pefs = analyzer_of(model, sketch="auto", target_modules=["query"]).compute_pefs(tiny_batch(model, 3, seed=1))
    assert pefs.config.sketch == "identity"
    assert pefs.sketch_error == 0


def test_a_flat_classifier_passes_the_self_test() -> None:
    """Oracle: brute force. A head of zeros predicts the uniform distribution, whose S has one eigenvalue repeated.

    Its eigenvectors are arbitrary, so an example in a batch and alone may have other rows of the same Fisher.
    """
    model = tiny_model("bert", num_labels=4, dtype=torch.float32)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-4)
        model.classifier.bias.zero_()
    examples = tiny_batch(model, 6, seed=14)
    analyzer = analyzer_of(model, rank=4)
    pefs = analyzer.compute_pefs(examples, batch_size=6)
    assert pefs.info["selftest"]["row_error"] < 1e-3
    assert max(errors(analyzer, pefs, brute_force(analyzer, examples))) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_queries_of_texts_of_one_token_have_no_gradient_to_check(task: Any, dtype: torch.dtype) -> None:
    """Oracle: attention to a single token ignores its query, so gradients are rounding beside those of longer texts."""
    model = tiny_model("bert", task, dtype=dtype)
    analyzer = analyzer_of(model, rank=2, target_modules=[r"query"])
    short = analyzer.compute_pefs([{"input_ids": torch.tensor([k])} for k in range(3, 9)])
    longer = analyzer.compute_pefs([{"input_ids": torch.tensor([k, k + 1, 2 * k])} for k in range(3, 9)])
    assert float(short.norms.max()) < 1e-8 * float(longer.norms.min())
    assert longer.info["selftest"]["row_error"] < 1e-4


def test_a_large_row_is_refused_where_the_gradient_is_rounding() -> None:
    """Oracle: planted sizes of a row: beside the gradients of the other weights it is rounding, or it is not."""
    model = tiny_model("bert", dtype=torch.float32)
    (example,) = tiny_batch(model, 1, seed=3)
    analyzer = analyzer_of(model, target_modules=[r"query"])
    worst = analyzer.maps[0].parameter
    with analyzer.forward_pass() as forward:
        few = analyzer.read([example])[0]
        cotangent = torch.ones_like(forward.outputs([few]).source)
        assert RowCheck(1.6, (), worst, cotangent, 1e-12).accepted_error(forward, few) is None
        for unknown in (RowCheck(1.6, (), worst, cotangent, 1e-2), RowCheck(float("inf"), (), worst)):
            with pytest.raises(UnsupportedModelError, match=re.escape(worst)):
                unknown.accepted_error(forward, few)


def test_wrong_rows_are_refused_by_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a model whose weight is also used behind the hooks' back."""
    model = tiny_model("bert")
    dense = model.bert.pooler.dense
    original = type(model.bert.pooler).forward

    def twice(self: Any, hidden: Tensor) -> Tensor:
        return original(self, hidden) + torch.nn.functional.linear(hidden[:, 0], dense.weight)

    monkeypatch.setattr(type(model.bert.pooler), "forward", twice)
    with pytest.raises(UnsupportedModelError, match="hooks"):
        analyzer_of(model).compute_pefs(tiny_batch(model, 3, seed=1))


@pytest.mark.parametrize(("family", "task"), [("gpt2", "causal-lm"), ("albert", "sequence-classification")])
@pytest.mark.parametrize("kind", ["kronecker", "two-stage", "countsketch"])
def test_sketches_are_judged_by_the_rows_of_the_passes_themselves(family: str, task: Any, kind: Any) -> None:
    """Oracle: the rows of a pass of their own, also of layers that run several times, to 1e-12 of the largest."""
    model = tiny_model(family, task)
    analyzer = analyzer_of(model, rank=2)
    with analyzer.forward_pass() as forward:
        examples = list(Examples(tiny_batch(model, 4, seed=3)))
        known = known_cotangents(forward, analyzer.fisher, None, examples)
        _, captures = exact_inner_products(forward, [known])
        sketch = Sketch(forward.shapes, kind, {"kronecker": 3}.get(kind, 64), 0)
        truth = RowMaker(forward, analyzer.fisher, sketch).rows_of(examples, known.values)
    assert captures is not None, "one pass has everything"
    rows = captures[0].rows(sketch, known.values.shape[1])
    assert rows.shape == truth.shape and rows.abs().max() > 0
    assert (rows - truth).abs().max() <= 1e-12 * truth.abs().max()


def test_a_packed_example_is_no_partner_of_one_that_is_not() -> None:
    """Oracle: by hand; the batches of the run keep them apart, so the self-test's batch does too."""
    alone = [Example(str(n), {"input_ids": [5] * n, "position_ids": list(range(n))}, {}, "") for n in (2, 3, 4)]
    packed = Example("packed", {"input_ids": [5] * 6, "position_ids": [0, 1, 2, 0, 1, 2]}, {}, "")
    assert pair_of([*alone, packed]) == [alone[0], alone[2]]
