"""Hooks on linear maps: from cotangents at a model's output to sketched per-example gradient rows, and nothing else.

The gradient of an example's output with respect to a linear map's weight is Σ_t δ_t x_tᵀ, with x_t the inputs and δ_t
the gradients of the outputs. The forward pass gives x, one backward pass per cotangent gives δ, and a sketch takes
their product apart (P_out δ)(P_in x)ᵀ. No parameter requires a gradient: weight gradients are never formed.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.linear_maps import CUT, LinearMap
from hf_npeff.fisher.parameters import fitted, gradients
from hf_npeff.pefs.sketches import Sketch


class CalledOnceForAll(UnsupportedModelError):  # noqa: N818
    """A module does not keep the examples of a batch apart (it ran once for all of them, or saw routed tokens)."""


class Receiver:
    """What is done with the inputs and output gradients of the linear maps; this one does nothing.

    `take_input` and `take_gradient` are called by hooks (`LinearHooks`), the others by `backward_passes`.
    """

    def take_input(self, name: str, x: Tensor) -> Any:
        """Called in the forward pass with x (B, t, in); what it returns comes back in `take_gradient`."""

    def take_gradient(self, name: str, saved: Any, delta: Tensor) -> None:
        """Called in every backward pass with δ (B, t, out)."""

    def after_forward(self, source: Tensor, passes: int) -> None:
        """Called with the source (B, t, s) and the number of backward passes that are to start from it."""

    def before_backward(self, number: int) -> None:
        """Called before backward pass `number`."""

    def after_backward(self, number: int) -> None:
        """Called after backward pass `number`."""


class LinearHooks:
    """Feeds a receiver from hooks on the linear maps of a model, inside `with`.

    `begin(batch)` comes before each forward pass and says how many examples it holds. After the pass, `ran` are the
    parameters whose modules were called.
    """

    def __init__(self, model: nn.Module, maps: Sequence[LinearMap], receiver: Receiver):
        self.ran: set[str] = set()
        self._end = torch.zeros((), requires_grad=True)
        self._receiver = receiver
        self._batch = 0
        self._modules = {name: m for m in maps for name in m.modules}
        self._model = model
        self._handles: list[Any] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> LinearHooks:
        modules = dict(self._model.named_modules())
        for name, linear_map in self._modules.items():
            self._handles.append(modules[name].register_forward_hook(self._hook(name, linear_map), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def begin(self, batch: int) -> None:
        """Announce a forward pass over `batch` examples."""
        self._batch = batch
        self.ran.clear()

    def _per_example(self, x: Tensor, name: str) -> Tensor:
        """(B, …, features) or flattened (B·t, features) → (B, t, features)."""
        if x.dim() == 3 and x.shape[0] == self._batch:
            return x
        if x.shape[0] % self._batch or x.dim() < 2:
            if x.shape[0] == 1:
                raise CalledOnceForAll(f"{name} runs once for the whole batch; use batch_size=1 for this model")
            raise CalledOnceForAll(
                f"{name} received {tuple(x.shape)} for a batch of {self._batch} examples, so its rows cannot be given "
                f"to examples (routed experts do this). Leave it out with exclude_modules, or use batch_size=1"
            )
        return x.reshape(self._batch, x.numel() // (self._batch * x.shape[-1]), x.shape[-1])

    def _hook(self, name: str, linear_map: LinearMap) -> Callable[..., Tensor]:
        parameter = linear_map.parameter

        def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if threading.get_ident() != self._thread:  # somebody else's prediction meanwhile
                return output
            if not torch.is_grad_enabled():
                _check_that_autograd_sees(name)
                return output  # nothing that comes of it reaches the output's gradient (indices of sparse attention)
            x = args[0] if args else next(iter(kwargs.values()))
            if x.requires_grad and not output.requires_grad:
                raise UnsupportedModelError(CUT.format(name=name, how="its input has one and its output has none"))
            self.ran.add(parameter)
            saved = self._receiver.take_input(parameter, self._per_example(x.detach(), name))

            def backward_hook(delta: Tensor | None) -> None:
                if delta is None:
                    raise UnsupportedModelError(
                        f"no gradient comes back through what follows {name}: its kernels have no backward pass. For a "
                        "model in 4 bits on a CPU, call model.enable_input_require_grads() before it predicts anything"
                    )
                self._receiver.take_gradient(parameter, saved, self._per_example(delta, name))

            tapped: Tensor = _Tap.apply(output, self._end, backward_hook)
            return tapped

        return forward_hook

    def backward(self, source: Tensor, cotangent: Tensor, *, last: bool = False) -> None:
        """Send one cotangent (shaped like `source`) back to all maps; `last` lets the graph go.

        Raises:
            UnsupportedModelError: if no map under analysis influences `source`.
        """
        if not self.ran or not source.requires_grad:
            raise UnsupportedModelError(
                "none of the target modules ran, or the output does not depend on them; check target_modules"
            )
        torch.autograd.grad(source, self._end, cotangent.to(source.dtype), retain_graph=not last, allow_unused=True)


def _check_that_autograd_sees(name: str) -> None:
    """Refuse a module that is being called without gradients by an autograd function of the model's own.

    Its backward pass makes the gradient (reversible layers run forward once more there), where neither hooks nor
    `torch.autograd.grad` can have it.

    Raises:
        UnsupportedModelError: if such a function is among the callers.
    """
    frame = sys._getframe(2)
    while frame is not None:
        first = next(iter(frame.f_locals.values()), None) if frame.f_code.co_name == "forward" else None
        if isinstance(first, torch.autograd.function.FunctionCtx):
            raise UnsupportedModelError(
                f"{name} is called inside {type(first).__name__.removesuffix('Backward')}, an autograd function of the "
                "model's own that hides its gradients (reversible layers do this). Leave all modules inside it out, "
                f"for instance with exclude_modules={name.split('.')[0] + '.*'!r}"
            )
        frame = frame.f_back  # type: ignore[assignment]


class _Tap(torch.autograd.Function):
    """A map's output as it is, whose gradient is handed over, and which makes a backward pass come this far.

    A backward pass visits only what leads to the tensors that it is asked for. `end` is asked for alone and enters
    every output, so each is visited, whatever else requires a gradient (embeddings in training in 8 bits, a constant),
    and nothing before the first map is.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, end: Tensor, taken: Callable[[Tensor | None], None]) -> Tensor:
        ctx.taken = taken
        ctx.set_materialize_grads(False)
        # The output of a linear layer is a view of a matrix, which a model may change in place (Longformer's queries
        # /= √d). The same memory under another name is no view, and PyTorch lets it be changed.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None) -> tuple[Tensor | None, None, None]:
        ctx.taken(delta)
        return delta, None, None


class MadeOneByOne(Sequence[Tensor]):
    """Tensors that are made when they are asked for, so that only one takes memory at a time.

    Args:
        count: how many.
        make: the number of one → the tensor.
    """

    def __init__(self, count: int, make: Callable[[int], Tensor]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._count:
            raise IndexError(i)
        return self._make(i)


def backward_passes(
    model: nn.Module,
    maps: Sequence[LinearMap],
    receiver: Receiver,
    batch: int,
    forward: Callable[[], Tensor],
    entering: Callable[[Tensor], Sequence[Tensor]],
) -> frozenset[str]:
    """One forward pass over a batch, and one backward pass for every cotangent that enters at its source.

    Args:
        model: frozen.
        maps: the linear maps whose inputs and output gradients the receiver gets; without any, nothing runs backward.
        receiver: what is done with them.
        batch: examples of the forward pass.
        forward: the forward pass; it returns the source (B, t, s).
        entering: source → cotangents, one a backward pass; they are cut to the source's shape (see `fitted`).

    Returns:
        The parameters whose modules were called.

    Raises:
        UnsupportedModelError: if the output does not depend on any of the maps, or a map's inputs cannot be told
            apart by example.
    """
    with LinearHooks(model, maps, receiver) as hooks:
        hooks.begin(batch)
        source = forward()
        cotangents = entering(source)
        receiver.after_forward(source, len(cotangents))
        for number, cotangent in enumerate(cotangents):
            receiver.before_backward(number)
            if maps:
                hooks.backward(source, fitted(cotangent, source), last=number == len(cotangents) - 1)
            receiver.after_backward(number)
        return frozenset(hooks.ran)


class RowCollector(Receiver):
    """A receiver that sketches on the fly: one row (B, d) for every backward pass.

    Attributes:
        sketch: what shortens the rows.
        rows: (B, c, d), those of the backward passes that `backward_passes` has run.
    """

    def __init__(self, sketch: Sketch):
        self.sketch = sketch
        self.rows = torch.zeros(0, 0, sketch.dim)
        self._rows: Tensor | None = None
        self._scratch: Tensor | None = None

    def after_forward(self, source: Tensor, passes: int) -> None:
        """Make room for the rows, on the source's device, in float32 or wider."""
        dtype = torch.promote_types(source.dtype, torch.float32)
        self.rows = torch.zeros(len(source), passes, self.sketch.dim, device=source.device, dtype=dtype)

    def before_backward(self, number: int) -> None:
        """Begin a row of every example."""
        self.start(len(self.rows), self.rows.device, self.rows.dtype)

    def after_backward(self, number: int) -> None:
        """Keep it."""
        self.rows[:, number] = self.finish()

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        """Begin the rows of one backward pass."""
        self._rows = self.sketch.new_rows(batch, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def finish(self) -> Tensor:
        """The rows (B, d) of the backward pass that has just run."""
        assert self._rows is not None
        return self.sketch.finish(self._rows)

    def take_input(self, name: str, x: Tensor) -> Tensor:
        """P_in x, once a forward pass."""
        return self.sketch.project_input(name, x)

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add (P_out δ)ᵀ(P_in x), summed over positions."""
        assert self._rows is not None
        delta = self.sketch.project_output(name, delta)
        saved = saved.to(delta.dtype)
        for part in self.sketch.slices(name, len(delta), delta.device):
            values = self._product(delta[..., part].mT, saved)
            self.sketch.add(self._rows, name, values, part.start)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """Products of a (B, m, t) and b (B, t, n), in memory that the next call takes over.

        Fresh memory for every product costs page faults: a third of the time that a countsketch adds to the passes.
        """
        shape = len(a), a.shape[1], b.shape[2]
        n = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < n or self._scratch.dtype != a.dtype:
            self._scratch = a.new_empty(n)
        return torch.bmm(a, b, out=self._scratch[:n].view(shape))


def autograd_rows(
    model: nn.Module, maps: Sequence[LinearMap], forward: Callable[[], Tensor], cotangent: Tensor
) -> Mapping[str, Tensor]:
    """{parameter: gradient (out, in)} of ⟨source, cotangent⟩ by plain autograd, for the self-test of the hooks.

    Args:
        model: frozen; the weights of `maps` require gradients inside only.
        maps: the linear maps to differentiate.
        forward: a forward pass that returns the source.
        cotangent: shaped like the source, or larger (see `fitted`).
    """
    (by_map,) = gradients(model, [m.parameter for m in maps], forward, cotangent[None])
    return {m.parameter: m.as_matrix(gradient) for m, gradient in zip(maps, by_map, strict=True)}
