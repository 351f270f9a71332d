"""Every model family and task against brute force, through the front door: NPEFFAnalyzer.compute_pefs."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer
from tests import reference, tiny
from tests.logged import warned_by

SMALL = 20
"""Vocabulary: brute force takes one backward pass per class and position."""
LINE_UP = 64
"""More rows than any example's Fisher has, so nothing is cut off."""

NOTES = {
    "deberta-v2": "one example at a time: a module runs once for the whole batch",
    "albert": "one set of weights, called in every layer",
    "gpt2": "Conv1D, fused query, key and value",
    "gemma2": "soft-capped logits and attention",
    "opt": "flattens examples inside its layers",
    "mamba": "no attention; `dt_proj` is read without being called: left out with a warning, or named in `parameters`",
    "mixtral": "fused experts, by hooks on their own call",
    "t5": "decoder positions",
    "bart": "decoder positions",
    "m2m_100": "decoder positions",
    "vit": "images",
}


def pair(family: str, task: str, **options: Any) -> tuple[Any, Any]:
    """A model in float32, and the same weights in float64 for the oracle."""
    if family != "vit":
        options.setdefault("vocab_size", SMALL)
    model = tiny.tiny_model(family, task, dtype=torch.float32, **options)
    exact = tiny.tiny_model(family, task, dtype=torch.float64, **options)
    exact.load_state_dict(model.state_dict())
    return model, exact


def analyzer_of(model: Any, **settings: Any) -> NPEFFAnalyzer:
    """An analyzer that keeps every row, unsketched."""
    defaults: dict[str, Any] = {
        "rank": LINE_UP, "output_factor": "exact", "sketch": "identity", "storage_dtype": "float64",
    }  # fmt: skip
    tokenizer = None if model.config.model_type == "vit" else tiny.tiny_tokenizer()
    return NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(**(defaults | settings)))


def as_rows(analyzer: NPEFFAnalyzer, model: Any, A: Tensor) -> Tensor:
    """The oracle's rows (m, p), parameters laid out as they are stored → as the analyzer lays them out."""
    shapes = reference.sizes(model, [*(m.parameter for m in analyzer.maps), *analyzer.parameters])
    transposed = {m.parameter for m in analyzer.maps if m.transposed}  # of the families here, no experts' are
    parts = A.split([shape.numel() for shape in shapes.values()], dim=1)
    matrices = [part.reshape(len(A), *shape) for part, shape in zip(parts, shapes.values(), strict=True)]
    return torch.cat(
        [(m.mT if n in transposed else m).flatten(1) for n, m in zip(shapes, matrices, strict=True)], 1
    )  # fmt: skip


def worst_error(
    analyzer: NPEFFAnalyzer, exact: Any, examples: list[dict[str, Any]], terms: Any, batch_size: int = 8
) -> float:
    """The largest relative error of an example's Fisher, ‖F − AᵀA‖ / ‖F‖, against the oracle one example at a time."""
    pefs = analyzer.compute_pefs(examples, batch_size=batch_size)
    names = [*(m.parameter for m in analyzer.maps), *analyzer.parameters]
    errors = []
    for i, example in enumerate(examples):
        batch = tiny.collate([example], exact)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(exact.dtype)
        B = as_rows(analyzer, exact, reference.example_factor(exact, batch, names, terms))
        errors.append(reference.relative_error_of_factors(B, pefs.factors[i].double() * pefs.norms[i].sqrt()))
    return max(errors)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "task"), tiny.CASES)
def test_fishers_of_every_family_and_task_equal_brute_force(family: str, task: str) -> None:
    """Oracle: JᵀSJ from one autograd pass per class and term on each unpadded example alone, in float64.

    The analyzer sees a padded batch of three, in float32, with the exact factor and no sketch.
    """
    model, exact = pair(family, task)
    examples = tiny.tiny_batch(model, 3, seed=1)
    analyzer = analyzer_of(model, positions="labels" if task == "seq2seq-lm" else "auto")
    assert worst_error(analyzer, exact, examples, reference.terms_of(task)) <= 1e-4


VOCABULARY_CASES = [(f, t) for f, t in tiny.CASES if t in ("causal-lm", "masked-lm", "seq2seq-lm")]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "task"), VOCABULARY_CASES)
def test_spectral_rows_at_the_hidden_state_with_full_rank_equal_brute_force(family: str, task: str) -> None:
    """Oracle: JᵀSJ as above; as many directions as the hidden state has are all there are, soft-capped or not."""
    model, exact = pair(family, task)
    examples = tiny.tiny_batch(model, 2, seed=2)
    if task == "masked-lm":  # one term each: 16 rows keep everything
        examples = [{"input_ids": [t if t != tiny.MASK else 9 for t in e["input_ids"]]} for e in examples]
        for example in examples:
            example["input_ids"][2] = tiny.MASK
        terms = reference.terms_of(task)
    elif task == "seq2seq-lm":
        terms = reference.terms_of(task, [-1])
    else:
        terms = reference.terms_of(task)
    size = getattr(model.config, "embedding_size", 16)  # ALBERT's head narrows it
    analyzer = analyzer_of(model, rank=size, output_factor="spectral")
    assert worst_error(analyzer, exact, examples, terms) <= 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_both_kinds_of_attention_equal_brute_force(family: str, attention: str) -> None:
    """Oracle: JᵀSJ in float64 with eager attention."""
    task = tiny.FAMILIES[family][0]
    model, exact = pair(family, task)
    model.set_attn_implementation(attention)
    exact.set_attn_implementation("eager")
    assert model.config._attn_implementation == attention
    examples = tiny.tiny_batch(model, 3, seed=3)
    assert worst_error(analyzer_of(model), exact, examples, reference.terms_of(task)) <= 1e-4


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_batch_gives_what_single_examples_give(family: str) -> None:
    """Oracle: the same analyzer at batch_size=1, where nothing is padded."""
    model = tiny.tiny_model(family, vocab_size=SMALL)
    examples = tiny.tiny_batch(model, 5, seed=4)
    analyzer = analyzer_of(model)
    one, many = (analyzer.compute_pefs(examples, batch_size=size) for size in (1, 5))
    torch.testing.assert_close(many.norms, one.norms, rtol=1e-10, atol=0)
    for i in range(5):
        assert reference.relative_error_of_factors(one.factors[i], many.factors[i]) <= 1e-10


def test_a_module_that_runs_once_for_the_batch_is_named_and_examples_go_one_by_one(caplog: Any) -> None:
    """Oracle: DeBERTa-v2 with shared keys projects its relative positions once for all examples (equality above)."""
    model = tiny.tiny_model("deberta-v2", vocab_size=SMALL)
    with caplog.at_level(logging.WARNING):
        analyzer_of(model).compute_pefs(tiny.tiny_batch(model, 3, seed=1))
    (warning,) = warned_by(caplog, "fisher.forward")
    assert "query_proj" in str(warning.args)


def test_fused_experts_are_named_with_their_share_when_they_are_left_out(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the parameter counts of Mixtral's two kinds of expert weights, and of all outside the embeddings.

    Where experts compute something else than is known of them, hooks do not see them; `parameters` brings them back.
    """
    model = tiny.tiny_model("mixtral", dtype=torch.float32, vocab_size=SMALL)
    formula = type(model.model.layers[0].mlp.experts).forward

    def doubled(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result: Tensor = 2 * formula(self, hidden_states, top_k_index, top_k_weights)
        return result

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "forward", doubled)
    outside = {n: p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n}
    share = 100 * sum(n for name, n in outside.items() if name.endswith("gate_up_proj")) / sum(outside.values())
    with caplog.at_level(logging.WARNING):
        analyzer_of(model).compute_pefs(tiny.tiny_batch(model, 2, seed=1))
    assert (
        f"model.layers.*.mlp.experts.gate_up_proj ({share:.1f}%), model.layers.*.mlp.experts.down_proj" in caplog.text
    )
    assert len(warned_by(caplog, "fisher.preparation")) == 1
    caplog.clear()
    analyzer = analyzer_of(model, parameters=r".*experts.*")
    assert len(analyzer.parameters) == 4
    with caplog.at_level(logging.WARNING):
        analyzer.compute_pefs(tiny.tiny_batch(model, 2, seed=1))
    assert "experts" not in caplog.text


def test_a_weight_that_is_read_without_calling_its_module_is_named_and_left_out(caplog: Any) -> None:
    """Oracle: Mamba multiplies by `dt_proj.weight` itself; what is left equals brute force (above)."""
    model = tiny.tiny_model("mamba", dtype=torch.float32, vocab_size=SMALL)
    analyzer = analyzer_of(model)
    with caplog.at_level(logging.WARNING):
        pefs = analyzer.compute_pefs(tiny.tiny_batch(model, 2, seed=1))
    left_out = [f"backbone.layers.{i}.mixer.dt_proj.weight" for i in (0, 1)]
    assert pefs.info["selftest"]["left_out"] == left_out
    assert all(name in caplog.text for name in left_out)
    assert not set(left_out) & set(pefs.sketch().shapes)


class RoutedExperts(torch.nn.Module):
    """Experts as nn.Linear, each of which sees the tokens that are routed to it, of any example."""

    def __init__(self, width: int, n_experts: int = 3):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out = torch.zeros_like(flat)
        which = (flat[:, 0] * 7).long() % len(self.experts)
        for i, expert in enumerate(self.experts):
            chosen = which == i
            out[chosen] = expert(flat[chosen])
        return x + out.view_as(x)


def with_routed_experts() -> Any:
    model = tiny.tiny_model("llama", dtype=torch.float32, vocab_size=SMALL)
    for layer in model.model.layers:
        layer.mlp = RoutedExperts(16)
    return model.eval()


def test_routed_linear_experts_go_one_by_one_in_a_batch_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: JᵀSJ of each example alone; an expert's inputs mix tokens of all examples of a batch."""
    model = with_routed_experts()
    examples = tiny.tiny_batch(model, 3, seed=1)
    with caplog.at_level(logging.WARNING):
        error = worst_error(analyzer_of(model), model, examples, reference.terms_of("causal-lm"), batch_size=3)
    assert error <= 1e-4
    assert re.search(r"experts\.\d.*continuing with one example at a time", caplog.text)


def test_routed_linear_experts_equal_brute_force_at_batch_size_one() -> None:
    """Oracle: JᵀSJ of each example alone, in the same precision, experts included."""
    model = with_routed_experts()
    examples = tiny.tiny_batch(model, 3, seed=1)
    analyzer = analyzer_of(model)
    assert any(".experts." in m.parameter for m in analyzer.maps)
    assert worst_error(analyzer, model, examples, reference.terms_of("causal-lm"), batch_size=1) <= 1e-4


def fnet() -> Any:
    """A classifier that mixes tokens by a Fourier transform over the batch's whole length, padding included."""
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    config = transformers.FNetConfig(vocab_size=SMALL, num_labels=3, initializer_range=0.3, **widths)
    return transformers.FNetForSequenceClassification(config).eval()


def test_a_model_that_padding_changes_gets_one_example_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: JᵀSJ of each example alone, and of their sum when a component is lifted; the warning says how much."""
    model = fnet()
    examples = tiny.tiny_batch(model, 3, seed=1)
    analyzer = analyzer_of(model)
    exact = copy.deepcopy(model).double()
    with caplog.at_level("WARNING", logger="hf_npeff"):
        assert worst_error(analyzer, exact, examples, reference.terms_of("sequence-classification")) <= 1e-4
    assert re.search(r"padding changes the model's logits by \d+\.\d%: continuing with one example", caplog.text)
    pefs = analyzer.compute_pefs(examples, batch_size=3)
    decomposition = analyzer.decompose(pefs, 2, seed=0)
    for other in (analyzer, analyzer_of(model)):
        together, alone = (other.lift(decomposition, 0, pefs, examples, batch_size=b, selective=False) for b in (3, 1))
        assert set(together) == set(alone)
        for name in together:
            torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-4)


def test_examples_of_one_length_keep_their_batches(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: without padding nothing depends on it, so nothing is said and the rows are those of examples alone."""
    model = fnet()
    examples = [{"input_ids": e["input_ids"][:4]} for e in tiny.tiny_batch(model, 3, seed=1)]
    with caplog.at_level("WARNING", logger="hf_npeff"):
        together, alone = (analyzer_of(model).compute_pefs(examples, batch_size=b).factors for b in (3, 1))
    assert not warned_by(caplog, "fisher.forward")
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_head_that_reads_its_weight_without_calling_it_is_right_at_the_logits(caplog) -> None:
    """Oracle: JᵀSJ by brute force. MobileBERT's masked-LM head multiplies by two weights put together."""
    config = transformers.MobileBertConfig(
        vocab_size=SMALL, hidden_size=16, embedding_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, intra_bottleneck_size=16, true_hidden_size=16, num_feedforward_networks=2,
    )  # fmt: skip
    model = transformers.MobileBertForMaskedLM(config).eval()
    exact = transformers.MobileBertForMaskedLM(config).double().eval()
    exact.load_state_dict(model.state_dict())
    examples = [{"input_ids": [5, 6, tiny.MASK, 7]}, {"input_ids": [8, tiny.MASK, 6, 9]}]
    assert worst_error(analyzer_of(model), exact, examples, reference.terms_of("masked-lm")) <= 1e-4
    assert warned_by(caplog, "fisher.heads")


def table() -> str:
    """The table in docs/models.md of what the test above runs."""
    lines = ["| family | tasks | notes |", "|---|---|---|"]
    lines += [f"| {family} | {', '.join(tasks)} | {NOTES.get(family, '')} |" for family, tasks in tiny.FAMILIES.items()]
    return "\n".join(lines)


def test_the_table_of_tested_families_is_what_is_tested() -> None:
    """Oracle: the parameters of the first test here. `python -m tests.test_families` writes the table."""
    text = PAGE.read_text()
    assert text.count(MARK) == 2, f"docs/models.md needs two lines {MARK}"
    assert text.split(MARK)[1].strip() == table(), "run `python -m tests.test_families`"


PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "<!-- tested-models -->"

if __name__ == "__main__":
    before, _, after = PAGE.read_text().split(MARK)
    PAGE.write_text(f"{before}{MARK}\n{table()}\n{MARK}{after}")
