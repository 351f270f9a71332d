"""What only Linux has, and tests need: such a test is skipped elsewhere, with the reason."""

from __future__ import annotations

import sys

import pytest


def linux_only(what: str) -> pytest.MarkDecorator:
    """A mark for a test that needs `what`: a file of /proc, a limit that is kept, a fork of a process with threads."""
    return pytest.mark.skipif(sys.platform != "linux", reason=f"needs {what}, which only Linux has")
