"""The method again, slowly: dense float64 oracles that share no line with the package under test.

Every function forms the matrix that its formula names. The letters are those of the package:

    n examples, k classes, h hidden size, c rows of an example's factor, p parameters, d sketched parameters,
    r components.

A per-example Fisher F (p×p) = Jᵀ S J = AᵀA has a factor A (c×p) whose *rows* are scaled gradients. `As` are the n
factors of a data set, an (n, c, d) tensor or a list of (c_i, d) ones; `W` is (n, r), `G` is (r, d).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import MASK

Batch = Mapping[str, Tensor]
Factors = Tensor | Sequence[Tensor]


# The output: distributions and the logits that make them ------------------------------------------------------------


class Term(NamedTuple):
    """One of the independent output distributions of an example."""

    logits: Tensor
    """(k,): of classes (softmax), of independent yes/no labels (bernoulli), or means of unit variance (gaussian)."""
    kind: str
    """"softmax", "bernoulli" or "gaussian"."""


TermsOf = Callable[[PreTrainedModel, Batch], list[Term]]
"""From a model and a batch of one example to the distributions whose Fishers add up to the example's."""

_MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "position_ids", "token_type_ids", "decoder_input_ids")


def terms_of(task: str, positions: str | Sequence[int] = "last", *, mask_token: int = MASK) -> TermsOf:
    """Return what a task predicts, as a function of a model and a batch of one.

    - sequence-classification, image-classification: one term, its kind from the config's problem type;
    - multiple-choice: one softmax over the choices;
    - question-answering: two softmaxes over the tokens, start and end;
    - token-classification: one softmax per token, without those labelled -100 where there are labels;
    - masked-lm: one softmax per mask token;
    - seq2seq-lm: one softmax per answer token, given those before it;
    - causal-lm: one softmax per position: the last one, those whose next token is a label, or all.

    Args:
        task: As in `tests.tiny.FAMILIES`.
        positions: Of a causal language model, "last", "labels" or "all"; for any task with a distribution per
            position also a list of the positions whose logits count.
        mask_token: Its id, for masked language models; with labels in the batch, those that are not -100 count.
    """

    def terms(model: PreTrainedModel, batch: Batch) -> list[Term]:
        inputs = {key: batch[key] for key in _MODEL_INPUTS if key in batch}
        if task == "seq2seq-lm" and "decoder_input_ids" not in inputs:
            inputs["labels"] = batch["labels"]
        outputs = model(**inputs)
        if task == "question-answering":
            spans = (outputs.start_logits, outputs.end_logits)
            return [Term(logits[0, _real(batch)], "softmax") for logits in spans]
        logits = outputs.logits[0]
        if logits.dim() == 1:
            return [Term(logits, "softmax" if task == "multiple-choice" else _kind(model))]
        counted = _positions(task, positions, batch, mask_token) if isinstance(positions, str) else positions
        return [Term(logits[t], "softmax") for t in counted]

    return terms


def embedding_terms(pooling: str, *, normalised: bool, skipped: int = 0, kept: int | None = None) -> TermsOf:
    """Return what an embedding model predicts, as a function of its transformer and a batch of one: one Gaussian.

    Its mean is the embedding e; of variance I, so that F = JᵀJ with J = ∂e/∂θ.

    Args:
        pooling: "mean", "cls" or "lasttoken".
        normalised: Whether e is divided by its length.
        skipped: Tokens of the prompt that are not pooled.
        kept: How many of the numbers of e count; all when None.
    """

    def terms(model: PreTrainedModel, batch: Batch) -> list[Term]:
        states = model(**{key: batch[key] for key in _MODEL_INPUTS if key in batch}).last_hidden_state[0, skipped:]
        e = {"mean": states.sum(0) / len(states), "cls": states[0], "lasttoken": states[-1]}[pooling]
        e = e / e.square().sum().sqrt() if normalised else e
        return [Term(e[:kept], "gaussian")]

    return terms


def _kind(model: PreTrainedModel) -> str:
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        return "bernoulli"
    if problem == "regression" or (problem is None and model.config.num_labels == 1):
        return "gaussian"
    return "softmax"


def _real(batch: Batch) -> list[int]:
    """The positions of one example that are not padding."""
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
    return mask[0].nonzero().flatten().tolist()


def _positions(task: str, positions: str, batch: Batch, mask_token: int) -> list[int]:
    """The positions of one example whose output distributions count."""
    labelled = (batch["labels"][0] != -100).nonzero().flatten().tolist() if "labels" in batch else None
    if task == "seq2seq-lm" or (task in ("token-classification", "masked-lm") and labelled is not None):
        return labelled or []
    if task == "masked-lm":
        return (batch["input_ids"][0] == mask_token).nonzero().flatten().tolist()
    real = _real(batch)
    if task == "token-classification" or positions == "all":
        return real
    if positions == "labels":
        return [t for t, following in itertools.pairwise(real) if following in (labelled or [])]
    return real[-1:]


def output_hessian(logits: Tensor, kind: str) -> Tensor:
    """S (k×k), the Fisher of a distribution with respect to its logits.

    diag(p) − p pᵀ for softmax, diag(p(1 − p)) for Bernoulli, I for a Gaussian of unit variance. 1 − p is the sum of the
    other probabilities: as a difference it is 0 for a class that is certain to the last digit, whose row is not.
    """
    logits = logits.detach().double()
    if kind == "softmax":
        prob = logits.softmax(-1)
        others = 1 - torch.eye(len(prob), dtype=torch.float64)
        return (prob * (others @ prob[:, None])[:, 0]).diag() - others * (prob[:, None] * prob[None, :])
    if kind == "bernoulli":
        return (logits.sigmoid() * torch.sigmoid(-logits)).diag()
    if kind == "gaussian":
        return torch.eye(len(logits), dtype=torch.float64)
    raise ValueError(f"no distribution is called {kind!r}")


def log_probability(logits: Tensor, kind: str, y: Tensor) -> Tensor:
    """log p(y), up to a constant: y is a class index, a vector of 0/1, or a real vector."""
    if kind == "softmax":
        return logits.log_softmax(-1)[y]
    if kind == "bernoulli":
        return torch.nn.functional.logsigmoid(torch.where(y == 1, logits, -logits)).sum()
    if kind == "gaussian":
        return -0.5 * (y - logits).square().sum()
    raise ValueError(f"no distribution is called {kind!r}")


def outcomes(logits: Tensor, kind: str) -> Iterator[tuple[float, Tensor]]:
    """Every outcome y with its probability.

    A Gaussian has too many: its 2k points f ± √k e_j, equally likely, have its mean and its covariance, which is all
    that the Fisher asks of it.
    """
    logits = logits.detach()
    k = len(logits)
    if kind == "softmax":
        for label, prob in enumerate(logits.softmax(-1).tolist()):
            yield prob, torch.tensor(label)
    elif kind == "bernoulli":
        for bits in itertools.product((0, 1), repeat=k):
            y = torch.tensor(bits)
            yield log_probability(logits, kind, y).exp().item(), y
    elif kind == "gaussian":
        for j, sign in itertools.product(range(k), (1, -1)):
            yield 1 / (2 * k), logits + sign * math.sqrt(k) * torch.eye(k, dtype=logits.dtype)[j]
    else:
        raise ValueError(f"no distribution is called {kind!r}")


# Per-example Fishers ------------------------------------------------------------------------------------------------


def sizes(model: PreTrainedModel, parameters: Sequence[str]) -> dict[str, torch.Size]:
    """Shapes of the named parameters, in the order in which every row here lays them out, each flattened."""
    return {name: tensor.shape for name, tensor in _tensors(model, parameters).items()}


def split_row(row: Tensor, model: PreTrainedModel, parameters: Sequence[str]) -> dict[str, Tensor]:
    """Cut a row (p,) into one tensor per parameter."""
    shapes = sizes(model, parameters)
    parts = row.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _tensors(model: PreTrainedModel, parameters: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: every[name] for name in parameters}


@contextmanager
def _differentiable(model: PreTrainedModel, parameters: Sequence[str]) -> Iterator[list[torch.nn.Parameter]]:
    """The named parameters, with requires_grad on for a while and on for nothing else."""
    before = [(tensor, tensor.requires_grad) for tensor in model.parameters()]
    chosen = list(_tensors(model, parameters).values())
    try:
        for tensor, _ in before:
            tensor.requires_grad_(False)
        for tensor in chosen:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield chosen
    finally:
        for tensor, flag in before:
            tensor.requires_grad_(flag)


def _row(scalar: Tensor, tensors: list[torch.nn.Parameter]) -> Tensor:
    """The gradient of a scalar, all parameters flattened and joined: (p,)."""
    grads = torch.autograd.grad(scalar, tensors, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)]
    return torch.cat([part.flatten() for part in parts])


def jacobian(
    model: PreTrainedModel,
    batch_of_one: Batch,
    parameters: Sequence[str],
    logits_of: Callable[[PreTrainedModel, Batch], Tensor],
) -> Tensor:
    """J = ∂logits/∂θ (k×p), one backward pass per logit, in the model's dtype.

    Args:
        model: In eval mode; its parameters' requires_grad comes back as it was.
        batch_of_one: One example, unpadded or not.
        parameters: Names, as in `model.named_parameters()`; their order is the order of the columns.
        logits_of: Runs the model and returns its logits (k,).
    """
    with _differentiable(model, parameters) as tensors:
        return torch.stack([_row(logit, tensors) for logit in logits_of(model, batch_of_one)])


def fisher(J: Tensor, S: Tensor) -> Tensor:
    """F = Jᵀ S J (p×p)."""
    return J.double().T @ S @ J.double()


def factor(J: Tensor, S: Tensor) -> Tensor:
    """A (k×p) with AᵀA = Jᵀ S J: the rows √λ uᵀ J of S's eigenpairs (λ, u), those with λ = 0 included."""
    values, vectors = torch.linalg.eigh(S)
    return values.clamp(min=0).sqrt()[:, None] * (vectors.T @ J.double())


def hidden_hessian(weight: Tensor, logits: Tensor, slope: Tensor | None = None) -> Tensor:
    """Σ_y p_y (w_y − w̄)(w_y − w̄)ᵀ (h×h), JᵀSJ of a softmax whose head has the rows w_y (k×h), without a k×k matrix."""
    rows = weight.double() if slope is None else slope.double()[:, None] * weight.double()
    p = logits.double().softmax(-1)
    best = int(p.argmax())
    rows = rows - rows[best]  # a certain prediction's p − p² is lost to rounding otherwise
    others = torch.cat([p[:best], p[best + 1 :]])
    mean = p @ rows
    apart = torch.cat([rows[:best], rows[best + 1 :]]) - mean
    return (others[:, None] * apart).T @ apart + (1 - others.sum()) * torch.outer(mean, mean)


def fisher_of_terms(Js: Sequence[Tensor], Ss: Sequence[Tensor]) -> Tensor:
    """F = Σ_t J_tᵀ S_t J_t (p×p): independent outputs add."""
    return torch.stack([fisher(J, S) for J, S in zip(Js, Ss, strict=True)]).sum(0)


def example_jacobians(
    model: PreTrainedModel, batch_of_one: Batch, parameters: Sequence[str], terms: TermsOf
) -> tuple[list[Tensor], list[Tensor]]:
    """J_t (k×p) and S_t (k×k) of every output distribution of one example."""
    with _differentiable(model, parameters) as tensors:
        outputs = terms(model, batch_of_one)
        Js = [torch.stack([_row(logit, tensors) for logit in term.logits]) for term in outputs]
    return Js, [output_hessian(term.logits, term.kind) for term in outputs]


def example_fisher(model: PreTrainedModel, batch_of_one: Batch, parameters: Sequence[str], terms: TermsOf) -> Tensor:
    """F (p×p) of one example, all its output distributions together."""
    return fisher_of_terms(*example_jacobians(model, batch_of_one, parameters, terms))


def example_factor(model: PreTrainedModel, batch_of_one: Batch, parameters: Sequence[str], terms: TermsOf) -> Tensor:
    """A (Σ_t k_t × p) with AᵀA the F of one example, where p×p would be too large."""
    Js, Ss = example_jacobians(model, batch_of_one, parameters, terms)
    return torch.cat([factor(J, S) for J, S in zip(Js, Ss, strict=True)])


def fisher_by_sampling_all_labels(
    model: PreTrainedModel, batch_of_one: Batch, parameters: Sequence[str], terms: TermsOf
) -> Tensor:
    """F = Σ_y p_y ∇log p_y ∇log p_yᵀ (p×p), from autograd of log p(y) alone: the definition, with no J and no S.

    y runs over every *joint* outcome of the example's distributions, so keep their number small.
    """
    rows = label_rows(model, batch_of_one, parameters, terms)
    return rows.T @ rows


def label_rows(model: PreTrainedModel, batch_of_one: Batch, parameters: Sequence[str], terms: TermsOf) -> Tensor:
    """The rows √p_y ∇log p_y over all joint outcomes y: (number of outcomes, p)."""
    with _differentiable(model, parameters) as tensors:
        outputs = terms(model, batch_of_one)
        rows = []
        for joint in itertools.product(*(outcomes(term.logits, term.kind) for term in outputs)):
            prob = math.prod(p for p, _ in joint)
            log_prob = sum(
                (log_probability(term.logits, term.kind, y) for term, (_, y) in zip(outputs, joint, strict=True)),
                start=torch.zeros(()),
            )
            rows.append(math.sqrt(prob) * _row(log_prob, tensors).double())
    return torch.stack(rows)


# How close a factor comes -------------------------------------------------------------------------------------------


def relative_error(F: Tensor, A: Tensor) -> float:
    """‖F − AᵀA‖_F / ‖F‖_F."""
    F, A = F.double(), A.double()
    return ((F - A.T @ A).norm() / F.norm()).item()


def relative_error_of_factors(B: Tensor, A: Tensor) -> float:
    """‖BᵀB − AᵀA‖_F / ‖BᵀB‖_F where p×p would be too large: both in an orthonormal basis Q of all their rows."""
    Q, _ = torch.linalg.qr(torch.cat([B, A]).double().T)
    return relative_error(fisher(B.double() @ Q, torch.eye(len(B), dtype=torch.float64)), A.double() @ Q)


def best_rank(M: Tensor, c: int) -> Tensor:
    """The positive semi-definite matrix of rank c nearest to M in Frobenius norm: its top c eigenpairs."""
    values, vectors = torch.linalg.eigh(M.double())
    return (vectors[:, -c:] * values[-c:].clamp(min=0)) @ vectors[:, -c:].T


def best_relative_error(A: Tensor, c: int) -> float:
    """‖F − F_c‖_F / ‖F‖_F of the best rank-c F_c for F = AᵀA, from the singular values of A."""
    values = torch.linalg.svdvals(A.double()).square()
    return (values[c:].norm() / values.norm()).item()


def inner(A_i: Tensor, A_j: Tensor) -> float:
    """⟨F_i, F_j⟩ = Σ_ab F_i[a,b] F_j[a,b]."""
    return (_matrix(A_i) * _matrix(A_j)).sum().item()


def frequency_shares(waves: Tensor) -> Tensor:
    """(…, p, k) → (…, (p − 1)/2): share of each frequency in the power over p places, sums of cosines and sines."""
    p = waves.shape[-2]
    powers = []
    for k in range(1, (p - 1) // 2 + 1):
        cosines = sum(waves[..., t, :].double() * math.cos(2 * math.pi * k * t / p) for t in range(p))
        sines = sum(waves[..., t, :].double() * math.sin(2 * math.pi * k * t / p) for t in range(p))
        powers.append((torch.as_tensor(cosines).square() + torch.as_tensor(sines).square()).sum(-1))
    power = torch.stack(powers, -1)
    return power / power.sum(-1, keepdim=True)


def unit(A: Tensor) -> Tensor:
    """A scaled so that ‖AᵀA‖_F = 1."""
    return A.double() / _matrix(A).norm().sqrt()


def _matrix(A: Tensor) -> Tensor:
    return A.double().T @ A.double()


# The decomposition --------------------------------------------------------------------------------------------------


def loss(As: Factors, W: Tensor, G: Tensor) -> float:
    """L = Σ_i ‖F_i − Σ_j W_ij g_j g_jᵀ‖²_F."""
    return sum((_matrix(A) - _reconstruction(w, G)).square().sum().item() for A, w in zip(As, W, strict=True))


def total(As: Factors) -> float:
    """Σ_i ‖F_i‖²_F, what the loss is a fraction of."""
    return sum(_matrix(A).square().sum().item() for A in As)


def _reconstruction(w: Tensor, G: Tensor) -> Tensor:
    """Σ_j w_j g_j g_jᵀ (d×d)."""
    return sum((w_j * torch.outer(g, g) for w_j, g in zip(w.double(), G.double(), strict=True)), start=torch.zeros(()))


def gradient_G(As: Factors, W: Tensor, G: Tensor) -> Tensor:  # noqa: N802
    """∂L/∂g_j = −4 Σ_i W_ij (F_i − Σ_l W_il g_l g_lᵀ) g_j, as (r, d)."""
    W, G = W.double(), G.double()
    gradient = torch.zeros_like(G)
    for A, w in zip(As, W, strict=True):
        residual = _matrix(A) - _reconstruction(w, G)
        for j, g in enumerate(G):
            gradient[j] -= 4 * w[j] * residual @ g
    return gradient


def residual_matrix(As: Factors, W: Tensor, G: Tensor, j: int) -> Tensor:
    """R_j = Σ_i W_ij (F_i − Σ_{l≠j} W_il g_l g_lᵀ) (d×d)."""
    others = W.double().clone()
    others[:, j] = 0
    return torch.stack(
        [w * (_matrix(A) - _reconstruction(rest, G)) for A, w, rest in zip(As, W[:, j].double(), others, strict=True)]
    ).sum(0)


def top_eigenvector(M: Tensor) -> Tensor:
    """The unit eigenvector of M's largest eigenvalue (d,)."""
    return torch.linalg.eigh(M.double()).eigenvectors[:, -1]


def nnls_coefficients(As: Factors, G: Tensor) -> Tensor:
    """W (n, r): for each example the w ≥ 0 minimising ‖vec F_i − Σ_j w_j vec(g_j g_jᵀ)‖, by an active set method.

    The d² × r design is QR: what of vec F_i is outside of Q's span adds the same to the norm for every w, so the active
    set method sees ‖Qᵀ vec F_i − R w‖, with r rows.
    """
    Q, R = torch.linalg.qr(torch.stack([torch.outer(g, g).flatten() for g in G.double()], 1))
    rows = [scipy.optimize.nnls(R.numpy(), (Q.mT @ _matrix(A).flatten()).numpy())[0] for A in As]
    return torch.from_numpy(np.stack(rows))


def multiplicative_update_W(As: Factors, W: Tensor, G: Tensor, eps: float = 1e-12) -> Tensor:  # noqa: N802
    """W_ij ← W_ij ⟨F_i, g_j g_jᵀ⟩ / (⟨Σ_l W_il g_l g_lᵀ, g_j g_jᵀ⟩ + ε)."""
    W, G = W.double(), G.double()
    updated = torch.empty_like(W)
    for i, A in enumerate(As):
        F, F_hat = _matrix(A), _reconstruction(W[i], G)
        for j, g in enumerate(G):
            E = torch.outer(g, g)
            updated[i, j] = W[i, j] * (F * E).sum() / ((F_hat * E).sum() + eps)
    return updated


def reference_step(As: Factors, W: Tensor, G: Tensor, eta: float, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """One joint step of the paper's algorithm: W by its multiplicative update, then G by the gradient at the new W."""
    W = multiplicative_update_W(As, W, G, eps)
    return W, G.double() - eta * gradient_G(As, W, G)


def dense_fit(As: Factors, G: Tensor, n_iterations: int) -> tuple[Tensor, Tensor, list[float]]:
    """Exact block coordinate descent from G: all of W by NNLS, then every g_j by a dense eigenproblem, and again.

    Returns W, which is optimal for G, unit rows G, and the loss after each iteration, which never rises. A component
    that no example uses keeps its row.
    """
    G = torch.nn.functional.normalize(G.double(), dim=1)
    W = nnls_coefficients(As, G)
    losses = [loss(As, W, G)]
    for _ in range(n_iterations):
        G = G.clone()
        for j in range(len(G)):
            if W[:, j].any():
                G[j] = top_eigenvector(residual_matrix(As, W, G, j))
        W = nnls_coefficients(As, G)
        losses.append(loss(As, W, G))
    return W, G, losses


# Sketches and lifting -----------------------------------------------------------------------------------------------


def dense_matrix(apply: Callable[[Tensor], Tensor], p: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """P (d×p), column by column: column i is what `apply` makes of the i-th unit vector."""
    return torch.stack([apply(e).flatten() for e in torch.eye(p, dtype=dtype)], 1)


def adjoint_gap(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    p: int,
    d: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> float:
    """|⟨Pa, b⟩ − ⟨a, Pᵀb⟩| / (‖Pa‖ ‖b‖) for random a (p,) and b (d,)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(p, generator=generator, dtype=torch.float64)
    b = torch.randn(d, generator=generator, dtype=torch.float64)
    Pa, Ptb = apply(a.to(dtype)).double().flatten(), adjoint(b.to(dtype)).double().flatten()
    return ((Pa @ b - a @ Ptb).abs() / (Pa.norm() * b.norm())).item()


def lifting_coefficients(sketched: Tensor, W: Tensor, G: Tensor) -> Tensor:
    """How much of each row is in each component at a stationary point: (r, n, c).

    Row j of M⁻¹ C written in the rows A_ic, with M = (WᵀW)∘(GGᵀ) and C_j = Σ_i Σ_c W_ij (A_ic·g_j) A_ic.

    Args:
        sketched: The rows that were decomposed, (n, c, d).
        W: (n, r).
        G: (r, d).
    """
    A, W, G = sketched.double(), W.double(), G.double()
    M = (W.T @ W) * (G @ G.T)
    n, c, _ = A.shape
    C = torch.stack([(W[:, j, None] * (A @ G[j])).flatten() for j in range(len(G))])
    return torch.linalg.solve(M, C).view(len(G), n, c)


def lift(rows: Tensor, sketched: Tensor, W: Tensor, G: Tensor) -> Tensor:
    """ĝ (r, p): the combination of sketched rows that is G, of the unsketched ones.

    Args:
        rows: The same rows in parameter space, with the same scale of each example, (n, c, p).
        sketched: The rows that were decomposed, (n, c, d).
        W: (n, r).
        G: (r, d), stationary together with W.
    """
    combination = lifting_coefficients(sketched, W, G)
    return torch.stack(
        [sum(b * a for b, a in zip(of_j.flatten(), rows.double().flatten(0, 1), strict=True)) for of_j in combination]
    )


def orthonormal_basis(rows: Tensor) -> Tensor:
    """Q (p, m) of the span of rows (n, c, p)."""
    _, S, Vh = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False)
    return Vh[S / S[0] > 1e-10].T


def selective(
    rows: Tensor, g: Tensor, alone: Sequence[bool] | Tensor, ridge: float, keep: Tensor | None = None
) -> Tensor:
    """δ (p,) that maximises (g·δ)² / (δᵀOδ + λ‖δ‖²) over combinations of the rows: (POP + λI)⁻¹ g.

    P projects on the span of all rows, O = mean of F_i = A_iᵀA_i over the examples to be left alone and those of
    `keep`, λ = ridge times the largest eigenvalue of POP.

    Args:
        rows: Unscaled ones, (n, c, p).
        g: In their span, (p,).
        alone: (n,), which are to be left alone.
        ridge: A share.
        keep: Further unscaled rows to be left alone, (n', c', p).
    """
    A, g = rows.double(), g.double()
    Q = orthonormal_basis(A)
    P = Q @ Q.T
    factors = [a for a, left in zip(A, torch.as_tensor(alone).tolist(), strict=True) if left]
    factors += [] if keep is None else list(keep.double())
    O = P @ sum(a.T @ a for a in factors) @ P / len(factors)
    top = torch.linalg.eigvalsh(O)[-1]
    return torch.linalg.solve(O + ridge * top * torch.eye(len(O), dtype=O.dtype), g)


def held_out_selectivity(
    rows: Tensor,
    beta: Tensor,
    wanted: Tensor,
    alone: Tensor,
    folds: Sequence[Sequence[int]],
    shift: float,
    keep: Tensor | None = None,
    keep_folds: Sequence[Sequence[int]] = (),
) -> float:
    """The mean of ‖A_i δ‖² over examples, weighted by `wanted`, over its mean over those to be left alone.

    Every example is judged by the δ = (POP + λI)⁻¹ g that was made without the examples of its fold: they are out of
    g = Σ β_ic A_ic, and out of the sum in O, which is divided by the number of all examples to be left alone.

    Args:
        rows: Unscaled ones, (n, c, p).
        beta: (n, c).
        wanted: (n,), weights; those of examples to be left alone do not count.
        alone: (n,) bool.
        folds: Examples of each fold.
        shift: λ.
        keep: Further rows to be left alone, (n', c', p).
        keep_folds: Theirs.
    """
    A = rows.double()
    n, _, p = A.shape
    Q = orthonormal_basis(A)
    P = Q @ Q.T
    further = torch.zeros(0, 1, p).double() if keep is None else keep.double()
    number = int(alone.sum()) + len(further)
    target = weight = others = 0.0
    for f, fold in enumerate(folds):
        out = set(fold)
        further_out = set(keep_folds[f]) if keep_folds else set()
        O = sum((A[i].T @ A[i] for i in range(n) if alone[i] and i not in out), torch.zeros(p, p).double())
        O = O + sum(
            (further[i].T @ further[i] for i in range(len(further)) if i not in further_out), torch.zeros(p, p).double()
        )
        g = sum((A[i].T @ beta[i].double() for i in range(n) if i not in out), torch.zeros(p).double())
        delta = torch.linalg.solve(P @ O @ P / number + shift * torch.eye(p).double(), g)
        for i in out:
            effect = float((A[i] @ delta).square().sum())
            if alone[i]:
                others += effect
            else:
                target, weight = target + float(wanted[i]) * effect, weight + float(wanted[i])
        others += sum(float((further[i] @ delta).square().sum()) for i in further_out)
    return (target / weight) / (others / number)


def generalised_eigenvector(T: Tensor, O: Tensor, shift: float) -> tuple[float, Tensor]:
    """The largest μ, and its y, of T y = μ (O + shift·1) y."""
    values, vectors = torch.linalg.eig(torch.linalg.solve(O + shift * torch.eye(len(O), dtype=O.dtype), T))
    best = int(values.real.argmax())
    return float(values.real[best]), vectors[:, best].real


def log_odds(logits: Tensor, kind: str, y: int) -> Tensor:
    """log p_y − log(1 − p_y) of a class or a label; of a regression the predicted number itself."""
    if kind != "softmax":
        return logits[y]
    return logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).logsumexp(0)


def log_odds_of(
    model: PreTrainedModel, batch_of_one: Batch, parameters: Sequence[str], terms: TermsOf, y: int
) -> tuple[float, Tensor]:
    """The mean log-odds of an outcome over an example's terms, and their gradient (p,) by plain autograd."""
    with _differentiable(model, parameters) as tensors:
        outputs = terms(model, batch_of_one)
        value = torch.stack([log_odds(term.logits, term.kind, y) for term in outputs]).mean()
        return float(value.detach()), _row(value, tensors)


def edit(rows: Tensor, targets: Tensor, ridge: float, keep: Tensor | None = None) -> Tensor:
    """δ (p,) that minimises Σ(A_ic·δ − t_ic)² + Σ(B_ic·δ)² + λ‖δ‖² over combinations of the rows A.

    λ = ridge times the largest eigenvalue of P(ΣAᵀA + ΣBᵀB)P, where P projects on the span of the rows.

    Args:
        rows: Unscaled ones, (n, c, p).
        targets: (n, c).
        ridge: A share.
        keep: Further unscaled rows, B (n', c', p), that are not to move.
    """
    A = rows.double().flatten(0, 1)
    Q = orthonormal_basis(rows.double())
    P = Q @ Q.T
    M = A.T @ A if keep is None else A.T @ A + keep.double().flatten(0, 1).T @ keep.double().flatten(0, 1)
    M = P @ M @ P
    shift = ridge * torch.linalg.eigvalsh(M)[-1]
    return torch.linalg.solve(M + shift * torch.eye(len(M), dtype=M.dtype), A.T @ targets.double().flatten())


def spare(changes: Mapping[str, Tensor], inputs: Mapping[str, Tensor], ridge: float) -> dict[str, Tensor]:
    """The δ that maximise ⟨δ₀, δ⟩² / Σ tr(δ C̃ δᵀ), C̃ = C + ridge·diag(C), as one dense system in vec(δ); unit norm.

    Args:
        changes: δ₀ (out, in) of every map.
        inputs: What every map reads on what is to be spared, (tokens, in); C is the mean of xxᵀ.
        ridge: A share.
    """
    solved = {}
    for name, change in changes.items():
        x = inputs[name].double()
        C = x.T @ x / len(x)
        metric = torch.kron(torch.eye(len(change), dtype=C.dtype), C + ridge * torch.diag(C.diagonal()))
        solved[name] = torch.linalg.solve(metric, change.double().flatten()).reshape(change.shape)
    norm = torch.cat([value.flatten() for value in solved.values()]).norm()
    return {name: value / norm for name, value in solved.items()}


# Measures -----------------------------------------------------------------------------------------------------------


def on_grid(W: Tensor, scheme: str) -> Tensor:
    """A weight (out, in) rounded to the nearest points of a grid, number by number, as plain Python arithmetic.

    Args:
        W: Its `in` a multiple of 32 for Q8_0 and Q4_0.
        scheme: "int8" (a row has 255 points), "Q8_0" and "Q4_0" (32 numbers share a step of 16 bits), "nf4" (64
            numbers, by the weight's order, share a largest size; 16 points, quantiles of a normal distribution).
    """
    size = {"int8": W.shape[1], "Q8_0": 32, "Q4_0": 32, "nf4": 64}[scheme]
    numbers = W.double().flatten().tolist()
    return torch.tensor([y for i in range(0, len(numbers), size) for y in _block(numbers[i : i + size], scheme)]).view(
        W.shape
    )


def _block(block: list[float], scheme: str) -> list[float]:
    largest = max(block, key=abs)
    if largest == 0:
        return block
    step = {"int8": abs(largest) / 127, "Q8_0": abs(largest) / 127, "Q4_0": largest / -8, "nf4": abs(largest)}[scheme]
    kept = step if scheme in ("int8", "nf4") else float(torch.tensor(step).half())
    points = {"int8": range(-127, 128), "Q8_0": range(-127, 128), "Q4_0": range(-8, 8), "nf4": NF4}[scheme]
    return [kept * min(points, key=lambda point: abs(step * point - x)) for x in block]


def _nf4_points() -> list[float]:
    """Appendix E of Dettmers et al. 2023 by its definition: quantiles of N(0, 1), eight above zero and seven below."""
    normal, offset = NormalDist(), 0.9677083
    above = [normal.inv_cdf(0.5 + (offset - 0.5) * i / 8) for i in range(1, 9)]
    below = [-normal.inv_cdf(0.5 + (offset - 0.5) * i / 7) for i in range(7, 0, -1)]
    return [x / normal.inv_cdf(offset) for x in (*below, 0.0, *above)]


NF4 = _nf4_points()
"""The points of "nf4"."""


def kl(logits_p: Tensor, logits_q: Tensor, kind: str = "softmax") -> float:
    """KL(p ‖ q) = E_p[log p(y) − log q(y)] of two distributions given by their logits (k,).

    Softmax: Σ_y p_y log(p_y / q_y). Bernoulli: the sum over labels of both outcomes. Gaussian: ½‖f_p − f_q‖².
    """
    f_p, f_q = logits_p.double(), logits_q.double()
    if kind == "gaussian":
        return 0.5 * (f_p - f_q).square().sum().item()
    if kind == "bernoulli":
        pairs = zip(f_p, f_q, strict=True)
        return sum(kl(torch.stack([a, a.new_zeros(())]), torch.stack([b, b.new_zeros(())])) for a, b in pairs)
    log_p, log_q = f_p - f_p.logsumexp(0), f_q - f_q.logsumexp(0)
    return sum((a.exp() * (a - b)).item() for a, b in zip(log_p, log_q, strict=True))


def curvature_by_moving(
    logits: Callable[[], Tensor], weights: Sequence[Tensor], directions: Sequence[Tensor], step: float = 1e-3
) -> float:
    """δᵀFδ of one softmax, (KL(W + εδ) + KL(W − εδ)) / ε²: the weights are moved and moved back."""
    kept = [weight.detach().clone() for weight in weights]
    divergences = []
    with torch.no_grad():
        before = logits()
        for signed in (step, -step):
            for weight, old, direction in zip(weights, kept, directions, strict=True):
                weight.copy_(old + signed * direction)
            divergences.append(kl(before, logits()))
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
    return sum(divergences) / step**2


def auroc(scores: Sequence[float] | Tensor, positives: Sequence[bool] | Tensor) -> float:
    """The share of (positive, negative) pairs in which the positive scores higher, ties counting one half."""
    pairs = list(zip(torch.as_tensor(scores).tolist(), torch.as_tensor(positives).tolist(), strict=True))
    above = [s for s, positive in pairs if positive]
    below = [s for s, positive in pairs if not positive]
    wins = sum((a > b) + 0.5 * (a == b) for a in above for b in below)
    return wins / (len(above) * len(below))


def kfac(rows: Tensor, ridge: float) -> Tensor:
    """(L + λ_L I) ⊗ (R + λ_R I) / tr L of rows (n, c, p, q), each λ a share of the mean eigenvalue; (p·q, p·q)."""
    n, c, p, q = rows.shape
    L, R = torch.zeros(p, p, dtype=rows.dtype), torch.zeros(q, q, dtype=rows.dtype)
    for i in range(n):
        for a in range(c):
            L += rows[i, a] @ rows[i, a].T / n
            R += rows[i, a].T @ rows[i, a] / n
    sides = [M + ridge * M.trace() / len(M) * torch.eye(len(M), dtype=rows.dtype) for M in (L, R)]
    return torch.kron(*sides) / L.trace()


class Autoencoder(NamedTuple):
    """x̂ = f D + b with f = TopK(max((x − b) Eᵀ + e, 0))."""

    D: Tensor
    """(m, h), unit rows."""
    E: Tensor
    """(m, h)."""
    e: Tensor
    """(m,)."""
    b: Tensor
    """(h,)."""

    def features(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """f and (x − b) Eᵀ + e of one example x (h,), both (m,)."""
        z = self.E @ (x - self.b) + self.e
        f = torch.zeros_like(z)
        for j in sorted(range(len(z)), key=lambda j: -float(z[j]))[:k]:
            f[j] = max(float(z[j]), 0.0)
        return f, z


def train_autoencoder(
    X: Tensor, D: Tensor, batches: Sequence[Sequence[int]], k: int, rates: Sequence[float]
) -> Autoencoder:
    """Adam (β = .9 and .99) on the mean of ‖x − x̂‖²/h over a batch, example by example, with gradients by hand.

    Args:
        X: (n, h) float64.
        D: (m, h), the start of decoder and encoder, unit rows; biases start at 0.
        batches: the examples of every step.
        k: features that are kept.
        rates: the learning rate of every step.
    """
    h = X.shape[1]
    values = [D.clone(), D.clone(), torch.zeros(len(D), dtype=X.dtype), torch.zeros(h, dtype=X.dtype)]
    first, second = ([torch.zeros_like(v) for v in values] for _ in range(2))
    for t, (batch, rate) in enumerate(zip(batches, rates, strict=True), 1):
        sae = Autoencoder(*values)
        by_D, by_E, by_e, by_b = (torch.zeros_like(v) for v in values)
        for i in batch:
            f, _ = sae.features(X[i], k)
            r = 2 * (f @ sae.D + sae.b - X[i]) / (h * len(batch))
            dz = torch.where(f > 0, sae.D @ r, 0.0)
            by_D += torch.outer(f, r)
            by_E += torch.outer(dz, X[i] - sae.b)
            by_e += dz
            by_b += r - dz @ sae.E
        for v, m, s, gradient in zip(values, first, second, (by_D, by_E, by_e, by_b), strict=True):
            m.mul_(0.9).add_(0.1 * gradient)
            s.mul_(0.99).add_(0.01 * gradient**2)
            v -= rate * (m / (1 - 0.9**t)) / ((s / (1 - 0.99**t)).sqrt() + 1e-8)
        values[0] /= values[0].norm(dim=1, keepdim=True)
    return Autoencoder(*values)
