"""What an analysis is said to cost, against what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.cost import numbers_of
from hf_npeff.fisher.preparation import prepare
from hf_npeff.pefs.sketches import Sketch
from tests import tiny


def model() -> Any:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, num_labels=4
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize(("sketch", "dim"), [("kronecker", 16), ("countsketch", 4096), ("two-stage", 4096)])
def test_estimated_flops_are_those_that_are_counted(sketch: Any, dim: int) -> None:
    """Oracle: torch's own count of matrix products while the rows of a batch are made; attention is a few percent."""
    examples = Examples({"input_ids": torch.randint(5, 100, (4, 32))})[:]
    fisher = FisherConfig(rank=3, sketch=sketch, sketch_dim=dim)
    analyzer = NPEFFAnalyzer(model(), fisher=fisher)
    with analyzer.forward_pass() as forward:
        maker = prepare(forward, fisher, examples)
        with FlopCounterMode(display=False) as counter:
            maker.rows(examples)
    assert analyzer.estimate(4, tokens=32).flops == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_the_estimated_store_is_as_large_as_the_store(tmp_path: Path) -> None:
    """Oracle: the files of a store of 200 examples."""
    fisher = FisherConfig(rank=3, sketch="kronecker", sketch_dim=8)
    analyzer = NPEFFAnalyzer(model(), fisher=fisher)
    data = {"input_ids": torch.randint(5, 100, (200, 8))}
    analyzer.compute_pefs(data, tmp_path / "pefs", batch_size=50)
    size = sum(path.stat().st_size for path in (tmp_path / "pefs").iterdir())
    assert analyzer.estimate(data).disk == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "dim"), [("identity", None), ("kronecker", 8), ("countsketch", 99), ("two-stage", 64)]
)
def test_the_numbers_of_a_row_are_known_without_the_sketch(kind: Any, dim: int | None) -> None:
    """Oracle: the sketch."""
    shapes = {"a": (12, 5), "b": (7, 30)}
    assert numbers_of(kind, dim, shapes) == Sketch(shapes, kind, dim).dim


def test_an_estimate_prints_and_runs_nothing() -> None:
    """Oracle: a model whose forward pass raises; the table's lines."""
    broken = tiny.tiny_model("bert")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model ran")

    broken.forward = fails
    text = str(NPEFFAnalyzer(broken, tiny.tiny_tokenizer()).estimate(["a cat", "the big dog ran"]))
    assert "2 of 3 tokens" in text and "at most" in text and "store on disk" in text


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("family", "task", "settings", "rank"),
    [
        ("bert", "sequence-classification", {"num_labels": 2}, 4),
        ("bert", "sequence-classification", {"num_labels": 4}, 4),
        ("bert", "sequence-classification", {"num_labels": 9}, 4),
        ("bert", "sequence-classification", {"num_labels": 3, "problem_type": "multi_label_classification"}, 4),
        ("bert", "sequence-classification", {"num_labels": 1}, 4),
        ("bert", "token-classification", {"num_labels": 3}, 4),
        ("bert", "multiple-choice", {}, 4),
        ("bert", "question-answering", {}, 4),
        ("llama", "causal-lm", {}, 3),
    ],
)
@pytest.mark.parametrize("factor", ["auto", "exact"])
def test_the_estimated_rows_are_those_that_are_made(
    family: str, task: str, settings: dict[str, Any], rank: int, factor: Any
) -> None:
    """Oracle: the number of rows of the PEFs."""
    model = tiny.tiny_model(family, task, **settings)
    fisher = FisherConfig(rank=rank, output_factor=factor, sketch="kronecker", sketch_dim=2)
    analyzer, data = NPEFFAnalyzer(model, fisher=fisher), tiny.tiny_batch(model, 3, seed=1)
    assert analyzer.estimate(data).c == analyzer.compute_pefs(data).rank
