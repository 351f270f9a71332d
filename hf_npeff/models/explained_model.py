"""ExplainedModel: what a change of the weights did, on which examples, through which components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from hf_npeff.config import ChangeRequest, LiftRequest
from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.encoding.record import Encoded
from hf_npeff.errors import IncompatibleWeightsError, UnsupportedModelError
from hf_npeff.fisher.bare_model import named_weights
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.fisher.predictions import Predictions, predict
from hf_npeff.fisher.unchanged_blocks import UnchangedBlocks
from hf_npeff.models.edited_model import EditedModel
from hf_npeff.models.measured_model import MeasuredModel
from hf_npeff.pefs.store import PEFs
from hf_npeff.pefs.weights_identity import difference, shown
from hf_npeff.progress import working
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.change_effects import RANDOM
from hf_npeff.weights.change_report import ChangeReport
from hf_npeff.weights.change_sums import inner
from hf_npeff.weights.decomposed import Decomposed
from hf_npeff.weights.directions import ParameterDirection, as_direction
from hf_npeff.weights.explaining import Grown, Seen, Watched, explained_change, shuffled
from hf_npeff.weights.measurement import check_groups, is_linear
from hf_npeff.weights.row_products import AnalysedChange, random_change, row_products


class ExplainedModel(MeasuredModel, EditedModel):
    """A model before a change of its weights, which can explain the change."""

    def explain_change(
        self,
        decomposition: Decomposition,
        pefs: PEFs,
        dataset: Any,
        change: ParameterDirection | Adapter,
        *,
        steps: Sequence[float] = ChangeRequest.steps,
        by: str | None = ChangeRequest.by,
        take_out: int | Sequence[int] = ChangeRequest.take_out,
        growth: bool = ChangeRequest.growth,
        n_new: int = ChangeRequest.n_new,
        examples: int = ChangeRequest.examples,
        draws: int = ChangeRequest.draws,
        batch_size: int = ChangeRequest.batch_size,
        seed: int = ChangeRequest.seed,
        check_weights: bool = ChangeRequest.check_weights,
    ) -> ChangeReport:
        """Explain a change of the weights: on which examples it acts, and through which components.

        The analyzer's model has to be the one before the change, with its PEFs and their decomposition.

        Args:
            decomposition: the decomposition of `pefs`.
            pefs: the PEFs of the model before the change.
            dataset: the dataset of the PEFs, in any order; ids and contents are compared.
            change: a change from `ParameterDirection.between` or `from_adapter`, or any other direction or adapter,
                applied with a scale of 1.
            steps: which parts of the change are measured, beside 0 and 1.
            by: a column; the curve has a line for the examples with each of its values.
            take_out: how many of the most changed components are taken out of the change, one at a time; or a list of
                components.
            growth: compute PEFs after the change, to see which components grew, shrank, appeared or vanished; this
                takes as long as computing the PEFs before.
            n_new: how many components are added for what is not explained after the change.
            examples: how many examples are listed.
            draws: how many random changes a component's KL is compared with.
            batch_size: how many examples a forward pass takes.
            seed: the seed of the random changes and the bootstrap.
            check_weights: raise an error if the decomposition, the PEFs or the change were made with other weights than
                the model has now.

        Raises:
            IndexError: if `take_out` names a component that does not exist.
            IncompatibleSketchError: if PEFs, decomposition and model do not fit together.
            IncompatibleWeightsError: if they, or the change, have other weights.
            UnsupportedModelError: if weights are quantised, offloaded or sharded, and `growth` is true or the change
                concerns more than linear maps.
            ValueError: if the change is for another model, no changed parameter is analysed, the dataset is not that of
                the PEFs, there is no column `by`, or an argument is out of range.
        """
        count = take_out if isinstance(take_out, int) else len(take_out)
        request = ChangeRequest(
            tuple(steps), by, count, growth, n_new, examples, draws, batch_size, seed, check_weights
        )
        analyzer = self.for_decomposition(decomposition)
        direction = as_direction(change, analyzer.model)
        weights = analyzer.weights_for(decomposition, pefs, check_weights)
        if check_weights and isinstance(change, Adapter):
            _check_made_for(change, weights)
        in_place = analyzer._check_change(direction, request, weights)
        chosen = analyzer.examples_of(decomposition, dataset, pefs)
        if check_weights:
            analyzer.check_predictions(pefs, chosen)
        check_groups(chosen, by)
        decomposed = Decomposed(decomposition, pefs, chosen, weights, analyzer._sketch)
        decomposed.cotangents()  # without them nothing can be explained
        named = None if isinstance(take_out, int) else [decomposition.index_of(j) for j in take_out]
        # Before; every part of the way; products with the rows; the rows after; the lifting and the rest, one by one.
        passes = 2 + len(request.scales) + growth + 2 * count
        with working("explaining the change", passes * len(chosen)):
            before, after = analyzer._on_the_way(direction, chosen, request, in_place)
            watched = analyzer._watched(pefs, chosen, request, before)
            seen = analyzer._seen(direction, pefs, watched, request, after)
            grown = analyzer._grown(decomposition, direction, pefs, chosen, request, weights) if growth else None
            explained = explained_change(decomposition, pefs, direction, watched, seen, grown, request)
            lifting = LiftRequest(selective=False, form="plain", batch_size=batch_size, check_weights=check_weights)
            for j in explained.most_changed(count) if named is None else named:
                (lifted,) = analyzer._lift(decomposed, analyzer._planned(decomposed, [j], lifting), lifting)
                try:
                    left = direction.without(lifted)
                except ValueError:  # nothing is left
                    explained.add_without(j, None)
                    continue
                with _moved(analyzer.model, left, 1.0, in_place), analyzer.forward_pass() as forward:
                    explained.add_without(j, predict(forward, chosen, batch_size))
        return explained.report()

    def _check_change(self, change: ParameterDirection, request: ChangeRequest, weights: Mapping[str, Any]) -> bool:
        """Check that a change is for this model; return whether the weights can be changed in place."""
        parameters = named_weights(self.model)
        if missing := [name for name in change if name not in parameters]:
            raise ValueError(f"the model has no parameters named {missing[:3]}; the change is for another model")
        wrong = [name for name, value in change.items() if parameters[name].shape != value.shape]
        if wrong and all(is_at_hand(parameters[name]) for name in wrong):
            shapes = {name: (tuple(parameters[name].shape), tuple(change[name].shape)) for name in wrong[:3]}
            raise ValueError(f"the model and the change have parameters of different shapes: {shapes}")
        made = change.info.get("weights")
        if request.check_weights and (how := difference(made, weights)):
            raise IncompatibleWeightsError(
                f"the change starts from other weights than the model has ({how}): use an analyzer of the model before "
                "the change. check_weights=False skips this check."
            )
        in_place = not self.fsdp.active and all(is_at_hand(parameters[name]) for name in change)
        if not in_place and request.growth:
            raise UnsupportedModelError(
                "quantised, offloaded or sharded weights cannot be changed, so no PEFs can be computed after the "
                "change: pass growth=False"
            )
        if not in_place and not is_linear(change):
            raise UnsupportedModelError(
                "the change concerns more than linear maps, and the weights are quantised, offloaded or sharded, so it "
                "cannot be applied: load the model whole, in a floating-point dtype"
            )
        if not set(self.shapes) & set(change):
            raise ValueError(
                f"none of the {len(change)} changed parameters is analysed ({next(iter(change))}, for instance, is "
                "not): compute PEFs with target_modules, or parameters, that name them"
            )
        return in_place

    def _on_the_way(
        self, change: ParameterDirection, examples: list[Example], request: ChangeRequest, in_place: bool
    ) -> tuple[Predictions, dict[float, Predictions]]:
        """The predictions before the change, and for every part of it; blocks below it run once for each example."""
        names = named_weights(self.model)
        moved = {id(names[name]) for name in change}  # a tied weight moves in every module that has it
        after: dict[float, Predictions] = {}
        with self.forward_pass() as forward:
            modules = forward.model.named_modules()
            changed = [n for n, m in modules if any(id(p) in moved for p in m.parameters(recurse=False))]
            outputs_of = UnchangedBlocks(forward, changed).outputs
            before = predict(forward, examples, request.batch_size, outputs_of=outputs_of)
            for scale in request.scales:
                with _moved(self.model, change, scale, in_place):
                    after[scale] = predict(forward, examples, request.batch_size, outputs_of=outputs_of)
        return before, after

    def _watched(self, pefs: PEFs, examples: list[Example], request: ChangeRequest, before: Predictions) -> Watched:
        """The examples with their predictions before the change, and their labels."""
        encoded = Encoded.of(pefs.info)
        truth = [None] * len(examples) if encoded is None else self.description.truth_of(examples, encoded)
        groups = check_groups(examples, request.by)
        return Watched(examples, truth, groups, before, self.description.in_words, request.seed)

    def _seen(
        self,
        change: ParameterDirection,
        pefs: PEFs,
        watched: Watched,
        request: ChangeRequest,
        after: dict[float, Predictions],
    ) -> Seen:
        """What was predicted on the way, and the inner products of rows with the change, random and shuffled ones."""
        ours = self._matrices(change)
        norm, size = inner(ours, ours) ** 0.5, sum(value.numel() for value in ours.values())
        anywhere = {name: norm * (value.numel() / size) ** 0.5 for name, value in ours.items()}
        where_it_is = {name: float(value.norm()) for name, value in ours.items()}
        changes: list[AnalysedChange] = [
            ours,
            random_change(ours, anywhere, request.seed),
            shuffled(ours, request.seed),
        ]
        changes += [random_change(ours, where_it_is, request.seed + k) for k in range(1, 1 + RANDOM)]
        assert pefs.cotangents is not None
        with self.forward_pass() as forward:
            products = row_products(forward, watched.examples, pefs.cotangents, changes, request.batch_size)
        return Seen(after, products, norm, list(self.shapes))

    def _matrices(self, change: ParameterDirection) -> dict[str, Tensor]:
        """{analysed parameter: ΔW (out, in)}."""
        maps = {m.parameter: m for m in self.maps}
        return {
            name: (maps[name].as_matrix(change[name]) if name in maps else change[name].reshape(shape)).float()
            for name, shape in self.shapes.items()
            if name in change
        }

    def _grown(
        self,
        decomposition: Decomposition,
        change: ParameterDirection,
        pefs: PEFs,
        examples: list[Example],
        request: ChangeRequest,
        weights: Mapping[str, Any],
    ) -> Grown:
        """Coefficients for the same components before and after the change, and with some components added after it."""
        with change.applied_to(self.model):
            after = self._rows_again(pefs, examples, request.batch_size, weights)
        device = self.device if self.device.type == "cuda" else None
        pair = (decomposition.explain(pefs, device=device)[0], decomposition.explain(after, device=device)[0])
        room = len(pefs) * pefs.rank - len(decomposition)
        if not request.n_new or room < 1 or not bool((after.norms > 0).any()):
            return Grown(*pair, None, None)
        estimator = NPEFF.from_config(decomposition.config, device=device)
        estimator.decomposition_ = decomposition
        expanded = estimator.expand(after, min(request.n_new, room), joint=False)
        return Grown(*pair, expanded.explain(pefs, device=device)[0], expanded.coefficients)


def _check_made_for(adapter: Adapter, weights: Mapping[str, Any]) -> None:
    """Check that an adapter's file does not name other weights."""
    now = shown(weights)
    if adapter.weights is not None and now is not None and adapter.weights != now:
        raise IncompatibleWeightsError(
            f"the adapter was made for weights with the hash {adapter.weights}, but the model's have {now}: use an "
            "analyzer of the adapter's model. check_weights=False skips this check."
        )


def _moved(model: Any, change: ParameterDirection, scale: float, in_place: bool) -> AbstractContextManager[Any]:
    return change.applied_to(model, scale) if in_place else change.applied_in_activations(model, scale)
