"""Analyzers without a sketch, and their rows by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff import (
    FisherConfig,
    NPEFFAnalyzer,
    PEFs,
)
from tests import reference
from tests.reference import terms_of
from tests.tiny import collate, task_of, tiny_batch, tiny_model


def analyzer_of(model: Any, processing_class: Any = None, **settings: Any) -> NPEFFAnalyzer:
    """An unsketched float64 analyzer, the brute-force setting; `settings` override."""
    config = FisherConfig(**{"sketch": "identity", "storage_dtype": "float64", **settings})
    return NPEFFAnalyzer(model, processing_class, fisher=config)


def in_parameters(analyzer: NPEFFAnalyzer, pefs: PEFs) -> Tensor:
    """Unsketched rows (n, c, p) before scaling, laid out as `model.named_parameters()` would flatten them."""
    blocks = pefs.sketch().blocks
    assert blocks is not None
    A = pefs.factors.double() * pefs.norms.sqrt()[:, None, None]
    parts = [m.as_weight(A[..., blocks[m.parameter]].unflatten(-1, m.shape)).flatten(2) for m in analyzer.maps]
    return torch.cat(parts, -1)


def brute_force(analyzer: NPEFFAnalyzer, examples: Sequence[Any], positions: str = "last") -> list[Tensor]:
    """A (k·t × p) of every example by plain autograd, one example at a time and unpadded."""
    model: Any = analyzer.model
    names = [m.parameter for m in analyzer.maps]
    terms = terms_of(task_of(model), positions)
    return [reference.example_factor(model, collate([e], model), names, terms) for e in examples]


def errors(analyzer: NPEFFAnalyzer, pefs: PEFs, truth: Sequence[Tensor]) -> list[float]:
    rows = in_parameters(analyzer, pefs)
    return [reference.relative_error_of_factors(B, A) for B, A in zip(truth, rows, strict=True)]


def small(settings: dict[str, Any] | None = None) -> tuple[NPEFFAnalyzer, list[dict[str, Any]]]:
    """An analyzer of two small weights, and seven examples."""
    model = tiny_model("bert")
    return analyzer_of(model, target_modules=["query"], **(settings or {})), tiny_batch(model, 7, seed=17)
