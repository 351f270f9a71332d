"""Toy models of superposition (Elhage et al. 2022): x̂ = ReLU(WᵀW x + b), with more features than dimensions.

The mechanisms of such a model are known: column j of W, and nothing else, handles feature j. A mechanism is therefore a
change of that column along itself. After training on sparse inputs, the columns share m dimensions and still act
separately.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_npeff.progress import training

_WEIGHT_DECAY = 0.01
"""The usual weight decay of AdamW, as in the published toys."""


class SuperpositionConfig(PretrainedConfig):
    """The sizes of a toy model: `num_labels` features in `hidden_size` dimensions."""

    model_type = "superposition"


class SuperpositionForSequenceClassification(PreTrainedModel):
    """The model x̂ = ReLU(WᵀW x + b), as a regression of k numbers.

    Attributes:
        embed: W (m, k).
        bias: b (k,).
    """

    config_class = SuperpositionConfig

    def __init__(self, config: Any):
        super().__init__(config)
        m, k = config.hidden_size, config.num_labels
        self.embed = nn.Parameter(torch.empty(m, k))
        self.bias = nn.Parameter(torch.zeros(k))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `superposition_model` draws the weights from a generator of its own."""

    def forward(self, input_values: Tensor, **_: Any) -> SequenceClassifierOutput:
        """The reconstruction of features (B, k): `logits` (B, k)."""
        hidden = input_values @ self.embed.T
        return SequenceClassifierOutput(logits=(hidden @ self.embed + self.bias).relu())


def sparse_features(n: int, k: int, probability: float, generator: torch.Generator) -> Tensor:
    """Inputs (n, k). A feature is present with this probability, uniform in [0, 1], else 0. Inputs may be all zero."""
    present = torch.rand(n, k, generator=generator) < probability
    return torch.rand(n, k, generator=generator) * present


def superposition_model(features: int, hidden: int, seed: int) -> SuperpositionForSequenceClassification:
    """A model with random weights, with columns of about unit length. The global random state is not changed."""
    config: Any = SuperpositionConfig
    model = SuperpositionForSequenceClassification(
        config(num_labels=features, hidden_size=hidden, problem_type="regression")
    )
    with torch.no_grad():
        model.embed.copy_(torch.randn(hidden, features, generator=torch.Generator().manual_seed(seed)) / hidden**0.5)
    return model.eval()


def train_superposition(
    model: SuperpositionForSequenceClassification,
    *,
    probability: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Train the model to reconstruct sparse inputs. Returns the mean squared error of the last tenth of the steps."""
    k = model.config.num_labels
    assert k is not None
    # No seed of the study shares a random stream with the weights
    generator = torch.Generator().manual_seed(10_000 + seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    last, errors = max(1, steps // 10), []
    for step in training("a toy model", steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)  # falls to 0, so that columns converge
        x = sparse_features(batch_size, k, probability, generator)
        loss = (model(x).logits - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= steps - last:
            errors.append(float(loss.detach()))
    return sum(errors) / len(errors)
