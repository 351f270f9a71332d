#!/usr/bin/env bash
# PEFT 0.21.2: `add_weighted_adapter` of LoRA adapters with use_rslora=True gives sqrt(rank of the sum) times the sum:
# one adapter of rank 4 with weight 1 becomes twice itself, two side by side ("cat") 2.83 times their sum. Without
# use_rslora "cat" is exact. No warning. The new adapter's A and B hold the scaled change, and its config, copied from
# the first adapter, has lora_alpha = r and use_rslora, so a scale of sqrt(r) and not 1 is applied once more.
# Known: issue 3761 of PEFT, open when this was written. Expected: as with plain LoRA, an adapter with weight 1 is itself.
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while PEFT behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0
cat > "$folder/summed.py" <<'PYTHON'
import sys

import peft
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(5, 16)
print("peft", peft.__version__)
good = True
for rslora in (False, True):
    for combination in ("cat", "svd", "linear"):
        model = nn.Sequential(nn.Linear(16, 8))
        with torch.no_grad():
            base = model(x)
        lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False, use_rslora=rslora)
        model = peft.get_peft_model(model, lora, "one")
        model.add_adapter("two", lora)
        model.add_weighted_adapter(["one"], [1.0], "copy", combination_type=combination)
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type=combination)
        changes = {}
        for name in ("one", "two", "copy", "sum"):
            model.set_adapter(name)
            with torch.no_grad():
                changes[name] = model(x) - base
        one, both = changes["one"], changes["one"] + changes["two"]
        copied = float((changes["copy"] * one).sum() / one.square().sum())
        summed = float((changes["sum"] * both).sum() / both.square().sum())
        print(f"use_rslora {str(rslora):5} {combination:6}: one adapter, weight 1: {copied:.3f} of itself; two: {summed:.3f} of the sum")
        good = good and abs(copied - (2 if rslora else 1)) < 1e-3
        if combination == "cat":
            good = good and abs(summed - (8**0.5 if rslora else 1)) < 1e-3
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/summed.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
