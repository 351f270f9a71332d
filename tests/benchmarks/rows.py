"""PEF rows: time as a ratio to the floor, error of PEF inner products, examples a second and peak memory, side by side.

    python -m tests.benchmarks.rows [--models BERT-like GPT-2-like SmolLM2] [--rounds 7] [--keep]

The floor is 1 forward pass and c backward passes through the activations alone. BERT-like (3 classes) and GPT-2-like
(vocabulary 8,192) have 4 layers and hidden size 256, and see 8 sequences of 64 tokens, c = 8; SmolLM2 sees 4
word-relation prompts, c = 4. All linear maps but the output embedding. Rows are the same passes with every map's rows
collected and sketched; a whole pass adds what chooses the cotangents, scales the rows and reads predictions. Everything
takes its turn in one process on one thread; a ratio is the median over rounds of the ratio to the floor in the same
round. The error is that of off-diagonal inner products of unit-norm PEFs against unsketched rows, the median over three
seeds of the sketch (one for SmolLM2). Memory is the largest RssAnon above what is held before, in a process of its own,
one pass.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.gradients import LinearHooks, LinearMap, frozen
from hf_npeff.fisher.passes import FisherPass
from hf_npeff.fisher.selftest import (
    Captured,
    Run,
    collect_rows,
    exact_gram,
    off_diagonal_error,
    pef_inner_products,
)
from hf_npeff.fisher.sketches import Sketch
from tests.benchmarks.measure import in_turn, keep, kept, machine, ratio
from tests.benchmarks.memory import Peak

LENGTH, BATCH, ROWS, VOCABULARY, DIM = 64, 8, 8, 8192, 4096
SKETCHES: dict[str, tuple[Any, int | None]] = {
    "kronecker 16": ("kronecker", 16), "auto": ("auto", None), f"two-stage {DIM}": ("two-stage", DIM),
    f"countsketch {DIM}": ("countsketch", DIM),
}  # fmt: skip
MODELS = ("BERT-like", "GPT-2-like", "SmolLM2")
SLICE, FEW = 64, 2
"""The dense map is timed on this many of its numbers, `torch.func` on this many examples; times are scaled up."""


@dataclass
class Case:
    """A frozen model on one batch, with cotangents that stay the same.

    Attributes:
        name: of the model.
        model: frozen.
        examples: of the batch.
        work: a FisherPass with each sketch, by its label.
        run: forward passes and cotangents (B, c, t, s).
    """

    name: str
    model: Any
    examples: Any
    work: dict[str, FisherPass]
    run: Run

    @property
    def chosen(self) -> str:
        """What `auto` took."""
        taken = self.work["auto"].sketch
        assert taken is not None
        return f"{taken.kind} {taken.setting}"

    @property
    def maps(self) -> Sequence[LinearMap]:
        """The linear maps under analysis."""
        return next(iter(self.work.values())).maps

    @functools.cached_property
    def grams(self) -> dict[tuple[str, bool], Tensor]:
        """{(parameter, whether its bias is counted): inner products (B·c, B·c) of unsketched rows}."""
        captured = Captured()
        with LinearHooks(self.model, self.maps, captured) as hooks:
            hooks.begin(len(self.run.values))
            source, V = self.run()
            for i in range(V.shape[1]):
                hooks.backward(source, V[:, i], last=i == V.shape[1] - 1)
        found = {}
        modules = dict(self.model.named_modules())
        for m in self.maps:
            x, delta = captured.tensors(m.parameter)
            found[m.parameter, False] = found[m.parameter, True] = exact_gram(x, delta)
            if modules[m.modules[0]].bias is not None:
                total = delta.sum(2).flatten(0, 1).double()
                found[m.parameter, True] = found[m.parameter, False] + total @ total.T
        return found

    def error(self, rows: Tensor, parameters: Sequence[str] | None = None, bias: bool = False) -> float:
        """Of the inner products of PEFs with these rows (B, c, d), over all parameters, or over those given."""
        parameters = [m.parameter for m in self.maps] if parameters is None else parameters
        exact = torch.stack([self.grams[name, bias] for name in parameters]).sum(0)
        flat = rows.flatten(0, 1).double()
        return off_diagonal_error(pef_inner_products(flat @ flat.T, len(rows)), pef_inner_products(exact, len(rows)))


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


def small_models() -> dict[str, tuple[Any, str]]:
    """{name: (model, output factor)}."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        num_labels=3,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=4)
    return {
        "BERT-like": (transformers.BertForSequenceClassification(bert), "projection"),
        "GPT-2-like": (transformers.GPT2LMHeadModel(gpt2), "spectral"),
    }


@functools.cache
def smollm2() -> tuple[Any, Any]:
    from hf_npeff.demo import load_model

    return load_model()


@contextlib.contextmanager
def case(name: str, labels: Sequence[str] = tuple(SKETCHES)) -> Iterator[Case]:
    """The model, its batch and its cotangents, with these sketches."""
    tokenizer = None
    if name == "SmolLM2":
        from hf_npeff.studies.tasks import word_relation_prompts

        (model, tokenizer), factor, c = smollm2(), "spectral", 4
        examples = Examples(word_relation_prompts(1), tokenizer)[:4]
    else:
        (model, factor), c = small_models()[name], ROWS
        ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        examples = Examples({"input_ids": ids})[:]
    with frozen(model.eval()), contextlib.ExitStack() as stack:
        work = {}
        for label in labels:
            if name == "SmolLM2" and label.startswith("two-stage"):
                continue  # auto takes two stages there, too
            kind, dim = SKETCHES[label]
            fisher = FisherConfig(rank=c, output_factor=factor, sketch=kind, sketch_dim=dim, sketch_tolerance=0.1)  # type: ignore[arg-type]
            work[label] = stack.enter_context(NPEFFAnalyzer(model, tokenizer, fisher=fisher)._at_work())
            if label == "auto":
                work[label].prepare(examples)
            else:
                shapes = {m.parameter: m.shape for m in work[label].maps}
                work[label].sketch = Sketch(shapes, kind, dim, 0)
        first = next(iter(work.values()))
        yield Case(name, model, examples, work, first._run(examples))


def floor(case: Any, model: Any, run: Any) -> Callable[[], None]:
    """The passes alone: gradients end at the embeddings, and no parameter has one."""

    def once() -> None:
        seen = {}

        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
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
    for label, work in case.work.items():
        assert work.sketch is not None

        def error(seed: int, like: Sketch = work.sketch) -> float:
            sketch = Sketch(like.shapes, like.kind, like.setting, seed)
            return case.error(collect_rows(case.model, case.maps, {}, case.run, sketch))

        collect = functools.partial(collect_rows, case.model, work.maps, {}, case.run, work.sketch)
        ways[label] = Way(collect, error, seeds=1 if case.name == "SmolLM2" else 3)
        if label in ("kronecker 16", "auto") and case.name != "SmolLM2":
            ways[f"{label}, whole pass"] = Way(functools.partial(work.rows, case.examples))
    return ways


def functional(case: Case) -> dict[str, Way]:
    """`torch.func`: per-example gradients by vmap over vjp, then a countsketch, or a dense map of random signs."""
    if case.name == "SmolLM2":
        return {}  # an example's rows are 1.7 GB before the sketch
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")  # the fused kernels have no batching rule
    modules = dict(model.named_modules())
    parameters = {m.parameter: modules[m.modules[0]].weight for m in case.maps}
    ids = torch.stack([torch.as_tensor(e.inputs["input_ids"]) for e in case.examples])
    mask = torch.zeros(1, 1, LENGTH, LENGTH)
    causal = case.name == "GPT-2-like"
    if causal:
        mask.masked_fill_(~torch.ones_like(mask, dtype=torch.bool).tril(), torch.finfo(mask.dtype).min)
    inner = model.transformer if causal else model
    prefix = "transformer." if causal else ""

    def output(weights: Mapping[str, Tensor], row: Tensor) -> Tensor:
        named = {name.removeprefix(prefix): value for name, value in weights.items()}
        out = functional_call(inner, named, (row[None],), {"attention_mask": mask})
        return out.last_hidden_state[:, -1] if causal else out.logits

    def gradients(row: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        _, pull = vjp(lambda weights: output(weights, row), parameters)
        return vmap(lambda v: pull(v[None])[0])(cotangents)

    V = case.run.values[:, :, 0]
    sketch = Sketch({m.parameter: m.shape for m in case.maps}, "countsketch", DIM, 0)

    def all_rows(n: int = FEW, together: int = 2) -> Iterator[dict[str, Tensor]]:
        for start in range(0, n, together):
            found = vmap(gradients)(ids[start : start + together], V[start : start + together])
            yield {m.parameter: m.as_matrix(found[m.parameter]) for m in case.maps}

    def sketched(n: int = FEW) -> Tensor:
        return torch.cat([sketch.apply(part) for part in all_rows(n)])

    def dense() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        flat = [torch.cat([g.flatten(2) for g in part.values()], 2) for part in all_rows()]
        rows = torch.zeros(FEW, V.shape[1], SLICE)
        A = torch.cat(flat)
        for start in range(0, A.shape[2], 2**17):
            part = A[:, :, start : start + 2**17]
            signs = torch.randint(0, 2, (part.shape[2], SLICE), generator=generator, dtype=torch.int8)
            rows += part @ (signs * 2 - 1).float()
        return rows

    def unsketched() -> None:
        for _ in all_rows():
            pass

    def same_rows(seed: int) -> float:
        return case.error(sketched(len(V)))

    few, plain = FEW / len(V), "torch.func, no sketch"
    return {
        plain: Way(unsketched, examples=few),
        f"torch.func + countsketch {DIM}": Way(sketched, same_rows, examples=few, seeds=1),
        f"torch.func + dense signs {DIM}": Way(
            dense, functools.partial(dense_error, case), examples=few, share=SLICE / DIM, fixed=plain
        ),
    }


def dense_error(case: Case, seed: int) -> float:
    """Of a dense normal map, drawn in the span of the rows, where it is again a normal map: no row is formed."""
    gram = torch.stack([case.grams[m.parameter, False] for m in case.maps]).sum(0)
    values, U = torch.linalg.eigh(gram)
    rows = U * values.clamp_min(0).sqrt()
    normal = torch.randn(len(gram), DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return case.error((rows @ normal).unflatten(0, case.run.values.shape[:2]))


Ways = Callable[[Case], dict[str, Way]]


def all_ways(case: Case) -> dict[str, Way]:
    return ours(case) | functional(case)


def peak_of(name: str, label: str, ways: Ways) -> float:
    """MiB that one pass takes above what is held before it, in a forked process; no backward pass may have run here."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        with case(name, [label] if label in SKETCHES else ["kronecker 16"]) as found:
            way = (ways(found) | {"floor": Way(floor(None, found.model, found.run))})[label]
            ctypes.CDLL(None).malloc_trim(0)
            try:
                with Peak() as peak:
                    way.rows()
                sender.send(peak.largest - peak.before)
            except Exception:
                sender.send(float("nan"))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return float("nan")
    finally:
        process.join()


def timed(case: Case, ways: Ways, rounds: int) -> dict[str, Any]:
    """{label: figures} of one model; ways that fail are kept with their error."""
    found: dict[str, Any] = {}
    fine = {}
    for label, way in ways(case).items():
        try:
            way.rows()
            errors = [way.error(seed) for seed in range(way.seeds)] if way.error else None
        except Exception as failure:
            found[label] = {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]}
            print(f"  {label:32} {found[label]['failed']}", flush=True)
            continue
        fine[label] = way
        found[label] = {"error": statistics.median(errors) if errors else None, "covers": way.covers}
    tries = {"floor": floor(None, case.model, case.run)} | {label: way.rows for label, way in fine.items()}
    times = in_turn(tries, rounds)
    floor_s = statistics.median(times["floor"])
    B = len(case.examples)
    print(f"{case.name}: floor {1000 * floor_s:.0f} ms for {B} examples, auto takes {case.chosen}")
    for label, way in fine.items():
        over = ratio(times, label, "floor") / way.examples
        if way.fixed:
            fixed = ratio(times, way.fixed, "floor") / fine[way.fixed].examples
            over = fixed + (over - fixed) / way.share
        found[label] |= {"ratio": over, "rate": B / floor_s / over}
        error = found[label]["error"]
        shown = "" if error is None else f"error {error:.3f}"
        covers = "" if way.covers == 1 else f"   covers {way.covers:.0%}"
        print(
            f"  {label:32} {over:7.2f} × the floor  {found[label]['rate']:8.1f} examples a second  {shown}{covers}",
            flush=True,
        )
    return {"floor": floor_s, "auto takes": case.chosen, "ways": found}


def memory_of(names: Sequence[str], ways: Ways, labels: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """{model: {label: MiB}}, printed; before any backward pass in this process, which is forked."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        if name == "SmolLM2":
            smollm2()
        found[name] = {label: peak_of(name, label, ways) for label in ("floor", *labels[name])}
        print(f"{name}, MiB of a pass: " + ", ".join(f"{k} {v:.0f}" for k, v in found[name].items()), flush=True)
    return found


def run(script: str, ways: Ways, labels: Mapping[str, Sequence[str]], options: argparse.Namespace, **more: Any) -> None:
    """Memory, time and errors of the models that were asked for, kept where that was asked for."""
    torch.set_num_threads(1)
    print(machine())
    if options.part in ("memory", "both"):
        memory = memory_of(options.models, ways, labels)
        if options.keep:
            keep(script, {**kept(script), **more, "memory": kept(script).get("memory", {}) | memory})
    if options.part in ("time", "both"):
        for name in options.models:
            with case(name) as found:
                figures = timed(found, ways, options.rounds)
            if options.keep:
                keep(script, {**kept(script), **more, "models": kept(script).get("models", {}) | {name: figures}})


def arguments(description: str) -> argparse.ArgumentParser:
    """What this script and that of the peers share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", choices=("memory", "time", "both"), default="both")
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    return parser


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    others = ("torch.func, no sketch", f"torch.func + countsketch {DIM}", f"torch.func + dense signs {DIM}")
    few = ("kronecker 16", "auto", f"countsketch {DIM}")
    labels = {name: few if name == "SmolLM2" else (*SKETCHES, *others) for name in options.models}
    run("rows", all_ways, labels, options)


if __name__ == "__main__":
    main()
