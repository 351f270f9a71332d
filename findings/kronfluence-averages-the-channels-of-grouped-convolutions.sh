#!/usr/bin/env bash
# kronfluence 1.0.1: influence scores are wrong for grouped convolutions, without a warning. With strategy="identity",
# where a score is by definition the product of two gradients, scores of linear layers and plain convolutions agree with
# autograd to rounding; those of the grouped convolutions of a RegNet (ResNeXt, MobileNet, EfficientNet and ConvNeXt have
# such layers too) are 26 to 68% off, and those of the whole model with them.
# Cause: the input's channels are averaged over the groups before the gradients are formed. (As K-FAC's factor of such a
# layer that is an approximation; here it is used for the gradients themselves.)
# Expected: products of the gradients, as for the other layers, or an error.
# Downloads about 350 MB with a CPU build of torch; Python 3.11. Exits 0 while kronfluence behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet "$@"; }
pip --no-deps kronfluence==1.0.1  # without torchvision, which only its examples use
pip torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 einops einconv opt-einsum safetensors tqdm
cat > "$folder/scored.py" <<'PYTHON'
import copy
import importlib.metadata
import sys

import torch
import transformers
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from transformers import RegNetConfig, RegNetForImageClassification


class Classify(Task):
    def compute_train_loss(self, batch, model, sample=False):
        images, labels = batch
        return nn.functional.cross_entropy(model(images).logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def pictures(number, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, 32, 32, generator=generator)
    return torch.utils.data.TensorDataset(images, torch.randint(0, 3, (number,), generator=generator))


def gradients(model, pictures):
    """Autograd's gradients of every picture's loss: for each layer a matrix, pictures x its weights and biases."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    rows = {name: [] for name in layers}
    for image, label in pictures:
        model.zero_grad()
        nn.functional.cross_entropy(model(image[None]).logits, label[None]).backward()
        for name, layer in layers.items():
            rows[name].append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    return {name: torch.stack(each) for name, each in rows.items()}


torch.manual_seed(0)
config = RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], groups_width=4, layer_type="x", num_labels=3)
model = RegNetForImageClassification(config).eval()
queries, train = pictures(4, 1), pictures(6, 2)
sides = [gradients(copy.deepcopy(model), side) for side in (queries, train)]
truth = {name: sides[0][name] @ sides[1][name].T for name in sides[0]}
kinds = {
    name: "linear" if isinstance(m, nn.Linear) else "plain convolution" if m.groups == 1 else "grouped convolution"
    for name, m in model.named_modules()
    if name in truth
}

task = Classify()
model = prepare_model(model, task)
analyzer = Analyzer("tiny", model, task, cpu=True, output_dir=sys.argv[1], disable_tqdm=True)
analyzer.fit_all_factors(
    "none", train, per_device_batch_size=2, factor_args=FactorArguments(strategy="identity")
)
analyzer.compute_pairwise_scores(
    "products", "none", query_dataset=queries, train_dataset=train, per_device_query_batch_size=2,
    per_device_train_batch_size=2, score_args=ScoreArguments(compute_per_module_scores=True),
)  # fmt: skip
scores = analyzer.load_pairwise_scores("products")

print("kronfluence", importlib.metadata.version("kronfluence"), "transformers", transformers.__version__)
good = set(scores) == set(truth)
for name, score in scores.items():
    off = float((score - truth[name]).norm() / truth[name].norm())
    cosine = float((score * truth[name]).sum() / score.norm() / truth[name].norm())
    print(f"{kinds[name]:19} {name:60} off by {off:.1e} of the scores' norm, cosine {cosine:.3f}")
    good = good and (off > 0.1 if kinds[name] == "grouped convolution" else off < 1e-3)
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/scored.py" "$folder" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
