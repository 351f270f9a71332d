"""What the processors of vision-language models return for a text with images, made with their image processors.

The tokens are made by hand, since a tokenizer would have to be downloaded: the placeholders of each image, and words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from tests.sweep.tiny_configs import WORDS

SIZE = 16
"""Of the images that the tiny models of the sweep take where they take one size."""


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A random one."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def processed(model: Any, images: Sequence[Image.Image], words: int, seed: int) -> dict[str, Tensor]:
    """A batch of one example: a text of so many words behind the images."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(WORDS.start, WORDS.stop, (words,), generator=generator).tolist()
    make = _PROCESSORS[model.config.model_type]
    inputs, placeholders, kind = make(model.config, list(images)) if images else ({}, [], "")
    ids = torch.tensor([placeholders + text])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    if kind:
        batch[kind] = (ids == image_token(model.config)).long()
    if model.config.model_type == "ernie4_5_vl_moe" and images:
        batch["moe_mm_token_type_ids"] = batch[kind].clone()
    return batch


def batched(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the processor returns for all of the texts together, padded on the left; images are joined or by example."""
    names = list(dict.fromkeys(name for example in examples for name in example))
    length = max(example["input_ids"].shape[1] for example in examples)
    batch = {}
    for name in names:
        values = [example[name] for example in examples if name in example]
        if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            every = [example.get(name, torch.zeros_like(example["input_ids"])) for example in examples]
            values = [F.pad(value, (length - value.shape[1], 0)) for value in every]
        elif "pixel_attention_mask" in names:
            none = torch.zeros_like(values[0][:, :0])
            values = _as_wide([example.get(name, none) for example in examples])
        else:
            values = _as_wide(values)
        batch[name] = torch.cat(values)
    return batch


def _as_wide(values: Sequence[Tensor]) -> list[Tensor]:
    wide = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padding = [[n for w, s in reversed([*zip(wide, v.shape[1:], strict=True)]) for n in (0, w - s)] for v in values]
    return [F.pad(value, by) for value, by in zip(values, padding, strict=True)]


def image_token(config: Any) -> int:
    """The id that stands for a part of an image."""
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


Made = tuple[dict[str, Tensor], list[int], str]
"""Images as the model takes them, their placeholders, and the input that marks placeholders, if there is one."""


def _run(name: str, images: list[Any], **settings: Any) -> dict[str, Tensor]:
    made = getattr(transformers, name)(**settings)(images=images, return_tensors="pt")
    return {key: value for key, value in made.items() if isinstance(value, Tensor)}


def _qwen(config: Any, images: list[Any]) -> Made:
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    made = _run(
        "Qwen2VLImageProcessorPil", images, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size, size={"shortest_edge": side**2, "longest_edge": 16 * side**2},
    )  # fmt: skip
    ids: list[int] = []
    for grid in made["image_grid_thw"]:
        count = int(grid.prod()) // vision.spatial_merge_size**2
        ids += [config.vision_start_token_id, *[image_token(config)] * count, 15]
    return made, ids, "mm_token_type_ids"


def _of_one_size(name: str, count: Callable[[Any], int], kind: str = "") -> Callable[[Any, list[Any]], Made]:
    def make(config: Any, images: list[Any]) -> Made:
        settings: dict[str, Any] = {"size": {"height": SIZE, "width": SIZE}}
        if name.startswith("CLIP"):
            settings = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        made = _run(name, images, **settings)
        made = {"pixel_values": made["pixel_values"]}
        return made, [image_token(config)] * count(config) * len(images), kind

    return make


def _patches(config: Any) -> int:
    return int((SIZE // config.vision_config.patch_size) ** 2)


def _idefics(name: str, count: Callable[[Any], int]) -> Callable[[Any, list[Any]], Made]:
    def make(config: Any, images: list[Any]) -> Made:
        edge = {"longest_edge": SIZE} if "3" in name else {"shortest_edge": 8, "longest_edge": SIZE}
        settings: dict[str, Any] = {"size": edge, "do_image_splitting": False}
        if "3" in name:
            settings["max_image_size"] = edge
        made = _run(name, [images], **settings)
        return made, [image_token(config)] * count(config) * len(images), ""

    return make


def _pixtral(config: Any, images: list[Any]) -> Made:
    patch = config.vision_config.patch_size
    side = patch * config.spatial_merge_size
    made = _run("PixtralImageProcessorPil", images, patch_size=side, size={"longest_edge": SIZE})
    counts = [int(h // side) * int(w // side) for h, w in made["image_sizes"].tolist()]
    return made, [image_token(config)] * sum(counts), ""


def _ernie(config: Any, images: list[Any]) -> Made:
    """Its experts for images get the tokens that `moe_mm_token_type_ids` marks, which `processed` adds."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    made = _run(
        "Ernie4_5_VLMoeImageProcessorPil", images, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
        size={"shortest_edge": side**2, "longest_edge": 16 * side**2},
    )  # fmt: skip
    ids: list[int] = []
    for grid in made["image_grid_thw"]:
        ids += [image_token(config)] * (int(grid.prod()) // vision.spatial_merge_size**2)
    return made, ids, "mm_token_type_ids"


_PROCESSORS: dict[str, Callable[[Any, list[Any]], Made]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "llava": _of_one_size("CLIPImageProcessorPil", _patches),
    "gemma3": _of_one_size("SiglipImageProcessorPil", lambda config: config.mm_tokens_per_image, "token_type_ids"),
    "paligemma": _of_one_size("SiglipImageProcessorPil", _patches),
    "idefics2": _idefics("Idefics2ImageProcessorPil", lambda config: config.perceiver_config.resampler_n_latents),
    "idefics3": _idefics("Idefics3ImageProcessorPil", lambda config: _patches(config) // config.scale_factor**2),
    "smolvlm": _idefics("Idefics3ImageProcessorPil", lambda config: _patches(config) // config.scale_factor**2),
    "mistral3": _pixtral,
    "ernie4_5_vl_moe": _ernie,
}
