#!/usr/bin/env bash
# TRL 1.16: a callback that calls trainer.log({...}) with a number of its own gets the trainer's waiting metrics
# (entropy, token accuracy, tokens seen) into its record, and the trainer's own record of that step lacks them.
# Expected: the callback's record has its number, and the trainer's has what it has without the callback.
# Downloads about 400 MB with a CPU build of torch; Python 3.11. Exits 0 while TRL behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 \
    datasets==5.2.0 tokenizers==0.23.3
cat > "$folder/logged.py" <<'PYTHON'
import sys

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnop"])}
tokens = Tokenizer(models.WordLevel(words, unk_token="a"))
tokens.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


class Logs(TrainerCallback):
    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer is not None:
            wanted = control.should_log
            self.trainer.log({"mine": 1.0})
            control.should_log = wanted


def records(logging):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )
    arguments = trl.SFTConfig(
        output_dir=sys.argv[1], max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True,
    )
    data = Dataset.from_dict({"text": ["a b c d", "e f g h"]})
    callback = Logs()
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(config), args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )
    callback.trainer = trainer if logging else None
    trainer.train()
    own = next(record for record in trainer.state.log_history if "loss" in record)
    return own, next((record for record in trainer.state.log_history if "mine" in record), None)


without, _ = records(False)
own, mine = records(True)
print("trl", trl.__version__)
print("the trainer's record without the callback:", sorted(without))
print("the trainer's record with it:             ", sorted(own))
print("the callback's record:                    ", sorted(mine))
moved = {"entropy", "mean_token_accuracy"}
sys.exit(0 if moved <= set(without) and not moved & set(own) and moved <= set(mine) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/logged.py" "$folder/out" 2> "$folder/errors" | grep -v "^{" || { tail -5 "$folder/errors"; exit 1; }
