"""ForwardPass: a batch of examples → what the model predicts for them, and nothing else.

Lifting, token alignments, predictions and studies take it as it is; `rows.RowMaker` adds what makes rows.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_npeff.data import Example, collate
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.fsdp import FSDPModel
from hf_npeff.fisher.gradients import LinearMap
from hf_npeff.fisher.heads import OutputHead, Outputs, traits_of
from hf_npeff.padding import Batch

logger = logging.getLogger(__name__)
TOLERANCE = 1e-2
"""How much rows and logits may differ by rounding, relative, where the model computes in float32 or wider."""
TOLERANCE_16_BIT = 1e-1
"""The same, where it computes in 16 bits."""
_PADDING_EXAMPLES = 64
"""Examples among which the shortest and the longest try out what padding does."""
_NO_LOGITS = "the model gives NaN or infinite logits"
_Self = TypeVar("_Self", bound="ForwardPass")


class NotFiniteError(ValueError):
    """What the model gives for some examples of a batch is NaN or infinite.

    Attributes:
        places: of these examples in the batch.
        reason: without their names.
    """

    def __init__(self, examples: Sequence[Example], places: list[int], reason: str, remedy: str):
        super().__init__(f"{reason}, for the examples {[examples[i].id for i in places]}; {remedy}")
        self.places = places
        self.reason = reason


class PaddingError(ValueError):
    """The model gives NaN for examples in a padded batch, and numbers for each of them alone."""


class ForwardPass:
    """What runs a forward pass: the model, its head, how examples become a batch, and what is under analysis.

    Args:
        model: frozen (see `gradients.frozen`).
        head: what it predicts.
        maps: the linear maps under analysis.
        pad_token_id: what input ids are padded with.
        device: of the model's inputs.
        parameters: other parameters under analysis, as `find_parameters` returns them.
        describe: predictions of a batch → one string an example, kept as the column `prediction`.
        one_at_a_time: never put two examples into a batch.
        feels_padding: whether padding changes what the model predicts; None where that was not tried.
        fsdp: how processes keep in step where the model's weights are sharded over them.
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
        feels_padding: bool | None = None,
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
        self.one_at_a_time = one_at_a_time
        self.feels_padding = feels_padding
        self.fsdp = fsdp or FSDPModel(model)

    def with_maps(
        self: _Self, maps: Sequence[LinearMap], parameters: Mapping[str, tuple[int, int]] | None = None
    ) -> _Self:
        """The same pass with other linear maps under analysis, and with other parameters where they are given."""
        other = copy.copy(self)
        other.maps = tuple(maps)
        other.parameters = dict(self.parameters if parameters is None else parameters)
        return other

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{parameter: (out, in)} of everything under analysis."""
        return {m.parameter: m.shape for m in self.maps} | self.parameters

    @property
    def tolerance(self) -> float:
        """How much rows and logits may differ by rounding, relative."""
        narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        return TOLERANCE_16_BIT if narrow else TOLERANCE

    def batch(self, examples: Sequence[Example], device: torch.device | str) -> Batch:
        """The inputs that the model takes, padded; a head of one's own gets all columns of lists."""
        return collate(examples, self.pad_token_id, device, self.traits.takes)

    def outputs(self, examples: Sequence[Example]) -> Outputs:
        """One forward pass.

        Raises:
            NotFiniteError: if a logit is not finite (the examples are named).
            UnsupportedModelError: if the model has no way to compute in the type of its weights.
        """
        try:
            outputs = self.head.outputs(self.model, self.batch(examples, self.device))
        except RuntimeError as error:
            if "Double" not in str(error) or all(p.dtype != torch.float64 for p in self.model.parameters()):
                raise
            raise UnsupportedModelError(
                f"the model does not run in float64 ({error}): load it in float32, or, where its experts are at fault, "
                "with experts_implementation='eager'"
            ) from error
        self.fsdp.gather_head(outputs.source)
        finite = torch.isfinite(outputs.logits) | outputs.logits.isneginf()
        fine = (finite | ~outputs.valid[..., None]).flatten(1).all(1)
        if not bool(fine.all()):
            places = (~fine).nonzero()[:, 0].tolist()
            remedy = "leave them out (on_error='skip') or fix the model"
            raise NotFiniteError(examples, places, _NO_LOGITS, remedy)
        return outputs

    def source_of(self, examples: Sequence[Example]) -> Callable[[], Tensor]:
        """A forward pass over these examples that returns the source (B, t, s), each time that it is called."""
        return functools.partial(self._source, examples)

    def _source(self, examples: Sequence[Example]) -> Tensor:
        return self.outputs(examples).source

    def batch_size(self, examples: Sequence[Example], wanted: int) -> int:
        """`wanted`, or 1 where a batch would change rows: tried once, on the shortest and the longest of a few."""
        if self.one_at_a_time or wanted == 1:
            return 1
        if self.feels_padding is None:
            few = [examples[i] for i in range(min(len(examples), _PADDING_EXAMPLES))]
            self.feels_padding = self._padding_changes(*(f(few, key=lambda e: e.length) for f in (min, max)))
        return 1 if self.feels_padding else wanted

    @torch.no_grad()
    def _padding_changes(self, short: Example, long: Example) -> bool | None:
        """Whether the model predicts otherwise for an example that is padded; None if none would be.

        Transformers hide padding from attention, but a Fourier transform or a convolution over the tokens mixes it in.
        """
        if short.length == long.length:
            return None
        if self.fsdp.active:
            return False
        try:
            together, alone = self.outputs([short, long]), self.outputs([short])
        except NotFiniteError:
            return False  # whoever runs the batch says which example it is
        padded, own = together.logits[0][together.valid[0]], alone.logits[0][alone.valid[0]]
        padded, own = padded[padded.isfinite()], own[own.isfinite()]
        if padded.shape != own.shape:
            return False
        change = float((padded - own).norm() / own.norm().clamp_min(torch.finfo(own.dtype).tiny))
        if change <= self.tolerance:
            return False
        logger.warning(
            "padding changes the model's logits by %.1f%%: going on with one example at a time", 100 * change
        )
        return True

    @contextlib.contextmanager
    def blaming_padding(self, examples: Sequence[Example]) -> Iterator[None]:
        """Inside `with`, a `NotFiniteError` of this batch is a `PaddingError` where it is padding that makes the NaN.

        Raises:
            PaddingError: if it is.
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
            f"{error.reason}, for the examples {[e.id for e in named]} in a padded batch, and numbers for each of them "
            "alone: use batch_size=1, or load the model in float32"
        ) from error
