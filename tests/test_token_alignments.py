"""Alignments position by position, against gradients that autograd takes of every position's own copy of a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.decomposition.decomposition import balanced
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.weights.token_alignments import in_pieces
from tests.tiny import collate, tiny_batch, tiny_model, tiny_tokenizer


@contextmanager
def own_weights(model: torch.nn.Module, names: Mapping[str, str], positions: int) -> Iterator[dict[str, Tensor]]:
    """Linear modules that use, at each position, a copy of their weight that only this position uses: (t, out, in)."""
    modules = dict(model.named_modules())
    copies: dict[str, Tensor] = {}
    before = {name: modules[name].forward for name in names}

    def patch(name: str) -> None:
        module = modules[name]
        weight = module.weight.detach()
        matrix = weight.T if isinstance(module, Conv1D) else weight

        def forward(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            copy = matrix.expand(len(flat), *matrix.shape).clone().requires_grad_()
            copies[names[name]] = copy
            y = torch.einsum("ti,toi->to", flat, copy)
            return (y if module.bias is None else y + module.bias).reshape(*x.shape[:-1], -1)

        module.forward = forward  # type: ignore[method-assign]

    for name in names:
        patch(name)
    try:
        yield copies
    finally:
        for name, forward in before.items():
            modules[name].forward = forward  # type: ignore[method-assign]


def position_rows(analyzer: NPEFFAnalyzer, sketch: Sketch, example: Any, cotangents: Tensor, task: str) -> Tensor:
    """(c, t + 1, d): the unscaled sketched row of every cotangent and position; the last holds what has no position.

    The source is what the cotangents belong to: the last hidden state at the last position of a language model, the
    logits of a classifier.
    """
    names = {module: m.parameter for m in analyzer.maps for module in m.modules}
    model = analyzer.model
    batch = collate([{k: v for k, v in example.items() if k != "id"}], model)
    length = len(example["input_ids"])
    with own_weights(model, names, length) as copies:
        if task == "causal-lm":
            hidden = model.base_model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
            source = hidden[0, -1]
        else:
            source = model(**batch).logits[0]
        rows = []
        for v in cotangents.reshape(len(cotangents), -1).to(source.dtype):
            found = torch.autograd.grad((source * v).sum(), list(copies.values()), retain_graph=True, allow_unused=True)
            gradients = dict(zip(copies, found, strict=True))
            row = torch.zeros(length + 1, sketch.dim, dtype=torch.float64)
            zeros = {n: torch.zeros(s, dtype=torch.float64) for n, s in sketch.shapes.items()}
            for t in range(length):
                at = {n: g[t] if g is not None and len(g) == length else zeros[n] for n, g in gradients.items()}
                row[t] = sketch.apply(at)
            pooled = {n: g.sum(0) if g is not None and len(g) != length else zeros[n] for n, g in gradients.items()}
            row[length] = sketch.apply(pooled)
            rows.append(row)
    return torch.stack(rows)


CASES = {
    "gpt2, no sketch": ("gpt2", "causal-lm", {"sketch": "identity"}, {}),
    "llama, Kronecker, balanced": (
        "llama",
        "causal-lm",
        {"sketch": "kronecker", "sketch_dim": 6},
        {"balance": "module"},
    ),
    "llama, two stages": ("llama", "causal-lm", {"sketch": "two-stage", "sketch_dim": 128}, {}),
    "bert, countsketch": ("bert", "sequence-classification", {"sketch": "countsketch", "sketch_dim": 256}, {}),
    "gpt2, square root": ("gpt2", "causal-lm", {"sketch": "identity"}, {"power": 0.5}),
    "bert, balanced square root": (
        "bert",
        "sequence-classification",
        {"sketch": "identity"},
        {"balance": "module", "power": 0.5},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_contributions_are_those_of_each_positions_own_gradient(case: str) -> None:
    """Oracle: brute force. Each position has its own copy of every weight; autograd, sketch and sum do the rest."""
    family, task, fisher, settings = CASES[case]
    model = tiny_model(family, task)
    data = [{"id": f"e{i}", **e} for i, e in enumerate(tiny_batch(model, 10, seed=1))]
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, storage_dtype="float64", **fisher))
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 3, n_restarts=1, max_iterations=30, progress=False, **settings)
    sketch, G = pefs.sketch(), found.pseudo_fishers.double()
    D = torch.ones(sketch.dim, dtype=torch.float64) if found.scales is None else found.scales.double()
    A = balanced(pefs.factors, found.scales, found.config.power)
    for one in analyzer.token_alignments(found, pefs, data, [0, 2], n_top=3, batch_size=2):
        i, g = one.example, G[one.component]
        rows = position_rows(analyzer, sketch, data[i], pefs.cotangents[i].double(), task) * D
        # The decomposed rows are a mixture T of the unscaled ones; T is found from both, not from the code under test.
        T = torch.linalg.lstsq(rows.sum(1).T, A[i].double().T).solution.T
        mixed = torch.einsum("ab,btd->atd", T, rows)
        torch.testing.assert_close(mixed.sum(1), A[i].double(), rtol=1e-6, atol=1e-9)
        truth = torch.einsum("a,atd,d->t", A[i].double() @ g, mixed, g)
        assert one.alignment == pytest.approx(float((A[i].double() @ g).square().sum()), rel=1e-9)
        got = torch.tensor([*one.contributions, one.unplaced], dtype=torch.float64)
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6 * one.alignment)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("family", "task", "fisher"),
    [
        ("opt", "causal-lm", {"sketch": "kronecker", "sketch_dim": 8}),
        ("gpt2", "causal-lm", {"parameters": r".*(bias|ln_1.weight)", "sketch": "identity"}),
        ("t5", "seq2seq-lm", {"sketch": "identity"}),
        ("bert", "multiple-choice", {"sketch": "identity"}),
        ("bert", "question-answering", {"sketch": "identity"}),
        ("bert", "token-classification", {"sketch": "identity", "rank": 3}),
        ("albert", "token-classification", {"sketch": "identity"}),
        ("deberta-v2", "question-answering", {"sketch": "identity"}),
        ("vit", "image-classification", {"sketch": "countsketch", "sketch_dim": 512}),
    ],
)
def test_contributions_sum_to_the_alignment(family: str, task: str, fisher: dict[str, Any]) -> None:
    """Oracle: identity, Σ_t n_ijt + unplaced = ‖A_i g_j‖²; flattened, shared, pooled, cross-attending, 2D inputs."""
    model = tiny_model(family, task)
    data = tiny_batch(model, 8, seed=2)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(**{"rank": 2, "storage_dtype": "float64", **fisher}))
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 3, n_restarts=1, max_iterations=20, progress=False)
    B = torch.einsum("icd,jd->icj", pefs.factors.double(), found.pseudo_fishers.double())
    N = B.square().sum(1)
    alignments = analyzer.token_alignments(found, pefs, data, n_top=4, batch_size=3)
    assert len(alignments) > 6
    for one in alignments:
        assert one.alignment == pytest.approx(float(N[one.example, one.component]), rel=1e-9)
        assert sum(one.contributions) + one.unplaced == pytest.approx(one.alignment, rel=1e-6, abs=1e-9)
        if task != "image-classification":
            ids = data[one.example]["input_ids"]
            assert len(one.contributions) == (sum(map(len, ids)) if isinstance(ids[0], list) else len(ids))
    if family in ("opt", "albert") or task == "token-classification":
        assert all(abs(one.unplaced) < 1e-9 for one in alignments)
    if fisher.get("parameters"):
        assert any(abs(one.unplaced) > 1e-6 for one in alignments)


def test_a_decoder_is_not_placed_where_it_has_as_many_positions_as_the_input() -> None:
    """Oracle: identity on the stored rows: what is unplaced is Σ_c b_c ⟨a_c, g⟩ over the decoder's blocks alone."""
    model = tiny_model("t5", "seq2seq-lm")
    data = [
        {"input_ids": e["input_ids"][:4], "labels": [5, 6, 7, 8 + i]}
        for i, e in enumerate(tiny_batch(model, 6, seed=4))
    ]
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="identity", storage_dtype="float64"))
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 2, n_restarts=1, max_iterations=20, progress=False)
    blocks = pefs.sketch().blocks
    assert blocks is not None and {name.split(".")[0] for name in blocks} == {"encoder", "decoder"}
    decoder = torch.zeros(pefs.dim, dtype=torch.float64)
    for name, block in blocks.items():
        decoder[block] = name.startswith("decoder")
    for one in analyzer.token_alignments(found, pefs, data, n_top=2):
        A, g = pefs.factors[one.example].double(), found.pseudo_fishers[one.component].double()
        assert len(one.contributions) == 4
        assert one.unplaced == pytest.approx(float((A @ g) @ (A @ (g * decoder))), rel=1e-6, abs=1e-9)
        assert abs(one.unplaced) > 1e-6


def test_the_model_comes_back_as_it_came() -> None:
    """Oracle: identity of mode, requires_grad, hooks and random state."""
    model = tiny_model("gpt2").train()
    data = tiny_batch(model, 6, seed=3)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=1, sketch="identity"))
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 2, n_restarts=1, max_iterations=5, progress=False)
    state = torch.get_rng_state()
    analyzer.token_alignments(found, pefs, data, [1], n_top=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_examples_are_the_top_ones_and_tokens_make_up_their_text() -> None:
    """Oracle: identity with top_examples; pieces joined are the tokenizer's text."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    texts = ["the cat sees a dog", "a dog runs", "the bird", "cat and dog run home", "a bird sees the cat"]
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=1, sketch="identity"))
    pefs = analyzer.compute_pefs(texts)
    found = analyzer.decompose(pefs, 2, n_restarts=1, max_iterations=20, progress=False)
    alignments = analyzer.token_alignments(found, pefs, texts, n_top=2)
    for j in range(2):
        top = found[j].top_examples(2)
        chosen = [one.example for one in alignments if one.component == j]
        assert chosen == [i for i, w in zip(top.indices, top.coefficients, strict=True) if w > 0]
    for one in alignments:
        assert one.tokens is not None
        assert "".join(one.tokens) == tokenizer.decode(tokenizer(texts[one.example])["input_ids"])
    with pytest.raises(ValueError, match="n_top"):
        analyzer.token_alignments(found, pefs, texts, n_top=0)


def test_tokens_that_share_a_character_become_one_piece() -> None:
    """Oracle: planted truth. Bytes of one emoji are four tokens; their values are added."""
    characters = "a🧭b".encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    pieces, values = in_pieces(list(characters), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], decode)
    assert pieces == ["a", "🧭", "b"] and values == [1.0, 14.0, 6.0]
    assert in_pieces([7, 8], [0.5, 0.25], None) == (["7", "8"], [0.5, 0.25])
    broken = list("🧭".encode())[:2]
    assert sum(in_pieces(broken, [1.0, 2.0], decode)[1]) == 3.0
