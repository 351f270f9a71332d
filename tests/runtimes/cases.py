"""Adapters that are loaded in other runtimes, and the logits that PEFT gives with them, every comparison's oracle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from hf_npeff import Adapter, FisherConfig, NPEFFAnalyzer, ParameterDirection
from hf_npeff.weights.layouts import layout_of

TOKENS = (1, 50, 60, 70, 80, 90, 100, 42, 77)
"""A prompt that every model's vocabulary has."""
_LARGE = 20
"""Layers from which a model is no random one."""
STEP = 0.5
"""Of each change, as a share of the moved weights' norm: enough to move the most likely token."""


@dataclass(frozen=True)
class Case:
    """One adapter on one model.

    Attributes:
        name: what it changes.
        adapter: the adapter.
        base: logits (vocabulary,) after `TOKENS` without it.
        expected: the same with it, in PEFT.
    """

    name: str
    adapter: Adapter
    base: Tensor
    expected: Tensor

    @property
    def folder(self) -> str:
        """Of the saved adapter."""
        return re.sub(r"\W+", "-", self.name.replace("+", "plus"))

    def normalised(self) -> Case:
        """With log-probabilities in the place of logits."""
        return replace(self, base=self.base.log_softmax(-1), expected=self.expected.log_softmax(-1))


PATTERNS = {
    "MLP": r"(mlp|feed_forward).*weight",
    "attention": r"(self_attn|attn|attention).*(proj|c_attn|dense|query_key_value)\.weight",
    "one layer": r"\.(layers|h)\.1\.(?!.*norm)(?!.*ln_).*weight",
}


def cases_of(model: Any, folder: Path, *, patterns: dict[str, str] = PATTERNS, selective: bool = False) -> list[Case]:
    """Random changes of rank 2, at a negative scale too, and a selective rank-4 one; adapters are saved in folders."""
    made = {}
    for name, pattern in patterns.items():
        direction = random_direction(model, pattern)
        for sign in (1, -1):
            scale = sign * STEP * direction.norm_in(model)
            made[f"{name}, {'+-'[sign < 0]}"] = direction.to_adapter(rank=2, scale=scale)
    if selective:
        made["selective, rank 4"] = selective_adapter(model)
    base = logits(model)
    cases = []
    for name, adapter in made.items():
        case = Case(name, adapter, base, base)
        adapter.save_pretrained(folder / case.folder)
        wrapped = PeftModel.from_pretrained(model, folder / case.folder)
        cases.append(replace(case, expected=logits(wrapped)))
        wrapped.unload()
    return cases


def random_direction(model: Any, pattern: str) -> ParameterDirection:
    generator = torch.Generator().manual_seed(1)
    shapes = {n: p.shape for n, p in model.named_parameters() if re.search(pattern, n) and p.dim() == 2}
    deltas = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    name = getattr(model, "name_or_path", "") or None
    info = {"model": name, "task": "causal-lm", "architecture": "AutoModelForCausalLM"}
    return ParameterDirection(deltas, {n: layout_of(model, n) for n in deltas}, info)


def selective_adapter(model: Any) -> Adapter:
    """A component of random prompts, lifted selectively and cut to rank 4."""
    generator = torch.Generator().manual_seed(2)
    prompts = [{"input_ids": torch.randint(3, 200, (8,), generator=generator).tolist()} for _ in range(16)]
    # Of a real model the last MLPs: the rows of all linear maps would fill the memory.
    targets = "all-linear" if model.config.num_hidden_layers < _LARGE else r".*layers\.2[89]\.mlp\.\w+_proj"
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, target_modules=targets))
    pefs = analyzer.compute_pefs(prompts)
    direction = analyzer.lift(analyzer.decompose(pefs, n_components=3), 0, pefs, prompts, selective=True)
    return direction.to_adapter(rank=4, scale=0.1 * direction.norm_in(model))


def logits(model: Any) -> Tensor:
    """(vocabulary,), after `TOKENS`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0, -1].float()


@dataclass(frozen=True)
class Difference:
    """How far another runtime is from PEFT.

    Attributes:
        probabilities: largest difference of a next token's probability.
        effect: largest difference of a logit's change, as a share of the largest change.
    """

    probabilities: float
    effect: float

    @classmethod
    def of(cls, case: Case, base: Tensor, given: Tensor) -> Difference:
        """From the other runtime's logits, without and with the adapter."""
        wanted = case.expected - case.base
        off = (given - base) - wanted
        probabilities = (given.softmax(-1) - case.expected.softmax(-1)).abs().max()
        return cls(float(probabilities), float(off.abs().max() / wanted.abs().max()))


def report(differences: Sequence[tuple[str, str, Difference]], bound: float, of_effect: float) -> int:
    """Print (model, adapter, difference) in lines; 0 where all are within the bounds, else 1."""
    print(f"{'model':12} {'adapter':20} {'largest difference of a probability':>36} {'of the change':>14}")
    for family, name, difference in differences:
        print(f"{family:12} {name:20} {difference.probabilities:36.1e} {difference.effect:14.1e}")
    good = all(each.probabilities < bound and each.effect < of_effect for _, _, each in differences)
    print(f"{'within' if good else 'NOT within'} {bound} of a probability and {of_effect} of the change")
    return 0 if good else 1
