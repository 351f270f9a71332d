"""Small changes of linear maps, added in the activations: y ← y + s·σ·(x·a) b for random a and b, drawn per map.

This has the same effect as the weight W + s·σ·b aᵀ. No weight is read or written, so it works for quantised, offloaded
and sharded weights too. σ makes the change as large as y itself, over all inputs of a map, so s is the relative change
of every map's output.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.expert_search import find_experts
from hf_npeff.fisher.gradients import Receiver
from hf_npeff.fisher.linear_maps import LinearMap
from hf_npeff.fisher.routing import Routing, Tap, multiplied_by_expert


class Directions:
    """K random directions for every map, always the same: a (in, K) and b (out, K), float32 or wider.

    Args:
        maps: any maps.
        count: K.
        seed: the seed; directions also depend on a map's name.
    """

    def __init__(self, maps: Sequence[LinearMap], count: int, seed: int):
        self.maps = {m.parameter: m for m in maps}
        self.count = count
        self._seed = seed
        self._drawn: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """The directions of one map, on the device of `like`; for fused experts b is (E·out, K) and a is shared."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = name, like.device, dtype
        if key not in self._drawn:
            digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            out, into = self.maps[name].shape
            a, b = (torch.randn(n, self.count, generator=generator) for n in (into, out))
            self._drawn[key] = a.to(like.device, dtype), b.to(like.device, dtype)
        return self._drawn[key]

    def of_experts(self, name: str, like: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The directions of fused experts: a (in, K), and b (S, out, K) for the expert of every row."""
        a, b = self.of(name, like)
        return a, b.unflatten(0, (len(routing.counts), -1))[routing.experts]


def sign_of(name: str) -> int:
    """A random sign for a map, always the same for its name."""
    return 1 if hashlib.sha256(name.encode()).digest()[0] % 2 else -1


class Slopes(Receiver):
    """A receiver that computes the slope of ⟨source, cotangent⟩ along the directions from autograd's gradients.

    Attributes:
        by_map: {parameter: Σ_t (x_t·a)(δ_t·b) (B, K)}, float64, before σ.
    """

    def __init__(self, directions: Directions):
        self.by_map: dict[str, Tensor] = {}
        self._directions = directions

    def take_input(self, name: str, x: Tensor) -> Tensor:
        """X·a (B, t, K)."""
        a, _ = self._directions.of(name, x)
        return x.to(a.dtype) @ a

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add the slopes of a module's call."""
        _, b = self._directions.of(name, delta)
        self._add(name, (saved.to(delta.device) * (delta.to(b.dtype) @ b)).double().sum(1))

    def take_routed_input(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """X·a (S, K)."""
        return self.take_input(name, x)

    def take_routed_gradient(self, name: str, saved: Tensor, delta: Tensor, routing: Routing) -> None:
        """Add the slopes of a call of fused experts."""
        _, b = self._directions.of_experts(name, delta, routing)
        each = (saved * torch.einsum("so,sok->sk", delta.to(b.dtype), b)).double()
        self._add(name, each.new_zeros(routing.batch, each.shape[1]).index_add_(0, routing.examples, each))

    def _add(self, name: str, values: Tensor) -> None:
        before = self.by_map.get(name)
        self.by_map[name] = values if before is None else before + values.to(before.device)


class Nudges:
    """Nudges forward passes along the directions, inside `with`; the hooks are removed on exit.

    Until `at` is called, passes run unchanged, and σ is measured in them. Every call of a module is nudged, also calls
    without gradients.

    Args:
        model: any model; its weights are not read.
        directions: the directions and their maps.
    """

    def __init__(self, model: nn.Module, directions: Directions):
        self._model = model
        self._directions = directions
        self._handles: list[Any] = []
        self._outputs: dict[str, Any] = {}
        self._changes: dict[str, Any] = {}
        self._steps: Sequence[tuple[int, float]] = ()
        self._names: Collection[str] = ()
        self._stretched: Mapping[str, Tensor] = {}
        self._thread = threading.get_ident()
        self._sizes: dict[str, Tensor] = {}

    def at(self, direction: int, size: float, names: Collection[str] | None = None) -> None:
        """Nudge the next passes by `size` along direction k, in all maps or in those of these parameters."""
        self._steps, self._stretched = ((direction, size),), {}
        self._names = self._directions.maps.keys() if names is None else names

    def at_stretched(self, size: float, weights: Mapping[str, Tensor]) -> None:
        """Nudge the next passes along direction 0 and along the weights W themselves: y ← y + size (σ (x·a) b ± Wx).

        Args:
            size: the size; the sign of Wx is `sign_of` the map.
            weights: {parameter: W (out, in)} of the maps to nudge.
        """
        self._steps, self._stretched, self._names = ((0, size),), weights, weights.keys()

    def change_of_weight(self, name: str, size: float, matrix: Tensor) -> Tensor:
        """The change (out, in) of a weight that `at_stretched` amounts to."""
        a, b = self._directions.of(name, matrix)
        rank_one = (float(self.sizes()[name][0]) * b[:, :1]) @ a[:, :1].mT
        return size * (rank_one + sign_of(name) * matrix.to(rank_one.dtype))

    def at_each(self, steps: Sequence[tuple[int, float]]) -> None:
        """Nudge the next passes in all maps, each over C copies of the same examples, one copy after another.

        Args:
            steps: (direction, size) for every copy. A pass fails, or its result is meaningless, if a map's input does
                not have the examples in its first dimension.
        """
        self._steps, self._stretched, self._names = tuple(steps), {}, self._directions.maps.keys()

    def rest(self) -> None:
        """Run the next passes unchanged; σ is measured in them if it has not been."""
        self._steps = ()

    def sizes(self) -> Mapping[str, Tensor]:
        """{parameter: σ (K,)} of the maps that ran; 0 where a map's input or output is zero."""
        if not self._sizes:
            ratios = {name: (self._outputs[name] / self._changes[name]).sqrt() for name in self._outputs}
            self._sizes = {name: torch.where(ratio.isfinite(), ratio, 0.0) for name, ratio in ratios.items()}
        return self._sizes

    def __enter__(self) -> Nudges:
        modules = dict(self._model.named_modules())
        fused: dict[str, dict[str, str]] = {}
        try:
            for m in self._directions.maps.values():
                if m.fused is not None:
                    fused.setdefault(m.modules[0], {})[m.fused.name] = m.parameter
                    continue
                for name in m.modules:
                    hook = self._hook(m)
                    self._handles.append(modules[name].register_forward_hook(hook, prepend=True, with_kwargs=True))
            for path, experts in find_experts(self._model, fused).items() if fused else ():
                self._handles.append(experts.intercept(self._tap(fused[path]), self._is_wanted))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _is_wanted(self) -> bool:
        """Whether a call belongs to this pass and is not another thread's prediction."""
        return threading.get_ident() == self._thread

    def _hook(self, m: LinearMap) -> Callable[..., Tensor]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not self._is_wanted():
                return output
            x = args[0] if args else next(iter(kwargs.values()))
            a, b = self._directions.of(m.parameter, x)
            nudged = self._nudged(m.parameter, output, x, a, b)
            if (weight := self._stretching(m.parameter)) is not None:
                return self._stretched_by(m.parameter, nudged, x @ weight.mT)
            return nudged

        return hook

    def _tap(self, parameters: Mapping[str, str]) -> Tap:
        def tap(weight: str, x: Tensor, routing: Routing, output: Tensor) -> Tensor:
            if weight not in parameters:
                return output
            a, b = self._directions.of_experts(parameters[weight], x, routing)
            nudged = self._nudged(parameters[weight], output, x, a, b, routing)
            if (matrix := self._stretching(parameters[weight])) is not None:
                product = multiplied_by_expert(x, matrix.unflatten(0, (len(routing.counts), -1)), routing.counts)
                return self._stretched_by(parameters[weight], nudged, product)
            return nudged

        return tap

    def _stretching(self, parameter: str) -> Tensor | None:
        """The weight along which a map's output is nudged, if it is."""
        return self._stretched.get(parameter) if self._steps and parameter in self.sizes() else None

    def _stretched_by(self, parameter: str, output: Tensor, product: Tensor) -> Tensor:
        ((_, size),) = self._steps
        wide = torch.promote_types(output.dtype, torch.float32)
        added = size * sign_of(parameter) * product.to(wide)
        return (output.to(wide) + added).to(output.dtype)

    def _nudged(
        self, parameter: str, output: Tensor, x: Tensor, a: Tensor, b: Tensor, routing: Routing | None = None
    ) -> Tensor:
        """A map's output with (x·a) b added, or unchanged while σ is measured."""
        if not self._steps:
            if not self._sizes:
                self._measure(parameter, output.detach(), x.detach().to(a.dtype) @ a, b)
            return output
        sigma = self.sizes().get(parameter)
        if parameter not in self._names or sigma is None:
            return output
        directions = [direction for direction, _ in self._steps]
        scales = a.new_tensor([size * float(sigma[direction]) for direction, size in self._steps])
        x, a, b = x.detach().to(a.dtype), a[:, directions] * scales, b[..., directions]
        if routing is None:  # (C, rows of a copy, in)(C, in, 1) → (C, rows of a copy, out)
            added = (x.reshape(len(self._steps), -1, x.shape[-1]) @ a.T[..., None]) * b.T[:, None]
        else:
            copies = routing.places // (routing.tokens * routing.slots // len(self._steps))
            rows = torch.arange(len(x), device=x.device)
            added = (x @ a)[rows, copies, None] * b[rows, :, copies]
        wide = torch.promote_types(output.dtype, torch.float32)
        return (output.to(wide) + added.to(output.device, wide).reshape(output.shape)).to(output.dtype)

    def _measure(self, parameter: str, output: Tensor, xa: Tensor, b: Tensor) -> None:
        """Add a call's Σ y² and Σ ‖(x·a) b‖² (K,)."""
        squares, lengths = xa.double().square(), b.double().square()
        if b.dim() == 3:  # fused experts: b by row
            change = (squares * lengths.sum(1)).sum(0)
        else:
            change = squares.flatten(0, -2).sum(0) * lengths.sum(0)
        total = output.double().square().sum()
        self._outputs[parameter] = self._outputs.get(parameter, 0) + total.cpu()
        self._changes[parameter] = self._changes.get(parameter, 0) + change.cpu()
