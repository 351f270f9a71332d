"""One thread, no network, no progress bars, no GPU: what every test may rely on, and the models that several share."""

from __future__ import annotations

import gc
import hashlib
import os
import random
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:  # the module brings transformers, which has to see the settings below
    from tests.trigger_words import TrainedCase

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before numpy is imported, and for the processes that tests start: torch.set_num_threads below is torch's alone, and
# OpenBLAS's threads wait for each other by spinning, which makes one NNLS of the oracles a hundred times as dear.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the tests of several threads would spin too
# Two processes of a test would each want a card of their own; CUDA_VISIBLE_DEVICES=0 runs the other tests beside one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch

torch.set_num_threads(1)

LONGEST_FIRST = ("test_sweep.py", "test_types.py", "test_studies_runs.py", "test_real_model.py", "test_processes.py")
"""Files of few tests that take long. `make check` hands files to processes in this order: the last one that is begun
may leave the other processes with nothing to do, so it must not be one of these."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--wide`: see `one_in` in pyproject.toml."""
    parser.addoption("--wide", action="store_true", help="all cases of tests with many alike, not a fixed share")


def pytest_configure() -> None:
    """Until all tests are collected: nothing of the million objects that imports make is garbage."""
    gc.disable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A share of the cases that are alike; the longest files first, then the others in their order."""
    if not config.getoption("--wide"):
        left = left_out(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases of `one_in` tests that are not run: all but a share, drawn by a hash of their names.

    A case that was named alone, `FILE::TEST[CASE]`, is run.
    """
    cases = defaultdict(list)
    for item in items:
        if (marker := item.get_closest_marker("one_in")) is not None:
            cases[item.nodeid.split("[")[0], marker.args[0]].append(item)
    left: set[pytest.Item] = set()
    for (_, n), alike in cases.items():
        drawn = sorted(alike, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        left.update(drawn[-(-len(alike) // n) :])
    return left


def pytest_collection_finish() -> None:
    """What was imported stays: a full collection need not go through half a million objects of it again and again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test, those of its module too
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own does not depend on the tests that its process ran before it."""
    random.seed(0)
    np.random.seed(0)  # libraries under test draw from it
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained_case(tmp_path_factory: pytest.TempPathFactory) -> TrainedCase:
    """A trained classifier, analysed. It is trained once for all processes that share the test files out."""
    from safetensors.torch import load_model, save_model

    from tests import trigger_words

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each process has a folder of its own in there
    weights = base / "trigger_words.safetensors"
    with FileLock(weights.with_suffix(".lock")):
        if not weights.exists():
            save_model(trigger_words.trained(), weights)
    with torch.random.fork_rng(devices=[]):
        model = trigger_words.untrained()
    load_model(model, weights)
    return trigger_words.trained_case(model=model.eval())
