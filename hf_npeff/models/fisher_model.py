"""FisherModel: examples → PEFs of a model, and an estimate of the cost."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_npeff.config import (
    ComputeRequest,
    DecompositionConfig,
    OnError,
)
from hf_npeff.data import Examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.record import Reading
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.fisher.compute import check_store, compute, dataset_hash
from hf_npeff.fisher.cost import Estimate, estimate, numbers_of
from hf_npeff.fisher.limits import ModelLimits
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.fisher.pilot_predictions import pilot_predictions
from hf_npeff.fisher.preparation import prepare
from hf_npeff.fisher.selftest import candidates
from hf_npeff.fisher.sketch_choice import DEFAULT_DIMS
from hf_npeff.models.analysed_model import AnalysedModel
from hf_npeff.pefs.shards import remove_store
from hf_npeff.pefs.store import PEFs
from hf_npeff.progress import progress_wanted

logger = logging.getLogger(__name__)
_FIRST = 64
"""The number of examples from which the self-test chooses. Chosen: some of them are short, and they encode quickly."""
_MEASURED_LENGTHS = 256
"""The number of examples whose mean length an estimate uses. Chosen: an estimate needs no more."""
_USUAL_TOKENS = 128.0
"""The number of tokens of an example that an estimate does not see. Chosen: a paragraph."""


class FisherModel(AnalysedModel):
    """The part of `NPEFFAnalyzer` that computes PEFs, from a data set to a store."""

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
        """Compute the PEFs (per-example Fisher matrices) of a data set.

        Args:
            dataset: `datasets.Dataset`, `IterableDataset` (needs `max_examples`), list of strings, list of
                dictionaries, dictionary of tensors, or DataLoader.
            output_dir: the folder to which results are written as they are ready; None keeps everything in memory.
            batch_size: how many examples a batch has; "auto" halves it when memory runs out.
            max_examples: use only this many examples, the first ones.
            columns: the columns to keep with the results; None keeps every column of strings, numbers or booleans.
            resume: continue with the results in `output_dir`; False starts again.
            shard_size: how many examples a shard has; every shard is a file.
            like: PEFs or a decomposition whose Fisher config and sketch are used instead of the analyzer's own, so that
                `decomposition.transform` takes the result.
            progress: show a progress bar; None shows one unless `HF_HUB_DISABLE_PROGRESS_BARS` is set.
            on_error: what happens to an example for which the model gives NaN or infinite numbers: "raise" stops,
                "skip" leaves the example out. The skipped examples and the reasons are in `info["skipped"]` and in
                manifest.json, and a warning says how many there are.
            text_column: the column to read: texts, conversations or lists of words; "translation.en" is an entry of a
                column of dictionaries. By default it is found by names and contents (docs/datasets.md); if that is not
                possible, an error says why. The record of what was read is in `info["dataset"]["encoded"]`.
            text_pair_column: the column with the second text of a pair; for multiple choice, the column of choices.
            label_column: the column of classes, numbers or tags; with positions="labels", the text that a language
                model should predict. By default `label` or `labels`.
            truncation: cut examples that are too long; by default they raise an error. The number of cut examples is in
                `info["dataset"]["truncated"]`.
            max_length: the most tokens of an example with truncation; by default the model's maximum.
            check_weights: raise an error if `output_dir` has PEFs that were made with other weights than the model has
                now.

        Returns:
            PEFs in the data set's order.

        Raises:
            ValueError: if the data is empty, cannot be encoded or is too long for the model; if it is not clear which
                columns to read, or a named column is missing; if the config does not fit the model; if the model gives
                NaN (the examples are named); if the rows of `like` were not made by hf_npeff.
            UnsupportedModelError: if the model has no logits or uses a module in a way that hooks do not see.
            IncompatibleSketchError: if `output_dir` has PEFs of another model, config or data set, or the model does
                not have the parameters of `like`.
            IncompatibleWeightsError: if `output_dir` has PEFs of other weights, because the model was trained, merged
                or edited since then, or other adapters are active.
        """
        folder = None if output_dir is None else Path(output_dir)
        shown = progress_wanted() if progress is None else progress
        request = ComputeRequest(
            output_dir=folder,
            batch_size=batch_size,
            shard_size=shard_size,
            on_error=on_error,
            check_weights=check_weights,
            progress=shown,
        )
        reading = Reading(
            text_column=text_column,
            text_pair_column=text_pair_column,
            label_column=label_column,
            truncation=truncation,
            max_length=max_length,
        )
        analyzer = self if like is None else self.with_settings_of(like)
        known = None if like is None else like.info
        examples = analyzer.read(dataset, reading, like=known, max_examples=max_examples, columns=columns)
        return analyzer._compute(examples, request, resume)

    def _compute(self, examples: Examples, request: ComputeRequest, resume: bool) -> PEFs:
        if self.fsdp.active:
            request.check_in_step()
        processes = self.processes()
        if processes.count > 1 and request.output_dir is None:
            raise ValueError("several processes gather their PEFs on disk: pass output_dir")
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
            if maker.selftest is not None:
                self._used_otherwise = frozenset(maker.selftest.used_otherwise)
            if processes.index == 0:
                logger.log(logging.WARNING if examples.encoded.doubtful else logging.INFO, "%s", examples.encoded)
                limits.tell_truncated(len(examples), examples.encoded.max_length)
                maker.log(self.fisher.sketch_tolerance)
            origin["pilots"] = pilot_predictions(maker.forward)
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
        """Estimate the cost of an analysis without running the model; print the result.

        Args:
            dataset: the data set for `compute_pefs`, or a number of examples.
            tokens: the number of tokens of an example; by default the mean of the first 256 examples, or 128 if only a
                number of examples is given.
            n_components: the number of components, r.
            max_examples: use only this many examples, the first ones.
            **reading: text_column, text_pair_column, label_column, truncation and max_length, as in `compute_pefs`.

        Raises:
            ValueError: if the data is empty or cannot be encoded, or it is not clear which columns to read.
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
            source=getattr(text, "hidden_size", 1) if hidden else self._outputs_of_head(config),
            storage_bytes=getattr(torch, self.fisher.storage_dtype).itemsize,
        )

    def _outputs_of_head(self, config: Any) -> int:
        """The number of outputs of the head for an example, if it is known."""
        if traits_of(self.head).embeds:
            return int(getattr(self.head, "size", None) or getattr(config, "hidden_size", None) or 1)
        return int(getattr(config, "num_labels", 1))
