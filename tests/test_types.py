"""The types of everything. A test, so that it takes its turn beside the others in `make check`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_mypy_finds_nothing() -> None:
    """Oracle: mypy, with the settings of pyproject.toml."""
    pytest.importorskip("mypy", reason="it is of the extra for development")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
