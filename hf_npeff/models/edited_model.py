"""EditedModel: weight changes of a model from stored rows, without a decomposition."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from hf_npeff.config import ComputeRequest, EditRequest, Ridge, Towards
from hf_npeff.data import Example, Examples, class_names
from hf_npeff.encoding.record import Encoded
from hf_npeff.fisher.compute import compute
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.kept_columns import check_columns
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.fisher.preparation import prepare
from hf_npeff.models.movable_model import MovableModel
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs, check_pefs
from hf_npeff.pefs.weights_identity import check_same_weights
from hf_npeff.progress import working
from hf_npeff.records import features_of
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.editing import (
    Goal,
    Step,
    goal_of,
    lift_contrast,
    outcome_info,
    sides,
    step_towards,
    tried,
    warn_of_what_is_not_reached,
)
from hf_npeff.weights.edits import STEPS, Length, NoStepError
from hf_npeff.weights.lifting import align
from hf_npeff.weights.log_odds import Naming, observe
from hf_npeff.weights.plans import check_kept
from hf_npeff.weights.ridge import RIDGES

logger = logging.getLogger(__name__)
_READ_BY_STEP = 2 + len(STEPS)
"""How often the model reads every example for a step: outcomes and their gradients, lifting, trials."""
_FIRST = 8
"""The number of examples in the self-test when rows are computed again with a known sketch."""
_NEXT_RIDGE = 10
"""The factor from a ridge that is too small to the next one. Chosen: half as many ridges as cross-validation tries."""


class EditedModel(MovableModel):
    """A model and changes of its weights: the part of `NPEFFAnalyzer` that needs no decomposition."""

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
        """The direction with the largest effect on some examples for a given effect on others, without a decomposition.

        It maximises the mean KL on the first over that on the others, to second order: δᵀTδ / (δᵀOδ + λ‖δ‖²) with the
        means T and O of their PEFs, with raw norms. Its sign has no meaning: measure both signs.

        Args:
            pefs: the PEFs of all these examples.
            dataset: the dataset of the PEFs, in any order; ids and contents are compared.
            ids: the ids of the examples to move.
            against: the ids of the examples to leave alone; None means all others.
            ridge: λ as a share of the largest eigenvalue of O, or "auto", by cross-validation over both groups.
            keep: PEFs of other data that should be left alone too; they need the same sketch and weights.
            memory_budget: bytes for solving, as in `lift`.
            batch_size: how many examples a forward pass takes.
            check_weights: raise an error if the PEFs were made with other weights than the model has now.

        Returns:
            A unit direction. `info` has the ridge, its cross-validated score and the eigenvalue.

        Raises:
            IncompatibleSketchError: if PEFs, `keep` and the model do not fit together.
            IncompatibleWeightsError: if the model or `keep` has other weights than the PEFs.
            ValueError: if an id is unknown or in both groups, a group is empty, or the dataset is not that of the PEFs.
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

        It is solved for in closed form from the stored rows, lifted exactly, and then tried on the given examples at a
        quarter, a half and the whole of its length. The largest step is kept that does what was predicted and does not
        move what should stay the same further than what should change: other examples, and other labels or numbers of
        the same ones.

        Args:
            pefs: the PEFs of the examples that should change and of others that should stay the same.
            dataset: the dataset of the PEFs, in any order; ids and contents are compared.
            change: {example id: nats by which the log-odds of its outcome should change}. For a regression, the amount
                by which the predicted number should change. All other examples should stay the same.
            remove: instead of `change`, a column whose influence is taken out: for each of its values, the mean
                log-odds of the examples move to the mean of all examples.
            given: a column; `remove` compares only examples with the same value in it. None compares all examples.
            towards: the goal of `remove`. "mean" moves to the mean of all examples. "highest" leaves the examples of
                the value with the highest mean log-odds alone, and moves the others to their log-odds, rank by rank. If
                `outcome` is a column of labels, the model then does the same where the column misleads it as where the
                column helps it.
            outcome: the outcome whose log-odds change: the number of a class, label, token or output; a class's name; a
                text of one token; or a column that has one of these for every example. It may be left out if there is
                only one outcome, or two classes.
            keep: PEFs of other data that should be left alone too; they need the same sketch and weights.
            ridge: regularisation of the change, as a share of the largest eigenvalue of the rows' Gram matrix; more
                makes the change smaller and less exact. "auto" chooses the value with the least error on held-out
                examples, in the sketch, and larger ones if the model does not do what this one predicts.
            iterations: how often to solve. Each further iteration computes the rows at the new weights and solves for
                what is still missing. The PEFs in `keep` are not computed again.
            memory_budget: bytes for solving, as in `lift`.
            batch_size: how many examples a forward pass takes.
            check_weights: raise an error if the PEFs were made with other weights than the model has now.

        Returns:
            A direction with a natural scale of 1: `applied_to(model)` and `to_adapter(rank)` make the change. `info`
            has the wanted, predicted and realised changes by group or id; `reached`, the share of the wanted changes
            that is realised (below a half there is a warning); the share of the wanted change that the rows express;
            the ridge with its cross-validated error, and the smaller ones that were refused; and the step. It also has
            what else moved, as mean KL: `kl_beside` on the same examples, `kl_of_others` on those that should stay the
            same; the shares of changed answers, `flips` and `flips_of_others`; and `disturbing`, a step that was
            refused because of what else it moved.

        Raises:
            IncompatibleSketchError: if PEFs, `keep` and the model do not fit together.
            IncompatibleWeightsError: if the model or `keep` has other weights than the PEFs.
            UnsupportedModelError: if the model predicts places in its input, or its weights are sharded.
            ValueError: if the goal is not clear, an id is unknown, a column is missing, incomplete or has a single
                value, the dataset is not that of the PEFs or has other values in that column, or no step does what was
                predicted.
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
        named = (outcome, remove, given if remove else None)
        check_columns([name for name in named if isinstance(name, str)], pefs.columns, examples)
        naming = Naming(
            pefs.columns, analyzer.description.label_names, analyzer._encoder(), _class_names(pefs, dataset)
        )
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
                try:
                    step, direction, length = self._step(forward, rows, examples, goal, request, weights)
                except NoStepError as error:
                    if total is None:
                        raise
                    logger.warning("the edit ended after %d of %d iterations: %s", number, request.iterations, error)
                    break
            steps.append(length.step)
            info = info or {**step.info, "tried": length.errors, "disturbing": length.disturbing}
            predicted = predicted + length.step * step.predicted
            total = _joined(total, direction, length.step)
        assert total is not None
        with total.applied_to(self.model), self.forward_pass() as forward:
            after = observe(forward, examples, goal.outcomes, request.batch_size)
        made = {"method": "edit", "steps": steps, **info}
        made |= {"remove": request.remove, "given": request.given if request.remove else None}
        if request.remove:
            made["towards"] = request.towards
        total.info.update(made | outcome_info(goal, after, predicted))
        warn_of_what_is_not_reached(total.info, request.iterations)
        return total

    def _step(
        self,
        forward: ForwardPass,
        rows: PEFs,
        examples: list[Example],
        goal: Goal,
        request: EditRequest,
        weights: dict[str, Any],
    ) -> tuple[Step, ParameterDirection, Length]:
        """The solution at the present weights, its direction, and its length.

        Cross-validation chooses the ridge from linear predictions. If the model refutes them, "auto" goes on to larger
        ridges, which make smaller changes.

        Raises:
            NoStepError: if no length does what was predicted.
        """
        refused: list[float] = []
        at: Ridge = request.ridge
        while True:
            with_ridge = replace(request, ridge=at)
            step, now = step_towards(
                forward, rows, examples, goal, with_ridge, self._own_sketch(), self._solver_device()
            )
            direction = self.direction_of(step.deltas, {"weights": weights}, unit=False)
            try:
                length = tried(forward, direction, examples, goal, now, step, with_ridge)
            except NoStepError as error:
                larger = _NEXT_RIDGE * step.info["ridge"]
                if request.ridge != "auto" or larger > max(RIDGES):
                    raise
                at = larger
                logger.info("the ridge %.1g is too small, and a larger one is tried: %s", step.info["ridge"], error)
                refused.append(step.info["ridge"])
                continue
            step.info["refused_ridges"] = refused
            return step, direction, length

    def _rows_again(self, pefs: PEFs, examples: list[Example], batch_size: int, weights: Mapping[str, Any]) -> PEFs:
        """The rows of the same examples at the model's present weights."""
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
        """The identity of the model's weights, after checking that they are those of the PEFs."""
        if keep is not None:
            check_kept(pefs, keep)
        weights = self.weights()
        if check_weights:
            remedy = "Restore those weights, or compute PEFs with the present ones."
            check_same_weights(pefs.info.get("weights"), weights, "these PEFs", remedy)
        return weights

    def _examples_of_pefs(self, pefs: PEFs, dataset: Any) -> list[Example]:
        """The data set's examples in the order of the PEFs, after comparing their contents with the analysed ones."""
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


def _class_names(pefs: PEFs, dataset: Any) -> dict[str, Sequence[str]]:
    """{column: the data set's own names of its classes}, of the data set at hand and of the one that was analysed."""
    record = Encoded.of(pefs.info)
    read = {} if record is None or record.label_names is None else {str(record.label_column): record.label_names}
    return {**class_names(features_of(dataset)), **read}


def _joined(total: ParameterDirection | None, step: ParameterDirection, length: float) -> ParameterDirection:
    """Total + length·step, with its own length."""
    deltas: Mapping[str, Any] = {
        name: length * value + (0 if total is None else total[name]) for name, value in step.items()
    }
    return ParameterDirection(deltas, step.layouts, step.info, unit=False)
