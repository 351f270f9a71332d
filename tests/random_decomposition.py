"""Decompositions of any size that no model made, to draw pages of."""

from __future__ import annotations

import random

import torch

from hf_npeff import Decomposition, DecompositionConfig, FisherConfig

WORDS = "the of a model answers weight moves city state verb plural past tense question because river".split()


def random_decomposition(n: int, r: int, seed: int = 0, *, dense: bool = True) -> Decomposition:
    """A random decomposition with texts, a label, a prediction and a number."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    W = torch.rand(n, r, generator=generator) ** 8
    if not dense:
        W = torch.where(W > 0.2, W, 0.0)
    G = torch.nn.functional.normalize(torch.randn(r, 64, generator=generator), dim=1)
    texts = [" ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(30)) for _ in range(n)]
    labels = [rng.randrange(6) for _ in range(n)]
    columns = {
        "text": texts,
        "label": labels,
        "prediction": [str(x if rng.random() < 0.8 else rng.randrange(6)) for x in labels],
        "length": [len(text) + rng.random() for text in texts],
    }
    info = {"fingerprint": "random", "fisher": FisherConfig().to_dict(), "sketch": None, "model": None}
    return Decomposition(
        W,
        G,
        config=DecompositionConfig(n_components=r),
        info=info,
        example_ids=[str(i) for i in range(n)],
        columns=columns,
        stability=torch.rand(r, generator=generator),
        loss_history=[1.0, 0.5, 0.3],
    )
