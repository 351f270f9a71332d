"""Repeats the self-test while rows are computed: on the first batch of every new kind, and on a later one.

The result on the first examples need not hold for all. A check costs one pass over one example and, if it compares with
autograd, the gradients of that example. There are a handful of checks in a run, however long it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.batching import percent, relative_change, row_tolerance, span_of
from hf_npeff.fisher.memory import is_out_of_memory
from hf_npeff.fisher.row_check import check_rows
from hf_npeff.fisher.rows import RowMaker

logger = logging.getLogger(__name__)
_LONGER = 1.5
"""An example that is this many times longer than all before it counts as a new kind; a run has a few at most."""
_BATCHES = 64
"""The fewest batches of a run in which a random batch is checked again, which costs about as much as two batches."""


class Rechecks:
    """Checks rows that are about to be stored, if they are of a kind that was not checked before.

    Args:
        maker: the maker of the rows, with the examples of its self-test.
        batches: how many batches will come; if there are enough, one that the seed draws is checked again.

    Attributes:
        results: the results of the checks so far: the reason, the examples of the batch, its shortest and longest
            length, the relative error of a row (None if nothing could be compared).
    """

    def __init__(self, maker: RowMaker, batches: int):
        self.results: list[dict[str, Any]] = []
        self._maker = maker
        self._names = {frozenset(example.inputs) for example in maker.tested}
        self._longest = max((example.length for example in maker.tested), default=0)
        self._mixed = len({example.length for example in maker.tested}) > 1
        generator = torch.Generator().manual_seed(maker.config.seed)
        self._later = int(torch.randint(1, batches, (1,), generator=generator)) if batches >= _BATCHES else None
        self._seen = 0

    def accept(self, examples: Sequence[Example], rows: Mapping[str, Tensor]) -> bool:
        """Whether these rows may be stored; False if the batch changes them; examples then run one at a time.

        Raises:
            UnsupportedModelError: if they are not the gradients of their examples, or if this batch is wrong and
                similar ones were stored before.
        """
        low, high, names, _ = span_of(examples)
        reasons = {
            "other inputs": names not in self._names,
            "longest so far": high > _LONGER * self._longest,
            "mixed lengths": low < high and not self._mixed,
            "drawn at random": self._seen == self._later,
        }
        self._seen += 1
        why = [reason for reason, holds in reasons.items() if holds]
        if not why or self._maker.forward.fsdp.active:
            return True
        place = min(range(len(examples)), key=lambda i: examples[i].length)
        error = self._change_in(examples, rows, place)
        if error is not None and error > row_tolerance(self._maker.forward.model):
            self._refuse(why, error)
            return False
        if why != ["mixed lengths"]:
            against_autograd = self._error_alone(examples[place])
            error = max((e for e in (error, against_autograd) if e is not None), default=None)
        self._names.add(names)
        self._longest, self._mixed = max(self._longest, high), self._mixed or low < high
        self.results.append(
            {"why": ", ".join(why), "examples": len(examples), "shortest": low, "longest": high, "row_error": error}
        )
        return True

    def _change_in(self, examples: Sequence[Example], rows: Mapping[str, Tensor], place: int) -> float | None:
        """The relative difference between the largest row of one example in a batch and the same row alone."""
        if len(examples) == 1 or not bool(rows["norms"][place] > 0):
            return None
        largest = int(rows["factors"][place].norm(dim=1).argmax())
        V = rows["cotangents"][place : place + 1, largest : largest + 1]
        alone = self._maker.rows_of([examples[place]], V)[0, 0]
        stored = rows["factors"][place, largest].double() * rows["norms"][place].sqrt()
        return relative_change(stored, alone.to(stored))

    def _refuse(self, why: Sequence[str], error: float) -> None:
        forward = self._maker.forward
        reason = f"the gradients of an example in a batch differ by {percent(error)} from those of the example alone"
        if why == ["drawn at random"]:
            raise UnsupportedModelError(
                f"{reason}, and similar batches were already stored; start again with resume=False and batch_size=1"
            )
        forward.refuse_batches(reason)

    def _error_alone(self, example: Example) -> float | None:
        """The error of an example's row compared with autograd."""
        maker = self._maker
        try:
            check = check_rows(maker.forward, maker.config, maker.metric, [example])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.info("example %r is too long for its gradients to be compared with autograd's", example.id)
            return None
        if check.unseen:
            raise UnsupportedModelError(
                f"for example {example.id!r} the model reads the weights of "
                f"{', '.join(m.parameter for m in check.unseen)} without calling these modules, so hooks do not see "
                "them; leave them out with exclude_modules, or name them in `parameters`"
            )
        return check.accepted_error(maker.forward, example)
