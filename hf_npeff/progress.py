"""Progress of what takes longer than five seconds: what is going on, and how long it will take.

An operation says what it does and how many examples the model is going to read for it; every forward pass counts its
examples. So one bar goes on through searches, trials and backward passes, and no loop knows of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

SECONDS = 5.0
"""What takes no longer shows nothing: a person waits so long without asking what is going on."""


class Progress:
    """The progress of an operation.

    Attributes:
        later: examples that come after the part that is under way, for `expect`.
    """

    def __init__(self, bar: tqdm[None] | None = None):
        self._bar = bar
        self.later = 0

    def count(self, examples: int) -> None:
        """So many more examples were read."""
        if self._bar is not None:
            if self._bar.total is not None and self._bar.n + examples > self._bar.total:
                self._bar.total = self._bar.n + examples  # an estimate that was too low
            self._bar.update(examples)

    def expect(self, examples: int) -> None:
        """So many examples are still to be read for the part that is under way."""
        if self._bar is not None:
            self._bar.total = self._bar.n + examples + self.later


_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)


def progress_wanted() -> bool:
    """Whether progress bars are shown where a call leaves that open."""
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() not in ("1", "ON", "YES", "TRUE")


def current() -> Progress:
    """The progress of the operation that is going on; where there is none, one that shows nothing."""
    return _CURRENT.get() or Progress()


@contextmanager
def working(what: str, examples: int) -> Iterator[Progress]:
    """Show the progress of an operation, after five seconds; inside another one, that one's goes on.

    Args:
        what: what is going on, for people.
        examples: how many examples the model is going to read; an estimate will do.
    """
    outer = _CURRENT.get()
    if outer is not None:
        yield Progress()
        return
    hidden = not progress_wanted() or os.environ.get("RANK", "0") != "0"  # of several processes the first one tells
    with tqdm(total=examples, desc=what, unit="example", delay=SECONDS, disable=hidden) as bar:
        token = _CURRENT.set(Progress(bar))
        try:
            yield current()
        finally:
            _CURRENT.reset(token)
        bar.total = bar.n  # where fewer sufficed
