"""The result of a decomposition: a `Decomposition` of components."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hf_npeff.config import AssociationRequest, DecompositionConfig, FisherConfig
from hf_npeff.decomposition.associations import Associations, associate
from hf_npeff.decomposition.component import Component
from hf_npeff.decomposition.folder import EXAMPLES, TENSORS, contents_of, read_folder, read_names
from hf_npeff.decomposition.objective import alignments, energies, nonnegative_coefficients, overlaps
from hf_npeff.decomposition.weighting import balanced
from hf_npeff.encoding.record import Encoded, shown_columns, shown_texts
from hf_npeff.pefs.store import PEFs, check_same_sketch
from hf_npeff.pefs.weights_identity import difference, warn_of_other_predictions, warn_of_other_weights
from hf_npeff.sharing.cards import decomposition_card, write_card
from hf_npeff.sharing.files import write_together
from hf_npeff.sharing.hub import shown_model, text_columns
from hf_npeff.sharing.pretrained import Readable, warn_of_local_model
from hf_npeff.sharing.protocols import HasDict, ReportLike, TokenAlignmentLike

logger = logging.getLogger(__name__)
_CHUNK = 1024
"""Examples whose rows are weighted at a time. Chosen: a few hundred MB at d = 65,536; no number depends on it."""


class Decomposition(Readable):
    """PEFs as non-negative combinations of rank-1 components: F_i ≈ Σ_j W_ij g_j g_jᵀ.

    Attributes:
        coefficients: W (n, r), float32, for PEFs of unit norm.
        pseudo_fishers: G (r, d), unit rows (of the balanced problem where `config.balance` is "module").
        stability: (r,), for each component the mean of its best |cosine| in other restarts with nearly the same loss;
            NaN with a single restart.
        loss_history: relative loss of the best restart, after its start and after every iteration.
        config: the settings of the decomposition.
        example_ids: the ids of the n examples.
        columns: {name: list of n values} stored with the PEFs.
        names: {component: name} given by people.
        info: model, commit, sketch and Fisher config of the PEFs.
        scales: (d,) the factors of balanced rows, or None.
        converged: whether the solver stopped before its iteration limit.
        evaluations: {component: measured perturbation}, filled by `NPEFFAnalyzer.evaluate_components`.
        commit: the commit of the Hub repository that it was read from, or None.

    Example:
        >>> decomposition.coefficients.shape, len(decomposition)
        (torch.Size([24, 3]), 3)
        >>> decomposition.rename(-1, "animals")
        >>> decomposition[decomposition.index_of(-1)].label
        'animals'
        >>> W, N = decomposition.explain(pefs)
        >>> torch.equal(decomposition.transform(pefs), W)
        True
        >>> associations = decomposition.associations()
        >>> path = decomposition.to_html("runs/page.html", layout="pca")
        >>> decomposition.save_pretrained("runs/decomposition", license="apache-2.0")
        >>> Decomposition.load("runs/decomposition").names
        {2: 'animals'}
    """

    _KIND = "decomposition"
    _FILES = ("config.json", TENSORS, EXAMPLES, "README.md")

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

    @property
    def explained(self) -> float:
        """1 − relative loss: the share of Σ‖F_i‖² that the components explain."""
        return 1 - self.loss_history[-1] if self.loss_history else float("nan")

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the PEFs' sketch."""
        return str(self.info["fingerprint"])

    @property
    def fisher_config(self) -> FisherConfig:
        """The Fisher config of the PEFs."""
        return FisherConfig.from_dict(self.info["fisher"])

    @property
    def text_column(self) -> str | None:
        """The column with the text of an example, as the data was read, or None; for a pair the first column."""
        return next(iter(shown_columns(self.columns, self.info)), None)

    @property
    def texts(self) -> list[str] | None:
        """The text of each example; the texts of a pair have " | " between them. None if no texts were kept."""
        return shown_texts(self.columns, self.info)

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

    def rename(self, j: int | str | os.PathLike[str], name: str | None = None) -> None:
        """Give component j a name, or remove its name with None; or use the names in a names.json that a page saved.

        Args:
            j: the number of the component; or the path of a names.json, whose names replace the present ones.
            name: the name.

        Raises:
            IndexError: if there is no such component.
            CorruptStoreError: if the file is missing or is not JSON.
            FormatVersionError: if the file does not have this version of the format.
            ValueError: if the name is empty or is not text, or the file is for another decomposition.
        """
        if isinstance(j, str | os.PathLike):
            self.names = read_names(Path(j), self.key, len(self))
            return
        j = self.index_of(j)
        if name is None:
            self.names.pop(j, None)
            return
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a name must be text, but it is {name!r}")
        self.names[j] = name.strip()

    @property
    def key(self) -> str:
        """A hash of G that identifies the decomposition."""
        return hashlib.sha256(self.pseudo_fishers.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        alignments: Sequence[TokenAlignmentLike] = (),
        energies: Mapping[int, Mapping[str, float]] | None = None,
        reports: Mapping[int, ReportLike | Mapping[str, Any]] | None = None,
        measurements: Mapping[int, HasDict | Mapping[str, Any]] | None = None,
        adapters: Mapping[int, str] | None = None,
        compare: Decomposition | None = None,
        training: str | os.PathLike[str] | None = None,
        change: HasDict | Mapping[str, Any] | None = None,
        texts: bool = True,
        layout: Literal["tsne", "pca"] | None = "tsne",
        title: str | None = None,
        force: bool = False,
    ) -> Path:
        """Write one self-contained HTML page for exploring the components.

        Args:
            path: the path of the file.
            alignments: the result of `NPEFFAnalyzer.token_alignments`, for shading the tokens of top examples.
            energies: {component: direction.energies()}, for showing how components are spread over modules. By default
                they are estimated, if the sketch keeps the modules apart.
            reports: {component: PerturbationReport}, for the certificate of its step, and answers before and after.
            measurements: {component: Measurement}, for KL by step size on other data; `texts` applies to this data too.
            adapters: {component: folder or repository} of adapters, for the code that loads them.
            compare: another decomposition to compare with.
            training: the folder of a run with an `NPEFFCallback`.
            change: a `ChangeReport`, or the result of its `to_dict`, for the view of a change.
            texts: whether the page has texts; False leaves out the columns that `hub.text_columns` counts as texts, and
                all tokens.
            layout: how the map of examples is computed; None leaves it out. t-SNE needs scikit-learn (the extra `viz`).
            title: the title of the page.
            force: overwrite an existing file.

        Returns:
            The path.

        Raises:
            FileExistsError: if `path` exists and `force` is not set.
            ModuleNotFoundError: if the map needs scikit-learn, which is not installed.
            ValueError: if another argument does not fit the decomposition.
        """
        from hf_npeff.report.page import Extras, write

        extras = Extras(
            alignments,
            energies,
            reports=dict(reports or {}),
            measurements=dict(measurements or {}),
            adapters=dict(adapters or {}),
            compare=compare,
            training=None if training is None else Path(training),
            change=change,
        )
        return write(self, path, extras=extras, texts=texts, layout=layout, title=title, force=force)

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_decomposition

        return of_decomposition(self)

    def associations(
        self,
        *,
        columns: Sequence[str] | None = None,
        texts: bool = True,
        top: int = AssociationRequest.top,
        level: float = AssociationRequest.level,
        shuffles: int = AssociationRequest.shuffles,
        max_examples: int = AssociationRequest.max_examples,
        seed: int = AssociationRequest.seed,
    ) -> Associations:
        """What each component's examples have in common: words and column values that are more frequent than elsewhere.

        Args:
            columns: the kept columns to use; None uses all. Words are used if a column of texts is among them.
            texts: whether to use the words of texts; False uses only the other columns. Data without texts, such as
                images, has only the other columns.
            top: how many associations of each component are kept.
            level: the largest corrected p-value at which an association counts.
            shuffles: how often the examples are shuffled to correct p-values; each shuffle takes a few milliseconds.
            max_examples: if there are more examples than this, a random sample of this size is used.
            seed: the seed for the shuffles and the sample.

        Returns:
            For every component its associations, the accuracy or error on its examples and on the others, and a short
            automatic label; and groups of components that share an association.

        Raises:
            ValueError: if the data's texts were not kept, `texts` is true and `columns` is None; if a column does not
                exist, there are no columns to use, or a setting is out of its range.
        """
        request = AssociationRequest(top=top, level=level, shuffles=shuffles, max_examples=max_examples, seed=seed)
        if missing := sorted(set(columns or ()) - set(self.columns)):
            raise ValueError(f"the columns {missing} do not exist; there are {sorted(self.columns)}")
        looked_at = {name: v for name, v in self.columns.items() if columns is None or name in columns}
        record = Encoded.of(self.info)
        could_be_kept = columns is None and (record is None or record.kind != "image")
        texts = texts and (could_be_kept or bool(shown_columns(looked_at, self.info)))
        return associate(self.coefficients, looked_at, self.info, request, texts=texts)

    def transform(self, pefs: PEFs, *, device: str | torch.device | None = None, check_weights: bool = True) -> Tensor:
        """The coefficients W (n′, r) of other PEFs for these components, with G fixed.

        Warns if the PEFs are of another commit of the model, or of other weights.

        Args:
            pefs: PEFs with the same sketch of the same model: `analyzer.compute_pefs(dataset, like=decomposition)`.
            device: the device for the products; None uses that of the rows.
            check_weights: False does not warn of other weights, for comparing them on purpose.

        Raises:
            IncompatibleSketchError: if they were made with another sketch.
            ValueError: if they are not PEFs.
        """
        check_same_sketch(
            self,
            pefs,
            remedy="analyzer.compute_pefs(dataset, like=decomposition) uses the right sketch, and so does an analyzer "
            "made with fisher=decomposition.fisher_config.",
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
        elif check_weights:
            warn_of_other_weights(
                self.info.get("weights"),
                pefs.info.get("weights"),
                "the decomposition and these PEFs are of a model with different weights",
            )
            if difference(self.info.get("weights"), pefs.info.get("weights")) is None:
                warn_of_other_predictions(
                    self.info.get("pilots"),
                    pefs.info.get("pilots"),
                    "the decomposition and these PEFs are of models with different predictions",
                )
        return self.explain(pefs, device=device)[0]

    def explain(self, pefs: PEFs, *, device: str | torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The coefficients W (n′, r) of PEFs, and the alignments N_ij = ‖A_i g_j‖² (n′, r); the sketch is not compared.

        Args:
            pefs: the n′ PEFs.
            device: see `transform`.
        """
        G = self.pseudo_fishers.to(device or pefs.device)
        H = overlaps(G.double())
        W = self.coefficients.new_zeros(len(pefs), len(self))
        N = torch.zeros(len(pefs), len(self))
        for place, chunk in pefs.placed_chunks(_CHUNK):
            A = balanced(chunk.factors.to(G.device), self.scales, self.config.power)
            aligned = energies(alignments(A, G.to(A.dtype)))
            N[place], W[place] = aligned.to(N), nonnegative_coefficients(aligned, H).to(W)
        return W, N

    def __repr__(self) -> str:
        model = shown_model(self.info["model"]) if self.info.get("model") else "rows not made by hf_npeff"
        return (
            f"Decomposition({len(self)} components of {len(self.example_ids):,} examples, "
            f"{self.explained:.1%} explained, {model})"
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

        A README.md that is not a card of hf_npeff is left alone.

        Args:
            directory: the folder; it is created if it is missing.
            include_columns: the columns to write to examples.parquet beside the ids; texts may be private.
            datasets: ids of the data sets of the examples, for the card.
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
        contents = contents_of(self, names)
        card = decomposition_card(self, repo_id=repo_id, columns=names, datasets=datasets, license=license)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, card)
        write_together(folder, contents)

    def _publish(
        self,
        folder: Path,
        repo_id: str,
        *,
        include_texts: bool = False,
        datasets: Sequence[str] = (),
        license: str | None = None,
    ) -> None:
        """Upload the decomposition; the card says which columns were left out."""
        texts = () if include_texts else text_columns(self.columns, self.info)
        warn_of_local_model(repo_id, self.info.get("model"))
        self._save(folder, [name for name in self.columns if name not in texts], repo_id, datasets, license)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Decomposition:
        """Read a folder that `save_pretrained` wrote.

        Raises:
            CorruptStoreError: if files are missing, altered, or do not fit together.
            FormatVersionError: if they were written by another version of the format.
        """
        return cls(**read_folder(Path(directory)))
