"""Output factors: the c cotangents of an example whose gradients make up its Fisher.

With S = B Bᵀ at the logits and J_head the head's Jacobian, the rows A = VᵀJ of the cotangents V give AᵀA ≈ JᵀSJ:

    exact       V = √λ e for the eigenpairs of S (k×k): all of them, AᵀA = F
    spectral    V = √λ u at the hidden state z for the top c eigenpairs of M = J_headᵀ S J_head (h×h); at the logits,
                where the cotangent has to pass the head itself, V = S J_head u / √λ: its pull-back to z is √λ u;
                in the metric C of the parameters (metric.py), V = √λ C^(−½)u for the eigenpairs of C^½ M C^½
    projection  V = B r/√c with r Rademacher, E[AᵀA] = F
    sampling    V = ∇log p(y)/√c with y ~ p, E[AᵀA] = F

M is never formed; `eigenpairs` finds its eigenpairs by thin products with the unembedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig, OutputFactor
from hf_npeff.fisher.distributions import Distribution
from hf_npeff.fisher.eigenpairs import OVERSAMPLING, HiddenMetric, likely_tokens, top_eigenpairs
from hf_npeff.fisher.outputs import HeadJacobian, Outputs

EXACT_LIMIT = 1024
"""`exact` diagonalises a k×k matrix for every example, so it is refused above this k."""
_CHUNK_NUMBERS = 2**26
"""Numbers of the terms that are handled together: bounds memory at 256 MB of float32; the factors do not depend on
it."""


class Cotangents(NamedTuple):
    """The cotangents that enter at `Outputs.source`.

    Attributes:
        values: (B, t, c, s), the cotangents of every term.
        joint: whether one backward pass may carry all terms at once (a single term, or random signs for each term);
            otherwise the rows of every term have to be stacked and reduced.
    """

    values: Tensor
    joint: bool


def resolve(factor: OutputFactor, outputs: Outputs, rank: int) -> OutputFactor:
    """The output factor for these outputs, with "auto" decided.

    Raises:
        ValueError: if `exact` is set for a vocabulary, or `rank` exceeds the dimension of the space of cotangents.
    """
    distribution = outputs.distribution(outputs.logits[:1, 0])
    k = outputs.logits.shape[-1]
    h = k if outputs.jacobian is None else outputs.jacobian.weight.shape[1]
    exact_rows = distribution.rows_of_exact()
    if factor == "auto":
        factor = "exact" if exact_rows <= rank and k <= EXACT_LIMIT else "spectral"
    if factor == "exact" and k > EXACT_LIMIT:
        raise ValueError(
            f"output_factor='exact' diagonalises a {k}×{k} matrix for every example; use output_factor='spectral', "
            f"which keeps the best `rank` rows (exact is for at most {EXACT_LIMIT} classes)"
        )
    if factor == "spectral" and rank > h:
        raise ValueError(f"rank={rank} is more than the {h} dimensions of the head's input; lower it to {h}")
    return factor


def rows_per_example(config: FisherConfig, distribution: type[Distribution] | None, k: int | None) -> int:
    """The number of rows c, before the model runs: "exact" keeps all rows of one output term, otherwise it is `rank`.

    Args:
        config: the settings of the analysis.
        distribution: the distribution of the model's output, or None if it is not known.
        k: the number of classes, or None if it is not known or an example has several terms.
    """
    if distribution is None or k is None or k < 1 or config.output_factor not in ("auto", "exact"):
        return config.rank
    exact = max(1, distribution(torch.zeros(1, k)).rows_of_exact())
    kept_by_auto = exact <= config.rank and k <= EXACT_LIMIT
    return exact if config.output_factor == "exact" or kept_by_auto else config.rank


def seeds_of(ids: Sequence[str], seed: int) -> list[int]:
    """A seed for every example from its id, so that random factors do not depend on the batch."""
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids)
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def cotangents(
    outputs: Outputs, factor: OutputFactor, rank: int, seeds: Sequence[int], metric: HiddenMetric | None = None
) -> Cotangents:
    """The cotangents of a batch.

    Args:
        outputs: B examples of t terms.
        factor: as `resolve` returned it.
        rank: c.
        seeds: the seeds of the random factors, one per example.
        metric: the metric of the hidden state in which "spectral" rows are the best; None uses the hidden state's own.

    Returns:
        Cotangents with c = `rank` columns ("exact" has all that exist), zero if a term does not exist.
    """
    B, t, k = outputs.logits.shape
    flat = outputs.logits.flatten(0, 1)
    jacobian = outputs.jacobian
    if factor in ("exact", "spectral"):
        pieces = []
        columns = rank + OVERSAMPLING if factor == "spectral" else k
        gathered = 0 if jacobian is None else (likely_tokens(k, rank) or 0) * jacobian.weight.shape[-1]
        step = max(1, _CHUNK_NUMBERS // max(k * columns, gathered))
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            distribution = outputs.distribution(flat[part])
            head = _slice_of(jacobian, part)
            if factor == "exact":
                values, vectors = distribution.eigen()
                V = vectors * values.sqrt()[:, None]
                if V.shape[-1] == 0:  # one class, which is certain, so the row is zero
                    V = V.new_zeros(*V.shape[:-1], 1)
            else:
                V = _spectral(distribution, head, rank, outputs.at_hidden, metric)
            pieces.append(_to_source(V, head, outputs.at_hidden and factor == "exact"))
        V = torch.cat(pieces)
        joint = t == 1 and not outputs.several
    else:
        V = _random(outputs, factor, rank, seeds, flat, jacobian)
        joint = True
    V = V.reshape(B, t, *V.shape[1:]).mT
    return Cotangents(V * outputs.valid[:, :, None, None], joint)


def _slice_of(jacobian: HeadJacobian | None, part: slice) -> HeadJacobian | None:
    if jacobian is None or jacobian.slope is None:
        return jacobian
    return HeadJacobian(jacobian.weight, jacobian.slope[part])


def _to_source(V: Tensor, jacobian: HeadJacobian | None, at_hidden: bool) -> Tensor:
    """Cotangents at the logits (N, k, c) → where they enter (N, s, c)."""
    if not at_hidden:
        return V
    assert jacobian is not None
    return jacobian.pull(V)


def _random(
    outputs: Outputs, factor: OutputFactor, rank: int, seeds: Sequence[int], flat: Tensor, jacobian: HeadJacobian | None
) -> Tensor:
    B, t, k = outputs.logits.shape
    pieces = []
    for i in range(B):  # one generator for each example, so that rows do not depend on the batch
        generator = torch.Generator().manual_seed(seeds[i])
        part = slice(i * t, (i + 1) * t)
        distribution = outputs.distribution(flat[part])
        if factor == "projection":
            signs = torch.randint(0, 2, (t, k, rank), generator=generator, dtype=torch.int8).to(flat.device) * 2 - 1
            V = distribution.sqrt_times(signs.to(flat.dtype))
        else:
            V = torch.stack([distribution.scores(rank, generator, j) for j in range(t)])
        pieces.append(_to_source(V / rank**0.5, _slice_of(jacobian, part), outputs.at_hidden))
    return torch.cat(pieces)


def _spectral(
    distribution: Distribution, jacobian: HeadJacobian | None, c: int, at_hidden: bool, metric: HiddenMetric | None
) -> Tensor:
    """√λ C^(−½)u at the hidden state, or S J u/√λ at the logits, for the top c eigenpairs: (N, s, c).

    If there is no Jacobian of a head, the metric is that of the logits themselves.
    """
    values, vectors = top_eigenpairs(distribution, jacobian, c, metric=metric)
    if at_hidden or (jacobian is None and metric is not None):
        vectors = vectors if metric is None else metric.inverse_root.to(vectors) @ vectors
        return vectors * values.sqrt()[:, None]
    V = distribution.hessian_times(vectors if jacobian is None else jacobian.push(vectors))
    scale = values.sqrt()
    # A direction below rounding carries nothing, and its cotangent would only be amplified rounding.
    tiny = values <= values[:, :1] * torch.finfo(values.dtype).eps * 10
    return V * torch.where(tiny, 0.0, 1 / scale.clamp_min(torch.finfo(scale.dtype).tiny))[:, None]


def reduce_rows(rows: Tensor, cotangents_of_rows: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """The best c combinations of the stacked rows of all terms, by an SVD of the sketched rows.

    Args:
        rows: (B, t·c', d), the rows of term after term.
        cotangents_of_rows: (B, t, c', s), their cotangents.
        c: the number of rows to keep.

    Returns:
        rows (B, c, d) = UᵀA for the top left singular vectors U (zero rows where there are fewer), and the cotangents
        (B, t, c, s) that make them in one backward pass each.
    """
    B, m, _ = rows.shape
    t, per_term = cotangents_of_rows.shape[1:3]
    scale = rows.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    A = (rows / scale).double()
    _, U = torch.linalg.eigh(A @ A.mT)
    U = U.flip(-1)[..., :c]
    if U.shape[-1] < c:
        U = torch.cat([U, U.new_zeros(B, m, c - U.shape[-1])], -1)
    reduced = (U.mT @ A).to(rows.dtype) * scale
    mixing = U.reshape(B, t, per_term, c).to(cotangents_of_rows.dtype)
    return reduced, mixing.mT @ cotangents_of_rows
