"""Language models whose logits are no product of the last state with the output embedding's weight, planted one by one.

Cotangents enter at the state that the output embedding reads wherever logits are f(U h) with a slope for every logit;
everywhere else at the logits. Oracle: the dense Fisher of `tests.reference`, which calls the model directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hf_npeff import FisherConfig, NPEFFAnalyzer
from tests import reference
from tests.logged import warned_by
from tests.tiny import tiny_model

VOCABULARY = 13
EXAMPLES = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [3, 4]}, {"input_ids": [6, 7, 8]}]
ONE_LENGTH = [{"input_ids": [1, 2, 3]}, {"input_ids": [6, 7, 8]}]


class _Scaled(nn.Linear):
    """A learned number for every logit, as in nGPT."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.linspace(0.5, 2, self.out_features, dtype=x.dtype)


class _OfUnitStates(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 * F.normalize(x, dim=-1))


class _Changed(LlamaForCausalLM):
    """Logits that `change(model, logits, states, input_ids)` makes of the model's own."""

    change: Callable[[Any, Tensor, Tensor, Tensor], Tensor]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        options = {**options, "attention_mask": attention_mask, "output_hidden_states": True}
        outputs = super().forward(input_ids, **options)
        outputs.logits = type(self).change(self, outputs.logits, outputs.hidden_states[-1], input_ids)
        return outputs


def _with_embedding(kind: type[nn.Linear]) -> Any:
    model = tiny_model("llama", dtype=torch.float32, vocab_size=VOCABULARY)
    embedding = kind(model.config.hidden_size, VOCABULARY, bias=False)
    embedding.weight = model.lm_head.weight
    model.lm_head = embedding
    return model


def _with_change(change: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Any:
    model: Any = tiny_model("llama", dtype=torch.float32, vocab_size=VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    model.register_buffer("second", torch.randn(VOCABULARY, model.config.hidden_size, generator=generator) / 3)
    model.register_buffer("of_positions", torch.randn(64, VOCABULARY, generator=generator))
    model.__class__ = type("LlamaForCausalLM", (_Changed,), {"change": staticmethod(change)})
    return model


def _copied(model: Any, logits: Tensor, states: Tensor, ids: Tensor) -> Tensor:
    """A pointer network's: attention to a token is a logit of that token."""
    return logits + (states @ states.mT).tril() @ F.one_hot(ids, VOCABULARY).to(logits) / 10


MODELS: dict[str, Callable[[], Any]] = {
    "as it is": lambda: _with_embedding(nn.Linear),
    "scaled": lambda: _with_embedding(_Scaled),
    "of unit states": lambda: _with_embedding(_OfUnitStates),
    "soft cap": lambda: _with_change(lambda m, logits, h, ids: 2 * (logits / 2).tanh()),
    "log-softmax": lambda: _with_change(lambda m, logits, h, ids: logits.log_softmax(-1)),
    "standardised": lambda: _with_change(lambda m, logits, h, ids: logits / logits.std(-1, keepdim=True)),
    "a second head": lambda: _with_change(lambda m, logits, h, ids: logits + h @ m.second.T),
    "by position": lambda: _with_change(lambda m, logits, h, ids: logits * (1 + m.of_positions[: ids.shape[1]])),
    "copied": lambda: _with_change(_copied),
}
MULTIPLIED = ("as it is", "soft cap")
NO_MATTER = ("by position", "all")
"""Every state is handed to the embedding there, and a number for every logit is a slope."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("examples", [EXAMPLES, ONE_LENGTH], ids=["padded", "one length"])
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_fishers_are_right_whatever_makes_the_logits(
    name: str, positions: Any, examples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """To 1e-4 of the dense Fisher; where logits are f(U h), without a warning of cotangents at the logits."""
    model = MODELS[name]()
    fisher = FisherConfig(
        rank=64, output_factor="exact", sketch="identity", positions=positions, target_modules=["down_proj"]
    )
    pefs = NPEFFAnalyzer(model, None, fisher=fisher).compute_pefs(examples, batch_size=3, progress=False)
    terms = reference.terms_of("causal-lm", positions)
    for i, example in enumerate(examples):
        ids = torch.tensor([example["input_ids"]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        B = reference.example_factor(model, batch, list(pefs.sketch().shapes), terms)
        A = torch.as_tensor(pefs.factors[i]) * float(pefs.norms[i]) ** 0.5
        assert reference.relative_error_of_factors(B, A.to(B)) < 1e-4
    assert bool(warned_by(caplog, "fisher.heads")) == (name not in MULTIPLIED and (name, positions) != NO_MATTER)
