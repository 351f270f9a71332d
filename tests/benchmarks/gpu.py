"""What only a GPU shows: rows of a 1B-parameter model in bfloat16, the solver at 20,000 examples, 512 components.

    python -m tests.benchmarks.gpu [--rounds 5] [--quick]

Rows: a random Llama on sequences of 256 tokens, as a ratio to 1 forward pass and c backward passes through activations
alone (the floor), with the peak memory over that of the forward pass. Solver: seconds of an iteration of block_power,
as a ratio to its two products with the rows at the rate that the card reaches on a matrix product of the same shapes,
for each precision, with the loss that it ends at. Everything is timed with CUDA events after warm-up, medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.decomposition.solvers import DenseRows, block_power
from hf_npeff.decomposition.starts import start_from_examples
from hf_npeff.fisher.frozen import frozen
from hf_npeff.fisher.preparation import prepare
from hf_npeff.fisher.sketch_choice import known_cotangents
from tests.benchmarks.ways import floor
from tests.planted import planted, recovered

SKETCHES: list[tuple[Any, int]] = [
    ("kronecker", 16), ("kronecker", 32), ("two-stage", 16_384), ("countsketch", 16_384)
]  # fmt: skip
GIB = 2**30


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """Median over rounds, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken[1:])


def peak(work: Callable[[], Any]) -> float:
    """GiB above what is held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / GIB


def rows(rounds: int, quick: bool) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512} if quick else {
        "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 5632
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=32_000, num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False, **size
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    batch, length = (2, 32) if quick else (32, 256)
    ids = torch.randint(5, 32_000, (batch, length), generator=torch.Generator().manual_seed(0))
    examples = Examples({"input_ids": ids})[:]
    print(
        f"\nLlama of {sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters, bfloat16, {batch} × {length}"
    )
    print(
        "| c | sketch | numbers a row | × floor, hooks | × floor, whole pass | examples a second | GiB over weights |"
    )
    print("|---" * 7 + "|")
    with frozen(model.eval()):
        for c in (4, 8):
            for kind, dim in SKETCHES if c == 4 else SKETCHES[:-1]:
                fisher = FisherConfig(rank=c, output_factor="spectral", sketch=kind, sketch_dim=dim)
                analyzer = NPEFFAnalyzer(model, fisher=fisher)
                with analyzer.forward_pass() as forward:
                    maker = prepare(forward, fisher, examples[:2])
                    batch_known = known_cotangents(maker.forward, maker.config, maker.metric, examples)
                    base = floor(model, lambda f=forward, k=batch_known: (f.outputs(examples).source, k.values))

                    def hooked(maker: Any = maker, known: Any = batch_known) -> Any:
                        return maker.rows_of(examples, known.values)

                    def whole(maker: Any = maker) -> Any:
                        return maker.rows(examples)

                    least = milliseconds(base, rounds)
                    hooks, total = milliseconds(hooked, rounds), milliseconds(whole, rounds)
                    if kind == SKETCHES[0][0] and dim == SKETCHES[0][1]:
                        print(f"| {c} | the floor | | 1 ({least:.0f} ms) | | | {peak(base):.2f} |")
                    print(
                        f"| {c} | {kind} {dim} | {maker.sketch.dim:,} | {hooks / least:.2f} | {total / least:.2f} | "
                        f"{1000 * batch / total:.1f} | {peak(whole):.2f} |",
                        flush=True,
                    )
        forward = peak(lambda: model(input_ids=ids.cuda(), logits_to_keep=1).logits)
        print(f"forward pass without gradients: {forward:.2f} GiB over the weights")


def solver(quick: bool, rounds: int) -> None:
    n, c, d, r = (400, 4, 512, 32) if quick else (20_000, 4, 16_384, 512)
    A, truth, _ = planted(n, c, d, r, overlap=0.3, noise=1.0, active=3, seed=0, device="cuda")
    print(f"\nSolver: n={n:,} c={c} d={d:,} r={r}, planted, noise 1; rows {A.numel() * 4 / GIB:.2f} GiB in float32")
    print(
        "| precision | products, ms (TFLOP/s) | iteration, ms | × products | loss at the end | iterations | "
        "directions found | peak GiB over the rows |\n" + "|---" * 8 + "|"
    )
    for precision in ("float32", "tf32", "bfloat16"):
        held = DenseRows(A, precision)  # type: ignore[arg-type]
        G = start_from_examples(held, r, torch.Generator().manual_seed(0))
        W = torch.rand(n, r, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

        def products(held: DenseRows = held, G: Any = G, W: Any = W) -> None:
            held._last = None
            held.pull(G, W)

        limit = milliseconds(products, rounds)
        events: list[Any] = []

        def tick(iteration: int, loss: float, events: list[Any] = events) -> bool:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            return False

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit = block_power(held, G, max_iterations=100, tolerance=1e-5, progress=tick)
        torch.cuda.synchronize()
        above = (torch.cuda.max_memory_allocated() - before) / GIB
        once = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
        exact = DenseRows(A)
        loss = final_loss(exact, fit)
        flops = 4 * n * c * d * r / limit / 1e9
        print(
            f"| {precision} | {limit:.1f} ({flops:.0f}) | {once:.1f} | {once / limit:.2f} | {loss:.6f} | "
            f"{len(fit.losses) - 1} | {recovered(fit.G.cpu(), truth.cpu())} of {r} | {above:.2f} |",
            flush=True,
        )


def final_loss(exact: DenseRows, fit: Any) -> float:
    """Relative loss in float32 products, W near its minimum for the final G."""
    from hf_npeff.decomposition.objective import coordinate_descent, loss_of, overlaps

    N, H = exact.energies(fit.G), overlaps(fit.G)
    W = coordinate_descent(fit.W, N, H, 50)
    total = exact.total()
    return float(loss_of(total, W, N.double(), H.double()) / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this script needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    rows(options.rounds, options.quick)
    torch.cuda.empty_cache()
    solver(options.quick, options.rounds)


if __name__ == "__main__":
    main()
