"""docs/models.md's table and the README's count, from the results of a whole sweep. `python -m tests.sweep.table`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.sweep.judge import ALONE, OUTCOMES, RIGHT, UNBUILT
from tests.sweep.tiny_models import TASKS

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).with_name("results.jsonl")
"""What the last whole sweep found, cut down to what the table says."""
MARK = "<!-- sweep -->"
_WORDS = 220
"""Letters of an error's message in the table: the module and what to do are in them."""
_COVERED = 0.9
"""Share of the parameters outside the embeddings, below which a type is listed as covered in part."""

Results = Mapping[tuple[str, str], Mapping[str, Any]]


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """{(model type, task): result} of a file of results; a line that was cut off is left out."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        results[result["type"], result["task"]] = result
    return results


def keep(results: Results, path: Path = KEPT) -> None:
    """Write what the table needs of the results, sorted."""
    lines = []
    for (model_type, task), result in sorted(results.items()):
        short = {"type": model_type, "task": task, "outcome": result["outcome"], "transformers": result["transformers"]}
        if "coverage" in result:
            short["coverage"] = round(result["coverage"], 3)
        if result["outcome"] == ALONE:
            short["message"] = next((w for w in result["warnings"] if "one example at a time" in w), "")[:_WORDS]
        elif result["outcome"] != RIGHT:
            short["message"] = result.get("message", "")[:_WORDS]
        lines.append(json.dumps(short, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n")


def counts(results: Results) -> str:
    """Tasks × outcomes."""
    lines = ["| task | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for task in TASKS:
        number = Counter(r["outcome"] for (_, t), r in results.items() if t == task)
        lines.append(f"| {task} | " + " | ".join(str(number[o]) for o in OUTCOMES) + " |")
    every = Counter(r["outcome"] for r in results.values())
    return "\n".join([*lines, "| all | " + " | ".join(str(every[o]) for o in OUTCOMES) + " |"])


def page(results: Results) -> str:
    """What stands between the marks of docs/models.md."""
    version = next(iter(results.values()))["transformers"]
    types = len({t for t, _ in results})
    parts = [
        f"transformers {version}: {types} model types, {len(results)} models.",
        counts(results),
        "**Right**, " + "; ".join(f"{task}: {', '.join(_types(results, task, RIGHT))}" for task in TASKS) + ".",
    ]
    for outcome in OUTCOMES[1:]:
        if rows := [(key, r) for key, r in sorted(results.items()) if r["outcome"] == outcome]:
            parts.append(f"**{outcome.capitalize()}**\n\n| type | task | why |\n|---|---|---|")
            parts[-1] += "".join(f"\n| {t} | {task} | {_cell(r.get('message', ''))} |" for (t, task), r in rows)
    covered = [(t, task, r["coverage"]) for (t, task), r in sorted(results.items()) if "coverage" in r]
    partly = [f"{t} ({task}) {share:.0%}" for t, task, share in covered if share < _COVERED]
    parts.append(
        "**Covered in part**: tiny models, whose biases, norms and convolutions weigh more than a real model's; "
        f"{'; '.join(partly)}."
    )
    return "\n\n".join(parts)


def sentence(results: Results) -> str:
    """The README's."""
    number = Counter(r["outcome"] for r in results.values())
    run = len(results) - number[UNBUILT]
    types = len({t for (t, _), r in results.items() if r["outcome"] != UNBUILT})
    others = ", ".join(f"{number[o]} {o}" for o in OUTCOMES[2:-1] if number[o])
    return (
        f"All model types of transformers {next(iter(results.values()))['transformers']} for seven tasks "
        f"are swept, tiny and random: of {run} models of {types} types that can be built, {number[RIGHT]} are right in "
        f"padded batches and {number[ALONE]} right one example at a time, with a warning; {others} "
        "([the table](docs/models.md#every-model-type))."
    )


def _types(results: Results, task: str, outcome: str) -> list[str]:
    return [t for (t, its), r in sorted(results.items()) if its == task and r["outcome"] == outcome]


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("*", "\\*")


def between(text: str, new: str) -> str:
    """A page with what stands between its marks replaced."""
    before, _, after = text.split(MARK)
    return f"{before}{MARK}\n{new}\n{MARK}{after}"


def main(arguments: Sequence[str]) -> None:
    """Take over results, where a file is named, and write the pages."""
    if arguments:
        keep(read(Path(arguments[0])))
    results = read(KEPT)
    for name, new in (("docs/models.md", page(results)), ("README.md", sentence(results))):
        path = ROOT / name
        path.write_text(between(path.read_text(), new))


if __name__ == "__main__":
    main(sys.argv[1:])
