"""The task of a model class, from transformers' own mappings of model types to classes, or from the class's name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
"""{task: transformers' class that loads a model with such a head}."""

# The first mapping that has a class gives its task. BART is also among the masked LMs, and XLM among the causal ones.
_MAPPINGS = (
    ("seq2seq-lm", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("masked-lm", "MASKED_LM"),
    ("causal-lm", "CAUSAL_LM"),
    ("causal-lm", "IMAGE_TEXT_TO_TEXT"),
    ("causal-lm", "MULTIMODAL_LM"),
    ("audio-classification", "AUDIO_CLASSIFICATION"),
    ("image-classification", "IMAGE_CLASSIFICATION"),
    ("sequence-classification", "SEQUENCE_CLASSIFICATION"),
    ("token-classification", "TOKEN_CLASSIFICATION"),
    ("question-answering", "QUESTION_ANSWERING"),
    ("multiple-choice", "MULTIPLE_CHOICE"),
)
_ENDINGS = {  # for classes in no mapping: those of users, and of models with their own code
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
}


def _classes_of(mapping: str) -> Iterator[str]:
    from transformers.models.auto import modeling_auto  # takes seconds, which reading the tasks' names should not

    # Some mappings came with later versions of transformers than the oldest that is supported.
    for classes in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
        yield from (classes,) if isinstance(classes, str) else classes


@lru_cache(maxsize=1)
def _known_classes() -> dict[str, str]:
    """{class of transformers: task}."""
    known: dict[str, str] = {}
    for task, mapping in _MAPPINGS:
        for name in _classes_of(mapping):
            known.setdefault(name, task)
    return known


def _sees(name: str) -> bool:
    """Whether a class reads images beside a text, as VisionEncoderDecoderModel does."""
    return name in _classes_of("IMAGE_TEXT_TO_TEXT") and name not in _classes_of("CAUSAL_LM")


def task_of_class(name: str, *, encoder_decoder: bool | None = None) -> str | None:
    """The task of a model class, for instance "causal-lm" for LlamaForCausalLM, or None.

    Args:
        name: the name of the class.
        encoder_decoder: `config.is_encoder_decoder`: "…ForConditionalGeneration" may be an encoder-decoder, or a
            decoder that also takes images or sound.
    """
    # FSDP2 puts its own class, of another name, before the model's.
    name = name.removeprefix("FSDP")
    task = _known_classes().get(name) or next((t for ending, t in _ENDINGS.items() if name.endswith(ending)), None)
    if task == "seq2seq-lm" and encoder_decoder is False:
        return "causal-lm"
    # BART's config says encoder-decoder, but its decoder alone, BartForCausalLM, is not one.
    if task == "causal-lm" and encoder_decoder and (name.endswith("ForConditionalGeneration") or _sees(name)):
        return "seq2seq-lm"
    return task


def task_of(model: Any) -> str | None:
    """The task of a model of transformers, or None."""
    return task_of_class(type(model).__name__, encoder_decoder=getattr(model.config, "is_encoder_decoder", None))


def loader_of(config: Any, task: str | None) -> tuple[str, str] | None:
    """The task of a checkpoint, and the name of transformers' class that loads it; None if it is not known.

    Args:
        config: the checkpoint's config.
        task: the wanted task; None uses the one of `config.architectures`.
    """
    import transformers

    encoder_decoder = getattr(config, "is_encoder_decoder", None)
    for name in getattr(config, "architectures", None) or ():
        own = task_of_class(name, encoder_decoder=encoder_decoder)
        if own is not None and task in (None, own):
            # An Auto class may map the model's type to another class than the saved one; but only Auto classes find
            # code that comes with the checkpoint.
            known = hasattr(transformers, name) and not getattr(config, "auto_map", None)
            return own, name if known else AUTO_CLASSES[own]
    return (task, AUTO_CLASSES[task]) if task in AUTO_CLASSES else None
