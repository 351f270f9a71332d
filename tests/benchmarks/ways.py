"""Ways to make rows: ours with every sketch, `torch.func`, and the floor that they are measured against."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from hf_npeff.fisher.rows import RowMaker
from hf_npeff.pefs.sketches import Sketch
from tests.benchmarks.cases import DIM, LENGTH, Case

SLICE, FEW = 64, 2
"""The dense map is timed on this many of its numbers, `torch.func` on this many examples; times are scaled up."""


@dataclass
class Way:
    """One way to make rows.

    Attributes:
        rows: makes them: (B, c, d).
        error: of rows with another seed; None to leave the error out.
        examples: share of the batch that `rows` takes; its time is divided by it.
        share: of the sketching that `rows` does; what it takes beyond `fixed` is divided by it.
        fixed: the way that does all but the sketching.
        covers: share of the parameters under analysis.
        seeds: how many seeds the error is the median of.
    """

    rows: Callable[[], Any]
    error: Callable[[int], float] | None = None
    examples: float = 1.0
    share: float = 1.0
    fixed: str = ""
    covers: float = 1.0
    seeds: int = 3


Ways = Callable[[Case], dict[str, Way]]


def floor(model: Any, run: Any) -> Callable[[], None]:
    """The passes alone: gradients end at the embeddings, and no parameter has one."""

    def once() -> None:
        seen = {}

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            seen["leaf"] = output.detach().requires_grad_()
            return seen["leaf"]

        handle = model.get_input_embeddings().register_forward_hook(hook)
        try:
            source, V = run()
            for i in range(V.shape[1]):
                torch.autograd.grad(source, seen["leaf"], V[:, i], retain_graph=i < V.shape[1] - 1)
        finally:
            handle.remove()

    return once


def ours(case: Case) -> dict[str, Way]:
    """Every sketch, and whole passes."""
    ways: dict[str, Way] = {}
    for label, maker in case.makers.items():

        def error(seed: int, maker: RowMaker = maker) -> float:
            sketch = Sketch(maker.sketch.shapes, maker.sketch.kind, maker.sketch.setting, seed)
            return case.error(dataclasses.replace(maker, sketch=sketch).rows_of(case.examples, case.known.values))

        collect = functools.partial(maker.rows_of, case.examples, case.known.values)
        ways[label] = Way(collect, error, seeds=5)
        if label == "kronecker 16" or (label == "auto" and case.name != "SmolLM2"):
            ways[f"{label}, whole pass"] = Way(functools.partial(maker.rows, case.examples))
    return ways


class PerExampleGradients:
    """`torch.func`: gradients of every example and cotangent by vmap over vjp, for a few examples of a case."""

    def __init__(self, case: Case):
        self.case = case
        model = copy.deepcopy(case.model)
        model.set_attn_implementation("eager")  # the fused kernels have no batching rule
        modules = dict(model.named_modules())
        self.parameters = {m.parameter: modules[m.modules[0]].weight for m in case.maps}
        self.ids = torch.stack([torch.as_tensor(e.inputs["input_ids"]) for e in case.examples])
        self.mask = torch.zeros(1, 1, LENGTH, LENGTH)
        self.causal = case.name == "GPT-2-like"
        if self.causal:
            least = torch.finfo(self.mask.dtype).min
            self.mask.masked_fill_(~torch.ones_like(self.mask, dtype=torch.bool).tril(), least)
        self.inner = model.transformer if self.causal else model
        self.prefix = "transformer." if self.causal else ""
        self.sketch = Sketch({m.parameter: m.shape for m in case.maps}, "countsketch", DIM, 0)

    def _output(self, weights: Mapping[str, Tensor], row: Tensor) -> Tensor:
        named = {name.removeprefix(self.prefix): value for name, value in weights.items()}
        out = functional_call(self.inner, named, (row[None],), {"attention_mask": self.mask})
        return out.last_hidden_state[:, -1] if self.causal else out.logits

    def _of(self, row: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        _, pull = vjp(lambda weights: self._output(weights, row), self.parameters)
        return vmap(lambda v: pull(v[None])[0])(cotangents)

    def all_rows(self, n: int = FEW, together: int = 2) -> Iterator[dict[str, Tensor]]:
        """{parameter: (together, c, out, in)} of n examples."""
        V = self.case.known.values[:, :, 0]
        for start in range(0, n, together):
            found = vmap(self._of)(self.ids[start : start + together], V[start : start + together])
            yield {m.parameter: m.as_matrix(found[m.parameter]) for m in self.case.maps}

    def unsketched(self) -> None:
        """Gradients alone."""
        for _ in self.all_rows():
            pass

    def sketched(self, n: int = FEW) -> Tensor:
        """Rows (n, c, d) of a countsketch."""
        return torch.cat([self.sketch.apply(part) for part in self.all_rows(n)])

    def dense(self) -> Tensor:
        """The first `SLICE` numbers of rows under a dense map of random signs."""
        generator = torch.Generator().manual_seed(0)
        A = torch.cat([torch.cat([g.flatten(2) for g in part.values()], 2) for part in self.all_rows()])
        rows = torch.zeros(FEW, A.shape[1], SLICE)
        for start in range(0, A.shape[2], 2**17):
            part = A[:, :, start : start + 2**17]
            signs = torch.randint(0, 2, (part.shape[2], SLICE), generator=generator, dtype=torch.int8)
            rows += part @ (signs * 2 - 1).float()
        return rows


def functional(case: Case) -> dict[str, Way]:
    """Per-example gradients by `torch.func`, then a countsketch, or a dense map of random signs."""
    if case.name == "SmolLM2":
        return {}  # an example's rows are 1.7 GB before the sketch
    of, few, plain = PerExampleGradients(case), FEW / len(case.examples), "torch.func, no sketch"

    def same_rows(seed: int) -> float:
        return case.error(of.sketched(len(case.examples)))

    return {
        plain: Way(of.unsketched, examples=few),
        f"torch.func + countsketch {DIM}": Way(of.sketched, same_rows, examples=few, seeds=1),
        f"torch.func + dense signs {DIM}": Way(
            of.dense, functools.partial(dense_error, case), examples=few, share=SLICE / DIM, fixed=plain
        ),
    }


def dense_error(case: Case, seed: int) -> float:
    """Of a dense normal map, drawn in the span of the rows, where it is again a normal map: no row is formed."""
    gram = torch.stack([case.grams[m.parameter, False] for m in case.maps]).sum(0)
    values, U = torch.linalg.eigh(gram)
    rows = U * values.clamp_min(0).sqrt()
    normal = torch.randn(len(gram), DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return case.error((rows @ normal).unflatten(0, case.known.values.shape[:2]))


def all_ways(case: Case) -> dict[str, Way]:
    """Ours and those of `torch.func`."""
    return ours(case) | functional(case)
