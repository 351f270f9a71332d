"""Examples that come padded, packed or with further inputs of tokens, against the model called on each one alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples, collate
from tests import tiny
from tests.test_checkpoints import decoder_that_sees

VOCABULARY = 20
PAD = 0


def analysed(model: Any, data: Any, batch_size: int = 8, **settings: Any) -> Any:
    """PEFs of few rows: predictions are what is looked at here."""
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=1, target_modules=r".*(q|q_proj|query)", **settings))
    return analyzer.compute_pefs(data, batch_size=batch_size)


def best(logits: Tensor) -> Tensor:
    """Log-probabilities of the likeliest outcome."""
    return logits.detach().log_softmax(-1).amax(-1)


def assert_predicts(pefs: Any, expected: list[Tensor]) -> None:
    for i, values in enumerate(expected):
        own = pefs.log_probs[i].reshape(-1)[: values.numel()]
        torch.testing.assert_close(own.double(), values.reshape(-1).double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_a_decoder_are_not_cut_with_the_encoders_padding(side: str, batch_size: int) -> None:
    """Oracle: T5 called on each example alone, its inputs and labels without padding; labels as wide as the inputs."""
    model = tiny.tiny_model("t5", "seq2seq-lm", dtype=torch.float32, vocab_size=VOCABULARY)
    ids = [[5, 6, 7, 1], [8, 9, 10, 11, 12, 1]]
    targets = [[7, 8, 9, 10, 11, 1], [6, 5, 1]]
    rows = [[0] * (6 - len(x)) + x if side == "left" else x + [0] * (6 - len(x)) for x in ids]
    data = {
        "input_ids": torch.tensor(rows),
        "attention_mask": (torch.tensor(rows) != PAD).long(),
        "labels": torch.tensor([x + [-100] * (6 - len(x)) for x in targets]),
    }
    pefs = analysed(model, data, batch_size, positions="labels")
    alone = [
        model(input_ids=torch.tensor([x]), labels=torch.tensor([y])).logits[0]
        for x, y in zip(ids, targets, strict=True)
    ]
    assert_predicts(pefs, [best(logits) for logits in alone])


def test_labels_of_a_causal_model_are_cut_with_its_padding() -> None:
    """Oracle: the labels at the tokens; those at padding repeat the padding token, as `labels=input_ids` has them."""
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    examples = Examples({"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.clone()})
    batch = collate(examples[:], PAD, "cpu", {"input_ids", "attention_mask", "labels"})
    assert batch["labels"].tolist() == [[5, 6, 7, -100, -100], [8, 9, 10, 11, 12]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_hole_in_an_attention_mask_is_no_padding(batch_size: int) -> None:
    """Oracle: Llama called on each example alone, with the hole, whose token keeps its position."""
    model = tiny.tiny_model("llama", "causal-lm", dtype=torch.float32, vocab_size=VOCABULARY)
    ids, mask = [[5, 6, 7, 8, 9], [8, 9, 10]], [[1, 0, 0, 1, 1], [1, 1, 1]]
    rows = [
        {"input_ids": x + [0] * (5 - len(x)), "attention_mask": m + [0] * (5 - len(m))}
        for x, m in zip(ids, mask, strict=True)
    ]
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    alone = [
        model(input_ids=torch.tensor([x]), attention_mask=torch.tensor([m])).logits[0, -1]
        for x, m in zip(ids, mask, strict=True)
    ]
    for data in (rows, columns):
        assert_predicts(analysed(model, data, batch_size), [best(logits) for logits in alone])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_documents_packed_into_one_sequence_do_not_see_each_other(batch_size: int) -> None:
    """Oracle: Llama called on the last document alone; position ids begin anew, and there is no attention mask."""
    model = tiny.tiny_model("llama", "causal-lm", dtype=torch.float32, vocab_size=VOCABULARY)
    data = [
        {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]},
        {"input_ids": [8, 9, 10], "position_ids": [0, 0, 1]},
    ]
    alone = [model(input_ids=torch.tensor([x])).logits[0, -1] for x in ([8, 9], [9, 10])]
    assert_predicts(analysed(model, data, batch_size), [best(logits) for logits in alone])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_documents_do_not_cut_a_text_beside_them(batch_size: int) -> None:
    """Oracle: Llama called on the last document alone, and on a text with gaps between its positions with a mask."""
    model = tiny.tiny_model("llama", "causal-lm", dtype=torch.float32, vocab_size=VOCABULARY)
    text, gaps = [8, 9, 10, 11, 12], [0, 2, 4, 6, 8]
    data = [
        {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]},
        {"input_ids": text, "position_ids": gaps},
    ]
    ids, places, ones = torch.tensor([text]), torch.tensor([gaps]), torch.ones(1, len(text), dtype=torch.long)
    whole = model(input_ids=ids, position_ids=places, attention_mask=ones).logits[0, -1]
    cut = model(input_ids=ids, position_ids=places, use_cache=False).logits[0, -1]
    assert abs(float(best(whole) - best(cut))) > 1e-2
    document = model(input_ids=torch.tensor([[8, 9]])).logits[0, -1]
    assert_predicts(analysed(model, data, batch_size), [best(document), best(whole)])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_positions_on_several_axes_are_given_to_their_examples(batch_size: int, padded: bool) -> None:
    """Oracle: Qwen2-VL called on each example alone, with its positions (3, 1, T); as many examples as axes."""
    model = decoder_that_sees("Qwen2VL").float()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 14, (n,), generator=generator).tolist() for n in (3, 5, 4)]
    axes = [torch.randint(0, 9, (3, len(x)), generator=generator) for x in ids]
    alone = [
        model(input_ids=torch.tensor([x]), position_ids=a[:, None]).logits[0, -1]
        for x, a in zip(ids, axes, strict=True)
    ]
    without = [model(input_ids=torch.tensor([x])).logits[0, -1] for x in ids]
    assert any(best(a) != best(b) for a, b in zip(alone, without, strict=True))
    data: list[dict[str, Any]] = [{"input_ids": x, "position_ids": a.tolist()} for x, a in zip(ids, axes, strict=True)]
    if padded:
        data = [
            {
                "input_ids": [0] * (5 - len(x)) + x,
                "position_ids": torch.nn.functional.pad(a, (5 - len(x), 0)).tolist(),
                "attention_mask": [0] * (5 - len(x)) + [1] * len(x),
            }
            for x, a in zip(ids, axes, strict=True)
        ]
    assert_predicts(analysed(model, data, batch_size), [best(logits) for logits in alone])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_documents_packed_with_positions_on_several_axes_do_not_see_each_other(batch_size: int) -> None:
    """Oracle: Qwen2-VL called on the last document alone; a row of the text's positions stands before the axes."""
    model = decoder_that_sees("Qwen2VL").float()
    data = [
        {"input_ids": [5, 6, 7, 8, 9], "position_ids": [[0, 1, 2, 0, 1]] * 4},
        {"input_ids": [8, 9, 10], "position_ids": [[0, 0, 1]] * 4},
    ]
    alone = [model(input_ids=torch.tensor([x])).logits[0, -1] for x in ([8, 9], [9, 10])]
    assert_predicts(analysed(model, data, batch_size), [best(logits) for logits in alone])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_boxes_of_tokens_are_padded_and_cut_with_them(batch_size: int, padded: bool) -> None:
    """Oracle: LayoutLM called on each example alone, with its boxes (T, 4)."""
    torch.manual_seed(0)
    config = transformers.LayoutLMConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, max_2d_position_embeddings=32, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LayoutLMForSequenceClassification(config).eval()
    ids = [[5, 6, 7], [8, 9, 10, 11, 12]]
    boxes = [[[i, i + 1, i + 2, i + 3] for i in x] for x in ids]
    data: list[dict[str, Any]] = [{"input_ids": x, "bbox": b} for x, b in zip(ids, boxes, strict=True)]
    if padded:
        data = [
            {
                "input_ids": [0] * (5 - len(x)) + x,
                "bbox": [[0] * 4] * (5 - len(x)) + b,
                "attention_mask": [0] * (5 - len(x)) + [1] * len(x),
            }
            for x, b in zip(ids, boxes, strict=True)
        ]
    alone = [
        model(input_ids=torch.tensor([x]), bbox=torch.tensor([b])).logits[0] for x, b in zip(ids, boxes, strict=True)
    ]
    assert_predicts(analysed(model, data, batch_size), [best(logits) for logits in alone])


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_masks_over_pairs_of_tokens_are_padded_in_both_dimensions(batch_size: int, additive: bool) -> None:
    """Oracle: Llama called on each example alone, with its own mask (1, T, T), of booleans or of what is added."""
    model = tiny.tiny_model("llama", "causal-lm", dtype=torch.float32, vocab_size=VOCABULARY)
    ids = [[5, 6, 7], [8, 9, 10, 11, 12]]
    masks = [torch.ones(1, len(x), len(x), dtype=torch.bool).tril() for x in ids]
    for mask in masks:
        mask[0, -1, 0] = False  # the last token does not see the first
    given = [torch.where(m, 0.0, torch.finfo(torch.float32).min) for m in masks] if additive else masks
    data = [{"input_ids": x, "attention_mask": m} for x, m in zip(ids, given, strict=True)]
    alone = [
        model(input_ids=torch.tensor([x]), attention_mask=m[None]).logits[0, -1]
        for x, m in zip(ids, given, strict=True)
    ]
    assert_predicts(analysed(model, data, batch_size), [best(logits) for logits in alone])


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_virtual_tokens_before_the_first_are_not_counted(kind: str, positions: str) -> None:
    """Oracle: the adapted Llama called on each example alone; its logits begin with those of three virtual tokens."""
    peft = pytest.importorskip("peft")
    model = tiny.tiny_model("llama", "causal-lm", dtype=torch.float32, vocab_size=VOCABULARY)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    if kind == "prompt":
        config = peft.PromptTuningConfig(**settings)
    else:
        config = peft.PromptEncoderConfig(**settings, encoder_hidden_size=8)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    ids = [[5, 6, 7], [8, 9, 10, 11, 12]]
    alone = [adapted(input_ids=torch.tensor([x]), attention_mask=torch.ones(1, len(x))).logits[0, 3:] for x in ids]
    expected = [best(logits[-1] if positions == "last" else logits) for logits in alone]
    assert_predicts(analysed(adapted, [{"input_ids": x} for x in ids], positions=positions), expected)
