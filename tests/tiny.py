"""Tiny random models, examples and a tokenizer: real architectures, small enough for brute force.

Nothing here imports the package under test, and nothing is downloaded. `FAMILIES` says which tasks each family has;
`tiny_model` builds one of them, `tiny_batch` makes unpadded examples for it, and `collate` pads them into a batch.

Llama-like models and T5 compute their norms in float32 whatever the dtype of their weights, and Mamba its logits: a
float64 one is exact to about 1e-7 only. BERT, DistilBERT, GPT-2, OPT, BART and ViT are float64 throughout.

Two families cannot be run in float64 as they come. Gemma 2's soft-capped attention adds float64's lowest number to
masked scores and then takes a float32 softmax, which is NaN wherever a padded position sees nothing; it gets
`_attention_float64` instead. Mixtral's grouped matrix product has no float64 kernel; it gets the eager one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import eager_mask

PAD, EOS, BOS, MASK, UNK = range(5)
"""Ids of the special tokens in every tiny model and in the tiny tokenizer; the words follow."""

SPECIAL_TOKENS = ("<pad>", "</s>", "<s>", "<mask>", "<unk>")
CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")
# fmt: off
WORDS = (
    "the", "a", "cat", "dog", "bird", "fish", "king", "queen", "paris", "france", "rome", "italy", "big",
    "bigger", "small", "smaller", "good", "better", "bad", "worse", "is", "was", "are", "were", "runs", "ran",
    "eats", "ate", "sees", "saw", "not", "never", "very", "happy", "sad", "red", "blue", "old", "new", "one",
    "two", "three", ":", ".", ",", "?", "->", "and", "or", "to",
)
# fmt: on
FIRST_WORD = len(SPECIAL_TOKENS) + len(CHAT_TOKENS)
VOCABULARY = FIRST_WORD + len(WORDS)
"""Vocabulary of every tiny model: each of its ids is a token of the tiny tokenizer."""

MAX_POSITIONS = 48
SLIDING_WINDOW = 3

_ENCODER_TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "masked-lm",
)
_DECODER_TASKS = ("causal-lm", "sequence-classification", "token-classification", "question-answering")

FAMILIES: dict[str, tuple[str, ...]] = {
    "bert": _ENCODER_TASKS,
    "roberta": _ENCODER_TASKS,
    "distilbert": _ENCODER_TASKS,
    "deberta-v2": _ENCODER_TASKS,
    "modernbert": _ENCODER_TASKS,
    "albert": _ENCODER_TASKS,
    "gpt2": _DECODER_TASKS,
    "llama": _DECODER_TASKS,
    "qwen3": _DECODER_TASKS,
    "gemma2": ("causal-lm", "sequence-classification", "token-classification"),
    "gemma3": ("causal-lm", "sequence-classification"),
    "mistral": _DECODER_TASKS,
    "phi": ("causal-lm", "sequence-classification", "token-classification"),
    "gpt_neox": _DECODER_TASKS,
    "opt": ("causal-lm", "sequence-classification", "question-answering"),
    "mamba": ("causal-lm",),
    "mixtral": _DECODER_TASKS,
    "t5": ("seq2seq-lm", "sequence-classification", "token-classification", "question-answering"),
    "bart": ("seq2seq-lm", "sequence-classification", "question-answering"),
    "m2m_100": ("seq2seq-lm",),
    "vit": ("image-classification",),
}
"""Family → the tasks it is tested on; the first is the default of `tiny_model`."""

CASES: tuple[tuple[str, str], ...] = tuple((family, task) for family, tasks in FAMILIES.items() for task in tasks)
"""Every (family, task), for `pytest.mark.parametrize`."""

AUTO_CLASSES: dict[str, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}

_CLASS_ENDINGS: dict[str, str] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForImageClassification": "image-classification",
}

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_BERT = {**_TOKENS, **_WIDTHS, "max_position_embeddings": MAX_POSITIONS}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 8}
_ALTERNATING = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}
_BART = {
    **_TOKENS,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": EOS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": MAX_POSITIONS,
}


def _partial_rotary(share: float) -> dict[str, Any]:
    """Rotate only the first `share` of each head's dimensions."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}}


_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _BERT),
    "roberta": ("roberta", {**_BERT, "type_vocab_size": 1}),
    "distilbert": (
        "distilbert",
        {**_TOKENS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": MAX_POSITIONS},
    ),
    "deberta-v2": (
        "deberta-v2",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "pooler_hidden_size": 16,
        },
    ),
    "modernbert": (
        "modernbert",
        {
            **_BERT,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
            "layer_types": ["full_attention", "sliding_attention"],
            "local_attention": 2 * (SLIDING_WINDOW - 1),
        },
    ),
    "albert": ("albert", {**_BERT, "embedding_size": 8}),
    "gpt2": ("gpt2", {**_TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": MAX_POSITIONS}),
    "llama": ("llama", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_LLAMA, **_ALTERNATING, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_LLAMA, **_ALTERNATING}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": SLIDING_WINDOW}),
    "phi": ("phi", {**_BERT, **_partial_rotary(0.5)}),
    "gpt_neox": ("gpt_neox", {**_BERT, **_partial_rotary(0.25)}),
    "opt": (
        "opt",
        {
            **_TOKENS,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": MAX_POSITIONS,
        },
    ),
    "mamba": (
        "mamba",
        {
            **_TOKENS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "time_step_rank": 2,
            "residual_in_fp32": False,
        },
    ),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "t5": (
        "t5",
        {
            "vocab_size": VOCABULARY,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": PAD,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 6,
            "relative_attention_max_distance": 8,
        },
    ),
    "bart": ("bart", _BART),
    "m2m_100": ("m2m_100", _BART),
    "vit": ("vit", {**_WIDTHS, "image_size": 8, "patch_size": 4, "num_channels": 3}),
}


def _attention_float64(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with soft-capped scores, written plainly in the dtype of its inputs.

    Args:
        module: The attention layer.
        query: (batch, heads, positions, head dimension).
        key: (batch, key heads, positions, head dimension); heads is a multiple of key heads.
        value: Like `key`.
        attention_mask: Added to the scores; None for no mask.
        scaling: Of the scores.
        softcap: Scores become softcap · tanh(scores / softcap).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = scaling * query @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("tiny_float64", _attention_float64)
AttentionMaskInterface.register("tiny_float64", eager_mask)

_FLOAT32_OPTIONS: dict[str, dict[str, str]] = {
    "gemma2": {"attn_implementation": "eager"},  # transformers before 5.18 would take sdpa, which has no soft cap
}
_FLOAT64_OPTIONS: dict[str, dict[str, str]] = {
    "gemma2": {"attn_implementation": "tiny_float64"},
    "mixtral": {"experts_implementation": "eager"},
}
"""What a family needs to run in a dtype, unless the caller says otherwise."""


def tiny_model(
    family: str,
    task: str | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    std: float = 0.3,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a random two-layer model of a family, in eval mode, whose predictions are not flat.

    Matrices are normal with deviation `std`, embeddings twice that; vectors (biases, norms) get normal noise of
    deviation 0.1 on top of the value that the architecture starts them at, so that no bias is zero and no norm is one.

    Args:
        family: A key of `FAMILIES`.
        task: One of `FAMILIES[family]`; the first when None.
        dtype: Of all parameters.
        seed: The same seed gives the same weights; the global generator is left as it was.
        std: Larger gives more peaked predictions, 0.1 nearly flat ones.
        **overrides: Fields of the config, such as `num_labels`, `problem_type`, `sliding_window`,
            `attn_implementation`.
    """
    task = task or FAMILIES[family][0]
    if task not in FAMILIES[family]:
        raise ValueError(f"{family} has {FAMILIES[family]}, not {task!r}")
    model_type, options = _CONFIGS[family]
    of_dtype = _FLOAT64_OPTIONS if dtype == torch.float64 else _FLOAT32_OPTIONS
    options = {**options, **of_dtype.get(family, {}), **overrides}
    if task in ("sequence-classification", "token-classification", "image-classification"):
        options.setdefault("num_labels", 3)
    config = AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, AUTO_CLASSES[task]).from_config(config)
    model = model.to(dtype).eval()
    model.config.dtype = dtype
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if parameter.dim() < 2 or name.endswith("A_log"):
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * (2 * std if id(parameter) in embeddings else std))
    return model


def task_of(model: PreTrainedModel) -> str:
    """Return the task that a model's class name says it was built for."""
    name = type(model).__name__
    return next(task for ending, task in _CLASS_ENDINGS.items() if name.endswith(ending))


def tiny_batch(
    model: PreTrainedModel,
    n: int,
    *,
    seed: int,
    min_length: int = 4,
    max_length: int = 9,
    labels: bool = False,
    n_choices: int = 3,
) -> list[dict[str, Any]]:
    """Return n random unpadded examples that a model can read.

    Every example has `input_ids` (a list; for multiple choice a list of lists; for images `pixel_values` instead).
    Masked language models find one to three mask tokens in theirs; sequence-to-sequence models always get `labels`,
    their decoder's answer. With `labels=True` the others get theirs too, in the form that their class expects:

    - sequence and image classification: a class, a list of 0.0/1.0 (multi-label), a float or a list of floats;
    - token classification: a class per token, a few of them -100;
    - question answering: `start_positions`, `end_positions`;
    - masked language models: the masked words, -100 elsewhere;
    - causal language models: the last one to three tokens, -100 elsewhere.

    Args:
        model: A tiny model: its class says the task, its config the classes and the vocabulary.
        n: Examples.
        seed: The same seed gives the same examples.
        min_length: Fewest tokens of an example, at least 4.
        max_length: Most tokens of an example.
        labels: Whether to add the labels that are not needed to run the model.
        n_choices: Of a multiple choice.
    """
    if not 4 <= min_length <= max_length <= MAX_POSITIONS - 4:
        raise ValueError(f"lengths {min_length}–{max_length} are not within 4–{MAX_POSITIONS - 4}")
    generator = torch.Generator().manual_seed(seed)
    make = _Maker(model, generator, min_length, max_length)
    return [make.example(labels, n_choices) for _ in range(n)]


class _Maker:
    """Draws examples for one model from one generator."""

    def __init__(self, model: PreTrainedModel, generator: torch.Generator, min_length: int, max_length: int) -> None:
        self.config: Any = model.config
        self.task = task_of(model)
        self.dtype = model.dtype
        self.generator = generator
        self.lengths = (min_length, max_length)
        self.framed = self.config.model_type in (
            *("bert", "roberta", "distilbert", "deberta-v2", "modernbert", "albert"),
            *("t5", "bart"),
        )

    def integer(self, low: int, high: int) -> int:
        """A uniform integer, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def words(self, length: int) -> list[int]:
        return torch.randint(FIRST_WORD, self.config.vocab_size, (length,), generator=self.generator).tolist()

    def tokens(self) -> list[int]:
        """A sequence: framed by <s> and </s> where the family's tokenizers do so."""
        length = self.integer(*self.lengths)
        return [BOS, *self.words(length - 2), EOS] if self.framed else self.words(length)

    def example(self, labels: bool, n_choices: int) -> dict[str, Any]:
        example: dict[str, Any]
        if self.task == "image-classification":
            shape = (self.config.num_channels, self.config.image_size, self.config.image_size)
            example = {"pixel_values": torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)}
            return example | ({"labels": self.class_label()} if labels else {})
        if self.task == "multiple-choice":
            example = {"input_ids": [self.tokens() for _ in range(n_choices)]}
            return example | ({"labels": self.integer(0, n_choices - 1)} if labels else {})
        tokens = self.tokens()
        if self.task == "masked-lm":
            return self.masked(tokens, labels)
        if self.task == "seq2seq-lm":
            return {"input_ids": tokens, "labels": [*self.words(self.integer(1, 3)), EOS]}
        return {"input_ids": tokens} | (self.labels(tokens) if labels else {})

    def masked(self, tokens: list[int], labels: bool) -> dict[str, Any]:
        inner = range(1, len(tokens) - 1)
        chosen = torch.randperm(len(inner), generator=self.generator)[: self.integer(1, min(3, len(inner)))]
        hidden = {inner[i] for i in chosen.tolist()}
        example = {"input_ids": [MASK if t in hidden else token for t, token in enumerate(tokens)]}
        truth = {"labels": [token if t in hidden else -100 for t, token in enumerate(tokens)]}
        return example | (truth if labels else {})

    def labels(self, tokens: list[int]) -> dict[str, Any]:
        if self.task == "sequence-classification":
            return {"labels": self.class_label()}
        if self.task == "token-classification":
            classes = [self.integer(0, self.config.num_labels - 1) for _ in tokens]
            return {"labels": [-100, *classes[1:-1], -100] if self.framed else classes}
        if self.task == "question-answering":
            start = self.integer(0, len(tokens) - 1)
            return {"start_positions": start, "end_positions": self.integer(start, len(tokens) - 1)}
        answer = self.integer(1, 3)
        return {"labels": [-100] * (len(tokens) - answer) + tokens[-answer:]}

    def class_label(self) -> int | float | list[float]:
        k, problem = self.config.num_labels, self.config.problem_type
        if problem == "multi_label_classification":
            return [float(self.integer(0, 1)) for _ in range(k)]
        if problem == "regression" or (problem is None and k == 1):
            values = torch.randn(k, generator=self.generator, dtype=torch.float64).tolist()
            return values if k > 1 else values[0]
        return self.integer(0, k - 1)


def collate(
    examples: Sequence[Mapping[str, Any]],
    model: PreTrainedModel,
    padding_side: str = "right",
    *,
    position_ids: bool = False,
) -> dict[str, Tensor]:
    """Return one padded batch with its attention mask.

    Labels per token are padded with -100 on the same side, except a decoder's answers (sequence-to-sequence), which
    are always padded on the right.

    Args:
        examples: From `tiny_batch`.
        model: Read for its task, padding token and dtype.
        padding_side: "right" or "left".
        position_ids: Whether to add positions that count real tokens only. Models with absolute positions need them
            under left padding (GPT-2); models that count for themselves (RoBERTa, OPT) do not.
    """
    task, floats = task_of(model), model.dtype
    batch: dict[str, Tensor] = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if key == "pixel_values":
            batch[key] = torch.stack(values)
        elif not isinstance(values[0], list):
            batch[key] = torch.tensor(values, dtype=floats if isinstance(values[0], float) else torch.long)
        elif isinstance(values[0][0], float):
            batch[key] = torch.tensor(values, dtype=floats)
        else:
            side = "right" if task == "seq2seq-lm" and key == "labels" else padding_side
            fill = -100 if key == "labels" else model.config.pad_token_id
            batch[key] = _pad(values, fill, side)
    if "input_ids" in batch:
        ones = [_ones_like(example["input_ids"]) for example in examples]
        batch["attention_mask"] = _pad(ones, 0, padding_side)
        if position_ids:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


def _ones_like(values: list[Any]) -> list[Any]:
    return [_ones_like(value) if isinstance(value, list) else 1 for value in values]


def _pad(rows: list[list[Any]], fill: int, side: str) -> Tensor:
    """Pad lists of integers, or lists of such lists, to the longest of them."""
    if isinstance(rows[0][0], list):
        flat = _pad([row for group in rows for row in group], fill, side)
        return flat.view(len(rows), -1, flat.shape[-1])
    width = max(map(len, rows))
    holes = [[fill] * (width - len(row)) for row in rows]
    padded = [row + hole if side == "right" else hole + row for row, hole in zip(rows, holes, strict=True)]
    return torch.tensor(padded, dtype=torch.long)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(
    *, padding_side: str = "right", add_eos: bool = False, words: Sequence[str] = WORDS
) -> PreTrainedTokenizerFast:
    """Return a fast word-level tokenizer over the tiny models' vocabulary, built in memory.

    Words are split at white space. A pair of texts is joined by </s>. The chat template writes each message as
    `<|role|> content </s>`.

    Args:
        padding_side: "right" or "left".
        add_eos: Whether every encoded text ends with </s>, as T5 and BART classifiers need.
        words: What it knows. More than `WORDS` has need a tiny model with a larger `vocab_size`.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHAT_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = " </s>" if add_eos else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A{end}", pair=f"$A </s> $B:1{end}", special_tokens=[("</s>", EOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        mask_token="<mask>",
        unk_token="<unk>",
        additional_special_tokens=list(CHAT_TOKENS),
        padding_side=padding_side,
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
