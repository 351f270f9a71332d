"""Log-odds of an outcome, and the cotangent whose row is their gradient.

For a softmax with logits f, outcome y and odds p_y : 1 − p_y,

    log-odds = f_y − log Σ_{k≠y} exp f_k,        ∂/∂f = e_y − p_{k≠y}/(1 − p_y)

For a yes-or-no label the log-odds are its logit, and for regression the predicted number is used instead; the gradient
is e_y in both cases. If cotangents enter at the hidden state, J_headᵀ maps the gradient there. For an example with
several terms, the mean over its terms is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.encoding.labels import truth_of
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.distributions import Bernoulli, Distribution, Softmax
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.outputs import Outputs
from hf_npeff.fisher.predictions import Predictions
from hf_npeff.weights.reach import odds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observed:
    """A model's predictions for n examples, with an outcome for each.

    Attributes:
        values: (n,) float64, log-odds of the outcomes in nats, or the predicted numbers of a regression.
        predictions: the predictions.
        cotangents: (n, t, s) float64, the cotangents that give the gradient of the values; None if not asked for.
    """

    values: Tensor
    predictions: Predictions
    cotangents: Tensor | None


@dataclass(frozen=True)
class Naming:
    """The names of outcomes, for turning a name into a number.

    Attributes:
        columns: {name: values} of the examples.
        labels: {number: name} of the classes, or None.
        encode: text → token ids, for a language model; otherwise None.
        class_names: {column: the data set's own names of its classes, in the order of their numbers}.
    """

    columns: Mapping[str, Sequence[Any]]
    labels: Mapping[str, str] | None
    encode: Callable[[str], list[int]] | None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


def outcomes_of(outcome: int | str | None, naming: Naming, n: int, kind: type[Distribution], k: int) -> list[int]:
    """The number of the outcome of every example.

    Args:
        outcome: a class or token number; the name of a column that has one for each example; the name of a class; a
            text of one token; or None for the only outcome, or class 1 of two.
        naming: the names of outcomes.
        n: the number of examples.
        kind: the kind of prediction.
        k: the number of classes, labels, tokens or numbers.

    Raises:
        ValueError: if `outcome` does not name one, or an example has none.
    """
    if outcome is None:
        if k > 2 or (kind is not Softmax and k > 1):
            raise ValueError(
                f"the model has {k} outcomes: set outcome= to the one whose log-odds should change (a class, its name, "
                "a token, or a column that has one for every example)"
            )
        return [k - 1] * n
    if isinstance(outcome, str) and outcome in naming.columns:
        values = naming.columns[outcome]
        missing = [i for i, value in enumerate(values) if value is None or value != value]
        if missing:
            raise ValueError(f"the column {outcome!r} has no value for {len(missing)} of {n} examples: {missing[:5]}")
        if kind is Softmax and naming.encode is None and naming.labels is not None:
            return _classes(outcome, values, naming, k)
        known = {value: _number(value, naming, k) for value in set(values)}
        return [known[value] for value in values]
    return [_number(outcome, naming, k)] * n


def outcome_in_words(
    outcome: int | str | None, numbers: Sequence[int], naming: Naming, kind: type[Distribution]
) -> str:
    """The outcomes whose log-odds an edit changes, in words: "class 'positive'", or "the column 'label'".

    Args:
        outcome: what was asked for, as in `outcomes_of`.
        numbers: the number of the outcome of every example, from `outcomes_of`.
        naming: the names of outcomes.
        kind: the kind of prediction.
    """
    if isinstance(outcome, str) and outcome in naming.columns:
        return f"what the column {outcome!r} names"
    if isinstance(outcome, str) and naming.encode is not None:
        return f"token {outcome!r}"
    what = "token" if naming.encode is not None else {Softmax: "class", Bernoulli: "label"}.get(kind, "number")
    names = {int(number): str(name) for number, name in (naming.labels or {}).items()}
    return f"{what} {names.get(numbers[0], numbers[0])!r}"


def _classes(name: str, column: Sequence[Any], naming: Naming, k: int) -> list[int]:
    """The model's classes of a column, read like labels: by name where the data set has its own names.

    Raises:
        ValueError: if a label is not a class of the model, or it is not clear which.
    """
    names = {int(number): str(word) for number, word in (naming.labels or {}).items()}
    truth = truth_of(column, Softmax.name, k, naming.class_names.get(name), names)
    if truth.why_none is not None:
        raise ValueError(f"the column {name!r} does not say which outcomes are meant: {truth.why_none}")
    if missing := [i for i, value in enumerate(truth.values) if value is None]:
        some = [column[i] for i in missing[:3]]
        raise ValueError(
            f"the column {name!r} names no class of the model for {len(missing)} examples, which have {some} there; "
            f"the model has {k} outcomes"
        )
    return list(truth.values)


def _number(outcome: Any, naming: Naming, k: int) -> int:
    """A class, label or token as a number.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(outcome, bool | int):
        if not 0 <= outcome < k:
            raise ValueError(f"the outcome {outcome} does not exist: the model has {k} outcomes, from 0 to {k - 1}")
        return int(outcome)
    names = {str(name): int(number) for number, name in (naming.labels or {}).items()}
    if isinstance(outcome, str) and outcome in names:
        return names[outcome]
    if isinstance(outcome, str) and naming.encode is not None:
        tokens = naming.encode(outcome)
        if len(tokens) == 1:
            return tokens[0]
        raise ValueError(
            f"the outcome {outcome!r} is {len(tokens)} tokens, but has to be one; a word's token usually begins with a "
            "space"
        )
    raise ValueError(
        f"the outcome {outcome!r} is neither a class ({sorted(names)[:10]}) nor a column "
        f"({sorted(naming.columns)[:10]})"
    )


def warn_of_other_spelling(
    outcome: int | str | None, naming: Naming, numbers: Sequence[int], predictions: Predictions
) -> None:
    """Warn if tokens that a text names are less likely than those with, or without, a space before the same text.

    Tokens of words usually begin with a space, and a text without it is another token, which the model may never say.

    Args:
        outcome: what was asked for, as in `outcomes_of`.
        naming: the names of outcomes.
        numbers: the number of the outcome of every example, from `outcomes_of`.
        predictions: the predictions of the examples.
    """
    if naming.encode is None or not isinstance(outcome, str):
        return
    texts = naming.columns.get(outcome, [outcome] * len(numbers))
    others = {text: text[1:] if text.startswith(" ") else f" {text}" for text in set(texts) if isinstance(text, str)}
    tokens = {text: naming.encode(other) for text, other in others.items()}
    likelier = []
    for text, number, logits in zip(texts, numbers, predictions.logits, strict=True):
        if len(other := tokens.get(text, [])) == 1:
            own, beside = logits.double().softmax(-1)[:, [number, other[0]]].mean(0).tolist()
            likelier += [(text, own, beside)] * (beside > own)
    if 2 * len(likelier) <= len(numbers):
        return
    text, own, beside = likelier[0]
    logger.warning(
        "for %d of %d examples the model predicts the outcome's token less often than the token that is written %s a "
        "space before it: %.2g is the probability of %r, and %.2g that of %r. If the latter is meant, name it so",
        len(likelier),
        len(numbers),
        "without" if text.startswith(" ") else "with",
        own,
        text,
        beside,
        others[text],
    )


def head_of_examples(forward: ForwardPass, examples: Sequence[Example]) -> tuple[type[Distribution], int]:
    """The kind of prediction, and the number of outcomes.

    Raises:
        UnsupportedModelError: if outcomes are positions in the text, or the numbers of an embedding.
    """
    with torch.no_grad():
        outputs = forward.outputs(examples[:1])
    if forward.traits.embeds:
        raise UnsupportedModelError(
            "an edit moves the log-odds of a class, a label or a token, or a predicted number, but the single numbers "
            "of an embedding have no meaning; lift a component instead, or train a classifier on top and edit that"
        )
    if forward.traits.task in ("question-answering", "multiple-choice"):
        raise UnsupportedModelError(
            "an edit moves the log-odds of a class, a label or a token, or a predicted number, but this model predicts "
            "places in its input"
        )
    return outputs.distribution, outputs.logits.shape[-1]


@torch.no_grad()
def observe(
    forward: ForwardPass,
    examples: Sequence[Example],
    outcomes: Sequence[int],
    batch_size: int,
    *,
    cotangents: bool = False,
) -> Observed:
    """One forward pass over the examples, in their order.

    Args:
        forward: the forward pass of the model.
        examples: the n examples.
        outcomes: the number of the outcome of each example.
        batch_size: the number of examples in a batch.
        cotangents: whether the gradients of the log-odds are wanted too.
    """
    values = torch.zeros(len(examples), dtype=torch.float64)
    logits: dict[int, Tensor] = {}
    entering: dict[int, Tensor] = {}
    kind: type[Distribution] = Softmax
    size = forward.batch_size(examples, batch_size)
    for batch in forward.batches(examples, size):
        with torch.set_grad_enabled(cotangents):  # a head may need it for its Jacobian
            outputs = forward.outputs([examples[i] for i in batch])
        kind = outputs.distribution
        y = torch.tensor([outcomes[i] for i in batch], device=outputs.logits.device)
        measured, at_logits = log_odds(outputs.logits, outputs.valid, y, kind)
        u = _at_source(at_logits, outputs) if cotangents else None
        for row, i in enumerate(batch):
            values[i] = measured[row]
            logits[i] = outputs.logits[row, outputs.valid[row]].detach().to("cpu", torch.float32)
            if u is not None:
                entering[i] = u[row].double().cpu()
    joined = None
    if cotangents:
        t, s = (max(v.shape[d] for v in entering.values()) for d in (0, 1))
        joined = torch.stack([F.pad(v, (0, s - v.shape[1], 0, t - v.shape[0])) for _, v in sorted(entering.items())])
    return Observed(values, Predictions([logits[i] for i in range(len(examples))], kind), joined)


def log_odds(logits: Tensor, valid: Tensor, y: Tensor, kind: type[Distribution]) -> tuple[Tensor, Tensor]:
    """The mean log-odds of outcomes y (B,) over the valid terms of logits (B, t, k), and their gradient (B, t, k)."""
    f = logits.double()
    chosen = F.one_hot(y, f.shape[-1]).bool()[:, None].expand_as(f)
    own, gradient = odds(f, chosen, kind), chosen.double()
    if kind is Softmax:
        gradient = gradient - f.masked_fill(chosen, float("-inf")).softmax(-1)
    weights = valid.double() / valid.sum(1, keepdim=True)
    return torch.where(valid, own, 0.0).mul(weights).sum(1), gradient * weights[..., None]


def _at_source(gradient: Tensor, outputs: Outputs) -> Tensor:
    """A gradient (B, t, k) at the logits → at the place where cotangents enter, (B, t, s)."""
    if not outputs.at_hidden:
        return gradient
    assert outputs.jacobian is not None
    flat = gradient.flatten(0, 1)[..., None].to(outputs.logits.dtype)
    return outputs.jacobian.pull(flat)[..., 0].unflatten(0, gradient.shape[:2])
