"""A small language model as a rater that need not follow instructions: how much more likely does a text become?

Small chat models do not answer in the form that `rate` asks for. What every language model has is likelihoods. A text
belongs to those shown if it is more likely after a list of them than by itself; the score is the difference of its
mean log-probability per token. Repeated words raise it, and so does whatever else the model takes texts to share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.studies.ratings import Answers, RatingStudy
from hf_npeff.studies.scripted_rater import Intruder, two_groups

_MARK = "-"
"""Begins an entry of a list. Chosen: the usual mark of plain text and of Markdown."""


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, context: str, texts: Sequence[str]) -> Tensor:
    """The mean log-probability per token, in nats, of each text (n,) after the same context.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        context: what comes before, after the token that begins texts, or else the one that ends them.
        texts: n texts.

    Raises:
        ValueError: if a text has no tokens.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    before = torch.tensor([[first, *tokenizer(context, add_special_tokens=False)["input_ids"]]], device=model.device)
    after = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts]
    if not all(after):
        raise ValueError("a text has no tokens, so it has no likelihood")
    n, longest = len(texts), max(map(len, after))
    ids = torch.full((n, longest), first)
    mask = torch.zeros_like(ids)
    for row, on, each in zip(ids, mask, after, strict=True):
        row[: len(each)], on[: len(each)] = torch.tensor(each), 1
    read = model(before, use_cache=True, logits_to_keep=1)  # once for all texts
    read.past_key_values.batch_repeat_interleave(n)
    seen = torch.cat([torch.ones(n, before.shape[1], dtype=mask.dtype), mask], dim=1).to(model.device)
    out = model(ids.to(model.device), attention_mask=seen, past_key_values=read.past_key_values)
    logits = torch.cat([read.logits[:, -1:].expand(n, -1, -1), out.logits[:, :-1]], dim=1).float()
    found = nn.functional.log_softmax(logits, dim=-1).cpu().gather(2, ids[:, :, None])[:, :, 0].double()
    return (found * mask).sum(1) / mask.sum(1)


def rate_by_likelihood(study: RatingStudy, model: Any, tokenizer: Any, name: str) -> Answers:
    """A model's answers to every task: the choices that the texts shown make likelier, in two groups.

    Args:
        study: the tasks.
        model: a causal language model.
        tokenizer: its tokenizer.
        name: the name of the rater.

    Example:
        >>> rate_by_likelihood(study, model, tokenizer, "tiny model").rater
        'tiny model'
    """
    picked = {}
    for task in study.tasks:
        picked[task.id] = two_groups(_gains(model, tokenizer, task.shown, task.choices).tolist())
    return Answers(study.id, name, {}, picked)


def intruder_by_likelihood(model: Any, tokenizer: Any) -> Intruder:
    """A rater that names the text that a list of the others makes likelier least."""

    def pick(texts: Sequence[str]) -> int:
        others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
        gained = [float(_gains(model, tokenizer, rest, [text])) for rest, text in zip(others, texts, strict=True)]
        return min(range(len(texts)), key=gained.__getitem__)

    return pick


def _gains(model: Any, tokenizer: Any, shown: Sequence[str], texts: Sequence[str]) -> Tensor:
    """(n,): how much likelier each text is in a list after those shown than in a list of its own, in nats per token."""
    listed = "".join(f"{_MARK} {text}\n" for text in shown) + _MARK
    entries = [" " + text for text in texts]
    return log_likelihoods(model, tokenizer, listed, entries) - log_likelihoods(model, tokenizer, _MARK, entries)
