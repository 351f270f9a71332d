"""Models for which a batch changes what an example gets: right all the same, one at a time where it has to be.

The oracle is a fresh copy of the model, called on each example alone without padding.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer, UnsupportedModelError
from hf_npeff.fisher.batching import relative_change
from hf_npeff.fisher.model_state import ModelState
from hf_npeff.fisher.rows import RowMaker
from tests import reference, tiny
from tests.logged import warned_by
from tests.test_families import analyzer_of, as_rows

VOCABULARY = 20
WIDTHS: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def built(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
    return model


def texts(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def fisher_errors(model: Any, task: str, examples: list[dict[str, Any]], batch_size: int) -> list[float]:
    """Relative errors of exact Fishers against JᵀSJ by autograd, each on a fresh copy of the model."""
    analyzer = analyzer_of(model)
    pefs = analyzer.compute_pefs(examples, batch_size=batch_size)
    names = [m.parameter for m in analyzer.maps]
    errors = []
    for i, example in enumerate(examples):
        fresh = copy.deepcopy(model)
        B = reference.example_factor(fresh, tiny.collate([example], fresh), names, reference.terms_of(task))
        A = pefs.factors[i].double() * pefs.norms[i].sqrt()
        errors.append(reference.relative_error_of_factors(as_rows(analyzer, fresh, B), A))
    return errors


def best_alone(model: Any, example: dict[str, Any]) -> Tensor:
    """The log-probability of a causal model's likeliest next token."""
    logits = copy.deepcopy(model)(input_ids=torch.tensor([example["input_ids"]]), use_cache=False).logits[0, -1]
    return logits.detach().log_softmax(-1).amax(-1)


def fnet(model_class: Any) -> Any:
    widths = {k: v for k, v in WIDTHS.items() if k != "num_attention_heads"}
    return built(model_class, hf.FNetConfig(vocab_size=VOCABULARY, num_labels=3, max_position_embeddings=48, **widths))


def convbert() -> Any:
    return built(
        hf.ConvBertForSequenceClassification,
        hf.ConvBertConfig(
            vocab_size=VOCABULARY, num_labels=3, embedding_size=16, max_position_embeddings=32, conv_kernel_size=3,
            num_groups=1, head_ratio=1, **WIDTHS,
        ),
    )  # fmt: skip


def nystromformer() -> Any:
    return built(
        hf.NystromformerForSequenceClassification,
        hf.NystromformerConfig(
            vocab_size=VOCABULARY, num_labels=3, max_position_embeddings=32, segment_means_seq_len=8, num_landmarks=8,
            conv_kernel_size=3, **WIDTHS,
        ),
    )  # fmt: skip


def funnel() -> Any:
    return built(
        hf.FunnelForSequenceClassification,
        hf.FunnelConfig(
            vocab_size=VOCABULARY, num_labels=3, block_sizes=[1, 1, 1], d_model=16, n_head=2, d_head=8, d_inner=24,
            num_decoder_layers=1,
        ),
    )  # fmt: skip


def big_bird() -> Any:
    """Block-sparse for more than 14 tokens; a shorter batch switches it to full attention for good."""
    return built(
        hf.BigBirdForSequenceClassification,
        hf.BigBirdConfig(
            vocab_size=VOCABULARY, num_labels=3, max_position_embeddings=48, block_size=2, num_random_blocks=1,
            attention_type="block_sparse", **WIDTHS,
        ),
    )  # fmt: skip


def phi3() -> Any:
    """Other rotary factors beyond 6 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 6,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.0],
    }  # fmt: skip
    return built(
        hf.Phi3ForCausalLM,
        hf.Phi3Config(
            vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64,
            original_max_position_embeddings=6, pad_token_id=0, rope_parameters=rope, **WIDTHS,
        ),
    )  # fmt: skip


CLASSIFIER, CAUSAL = "sequence-classification", "causal-lm"
KINDS: dict[str, tuple[Any, str, tuple[int, ...], bool]] = {
    "FNet, one label a token": (
        lambda: fnet(hf.FNetForTokenClassification),
        "token-classification",
        (3, 9, 5, 8),
        True,
    ),
    "ConvBERT": (convbert, CLASSIFIER, (3, 9, 5, 8), True),
    "Nyströmformer": (nystromformer, CLASSIFIER, (3, 9, 5, 8), True),
    "Funnel": (funnel, CLASSIFIER, (9, 8, 16, 11, 12, 10), True),
    "BigBird": (big_bird, CLASSIFIER, (3, 19, 5, 30, 7, 25), True),
    "Phi-3": (phi3, CAUSAL, (3, 9, 5, 8, 6, 7), False),
}
"""{kind: (model, task, lengths of the examples, whether they go one at a time)}."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_each_example_the_fisher_that_a_fresh_model_gives_it_alone(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: JᵀSJ by autograd, each example alone on a fresh copy; a warning where batches are out of the question."""
    make, task, lengths, alone = KINDS[kind]
    with caplog.at_level(logging.WARNING, logger="hf_npeff"):
        assert max(fisher_errors(make(), task, texts(*lengths), 4)) <= 1e-4
    assert bool(warned_by(caplog, "fisher.forward")) == alone


@pytest.mark.parametrize("kind", ["BigBird", "Phi-3"])
def test_a_model_that_changes_itself_with_its_input_comes_back_as_it_came(kind: str) -> None:
    """Oracle: modules, buffers and plain attributes of the model before, and its predictions for a long example."""
    make, _, lengths, _ = KINDS[kind]
    model = make()
    state, before = ModelState(model), {name: type(module) for name, module in model.named_modules()}
    (long,) = texts(30)
    expected = copy.deepcopy(model)(input_ids=torch.tensor([long["input_ids"]])).logits
    analyzer_of(model).compute_pefs(texts(*lengths), batch_size=4)
    assert not state.restore(), "something had changed"
    assert {name: type(module) for name, module in model.named_modules()} == before
    torch.testing.assert_close(model(input_ids=torch.tensor([long["input_ids"]])).logits, expected)


def test_states_left_in_modules_by_a_generated_text_do_not_reach_an_analysis() -> None:
    """Oracle: the analysis of a RecurrentGemma, which keeps states in its modules, that has generated nothing."""
    config = hf.RecurrentGemmaConfig(
        vocab_size=VOCABULARY, lru_width=16, hidden_size=16, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    fresh, used = (built(hf.RecurrentGemmaForCausalLM, config) for _ in range(2))
    start = {"input_ids": torch.tensor([[2]]), "max_new_tokens": 1, "output_logits": True}
    logits = [used.generate(**start, return_dict_in_generate=True).logits[0] for _ in range(2)]
    assert relative_change(logits[1], logits[0]) > 1e-2, "generating from one token goes on from the last text"
    data = [{"input_ids": [2]}, *texts(4)]
    before, after = (analyzer_of(model).compute_pefs(data, batch_size=1) for model in (fresh, used))
    torch.testing.assert_close(after.log_probs, before.log_probs)
    torch.testing.assert_close(after.factors, before.factors)


def test_a_model_without_a_mask_predicts_at_each_examples_last_token() -> None:
    """Oracle: xLSTM, which takes no attention mask, called on each example alone."""
    kernels = {
        "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
        "step_kernel": "native", "chunk_size": 4, "mode": "inference",
    }  # fmt: skip
    config = hf.xLSTMConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_heads=2, qk_dim_factor=0.5, v_dim_factor=1.0,
        **kernels,
    )  # fmt: skip
    model, examples = built(hf.xLSTMForCausalLM, config), texts(3, 9, 5, 8)
    pefs = analyzer_of(model, output_factor="auto", rank=1).compute_pefs(examples, batch_size=4)
    expected = torch.stack([best_alone(model, example) for example in examples])
    torch.testing.assert_close(pefs.log_probs.flatten().float(), expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_puts_tokens_before_examples_goes_one_at_a_time_by_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Oracle: JᵀSJ of XLNet on each example alone; its layers see (T, B, h), so that no row can be told apart."""
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = built(hf.XLNetLMHeadModel, config)
    with caplog.at_level(logging.WARNING, logger="hf_npeff"):
        assert max(fisher_errors(model, CAUSAL, texts(3, 9, 5), 3)) <= 1e-4
    assert warned_by(caplog, "fisher.forward")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_labels_padded_to_one_width_leave_the_decoders_input_alone(batch_size: int) -> None:
    """Oracle: FSMT called on each example alone; its decoder's input begins with the last label that is no padding."""
    config = hf.FSMTConfig(
        src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["en", "de"], d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    model, examples = built(hf.FSMTForConditionalGeneration, config), texts(4, 6)
    targets = [[7, 8, 1], [6, 5, 9, 10, 1]]
    data = [{**e, "labels": y + [-100] * (5 - len(y))} for e, y in zip(examples, targets, strict=True)]
    fisher = FisherConfig(rank=1, positions="labels", target_modules=r".*q_proj")
    pefs = NPEFFAnalyzer(model, fisher=fisher).compute_pefs(data, batch_size=batch_size)
    for i, (example, labels) in enumerate(zip(examples, targets, strict=True)):
        read = torch.tensor([labels[-1:] + labels[:-1]])
        logits = model(input_ids=torch.tensor([example["input_ids"]]), decoder_input_ids=read, use_cache=False).logits[
            0
        ]
        expected = logits.detach().log_softmax(-1).amax(-1)
        torch.testing.assert_close(pefs.log_probs[i, : len(labels)].float(), expected, atol=1e-4, rtol=1e-4)


def test_padding_is_tried_where_the_first_mixed_batch_comes(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: FNet called on each example alone; 64 examples of one length, then others."""
    model = fnet(hf.FNetForSequenceClassification)
    examples = texts(*[4] * 66, 9, 7, 5, 11)
    with caplog.at_level(logging.WARNING, logger="hf_npeff"):
        pefs = analyzer_of(model).compute_pefs(examples, batch_size=4)
    assert "padding" in warned_by(caplog, "fisher.forward")[0].getMessage()
    for i, example in enumerate(examples[60:], 60):
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        expected = logits.detach().log_softmax(-1).amax(-1)
        torch.testing.assert_close(pefs.log_probs[i].float(), expected, atol=1e-4, rtol=1e-4)


# The self-test, repeated ----------------------------------------------------------------------------------------------


def bert() -> Any:
    return tiny.tiny_model("bert", vocab_size=VOCABULARY, dtype=torch.float32)


def test_rows_of_new_kinds_are_checked_again_and_the_store_says_so(tmp_path: Any) -> None:
    """Oracle: what is in the data: lengths mixed, longer and with other inputs after the first 64 examples."""
    model, data = bert(), texts(*[4] * 64, 9, 5, 8, 7, *[6] * 12, 5)
    data[-1]["token_type_ids"] = [0] * 5
    analyzer = analyzer_of(model, sketch="kronecker", sketch_dim=4, rank=2)
    pefs = analyzer.compute_pefs(data, tmp_path / "pefs", batch_size=4, shard_size=16)
    later = pefs.info["selftest"]["later"]
    assert [(check["why"], check["examples"], check["shortest"], check["longest"]) for check in later] == [
        ("longest so far, mixed lengths", 4, 6, 9),
        ("other inputs", 1, 5, 5),
    ]
    assert all(check["row_error"] < 1e-3 for check in later)
    assert analyzer.compute_pefs(data, batch_size=4, shard_size=16).info["selftest"]["later"] == later
    pefs.save(tmp_path / "copy")
    assert type(pefs).load(tmp_path / "copy").info["selftest"]["later"] == later


def test_a_random_batch_of_a_long_run_is_checked_again() -> None:
    """Oracle: 65 batches of one kind; one of them is drawn, the same each time."""
    analyzer = analyzer_of(bert(), sketch="kronecker", sketch_dim=4, rank=1, output_factor="spectral")
    runs = [analyzer.compute_pefs(texts(*[4] * 130), batch_size=2) for _ in range(2)]
    checks = [run.info["selftest"]["later"] for run in runs]
    assert [check["why"] for check in checks[0]] == ["drawn at random"]
    assert checks[0] == checks[1]


def test_rows_that_go_wrong_later_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: rows that are spoilt on the way, but for those of the first batches."""
    analyzer, original, made = analyzer_of(bert(), rank=2), RowMaker.rows, []

    def spoilt(self: RowMaker, examples: Any) -> Any:
        rows = original(self, examples)
        if self.selftest is not None:
            made.append(len(examples))
            if len(made) > 1 and len(examples) > 1:
                rows["factors"] = rows["factors"].flip(2)
        return rows

    monkeypatch.setattr(RowMaker, "rows", spoilt)
    with pytest.raises(UnsupportedModelError, match="batch_size=1"):
        analyzer.compute_pefs(texts(*[4] * 130), batch_size=2)


def test_a_number_that_a_batch_makes_infinite_is_a_change() -> None:
    """Oracle: by hand. −∞ in the same place is what a model gives for a forbidden outcome; in one of both, a change."""
    alone = torch.tensor([1.0, 2.0, float("-inf")])
    assert relative_change(alone.clone(), alone) == 0
    assert relative_change(torch.tensor([float("-inf"), 2.0, float("-inf")]), alone) == float("inf")
    assert relative_change(torch.tensor([1.0, 2.0, 3.0]), alone) == float("inf")


def changed_at_a_word(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the model's hidden states where a batch of several holds the word 17."""
    ids: list[Tensor] = []
    model.bert.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )
    layer = model.bert.encoder.layer[1].intermediate

    def before(module: Any, args: Any) -> Any:
        here = len(ids[-1]) > 1 and bool((ids[-1] == 17).any())
        return (change(args[0]), *args[1:]) if here else args

    layer.register_forward_pre_hook(before)


@pytest.mark.parametrize("kind", ["NaN", "not told apart"])
def test_what_only_a_later_batch_does_not_bear_sends_examples_one_at_a_time(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: JᵀSJ on a fresh copy of the model, alone; the first 64 examples show nothing of what comes later."""
    examples = [{"input_ids": [5 + i % 5] * (4 + i % 3)} for i in range(66)]
    examples += [{"input_ids": [17, 6, 9, 9]}, {"input_ids": [8, 7, 5, 11, 9, 6]}]
    model = bert()
    if kind == "NaN":
        changed_at_a_word(model, lambda x: x * float("nan"))
    else:
        changed_at_a_word(model, lambda x: x.flatten(0, 1)[None])
        later = model.bert.encoder.layer[1].output.dense
        later.register_forward_hook(lambda module, args, output: output.reshape(-1, *output.shape[-2:]))
    with caplog.at_level(logging.WARNING):
        analyzer = analyzer_of(model)
        pefs = analyzer.compute_pefs(examples, batch_size=34, progress=False)
    assert any("one example at a time" in record.message for record in caplog.records)
    names = [m.parameter for m in analyzer.maps]
    for i in (0, 65, 66, 67):
        fresh = copy.deepcopy(bert())
        B = reference.example_factor(fresh, tiny.collate([examples[i]], fresh), names, reference.terms_of("bert"))
        assert torch.isfinite(B).all()
        A = pefs.factors[i].double() * pefs.norms[i].sqrt()
        assert reference.relative_error_of_factors(as_rows(analyzer, fresh, B), A) < 1e-4
