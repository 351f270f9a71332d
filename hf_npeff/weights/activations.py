"""Weight changes measured in the activations: y ← y + s·ΔW x after a linear map, without touching a weight.

A linear map with the weight W + s·ΔW returns W x + s·ΔW x, so adding the second term to the module's output is the
same as changing the weight. Every example of a batch may have its own change and scale, nothing is lost by rounding
to weights of few bits, and it works for quantised, offloaded and sharded weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.adapted_maps import check_adapted_maps
from hf_npeff.fisher.bare_model import bare_module_names, bare_modules, bare_name, bare_parameters
from hf_npeff.fisher.expert_search import find_experts
from hf_npeff.fisher.gradients import CalledOnceForAll
from hf_npeff.fisher.linear_layers import packed_size
from hf_npeff.fisher.routing import Routing, Tap, multiplied_by_expert
from hf_npeff.weights.parameter_reads import ParameterReads


@dataclass(frozen=True)
class LinearDelta:
    """ΔW (out, in) of one linear map, as a matrix or in two factors.

    Attributes:
        left: ΔW itself, or B (out, r).
        right: A (r, in) with ΔW = BA; None if `left` is the whole ΔW.
        experts: for fused experts, the number of stacked ΔW_e.
    """

    left: Tensor
    right: Tensor | None = None
    experts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def matrix(self) -> Tensor:
        """ΔW (out, in)."""
        return self.left if self.right is None else self.left @ self.right

    def times(self, x: Tensor) -> Tensor:
        """ΔW x for x (…, in): (…, out)."""
        return F.linear(x if self.right is None else F.linear(x, self.right), self.left)

    def times_by_expert(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """ΔW_e x of fused experts, whose ΔW_e (out, in) are stacked: (S, out) for x (S, in).

        Args:
            x: rows sorted by expert.
            counts: the number of rows of every expert.
        """
        x = x if self.right is None else F.linear(x, self.right)
        return multiplied_by_expert(x, self.left.unflatten(0, (len(counts), -1)), list(counts))

    def to(self, device: torch.device, dtype: torch.dtype) -> LinearDelta:
        """The same delta on a device, with a dtype."""
        right = self.right
        moved = None if right is None else right.to(device, dtype)
        return LinearDelta(self.left.to(device, dtype), moved, self.experts)

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖², in float64; from factors as tr((BᵀB)(AAᵀ)), without forming ΔW."""
        left = self.left.double()
        if self.right is None:
            return float(left.square().sum())
        right = self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum())


def random_like(deltas: Mapping[str, LinearDelta], seed: int = 0) -> dict[str, LinearDelta]:
    """A random change of equal total norm and the same ranks; a weight's share of ‖·‖² is its share of the numbers.

    It is like a Gaussian change of all weights together, truncated to the ranks of the given change. Weights that the
    given change leaves as they are stay so.
    """
    deltas = {name: delta for name, delta in deltas.items() if delta.squared_norm > 0}
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, LinearDelta] = {}
    for name, delta in deltas.items():
        left = torch.randn(delta.left.shape, generator=generator)
        right = None if delta.right is None else torch.randn(delta.right.shape, generator=generator)
        unit = LinearDelta(left, right)
        size = (delta.shape[0] * delta.shape[1] / unit.squared_norm) ** 0.5
        drawn[name] = LinearDelta(left * size, right, delta.experts)
    wanted = sum(delta.squared_norm for delta in deltas.values())
    ratio = (wanted / sum(delta.squared_norm for delta in drawn.values())) ** 0.5
    return {name: LinearDelta(delta.left * ratio, delta.right, delta.experts) for name, delta in drawn.items()}


def fused_places(model: nn.Module, deltas: Mapping[str, LinearDelta]) -> dict[str, dict[str, str]]:
    """{module: {name in it: parameter}} of the fused experts among the changed weights.

    Raises:
        ValueError: if a weight has another shape in the model.
    """
    known = bare_parameters(model)
    if all(name.endswith(".weight") and known[name].dim() == 2 for name in deltas if name in known):
        return {}
    bare = bare_module_names(model)
    places: dict[str, dict[str, str]] = {}
    for path, experts in find_experts(model).items():
        for weight in experts.weights:
            name = bare_name(f"{path}.{weight.name}", bare)
            if name in deltas:
                if deltas[name].shape != weight.shape:
                    raise ValueError(
                        f"{name} is {weight.shape} (out of all experts, in) in the model, and {deltas[name].shape} in "
                        "the change"
                    )
                places.setdefault(path, {})[weight.name] = name
    return places


def check_linear(model: nn.Module, deltas: Mapping[str, LinearDelta]) -> dict[str, str]:
    """{module: parameter} of the linear maps after which the deltas are added, including tied ones.

    Raises:
        UnsupportedModelError: if a parameter is not only the weight of linear maps, or that of a packed layer.
        ValueError: if the model lacks a parameter, or has one of another shape.
    """
    modules = dict(model.named_modules())
    known = bare_parameters(model)
    if missing := [name for name in deltas if name not in known]:
        layers = bare_modules(model)
        if packed := [n for n in missing if (m := layers.get(n.rpartition(".")[0])) is not None and packed_size(m)]:
            raise UnsupportedModelError(
                f"{packed[0]} is quantised in a layer that is no linear layer of PyTorch's, so its change cannot be "
                "added to an output; measure it on the model in floating point"
            )
        raise ValueError(f"the model has no parameters named {missing[:3]}; is it the one the change was made for?")
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, module))
    places: dict[str, str] = {}
    for name, delta in deltas.items():
        leaf = name.rpartition(".")[2]
        holders = owners[id(known[name])]
        if other := [p for p, m in holders if leaf != "weight" or not isinstance(m, nn.Linear | Conv1D)]:
            raise UnsupportedModelError(
                f"{name} is not only the weight of linear maps ({other[0] or 'the model'} reads it too), so its change "
                "cannot be added to a linear map's output; change the weights with ParameterDirection.applied_to"
            )
        if delta.shape != (shape := _shape_of(holders[0][1])):
            raise ValueError(f"{name} is {shape} (out, in) in the model, and {delta.shape} in the change")
        places |= {holder: name for holder, _ in holders}
    return places


def _shape_of(module: Any) -> tuple[int, int]:
    """(out, in) of a linear map; a packed weight has another shape than this."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return module.out_features, module.in_features


_Stack: TypeAlias = tuple[Tensor, Tensor]
"""Bᵀ (n, q, out) and A (n, q, in) of n changes."""


class ChangedActivations:
    """Runs a model as if its weights were changed, inside `with`; each example of a batch gets one change at a scale.

    After `assign`, forward passes of that many examples run with the changes. The hooks are removed on exit. It may be
    entered again; deltas that were moved to the activations' device and type are kept.

    Args:
        model: any model; its weights are not read.
        changes: {parameter: delta} of every change.

    Raises:
        UnsupportedModelError: if a parameter is not only the weight of linear maps; on exit, if a changed module never
            ran although the module around it did, because the model reads its weight in another way, as an adapter of
            PEFT may do. A weight of transformers' own modules that was not read has no effect on these inputs, such as
            those of Longformer's global attention where no token has it.
        ValueError: if the model lacks a parameter, or has one of another shape.
    """

    def __init__(self, model: nn.Module, changes: Sequence[Mapping[str, LinearDelta]]):
        self._model = model
        self._changes = changes
        self._places: dict[str, str] = {}
        self._fused: dict[str, dict[str, str]] = {}
        checked: set[tuple[str, tuple[int, int]]] = set()  # changes of the same weights: each is looked up once
        for change in changes:
            new = {name: delta for name, delta in change.items() if (name, delta.shape) not in checked}
            if not new:
                continue
            checked |= {(name, delta.shape) for name, delta in new.items()}
            fused = fused_places(model, new)
            for path, names in fused.items():
                self._fused[path] = self._fused.get(path, {}) | names
            inside = {name for names in fused.values() for name in names.values()}
            self._places |= check_linear(model, {n: delta for n, delta in new.items() if n not in inside})
        check_adapted_maps(model, self._places)
        self._cast: dict[tuple[int, str, torch.device, torch.dtype], LinearDelta] = {}
        self._stacks: dict[tuple[str, torch.device, torch.dtype], _Stack | None] = {}
        self._numbers: tuple[int, ...] = ()
        self._scales: tuple[float, ...] = ()
        self._assigned: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []
        self._ran: set[str] = set()
        self._reads = ParameterReads(self._that_may_be_idle())

    def _that_may_be_idle(self) -> dict[str, nn.Module]:
        """The changed modules inside transformers' own, which read no weight but as `module.weight`."""
        modules = dict(self._model.named_modules())
        around = {path: modules[path.rpartition(".")[0]] for path in self._places}
        own = {path for path, module in around.items() if type(module).__module__.partition(".")[0] == "transformers"}
        return {path: modules[path] for path in self._places if path in own}

    @property
    def modules(self) -> list[str]:
        """Names of the modules whose outputs change."""
        return [*self._places, *self._fused]

    def assign(self, numbers: Sequence[int], scales: Sequence[float]) -> None:
        """Set the change and the scale for each example of the next batches; a scale of 0 leaves an example unchanged.

        Raises:
            IndexError: if there is no such change.
            ValueError: if there are not equally many changes and scales.
        """
        if len(numbers) != len(scales):
            raise ValueError(f"there are {len(numbers)} numbers of changes and {len(scales)} scales")
        if wrong := [k for k in numbers if not 0 <= k < len(self._changes)]:
            raise IndexError(f"there is no change {wrong[0]}; there are {len(self._changes)}")
        self._numbers, self._scales = tuple(numbers), tuple(map(float, scales))
        self._assigned.clear()

    def assign_all(self, number: int, scale: float) -> None:
        """Set one change at one scale for every example of any batch."""
        self.assign([number], [scale])

    def __enter__(self) -> ChangedActivations:
        modules = dict(self._model.named_modules())
        around = {path.rpartition(".")[0] for path in self._places}
        for path in around - set(self._places):
            self._handles.append(modules[path].register_forward_hook(self._watching(path)))
        for path, parameter in self._places.items():
            hook = self._adding(path, parameter)
            # First, so that other hooks get the output of the changed weight.
            self._handles.append(modules[path].register_forward_hook(hook, prepend=True, with_kwargs=True))
        for path, experts in find_experts(self._model, self._fused).items() if self._fused else ():
            self._handles.append(experts.intercept(self._tap(path), lambda: True))
        self._reads.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._reads.__exit__(kind, error, trace)
        unseen = [path for path in self._places if path not in self._ran and path.rpartition(".")[0] in self._ran]
        unseen = [path for path in unseen if path in self._reads.read or path not in self._reads.modules]
        unseen = [path for path in unseen if self._moves(self._places[path])]
        if unseen and kind is None:
            raise UnsupportedModelError(
                f"the model reads the weight of {', '.join(unseen[:3])} without calling the module, so its change was "
                "not measured; change the weights in place with ParameterDirection.applied_to"
            )

    def _moves(self, parameter: str) -> bool:
        """Whether one of the changes of this weight is not zero."""
        deltas = [change[parameter] for change in self._changes if parameter in change]
        return any(delta.squared_norm > 0 for delta in deltas)

    def _watching(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._ran.add(path)

        return hook

    def _adding(self, path: str, parameter: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            self._ran.add(path)
            x = args[0] if args else next(iter(kwargs.values()))
            if len(set(zip(self._numbers, self._scales, strict=True))) > 1:
                each = _per_example(x, len(self._numbers), path).to(torch.promote_types(x.dtype, torch.float32))
                if (stack := self._stack(parameter, each)) is not None:
                    return self._with_stack(stack, each, output)
            added = self._added(path, parameter, x)
            if added is None:
                return output
            wide = torch.promote_types(output.dtype, torch.float32)
            return (output.to(wide) + added.to(output.device, wide).reshape(output.shape)).to(output.dtype)

        return hook

    def _tap(self, path: str) -> Tap:
        """The tap that adds the changes of fused experts to their products."""

        def tap(weight: str, x: Tensor, routing: Routing, output: Tensor) -> Tensor:
            parameter = self._fused[path].get(weight)
            added = None if parameter is None else self._added_by_experts(path, parameter, x, routing)
            if added is None:
                return output
            return (output.to(added.dtype) + added).to(output.dtype)

        return tap

    def _added_by_experts(self, path: str, parameter: str, x: Tensor, routing: Routing) -> Tensor | None:
        """The change of the products (S, out) of fused experts; None if there is none."""
        wide = torch.promote_types(x.dtype, torch.float32)
        pairs = set(zip(self._numbers, self._scales, strict=True))
        if len(pairs) <= 1:
            for number, scale in pairs:
                delta = self._delta(number, parameter, x)
                return (
                    None if delta is None or scale == 0 else scale * delta.times_by_expert(x.to(wide), routing.counts)
                )
            return None
        if routing.tokens % len(self._numbers):
            raise UnsupportedModelError(
                f"{path} received {routing.tokens} tokens for a batch of {len(self._numbers)} examples, so they cannot "
                "be assigned to examples; use the same change and scale for all examples of a batch"
            )
        examples = replace(routing, batch=len(self._numbers)).examples
        total: Tensor | None = None
        for number in sorted(set(self._numbers)):
            delta = self._delta(number, parameter, x)
            scales = [s if k == number else 0.0 for k, s in zip(self._numbers, self._scales, strict=True)]
            if delta is not None and any(scales):
                each = torch.tensor(scales, device=x.device, dtype=wide)[examples, None]
                added = each * delta.times_by_expert(x.to(wide), routing.counts)
                total = added if total is None else total + added
        return total

    def _delta(self, number: int, parameter: str, x: Tensor) -> LinearDelta | None:
        """A change's delta on the device of x, in float32 or wider; kept for the next batch."""
        delta = self._changes[number].get(parameter)
        if delta is None:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        key = number, parameter, x.device, wide
        if key not in self._cast:
            self._cast[key] = delta.to(x.device, wide)
        return self._cast[key]

    def _stack(self, parameter: str, like: Tensor) -> _Stack | None:
        """Bᵀ (n, q, out) and A (n, q, in) of all changes, if there are several of the same rank; kept for later."""
        key = parameter, like.device, like.dtype
        if key not in self._stacks:
            deltas = [change.get(parameter) for change in self._changes]
            ranks = {None if d is None or d.right is None else len(d.right) for d in deltas}
            self._stacks[key] = None
            if len(deltas) > 1 and len(ranks) == 1 and None not in ranks:
                left = torch.stack([d.left.mT for d in deltas if d is not None]).to(like)
                right = torch.stack([d.right for d in deltas if d is not None and d.right is not None]).to(like)
                self._stacks[key] = left, right
        return self._stacks[key]

    def _with_stack(self, stack: _Stack, x: Tensor, output: Tensor) -> Tensor:
        """The changed output for inputs x (B, …, in), each example with its own change."""
        key = x.device, x.dtype
        if key not in self._assigned:
            scales = torch.tensor(self._scales, device=x.device, dtype=x.dtype)[:, None, None]
            self._assigned[key] = torch.tensor(self._numbers, device=x.device), scales
        numbers, scales = self._assigned[key]
        left, right = (factor.index_select(0, numbers) for factor in stack)
        inside = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), right.mT) * scales
        before = output.to(x.device, torch.promote_types(output.dtype, x.dtype)).reshape(len(x), -1, left.shape[-1])
        after = torch.baddbmm(
            before, inside.to(before.dtype), left.to(before.dtype)
        )  # one product, and no third tensor
        return after.reshape(output.shape).to(output.device, output.dtype)

    def _added(self, path: str, parameter: str, x: Tensor) -> Tensor | None:
        """The change of the module's output, shaped like it up to flattening; None if there is none."""
        pairs = set(zip(self._numbers, self._scales, strict=True))
        wide = torch.promote_types(x.dtype, torch.float32)
        if len(pairs) <= 1:
            for number, scale in pairs:
                delta = self._delta(number, parameter, x)
                return None if delta is None or scale == 0 else scale * delta.times(x.to(wide))
            return None
        each = _per_example(x, len(self._numbers), path).to(wide)
        parts: list[tuple[Tensor, Tensor]] = []
        for number in sorted(set(self._numbers)):
            delta = self._delta(number, parameter, x)
            where = [i for i, k in enumerate(self._numbers) if k == number and self._scales[i] != 0]
            if delta is not None and where:
                rows = torch.tensor(where, device=x.device)
                scales = torch.tensor([self._scales[i] for i in where], device=x.device, dtype=wide)
                chosen = each if len(where) == len(each) else each[rows]
                parts.append((rows, delta.times(chosen) * scales.view(-1, *[1] * (each.dim() - 1))))
        if not parts:
            return None
        if len(parts) == 1 and len(parts[0][0]) == len(each):
            return parts[0][1]
        total = parts[0][1].new_zeros(*each.shape[:-1], parts[0][1].shape[-1])
        for rows, values in parts:
            total[rows] = values
        return total


def _per_example(x: Tensor, batch: int, path: str) -> Tensor:
    """(B, …, in), or flattened (B·t, in), → (B, …, in).

    Raises:
        CalledOnceForAll: if the module ran once for the whole batch.
        UnsupportedModelError: if the inputs cannot be assigned to examples.
    """
    if x.shape[0] == batch:
        return x
    if x.shape[0] == 1:
        raise CalledOnceForAll(
            f"{path} runs once for the whole batch; use the same change and scale for all its examples"
        )
    if x.dim() != 2 or x.shape[0] % batch:
        raise UnsupportedModelError(
            f"{path} received {tuple(x.shape)} for a batch of {batch} examples, so its inputs cannot be assigned to "
            "examples (this happens with routed experts); use the same change and scale for all examples of a batch"
        )
    return x.reshape(batch, -1, x.shape[1])


@contextlib.contextmanager
def changed_in_activations(
    model: nn.Module, deltas: Mapping[str, LinearDelta], scale: float = 1.0
) -> Iterator[nn.Module]:
    """Runs the model as if its weights were W + scale·ΔW, inside `with`, by hooks; see `ChangedActivations`."""
    with ChangedActivations(model, [deltas]) as changed:
        changed.assign_all(0, scale)
        yield model
