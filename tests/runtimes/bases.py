"""Small random models of llama.cpp's architectures, and their own GGUF files.

The conversion is written from what llama.cpp's graphs do with each tensor, index by index, without the package.
`tests.runtimes.in_llama_cpp` compares the base models' logits in both runtimes too: a mistake here is no agreement.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize
from transformers import AutoConfig, AutoModelForCausalLM

WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, INNER, POSITIONS = 64, 2, 4, 2, 96, 256
VOCABULARY = 512
"""The first tokens of SmolLM2's tokenizer: llama.cpp wants one in the file."""

_LIKE_LLAMA = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}
_GEMMA = {**_LIKE_LLAMA, "head_dim": 16, "tie_word_embeddings": True}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LIKE_LLAMA,
    "mistral": {**_LIKE_LLAMA, "head_dim": 32, "sliding_window": None},
    "qwen2": _LIKE_LLAMA,
    "qwen3": {**_LIKE_LLAMA, "head_dim": 16},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, **_ALTERNATING, "query_pre_attn_scalar": 16},
    # llama.cpp takes each sixth layer for one that sees everything.
    "gemma3_text": {
        **_GEMMA,
        "layer_types": ["sliding_attention"] * LAYERS,
        "sliding_window": 4,
        "query_pre_attn_scalar": 16,
    },
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS},
    "gpt_neox": {**_LIKE_LLAMA, "num_key_value_heads": HEADS},
    "granite": {
        **_LIKE_LLAMA,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "olmo2": _LIKE_LLAMA,
    "phi3": {**_LIKE_LLAMA, "pad_token_id": 0},
    "smollm3": {**_LIKE_LLAMA, "no_rope_layers": [1, 1], "pad_token_id": 0},
    "starcoder2": {**_LIKE_LLAMA, "sliding_window": None},
}


def model_of(family: str, **overrides: Any) -> Any:
    """A random model whose weights are numbers of 16 bits, in float32: both runtimes have the same."""
    special = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**special, **FAMILIES[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Wide enough that attention is not flat, and each block moves the logits.
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
                parameter.copy_(parameter.half().float())
    return model


def write_base(model: Any, path: Path, tokenizer: Path) -> None:
    """The model as GGUF, with the tokenizer of another file."""
    config = model.config
    name = _GGUF_NAMES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, name)
    _write_settings(writer, config)
    for setting, (given, kind, inner) in _small_tokenizer(tokenizer).items():
        writer.add_key_value(setting, given, kind, inner)
    for key, array in gguf_tensors(model).items():
        writer.add_tensor(key, array)
    finish(writer)


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """{tensor's name in GGUF: what llama.cpp expects there}."""
    config = model.config
    name = _GGUF_NAMES.get(config.model_type, config.model_type)
    number = next(number for number, each in MODEL_ARCH_NAMES.items() if each == name)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for parameter, value in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        key = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        assert key is not None, parameter
        tensors[key] = np.array(_as_llama_cpp_has_it(parameter, value, model))
    return tensors


def write_float16(source: Path, target: Path) -> None:
    """A quantised GGUF file with its weights as numbers of 16 bits."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, (value, kind, inner) in _settings(reader).items():
        writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values if values.ndim == 1 else values.astype(np.float16))
    finish(writer)


def _settings(reader: GGUFReader, prefix: str = "") -> dict[str, tuple[Any, Any, Any]]:
    """{name: value, type, elements' type} of all settings whose names begin so, without what a writer writes itself."""
    return {
        name: (field.contents(), field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None)
        for name, field in reader.fields.items()
        if name.startswith(prefix) and not name.startswith("GGUF.") and name != "general.architecture"
    }


@functools.cache
def _small_tokenizer(source: Path) -> dict[str, tuple[Any, Any, Any]]:
    """A file's tokenizer, of its first tokens alone."""
    settings = _settings(GGUFReader(source), "tokenizer.")
    kept = set(settings["tokenizer.ggml.tokens"][0][:VOCABULARY])
    for name, (value, *types) in settings.items():
        if name == "tokenizer.ggml.merges":
            value = [merge for merge in value if merge.replace(" ", "") in kept]
        elif isinstance(value, list):
            value = value[:VOCABULARY]
        settings[name] = (value, *types)
    return settings


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_GGUF_NAMES = {"gemma3_text": "gemma3", "mistral": "llama", "gpt_neox": "gptneox"}


def _write_settings(writer: GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_vocab_size(config.vocab_size)
    for field in ("rms_norm_eps",):
        if getattr(config, field, None) is not None:
            writer.add_layer_norm_rms_eps(getattr(config, field))
    for field in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"):
        if getattr(config, field, None) is not None:
            writer.add_layer_norm_eps(getattr(config, field))
    if config.model_type != "gpt2":
        rope = config.rope_parameters
        of_full = rope.get("full_attention", rope)
        writer.add_rope_freq_base(of_full["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * of_full.get("partial_rotary_factor", 1.0)))
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _as_llama_cpp_has_it(parameter: str, value: torch.Tensor, model: Any) -> np.ndarray:
    config, array = model.config, value.float().numpy()
    module, _, leaf = parameter.rpartition(".")
    if type(model.get_submodule(module)).__name__ == "Conv1D" and leaf == "weight":
        return np.ascontiguousarray(array.T)
    if "norm" in parameter and config.model_type.startswith("gemma"):
        return array + 1
    if config.model_type in ("llama", "mistral", "granite", "smollm3") and module.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
        return array[list(_pairs(heads, len(array) // heads))]
    if config.model_type == "gpt_neox" and module.endswith("query_key_value"):
        return array[list(_apart(config.num_attention_heads, len(array) // config.num_attention_heads // 3))]
    return array


def _pairs(heads: int, size: int) -> Iterator[int]:
    """Rows so that the two which rotate together, i and i + size/2 of a head, lie side by side."""
    for head in range(heads):
        for i in range(size // 2):
            yield from (head * size + i, head * size + i + size // 2)


def _apart(heads: int, size: int) -> Iterator[int]:
    """Rows of q of all heads, then of k, then of v, from q, k and v of each head in turn."""
    for which in range(3):
        for head in range(heads):
            for i in range(size):
                yield (head * 3 + which) * size + i
