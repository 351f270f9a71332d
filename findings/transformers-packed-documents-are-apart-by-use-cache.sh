#!/usr/bin/env bash
# transformers 5.23.0: whether documents packed into one row, whose position_ids begin again, see each other depends on
# use_cache. Called with use_cache=False and no attention mask, as by a Trainer, Llama, Qwen 3 and GPT-2 keep them
# apart; called in the usual way (a cache is made by default), or with a mask of ones, the second document reads the
# first. So a packed model is evaluated on something else than it is trained on. The same rule takes every step of
# position_ids that is not 1 for a new document: with positions 0, 2, 4, ... (stretched, or with gaps as PoSE has them)
# and use_cache=False each token sees nothing but itself, and with a cache all before it. No warning in any case.
# Known for a mask of ones: pull request 46634 of transformers, closed. Expected: one reading of position_ids.
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/packed.py" <<'PYTHON'
import sys

import torch
import transformers

TOKENS, SECOND = 12, 7  # the second document begins at token 7
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
configs = {
    "Llama": transformers.LlamaConfig(**sizes),
    "Qwen 3": transformers.Qwen3Config(**sizes),
    "GPT-2": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
}
ids = torch.randint(2, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
document = (torch.arange(TOKENS) >= SECOND).long()
before = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
masks = {
    "all before": before,
    "own document": before & (document[:, None] == document),
    "itself alone": torch.eye(TOKENS, dtype=torch.bool),
}
positions = {
    "0 1 2 3 ...": torch.arange(TOKENS),
    "begin again": torch.cat([torch.arange(SECOND), torch.arange(TOKENS - SECOND)]),
    "0 2 4 6 ...": 2 * torch.arange(TOKENS),
}
calls = {
    "as usual": {},
    "use_cache=False": {"use_cache": False},
    "mask of ones": {"use_cache": False, "attention_mask": torch.ones(1, TOKENS, dtype=torch.long)},
}
expected = {
    ("begin again", "use_cache=False"): "own document",
    ("0 2 4 6 ...", "use_cache=False"): "itself alone",
}

print("transformers", transformers.__version__)
good = True
for name, config in configs.items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    for where, place in positions.items():
        told = {}  # what the logits are if each token is told by a mask of pairs what to see
        for seen, mask in masks.items():
            pairs = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~mask, torch.finfo(torch.float32).min)
            with torch.no_grad():
                told[seen] = model(ids, attention_mask=pairs, position_ids=place[None], use_cache=False).logits
        if where == "begin again":
            with torch.no_grad():
                alone = model(ids[:, SECOND:]).logits
            off = float((told["own document"][:, SECOND:] - alone).abs().max())
            print(f"{name}: 'own document' differs from the second document alone by {off:.1e}")
            good = good and off < 1e-4
        for call, arguments in calls.items():
            with torch.no_grad():
                logits = model(ids, position_ids=place[None], **arguments).logits
            off = {seen: float((logits - each).abs().max()) for seen, each in told.items()}
            sees = min(off, key=off.get)
            next_best = sorted(off.values())[1]
            print(f"{name}, positions {where}, {call:15}: a token sees {sees} (to {off[sees]:.1e}; next {next_best:.1e})")
            good = good and sees == expected.get((where, call), "all before") and off[sees] < 1e-4 and next_best > 1e-2
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/packed.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
