"""The figures of docs/changes.md, from docs/studies/changes.json, which `tests.benchmarks.changes` keeps.

python -m tests.benchmarks.changes_page
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.changes import with_cue

_ROOT = Path(__file__).parents[2]
KEPT, PAGE = _ROOT / "docs" / "studies" / "changes.json", _ROOT / "docs" / "changes.md"
MARKS = {name: (f"<!-- {name}: from here", f"<!-- {name}: to here -->") for name in ("planted", "cue")}
"""Between these the page is written by this script."""
_GROUPS = ("misleads", "helps", "all")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seeds(rows: Mapping[str, Any]) -> str:
    numbers = sorted(map(int, rows))
    return f"--first {numbers[0]} --seeds {len(numbers)} --keep docs/studies/changes.json"


def planted(rows: Mapping[str, Any]) -> str:
    """Whether the changed words' components come first."""

    def count(of: str, what: str) -> str:
        return f"{sum(row[of][what] for row in rows.values())} of {len(rows)}"

    constructed = sum(row["first by cosine"] for row in rows.values())
    body = [
        ["a LoRA trained so that one word gets another class", "the first component is one of the word's",
         count("1 word", "first by KL")],
        ["the same for two words", "the first two are one of each word's", count("2 words", "first by KL")],
        ["the same for two words", "the components of both come before those of any other word",
         count("2 words", "of their examples")],
        ["a lifted component, with random weights of three times its norm on top",
         "that component has the largest cosine", f"{constructed} of {len(rows)}"],
    ]  # fmt: skip
    command = f"`python -m tests.benchmarks.changes planted {_seeds(rows)}`"
    return f"{command}\n\n{_table(['what was changed', 'what was found', 'seeds'], body)}"


def cue(rows: Mapping[str, Any]) -> str:
    """What is named first, and accuracy along the way."""
    ordered = sorted(rows.items(), key=lambda item: int(item[0]))
    named = sum(row["named"] for row in rows.values())
    body = [
        [seed, f"`{with_cue([{'text': '…', 'label': 0}], (1.0, 1.0), int(seed))[0]['text']}`",
         ", ".join(f"`{feature}`" for feature in row["first three"]) or "nothing", "yes" if row["named"] else "no"]
        for seed, row in ordered
    ]  # fmt: skip
    way = list(ordered[0][1]["curve"])
    means = {g: [sum(row["curve"][s][g] for row in rows.values()) / len(rows) for s in way] for g in _GROUPS}
    curve = [
        [seed, group, *(f"{row['curve'][step][group]:.3f}" for step in way)]
        for seed, row in ordered
        for group in _GROUPS
    ]
    curve += [["mean", group, *(f"{value:.3f}" for value in means[group])] for group in _GROUPS]
    best = max(range(len(way)), key=lambda k: means["all"][k])
    above = sum(max(row["curve"][s]["all"] for s in way[1:-1]) > row["curve"][way[-1]]["all"] for row in rows.values())
    return (
        f"`python -m tests.benchmarks.changes cue {_seeds(rows)}`: the cue is named in {named} of "
        f"{len(rows)} seeds.\n\n"
        f"{_table(['seed', 'cue', 'first three associations', 'named'], body)}\n\n"
        f"Accuracy on the same sentences, half of which have the cue, part of the way from before (0) to after (1). "
        f"In the mean it is highest at {way[best]} of the change ({means['all'][best]:.3f}, "
        f"against {means['all'][0]:.3f} before and {means['all'][-1]:.3f} after); "
        f"part of the change does better than all of it in {above} of {len(rows)} seeds.\n\n"
        f"{_table(['seed', 'where the cue', *way], curve)}"
    )


def page(text: str, figures: Mapping[str, Any]) -> str:
    """The page with the parts that are made from figures made again."""
    for name, make in (("planted", planted), ("cue", cue)):
        if name not in figures:
            continue
        begin, end = MARKS[name]
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}, `python -m tests.benchmarks.changes_page` -->\n{make(figures[name])}\n{end}{after}"
    return text


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), json.loads(KEPT.read_text(encoding="utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
