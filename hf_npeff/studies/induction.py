"""A two-layer language model with two known ways to predict: does a component stand for one of them?

Half of the sequences repeat a random permutation of tokens with a random period, and their next token can only be read
off an earlier copy: an induction circuit (Olsson et al. 2022), which two layers of attention are enough for. The others
follow a table that gives each token its successor nine times in ten, which needs no attention. One model learns both.
Which way a sequence needs is known, and where the circuit lies: induction is made of attention.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.gradient_clustering import lift_combinations
from hf_npeff.baselines.row_dictionaries import coordinates
from hf_npeff.baselines.row_directions import combination_of, selective_combinations, unscaled
from hf_npeff.config import BATCH_SIZE, FisherConfig
from hf_npeff.data import Example
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.pefs.store import PEFs
from hf_npeff.studies.fair import random_directions
from hf_npeff.studies.measures import aurocs
from hf_npeff.studies.selectivity import switch
from hf_npeff.studies.settings import SelectivityConfig

_TOKENS, _LENGTH = 32, 25
"""Chosen: two periods of the longest repetition fit, and a token says little about which kind a sequence is."""
_PERIODS = range(6, 13)
"""Chosen: the shortest is beyond the chains' chance repetitions, the longest is half of a sequence."""
_FOLLOWED = 0.9
"""How often a chain follows the table: below 1, so that the model is never certain, which would leave no Fisher."""
_TABLE_SEED = 99
_POOL, _BATCH, _LEARNING_RATE = 20_000, 64, 2e-3
"""Training: sequences drawn once, a step's number, and Adam's rate. Chosen: both kinds are learned in 500 steps."""
_COMPONENTS = 16
"""Chosen on the models of the seeds 10 and 11, which are not shown: with 4 and 8 none was for repetitions alone."""
_POWERS = {"NPEFF": 1.0, "NPEFF, power 0.5": 0.5}
_MAPS = ("c_attn", "c_proj", "c_fc")
_RANK = 4
"""Rows a PEF. Chosen: 8 rows and 98,304 numbers a row took 210 s of the processor a model."""


def sequences(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (n, 25), and which of them are repetitions (n,), the others chains."""
    successor = torch.randperm(_TOKENS, generator=torch.Generator().manual_seed(_TABLE_SEED))
    repeated = torch.rand(n, generator=generator) < 0.5
    periods = torch.randint(_PERIODS.start, _PERIODS.stop, (n,), generator=generator)
    orders = torch.rand(n, _TOKENS, generator=generator).argsort(1)
    places = torch.arange(_LENGTH)[None] % periods[:, None]
    chains = torch.randint(0, _TOKENS, (n, _LENGTH), generator=generator)
    follows = torch.rand(n, _LENGTH, generator=generator) < _FOLLOWED
    for t in range(1, _LENGTH):
        chains[:, t] = torch.where(follows[:, t], successor[chains[:, t - 1]], chains[:, t])
    return torch.where(repeated[:, None], orders.gather(1, places), chains), repeated


def language_model(seed: int) -> GPT2LMHeadModel:
    """Two layers of four heads, with random weights; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=_TOKENS, n_positions=_LENGTH, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def train_language_model(model: GPT2LMHeadModel, steps: int, seed: int) -> None:
    """Train on both kinds of sequences."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    pool, _ = sequences(_POOL, generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    for _ in range(steps):
        batch = pool[torch.randint(len(pool), (_BATCH,), generator=generator)]
        loss = model(batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def one_model(steps: int, n: int, n_restarts: int, seed: int) -> dict[str, Any]:
    """What components of a model say of both ways, before and after training.

    Args:
        steps: the number of steps of training.
        n: sequences to analyse, the last token of each predicted.
        n_restarts: the number of restarts of a decomposition.
        seed: the seed of the model, of training and of the sequences.

    Returns:
        `seed`; `accuracy` {"repetitions", "chains"} on the analysed sequences; `rows` {method: measures}.
    """
    model = language_model(seed)
    generator = torch.Generator().manual_seed(20_000 + seed)
    analysed, fresh = sequences(n, generator), sequences(n, generator)
    untrained = _component(_rows(model, analysed), fresh, n_restarts, seed, 1.0)
    train_language_model(model, steps, seed)
    trained = _rows(model, analysed)
    rows = {name: _component(trained, fresh, n_restarts, seed, power) for name, power in _POWERS.items()}
    # As many random combinations of the rows, the best of them chosen alike
    random = random_directions(trained.points, _COMPONENTS, seed)
    both = {"coefficients": random.competing, "alignments": random.alone}
    rows["random directions"] = {name: best_of(read, trained.repeated)[0] for name, read in both.items()}
    rows["NPEFF, weights untrained"] = untrained
    x, repeated = analysed
    with torch.no_grad():
        right = (model(x[:, :-1]).logits[:, -1].argmax(-1) == x[:, -1]).double()
    accuracy = {"repetitions": float(right[repeated].mean()), "chains": float(right[~repeated].mean())}
    return {"seed": seed, "accuracy": accuracy, "rows": rows}


@dataclass(frozen=True)
class _Rows:
    """Sequences as a model sees them.

    Attributes:
        analyzer: the analyzer of the model.
        data: the sequences, as the analyzer reads them.
        repeated: (n,) bool, which of them repeat.
        pefs: their PEFs, without a sketch.
        points: the same PEFs in coordinates of the span of all rows: exact, and of far fewer numbers.
    """

    analyzer: NPEFFAnalyzer
    data: list[dict[str, Any]]
    repeated: Tensor
    pefs: PEFs
    points: PEFs


def _rows(model: GPT2LMHeadModel, analysed: tuple[Tensor, Tensor]) -> _Rows:
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=_RANK, target_modules=_MAPS, sketch="identity"))
    data = _prompts(analysed[0])
    pefs = analyzer.compute_pefs(data, progress=False)
    rows = pefs.factors.flatten(0, 1)
    points = coordinates(rows @ rows.T).float().reshape(*pefs.factors.shape[:2], -1)
    return _Rows(analyzer, data, analysed[1], pefs, PEFs.from_factors(points))


def _component(rows: _Rows, fresh: tuple[Tensor, Tensor], n_restarts: int, seed: int, power: float) -> dict[str, Any]:
    """The component of repetitions: chosen on one half of the sequences, measured on the other and on fresh ones."""
    decomposition = NPEFF(_COMPONENTS, n_restarts=n_restarts, power=power, seed=seed).fit(rows.points)
    coefficients, alignments = decomposition.explain(rows.points)
    measured: dict[str, Any] = {"coefficients": best_of(coefficients, rows.repeated)[0]}
    measured["alignments"], j = best_of(alignments, rows.repeated)
    X = rows.points.factors.flatten(0, 1)
    mixing = combination_of(X, decomposition.pseudo_fishers).reshape(-1, *rows.pefs.factors.shape[:2])
    active = active_examples(coefficients)
    selective = selective_combinations(rows.pefs, mixing[[j]], active[:, [j]])
    beta = torch.cat([unscaled(rows.pefs, mixing), selective])
    *plain, direction = lift_combinations(rows.analyzer, rows.pefs, rows.data, beta, BATCH_SIZE, {})
    attention = [_in_attention(lifted.energies()) for lifted in plain]
    measured["attention"] = attention[j]
    measured["attention of others"] = statistics.mean(attention[:j] + attention[j + 1 :])
    settings = SelectivityConfig()
    signed_on = _kinds(rows.analyzer.read(rows.data)[:], rows.repeated, settings.for_signs)
    measured_on = _kinds(rows.analyzer.read(_prompts(fresh[0]))[:], fresh[1], settings)
    for name, change in (("ratio", direction), ("ratio of a random direction", direction.random_like(seed))):
        with rows.analyzer.forward_pass() as forward:
            switched = switch(forward, change, signed_on, measured_on, settings)
        measured[name] = switched["ratio"] if switched["reached"] else None
    return measured


def _kinds(examples: Sequence[Example], repeated: Tensor, settings: SelectivityConfig) -> list[list[Example]]:
    """The first sequences that repeat, and the first that do not."""
    counts = ((repeated, settings.n_top), (~repeated, settings.n_others))
    return [[examples[i] for i in kind.nonzero()[:n, 0].tolist()] for kind, n in counts]


def best_of(scores: Tensor, repeated: Tensor) -> tuple[float, int]:
    """The AUROC of a column of scores (n, r) on the second half of examples, and its number, chosen on the first."""
    half = len(scores) // 2
    best = int(aurocs(scores[:half], repeated[:half]).argmax())
    return float(aurocs(scores[half:, best : best + 1], repeated[half:])[0]), best


def _prompts(x: Tensor) -> list[dict[str, Any]]:
    """Everything but the last token, which is predicted."""
    return [{"input_ids": row[:-1].tolist()} for row in x]


def _in_attention(energies: dict[str, float]) -> float:
    """The share of a direction's squared norm that lies in attention."""
    return sum(share for name, share in energies.items() if ".attn." in name) / sum(energies.values())
