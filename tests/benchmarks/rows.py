"""PEF rows: time as a ratio to the floor, error of PEF inner products, examples a second and peak memory, side by side.

    python -m tests.benchmarks.rows [--models BERT-like GPT-2-like SmolLM2] [--rounds 5] [--keep]

The floor is 1 forward pass and c backward passes through the activations alone, over a batch of `cases`. Rows are the
same passes with every map's rows collected and sketched; a whole pass adds what chooses the cotangents, scales the rows
and reads predictions. Everything takes its turn in one process on one thread; a ratio is the median over rounds of the
ratio of processor times in the same round. The error is that of off-diagonal inner products of unit-norm PEFs against
unsketched rows, the median over five seeds of our sketches and three of the others. Memory is the largest RssAnon above
what is held before, in a process of its own, one pass.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tests.benchmarks.cases import DIM, MODELS, SKETCHES, Case, case, smollm2
from tests.benchmarks.measure import in_turn, keep, kept, machine, ratio
from tests.benchmarks.memory import Peak
from tests.benchmarks.ways import Way, Ways, all_ways, floor

WHOLE = ", whole pass"


def peak_of(name: str, label: str, ways: Ways) -> float:
    """MiB that one pass takes above what is held before it, in a forked process; no backward pass may have run here."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        sketch = label.removesuffix(WHOLE)
        with case(name, [sketch] if sketch in SKETCHES else ["kronecker 16"]) as found:
            way = (ways(found) | {"floor": Way(floor(found.model, found.run))})[label]
            ctypes.CDLL(None).malloc_trim(0)
            try:
                with Peak() as peak:
                    way.rows()
                sender.send(peak.largest - peak.before)
            except Exception:
                sender.send(float("nan"))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return float("nan")
    finally:
        process.join()


def memory_of(names: Sequence[str], ways: Ways, labels: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """{model: {label: MiB}}, printed; before any backward pass in this process, which is forked."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        if name == "SmolLM2":
            smollm2()
        peaks = {label: peak_of(name, label, ways) for label in ("floor", *labels[name])}
        found[name] = {label: mib for label, mib in peaks.items() if mib == mib}  # a way that fails has none
        print(f"{name}, MiB of a pass: " + ", ".join(f"{k} {v:.0f}" for k, v in found[name].items()), flush=True)
    return found


def errors_of(ways: Mapping[str, Way]) -> tuple[dict[str, Way], dict[str, Any]]:
    """The ways that work, and {label: figures}: the error of each, or why it fails."""
    fine, found = {}, {}
    for label, way in ways.items():
        try:
            way.rows()
            errors = [way.error(seed) for seed in range(way.seeds)] if way.error else None
        except Exception as failure:  # what a library cannot do is a row of the table
            found[label] = {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]}
            print(f"  {label:32} {found[label]['failed']}", flush=True)
            continue
        fine[label] = way
        found[label] = {"error": statistics.median(errors) if errors else None, "covers": way.covers}
    return fine, found


def timed(case: Case, ways: Ways, rounds: int) -> dict[str, Any]:
    """{label: figures} of one model; ways that fail are kept with their error."""
    fine, found = errors_of(ways(case))
    times = in_turn({"floor": floor(case.model, case.run)} | {label: way.rows for label, way in fine.items()}, rounds)
    floor_s = statistics.median(times["floor"])
    B = len(case.examples)
    print(f"{case.name}: floor {1000 * floor_s:.0f} ms for {B} examples, auto takes {case.chosen}")
    for label, way in fine.items():
        over = sorted(a / b / way.examples for a, b in zip(times[label], times["floor"], strict=True))
        if way.fixed:
            fixed = ratio(times, way.fixed, "floor") / fine[way.fixed].examples
            over = [fixed + (one - fixed) / way.share for one in over]
        middle = statistics.median(over)
        found[label] |= {"ratio": middle, "rate": B / floor_s / middle, "range": [over[0], over[-1]]}
        error = found[label]["error"]
        shown = "" if error is None else f"error {error:.3f}"
        covers = "" if way.covers == 1 else f"   covers {way.covers:.0%}"
        print(
            f"  {label:32} {middle:7.2f} × the floor ({over[0]:.2f} to {over[-1]:.2f})  "
            f"{found[label]['rate']:8.1f} examples a second  {shown}{covers}",
            flush=True,
        )
    return {"floor": floor_s, "rounds": rounds, "auto takes": case.chosen, "ways": found}


def run(script: str, ways: Ways, labels: Mapping[str, Sequence[str]], options: argparse.Namespace, **more: Any) -> None:
    """Memory, time and errors of the models that were asked for, kept where that was asked for."""
    torch.set_num_threads(1)
    print(machine())
    if options.part in ("memory", "both"):
        memory = memory_of(options.models, ways, labels)
        if options.keep:
            keep(script, {**kept(script), **more, "memory": kept(script).get("memory", {}) | memory})
    if options.part in ("time", "both"):
        for name in options.models:
            with case(name, [label for label in SKETCHES if label in labels[name]]) as found:
                figures = timed(found, ways, options.rounds)
            if options.keep:
                keep(script, {**kept(script), **more, "models": kept(script).get("models", {}) | {name: figures}})


def arguments(description: str) -> argparse.ArgumentParser:
    """What this script and that of the peers share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=("memory", "time", "both"), default="both")
    parser.add_argument("--keep", action="store_true", help="keep the figures for the page")
    return parser


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    own = [*SKETCHES, f"kronecker 16{WHOLE}", f"auto{WHOLE}"]
    others = ["torch.func, no sketch", f"torch.func + countsketch {DIM}", f"torch.func + dense signs {DIM}"]
    labels = {name: own[:-1] if name == "SmolLM2" else own + others for name in options.models}
    run("rows", all_ways, labels, options)


if __name__ == "__main__":
    main()
