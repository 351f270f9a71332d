"""All stages on a tiny model, over and over, and what is measured of the process after every round."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from hf_npeff import NPEFF, Decomposition, FisherConfig, NPEFFAnalyzer, ParameterDirection
from tests.tiny import tiny_batch, tiny_model


def hooks_of(model: torch.nn.Module) -> int:
    """Hooks of every kind on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def measured(model: torch.nn.Module, folder: Path) -> dict[str, int]:
    """What may not grow: bytes held, tensors, hooks, open files, memory maps, threads, files in the folder."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "kilobytes": resident,
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "hooks": hooks_of(model),
        "open files": len(os.listdir("/proc/self/fd")),
        "maps of stores": Path("/proc/self/maps").read_text(encoding="utf-8").count(str(folder)),
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),
        "files": sum(path.is_file() for path in folder.rglob("*")),
    }


def one_round(analyzer: NPEFFAnalyzer, data: list[dict[str, Any]], folder: Path) -> None:
    """All stages, through files."""
    pefs = analyzer.compute_pefs(data, folder / "pefs", batch_size=4, shard_size=5, resume=False, progress=False)
    decomposition = NPEFF(3, n_restarts=2, max_iterations=20).fit(pefs)
    decomposition.save_pretrained(folder / "decomposition")
    decomposition = Decomposition.from_pretrained(folder / "decomposition")
    direction = analyzer.lift(decomposition, 0, pefs, data, method="adjoint")
    direction.save_pretrained(folder / "direction")
    direction = ParameterDirection.from_pretrained(folder / "direction")
    direction.to_adapter(rank=1, scale=0.1).save_pretrained(folder / "adapter")
    analyzer.evaluate_direction(direction, decomposition, 0, data, scale=0.1, n_top=2, n_others=4)
    try:
        with direction.applied_to(analyzer.model, 0.1):
            raise InterruptedError
    except InterruptedError:
        pass


def soak(rounds: int, warm_up: int = 5, folder: Path | None = None) -> list[dict[str, int]]:
    """What is measured after the warm-up, and after every round from then on.

    Args:
        rounds: in all.
        warm_up: rounds that fill caches.
        folder: for the files; a temporary one by default.
    """
    model = tiny_model("gpt2", dtype=torch.float32)
    data = tiny_batch(model, 12, seed=0)
    config = FisherConfig(rank=2, sketch="kronecker", sketch_dim=4)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        for number in range(rounds):
            one_round(NPEFFAnalyzer(model, fisher=config), data, place)
            if number >= warm_up:
                found.append(measured(model, place))
    return found
