"""Import time, start-up of the command line, and the size of the wheel.

    python -m tests.benchmarks.startup [--keep]

Every command is a fresh process; ratios are to `python -c pass` in the same round, medians of five. `import torch` and
`import transformers` are given for scale.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tests.benchmarks.measure import in_turn, keep, machine, ratio

ROUNDS = 5
COMMANDS = {
    "python -c pass": "pass",
    "import hf_npeff": "import hf_npeff",
    "hf-npeff --help": "import sys; sys.argv[1:] = ['--help']; from hf_npeff.cli import main; main()",
    "hf-npeff decompose --help": (
        "import sys; sys.argv[1:] = ['decompose', '--help']; from hf_npeff.cli import main; main()"
    ),
    "import torch": "import torch",
    "import torch, transformers": "import torch, transformers",
    "from hf_npeff import NPEFFAnalyzer": "from hf_npeff import NPEFFAnalyzer",
}


def imports_torch(code: str) -> bool:
    """Whether torch is loaded once the code has run."""
    watched = (
        f"import atexit, sys; atexit.register(lambda: sys.stderr.write(f'torch={{\"torch\" in sys.modules}}'))\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, check=False)
    return "torch=True" in done.stderr


def wheel() -> dict[str, float]:
    """KiB of the wheel and its files; empty where it cannot be built."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, "."]
        if subprocess.run(command, check=False).returncode:
            return {}
        path = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(path) as archive:
            sizes = [item.file_size for item in archive.infolist()]
        return {"KiB": path.stat().st_size / 1024, "files": len(sizes), "unpacked KiB": sum(sizes) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    options = parser.parse_args()
    print(machine())

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    times = in_turn({name: lambda code=code: run(code) for name, code in COMMANDS.items()}, ROUNDS, time.perf_counter)  # type: ignore[misc]
    figures = {}
    for name, code in COMMANDS.items():
        figures[name] = {
            "ratio": ratio(times, name, "python -c pass"),
            "of torch": ratio(times, name, "import torch"),
            "seconds": statistics.median(times[name]),
            "torch": imports_torch(code),
        }
        found = figures[name]
        print(
            f"{name:36} {found['ratio']:6.1f} × python -c pass, {found['of torch']:.2f} × import torch "
            f"({1000 * found['seconds']:.0f} ms){', loads torch' if found['torch'] else ''}",
            flush=True,
        )
    size = wheel()
    if size:
        print(f"wheel: {size['KiB']:.0f} KiB, {size['files']} files of {size['unpacked KiB']:.0f} KiB in all")
    if options.keep:
        keep("startup", {"commands": figures, "wheel": size})


if __name__ == "__main__":
    main()
