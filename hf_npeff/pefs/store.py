"""PEFs: per-example Fishers as rows, with data on every example, in memory or memory-mapped from disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.encoding.record import Encoded, shown_columns, shown_texts
from hf_npeff.errors import IncompatibleSketchError
from hf_npeff.pefs.given_rows import given_rows
from hf_npeff.pefs.shards import ID, Shards, StoreWriter, read_store
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.weights_identity import joined
from hf_npeff.sharing.cards import pefs_card, write_card
from hf_npeff.sharing.hub import shown_model, text_columns
from hf_npeff.sharing.pretrained import Readable, warn_of_local_model
from hf_npeff.sharing.protocols import HasFingerprint


class PEFs(Readable):
    """The PEFs (per-example Fisher matrices) of n examples.

    Attributes:
        factors: (n, c, d), the rows A of every example, scaled so that ‖AᵀA‖_F = 1; a zero PEF stays zero.
        norms: (n,) float64, ‖AᵀA‖_F before scaling.
        cotangents: (n, c, t, s), the vectors that were sent back from the output to compute each row, before scaling,
            with t terms (positions) for each example, and s the hidden size or the number of logits. None for rows that
            were not made by hf_npeff.
        predictions: the predicted classes (n,), those of several terms (n, t) (−1 for missing terms), or predicted
            labels or values (n, k).
        log_probs: (n,) or (n, t), log-probabilities of the predictions, in nats.
        entropies: (n,) or (n, t), entropies of the output distributions, in nats, if they have one.
        example_ids: the ids of the examples, n strings.
        columns: {name: list of n values} stored with the rows.
        info: the content of config.json: model, commit, config, versions and sketch.
        sketch_error: measured relative error of inner products of PEFs, or None if it was not measured.
        commit: the commit of the Hub repository that they were read from, or None.

    Example:
        >>> pefs.factors.shape == (len(pefs), pefs.rank, pefs.dim)
        True
        >>> sure = pefs.filter(pefs.log_probs > pefs.log_probs.median())
        >>> sure.save("runs/sure")
        >>> [len(chunk) for chunk in PEFs.load("runs/sure").chunks(8)]
        [8, 4]
        >>> places = [place for place, _ in pefs[:5].placed_chunks(2)]
        >>> places == [slice(0, 2), slice(2, 4), slice(4, 5)]
        True
        >>> both = PEFs.concatenate([pefs[:4], pefs[[7, 5]]])
        >>> both.save_pretrained("runs/both", datasets=["org/data"])
        >>> rows = PEFs.from_factors(torch.randn(20, 2, 8), label=[0, 1] * 10)
        >>> rows.gram(0).shape
        torch.Size([8, 8])
        >>> pefs.sketch().fingerprint == pefs.fingerprint
        True
    """

    _KIND = "PEFs"
    _FILES = ("config.json", "manifest.json", "pefs-*", "README.md")
    _REPLACED = ("pefs-*",)

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        columns: Mapping[str, Sequence[Any]],
        info: Mapping[str, Any],
        shards: Sequence[Mapping[str, Tensor]] | None = None,
    ):
        self._shards = Shards([tensors] if shards is None else shards)
        self.columns = {name: list(values) for name, values in columns.items()}
        self.info: dict[str, Any] = dict(info)

    @classmethod
    def from_factors(cls, factors: Tensor, *, fingerprint: str | None = None, **columns: Any) -> PEFs:
        """PEFs from your own rows.

        Args:
            factors: (n, c, d), or (n, d) for one row in each example; they are scaled to unit Frobenius norm.
            fingerprint: PEFs can only be used together if their fingerprints are equal; by default a hash of d, so that
                any rows of the same length can.
            **columns: lists of n values by name; `example_ids` and `labels` may be among them.

        Raises:
            ValueError: if the rows are not finite numbers of shape (n, c, d), a column has another length, or two
                examples have one id.
        """
        return cls(*given_rows(torch.as_tensor(factors), fingerprint, columns))

    # What is in it

    def __len__(self) -> int:
        return len(self._shards)

    def _optional(self, name: str) -> Tensor | None:
        return self._shards[name] if name in self._shards.names else None

    @property
    def factors(self) -> Tensor:
        """(n, c, d) rows of unit norm; the memory map itself if there is one shard, otherwise joined in memory."""
        return self._shards["factors"]

    @property
    def norms(self) -> Tensor:
        """(n,) Frobenius norms before scaling."""
        return self._shards["norms"]

    @property
    def cotangents(self) -> Tensor | None:
        """(n, c, t, s), or None for rows that were not made by hf_npeff."""
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
    def entropies(self) -> Tensor | None:
        """Entropies of the output distributions, in nats."""
        return self._optional("entropies")

    @property
    def labels(self) -> list[Any] | None:
        """The column that was read as labels, otherwise `label` or `labels`, if one was kept."""
        record = Encoded.of(self.info)
        if record is not None and record.label_column in self.columns:
            return self.columns[record.label_column]
        return self.columns.get("label", self.columns.get("labels"))

    @property
    def text_column(self) -> str | None:
        """The column with the text of an example, or None; for a pair the first column."""
        return next(iter(shown_columns(self.columns, self.info)), None)

    @property
    def texts(self) -> list[str] | None:
        """The text of each example; the texts of a pair have " | " between them. None if no texts were kept."""
        return shown_texts(self.columns, self.info)

    @property
    def example_ids(self) -> list[str]:
        """The ids in order."""
        return self.columns[ID]

    @property
    def content_hashes(self) -> list[str] | None:
        """Hashes of the encoded inputs, or None for rows that were not made by hf_npeff."""
        return self.columns.get("content_hash")

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the sketch; rows with different fingerprints cannot be used together."""
        return str(self.info["fingerprint"])

    @property
    def sketch_error(self) -> float | None:
        """Relative error of off-diagonal inner products of PEFs, measured on the first examples."""
        return (self.info.get("selftest") or {}).get("sketch_error")

    @property
    def config(self) -> FisherConfig:
        """The Fisher config of the PEFs."""
        return FisherConfig.from_dict(self.info["fisher"])

    @property
    def dim(self) -> int:
        """The number d of numbers in a row."""
        return int(self._shards.parts[0]["factors"].shape[-1])

    @property
    def rank(self) -> int:
        """The number c of rows an example has."""
        return int(self._shards.parts[0]["factors"].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * self.rank * self.dim * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self._shards.parts[0]["factors"].dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self._shards.parts[0]["factors"].device

    def sketch(self) -> Sketch:
        """The sketch that made the rows, rebuilt.

        Raises:
            ValueError: if the rows were not made by hf_npeff.
        """
        if self.info.get("sketch") is None:
            raise ValueError("these rows were not made by hf_npeff, so there is no sketch to rebuild")
        sketch = Sketch.from_dict(self.info["sketch"])
        if sketch.fingerprint != self.fingerprint:
            raise IncompatibleSketchError(
                f"the sketch in config.json has the fingerprint {sketch.fingerprint}, but the rows have "
                f"{self.fingerprint}"
            )
        return sketch

    def gram(self, i: int) -> Tensor:
        """F_i = AᵀA (d×d) of one example, of unit norm; only for small d.

        Raises:
            IndexError: if there is no such example.
        """
        row = self[i : i + 1].factors[0] if i != -1 else self[-1:].factors[0]
        row = row.to(torch.promote_types(row.dtype, torch.float32))
        return row.T @ row

    def __repr__(self) -> str:
        model = shown_model(self.info["model"]) if self.info.get("model") else "rows not made by hf_npeff"
        return f"PEFs({len(self):,} examples × {self.rank} rows × {self.dim:,} numbers, {model})"

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_pefs

        return of_pefs(self)

    # Parts of it

    def chunks(self, size: int) -> Iterator[PEFs]:
        """The examples in order, at most `size` at a time, without copying a shard."""
        return (chunk for _, chunk in self.placed_chunks(size))

    def placed_chunks(self, size: int) -> Iterator[tuple[slice, PEFs]]:
        """`chunks`, each with its place, a slice of the examples.

        Raises:
            ValueError: if `size` is less than 1.
        """
        if size < 1:
            raise ValueError(f"a chunk needs at least one example, but its size is {size}")
        for place, tensors in self._shards.pieces(size):
            yield place, PEFs(tensors, {name: values[place] for name, values in self.columns.items()}, self.info)

    @overload
    def __getitem__(self, which: slice) -> PEFs: ...

    @overload
    def __getitem__(self, which: Sequence[int] | Tensor) -> PEFs: ...

    def __getitem__(self, which: Any) -> PEFs:
        """PEFs of a slice, a list of indices or a boolean mask.

        Raises:
            IndexError: if an example does not exist.
            TypeError: if it is one index, or numbers that are not whole.
            ValueError: if a mask has another length.
        """
        n = len(self)
        if isinstance(which, slice):
            indices = list(range(*which.indices(n)))
        elif isinstance(which, int):
            raise TypeError(
                f"pefs[{which}] would be a single example; use pefs[{which}:{which + 1}] for PEFs, or "
                f"pefs.gram({which}) for its matrix"
            )
        else:
            chosen = torch.as_tensor(which)
            if chosen.dtype == torch.bool:
                return self.filter(chosen)
            if len(chosen) and chosen.dtype.is_floating_point:  # perhaps a mask, whose 0 and 1 are examples too
                raise TypeError(f"expected whole numbers, a slice or booleans for a mask, but got {chosen.dtype}")
            indices = [int(i) for i in chosen]
            if bad := [i for i in indices if not -n <= i < n]:
                raise IndexError(f"there are {n} examples; these do not exist: {bad[:10]}")
        indices = [i % n for i in indices]
        columns = {k: [v[i] for i in indices] for k, v in self.columns.items()}
        if isinstance(which, slice) and which.step in (None, 1):
            return PEFs({}, columns, self.info, self._shards.between(*which.indices(n)[:2]))
        index = torch.tensor(indices, dtype=torch.int64)
        return PEFs({name: self._shards.picked(name, index) for name in self._shards.names}, columns, self.info)

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
        """Join PEFs one after another; warns if they are of models with different weights.

        Raises:
            IncompatibleSketchError: if they were made with different sketches.
            ValueError: if there are none, or they have different columns or numbers of rows.
        """
        if not parts:
            raise ValueError("nothing to concatenate")
        first = parts[0]
        for part in parts[1:]:
            check_same_sketch(first, part, "PEFs")
            if set(part.columns) != set(first.columns) or part.rank != first.rank:
                raise ValueError(
                    f"PEFs with the columns {sorted(first.columns)} and {first.rank} rows cannot be joined with PEFs "
                    f"with the columns {sorted(part.columns)} and {part.rank} rows"
                )
        names = set.intersection(*(set(p._shards.names) for p in parts))
        shards = [{name: s[name] for name in names} for p in parts for s in p._shards.parts]
        columns = {k: [v for p in parts for v in p.columns[k]] for k in first.columns}
        weights = joined([part.info.get("weights") for part in parts])
        skipped: list[Any] = []  # parts of one store name the same ones
        for entry in (entry for part in parts for entry in part.info.get("skipped", ())):
            if entry not in skipped:
                skipped.append(entry)
        own = {"weights": weights, "skipped": skipped}
        return PEFs({}, columns, {**first.info, **{name: value for name, value in own.items() if value}}, shards)

    # On disk

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a finished store (see `hf_npeff.pefs.shards`); `load` reads it.

        Raises:
            ValueError: if the folder already holds a store.
        """
        folder = _without_store(Path(directory))
        writer = StoreWriter(folder, {name: value for name, value in self.info.items() if name != "skipped"})
        start = 0
        for tensors, n in zip(self._shards.parts, self._shards.sizes, strict=True):
            writer.write_shard(start, tensors, {name: v[start : start + n] for name, v in self.columns.items()})
            start += n
        writer.finish(len(self), self.info.get("skipped", ()))

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
        info, shards, columns = read_store(Path(directory), verify=verify)
        return cls({}, columns, info, shards)

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, datasets: Sequence[str] = (), license: str | None = None
    ) -> None:
        """Write a finished store as `save` does, and README.md, its card.

        Args:
            directory: the folder; it is created if it is missing.
            datasets: ids of the data sets that the examples are from, for the card.
            license: an identifier of the Hub such as "apache-2.0", for the card.

        Raises:
            ValueError: if the folder already holds a store, or the license or a data set's id is malformed.
        """
        card = pefs_card(self, datasets=datasets, license=license)
        folder = _without_store(Path(directory))
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, card)
        self.save(folder)

    def _publish(
        self,
        folder: Path,
        repo_id: str,
        *,
        include_texts: bool = False,
        datasets: Sequence[str] = (),
        license: str | None = None,
    ) -> None:
        """Upload the PEFs. Rows are gradients, and say something about their examples in any case."""
        texts = [] if include_texts else text_columns(self.columns, self.info)
        kept = {name: values for name, values in self.columns.items() if name not in texts}
        published = PEFs({}, kept, self.info, self._shards.parts)
        warn_of_local_model(repo_id, self.info.get("model"))
        card = pefs_card(published, repo_id=repo_id, left_out=texts, datasets=datasets, license=license)
        published.save(folder)
        write_card(folder, card)


def _without_store(folder: Path) -> Path:
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} already holds PEFs; save to another folder")
    return folder


def check_pefs(value: object) -> None:
    """Check that a value is PEFs.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, PEFs):
        raise ValueError(
            f"expected PEFs, but got {type(value).__name__}; PEFs.from_factors makes them from rows (n, c, d)"
        )


def check_same_sketch(made: HasFingerprint, pefs: PEFs, what: str = "the decomposition", remedy: str = "") -> None:
    """Check that PEFs have the same sketch as `made`, which the message calls `what`.

    Raises:
        IncompatibleSketchError: if they have another sketch.
        ValueError: if they are not PEFs.
    """
    check_pefs(pefs)
    if made.fingerprint != pefs.fingerprint:
        raise IncompatibleSketchError(
            f"{what} with the sketch {made.fingerprint} and PEFs with the sketch {pefs.fingerprint} cannot be used "
            "together, because their numbers mean different things. Compute them with the same model, target_modules, "
            f"sketch and seed. {remedy}".rstrip()
        )
