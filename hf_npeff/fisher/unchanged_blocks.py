"""Caches the hidden states below a change for each example, so that the blocks below the change run only once.

A change of some layers does not affect the hidden states of the blocks before them. If a model runs many times over the
same examples, with one change after another, these blocks run only the first time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.data import Example
from hf_npeff.fisher.batching import relative_change
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.memory import is_out_of_memory
from hf_npeff.fisher.outputs import Outputs

logger = logging.getLogger(__name__)
_MOST_BYTES = 2**30
"""The most memory for cached states: 100,000 tokens of a model with states of 2,560 numbers in float32."""


class UnchangedBlocks:
    """Runs a model whose changes do not affect its first blocks, and runs these blocks once for each example.

    The blocks are members of the model's outermost `nn.ModuleList`s. The first forward pass shows which of them come
    before every changed module. The first pass that uses cached states is also made in full. If the results differ,
    because the model uses a block's output elsewhere too, all passes are made in full from then on.

    Args:
        forward: the forward pass.
        changed: names of the modules whose outputs may change from one pass to the next.
    """

    def __init__(self, forward: ForwardPass, changed: Iterable[str]):
        self._forward = forward
        modules = dict(forward.model.named_modules())
        self._changed = [modules[name] for name in changed]
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        self._list_of = {block: name for name in outer for block in modules[name].children()}
        self._below: list[nn.Module] | None = None  # those before the change, once a pass has shown them
        self._states: dict[int, tuple[Example, Tensor]] = {}  # by identity: an example is held as long as its state is
        self._bytes = 0
        self._tried = False
        self._usable = bool(self._list_of) and not forward.fsdp.active

    def outputs(self, examples: Sequence[Example]) -> Outputs:
        """`ForwardPass.outputs`, without running the blocks whose states are cached.

        Raises:
            NotFiniteError: if a logit is not finite (the examples are named).
        """
        if not self._usable or torch.is_grad_enabled():
            return self._forward.outputs(examples)
        states = self._states_of(examples)
        if states is None:
            with self._recording(examples):
                return self._forward.outputs(examples)
        short = self._short(examples, states)
        if short is not None and self._tried:
            return short
        whole = self._forward.outputs(examples)
        return whole if short is None else self._compared(short, whole)

    def _short(self, examples: Sequence[Example], states: Tensor) -> Outputs | None:
        """A pass with cached states; None if it fails."""
        try:
            with self._given(states):
                return self._forward.outputs(examples)
        except NotFiniteError:
            if self._tried:
                raise
            self._give_up("without them it gives numbers that are not finite")
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            self._give_up(f"without them it fails: {error}")
        return None

    def _compared(self, short: Outputs, whole: Outputs) -> Outputs:
        """Compare the first pass with cached states to a full pass, and return the full pass."""
        self._tried = True
        same = whole.valid.shape == short.valid.shape and torch.equal(whole.valid, short.valid)
        pairs = zip(short.logits[whole.valid], whole.logits[whole.valid], strict=True) if same else ()
        if not same or any(relative_change(a, b) > self._forward.tolerance for a, b in pairs):
            self._give_up("without them the result differs")
        return whole

    def _give_up(self, why: str) -> None:
        logger.info("the blocks below the change run in every pass: %s", why)
        self._usable = False
        self._states.clear()

    # What is kept ------------------------------------------------------------------------------------------------

    def _states_of(self, examples: Sequence[Example]) -> Tensor | None:
        """(B, T, …): the cached states of a batch, with zeros at padding; None if one is missing."""
        kept = [self._states.get(id(example)) for example in examples]
        states = [pair[1] for pair in kept if pair is not None]
        if len(states) < len(kept) or len({state.shape[1:] for state in states}) > 1:
            return None
        whole = any(len(state) != example.length for state, example in zip(states, examples, strict=True))
        if whole and len({(example.length, len(state)) for state, example in zip(states, examples, strict=True)}) > 1:
            return None  # how many positions such inputs have together is the model's to say
        return torch.nn.utils.rnn.pad_sequence(states, batch_first=True)

    def _keep(self, examples: Sequence[Example], states: Any) -> None:
        if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != len(examples):
            self._give_up("their output is not a tensor (examples, positions, numbers)")
            return
        padded = states.shape[1] == max(example.length for example in examples)
        if not padded and len({(example.length, example.sizes) for example in examples}) > 1:
            return  # positions that are not the tokens', of inputs of several sizes
        for example, state in zip(examples, states, strict=True):
            own = (state[: example.length] if padded else state).clone()
            self._bytes += own.numel() * own.element_size()
            if self._bytes > _MOST_BYTES:
                return
            self._states[id(example)] = example, own

    # Forward passes ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _recording(self, examples: Sequence[Example]) -> Iterator[None]:
        """Inside `with`, a pass records which blocks come before the change, and the output of the last of them."""
        ended: list[nn.Module] = []
        last: list[Any] = []
        open_: list[bool] = [True]

        def starts(module: nn.Module, args: Any) -> None:
            open_[0] = False

        def ends(module: nn.Module, args: Any, output: Any) -> None:
            if open_[0]:
                ended.append(module)
                last[:] = [output]

        handles = [module.register_forward_pre_hook(starts) for module in self._changed]
        handles += [block.register_forward_hook(ends) for block in self._list_of]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        below = [block for block in ended if self._list_of[block] == self._list_of[ended[-1]]]
        if not below or len(set(below)) < len(below) or open_[0]:
            self._give_up("none comes before it, or one runs several times")
        elif self._below not in (None, below):
            self._give_up("they differ from pass to pass")
        else:
            self._below = below
            self._keep(examples, last[0])

    @contextlib.contextmanager
    def _given(self, states: Tensor) -> Iterator[None]:
        """Inside `with`, the blocks before the change return the cached states, whatever their inputs are."""
        assert self._below is not None
        before = [(block, vars(block).get("forward")) for block in self._below]
        try:
            for block in self._below:
                block.forward = lambda *args, **kwargs: states
            yield
        finally:
            for block, forward in before:
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
