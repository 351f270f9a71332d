"""The leading eigenpairs of M = JᵀSJ (h×h) at an output head, from thin products with the unembedding only.

They come from a block Krylov space (Musco & Musco 2015, arXiv:1504.05477), each block of which costs two products of a
few columns with the unembedding. For a large vocabulary the space is built with the likely tokens alone, in which all
others are merged into one outcome of their probability ε and mean row μ, and M itself is used once, at the end. With R
the merged tokens and w_y the rows of J (the law of total variance),

    M = M_T + E,    E = Σ_{y ∈ R} p_y (w_y − μ)(w_y − μ)ᵀ,    both positive semi-definite

M_T is the same expression for the merged distribution. With U the leading eigenvectors of M_T, at least c, the factor
is the best one in their span: the leading c eigenpairs (θ, u) of UᵀMU, so that what it leaves of M is exact. Its error
is no larger than that of X_T, the leading c eigenpairs of M_T, which lie in the same span, so that

    ‖M − Σθuuᵀ‖_F ≤ ‖M − X_T‖_F ≤ ‖M_T − X_T‖_F + ‖E‖_F ≤ (1 + ‖E‖_F / ‖M_T − X_T‖_F) · the least error possible

The last step holds because the eigenvalues of M are no smaller than those of M_T, and so are the sums of squares that
c of them leave. Both norms are estimated from a few random vectors g, as the mean of ‖Eg‖² is ‖E‖_F², and an example
whose ratio is above a quarter gets the whole iteration. (The error is of second order in E, and far below the bound.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_npeff.fisher.distributions import Distribution, Softmax
from hf_npeff.fisher.outputs import HeadJacobian

_ROUNDS = 3
"""Blocks of the Krylov space. With three, errors are at most 1.02 × the least possible ones, where rounding is not
larger than those: random heads of k = 40 to 8,192 with flat and steep spectra, flat and peaked predictions, c = 1 to
32, and SmolLM2's (1.01). With two it is 1.10 there, with one 4.1."""
OVERSAMPLING = 2
"""Columns beyond c of a block. Chosen with `_ROUNDS`, whose errors were measured with two."""
_LIKELY = 256
"""Likely tokens for each of the c rows. Measured on 24 prompts and texts of SmolLM2, c = 1, 4 and 8: errors are at most
1.004 × the least possible ones, and the bound at most 1.24."""
_FEWEST = 512
"""Likely tokens at least. Chosen: with c = 1 the bound is then at most 1.19 there."""
_WORTHWHILE = 8
"""The vocabulary is at least so many times the likely tokens: gathering their rows costs as much as some products."""
_PROBES = 4
"""Random vectors for the two norms. E has hundreds of small directions, so four give its norm to a few per cent."""
_BOUND = 0.25
"""The largest ‖E‖_F / ‖M_T − X_T‖_F: the error is then at most 1.25 × the least possible one."""


class HiddenMetric(NamedTuple):
    """A metric C of the hidden state, as its square roots.

    Attributes:
        root: C^½ (h, h).
        inverse_root: C^(−½) (h, h).
    """

    root: Tensor
    inverse_root: Tensor

    @classmethod
    def of(cls, C: Tensor, shrinkage: float = 0.2) -> HiddenMetric:
        """The metric of a positive semi-definite C (h, h), shrunk towards the identity of the same trace.

        Examples differ in their C; the identity stands for the unknown part.
        """
        h = len(C)
        trace = C.diagonal().sum()
        mean = C / trace if bool(trace > 0) else torch.zeros_like(C)
        identity = torch.eye(h, dtype=C.dtype, device=C.device) / h
        values, U = torch.linalg.eigh((1 - shrinkage) * (mean + mean.mT) / 2 + shrinkage * identity)
        return cls((U * values.sqrt()) @ U.mT, (U / values.sqrt()) @ U.mT)


def top_eigenpairs(
    distribution: Distribution,
    jacobian: HeadJacobian | None,
    c: int,
    rounds: int = _ROUNDS,
    metric: HiddenMetric | None = None,
) -> tuple[Tensor, Tensor]:
    """The top c eigenvalues (N, c), descending, and eigenvectors (N, h, c) of M = JᵀSJ; see the module.

    With a metric C they are those of C^½ M C^½.

    Args:
        distribution: N output distributions.
        jacobian: J_head, or None for the identity (then h = k).
        c: the number of eigenpairs, at most h.
        rounds: the number of blocks of the Krylov space.
        metric: the metric C of the Jacobian's input; of the logits if there is no Jacobian.
    """
    root = None if metric is None else metric.root.to(distribution.logits)
    likely = likely_tokens(distribution.logits.shape[-1], c)
    if jacobian is None or type(distribution) is not Softmax or likely is None:
        return _krylov(distribution, jacobian, c, rounds, root)
    values, vectors, certain = _by_likely(distribution, jacobian, c, rounds, root, likely)
    if not bool(certain.all()):
        rest = (~certain).nonzero()[:, 0]
        slope = None if jacobian.slope is None else jacobian.slope[rest]
        some = Softmax(distribution.logits[rest]), HeadJacobian(jacobian.weight, slope)
        values[rest], vectors[rest] = _krylov(*some, c, rounds, root)
    return values, vectors


def likely_tokens(k: int, c: int) -> int | None:
    """How many of k tokens the space is built with; None: all."""
    likely = max(_FEWEST, _LIKELY * c)
    return likely if k >= _WORTHWHILE * likely else None


def _by_likely(
    distribution: Softmax, jacobian: HeadJacobian, c: int, rounds: int, root: Tensor | None, likely: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenpairs from the `likely` tokens, and (N,) whether the bound of the module's formulas holds for them."""
    h = jacobian.weight.shape[1]
    tokens = distribution.logits.topk(likely, sorted=False).indices
    rare = distribution.p.scatter(-1, tokens, 0.0)
    mass = rare.sum(-1, keepdim=True)
    mean = jacobian.pull(rare[..., None])[..., 0] / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    remainder = distribution.logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    merged = Softmax(torch.cat([distribution.logits.gather(-1, tokens), remainder], -1))
    chosen = torch.cat([tokens, tokens[:, :1]], -1)  # the last place is overwritten
    rows = jacobian.weight[chosen]
    if jacobian.slope is not None:
        rows *= jacobian.slope.gather(-1, chosen)[..., None]
    rows[:, -1] = mean
    merged_head = HeadJacobian(rows)
    width = min(c + OVERSAMPLING, h)
    known, U = _krylov(merged, merged_head, width, rounds, root)
    pushed = jacobian.push(U if root is None else root @ U)
    T = distribution.hessian_form(pushed).double()
    values, rotation = torch.linalg.eigh((T + T.mT) / 2)
    values, rotation = values.flip(-1)[:, :c], rotation.flip(-1)[..., :c]
    probes = torch.randn(h, _PROBES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probes = probes.to(U.device, U.dtype).expand(1, h, _PROBES)
    turned = probes if root is None else root @ probes
    spread = rare[..., None] * (jacobian.push(turned) - (mean[:, None] @ turned))
    lost = jacobian.pull(spread)
    lost = lost if root is None else root @ lost
    beside = probes - U @ (U.mT @ probes)
    left = _product(merged, merged_head, root, beside)
    left = left - U @ (U.mT @ left)
    least = known[:, c:].double().square().sum(1) + left.double().square().sum((1, 2)) / _PROBES
    certain = lost.double().square().sum((1, 2)) / _PROBES <= _BOUND**2 * least
    return values.clamp_min(0).to(U.dtype), U @ rotation.to(U.dtype), certain


def _product(distribution: Distribution, jacobian: HeadJacobian | None, root: Tensor | None, Q: Tensor) -> Tensor:
    """M Q (N, h, m), or C^½ M C^½ Q."""
    Q = Q if root is None else root @ Q
    Y = distribution.hessian_times(Q if jacobian is None else jacobian.push(Q))
    Y = Y if jacobian is None else jacobian.pull(Y)
    return Y if root is None else root @ Y


def _krylov(
    distribution: Distribution, jacobian: HeadJacobian | None, c: int, rounds: int, root: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The eigenpairs from a block Krylov space of M itself."""
    logits = distribution.logits
    N, k = logits.shape
    h = k if jacobian is None else jacobian.weight.shape[-1]

    def times(Q: Tensor) -> Tensor:
        return _product(distribution, jacobian, root, Q)

    width = min(c + OVERSAMPLING, h)
    start = torch.randn(h, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = (start / start.norm(dim=0)).to(logits.device, logits.dtype)[None]  # through the head once for all
    noise = shared.expand(N, h, width)
    basis = torch.linalg.qr(times(shared) + torch.finfo(logits.dtype).tiny * noise)[0]
    images = times(basis)
    while basis.shape[-1] < min(h, rounds * width):
        block = images[..., -width:]
        room = min(width, h - basis.shape[-1])
        # A space that is exhausted leaves only rounding; fresh noise in its place keeps the basis orthonormal.
        scale = block.norm(dim=-2, keepdim=True).amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
        # Above rounding of float32, below all that counts
        block = (block / scale)[..., :room] + 1e-6 * noise[..., :room].roll(basis.shape[-1], dims=-2)
        for _ in range(2):
            block = block - basis @ (basis.mT @ block)
            block = torch.linalg.qr(block)[0]
        basis = torch.cat([basis, block], -1)
        images = torch.cat([images, times(block)], -1)
    T = (basis.mT @ images).double()
    values, rotation = torch.linalg.eigh((T + T.mT) / 2)
    values, rotation = values.flip(-1)[:, :c], rotation.flip(-1)[..., :c]
    return values.clamp_min(0).to(logits.dtype), basis @ rotation.to(logits.dtype)
