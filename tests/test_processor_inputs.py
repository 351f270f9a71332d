"""What processors make beside tokens: images and their places, another tokenizer's text, boxes; padded and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.fisher.tasks import task_of_class
from tests.sweep.judge import ROWS, TOKENS, errors_of, padded_batch
from tests.sweep.tiny_models import TinyModel, build
from tests.vision_inputs import batched, picture, processed


def pefs_of(tiny: TinyModel, data: Any, batch_size: int = 3, **settings: Any) -> PEFs:
    positions: Any = "labels" if tiny.kind == "seq2seq-lm" else "auto"
    fisher = FisherConfig(rank=ROWS, output_factor="exact", sketch="identity", positions=positions, **settings)
    return NPEFFAnalyzer(tiny.model, TOKENS, fisher=fisher).compute_pefs(data, batch_size=batch_size, progress=False)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", ["unpadded", "left"])
@pytest.mark.parametrize("model_type", ["instructblip", "kosmos-2", "idefics", "vision-encoder-decoder"])
def test_inputs_beside_the_tokens_are_padded_and_cut_with_theirs(model_type: str, how: str) -> None:
    """Oracle: JᵀSJ of every example alone by autograd, the model called directly on what its processor gives."""
    tiny = build(model_type, "image-text-to-text")
    data = tiny.examples if how == "unpadded" else padded_batch(tiny.examples, "left")
    assert max(errors_of(tiny, pefs_of(tiny, data)).values()) < 1e-4


def test_an_encoder_decoder_that_reads_images_alone_is_no_causal_language_model() -> None:
    """Oracle: transformers' own classes; BART's decoder alone says encoder-decoder in its config too."""
    assert task_of_class("VisionEncoderDecoderModel", encoder_decoder=True) == "seq2seq-lm"
    assert task_of_class("BartForCausalLM", encoder_decoder=True) == "causal-lm"
    assert task_of_class("GitForCausalLM", encoder_decoder=False) == "causal-lm"


_VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "idefics2", "smolvlm", "mistral3", "paligemma")
_FORMS = ("returned", "returned for all", "tokens without the batch", "without the batch")


def with_images(model_type: str) -> TinyModel:
    """Texts with one, two, no and one image, of different sizes."""
    model = build(model_type, "image-text-to-text").model
    images = [[picture(16, 16, 0)], [picture(24, 16, 1), picture(16, 24, 2)], [], [picture(16, 16, 3)]]
    return TinyModel(model, "causal-lm", [processed(model, own, 5 + i, i) for i, own in enumerate(images)])


def in_form(examples: list[dict[str, Any]], form: str) -> Any:
    if form == "returned for all":
        return batched(examples)
    tokens = {name for name in examples[0] if examples[0][name].shape[:2] == examples[0]["input_ids"].shape}
    if form == "tokens without the batch":
        return [{k: v[0].tolist() if k in tokens else v for k, v in example.items()} for example in examples]
    if form == "without the batch":
        return [
            {k: v[0].tolist() if k in tokens else v[0] if len(v) == 1 else v for k, v in example.items()}
            for example in examples
        ]
    return examples


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("model_type", "form"),
    # Every family in the form of one example, and every form; all of them together take half a minute.
    [(t, "returned") for t in _VISION]
    + [(t, f) for t, f in zip(("llava", "qwen2_vl", "mistral3", "idefics2", "smolvlm"), 2 * _FORMS[1:], strict=False)],
)
def test_texts_with_images_as_processors_return_them_have_the_fishers_of_each_alone(
    model_type: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: JᵀSJ of every example alone by autograd, the model called directly on what the processor returns.

    A batch holds texts with one, two and no images, of different sizes. PaliGemma does not bear padding.
    """
    tiny = with_images(model_type)
    model: Any = tiny.model
    logits = [model(**{k: v for k, v in tiny.examples[0].items() if k in names}).logits[0, -1] for names in _SEEN]
    assert float((logits[0] - logits[1]).detach().norm() / logits[0].detach().norm()) > 1e-3  # the image matters
    pefs = pefs_of(tiny, in_form(tiny.examples, form), batch_size=4)
    assert max(errors_of(tiny, pefs).values()) < 1e-4
    alone = any("one example at a time" in record.message for record in caplog.records)
    assert alone == (model_type == "paligemma" or (form == "without the batch" and model_type == "smolvlm"))


_SEEN: tuple[set[str], set[str]] = (
    {"input_ids", "attention_mask"},
    {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes",
     "mm_token_type_ids", "token_type_ids"},
)  # fmt: skip


def test_images_that_cannot_be_told_apart_are_refused_before_the_model_runs() -> None:
    """Oracle: the placeholders; two texts with places for one image each, and three images."""
    tiny = with_images("llava")
    batch = batched([tiny.examples[0], tiny.examples[3]])
    batch["pixel_values"] = torch.cat([batch["pixel_values"], batch["pixel_values"][:1]])
    with pytest.raises(ValueError, match=r"3 images.*2 texts.*processor"):
        pefs_of(tiny, batch)


def test_maps_of_the_vision_tower_get_each_examples_own_images() -> None:
    """Oracle: JᵀSJ by autograd; examples with one and with three images would get two each by equal shares."""
    tiny = with_images("llava")
    tiny.examples = [tiny.examples[0], processed(tiny.model, [picture(16, 16, i) for i in range(3)], 6, 9)]
    assert max(errors_of(tiny, pefs_of(tiny, tiny.examples, target_modules=r".*vision_tower.*q_proj")).values()) < 1e-4


def test_experts_for_tokens_of_images_get_each_examples_own() -> None:
    """Oracle: JᵀSJ by autograd; the self-test sees images of one size, and later batches images of two sizes.

    The experts for text and those for images get the tokens of all examples together, so equal shares would be wrong.
    """
    model = build("ernie4_5_vl_moe", "image-text-to-text").model
    sizes = [(16, 16)] * 8 + [(32, 16), (16, 16), (32, 32), (16, 16)]
    words = [6, 20] * 4 + [6] * 4  # so that later batches are no longer than those before them
    examples = [
        processed(model, [picture(*size, i)], n, i) for i, (size, n) in enumerate(zip(sizes, words, strict=True))
    ]
    tiny = TinyModel(model, "causal-lm", examples)
    pefs = pefs_of(tiny, examples, batch_size=4, target_modules=["gate_up_proj", "down_proj"])
    assert max(errors_of(tiny, pefs).values()) < 1e-4


def wav2vec2(norm: str) -> Any:
    return hf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8), num_labels=3,
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm=norm, classifier_proj_size=16,
    )  # fmt: skip


def spectrograms() -> Any:
    return hf.ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3, max_length=32,
        num_mel_bins=16, patch_size=8,
    )  # fmt: skip


def whisper() -> Any:
    return hf.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, num_labels=3, num_mel_bins=16,
        max_source_positions=50, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=16,
        pad_token_id=0, classifier_proj_size=16,
    )  # fmt: skip


_SOUND: dict[str, tuple[Callable[[], Any], Callable[[], Any], bool]] = {
    "with a mask": (lambda: wav2vec2("layer"), lambda: hf.Wav2Vec2FeatureExtractor(return_attention_mask=True), True),
    "without a mask": (lambda: wav2vec2("group"), lambda: hf.Wav2Vec2FeatureExtractor(), True),
    "spectrogram": (spectrograms, lambda: hf.ASTFeatureExtractor(num_mel_bins=16, max_length=32), False),
    "whisper": (whisper, lambda: hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1), False),
}


@pytest.mark.parametrize("batched_by_hand", [True, False], ids=["of one", "bare"])
@pytest.mark.parametrize("kind", list(_SOUND))
def test_sounds_as_feature_extractors_return_them_have_the_fishers_of_each_alone(
    kind: str, batched_by_hand: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: JᵀSJ of every sound alone by autograd; sounds of different lengths go one at a time, with a warning."""
    config, extractor, of_any_length = _SOUND[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = hf.AutoModelForAudioClassification.from_config(config()).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    sounds = [np.random.default_rng(i).standard_normal(n).astype("float32") for i, n in enumerate((800, 1200, 1000))]
    returned = [dict(extractor()(sound, sampling_rate=16_000, return_tensors="pt")) for sound in sounds]
    alone = [{name: value[0] for name, value in example.items()} for example in returned]
    tiny = TinyModel(model, "image-classification", alone)  # its oracle calls the model on whatever an example holds
    pefs = pefs_of(tiny, returned if batched_by_hand else alone)
    assert max(errors_of(tiny, pefs).values()) < 1e-4
    assert any("one example at a time" in record.message for record in caplog.records) == of_any_length


def test_texts_as_tokenizers_return_them_with_tensors_are_single_texts() -> None:
    """Oracle: JᵀSJ by autograd; a batch of one is no list of choices."""
    tiny = build("bert", "sequence-classification")
    returned = [{k: torch.tensor([v]) for k, v in example.items()} for example in tiny.examples]
    assert max(errors_of(tiny, pefs_of(tiny, returned)).values()) < 1e-4
