#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: a LoRA on Mamba's dt_proj is taken and does nothing. With B far from zero the
# logits are those of the base model to rounding, and in training neither A nor B gets a gradient; merged, the same
# adapter changes the logits. Mamba reads dt_proj's weight in its scan without calling the layer, and PEFT's LoRA acts
# where the layer is called. For out_proj and conv1d of the same model PEFT refuses a LoRA for this reason.
# Expected: dt_proj is refused too, or the adapter acts. (Named beside in_proj and x_proj, it is silently never trained.)
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while PEFT behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/nothing.py" <<'PYTHON'
import sys

import peft
import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

ids = torch.tensor([[3, 7, 11, 5, 2]])


def adapted(target):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.shape[1] != 8:   # as large as trained weights; A is left
                parameter.normal_(0, 0.3)
    plain = model(ids).logits.detach()
    config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.5)
    beside = wrapped(ids).logits
    if beside.requires_grad:  # not with dt_proj alone
        beside.square().sum().backward()
    names = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    without = {n for n, p in names.items() if p.grad is None or not bool(p.grad.any())}
    merged = wrapped.merge_and_unload()(ids).logits.detach()
    moved = [float((logits.detach() - plain).abs().max()) for logits in (beside, merged)]
    return *moved, len(names), len(without), {n.split(".")[-4] for n in without}


print("peft", peft.__version__, "transformers", transformers.__version__)
results = {}
for target in (["dt_proj"], ["in_proj"], ["dt_proj", "in_proj", "x_proj"]):
    results[str(target)] = beside, merged, count, dead, which = adapted(target)
    print(
        f"LoRA on {target}: logits move by {beside:.2g} beside the model and by {merged:.2g} merged; {dead} of {count} "
        f"trainable tensors have no gradient {sorted(which)}"
    )
try:
    adapted(["out_proj"])
    refused = False
except ValueError as error:
    refused = True
    print("LoRA on ['out_proj']:", error)
dt, into = results["['dt_proj']"], results["['in_proj']"]
silent = dt[0] < 1e-5 and dt[1] > 1e-3 and dt[2] == dt[3]
sys.exit(0 if silent and refused and into[0] > 1e-3 and into[3] == 0 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/nothing.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
