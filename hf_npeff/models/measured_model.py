"""MeasuredModel: what a weight change does to the predictions of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from hf_npeff.config import (
    LiftRequest,
    MeasureRequest,
    OffTargetRequest,
    PerturbationRequest,
    Quantisation,
)
from hf_npeff.data import Example, Examples
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.record import Reading
from hf_npeff.models.adapted_model import RANK, AdaptedModel
from hf_npeff.models.fisher_model import FisherModel
from hf_npeff.pefs.store import PEFs
from hf_npeff.progress import working
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.directions import as_direction
from hf_npeff.weights.layouts import layouts_of
from hf_npeff.weights.lifting import select
from hf_npeff.weights.measurement import Change, Measurement, check_groups, is_linear, measure
from hf_npeff.weights.off_target import OffTarget, check_tokens, off_target
from hf_npeff.weights.off_target import examples_read as searched_examples
from hf_npeff.weights.perturbation import PerturbationReport
from hf_npeff.weights.trials import evaluate, evaluate_together, examples_read

_Self = TypeVar("_Self", bound="MeasuredModel")

_MEASURED_TOGETHER = 32
"""Adapters whose searches take turns. Chosen: each is held twice meanwhile, beside a random one of its size."""


class MeasuredModel(FisherModel, AdaptedModel):
    """A model on which directions, adapters and edits are measured."""

    def evaluate_direction(
        self,
        direction: Change,
        decomposition: Decomposition,
        component: int,
        dataset: Any,
        *,
        target_kl: float = PerturbationRequest.target_kl,
        scale: float | None = PerturbationRequest.scale,
        n_top: int = PerturbationRequest.n_top,
        n_others: int = PerturbationRequest.n_others,
        batch_size: int = PerturbationRequest.batch_size,
        seed: int = PerturbationRequest.seed,
        search_rounds: int = PerturbationRequest.search_rounds,
        held_out: Any = None,
        by: str | None = None,
    ) -> PerturbationReport:
        """What moving the parameters along a direction does to a component's top examples and to others.

        Args:
            direction: from `lift`, or an adapter of linear maps, whose scale of 1 is the adapter as it is.
            decomposition: whose component is followed.
            component: its number.
            dataset: the one that was analysed, in any order.
            target_kl: mean KL on the top examples (nats) that each sign's step is to reach.
            scale: a given step instead.
            n_top: top examples.
            n_others: others, drawn from the examples on which the component is not active.
            batch_size: examples of a forward pass.
            seed: the seed of the drawing, the random direction, the search and the bootstrap.
            search_rounds: rounds of a search for inputs that the best step moves although they are not the component's,
                from the most moved of the others: see `off_target`. 0 searches for none.
            held_out: other data, never analysed, on which the best step is measured too: see `measure`.
            by: a column of that data whose values make groups.

        Returns:
            KL on both, their ratio with a bootstrap interval, flips, accuracy where there are labels (of regression the
            errors, and no flips), answers that changed, for the more selective sign, the other, and a random direction
            of equal norm.

        Raises:
            IndexError: if the component does not exist.
            UnsupportedModelError: if the model's weights are sharded over processes, and the direction moves more than
                those of linear maps; or if an adapter stores what a norm becomes.
            ValueError: if an argument is out of range, the dataset or model does not fit, or a search is wanted and the
                inputs are no sequences of tokens.
        """
        request = PerturbationRequest(
            target_kl=target_kl,
            scale=scale,
            n_top=n_top,
            n_others=n_others,
            batch_size=batch_size,
            seed=seed,
            search_rounds=search_rounds,
        )
        direction = as_direction(direction, self.model)
        self.check_movable(direction, in_place=not is_linear(direction))
        component = decomposition.index_of(component)
        analyzer = self._predicting_as(decomposition)
        examples = analyzer.examples_of(decomposition, dataset)
        if held_out is None and by is not None:
            raise ValueError(f"by={by!r} is a column of held_out, which is not given")
        others = None if held_out is None else analyzer._measurable(analyzer.read(held_out, Reading()), by)
        with analyzer.forward_pass() as forward:
            report = evaluate(forward, direction, decomposition, component, examples, request)
        report = analyzer._searched(report, direction, decomposition, examples, request)
        if others is None:
            return report
        of_best_step = MeasureRequest(scales=(report.scale,), by=by, batch_size=batch_size, seed=seed)
        return replace(report, held_out=analyzer._measured(direction, others, of_best_step))

    def _predicting_as(self: _Self, decomposition: Decomposition) -> _Self:
        """An analyzer that predicts at the positions where the decomposition's examples were analysed."""
        made_elsewhere = decomposition.info.get("sketch") is None  # no positions are known of such rows
        if made_elsewhere or decomposition.fisher_config.positions == self.fisher.positions:
            return self
        return self.for_decomposition(decomposition)

    def evaluate_components(
        self,
        decomposition: Decomposition,
        pefs: PEFs,
        dataset: Any,
        components: Sequence[int] | None = None,
        *,
        rank: int | None = RANK,
        lift: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> list[PerturbationReport]:
        """What moving the parameters along several components does, kept in `decomposition.evaluations`.

        All of them are lifted as adapters of one rank, and measured in shared forward passes (`lift_adapters`,
        `evaluate_adapters`). Where components move more than linear maps, or another method lifts them, every
        component is lifted and measured by itself, whole.

        Args:
            decomposition: of `pefs`.
            pefs: those that were decomposed.
            dataset: the one they came from.
            components: their numbers; None takes all.
            rank: of the adapters that are measured; None measures whole directions, one after another.
            lift: arguments of `lift`, `check_weights` among them.
            **settings: arguments of `evaluate_direction`.

        Returns:
            A report a component, in order.
        """
        wanted = select(decomposition, range(len(decomposition)) if components is None else components)
        request, measuring = LiftRequest(**dict(lift or {})), PerturbationRequest(**settings)
        analyzer, decomposed = self._opened(decomposition, pefs, dataset, request.check_weights)
        examples = list(decomposed.examples)
        if rank is not None and request.method == "exact" and analyzer._moves_linear_maps():
            low = min(rank, max(min(shape) for shape in analyzer.shapes.values()))
            adapters = analyzer._adapters(decomposed, wanted, request, rank=low)
            return analyzer._measured_together(adapters, decomposition, wanted, examples, pefs, measuring)
        reports: list[PerturbationReport] = []
        for j, direction in analyzer._lift_each(decomposed, wanted, request):
            self.check_movable(direction, in_place=not is_linear(direction))
            with analyzer.forward_pass() as forward:
                report = evaluate(forward, direction, decomposition, j, examples, measuring, (pefs.sketch(), pefs))
            report = analyzer._searched(report, direction, decomposition, examples, measuring)
            decomposition.evaluations[j] = report.summary()
            reports.append(report)
        return reports

    def _moves_linear_maps(self) -> bool:
        """Whether components change linear maps alone, so that all can be lifted and measured together."""
        return set(layouts_of(self.model, self.shapes).values()) <= {"linear", "conv1d"}

    def evaluate_adapters(
        self,
        adapters: Sequence[Adapter],
        decomposition: Decomposition,
        dataset: Any,
        pefs: PEFs | None = None,
        **settings: Any,
    ) -> list[PerturbationReport]:
        """`evaluate_direction` for adapters of components, in shared forward passes.

        Component, sign and scale differ from example to example of a batch, and no weight is touched, so the model may
        be quantised, offloaded or sharded. Reports are kept in `decomposition.evaluations`.

        Args:
            adapters: from `lift_adapters`; a step of 1 is an adapter as it is.
            decomposition: whose components they are.
            dataset: the one that was analysed, in any order.
            pefs: those that were decomposed, which predict the first steps to try; None tries short ones first.
            **settings: arguments of `evaluate_direction`, but for `held_out` and `by`.

        Returns:
            A report an adapter, in order.

        Raises:
            IndexError: if the decomposition has no such component.
            UnsupportedModelError: if an adapter changes anything but linear maps.
            ValueError: if an adapter is of no component, an argument is out of range, or the dataset or model does not
                fit.
        """
        request = PerturbationRequest(**settings)
        numbers = [None if adapter.about is None else adapter.about.component for adapter in adapters]
        if not numbers or None in numbers:
            raise ValueError("evaluate_adapters takes adapters of components, as lift_adapters makes them")
        components = [decomposition.index_of(j) for j in numbers if j is not None]
        self.check_movable(adapters[0], in_place=False)
        analyzer = self._predicting_as(decomposition)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        return analyzer._measured_together(adapters, decomposition, components, examples, pefs, request)

    def _measured_together(
        self,
        adapters: Sequence[Adapter],
        decomposition: Decomposition,
        components: list[int],
        examples: list[Example],
        pefs: PEFs | None,
        request: PerturbationRequest,
    ) -> list[PerturbationReport]:
        """`evaluate_adapters` for examples that are encoded already."""
        changes = [adapter.linear_deltas() for adapter in adapters]
        rows = None if pefs is None else (pefs.sketch(), pefs)
        reports: list[PerturbationReport] = []
        told = f"measuring {len(changes)} components"
        with self.forward_pass() as forward, working(told, examples_read(len(changes), request)) as progress:
            for start in range(0, len(changes), _MEASURED_TOGETHER):
                few = slice(start, start + _MEASURED_TOGETHER)
                progress.later = examples_read(len(changes[few.stop :]), request)
                reports += evaluate_together(
                    forward, changes[few], decomposition, components[few], examples, request, rows
                )
        each = searched_examples(request.n_others, OffTargetRequest(1.0, rounds=request.search_rounds))
        with working("searching for inputs off target", each * len(reports)):
            pairs = zip(reports, adapters, strict=True)
            reports = [self._searched(report, adapter, decomposition, examples, request) for report, adapter in pairs]
        decomposition.evaluations |= {j: report.summary() for j, report in zip(components, reports, strict=True)}
        return reports

    def _searched(
        self,
        report: PerturbationReport,
        direction: Change,
        decomposition: Decomposition,
        examples: Sequence[Example],
        request: PerturbationRequest,
    ) -> PerturbationReport:
        """The report with what a search finds from its other examples, where one is asked for."""
        if not request.search_rounds:
            return report
        pool = [examples[i] for i in report.other_examples]
        check_tokens(pool)
        searching = OffTargetRequest(
            report.scale, rounds=request.search_rounds, batch_size=request.batch_size, seed=request.seed
        )
        searched = self._search(direction, pool, searching, (decomposition, report.component))
        return replace(report, off_target=searched)

    def _search(
        self,
        change: Change,
        pool: list[Example],
        request: OffTargetRequest,
        whose: tuple[Decomposition, int] | None,
    ) -> OffTarget:
        """A change on a pool that it is not meant for, and what a search from it ends at."""
        decode = getattr(self.processing_class, "decode", None)
        special = getattr(self.processing_class, "all_special_ids", ())
        told = "searching for inputs off target" if request.rounds else "measuring inputs off target"
        with self.forward_pass() as forward, working(told, searched_examples(len(pool), request)):
            result, ends = off_target(forward, change, pool, request, special=special, decode=decode)
        if whose is not None and ends:
            own = self._active_on(*whose, ends)
            result.searched[:] = [{**row, "own": is_own} for row, is_own in zip(result.searched, own, strict=True)]
        return result

    def measure(
        self,
        change: Change,
        dataset: Any,
        *,
        scales: Sequence[float] = MeasureRequest.scales,
        ranks: Sequence[int | None] = MeasureRequest.ranks,
        by: str | None = MeasureRequest.by,
        both_signs: bool = MeasureRequest.both_signs,
        random: bool = MeasureRequest.random,
        quantise: Sequence[Quantisation] = MeasureRequest.quantise,
        worst: int = MeasureRequest.worst,
        batch_size: int = MeasureRequest.batch_size,
        max_examples: int | None = None,
        seed: int = MeasureRequest.seed,
        **reading: Any,
    ) -> Measurement:
        """What a weight change does to any data, analysed or not: its certificate.

        A change of linear maps is added in the activations, so that weights may be quantised, offloaded or sharded;
        a direction that moves something else moves the weights, and brings them back bit for bit.

        Args:
            change: a direction, or an adapter of linear maps.
            dataset: anything that `compute_pefs` takes.
            scales: steps along the change; 1 for an adapter or an edit as it is.
            ranks: what every weight's change is cut to; None is the change as it is.
            by: a column whose values make groups, beside that of all examples.
            both_signs: measure every scale backwards too.
            random: measure a random change of equal norm at every size.
            quantise: grids of 8 and 4 bits, "int8", "Q8_0", "Q4_0" and "nf4" (see `weights.requantised`), to which the
                weights of the linear maps are rounded meanwhile: what the change then does as an adapter beside them,
                and merged into them before they are rounded, each against the rounded base model.
            worst: how many of the most changed examples of every group are named.
            batch_size: examples of a forward pass.
            max_examples: only the first ones.
            seed: the seed of the random change and the bootstrap.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Returns:
            KL with quantiles, answers changed, share of each answer, and, where a column `label` or `labels` tells what
            is right, accuracy and loss, or the error of a regression, before and after, of every group at every step.

        Raises:
            UnsupportedModelError: if an adapter, a direction to be cut to a rank, or a change of sharded weights is not
                one of linear maps alone; if `quantise` is given and weights are quantised, offloaded or sharded, or the
                change is not one of linear maps alone.
            ValueError: if an argument is out of range, there is no column `by`, the model differs from that of the
                change, or a grid does not fit a weight.
        """
        request = MeasureRequest(
            scales=tuple(scales),
            ranks=tuple(ranks),
            by=by,
            both_signs=both_signs,
            random=random,
            quantise=(quantise,) if isinstance(quantise, str) else tuple(quantise),  # type: ignore[arg-type]
            worst=worst,
            batch_size=batch_size,
            seed=seed,
        )
        self.check_movable(change, in_place=not is_linear(change))
        read = self.read(dataset, Reading(**reading), max_examples=max_examples)
        return self._measured(change, self._measurable(read, by), request)

    def _measurable(self, read: Examples, by: str | None) -> tuple[Sequence[Example], Examples]:
        """Data as read, that fit the model and have the column of the groups."""
        examples = self._checked(read)
        check_groups(examples, by)
        return examples, read

    def _measured(
        self, change: Change, data: tuple[Sequence[Example], Examples], request: MeasureRequest
    ) -> Measurement:
        examples, read = data
        with self.forward_pass() as forward:
            return measure(forward, change, examples, self.description.truth_of(examples, read.encoded), request)

    def off_target(
        self,
        change: Change,
        dataset: Any,
        *,
        scale: float = OffTargetRequest.scale,
        decomposition: Decomposition | None = None,
        component: int | None = None,
        worst: int = OffTargetRequest.worst,
        rounds: int = OffTargetRequest.rounds,
        starts: int = OffTargetRequest.starts,
        candidates: int = OffTargetRequest.candidates,
        batch_size: int = OffTargetRequest.batch_size,
        seed: int = OffTargetRequest.seed,
        max_examples: int | None = None,
        **reading: Any,
    ) -> OffTarget:
        """The inputs that a change moves most although it was not meant for them: in a pool, and by a search from it.

        The search puts other tokens of the pool, one at a time, into the most moved inputs, and keeps what moves the
        prediction more. It shows that such inputs exist, never that there are none worse.

        Args:
            change: a direction, or an adapter of linear maps.
            dataset: the pool: inputs that the change should leave alone.
            scale: the step along the change; 1 for an adapter or an edit as it is.
            decomposition: whose component the change is of: inputs on which it is active are no failure, neither in the
                pool nor where the search ends. Their PEFs are computed for that.
            component: its number.
            worst: how many of the most moved inputs of the pool are named.
            rounds: rounds of the search; 0 measures the pool alone.
            starts: inputs that the search begins with.
            candidates: inputs that are tried in a round, for each that it began with.
            batch_size: examples of a forward pass.
            seed: the seed of the search.
            max_examples: only the first ones.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Raises:
            IncompatibleSketchError: if the decomposition is of another model.
            UnsupportedModelError: if an adapter, or a change of sharded weights, is not one of linear maps alone.
            ValueError: if an argument is out of range, only one of `decomposition` and `component` is given, the
                component is active on all inputs, or a search is wanted and the inputs are no sequences of tokens.
        """
        request = OffTargetRequest(
            scale=scale,
            worst=worst,
            rounds=rounds,
            starts=starts,
            candidates=candidates,
            batch_size=batch_size,
            seed=seed,
        )
        if (decomposition is None) != (component is None):
            raise ValueError("decomposition and component go together: the second is a number in the first")
        self.check_movable(change, in_place=not is_linear(change))
        analyzer = self if decomposition is None else self._predicting_as(decomposition)
        pool = analyzer._checked(analyzer.read(dataset, Reading(**reading), max_examples=max_examples))
        if rounds:
            check_tokens(pool)
        if decomposition is not None and component is not None:
            component = decomposition.index_of(component)
            own = analyzer._active_on(decomposition, component, pool)
            pool = [example for example, is_own in zip(pool, own, strict=True) if not is_own]
            if not pool:
                raise ValueError(
                    f"component {component} is active on all inputs; give others that it should leave alone"
                )
        whose = None if decomposition is None or component is None else (decomposition, component)
        return analyzer._search(change, pool, request, whose)

    def _active_on(self, decomposition: Decomposition, component: int, examples: Sequence[Example]) -> list[bool]:
        """Whether a component is active; PEFs are computed of those inputs alone that were not analysed."""
        analysed = active_examples(decomposition.coefficients)[:, component].tolist()
        known = dict(zip(decomposition.columns.get("content_hash", ()), analysed, strict=False))
        new = [example for example in examples if example.content not in known]
        if new:
            pefs = self.compute_pefs([dict(example.inputs) for example in new], like=decomposition, progress=False)
            active = active_examples(decomposition.transform(pefs))[:, component].tolist()
            known |= dict(zip((example.content for example in new), active, strict=True))
        return [known[example.content] for example in examples]
