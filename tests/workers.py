"""What the processes of tests/test_processes.py run: `torchrun … -m tests.workers NAME FOLDER`."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

from hf_npeff import NPEFF, PEFs, UnsupportedModelError
from tests import planted, tiny
from tests.test_families import analyzer_of

torch.set_num_threads(1)


def analyzer(**settings: Any) -> Any:
    model = tiny.tiny_model("bert", vocab_size=20, dtype=torch.float32)
    return analyzer_of(
        model, **({"sketch": "kronecker", "sketch_dim": 8, "rank": 2, "storage_dtype": "float32"} | settings)
    )


def examples(n: int) -> list[dict[str, Any]]:
    return tiny.tiny_batch(tiny.tiny_model("bert", vocab_size=20), n, seed=1)


COUNTS = (1, 5, 11)
"""Examples: an empty share, an uneven one, and several shards a process."""


def compute_all(folder: Path) -> None:
    for n in COUNTS:
        analyzer().compute_pefs(examples(n), folder / f"pefs-{n}", batch_size=2, shard_size=3)


def one_store(folder: Path) -> None:
    analyzer().compute_pefs(examples(5), folder, batch_size=2, shard_size=3)


PROBLEMS: dict[str, dict[str, Any]] = {
    "dense": {"n": 401, "d": 64},
    "gram": {"n": 31, "d": 400},
    "gram, float64": {"n": 31, "d": 400, "dtype": torch.float64},
    "expanded": {"n": 61, "d": 64, "r": 4, "expand": 2, "settings": {"memory_budget": 40_000}},
    "refitted": {"n": 61, "d": 64, "refit": True, "settings": {"n_restarts": 1, "max_iterations": 5}},
    "chunked": {"n": 401, "d": 64, "settings": {"memory_budget": 40_000}},
    "held-out": {"n": 401, "d": 64, "validation": True},
    "reference": {"n": 101, "d": 64, "settings": {"solver": "reference", "learning_rate": 1e-4, "max_iterations": 20}},
    "fewer examples than processes": {"n": 1, "d": 64, "r": 2},
}


def fit(name: str) -> Any:
    """One of the problems, with a callback that stops the second start early."""
    problem = PROBLEMS[name]
    n, d = problem["n"], problem["d"]
    A, _, _ = planted.planted(n + 64, 3, d, 6, overlap=0.1, noise=0.3, active=2, seed=0)
    A = A.to(problem.get("dtype", torch.float32))
    pefs = PEFs.from_factors(A[:n])
    held_out = PEFs.from_factors(A[n:]) if problem.get("validation") else None
    settings = {"n_restarts": 2, "max_iterations": 60} | problem.get("settings", {})

    def stop(restart: int, iteration: int, loss: float) -> bool:
        return restart == 1 and iteration == 10

    estimator = NPEFF(problem.get("r", 6), callbacks=[stop], **settings)
    found = estimator.fit(pefs, held_out)
    if "expand" in problem:
        found = estimator.expand(pefs, problem["expand"])
    return estimator.refit(pefs) if problem.get("refit") else found


def fit_all(folder: Path) -> None:
    for name in PROBLEMS:
        result = fit(name)
        torch.save((result.coefficients, result.pseudo_fishers, result.loss_history, result.stability),
                   folder / f"{name}-{os.environ.get('RANK', 'alone')}.pt")  # fmt: skip


def everything(folder: Path) -> None:
    """All that two processes do without an accident, since most of a run's time is that it starts."""
    compute_all(folder)
    fit_all(folder)
    adapters(folder)
    wrapped_models(folder)
    moved(folder)
    sharded(folder / "sharded")
    followed(folder)


def adapters(folder: Path) -> None:
    """All components, each process going through its share of the examples."""
    ours, data = analyzer(), examples(11)
    pefs = PEFs.load(folder / "pefs-11")
    found = NPEFF(2, n_restarts=1).fit(pefs)
    made = ours.lift_adapters(found, pefs, data, 2, selective=False, output_dir=folder / "adapters")
    torch.save([a.tensors for a in made], folder / f"adapters-{os.environ['RANK']}.pt")


def changes(pefs: PEFs) -> dict[str, Any]:
    """A selective direction, one between examples, and an edit with rows that are computed again."""
    ours, data = analyzer(), examples(11)
    found = NPEFF(4, n_restarts=1).fit(pefs)
    ids = pefs.example_ids
    return {
        "selective": ours.lift(found, 0, pefs, data, selective=True, ridge=0.01, keep=pefs),
        "contrast": ours.lift_examples(pefs, data, ids[:3], ids[3:]),
        "edit": ours.edit(pefs, data, change={ids[1]: 0.3, ids[4]: -0.3}, outcome=0, iterations=2),
    }


def moved(folder: Path) -> None:
    """Changes of the weights, which every process makes whole."""
    torch.distributed.barrier()
    for name, change in changes(PEFs.load(folder / "pefs-11")).items():
        torch.save((dict(change), change.info.get("steps")), folder / f"{name}-{os.environ['RANK']}.pt")


def wrapped_models(folder: Path) -> None:
    """DDP, which is taken off."""
    from hf_npeff import NPEFFAnalyzer

    plain = analyzer()
    ddp = torch.nn.parallel.DistributedDataParallel(plain.model)
    NPEFFAnalyzer(ddp, plain.processing_class, fisher=plain.fisher).compute_pefs(
        examples(5), folder / "ddp", batch_size=2, shard_size=3
    )


SHARDED: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert"},
    "bert, one example": {"family": "bert", "n": 1},
    "llama": {"family": "llama"},
    "llama, everything resharded": {"family": "llama", "reshard_after_forward": True},
    "llama, norm and head together": {"family": "llama", "together": True, "n": 3},
    "llama, all positions": {"family": "llama", "settings": {"positions": "all"}},
    "mixtral": {"family": "mixtral", "n": 3},
    "mixtral, experts by themselves": {"family": "mixtral", "n": 3, "apart": "experts"},
    "gemma2": {"family": "gemma2", "settings": {"sketch": "auto", "sketch_dim": None, "sketch_tolerance": 1.0}},
}
"""FSDP2: a classifier, a head read outside the passes, one softmax a token (so passes differ), fused experts,
soft-capped logits."""


def sharded_problem(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """An analyzer of the whole model, and the examples."""
    problem = SHARDED[name]
    task = tiny.FAMILIES[problem["family"]][0] if problem["family"] != "bert" else "sequence-classification"
    model = tiny.tiny_model(problem["family"], task, vocab_size=20, dtype=torch.float32, tie_word_embeddings=False)
    settings = {"sketch": "kronecker", "sketch_dim": 8, "rank": 2} | problem.get("settings", {})
    plain = analyzer_of(model, output_factor="auto", **settings)
    return plain, tiny.tiny_batch(model, problem.get("n", 7), seed=1)


def shard(model: Any, problem: dict[str, Any]) -> Any:
    """FSDP2 over all processes, a layer at a time."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for name, part in model.named_modules():
        if "apart" in problem and name.endswith(problem["apart"]):
            fully_shard(part, mesh=mesh)
    for part in model.modules():
        if isinstance(part, torch.nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=mesh)
    if problem.get("together"):
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    options = {name: problem[name] for name in ("reshard_after_forward",) if name in problem}  # torch 2.6 takes no None
    return fully_shard(model, mesh=mesh, **options)


def sharded(folder: Path) -> None:
    """Compute and lift with every process holding half of every weight."""
    from hf_npeff import NPEFFAnalyzer

    folder.mkdir(exist_ok=True)
    for name, problem in SHARDED.items():
        plain, data = sharded_problem(name)
        before = [p.clone() for p in plain.model.parameters()]
        model = shard(plain.model, problem)
        ours = NPEFFAnalyzer(model, plain.processing_class, fisher=plain.fisher)
        pefs = ours.compute_pefs(data, folder / name, batch_size=2, shard_size=3)
        if name == "bert":  # only the first process has something to do again, once both have read the store
            torch.distributed.barrier()
            for path in (folder / name).glob("pefs-00000*") if os.environ["RANK"] == "0" else ():
                path.unlink()
            torch.distributed.barrier()
            pefs = ours.compute_pefs(data, folder / name, batch_size=2, shard_size=3)
        direction = None
        if name == "llama":
            found = NPEFF(2, n_restarts=1).fit(pefs)
            direction = dict(ours.lift(found, 0, pefs, data, selective=False))
            made = ours.lift_adapters(found, pefs, data, 16, [0], selective=False, output_dir=folder / "adapters")
            torch.save(made[0].linear_deltas(), folder / f"adapters-{os.environ['RANK']}.pt")
        same = all(torch.equal(a, p.full_tensor()) for a, p in zip(before, model.parameters(), strict=True))
        required = all(p.requires_grad for p in model.parameters())
        torch.save((same and required, direction), folder / f"{name}-{os.environ['RANK']}.pt")
    refused(folder)


def trained(model: Any, folder: Path, *, follow: bool) -> dict[str, Any]:
    """Three steps of SGD on one batch, the same in every process, with the events that a Trainer sends."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_npeff import FisherConfig, NPEFFCallback

    data = tiny.tiny_batch(model, 5, seed=1, labels=True)
    batch = tiny.collate(data, model)
    arguments, control = TrainingArguments(str(folder), use_cpu=True, report_to="none"), TrainerControl()
    state = TrainerState(is_world_process_zero=os.environ.get("RANK", "0") == "0")
    probe = [{"input_ids": row["input_ids"]} for row in data]
    callback = NPEFFCallback(probe, every=1, n_components=2, n_restarts=1, fisher=FisherConfig(rank=2))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        state.global_step = step + 1
        if follow:
            callback.on_step_end(arguments, state, control, model=model)
    if follow:
        callback.on_train_end(arguments, state, control, model=model)
    report = callback.report_
    return {"losses": losses, "history": callback.history, "kl": None if report is None else report.mean_kl}


def followed(folder: Path) -> None:
    """Training with every process holding half of every weight, with our callback and without."""
    for follow in (True, False):
        model = shard(tiny.tiny_model("llama", vocab_size=20, dtype=torch.float32, tie_word_embeddings=False), {})
        result = trained(model, folder / "followed", follow=follow)
        (folder / f"followed-{follow}-{os.environ['RANK']}.json").write_text(json.dumps(result))


def refused(folder: Path) -> None:
    """What has to be refused, by its message."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from hf_npeff import FisherConfig, NPEFFAnalyzer, ParameterDirection

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    plain, data = sharded_problem("bert")
    model = shard(plain.model, {})
    ours = NPEFFAnalyzer(model, fisher=plain.fisher)
    pefs = PEFs.load(folder / "bert")
    found = NPEFF(2, n_restarts=1).fit(pefs)
    name = ours.maps[0].parameter
    direction = ParameterDirection({name: torch.ones(ours.maps[0].shape)}, {name: "linear"})
    report = ours.evaluate_direction(direction, found, 0, data, scale=0.5, n_top=3)
    (folder / f"evaluated-{os.environ['RANK']}.json").write_text(json.dumps([report.best.top, report.best.others]))
    parallel = sharded_problem("bert")[0].model
    parallelize_module(parallel.classifier, mesh, ColwiseParallel())

    def apply() -> None:
        with direction.applied_to(model):
            pass

    tries = {
        "auto": lambda: ours.compute_pefs(data, folder / "auto", batch_size="auto"),
        "apply": apply,
        "parameters": lambda: NPEFFAnalyzer(model, fisher=FisherConfig(parameters=".*bias")),
        "tensor parallel": lambda: NPEFFAnalyzer(parallel),
    }
    messages = {}
    for what, attempt in tries.items():
        try:
            attempt()
        except (ValueError, UnsupportedModelError) as error:
            messages[what] = str(error)
    (folder / f"refused-{os.environ['RANK']}.json").write_text(json.dumps(messages))


def dies(folder: Path) -> None:
    """Process 1 is killed in its second shard; process 0 would go on for ever at the barrier."""
    from hf_npeff.pefs.shards import StoreWriter

    write = StoreWriter.write_shard

    def write_shard(self: Any, start: int, *args: Any) -> None:
        if os.environ["RANK"] == "1" and start > 6:
            os._exit(3)
        write(self, start, *args)

    StoreWriter.write_shard = write_shard  # type: ignore[method-assign]
    analyzer().compute_pefs(examples(12), folder, batch_size=2, shard_size=2)


KILLS = 12
"""Chosen: every number of finished shards comes up twice, in ten seconds."""


def kills(folder: Path) -> None:
    """KILLS runs killed at random moments, each resumed; forked, so that no import is waited for."""
    work, data = analyzer(), examples(12)

    def run(name: str) -> None:
        work.compute_pefs(data, folder / name, batch_size=2, shard_size=2)

    def written(name: str) -> int:
        return len(list((folder / name).glob("pefs-*.json")))

    def child(name: str, shards: int | None = None, delay: float = 0.0) -> None:
        """Run to the end, or kill `delay` seconds after so many shards are there: no clock has to be guessed."""
        pid = os.fork()
        if pid == 0:
            try:
                run(name)
            finally:
                os._exit(0)
        if shards is None:
            os.waitpid(pid, 0)
            return
        while written(name) < shards:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    child("whole")
    generator = random.Random(0)
    left = []
    for i in range(KILLS):
        child(f"killed-{i}", i % 6, generator.uniform(0, 0.03))
        left.append(written(f"killed-{i}"))
        child(f"killed-{i}")
    (folder / "left.json").write_text(json.dumps(left))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
