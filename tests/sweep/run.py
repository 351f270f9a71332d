"""The whole sweep: a process for every model type, results as lines of JSON, resumable. `python -m tests.sweep.run`.

The parent imports torch and transformers once and forks: a type takes a second or two, and whatever it does to its
process (memory, a crash of the interpreter) is its own.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.sweep.judge import RAW, judge
from tests.sweep.table import counts, read
from tests.sweep.table import main as write_pages
from tests.sweep.tiny_models import every_case

RESULTS = Path("runs/sweep/results.jsonl")
TIMEOUT_S = 240
"""Of one model type with all of its tasks: ten times what the slowest one takes."""
MEMORY = 8 * 2**30
"""Bytes of address space beyond what the parent has: a tiny model needs a few hundred million."""


def in_share(model_type: str, of: int) -> bool:
    """Whether a type is in the fixed share, one in `of`: by a hash of its name, so that new types join it."""
    return _hash_of(model_type) % of == 0


def cases_in_share(of: int) -> list[tuple[str, str]]:
    """(type, task) of the share: of every type one head, by the same hash."""
    groups = [list(group) for _, group in groupby(every_case(), key=lambda case: case[0])]
    heads = [group[_hash_of(group[0][0]) // of % len(group)] for group in groups]
    return [(model_type, task) for model_type, task in heads if in_share(model_type, of)]


def _hash_of(model_type: str) -> int:
    return int(hashlib.sha256(model_type.encode()).hexdigest(), 16)


def sweep(cases: Iterable[tuple[str, str]], path: Path, jobs: int, paddings: Sequence[str] = ("right", "left")) -> None:
    """Judge the cases that `path` does not hold, a forked process for every model type, and append to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read(path)
    groups = [list(group) for _, group in groupby((c for c in cases if c not in done), key=lambda c: c[0])]
    running: dict[int, tuple[float, list[tuple[str, str]]]] = {}
    while groups or running:
        while groups and len(running) < jobs:
            group = groups.pop(0)
            pid = os.fork()
            if pid == 0:
                _child(group, path, paddings)
            running[pid] = (time.monotonic(), group)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            _, group = running.pop(pid)
            if status:
                _tell_unread(group, path, f"the process ended with status {status}")
            continue
        for pid, (start, _) in running.items():
            if time.monotonic() - start > TIMEOUT_S:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _child(group: Sequence[tuple[str, str]], path: Path, paddings: Sequence[str]) -> None:
    try:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        torch.set_num_threads(1)
        for model_type, task in group:
            start = time.monotonic()
            try:
                result = judge(model_type, task, paddings)
            except Exception:
                result = {"outcome": RAW, "message": "the sweep itself failed", "place": traceback.format_exc()[-700:]}
            result["seconds"] = round(time.monotonic() - start, 2)
            _append(path, model_type, task, result)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _append(path: Path, model_type: str, task: str, result: dict[str, Any]) -> None:
    line = json.dumps({"type": model_type, "task": task, **result, "transformers": transformers.__version__})
    with path.open("a") as file:  # one write of one line: processes do not mix theirs
        file.write(line + "\n")


def _tell_unread(group: Sequence[tuple[str, str]], path: Path, why: str) -> None:
    done = read(path)
    for model_type, task in group:
        if (model_type, task) not in done:
            _append(path, model_type, task, {"outcome": RAW, "message": why})


def main() -> None:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--types", nargs="*", help="only these model types")
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--one-in", type=int, metavar="N", help="only a fixed share of the types, with one head each")
    parser.add_argument("--right-only", action="store_true", help="no left padding: half of the time")
    parser.add_argument("--pages", action="store_true", help="write the table of docs/models.md and the README's count")
    parser.add_argument("--again", nargs="*", metavar="OUTCOME", help="judge those with these outcomes again")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.again is not None:
        kept = [r for r in read(arguments.results).values() if r["outcome"] not in arguments.again]
        arguments.results.write_text("".join(json.dumps(r) + "\n" for r in kept))
    judge("bert", "sequence-classification")  # imports, once for all children, what the first call imports
    cases = [
        (t, task) for t, task in every_case()
        if (not arguments.types or t in arguments.types) and (not arguments.tasks or task in arguments.tasks)
    ]  # fmt: skip
    if arguments.one_in:
        cases = [case for case in cases_in_share(arguments.one_in) if case in cases]
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page of what was imported
    sweep(cases, arguments.results, arguments.jobs, ("right",) if arguments.right_only else ("right", "left"))
    print(counts(read(arguments.results)))
    if arguments.pages:
        write_pages([str(arguments.results)])


if __name__ == "__main__":
    main()
