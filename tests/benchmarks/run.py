"""The benchmarks that docs/benchmarks.md is made of, in turn, and then the page: `make bench`.

    python -m tests.benchmarks.run              # under 20 minutes on 2 free cores; keeps every figure, renews the page
    python -m tests.benchmarks.run --quick      # under 2 minutes: the guard, against the figures that are kept

Each script compares things in the same process, or in fresh processes that take turns. None of them is part of
`make test`. `peers` runs in an environment of its own (`make bench-peers`), `gpu`, whole `fidelity` and `stability` of
SmolLM2 want a GPU, and `sketches`, `memory`, `page` and `soak` print figures of other pages of docs/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

SCRIPTS: list[tuple[str, ...]] = [
    ("sets",),
    ("startup", "--keep"),
    ("rows", "--keep"),
    ("fidelity", "--errors-only", "--keep"),
    ("fidelity", "--time-only", "--keep"),
    ("solver", "--keep"),
    ("stability", "--model", "MiniLM", "--keep"),
    ("scaling", "--keep"),
    ("lifting", "--keep"),
    ("stopping", "--keep"),
    ("guard", "--keep"),
    ("report",),
]


def run(name: str, *arguments: str) -> bool:
    """Whether the script ended well."""
    print(f"\n== {name}", flush=True)
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", *arguments], check=False)
    print(f"-- {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args().quick:
        return int(not run("guard"))
    failed = [name for name, *arguments in SCRIPTS if not run(name, *arguments)]
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
