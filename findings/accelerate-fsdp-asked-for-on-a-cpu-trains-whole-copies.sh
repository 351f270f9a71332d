#!/usr/bin/env bash
# accelerate 1.15.0: a Trainer that is asked for FSDP2 on two processes on CPUs trains a whole copy in each, by DDP, and
# says nothing of it: no error, no warning; the number of weights a process holds is that of the whole model.
# Expected: weights sharded over both, as torch 2.13 can on CPUs (`fully_shard` with gloo), or an error.
# Downloads about 400 MB with a CPU build of torch; Python 3.11. Exits 0 while accelerate behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet accelerate==1.15.0 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/asked.py" <<'PYTHON'
import sys
import warnings

import accelerate
import torch
import transformers
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


def held(model):
    """Numbers of the weights that lie in this process."""
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    ))


class Look(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.held = held(model)


rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
settings = TrainingArguments(
    output_dir=sys.argv[1], max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    fsdp="full_shard auto_wrap", fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
)
look = Look()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainer = Trainer(tiny(), settings, train_dataset=rows, callbacks=[look])
    trainer.train()
told = [str(w.message) for w in caught if "fsdp" in str(w.message).lower() or "shard" in str(w.message).lower()]
by_hand = tiny()
for layer in by_hand.model.layers:
    fully_shard(layer)
fully_shard(by_hand)
whole = held(tiny())
kind = str(trainer.accelerator.distributed_type)
if settings.process_index == 0:
    print("accelerate", accelerate.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
    print(f"asked for: FSDP2; accelerate's distributed_type: {kind}; warnings that speak of it: {len(told)}")
    print(f"numbers in one process: the whole model {whole}, while the Trainer trains {look.held}, by fully_shard {held(by_hand)}")
behaves = "MULTI_CPU" in kind and look.held == whole and held(by_hand) < whole and not told
torch.distributed.destroy_process_group()
sys.exit(0 if behaves else 1)
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$folder/asked.py" "$folder/out" \
    2> "$folder/errors" || { tail -15 "$folder/errors"; exit 1; }
