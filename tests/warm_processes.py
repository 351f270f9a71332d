"""Python processes that need not import torch and transformers: each is forked from one that has, and waits.

A process of its own is what many tests are about, and starting one costs four to six seconds of imports, hundreds of
milliseconds of everything else. What a process has of its own here too: arguments, folder, environment, streams, exit
code, and whatever it imports beyond. huggingface_hub and transformers read their settings when they are imported: where
the environment says something else of the Hub than the tests' own does, the process is forked from one that waits with
the address of tests/hub_server.py and with a link in the place of its home, or else imports them itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WITHOUT_HUB = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.utils.data",
    "scipy.optimize", "scipy.sparse", "sympy", "httpx", "requests", "fsspec", "pandas", "pyarrow.parquet",
    "safetensors.torch", "typer", "yaml",
)  # fmt: skip
"""What takes long to import and reads no setting of the Hub."""
WITH_HUB = (
    *WITHOUT_HUB,
    "transformers.modeling_utils",
    "peft",
    "accelerate",
    "datasets",
    "hf_npeff.analyzer",
    "hf_npeff.cli",
)
_OF_HUB = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_")
_CLIENT = {
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS",
}  # fmt: skip
"""What `HubServer.env` sets, beside the token, which is read when it is used."""
PATHS = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
"""Other versions of packages are tried by a folder of them in PYTHONPATH; these processes must run those too."""
_CAN_FORK = sys.platform.startswith("linux")
"""Elsewhere a fork of a process that has loaded so much is not safe, and processes start from nothing."""
Command = Sequence[object]


def run(
    command: Command,
    *,
    cwd: str | os.PathLike[str] = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `python` with the arguments `-m module …` or `-c code …`, to its end.

    Raises:
        TimeoutError: if it takes too long; it is killed.
    """
    return run_together([command], cwd=cwd, env=env, timeout=timeout)[0]


def run_together(
    commands: Sequence[Command],
    *,
    cwd: str | os.PathLike[str] = ROOT,
    env: Mapping[str, str] | None = None,
    environments: Sequence[Mapping[str, str]] = (),
    codes: Sequence[Path] = (),
    timeout: float = 300,
) -> list[subprocess.CompletedProcess[str]]:
    """Several at once, `environments` being what each has beside `env`. When one fails, the others are killed.

    `codes` are files that get each one's exit code when it ends, up to that of the first failure.
    """
    shared = dict(os.environ if env is None else env)
    each = [shared | dict(own) for own in environments] or [shared for _ in commands]
    if not _CAN_FORK:
        return _run_cold(commands, cwd, each, timeout)
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[dict[str, Any]] = []
        for number, (command, environment) in enumerate(zip(commands, each, strict=True)):
            streams = {name: f"{folder}/{number}.{name}" for name in ("stdout", "stderr")}
            jobs.append({"command": [*map(str, command)], "cwd": str(cwd), "env": environment, **streams})
        for job, path in zip(jobs, codes, strict=False):
            job["code"] = str(path)
        waiting, changed = _waiting_for(shared)
        for job in jobs:
            job["env"] = job["env"] | changed
        ends = waiting.run(jobs, timeout)
        return [
            subprocess.CompletedProcess(
                job["command"], code, *(Path(job[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
            )
            for job, code in zip(jobs, ends, strict=True)
        ]


def _waiting_for(environment: Mapping[str, str]) -> tuple[_WaitingProcess, dict[str, str]]:
    """What to fork from for an environment, and what of the environment has to change for it."""
    own, wanted = (
        {name: value for name, value in each.items() if name.startswith(_OF_HUB)} for each in (os.environ, environment)
    )
    if wanted == own:
        return _waiting_process(WITH_HUB), {}
    settings = {name: value for name, value in wanted.items() if name != "HF_TOKEN"}
    if settings.keys() != _CLIENT or settings["HF_ENDPOINT"] != _first(settings["HF_ENDPOINT"])[0]:
        return _waiting_process(WITHOUT_HUB), {}
    home, link = Path(settings["HF_HOME"]).absolute(), Path(_first(settings["HF_ENDPOINT"])[1]) / "home"
    home.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(home)
    changed = {"HF_HOME": str(link)}
    return _waiting_process(WITH_HUB, tuple(sorted((settings | changed).items()))), changed


_endpoints: list[tuple[str, str]] = []


def _first(endpoint: str) -> tuple[str, str]:
    """The first address of a Hub that a process was started for, and a folder."""
    if not _endpoints:
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        _endpoints.append((endpoint, folder.name))
    return _endpoints[0]


def two_of_torch(command: Command, *, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Two processes that torch.distributed takes for two of one run, as torchrun starts them."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_of = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**run_of, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return run_together([command, command], environments=environments, timeout=timeout)


def launched(launcher: Command, command: Command, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python launcher… command…` to its end, a launcher that starts two processes: torchrun or accelerate.

    What it starts is `tests.launched`, at once; each program is a forked process with the environment that it got, and
    the launcher gets its exit code. What the two programs write on stderr comes after the launcher's own.

    Raises:
        TimeoutError: if the two are not there, or not done, in time.
    """
    start = [sys.executable, *map(str, launcher)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    if not _CAN_FORK:
        return subprocess.run([*start, *map(str, command)], timeout=timeout, **streams)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*start, "-m", "tests.launched", folder], env={**os.environ, "PYTHONPATH": PATHS}, **streams
        )
        try:
            places = [Path(folder) / f"environment-{rank}.json" for rank in range(2)]
            end = time.monotonic() + timeout
            while not all(place.exists() for place in places):
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    raise TimeoutError(f"{start} started no two processes: {process.communicate()[1][-2000:]}")
                time.sleep(0.02)
            environments = [json.loads(place.read_text(encoding="utf-8")) for place in places]
            codes = [Path(folder) / f"code-{rank}" for rank in range(2)]
            done = run_together([command, command], environments=environments, codes=codes, timeout=timeout)
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err + "".join(d.stderr for d in done))


def _run_cold(
    commands: Sequence[Command], cwd: str | os.PathLike[str], environments: Sequence[Mapping[str, str]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=cwd, env={**env, "PYTHONPATH": PATHS}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command, env in zip(commands, environments, strict=True)
    ]  # fmt: skip
    done = []
    for process in started:
        out, err = process.communicate(timeout=timeout)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


class _WaitingProcess:
    """One that has imported, waits for jobs on its standard input, and forks."""

    def __init__(self, imported: Sequence[str], settings: Mapping[str, str]):
        others = {n: v for n, v in os.environ.items() if not (settings and n.startswith(_OF_HUB))}
        environment = {**others, **settings, "PYTHONPATH": PATHS}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_processes", *imported], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.end)

    def run(self, jobs: Sequence[Mapping[str, Any]], timeout: float) -> list[int]:
        """Exit codes of the jobs."""
        ours, theirs = self._process.stdin, self._process.stdout
        assert ours is not None and theirs is not None
        ours.write(json.dumps(jobs) + "\n")
        ours.flush()
        if not select.select([theirs], [], [], timeout)[0]:
            self.end()
            _waiting_process.cache_clear()
            raise TimeoutError(f"not done within {timeout} s: {[job['command'] for job in jobs]}")
        return list(json.loads(theirs.readline()))

    def end(self) -> None:
        """Kill it, and what it forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@functools.cache
def _waiting_process(imported: Sequence[str], settings: tuple[tuple[str, str], ...] = ()) -> _WaitingProcess:
    return _WaitingProcess(imported, dict(settings))


# In the process that waits


def _wait(imported: Sequence[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in imported:
        with contextlib.suppress(ImportError):  # an extra
            importlib.import_module(name)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in threads[1:] if not name.startswith("jemalloc")]  # pyarrow's, which looks after itself
    assert not others, f"threads {others}, which a fork would leave behind"
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of what was imported
    for line in sys.stdin:
        answers.write(json.dumps(_run_all(json.loads(line))) + "\n")
        answers.flush()


def _run_all(jobs: Sequence[Mapping[str, Any]]) -> list[int]:
    running = {}
    for number, job in enumerate(jobs):
        pid = os.fork()
        if pid == 0:
            _become(job)
        running[pid] = number
    codes = [0] * len(jobs)
    failed = False
    while running:
        pid, status = os.wait()
        if pid not in running:
            continue
        number = running.pop(pid)
        codes[number] = code = os.waitstatus_to_exitcode(status)
        if not failed and "code" in jobs[number]:
            part = Path(jobs[number]["code"] + ".part")
            part.write_text(str(code), encoding="utf-8")
            part.rename(jobs[number]["code"])
        failed |= code != 0
        if code != 0:
            time.sleep(0.2)  # what ends by itself of the same cause has the time to say so
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


def _become(job: Mapping[str, Any]) -> None:
    """The process that was asked for; it does not return."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    kind, what, *arguments = job["command"]
    sys.argv = [kind, *arguments]
    code = 0
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        import threading

        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _wait(sys.argv[1:])
