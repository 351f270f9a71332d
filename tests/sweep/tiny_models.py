"""Tiny random models of every type and task, and examples that they can read; nothing here imports hf_npeff."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from tests.sweep.tiny_configs import ATTEMPTS, EOS, MASK, WORDS, tiny_config

TASKS: dict[str, tuple[str, str]] = {
    "causal-lm": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
    "token-classification": ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification"),
    "masked-lm": ("MASKED_LM", "AutoModelForMaskedLM"),
    "seq2seq-lm": ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM"),
    "image-classification": ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification"),
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText"),
}
"""Task → its mapping in transformers, and the Auto class that reads the mapping."""
LENGTHS = (5, 9, 6)
"""Of the examples: none the same, the longest longer than every window of the tiny configs."""
N_LABELS = 3
_GENERATES = ("ForConditionalGeneration", "EncoderDecoderModel", "MTModel", "ForTextToText", "ForCausalLM")
"""Classes whose kind their config says, and not the mapping: BART's is in that of masked language models too."""


class CannotBuildError(Exception):
    """No tiny model of this type can be built or run here, and why."""


@dataclass
class TinyModel:
    """A model with examples.

    Attributes:
        model: in eval mode, float32.
        kind: what it predicts: a task of `TASKS`, where an image-text-to-text model is "causal-lm" or "seq2seq-lm".
        examples: unpadded, as lists (tensors for images).
    """

    model: nn.Module
    kind: str
    examples: list[dict[str, Any]]


def classes_of(task: str) -> dict[str, str]:
    """{model type: name of its class} of a task, in the order of the names."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task][0]}_MAPPING_NAMES")
    return {name: c if isinstance(c, str) else c[0] for name, c in sorted(mapping.items())}


def every_case() -> Iterator[tuple[str, str]]:
    """(model type, task) of every entry of the mappings, all tasks of a type together."""
    mappings = {task: classes_of(task) for task in TASKS}
    for model_type in sorted({t for mapping in mappings.values() for t in mapping}):
        yield from ((model_type, task) for task in TASKS if model_type in mappings[task])


def build(model_type: str, task: str) -> TinyModel:
    """A tiny random model, with examples that it runs.

    Raises:
        CannotBuildError: if there is none, with the first reason.
    """
    reasons = []
    for attempt in ATTEMPTS:
        try:
            return _built(model_type, task, attempt)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise CannotBuildError(" ".join(reasons[0].split())[:300])


def _built(model_type: str, task: str, attempt: dict[str, int]) -> TinyModel:
    config = tiny_config(model_type, attempt)
    if task in ("sequence-classification", "token-classification", "image-classification"):
        config.num_labels = N_LABELS
    if task == "causal-lm" and model_type == "reformer":
        config.is_decoder = True  # its class refuses to be built without
    torch.manual_seed(0)
    mapping, auto = TASKS[task]
    if isinstance(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")[model_type], str):
        model = getattr(transformers, auto).from_config(config)
    else:
        model = getattr(transformers, classes_of(task)[model_type])(config)
    model = model.float().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _randomise(model)
    kind = _kind(model, model_type, task)
    examples = _examples(model, kind)
    _check_that_it_runs_a_batch(model, kind, examples[0])
    if not _runs(model, kind, examples):
        model.load_state_dict(before)  # some formulas hold near their own initial values only
        if not _runs(model, kind, examples):
            raise ValueError("the model gives no finite logits")
    return TinyModel(model, kind, examples)


def _kind(model: Any, model_type: str, task: str) -> str:
    if task in ("image-text-to-text", "seq2seq-lm", "masked-lm") and type(model).__name__.endswith(_GENERATES):
        return "seq2seq-lm" if model.config.is_encoder_decoder else "causal-lm"
    if task == "causal-lm" and classes_of("masked-lm").get(model_type) == type(model).__name__:
        return "masked-lm"  # XLM and FlauBERT have one class for both, and mask unless their config says otherwise
    return task


def _randomise(model: nn.Module) -> None:
    """Weights for which predictions are not flat: initial ones are so small that nothing would show in a Fisher."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2 or name.endswith("A_log"):
                parameter.add_(noise, alpha=0.1)
            elif id(parameter) in embeddings:
                parameter.copy_(0.6 * noise)
            else:
                fan_in = math.prod(parameter.shape[1:]) if parameter.dim() != 3 else max(parameter.shape[1:])
                parameter.copy_(noise * 1.2 / math.sqrt(max(fan_in, 16)))


def _examples(model: Any, kind: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    if own := _OWN_INPUTS.get(model.config.model_type):
        return [own(model.config, length, generator) for length in LENGTHS]
    if kind == "image-classification":
        return [{"pixel_values": _image(model.config, generator)} for _ in LENGTHS]
    examples = []
    for length in LENGTHS:
        words = torch.randint(WORDS.start, WORDS.stop, (length,), generator=generator).tolist()
        example: dict[str, Any] = {"input_ids": words}
        if kind == "masked-lm":
            words[1 + length % 3] = MASK
        if kind == "sequence-classification" and model.config.is_encoder_decoder:
            words[-1] = EOS  # BART reads its classes there
        if kind == "seq2seq-lm":
            example["labels"] = words[
                : 1 + length // 4
            ]  # of two lengths; every term takes a pass per token of the vocabulary
        examples.append(example)
    missing = _missing(model, kind, examples)
    for example in examples if missing else ():
        if "bbox" in missing:
            example["bbox"] = [[t, 1, t + 2, 3] for t in range(len(example["input_ids"]))]
        if "pixel_values" in missing:
            example["pixel_values"] = _image(model.config, generator)
    return examples


def _words(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(WORDS.start, WORDS.stop, (length,), generator=generator).tolist()


def _patches(config: Any, length: int, generator: torch.Generator) -> dict[str, Any]:
    """SigLIP 2: patches of an image of any shape, up to a number that is padded to."""
    vision, (height, width) = config.vision_config, (2, 1 + length // 3)
    size = vision.num_channels * vision.patch_size**2
    patches = torch.zeros(9, size)
    patches[: height * width] = torch.randn(height * width, size, generator=generator)
    shown = (torch.arange(9) < height * width).long()
    return {"pixel_values": patches, "pixel_attention_mask": shown, "spatial_shapes": torch.tensor([height, width])}


def _pixels(config: Any, length: int, generator: torch.Generator) -> dict[str, Any]:
    """ImageGPT: colours as tokens."""
    return {"input_ids": _words(9, generator)}


def _flattened(config: Any, length: int, generator: torch.Generator) -> dict[str, Any]:
    """Pix2Struct: patches with their row and column before their pixels."""
    patches = torch.randn(9, 2 + config.vision_config.patch_embed_hidden_size, generator=generator)
    patches[:, 0], patches[:, 1] = torch.arange(9) // 3 + 1, torch.arange(9) % 3 + 1
    patches[length:] = 0
    return {
        "flattened_patches": patches,
        "attention_mask": (torch.arange(9) < length).long().tolist(),
        "labels": _words(1 + length // 3, generator),
    }


def _asked(config: Any, length: int, generator: torch.Generator) -> dict[str, Any]:
    """InstructBLIP: another tokenizer's question for its Q-Former beside the text, of another length."""
    image = _image(config, generator)
    frames = image.expand(2, *image.shape) if config.model_type == "instructblipvideo" else image
    placeholder = config.image_token_index if config.model_type == "instructblip" else config.video_token_index
    n = config.num_query_tokens * (2 if config.model_type == "instructblipvideo" else 1)
    question = _words(14 - length, generator)
    return {
        "input_ids": [placeholder] * n + _words(length, generator),
        "qformer_input_ids": question,
        "qformer_attention_mask": [1] * len(question),
        "pixel_values": frames,
    }


def _placed(config: Any, length: int, generator: torch.Generator) -> dict[str, Any]:
    """KOSMOS-2: the places of the image's tokens in a mask of their own."""
    places = [0] + [1] * config.latent_query_num + [0] * length
    ids = _words(len(places), generator)
    return {"input_ids": ids, "image_embeds_position_mask": places, "pixel_values": _image(config, generator)}


def _seen_by_tokens(config: Any, length: int, generator: torch.Generator) -> dict[str, Any]:
    """IDEFICS: images with a mask that says which tokens see which."""
    images = torch.stack([_image(config, generator)] * 2)
    seen = [[int(t > 0), int(t > 2)] for t in range(length)]
    return {"input_ids": _words(length, generator), "pixel_values": images, "image_attention_mask": seen}


def _boxed(config: Any, length: int, generator: torch.Generator) -> dict[str, Any]:
    """UDOP: boxes as shares of the page."""
    words = _words(length, generator)
    boxes = [[0.05 * t, 0.1, 0.05 * t + 0.1, 0.3] for t in range(length)]
    return {
        "input_ids": words,
        "bbox": boxes,
        "pixel_values": _image(config, generator),
        "labels": words[: length // 3],
    }


_OWN_INPUTS: dict[str, Callable[[Any, int, torch.Generator], dict[str, Any]]] = {
    "siglip2": _patches, "imagegpt": _pixels, "pix2struct": _flattened, "instructblip": _asked,
    "instructblipvideo": _asked, "kosmos-2": _placed, "idefics": _seen_by_tokens, "udop": _boxed,
}  # fmt: skip
"""Model type → inputs that no other type has."""


def _check_that_it_runs_a_batch(model: nn.Module, kind: str, example: dict[str, Any]) -> None:
    """Sizes that do not fit each other may go unnoticed with one example, where torch broadcasts.

    Raises:
        Exception: whatever the model raises for twice the same example.
    """
    names = [name for name in example if name != "labels"]
    batch: dict[str, Any] = {name: torch.stack([torch.as_tensor(example[name])] * 2) for name in names}
    if kind == "seq2seq-lm":
        batch["decoder_input_ids"] = torch.tensor([example["labels"]] * 2)
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch["use_cache"] = False  # a cache does not bear every order of tiny layers
    with torch.no_grad():
        model(**batch)


def _image(config: Any, generator: torch.Generator) -> Tensor:
    own = getattr(config, "vision_config", getattr(config, "encoder", config))
    size = getattr(own, "image_size", 64)  # what five halvings leave a pixel of
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(getattr(own, "num_channels", 3), height, width, generator=generator)


def _missing(model: nn.Module, kind: str, examples: list[dict[str, Any]]) -> str:
    """What the model says is missing beside the tokens, in lower case; empty where it runs or fails otherwise."""
    try:
        _runs(model, kind, examples)
    except (TypeError, ValueError) as error:
        return str(error).lower()
    except Exception:
        return ""
    return ""


def _runs(model: nn.Module, kind: str, examples: list[dict[str, Any]]) -> bool:
    """Whether the model gives finite numbers for each example alone.

    Raises:
        Exception: whatever the model raises.
    """
    with torch.no_grad():
        try:
            return all(bool(logits_of(model, kind, example).isfinite().any()) for example in examples)
        except AttributeError as error:
            if "no attribute 'logits'" in str(error):
                return True  # what is said of a model that predicts nothing is to be seen
            raise


def logits_of(model: Any, kind: str, example: dict[str, Any]) -> Tensor:
    """The logits of what an example predicts, one row a term (t, k), the model called directly on it alone.

    An example may hold a batch of one, as processors return it.
    """
    batch = {name: torch.as_tensor(value) for name, value in example.items()}
    if batch.get("input_ids", torch.zeros(0)).dim() < 2:
        batch = {name: value[None] for name, value in batch.items()}
    if kind == "image-classification":
        return model(**batch).logits
    taken = inspect.signature(model.forward).parameters
    if kind == "seq2seq-lm":
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            # FSMT takes the decoder's input from the encoder's where it gets labels alone.
            labels = batch.pop("labels")
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        if "input_ids" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])  # without one UDOP hides its image
        if "use_cache" in taken:
            batch["use_cache"] = False  # FSMT's decoder sees what comes later where it fills a cache
        return model(**batch).logits[0]
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    if "attention_mask" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        del batch["attention_mask"]
    if "use_cache" in taken:
        batch["use_cache"] = False
    logits = model(**batch).logits
    if kind == "sequence-classification":
        return logits.reshape(1, -1)
    if kind == "token-classification":
        return logits[0]
    if kind == "masked-lm":
        return logits[0, : batch["input_ids"].shape[1]][batch["input_ids"][0] == MASK]  # Perceiver gives a fixed number
    return logits[0, -1:]
