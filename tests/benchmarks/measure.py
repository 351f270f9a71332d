"""Things timed in turn in one process, and the figures that are kept of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """One line: processor, threads in use, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return (
        f"{cpu}, {os.cpu_count()} processors, {torch.get_num_threads()} thread(s) used, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def in_turn(
    tries: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every try in every round, all tries once a round; a first round is not counted.

    The clock is that of the processor: what other processes do does not count, nor do processes that a try starts.
    """
    times: dict[str, list[float]] = {label: [] for label in tries}
    for round_ in range(rounds + 1):
        for label, work in tries.items():
            begin = clock()
            work()
            if round_:
                times[label].append(clock() - begin)
    return times


def ratio(times: Mapping[str, list[float]], label: str, base: str) -> float:
    """The median over rounds of the ratio within a round: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(times[label], times[base], strict=True))


def keep(name: str, figures: Mapping[str, Any]) -> None:
    """Write a script's figures, with the machine, where the page and the next `make bench-quick` read them."""
    RESULTS.mkdir(exist_ok=True)
    record = {**figures, "machine": machine()}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def kept(name: str) -> dict[str, Any]:
    """The figures of a script; empty where it has not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
