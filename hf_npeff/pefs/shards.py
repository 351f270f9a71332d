"""Shards: the tensors of many examples in parts, in memory or memory-mapped, and their files in a PEF store.

A store on disk is a folder:

    config.json        configs, model and commit, versions, the sketch, its measured error, format_version
    manifest.json      for every shard its examples, rows and SHA-256; the examples that were skipped, with the reason;
                       whether the store is finished
    pefs-00000.safetensors, pefs-00000.parquet, …     tensors, and ids with the kept columns, of one shard each

Every file is written to a temporary name, flushed and renamed, so a reader sees an old file or a whole new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from hf_npeff.errors import CorruptStoreError, FormatVersionError, IncompatibleSketchError
from hf_npeff.pefs.manifest import check_info, check_tensors, check_width, checked_entry, checked_skipped
from hf_npeff.sharing.files import (
    FORMAT_VERSION,
    read_json,
    read_table,
    read_tensors,
    sha256_of,
    table_bytes,
    write_atomically,
    write_json,
)

ID = "example_id"
"""The column of the examples' ids, in every shard."""
FILL = {"predictions": -1}
"""{tensor: what stands in it where an example has fewer terms than others}; 0 in the rest."""


def padded_cat(tensors: Sequence[Tensor], fill: float = 0) -> Tensor:
    """Concatenate along the first dimension, other dimensions padded at their end to the largest.

    A tensor (n,) among tensors (n, t) has one term.
    """
    if 1 in (dims := {t.dim() for t in tensors}) and 2 in dims:
        tensors = [t[:, None] if t.dim() == 1 else t for t in tensors]
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    if all(list(t.shape[1:]) == shape for t in tensors):
        return torch.cat(list(tensors))
    out = tensors[0].new_full((sum(len(t) for t in tensors), *shape), fill)
    start = 0
    for t in tensors:
        where = (slice(start, start + len(t)), *(slice(0, s) for s in t.shape[1:]))
        out[where] = t
        start += len(t)
    return out


class Shards:
    """The same tensors, (n_s, …) each, of one part of the examples after another.

    Examples are taken from the parts that hold them; a tensor of all examples is joined in memory when it is asked for.

    Attributes:
        parts: {name: tensor} of each shard, at least one.
        joined: the tensors that were asked for whole.
    """

    def __init__(self, parts: Sequence[Mapping[str, Tensor]]):
        self.parts = [dict(part) for part in parts]
        self.joined: dict[str, Tensor] = dict(self.parts[0]) if len(self.parts) == 1 else {}

    @property
    def names(self) -> list[str]:
        """Of the tensors."""
        return list(self.parts[0])

    @property
    def sizes(self) -> list[int]:
        """The examples of every shard."""
        return [len(part["norms"]) for part in self.parts]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor of all examples: the memory map itself where there is one shard."""
        if name not in self.joined:
            self.joined[name] = padded_cat([part[name] for part in self.parts], FILL.get(name, 0))
        return self.joined[name]

    def pieces(self, size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """At most `size` examples at a time, none across two shards, uncopied: their positions and tensors."""
        start = 0
        for part, n in zip(self.parts, self.sizes, strict=True):
            for at in range(0, n, size):
                stop = min(at + size, n)
                yield slice(start + at, start + stop), {name: value[at:stop] for name, value in part.items()}
            start += n

    def between(self, start: int, stop: int) -> list[dict[str, Tensor]]:
        """The parts of a range of examples, without copying."""
        parts, at = [], 0
        for shard, size in zip(self.parts, self.sizes, strict=True):
            part = slice(max(start - at, 0), max(min(stop - at, size), 0))
            if part.start < part.stop:
                parts.append({name: value[part] for name, value in shard.items()})
            at += size
        return parts or [{name: value[:0] for name, value in self.parts[0].items()}]

    def picked(self, name: str, index: Tensor) -> Tensor:
        """One tensor of the chosen examples; shards that hold none of them are not read."""
        order = torch.argsort(index, stable=True)
        parts, at = [self.parts[0][name][:0]], 0
        for shard, size in zip(self.parts, self.sizes, strict=True):
            here = index[order]
            here = here[(here >= at) & (here < at + size)] - at
            if len(here):
                parts.append(shard[name][here])
            at += size
        return padded_cat(parts, FILL.get(name, 0))[torch.argsort(order)]


# In a folder


def read_store(folder: Path, *, verify: bool) -> tuple[dict[str, Any], list[dict[str, Tensor]], dict[str, list[Any]]]:
    """Read a finished store: config.json, the memory-mapped tensors of its shards, and the joined columns.

    Args:
        folder: the folder of the store.
        verify: compare every shard's SHA-256, and look for NaN and infinite numbers (reads the whole store once).

    Returns:
        config.json, with `skipped` from the manifest if examples were skipped; shards; columns.

    Raises:
        CorruptStoreError: if the store is unfinished, or files are missing or altered.
        FormatVersionError: if it was written by another version of the format.
    """
    if not folder.is_dir():
        raise CorruptStoreError(f"{folder} is not a folder of PEFs")
    info = read_json(folder / "config.json")
    stopped = not (folder / "manifest.json").exists() and any(folder.glob("pefs-*.json"))  # each shard has its record
    manifest = {} if stopped else read_json(folder / "manifest.json")
    if manifest.get("finished") is not True:
        raise CorruptStoreError(
            f"{folder} is not finished: run compute again with the same settings and this folder (hf-npeff compute, or "
            "compute_pefs with output_dir), and it continues where it stopped"
        )
    check_info(info, folder / "config.json")
    listed = manifest.get("shards")
    entries = [checked_entry(entry, folder) for entry in listed] if isinstance(listed, list) else []
    parts = [read_shard(folder, entry, verify=verify) for entry in entries if entry["examples"]]
    if not parts:
        raise CorruptStoreError(f"{folder} has no shard")
    shards = [tensors for tensors, _ in parts]
    if (
        len({frozenset(s) for s in shards}) > 1
        or len({(s["factors"].shape[1:], s["factors"].dtype) for s in shards}) > 1
    ):
        raise CorruptStoreError(f"{folder}: the shards have different tensors")
    check_width(info, shards[0]["factors"].shape[-1], folder)
    skipped = checked_skipped(manifest.get("skipped", []), folder)
    info.pop("skipped", None)
    if checks := [check for entry in entries for check in entry.get("checks", [])]:
        info["selftest"] = {**(info.get("selftest") or {}), "later": checks}
    return {**info, **({"skipped": skipped} if skipped else {})}, shards, joined_columns([kept for _, kept in parts])


def read_shard(
    folder: Path, entry: Mapping[str, Any], *, verify: bool
) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """One shard of a store as a checked entry of the manifest describes it.

    Raises:
        CorruptStoreError: if a file is missing, altered or of another size.
    """
    name, n = entry["name"], entry["examples"]
    tensors_path, columns_path = folder / f"{name}.safetensors", folder / f"{name}.parquet"
    for path, key in ((tensors_path, "sha256"), (columns_path, "columns_sha256")):
        if not path.is_file():
            raise CorruptStoreError(f"{path} is missing")
        if verify and sha256_of(path) != entry.get(key):
            raise CorruptStoreError(f"{path} was altered: its SHA-256 differs from the manifest's")
    tensors = read_tensors(tensors_path)
    if {"factors", "norms"} - set(tensors) or any(t.dim() == 0 or len(t) != n for t in tensors.values()):
        raise CorruptStoreError(f"{tensors_path} does not have the {n} examples of the manifest")
    check_tensors(tensors, tensors_path, finite=verify)
    columns = read_table(columns_path)
    if any(len(v) != n for v in columns.values()) or not all(isinstance(i, str) for i in columns.get(ID, [None])):
        raise CorruptStoreError(f"{columns_path} does not have the {n} examples of the manifest")
    return tensors, columns


def remove_store(folder: Path) -> None:
    """Remove the files of a store, and nothing else.

    What says that shards are whole goes first, and what says of what they are goes last: whenever this is cut short, a
    later run takes no shard for one of its own that is not.
    """
    for pattern in ("manifest.json", "pefs-*.json", "pefs-*", "config.json"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def joined_columns(parts: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """The columns of one shard after another; None where a shard lacks a column that another has."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [v for part in parts for v in part.get(name, [None] * len(part[ID]))] for name in names}


class StoreWriter:
    """Writes a store shard by shard; what it has written stays, and `done` tells what need not be done again.

    Several processes may write shards of one folder; one of them calls `finish`.

    Raises:
        IncompatibleSketchError: if the folder holds a store made with other settings; the differing field is named.
        CorruptStoreError: if the folder's config.json cannot be read, or shards lie there without one.
        FormatVersionError: if it was written by another version of the format.
    """

    def __init__(self, folder: Path, info: Mapping[str, Any], *, write_info: bool = True):
        self.folder = folder
        self.info = dict(info)
        folder.mkdir(parents=True, exist_ok=True)
        existing = folder / "config.json"
        if existing.exists():
            self._check_same(read_json(existing))
        elif next(folder.glob("pefs-*"), None) is not None or (folder / "manifest.json").exists():
            raise CorruptStoreError(
                f"{folder} has shards, but no config.json that describes them; use another output_dir, or resume=False "
                "to start again"
            )
        elif write_info:
            write_json(existing, self.info)

    def _check_same(self, before: Mapping[str, Any]) -> None:
        for name in ("format_version", "model", "revision", "task", "fisher", "dataset", "fingerprint"):
            if before.get(name) != self.info.get(name):
                old, new = before.get(name), self.info.get(name)
                if isinstance(old, Mapping) and isinstance(new, Mapping):
                    changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
                    old, new = {k: old.get(k) for k in changed}, {k: new.get(k) for k in changed}
                raise IncompatibleSketchError(
                    f"{self.folder} has PEFs made with another {name}: {old!r} there, {new!r} now. Use another "
                    "output_dir, or resume=False to start again."
                )

    def _entry_path(self, start: int) -> Path:
        return self.folder / f"pefs-{start:05d}.json"

    def done(self) -> dict[int, int]:
        """{first example: examples that were looked at} of the shards that are whole."""
        shards = {}
        for start, entry in self._entries().items():
            try:
                if entry["examples"]:
                    read_shard(self.folder, entry, verify=True)
                shards[start] = int(entry["covers"])
            except CorruptStoreError:
                continue  # not whole: written again
        return shards

    def filled(self) -> list[int]:
        """The first examples of the shards that hold any."""
        return sorted(start for start, entry in self._entries().items() if entry["examples"])

    def shard(self, start: int) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
        """The tensors and columns of the shard whose first example is number `start`."""
        return read_shard(self.folder, self._entries()[start], verify=False)

    def skipped(self) -> list[dict[str, str]]:
        """{id, reason} of every example that was skipped, in order."""
        return [example for _, entry in sorted(self._entries().items()) for example in entry["skipped"]]

    def _entries(self) -> dict[int, dict[str, Any]]:
        """{first example: entry}: what a finished store's manifest says, and over it what was written since."""
        entries_read: list[Any] = []
        with contextlib.suppress(CorruptStoreError, FormatVersionError):
            shards = read_json(self.folder / "manifest.json").get("shards")
            entries_read += shards if isinstance(shards, list) else []
        for path in self.folder.glob("pefs-*.json"):
            with contextlib.suppress(CorruptStoreError):
                entries_read.append(read_json(path, None))
        entries = {}
        for entry in entries_read:
            with contextlib.suppress(CorruptStoreError):
                checked = checked_entry(entry, self.folder)
                entries[checked["start"]] = checked
        return entries

    def write_shard(
        self,
        start: int,
        tensors: Mapping[str, Tensor],
        columns: Mapping[str, Sequence[Any]],
        skipped: Sequence[Mapping[str, str]] = (),
        checks: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write the shard whose first example is number `start`.

        Args:
            start: counts skipped examples too.
            tensors: the tensors of the examples that it holds; none where all were skipped.
            columns: the columns of the same examples.
            skipped: {id, reason} of the others of its range.
            checks: what was found where the self-test was repeated on them.
        """
        name = f"pefs-{start:05d}"
        entry: dict[str, Any] = {"name": name, "start": start, "examples": 0}
        if tensors:
            content = tensors_to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
            kept = table_bytes(columns)
            write_atomically(self.folder / f"{name}.safetensors", content)
            write_atomically(self.folder / f"{name}.parquet", kept)
            entry["examples"] = len(tensors["norms"])
            entry["sha256"] = hashlib.sha256(content).hexdigest()
            entry["columns_sha256"] = hashlib.sha256(kept).hexdigest()
        if skipped:
            entry |= {"covers": entry["examples"] + len(skipped), "skipped": [dict(example) for example in skipped]}
        if checks:
            entry["checks"] = [dict(check) for check in checks]
        write_json(self._entry_path(start), entry)

    def write_columns(self, start: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write other columns for the shard whose first example is number `start`; its tensors stay as they are.

        A run that is cut short in between finds the shard damaged, and computes it again.
        """
        entry, kept = self._entries()[start], table_bytes(columns)
        write_atomically(self.folder / f"{entry['name']}.parquet", kept)
        entry["columns_sha256"] = hashlib.sha256(kept).hexdigest()
        write_json(self._entry_path(start), _as_written(entry))

    def finish(self, n: int, skipped: Sequence[Mapping[str, str]] = ()) -> None:
        """Write the manifest over the shards of all n examples.

        Args:
            n: examples, with those that the shards' entries name as skipped.
            skipped: further ones that were left out before, {id, reason} each.

        Raises:
            CorruptStoreError: if the shards do not cover the examples.
        """
        entries_by_start = self._entries()
        entries, at = [], 0
        while at in entries_by_start:
            entries.append(entries_by_start.pop(at))
            at += entries[-1]["covers"]
        if at != n:
            raise CorruptStoreError(f"{self.folder}: the shards have only the first {at} of {n} examples without a gap")
        left_out = [*map(dict, skipped), *(example for entry in entries for example in entry["skipped"])]
        manifest = {
            "format_version": FORMAT_VERSION,
            "finished": True,
            "examples": sum(entry["examples"] for entry in entries),
            "shards": [_as_written(entry) for entry in entries],
            **({"skipped": left_out} if left_out else {}),
        }
        write_json(self.folder / "manifest.json", manifest)
        for start in (*entries_by_start, *(entry["start"] for entry in entries)):
            self._entry_path(start).unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):  # left by a run that was killed
            path.unlink(missing_ok=True)
        for start in entries_by_start:  # left by a run with another shard_size
            for suffix in ("safetensors", "parquet"):
                (self.folder / f"pefs-{start:05d}.{suffix}").unlink(missing_ok=True)


def _as_written(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing where no example was skipped."""
    return {k: v for k, v in entry.items() if entry["skipped"] or k not in ("covers", "skipped")}
