"""A model's predictions for examples, and the distance between two sets of predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.fisher.distributions import Distribution
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.outputs import Outputs


@dataclass
class Predictions:
    """A model's predictions for some examples, on the CPU.

    Attributes:
        logits: a (t_i, k) tensor for each example, with its own terms only.
        distribution: the distribution of every term.
    """

    logits: list[Tensor]
    distribution: type[Distribution]

    def kl_to(self, other: Predictions) -> Tensor:
        """KL(self ‖ other) of every example, summed over its terms, in nats, float64 (n,)."""
        pairs = zip(self.logits, other.logits, strict=True)
        return torch.stack([self.distribution(a).kl(self.distribution(b)).sum() for a, b in pairs])

    def answers(self) -> list[Tensor]:
        """The likeliest outcome of every term, one tensor per example."""
        return [self.distribution(a).predictions()[0] for a in self.logits]


@torch.no_grad()
def predict(
    forward: ForwardPass,
    examples: Sequence[Example],
    batch_size: int,
    before_batch: Callable[[Sequence[int]], None] | None = None,
    outputs_of: Callable[[Sequence[Example]], Outputs] | None = None,
) -> Predictions:
    """The model's predictions for the examples, in their order.

    Args:
        forward: the forward pass.
        examples: the examples, in any order; those of similar length share a batch.
        batch_size: the most examples in a batch.
        before_batch: called before the model runs, with the indices of a batch's examples in the batch's order.
        outputs_of: runs the model on a batch; None uses `forward.outputs`.
    """
    logits: dict[int, Tensor] = {}
    distribution: type[Distribution] | None = None
    # While a caller changes each batch's examples, a trial of other examples would be changed like them.
    for batch in forward.batches(examples, batch_size, trials=before_batch is None):
        if before_batch is not None:
            before_batch(batch)
        outputs = (outputs_of or forward.outputs)([examples[i] for i in batch])
        distribution = outputs.distribution
        for row, i in enumerate(batch):
            logits[i] = outputs.logits[row, outputs.valid[row]].detach().to("cpu", torch.float32)
    assert distribution is not None
    return Predictions([logits[i] for i in range(len(examples))], distribution)
