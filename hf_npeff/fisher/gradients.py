"""Hooks on linear maps: from cotangents at a model's output to sketched per-example gradient rows, and nothing else.

The gradient of an example's output with respect to a linear map's weight is Σ_t δ_t x_tᵀ, with x_t the inputs and δ_t
the gradients of the outputs. The forward pass gives x, one backward pass per cotangent gives δ, and a sketch takes
their product apart (P_out δ)(P_in x)ᵀ. No parameter requires a gradient: weight gradients are never formed.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_module_names, bare_name, bare_parameters, base_of, is_wrapper
from hf_npeff.fisher.linear_layers import behaviour, is_linear
from hf_npeff.fisher.parameters import fitted, gradients
from hf_npeff.fisher.undisturbed import undisturbed
from hf_npeff.pefs.sketches import Sketch


@dataclass(frozen=True)
class LinearMap:
    """One weight under analysis and the modules that apply it (several where a weight is tied).

    Attributes:
        parameter: the weight's name in the bare model.
        modules: names of the modules, in the model as it is.
        shape: (out, in).
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does.
    """

    parameter: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    transposed: bool = False

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight → (…, out, in)."""
        return weight.mT if self.transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(…, out, in) → shaped like the weight."""
        return matrix.mT if self.transposed else matrix


_CUT = (
    "{name} cuts the gradient: {how}, so that all rows before it would be those of another network. Layers that "
    "quantise their inputs do this (activations in 8 bits, whole numbers or floating point). Load the model with a "
    "scheme that quantises weights alone, or dequantised"
)


class CalledOnceForAll(UnsupportedModelError):  # noqa: N818
    """A module does not keep the examples of a batch apart (it ran once for all of them, or saw routed tokens)."""


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or name endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _identity(module: nn.Module) -> int:
    """What tells one weight from another; one that the first forward pass unpacks is the module's own until then."""
    return id(getattr(module, "weight", module))


def _check_that_none_rounds(model: nn.Module) -> None:
    """Refuse a model one of whose linear maps, analysed or not, lets no gradient through to what comes before it.

    Raises:
        UnsupportedModelError: if one does.
    """
    for name, module in model.named_modules():
        if is_linear(module) and behaviour(module) == "rounding":
            raise UnsupportedModelError(_CUT.format(name=name, how="it rounds its input"))


def find_linear_maps(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
) -> list[LinearMap]:
    """The linear maps (nn.Linear, Conv1D) under analysis, in the model's order; PEFT's meaning of `target_modules`.

    Modules that share a weight are one map, and one of them brings the others. "all-linear" leaves out a language
    model's output embedding, maps that share an input embedding's weight, the vision tower of a model that takes
    images, and the parts of a loaded PEFT adapter. Inside PEFT's wrappers modules and weights go by the names of the
    bare model. An empty list chooses none.
    Modules whose forward pass is not x Wᵀ + b are left out (`linear_layers.behaviour`).

    Raises:
        ValueError: if nothing matches, or a regular expression is not one.
        UnsupportedModelError: if a linear map rounds its input, or none of those chosen computes x Wᵀ + b.
    """
    bare = bare_module_names(model)
    linear = [(n, m) for n, m in model.named_modules() if is_linear(m) and not is_wrapper(m)]
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        skip = _beside_the_language_model(model)
        chosen = [(n, m) for n, m in linear if n in bare and id(m) not in skip]
    else:
        chosen = [(n, m) for n, m in linear if _is_named(n, bare, target_modules, "target_modules")]
    if exclude_modules is not None:
        chosen = [(n, m) for n, m in chosen if not _is_named(n, bare, exclude_modules, "exclude_modules")]
    if not chosen and len(target_modules):
        known = [bare.get(n, n) for n, _ in linear]
        raise ValueError(
            f"target_modules={target_modules!r} (exclude_modules={exclude_modules!r}) matches none of the model's "
            f"{len(known)} linear maps, for instance {known[:8]}"
        )
    _check_that_none_rounds(model)
    candidates, chosen = chosen, [(n, m) for n, m in chosen if behaviour(m) == "product"]
    if candidates and not chosen:
        raise UnsupportedModelError(
            f"none of the {len(candidates)} linear layers under analysis computes x Wᵀ + b, so hooks cannot give their "
            f"rows (for instance {candidates[0][0]}, a {type(candidates[0][1]).__name__} whose forward pass is "
            "another). Weights that are quantised anew in every pass do this: load the model as it was saved"
        )
    weights, names = {_identity(m) for _, m in chosen}, {n for n, _ in chosen}
    # A tied weight's gradient is the sum over all its modules.
    chosen += [(n, m) for n, m in linear if n not in names and _identity(m) in weights]
    first_name: dict[int, str] = {}
    maps: dict[str, LinearMap] = {}
    for name, module in chosen:
        transposed = isinstance(module, Conv1D)
        parameter = first_name.setdefault(_identity(module), bare_name(f"{name}.weight", bare))
        if transposed:
            shape = (int(module.weight.shape[1]), int(module.weight.shape[0]))
        else:
            shape = (module.out_features, module.in_features)  # a quantised weight has another shape
        before = maps[parameter].modules if parameter in maps else ()
        maps[parameter] = LinearMap(parameter, (*before, name), shape, transposed)
    return list(maps.values())


def _is_named(name: str, bare: Mapping[str, str], targets: str | Sequence[str], setting: str) -> bool:
    """Whether a setting names a module, by its name in the bare model or inside PEFT's wrappers."""
    try:
        return any(_matches(known, targets) for known in {name, bare.get(name, name)})
    except re.error as error:
        raise ValueError(f"{setting} {targets!r} is not a regular expression: {error}") from error


def _beside_the_language_model(model: nn.Module) -> set[int]:
    """Modules of a language model that "all-linear" leaves out: its output embedding, and what makes images tokens."""
    base: Any = base_of(model)
    embedding = getattr(base, "get_output_embeddings", lambda: None)()
    skip = set() if embedding is None else {id(part) for part in embedding.modules()}
    # What shares an input embedding's weight writes tokens too, whether the model names it or not (BLIP's decoder).
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    skip |= {id(m) for m in model.modules() if is_linear(m) and _identity(m) in embedded}
    config: Any = getattr(base, "config", None)
    if hasattr(config, "get_text_config") and not getattr(config, "is_encoder_decoder", False):
        decoder = base.get_decoder() if config.get_text_config() is not config else None
        if decoder is not None and decoder is not base:
            skip |= {id(part) for part in base.modules()} - {id(part) for part in decoder.modules()}
    return skip


def without_parameters(
    model: nn.Module, maps: Sequence[LinearMap], parameters: Mapping[str, tuple[int, int]]
) -> list[LinearMap]:
    """The maps whose weights autograd does not already differentiate under one of their names.

    Raises:
        UnsupportedModelError: if a map's weight is also a part of something else, such as the input embedding.
    """
    weights = bare_parameters(model)
    named = {id(weights[name]) for name in parameters}
    left = [m for m in maps if id(weights.get(m.parameter)) not in named]
    elsewhere = {
        id(parameter): name
        for prefix, module in model.named_modules()
        if not is_linear(module)
        for name, parameter in module.named_parameters(prefix, recurse=False)
    }
    for m in left:
        if other := elsewhere.get(id(weights.get(m.parameter))):
            raise UnsupportedModelError(
                f"{m.parameter} is the same weight as {other}, and hooks see only what passes through {m.modules[0]}. "
                f"Leave it out with exclude_modules=[{m.modules[0]!r}], or name it in parameters=[{other!r}]: autograd "
                "sees all of its gradient"
            )
    return left


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
                raise UnsupportedModelError(_CUT.format(name=name, how="its input has one and its output has none"))
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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with no parameter requiring a gradient; as it was on exit, exceptions included.

    Modes, requires_grad and the state of the random generators come back; forward hooks are the callers' own. Nothing
    is cast meanwhile: neither by an autocast that is active, nor by the one that Accelerate leaves around the forward
    pass of a model that it trained in mixed precision. Rows are those of the weights in their own type.
    """
    with undisturbed(model):  # first: what another thread has frozen is not how the model came
        yield from _frozen(model)


def _frozen(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng(), torch.enable_grad(), _uncast(model):
            model.eval()
            for parameter, _ in required:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _uncast(model: nn.Module) -> Iterator[None]:
    """No autocast inside: off where it is active, and Accelerate's taken off the forward pass, put back on exit.

    Accelerate keeps the forward pass that it wraps as `_original_forward`, the last of several where a model was
    prepared more than once; so the class's own is taken, but for a model whose pass moves weights between devices.
    """
    wrapped = [(m, vars(m)["forward"]) for m in model.modules() if {"_original_forward", "forward"} <= vars(m).keys()]
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for module, _ in wrapped:
                if hasattr(module, "_hf_hook"):
                    module.forward = vars(module)["_original_forward"]
                else:
                    del module.forward
            yield
        finally:
            for module, forward in wrapped:
                module.forward = forward


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
