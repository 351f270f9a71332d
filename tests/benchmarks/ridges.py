"""The ridge that an edit chooses by cross-validation, against the best one on held-out texts, in the sketch.

    python -m tests.benchmarks.ridges --models runs/shortcut [--seeds 0 1 2]

Of the planted shortcut of examples/07_take_a_shortcut_out.py, whose classifiers are read from its output: the rows that
the given texts and the held-out ones have at the classifier's own weights. The error of a ridge is Σ‖A_i δ − t_i‖² over
Σ‖t_i‖² with the change δ that it gives on the given texts and the changes t_i that the held-out ones want.

Only the first model was measured (docs/shortcut.md), not all three seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_npeff import NPEFFAnalyzer, PEFs
from hf_npeff.weights.edits import Functionals, removal, solve
from hf_npeff.weights.log_odds import observe
from hf_npeff.weights.ridge import RIDGES
from hf_npeff.weights.row_space import row_space

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "07_take_a_shortcut_out.py"


def targets(analyzer: NPEFFAnalyzer, pefs: PEFs, rows: list[dict[str, Any]]) -> Tensor:
    """What the rows of an edit towards the highest are to be moved by: (n, c)."""
    examples = analyzer._examples_of_pefs(pefs, rows)
    with analyzer.forward_pass() as forward:
        seen = observe(forward, examples, [row["label"] for row in rows], 32, cotangents=True)
    assert seen.cotangents is not None and pefs.cotangents is not None
    wanted = removal("cue", "label", pefs.columns, seen.values, "highest")
    return Functionals.of(seen.cotangents, pefs.cotangents).targets(wanted.changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for seed in options.seeds:
        task = example.planted(seed)
        model, tokenizer = example.classifier(task, seed, options.models / f"model-planted-{seed}")
        analyzer = NPEFFAnalyzer(model, tokenizer)
        given = analyzer.compute_pefs(task.probes, progress=False)
        held_out = analyzer.compute_pefs(task.test, like=given, progress=False)
        t, truth = targets(analyzer, given, task.probes), targets(analyzer, held_out, task.test)
        space = row_space(given)
        X = space.coordinates(held_out)

        def error(ridge: Any, X: Tensor = X, t: Tensor = t, truth: Tensor = truth, space: Any = space) -> float:
            return float((X @ solve(space, t, None, ridge).y - truth).square().sum() / truth.square().sum())

        chosen = solve(space, t, None, "auto").info
        errors = {ridge: error(ridge) for ridge in RIDGES}
        best = min(errors, key=lambda ridge: errors[ridge])
        print(
            f"seed {seed}: auto {chosen['ridge']:.2g} with an error of {errors[chosen['ridge']]:.3f} on {len(truth)} "
            f"held-out texts ({chosen['cross_validated']:.3f} by cross-validation); the best, {best:.2g}, has "
            f"{errors[best]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
