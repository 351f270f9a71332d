"""ForwardPass: a batch of examples → the model's predictions for them, and nothing else.

Lifting, token alignments, predictions and studies use it directly; `rows.RowMaker` adds the computation of rows.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_npeff import progress
from hf_npeff.data import Example, batches_by_length, collate
from hf_npeff.errors import NPEFFError, UnsupportedModelError
from hf_npeff.fisher.bare_model import base_of
from hf_npeff.fisher.batching import (
    TRIED_TOGETHER,
    BatchTrials,
    alike,
    length_limits,
    logit_tolerance,
    percent,
    relative_change,
    span_of,
    spread,
    straddles,
)
from hf_npeff.fisher.fsdp import FSDPModel
from hf_npeff.fisher.linear_maps import LinearMap, sees_images, shapes_of
from hf_npeff.fisher.memory import is_out_of_memory
from hf_npeff.fisher.model_state import ModelState
from hf_npeff.fisher.outputs import OutputHead, Outputs, traits_of
from hf_npeff.fisher.repeatable import check_repeatable
from hf_npeff.fisher.terms import NothingMarkedError
from hf_npeff.fisher.token_shares import gets_some_tokens
from hf_npeff.images import with_images_joined
from hf_npeff.padding import Batch, is_beside_tokens

logger = logging.getLogger(__name__)
_PADDING_EXAMPLES = 64
"""The shortest and the longest of the first examples, this many, show whether padding matters, before any batch is
made."""
_REASON = 200
"""Letters of a model's own error that a message quotes. Chosen: two lines."""
_NO_LOGITS = "the model gives NaN or infinite logits"
_Self = TypeVar("_Self", bound="ForwardPass")


class NotFiniteError(ValueError):
    """The model's output for some examples of a batch is NaN or infinite.

    Attributes:
        places: the places of these examples in the batch.
        reason: the reason, without the examples' ids.
    """

    def __init__(self, examples: Sequence[Example], places: list[int], reason: str, remedy: str):
        super().__init__(f"{reason}, for the examples {[examples[i].id for i in places]}; {remedy}")
        self.places = places
        self.reason = reason


_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""Errors that models raise for inputs of wrong shapes."""


def _in_words(error: Exception) -> str:
    """A model's own error, with its class: a `KeyError` says no more than a name."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_REASON]}"


class _NotTogetherError(Exception):
    """The model fails for a batch, but not for its examples alone."""


class ModelFailsError(ValueError, RuntimeError):
    """The model's own forward pass raises an error; a RuntimeError, because most of these errors are."""


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by this package, with an explanation, and not by the model."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    name = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
    return isinstance(error, NPEFFError) or name.split(".")[0] == __name__.split(".")[0]


class PaddingError(ValueError):
    """The model gives NaN for examples in a padded batch, but finite numbers for each of them alone."""


class ForwardPass:
    """Runs a model on batches of examples, and knows its head and the analysed weights.

    Args:
        model: the frozen model (see `gradients.frozen`).
        head: the head, which says what the model predicts.
        maps: the analysed linear maps.
        pad_token_id: the token id for padding.
        device: the device of the model's inputs.
        parameters: other analysed parameters, as `find_parameters` returns them.
        describe: predictions of a batch → a string for each example, kept as the column `prediction`.
        one_at_a_time: whether every batch has a single example.
        trials: the results of trials of batches, shared by all passes over one model.
        fsdp: keeps processes in step if the model's weights are sharded over them.
    """

    def __init__(
        self,
        model: nn.Module,
        head: OutputHead,
        maps: Sequence[LinearMap],
        pad_token_id: int | None,
        device: torch.device,
        *,
        parameters: Mapping[str, tuple[int, int]] | None = None,
        describe: Callable[[Tensor], list[str]] | None = None,
        one_at_a_time: bool = False,
        trials: BatchTrials | None = None,
        fsdp: FSDPModel | None = None,
    ):
        self.model = model
        self.head = head
        self.traits = traits_of(head)
        self.maps = tuple(maps)
        self.pad_token_id = pad_token_id
        self.device = device
        self.parameters = dict(parameters or {})
        self.describe = describe
        self._one_at_a_time = one_at_a_time
        self.trials = trials or BatchTrials()
        self.fsdp = fsdp or FSDPModel(model)
        self.limits = length_limits(model)
        self._state = ModelState(model)
        self._maps_of_images = sees_images(model, maps)

    def in_words(self, answer: Tensor) -> str:
        """An example's answer, all its terms, in words.

        Args:
            answer: one of `Predictions.answers`.
        """
        assert self.describe is not None
        return self.traits.between_terms.join(self.describe(answer))

    def with_maps(
        self: _Self, maps: Sequence[LinearMap], parameters: Mapping[str, tuple[int, int]] | None = None
    ) -> _Self:
        """The same pass with other analysed linear maps and, if given, other parameters."""
        other = copy.copy(self)
        other.maps = tuple(maps)
        other.parameters = dict(self.parameters if parameters is None else parameters)
        return other

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{parameter: (out, in)} of all analysed weights."""
        return shapes_of(self.maps, self.parameters)

    @property
    def one_at_a_time(self) -> bool:
        """Whether every batch has a single example, because it was asked for or a trial has shown the need."""
        return self._one_at_a_time or self.trials.one_at_a_time

    @property
    def tolerance(self) -> float:
        """The relative difference of logits that may be rounding."""
        return logit_tolerance(self.model)

    def batch(self, examples: Sequence[Example], device: torch.device | str) -> Batch:
        """The inputs that the model takes, padded; a custom head gets all columns of lists."""
        if not self.trials.image_layout_is_known and any(map(self._is_doubtful, examples)):
            self._find_image_layout(next(e for e in examples if self._is_doubtful(e)), device)
        if self.trials.images_joined:
            examples = [dataclasses.replace(e, inputs=with_images_joined(e.inputs)) for e in examples]
        return collate(examples, self.pad_token_id, device, self.traits.takes)

    def _is_doubtful(self, example: Example) -> bool:
        """Whether a batch has images for which it is not known whether the model takes them stacked by example."""
        images = example.inputs.get("pixel_values")
        return isinstance(images, Tensor) and images.dim() >= 4 and "input_ids" in example.inputs

    @torch.no_grad()
    def _find_image_layout(self, example: Example, device: torch.device | str) -> None:
        """Find out whether the model takes the images of a batch stacked by example or joined.

        Raises:
            ValueError: if it takes neither.
        """
        self.trials.image_layout_is_known = True
        try:
            self.head.outputs(self.model, self.batch([example], device))
        except _FAILURES as error:
            self.trials.image_layout_is_known = False
            if is_out_of_memory(error):
                raise
            self._try_images_joined(example, device, error)
        finally:
            self._state.restore()

    def _try_images_joined(self, example: Example, device: torch.device | str, stacked: Exception) -> None:
        """Record that images are joined, if the model takes them so; for stacked ones it failed with `stacked`."""
        self.trials.image_layout_is_known = self.trials.images_joined = True
        try:
            self.head.outputs(self.model, self.batch([example], device))
        except _FAILURES as error:
            self.trials.image_layout_is_known = self.trials.images_joined = False
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"the model takes the images of example {example.id!r} neither as they are nor with a dimension of "
                f"examples before them ({_in_words(stacked)}): pass what its processor returns for this example, with "
                "return_tensors='pt'"
            ) from stacked
        logger.info(
            "the images of a batch are joined, because the model fails with images stacked by example: %s",
            _in_words(stacked),
        )

    def outputs(self, examples: Sequence[Example]) -> Outputs:
        """One forward pass.

        Raises:
            NotFiniteError: if a logit is not finite (the examples are named).
            ValueError: if nothing is to be predicted in an example (it is named).
            UnsupportedModelError: if the model cannot compute in the type of its weights.
            ModelFailsError: if the model raises an error of its own.
        """
        try:
            outputs = self.head.outputs(self.model, self.batch(examples, self.device))
            self._state.restore()  # each pass finds the model in its original state
        except NothingMarkedError as error:
            self._state.restore()
            names = [examples[i].id for i in error.places]
            raise ValueError(
                f"positions={error.rule!r} finds nothing to predict in the example{'s' if len(names) > 1 else ''} "
                f"{', '.join(map(repr, names[:3]))}; leave such examples out, or choose other positions"
            ) from None
        except (*_FAILURES, ImportError) as error:
            self._state.restore()
            if is_out_of_memory(error) or _is_ours(error):
                raise
            if "Double" in str(error) and any(p.dtype == torch.float64 for p in self.model.parameters()):
                raise UnsupportedModelError(
                    f"the model does not run in float64 ({error}): load it in float32, or, if its experts are the "
                    "reason, with experts_implementation='eager'"
                ) from error
            names = sorted(examples[0].inputs)
            raise ModelFailsError(
                f"{type(base_of(self.model)).__name__} fails for the inputs {names} of the example"
                f"{'s' if len(examples) > 1 else ''} {[e.id for e in examples[:3]]} ({_in_words(error)}): pass all "
                "inputs that the model needs, such as everything that its processor or tokenizer returns, and check "
                "that the model itself runs on them"
            ) from error
        self.fsdp.gather_head(outputs.source)
        if not torch.isfinite(outputs.logits.detach().sum()):  # a sum is finite only if all its terms are
            finite = torch.isfinite(outputs.logits) | outputs.logits.isneginf()
            fine = (finite | ~outputs.valid[..., None]).flatten(1).all(1)
            if not bool(fine.all()):
                places = (~fine).nonzero()[:, 0].tolist()
                remedy = "leave them out (on_error='skip') or fix the model"
                raise NotFiniteError(examples, places, _NO_LOGITS, remedy)
        progress.current().count(len(examples))
        return outputs

    def source_of(self, examples: Sequence[Example]) -> Callable[[], Tensor]:
        """A function that runs a forward pass over these examples and returns the source (B, t, s)."""
        return functools.partial(self._source, examples)

    def _source(self, examples: Sequence[Example]) -> Tensor:
        return self.outputs(examples).source

    def batches(self, examples: Sequence[Example], size: int, *, trials: bool = True) -> Iterator[list[int]]:
        """Places of all examples in batches of at most `size`, of similar length, longest first.

        Batches of a new kind are tried (see `may_share`); examples that must not share a batch get one each.

        Args:
            examples: the examples, in any order.
            size: the most examples in a batch.
            trials: whether to try batches; otherwise the results of earlier trials decide.
        """
        for batch in batches_by_length([example.length for example in examples], size):
            for part in alike([examples[i] for i in batch], self.traits.takes):
                places = [batch[i] for i in part]
                together = [examples[i] for i in places]
                known = self.one_at_a_time or straddles(together, self.limits)
                if len(places) == 1 or (self.may_share(together) if trials else not known):
                    yield places
                else:
                    yield from ([i] for i in places)

    def batch_size(self, examples: Sequence[Example], wanted: int) -> int:
        """`wanted`, or 1 if the shortest and the longest of a few examples must not share a batch."""
        if self.one_at_a_time or wanted == 1:
            return 1
        few = sorted((examples[i] for i in range(min(len(examples), _PADDING_EXAMPLES))), key=lambda e: e.length)
        for low, high in zip([0, *self.limits], [*self.limits, few[-1].length], strict=True):
            within = [example for example in few if low < example.length <= high]
            for part in alike(within, self.traits.takes):
                self.may_share([within[i] for i in part], at_once=wanted)
        return 1 if self.one_at_a_time else wanted

    def may_share(self, examples: Sequence[Example], at_once: int = TRIED_TOGETHER) -> bool:
        """Whether these examples may share a batch; for a new kind of batch this is tried with a few of them.

        Args:
            examples: the examples of the batch.
            at_once: the most examples to try together, at least 2; the shortest and the longest are among them.
        """
        if len(examples) == 1:
            return True
        if self.one_at_a_time or straddles(examples, self.limits) or len(alike(examples, self.traits.takes)) > 1:
            return False
        if len({example.sizes for example in examples}) > 1 and self._divides_unequally(examples):
            return False
        kinds = {(example.length, *example.sizes): example for example in examples}
        if len(kinds) == 1 or self.fsdp.active or self.trials.covers(examples):
            return True
        try:
            change = self._change_of([kinds[n] for n in spread(sorted(kinds), max(2, min(at_once, TRIED_TOGETHER)))])
        except _NotTogetherError as error:
            self.refuse_batches(f"the model or its inputs do not work in a batch of several sizes ({error})")
            return False
        if change is None:
            return True  # if it is NaN, the caller that runs the batch names the example
        if change > logit_tolerance(self.model):
            self.check_repeatable(max(examples, key=lambda example: example.length))
            how = "altogether" if change == float("inf") else f"by {percent(change)}"
            self.refuse_batches(f"padding changes the model's logits {how}")
            return False
        self.trials.agreeing.append(span_of(examples))
        return True

    def _divides_unequally(self, examples: Sequence[Example]) -> bool:
        """Whether a map may get more rows of one of these examples than of another, such as the tokens of its images.

        The rows of a map are divided among the examples in equal shares.
        """
        if self._maps_of_images:
            return True
        known = self.trials.getting_some_tokens
        for kind, example in {frozenset(example.inputs): example for example in examples}.items():
            if kind not in known and not self.fsdp.active and any(map(is_beside_tokens, kind)):
                run = functools.partial(self._ran_on, example)
                known[kind] = gets_some_tokens(self.model, self.maps, run, example.length)
            if known.get(kind):
                return True
        return False

    def _ran_on(self, example: Example) -> None:
        with contextlib.suppress(NotFiniteError):  # whoever runs the batch names the example
            self.outputs([example])

    @torch.no_grad()
    def check_repeatable(self, example: Example) -> None:
        """Check that the model gives the same logits in every pass over the same example.

        Raises:
            UnsupportedModelError: see `repeatable.check_repeatable`.
        """
        # Documents packed into one sequence, whose positions begin again, are kept apart only without a cache.
        positions = example.inputs.get("position_ids")
        packed = positions is not None and bool((torch.as_tensor(positions).diff(dim=-1) != 1).any())
        check_repeatable(
            self.model,
            self.device,
            lambda: self._logits_of(example),
            with_cache=self.traits.task != "seq2seq-lm" and not packed,
            failures=(ModelFailsError, NotFiniteError),
        )

    def _logits_of(self, example: Example) -> Tensor:
        outputs = self.outputs([example])
        return outputs.logits[0][outputs.valid[0]]

    def refuse_batches(self, reason: str) -> None:
        """From now on run one example at a time, and warn with the reason."""
        self.trials.one_at_a_time = True
        logger.warning("%s: continuing with one example at a time", reason)

    @torch.no_grad()
    def _change_of(self, examples: Sequence[Example]) -> float | None:
        """The largest relative change of an example's logits in a batch of all; None if its logits alone are NaN.

        Raises:
            _NotTogetherError: if the model takes each example alone, but not all together.
        """
        try:
            alone = [self.outputs([example]) for example in examples]
        except NotFiniteError:
            return None
        try:
            together = self.outputs(examples)
        except NotFiniteError:
            return float("inf")
        except _FAILURES as error:
            if is_out_of_memory(error):
                raise
            raise _NotTogetherError(_in_words(error)) from error
        return max(
            relative_change(together.logits[i][together.valid[i]], own.logits[0][own.valid[0]])
            for i, own in enumerate(alone)
        )

    @contextlib.contextmanager
    def blaming_padding(self, examples: Sequence[Example]) -> Iterator[None]:
        """Inside `with`, turn a `NotFiniteError` of this batch into a `PaddingError` if padding causes the NaN.

        Raises:
            PaddingError: if padding causes it.
        """
        try:
            yield
        except NotFiniteError as error:
            self._blame_padding(examples, error)
            raise

    def _blame_padding(self, examples: Sequence[Example], error: NotFiniteError) -> None:
        if len(examples) == 1 or self.fsdp.active or error.reason != _NO_LOGITS:
            return
        named = [examples[i] for i in error.places]
        try:
            for example in named:
                self.outputs([example])
        except NotFiniteError:
            return
        raise PaddingError(
            f"{error.reason}, for the examples {[e.id for e in named]} in a padded batch, but not for each of them "
            "alone: use batch_size=1, or load the model in float32"
        ) from error
