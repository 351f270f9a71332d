"""LiftedModel: components of a model as directions in its weights, and as shares of tokens."""

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
            decomposition: the decomposition of `pefs`.
            components: a number, or several, which share the forward passes.
            pefs: those that were decomposed.
            dataset: the one they came from, in any order; ids and contents are compared.
            method: "exact" (one backward pass with the stored cotangents), "adjoint" (Pᵀg, noisy) or
                "compressed_sensing" (the sparse direction whose sketch is g).
            top_examples: exact lifting from the examples with the largest coefficients only.
            form: the form of a balanced decomposition: "plain", the combination of unscaled rows, or "metric", that
                times D², steepest in the balanced metric and the more selective by measurement; "auto" takes it.
            semi_orthogonal: first take out of g its projection on the components nearly orthogonal to it.
            solver: the algorithm of compressed sensing: iterative hard thresholding ("iht") or "fista".
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
        """`lift` for many components, a few at a time: each takes the memory of all analysed weights.

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
        told = f"lifting component {plans[0].component}" if len(plans) == 1 else f"lifting {len(plans)} components"
        with self.forward_pass() as forward, working(told, len(decomposed.examples)):
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
        """A change that keeps most of another, and leaves what layers give on a data set as it is.

        What a change adds behind a linear map is δx. The one that is returned maximises ⟨δ₀, δ⟩² over the mean of ‖δx‖²
        on the tokens of the data set: δ₀ (C + λ diag C)⁻¹ with C their second moments. A selective direction leaves
        predictions alone as long as KL is a square of the step; this holds at steps that move others by nats.

        Args:
            change: from `lift`, `lift_examples` or `edit`, of linear maps alone; or several, over the same weights,
                which share the forward passes.
            dataset: what is to be spared: one forward pass over it, and no PEFs.
            decomposition: the decomposition of the data set, whose components the changes are: then each spares the
                examples on which its component is not active. None spares all examples: give none that are to move.
            ridge: λ.
            rank: what every weight's change is cut to, losing the least in that metric, not in the weights'; a LoRA of
                that rank then holds it whole. Of several changes, one for all or one each.
            batch_size: examples of a forward pass.
            max_examples: only the first ones.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Returns:
            A unit direction, whatever length the change had, or a list of them where several were given.
            `info["spared"]` holds examples, tokens, ridge and rank, the cosine with the change, and what of the
            disturbance is left at equal length.

        Raises:
            UnsupportedModelError: if a change moves anything but weights of linear maps.
            ValueError: if an argument is out of range, the model or the data set is another one, changes are over
                different weights, one is of no component of the decomposition, or nothing is left to be spared.
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
        with self.forward_pass() as forward, working("reading what is to be spared", len(examples)):
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
        """Examples, and (n, b) which of them each change does not spare; None where all are spared by all."""
        if decomposition is None:
            return self._checked(self.read(dataset, reading, max_examples=max_examples)), None
        if max_examples is not None or reading != Reading():
            raise ValueError("with decomposition= the data set is read whole, and as it was analysed")
        if unknown := [repr(each) for each in changes if "component" not in each.info]:
            raise ValueError(f"{unknown[0]} is of no component, so it is not known which examples it is to spare")
        components = [decomposition.index_of(each.info["component"]) for each in changes]
        active = active_examples(decomposition.coefficients)[:, components]
        if bool(active.all(0).any()):
            busy = [j for j, all_active in zip(components, active.all(0).tolist(), strict=True) if all_active]
            raise ValueError(f"the components {busy} are active on all examples, so that none is left to be spared")
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
        """How much each token of a component's top examples contributes to their alignment with it, exactly.

        One forward and one backward pass for every example and component, with the stored cotangents.

        Args:
            decomposition: the decomposition of `pefs`.
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
        analyzer, decomposed = self._opened(decomposition, pefs, dataset, check_weights)
        decode = getattr(self.processing_class, "decode", None)
        with analyzer.forward_pass() as forward, working("aligning tokens", sum(map(len, chosen.values()))):
            return token_alignments(forward, decomposed, chosen, decode, batch_size)
