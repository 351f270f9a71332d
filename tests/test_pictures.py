"""Pictures of every mode of Pillow's as a model of three colours sees them.

Oracle: transformers' own pipeline for images, which loads every picture as RGB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image

from hf_npeff import NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.encoding.record import ModelNeeds
from tests.tiny import tiny_model

EIGHT_BITS = ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "RGB")


def picture(mode: str) -> Image.Image:
    """A random one with all that its mode can hold."""
    values = np.random.default_rng(0).integers(0, 256, (20, 14, 4), dtype=np.uint8)
    if mode in ("LA", "RGBA"):
        return Image.fromarray(values, "RGBA").convert(mode)
    return Image.fromarray(values[..., :3]).convert(mode)


def processor(size: int, **settings: Any) -> Any:
    return transformers.ViTImageProcessorPil(size={"height": size, "width": size}, **settings)


def inputs_of(image: Any, processing_class: Any) -> torch.Tensor:
    examples = Examples([{"image": image, "label": 0}], processing_class, needs=ModelNeeds("image-classification"))
    return torch.as_tensor(examples[0].inputs["pixel_values"])


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_a_model_of_three_colours_sees_what_the_pipeline_shows_it(mode: str) -> None:
    model = tiny_model("vit", "image-classification", dtype=torch.float32)
    own = processor(model.config.image_size)
    image = picture(mode)
    wanted = own(images=load_image(image), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(inputs_of(image, own), wanted)
    pefs = NPEFFAnalyzer(model, own).compute_pefs([{"image": image, "label": 0}] * 2)
    with torch.no_grad():
        expected = model(pixel_values=wanted[None]).logits[0].log_softmax(-1).max()
    assert pefs.log_probs is not None
    torch.testing.assert_close(pefs.log_probs[0], expected)


def test_a_model_of_one_colour_gets_its_pictures_as_they_are() -> None:
    """Oracle: the processor itself."""
    grey = processor(16, image_mean=[0.5], image_std=[0.5])
    wanted = grey(images=picture("L"), return_tensors="pt")["pixel_values"][0]
    assert wanted.shape[0] == 1 and torch.equal(inputs_of(picture("L"), grey), wanted)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_eight_bits_are_refused(mode: str) -> None:
    """A conversion to RGB would cut off what is above 255."""
    values = np.full((8, 8), 3000, dtype={"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    image = Image.fromarray(values)
    assert image.mode == mode
    with pytest.raises(ValueError, match=mode):
        inputs_of(image, processor(16))
