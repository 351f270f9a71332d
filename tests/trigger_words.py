"""A small BERT classifier that has learned trigger words, analysed: lifting and perturbing are tested on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_npeff import Decomposition, FisherConfig, NPEFFAnalyzer, PEFs
from tests import reference

VOCABULARY, LENGTH, RULES = 48, 8, 6


def untrained(hidden: int = 64, layers: int = 2) -> Any:
    """The classifier before it has learned anything; its weights are drawn from torch's global generator."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        num_labels=RULES,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    return transformers.BertForSequenceClassification(config)


def trained(seed: int = 0, hidden: int = 64, layers: int = 2, steps: int = 150) -> Any:
    """A BERT classifier that has learned which of six trigger words an input holds; a few seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained(hidden, layers).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(steps):
            ids, labels = sentences(64, seed=1000 + step)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def sentences(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Random words with one trigger in each, and, in a fifth of them, a second one of another class."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, VOCABULARY, (n, LENGTH), generator=generator)
    labels = torch.randint(0, RULES, (n,), generator=generator)
    ids[torch.arange(n), torch.randint(0, LENGTH // 2, (n,), generator=generator)] = 1 + labels
    both = torch.rand(n, generator=generator) < 0.2
    other = torch.randint(0, RULES, (n,), generator=generator)
    ids[both, LENGTH - 1] = 1 + other[both]
    return ids, labels


@dataclass
class TrainedCase:
    """A trained model, analysed."""

    analyzer: NPEFFAnalyzer
    data: list[dict[str, Any]]
    pefs: PEFs
    decomposition: Decomposition


def trained_case(
    n: int = 80, rank: int = 2, components: int = 6, dim: int = 1024, *, model: Any = None, **settings: Any
) -> TrainedCase:
    """PEFs of a trained model in a countsketch of `dim` numbers, and a converged decomposition."""
    ids, labels = sentences(n, seed=1)
    data = [
        {"id": f"e{i}", "input_ids": x, "label": y}
        for i, (x, y) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True))
    ]
    fisher = FisherConfig(rank=rank, sketch="countsketch", sketch_dim=dim, storage_dtype="float32")
    analyzer = NPEFFAnalyzer(model or trained(), fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    options = {"n_restarts": 4, "max_iterations": 3000, "tolerance": 1e-10, "progress": False, **settings}
    return TrainedCase(analyzer, data, pefs, analyzer.decompose(pefs, components, **options))


def continued(found: TrainedCase, iterations: int = 8) -> dict[str, Tensor]:
    """{parameter: (r, out, in)}: the decomposition continued without a sketch from the same coefficients.

    Unsketched rows in an orthonormal basis of them all; from W alone, G by dense eigenproblems with W fixed, then both.
    """
    config = FisherConfig(rank=found.pefs.rank, sketch="identity", storage_dtype="float32")
    whole = NPEFFAnalyzer(found.analyzer.model, fisher=config).compute_pefs(found.data)
    rows = whole.factors.double()
    Q, _ = torch.linalg.qr(rows.flatten(0, 1).T)
    A = rows @ Q
    W = found.decomposition.coefficients.double()
    F = A.mT @ A
    G = torch.stack([reference.top_eigenvector(torch.einsum("i,iab->ab", w, F)) for w in W.T])
    for _ in range(20):
        for j in range(len(G)):
            others = W.clone()
            others[:, j] = 0
            mixed = torch.einsum("i,il->l", W[:, j], others)
            R = torch.einsum("i,iab->ab", W[:, j], F) - torch.einsum("l,la,lb->ab", mixed, G, G)
            G[j] = reference.top_eigenvector(R)
    _, G, _ = reference.dense_fit(A, G, iterations)
    blocks, shapes = whole.sketch().blocks, whole.sketch().shapes
    assert blocks is not None
    return {name: (G @ Q.T)[:, blocks[name]].unflatten(1, shapes[name]) for name in shapes}
