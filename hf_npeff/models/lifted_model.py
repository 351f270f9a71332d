"""LiftedModel: components of a model as directions in its weights, and as shares of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_npeff.config import (
    BATCH_SIZE,
    SHADED,
    LiftForm,
    LiftMethod,
    LiftRequest,
    Ridge,
    SparseSolver,
)
from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.models.movable_model import MovableModel
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.lifting import lift_components, plan, select
from hf_npeff.weights.plans import Plan
from hf_npeff.weights.token_alignments import TokenAlignment, token_alignments

_LIFTED_TOGETHER = 4
"""Components that share forward passes in `lift_each`. Chosen: each holds a copy of all analysed weights meanwhile."""


class LiftedModel(MovableModel):
    """A model to whose weights and tokens components are taken back."""

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
        """Components as directions in the parameters.

        Args:
            decomposition: of `pefs`.
            components: a number, or several, which share the forward passes.
            pefs: those that were decomposed.
            dataset: the one they came from, in any order; ids and contents are compared.
            method: "exact" (one backward pass with the stored cotangents), "adjoint" (Pᵀg, noisy) or
                "compressed_sensing" (the sparse direction whose sketch is g).
            top_examples: exact lifting from the examples with the largest coefficients only.
            form: of a balanced decomposition: "plain", the combination of unscaled rows, or "metric", that times D²,
                steepest in the balanced metric and the more selective by measurement; "auto" takes it.
            semi_orthogonal: first take out of g its projection on the components nearly orthogonal to it.
            solver: of compressed sensing: iterative hard thresholding ("iht") or "fista".
            batch_size: examples of a forward pass.
            check_weights: refuse PEFs and decompositions of other weights than the model has now.
            selective: the direction (O + λI)⁻¹ g, which moves the component most for what it does to the examples on
                which it is not active. None does so where there are such examples, else warns and lifts g itself, and
                stays with g for other methods than "exact", `top_examples` and `semi_orthogonal`; False gives g.
            ridge: λ as a share of the largest eigenvalue of O; "auto" cross-validates it on the examples to be left
                alone, in the sketch.
            keep: PEFs of other data with the same sketch and weights, which are to be left alone too
                (`compute_pefs(other, like=pefs)`).
            memory_budget: bytes for solving; with less than the span of all rows needs, its leading part is used, and
                `info["captured"]` says how much of the rows that is.

        Returns:
            A unit `ParameterDirection`, or a list of them where several components were asked for. `info` holds the
            method, the estimated cosine (the sketch of the direction against g) and, with `top_examples`, the share of
            the combination's weight that these carry.

        Raises:
            IndexError: if a component does not exist.
            IncompatibleSketchError: if the PEFs, the decomposition and the model do not belong together.
            IncompatibleWeightsError: if the model's weights have changed since.
            ValueError: if the dataset or the PEFs are others than were decomposed, the decomposition is far from
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
        analyzer = self.for_decomposition(decomposition)
        weights = analyzer.weights_for(decomposition, pefs, check_weights)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        plans = analyzer._planned(decomposition, wanted, pefs, request)
        directions = analyzer._lift(decomposition, plans, pefs, examples, request, weights)
        return directions[0] if hasattr(components, "__index__") else directions

    def lift_each(
        self,
        decomposition: Decomposition,
        components: Sequence[int],
        pefs: PEFs,
        dataset: Any,
        **settings: Any,
    ) -> Iterator[tuple[int, ParameterDirection]]:
        """`lift` for many components, a few at a time: each takes the memory of all analysed weights.

        Yields:
            A component's number and its direction, in the order of `components`.
        """
        wanted = select(decomposition, components)
        analyzer = self.for_decomposition(decomposition)
        request = LiftRequest(**settings)
        weights = analyzer.weights_for(decomposition, pefs, request.check_weights)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        yield from analyzer._lift_each(decomposition, wanted, pefs, examples, request, weights)

    def _lift_each(
        self,
        decomposition: Decomposition,
        wanted: list[int],
        pefs: PEFs,
        examples: list[Example],
        request: LiftRequest,
        weights: Mapping[str, Any],
    ) -> Iterator[tuple[int, ParameterDirection]]:
        plans = self._planned(decomposition, wanted, pefs, request)
        for start in range(0, len(wanted), _LIFTED_TOGETHER):
            group = slice(start, start + _LIFTED_TOGETHER)
            directions = self._lift(decomposition, plans[group], pefs, examples, request, weights)
            yield from zip(wanted[group], directions, strict=True)

    def _planned(self, decomposition: Decomposition, wanted: list[int], pefs: PEFs, request: LiftRequest) -> list[Plan]:
        return plan(decomposition, wanted, pefs, request, self.device if self.device.type == "cuda" else None)

    def _lift(
        self,
        decomposition: Decomposition,
        plans: list[Plan],
        pefs: PEFs,
        examples: list[Example],
        request: LiftRequest,
        weights: Mapping[str, Any],
    ) -> list[ParameterDirection]:
        with self.forward_pass() as forward:
            lifted = lift_components(forward, decomposition, plans, pefs, examples, request, self._sketch)
        kept = {"fingerprint": pefs.fingerprint, "weights": dict(weights)}
        return [self.direction_of(direction.deltas, {**kept, **direction.facts}) for direction in lifted]

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
        """How much each token of a component's top examples contributes to their alignment with it, exactly.

        One forward and one backward pass for every example and component, with the stored cotangents.

        Args:
            decomposition: of `pefs`.
            pefs: those that were decomposed.
            dataset: the one they came from, in any order; ids and contents are compared.
            components: their numbers; None takes all.
            n_top: top examples of each, as `Component.top_examples` gives them; those with a coefficient of zero are
                left out.
            batch_size: examples of a forward pass.
            check_weights: refuse PEFs and decompositions of other weights than the model has now.

        Returns:
            One for every component and top example, for `Decomposition.to_html(alignments=…)`.

        Raises:
            IndexError: if a component does not exist.
            IncompatibleSketchError: if the PEFs, the decomposition and the model do not belong together.
            IncompatibleWeightsError: if the model's weights have changed since.
            ValueError: if the dataset or the PEFs are others than were decomposed, or a number is below 1.
        """
        if min(n_top, batch_size) < 1:
            raise ValueError(f"n_top and batch_size must be at least 1, but they are {n_top} and {batch_size}")
        wanted = select(decomposition, range(len(decomposition)) if components is None else components)
        chosen = {j: decomposition[j].top_examples(n_top).indices for j in wanted}
        analyzer = self.for_decomposition(decomposition)
        analyzer.weights_for(decomposition, pefs, check_weights)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        decode = getattr(self.processing_class, "decode", None)
        with analyzer.forward_pass() as forward:
            return token_alignments(
                forward, decomposition, pefs, examples, chosen, decode, batch_size, analyzer._sketch
            )
