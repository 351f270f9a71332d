"""NPEFFCallback: follows components while transformers' Trainer trains; its only arithmetic is comparing two points."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import random
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.config import BATCH_SIZE, ComputeRequest, DecompositionConfig, FisherConfig, is_count
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.drift import drift, same_examples
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.encoding.record import Reading
from hf_npeff.fisher.adapted_maps import check_adapted_maps
from hf_npeff.models.run_change import RunPoint, run_change, seen_at
from hf_npeff.pefs.store import PEFs
from hf_npeff.processes import Processes
from hf_npeff.records import records_of
from hf_npeff.sharing.files import read_json_lines, write_atomically
from hf_npeff.sharing.hub import text_columns
from hf_npeff.weights.change_report import ChangeReport

logger = logging.getLogger(__name__)

FOLDER = "npeff"
"""Within a checkpoint, and within what is pushed."""
HISTORY = "history.jsonl"
_PROBE = "_npeff_probe"  # Trainer pushes nothing that begins with an underscore


class NPEFFCallback(TrainerCallback):
    """Follows components on a fixed probe set while a model trains: `trainer.add_callback(NPEFFCallback(probe, ...))`.

    An analysed step is called a point. At every point the probe's PEFs are computed in a pass of their own, in eval
    mode and in the weights' own precision. Without a decomposition the first point fits one, and each later point
    starts from the previous components, which keep their numbers. With a decomposition its components stay the same,
    and their coefficients W are computed by `transform`. Training does not change: mode, gradients and random state are
    restored.

    Every point is logged by transformers' `Trainer.log`, so to all trackers, and added to `history`. Metrics that a
    subclass of Trainer keeps for its own next log are not touched. The logged values are:

    - `npeff/explained`: the explained fraction;
    - `npeff/active`: how many components have at least 5% of some probe example's coefficients;
    - `npeff/cosine/j`: |cosine| of g_j with the previous point's g_j (not with a given decomposition, where g_j stays);
    - `npeff/correlation/j`: correlation of component j's column of W with the previous point's, if both vary;
    - `npeff/share/j`: share of the probe examples on which j has the largest coefficient;
    - `npeff/accuracy/j`: share of right predictions on component j's examples, if the probe has labels;
    - `npeff/associated/j`: share of component j's examples that have its most certain association, a word or a value
      of a column, if there is one; `history` has the association itself.

    When training ends, `report_` says what changed between the first and the last point; for a resumed run, the first
    point is the first one after resuming. The report is written to `npeff/change.json` in `args.output_dir`, without
    texts if the run pushes to the Hub, unless `include_texts` is set.

    Every checkpoint gets a folder `npeff/` with the last point's decomposition and `history.jsonl`, from which a
    resumed run continues. Several processes share the examples of the probe; they exchange results in
    `args.output_dir`, to which all need access. Weights may be whole in every process, as under DDP, or sharded by
    FSDP2.

    Trainer does not give its callbacks a way to log, so call `attach(trainer)` to say which Trainer to log with. After
    a plain `add_callback` the callback uses the Trainer on the call stack of the event. If there is none (in another
    training loop that calls callbacks), scalars are written only to `state.log_history`, with a warning.

    Args:
        probe_dataset: a few dozen to a few hundred examples, in any form that `NPEFFAnalyzer.compute_pefs` takes.
        every: when to make a point: "eval" (after every evaluation), "epoch", or a number of optimizer steps.
        n_components: the number of components, r, if no decomposition is given; 16 by default.
        decomposition: follow the components of this decomposition instead of fitting new ones.
        fisher: how PEFs are computed, if no decomposition is given.
        push: add `npeff/` to what Trainer pushes, beside the model.
        include_texts: if the run pushes to the Hub, whether texts among the probe's columns are in checkpoints and are
            pushed (`hub.text_columns`).
        processing_class: the probe's tokenizer or image processor; Trainer's own by default.
        task: the task of the head, if the model's class does not determine it.
        batch_size: how many probe examples a batch has, or "auto".
        max_points: the most points to make; later steps are not analysed.
        max_examples: use only this many examples of the probe, the first ones; needed for an `IterableDataset`.
        on_start: also make a point before the first step.
        **settings: text_column, text_pair_column, label_column, truncation, max_length, as in `compute_pefs`; if no
            decomposition is given, also the settings of `NPEFF`.

    Attributes:
        history: a dictionary for each point: step, epoch, and the values above, with lists of length r for those of
            components; None if a value is not defined.
        decomposition_: the last point's decomposition.
        report_: when training has ended, a `ChangeReport` between the first and the last point; None if there is only
            one point.

    Raises:
        ValueError: if the probe set is empty or in an unknown form, a setting is out of its range, there would be more
            components than rows, or a decomposition is given together with `n_components`, `fisher` or `settings`.
        TypeError: if `decomposition` is not a Decomposition, or a setting of NPEFF does not exist.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> arguments = TrainingArguments("runs/trainer", max_steps=2, report_to="none", use_cpu=True)
        >>> encoded = tokenizer([row["text"] for row in dataset])["input_ids"]
        >>> examples = [{"input_ids": ids, "labels": ids} for ids in encoded]
        >>> trainer = Trainer(model, arguments, train_dataset=examples, processing_class=tokenizer)
        >>> callback = NPEFFCallback(dataset, every=1, n_components=2).attach(trainer)
        >>> trainer.train()
        {...TrainOutput(global_step=2, ...)
        >>> [point["step"] for point in callback.history]
        [1, 2]
    """

    def __repr__(self) -> str:
        return f"NPEFFCallback({len(self.probe)} probe examples, every {self.every}, {len(self.history)} points so far)"

    def __init__(
        self,
        probe_dataset: Any,
        every: Literal["eval", "epoch"] | int = "eval",
        n_components: int | None = None,
        *,
        decomposition: Decomposition | None = None,
        fisher: FisherConfig | None = None,
        push: bool = False,
        include_texts: bool = False,
        processing_class: Any = None,
        task: Any = None,
        batch_size: int | Literal["auto"] = ComputeRequest.batch_size,
        max_points: int | None = None,
        max_examples: int | None = None,
        on_start: bool = False,
        **settings: Any,
    ):
        _check_settings(every, batch_size, max_points)
        if decomposition is not None and not isinstance(decomposition, Decomposition):
            raise TypeError(
                f"decomposition must be a Decomposition, but it is a {type(decomposition).__name__}; "
                "load one with Decomposition.from_pretrained"
            )
        read = {setting.name: settings.pop(setting.name) for setting in fields(Reading) if setting.name in settings}
        self.reading = Reading(**read)
        if decomposition is not None and (n_components is not None or fisher is not None or settings):
            raise ValueError(
                "a given decomposition has its own settings: leave out n_components, fisher and the settings of NPEFF"
            )
        self.probe = records_of(probe_dataset, max_examples)
        if len(self.probe) == 0:
            raise ValueError("the probe set is empty: give NPEFFCallback some examples to follow, a few dozen or more")
        self.every = every
        self.fixed = decomposition
        self.fisher = fisher or FisherConfig()
        self.push, self.include_texts = push, include_texts
        self.processing_class = processing_class
        self.task = task
        self.batch_size = batch_size
        self.max_points = max_points
        self.max_examples = max_examples
        self.on_start = on_start
        if decomposition is None:
            r = DecompositionConfig.n_components if n_components is None else n_components
            self._estimator = NPEFF(r, **settings)
            if self.fisher.output_factor != "exact":  # which keeps more rows where the model has more classes
                self._check_enough_rows(self.fisher.rank)
        else:
            self._estimator = NPEFF.from_config(decomposition.config)
        self.history: list[dict[str, Any]] = []
        self.decomposition_: Decomposition | None = None
        self.report_: ChangeReport | None = None
        self._points: list[RunPoint] = []  # the first and the last
        self._resumed_at = 0
        self._seen: tuple[int, int] | None = None
        self._trainer: Callable[[], Any] = lambda: None
        self._warned = False
        self._pushed: int | None = None

    def attach(self, trainer: Any) -> NPEFFCallback:
        """Add this callback to a Trainer, and log with this Trainer.

        Returns:
            The callback.
        """
        trainer.add_callback(self)
        self._trainer = weakref.ref(trainer)
        return self

    def _check_enough_rows(self, each: int) -> None:
        examples = len(self.probe) if self.max_examples is None else min(len(self.probe), self.max_examples)
        rows, wanted = examples * each, self._estimator.config.n_components
        if wanted > rows:
            raise ValueError(
                f"n_components={wanted} is more than the {rows} rows that {examples} probe examples can have; use "
                "fewer components or a larger probe set"
            )

    # When

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or continue from the checkpoint that Trainer resumes from; check that all settings fit the model.

        Raises:
            UnsupportedModelError: if the model's PEFs cannot be computed.
            IncompatibleSketchError: if the given decomposition belongs to a model with other parameters.
            ValueError: if `fisher` does not fit the model, or the probe has to be encoded and there is no tokenizer or
                processor.
            CorruptStoreError: if the checkpoint's `npeff/` is damaged.
            FormatVersionError: if another version of the format wrote it.
        """
        analyzer = self._analyzer(**kwargs)
        check_adapted_maps(analyzer.model, (name for m in analyzer.maps for name in m.modules))
        if self.fixed is not None:
            analyzer.for_decomposition(self.fixed)
        elif self.fisher.output_factor == "exact":
            self._check_enough_rows(analyzer.rows_per_example(analyzer.read(self.probe)[0].choices))
        self.history, self.decomposition_, self._seen, self._pushed = [], None, None, None
        self._points, self.report_, self._resumed_at = [], None, state.global_step
        if state.global_step > 0:
            self._resume(args, state)
        if self.on_start and not self.history:
            self._point(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make a point every N optimizer steps."""
        if not isinstance(self.every, str) and state.global_step % self.every == 0:
            self._point(args, state, control, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make a point every epoch."""
        if self.every == "epoch":
            self._point(args, state, control, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make a point after an evaluation; only one if there are several evaluation sets."""
        if self.every == "eval":
            self._point(args, state, control, **kwargs)

    # A point

    def _analyzer(
        self, model: Any, processing_class: Any = None, st_model: nn.Module | None = None, **_: Any
    ) -> NPEFFAnalyzer:
        # SetFit passes its own object, which is not a module, and also the SentenceTransformer that is trained.
        model = model if st_model is None else st_model
        # PartialState and not a second Accelerator, which would take over Trainer's gradient accumulation.
        analyzer = NPEFFAnalyzer(
            model,
            self.processing_class if self.processing_class is not None else processing_class,
            fisher=self.fisher,
            accelerator=PartialState(),
            task=self.task,
        )
        analyzer.reading = self.reading
        return analyzer

    def _point(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trained: nn.Module = kwargs["model"] if kwargs.get("st_model") is None else kwargs["st_model"]
        weights = (state.global_step, sum(p._version for p in trained.parameters()))
        if weights == self._seen or (self.max_points is not None and len(self.history) >= self.max_points):
            return
        self._seen = weights
        with _undisturbed():
            now = self._decompose(args, state.global_step, **kwargs)
        before = self.decomposition_
        if before is not None and not same_examples(before, now):
            logger.warning(
                "the probe set differs from the previous point's, so this point is not compared with earlier ones"
            )
            before = None
        record = {"step": state.global_step, "epoch": state.epoch, **drift(now, before, self.fixed is not None)}
        self.decomposition_ = now
        self.history.append(record)
        self._log(state, control, record)

    def _decompose(self, args: TrainingArguments, step: int, **kwargs: Any) -> Decomposition:
        """The decomposition of this point, the same in every process."""
        analyzer, processes = self._analyzer(**kwargs), Processes.of(PartialState())
        folder = _output(args) / _PROBE if processes.count > 1 else None
        old = self.fixed or self.decomposition_
        try:
            pefs = analyzer.compute_pefs(
                self.probe,
                folder,
                batch_size=self.batch_size,
                max_examples=self.max_examples,
                resume=False,
                like=old,
                progress=False,
            )
            now = self._fit(pefs, old)
            self._keep(analyzer, step, pefs, now)
            if folder is not None:
                processes.meet()  # nobody reads any more
        finally:
            if folder is not None and processes.index == 0:
                shutil.rmtree(folder, ignore_errors=True)
        return now

    def _keep(self, analyzer: NPEFFAnalyzer, step: int, pefs: PEFs, now: Decomposition) -> None:
        """Keep this point as the last, and also as the first if there is no earlier point of the same examples."""
        examples = analyzer.examples_of(now, self.probe)
        held = pefs[list(range(len(pefs)))]  # in memory: the folder of several processes goes away
        point = seen_at(analyzer, step, held, now, examples, BATCH_SIZE)
        same = bool(self._points) and same_examples(self._points[0].decomposition, now)
        self._points = [self._points[0], point] if same else [point]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what changed from the first point to the last."""
        if len(self._points) < 2:
            return
        analyzer = self._analyzer(**kwargs)
        examples = analyzer.examples_of(self._points[0].decomposition, self.probe)
        first, last = self._points
        self.report_ = run_change(analyzer, first, last, examples, self._resumed_at)
        if state.is_world_process_zero:
            self.report_.save(_output(args) / FOLDER, texts=self.include_texts or not args.push_to_hub)

    def _fit(self, pefs: PEFs, old: Decomposition | None) -> Decomposition:
        if old is None:
            return self._estimator.fit(pefs)
        self._estimator.decomposition_ = old
        return self._estimator.refit(pefs, move=self.fixed is None)

    # Where the numbers go

    def _log(self, state: TrainerState, control: TrainerControl, record: dict[str, Any]) -> None:
        values = _scalars(record)
        trainer = self._trainer() or _caller(self)
        if trainer is None:
            if not self._warned:
                logger.warning(
                    "no Trainer was found, so trackers do not get the scalars; use NPEFFCallback(...).attach(trainer)"
                )
            self._warned = True
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            return
        wanted = control.should_log
        # Trainers such as TRL's add pending metrics to whatever is logged next; they must not be added to ours.
        log = functools.partial(Trainer.log, trainer) if isinstance(trainer, Trainer) else trainer.log
        log(values)
        control.should_log = wanted  # logging takes it back, and Trainer's own log of this step is still to come

    # Files

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write `npeff/` into the checkpoint, unless it is already there and about to be pushed."""
        checkpoint = _checkpoint(args, state)
        if state.is_world_process_zero and checkpoint.is_dir() and self._pushed != state.global_step:
            self._write(checkpoint / FOLDER, everything=not args.push_to_hub)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write `npeff/` beside the model that is about to be pushed, and into a checkpoint that is pushed too."""
        if self.push and state.is_world_process_zero:
            self._write(_output(args) / FOLDER, everything=False)
            checkpoint = _checkpoint(args, state)
            if checkpoint.is_dir():
                self._write(checkpoint / FOLDER, everything=False)
                self._pushed = state.global_step

    def _write(self, folder: Path, *, everything: bool) -> None:
        if self.decomposition_ is None:
            return
        columns, info = self.decomposition_.columns, self.decomposition_.info
        texts = () if everything or self.include_texts else text_columns(columns, info)
        self.decomposition_.save_pretrained(folder, include_columns=[name for name in columns if name not in texts])
        shown = [{k: v for k, v in record.items() if k != "association" or not texts} for record in self.history]
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in shown)
        write_atomically(folder / HISTORY, lines.encode())

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Read the last point and the history of a checkpoint."""
        given = args.resume_from_checkpoint
        places = [Path(given)] if isinstance(given, str) and Path(given).is_dir() else []
        for checkpoint in (*places, _checkpoint(args, state)):
            folder = checkpoint / FOLDER
            if not folder.is_dir():
                continue
            decomposition = Decomposition.load(folder)
            wanted = self._estimator.config.n_components if self.fixed is None else len(self.fixed)
            if len(decomposition) != wanted:
                logger.warning(
                    "%s has %d components, not %d: starting without its history", folder, len(decomposition), wanted
                )
                return
            self.history, self.decomposition_ = read_json_lines(folder / HISTORY), decomposition
            return
        logger.warning("%s has no points of an NPEFFCallback: starting without a history", _checkpoint(args, state))


def _check_settings(every: object, batch_size: object, max_points: object) -> None:
    if every not in ("eval", "epoch") and not is_count(every):
        raise ValueError(f"every must be 'eval', 'epoch' or a positive number of steps, but it is {every!r}")
    if batch_size != "auto" and not is_count(batch_size):
        raise ValueError(f"batch_size must be a positive whole number or 'auto', but it is {batch_size!r}")
    if max_points is not None and not is_count(max_points):
        raise ValueError(f"max_points must be a positive whole number or None, but it is {max_points!r}")


def _output(args: TrainingArguments) -> Path:
    return Path(args.output_dir or "trainer_output")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return _output(args) / f"checkpoint-{state.global_step}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch; `compute_pefs` restores the model."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _caller(callback: NPEFFCallback) -> Any:
    """The Trainer that called: the nearest one on the call stack that has this callback; None if there is none.

    transformers passes callbacks everything but the Trainer, and runs those of the trackers first, so that what is
    added to `logs` in `on_log` comes too late.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        callbacks = getattr(getattr(owner, "callback_handler", None), "callbacks", ())
        if any(each is callback for each in callbacks) and callable(getattr(owner, "log", None)):
            return owner
        frame = frame.f_back
    return None


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {"npeff/explained": record["explained"], "npeff/active": record["active"]}
    for name in ("cosine", "correlation", "share", "accuracy", "associated"):
        numbered = enumerate(record.get(name) or ())
        values |= {f"npeff/{name}/{j}": value for j, value in numbered if value is not None}
    return values
