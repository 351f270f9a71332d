"""What a decomposition found: a Decomposition, and the Component that a person looks at."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from hf_npeff.cards import decomposition_card, write_card
from hf_npeff.config import DecompositionConfig, FisherConfig
from hf_npeff.decomposition.objective import alignments, energies, module_scales, nonnegative_coefficients, overlaps
from hf_npeff.errors import CorruptStoreError, FormatVersionError
from hf_npeff.files import FORMAT_VERSION, json_bytes, read_json, read_tensors, sha256_of, write_atomically
from hf_npeff.hub import commit_of, is_hub_id, push_folder, resolve_folder, text_columns
from hf_npeff.store import PEFs, check_same_sketch, column_array, normalise, plain_column

logger = logging.getLogger(__name__)

ACTIVE_SHARE = 0.05
"""A component is active on an example when it carries at least this share of its coefficients' sum."""
_TENSORS = ("coefficients", "pseudo_fishers", "stability")
_FILES = ("config.json", "decomposition.safetensors", "examples.parquet", "README.md")


@dataclass(frozen=True)
class TopExamples:
    """The examples with a component's largest coefficients, descending.

    Attributes:
        indices: positions among the analysed examples.
        coefficients: W of each.
        ids: their ids.
        texts: their text, where a text column was kept, else None.
        columns: {name: values} of everything kept.
    """

    indices: list[int]
    coefficients: list[float]
    ids: list[str]
    texts: list[str] | None
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(len(self)):
            row = {name: values[i] for name, values in self.columns.items()}
            yield {"index": self.indices[i], "coefficient": self.coefficients[i], "id": self.ids[i], **row}


class Component:
    """One component: a pseudo-Fisher vector and the examples that it explains."""

    def __init__(self, decomposition: Decomposition, index: int):
        self._decomposition = decomposition
        self.index = index

    @property
    def name(self) -> str | None:
        """What a person called it, or None."""
        return self._decomposition.names.get(self.index)

    @property
    def label(self) -> str:
        """Its name, or its number."""
        return self.name or f"component {self.index}"

    @property
    def coefficients(self) -> Tensor:
        """(n,) W of every example."""
        return self._decomposition.coefficients[:, self.index]

    @property
    def pseudo_fisher(self) -> Tensor:
        """(d,) unit g."""
        return self._decomposition.pseudo_fishers[self.index]

    @property
    def stability(self) -> float:
        """Mean best |cosine| with the components of other restarts of near-equal loss; NaN with one restart."""
        return float(self._decomposition.stability[self.index])

    @property
    def active_share(self) -> float:
        """Share of the examples on which it is active."""
        W = self._decomposition.coefficients
        total = W.sum(1)
        return float(((self.coefficients > ACTIVE_SHARE * total) & (total > 0)).float().mean())

    def top_examples(self, k: int = 10) -> TopExamples:
        """The k examples with the largest coefficients.

        Raises:
            ValueError: if k is less than 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, but it is {k}")
        decomposition = self._decomposition
        values, order = torch.sort(self.coefficients, descending=True, stable=True)
        indices = order[:k].tolist()
        columns = {name: [v[i] for i in indices] for name, v in decomposition.columns.items()}
        column = decomposition.text_column
        return TopExamples(
            indices,
            values[:k].tolist(),
            [decomposition.example_ids[i] for i in indices],
            None if column is None else columns[column],
            columns,
        )

    def __repr__(self) -> str:
        facts = f"active on {self.active_share:.0%}, stability {self.stability:.2f}"
        return f"Component({self.index}, {self.label!r}, {facts})"


class Decomposition:
    """PEFs as non-negative combinations of rank-1 components: F_i ≈ Σ_j W_ij g_j g_jᵀ.

    Attributes:
        coefficients: W (n, r), float32, for PEFs of unit norm.
        pseudo_fishers: G (r, d), unit rows (of the balanced problem where `config.balance` is "module").
        stability: (r,), mean best |cosine| with the other restarts of near-equal loss; NaN with a single restart.
        loss_history: relative loss of the best restart, after its start and after every iteration.
        config: how it was made.
        example_ids: n strings.
        columns: {name: list of n values} kept beside the PEFs.
        names: {component: name} given by people.
        info: model, commit, sketch and Fisher config of the PEFs.
        scales: (d,) what balanced rows were multiplied with, or None.
        converged: whether the solver stopped before its iteration limit.
        evaluations: {component: measured perturbation}, filled by `NPEFFAnalyzer.evaluate_components`.
        commit: of the Hub repository that it was read from, or None.
    """

    def __init__(
        self,
        coefficients: Tensor,
        pseudo_fishers: Tensor,
        *,
        config: DecompositionConfig,
        info: Mapping[str, Any],
        example_ids: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        stability: Tensor | None = None,
        loss_history: Sequence[float] = (),
        scales: Tensor | None = None,
        converged: bool = True,
        names: Mapping[int, str] | None = None,
        evaluations: Mapping[int, Mapping[str, Any]] | None = None,
    ):
        self.coefficients = coefficients
        self.pseudo_fishers = pseudo_fishers
        self.stability = torch.full((len(pseudo_fishers),), float("nan")) if stability is None else stability
        self.loss_history = [float(x) for x in loss_history]
        self.config = config
        self.info = dict(info)
        self.example_ids = list(example_ids)
        self.columns = {name: list(values) for name, values in (columns or {}).items()}
        self.scales = scales
        self.converged = converged
        self.names: dict[int, str] = dict(names or {})
        self.evaluations: dict[int, dict[str, Any]] = {int(j): dict(e) for j, e in (evaluations or {}).items()}
        self.commit: str | None = None

    @property
    def explained(self) -> float:
        """1 − relative loss: the share of Σ‖F_i‖² that the components explain."""
        return 1 - self.loss_history[-1] if self.loss_history else float("nan")

    @property
    def fingerprint(self) -> str:
        """Of the sketch of the PEFs."""
        return str(self.info["fingerprint"])

    @property
    def fisher_config(self) -> FisherConfig:
        """How the PEFs were made."""
        return FisherConfig.from_dict(self.info["fisher"])

    @property
    def text_column(self) -> str | None:
        """The column that shows an example to a person: "text" or another text column, or None."""
        for name in ("text", "prompt", "sentence", "premise", "question", "content"):
            if name in self.columns:
                return name
        return None

    def __len__(self) -> int:
        return len(self.pseudo_fishers)

    def __getitem__(self, j: int) -> Component:
        """Component j.

        Raises:
            IndexError: if it does not exist.
        """
        return Component(self, self.index_of(j))

    def __iter__(self) -> Iterator[Component]:
        return (Component(self, j) for j in range(len(self)))

    def index_of(self, j: int) -> int:
        """Component j as a number from 0 to r − 1; negative ones count from the end.

        Raises:
            IndexError: if there is no such component.
            TypeError: if j is not a whole number.
        """
        if isinstance(j, bool) or not hasattr(j, "__index__"):
            raise TypeError(f"components are numbered; expected an integer, but got {j!r}")
        j = int(j)
        if not -len(self) <= j < len(self):
            raise IndexError(f"there are {len(self)} components, numbered from 0; {j} does not exist")
        return j % len(self)

    def rename(self, j: int, name: str | None) -> None:
        """Give component j a name, or take it away with None.

        Raises:
            IndexError: if there is no such component.
            ValueError: if the name is empty or is not text.
        """
        j = self.index_of(j)
        if name is None:
            self.names.pop(j, None)
            return
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a name must be text, but it is {name!r}")
        self.names[j] = name.strip()

    def transform(self, pefs: PEFs) -> Tensor:
        """W (n′, r) of PEFs, G fixed: what these components explain of other examples.

        Warns where the PEFs are of another commit of the model.

        Args:
            pefs: made with the same sketch of the same model: `analyzer.compute_pefs(dataset, like=decomposition)`.

        Raises:
            IncompatibleSketchError: if they were made with another sketch.
        """
        check_same_sketch(
            self.fingerprint,
            pefs.fingerprint,
            "the decomposition",
            "PEFs",
            "analyzer.compute_pefs(dataset, like=decomposition) does, and so does an analyzer that is made with "
            "fisher=decomposition.fisher_config.",
        )
        ours, theirs = self.info.get("revision"), pefs.info.get("revision")
        if self.info.get("model") == pefs.info.get("model") and None not in (ours, theirs) and ours != theirs:
            logger.warning(
                "the decomposition was made from %s at commit %s, and these PEFs at commit %s: the weights may differ; "
                "load the model with revision=%r",
                self.info.get("model"),
                ours,
                theirs,
                ours,
            )
        H = overlaps(self.pseudo_fishers.double())
        parts = []
        for chunk in pefs.chunks(1024):
            A = balanced(chunk.factors, self.scales, self.config.power)
            N = energies(alignments(A, self.pseudo_fishers.to(A.dtype)))
            parts.append(nonnegative_coefficients(N, H).to(self.coefficients.dtype))
        return torch.cat(parts) if parts else self.coefficients.new_zeros(0, len(self))

    def __repr__(self) -> str:
        return (
            f"Decomposition({len(self)} components of {len(self.example_ids):,} examples, "
            f"{self.explained:.1%} explained, {self.info.get('model') or 'rows made elsewhere'})"
        )

    # On disk

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        include_columns: bool | Sequence[str] = True,
        datasets: Sequence[str] = (),
        license: str | None = None,
    ) -> None:
        """Write config.json, decomposition.safetensors, examples.parquet and README.md, the model card.

        A README.md that is not a card of hf_npeff stays as it is.

        Args:
            directory: made where it is missing.
            include_columns: which columns go into examples.parquet beside the ids: texts may be private.
            datasets: ids of the data sets that the examples are from, for the card.
            license: an identifier of the Hub such as "apache-2.0", for the card.

        Raises:
            ValueError: if a column does not exist, or the license or a data set's id is malformed.
        """
        self._save(Path(directory), include_columns, None, datasets, license)

    def _save(
        self,
        folder: Path,
        include_columns: bool | Sequence[str],
        repo_id: str | None,
        datasets: Sequence[str],
        license: str | None,
    ) -> None:
        """Make every file's content, then write them, config.json with the checksums last."""
        names = list(self.columns) if include_columns is True else list(include_columns or ())
        if missing := sorted(set(names) - set(self.columns)):
            raise ValueError(f"the columns {missing} do not exist; there are {sorted(self.columns)}")
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        if self.scales is not None:
            tensors["scales"] = self.scales.contiguous()
        table = pa.table({"example_id": self.example_ids, **{name: column_array(self.columns[name]) for name in names}})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        contents = {
            "decomposition.safetensors": tensors_to_bytes(tensors),
            "examples.parquet": buffer.getvalue().to_pybytes(),
        }
        config = {
            "format_version": FORMAT_VERSION,
            "library_name": "hf_npeff",
            "n_components": len(self),
            "n_examples": len(self.example_ids),
            "decomposition": self.config.to_dict(),
            "pefs": self.info,
            "loss_history": self.loss_history,
            "converged": self.converged,
            "names": {str(j): name for j, name in sorted(self.names.items())},
            "evaluations": {str(j): e for j, e in sorted(self.evaluations.items())},
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        }
        contents["config.json"] = json_bytes(config)
        card = decomposition_card(self, repo_id=repo_id, columns=names, datasets=datasets, license=license)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, card)
        for name, content in contents.items():
            write_atomically(folder / name, content)

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
        """Publish the files of `save_pretrained` as a model repository.

        Args:
            repo_id: user/name; made where it is missing.
            private: whether a new repository is private; True also refuses an existing public one.
            token: None takes the one of `hf auth login`.
            revision: the branch, made where it is missing.
            create_pr: open a pull request instead of committing.
            commit_message: the commit's title.
            include_texts: publish the columns that `hub.text_columns` counts as texts too. Without them, ids, labels,
                predictions and numbers go along, and the card says what was left out.
            datasets: ids of the data sets that the examples are from, for the card.
            license: an identifier of the Hub, for the card.

        Returns:
            The address of the commit or of the pull request.

        Raises:
            OSError: if the upload is refused or the Hub cannot be reached.
            ValueError: if the id, license or a data set's id is malformed, or a private repository is public.
        """
        texts = () if include_texts else text_columns(self.columns)
        kept = [name for name in self.columns if name not in texts]
        model = self.info.get("model")
        if model is not None and not is_hub_id(model):
            logger.warning(
                "%s is made from the local model %s: nobody else can load that; publish it first", repo_id, model
            )
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), kept, repo_id, datasets, license)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload decomposition",
            )

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Decomposition:
        """Read what `save_pretrained` wrote.

        Raises:
            CorruptStoreError: if files are missing, altered, or do not fit together.
            FormatVersionError: if they were written by another version of the format.
        """
        folder = Path(directory)
        config = read_json(folder / "config.json")
        try:
            sums = {str(k): str(v) for k, v in config["files"].items()}
            n, r = int(config["n_examples"]), int(config["n_components"])
            settings = DecompositionConfig.from_dict(config["decomposition"])
            info = dict(config["pefs"])
            str(info["fingerprint"])
            FisherConfig.from_dict(info["fisher"])
            losses = [float(x) for x in config["loss_history"]]
            names = {int(j): str(name) for j, name in config["names"].items()}
            evaluations = {int(j): dict(e) for j, e in config["evaluations"].items()}
            converged = bool(config["converged"])
        except FormatVersionError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptStoreError(f"{folder / 'config.json'} is not a decomposition's: {error!r}") from error
        for name in ("decomposition.safetensors", "examples.parquet"):
            if not (folder / name).is_file():
                raise CorruptStoreError(f"{folder / name} is missing")
            if sha256_of(folder / name) != sums.get(name):
                raise CorruptStoreError(
                    f"{folder / name} is not what was written: its SHA-256 differs from config.json's"
                )
        tensors = read_tensors(folder / "decomposition.safetensors")
        if set(_TENSORS) - set(tensors):
            raise CorruptStoreError(f"{folder}: tensors are missing: {sorted(set(_TENSORS) - set(tensors))}")
        G = tensors["pseudo_fishers"]
        expected = {"coefficients": (n, r), "pseudo_fishers": (r, *G.shape[1:]), "stability": (r,)}
        if "scales" in tensors:
            expected["scales"] = G.shape[1:]
        wrong = {name: tuple(tensors[name].shape) for name, s in expected.items() if tuple(tensors[name].shape) != s}
        if wrong or G.dim() != 2 or any(not 0 <= j < r for j in (*names, *evaluations)):
            raise CorruptStoreError(f"{folder}: expected the shapes {expected}, but found {wrong or tuple(G.shape)}")
        try:
            columns = pq.read_table(folder / "examples.parquet").to_pydict()
            ids = [str(i) for i in columns.pop("example_id")]
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise CorruptStoreError(f"{folder / 'examples.parquet'} cannot be read: {error!r}") from error
        if len(ids) != n:
            raise CorruptStoreError(f"{folder}: examples.parquet holds {len(ids)} examples, config.json says {n}")
        return cls(
            tensors["coefficients"],
            G,
            config=settings,
            info=info,
            example_ids=ids,
            columns={name: plain_column(values) for name, values in columns.items()},
            stability=tensors["stability"],
            loss_history=losses,
            scales=tensors.get("scales"),
            converged=converged,
            names=names,
            evaluations=evaluations,
        )

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
    ) -> Decomposition:
        """Read what `save_pretrained` or `push_to_hub` wrote.

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
            CorruptStoreError: if files are missing, altered, or do not fit together.
            FormatVersionError: if they were not written by this version of the format.
        """
        folder = resolve_folder(
            id_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
            allow_patterns=_FILES,
        )
        decomposition = cls.load(folder)
        decomposition.commit = commit_of(folder)
        return decomposition


def mixing_of(A: Tensor, scales: Tensor | None, power: float = 1.0) -> Tensor:
    """T (n, c, c), float64: T (A∘D) are the rows that are decomposed, of F^γ at unit Frobenius norm.

    With K = (A∘D)(A∘D)ᵀ = UΛUᵀ and F = (A∘D)ᵀ(A∘D), the rows UΛ^((γ−1)/2)Uᵀ (A∘D) have the matrix power F^γ as their
    Gram matrix, whatever rotation of the rows was stored. Eigenvalues below rounding are left out.
    """
    scaled = A if scales is None else A * scales.to(A.dtype)
    scale = scaled.abs().amax((1, 2), keepdim=True).double()
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = scaled / scale.to(A.dtype)
    K = (scaled @ scaled.mT).double()
    if power == 1:
        norm = K.flatten(1).norm(dim=1)
        unit = torch.eye(A.shape[1], dtype=torch.float64, device=A.device)
        return unit / torch.where(norm > 0, norm, 1.0).sqrt()[:, None, None] / scale
    values, U = torch.linalg.eigh((K + K.mT) / 2)
    kept = values > values[:, -1:] * 1e-6
    safe = torch.where(kept, values, 1.0)
    norm = torch.where(kept, safe.pow(2 * power), 0.0).sum(1).sqrt()
    factors = torch.where(kept, safe.pow((power - 1) / 2), 0.0) / torch.where(norm > 0, norm, 1.0).sqrt()[:, None]
    return (U * factors[:, None]) @ U.mT / scale


def balanced(A: Tensor, scales: Tensor | None, power: float = 1.0) -> Tensor:
    """The rows (n, c, d) that are decomposed, in float32 or wider: A∘D, of the power γ of their PEF, at unit norm."""
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    if power != 1:
        scaled = A if scales is None else A * scales.to(A.dtype)
        return mixing_of(A, scales, power).to(A.dtype) @ scaled
    return A if scales is None else normalise(A * scales.to(A.dtype))[0]


def balance_scales(pefs: PEFs) -> Tensor:
    """(d,) D that divides every module's block by the square root of its mean PEF norm over the examples.

    The block's own PEF is A_bᵀA_b of the unscaled rows; zero blocks keep scale 0. D is scaled so that its largest entry
    over the modules is 1, since only ratios matter.

    Raises:
        ValueError: if the modules share one row of numbers, so that they cannot be told apart.
    """
    blocks = pefs.sketch().blocks if pefs.info.get("sketch") is not None else None
    if blocks is None:
        raise ValueError(
            "balance='module' needs a block of numbers for every module; compute the PEFs with sketch='kronecker' or "
            "'identity' (a countsketch adds the modules up), or use balance='none'"
        )
    order = list(blocks.values())
    total = torch.zeros(len(order), dtype=torch.float64)
    n = 0
    for chunk in pefs.chunks(256):
        A = chunk.factors.to(torch.promote_types(chunk.factors.dtype, torch.float32))
        total += module_scales(A, order, chunk.norms) * len(chunk)
        n += len(chunk)
    mean = total / n
    scale = torch.where(mean > 0, mean.clamp_min(torch.finfo(torch.float64).tiny) ** -0.5, 0.0)
    scale = scale / scale.max().clamp_min(torch.finfo(torch.float64).tiny)
    D = torch.zeros(pefs.dim)
    for value, block in zip(scale.tolist(), order, strict=True):
        D[block] = value
    return D
