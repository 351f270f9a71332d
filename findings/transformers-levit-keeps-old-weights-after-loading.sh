#!/usr/bin/env bash
# transformers 5.23.0: a LeViT classifier in eval mode that has predicted once goes on predicting with its first
# attention biases: after load_state_dict of another checkpoint it predicts as neither of the two does, and after a
# loss.backward() in eval mode its attention biases have no gradient if the first prediction was made under no_grad.
# Cause: each attention layer keeps a table of its biases from the first prediction, and forgets it only in train().
# Expected: the predictions of the loaded checkpoint, as ViT's, and gradients of every parameter that is used.
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/loaded.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import LevitConfig, LevitForImageClassification, ViTConfig, ViTForImageClassification

images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MAKERS = {
    "LeViT": lambda: LevitForImageClassification(LevitConfig(image_size=64, hidden_sizes=[32, 48, 64], num_labels=3)),
    "ViT": lambda: ViTForImageClassification(
        ViTConfig(image_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                  num_labels=3)
    ),
}


def checkpoint(make, seed):
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:  # zero in a new model; a trained one has its own
                parameter.normal_()
    return model


@torch.no_grad()
def predicted(model):
    return model(images).logits


print("transformers", transformers.__version__)
results = {}
for name, make in MAKERS.items():
    used, other = checkpoint(make, 1), checkpoint(make, 2)
    first, wanted = predicted(used), predicted(other)
    used.load_state_dict(other.state_dict())
    same = all(torch.equal(a, b) for a, b in zip(used.state_dict().values(), other.state_dict().values()))
    loaded = predicted(used)
    off = float((loaded - wanted).norm() / wanted.norm())
    used.train().eval()
    again = float((predicted(used) - wanted).norm() / wanted.norm())
    used(images).logits.square().sum().backward()
    without = [n for n, p in used.named_parameters() if p.grad is None]
    results[name] = off, again, without
    print(
        f"{name}: weights equal after loading: {same}; predictions differ from the loaded checkpoint's by {off:.1%}, "
        f"after train().eval() by {again:.1%}; parameters without a gradient in eval mode: {len(without)}"
    )
off, again, without = results["LeViT"]
print("LeViT's without a gradient:", sorted({n.rpartition(".")[2] for n in without}))
plain = results["ViT"]
as_described = off > 0.01 and again < 1e-5 and without and all("attention_biases" in n for n in without)
sys.exit(0 if as_described and plain[0] < 1e-5 and not plain[2] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/loaded.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
