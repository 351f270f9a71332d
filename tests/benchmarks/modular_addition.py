"""A known circuit, modular addition: are components its frequencies?

`python -m tests.benchmarks.modular_addition` writes docs/studies/mechanisms/modular_addition.md and the
figures that it shows as modular_addition.json beside it. Networks are kept in `parts`; those are not trained again.

The network adds two numbers modulo p with a layer of squares: logits = (x E M)² U, where x counts both numbers.
Trained to do so, such networks compute cos(2πk(a + b − c)/p) for some frequencies k (Nanda et al., arXiv 2301.05217;
Gromov, arXiv 2301.02679): here a neuron, a column of E M, is a wave over the numbers. The matrix M in the middle is
what is analysed, because its directions can be of one frequency; a gradient by E moves the rows of two numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.config import FisherConfig
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.result import markdown

PAGE = Path("docs/studies/mechanisms/modular_addition.md")
POWERS = {"NPEFF": 1.0, "NPEFF, power 0.25": 0.25}
NUMBERS, STEPS = 17, 2000
SEEDS = range(1, 6)
RESTARTS = 2
"""Of a decomposition. Chosen: five networks stay under half a minute of the processor."""
MEASURES = ("share of one frequency", "frequencies", "correlation with its strength", "explained")


class ModularAdditionConfig(PretrainedConfig):
    """p numbers (`num_labels`), the width of their states, and the number of neurons (`intermediate_size`)."""

    model_type = "modular_addition"


class ModularAdditionForSequenceClassification(PreTrainedModel):
    """logits = (x E M)² U: E (p, d), M (d, m), U (m, p)."""

    config_class = ModularAdditionConfig

    def __init__(self, config: Any):
        super().__init__(config)
        p, d, m = config.num_labels, config.hidden_size, config.intermediate_size
        self.embed = nn.Parameter(torch.empty(p, d))
        self.reading = nn.Parameter(torch.empty(d, m))
        self.answer = nn.Parameter(torch.empty(m, p))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `untrained` draws the weights from a generator of its own."""

    def forward(self, input_values: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Counts of both numbers (B, p): their sum modulo p, as logits (B, p)."""
        return SequenceClassifierOutput(logits=(input_values @ self.embed @ self.reading).square() @ self.answer)


def untrained(p: int, seed: int) -> ModularAdditionForSequenceClassification:
    """A network with random weights: states twice as wide as numbers, four times as many neurons."""
    config: Any = ModularAdditionConfig
    model = ModularAdditionForSequenceClassification(
        config(num_labels=p, hidden_size=2 * p, intermediate_size=4 * p, problem_type="single_label_classification")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[0] ** 0.5)
    return model.eval()


def all_pairs(p: int) -> tuple[Tensor, Tensor]:
    """Every pair a ≤ b (n, 2), and how often each number is in it (n, p)."""
    pairs = torch.combinations(torch.arange(p), with_replacement=True)
    return pairs, nn.functional.one_hot(pairs, p).sum(1).float()


def train(model: nn.Module, x: Tensor, sums: Tensor, steps: int) -> float:
    """Train on all pairs; the share of right sums. The decay was set on seed 0, which is not shown."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.5, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x).logits, sums).backward()
        optimiser.step()
    return float((model(x).logits.argmax(1) == sums).float().mean())


def spectrum(waves: Tensor) -> Tensor:
    """Share of each frequency 1 … (p − 1)/2 in functions of a number (…, p, k): (…, (p − 1)/2), the mean left out."""
    power = torch.fft.rfft(waves.double(), dim=-2).abs().square().sum(-1)[..., 1:]
    return power / power.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def strengths(pairs: Tensor, p: int) -> Tensor:
    """How strongly each frequency is in a pair: cos²(πk(a − b)/p), (n, (p − 1)/2), since E's two waves add up to it."""
    k = torch.arange(1, (p - 1) // 2 + 1).double()
    return torch.cos(torch.pi * torch.outer((pairs[:, 0] - pairs[:, 1]).double(), k) / p).square()


def held_against(waves: Tensor, coefficients: Tensor | None, strong: Tensor) -> dict[str, float]:
    """The mean share of the largest frequency, how many frequencies that are, and its strength against W (n, r)."""
    shares = spectrum(waves)
    largest = shares.argmax(-1)
    measured = {MEASURES[0]: float(shares.amax(-1).mean()), MEASURES[1]: float(len(largest.unique()))}
    if coefficients is not None:
        both = [torch.stack([strong[:, k], coefficients[:, i].double()]) for i, k in enumerate(largest.tolist())]
        measured[MEASURES[2]] = statistics.mean(float(torch.corrcoef(b)[0, 1].nan_to_num()) for b in both)
    return measured


def measured(p: int, steps: int, seed: int, n_restarts: int) -> dict[str, Any]:
    """One network: its components, its PEFs' rows, its neurons, random directions and the same without training."""
    pairs, x = all_pairs(p)
    strong = strengths(pairs, p)
    dataset = [{"input_values": row.tolist()} for row in x]
    rows: dict[str, dict[str, float]] = {}
    accuracy = 0.0
    for trained in (False, True):
        model = untrained(p, seed)
        if trained:
            accuracy = train(model, x, pairs.sum(1) % p, steps)
        E = model.embed.detach()
        fisher = FisherConfig(
            rank=p, output_factor="exact", parameters=("reading",), target_modules=(), sketch="identity"
        )
        pefs = NPEFFAnalyzer(model, fisher=fisher).compute_pefs(dataset, batch_size=len(x))
        for name, power in POWERS.items():
            if not trained and power != 1.0:
                continue
            fitted = NPEFF((p - 1) // 2, n_restarts=n_restarts, power=power, seed=seed).fit(pefs)
            waves = E @ fitted.pseudo_fishers.float().reshape(-1, *model.reading.shape)
            row = name if trained else f"{name}, weights untrained"
            rows[row] = {**held_against(waves, fitted.explain(pefs)[0], strong), MEASURES[3]: float(fitted.explained)}
        if trained:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(x), generator=generator)[: (p - 1) // 2]
            first = torch.stack([pefs.factors[int(i)][0] for i in chosen]).float()  # a PEF's strongest row
            random = torch.randn(len(chosen), *model.reading.shape, generator=generator)
            rows["a row of single PEFs"] = held_against(E @ first.reshape(-1, *model.reading.shape), None, strong)
            rows["random directions"] = held_against(E @ random, None, strong)
            neurons = (E @ model.reading.detach()).T[:, :, None]
            rows["the network's neurons"] = held_against(neurons, None, strong)
    return {"seed": seed, "accuracy": accuracy, "rows": rows}


def page(networks: list[dict[str, Any]], p: int) -> str:
    """The page: medians and ranges over the networks, and what they say."""

    def cell(row: str, measure: str) -> str:
        values = [n["rows"][row][measure] for n in networks if measure in n["rows"][row]]
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"

    rows = list(networks[0]["rows"])
    table = markdown(["directions", *MEASURES], [[row, *(cell(row, m) for m in MEASURES)] for row in rows])
    least = min(n["accuracy"] for n in networks)
    ours, alone, known = (cell(row, MEASURES[0]) for row in ("NPEFF", "a row of single PEFs", "the network's neurons"))
    return (
        f"# A known circuit: modular addition\n\n"
        f"The strongest frequency has {ours} of the power of NPEFF's components, {alone} of a row of a single PEF, and "
        f"{known} of the network's neurons. If components were the network's frequencies, the first number would be "
        f"near the last.\n\n"
        f"Written by `python -m tests.benchmarks.modular_addition`. There are "
        f"{len(networks)} networks that add modulo {p}, with logits = (x E M)² U; each is right on at least "
        f"{least:.0%} of all pairs. The PEFs of M are computed for all {p * (p + 1) // 2} pairs, with all outputs and "
        f"no sketch. There are {(p - 1) // 2} components, as many as frequencies. The table has the median and range "
        f"over the networks.\n\n"
        f"{table}\n\n{_READING}"
    )


_READING = """How to read it:

- **Share of one frequency**: a direction D of M moves the neurons by E D, which are functions of the input number. The
  share is how much of their power is at the strongest frequency; it is 1 for a component that is a single frequency.
  **Frequencies**: how many different frequencies are the strongest one of some component.
- **Correlation with its strength**: the correlation of a component's coefficients with cos²(πk(a − b)/p), which is how
  strong the component's frequency is in a pair. It is 1 for a component that shows when its frequency is at work.
- **A row of single PEFs** is the strongest row of one pair: what a component would be without any decomposition.
"""


def part_settings(seed: int, numbers: int = NUMBERS, steps: int = STEPS) -> dict[str, Any]:
    """What the part of a network depends on."""
    return {"numbers": numbers, "steps": steps, "seed": seed, "n_restarts": RESTARTS}


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=NUMBERS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--output", type=Path, default=PAGE)
    given = parser.parse_args()
    networks = []
    for seed in range(SEEDS.start, SEEDS.start + given.seeds):
        settings = part_settings(seed, given.numbers, given.steps)
        compute = partial(measured, given.numbers, given.steps, seed, RESTARTS)
        networks.append(kept_part(given.output.parent / "parts", f"modular_addition-{seed}", settings, compute))
    kept = {"numbers": given.numbers, "networks": networks}
    given.output.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    given.output.write_text(page(networks, given.numbers), encoding="utf-8")
    print(given.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
