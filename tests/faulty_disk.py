"""A file system that fails when it is told to: under one folder, `open`, `os.replace`, `os.unlink` and `os.fsync` pass
through here and are counted; at one of them the disk is full, permission is missing, the process dies or the power.

What Python has buffered dies with the process. Under a power failure everything is lost that no `fsync` brought to the
disk: the content of files that were not flushed, and creations, renames and removals since their folder was.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FAULTS = ("disk full", "permission denied", "partial write", "killed", "power failure")


class Died(BaseException):
    """The process is no more: nothing catches this, and nothing that runs on the way out reaches the disk."""


class FaultyDisk:
    """Counts the points of everything that happens under a folder, and fails at one of them.

    Attributes:
        points: (operation, file name) of every point so far.
    """

    def __init__(self, folder: Path, fault: str | None = None, at: int = -1):
        self.folder = os.path.realpath(folder)
        self.fault, self.at = fault, at
        self.points: list[tuple[str, str]] = []
        self.dead = False
        self.broken = False
        self._journal: list[Callable[[], None]] = []  # how to undo what is not on the disk yet
        self._real = {name: getattr(os, name) for name in ("replace", "unlink", "fsync", "open")}
        self._open = builtins.open
        self._folders: dict[int, str] = {}

    def _here(self, path: Any) -> bool:
        try:
            return os.path.realpath(os.path.dirname(os.fspath(path)) or ".").startswith(self.folder)
        except TypeError:
            return False

    def point(self, operation: str, path: Any, half: Callable[[], None] | None = None) -> None:
        """One operation is about to happen; the fault strikes here, or one that struck before lasts."""
        if self.dead:
            raise Died
        number = len(self.points)
        self.points.append((operation, os.path.basename(str(path))))
        if number == self.at and self.fault == "partial write" and half is not None:
            half()
        if number == self.at and self.fault in ("killed", "power failure", "partial write"):
            self.dead = True
            for undo in reversed(self._journal) if self.fault == "power failure" else ():
                undo()
            raise Died
        if number >= self.at >= 0 and self.fault == "permission denied":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        if number >= self.at >= 0 and self.fault == "disk full" and operation in ("open", "write", "flush", "fsync"):
            if operation == "write" and half is not None:
                half()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    # What is put in the place of the real ones

    def open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+") or not self._here(path):
            return self._open(path, mode, *args, **options)
        self.point("open", path)
        made = not os.path.lexists(path)
        raw = io.FileIO(os.fspath(path), mode.replace("b", ""))
        if made:
            self._journal.append(lambda: _removed(self._real["unlink"], path))
        return _File(self, raw, os.fspath(path))

    def replace(self, source: Any, target: Any) -> None:
        if not self._here(target):
            return self._real["replace"](source, target)
        self.point("replace", target)
        content = Path(source).read_bytes()
        before = Path(target).read_bytes() if os.path.exists(target) else None
        self._real["replace"](source, target)

        def undo() -> None:
            Path(source).write_bytes(content)
            _removed(self._real["unlink"], target) if before is None else Path(target).write_bytes(before)

        self._journal.append(undo)

    def unlink(self, path: Any, **options: Any) -> None:
        if not self._here(path) or not os.path.lexists(path):
            return self._real["unlink"](path, **options)
        self.point("unlink", path)
        content = Path(path).read_bytes()
        self._real["unlink"](path, **options)
        self._journal.append(lambda: Path(path).write_bytes(content) and None)

    def os_open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        number = self._real["open"](path, flags, *args, **options)
        if os.path.isdir(path) and os.path.realpath(path).startswith(self.folder):
            self._folders[number] = os.fspath(path)
        return number

    def fsync(self, number: int) -> None:
        if number in self._folders:
            self.point("fsync", self._folders.pop(number))
            self._journal.clear()

    @contextmanager
    def mounted(self) -> Iterator[FaultyDisk]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", self.open)
            patch.setattr(os, "replace", self.replace)
            patch.setattr(os, "unlink", self.unlink)
            patch.setattr(os, "open", self.os_open)
            patch.setattr(os, "fsync", self.fsync)
            yield self


def _removed(unlink: Callable[..., None], path: Any) -> None:
    if os.path.lexists(path):
        unlink(path)


class _File:
    """A file for writing whose buffer is ours, so that it can be lost."""

    def __init__(self, disk: FaultyDisk, raw: io.FileIO, path: str):
        self.disk, self.raw, self.path = disk, raw, path
        self.buffer = b""
        self.synced = False
        self._lost: Callable[[], None] = lambda: self._truncate()
        disk._journal.append(self._lost)

    def _truncate(self) -> None:
        if os.path.exists(self.path):
            os.truncate(self.path, 0)

    def write(self, content: bytes) -> int:
        self.disk.point("write", self.path, lambda: self._half(content) and None)
        self.buffer += content
        return len(content)

    def _half(self, content: bytes) -> int:
        return self.raw.write(self.buffer + bytes(content)[: len(content) // 2]) or 0

    def flush(self) -> None:
        self.disk.point("flush", self.path)
        self.raw.write(self.buffer)
        self.buffer = b""

    def fileno(self) -> int:
        disk = self.disk
        disk.point("fsync", self.path)
        if self._lost in disk._journal:
            disk._journal.remove(self._lost)
        return self.raw.fileno()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.disk.dead and self.buffer:
            self.raw.write(self.buffer)
        self.raw.close()
