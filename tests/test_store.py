"""PEF stores: parts of them, files, and what happens to damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import CorruptStoreError, FormatVersionError, IncompatibleSketchError, PEFs
from hf_npeff.pefs.norms import normalise
from hf_npeff.pefs.shards import padded_cat
from tests.systems import linux_only


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pefs_of(n: int = 7, dtype: torch.dtype = torch.float32, **columns: Any) -> PEFs:
    return PEFs.from_factors(normal(n, 3, 5).to(dtype), **{"label": list(range(n)), **columns})


def in_shards(pefs: PEFs, *sizes: int) -> PEFs:
    parts, at = [], 0
    for size in sizes:
        parts.append(pefs[at : at + size])
        at += size
    return PEFs.concatenate(parts)


def test_factors_are_scaled_to_unit_norm_and_norms_are_kept() -> None:
    """Oracle: ‖AᵀA‖_F from the dense matrix; tiny, huge and zero rows included."""
    A = normal(5, 3, 6) * torch.tensor([1, 1e-12, 1e12, 0, 3.0])[:, None, None]
    pefs = PEFs.from_factors(A)
    for i in range(5):
        F = A[i].T @ A[i]
        assert float(pefs.norms[i]) == pytest.approx(float(F.norm()), rel=1e-12)
        gram = pefs.gram(i)
        torch.testing.assert_close(gram, F / (F.norm() if i != 3 else 1), atol=1e-12, rtol=0)
    unit, norms = normalise(A.float() * 1e-18)
    assert torch.isfinite(unit).all()
    assert (norms[[0, 2, 4]] > 0).all()


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 2, 3)])
def test_slices_indices_and_masks_take_the_same_examples(sizes: tuple[int, ...]) -> None:
    """Oracle: the same on plain tensors and lists."""
    whole = pefs_of()
    pefs = in_shards(whole, *sizes)
    mask = torch.tensor([True, False, True, True, False, False, True])
    for which, indices in (
        (slice(2, 6), [2, 3, 4, 5]), (slice(None, None, -2), [6, 4, 2, 0]), ([5, 0, -1], [5, 0, 6]),
        (torch.tensor([1, 1]), [1, 1]), (mask, [0, 2, 3, 6]), (slice(0, 0), []),
    ):  # fmt: skip
        part = pefs[which]
        assert torch.equal(part.factors, whole.factors[indices])
        assert torch.equal(part.norms, whole.norms[indices])
        assert part.labels == indices
        assert part.example_ids == [str(i) for i in indices]
    assert pefs.filter(mask).labels == [0, 2, 3, 6]
    joined = [i for chunk in pefs.chunks(2) for i in chunk.labels or []]
    assert joined == list(range(7))
    assert all(len(chunk) <= 2 for chunk in pefs.chunks(2))
    for place, chunk in pefs.placed_chunks(2):
        assert chunk.example_ids == pefs.example_ids[place]


def test_taking_a_few_examples_does_not_join_the_shards() -> None:
    """Oracle: no joined copy of the rows is kept."""
    pefs = in_shards(pefs_of(), 3, 4)
    pefs[[1, 5]]
    pefs[2:4]
    assert "factors" not in pefs._shards.joined


def test_joined_pefs_name_every_example_that_a_part_left_out_once(tmp_path: Path) -> None:
    """Oracle: the lists of the parts, of which two are of one store; they are read back from disk."""
    a, b = ({"id": name, "reason": "the model gives NaN"} for name in "ab")
    one, other = PEFs.from_factors(normal(4, 1, 2)), PEFs.from_factors(normal(2, 1, 2))
    one.info["skipped"], other.info["skipped"] = [a], [b]
    both = PEFs.concatenate([one[:2], one[2:], other])
    assert both.info["skipped"] == [a, b]
    both.save(tmp_path / "both")
    assert PEFs.load(tmp_path / "both").info["skipped"] == [a, b]
    assert one.info["skipped"] == [a]


def test_misuse_is_refused() -> None:
    """Oracle: the documented errors."""
    pefs = pefs_of()
    with pytest.raises(TypeError, match=r"pefs\[3\]"):
        pefs[3]  # type: ignore[call-overload]
    with pytest.raises(IndexError, match="7"):
        pefs[[7]]
    with pytest.raises(TypeError, match="float32"):
        pefs[torch.tensor([1.0, 0.0, 1.0])]
    assert len(pefs[[]]) == 0
    with pytest.raises(ValueError, match=r"torch\.bool.*\(1,\)"):
        pefs.filter([True])
    with pytest.raises(ValueError, match=r"chunk.*0"):
        list(pefs.chunks(0))
    with pytest.raises(ValueError, match=r"finite.*1"):
        PEFs.from_factors(torch.stack([torch.ones(1, 2), torch.full((1, 2), float("nan"))]))
    for wrong in (torch.ones(3), torch.ones(0, 2, 2), torch.ones(2, 2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"factors"):
            PEFs.from_factors(wrong)
    with pytest.raises(ValueError, match="label"):
        PEFs.from_factors(normal(3, 1, 2), label=[1])
    with pytest.raises(ValueError, match=r"example_ids.*\['a'\]"):
        PEFs.from_factors(normal(3, 1, 2), example_ids=["a", "b", "a"])
    with pytest.raises(ValueError, match=r"'label'.*5"):
        PEFs.from_factors(normal(3, 1, 2), label=5)
    with pytest.raises(ValueError, match="sketch"):
        pefs.sketch()
    with pytest.raises(ValueError, match="nothing"):
        PEFs.concatenate([])
    with pytest.raises(IncompatibleSketchError):
        PEFs.concatenate([pefs, PEFs.from_factors(normal(2, 3, 6), label=[1, 2])])
    with pytest.raises(ValueError, match="columns"):
        PEFs.concatenate([pefs, PEFs.from_factors(normal(2, 3, 5))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(7,), (2, 5)])
def test_a_store_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Oracle: what was saved, in every storage dtype, in one shard and in two."""
    pefs = in_shards(pefs_of(dtype=dtype), *sizes)
    pefs.save(tmp_path / "p")
    loaded = PEFs.load(tmp_path / "p")
    assert loaded.factors.dtype == dtype
    assert torch.equal(loaded.factors, pefs.factors)
    assert torch.equal(loaded.norms, pefs.norms)
    assert loaded.columns == pefs.columns
    assert loaded.fingerprint == pefs.fingerprint
    assert loaded.nbytes == 7 * 3 * 5 * dtype.itemsize
    with pytest.raises(ValueError, match=r"p .*PEFs"):
        pefs.save(tmp_path / "p")


@pytest.mark.parametrize(
    "values",
    [
        [1, "two", None, 3.5, True, "x", "y"],
        [None] * 7,
        ["a", None, "c", "d", "e", "f", ""],
        [0.5, float("inf"), 1, 2, 3, 4, None],
        [2**70, 1, 2, 3, 4, 5, 6],
        [True, False, None, True, True, True, True],
        ["\x00json:1", "b", "c", "d", "e", "f", "g"],
        ["\x00json:1"] * 7,
        ["ünï", "\n", "🙂", "", " ", "a", "b"],
    ],
)
def test_columns_of_every_kind_come_back(tmp_path: Path, values: list[Any]) -> None:
    """Oracle: what was saved; mixed types in one column, missing values, and strings that look like our own mark."""
    pefs = pefs_of(thing=values)
    for name, stored in (("one", pefs), ("two", in_shards(pefs, 3, 4))):
        stored.save(tmp_path / name)
        assert PEFs.load(tmp_path / name).columns["thing"] == values


@linux_only("/proc/self/maps")
def test_rows_are_memory_mapped(tmp_path: Path) -> None:
    """Oracle: the process's own map of the file."""
    PEFs.from_factors(normal(50, 3, 5)).save(tmp_path / "p")
    loaded = PEFs.load(tmp_path / "p")
    assert len(loaded.factors) == 50
    assert "pefs-00000.safetensors" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("victim", ["pefs-00000.safetensors", "pefs-00002.parquet", "manifest.json", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "altered", "truncated", "empty"])
def test_damage_is_noticed_and_the_file_named(tmp_path: Path, victim: str, damage: str) -> None:
    """Oracle: a CorruptStoreError (or FormatVersionError) that names the file; never another exception."""
    in_shards(pefs_of(), 2, 5).save(tmp_path / "p")
    path = tmp_path / "p" / victim
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises((CorruptStoreError, FormatVersionError), match=victim.split(".")[0]):
        PEFs.load(tmp_path / "p")


def test_of_an_unfinished_store_it_is_said_what_finishes_it(tmp_path: Path) -> None:
    """Oracle: the message, by the command and by the function that go on."""
    pefs_of().save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    with pytest.raises(CorruptStoreError, match=r"run compute again.*hf-npeff compute.*compute_pefs"):
        PEFs.load(tmp_path)


def test_wrong_contents_are_refused(tmp_path: Path) -> None:
    """Oracle: the documented errors for a manifest or config that says something else."""
    pefs_of().save(tmp_path / "p")
    manifest, config = tmp_path / "p" / "manifest.json", tmp_path / "p" / "config.json"
    good_manifest, good_config = json.loads(manifest.read_text()), json.loads(config.read_text())
    for change, error in (
        ({"format_version": 99}, FormatVersionError),
        ({"finished": False}, CorruptStoreError),
        ({"shards": []}, CorruptStoreError),
        ({"shards": 5}, CorruptStoreError),
        ({"shards": [3]}, CorruptStoreError),
        ({"shards": [{**good_manifest["shards"][0], "name": "../p/pefs-00000"}]}, CorruptStoreError),
        ({"shards": [{**good_manifest["shards"][0], "examples": 6}]}, CorruptStoreError),
    ):
        manifest.write_text(json.dumps({**good_manifest, **change}))
        with pytest.raises(error):
            PEFs.load(tmp_path / "p")
    manifest.write_text(json.dumps(good_manifest))
    for change, error in (
        ({"format_version": 99}, FormatVersionError),
        ({"fisher": 3}, FormatVersionError),
        ({"fisher": {**good_config["fisher"], "rank": -1}}, CorruptStoreError),
    ):
        config.write_text(json.dumps({**good_config, **change}))
        with pytest.raises(error):
            PEFs.load(tmp_path / "p")
    with pytest.raises(CorruptStoreError):
        PEFs.load(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the folder before."""
    from hf_npeff.sharing import files

    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def no_rename(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_of_different_lengths_are_padded() -> None:
    """Oracle: written by hand; one term beside several."""
    joined = padded_cat([torch.tensor([1, 2]), torch.tensor([[3, 4]])], -1)
    assert joined.tolist() == [[1, -1], [2, -1], [3, 4]]


def test_shards_with_different_columns_are_joined(tmp_path: Path) -> None:
    """Oracle: None where a shard lacks the column: only the records of the other shard have it."""
    from hf_npeff.pefs.shards import StoreWriter

    first, second = pefs_of()[:3], pefs_of(extra=list("abcdefg"))[3:]
    writer = StoreWriter(tmp_path / "p", first.info)
    for start, part in ((0, first), (3, second)):
        writer.write_shard(start, {"factors": part.factors, "norms": part.norms}, part.columns)
    writer.finish(7)
    assert PEFs.load(tmp_path / "p").columns["extra"] == [None, None, None, *"defg"]
