#!/usr/bin/env bash
# curvlinops 3.0.1: KFAC (exact or sampled), EKFAC and the sampled Fisher of a CrossEntropyLoss count rows whose label is
# ignore_index (-100, as at the padding and the prompts of language models) like any other row. The loss leaves them out,
# and so do the GGN and the empirical Fisher of the same library. With half of the rows ignored, KFAC and the sampled
# Fisher come out more than twice as large, and are turned towards what padding looks like. No warning. Class weights
# are left out in the same way: the GGN has them; KFAC of TYPE2, documented as the exact Hessian of the loss by the
# outputs, has not. Expected: the Fisher of the rows that have a label, with the loss's weights, or an error.
# Downloads about 350 MB with a CPU build of torch; Python 3.11. Exits 0 while curvlinops behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet curvlinops-for-pytorch==3.0.1 torch==2.13.0 numpy==2.4.6
cat > "$folder/ignored.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    FisherMCLinearOperator,
    FisherType,
    GGNLinearOperator,
    KFACLinearOperator,
)
from torch import nn

LENGTHS, WIDTH, CLASSES = (6, 3, 2, 1), 6, 5
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
params = list(model.parameters())
size = sum(p.numel() for p in params)
rows = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, dtype=torch.double)
labels = torch.randint(0, CLASSES, rows.shape[:2])
for text, length in enumerate(LENGTHS):
    rows[text, length:] = rows[0, 0]  # padding looks the same everywhere
    labels[text, length:] = -100
rows, labels = rows.flatten(0, 1), labels.flatten()
kept = labels != -100
padded, short = [(rows, labels)], [(rows[kept], labels[kept])]

silent = dict(check_deterministic=False)
operators = {
    "GGN": lambda loss, data: GGNLinearOperator(model, loss, params, data, **silent),
    "empirical Fisher": lambda loss, data: EFLinearOperator(model, loss, params, data, **silent),
    "sampled Fisher": lambda loss, data: FisherMCLinearOperator(model, loss, params, data, mc_samples=4000, **silent),
    "KFAC, exact": lambda loss, data: KFACLinearOperator(
        model, loss, params, data, fisher_type=FisherType.TYPE2, **silent
    ),
    "KFAC, sampled": lambda loss, data: KFACLinearOperator(
        model, loss, params, data, fisher_type=FisherType.MC, mc_samples=500, **silent
    ),
    "EKFAC, exact": lambda loss, data: EKFACLinearOperator(
        model, loss, params, data, fisher_type=FisherType.TYPE2, **silent
    ),
}  # fmt: skip


def dense(operator):
    return (operator @ torch.eye(size, dtype=torch.double)).detach()


def by_definition():
    """The sum over the rows with a label of J' (diag p - p p') J, by autograd."""
    total = torch.zeros(size, size, dtype=torch.double)
    for row in rows[kept]:
        logits = model(row)
        jacobian = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(each, params, retain_graph=True)]) for each in logits]
        )
        p = logits.detach().softmax(0)
        total += jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
    return total


truth = by_definition()
print("curvlinops", importlib.metadata.version("curvlinops-for-pytorch"), "torch", torch.__version__)
print(f"{int(kept.sum())} of {len(kept)} rows have a label")
loss = nn.CrossEntropyLoss(reduction="sum")
weighted = nn.CrossEntropyLoss(reduction="sum", weight=torch.full((CLASSES,), 3.0, dtype=torch.double))
good = True
for name, make in operators.items():
    with_ignored, without, heavy = (dense(make(*each)) for each in ((loss, padded), (loss, short), (weighted, short)))
    ratio = float(with_ignored.trace() / without.trace())
    off = float((with_ignored - without).norm() / without.norm())
    share = float(heavy.trace() / without.trace())
    print(
        f"{name:16}: trace with the ignored rows {ratio:.2f} times that without them, matrices differ by {off:.2f}; "
        f"with class weights of 3 {share:.2f} times"
    )
    right = name in ("GGN", "empirical Fisher")
    good = good and (off < 1e-8 if right else off > 0.5 and ratio > 1.3)
    if name in ("GGN", "KFAC, exact"):
        good = good and abs(share - (3 if name == "GGN" else 1)) < 1e-3
    if name in ("GGN", "sampled Fisher"):
        error = float((without - truth).norm() / truth.norm())
        print(f"{'':16}  without ignored rows it differs by {error:.1e} from the definition")
        good = good and error < (1e-8 if name == "GGN" else 0.1)
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/ignored.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
