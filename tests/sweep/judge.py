"""One model through `NPEFFAnalyzer.compute_pefs`, and what is to be said of the result, by brute force."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_npeff import FisherConfig, NPEFFAnalyzer, NPEFFError, PEFs
from tests.sweep.tiny_configs import MASK, PAD
from tests.sweep.tiny_models import CannotBuildError, TinyModel, build, logits_of

RIGHT, ALONE, REFUSED, RAW, WRONG, UNBUILT = OUTCOMES = (
    "right", "right one at a time", "refused", "raw error", "silently wrong", "cannot be built",
)  # fmt: skip
TOLERANCE = 1e-3
"""Of a Fisher, ‖F − AᵀA‖ / ‖F‖, and of norms and log-probabilities. Rounding in float32 is below 1e-4 here; what
padding does to a model starts at several times this."""
ROWS = 64
"""More than any example's Fisher has: nothing is cut off."""

TOKENS = SimpleNamespace(mask_token_id=MASK, pad_token_id=PAD)
"""All of a tokenizer that encoded examples need."""


def judge(model_type: str, task: str, paddings: Sequence[str] = ("right", "left")) -> dict[str, Any]:
    """One line of the results: the outcome, errors, coverage, warnings, the message of an error."""
    try:
        tiny = build(model_type, task)
    except CannotBuildError as error:
        return {"outcome": UNBUILT, "message": str(error)}
    name = type(tiny.model).__name__
    result: dict[str, Any] = {"class": name, "kind": tiny.kind}
    outcomes = []
    for padding in paddings[:1] if tiny.kind == "image-classification" else paddings:
        outcomes.append(_judged(tiny, padding, batch_size=len(tiny.examples)))
        if outcomes[-1]["outcome"] in (REFUSED, RAW):
            break
    if tiny.kind == "seq2seq-lm" and outcomes[-1]["outcome"] in (RIGHT, ALONE):
        outcomes.append(_judged(tiny, "right", batch_size=1))  # labels keep their padding
    worst = max(outcomes, key=lambda o: OUTCOMES.index(o["outcome"]))
    if worst["outcome"] == REFUSED and "batch_size=1" in worst["message"]:
        worst["at_batch_size_1"] = _judged(tiny, "right", batch_size=1)["outcome"]
    return result | worst


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _judged(tiny: TinyModel, padding: str, batch_size: int) -> dict[str, Any]:
    warnings = _Warnings()
    logger = logging.getLogger("hf_npeff")
    logger.addHandler(warnings)
    result: dict[str, Any] = {"padding": padding, "batch_size": batch_size}
    try:
        positions = "labels" if tiny.kind == "seq2seq-lm" else "auto"
        fisher = FisherConfig(rank=ROWS, output_factor="exact", sketch="identity", positions=positions)  # type: ignore[arg-type]
        analyzer = NPEFFAnalyzer(tiny.model, TOKENS, fisher=fisher)
        pefs = analyzer.compute_pefs(padded_batch(tiny.examples, padding), batch_size=batch_size, progress=False)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = isinstance(error, NPEFFError) or (isinstance(error, ValueError) and "hf_npeff" in place)
        message = " ".join(str(error).split())
        result |= {"outcome": REFUSED if ours else RAW, "message": f"{type(error).__name__}: {message}"[:500]}
        if not ours:
            result["place"] = traceback.format_exc()[-700:]
        return result | {"warnings": warnings.texts}
    finally:
        logger.removeHandler(warnings)
    result |= errors_of(tiny, pefs)
    if result["error"] == math.inf:
        return result | {"outcome": UNBUILT, "message": "the Fisher of this random model is zero"}
    fine = max(result["error"], result["norm_error"], result["log_prob_error"]) <= TOLERANCE
    alone = any("one example at a time" in text for text in warnings.texts)
    result["outcome"] = WRONG if not fine else ALONE if alone else RIGHT
    return result | {"coverage": coverage_of(tiny.model, pefs), "warnings": warnings.texts}


def padded_batch(examples: Sequence[Mapping[str, Any]], side: str) -> Any:
    """A dictionary of padded tensors with their mask, as a tokenizer returns it; images are stacked."""
    if "input_ids" not in examples[0]:
        return [dict(example) for example in examples]
    columns: dict[str, Tensor] = {}
    lists = [{"attention_mask": [1] * len(e["input_ids"]), **e} for e in examples]
    for name in lists[0]:
        values = [torch.as_tensor(e[name]) for e in lists]
        if len({tuple(value.shape) for value in values}) == 1:
            columns[name] = torch.stack(values)
            continue
        flip = side == "left" and name != "labels"
        if flip:
            values = [v.flip(0) for v in values]
        fill = {"input_ids": PAD, "labels": -100}.get(name, 0)
        stacked = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        columns[name] = stacked.flip(1) if flip else stacked
    return columns


def errors_of(tiny: TinyModel, pefs: PEFs) -> dict[str, float]:
    """The largest relative errors over the examples: of the Fisher, of its norm, and of log p of the prediction."""
    shapes = pefs.sketch().shapes
    errors, norms, log_probs = [], [], []
    for i, example in enumerate(tiny.examples):
        B, best = brute_force(tiny, example, shapes)
        A = torch.as_tensor(pefs.factors[i]).double() * float(pefs.norms[i]) ** 0.5
        errors.append(relative_error(B, A))
        norm = float((B @ B.T).norm())
        norms.append(abs(float(pefs.norms[i]) - norm) / norm if norm else 0.0)
        given = torch.as_tensor(pefs.log_probs[i]).double().flatten()
        missing = given[len(best) :]
        log_probs.append(float((given[: len(best)] - best).abs().max()) + float(missing.abs().sum()))
    return {"error": max(errors), "norm_error": max(norms), "log_prob_error": max(log_probs)}


def brute_force(tiny: TinyModel, example: Mapping[str, Any], shapes: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The rows of an example's factor B (rows, d), BᵀB = Σ_t JᵀSJ, by autograd; log p of every term's best class."""
    weights = dict(tiny.model.named_parameters(remove_duplicate=False))
    tensors = [weights[name] for name in shapes]
    transposed = {f"{name}.weight" for name, m in tiny.model.named_modules() if isinstance(m, Conv1D)}
    required = [(p, p.requires_grad) for p in tiny.model.parameters()]
    for parameter, _ in required:
        parameter.requires_grad_(False)
    for tensor in tensors:
        tensor.requires_grad_(True)
    rows = []
    try:
        logits = logits_of(tiny.model, tiny.kind, dict(example))
        for term in logits:
            J = []
            for logit in term:
                gradients = torch.autograd.grad(logit, tensors, retain_graph=True, allow_unused=True)
                parts = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]
                parts = [
                    p.mT if n in transposed else _experts_transposed(p, shapes[n])
                    for n, p in zip(shapes, parts, strict=True)
                ]
                J.append(torch.cat([p.flatten() for p in parts]))
            p = term.detach().double().softmax(-1)
            # B = (diag(√p) − √p pᵀ) J, so BᵀB = Jᵀ(diag(p) − p pᵀ)J
            stacked = torch.stack(J).double()
            rows.append(p.sqrt()[:, None] * (stacked - p @ stacked))
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
    return torch.cat(rows), logits.detach().double().log_softmax(-1).amax(-1)


def _experts_transposed(gradient: Tensor, shape: tuple[int, int]) -> Tensor:
    """A gradient as it is, or with the part of every expert transposed where the sketch's (E·out, in) says so."""
    if gradient.dim() < 2 or gradient.shape[-1] == shape[1] or shape[1] == gradient[0].numel():
        return gradient
    return gradient.reshape(-1, shape[1], gradient.shape[-1]).mT


def relative_error(B: Tensor, A: Tensor) -> float:
    """‖BᵀB − AᵀA‖ / ‖BᵀB‖ without a d×d matrix, from the inner products of rows."""
    own, both, other = (float((x @ y.T).square().sum()) for x, y in ((B, B), (B, A), (A, A)))
    return (max(own - 2 * both + other, 0.0) / own) ** 0.5 if own else math.inf


def coverage_of(model: Any, pefs: PEFs) -> float:
    """The share of the parameters outside the embeddings that is under analysis, by counting."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(output, nn.Module):
        embeddings |= {id(p) for p in output.parameters()}
    every = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    weights = dict(model.named_parameters(remove_duplicate=False))
    covered = {id(weights[n]): weights[n].numel() for n in pefs.sketch().shapes}
    return sum(covered.values()) / max(every, 1)
