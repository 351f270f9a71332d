"""What a decomposition found: a Decomposition of Components."""

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
from hf_npeff.encoding.record import shown_columns, shown_texts
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
        """Of the sketch of the PEFs."""
        return str(self.info["fingerprint"])

    @property
    def fisher_config(self) -> FisherConfig:
        """How the PEFs were made."""
        return FisherConfig.from_dict(self.info["fisher"])

    @property
    def text_column(self) -> str | None:
        """The column that shows an example to people, as the data was read, or None; of a pair the first."""
        return next(iter(shown_columns(self.columns, self.info)), None)

    @property
    def texts(self) -> list[str] | None:
        """What shows each example to people; the texts of a pair have " | " between them. None where none was kept."""
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
        """Give component j a name, or take it away with None; or take over the names.json that a page saved.

        Args:
            j: its number; or the path of such a file, whose names replace those there are.
            name: what to call it.

        Raises:
            IndexError: if there is no such component.
            CorruptStoreError: if the file is missing or is no JSON.
            FormatVersionError: if it is no file of this version of the format.
            ValueError: if the name is empty or is not text, or the file is of another decomposition.
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
        """Tells the decomposition from others: a hash of G."""
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
        """Write one self-contained HTML file on which a person explores the components.

        Args:
            path: the path of the file.
            alignments: from `NPEFFAnalyzer.token_alignments`: tokens of top examples are shaded by them.
            energies: {component: direction.energies()}: the modules in which each component lives. By default they are
                estimated, where the sketch keeps the modules apart.
            reports: {component: PerturbationReport}: the certificate of its step, and answers before and after.
            measurements: {component: Measurement}: its dose curve on other data; texts of that data go along with
                `texts`.
            adapters: {component: folder or repository} of adapters, for the code that loads them.
            compare: another decomposition, to compare with.
            training: the folder of a run with an `NPEFFCallback`.
            change: a `ChangeReport`, or what its `to_dict` gives: what a change of the weights did.
            texts: whether texts go along; False leaves out what `hub.text_columns` counts as texts, and all tokens.
            layout: how the map of examples is made; None leaves it out. t-SNE needs scikit-learn (the extra `viz`).
            title: the title of the page.
            force: write over what is there.

        Returns:
            The path.

        Raises:
            FileExistsError: if there is something at `path`, and `force` is not given.
            ModuleNotFoundError: if the map needs scikit-learn, which is not installed.
            ValueError: if what is given beside the decomposition does not fit it.
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
        """What each component's examples have in common: words and columns that they have more often than the others.

        Args:
            columns: which of the kept columns to look at, texts among them; None: all.
            texts: whether to look at the words of texts; False looks at the other columns alone.
            top: associations of a component that are kept.
            level: corrected p-value up to which an association counts.
            shuffles: how often the examples are shuffled to correct p-values; each takes a few milliseconds.
            max_examples: if there are more examples, so many are drawn at random.
            seed: the seed of the shuffles and the drawing.

        Returns:
            For every component its associations, the accuracy or error on its examples and on the others, and a short
            automatic label; and groups of components that share an association.

        Raises:
            ValueError: if no texts were kept and `texts` is true, a column does not exist, nothing is left to look at,
                or a setting is out of its range.
        """
        request = AssociationRequest(top=top, level=level, shuffles=shuffles, max_examples=max_examples, seed=seed)
        if missing := sorted(set(columns or ()) - set(self.columns)):
            raise ValueError(f"the columns {missing} do not exist; there are {sorted(self.columns)}")
        looked_at = {name: v for name, v in self.columns.items() if columns is None or name in columns}
        return associate(self.coefficients, looked_at, self.info, request, texts=texts)

    def transform(self, pefs: PEFs, *, device: str | torch.device | None = None, check_weights: bool = True) -> Tensor:
        """W (n′, r) of PEFs, G fixed: what these components explain of other examples.

        Warns where the PEFs are of another commit of the model, or of other weights.

        Args:
            pefs: made with the same sketch of the same model: `analyzer.compute_pefs(dataset, like=decomposition)`.
            device: where the products are taken; None: where the rows are.
            check_weights: False says nothing of other weights, where comparing them is what is wanted.

        Raises:
            IncompatibleSketchError: if they were made with another sketch.
            ValueError: if they are no PEFs.
        """
        check_same_sketch(
            self,
            pefs,
            remedy="analyzer.compute_pefs(dataset, like=decomposition) does, and so does an analyzer that is made with "
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
                    "the decomposition and these PEFs are of a model that predicts something else",
                )
        return self.explain(pefs, device=device)[0]

    def explain(self, pefs: PEFs, *, device: str | torch.device | None = None) -> tuple[Tensor, Tensor]:
        """W (n′, r) of PEFs and the alignments N_ij = ‖A_i g_j‖² (n′, r) that it is from; the sketch is not compared.

        Args:
            pefs: n′ of them.
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
        model = shown_model(self.info["model"]) if self.info.get("model") else "rows made elsewhere"
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
        """`push_to_hub`'s own arguments; the card says which columns were left out."""
        texts = () if include_texts else text_columns(self.columns, self.info)
        warn_of_local_model(repo_id, self.info.get("model"))
        self._save(folder, [name for name in self.columns if name not in texts], repo_id, datasets, license)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Decomposition:
        """Read what `save_pretrained` wrote.

        Raises:
            CorruptStoreError: if files are missing, altered, or do not fit together.
            FormatVersionError: if they were written by another version of the format.
        """
        return cls(**read_folder(Path(directory)))
