#!/usr/bin/env bash
# transformers 5.23.0 loads a GGUF file of a Llama 3.1, 3.2 or 3.3 as a Llama without rotary scaling, without a warning:
# the first token's logits are right, those of later ones drift away with their position. llama.cpp's converter writes
# the scaling as a tensor, `rope_freqs.weight`, which transformers skips. It also skips the keys `rope.scaling.*` of
# Llama and Qwen 2 (linear, YaRN), and reads them for gpt-oss. Set by hand in the config, the scaling is all that lacks.
# Expected: the logits of the model that was written, or an error.
# Downloads about 350 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 gguf==0.19.0 torch==2.13.0 sentencepiece==0.2.3 \
    accelerate==1.15.0
cat > "$folder/loaded.py" <<'PYTHON'
import importlib.metadata
import sys
from pathlib import Path

import gguf
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

folder = Path(sys.argv[1])
HEADS, HEAD, TOKENS = 2, 64, 1024
BASE = 500000.0
SCALINGS = {  # those of Llama 3.2, of a LongChat and of Qwen 2.5
    "none": {},
    "llama3": {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "linear": {"factor": 8.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
}  # fmt: skip
ids = torch.randint(2, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def interleaved(weight):
    """Rows of queries or keys in GGUF's order for Llama, where the two numbers of a rotation are neighbours."""
    return weight.view(HEADS, 2, HEAD // 2, -1).transpose(1, 2).reshape(weight.shape)


def write(model, model_type, scaling):
    writer = gguf.GGUFWriter(folder / "model.gguf", model_type)
    writer.add_context_length(131072)
    writer.add_embedding_length(HEADS * HEAD)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(64)
    if scaling == "llama3":
        plain = BASE ** -(torch.arange(0, HEAD, 2) / HEAD)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    elif scaling != "none":
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(SCALINGS[scaling]["factor"])
        if scaling == "yarn":
            writer.add_rope_scaling_orig_ctx_len(SCALINGS[scaling]["original_max_position_embeddings"])
    number = next(number for number, each in gguf.MODEL_ARCH_NAMES.items() if each == model_type)
    names = gguf.get_tensor_name_map(number, 2)
    for key, value in model.state_dict().items():
        if model_type == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def off(model, loaded):
    """The largest difference of the logits at positions 0 and 20, and over all, in spreads of the logits."""
    logits = model(ids).logits[0]
    differences = (loaded(ids).logits[0] - logits).abs().amax(-1) / logits.std()
    return [float(each) for each in (differences[0], differences[20], differences.max())]


print("transformers", transformers.__version__, "gguf", importlib.metadata.version("gguf"))
good = True
cases = [("llama", "none"), ("llama", "llama3"), ("llama", "linear"), ("qwen2", "none"), ("qwen2", "yarn")]
for model_type, scaling in cases:
    torch.manual_seed(0)
    rotary = {"rope_theta": BASE, "rope_type": "default" if scaling == "none" else scaling, **SCALINGS[scaling]}
    config = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=HEADS * HEAD, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD, max_position_embeddings=131072,
        rope_parameters=rotary, tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    write(model, model_type, scaling)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    first, early, most = off(model, loaded)
    given = loaded.config.rope_parameters["rope_type"]
    print(
        f"{model_type} written with {scaling}, loaded with {given}: logits off by {first:.1e} of their spread at the "
        f"first token, {early:.2g} at position 20, {most:.2g} at most"
    )
    loaded.config.rope_parameters = rotary
    repaired = type(loaded)(loaded.config).eval()
    repaired.load_state_dict(loaded.state_dict())
    by_hand = off(model, repaired)[2]
    print(f"    with its rotary parameters set by hand: {by_hand:.1e}")
    wrong = scaling != "none"
    good = good and given == "default" and first < 1e-3 and (most > 0.1) == wrong and (most < 1e-3) == (not wrong)
    good = good and by_hand < 1e-3
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/loaded.py" "$folder" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
