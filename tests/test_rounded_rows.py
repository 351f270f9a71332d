"""Rows that are rounding and nothing else: zero PEFs with a warning; small true gradients stay.

Oracle: JᵀSJ by autograd in float64, of every example alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import reference, tiny
from tests.logged import warned_by
from tests.test_families import analyzer_of, as_rows, pair

QUERIES_AND_KEYS = r".*\.(q|k)_proj"


def fishers(analyzer: Any, exact: Any, examples: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The rows of every example by autograd in float64."""
    names = [m.parameter for m in analyzer.maps]
    terms = reference.terms_of(tiny.task_of(exact))
    return [
        as_rows(analyzer, exact, reference.example_factor(exact, tiny.collate([e], exact), names, terms))
        for e in examples
    ]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_where_attention_has_nothing_to_choose_queries_and_keys_have_zero_pefs(
    attention: str, batch_size: int, caplog: Any
) -> None:
    """One token, and one token many times: what is computed of their zero gradients is rounding."""
    model, exact = pair("llama", "causal-lm", attn_implementation=attention)
    examples = tiny.tiny_batch(model, 7, seed=1)
    examples[2], examples[5] = {"input_ids": [tiny.FIRST_WORD]}, {"input_ids": [tiny.FIRST_WORD] * 6}
    analyzer = analyzer_of(model, target_modules=QUERIES_AND_KEYS)
    pefs = analyzer.compute_pefs(examples, batch_size=batch_size)
    for i, B in enumerate(fishers(analyzer, exact, examples)):
        if i in (2, 5):
            assert float(pefs.norms[i]) == 0 and not bool(pefs.factors[i].any())
        else:
            row = pefs.factors[i].double() * pefs.norms[i].sqrt()
            assert reference.relative_error_of_factors(B, row) <= 1e-5
    # The self-test is made on another example: this one's gradient tells nothing, of batches and of the model.
    assert not warned_by(caplog, "fisher.forward") and not warned_by(caplog, "fisher.differences")
    assert pefs.info["selftest"]["row_error"] is not None
    (warning,) = warned_by(caplog, "fisher.rounded_rows")
    assert "'5'" in warning.args[0]  # whether the gradient of a single token is exactly zero, depends on the kernel


def test_an_example_with_a_hundred_thousandth_of_the_usual_effect_keeps_its_rows(caplog: Any) -> None:
    """Two tokens that differ by 1e-5 leave attention little to choose: a small gradient, to 1e-2 the true one."""
    model, exact = pair("llama", "causal-lm")
    a, b = tiny.FIRST_WORD, tiny.FIRST_WORD + 1
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[b] = table[a] * (1 + 1e-5 * torch.linspace(-1, 1, table.shape[1]))
        exact.get_input_embeddings().weight.copy_(table)
    examples = tiny.tiny_batch(model, 6, seed=1)
    examples[3] = {"input_ids": [a, b, a, a, b]}
    analyzer = analyzer_of(model, target_modules=QUERIES_AND_KEYS)
    pefs = analyzer.compute_pefs(examples)
    B = fishers(analyzer, exact, examples)[3]
    assert 0 < float(pefs.norms[3].sqrt()) < 1e-4 * float(pefs.norms[0].sqrt())
    assert reference.relative_error_of_factors(B, pefs.factors[3].double() * pefs.norms[3].sqrt()) <= 0.1
    assert not warned_by(caplog, "fisher.rounded_rows")


def test_predictions_that_are_certain_keep_their_rows(caplog: Any) -> None:
    """Fishers of 1e-12 and less: the cotangents are as small as the rows, so nothing is rounding."""
    model, exact = pair("bert", "sequence-classification")
    with torch.no_grad():
        for each in (model, exact):
            each.classifier.weight.mul_(150)
    examples = tiny.tiny_batch(model, 6, seed=2)
    analyzer = analyzer_of(model, target_modules=["query", "value"])
    pefs = analyzer.compute_pefs(examples)
    assert 0 < float(pefs.norms.min()) < 1e-12
    for i, B in enumerate(fishers(analyzer, exact, examples)):
        assert reference.relative_error_of_factors(B, pefs.factors[i].double() * pefs.norms[i].sqrt()) <= 1e-3
    assert not warned_by(caplog, "fisher.rounded_rows")
