"""LiftedModel: components of a model as directions in its weights, and contributions of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from hf_npeff.config import (
    BATCH_SIZE,
    SHADED,
    LiftForm,
    LiftMethod,
    LiftRequest,
    Ridge,
    SpareRequest,
    SparseSolver,
)
from hf_npeff.data import Example
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.record import Reading
from hf_npeff.models.movable_model import MovableModel
from hf_npeff.pefs.store import PEFs
from hf_npeff.progress import working
from hf_npeff.weights.decomposed import Decomposed
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.lifting import lift_components, plan, select
from hf_npeff.weights.plans import Plan
from hf_npeff.weights.sparing import second_moments, spared
from hf_npeff.weights.token_alignments import TokenAlignment, token_alignments

_LIFTED_TOGETHER = 4
"""How many components share forward passes in `lift_each`. Chosen: each needs memory for a copy of all analysed
weights."""


class LiftedModel(MovableModel):
    """The part of `NPEFFAnalyzer` that lifts components to weights and assigns them to tokens."""

    def lift(
        self,
        decomposition: Decomposition,
        components: int | Sequence[int],
        pefs: PEFs,
        dataset: Any,
        *,
        method: LiftMethod = LiftRequest.method,
        top_examples: int | None = LiftRequest.top_examples,
        form: LiftForm = LiftRequest.form,
        semi_orthogonal: bool = LiftRequest.semi_orthogonal,
        solver: SparseSolver = LiftRequest.solver,
        batch_size: int = LiftRequest.batch_size,
        check_weights: bool = LiftRequest.check_weights,
        selective: bool | None = LiftRequest.selective,
        ridge: Ridge = LiftRequest.ridge,
        keep: Any = LiftRequest.keep,
        memory_budget: int | None = LiftRequest.memory_budget,
    ) -> Any:
        """Lift components: turn them into directions in the weights.

        Args:
            decomposition: the decomposition of `pefs`.
            components: the number of a component, or a list of numbers, which share the forward passes.
            pefs: the PEFs that were decomposed.
            dataset: the dataset of the PEFs, in any order; ids and contents are compared.
            method: "exact" (one backward pass with the stored cotangents), "adjoint" (Pᵀg, noisy) or
                "compressed_sensing" (the sparse direction whose sketch is g).
            top_examples: lift from only this many examples, those with the largest coefficients; for the exact method.
            form: how a component of a balanced decomposition is read: "plain", the combination of unscaled rows, or
                "metric", that times D², which is steepest in the balanced metric and was more selective when measured.
                "auto" is "metric".
            semi_orthogonal: first subtract from g its projection on the components that are nearly orthogonal to it.
            solver: the solver for compressed sensing: iterative hard thresholding ("iht") or "fista".
            batch_size: how many examples a forward pass takes.
            check_weights: raise an error if the PEFs or the decomposition were made with other weights than the model
                has now.
            selective: use the direction (O + λI)⁻¹ g, which has the largest effect on the component's examples for a
                given effect on the examples on which it is not active. False uses g itself. None is selective if there
                are examples to leave alone, and otherwise warns and uses g; with methods other than "exact", with
                `top_examples` or `semi_orthogonal` it uses g.
            ridge: λ as a share of the largest eigenvalue of O; "auto" chooses it by cross-validation over the examples,
                in the sketch.
            keep: PEFs of other data that should be left alone too, with the same sketch and weights
                (`compute_pefs(other, like=pefs)`).
            memory_budget: bytes that may be used to solve. If the span of all rows needs more, only its leading part is
                used, and `info["captured"]` says how much of the rows this is.

        Returns:
            A unit `ParameterDirection`, or a list of them for several components. `info` has the method, the estimated
            cosine (of the direction's sketch with g) and, with `top_examples`, their share of the combination's weight.

        Raises:
            IndexError: if a component does not exist.
            IncompatibleSketchError: if the PEFs, the decomposition and the model do not fit together.
            IncompatibleWeightsError: if the model's weights have changed since then.
            ValueError: if the dataset or the PEFs are not those that were decomposed, the decomposition is far from
                converged, or an argument is out of range.
        """
        request = LiftRequest(
            method=method,
            top_examples=top_examples,
            form=form,
            semi_orthogonal=semi_orthogonal,
            solver=solver,
            batch_size=batch_size,
            check_weights=check_weights,
            selective=selective,
            ridge=ridge,
            keep=keep,
            memory_budget=memory_budget,
        )
        wanted = select(decomposition, components)
        analyzer, decomposed = self._opened(decomposition, pefs, dataset, check_weights)
        directions = analyzer._lift(decomposed, analyzer._planned(decomposed, wanted, request), request)
        return directions[0] if hasattr(components, "__index__") else directions

    def lift_each(
        self,
        decomposition: Decomposition,
        components: Sequence[int],
        pefs: PEFs,
        dataset: Any,
        **settings: Any,
    ) -> Iterator[tuple[int, ParameterDirection]]:
        """`lift` for many components, a few at a time, because each needs the memory of all analysed weights.

        Yields:
            A component's number and its direction, in the order of `components`.
        """
        wanted = select(decomposition, components)
        request = LiftRequest(**settings)
        analyzer, decomposed = self._opened(decomposition, pefs, dataset, request.check_weights)
        yield from analyzer._lift_each(decomposed, wanted, request)

    def _lift_each(
        self, decomposed: Decomposed, wanted: list[int], request: LiftRequest
    ) -> Iterator[tuple[int, ParameterDirection]]:
        plans = self._planned(decomposed, wanted, request)
        for start in range(0, len(wanted), _LIFTED_TOGETHER):
            group = slice(start, start + _LIFTED_TOGETHER)
            yield from zip(wanted[group], self._lift(decomposed, plans[group], request), strict=True)

    def _planned(self, decomposed: Decomposed, wanted: list[int], request: LiftRequest) -> list[Plan]:
        device = self.device if self.device.type == "cuda" else None
        return plan(decomposed.decomposition, wanted, decomposed.pefs, request, device)

    def _lift(self, decomposed: Decomposed, plans: list[Plan], request: LiftRequest) -> list[ParameterDirection]:
        label = f"lifting component {plans[0].component}" if len(plans) == 1 else f"lifting {len(plans)} components"
        with self.forward_pass() as forward, working(label, len(decomposed.examples)):
            lifted = lift_components(forward, decomposed, plans, request)
        kept = {"fingerprint": decomposed.pefs.fingerprint, "weights": dict(decomposed.weights)}
        return [self.direction_of(direction.deltas, {**kept, **direction.info}) for direction in lifted]

    def spare(
        self,
        change: ParameterDirection | Sequence[ParameterDirection],
        dataset: Any,
        *,
        decomposition: Decomposition | None = None,
        ridge: float = SpareRequest.ridge,
        rank: int | Sequence[int | None] | None = SpareRequest.rank,
        batch_size: int = SpareRequest.batch_size,
        max_examples: int | None = None,
        **reading: Any,
    ) -> Any:
        """The change that keeps most of another change and leaves the outputs of layers on a data set alone.

        A change adds δx to the output of a linear map. The returned change maximises ⟨δ₀, δ⟩² over the mean of ‖δx‖² on
        the tokens of the data set: it is δ₀ (C + λ diag C)⁻¹ with C their second moments. A selective direction leaves
        predictions alone only while KL is quadratic in the step; this change also does for long steps.

        Args:
            change: a change of linear maps from `lift`, `lift_examples` or `edit`; or several changes of the same
                weights, which share the forward passes.
            dataset: the data to spare; this takes one forward pass over it, and no PEFs.
            decomposition: the decomposition of the data set, if the changes are its components. Each change then spares
                the examples on which its component is not active. None spares all examples, so the data set must not
                contain examples that should move.
            ridge: λ.
            rank: the rank to which every weight's change is truncated, where that disturbs the spared data least; a
                LoRA of that rank then holds it exactly. For several changes, one rank for all or one for each.
            batch_size: how many examples a forward pass takes.
            max_examples: use only this many examples, the first ones.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Returns:
            A direction of unit norm, or a list of directions for several changes. `info["spared"]` has examples,
            tokens, ridge and rank, the cosine with the change, and the share of the disturbance that is left at equal
            length.

        Raises:
            UnsupportedModelError: if a change affects anything other than weights of linear maps.
            ValueError: if an argument is out of range, the model or the data set does not fit, changes are of different
                weights, one does not belong to a component of the decomposition, or there is nothing to spare.
        """
        request = SpareRequest(ridge=ridge, rank=rank, batch_size=batch_size)
        changes = [change] if isinstance(change, ParameterDirection) else list(change)
        ranks = request.ranks(len(changes))
        deltas = [each.linear_deltas() for each in changes]
        if not deltas or any(set(each) != set(deltas[0]) for each in deltas):
            raise ValueError("give a direction, or several over the same weights")
        for each in changes:
            self.check_movable(each, in_place=False)
        examples, left_out = self._to_be_spared(changes, dataset, decomposition, max_examples, Reading(**reading))
        with self.forward_pass() as forward, working("reading the data to spare", len(examples)):
            sets = second_moments(forward, examples, deltas[0], batch_size, left_out)
        made = []
        sets = sets if len(sets) > 1 else sets * len(changes)
        for each, delta, moments, own_rank in zip(changes, deltas, sets, ranks, strict=True):
            matrices, description = spared(delta, moments, request.ridge, own_rank)
            turned = {n: m.mT.contiguous() if each.layouts[n] == "conv1d" else m for n, m in matrices.items()}
            info = {name: value for name, value in each.info.items() if name != "natural_scale"}
            made.append(ParameterDirection(turned, each.layouts, info | description))
        return made[0] if isinstance(change, ParameterDirection) else made

    def _to_be_spared(
        self,
        changes: Sequence[ParameterDirection],
        dataset: Any,
        decomposition: Decomposition | None,
        max_examples: int | None,
        reading: Reading,
    ) -> tuple[list[Example], Tensor | None]:
        """The examples, and (n, b) which of them each change does not spare; None if all changes spare all examples."""
        if decomposition is None:
            return self._checked(self.read(dataset, reading, max_examples=max_examples)), None
        if max_examples is not None or reading != Reading():
            raise ValueError("with decomposition= the whole data set is read, as it was analysed")
        if unknown := [repr(each) for each in changes if "component" not in each.info]:
            raise ValueError(
                f"{unknown[0]} does not belong to a component, so it is not known which examples it should spare"
            )
        components = [decomposition.index_of(each.info["component"]) for each in changes]
        active = active_examples(decomposition.coefficients)[:, components]
        if bool(active.all(0).any()):
            busy = [j for j, all_active in zip(components, active.all(0).tolist(), strict=True) if all_active]
            raise ValueError(f"the components {busy} are active on all examples, so there are no examples to spare")
        return self.examples_of(decomposition, dataset), active

    def token_alignments(
        self,
        decomposition: Decomposition,
        pefs: PEFs,
        dataset: Any,
        components: Sequence[int] | None = None,
        *,
        n_top: int = SHADED,
        batch_size: int = BATCH_SIZE,
        check_weights: bool = LiftRequest.check_weights,
    ) -> list[TokenAlignment]:
        """The exact contribution of each token of a component's top examples to their alignment with the component.

        This takes one forward and one backward pass for every example and component, with the stored cotangents.

        Args:
            decomposition: the decomposition of `pefs`.
            pefs: the PEFs that were decomposed.
            dataset: the dataset of the PEFs, in any order; ids and contents are compared.
            components: the numbers of the components; None means all.
            n_top: how many top examples of each component, from `Component.top_examples`; examples with a coefficient
                of zero are left out.
            batch_size: how many examples a forward pass takes.
            check_weights: raise an error if the PEFs or the decomposition were made with other weights than the model
                has now.

        Returns:
            A `TokenAlignment` for every component and top example, for `Decomposition.to_html(alignments=…)`.

        Raises:
            IndexError: if a component does not exist.
            IncompatibleSketchError: if the PEFs, the decomposition and the model do not fit together.
            IncompatibleWeightsError: if the model's weights have changed since then.
            ValueError: if the dataset or the PEFs are not those that were decomposed, or a number is below 1.
        """
        if min(n_top, batch_size) < 1:
            raise ValueError(f"n_top and batch_size must be at least 1, but they are {n_top} and {batch_size}")
        wanted = select(decomposition, range(len(decomposition)) if components is None else components)
        chosen = {j: decomposition[j].top_examples(n_top).indices for j in wanted}
        analyzer, decomposed = self._opened(decomposition, pefs, dataset, check_weights)
        decode = getattr(self.processing_class, "decode", None)
        with analyzer.forward_pass() as forward, working("aligning tokens", sum(map(len, chosen.values()))):
            return token_alignments(forward, decomposed, chosen, decode, batch_size)
