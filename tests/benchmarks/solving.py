"""How long solving for weight changes takes, and how much memory, beside the PEFs that it starts from.

    python -m tests.benchmarks.solving [--examples 2000] [--rank 8] [--dim 16384] [--memory-budget BYTES] [--beside 32]

Rows are drawn with a decaying spectrum, since solving does not depend on where they come from. `--beside` computes PEFs
of that many word-relation prompts with SmolLM2 and says what as many as were solved for would take: a tenth of that is
the bar. Seconds are those of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time

import torch

from hf_npeff import PEFs
from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.edits import solve
from hf_npeff.weights.row_space import combined_rows, row_space
from hf_npeff.weights.selective import selective

INNER = 600
"""Dimensions with a spectrum of their own, above noise: as of 224 prompts of SmolLM2."""


def drawn(n: int, c: int, d: int) -> PEFs:
    """PEFs whose rows have a spectrum that decays as those of a model do."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, INNER + 1).pow(-0.7)
    mixing = torch.randn(INNER, d, generator=generator)
    rows = torch.empty(n, c, d)
    for some in torch.arange(n).split(50):
        drawn = (torch.randn(len(some) * c, INNER, generator=generator) * spectrum) @ mixing
        rows[some] = (drawn + 0.1 * torch.randn(drawn.shape, generator=generator)).view(-1, c, d)
    return PEFs.from_factors(rows)


def seconds_of_pefs(examples: int, rank: int) -> float:
    """Processor seconds that the PEFs of one word-relation prompt take, with the settings of the demo."""
    from hf_npeff import FisherConfig, NPEFFAnalyzer
    from hf_npeff.demo import TARGETS, load_model
    from hf_npeff.studies.word_relations import word_relation_prompts

    model, tokenizer = load_model()
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=rank, target_modules=TARGETS))
    prompts = word_relation_prompts()
    like = analyzer.compute_pefs(prompts[:8], progress=False)  # the choice of a sketch is made once
    started = time.process_time()
    analyzer.compute_pefs(prompts[8 : 8 + examples], like=like, progress=False)
    return (time.process_time() - started) / examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dim", type=int, default=16_384)
    parser.add_argument("--memory-budget", type=int)
    parser.add_argument("--beside", type=int, default=0)
    options = parser.parse_args()
    n, c, d = options.examples, options.rank, options.dim
    pefs = drawn(n, c, d)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wanted = torch.zeros(n, dtype=torch.float64)
    wanted[: n // 8] = 1
    generator = torch.Generator().manual_seed(1)
    beta = torch.randn(n, c, generator=generator, dtype=torch.float64) * wanted[:, None]
    times = [time.process_time()]
    space = row_space(pefs, inside=beta[None], memory_budget=options.memory_budget)
    times.append(time.process_time())
    solution, _, info = selective(Contrast(space, wanted, wanted == 0), beta, "auto")
    combined_rows(pefs, solution[None], None, space.rows)
    times.append(time.process_time())
    found = solve(space, beta, None, "auto")
    combined_rows(pefs, space.coefficients(found.y)[None], None, space.rows)
    times.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    span, direction, edit = (b - a for a, b in itertools.pairwise(times))
    print(f"{n:,} examples × {c} rows × {d:,} numbers; {torch.get_num_threads()} threads")
    print(f"span: {span:.1f} s, {info['dimensions']} dimensions, {space.captured:.1%} of the rows")
    print(f"selective direction, ridge chosen: {direction:.1f} s; edit: {edit:.1f} s")
    print(f"memory beyond the rows, at most: {(peak - held) / 2**20:.2f} GiB")
    if options.beside:
        each = seconds_of_pefs(options.beside, c)
        print(f"PEFs of SmolLM2: {each:.2f} s an example, {each * n:,.0f} s for {n:,}")
        shares = [(span + seconds) / (each * n) for seconds in (direction, edit)]
        print("a direction takes {:.3f} of that, an edit {:.3f}".format(*shares))


if __name__ == "__main__":
    main()
