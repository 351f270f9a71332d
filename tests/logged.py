"""What the package logged, by the module that said it: which warning came matters, not its sentence."""

from __future__ import annotations

import logging

import pytest


def warned_by(caplog: pytest.LogCaptureFixture, module: str) -> list[logging.LogRecord]:
    """The warnings of one module, such as "fisher.forward"; their `args` are the numbers and names that they tell."""
    name = f"hf_npeff.{module}"
    return [record for record in caplog.records if record.name == name and record.levelno >= logging.WARNING]
