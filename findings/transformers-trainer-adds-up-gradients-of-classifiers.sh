#!/usr/bin/env bash
# transformers 5.23.0: with gradient_accumulation_steps=k, Trainer's gradient of a BERT or Llama classifier, a BERT
# masked LM or a T5 is k times that of the same examples in one batch, and so is the loss it logs. Of a Llama language
# model it is the same. Trainer divides by k unless a model takes **kwargs, which it reads as "divides by
# num_items_in_batch itself"; these take it and compute a plain mean. No warning. Clipping (max_grad_norm is 1.0 unless
# changed) and AdamW hide much of it. (In tiny models of all types up to
# "minicpm" in the alphabet, 63 of 64 sequence classifiers and 50 of 51 token classifiers are concerned.)
# Known: issue 47688 of transformers, open when this was written. Expected: the gradient of the whole batch.
# Downloads about 350 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 accelerate==1.15.0 torch==2.13.0
cat > "$folder/accumulated.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import Trainer, TrainingArguments

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
t5 = dict(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0)
cases = {
    "LlamaForCausalLM": transformers.LlamaConfig(**sizes),
    "LlamaForSequenceClassification": transformers.LlamaConfig(**sizes, num_labels=3, pad_token_id=0),
    "BertForSequenceClassification": transformers.BertConfig(**sizes, **still, num_labels=3),
    "BertForMaskedLM": transformers.BertConfig(**sizes, **still),
    "T5ForConditionalGeneration": transformers.T5Config(**t5, decoder_start_token_id=0),
}
tokens = torch.randint(5, 64, (8, 8), generator=torch.Generator().manual_seed(0)).tolist()


def step(name, config, batch_size):
    """The norm of the step of plain SGD over the same eight examples, and the loss that is logged."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    classes = "Classification" in name
    rows = [{"input_ids": row, "labels": i % 3 if classes else row} for i, row in enumerate(tokens)]
    arguments = TrainingArguments(
        output_dir=sys.argv[1], max_steps=1, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0.0, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return float((after - before).norm()), next(log["loss"] for log in trainer.state.log_history if "loss" in log)


print("transformers", transformers.__version__)
good = True
for name, config in cases.items():
    (whole, whole_loss), (parts, parts_loss) = step(name, config, 8), step(name, config, 2)
    ratio, loss_ratio = parts / whole, parts_loss / whole_loss
    print(f"{name:31} 4 x 2 examples over 1 x 8: gradient {ratio:.3f}, logged loss {loss_ratio:.3f}")
    expected = 1 if name == "LlamaForCausalLM" else 4
    good = good and abs(ratio - expected) < 0.02 and abs(loss_ratio - expected) < 0.02
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/accumulated.py" "$folder/out" 2> "$folder/errors" | grep -v "^{" || { tail -5 "$folder/errors"; exit 1; }
