"""Hooks on linear maps: from cotangents at a model's output to sketched gradient rows of each example.

The gradient of an example's output with respect to a linear map's weight is Σ_t δ_t x_tᵀ, with x_t the inputs and δ_t
the gradients of the outputs. The forward pass gives x, one backward pass for each cotangent gives δ, and a sketch
splits their product into (P_out δ)(P_in x)ᵀ. No parameter requires a gradient, and weight gradients are never formed.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.expert_search import find_experts
from hf_npeff.fisher.linear_maps import CUT, LinearMap
from hf_npeff.fisher.parameters import fitted, gradients
from hf_npeff.fisher.routing import Routing, RowsByExpert, Tap
from hf_npeff.pefs.sketches import Sketch


class CalledOnceForAll(UnsupportedModelError):  # noqa: N818
    """A module mixes the examples of a batch (it ran once for all of them, or got routed tokens)."""


class NoneRan(UnsupportedModelError):  # noqa: N818
    """No module of the target maps was called in a forward pass."""


class Receiver:
    """Base class of receivers for the inputs and output gradients of the linear maps; this one does nothing.

    Hooks (`LinearHooks`) call the `take_…` methods, and `backward_passes` calls the others.
    """

    def take_input(self, name: str, x: Tensor) -> Any:
        """Called in the forward pass with x (B, t, in); the returned object is passed to `take_gradient`."""

    def take_gradient(self, name: str, saved: Any, delta: Tensor) -> None:
        """Called in every backward pass with δ (B, t, out)."""

    def take_routed_input(self, name: str, x: Tensor, routing: Routing) -> Any:
        """Called for fused experts, with x (S, in) sorted by expert; the result is passed to `take_routed_gradient`.

        By default, here and in `take_routed_gradient`, the rows are arranged by example, with each δ at the place of
        its expert. This is right for every receiver, but E times as large as necessary.
        """
        return self.take_input(name, routing.by_example(x))

    def take_routed_gradient(self, name: str, saved: Any, delta: Tensor, routing: Routing) -> None:
        """Called in every backward pass with δ (S, out) of fused experts, sorted like x."""
        self.take_gradient(name, saved, routing.embedded(delta))

    def after_forward(self, source: Tensor, passes: int) -> None:
        """Called with the source (B, t, s) and the number of backward passes that will start from it."""

    def before_backward(self, number: int) -> None:
        """Called before backward pass `number`."""

    def after_backward(self, number: int) -> None:
        """Called after backward pass `number`."""


class LinearHooks:
    """Hooks on the linear maps of a model that call a receiver, inside `with`.

    Call `begin(batch)` before each forward pass, with the number of its examples. After the pass, `ran` has the
    parameters whose modules were called.

    Raises:
        UnsupportedModelError: on entering, if a module no longer has fused experts.
    """

    def __init__(self, model: nn.Module, maps: Sequence[LinearMap], receiver: Receiver):
        self.ran: set[str] = set()
        self._end = torch.zeros((), requires_grad=True)
        self._receiver = receiver
        self._batch = 0
        self._modules = {name: m for m in maps if m.fused is None for name in m.modules}
        self._fused: dict[str, dict[str, LinearMap]] = {}
        for m in maps:
            if m.fused is not None:
                self._fused.setdefault(m.modules[0], {})[m.fused.name] = m
        self._model = model
        self._handles: list[Any] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> LinearHooks:
        modules = dict(self._model.named_modules())
        for name, linear_map in self._modules.items():
            # First, because the outputs of other hooks are not the weight's.
            hook = self._hook(name, linear_map)
            self._handles.append(modules[name].register_forward_hook(hook, prepend=True, with_kwargs=True))
        if self._fused:
            # no module stays changed if entering fails
            try:
                modules_of_experts = find_experts(self._model, self._fused)
                if moved := sorted(self._fused.keys() - modules_of_experts.keys()):
                    raise UnsupportedModelError(
                        f"{moved[0]} had fused experts when the analyzer was made and has none now, for example "
                        "because an adapter was added or removed: make a new NPEFFAnalyzer of the model"
                    )
                for name, experts in modules_of_experts.items():
                    wanted = functools.partial(self._is_wanted, name)
                    self._handles.append(experts.intercept(self._tap(name, self._fused[name]), wanted))
            except BaseException:
                self.__exit__(None, None, None)
                raise
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
                f"{name} received {tuple(x.shape)} for a batch of {self._batch} examples, so its rows cannot be "
                "assigned to examples (this happens with routed experts). Leave it out with exclude_modules, or use "
                "batch_size=1"
            )
        return x.reshape(self._batch, x.numel() // (self._batch * x.shape[-1]), x.shape[-1])

    def _hook(self, name: str, linear_map: LinearMap) -> Callable[..., Tensor]:
        parameter = linear_map.parameter

        def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not self._is_wanted(name):
                return output
            x = args[0] if args else next(iter(kwargs.values()))
            self._check_uncut(name, x, output)
            self.ran.add(parameter)
            saved = self._receiver.take_input(parameter, self._per_example(x.detach(), name))

            def take(delta: Tensor) -> None:
                self._receiver.take_gradient(parameter, saved, self._per_example(delta, name))

            return self._watched(name, output, take)

        return forward_hook

    def _tap(self, name: str, maps: Mapping[str, LinearMap]) -> Tap:
        """The tap for the products of a module of fused experts, for the analysed maps."""

        def tap(weight: str, x: Tensor, routing: Routing, output: Tensor) -> Tensor:
            if weight not in maps:
                return output
            parameter = maps[weight].parameter
            self._check_uncut(name, x, output)
            if routing.tokens % self._batch:
                raise CalledOnceForAll(
                    f"{name} received {routing.tokens} tokens for a batch of {self._batch} examples, so its rows "
                    "cannot be assigned to examples. Leave it out with exclude_modules, or use batch_size=1"
                )
            routing.batch = self._batch
            self.ran.add(parameter)
            saved = self._receiver.take_routed_input(parameter, x.detach(), routing)

            def take(delta: Tensor) -> None:
                self._receiver.take_routed_gradient(parameter, saved, delta, routing)

            return self._watched(name, output, take)

        return tap

    def _is_wanted(self, name: str) -> bool:
        """Whether a module's call belongs to the pass: not a call under `no_grad`, nor another thread's prediction.

        A call under `no_grad` has no influence on the output's gradient (indices of sparse attention).
        """
        if threading.get_ident() != self._thread:
            return False
        if not torch.is_grad_enabled():
            _check_that_autograd_sees(name)
        return torch.is_grad_enabled()

    @staticmethod
    def _check_uncut(name: str, x: Tensor, output: Tensor) -> None:
        if x.requires_grad and not output.requires_grad:
            raise UnsupportedModelError(CUT.format(name=name, how="its input has a gradient and its output has none"))

    def _watched(self, name: str, output: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        """A map's output, with a hook that takes its gradient in every backward pass."""

        def backward_hook(delta: Tensor | None) -> None:
            if delta is None:
                raise UnsupportedModelError(
                    f"no gradient comes back through the layers after {name}, because their kernels have no backward "
                    "pass. For a model in 4 bits on a CPU, call model.enable_input_require_grads() before it makes any "
                    "prediction"
                )
            take(delta)

        tapped: Tensor = _Tap.apply(output, self._end, backward_hook)
        return tapped

    def backward(self, source: Tensor, cotangent: Tensor, *, last: bool = False) -> None:
        """Send one cotangent (shaped like `source`) back to all maps; `last` frees the graph.

        Raises:
            NoneRan: if no analysed map was called.
            UnsupportedModelError: if no analysed map influences `source`.
        """
        if not self.ran:
            raise NoneRan("none of the target modules ran; check target_modules")
        if not source.requires_grad:
            raise UnsupportedModelError("the output does not depend on the target modules; check target_modules")
        torch.autograd.grad(source, self._end, cotangent.to(source.dtype), retain_graph=not last, allow_unused=True)


def _check_that_autograd_sees(name: str) -> None:
    """Check that a module is not called without gradients inside an autograd function of the model.

        The function's backward pass computes the gradient (reversible layers run forward again there), out of reach of
        hooks and `torch.autograd.grad`.

    Raises:
        UnsupportedModelError: if such a function is among the callers.
    """
    frame = sys._getframe(2)
    while frame is not None:
        first = next(iter(frame.f_locals.values()), None) if frame.f_code.co_name == "forward" else None
        if isinstance(first, torch.autograd.function.FunctionCtx):
            raise UnsupportedModelError(
                f"{name} is called inside {type(first).__name__.removesuffix('Backward')}, an autograd function of the "
                "model that hides its gradients (reversible layers do this). Leave out all modules inside it, for "
                f"instance with exclude_modules={name.split('.')[0] + '.*'!r}"
            )
        frame = frame.f_back  # type: ignore[assignment]


class _Tap(torch.autograd.Function):
    """Returns a map's output unchanged, hands over its gradient, and makes the backward pass reach it.

    A backward pass visits only the graph that leads to the requested tensors. Only `end` is requested, and it enters
    every map's output. So every map is visited, whatever else requires a gradient (embeddings in 8-bit training, a
    constant), and nothing before the first map is visited.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, end: Tensor, taken: Callable[[Tensor | None], None]) -> Tensor:
        ctx.taken = taken
        ctx.set_materialize_grads(False)
        # The output of a linear layer is a view of a matrix, which a model may change in place (Longformer's queries
        # /= √d). The same memory under another name is not a view, and PyTorch allows changes to it.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, delta: Tensor | None) -> tuple[Tensor | None, None, None]:
        ctx.taken(delta)
        return delta, None, None


class MadeOneByOne(Sequence[Tensor]):
    """A sequence of tensors, each made when it is read, so that only one takes memory at a time.

    Args:
        count: the number of tensors.
        make: index → tensor.
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
        model: the frozen model.
        maps: the linear maps whose inputs and output gradients the receiver gets; without any, there is no backward
            pass.
        receiver: gets the inputs and output gradients.
        batch: the number of examples of the forward pass.
        forward: the forward pass; it returns the source (B, t, s).
        entering: source → cotangents, one for each backward pass; they are cut to the source's shape (see `fitted`).

    Returns:
        The parameters whose modules were called.

    Raises:
        UnsupportedModelError: if the output does not depend on any of the maps, or a map's inputs cannot be assigned
            to examples.
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
    """A receiver that sketches gradients as they arrive: a row (B, d) for every backward pass.

    Attributes:
        sketch: the sketch that shortens the rows.
        rows: (B, c, d), the rows of the backward passes so far.
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
        """Start a row for every example."""
        self.start(len(self.rows), self.rows.device, self.rows.dtype)

    def after_backward(self, number: int) -> None:
        """Keep the finished row of every example."""
        self.rows[:, number] = self.finish()

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        """Start the rows of one backward pass."""
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
        self._add(name, saved, self.sketch.project_output(name, delta))

    def _add(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add δᵀx for projected x (B, t, k_in) and δ (B, t, k_out)."""
        assert self._rows is not None
        saved = saved.to(delta.dtype)
        for part in self.sketch.slices(name, len(delta), delta.device):
            values = self._product(delta[..., part].mT, saved)
            self.sketch.add(self._rows, name, values, part.start)

    def take_routed_input(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """P_in x, arranged by example if output gradients will be as short."""
        x = self.sketch.project_input(name, x)
        return routing.by_example(x) if self.sketch.has_output_side(name) else x

    def take_routed_gradient(self, name: str, saved: Tensor, delta: Tensor, routing: Routing) -> None:
        """Add (P_out δ)ᵀ(P_in x), summed over an example's tokens and their experts."""
        assert self._rows is not None
        if self.sketch.has_output_side(name):
            delta = routing.by_example(self.sketch.project_output_by_expert(name, delta, routing.counts))
            self._add(name, saved, delta)
            return
        # Rows of the product that belong to an expert without tokens are zero.
        out, parts = delta.shape[1], RowsByExpert(routing, saved.to(delta.dtype), delta)
        for part in self.sketch.slices(name, routing.batch, delta.device):
            values = delta.new_zeros(routing.batch, part.stop - part.start, saved.shape[-1])
            for expert in range(part.start // out, (part.stop - 1) // out + 1):
                if routing.counts[expert]:
                    first, last = max(part.start, expert * out), min(part.stop, (expert + 1) * out)
                    x, d = parts.of(expert)
                    d = d[..., first - expert * out : last - expert * out]
                    values[:, first - part.start : last - part.start] = self._product(d.mT, x)
            self.sketch.add(self._rows, name, values, part.start)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """Products of a (B, m, t) and b (B, t, n), in memory that the next call reuses.

        New memory for every product would cost page faults: a third of the time that a countsketch adds to the passes.
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
        model: the frozen model; the weights of `maps` require gradients only inside this function.
        maps: the linear maps to differentiate.
        forward: a forward pass that returns the source.
        cotangent: shaped like the source, or larger (see `fitted`).
    """
    (by_map,) = gradients(model, [m.parameter for m in maps], forward, cotangent[None])
    return {m.parameter: m.as_matrix(gradient) for m, gradient in zip(maps, by_map, strict=True)}
