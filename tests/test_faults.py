"""Nothing is lost: whatever fails while files are written, the old or the new can be read, and a second run finishes.

The disks that fail are those of tests/faulty_disk.py; processes that are killed in earnest are in test_processes.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_npeff import (
    CorruptStoreError,
    Decomposition,
    FisherConfig,
    IncompatibleSketchError,
    NPEFFError,
    ParameterDirection,
    PEFs,
)
from hf_npeff.config import ComputeRequest
from hf_npeff.data import Example
from hf_npeff.fisher.compute import compute
from hf_npeff.fisher.forward import NotFiniteError
from hf_npeff.fisher.gradients import RowCollector
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.fisher.selftest import SelfTest
from hf_npeff.pefs.norms import normalise
from hf_npeff.pefs.shards import StoreWriter
from hf_npeff.pefs.sketches import Sketch
from tests import warm_processes, workers
from tests.faulty_disk import FAULTS, Died, FaultyDisk
from tests.logged import warned_by
from tests.rounds import hooks_of, soak
from tests.systems import linux_only
from tests.test_directions import direction_for
from tests.test_hub import small_decomposition

ROOT = Path(__file__).parents[1]
LEAST_POINTS = 1000
"""Failures that the test below tries with --wide; it may try more, but not fewer."""
TRIED = 3
"""Without --wide it tries one in so many. Chosen: eight seconds in place of twenty."""


@dataclass(frozen=True)
class Case:
    """Something that is written to a folder.

    Attributes:
        before: makes what is there already; None where nothing is.
        write: what is interrupted, and what finishes afterwards.
        read: what can be read, or None where it is refused as not there or unfinished.
    """

    before: Callable[[Path], Any] | None
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def refused(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def reading(folder: Path) -> Any:
        try:
            return read(folder)
        except CorruptStoreError:
            return None

    return reading


def pefs(seed: int) -> PEFs:
    A = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed))
    whole = PEFs.from_factors(A, text=[f"{seed} {i}" for i in range(5)])
    return PEFs.concatenate([whole[:3], whole[3:]])


def save_pefs(folder: Path) -> None:
    if not (folder / "manifest.json").exists():
        pefs(0).save_pretrained(folder)


SKIPPED = {1, 2, 3}


class Listed(list[Example]):
    """Examples that are made beforehand, with what the loop asks `Examples` for."""

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self]

    def columns_of(self, i: int) -> dict[str, Any]:
        return dict(self[i].columns)


def compute_pefs(folder: Path, shard_size: int = 2, skip: bool = True) -> PEFs:
    """The real loop over a pass that needs no model; of 5 examples three give NaN, so a whole shard."""

    def rows(batch: list[Example]) -> dict[str, torch.Tensor]:
        if bad := [place for place, example in enumerate(batch) if int(example.id) in SKIPPED]:
            raise NotFiniteError(batch, bad, "not finite", "leave them out")
        unit, norms = normalise(torch.stack([torch.full((1, 4), 1.0 + int(e.id)) for e in batch]))
        return {"factors": unit, "norms": norms, "cotangents": torch.ones(len(batch), 1, 1, 1)}

    sketch = Sketch({"w": (2, 2)}, "identity")
    forward = SimpleNamespace(
        model=torch.nn.Linear(2, 2),
        traits=SimpleNamespace(takes=None),
        blaming_padding=lambda batch: contextlib.nullcontext(),
        batch_size=lambda examples, wanted: wanted,
        may_share=lambda examples: True,
        describe=None,
        fsdp=SimpleNamespace(most=lambda n: n, active=False),
    )
    maker: Any = SimpleNamespace(
        forward=forward,
        sketch=sketch,
        selftest=SelfTest(1, 0.0, 0.0, 1.0, {}),
        config=FisherConfig(),
        rows=rows,
        tested=(Example("", {"input_ids": [1]}, {}, ""),),
    )
    examples: Any = Listed(Example(str(i), {"input_ids": [1]}, {"number": i}, f"c{i}") for i in range(5))
    return compute(
        maker,
        examples,
        {"model": "m", "revision": None, "task": "t", "versions": {}, "dataset": {"examples": 5, "hash": "h"}},
        ComputeRequest(folder, batch_size=2, shard_size=shard_size, on_error="skip" if skip else "raise"),
    )


def read_pefs(folder: Path) -> Any:
    found = PEFs.load(folder)
    return found.factors.tolist(), found.columns, found.info.get("skipped")


def other_decomposition() -> Decomposition:
    other = small_decomposition()
    other.coefficients, other.pseudo_fishers = other.coefficients.flip(0), other.pseudo_fishers.roll(1, 0)
    other.columns["text"] = [f"other {i}" for i in range(10)]
    other.rename(1, "new")
    return other


def read_decomposition(folder: Path) -> Any:
    found = Decomposition.load(folder)
    return found.coefficients.tolist(), found.pseudo_fishers.tolist(), found.columns, found.names


def read_direction(folder: Path) -> Any:
    found = ParameterDirection.load(folder)
    return {name: value.tolist() for name, value in found.items()}, found.info


def read_adapter(folder: Path) -> Any:
    """PEFT's two files; it refuses a folder without either."""
    if not ((folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()):
        return None
    tensors = load_file(folder / "adapter_model.safetensors")
    return {n: t.tolist() for n, t in tensors.items()}, json.loads((folder / "adapter_config.json").read_text())


def direction(seed: int) -> ParameterDirection:
    return direction_for(torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3, bias=False)}), seed)


def adapter(seed: int, kind: Any) -> Callable[[Path], Any]:
    return lambda folder: direction(seed).to_adapter(rank=1, kind=kind).save_pretrained(folder)


CASES = {
    "a store": Case(None, save_pefs, refused(read_pefs)),
    "a computation": Case(None, compute_pefs, refused(read_pefs)),
    "a computation, once more": Case(compute_pefs, compute_pefs, refused(read_pefs)),
    "a decomposition": Case(None, lambda f: other_decomposition().save_pretrained(f), refused(read_decomposition)),
    "a decomposition over another": Case(
        lambda f: small_decomposition().save_pretrained(f),
        lambda f: other_decomposition().save_pretrained(f),
        refused(read_decomposition),
    ),
    "a direction": Case(None, lambda f: direction(1).save_pretrained(f), refused(read_direction)),
    "a direction over another": Case(
        lambda f: direction(0).save_pretrained(f),
        lambda f: direction(1).save_pretrained(f),
        refused(read_direction),
    ),
    "an adapter": Case(None, adapter(1, "lora"), read_adapter),
    "an adapter over another": Case(adapter(0, "lora"), adapter(1, "lora"), read_adapter),
    "a dense adapter": Case(None, adapter(1, "delta"), refused(read_direction)),
    "a dense adapter over another": Case(adapter(0, "delta"), adapter(1, "delta"), refused(read_direction)),
}


def lost(case: Case, old: Path | None, new: Any, folder: Path, fault: str, at: int) -> str | None:
    """What is wrong after one failure, or None."""
    before = None
    shutil.rmtree(folder, ignore_errors=True)
    if old is not None:
        shutil.copytree(old, folder)
        before = case.read(folder)
    try:
        with FaultyDisk(folder, fault, at).mounted():
            case.write(folder)
    except (OSError, Died):
        pass
    else:
        if case.read(folder) != new:  # a folder that cannot be flushed is no error
            return "no error"
    found = case.read(folder)
    if found != new and found != before:
        return f"neither: {str(found)[:200]}"
    with FaultyDisk(folder).mounted():
        case.write(folder)
    if case.read(folder) != new:
        return "the second run does not finish"
    if litter := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
        return f"litter: {litter}"
    return None


def test_nothing_is_lost_wherever_a_write_a_rename_or_a_flush_fails(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, pytestconfig: pytest.Config
) -> None:
    """Invariant, at every point in turn: what is read is the old or the new, and a second run ends in the new."""
    caplog.set_level("ERROR", logger="hf_npeff")
    memory = Path("/dev/shm")  # a disk that takes no time, where there is one
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        tried = 1 if pytestconfig.getoption("--wide") else TRIED
        points, wrong, kinds = _all_failures(Path(folder), tried)
    with capsys.disabled():
        print(f"\n{points} points, {len(wrong)} lost")
    assert kinds == {"open", "write", "flush", "fsync", "replace", "unlink"}
    assert not wrong, "\n".join(wrong[:20])
    assert points >= LEAST_POINTS / tried


def _all_failures(place: Path, tried: int) -> tuple[int, list[str], set[str]]:
    points: int = 0
    wrong: list[str] = []
    kinds: set[str] = set()
    met = itertools.count()
    for name, case in CASES.items():
        old, folder = None, place / "folder"
        if case.before is not None:
            old = place / "old"
            shutil.rmtree(old, ignore_errors=True)
            case.before(old)
        shutil.rmtree(folder, ignore_errors=True)
        if old is not None:
            shutil.copytree(old, folder)
        with FaultyDisk(folder).mounted() as disk:
            case.write(folder)
        new = case.read(folder)
        assert new is not None and disk.points, name
        kinds |= {operation for operation, _ in disk.points}
        for (at, point), fault in itertools.product(enumerate(disk.points), FAULTS):
            if fault == "partial write" and point[0] != "write":
                continue
            if next(met) % tried:
                continue
            points += 1
            if problem := lost(case, old, new, folder, fault, at):
                wrong.append(f"{name}, {fault} at {point}: {problem}")
    return points, wrong, kinds


@linux_only("os.fork with torch's threads")
def test_the_simulated_death_is_that_of_a_process_that_is_killed(tmp_path: Path) -> None:
    """Oracle: forked processes that SIGKILL themselves at the same points leave the same bytes."""
    case = CASES["a decomposition over another"]
    assert case.before is not None
    case.before(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "count")
    with FaultyDisk(tmp_path / "count").mounted() as disk:
        case.write(tmp_path / "count")
    for at in range(0, len(disk.points), 3):
        simulated, real = tmp_path / f"simulated-{at}", tmp_path / f"real-{at}"
        for folder in (simulated, real):
            shutil.copytree(tmp_path / "old", folder)
        with pytest.raises(Died), FaultyDisk(simulated, "killed", at).mounted():
            case.write(simulated)
        pid = os.fork()
        if pid == 0:
            try:
                _die_at(real, at, lambda folder=real: case.write(folder))
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert _contents(real) == _contents(simulated), disk.points[at]


def _die_at(folder: Path, at: int, write: Callable[[], Any]) -> None:
    disk = FaultyDisk(folder, "killed", at)
    try:
        with disk.mounted():
            write()
    except Died:
        os.kill(os.getpid(), signal.SIGKILL)


def _contents(folder: Path) -> dict[str, bytes]:
    return {_without_process(path.name): path.read_bytes() for path in folder.iterdir()}


def _without_process(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def test_a_store_that_is_begun_again_is_never_taken_for_the_one_before(tmp_path: Path, monkeypatch: Any) -> None:
    """Oracle: removal cut short at every file; what is left is refused for other settings, and never read as theirs."""
    analyzer, data = workers.analyzer(), workers.examples(4)
    other = workers.analyzer(seed=1)
    analyzer.compute_pefs(data, tmp_path / "old", shard_size=2)
    new = other.compute_pefs(data, shard_size=2)
    unlink = Path.unlink
    for survivors in range(7):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(survivors))
        left = itertools.count(survivors - 6)

        def some(path: Path, left: Any = left, **options: Any) -> None:
            if next(left) >= 0:
                raise KeyboardInterrupt
            unlink(path, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", some)
            other.compute_pefs(data, folder, shard_size=2, resume=False)
        if (folder / "config.json").exists():
            with pytest.raises(IncompatibleSketchError, match="resume=False"):
                workers.analyzer(seed=1).compute_pefs(data, folder, shard_size=2)
        again = workers.analyzer(seed=1).compute_pefs(data, folder, shard_size=2, resume=False)
        torch.testing.assert_close(again.factors, new.factors)


def test_shards_without_a_config_are_nobodys(tmp_path: Path) -> None:
    """Oracle: a store whose config.json is gone is refused, with the way out, whatever the settings."""
    compute_pefs(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CorruptStoreError, match="resume=False"):
        compute_pefs(tmp_path)


def test_an_adapter_of_another_shape_is_not_written_over(tmp_path: Path) -> None:
    """Oracle: PEFT reads two files, so half of each could load; the folder's bytes stay, and a like adapter goes in."""
    direction(0).to_adapter(rank=2).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        direction(1).to_adapter(rank=1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    direction(1).to_adapter(rank=2).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


# A batch that fails ---------------------------------------------------------------------------------------------------


def hooks_and_modes(model: Any) -> tuple[int, list[bool], list[bool]]:
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return hooks_of(model), [module.training for module in model.modules()], flags


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_memory_that_runs_out_in_a_backward_pass_costs_one_batch(
    batch_size: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Oracle: a run that was left alone. A fixed size stops, keeping shards; "auto" goes on; no hook is left behind."""
    data = workers.examples(8)
    whole = workers.analyzer().compute_pefs(data, tmp_path / "whole", batch_size=2, shard_size=2)
    analyzer = workers.analyzer()
    before = hooks_and_modes(analyzer.model)
    rows, finish, batches, calls = RowMaker.rows, RowCollector.finish, [], itertools.count()

    def watched(self: Any, examples: Any) -> Any:
        if self.selftest is not None:  # not the self-test's own rows
            batches.append(examples)
        return rows(self, examples)

    def sometimes(self: Any) -> Any:
        if batches and next(calls) == (5 if batch_size == 2 else 1):  # within the third batch, or the first
            raise torch.OutOfMemoryError("simulated")
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(RowMaker, "rows", watched)
        patch.setattr(RowCollector, "finish", sometimes)
        if batch_size == "auto":
            analyzer.compute_pefs(data, tmp_path / "one", batch_size="auto", shard_size=2)
        else:
            with pytest.raises(NPEFFError, match=r"2.*batch_size='auto'"):
                analyzer.compute_pefs(data, tmp_path / "one", batch_size=2, shard_size=2)
            assert 0 < len(list((tmp_path / "one").glob("pefs-*.safetensors"))) < 4
    assert hooks_and_modes(analyzer.model) == before
    done = analyzer.compute_pefs(data, tmp_path / "one", batch_size=2, shard_size=2)
    torch.testing.assert_close(done.factors, whole.factors, rtol=0, atol=1e-6)
    assert done.example_ids == whole.example_ids


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """Python's own handler, which a process that a shell started in the background does not get."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_leaves_a_run_that_can_be_resumed_and_says_how(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the bytes of a run that was left alone; the message names the folder; the model comes back."""
    data = workers.examples(6)
    workers.analyzer().compute_pefs(data, tmp_path / "whole", batch_size=2, shard_size=2)
    rows, calls = RowMaker.rows, itertools.count()

    def interrupted(self: Any, examples: Any) -> Any:
        if self.selftest is not None and next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return rows(self, examples)

    analyzer = workers.analyzer()
    before = hooks_and_modes(analyzer.model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RowMaker, "rows", interrupted)
        analyzer.compute_pefs(data, tmp_path / "one", batch_size=2, shard_size=2)
    assert [str(where) for warning in warned_by(caplog, "fisher.compute") for where in warning.args or ()] == [
        str(tmp_path / "one")
    ]
    assert hooks_and_modes(analyzer.model) == before
    assert len(list((tmp_path / "one").glob("pefs-*.safetensors"))) == 2
    workers.analyzer().compute_pefs(data, tmp_path / "one", batch_size=2, shard_size=2)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls = itertools.count(2)  # at the first batch
        patch.setattr(RowMaker, "rows", interrupted)
        workers.analyzer().compute_pefs(data)
    assert len(warned_by(caplog, "fisher.compute")) == 2


# Examples that give NaN -----------------------------------------------------------------------------------------------

POISON = 19


def poisoned(n: int, bad: set[int]) -> tuple[Any, list[dict[str, Any]]]:
    """An analyzer of a model that gives NaN wherever one token occurs, and examples with and without it."""
    analyzer = workers.analyzer()
    with torch.no_grad():
        analyzer.model.bert.embeddings.word_embeddings.weight[POISON] = float("nan")
    ids = [[2, 9 + i % 10, 9 + i % 7, 1] for i in range(n)]
    return analyzer, [
        {"id": f"e{i}", "input_ids": [2, POISON, 9, 1] if i in bad else row, "label": i % 2}
        for i, row in enumerate(ids)
    ]


@pytest.mark.parametrize("stored", [True, False])
def test_examples_that_give_nan_are_left_out_and_listed(
    stored: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: a data set without them; the ids and reasons in the manifest, in `info` and in a copy of the store."""
    bad = {0, 3, 4, 5, 10}
    analyzer, data = poisoned(11, bad)
    good = [example for i, example in enumerate(data) if i not in bad]
    whole = workers.analyzer().compute_pefs(good, batch_size=3)
    with pytest.raises(ValueError, match=r"'e0'.*on_error='skip'"):
        analyzer.compute_pefs(data, batch_size=3)
    folder = tmp_path / "pefs" if stored else None
    pefs = analyzer.compute_pefs(data, folder, batch_size=3, shard_size=3, on_error="skip")
    (warning,) = warned_by(caplog, "fisher.compute")
    assert all(name in str(warning.args) for name in ("'e0', 'e3', 'e4', 'e5', 'e10'", "11"))
    reason = "the model gives NaN or infinite logits"
    assert pefs.info["skipped"] == [{"id": f"e{i}", "reason": reason} for i in sorted(bad)]
    assert pefs.example_ids == [example["id"] for example in good]
    assert pefs.labels == [example["label"] for example in good]
    torch.testing.assert_close(pefs.factors, whole.factors, rtol=0, atol=1e-6)
    pefs.save(tmp_path / "copy")
    assert PEFs.load(tmp_path / "copy").info["skipped"] == pefs.info["skipped"]
    if folder is not None:
        assert json.loads((folder / "manifest.json").read_text())["skipped"] == pefs.info["skipped"]
        assert PEFs.load(folder).info["skipped"] == pefs.info["skipped"]
    decomposition = analyzer.decompose(pefs, 2, n_restarts=1)
    assert analyzer.lift(decomposition, 0, pefs, data, selective=False).norm == pytest.approx(1, abs=1e-5)


def test_a_store_that_lacks_examples_is_not_passed_off_as_whole(tmp_path: Path) -> None:
    """Oracle: the error names them, where the same folder is asked for with on_error="raise"."""
    analyzer, data = poisoned(12, {9})
    analyzer.compute_pefs(data, tmp_path, on_error="skip")
    with pytest.raises(ValueError, match=r"'e9'.*on_error='skip'.*resume=False"):
        analyzer.compute_pefs(data, tmp_path)


def test_a_run_that_skips_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    """Oracle: the bytes of a run that was left alone; no finished shard is computed again, not even an empty one."""
    analyzer, data = poisoned(8, {1, 2, 3, 7})
    arguments: dict[str, Any] = {"batch_size": 2, "shard_size": 2, "on_error": "skip"}
    analyzer.compute_pefs(data, tmp_path / "whole", **arguments)
    rows, seen = RowMaker.rows, []

    def stops(self: Any, examples: Any) -> Any:
        if self.selftest is None:  # the self-test's own rows
            return rows(self, examples)
        seen.append([example.id for example in examples])
        if "e6" in seen[-1] and len(seen[-1]) == 2:
            raise OSError("unplugged")
        return rows(self, examples)

    analyzer, _ = poisoned(8, set())
    with monkeypatch.context() as patch, pytest.raises(OSError, match="unplugged"):
        patch.setattr(RowMaker, "rows", stops)
        analyzer.compute_pefs(data, tmp_path / "one", **arguments)
    seen.clear()

    def watched(self: Any, few: Any) -> Any:
        if self.selftest is not None:  # not the self-test's own rows
            seen.append([example.id for example in few])
        return rows(self, few)

    with monkeypatch.context() as patch:
        patch.setattr(RowMaker, "rows", watched)
        poisoned(8, set())[0].compute_pefs(data, tmp_path / "one", **arguments)
    assert [ids for ids in seen if len(ids) == 2] == [["e6", "e7"]], seen
    assert _contents(tmp_path / "one") == _contents(tmp_path / "whole")


def test_gradients_that_overflow_are_skipped_with_their_reason(monkeypatch: Any) -> None:
    """Oracle: one example whose rows are made infinite on the way; its batch is computed again without it."""
    analyzer, data = poisoned(6, set())
    finish = RowCollector.finish

    def overflows(self: Any) -> Any:
        rows = finish(self)
        if len(rows) == 3 and next(calls) < 2:  # both rows of the first batch
            rows[1] = float("inf")
        return rows

    calls = itertools.count()
    monkeypatch.setattr(RowCollector, "finish", overflows)
    pefs = analyzer.compute_pefs(data, batch_size=3, on_error="skip")
    assert [one["reason"] for one in pefs.info["skipped"]] == ["the gradients are not finite"]
    assert len(pefs) == 5 and bool(torch.isfinite(pefs.factors).all())


def test_a_model_that_gives_nothing_but_nan_is_an_error(tmp_path: Path) -> None:
    """Oracle: the message; misspelt choices are refused before anything runs."""
    analyzer, data = poisoned(3, {0, 1, 2})
    with pytest.raises(ValueError, match="'e0'"):
        analyzer.compute_pefs(data, tmp_path, on_error="skip")
    with pytest.raises(ValueError, match=r"on_error.*'ignore'"):
        analyzer.compute_pefs(data, on_error="ignore")
    sound, _ = poisoned(3, set())
    pefs = sound.compute_pefs(poisoned(90, set(range(1, 90)))[1], batch_size=8, on_error="skip")
    assert len(pefs) == 1 and len(pefs.info["skipped"]) == 89


# Several processes ----------------------------------------------------------------------------------------------------


def two(folder: Path) -> None:
    """Two processes skip; then the second hangs, and the first waits for it."""
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    patient = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=12))])
    analyzer, data = poisoned(10, {1, 6, 7, 8, 9})
    analyzer._accelerator = patient
    analyzer.compute_pefs(data, folder / "skipped", batch_size=2, shard_size=2, on_error="skip")
    write = StoreWriter.write_shard

    def hangs(self: Any, start: int, *args: Any) -> None:
        write(self, start, *args)
        if os.environ["RANK"] == "1":
            time.sleep(600)

    StoreWriter.write_shard = hangs  # type: ignore[method-assign]
    analyzer.compute_pefs(poisoned(8, set())[1], folder / "hangs", batch_size=2, shard_size=2)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What two processes leave behind, and how the first of them ended."""
    folder = tmp_path_factory.mktemp("two")
    return folder, warm_processes.two_of_torch(["-m", "tests.test_faults", "two", folder], timeout=120)[0]


def test_two_processes_skip_what_one_skips(processes: tuple[Path, Any]) -> None:
    """Oracle: one process; all of the second one's share but one example gives NaN."""
    found = PEFs.load(processes[0] / "skipped")
    analyzer, data = poisoned(10, {1, 6, 7, 8, 9})
    one = analyzer.compute_pefs(data, batch_size=2, on_error="skip")
    assert found.info["skipped"] == one.info["skipped"] and len(found.info["skipped"]) == 5
    assert found.columns == one.columns
    torch.testing.assert_close(found.factors, one.factors, rtol=0, atol=1e-5)


def test_a_process_that_hangs_stops_the_others_within_the_time_out(processes: tuple[Path, Any]) -> None:
    """Oracle: the first of two processes ends with the message; shards stay, and a run alone needs only the rest."""
    folder, done = processes
    assert done.returncode == 1, "it ended by itself"
    assert "did not answer within the time-out" in done.stderr, done.stderr[-3000:]
    kept = {path.name: path.read_bytes() for path in (folder / "hangs").glob("pefs-*.safetensors")}
    assert {"pefs-00000.safetensors", "pefs-00002.safetensors", "pefs-00004.safetensors"} == set(kept)
    analyzer, data = poisoned(8, set())
    pefs = analyzer.compute_pefs(data, folder / "hangs", batch_size=2, shard_size=2)
    assert len(pefs) == 8
    assert {name: (folder / "hangs" / name).read_bytes() for name in kept} == kept


@linux_only("/proc/self/status, fd, maps and task")
def test_rounds_of_all_stages_leave_nothing_behind(tmp_path: Path) -> None:
    """Invariant: hooks, tensors, open files, maps, threads and files after every round; 200 rounds run as a script."""
    found = soak(6, warm_up=3, folder=tmp_path)
    for name in ("hooks", "tensors", "open files", "maps of stores", "threads", "files"):
        values = [one[name] for one in found]
        assert max(values) <= values[0], (name, values)
    assert found[0]["hooks"] == 0 and found[0]["files"] > 0


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
