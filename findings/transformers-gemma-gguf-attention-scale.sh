#!/usr/bin/env bash
# transformers 5.23 loads a GGUF file of a Gemma 2 or Gemma 3 model with query_pre_attn_scalar = 256, whatever the size
# of a head is: attention has another scale wherever that is not 256, and logits are others, with no warning.
# The largest Gemma 3 has heads of 128 and a scalar of 168. GGUF has no key for the scalar; llama.cpp takes the size of
# a head, and the exact number for the largest models. Expected: the same, or a refusal.
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 gguf==0.19.0 torch==2.13.0 sentencepiece==0.2.3 \
    accelerate==1.15.0
cat > "$folder/loaded.py" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

folder = Path(sys.argv[1])
HEAD = 16


def off(model_type, name, scalar):
    torch.manual_seed(0)
    sliding = {"layer_types": ["sliding_attention"] * 2} if model_type == "gemma3_text" else {}
    config = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=128, query_pre_attn_scalar=scalar, **sliding,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    writer = gguf.GGUFWriter(folder / "model.gguf", name)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(64)
    if model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    number = next(number for number, each in gguf.MODEL_ARCH_NAMES.items() if each == name)
    names = gguf.get_tensor_name_map(number, 2)
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            value = value + 1 if "norm" in key else value  # GGUF has Gemma's norms with their 1
            writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    ids = torch.tensor([[5, 9, 13, 17, 21, 25]])
    with torch.no_grad():
        return loaded.config.query_pre_attn_scalar, float((loaded(ids).logits - model(ids).logits).abs().max())


print("transformers", transformers.__version__)
good = True
for model_type, name in (("gemma2", "gemma2"), ("gemma3_text", "gemma3")):
    for scalar in (256, HEAD):
        given, distance = off(model_type, name, scalar)
        print(f"{name}: written with query_pre_attn_scalar {scalar}, loaded with {given}, logits off by {distance:.1e}")
        good = good and given == 256 and (distance < 1e-4) == (scalar == 256)
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/loaded.py" "$folder" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
