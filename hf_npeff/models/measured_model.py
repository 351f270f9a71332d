"""MeasuredModel: the effects of a weight change on the predictions of a model."""

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
from hf_npeff.weights.lifting import select
from hf_npeff.weights.measurement import Change, Measurement, check_groups, is_linear, measure
from hf_npeff.weights.off_target import OffTarget, check_tokens, off_target
from hf_npeff.weights.off_target import examples_read as searched_examples
from hf_npeff.weights.outcomes import check_labels
from hf_npeff.weights.perturbation import PerturbationReport
from hf_npeff.weights.trials import evaluate, evaluate_together, examples_read

_Self = TypeVar("_Self", bound="MeasuredModel")

_MEASURED_TOGETHER = 32
"""How many adapters are searched together. Chosen: each is in memory twice meanwhile, beside a random one of its
size."""


class MeasuredModel(FisherModel, AdaptedModel):
    """The part of `NPEFFAnalyzer` that measures directions, adapters and edits."""

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
        """Measure the effect of moving the weights along a direction on a component's top examples and on others.

        Args:
            direction: a direction from `lift`, or an adapter of linear maps, which a scale of 1 applies as it is.
            decomposition: the decomposition.
            component: the number of the component.
            dataset: the analysed dataset, in any order.
            target_kl: the mean KL on the component's top examples, in nats, that the step has to reach, for each sign.
            scale: use this step instead of searching for one that reaches `target_kl`.
            n_top: how many of the component's top examples to measure.
            n_others: how many other examples to measure, drawn from those on which the component is not active.
            batch_size: how many examples a forward pass takes.
            seed: the seed for drawing examples, the random direction, the search and the bootstrap.
            search_rounds: rounds of a search for inputs that the best step moves although they are not the component's,
                starting from the most moved of the others; see `off_target`. 0 makes no search.
            held_out: other data, which was not analysed; the best step is measured on it too, see `measure`.
            by: a column of `held_out`; examples with the same value in it are measured as a group.

        Returns:
            KL on both groups, their ratio with a bootstrap interval, flips, accuracy if there are labels (for
            regression errors, and no flips) and changed answers, for the more selective sign, the other sign, and a
            random direction of equal norm.

        Raises:
            IndexError: if the component does not exist.
            UnsupportedModelError: if the model's weights are sharded over processes, and the direction affects more
                than linear maps; or if an adapter stores the new value of a norm.
            ValueError: if an argument is out of range, the dataset or model does not fit, the dataset has other labels
                than were stored, or a search is wanted and the inputs are not sequences of tokens.
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
        check_labels(decomposition.info, decomposition.columns, examples)
        if held_out is None and by is not None:
            raise ValueError(f"by={by!r} is for a column of held_out: pass held_out too")
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
        made_elsewhere = decomposition.info.get("sketch") is None  # such rows have no known positions
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
        """Measure the effects of several components; reports are also stored in `decomposition.evaluations`.

        All are lifted as adapters of one rank and measured in shared forward passes (`lift_adapters`,
        `evaluate_adapters`). If components affect more than linear maps, or another method lifts them, each component's
        whole direction is lifted and measured separately.

        Args:
            decomposition: the decomposition of `pefs`.
            pefs: the PEFs that were decomposed.
            dataset: the dataset of the PEFs.
            components: the numbers of the components; None means all.
            rank: the rank of the measured adapters; None measures whole directions, one after another.
            lift: arguments for `lift`, including `check_weights`.
            **settings: arguments for `evaluate_direction`.

        Returns:
            A report for each component, in order.
        """
        wanted = select(decomposition, range(len(decomposition)) if components is None else components)
        request, measuring = LiftRequest(**dict(lift or {})), PerturbationRequest(**settings)
        analyzer, decomposed = self._opened(decomposition, pefs, dataset, request.check_weights)
        examples = list(decomposed.examples)
        check_labels(decomposition.info, decomposition.columns, examples)
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
        """Whether components affect only linear maps, so that all can be lifted and measured together."""
        return set(self.layouts_of(self.shapes).values()) <= {"linear", "conv1d"}

    def evaluate_adapters(
        self,
        adapters: Sequence[Adapter],
        decomposition: Decomposition,
        dataset: Any,
        pefs: PEFs | None = None,
        **settings: Any,
    ) -> list[PerturbationReport]:
        """`evaluate_direction` for adapters of components, in shared forward passes.

        The examples of a batch may have different components, signs and scales. No weight is touched, so the model may
        be quantised, offloaded or sharded. Reports are also stored in `decomposition.evaluations`.

        Args:
            adapters: adapters from `lift_adapters`; a step of 1 applies an adapter as it is.
            decomposition: the decomposition of the components.
            dataset: the analysed dataset, in any order.
            pefs: the PEFs that were decomposed, which predict the first steps to try; None starts with short steps.
            **settings: arguments for `evaluate_direction`, except `held_out` and `by`.

        Returns:
            A report for each adapter, in order.

        Raises:
            IndexError: if the decomposition has no such component.
            UnsupportedModelError: if an adapter changes anything other than linear maps.
            ValueError: if an adapter does not belong to a component, an argument is out of range, or the dataset or
                model does not fit.
        """
        request = PerturbationRequest(**settings)
        numbers = [None if adapter.about is None else adapter.about.component for adapter in adapters]
        if not numbers or None in numbers:
            raise ValueError("evaluate_adapters needs adapters of components, as lift_adapters makes them")
        components = [decomposition.index_of(j) for j in numbers if j is not None]
        self.check_movable(adapters[0], in_place=False)
        analyzer = self._predicting_as(decomposition)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        check_labels(decomposition.info, decomposition.columns, examples)
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
        """`evaluate_adapters` for examples that are already encoded."""
        changes = [adapter.linear_deltas() for adapter in adapters]
        rows = None if pefs is None else (pefs.sketch(), pefs)
        reports: list[PerturbationReport] = []
        label = f"measuring {len(changes)} components"
        with self.forward_pass() as forward, working(label, examples_read(len(changes), request)) as progress:
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
        """The report with the result of the off-target search, if one is asked for."""
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
        """Measure a change on a pool that it was not meant for, and search for worse inputs."""
        decode = getattr(self.processing_class, "decode", None)
        special = getattr(self.processing_class, "all_special_ids", ())
        label = "searching for inputs off target" if request.rounds else "measuring inputs off target"
        with self.forward_pass() as forward, working(label, searched_examples(len(pool), request)):
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
        """Measure the effects of a weight change on any data, analysed or not.

        A change of linear maps is added in the activations, so weights may be quantised, offloaded or sharded. Any
        other direction changes the weights, which are restored bit for bit.

        Args:
            change: a direction, or an adapter of linear maps.
            dataset: anything that `compute_pefs` takes.
            scales: steps along the change; 1 applies an adapter or an edit as it is.
            ranks: ranks to which every weight's change is truncated; None leaves the change as it is.
            by: a column; examples with the same value in it are measured as a group, beside all examples.
            both_signs: measure the opposite sign of every scale too.
            random: measure a random change of equal norm at every scale too.
            quantise: number formats of 8 and 4 bits, "int8", "Q8_0", "Q4_0" and "nf4" (see `weights.requantised`), to
                which the weights of the linear maps are rounded. The change is then measured as an adapter beside the
                rounded model, and merged into it before rounding, each compared with the rounded base model.
            worst: how many of the most changed examples of every group are named.
            batch_size: how many examples a forward pass takes.
            max_examples: use only this many examples, the first ones.
            seed: the seed of the random change and the bootstrap.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Returns:
            For every group at every step: KL with quantiles, changed answers and the share of each answer; if there is
            a column `label` or `labels`, also accuracy and loss, or the error of a regression, before and after.

        Raises:
            UnsupportedModelError: if an adapter, a direction that is truncated, or a change of sharded weights affects
                more than linear maps; if `quantise` is given, and weights are quantised, offloaded or sharded, or the
                change affects more than linear maps.
            ValueError: if an argument is out of range, there is no column `by`, the model differs from that of the
                change, or a number format does not fit a weight.
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
        """The data, after checking that they fit the model and have the column of the groups."""
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
        """Find the inputs that a change moves most although it was not meant for them: in a pool, and by a search.

        The search replaces tokens in the most moved inputs, one at a time, by other tokens of the pool, and keeps a
        replacement that moves the prediction more. It shows that such inputs exist, but not that there are no worse
        ones.

        Args:
            change: a direction, or an adapter of linear maps.
            dataset: the pool: inputs that the change should leave alone.
            scale: the step along the change; 1 applies an adapter or an edit as it is.
            decomposition: the decomposition, if the change is one of its components. Inputs on which the component is
                active do not count, neither in the pool nor in the result of the search. Their PEFs are computed for
                this.
            component: the number of the component.
            worst: how many of the most moved inputs of the pool are named.
            rounds: rounds of the search; 0 only measures the pool.
            starts: how many inputs of the pool the search starts from, the most moved ones.
            candidates: how many inputs a round tries for each of these.
            batch_size: how many examples a forward pass takes.
            seed: the seed of the search.
            max_examples: use only this many examples, the first ones.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Raises:
            IncompatibleSketchError: if the decomposition belongs to another model.
            UnsupportedModelError: if an adapter, or a change of sharded weights, affects more than linear maps.
            ValueError: if an argument is out of range, only one of `decomposition` and `component` is given, the
                component is active on all inputs, or a search is wanted and the inputs are not sequences of tokens.
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
            raise ValueError(
                "decomposition and component go together: pass both, component being a number of the decomposition"
            )
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
                    f"component {component} is active on all inputs; use other inputs, which it should leave alone"
                )
        whose = None if decomposition is None or component is None else (decomposition, component)
        return analyzer._search(change, pool, request, whose)

    def _active_on(self, decomposition: Decomposition, component: int, examples: Sequence[Example]) -> list[bool]:
        """Whether a component is active on each input; PEFs are computed only for inputs that were not analysed."""
        analysed = active_examples(decomposition.coefficients)[:, component].tolist()
        known = dict(zip(decomposition.columns.get("content_hash", ()), analysed, strict=False))
        new = [example for example in examples if example.content not in known]
        if new:
            pefs = self.compute_pefs([dict(example.inputs) for example in new], like=decomposition, progress=False)
            active = active_examples(decomposition.transform(pefs))[:, component].tolist()
            known |= dict(zip((example.content for example in new), active, strict=True))
        return [known[example.content] for example in examples]
