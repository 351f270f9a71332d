"""Output distributions: softmax, Bernoulli, Gaussian.

A distribution turns the k logits of one *term* (a single prediction) into probabilities. Its Fisher with respect to the
logits is S, factored as S = B Bᵀ:

    softmax     S = diag(p) − p pᵀ     B = diag(√p) − p √pᵀ
    Bernoulli   S = diag(p(1 − p))     B = diag(√(p(1 − p)))
    Gaussian    S = I                  B = I

A prediction of several terms (tokens, start and end of an answer) is a product of independent ones: Fishers add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _mean(values: Sequence[Tensor]) -> Tensor:
    """The mean (1, k) of rows (t_i, k)."""
    total = torch.zeros_like(values[0][:1])
    for rows in values:  # stacked, as many vocabularies as examples would be in memory at once
        total += rows.sum(0)
    return total / sum(len(rows) for rows in values)


class Distribution(ABC):
    """Independent output distributions from `logits` (N, k), one for each row. Vectors to multiply are (N, k, m)."""

    name: str

    def __init__(self, logits: Tensor):
        self.logits = logits

    @classmethod
    @abstractmethod
    def averaged(cls, predictions: Sequence[Tensor]) -> Distribution:
        """The distribution (1, k) with the mean of all terms' expectations, from the logits (t_i, k) of examples."""

    @abstractmethod
    def rows_of_exact(self) -> int:
        """The rank of S, which is the number of rows that `exact` needs."""

    @abstractmethod
    def hessian_times(self, V: Tensor) -> Tensor:
        """S V."""

    def hessian_form(self, V: Tensor) -> Tensor:
        """VᵀSV (N, m, m)."""
        return V.mT @ self.hessian_times(V)

    @abstractmethod
    def sqrt_times(self, V: Tensor) -> Tensor:
        """B V."""

    @abstractmethod
    def eigen(self) -> tuple[Tensor, Tensor]:
        """The `rows_of_exact` largest eigenvalues (N, ·), descending, and eigenvectors (N, k, ·) of S."""

    @abstractmethod
    def scores(self, c: int, generator: torch.Generator, index: int) -> Tensor:
        """Gradients of log p(y) with respect to the logits, for c samples y of distribution `index`: (k, c)."""

    @abstractmethod
    def predictions(self) -> tuple[Tensor, Tensor]:
        """The likeliest outcome, (N,) or (N, k), and its log-probability (N,)."""

    @abstractmethod
    def kl(self, other: Distribution) -> Tensor:
        """KL(self ‖ other), (N,), in nats, float64."""


class Softmax(Distribution):
    """One of k classes; classes with logit −inf have probability 0.

    If the likeliest class has probability 1 − ε, the Fisher is of the order of ε, and computing 1 − p would lose it to
    rounding. So 1 − p is computed as the sum of the other probabilities, and products with S, for which S 1 = 0, first
    subtract the entry of the likeliest class.
    """

    name = "softmax"

    def __init__(self, logits: Tensor):
        super().__init__(logits)
        self.p = logits.softmax(-1)
        self._best = logits.argmax(-1, keepdim=True)

    @classmethod
    def averaged(cls, predictions: Sequence[Tensor]) -> Softmax:
        """See `Distribution`."""
        return cls(_mean([logits.softmax(-1) for logits in predictions]).log())

    def _rest(self, p: Tensor) -> Tensor:
        """1 − p, accurate to the last digit."""
        others = p.scatter(-1, self._best, 0.0).sum(-1, keepdim=True)
        return (1 - p).scatter(-1, self._best, others)

    def rows_of_exact(self) -> int:
        """See `Distribution`."""
        return self.logits.shape[-1] - 1

    def hessian_times(self, V: Tensor) -> Tensor:
        """See `Distribution`."""
        p = self.p[..., None]
        W = self._from_best(V)
        W -= (p * W).sum(-2, keepdim=True)
        return W.mul_(p)

    def hessian_form(self, V: Tensor) -> Tensor:
        """See `Distribution`; S 1 = 0, so V counts only as far as it differs from its entry of the likeliest class."""
        p = self.p[..., None]
        W = self._from_best(V)
        W -= (p * W).sum(-2, keepdim=True)
        return W.mT @ (p * W)

    def _from_best(self, V: Tensor) -> Tensor:
        """V less its entry of the likeliest class, (N, k, m)."""
        N, m = len(self.p), V.shape[-1]
        return V - V.expand(N, -1, -1).gather(-2, self._best[..., None].expand(-1, -1, m))

    def sqrt_times(self, V: Tensor) -> Tensor:
        """See `Distribution`."""
        p = self.p[..., None]
        T = p.sqrt() * V
        # √p v − p Σ √p v, the likeliest class as (1 − p) √p v − p Σ over the others
        best = self._best[..., None].expand(-1, -1, V.shape[-1])
        others = T.scatter(-2, best, 0.0).sum(-2, keepdim=True)
        own = self._rest(self.p).gather(-1, self._best)[..., None] * T.gather(-2, best)
        result = T - p * (others + T.gather(-2, best))
        return result.scatter(-2, best, own - p.gather(-2, self._best[..., None]) * others)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """See `Distribution`."""
        p = self.logits.double().softmax(-1)
        S = -p[:, :, None] * p[:, None, :]
        S.diagonal(dim1=-2, dim2=-1).copy_(p * self._rest(p))
        values, vectors = torch.linalg.eigh(S)
        keep = self.rows_of_exact()
        values, vectors = values.flip(-1)[:, :keep], vectors.flip(-1)[:, :, :keep]
        return values.clamp_min(0).to(self.p.dtype), vectors.to(self.p.dtype)

    def scores(self, c: int, generator: torch.Generator, index: int) -> Tensor:
        """See `Distribution`."""
        p = self.p[index]
        return self.score(index, torch.multinomial(p.cpu(), c, replacement=True, generator=generator).to(p.device))

    def score(self, index: int, y: Tensor) -> Tensor:
        """∇ log p(y) by the logits for classes y (c,) of distribution `index`: (k, c)."""
        hit = F.one_hot(y, self.logits.shape[-1]).T.bool()
        return torch.where(hit, self._rest(self.p)[index, :, None], -self.p[index, :, None])

    def predictions(self) -> tuple[Tensor, Tensor]:
        """See `Distribution`."""
        best = self.logits.argmax(-1)
        return best, self.logits.log_softmax(-1).gather(-1, best[:, None])[:, 0]

    def kl(self, other: Distribution) -> Tensor:
        """See `Distribution`."""
        a, b = self.logits.double().log_softmax(-1), other.logits.double().log_softmax(-1)
        return torch.where(a.isneginf(), 0.0, a.exp() * (a - b)).sum(-1).clamp_min(0)


class Bernoulli(Distribution):
    """k independent yes-or-no labels."""

    name = "bernoulli"

    def __init__(self, logits: Tensor):
        super().__init__(logits)
        self.p = logits.sigmoid()
        self.variance = self.p * torch.sigmoid(-logits)

    @classmethod
    def averaged(cls, predictions: Sequence[Tensor]) -> Bernoulli:
        """See `Distribution`."""
        return cls(_mean([logits.sigmoid() for logits in predictions]).logit())

    def rows_of_exact(self) -> int:
        """See `Distribution`."""
        return self.logits.shape[-1]

    def hessian_times(self, V: Tensor) -> Tensor:
        """See `Distribution`."""
        return self.variance[..., None] * V

    def sqrt_times(self, V: Tensor) -> Tensor:
        """See `Distribution`."""
        return self.variance.sqrt()[..., None] * V

    def eigen(self) -> tuple[Tensor, Tensor]:
        """See `Distribution`."""
        values, order = self.variance.sort(dim=-1, descending=True)
        return values, F.one_hot(order, self.logits.shape[-1]).to(values.dtype).mT

    def scores(self, c: int, generator: torch.Generator, index: int) -> Tensor:
        """See `Distribution`."""
        p = self.p[index]
        return self.score(index, torch.bernoulli(p.cpu()[:, None].expand(-1, c), generator=generator).to(p.device))

    def score(self, index: int, y: Tensor) -> Tensor:
        """∇ log p(y) by the logits for labels y (k, c), 0 or 1, of distribution `index`: (k, c)."""
        return torch.where(y.bool(), torch.sigmoid(-self.logits[index])[:, None], -self.p[index, :, None])

    def predictions(self) -> tuple[Tensor, Tensor]:
        """See `Distribution`."""
        return (self.logits > 0).to(torch.int64), F.logsigmoid(self.logits.abs()).sum(-1)

    def kl(self, other: Distribution) -> Tensor:
        """See `Distribution`."""
        a, b = self.logits.double(), other.logits.double()
        p = a.sigmoid()
        yes = p * (F.logsigmoid(a) - F.logsigmoid(b))
        no = (1 - p) * (F.logsigmoid(-a) - F.logsigmoid(-b))
        return (yes + no).sum(-1).clamp_min(0)


HALF_SQUARED = "half squared distance"
"""The usual name for the KL of two Gaussians of unit variance."""


class Gaussian(Distribution):
    """k real numbers with the logits as mean and unit variance: regression, embeddings.

    The KL of two is half the squared distance of their means; for normalised embeddings it is 1 − their cosine.
    """

    name = "gaussian"

    @classmethod
    def averaged(cls, predictions: Sequence[Tensor]) -> Gaussian:
        """See `Distribution`."""
        return cls(_mean(predictions))

    def rows_of_exact(self) -> int:
        """See `Distribution`."""
        return self.logits.shape[-1]

    def hessian_times(self, V: Tensor) -> Tensor:
        """See `Distribution`."""
        return V

    def sqrt_times(self, V: Tensor) -> Tensor:
        """See `Distribution`."""
        return V

    def eigen(self) -> tuple[Tensor, Tensor]:
        """See `Distribution`."""
        n, k = self.logits.shape
        return torch.ones_like(self.logits), torch.eye(k, device=self.logits.device).to(self.logits).expand(n, k, k)

    def scores(self, c: int, generator: torch.Generator, index: int) -> Tensor:
        """See `Distribution`."""
        return torch.randn(self.logits.shape[-1], c, generator=generator).to(self.logits)

    def predictions(self) -> tuple[Tensor, Tensor]:
        """See `Distribution`."""
        k = self.logits.shape[-1]
        density = -0.5 * k * torch.log(torch.tensor(2 * torch.pi))
        return self.logits, density.expand(len(self.logits)).to(self.logits)

    def kl(self, other: Distribution) -> Tensor:
        """See `Distribution`."""
        return 0.5 * (self.logits.double() - other.logits.double()).square().sum(-1)
