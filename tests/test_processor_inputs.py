"""What processors make beside tokens: images and their places, another tokenizer's text, boxes; padded and not."""

from __future__ import annotations

from typing import Any

import pytest

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.fisher.tasks import task_of_class
from tests.sweep.judge import ROWS, TOKENS, errors_of, padded_batch
from tests.sweep.tiny_models import TinyModel, build


def pefs_of(tiny: TinyModel, data: Any, batch_size: int = 3) -> PEFs:
    positions: Any = "labels" if tiny.kind == "seq2seq-lm" else "auto"
    fisher = FisherConfig(rank=ROWS, output_factor="exact", sketch="identity", positions=positions)
    return NPEFFAnalyzer(tiny.model, TOKENS, fisher=fisher).compute_pefs(data, batch_size=batch_size, progress=False)


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
