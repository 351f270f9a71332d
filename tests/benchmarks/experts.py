"""Rows of fused experts: time as a ratio to the floor, beside dense models of the same size and of the same work.

    python -m tests.benchmarks.experts [--rounds 5]

The floor is one forward pass and c backward passes through the activations alone (see `rows`). Three floors stand
beside each mixture: its own; that of a dense model whose layers have as many numbers as all experts together; and that
of a dense model whose layers do as much as the experts of one token. Rows are of all linear maps but the output
embedding, experts and shared ones. Everything takes its turn in one process on one thread.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.frozen import frozen
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.fisher.sketch_choice import known_cotangents
from hf_npeff.pefs.sketches import Sketch
from tests.benchmarks.cases import DIM, LENGTH
from tests.benchmarks.measure import in_turn, machine
from tests.benchmarks.ways import floor

BATCH, ROWS, VOCABULARY = 4, 4, 1024
"""Half of what `rows` takes, since a dense model as large as all experts is four times as large as its models."""
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0,
}  # fmt: skip
MIXTURES = {"8 experts of 1024, 2 a token": (8, 2, 1024), "64 experts of 128, 8 a token": (64, 8, 128)}
"""Like Mixtral's and like OLMoE's and Qwen3's: few large ones, many small ones."""


def mixture(experts: int, slots: int, width: int) -> Any:
    """A mixture of experts as transformers runs it by default."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **_SHAPE, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=slots
    )
    return transformers.MixtralForCausalLM(config).eval()


def dense(width: int) -> Any:
    """A dense model of the same attention, with layers of a width."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE, intermediate_size=width)).eval()


def passes(model: Any, kind: Any, dim: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The floor of a model and its rows, on a batch with cotangents that stay the same; the model stays frozen."""
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    examples = Examples({"input_ids": ids})[:]
    fisher = FisherConfig(rank=ROWS, output_factor="spectral")
    frozen_now = frozen(model)
    frozen_now.__enter__()
    forward = NPEFFAnalyzer(model, None, fisher=fisher).forward_pass().__enter__()
    maker = RowMaker(forward, fisher, Sketch(forward.shapes, kind, dim, 0))
    known = known_cotangents(forward, fisher, None, examples)
    return floor(model, lambda: (forward.outputs(examples).source, known.values)), lambda: maker.rows_of(
        examples, known.values
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name, (experts, slots, width) in MIXTURES.items():
        model = mixture(experts, slots, width)
        own, kronecker = passes(model, "kronecker", 16)
        tries = {
            "own floor": own,
            "floor of a dense model as large": passes(dense(experts * width), "kronecker", 16)[0],
            "floor of a dense model of the same work": passes(dense(slots * width), "kronecker", 16)[0],
            "kronecker 16": kronecker,
            f"countsketch {DIM}": passes(model, "countsketch", DIM)[1],
        }
        times = in_turn(tries, options.rounds)
        print(f"{name}: {1000 * statistics.median(times['own floor']):.0f} ms its own floor, {BATCH} examples")
        for way in ("kronecker 16", f"countsketch {DIM}"):
            over = {
                base: statistics.median(a / b for a, b in zip(times[way], times[base], strict=True))
                for base in tries
                if "floor" in base
            }
            print(f"  {way:18} " + ", ".join(f"{value:.2f} × {base}" for base, value in over.items()), flush=True)


if __name__ == "__main__":
    main()
