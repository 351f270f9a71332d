"""PEFs: per-example Fishers as factors, with what is known of every example, in memory or memory-mapped from disk.

A store on disk is a folder:

    config.json        configs, model and commit, versions, the sketch, its measured error, format_version
    manifest.json      for every shard its examples, rows and SHA-256; whether the store is finished
    pefs-00000.safetensors, pefs-00000.parquet, …     tensors, and ids with the kept columns, of one shard each

Every file is written to a temporary name, flushed and renamed, so a reader sees an old file or a whole new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from hf_npeff.cards import pefs_card, write_card
from hf_npeff.config import FisherConfig
from hf_npeff.errors import CorruptStoreError, FormatVersionError, IncompatibleSketchError
from hf_npeff.files import FORMAT_VERSION, read_json, read_tensors, sha256_of, write_atomically, write_json
from hf_npeff.fisher.sketches import Sketch
from hf_npeff.hub import commit_of, is_hub_id, push_folder, resolve_folder, text_columns

logger = logging.getLogger(__name__)

_ID, _CONTENT = "example_id", "content_hash"


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
        out[(slice(start, start + len(t)), *(slice(0, s) for s in t.shape[1:]))] = t
        start += len(t)
    return out


_FILL = {"predictions": -1}


class PEFs:
    """Per-example Fishers of n examples.

    Attributes:
        factors: (n, c, d), rows A of every example, scaled so that ‖AᵀA‖_F = 1; a zero PEF stays zero.
        norms: (n,) float64, ‖AᵀA‖_F before scaling.
        cotangents: (n, c, t, s), what was sent back from the output to make each row, before scaling; None for rows
            made elsewhere. t terms (positions) an example, s the hidden size or the number of logits.
        predictions: (n,) class, (n, t) classes of several terms (−1 where there is none), (n, k) of labels or values.
        log_probs: (n,) or (n, t), of the predictions, in nats.
        entropies: (n,) or (n, t), of the output distributions, in nats, where there are some.
        example_ids: n strings.
        columns: {name: list of n values} kept beside the rows.
        info: model, commit, config, versions and sketch: what config.json holds.
        sketch_error: measured relative error of inner products of PEFs, or None where it was not measured.
        commit: of the Hub repository that they were read from, or None.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        columns: Mapping[str, Sequence[Any]],
        info: Mapping[str, Any],
        shards: Sequence[Mapping[str, Tensor]] | None = None,
    ):
        self._shards = list(shards) if shards is not None else [dict(tensors)]
        self._joined: dict[str, Tensor] = dict(self._shards[0]) if len(self._shards) == 1 else {}
        self.columns = {name: list(values) for name, values in columns.items()}
        self.info: dict[str, Any] = dict(info)
        self.commit: str | None = None

    @classmethod
    def from_factors(cls, factors: Tensor, *, fingerprint: str | None = None, **columns: Any) -> PEFs:
        """PEFs from rows made elsewhere.

        Args:
            factors: (n, c, d), or (n, d) for one row an example; scaled here to unit Frobenius norm.
            fingerprint: what the rows may be mixed with; by default a hash of d, so that any rows of one size may.
            **columns: names to lists of n values; `example_ids` and `labels` may be among them.

        Raises:
            ValueError: if the rows are not finite numbers of shape (n, c, d), or a column has another length.
        """
        factors = torch.as_tensor(factors)
        if factors.dim() == 2:
            factors = factors[:, None]
        if factors.dim() != 3 or 0 in factors.shape or not factors.is_floating_point():
            raise ValueError(
                f"factors must be floating-point (n, c, d), but they are {factors.dtype} {tuple(factors.shape)}"
            )
        if not bool(torch.isfinite(factors).all()):
            bad = (~torch.isfinite(factors).flatten(1).all(1)).nonzero()[:, 0].tolist()
            raise ValueError(f"factors must be finite, but those of the examples {bad[:10]} are not")
        n, _, d = factors.shape
        unit, norms = normalise(factors)
        ids = [str(i) for i in columns.pop("example_ids", range(n))]
        kept = {name: _as_list(values) for name, values in columns.items()}
        if wrong := {name: len(values) for name, values in {**kept, "example_ids": ids}.items() if len(values) != n}:
            raise ValueError(f"columns need {n} values, but these have other lengths: {wrong}")
        info = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint or f"rows-of-{d}",
            "fisher": FisherConfig().to_dict(),
            "sketch": None,
            "model": None,
            "revision": None,
            "selftest": None,
        }
        return cls({"factors": unit, "norms": norms}, {_ID: ids, **kept}, info)

    # What is in it

    def __len__(self) -> int:
        return sum(len(shard["norms"]) for shard in self._shards)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._joined:
            self._joined[name] = padded_cat([shard[name] for shard in self._shards], _FILL.get(name, 0))
        return self._joined[name]

    def _optional(self, name: str) -> Tensor | None:
        return self._tensor(name) if name in self._shards[0] else None

    @property
    def factors(self) -> Tensor:
        """(n, c, d) unit-norm factors; the memory map itself where there is one shard, else joined in memory."""
        return self._tensor("factors")

    @property
    def norms(self) -> Tensor:
        """(n,) Frobenius norms before scaling."""
        return self._tensor("norms")

    @property
    def cotangents(self) -> Tensor | None:
        """(n, c, t, s), or None for rows made elsewhere."""
        return self._optional("cotangents")

    @property
    def predictions(self) -> Tensor | None:
        """The likeliest outcome of every term."""
        return self._optional("predictions")

    @property
    def log_probs(self) -> Tensor | None:
        """Log-probability of the predictions, in nats."""
        return self._optional("log_probs")

    @property
    def labels(self) -> list[Any] | None:
        """The column `label` or `labels`, where one was kept."""
        return self.columns.get("label", self.columns.get("labels"))

    @property
    def example_ids(self) -> list[str]:
        """The ids in order."""
        return self.columns[_ID]

    @property
    def content_hashes(self) -> list[str] | None:
        """Hashes of the encoded inputs, or None for rows made elsewhere."""
        return self.columns.get(_CONTENT)

    @property
    def fingerprint(self) -> str:
        """Of the sketch: rows of different fingerprints must never meet."""
        return str(self.info["fingerprint"])

    @property
    def sketch_error(self) -> float | None:
        """Relative error of off-diagonal inner products of PEFs, measured on the first examples."""
        return (self.info.get("selftest") or {}).get("sketch_error")

    @property
    def config(self) -> FisherConfig:
        """How the PEFs were made."""
        return FisherConfig.from_dict(self.info["fisher"])

    @property
    def dim(self) -> int:
        """The number d of numbers in a row."""
        return int(self._shards[0]["factors"].shape[-1])

    @property
    def rank(self) -> int:
        """The number c of rows an example has."""
        return int(self._shards[0]["factors"].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(s["factors"].numel() * s["factors"].element_size() for s in self._shards)

    def sketch(self) -> Sketch:
        """The sketch that made the rows, rebuilt.

        Raises:
            ValueError: if the rows were made elsewhere.
        """
        if self.info.get("sketch") is None:
            raise ValueError("these rows were made elsewhere; there is no sketch to rebuild")
        sketch = Sketch.from_dict(self.info["sketch"])
        if sketch.fingerprint != self.fingerprint:
            raise IncompatibleSketchError(
                f"the sketch in config.json has the fingerprint {sketch.fingerprint}, the rows have {self.fingerprint}"
            )
        return sketch

    def gram(self, i: int) -> Tensor:
        """F_i = AᵀA (d×d) of one example, unit norm: for curiosity and for tests.

        Raises:
            IndexError: if there is no such example.
        """
        row = self[i : i + 1].factors[0] if i != -1 else self[-1:].factors[0]
        row = row.to(torch.promote_types(row.dtype, torch.float32))
        return row.T @ row

    def __repr__(self) -> str:
        model = self.info.get("model") or "rows made elsewhere"
        return f"PEFs({len(self):,} examples × {self.rank} rows × {self.dim:,} numbers, {model})"

    # Parts of it

    def chunks(self, size: int) -> Iterator[PEFs]:
        """The examples in order, at most `size` at a time, without copying a shard."""
        if size < 1:
            raise ValueError(f"a chunk has at least one example, not {size}")
        start = 0
        for shard in self._shards:
            n = len(shard["norms"])
            for at in range(0, n, size):
                part = slice(at, min(at + size, n))
                here = slice(start + at, start + min(at + size, n))
                yield self._with({k: v[part] for k, v in shard.items()}, {k: v[here] for k, v in self.columns.items()})
            start += n

    def _with(self, tensors: Mapping[str, Tensor], columns: Mapping[str, Sequence[Any]]) -> PEFs:
        return PEFs(tensors, columns, self.info)

    @overload
    def __getitem__(self, which: slice) -> PEFs: ...

    @overload
    def __getitem__(self, which: Sequence[int] | Tensor) -> PEFs: ...

    def __getitem__(self, which: Any) -> PEFs:
        """PEFs of a slice, a list of indices or a boolean mask."""
        n = len(self)
        if isinstance(which, slice):
            indices = list(range(*which.indices(n)))
        elif isinstance(which, int):
            raise TypeError(
                f"pefs[{which}] is one example; pefs[{which}:{which + 1}] are PEFs, pefs.gram({which}) its matrix"
            )
        else:
            chosen = torch.as_tensor(which)
            if chosen.dtype == torch.bool:
                return self.filter(chosen)
            indices = [int(i) for i in chosen]
            if bad := [i for i in indices if not -n <= i < n]:
                raise IndexError(f"there are {n} examples; these do not exist: {bad[:10]}")
        indices = [i % n for i in indices]
        columns = {k: [v[i] for i in indices] for k, v in self.columns.items()}
        if isinstance(which, slice) and which.step in (None, 1):
            return PEFs({}, columns, self.info, self._between(*which.indices(n)[:2]))
        return self._with(
            {name: self._picked(name, torch.tensor(indices, dtype=torch.int64)) for name in self._shards[0]}, columns
        )

    def _between(self, start: int, stop: int) -> list[dict[str, Tensor]]:
        """The shards of a range of examples, without copying."""
        parts, at = [], 0
        for shard in self._shards:
            size = len(shard["norms"])
            part = slice(max(start - at, 0), max(min(stop - at, size), 0))
            if part.start < part.stop:
                parts.append({name: value[part] for name, value in shard.items()})
            at += size
        return parts or [{name: value[:0] for name, value in self._shards[0].items()}]

    def _picked(self, name: str, index: Tensor) -> Tensor:
        """One tensor of the chosen examples; shards that hold none of them are not read."""
        order = torch.argsort(index, stable=True)
        parts, at = [self._shards[0][name][:0]], 0
        for shard in self._shards:
            size = len(shard["norms"])
            here = index[order]
            here = here[(here >= at) & (here < at + size)] - at
            if len(here):
                parts.append(shard[name][here])
            at += size
        return padded_cat(parts, _FILL.get(name, 0))[torch.argsort(order)]

    def filter(self, mask: Sequence[bool] | Tensor) -> PEFs:
        """The examples where `mask` (n,) is true, in order.

        Raises:
            ValueError: if the mask is not n booleans.
        """
        chosen = torch.as_tensor(mask)
        if chosen.dtype != torch.bool or chosen.shape != (len(self),):
            raise ValueError(f"expected {len(self)} booleans, but got {chosen.dtype} of shape {tuple(chosen.shape)}")
        return self[chosen.nonzero()[:, 0]]

    @staticmethod
    def concatenate(parts: Sequence[PEFs]) -> PEFs:
        """One after the other.

        Raises:
            IncompatibleSketchError: if they were made with different sketches.
            ValueError: if there are none, or they hold different columns or numbers of rows.
        """
        if not parts:
            raise ValueError("nothing to concatenate")
        first = parts[0]
        for part in parts[1:]:
            check_same_sketch(first.fingerprint, part.fingerprint, "PEFs", "PEFs")
            if set(part.columns) != set(first.columns) or part.rank != first.rank:
                raise ValueError(
                    f"PEFs with the columns {sorted(first.columns)} and {first.rank} rows do not go with "
                    f"{sorted(part.columns)} and {part.rank} rows"
                )
        names = set.intersection(*(set(p._shards[0]) for p in parts))
        shards = [{name: s[name] for name in names} for p in parts for s in p._shards]
        columns = {k: [v for p in parts for v in p.columns[k]] for k in first.columns}
        return PEFs({}, columns, first.info, shards)

    # On disk

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a finished store (see the module); `load` reads it.

        Raises:
            ValueError: if the folder already holds a store.
        """
        folder = Path(directory)
        if (folder / "manifest.json").exists():
            raise ValueError(f"{folder} already holds PEFs; save to another folder")
        writer = StoreWriter(folder, self.info)
        start = 0
        for shard in self._shards:
            n = len(shard["norms"])
            writer.write_shard(start, shard, {k: v[start : start + n] for k, v in self.columns.items()})
            start += n
        writer.finish(start)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, verify: bool = True) -> PEFs:
        """Open a finished store; rows stay on disk until they are used.

        Args:
            directory: a folder written by `save` or by `NPEFFAnalyzer.compute_pefs`.
            verify: compare every shard's SHA-256 (reads the whole store once).

        Raises:
            CorruptStoreError: if the store is unfinished, or files are missing or altered.
            FormatVersionError: if it was written by another version of the format.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise CorruptStoreError(f"{folder} is not a folder of PEFs")
        info = read_json(folder / "config.json")
        manifest = read_json(folder / "manifest.json")
        if not manifest.get("finished"):
            raise CorruptStoreError(f"{folder} is not finished; run compute_pefs again with this output_dir to resume")
        try:
            FisherConfig.from_dict(info["fisher"])
            str(info["fingerprint"])
            entries = [(str(s["name"]), int(s["examples"])) for s in manifest["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptStoreError(f"{folder}: config.json or manifest.json is not a store's: {error!r}") from error
        if not entries:
            raise CorruptStoreError(f"{folder} holds no shard")
        shards, columns = [], []
        for entry in manifest["shards"]:
            tensors, kept = read_shard(folder, entry, verify=verify)
            shards.append(tensors)
            columns.append(kept)
        names = set(shards[0])
        if any(set(s) != names or s["factors"].shape[1:] != shards[0]["factors"].shape[1:] for s in shards):
            raise CorruptStoreError(f"{folder}: the shards hold different tensors")
        return cls({}, joined_columns(columns), info, shards)

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, datasets: Sequence[str] = (), license: str | None = None
    ) -> None:
        """Write a finished store as `save` does, and README.md, its card.

        Args:
            directory: made where it is missing.
            datasets: ids of the data sets that the examples are from, for the card.
            license: an identifier of the Hub such as "apache-2.0", for the card.

        Raises:
            ValueError: if the folder already holds a store, or the license or a data set's id is malformed.
        """
        card = pefs_card(self, datasets=datasets, license=license)
        self.save(directory)
        write_card(Path(directory), card)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
    ) -> PEFs:
        """Open a store in a folder or on the Hub, every checksum compared.

        Args:
            id_or_path: a folder, or a repository's id on the Hub.
            revision: branch, tag or commit.
            token: for private repositories; None takes the one of `hf auth login`.
            cache_dir: the Hub client's cache, where it is not the usual one.
            local_files_only: use the cache alone.
            subfolder: the folder within, with forward slashes.

        Raises:
            OSError: if there is no such folder, repository or revision, or the Hub cannot be reached.
            ValueError: if the id is malformed, or the subfolder leads out of the repository.
            CorruptStoreError: if the store is unfinished, or files are missing or altered.
            FormatVersionError: if it was not written by this version of the format.
        """
        folder = resolve_folder(
            id_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
            allow_patterns=("config.json", "manifest.json", "pefs-*", "README.md"),
        )
        pefs = cls.load(folder)
        pefs.commit = commit_of(folder)
        return pefs

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        include_texts: bool = False,
        datasets: Sequence[str] = (),
        license: str | None = None,
    ) -> str:
        """Publish the store as a model repository; it takes the place of PEFs that are there.

        Args:
            repo_id: user/name; made where it is missing.
            private: whether a new repository is private; True also refuses an existing public one.
            token: None takes the one of `hf auth login`.
            revision: the branch, made where it is missing.
            create_pr: open a pull request instead of committing.
            commit_message: the commit's title.
            include_texts: publish the columns that `hub.text_columns` counts as texts too. Rows are gradients, and tell
                something about their examples either way.
            datasets: ids of the data sets that the examples are from, for the card.
            license: an identifier of the Hub, for the card.

        Returns:
            The address of the commit or of the pull request.

        Raises:
            OSError: if the upload is refused or the Hub cannot be reached.
            ValueError: if the id, license or a data set's id is malformed, or a private repository is public.
        """
        texts = [] if include_texts else text_columns(self.columns)
        kept = {name: values for name, values in self.columns.items() if name not in texts}
        published = PEFs({}, kept, self.info, self._shards)
        model = self.info.get("model")
        if model is not None and not is_hub_id(model):
            logger.warning(
                "%s is made from the local model %s: nobody else can load that; publish it first", repo_id, model
            )
        card = pefs_card(published, repo_id=repo_id, left_out=texts, datasets=datasets, license=license)
        with tempfile.TemporaryDirectory() as folder:
            published.save(folder)
            write_card(Path(folder), card)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload PEFs",
                delete_patterns=["pefs-*"],
            )


def _as_list(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def normalise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, c, d) scaled to ‖AAᵀ‖_F = 1, and the norms before, float64 (n,). Zero stays zero."""
    scale = rows.abs().amax((1, 2)).double()
    safe = torch.where(scale > 0, scale, 1.0)
    A = (rows.double() / safe[:, None, None]) if rows.numel() < 2**22 else rows / safe[:, None, None].to(rows.dtype)
    gram = (A @ A.mT).double()
    norms = gram.flatten(1).norm(dim=1)
    unit = A / torch.where(norms > 0, norms, 1.0).sqrt()[:, None, None].to(A.dtype)
    return unit.to(rows.dtype), norms * scale**2


def check_same_sketch(a: str, b: str, first: str, second: str, remedy: str = "") -> None:
    """Refuse two fingerprints that differ.

    Raises:
        IncompatibleSketchError: if they do.
    """
    if a != b:
        raise IncompatibleSketchError(
            f"{first} with the sketch {a} and {second} with the sketch {b} cannot be used together: their numbers mean "
            f"different things. Compute them with the same model, target_modules, sketch and seed. {remedy}".rstrip()
        )


def read_shard(
    folder: Path, entry: Mapping[str, Any], *, verify: bool
) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """One shard of a store as the manifest describes it.

    Raises:
        CorruptStoreError: if a file is missing, altered or of another size.
    """
    name = str(entry.get("name", ""))
    if Path(name).name != name or not name.startswith("pefs-"):
        raise CorruptStoreError(f"{folder}: the manifest names a shard {name!r}")
    tensors_path, columns_path = folder / f"{name}.safetensors", folder / f"{name}.parquet"
    for path, key in ((tensors_path, "sha256"), (columns_path, "columns_sha256")):
        if not path.is_file():
            raise CorruptStoreError(f"{path} is missing")
        if verify and sha256_of(path) != entry.get(key):
            raise CorruptStoreError(f"{path} is not what was written: its SHA-256 differs from the manifest's")
    tensors = read_tensors(tensors_path)
    n = entry.get("examples")
    if (
        {"factors", "norms"} - set(tensors)
        or any(len(t) != n for t in tensors.values())
        or tensors["factors"].dim() != 3
    ):
        raise CorruptStoreError(f"{tensors_path} does not hold the {n} examples that the manifest names")
    try:
        columns = pq.read_table(columns_path, memory_map=False).to_pydict()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptStoreError(f"{columns_path} cannot be read: {error}") from error
    if any(len(v) != n for v in columns.values()) or _ID not in columns:
        raise CorruptStoreError(f"{columns_path} does not hold the {n} examples that the manifest names")
    return tensors, {k: plain_column(v) for k, v in columns.items()}


_JSON_MARK = "\x00json:"


def joined_columns(parts: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """The columns of one shard after another; None where a shard lacks a column that another has."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [v for part in parts for v in part.get(name, [None] * len(part[_ID]))] for name in names}


def column_array(values: Sequence[Any]) -> pa.Array:
    """A column for Parquet; values of mixed types are kept as JSON."""
    try:
        if any(isinstance(value, str) and value.startswith(_JSON_MARK) for value in values):
            raise TypeError("a text looks like the mark")
        return pa.array(list(values))
    except (pa.ArrowException, OverflowError, TypeError):  # mixed types in one column
        return pa.array([_JSON_MARK + json.dumps(value) for value in values])


def plain_column(values: list[Any]) -> list[Any]:
    """What `column_array` was given."""
    if values and all(isinstance(v, str) and v.startswith(_JSON_MARK) for v in values):
        return [json.loads(v[len(_JSON_MARK) :]) for v in values]
    return values


class StoreWriter:
    """Writes a store shard by shard; what it has written stays, and `done` tells what need not be done again.

    Several processes may write shards of one folder; one of them calls `finish`.

    Raises:
        IncompatibleSketchError: if the folder holds a store made with other settings; the differing field is named.
        CorruptStoreError: if the folder's config.json cannot be read.
        FormatVersionError: if it was written by another version of the format.
    """

    def __init__(self, folder: Path, info: Mapping[str, Any], *, write_info: bool = True):
        self.folder = folder
        self.info = dict(info)
        folder.mkdir(parents=True, exist_ok=True)
        existing = folder / "config.json"
        if existing.exists():
            self._check_same(read_json(existing))
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
                    f"{self.folder} holds PEFs made with another {name}: {old!r} there, {new!r} now. Use another "
                    "output_dir, or resume=False to begin again."
                )

    def _entry_path(self, start: int) -> Path:
        return self.folder / f"pefs-{start:05d}.json"

    def done(self) -> dict[int, int]:
        """{first example: examples} of the shards that are whole."""
        shards = {}
        for start, entry in self._entries().items():
            try:
                read_shard(self.folder, entry, verify=True)
                shards[start] = int(entry["examples"])
            except (CorruptStoreError, KeyError, TypeError, ValueError):
                continue  # not whole: written again
        return shards

    def _entries(self) -> dict[int, dict[str, Any]]:
        """{first example: entry}: what a finished store's manifest says, and over it what was written since."""
        found = []
        with contextlib.suppress(CorruptStoreError, FormatVersionError):
            shards = read_json(self.folder / "manifest.json").get("shards")
            found += shards if isinstance(shards, list) else []
        for path in self.folder.glob("pefs-*.json"):
            with contextlib.suppress(CorruptStoreError):
                found.append(read_json(path, None))
        return {e["start"]: e for e in found if isinstance(e, dict) and isinstance(e.get("start"), int)}

    def write_shard(self, start: int, tensors: Mapping[str, Tensor], columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the shard whose first example is number `start`."""
        name = f"pefs-{start:05d}"
        content = tensors_to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        table = pa.table({k: column_array(v) for k, v in columns.items()})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        kept = buffer.getvalue().to_pybytes()
        write_atomically(self.folder / f"{name}.safetensors", content)
        write_atomically(self.folder / f"{name}.parquet", kept)
        entry = {
            "name": name,
            "start": start,
            "examples": len(tensors["norms"]),
            "sha256": hashlib.sha256(content).hexdigest(),
            "columns_sha256": hashlib.sha256(kept).hexdigest(),
        }
        write_json(self._entry_path(start), entry)

    def finish(self, n: int, **facts: Any) -> None:
        """Write the manifest over the shards of all n examples.

        Raises:
            CorruptStoreError: if the shards do not cover the examples.
        """
        found = self._entries()
        entries, at = [], 0
        while at in found:
            entries.append(found.pop(at))
            at += entries[-1]["examples"]
        if at != n:
            raise CorruptStoreError(f"{self.folder}: the shards hold {at} of {n} examples without a gap")
        manifest = {"format_version": FORMAT_VERSION, "finished": True, "examples": n, "shards": entries, **facts}
        write_json(self.folder / "manifest.json", manifest)
        for start in (*found, *(entry["start"] for entry in entries)):
            self._entry_path(start).unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):  # left by a run that was killed
            path.unlink(missing_ok=True)
        for start in found:  # left by a run with another shard_size
            for suffix in ("safetensors", "parquet"):
                (self.folder / f"pefs-{start:05d}.{suffix}").unlink(missing_ok=True)
