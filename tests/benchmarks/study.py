"""Everything that docs/studies.md shows, in one command: `make study`.

Every study keeps its finished parts in `docs/studies/NAME/parts`, so a run that was interrupted goes on there, and a
run after which nothing changed ends within a minute. Two studies run at a time, each on one thread. Two of them are of
a language model under thousands of prompts and need a GPU; without one their tables and figures are drawn again from
the results that are kept in git.

    make study                                     # everything
    make study ARGS="--only planted mechanisms"    # some of it
    make study ARGS="--data first_names"           # one data set of the comparison and of the fair readings
    make study ARGS="--list"                       # what is done and what is left, with minutes; nothing is run

At the end docs/studies/seconds.json is written: processor seconds of every part that this machine has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STUDIES = Path("docs/studies")
SECONDS = STUDIES / "seconds.json"
NAMES = (
    "comparison",
    "mechanisms",
    "modular_addition",
    "minimal_pairs",
    "planted",
    "ratings",
    "whitening",
    "in_context",
    "ablations",
)
_PAIRS = ("planted_cues", "home_assistant", "word_relations")
_REAL = ("human_rights", "home_assistant", "first_names")
"""Data sets of the comparison and of the fair readings. Each is a job of its own; the longest is first."""
_COMPARISON = Path("examples/04_fine_tune_and_compare.py")


def parts_of_studies(folder: Path) -> dict[str, dict[str, Mapping[str, Any] | None]]:
    """{study: {part: its settings}} of every study that is made of parts, docs/studies/NAME/parts/PART.json.

    Ridges of whitening are chosen in its first part; while that is missing, the settings of its others are None.

    Args:
        folder: of the studies.
    """
    from hf_npeff.studies import mechanisms, pair_study, planted
    from hf_npeff.studies.parts import read_part
    from hf_npeff.studies.rival_settings import MinimalPairsConfig
    from hf_npeff.studies.settings import MechanismsConfig
    from tests.benchmarks import modular_addition, rated, whitening

    example = _module(_COMPARISON)
    toys, pairs = MechanismsConfig(), MinimalPairsConfig()
    first = f"planted_cues-{whitening.TUNED_ON}"
    tuning = whitening.part_settings("planted cues", whitening.TUNED_ON, whitening.ALL_RIDGES)
    tuned = read_part(folder / "whitening" / "parts", first, tuning)
    ridges = None if tuned is None else whitening.best_ridges(tuned)
    left = [*(("planted cues", seed) for seed in whitening.SEEDS), ("first names", 0)]
    return {
        "comparison": dict.fromkeys(_REAL, example.part_settings("comparison")),
        "fair": dict.fromkeys(_REAL, example.part_settings("fair")),
        "mechanisms": {
            **{f"{toy}-{s}": mechanisms.toy_settings(toys, toy, s) for toy in toys.names for s in range(toys.seeds)},
            **{f"induction-{s}": mechanisms.induction_settings(toys, s) for s in range(toys.induction_seeds)},
            **{f"modular_addition-{s}": modular_addition.part_settings(s) for s in modular_addition.SEEDS},
        },
        "minimal_pairs": {
            f"{data}-{seed}{'' if trained else '-untrained'}": pair_study.part_settings(pairs, data, seed, trained)
            for data in _PAIRS
            for seed, trained in (*((seed, True) for seed in range(pairs.seeds)), (0, False))
        },
        "planted": {f"seed-{seed}": planted.part_settings(seed) for seed in planted.SEEDS},
        "ratings": {
            f"{group.replace(' ', '_')}-0": rated.part_settings(0, group) for group in ("trained", "random weights")
        },
        "whitening": {first: tuning} | {
            f"{data.replace(' ', '_')}-{seed}": None if ridges is None else whitening.part_settings(data, seed, ridges)
            for data, seed in left
        },
    }  # fmt: skip


def _module(path: Path) -> Any:
    """An example, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its data classes look for their annotations
    spec.loader.exec_module(module)
    return module


def ours(*arguments: str) -> list[str]:
    """The command `hf-npeff study`, in this interpreter."""
    return [sys.executable, "-m", "hf_npeff", "study", *arguments]


def commands(name: str, further: Sequence[str], gpu: bool) -> list[list[str]]:
    """What makes one study; its output is docs/studies/NAME.

    Args:
        name: of `NAMES`.
        further: arguments of the comparison's command.
        gpu: whether there is one.
    """
    output = ["-o", str(STUDIES / name)]
    if name == "comparison":
        places = ["--output", str(STUDIES / "comparison"), "--fair-output", str(STUDIES / "fair")]
        return [[sys.executable, str(_COMPARISON), *places, *further]]
    if name in ("modular_addition", "ratings", "whitening"):
        return [[sys.executable, "-m", f"tests.benchmarks.{'rated' if name == 'ratings' else name}"]]
    if name == "minimal_pairs":
        return [ours(name, *(word for each in _PAIRS for word in ("--data", each)), *output)]
    if name in ("mechanisms", "planted"):
        return [ours(name, *output)]
    if not gpu:
        return [[sys.executable, "-m", "tests.benchmarks.study", "--redraw", name]]
    if name == "in_context":
        return [ours(name, "--queries", "20", "--rank", "4", "--device-map", "cuda", *output)]
    model, prompts = (str(Path("runs/study") / each) for each in ("model", "prompts.jsonl"))
    grid = ["--grid", str(STUDIES / "ablations" / "grid.yaml"), "--attributes", "relation"]
    return [
        [sys.executable, "-m", "tests.benchmarks.study", "--save-demo", "runs/study"],
        ours(name, model, prompts, *grid, "--device-map", "cuda", "--batch-size", "32", *output),
    ]


def redraw(name: str, folder: Path = STUDIES) -> None:
    """Table and figure of a study from its kept result.json.

    Raises:
        ValueError: if the study is not one that can be read from a file.
    """
    from hf_npeff.studies.ablations import AblationsResult
    from hf_npeff.studies.in_context import InContextResult
    from hf_npeff.studies.planted import PlantedResult

    readers = {"ablations": AblationsResult, "in_context": InContextResult, "planted": PlantedResult}
    if name not in readers:
        raise ValueError(f"{name} cannot be drawn from a file; {', '.join(readers)} can")
    path = folder / name
    values = json.loads((path / "result.json").read_text(encoding="utf-8"))
    readers[name].from_dict(values).write(path)
    print(f"{name}: drawn again from {path}/result.json; making it anew needs a GPU", flush=True)


def save_demo(folder: Path) -> None:
    """The demo's language model as a folder, and the prompts of the ablations."""
    from hf_npeff.demo import load_model
    from hf_npeff.studies.word_relations import word_relation_prompts

    for part in load_model():
        part.save_pretrained(folder / "model")
    rows = word_relation_prompts(32)  # of every relation, as docs/studies.md says
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def seconds_of_parts(folder: Path = STUDIES) -> dict[str, dict[str, float]]:
    """{study: {part: processor seconds}} of the parts that are here and know it."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*/parts/*.json")):
        taken = json.loads(path.read_text(encoding="utf-8")).get("processor seconds")
        if taken is not None:
            found.setdefault(path.parts[-3], {})[path.stem] = taken
    return found


def minutes(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """How long everything takes, study by study, as docs/studies.md says it."""
    totals = {name: sum(parts.values()) / 60 for name, parts in seconds.items()}
    each = ", ".join(f"{name.replace('_', ' ')} {total:.0f}" for name, total in totals.items())
    return f"{sum(totals.values()):.0f} minutes of one core ({each})"


def listing(folder: Path, kept: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each study: which parts are here and which are left, and their processor minutes as far as known.

    A part of other settings is left, because the next run makes it anew.

    Args:
        folder: of the studies.
        kept: {study: {part: processor seconds}} of parts that were made here or elsewhere.
    """
    from hf_npeff.studies.parts import read_part

    lines, total, unknown = [], 0.0, 0
    for name, parts in parts_of_studies(folder).items():
        here = folder / name / "parts"
        left = [part for part, made in parts.items() if made is None or read_part(here, part, made) is None]
        known = [kept[name][part] for part in left if part in kept.get(name, {})]
        total, unknown = total + sum(known), unknown + len(left) - len(known)
        line = f"{name.replace('_', ' ')}: {len(parts) - len(left)} of {len(parts)} parts are done"
        said = [f"{part}, of other settings" if (here / f"{part}.json").is_file() else part for part in left]
        lines.append(f"{line}; left: {'; '.join(said)} ({_minutes(known, len(left))})" if left else line)
    return "\n".join([*lines, f"left in all: {_minutes([total], 1 + unknown)}"])


def _minutes(known: Sequence[float], parts: int) -> str:
    more = f" and {parts - len(known)} of unknown length" if parts > len(known) else ""
    return f"{sum(known) / 60:.1f} minutes of one core{more}"


def run(several: Sequence[Sequence[str]]) -> None:
    """Run commands one after another, each on one thread.

    Raises:
        CalledProcessError: if one fails.
    """
    for command in several:
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    """Run the studies that are asked for, and note how long their parts took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=NAMES)
    parser.add_argument("--data", nargs="*", default=[], help="data sets of the comparison, which alone is run then")
    parser.add_argument(
        "--what", nargs="*", default=[], help="comparison or fair; the comparison's command alone is run"
    )
    parser.add_argument("--workers", type=int, default=2, help="studies at a time, each on one thread")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and run nothing")
    parser.add_argument("--redraw", help=argparse.SUPPRESS)
    parser.add_argument("--save-demo", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.redraw:
        redraw(given.redraw)
        return
    if given.save_demo:
        save_demo(given.save_demo)
        return
    kept = json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.is_file() else {}
    if given.list:
        print(listing(STUDIES, kept))
        return
    import torch

    gpu = torch.cuda.is_available()
    passed = {"--data": given.data, "--what": given.what}
    further = [word for option, values in passed.items() if values for word in (option, *values)]
    names = given.only or (("comparison",) if further else NAMES)
    jobs = {name: commands(name, further, gpu) for name in names}
    last = jobs.pop("comparison", []) if not given.data else []  # its page is of all data sets
    first = [commands("comparison", [*further, "--data", data], gpu) for data in _REAL] if last else []
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(run, [*first, *jobs.values()]))
    run(last)
    for name, parts in seconds_of_parts().items():
        kept[name] = {**kept.get(name, {}), **parts}
    SECONDS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(minutes(kept), flush=True)


if __name__ == "__main__":
    main()
