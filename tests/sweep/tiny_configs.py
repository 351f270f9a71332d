"""A tiny config of any model type, from its default one: sizes are set by the names of attributes that exist.

Few architectures are known here by heart (`_EXCEPTIONS`): a type that a newer transformers brings is built by the same
rules as the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 16
"""Few, since brute force takes a backward pass per token of the vocabulary."""
WORDS = range(5, 13)
"""Ids that examples are made of: the special tokens of texts are below, those of images and sound above."""
PAD, EOS, BOS, MASK = 0, 1, 2, 3
WIDTH, HEADS, HEAD = 16, 2, 8

_RULES: list[tuple[str, int]] = [
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 4),
    (r"(.*_)?(vocab_size|vocabulary_size)(_.*)?|src_vocab_size|tgt_vocab_size", VOCABULARY),
    (
        r"(.*_)?(max_position_embeddings|max_source_positions|max_target_positions)|n_positions|n_ctx|max_seq_len|"
        r"max_sequence_length|seq_length|context_length|num_position_embeddings|max_2d_position_embeddings",
        64,
    ),
    (
        r"(.*_)?(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks)|layers",
        2,
    ),
    (
        r"num_hidden_groups|num_feedforward_networks|num_nextn_predict_layers|depth|resampler_depth|first_k_dense_replace|"
        r"num_global_layers",
        1,
    ),
    (r"(.*_)?(num_attention_heads|num_heads|n_heads?|(en|de)coder_attention_heads|attention_heads|nhead)", HEADS),
    (
        r"(.*_)?(num_key_value_heads|num_kv_heads|num_key_heads|n_kv_heads?|attention_groups|n_groups|num_query_groups)",
        1,
    ),
    (r"(.*_)?num_value_heads", 2),
    (r"(.*_)?(head_dim|d_kv|d_head|attention_head_size|kv_channels|head_size|dim_head|headdim)", HEAD),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|d_inner|mlp_dim|feed_forward_size|"
        r"intermediate_size_mlp|expert_dim)",
        24,
    ),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|hidden_dim|projection_dim|word_embed_proj_dim|"
        r"proj_dim|output_dim|out_dim|pooler_output_size|hidden_size_per_layer_input|hidden_size_global|mid_dim|bottleneck_size)",
        WIDTH,
    ),
    (r"dim|emb_size|lru_width|embedding_rank|d_latents|projector_input_dim|input_dim", WIDTH),
    (r"(.*_)?(num_(local_|routed_)?experts|n_routed_experts|zero_expert_num)", 4),
    (r"(.*_)?(experts_per_tok|experts_per_token|moe_topk|top_k_experts|moe_k|moe_top_k|index_topk)", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(.*_)?lora_rank|laurel_rank|adapter_rank|d_rel", 8),
    (r"(.*_)?(state_size|d_state|time_step_rank|dt_rank|n_state)", 4),
    (
        r"(.*_)?(chunk_size|sliding_window|window_size|attention_window|sliding_window_size)|local_attention|block_size",
        4,
    ),
    (r"(.*_)?(image_size|img_size|input_size)", 16),
    (r"(.*_)?patch_size", 4),
    (r"num_latents|(.*_)?num_query_tokens|latent_query_num|num_embeddings|codebook_size|resampler_n_latents", 4),
    (r"base_channels|latent_channels", 32),
    (r"num_filters|.*_channels|num_mel_bins|codebook_dim|dim_model_base", WIDTH),
]  # fmt: skip
_KEPT = {"num_channels", "in_channels", "out_channels"}
_LISTS = {
    "depths": 1, "hidden_sizes": WIDTH, "embed_dims": WIDTH, "embed_dim": WIDTH, "num_heads": HEADS,
    "num_groups": HEADS, "num_attention_heads": HEADS,
}  # fmt: skip
"""A number for every stage of a vision model."""
_ABOVE = range(13, 16)
"""Where the special tokens of images and sound go: a model looks for them in its texts, and must not find them."""


ATTEMPTS: tuple[dict[str, int], ...] = (
    {}, {"num_key_value_heads": HEADS}, {"num_hidden_layers": 4, "num_layers": 4}, {"mrope_section": 1},
)  # fmt: skip
"""Sizes that differ from the rules', tried one after another: not every attention shares keys among heads, some
patterns of layers are longer than two, and positions of several dimensions need their shares of a head."""


def tiny_config(model_type: str, attempt: Mapping[str, int] | None = None) -> PretrainedConfig:
    """The config of a tiny model of this type.

    Args:
        model_type: a key of `CONFIG_MAPPING`.
        attempt: one of `ATTEMPTS`.

    Raises:
        Exception: whatever the config's class raises for these sizes.
    """
    return _shrunk(CONFIG_MAPPING[model_type](), attempt or {})


def _shrunk(default: PretrainedConfig, attempt: Mapping[str, int]) -> PretrainedConfig:
    cls = type(default)
    sizes: dict[str, Any] = {}
    for name, value in vars(default).items():
        new = _smaller(name, value, attempt)
        if new is not None:
            sizes[name] = new
    sizes |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    if getattr(default, "is_encoder_decoder", False) or hasattr(default, "decoder_start_token_id"):
        sizes["decoder_start_token_id"] = EOS
    if "kv_lora_rank" in vars(default):  # some configs have one a layer, and refuse to be asked for it
        sizes["num_key_value_heads"] = HEADS  # latent attention has a key for every head, whatever this says
    sizes |= _EXCEPTIONS.get(default.model_type, {})
    return cls(**sizes)


def _smaller(name: str, value: Any, attempt: Mapping[str, int]) -> Any:
    """What a config's attribute becomes; None where it stays."""
    if isinstance(value, PretrainedConfig):
        return _shrunk(value, attempt)
    if isinstance(value, bool) or name.startswith("_") or name in _KEPT:
        return None
    if value is None:
        return _WHERE_NONE.get(name)
    if isinstance(value, list | tuple) and name in _LISTS and value and isinstance(value[0], int):
        return type(value)([_LISTS[name]] * len(value))
    if name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in {*value, *attempt}:
        half = int(HEAD // 2 * value.get("partial_rotary_factor", 1.0))
        return {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if not isinstance(value, int):
        return None
    if name in attempt:
        return attempt[name]
    if name.endswith(("_token_id", "_token_index", "_id", "_index")):
        return value if value < VOCABULARY else _ABOVE[sum(name.encode()) % len(_ABOVE)]
    for pattern, size in _RULES:
        if re.fullmatch(pattern, name):
            return min(size, value) if value > 0 else None
    return None


_WHERE_NONE = {
    "head_dim": HEAD, "vocab_size": VOCABULARY, "n_routed_experts": 4, "num_key_value_heads": HEADS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
"""Sizes that a default config leaves open and the model needs."""
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_STAGES = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 4},
    "bamba": _MAMBA,
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 13},
    "blt": {"encoder_hash_byte_group_vocab": 8},
    "bros": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 13, "IMGIMGA": 14}},
    "codegen": {"n_head": 4, "n_embd": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _SECTIONS, "full_attention": _SECTIONS},
    },
    "cosmos3_edge_text": {"rope_parameters": _SECTIONS},
    "cpmant": {"dim_ff": 24},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "cvt": {"embed_dim": (16, 16, 16), "num_heads": (1, 2, 2), "depth": (1, 2, 3)},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 1, "clip_qkv": 8}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"head_dim": 4},
    "deepseek_v3": {"head_dim": 4},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "donut-swin": _STAGES,
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "efficientnet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "emu3": {"vocabulary_map": {"<image>": 13, "<|extra_200|>": 14}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]}},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 24},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"index_kpool": 2, "layer_types": ["linear_attention", "indexed_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hgnet_v2": {"hidden_sizes": (256, 512, 1024, 2048)},
    "instructblip": {"image_token_index": 13},
    "instructblipvideo": {"video_token_index": 13},
    "layoutlmv2": {"coordinate_size": 2, "shape_size": 4},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4, "visual_embed": False},
    "levit": {
        "hidden_sizes": (16, 16, 16), "num_attention_heads": (2, 2, 2), "key_dim": (8, 8, 8), "depths": (1, 1, 1),
        "image_size": 224, "patch_size": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 24},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 8},
    "mistral3": {"image_token_index": 13},
    "mistral4": {"head_dim": 4},
    "mobilevitv2": {"image_size": 64},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "neomme": {"head_dim": 16},
    "pvt": {"image_size": 64},
    "qwen2_5_vl_vision": {"window_size": 16},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 15, "audio_start_token_id": 15},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 15, "audio_start_token_id": 15},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "qwen2_5_omni_text": {"rope_parameters": _SECTIONS},
    "reformer": {
        "axial_pos_embds_dim": (8, 8), "axial_pos_shape": (8, 8), "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
    },
    "step3p5": {"sliding_window": 4},
    "siglip2_vision_model": {"num_patches": 9},
    "swin": _STAGES,
    "swinv2": _STAGES,
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {"head_dim": 4},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "num_hidden_layers": 6,
        "attention_hidden_size": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2, "hybrid_layer_ids": [1],
        "mamba_headdim": 8, "n_mamba_heads": 4, "attention_hidden_size": 32, "attention_head_dim": 16,
    },
}  # fmt: skip
"""Model type → attributes that depend on one another."""
