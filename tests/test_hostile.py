"""Files and texts of somebody who means harm: refused by our own errors, within bounds, and nothing outside is touched.

Every reader gets its files damaged in all ways below; a checksum is adapted where a damage is to get past it. What is
allowed is to read the file, or `CorruptStoreError`, or `FormatVersionError`.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as tensors_to_bytes

from hf_npeff import (
    CorruptStoreError,
    Decomposition,
    DecompositionConfig,
    FisherConfig,
    FormatVersionError,
    ParameterDirection,
    PEFs,
)
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.pefs.shards import StoreWriter
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.report.training import read_run
from hf_npeff.sharing.cards import metadata, said_on_card, write_card
from hf_npeff.sharing.files import (
    read_json,
    read_json_lines,
    read_table,
    read_tensors,
    table_bytes,
    write_atomically,
    write_together,
)
from hf_npeff.sharing.hub import _checked_subfolder, is_hub_id
from tests import workers
from tests.systems import linux_only
from tests.test_cards import parts, skeleton
from tests.test_faults import direction
from tests.test_hub import small_decomposition

REFUSED = (CorruptStoreError, FormatVersionError)
LEAST_CASES = 3000
"""Damages that the fuzz test makes; it may make more, but not fewer."""
TRIED = 3
"""One in so many of them is tried, and all with --wide. Chosen: a few seconds in place of twenty."""

bounded = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


# Every reader, and what it reads --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A folder, what reads it, and where the checksum of each of its files is kept.

    Attributes:
        make: writes a sound folder.
        read: reads it, and looks at what came.
        sums: {file: (index, path within it)}.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    sums: dict[str, tuple[str, tuple[Any, ...]]]


def look_at_pefs(folder: Path, verify: bool = True) -> None:
    pefs = PEFs.load(folder, verify=verify)
    repr(pefs), pefs.norms.sum(), pefs.factors.sum(), pefs.sketch_error, pefs.config, pefs.labels
    assert len(pefs) == len(pefs.example_ids)
    if pefs.info.get("sketch") is not None:
        assert pefs.sketch().dim == pefs.dim


def look_at_decomposition(folder: Path) -> None:
    found = Decomposition.load(folder)
    repr(found), repr(list(found)), found[0].top_examples(2), found.fisher_config, found.explained


def look_at_direction(folder: Path) -> None:
    found = ParameterDirection.load(folder)
    repr(found), found.norm
    assert found.norm == pytest.approx(1, abs=1e-3)


def resume(folder: Path) -> None:
    info = {"format_version": 1, "fingerprint": "f"}
    if (folder / "config.json").is_file():
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(info))
    writer = StoreWriter(folder, info)
    writer.done()
    writer.skipped()
    writer.finish(4)


def save_history(folder: Path) -> None:
    folder.mkdir()
    record = {"step": 1, "epoch": 0.5, "explained": 0.5, "active": 2, "share": [0.5, 0.5], "cosine": None}
    (folder / "history.jsonl").write_text("".join(json.dumps({**record, "step": i}) + "\n" for i in range(3)))


def read_history(folder: Path) -> None:
    read_json_lines(folder / "history.jsonl")
    try:
        read_run(folder, 2)
    except (ValueError, FileNotFoundError) as error:
        assert "do not belong" in str(error) or "has no run" in str(error), error


def computed(folder: Path) -> None:
    workers.analyzer().compute_pefs(workers.examples(4), folder, batch_size=2, shard_size=2)


SHARD_SUMS = {
    f"pefs-{start:05d}.{ending}": ("manifest.json", ("shards", i, key))
    for i, start in enumerate((0, 2))
    for ending, key in (("safetensors", "sha256"), ("parquet", "columns_sha256"))
}
READERS = {
    "PEFs": Reader(computed, look_at_pefs, SHARD_SUMS),
    "PEFs, not verified": Reader(computed, lambda f: look_at_pefs(f, False), {}),
    "a run that resumes": Reader(computed, resume, SHARD_SUMS),
    "decomposition": Reader(
        lambda f: small_decomposition().save_pretrained(f),
        look_at_decomposition,
        {n: ("config.json", ("files", n)) for n in ("decomposition.safetensors", "examples.parquet")},
    ),
    "direction": Reader(
        lambda f: direction(0).save_pretrained(f),
        look_at_direction,
        {"direction.safetensors": ("config.json", ("sha256",))},
    ),
    "dense adapter": Reader(
        lambda f: direction(0).to_adapter(kind="delta").save_pretrained(f),
        look_at_direction,
        {"adapter_model.safetensors": ("adapter_config.json", ("sha256",))},
    ),
    "history": Reader(save_history, read_history, {}),
    "card": Reader(lambda f: small_decomposition().save_pretrained(f, license="mit"), said_on_card, {}),
}
WHICH = {"card": ("README.md",), "history": ("history.jsonl",)}
UNREAD = ("README.md",)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where there is one, a disk that takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def sound(place: Path) -> dict[str, Path]:
    """A folder for every reader, which it reads."""
    place = place / "sound"
    place.mkdir()
    for name, reader in READERS.items():
        reader.make(place / name)
        probe = shutil.copytree(place / name, place / f"{name}, read")
        reader.read(probe)
    return {name: place / name for name in READERS}


class Fuzz:
    """Reads one damaged folder after the other, counts them and keeps what went wrong."""

    def __init__(self, place: Path):
        self.folder = place / "folder"
        self.canary = place / "canary"
        self.canary.write_text("untouched")
        self.place = place
        self.cases = 0
        self.wrong: list[str] = []
        self.refused = 0

    def try_one(self, what: str, reader: Reader, source: Path, changed: dict[str, bytes | None]) -> None:
        """Read the folder with these files changed, or gone where there are no bytes."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        for path in source.iterdir():
            if path.name not in changed:
                os.link(path, self.folder / path.name)
        for name, content in changed.items():
            if content is not None:
                (self.folder / name).write_bytes(content)
        self.read(what, reader)

    def read(self, what: str, reader: Reader) -> None:
        self.cases += 1
        try:
            reader.read(self.folder)
        except REFUSED as error:
            self.refused += 1
            assert len(str(error)) < 20_000
        except Exception as error:
            self.wrong.append(f"{what}: {error!r}\n{''.join(traceback.format_tb(error.__traceback__)[-2:])}")
        if sorted(os.listdir(self.place)) != ["canary", "folder"] or self.canary.read_text() != "untouched":
            self.wrong.append(f"{what}: something outside was touched")


def resigned(source: Path, reader: Reader, name: str, content: bytes) -> dict[str, bytes | None]:
    """The change of a file, with its checksum adapted where one is kept."""
    if name not in reader.sums:
        return {name: content}
    index, path = reader.sums[name]
    values = json.loads((source / index).read_bytes())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = hashlib.sha256(content).hexdigest()
    return {name: content, index: json.dumps(values).encode()}


def damaged(content: bytes, draw: random.Random, times: int) -> Iterator[tuple[str, bytes]]:
    """Bits flipped, ends cut off, bytes put in, blocks zeroed, filled and swapped."""
    n = len(content)
    for _ in range(times):
        at = draw.randrange(n)
        yield f"bit {at}", content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
        yield f"cut at {at}", content[:at]
        yield f"more at {at}", content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at:]
        block = draw.randrange(1, 17)
        fill = draw.choice([b"\0", b"\xff", b"9", b"["])
        yield f"{fill!r} at {at}", content[:at] + fill * block + content[at + block :]
        early = draw.randrange(min(n, 200))  # where headers are
        yield f"early bit {early}", content[:early] + bytes([content[early] ^ 0x55]) + content[early + 1 :]
        late = n - 1 - draw.randrange(min(n, 200))  # where Parquet keeps its own
        yield f"late bit {late}", content[:late] + bytes([content[late] ^ 0x2A]) + content[late + 1 :]


NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**30, 1e308, -0.5, "", "x", "../../canary", "/etc/passwd", "\0", "1e9", [], {}, [[]],
    [None], {"a": {}}, [1, 2, 3], "9" * 5000,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def rewritten(values: Any, draw: random.Random, times: int) -> Iterator[tuple[str, bytes]]:
    """A JSON file with each of its values replaced by others, taken away, or there twice."""
    for path in places(values):
        for nasty in draw.sample(NASTY, times):
            changed = copy.deepcopy(values)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = nasty
            yield f"{path} is {str(nasty)[:20]!r}", json.dumps(changed).encode()
        del inner[path[-1]]
        yield f"no {path}", json.dumps(changed).encode()
    whole = json.dumps(values)
    for key in values if isinstance(values, dict) else ():
        yield f"{key} twice", (whole[:-1] + f", {json.dumps(key)}: 1}}").encode()
    for text in (
        "",
        "null",
        "[]",
        "{}",
        "NaN",
        '{"a": NaN}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 100_000,
        "\ufeff{}",
    ):
        yield text[:10], text.encode()


def other_tensors(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A safetensors file with other types, shapes, names and numbers, and with a header that lies."""
    from safetensors.torch import load

    tensors = load(content)
    for name, t in tensors.items():
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.float16):
            yield f"{name} as {dtype}", tensors_to_bytes({**tensors, name: t.to(dtype).contiguous()})
        for shape in ((), (0,), (t.numel(),), (1, *t.shape), (*t.shape, 1), t.shape[::-1], (2**40, 0), (0, 2**40)):
            if math.prod(shape) == t.numel():
                yield f"{name} as {shape}", tensors_to_bytes({**tensors, name: t.reshape(shape).contiguous()})
            elif 0 in shape:
                yield f"{name} as {shape}", tensors_to_bytes({**tensors, name: torch.zeros(0).reshape(shape)})
        if t.is_floating_point():
            for number in (math.nan, math.inf, -1.0):
                yield f"{name} with {number}", tensors_to_bytes({**tensors, name: torch.full_like(t, number)})
        yield f"no {name}", tensors_to_bytes({k: v for k, v in tensors.items() if k != name})
    yield "another", tensors_to_bytes({**tensors, "../other": torch.zeros(2)})
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    first = next(key for key in header if key != "__metadata__")
    for lie in (
        {"shape": [2**62, 2**62]}, {"shape": [-1]}, {"shape": ["1"]}, {"data_offsets": [0, 2**60]}, {"dtype": "F99"},
        {"data_offsets": [2**40, 0]}, {"shape": [10**15], "data_offsets": [0, 8 * 10**15]}, {"dtype": "F4"},
    ):  # fmt: skip
        text = json.dumps({**header, first: {**header[first], **lie}}).encode()
        yield f"{lie}", len(text).to_bytes(8, "little") + text + data
    twice = json.dumps(header)[:-1].encode() + b"," + json.dumps({first: header[first]}).encode()[1:]
    yield "a name twice", len(twice).to_bytes(8, "little") + twice + data
    for claimed in (0, 2**63, 2**64 - 1, length * 2, 10**8):
        yield f"header of {claimed}", claimed.to_bytes(8, "little") + content[8:]


def other_table(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A Parquet file with other types, rows, names and codecs."""
    table = pq.read_table(pa.BufferReader(content))

    def written(table: pa.Table, **options: Any) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        return bytes(sink.getvalue().to_pybytes())

    n = table.num_rows
    for column in (
        pa.array([[1]] * n), pa.array([{"a": 1}] * n), pa.array([b"\xff"] * n), pa.array(range(n), pa.int8()),
        pa.array(["\x00json:{"] * n), pa.array(["\x00json:" + "[" * 100_000] * n), pa.array([None] * n),
        pa.array(["a"] * n).dictionary_encode(), pa.array(range(n), pa.timestamp("s")), pa.array(["\x00json:NaN"] * n),
    ):  # fmt: skip
        yield f"more of {column.type}", written(table.append_column("more", column))
        yield f"ids of {column.type}", written(table.set_column(0, "example_id", column))
    yield "names twice", written(table.append_column("example_id", table.column(0)))
    yield "no ids", written(table.drop_columns(["example_id"]))
    yield "fewer", written(table.slice(0, n - 1))
    yield "none", written(table.slice(0, 0))
    yield "no columns", written(table.select([]))
    for codec in ("zstd", "gzip", "brotli"):
        yield codec, written(table, compression=codec)
    yield "row groups", written(table, row_group_size=1)


def changes(name: str, content: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """All damages of one file."""
    yield from damaged(content, draw, 5)
    if name.endswith(".json"):
        yield from rewritten(json.loads(content), draw, 2)
    elif name.endswith(".jsonl"):
        lines = content.splitlines(keepends=True)
        yield from ((what, lines[0] + changed) for what, changed in rewritten(json.loads(lines[1]), draw, 3))
    elif name.endswith(".safetensors"):
        yield from other_tensors(content)
    elif name.endswith(".parquet"):
        yield from other_table(content)
    elif name.endswith(".md"):
        yield from other_cards(content)


def other_cards(content: bytes) -> Iterator[tuple[str, bytes]]:
    head, _, rest = content.decode().removeprefix("---\n").partition("---\n")
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    tag = "\ntags:\n- npeff\n"
    for text in (
        "license: [", "license: {a: b}\ndatasets: 5", "- a", "license: !!python/object/apply:os.system [ls]", bomb,
        "license: *b", "?" * 1000, "[" * 10_000, "license: 5", "datasets: [[a], {b: c}]", "a: 1\na: 2",
    ):  # fmt: skip
        yield text[:20], f"---\n{text}{tag}---\n{rest}".encode()
    yield "no end", f"---\n{head}".encode()
    yield "nothing", f"---\n{tag}".encode()


def test_every_reader_refuses_every_damage(
    sound: dict[str, Path], place: Path, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    """Invariant: what is read is sound, or refused by one of our two errors; nothing outside the folder changes."""
    (place / "fuzz").mkdir()
    made, tried = itertools.count(), 1 if pytestconfig.getoption("--wide") else TRIED
    fuzz = Fuzz(place / "fuzz")
    for name, reader in READERS.items():
        draw = random.Random(name)
        for file in sorted(path.name for path in sound[name].iterdir()):
            if (file in UNREAD and name not in WHICH) or file not in WHICH.get(name, (file,)):
                continue
            content = (sound[name] / file).read_bytes()
            fuzz.try_one(f"{name}, no {file}", reader, sound[name], {file: None})
            for what, changed in changes(file, content, draw):
                if next(made) % tried:
                    continue
                fuzz.try_one(f"{name}, {file}: {what}", reader, sound[name], {file: changed})
                if file in reader.sums:
                    signed = resigned(sound[name], reader, file, changed)
                    fuzz.try_one(f"{name}, {file}, checksum adapted: {what}", reader, sound[name], signed)
    with capsys.disabled():
        print(f"\n{fuzz.cases} cases, {fuzz.refused} refused, {len(fuzz.wrong)} wrong")
    assert not fuzz.wrong, f"{len(fuzz.wrong)}:\n" + "\n".join(fuzz.wrong[:12])
    assert fuzz.cases >= LEAST_CASES / tried
    assert fuzz.refused > fuzz.cases / 2


# Bombs ----------------------------------------------------------------------------------------------------------------

ROOM = 2**29
"""Bytes that a reader may take beyond what the process has, and seconds of one core:"""
SECONDS = 20


def within_bounds(*reads: Callable[[], Any]) -> list[str]:
    """The classes of the errors that calls end in, or "read", one after another in a process with little room and time.

    Room and time are for all of them together: each has no more than that.
    """
    import resource  # not on Windows, where no test calls this

    inside, outside = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            status = Path("/proc/self/statm").read_text()
            limit = int(status.split()[0]) * os.sysconf("SC_PAGE_SIZE") + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(3 * SECONDS)  # waiting costs no time of the core
            for read in reads:
                try:
                    read()
                    result = "read"
                except BaseException as error:
                    result = type(error).__name__
                os.write(outside, f"{result}\n".encode())
        finally:
            os._exit(0)
    os.close(outside)
    with os.fdopen(inside) as answer:
        results = answer.read().splitlines()
    status = os.waitpid(pid, 0)[1]
    return results + [f"died of {status}"] * (len(reads) - len(results))


def parquet(path: Path, table: pa.Table, times: int = 1, **options: Any) -> Path:
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        for _ in range(times):
            writer.write_table(table)
    return path


def table_bombs(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """(name, small file that unfolds into gigabytes, how reading it ends)."""
    ones = pa.table({"a": pa.array([1]).take(pa.array([0] * 2_000_000))})
    yield "rows of one number", parquet(folder / "a", ones, 20), "CorruptStoreError"
    zeros = pa.table({"a": ["0" * 30_000_000]})
    for codec in ("zstd", "gzip", "brotli"):
        yield codec, parquet(folder / codec, zeros, compression=codec, use_dictionary=False), "CorruptStoreError"
    text = pa.array(["0" * 1_000_000])
    one_text = pa.table({"a": pa.DictionaryArray.from_arrays(pa.array([0] * 100_000), text)})
    path = parquet(folder / "dictionary", one_text.cast(pa.schema({"a": pa.dictionary(pa.int64(), pa.string())})))
    yield "one long text, 100 gigabytes of it", path, "CorruptStoreError"  # its type is not ours
    again = pa.table({"a": pa.array(["0" * 1_000_000] * 100)})
    yield "one long text", parquet(folder / "text", again, 8), "read"  # 800 MB as copies, 1 MB as one object
    wide = pa.table({f"c{i}": pa.array([None] * 20_000, pa.int64()) for i in range(2000)})
    yield "many columns of nothing", parquet(folder / "wide", wide), "CorruptStoreError"


@linux_only("/proc/self/statm and RLIMIT_AS")
def test_small_files_cannot_unfold_into_large_ones(tmp_path: Path) -> None:
    """Oracle: a process with half a gigabyte to spare refuses them, or reads them within it."""
    for name, path, expected in table_bombs(tmp_path):
        assert path.stat().st_size < 6_000_000, name
        assert within_bounds(lambda path=path: read_table(path)) == [expected], name
    huge = tmp_path / "sparse"
    with open(huge, "wb") as file:
        file.truncate(2**40)
    readers = (read_json, read_tensors, read_table)
    assert within_bounds(*(lambda read=read: read(huge) for read in readers)) == ["CorruptStoreError"] * 3
    shapes = [["a", [10**9, 10**9]], ["b", [10**12, 1]]]
    kinds = (("kronecker", 1), ("countsketch", 4), ("two-stage", 4), ("identity", None))
    claims = [{"kind": kind, "dim": dim, "seed": 0, "shapes": shapes} for kind, dim in kinds]
    assert within_bounds(*(lambda c=c: Sketch.from_dict(c).fingerprint for c in claims)) == ["read"] * 4
    assert within_bounds(lambda: bytearray(2 * ROOM)) == ["MemoryError"]  # the bound itself


@linux_only("/proc/self/statm and RLIMIT_AS")
def test_what_is_no_file_is_not_read(sound: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: a pipe, an endless device, a folder, a link in a circle in the place of every file, within a time."""
    for name, reader in READERS.items():
        if name == "PEFs, not verified":  # opens what "PEFs" does
            continue
        folders: dict[tuple[str, str], Path] = {}
        for file in [*reader.sums, "config.json", "manifest.json", "history.jsonl", "README.md"]:
            if not (sound[name] / file).exists() or (file == "README.md" and name != "card"):
                continue
            for kind in ("pipe", "device", "folder", "circle"):
                folders[file, kind] = folder = tmp_path / name / file / kind
                shutil.copytree(sound[name], folder)
                (folder / file).unlink()
                if kind == "pipe":
                    os.mkfifo(folder / file)
                elif kind == "device":
                    (folder / file).symlink_to("/dev/zero")
                elif kind == "folder":
                    (folder / file).mkdir()
                else:
                    (folder / file).symlink_to(folder / file)
        reads = [lambda folder=folder, reader=reader: reader.read(folder) for folder in folders.values()]
        # They do without what is missing
        expected = {"read", "CorruptStoreError"} if name in ("card", "a run that resumes") else {"CorruptStoreError"}
        for what, result in zip(folders, within_bounds(*reads), strict=True):
            assert result in expected, (name, what, result)


# Nothing is written outside -------------------------------------------------------------------------------------------


def test_links_in_a_folder_do_not_lead_a_write_out_of_it(tmp_path: Path) -> None:
    """Oracle: the bytes of files outside that links under every name we write point to, temporary ones included."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    decomposition = small_decomposition()
    names = ["config.json", "decomposition.safetensors", "examples.parquet", "manifest.json", "pefs-00000.parquet"]
    names += ["pefs-00000.safetensors", "pefs-00000.json", "direction.safetensors", "adapter_config.json"]
    with pytest.MonkeyPatch.context() as patch:  # the names that are about to be written
        written: list[str] = []
        replace = os.replace
        patch.setattr(os, "replace", lambda a, b: (written.extend(map(str, (a, b))), replace(a, b))[1])
        decomposition.save_pretrained(tmp_path / "count")
    names += [Path(name).name for name in written]
    assert any(name.endswith(".tmp") for name in names) and any(name.endswith(".new") for name in names)
    for name in names:
        (outside / name).write_text("untouched")
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(outside / name)
    decomposition.save_pretrained(folder)
    direction(0).save_pretrained(folder)
    write_atomically(folder / "manifest.json", b"{}")
    write_together(folder, {"pefs-00000.parquet": b"1", "pefs-00000.json": b"2"})
    assert {path.read_text() for path in outside.iterdir()} == {"untouched"}
    assert json.loads((folder / "config.json").read_text())["library_name"] == "hf_npeff"
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(outside / "config.json")
    write_card(folder, "a card")
    assert (outside / "config.json").read_text() == "untouched"


@given(st.text(max_size=30) | st.lists(st.sampled_from(["..", "a", "/", "\\", "C:", "~"]), max_size=8).map("".join))
@bounded
def test_a_subfolder_never_leads_out_of_its_repository(subfolder: str) -> None:
    """Invariant: whatever is not refused stays below the folder."""
    try:
        inner = _checked_subfolder(subfolder)
    except ValueError:
        return
    assert inner is not None
    assert os.path.normpath(f"/repository/{inner}").startswith("/repository/") and "\\.." not in str(inner)


# Properties -----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([FisherConfig, DecompositionConfig]), st.data())
@bounded
def test_a_config_is_sound_or_refused(kind: Any, data: st.DataObject) -> None:
    """Invariant: any value for any setting is a config that comes back from JSON, or a ValueError, or of a version."""
    values = kind().to_dict()
    for name in data.draw(st.lists(st.sampled_from(sorted(values)), max_size=3)):
        values[name] = data.draw(json_values)
    if data.draw(st.integers(0, 3)) == 0:
        values[data.draw(st.text(max_size=5))] = 1
    try:
        config = kind.from_dict(values)
    except (ValueError, FormatVersionError):
        return
    assert kind.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


@given(
    st.dictionaries(st.sampled_from(["format_version", "finished", "shards", "examples", "skipped", "x"]), json_values)
)
@bounded
def test_any_manifest_is_refused_unless_it_is_the_stores(values: dict[str, Any]) -> None:
    """Invariant: two errors and no other."""
    with tempfile.TemporaryDirectory() as folder:
        PEFs.from_factors(torch.ones(2, 1, 2)).save(folder)
        (Path(folder) / "manifest.json").write_text(json.dumps({"format_version": 1, "finished": True, **values}))
        with pytest.raises(REFUSED):
            PEFs.load(folder)


plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)


@given(st.dictionaries(st.text(max_size=12), st.lists(plain_values | json_values, min_size=3, max_size=3), max_size=3))
@bounded
def test_columns_of_any_names_and_values_come_back(columns: dict[str, list[Any]]) -> None:
    """Identity, NaN included; a name that Parquet cannot hold is refused before anything is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        try:
            content = table_bytes({"example_id": ["a", "b", "c"], **columns})
        except ValueError as error:
            assert "cannot be stored" in str(error)
            return
        path.write_bytes(content)
        found = read_table(path)
    assert set(found) == {"example_id", *columns}
    assert json.dumps(found | {}, sort_keys=True) == json.dumps(
        {"example_id": ["a", "b", "c"]} | columns, sort_keys=True
    )


@given(st.integers() | st.floats() | st.text(max_size=5) | st.booleans() | st.none())
@bounded
def test_a_component_is_a_number_that_exists_or_an_error(j: Any) -> None:
    """Invariant: 0 to r − 1, an IndexError or a TypeError, in every place that takes one."""
    decomposition = small_decomposition()
    try:
        found = decomposition.index_of(j)
    except (IndexError, TypeError):
        with pytest.raises((IndexError, TypeError)):
            decomposition[j]
        if not isinstance(j, str):  # else it is the path of a file with names
            with pytest.raises((IndexError, TypeError)):
                decomposition.rename(j, "x")
        return
    assert 0 <= found < 3 and decomposition[j].index == found


NEUTRAL = "plain"


def card_of(model: str, text: str, name: str) -> str:
    from hf_npeff.sharing.cards import decomposition_card

    decomposition = small_decomposition()
    decomposition.info["model"] = model
    decomposition.columns["text"] = [text] * 10
    decomposition.names = {0: name}
    return decomposition_card(decomposition)


hostile_text = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["---\n", "\n", "|", "# ", "```", "<script>", "-->", "<!--", "](http://x.y)", "![a](b)", "license: x", "$", "*",
         "`", "\\", "&lt;", "&", "~~", "- [ ]", "1. ", "\u202e", "\r", "\t", "{{", "%", "base_model: e", "@me", "\x00"]
    ),
    max_size=8,
).map("".join)  # fmt: skip


@given(hostile_text, hostile_text.filter(str.strip), hostile_text)
@bounded
def test_no_text_name_or_model_changes_what_a_card_is(text: str, name: str, model: str) -> None:
    """Identity of the metadata with that of plain texts, of the Markdown's structure, and of the code's lines."""
    neutral = card_of("local folder", NEUTRAL, NEUTRAL)
    card = card_of("local folder", text, name)
    assert parts(card)[0] == parts(neutral)[0]
    assert skeleton(card) == skeleton(neutral)
    front = yaml.safe_load(metadata("npeff-pefs", model, [], None).split("---\n")[1])
    assert set(front) == {"library_name", "tags", *(("base_model", "base_model_relation") if is_hub_id(model) else ())}
    assert front.get("base_model") in (None, model)


@given(hostile_text)
@bounded
def test_names_and_ids_of_any_text_come_back(text: str) -> None:
    """Identity of a component's name, of an id and of a text, through the files of a decomposition."""
    decomposition = small_decomposition()
    decomposition.columns["text"][3] = text
    decomposition.example_ids[0] = text
    if text.strip():
        decomposition.rename(2, text)
    with tempfile.TemporaryDirectory() as folder:
        decomposition.save_pretrained(folder)
        found = Decomposition.load(folder)
    assert found.names == decomposition.names
    assert found.example_ids == decomposition.example_ids and found.columns == decomposition.columns
    repr(found[2]), repr(found)


def test_the_solver_refuses_rows_that_are_not_finite() -> None:
    """Oracle: rows put into PEFs past every check; the error names the examples."""
    pefs = PEFs.from_factors(torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0)))
    pefs.factors[4] = math.nan
    with pytest.raises(ValueError, match=r"\[4\]"):
        NPEFF(2, n_restarts=1).fit(pefs)
