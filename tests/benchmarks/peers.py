"""What other libraries take for the same rows: bergson, dattri and dattri-llm, beside ours, in one process.

    make bench-peers      # makes .venv-peers from tests/benchmarks/peers.txt, then runs this in it

The models, the batch, the cotangents and the floor are those of `rows`. None of them reuses a forward pass for several
cotangents, so each takes one forward and one backward pass a cotangent, through gradients that end at the embeddings:
no weight gradient is formed. Each projects a module's gradient from both sides to 16 × 16, as `kronecker 16` does:

    bergson     a subclass of HookCollectorBase, GradientProcessor(projection_dim=16)
    dattri      LoGra's compressors (normal, then identity) under block_projected_if's HookManager
    dattri-llm  HookManager with style "logra", capture_style "materialized", a seed for every layer

Where a library leaves modules out, its error is that over the modules it covers; where it counts biases, so does what
it is compared with.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # dattri compiles a function a layer: minutes on a CPU

import contextlib
import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.cases import Case
from tests.benchmarks.rows import arguments, run
from tests.benchmarks.ways import Way, ours

SIDE = 16
PEERS = ("bergson", "dattri", "dattri-llm")


@contextlib.contextmanager
def leaf_at_embeddings(model: Any) -> Iterator[dict[str, Tensor]]:
    """Gradients end at the output of the embeddings, which is `leaf` after a forward pass."""
    seen: dict[str, Tensor] = {}

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        seen["leaf"] = output.detach().requires_grad_()
        return seen["leaf"]

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def one_pass_a_cotangent(case: Case, read: Callable[[], Sequence[Tensor]]) -> Tensor:
    """Rows (B, c, d): `read` gives every module's (B, …) after each backward pass."""
    rows = []
    with leaf_at_embeddings(case.model) as seen:
        for i in range(case.known.values.shape[1]):
            source, V = case.run()
            torch.autograd.grad(source, seen["leaf"], V[:, i])
            rows.append(torch.cat([part.flatten(1) for part in read()], 1))
    return torch.stack(rows, 1)


def covering(case: Case, modules: Sequence[str]) -> tuple[list[str], float]:
    """Parameters of these modules, and their share of those under analysis."""
    chosen = [m for m in case.maps if m.modules[0] in set(modules)]
    total = sum(a * b for a, b in (m.shape for m in case.maps))
    return [m.parameter for m in chosen], sum(a * b for a, b in (m.shape for m in chosen)) / total


def way(case: Case, make: Callable[[int], Tensor], modules: Sequence[str], bias: bool) -> Way:
    parameters, covers = covering(case, modules)
    return Way(
        functools.partial(make, 0),
        lambda seed: case.error(make(seed), parameters, bias),
        covers=covers,
        seeds=1 if case.name == "SmolLM2" else 3,
    )


def bergson(case: Case) -> Way:
    from bergson.collector.collector import HookCollectorBase
    from bergson.gradients import GradientProcessor

    class Collector(HookCollectorBase):
        def setup(self) -> None:
            self.mod_grads = {}

        def teardown(self) -> None:
            pass

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            self.mod_grads[module._name] = self._compute_gradient(module, g)

        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            pass

    # It takes inputs (batch, positions, features) alone: BERT's pooler and classifier have two dimensions.
    modules = [m.modules[0] for m in case.maps if ".layer" in m.parameter or ".h." in m.parameter]
    processors = {seed: GradientProcessor(projection_dim=SIDE, projection_seed=seed) for seed in range(3)}

    def make(seed: int) -> Tensor:
        collector = Collector(case.model, target_modules=set(modules), processor=processors[seed])

        def read() -> list[Tensor]:
            return [collector.mod_grads[name] for name in modules]

        with collector:
            return one_pass_a_cotangent(case, read)

    return way(case, make, modules, bias=False)


def dattri(case: Case) -> Way:
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    modules = [m.modules[0] for m in case.maps]
    known = dict(case.model.named_modules())

    @functools.cache
    def compressors(seed: int) -> list[Any]:
        captured: dict[str, Any] = {}
        handle = case.model.register_forward_pre_hook(
            lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            case.run()
        handle.remove()
        inputs = {k: v for k, v in captured.items() if isinstance(v, Tensor)}
        first = {"proj_dim": SIDE, "proj_max_batch_size": 64, "proj_type": "normal", "proj_seed": seed * 1_000_000}
        second = {"proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
        return setup_model_compressors(case.model, modules, first, second, inputs)

    def make(seed: int) -> Tensor:
        found = compressors(seed)
        manager = HookManager(case.model, modules)
        try:
            manager.set_compressors(found)
            return one_pass_a_cotangent(case, manager.get_compressed_grads)
        finally:
            manager.remove_hooks()

    return way(case, make, modules, bias=any(known[name].bias is not None for name in modules))


def dattri_llm(case: Case) -> Way:
    from dattri_llm.gradient import CaptureCallback, HookManager, HookManagerConfig

    modules = [m.modules[0] for m in case.maps]
    known = dict(case.model.named_modules())

    def make(seed: int) -> Tensor:
        kwargs = {
            name: {
                "style": "logra", "proj_dim": SIDE, "proj_max_batch_size": 8, "proj_type": "normal",
                "proj_seed": 1_000_000 * seed + 2 * i,
            }
            for i, name in enumerate(modules)
        }  # fmt: skip
        config = HookManagerConfig(
            hook_types=dict.fromkeys(modules, "linear_io"),
            projection_kwargs=kwargs,
            capture_style="materialized",
            include_frozen=True,
        )
        capture = CaptureCallback()
        manager = HookManager(case.model, config=config, callbacks=[capture])

        def read() -> list[Tensor]:
            assert capture.record is not None
            return [capture.record.gradient.data[name] for name in modules]

        with manager.collect(deregister_on_exit=True):
            return one_pass_a_cotangent(case, read)

    return way(case, make, modules, bias=any(known[name].bias is not None for name in modules))


def failing(error: Exception) -> Way:
    def rows() -> None:
        raise error

    return Way(rows)


def everyone(case: Case) -> dict[str, Way]:
    ways = {label: w for label, w in ours(case).items() if label in ("kronecker 16", "auto")}
    for label, build in {"bergson": bergson, "dattri": dattri, "dattri-llm": dattri_llm}.items():
        try:
            ways[label] = build(case)
        except Exception as error:  # what a library cannot do is a row of the table
            ways[label] = failing(error)
    return ways


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    warnings.simplefilter("ignore")
    labels = dict.fromkeys(options.models, ("kronecker 16", "auto", *PEERS))
    versions = {name: importlib.metadata.version(name) for name in PEERS}
    run("peers", everyone, labels, options, versions=versions)


if __name__ == "__main__":
    main()
