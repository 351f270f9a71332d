"""How long solving for weight changes takes, and how much memory, beside the rows that it starts from.

    python -m tests.benchmarks.solving [--examples 2000] [--rank 8] [--dim 16384] [--memory-budget BYTES]

Rows are drawn with a decaying spectrum, since solving does not depend on where they come from. Divide the seconds by
those that PEFs of as many examples take on the same machine: a tenth is the bar.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from hf_npeff import PEFs
from hf_npeff.weights.edits import solve
from hf_npeff.weights.row_space import row_space
from hf_npeff.weights.selective import Contrast, selective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dim", type=int, default=16_384)
    parser.add_argument("--memory-budget", type=int)
    options = parser.parse_args()
    n, c, d = options.examples, options.rank, options.dim
    generator = torch.Generator().manual_seed(0)
    inner = 600  # dimensions with a spectrum of their own, above noise: as of 224 prompts of SmolLM2
    spectrum = torch.arange(1, inner + 1).pow(-0.7)
    rows = (torch.randn(n * c, inner, generator=generator) * spectrum) @ torch.randn(inner, d, generator=generator)
    rows += 0.05 * torch.randn(n * c, d, generator=generator) * rows.std()
    pefs = PEFs.from_factors(rows.view(n, c, d))
    del rows
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wanted = torch.zeros(n, dtype=torch.float64)
    wanted[: n // 8] = 1
    beta = torch.randn(n, c, generator=generator, dtype=torch.float64) * wanted[:, None]
    started = time.perf_counter()
    space = row_space(pefs, inside=beta[None], memory_budget=options.memory_budget)
    spanned = time.perf_counter()
    _, _, info = selective(Contrast(space, wanted, wanted == 0), beta, "auto")
    whitened = time.perf_counter()
    solve(space, beta, None, "auto")
    solved = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{n:,} examples × {c} rows × {d:,} numbers; {torch.get_num_threads()} threads")
    print(f"span: {spanned - started:.1f} s, {info['dimensions']} dimensions, {space.captured:.1%} of the rows")
    print(f"selective direction, ridge chosen: {whitened - spanned:.1f} s; edit: {solved - whitened:.1f} s")
    print(f"memory beyond the rows, at most: {(peak - held) / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
