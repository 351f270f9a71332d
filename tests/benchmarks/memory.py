"""Peak memory of computing PEFs and of an out-of-core fit, for 1,000 and for 20,000 examples.

    python -m tests.benchmarks.memory [--small 1000] [--large 20000]

Each runs in a process of its own. Two peaks are given: all memory (VmHWM), which counts pages of the memory-mapped
store that the system keeps because nobody needs the room, and the process's own (sampled RssAnon), which cannot be
taken back. The own peak is the one that decides whether a run fits; it should be flat.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
TEXTS = 32


def status(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1024 if found else float("nan")


class Peak:
    """The largest RssAnon in MiB, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.before = self.largest = status("RssAnon")
        self.done = False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done:
            self.largest = max(self.largest, status("RssAnon"))
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()


def compute(folder: Path, n: int) -> None:
    import datasets
    import torch
    import transformers

    from hf_npeff import FisherConfig, NPEFFAnalyzer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(5, 512, (n, TEXTS), generator=torch.Generator().manual_seed(0))
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    fisher = FisherConfig(rank=1, sketch="kronecker", sketch_dim=16)
    with Peak() as peak:
        pefs = NPEFFAnalyzer(model, fisher=fisher).compute_pefs(data, folder, batch_size=64, shard_size=512)
    report(peak, n, pefs.nbytes)


def fit(folder: Path, n: int) -> None:
    import torch

    from hf_npeff import NPEFF, PEFs

    torch.set_num_threads(1)
    if not (folder / "config.json").exists():
        G = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
        parts = []
        for start in range(0, n, 500):
            generator = torch.Generator().manual_seed(start)
            parts.append(PEFs.from_factors(
                G[torch.randint(0, 16, (500, 2), generator=generator)] + torch.randn(500, 2, 512, generator=generator)
            ))  # fmt: skip
        PEFs.concatenate(parts).save(folder)
        return
    pefs = PEFs.load(folder, verify=False)
    with Peak() as peak:
        NPEFF(8, n_restarts=1, max_iterations=4, memory_budget=2**20).fit(pefs)
    report(peak, n, pefs.nbytes)


def report(peak: Peak, n: int, nbytes: int) -> None:
    own = peak.largest - peak.before
    print(json.dumps({"n": n, "own": own, "all own": peak.largest, "all": status("VmHWM"), "rows": nbytes / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=20_000)
    parser.add_argument("--run", nargs=3, metavar=("WHAT", "FOLDER", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        what, folder, n = options.run
        {"compute": compute, "fit": fit}[what](Path(folder), int(n))
        return
    for what in ("compute", "fit"):
        peaks = []
        for n in (options.small, options.large):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.memory",
                    "--run",
                    what,
                    str(Path(folder) / "pefs"),
                    str(n),
                ]
                if what == "fit":
                    subprocess.run(command, check=True)
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks.append(json.loads(out.splitlines()[-1]))
        for peak in peaks:
            print(
                f"{what:8} n = {peak['n']:6,}: {peak['all own']:6.0f} MiB of its own at the peak, {peak['own']:5.0f} "
                f"of them since the start; {peak['all']:6.0f} MiB with mapped files; rows {peak['rows']:6.1f} MiB"
            )
        own, everything = (peaks[1][key] / peaks[0][key] for key in ("all own", "all"))
        print(f"{what:8} ratio: own {own:.3f}, all {everything:.3f}")


if __name__ == "__main__":
    main()
