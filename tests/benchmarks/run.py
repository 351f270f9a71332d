"""The benchmarks that docs/benchmarks.md is made of, in turn, and then the page: `make bench`.

    python -m tests.benchmarks.run              # under 20 minutes on 2 free cores; keeps every figure, renews the page
    python -m tests.benchmarks.run --quick      # under 2 minutes: the guard, against the figures that are kept

Each script compares things in the same process, or in fresh processes that take turns. None of them is part of
`make test`. `peers` runs in an environment of its own (`make bench-peers`), `gpu`, whole `fidelity` and `stability` of
SmolLM2 want a GPU, `fidelity --metric-only` takes minutes for one table, and `sketches`, `memory`, `page` and `soak`
print figures of other pages of docs/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

SCRIPTS: list[tuple[str, ...]] = [
    ("sets",),
    ("startup", "--keep"),
    ("rows", "--models", "BERT-like", "GPT-2-like", "--keep"),  # SmolLM2 is in `peers`
    ("fidelity", "--errors-only", "--keep"),
    ("fidelity", "--time-only", "--keep"),
    ("solver", "--keep"),
    ("stability", "--model", "MiniLM", "--keep"),
    ("scaling", "--keep"),
    ("large_fit", "--keep"),
    ("lifting", "--keep"),
    ("low_rank", "--models", "MiniLM", "--keep"),  # SmolLM2 takes half an hour
    ("stopping", "--keep"),
    ("guard", "--keep"),
    ("report",),
]


def run(name: str, *arguments: str) -> tuple[bool, float]:
    """Whether the script ended well, and its seconds."""
    print(f"\n== {' '.join([name, *arguments])}", flush=True)
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", *arguments], check=False)
    return done.returncode == 0, time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args().quick:
        return int(not run("guard")[0])
    ended = {" ".join(script): run(*script) for script in SCRIPTS}
    print()
    for script, (well, seconds) in ended.items():
        print(f"{script:32} {seconds:5.0f} s{'' if well else '   FAILED'}")
    print(f"{'all':32} {sum(seconds for _, seconds in ended.values()):5.0f} s")
    return int(not all(well for well, _ in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
