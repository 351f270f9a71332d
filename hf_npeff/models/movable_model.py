"""MovableModel: changes of a model's weights as directions, and checks whether they may be applied."""

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
from hf_npeff.weights.layouts import Layout, layouts_of
from hf_npeff.weights.own_weights import tied_weights

_Self = TypeVar("_Self", bound="MovableModel")


class MovableModel(AnalysedModel):
    """A model whose weights are changed by directions and adapters that were made for it."""

    def direction_of(
        self, matrices: dict[str, Tensor], info: Mapping[str, Any], *, unit: bool = True
    ) -> ParameterDirection:
        """The result of lifting as a direction in the weights; the matrices are removed from the dictionary.

        Args:
            matrices: {parameter: (out, in)}.
            info: entries for the direction's `info`, beside the `provenance` of the model; `weights`, if already known.
            unit: False keeps its length.
        """
        maps = {m.parameter: m for m in self.maps}
        parameters = bare_parameters(self.model)
        deltas = {}
        for name in list(matrices):  # one at a time, because transposed matrices are copied
            value = matrices.pop(name)
            shaped = maps[name].as_weight(value) if name in maps else value.reshape(parameters[name].shape)
            deltas[name] = shaped.contiguous()
        about = {**self.info_of_change(deltas, info.get("weights")), **info}
        return ParameterDirection(deltas, self.layouts_of(deltas), about, unit=unit)

    def layouts_of(self, parameters: Iterable[str]) -> dict[str, Layout]:
        """{parameter: layout}; "other" for a linear map's weight that the model uses otherwise than by its module."""
        layouts = layouts_of(self.model, parameters)
        return {name: "other" if name in self._used_otherwise else layout for name, layout in layouts.items()}

    def info_of_change(self, parameters: Iterable[str], weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The information on the model that a change of some parameters keeps.

        Args:
            parameters: the names of the parameters.
            weights: the identity of the model's weights, if already known.
        """
        about = {**self.provenance(weights), "module": type(base_of(self.model)).__module__}
        return {**about, **tied_weights(self.model, parameters)}

    def check_movable(self, change: ParameterDirection | Adapter | None = None, *, in_place: bool = True) -> None:
        """Check that a change may be applied: the weights are not sharded, and the model is at the change's commit.

        Warns if the weights differ from those with which a direction was made.

        Args:
            change: a direction or an adapter.
            in_place: whether the weights themselves are changed.

        Raises:
            UnsupportedModelError: if the weights are sharded and should be changed in place.
            ValueError: if the commits differ.
        """
        if in_place and self.fsdp.active:
            raise UnsupportedModelError(
                "the model's weights are sharded over processes; load the whole model in one process to change them"
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
        """The examples of data that was not analysed, after checking them.

        Raises:
            ValueError: if the model cannot take one of them.
        """
        limits = ModelLimits.of(self.model, needs_labels=self.fisher.positions == "labels")
        return list(limits.checked(examples))

    def _opened(
        self: _Self, decomposition: Decomposition, pefs: PEFs, dataset: Any, check_weights: bool
    ) -> tuple[_Self, Decomposed]:
        """An analyzer with the decomposition's sketch, and the data for lifting components.

        Raises:
            IncompatibleSketchError: if the PEFs, the decomposition and the model do not fit together.
            IncompatibleWeightsError: if the model's weights have changed, and weights are checked.
            ValueError: if the dataset or the PEFs are not those that were decomposed.
        """
        analyzer = self.for_decomposition(decomposition)
        weights = analyzer.weights_for(decomposition, pefs, check_weights)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        if check_weights:
            analyzer.check_predictions(pefs, examples)
        return analyzer, Decomposed(decomposition, pefs, examples, weights, analyzer._sketch)

    def check_predictions(self, pefs: PEFs, examples: Sequence[Example]) -> None:
        """Check on a few examples that the model still has the predictions stored with PEFs.

        Args:
            pefs: the PEFs whose cotangents are sent back again.
            examples: the examples of the PEFs, in their order.

        Raises:
            IncompatibleWeightsError: if the predictions differ.
        """
        some = places_to_compare(len(pefs))
        stored = {name: None if (v := getattr(pefs, name)) is None else v[some] for name in STORED}
        remedy = "Restore the model as it was, or compute PEFs with the present model and decompose them."
        with self.forward_pass() as forward:
            check_predictions(forward, [examples[i] for i in some], stored, "these PEFs", remedy)

    def weights_for(self, decomposition: Decomposition, pefs: PEFs, check_weights: bool) -> dict[str, Any]:
        """The identity of the model's weights, after checking that they are those of PEFs and their decomposition.

        Args:
            decomposition: the decomposition of `pefs`.
            pefs: the PEFs whose cotangents are sent back again.
            check_weights: False skips the check.

        Raises:
            IncompatibleWeightsError: if the weights differ.
        """
        weights = self.weights()
        if check_weights:
            remedy = "Restore those weights, or compute PEFs with the present ones and decompose them."
            check_same_weights(pefs.info.get("weights"), weights, "these PEFs", remedy)
            check_same_weights(decomposition.info.get("weights"), weights, "the PEFs of this decomposition", remedy)
        return weights
