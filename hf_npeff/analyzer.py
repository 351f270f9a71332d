"""NPEFFAnalyzer: one object for all stages of an analysis; it has no arithmetic of its own."""

from __future__ import annotations

from typing import Any

from hf_npeff.config import (
    DecompositionConfig,
)
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.models.explained_model import ExplainedModel
from hf_npeff.pefs.store import PEFs
from hf_npeff.progress import progress_wanted
from hf_npeff.sharing.hub import shown_model


class NPEFFAnalyzer(ExplainedModel):
    """A model that is analysed: its PEFs, components, and changes of its weights.

    The model runs in eval mode without parameter gradients. Afterwards it is as it was before (mode, requires_grad,
    hooks, random state), also after an exception.

    Args:
        model: a transformers model, PEFT-wrapped or not, or a SentenceTransformer.
        processing_class: its tokenizer, image processor or processor; needed unless the data is already encoded.
        fisher: how PEFs are computed.
        accelerator: an `accelerate.Accelerator`; by default one is made when it is needed.
        task: the head's task, if the model's class does not determine it, or an object with the `OutputHead` protocol.

    Raises:
        UnsupportedModelError: if the model has no output that hf_npeff supports.
        ValueError: if `fisher` does not fit the model.

    Example:
        >>> analyzer = NPEFFAnalyzer.from_pretrained("org/any-model", fisher=FisherConfig(rank=2))
        >>> print(analyzer.estimate(dataset))
        examples n   24 of 5 tokens
        ...
        >>> pefs = analyzer.compute_pefs(dataset, output_dir="runs/pefs")
        >>> decomposition = analyzer.decompose(pefs, n_components=3)
        >>> tokens = analyzer.token_alignments(decomposition, pefs, dataset, [0], n_top=2)
        >>> direction = analyzer.lift(decomposition, 0, pefs, dataset)
        >>> report = analyzer.evaluate_direction(direction, decomposition, 0, dataset, n_top=4)
        >>> directions = dict(analyzer.lift_each(decomposition, [1, 2], pefs, dataset))
        >>> adapters = analyzer.lift_adapters(decomposition, pefs, dataset, rank=2)  # all components, one pass
        >>> reports = analyzer.evaluate_adapters(adapters, decomposition, dataset, pefs, n_top=4)
        >>> reports = analyzer.evaluate_components(decomposition, pefs, dataset, n_top=4)
        >>> sorted(decomposition.evaluations)
        [0, 1, 2]
        >>> sparing = analyzer.spare(direction, ["the cat saw the king", "rome is old"])  # predictions on these stay
        >>> sparing.info["spared"]["disturbed"] < 1
        True
        >>> measured = analyzer.measure(direction, ["the cat saw the king", "rome is old"], scales=(report.scale,))
        >>> measured.n, len(measured.steps)  # the change, and a random one
        (2, 2)
        >>> analyzer.explain_change(decomposition, pefs, dataset, 0.3 * direction, growth=False)
        ChangeReport(KL ... on 24 examples, ...
        >>> analyzer.off_target(direction, ["the cat saw the king", "rome is old"], scale=report.scale, rounds=2).n
        2
    """

    def __repr__(self) -> str:
        name = shown_model(self.description.provenance({})["model"])
        return f"NPEFFAnalyzer({name}, {traits_of(self.head).task}, {len(self.maps)} linear maps under analysis)"

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_analyzer

        return of_analyzer(self)

    def decompose(
        self,
        pefs: PEFs,
        n_components: int = DecompositionConfig.n_components,
        *,
        validation: PEFs | None = None,
        **settings: Any,
    ) -> Decomposition:
        """Decompose PEFs on the model's device: `NPEFF(n_components, **settings).fit(pefs, validation)`."""
        settings.setdefault("progress", progress_wanted())
        settings.setdefault("device", self.device if self.device.type == "cuda" else None)
        return NPEFF(n_components, **settings).fit(pefs, validation)
