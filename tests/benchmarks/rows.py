"""Time of sketched rows as a ratio to the floor: 1 forward pass and c backward passes through the activations alone.

    python -m tests.benchmarks.rows [--rounds 7] [--threads 1]

Models of 4 layers, hidden size 256, on 16 sequences of 64 tokens, c = 8: BERT-like with 3 classes, GPT-2-like with a
vocabulary of 8,192. `hooks` is the same passes with every linear map's rows collected and sketched; `whole` adds what
chooses the cotangents, scales and stores the rows. Variants are interleaved; the ratio is the median over rounds of
the ratio to the floor in the same round.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.gradients import frozen
from hf_npeff.fisher.selftest import collect_rows

LENGTH, BATCH, ROWS, VOCABULARY = 64, 16, 8, 8192
SKETCHES = {
    "kronecker 16": ("kronecker", 16),
    "two-stage 8192": ("two-stage", 8192),
    "countsketch 8192": ("countsketch", 8192),
}
BARS = {"kronecker 16": 1.15, "countsketch 8192": 2.4}


def models() -> dict[str, tuple[Any, str]]:
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


def floor(work: Any, model: Any, run: Any) -> Callable[[], None]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    print(f"{cpu}, {options.threads} thread(s), torch {torch.__version__}, transformers {transformers.__version__}")
    for name, (model, factor) in models().items():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator)
        examples = Examples({"input_ids": ids})[:]
        tries: dict[str, Callable[[], Any]] = {}
        with frozen(model.eval()):
            for label, (kind, dim) in SKETCHES.items():
                fisher = FisherConfig(rank=ROWS, output_factor=factor, sketch=kind, sketch_dim=dim)  # type: ignore[arg-type]
                analyzer = NPEFFAnalyzer(model, fisher=fisher)
                with analyzer._at_work() as work:
                    work.prepare(examples[:2])
                    run = work._run(examples)
                    tries.setdefault("floor", floor(work, model, run))
                    tries[f"{label}, hooks"] = functools.partial(collect_rows, model, work.maps, {}, run, work.sketch)
                    tries[f"{label}, whole"] = functools.partial(work.rows, examples)
            times: dict[str, list[float]] = {label: [] for label in tries}
            for round_ in range(options.rounds + 1):
                for label, once in tries.items():
                    begin = time.perf_counter()
                    once()
                    if round_:
                        times[label].append(time.perf_counter() - begin)
        base = times.pop("floor")
        print(f"\n{name}: floor {1000 * statistics.median(base):.0f} ms for {BATCH} examples")
        for label, taken in times.items():
            ratio = statistics.median(t / f for t, f in zip(taken, base, strict=True))
            sketch, part = label.split(", ")
            bar = f"   bar {BARS[sketch]}" if sketch in BARS and part == "hooks" else ""
            print(f"  {label:26} {ratio:.2f} × the floor{bar}")


if __name__ == "__main__":
    main()
