"""Progress of operations that take longer than five seconds: what is being done, and how long it will take.

An operation says what it does and how many examples the model will read for it, and every forward pass counts its
examples. So a single bar covers searches, trials and backward passes, without code in their loops.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

SECONDS = 5.0
"""Seconds; shorter operations show nothing, because a person waits that long without wondering."""


class Progress:
    """The progress of an operation.

    Attributes:
        later: how many examples come after the current part, for `expect`.
    """

    def __init__(self, bar: tqdm[None] | None = None):
        self._bar = bar
        self.later = 0

    def count(self, examples: int) -> None:
        """Count examples that were read."""
        if self._bar is not None:
            if self._bar.total is not None and self._bar.n + examples > self._bar.total:
                self._bar.total = self._bar.n + examples  # an estimate that was too low
            self._bar.update(examples)

    def expect(self, examples: int) -> None:
        """Set how many examples are still to be read for the current part."""
        if self._bar is not None:
            self._bar.total = self._bar.n + examples + self.later


_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)


def progress_wanted() -> bool:
    """Whether progress bars are shown if a call does not say."""
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() not in ("1", "ON", "YES", "TRUE")


def current() -> Progress:
    """The progress of the current operation; if there is none, one that shows nothing."""
    return _CURRENT.get() or Progress()


def _hidden() -> bool:
    # Only the first of several processes shows a bar.
    return not progress_wanted() or os.environ.get("RANK", "0") != "0"


def training(what: str, steps: int) -> Iterator[int]:
    """The steps 0, 1, … of a training loop, with a progress bar after five seconds unless an operation has one.

    Args:
        what: what is being trained, as shown beside the bar.
        steps: the number of steps.
    """
    hidden = _CURRENT.get() is not None or _hidden()
    yield from tqdm(range(steps), desc=f"training {what}", unit="step", delay=SECONDS, disable=hidden)


@contextmanager
def working(what: str, examples: int) -> Iterator[Progress]:
    """Show the progress of an operation after five seconds; inside another operation, the outer bar continues.

    Args:
        what: what is being done, as shown beside the bar.
        examples: how many examples the model will read; an estimate is enough.
    """
    outer = _CURRENT.get()
    if outer is not None:
        yield Progress()
        return
    with tqdm(total=examples, desc=what, unit="example", delay=SECONDS, disable=_hidden()) as bar:
        token = _CURRENT.set(Progress(bar))
        try:
            yield current()
        finally:
            _CURRENT.reset(token)
        bar.total = bar.n  # where fewer sufficed
