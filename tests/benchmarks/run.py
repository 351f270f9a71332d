"""Every benchmark in turn: `make bench`. `--quick` leaves out those that load a real model or take minutes.

Each script prints ratios of things measured in the same process; none of them is part of `make test`.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
QUICK = {"rows": ["--rounds", "3"]}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    scripts = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "run"))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    )
    failed = []
    for name in [s for s in scripts if s in QUICK] if quick else scripts:
        print(f"\n== {name}", flush=True)
        arguments = QUICK[name] if quick else []
        if subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", *arguments], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
