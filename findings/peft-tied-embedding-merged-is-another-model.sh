#!/usr/bin/env bash
# PEFT 0.21.2: a LoRA on the input embedding of a model with tied embeddings gives other logits after merge_and_unload
# than before. Beside the weight it moves the input side alone; merged, it moves the output embedding too.
# Expected: merging changes logits by rounding. (ensure_weight_tying=True moves both sides before the merge.)
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while PEFT behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/merged.py" <<'PYTHON'
import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.tensor([[3, 7, 11]])


def effect(target, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    plain = model(ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.mul_(0.1)  # an effect of the logits' own size
    beside = wrapped(ids).logits
    merged = wrapped.merge_and_unload()(ids).logits
    return float((beside - plain).abs().max()), float((merged - beside).abs().max())


print("peft", peft.__version__)
results = {}
for target, tied in (("embed_tokens", True), ("embed_tokens", False), ("down_proj", True)):
    results[target, tied] = moved, off = effect(target, tied)
    print(f"{target}, {'tied' if tied else 'untied'}: the adapter moves logits by {moved:.4f}; merging by {off:.1e}")
off = {key: off / moved for key, (moved, off) in results.items()}
sys.exit(0 if off["embed_tokens", True] > 0.5 and max(off["embed_tokens", False], off["down_proj", True]) < 1e-3 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/merged.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
