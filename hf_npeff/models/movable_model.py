"""MovableModel: changes of a model's weights, as directions of its parameters, and whether they may be made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_parameters, base_of
from hf_npeff.fisher.limits import ModelLimits
from hf_npeff.fisher.same_predictions import STORED, check_predictions, places_to_compare
from hf_npeff.models.analysed_model import AnalysedModel
from hf_npeff.pefs.store import PEFs
from hf_npeff.pefs.weights_identity import check_same_weights, warn_of_other_weights
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.decomposed import Decomposed
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.layouts import layouts_of
from hf_npeff.weights.own_weights import tied_weights

_Self = TypeVar("_Self", bound="MovableModel")


class MovableModel(AnalysedModel):
    """A model whose weights are moved, by directions and adapters that were made for it."""

    def direction_of(
        self, matrices: dict[str, Tensor], info: Mapping[str, Any], *, unit: bool = True
    ) -> ParameterDirection:
        """What lifting found, as a direction in the parameters; the matrices are taken out of the dictionary.

        Args:
            matrices: {parameter: (out, in)}.
            info: what is kept with it, beside the `provenance` of the model; `weights`, where they are known already.
            unit: False keeps its length.
        """
        maps = {m.parameter: m for m in self.maps}
        parameters = bare_parameters(self.model)
        deltas = {}
        for name in list(matrices):  # one at a time: what is transposed is copied
            value = matrices.pop(name)
            shaped = maps[name].as_weight(value) if name in maps else value.reshape(parameters[name].shape)
            deltas[name] = shaped.contiguous()
        about = {**self.info_of_change(deltas, info.get("weights")), **info}
        return ParameterDirection(deltas, layouts_of(self.model, deltas), about, unit=unit)

    def info_of_change(self, parameters: Iterable[str], weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a change of some parameters keeps of the model.

        Args:
            parameters: their names.
            weights: which the model has, where that is known already.
        """
        about = {**self.provenance(weights), "module": type(base_of(self.model)).__module__}
        return {**about, **tied_weights(self.model, parameters)}

    def check_movable(self, change: ParameterDirection | Adapter | None = None, *, in_place: bool = True) -> None:
        """Refuse to move weights that are sharded, or those of another commit than the change's.

        Warns where the weights are others than those that a direction was made with.

        Args:
            change: a direction or an adapter.
            in_place: whether the weights themselves are to be moved.

        Raises:
            UnsupportedModelError: if they are sharded, and are to be moved in place.
            ValueError: if the commits differ.
        """
        if in_place and self.fsdp.active:
            raise UnsupportedModelError(
                "the model's weights are sharded over processes; load the whole model in one process to move them"
            )
        info = {} if change is None else {**getattr(change, "config", {}), **change.info}
        made = info.get("revision")
        if made is not None and self.revision is not None and made != self.revision:
            raise ValueError(
                f"the change was made for the model at commit {made}, and this model is at {self.revision}; load "
                "that revision"
            )
        weights = info.get("weights")
        if weights is not None:
            warn_of_other_weights(weights, self.weights(), "the change was made with other weights than the model has")

    def _checked(self, examples: Iterable[Example]) -> list[Example]:
        """The examples of data that was not analysed.

        Raises:
            ValueError: if the model cannot take one of them.
        """
        limits = ModelLimits.of(self.model, needs_labels=self.fisher.positions == "labels")
        return list(limits.checked(examples))

    def _opened(
        self: _Self, decomposition: Decomposition, pefs: PEFs, dataset: Any, check_weights: bool
    ) -> tuple[_Self, Decomposed]:
        """An analyzer with the decomposition's sketch, and what it lifts components from.

        Raises:
            IncompatibleSketchError: if the PEFs, the decomposition and the model do not belong together.
            IncompatibleWeightsError: if the model's weights have changed since, and are to be checked.
            ValueError: if the dataset or the PEFs are others than were decomposed.
        """
        analyzer = self.for_decomposition(decomposition)
        weights = analyzer.weights_for(decomposition, pefs, check_weights)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        if check_weights:
            analyzer.check_predictions(pefs, examples)
        return analyzer, Decomposed(decomposition, pefs, examples, weights, analyzer._sketch)

    def check_predictions(self, pefs: PEFs, examples: Sequence[Example]) -> None:
        """Refuse PEFs of a model that predicts something else now, although its weights are the same.

        Args:
            pefs: whose cotangents are replayed.
            examples: theirs, in their order.

        Raises:
            IncompatibleWeightsError: if it predicts something else for a few of them.
        """
        some = places_to_compare(len(pefs))
        stored = {name: None if (v := getattr(pefs, name)) is None else v[some] for name in STORED}
        remedy = "Give the model back what it had, or compute PEFs with it as it is and decompose them."
        with self.forward_pass() as forward:
            check_predictions(forward, [examples[i] for i in some], stored, "these PEFs", remedy)

    def weights_for(self, decomposition: Decomposition, pefs: PEFs, check_weights: bool) -> dict[str, Any]:
        """The model's weights, which must be those of PEFs and their decomposition where cotangents are replayed.

        Args:
            decomposition: the decomposition of `pefs`.
            pefs: whose cotangents are replayed.
            check_weights: False compares nothing.

        Raises:
            IncompatibleWeightsError: if they are others.
        """
        weights = self.weights()
        if check_weights:
            remedy = "Give the model those weights again, or compute PEFs with those that it has and decompose them."
            check_same_weights(pefs.info.get("weights"), weights, "these PEFs", remedy)
            check_same_weights(decomposition.info.get("weights"), weights, "the PEFs of this decomposition", remedy)
        return weights
