"""EditedModel: weight changes of a model from stored rows, without a decomposition."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from hf_npeff.config import ComputeRequest, EditRequest, Ridge, Towards
from hf_npeff.data import Example, Examples
from hf_npeff.fisher.compute import compute
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.fisher.preparation import prepare
from hf_npeff.models.movable_model import MovableModel
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs, check_pefs
from hf_npeff.pefs.weights_identity import check_same_weights
from hf_npeff.progress import working
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.editing import Goal, goal_of, lift_contrast, outcome_info, sides, step_towards, tried
from hf_npeff.weights.edits import STEPS, NoStepError
from hf_npeff.weights.lifting import align
from hf_npeff.weights.log_odds import Naming, observe
from hf_npeff.weights.plans import check_kept

logger = logging.getLogger(__name__)
_READ_BY_STEP = 2 + len(STEPS)
"""How often every example is read for a step: the outcomes and their gradients, the lifting, the trials."""
_FIRST = 8
"""Examples of the self-test where rows are computed again; the sketch is known."""


class EditedModel(MovableModel):
    """A model and what changes it: the part of `NPEFFAnalyzer` that needs no decomposition."""

    def lift_examples(
        self,
        pefs: PEFs,
        dataset: Any,
        ids: Sequence[Any],
        against: Sequence[Any] | None = None,
        *,
        ridge: Ridge = EditRequest.ridge,
        keep: Any = EditRequest.keep,
        memory_budget: int | None = EditRequest.memory_budget,
        batch_size: int = EditRequest.batch_size,
        check_weights: bool = EditRequest.check_weights,
    ) -> ParameterDirection:
        """The direction that moves some examples most for what it does to others, without a decomposition.

        It maximises the mean KL of the first over that of the others, to second order: δᵀTδ / (δᵀOδ + λ‖δ‖²) with the
        means T and O of their PEFs, of raw norms. Its sign means nothing: measure both.

        Args:
            pefs: the PEFs of all of them.
            dataset: the one that they came from, in any order; ids and contents are compared.
            ids: examples that are to move.
            against: examples that are to be left alone; None takes all others.
            ridge: λ as a share of the largest eigenvalue of O, or "auto", by cross-validation over both sides.
            keep: PEFs of other data, of the same sketch and weights, that are to be left alone too.
            memory_budget: bytes for solving, as in `lift`.
            batch_size: examples of a forward pass.
            check_weights: refuse PEFs of other weights than the model has now.

        Returns:
            A unit direction. `info` holds the ridge, its cross-validated score and the eigenvalue.

        Raises:
            IncompatibleSketchError: if PEFs, `keep` and the model do not belong together.
            IncompatibleWeightsError: if the model or `keep` has other weights than the PEFs.
            ValueError: if an id is unknown or on both sides, a side is empty, or the dataset is another one.
        """
        check_pefs(pefs)
        request = EditRequest(keep=keep, ridge=ridge, memory_budget=memory_budget, batch_size=batch_size)
        masks = sides(pefs, ids, against)
        analyzer = self.with_settings_of(pefs)
        weights = analyzer._weights_of(pefs, keep, check_weights)
        examples = analyzer._examples_of_pefs(pefs, dataset)
        if check_weights:
            analyzer.check_predictions(pefs, examples)
        with analyzer.forward_pass() as forward:
            deltas, info = lift_contrast(
                forward, pefs, examples, masks, request, analyzer._own_sketch(), analyzer._solver_device()
            )
        return analyzer.direction_of(deltas, {"fingerprint": pefs.fingerprint, "weights": weights, **info})

    def edit(
        self,
        pefs: PEFs,
        dataset: Any,
        *,
        change: Any = EditRequest.change,
        remove: str | None = EditRequest.remove,
        given: str | None = EditRequest.given,
        towards: Towards = EditRequest.towards,
        outcome: int | str | None = EditRequest.outcome,
        keep: Any = EditRequest.keep,
        ridge: Ridge = EditRequest.ridge,
        iterations: int = EditRequest.iterations,
        memory_budget: int | None = EditRequest.memory_budget,
        batch_size: int = EditRequest.batch_size,
        check_weights: bool = EditRequest.check_weights,
    ) -> ParameterDirection:
        """The weight change that moves chosen log-odds by chosen amounts and leaves the other examples alone.

        Solved in closed form from the stored rows, lifted exactly, and then tried on the given examples at a quarter, a
        half and the whole of its length: the largest step that does what was predicted is kept.

        Args:
            pefs: the PEFs of the examples that are to change and of others that are to stay.
            dataset: the one that they came from, in any order; ids and contents are compared.
            change: {example id: nats by which the log-odds of its outcome are to change}; of a regression, by how much
                the predicted number is. All other examples are to stay as they are.
            remove: instead, a column whose influence is to be taken out: the mean log-odds of the examples with each of
                its values move to the mean of all, which stays.
            given: `remove` compares examples with the same value of this column only; None compares all.
            towards: "mean" is as above. "highest" leaves the examples of the value with the highest mean log-odds as
                they are and gives those of the others their log-odds, rank by rank: with `outcome` a column of labels,
                what the model does where the column helps it is what it is to do where the column misleads it.
            outcome: whose log-odds: the number of a class, label, token or output; a class's name; a text of one token;
                or a column that holds one for every example. None where there is one only, or two classes.
            keep: PEFs of other data, of the same sketch and weights, that are to be left alone too.
            ridge: the size of the change against what it misses, as a share of the largest eigenvalue of the rows' Gram
                matrix; "auto" takes the one of the least error on examples that are held out, in the sketch.
            iterations: how often to solve: again with rows computed at the new weights, for what is still missing.
                `keep` stays as it was computed.
            memory_budget: bytes for solving, as in `lift`.
            batch_size: examples of a forward pass.
            check_weights: refuse PEFs of other weights than the model has now.

        Returns:
            A direction whose natural scale is 1: `applied_to(model)` and `to_adapter(rank)` make the change. `info`
            holds what was wanted, predicted and realised, group by group or id by id; the share of the wanted change
            that the rows express; the ridge with its cross-validated error; and the step.

        Raises:
            IncompatibleSketchError: if PEFs, `keep` and the model do not belong together.
            IncompatibleWeightsError: if the model or `keep` has other weights than the PEFs.
            UnsupportedModelError: if the model points at places of its input, or its weights are sharded.
            ValueError: if it is not clear what is to change, an id is unknown, a column is missing, incomplete or has
                one value, the dataset is another one, or no step does what was predicted.
        """
        request = EditRequest(
            change=change,
            remove=remove,
            given=given,
            towards=towards,
            outcome=outcome,
            keep=keep,
            ridge=ridge,
            iterations=iterations,
            memory_budget=memory_budget,
            batch_size=batch_size,
            check_weights=check_weights,
        )
        request.check_goal()
        check_pefs(pefs)
        self.check_movable()
        analyzer = self.with_settings_of(pefs)
        weights = analyzer._weights_of(pefs, keep, check_weights)
        examples = analyzer._examples_of_pefs(pefs, dataset)
        if check_weights:
            analyzer.check_predictions(pefs, examples)
        naming = Naming(pefs.columns, analyzer.description.label_names, analyzer._encoder())
        with working("editing", len(examples) * (2 + _READ_BY_STEP * iterations + iterations - 1)):
            with analyzer.forward_pass() as forward:
                goal = goal_of(forward, pefs, examples, request, naming)
            direction = analyzer._edited(pefs, examples, goal, request, weights)
        direction.info.update(fingerprint=pefs.fingerprint)
        return direction

    def _edited(
        self, pefs: PEFs, examples: list[Example], goal: Goal, request: EditRequest, weights: dict[str, Any]
    ) -> ParameterDirection:
        """Steps towards a goal, one after the other."""
        sketch, device = self._own_sketch(), self._solver_device()
        total: ParameterDirection | None = None
        predicted = torch.zeros(len(examples), dtype=torch.float64)
        info: dict[str, Any] = {}
        steps: list[float] = []
        rows = pefs
        for number in range(request.iterations):
            moved = contextlib.nullcontext() if total is None else total.applied_to(self.model)
            with moved, self.forward_pass() as forward:
                if number:
                    rows = self._rows_again(pefs, examples, request.batch_size, weights)
                step, now = step_towards(forward, rows, examples, goal, request, sketch, device)
                direction = self.direction_of(step.deltas, {"weights": weights}, unit=False)
                try:
                    length, errors = tried(forward, direction, examples, goal, now, step, request)
                except NoStepError as error:
                    if total is None:
                        raise
                    logger.warning("the edit ends after %d of %d steps: %s", number, request.iterations, error)
                    break
            steps.append(length)
            info = info or {**step.info, "tried": errors}
            predicted = predicted + length * step.predicted
            total = _joined(total, direction, length)
        assert total is not None
        with total.applied_to(self.model), self.forward_pass() as forward:
            after = observe(forward, examples, goal.outcomes, request.batch_size)
        made = {"method": "edit", "steps": steps, **info}
        made |= {"remove": request.remove, "given": request.given if request.remove else None}
        if request.remove:
            made["towards"] = request.towards
        total.info.update(made | outcome_info(goal, after, predicted))
        return total

    def _rows_again(self, pefs: PEFs, examples: list[Example], batch_size: int, weights: Mapping[str, Any]) -> PEFs:
        """The rows of the same examples at the weights that the model has now."""
        with self.forward_pass() as forward:
            maker = prepare(forward, self.fisher, examples[:_FIRST], sketch=self._sketch)
            again = compute(
                maker,
                cast(Examples, examples),
                self.provenance(weights),
                ComputeRequest(batch_size=batch_size, progress=False),
            )
        return PEFs({}, pefs.columns, pefs.info, again._shards.parts)

    def _weights_of(self, pefs: PEFs, keep: PEFs | None, check_weights: bool) -> dict[str, Any]:
        """The model's weights, which have to be those of the PEFs."""
        if keep is not None:
            check_kept(pefs, keep)
        weights = self.weights()
        if check_weights:
            remedy = "Give the model those weights again, or compute PEFs with those that it has."
            check_same_weights(pefs.info.get("weights"), weights, "these PEFs", remedy)
        return weights

    def _examples_of_pefs(self, pefs: PEFs, dataset: Any) -> list[Example]:
        """The data set's examples in the order of the PEFs, each with the content that was analysed."""
        examples = self.read(dataset, like=pefs.info, positions=pefs.config.positions)
        return align(examples, pefs.example_ids, pefs.content_hashes)

    def _own_sketch(self) -> Sketch:
        """The sketch, which `with_settings_of` has set."""
        assert self._sketch is not None
        return self._sketch

    def _solver_device(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None

    def _encoder(self) -> Callable[[str], list[int]] | None:
        """A text → its tokens, for a language model; None for others."""
        tokenizer = self.processing_class
        if not traits_of(self.head).vocabulary or not callable(tokenizer):
            return None

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        return encode


def _joined(total: ParameterDirection | None, step: ParameterDirection, length: float) -> ParameterDirection:
    """Total + length·step, of its natural length."""
    deltas: Mapping[str, Any] = {
        name: length * value + (0 if total is None else total[name]) for name, value in step.items()
    }
    return ParameterDirection(deltas, step.layouts, step.info, unit=False)
