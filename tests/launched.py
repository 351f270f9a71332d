"""What a launcher (torchrun, accelerate) starts in a test: it leaves its environment and waits for its exit code.

`warm_processes.launched` runs the program in a process that has this environment and need not import anything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(folder: Path) -> int:
    """The exit code, once it is there; whoever ends the launcher ends this too."""
    rank = os.environ["RANK"]
    own = folder / f"environment-{rank}.part"
    own.write_text(json.dumps(dict(os.environ)), encoding="utf-8")
    own.rename(own.with_suffix(".json"))
    code = folder / f"code-{rank}"
    while not code.exists():
        time.sleep(0.02)
    return int(code.read_text())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
