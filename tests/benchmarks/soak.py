"""Compute, decompose, lift, apply, over and over on a tiny model: nothing may grow. Linux only.

python -m tests.benchmarks.soak --rounds 200
"""

from __future__ import annotations

import argparse
import logging

import torch

from tests.rounds import soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    logging.getLogger("hf_npeff").setLevel(logging.ERROR)  # of the rough sketch
    found = soak(parser.parse_args().rounds)
    print(f"{'':>16} {'first':>10} {'last':>10} {'most':>10}")
    for name in found[0]:
        values = [one[name] for one in found]
        print(f"{name:>16} {values[0]:>10,} {values[-1]:>10,} {max(values):>10,}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
