"""What a decomposition says about examples: how much of each is explained, by which components; a map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_npeff.decomposition.objective import overlaps
from hf_npeff.extras import load

Layout = Literal["tsne", "pca"]
LANDMARKS = 4000
"""The most examples that t-SNE places. Other examples are placed between their nearest neighbours among these."""
_NEIGHBOURS = 5
"""Between how many landmarks an example is placed. Chosen: fewer put it on top of one, more into the middle."""
_CHUNK = 1024
"""How many examples are processed at a time; bounds the memory."""


@dataclass(frozen=True)
class Explained:
    """How the components explain each example.

    With F_i at unit norm and w its coefficients at their minimum, ⟨F_i, g_j g_jᵀ⟩ = (Hw)_j wherever w_j > 0, so that
    1 − ‖F_i − Σ_j w_j g_j g_jᵀ‖² = wᵀHw, and component j brings w_j (Hw)_j of it.

    Attributes:
        total: (n,) explained fraction of each.
        components: (n, k) the k components that bring most, descending.
        parts: (n, k) what they bring.
    """

    total: np.ndarray
    components: np.ndarray
    parts: np.ndarray


def explained_by(W: Tensor, G: Tensor, k: int = 8) -> Explained:
    """How much of each example the components explain, and which components explain most.

    Args:
        W: (n, r) coefficients of unit PEFs at their minimum, as `Decomposition.transform` gives them.
        G: (r, d) pseudo-Fishers.
        k: components to name.
    """
    W, H = W.cpu(), overlaps(G.cpu().double())
    k = min(k, W.shape[1])
    totals, indices, values = [], [], []
    for w in W.double().split(_CHUNK):
        parts = w * (w @ H)
        totals.append(parts.sum(1))
        leading = torch.sort(parts, dim=1, descending=True, stable=True)
        indices.append(leading.indices[:, :k])
        values.append(leading.values[:, :k])
    return Explained(*(torch.cat(x).numpy() for x in (totals, indices, values)))


def nearest_components(G: Tensor, k: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The k components nearest to each by |cosine|, without itself, and the cosines, sign included: (r, k) each."""
    r = len(G)
    k = min(k, r - 1)
    C = G.cpu().double() @ G.cpu().double().T
    C.fill_diagonal_(0)
    size = C.abs()
    size.fill_diagonal_(-1)
    order = torch.argsort(size, dim=1, descending=True, stable=True)[:, :k]
    return order.numpy(), C.gather(1, order).numpy()


def place(W: Tensor, method: Layout = "tsne", seed: int = 0) -> np.ndarray:
    """Places of examples on a plane, (n, 2) within [0, 1]; examples with similar coefficients lie close together.

    Rows of W are scaled to unit length. Above `LANDMARKS` examples t-SNE places a random sample of so many, and the
    others lie at the mean of their five nearest there, weighted by cosine: the cost stays that of the sample.

    Args:
        W: (n, r).
        method: t-SNE, or the first two principal components.
        seed: the seed of the sample and of t-SNE.

    Raises:
        ModuleNotFoundError: if t-SNE is wanted and scikit-learn is not installed.
        ValueError: if the method is unknown.
    """
    if method not in ("tsne", "pca"):
        raise ValueError(f"the map is made by 'tsne' or 'pca', not {method!r}")
    manifold = _manifold() if method == "tsne" else None  # what is missing is missed before any work
    X = torch.nn.functional.normalize(W.cpu().double(), dim=1).numpy()
    n, r = X.shape
    if n < 4 or r < 2 or np.ptp(X, axis=0).max() < 1e-6:  # nothing to lay out
        return _within_unit(np.stack([np.arange(n), np.zeros(n)], 1))
    if manifold is None:
        return _within_unit(_principal(X, 2))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(n)[:LANDMARKS])
    few = _principal(X[chosen], min(50, r))  # van der Maaten & Hinton 2008 reduce to 30; noise goes, distances stay
    # scikit-learn's own start from principal components divides by a deviation that may be zero.
    start = few[:, :2] + 1e-3 * rng.standard_normal((len(few), 2))
    # 1e-4 and a perplexity of 30 are scikit-learn's; 500 iterations suffice for a map of 4,000.
    start = (start / start.std(0) * 1e-4).astype(np.float32)
    perplexity = min(30.0, (len(few) - 1) / 3)  # scikit-learn's default, and what few examples allow
    # Enough for the page: it starts at a good place
    tsne = manifold.TSNE(2, init=start, perplexity=perplexity, max_iter=500, random_state=seed)
    landmarks = tsne.fit_transform(few.astype(np.float32))
    if len(chosen) == n:
        return _within_unit(landmarks)
    return _within_unit(_between_landmarks(X, chosen, landmarks))


def _manifold() -> Any:
    return load(
        "sklearn.manifold",
        "the map of examples",
        extra="viz",
        instead="; or make it of principal components (layout='pca', --map pca), or leave it out (layout=None, "
        "--map none)",
    )


def _principal(X: np.ndarray, k: int) -> np.ndarray:
    """The first k principal components (n, k), each with its largest entry positive."""
    centred = X - X.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    projected = centred @ vectors[:, ::-1][:, :k]
    return projected * np.sign(projected[np.abs(projected).argmax(0), np.arange(k)])


def _between_landmarks(X: np.ndarray, chosen: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    xy = np.empty((len(X), 2), dtype=np.float64)
    for start in range(0, len(X), _CHUNK):
        cosines = X[start : start + _CHUNK] @ X[chosen].T
        near = np.argpartition(-cosines, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
        # The fourth power lets near landmarks outweigh the others.
        weights = np.clip(np.take_along_axis(cosines, near, 1), 1e-6, None) ** 4
        xy[start : start + _CHUNK] = (landmarks[near] * weights[..., None]).sum(1) / weights.sum(1)[:, None]
    xy[chosen] = landmarks
    return xy


def _within_unit(xy: np.ndarray) -> np.ndarray:
    """Shift and scale each axis to [0, 1] separately, since the proportions of such a map mean nothing."""
    if len(xy) == 0:
        return xy.astype(np.float32)
    span = np.ptp(xy, axis=0)
    return np.where(span > 0, (xy - xy.min(0)) / np.where(span > 0, span, 1.0), 0.5).astype(np.float32)
