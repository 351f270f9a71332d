"""NPEFFAnalyzer: the few-line way through all stages; no arithmetic."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_npeff.config import (
    BATCH_SIZE,
    SHADED,
    ComputeRequest,
    DecompositionConfig,
    LiftForm,
    LiftMethod,
    LiftRequest,
    MeasureRequest,
    OffTargetRequest,
    OnError,
    PerturbationRequest,
    Ridge,
    SparseSolver,
)
from hf_npeff.data import Example, Examples
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.edited_model import EditedModel
from hf_npeff.encoding.record import Reading
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.fisher.compute import check_store, compute, dataset_hash
from hf_npeff.fisher.cost import Estimate, estimate, numbers_of
from hf_npeff.fisher.heads import traits_of
from hf_npeff.fisher.limits import ModelLimits
from hf_npeff.fisher.preparation import DEFAULT_DIMS, prepare
from hf_npeff.fisher.selftest import candidates
from hf_npeff.pefs.shards import remove_store
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.lifting import lift_components, plan, select
from hf_npeff.weights.measurement import Change, Measurement, check_groups, is_linear, measure
from hf_npeff.weights.off_target import OffTarget, check_tokens, off_target
from hf_npeff.weights.perturbation import PerturbationReport, evaluate
from hf_npeff.weights.plans import Plan
from hf_npeff.weights.token_alignments import TokenAlignment, token_alignments

logger = logging.getLogger(__name__)
_FIRST = 64
"""Examples among which the self-test finds its own."""
_MEASURED_LENGTHS = 256
"""Examples whose mean length an estimate takes. Chosen: an estimate needs no more."""
_USUAL_TOKENS = 128.0
"""Of an example that an estimate does not see. Chosen: a paragraph."""
_LIFTED_TOGETHER = 4
"""Components that share forward passes in `lift_each`."""


class NPEFFAnalyzer(EditedModel):
    """A model under analysis.

    The model is used in eval mode without parameter gradients, and is handed back as it came (mode, requires_grad,
    hooks, random state), exceptions included.

    Args:
        model: a transformers model, PEFT-wrapped or not.
        processing_class: its tokenizer, image processor or processor; needed unless the data is encoded.
        fisher: how PEFs are computed.
        accelerator: an `accelerate.Accelerator`; by default one is made when it is needed.
        task: the head's task where the model's class does not tell it, or an object with the `OutputHead` protocol.

    Raises:
        UnsupportedModelError: if the model predicts nothing that is known.
        ValueError: if `fisher` does not fit the model.

    Example:
        >>> analyzer = NPEFFAnalyzer.from_pretrained("org/any-model", fisher=FisherConfig(rank=2))
        >>> print(analyzer.estimate(dataset))
        examples n   24 of 5 tokens
        ...
        >>> pefs = analyzer.compute_pefs(dataset, output_dir="runs/pefs")
        >>> decomposition = analyzer.decompose(pefs, n_components=3)
        >>> tokens = analyzer.token_alignments(decomposition, pefs, dataset, [0], n_top=2)
        >>> direction = analyzer.lift(decomposition, 0, pefs, dataset)
        >>> report = analyzer.evaluate_direction(direction, decomposition, 0, dataset, n_top=4)
        >>> directions = dict(analyzer.lift_each(decomposition, [1, 2], pefs, dataset))
        >>> reports = analyzer.evaluate_components(decomposition, pefs, dataset, n_top=4)
        >>> sorted(decomposition.evaluations)
        [0, 1, 2]
        >>> measured = analyzer.measure(direction, ["the cat saw the king", "rome is old"], scales=(report.scale,))
        >>> measured.n, len(measured.steps)  # the change, and a random one
        (2, 2)
        >>> analyzer.off_target(direction, ["the cat saw the king", "rome is old"], scale=report.scale, rounds=2).n
        2
    """

    # Examples → PEFs

    def compute_pefs(
        self,
        dataset: Any,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        batch_size: int | Literal["auto"] = ComputeRequest.batch_size,
        max_examples: int | None = None,
        columns: Sequence[str] | None = None,
        resume: bool = True,
        shard_size: int = ComputeRequest.shard_size,
        like: PEFs | Decomposition | None = None,
        progress: bool | None = None,
        on_error: OnError = ComputeRequest.on_error,
        text_column: str | None = Reading.text_column,
        text_pair_column: str | None = Reading.text_pair_column,
        label_column: str | None = Reading.label_column,
        truncation: bool = Reading.truncation,
        max_length: int | None = Reading.max_length,
        check_weights: bool = ComputeRequest.check_weights,
    ) -> PEFs:
        """Per-example Fishers of a data set.

        Args:
            dataset: `datasets.Dataset`, `IterableDataset` (needs `max_examples`), list of strings, list of
                dictionaries, dictionary of tensors, or DataLoader.
            output_dir: where shards are written as they are ready; None keeps everything in memory.
            batch_size: examples of a batch, or "auto" to halve it when memory runs out.
            max_examples: only the first ones.
            columns: what to keep beside the rows; None keeps every column of strings, numbers or booleans.
            resume: go on with what `output_dir` holds; False begins again.
            shard_size: examples of a shard.
            like: PEFs or a decomposition whose Fisher config and sketch are used instead of the analyzer's own, so that
                `decomposition.transform` takes the result.
            progress: show a progress bar; None shows one unless `HF_HUB_DISABLE_PROGRESS_BARS` is set.
            on_error: what happens to an example for which the model gives NaN or infinite numbers: "raise" stops there,
                "skip" leaves it out. Who was left out, and why, is in `info["skipped"]` and in manifest.json, and a
                warning says how many.
            text_column: what is read: a column of texts, conversations or lists of words; "translation.en" reaches into
                a column of dictionaries. None: found by names and contents (docs/datasets.md), or an error says why
                not. What was read is in `info["dataset"]["encoded"]`.
            text_pair_column: the second text of a pair; with multiple choice, the column of choices.
            label_column: classes, numbers or tags; with positions="labels", the text that a language model is to
                predict. None: `label` or `labels`.
            truncation: cut examples that are too long; by default they are refused. How many were cut is in
                `info["dataset"]["truncated"]`.
            max_length: the most tokens of an example with truncation; None: the model's positions.
            check_weights: refuse to go on with PEFs of other weights than the model has now.

        Returns:
            PEFs in the data set's order.

        Raises:
            ValueError: if the data is empty, cannot be encoded or is too long for the model; if it is not clear which
                columns to read, or one that was asked for is missing; if the config asks for
                what the model does not have; if the model gives NaN (the examples are named); if `like` is of rows
                made elsewhere.
            UnsupportedModelError: if the model has no logits or uses a module in a way that hooks do not see.
            IncompatibleSketchError: if `output_dir` holds PEFs of another model, config or data set, or the model does
                not have the parameters of `like`.
            IncompatibleWeightsError: if `output_dir` holds PEFs of other weights: the model was trained, merged or
                edited since, or other adapters are active.
        """
        folder = None if output_dir is None else Path(output_dir)
        shown = _progress_wanted() if progress is None else progress
        request = ComputeRequest(
            output_dir=folder,
            batch_size=batch_size,
            shard_size=shard_size,
            on_error=on_error,
            check_weights=check_weights,
            progress=shown,
        )
        analyzer = self if like is None else self.with_settings_of(like)
        reading = Reading(text_column, text_pair_column, label_column, truncation, max_length)
        known = None if like is None else like.info
        examples = analyzer.read(dataset, reading, like=known, max_examples=max_examples, columns=columns)
        return analyzer._compute(examples, request, resume)

    def _compute(self, examples: Examples, request: ComputeRequest, resume: bool) -> PEFs:
        if self.fsdp.active:
            request.check_in_step()
        processes = self.processes()
        if processes.count > 1 and request.output_dir is None:
            raise ValueError("with several processes PEFs are gathered on disk: pass output_dir")
        limits = ModelLimits.of(self.model, needs_labels=self.fisher.positions == "labels")
        hashed = dataset_hash(limits.checked(examples))
        about = {"examples": len(examples), "hash": hashed, "encoded": examples.encoded.to_dict()}
        origin = {**self.provenance(), "dataset": {**about, "truncated": limits.truncated}}
        if request.output_dir is not None and not resume and processes.index == 0:
            remove_store(request.output_dir)
        processes.meet()
        if request.output_dir is not None:
            check_store(request, origin["weights"])  # before anything is computed
        known = self.sketch_for(request.output_dir)
        with self.forward_pass(one_at_a_time=request.batch_size == 1) as forward:
            maker = prepare(forward, self.fisher, examples[:_FIRST], sketch=known, skip=request.skip)
            self._sketch, self.maps = maker.sketch, list(maker.forward.maps)
            if processes.index == 0:
                logger.log(logging.WARNING if examples.encoded.doubtful else logging.INFO, "%s", examples.encoded)
                limits.tell_truncated(len(examples), examples.encoded.max_length)
                maker.log(self.fisher.sketch_tolerance)
            return compute(maker, examples, origin, request, processes)

    def estimate(
        self,
        dataset: Any,
        *,
        tokens: float | None = None,
        n_components: int = DecompositionConfig.n_components,
        max_examples: int | None = None,
        **reading: Any,
    ) -> Estimate:
        """What an analysis will cost, without running anything; print it.

        Args:
            dataset: what `compute_pefs` would get, or a number of examples.
            tokens: of an example; by default the mean of the first 256, or 128 where there is only a number.
            n_components: r.
            max_examples: only the first ones.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Raises:
            ValueError: if the data is empty or cannot be encoded, or it is not clear what to read.
        """
        n, choices = dataset if isinstance(dataset, int) else 0, None
        if not isinstance(dataset, int):
            examples = self.read(dataset, Reading(**reading), max_examples=max_examples)
            n, choices = len(examples), examples[0].choices
            lengths = [examples[i].length for i in range(min(n, _MEASURED_LENGTHS))]
            tokens = sum(lengths) / len(lengths) if tokens is None else tokens
        config: Any = base_of(self.model).config
        shapes = self.shapes
        if self._sketch is not None:
            kind, dim = self._sketch.kind, self._sketch.setting
        elif self.fisher.sketch == "auto":
            kind, dim = max(candidates(self.fisher, shapes), key=lambda t: numbers_of(t[0], t[1], shapes))
        else:
            kind, dim = self.fisher.sketch, self.fisher.sketch_dim or DEFAULT_DIMS[self.fisher.sketch]
        embeddings = {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        hidden = traits_of(self.head).at_hidden
        text = config.get_text_config()
        return estimate(
            self.maps,
            sum(p.numel() for p in self.model.parameters() if id(p) not in embeddings),
            shapes,
            kind,
            dim,
            chosen=self._sketch is not None or self.fisher.sketch != "auto",
            n=n,
            tokens=_USUAL_TOKENS if tokens is None else tokens,
            c=self.rows_per_example(choices),
            r=n_components,
            source=getattr(text, "hidden_size", 1) if hidden else getattr(config, "num_labels", 1),
            storage_bytes=getattr(torch, self.fisher.storage_dtype).itemsize,
        )

    # PEFs → decomposition

    def decompose(
        self,
        pefs: PEFs,
        n_components: int = DecompositionConfig.n_components,
        *,
        validation: PEFs | None = None,
        **settings: Any,
    ) -> Decomposition:
        """Decompose PEFs on the model's device: `NPEFF(n_components, **settings).fit(pefs, validation)`."""
        settings.setdefault("progress", _progress_wanted())
        settings.setdefault("device", self.device if self.device.type == "cuda" else None)
        return NPEFF(n_components, **settings).fit(pefs, validation)

    # Components → parameters

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

    def evaluate_direction(
        self,
        direction: ParameterDirection,
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
        held_out: Any = None,
        by: str | None = None,
    ) -> PerturbationReport:
        """What moving the parameters along a direction does to a component's top examples and to others.

        Args:
            direction: from `lift`.
            decomposition: whose component is followed.
            component: its number.
            dataset: the one that was analysed, in any order.
            target_kl: mean KL on the top examples (nats) that each sign's step is to reach.
            scale: a given step instead.
            n_top: top examples.
            n_others: others, drawn from the examples on which the component is not active.
            batch_size: examples of a forward pass.
            seed: of the drawing, the random direction and the bootstrap.
            held_out: other data, never analysed, on which the best step is measured too: see `measure`.
            by: a column of that data whose values make groups.

        Returns:
            KL on both, their ratio with a bootstrap interval, flips, accuracy where there are labels (of regression the
            errors, and no flips), answers that changed, for the more selective sign, the other, and a random direction
            of equal norm.

        Raises:
            IndexError: if the component does not exist.
            UnsupportedModelError: if the model's weights are sharded over processes, and the direction moves more than
                those of linear maps.
            ValueError: if an argument is out of range, or the dataset or model does not fit.
        """
        request = PerturbationRequest(
            target_kl=target_kl, scale=scale, n_top=n_top, n_others=n_others, batch_size=batch_size, seed=seed
        )
        self.check_movable(direction, in_place=not is_linear(direction))
        component = decomposition.index_of(component)
        examples = self.examples_of(decomposition, dataset)
        if held_out is None and by is not None:
            raise ValueError(f"by={by!r} is a column of held_out, which is not given")
        with self.forward_pass() as forward:
            report = evaluate(forward, direction, decomposition, component, examples, request)
        if held_out is None:
            return report
        measured = self.measure(direction, held_out, scales=(report.scale,), by=by, batch_size=batch_size, seed=seed)
        return replace(report, held_out=measured)

    def evaluate_components(
        self,
        decomposition: Decomposition,
        pefs: PEFs,
        dataset: Any,
        components: Sequence[int] | None = None,
        *,
        lift: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> list[PerturbationReport]:
        """`lift` and `evaluate_direction` for several components, kept in `decomposition.evaluations`.

        Args:
            decomposition: of `pefs`.
            pefs: those that were decomposed.
            dataset: the one they came from.
            components: their numbers; None takes all.
            lift: arguments of `lift`, `check_weights` among them.
            **settings: arguments of `evaluate_direction`.

        Returns:
            A report a component, in order.
        """
        wanted = select(decomposition, range(len(decomposition)) if components is None else components)
        lifting, measuring = LiftRequest(**dict(lift or {})), PerturbationRequest(**settings)
        analyzer = self.for_decomposition(decomposition)
        weights = analyzer.weights_for(decomposition, pefs, lifting.check_weights)
        examples = analyzer.examples_of(decomposition, dataset, pefs)
        reports = []
        for j, direction in analyzer._lift_each(decomposition, wanted, pefs, examples, lifting, weights):
            self.check_movable(direction, in_place=not is_linear(direction))
            with self.forward_pass() as forward:
                report = evaluate(forward, direction, decomposition, j, examples, measuring, (pefs.sketch(), pefs))
            decomposition.evaluations[j] = report.summary()
            reports.append(report)
        return reports

    def measure(
        self,
        change: Change,
        dataset: Any,
        *,
        scales: Sequence[float] = MeasureRequest.scales,
        ranks: Sequence[int | None] = MeasureRequest.ranks,
        by: str | None = None,
        both_signs: bool = False,
        random: bool = True,
        worst: int = MeasureRequest.worst,
        batch_size: int = BATCH_SIZE,
        max_examples: int | None = None,
        seed: int = 0,
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
            worst: how many of the most changed examples of every group are named.
            batch_size: examples of a forward pass.
            max_examples: only the first ones.
            seed: of the random change and the bootstrap.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Returns:
            KL with quantiles, answers changed, share of each answer, and, where a column `label` or `labels` tells what
            is right, accuracy and loss, or the error of a regression, before and after, of every group at every step.

        Raises:
            UnsupportedModelError: if an adapter, a direction to be cut to a rank, or a change of sharded weights is not
                one of linear maps alone.
            ValueError: if an argument is out of range, there is no column `by`, or the model is another than that of
                the change.
        """
        request = MeasureRequest(tuple(scales), tuple(ranks), by, both_signs, random, worst, batch_size, seed)
        self.check_movable(change, in_place=not is_linear(change))
        examples_read = self.read(dataset, Reading(**reading), max_examples=max_examples)
        limits = ModelLimits.of(self.model, needs_labels=self.fisher.positions == "labels")
        examples = list(limits.checked(examples_read))
        check_groups(examples, by)
        with self.forward_pass() as forward:
            return measure(forward, change, examples, self.truth_of(examples, examples_read.encoded), request)

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
            seed: of the search.
            max_examples: only the first ones.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Raises:
            IncompatibleSketchError: if the decomposition is of another model.
            UnsupportedModelError: if an adapter, or a change of sharded weights, is not one of linear maps alone.
            ValueError: if an argument is out of range, only one of `decomposition` and `component` is given, the
                component is active on all inputs, or a search is wanted and the inputs are no sequences of tokens.
        """
        request = OffTargetRequest(scale, worst, rounds, starts, candidates, batch_size, seed)
        if (decomposition is None) != (component is None):
            raise ValueError("decomposition and component go together: the second is a number in the first")
        self.check_movable(change, in_place=not is_linear(change))
        limits = ModelLimits.of(self.model, needs_labels=self.fisher.positions == "labels")
        pool = list(limits.checked(self.read(dataset, Reading(**reading), max_examples=max_examples)))
        if rounds:
            check_tokens(pool)
        if decomposition is not None and component is not None:
            component = decomposition.index_of(component)
            own = self._active_on(decomposition, component, pool)
            pool = [example for example, is_own in zip(pool, own, strict=True) if not is_own]
            if not pool:
                raise ValueError(
                    f"component {component} is active on all inputs; give others that it should leave alone"
                )
        decode = getattr(self.processing_class, "decode", None)
        special = getattr(self.processing_class, "all_special_ids", ())
        with self.forward_pass() as forward:
            found, ends = off_target(forward, change, pool, request, special=special, decode=decode)
        if decomposition is not None and component is not None and ends:
            own = self._active_on(decomposition, component, ends)
            found.searched[:] = [{**row, "own": is_own} for row, is_own in zip(found.searched, own, strict=True)]
        return found

    def _active_on(self, decomposition: Decomposition, component: int, examples: Sequence[Example]) -> list[bool]:
        """Whether a component is active, for inputs that need not have been analysed."""
        rows = [dict(example.inputs) for example in examples]
        pefs = self.compute_pefs(rows, like=decomposition, progress=False)
        active: list[bool] = active_examples(decomposition.transform(pefs))[:, component].tolist()
        return active


def _progress_wanted() -> bool:
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() not in ("1", "ON", "YES", "TRUE")
