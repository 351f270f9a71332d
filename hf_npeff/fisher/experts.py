"""Fused experts: many linear maps in one parameter, applied to tokens that a router sends to a few of them.

A mixture of experts keeps its weights W_e in one tensor, as (E, out, in) or (E, in, out), and multiplies token t by
those of its k experts alone. No module call passes through a single W_e, so hooks on modules see nothing of it. Here
the experts' own call is carried out by a forward pass that computes the same and hands every product x ↦ W_e x to
whoever asks: its inputs, its outputs, and which example and expert each row belongs to (`Routing`).

All W_e of a parameter count as one linear map with the weight (E·out, in), its parts one below the other. The gradient
of an example's output is then Σ over its rows of (δ placed at expert e) xᵀ.

Which modules are fused experts is read off their parameters and the arguments of their forward pass, and tried: with
random tokens, this forward pass must give what the module's own gives (`find_experts`). Known forms: those that
transformers' `use_experts_implementation` describes (Mixtral, OLMoE, Qwen, gpt-oss, DeepSeek, …), which take tokens,
experts' numbers and weights; LongCat's, some of whose experts give back their input; Llama 4's, which gives every token
to every expert; DBRX's, in two dimensions; and JetMoE's, whose tokens come sorted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_npeff.fisher.fsdp import is_sharded
from hf_npeff.fisher.linear_layers import is_at_hand

_TRIED_TOKENS = 3
"""Random tokens of a trial: few, since some implementations copy an expert's weights for every token."""
_TRIED_EXPERTS = 2
"""Experts of each of them; a model with fewer has as many as it has."""
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of a trial's output that is rounding, by type; `_SAME_IN_16_BITS` for what has fewer bits."""
_SAME_IN_16_BITS = 3e-2


@dataclass(frozen=True)
class FusedWeight:
    """One parameter that holds the weights of E experts.

    Attributes:
        name: in its module, for instance "gate_up_proj".
        experts: E.
        out: numbers that an expert gives.
        into: numbers that it takes.
        transposed: every expert's part is stored (in, out).
        flat: the parameter is a matrix, the experts' parts one below the other.
    """

    name: str
    experts: int
    out: int
    into: int
    transposed: bool = False
    flat: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(E·out, in)."""
        return self.experts * self.out, self.into

    def by_expert(self, weight: Tensor) -> Tensor:
        """The parameter, or what is shaped like it → (E, out, in)."""
        parts = weight.reshape(self.experts, -1, weight.shape[-1])
        return parts.mT if self.transposed else parts

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(E·out, in) → shaped like the parameter."""
        parts = matrix.reshape(self.experts, self.out, self.into)
        parts = parts.mT if self.transposed else parts
        return parts.flatten(0, 1) if self.flat else parts


@dataclass
class Routing:
    """Which expert and which example the rows of a product belong to; rows are sorted by expert.

    Attributes:
        counts: rows of every expert, E numbers.
        places: (S,), of every row among all pairs of a token and one of its experts, token by token.
        tokens: the number of tokens of the whole batch.
        slots: k, the most experts of a token.
        batch: examples of the batch, which have equally many tokens.
    """

    counts: list[int]
    places: Tensor
    tokens: int
    slots: int
    batch: int = 1

    @property
    def width(self) -> int:
        """Pairs of a token and an expert in an example."""
        return self.tokens * self.slots // self.batch

    @property
    def examples(self) -> Tensor:
        """(S,), of every row."""
        return self.places // self.width

    @property
    def experts(self) -> Tensor:
        """(S,), of every row."""
        counts = torch.tensor(self.counts, device=self.places.device)
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.places.device), counts)

    def segments(self) -> Iterator[tuple[int, slice]]:
        """Experts that have rows, and which rows these are."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def by_example(self, rows: Tensor) -> Tensor:
        """(S, n) → (B, t·k, n), token after token; zero where a token has fewer than k experts."""
        laid = rows.new_zeros(self.batch * self.width, rows.shape[-1]).index_copy_(0, self.places, rows)
        return laid.unflatten(0, (self.batch, self.width))

    def embedded(self, rows: Tensor) -> Tensor:
        """Output gradients (S, out) → (B, t·k, E·out), each at the place of its expert."""
        wide = rows.new_zeros(self.batch * self.width, len(self.counts), rows.shape[-1])
        wide[self.places, self.experts] = rows
        return wide.flatten(1).unflatten(0, (self.batch, self.width))


class RowsByExpert:
    """Rows of one expert after another by example: x (B, m, in) and δ (B, m, out), m the most that an example has.

    Args:
        routing: the routing of the rows.
        x: (S, in), sorted by expert.
        delta: (S, out), sorted likewise.
    """

    def __init__(self, routing: Routing, x: Tensor, delta: Tensor):
        self._segments = dict(routing.segments())
        self._examples, self._batch = routing.examples, routing.batch
        self._x, self._delta = x, delta
        self._last: tuple[int, tuple[Tensor, Tensor]] | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Those of an expert that has rows; the last ones asked for are kept."""
        if self._last is None or self._last[0] != expert:
            rows = self._segments[expert]
            x, delta = self._x[rows], self._delta[rows]
            if self._batch == 1:
                laid = x[None], delta[None]
            else:
                examples, order = self._examples[rows].sort()
                x, delta = x[order], delta[order]
                counts = torch.bincount(examples, minlength=self._batch)
                places = torch.arange(len(examples), device=x.device) - (counts.cumsum(0) - counts)[examples]
                shape = self._batch, int(counts.max())
                laid = x.new_zeros(*shape, x.shape[1]), delta.new_zeros(*shape, delta.shape[1])
                laid[0][examples, places], laid[1][examples, places] = x, delta
            self._last = expert, laid
        return self._last[1]


Tap = Callable[[str, Tensor, Routing, Tensor], Tensor]
"""What is done with a product: (name of the parameter, x (S, in), routing, W_e x (S, out)) → what goes on instead."""


def product_by_expert(x: Tensor, parts: Tensor, counts: Sequence[int]) -> Tensor:
    """X (S, n), sorted by expert, times each expert's matrix (E, m, n): (S, m), without a graph."""
    result = x.new_empty(len(x), parts.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(x[start : start + count], parts[expert].mT, out=result[start : start + count])
        start += count
    return result


class _Product(torch.autograd.Function):
    """`product_by_expert` with a gradient for x alone: the weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(parts)
        ctx.counts = counts
        return product_by_expert(x, parts, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (parts,) = ctx.saved_tensors
        return product_by_expert(gradients[0].contiguous(), parts.mT, ctx.counts), None, None


def multiplied_by_expert(x: Tensor, parts: Tensor, counts: list[int]) -> Tensor:
    """W_e x for x (S, in) sorted by expert and parts (E, out, in): (S, out)."""
    x = x.to(parts.dtype)
    if parts.requires_grad and torch.is_grad_enabled():
        pieces = x.split(counts)
        return torch.cat([F.linear(piece, parts[e]) for e, piece in enumerate(pieces)])
    result: Tensor = _Product.apply(x, parts, counts)
    return result


@dataclass
class Experts:
    """A module that holds fused experts, and the forward pass that shows their products.

    Attributes:
        module: with the module's own forward pass.
        weights: its fused parameters.
    """

    module: Any
    weights: tuple[FusedWeight, ...]

    def intercept(self, tap: Tap, wanted: Callable[[], bool]) -> Interception:
        """Carry the module's calls out by `forward` from now on, where they are wanted; undone by `remove`.

        Args:
            tap: called with every product.
            wanted: whether a call is; the module's own forward pass carries out the others.
        """
        return Interception(self, tap, wanted)

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward pass gives, by products that the tap sees."""
        raise NotImplementedError

    def watch(self) -> list[Any]:
        """Hooks that the forward pass needs on other modules."""
        return []

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        """Random arguments of a forward pass; the first is the one to differentiate."""
        raise NotImplementedError

    def part(self, weight: FusedWeight) -> Tensor:
        """(E, out, in) of a fused parameter."""
        return weight.by_expert(self.tensor(weight))

    def tensor(self, weight: FusedWeight) -> Any:
        """A fused parameter."""
        tensor: Any = self.module
        for name in weight.name.split("."):
            tensor = getattr(tensor, name)
        return tensor

    def _product(self, tap: Tap, weight: FusedWeight, x: Tensor, routing: Routing, bias: str = "") -> Tensor:
        result = multiplied_by_expert(x, self.part(weight), routing.counts)
        if bias:
            result = result + getattr(self.module, bias)[routing.experts]
        unused = weight.experts - len(routing.counts)  # numbers of experts that have no other weights
        return tap(weight.name, x, replace(routing, counts=routing.counts + [0] * unused), result)

    def _random(self, generator: torch.Generator, tokens: int, width: int) -> Tensor:
        x, part = torch.randn(tokens, width, generator=generator), self.part(self.weights[0])
        return x.to(part.device, part.dtype)


class Interception:
    """A module's forward pass replaced by that of its `Experts`, until `remove`.

    Where there are several of one module, their taps see each product one after another, as hooks of a module would.
    """

    def __init__(self, experts: Experts, tap: Tap, wanted: Callable[[], bool]):
        self._module = experts.module
        self._tap, self._wanted = tap, wanted
        self._handles = experts.watch()
        own = vars(self._module)
        self._all: list[Interception] = own.setdefault(_INTERCEPTIONS, [])
        self._all.append(self)
        if len(self._all) == 1:
            # Where Accelerate moves weights between devices, its own forward pass stays around this one.
            place = "_old_forward" if hasattr(self._module, "_hf_hook") else "forward"
            own[_REPLACED] = place, own.get(place)
            setattr(self._module, place, _forward(experts, self._all, getattr(self._module, place)))

    def remove(self) -> None:
        """Take the tap off; without any, the module's own forward pass is back."""
        for handle in self._handles:
            handle.remove()
        self._all.remove(self)
        own = vars(self._module)
        if not self._all:
            place, before = own.pop(_REPLACED)
            del own[_INTERCEPTIONS]
            if before is None:
                delattr(self._module, place)
            else:
                setattr(self._module, place, before)

    @property
    def active(self) -> bool:
        """Whether the call that is made now is to be seen."""
        return self._wanted()

    def __call__(self, name: str, x: Tensor, routing: Routing, output: Tensor) -> Tensor:
        """What goes on instead of a product."""
        return self._tap(name, x, routing, output)


_INTERCEPTIONS, _REPLACED = "_npeff_interceptions", "_npeff_replaced"
"""Attributes of a module whose forward pass is replaced: by whom, and what stood in its place."""


def _forward(experts: Experts, interceptions: Sequence[Interception], own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        taps = [each for each in interceptions if each.active]

        def through(name: str, x: Tensor, routing: Routing, output: Tensor) -> Tensor:
            for tap in taps:
                output = tap(name, x, routing, output)
            return output

        return experts.forward(through, *args, **kwargs) if taps else own(*args, **kwargs)

    return forward


class _Routed(Experts):
    """forward(tokens (…, h), numbers of experts (T, k), weights (T, k)), as transformers' experts have it."""

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Tensor:
        hidden, index, weights = _in_order(self.module, args, kwargs)[:3]
        tokens = hidden.reshape(-1, hidden.shape[-1])
        slots = index.shape[-1]
        chosen, order = torch.sort(index.reshape(-1), stable=True)
        known = self.weights[-1].experts  # numbers beyond stand for no expert, or for one that has no weights
        counts = torch.bincount(chosen, minlength=known)[:known].tolist()
        places = order[: sum(counts)]
        routing = Routing(counts, places, len(tokens), slots)
        shares = weights.reshape(-1)
        out = self._experts(tap, tokens[places // slots], routing)
        out = out * shares[places, None]
        width = out.shape[-1]
        laid = out.new_zeros(len(tokens) * slots, width).index_copy(0, places, out)
        if hasattr(self.module, "identity_expert") and len(places) < len(order):
            rest = order[len(places) :]
            laid = laid.index_copy(0, rest, (tokens[rest // slots] * shares[rest, None]).to(laid.dtype))
        total = laid.unflatten(0, (len(tokens), slots)).sum(1)
        return total.to(hidden.dtype).reshape(*hidden.shape[:-1], width)

    def _experts(self, tap: Tap, x: Tensor, routing: Routing) -> Tensor:
        module, bias = self.module, getattr(self.module, "has_bias", False)
        up, down = self.weights
        states = self._product(tap, up, x, routing, f"{up.name}_bias" if bias else "")
        if up.name == "up_proj":
            states = module.act_fn(states)
        elif hasattr(module, "_apply_gate"):
            states = module._apply_gate(states)
        else:
            gate, rest = states.chunk(2, dim=-1)
            states = module.act_fn(gate) * rest
        states = self._product(tap, down, states, routing, f"{down.name}_bias" if bias else "")
        return module.post_expert_norm(states) if getattr(module, "has_post_expert_norm", False) else states

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        x = self._random(generator, _TRIED_TOKENS, self.weights[0].into)
        known = self.weights[0].experts
        slots = min(_TRIED_EXPERTS, known)
        index = torch.stack([torch.randperm(known, generator=generator)[:slots] for _ in range(_TRIED_TOKENS)])
        weights = torch.rand(_TRIED_TOKENS, slots, generator=generator)
        return x, index.to(x.device), weights.to(x.device, x.dtype)


class _Dbrx(_Routed):
    """DBRX's: W₁, V₁ and W₂ᵀ of all experts one below the other, in a module of their own."""

    def _experts(self, tap: Tap, x: Tensor, routing: Routing) -> Tensor:
        w1, v1, w2 = self.weights
        gate = self._product(tap, w1, x, routing)
        rest = self._product(tap, v1, x, routing)
        return self._product(tap, w2, self.module.mlp.activation_fn(gate) * rest, routing)

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        x, *others = super().trial(generator)
        return x[None], *others


class _All(Experts):
    """Llama 4's forward(tokens (E·T, h)): every expert gets all tokens, those that are not its own as zeros."""

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Tensor:
        (hidden,) = _in_order(self.module, args, kwargs)
        up, down = self.weights
        x = hidden.reshape(-1, up.into)
        tokens = len(x) // up.experts
        each = torch.arange(up.experts, device=x.device)[:, None]
        places = (torch.arange(tokens, device=x.device) * up.experts + each).flatten()
        routing = Routing([tokens] * up.experts, places, tokens, up.experts)
        gate, rest = self._product(tap, up, x, routing).chunk(2, dim=-1)
        return self._product(tap, down, rest * self.module.act_fn(gate), routing)

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        up = self.weights[0]
        return (self._random(generator, _TRIED_TOKENS * up.experts, up.into),)


class _Sorted(Experts):
    """JetMoE's forward(rows sorted by expert, their numbers); the router beside it says which tokens they are."""

    def __init__(self, module: Any, weights: tuple[FusedWeight, ...], router: nn.Module):
        super().__init__(module, weights)
        self._router: Any = router
        self._order: Tensor | None = None

    def watch(self) -> list[Any]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._order = output[0]

        return [self._router.register_forward_hook(keep)]

    def forward(self, tap: Tap, *args: Any, **kwargs: Any) -> Tensor:
        x, counts = _in_order(self.module, args, kwargs)
        order = self._order if self._order is not None else torch.arange(len(x), device=x.device)
        slots = self._router.top_k if self._order is not None else 1
        return self._product(tap, self.weights[0], x, Routing(list(counts), order, len(x) // slots, slots))

    def trial(self, generator: torch.Generator) -> tuple[Any, ...]:
        weight = self.weights[0]
        counts = [_TRIED_TOKENS if e in (0, weight.experts - 1) else 0 for e in range(weight.experts)]
        return self._random(generator, sum(counts), weight.into), counts


def _in_order(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a forward pass, in the order of its parameters."""
    return list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]


def find_experts(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Experts]:
    """{name of the module: its fused experts}, in the model's order.

    Modules whose forward pass gives something else for random tokens are left out, and so are quantised ones. Weights
    that are offloaded or sharded cannot be tried; theirs are taken at their word.

    Args:
        model: any module.
        names: modules that were found before and need not be tried again; None finds all.
    """
    by_name: dict[str, Experts] = {}
    for parent, module in model.named_modules():
        for suffix, experts in _candidates(module):
            name = f"{parent}.{suffix}".strip(".")
            if _is_the_same(experts) if names is None else name in names:
                by_name[name] = experts
    return by_name


def _candidates(module: Any) -> Iterator[tuple[str, Experts]]:
    """Experts that a module holds, and the path to the module whose call is theirs."""
    if hasattr(module, "router") and all(hasattr(module, n) for n in ("input_linear", "output_linear")):
        for name in ("input_linear", "output_linear"):
            inside = getattr(module, name)
            weight = getattr(inside, "weight", None)
            if _arguments(inside) == 2 and (fused := _fused("weight", weight)) is not None:
                yield name, _Sorted(inside, (fused,), module.router)
        return
    mlp = getattr(module, "mlp", None)
    if all(isinstance(getattr(mlp, n, None), nn.Parameter) for n in ("w1", "v1", "w2")) and _arguments(module) == 3:
        number = getattr(module, "num_experts", 0)
        names = ("w1", "v1", "w2")
        parts = [_fused(f"mlp.{n}", getattr(mlp, n), number, transposed=n == "w2") for n in names]
        if None not in parts:
            yield "", _Dbrx(module, tuple(p for p in parts if p is not None))
        return
    up = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    tensors = getattr(module, up, None), getattr(module, "down_proj", None)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return
    arguments = _arguments(module)
    transposed = bool(getattr(module, "is_transposed", arguments == 1))
    pair = [_fused(n, t, transposed=transposed) for n, t in zip((up, "down_proj"), tensors, strict=True)]
    if None not in pair and arguments in (1, 3) and not getattr(module, "_is_expert_parallel", False):
        weights = tuple(p for p in pair if p is not None)
        yield "", (_All if arguments == 1 else _Routed)(module, weights)


def _fused(name: str, tensor: Any, experts: int = 0, *, transposed: bool = False) -> FusedWeight | None:
    """The description of a tensor of three dimensions, or of two where it is said how many experts it holds."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or _is_quantised(tensor):
        return None
    if tensor.dim() == 2 and experts and tensor.shape[0] % experts == 0:
        rows, columns = tensor.shape[0] // experts, tensor.shape[1]
    elif tensor.dim() == 3:
        experts, rows, columns = tensor.shape
    else:
        return None
    out, into = (columns, rows) if transposed else (rows, columns)
    return FusedWeight(name, int(experts), int(out), int(into), transposed, tensor.dim() == 2)


def _is_quantised(tensor: Tensor) -> bool:
    return not is_sharded(tensor) and is_traceable_wrapper_subclass(tensor)


def _arguments(module: Any) -> int:
    """How many arguments a module's forward pass takes; 0 where that is open."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return 0
    return 0 if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) else len(parameters)


@torch.enable_grad()
def _is_the_same(experts: Experts) -> bool:
    """Whether random tokens get the same output and gradient from the module and from `experts`."""
    module = experts.module
    if _INTERCEPTIONS in vars(module):
        return True  # it was tried before, and what it gives now is somebody's change of it
    if not all(is_at_hand(experts.tensor(weight)) for weight in experts.weights):
        return True
    generator = torch.Generator().manual_seed(0)
    first, *others = experts.trial(generator)
    results = []
    training = module.training
    try:
        module.training = False
        with torch.random.fork_rng():
            for forward in (module.forward, lambda *values: experts.forward(lambda n, x, r, out: out, *values)):
                x = first.clone().requires_grad_()
                output = forward(x, *others)
                weights = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape)
                (gradient,) = torch.autograd.grad((output * weights).sum(), x)
                results.append((output.detach(), gradient))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it is called in some other way
        return False
    finally:
        module.training = training
    tolerance = _SAME.get(first.dtype, _SAME_IN_16_BITS)
    return all(
        a.shape == b.shape and bool((a - b).norm() <= tolerance * a.norm()) for a, b in zip(*results, strict=True)
    )
