"""The inputs that a change moves most although it was not meant for them: in a pool, and by a search from there.

The search is greedy. From the most moved inputs of the pool it tries other tokens, drawn from the tokens of the pool,
at random places, and keeps the input whose prediction moves most. It has a seed and a limited number of forward passes.
It shows that such inputs exist, but not that there are no worse ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import OffTargetRequest
from hf_npeff.data import Example
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.predictions import Predictions, predict
from hf_npeff.weights.activations import LinearDelta
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.measurement import Change, applied, is_linear, text_of


@dataclass(frozen=True)
class OffTarget:
    """The effect of a change on inputs that it was not meant for; KL is in nats, from the model to the changed model.

    Attributes:
        scale: the step.
        n: the number of inputs in the pool.
        mean: mean KL over the pool.
        worst: the most moved inputs of the pool: index, id, text, kl, before, after.
        searched: the inputs at which the search ended, most moved first: index of the input that it started from, text,
            input_ids, replaced (the number of replaced tokens), kl_start, kl, before, after, own (whether the component
            is active on the new input, so that the effect is intended; None if this was not checked).
        tried: the number of inputs that the search tried.

    Example:
        >>> found = analyzer.off_target(direction, dataset, scale=0.3, rounds=1)
        >>> found.worst_kl >= found.worst[0]["kl"] >= found.mean
        True
    """

    scale: float
    n: int
    mean: float
    worst: list[dict[str, Any]]
    searched: list[dict[str, Any]]
    tried: int

    @property
    def worst_kl(self) -> float:
        """The largest KL of all inputs, including searched ones that are not the component's own."""
        return max(row["kl"] for row in (*self.worst, *self.searched) if not row.get("own"))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_off_target

        return of_off_target(self)

    def __repr__(self) -> str:
        return (
            f"OffTarget(KL {self.mean:.3g} on average over {self.n} inputs, at most {self.worst[0]['kl']:.3g} in the "
            f"pool and {self.worst_kl:.3g} after trying {self.tried} others, at scale {self.scale:.3g})"
        )


def off_target(
    forward: ForwardPass,
    change: Change,
    pool: Sequence[Example],
    request: OffTargetRequest,
    *,
    special: Sequence[int] = (),
    decode: Callable[[list[int]], str] | None = None,
    shown: Callable[[Example], str | None] = text_of,
) -> tuple[OffTarget, list[Example]]:
    """Measure a change on a pool of inputs that it was not meant for, and search for worse ones.

    Args:
        forward: the forward pass.
        change: a direction, or an adapter of linear maps.
        pool: the inputs.
        request: the settings.
        special: tokens that the search neither replaces nor inserts.
        decode: tokens → text.
        shown: input → the text that is shown for it.

    Returns:
        The result, and the inputs at which the search ended, in the order of `searched`.

    Raises:
        UnsupportedModelError: if an adapter changes anything other than linear maps.
        ValueError: if a search is wanted and the inputs are not sequences of tokens.
    """
    what: Any = change.linear_deltas() if is_linear(change) or isinstance(change, Adapter) else change
    compare = _Comparison(forward, what, request)
    kl, before, after = compare(pool)
    order = torch.argsort(kl, descending=True).tolist()
    answers = _Answers(forward, before, after)
    worst = [
        {"index": i, "id": pool[i].id, "text": shown(pool[i]), "kl": float(kl[i]), **answers(i)}
        for i in order[: request.worst]
    ]
    searched, ends, tried = [], [], 0
    if request.rounds:
        starts = order[: request.starts]
        check_tokens([pool[i] for i in starts])
        search = _Search(compare, pool, set(special), request)
        ends, tried = search.run(starts, kl), search.tried
        final, before, after = compare(ends)
        answers = _Answers(forward, before, after)
        for row, (i, end) in enumerate(zip(starts, ends, strict=True)):
            ids = list(end.inputs["input_ids"])
            changed = sum(a != b for a, b in zip(ids, pool[i].inputs["input_ids"], strict=True))
            about = {"index": i, "text": None if decode is None else decode(ids), "input_ids": ids}
            kls = {"kl_start": float(kl[i]), "kl": float(final[row])}
            searched.append({**about, "replaced": changed, **kls, **answers(row), "own": None})
    return OffTarget(request.scale, len(pool), float(kl.mean()), worst, searched, tried), ends


def examples_read(pool: int, request: OffTargetRequest) -> int:
    """How many examples the model reads for `off_target`, before and after the change."""
    starts = min(pool, request.starts) if request.rounds else 0
    return 2 * (pool + starts * request.candidates * request.rounds + starts)


def check_tokens(examples: Sequence[Example]) -> None:
    """Check that inputs are sequences of tokens, so that tokens can be replaced.

    Raises:
        ValueError: if they are not.
    """
    for example in examples:
        ids = example.inputs.get("input_ids")
        if ids is None or not len(ids) or isinstance(ids[0], list):
            raise ValueError(
                f"the input {example.id!r} is not a sequence of tokens, so no token can be replaced; use rounds=0 to "
                "measure only the pool"
            )


class _Comparison:
    """KL of every input between the model as it is and the changed one."""

    def __init__(self, forward: ForwardPass, what: Change | Mapping[str, LinearDelta], request: OffTargetRequest):
        self._forward, self._what, self._request = forward, what, request

    def __call__(self, examples: Sequence[Example]) -> tuple[Tensor, Predictions, Predictions]:
        before = predict(self._forward, examples, self._request.batch_size)
        with applied(self._forward.model, self._what, self._request.scale):
            after = predict(self._forward, examples, self._request.batch_size)
        return before.kl_to(after), before, after


class _Answers:
    """Answers before and after, in words."""

    def __init__(self, forward: ForwardPass, before: Predictions, after: Predictions):
        self._forward, self._answers = forward, (before.answers(), after.answers())

    def __call__(self, i: int) -> dict[str, str]:
        before, after = (self._forward.in_words(answers[i]) for answers in self._answers)
        return {"before": before, "after": after}


class _Search:
    """Greedy substitution of tokens, from several inputs at once."""

    def __init__(self, compare: _Comparison, pool: Sequence[Example], special: set[int], request: OffTargetRequest):
        self._compare, self._pool, self._special, self._request = compare, pool, special, request
        self._generator = torch.Generator().manual_seed(request.seed)
        tokens = {t for e in pool for t in map(int, e.inputs.get("input_ids", ())) if t not in special}
        self._tokens = sorted(tokens)
        self.tried = 0

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))

    def _candidate(self, example: Example) -> Example:
        """The input with another token at one place; the input itself if there is no place."""
        ids = [int(t) for t in example.inputs["input_ids"]]
        places = [i for i, token in enumerate(ids) if token not in self._special]
        if places and self._tokens:
            ids[places[self._draw(len(places))]] = self._tokens[self._draw(len(self._tokens))]
        return replace(example, inputs={**example.inputs, "input_ids": ids})

    def run(self, starts: Sequence[int], kl: Tensor) -> list[Example]:
        """The inputs at which the search ends, one for each input that it starts from."""
        best, reached = [self._pool[i] for i in starts], [float(kl[i]) for i in starts]
        for _ in range(self._request.rounds):
            tries = [self._candidate(example) for example in best for _ in range(self._request.candidates)]
            moved = self._compare(tries)[0].reshape(len(best), -1)
            self.tried += len(tries)
            for row in range(len(best)):
                place = int(moved[row].argmax())
                if float(moved[row, place]) > reached[row]:
                    reached[row] = float(moved[row, place])
                    best[row] = tries[row * self._request.candidates + place]
        return best
