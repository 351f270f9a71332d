"""The command that moves log-odds by a weight change, in closed form from stored PEFs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data
from hf_npeff.commands.options import (
    AdapterKind,
    Data,
    Keep,
    Model,
    Output,
    PEFsArgument,
    Result,
    command,
    table,
    write_result,
)
from hf_npeff.config import EditRequest


@command
def edit(
    pefs: PEFsArgument,
    model: Model,
    data: Data,
    output: Output,
    loading: ModelOptions,
    reading: DataOptions,
    editing: EditRequest,
    change: Annotated[
        Path | None, typer.Option(help="A JSON file: {example id: nats by which its log-odds should change}.")
    ] = None,
    outcome: Annotated[
        str | None,
        typer.Option(
            help="The outcome whose log-odds change: a class or token number, a class's name, a token, or a column."
        ),
    ] = None,
    keep: Keep = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter's matrices.")] = 4,
    kind: AdapterKind = "lora",
) -> Result:
    """Move log-odds by a weight change that leaves other examples alone, and write it as an adapter.

    The folder gets `direction`, `adapter` (which PEFT loads) and report.json. The data has to be that of the PEFs.

    Examples:
    - `hf-npeff edit runs/pefs user/classifier train.jsonl --remove cue -o runs/without-cue`
    - `hf-npeff edit runs/pefs user/scores train.jsonl --remove cue --given "" -o runs/edit` compares all examples
    - `hf-npeff edit runs/pefs gpt2 prompts.jsonl --change changes.json --outcome " Paris" -o runs/edit`
    """
    from rich.console import Group

    from hf_npeff.fisher.distributions import HALF_SQUARED
    from hf_npeff.pefs.store import PEFs

    fishers, dataset = PEFs.from_pretrained(pefs), read_data(data, reading)
    analyzer = analyzer_for(model, loading, fishers.config, reading)
    given: dict[str, Any] = vars(editing) | {
        "change": None if change is None else json.loads(change.read_text(encoding="utf-8")),
        "outcome": int(outcome) if outcome is not None and outcome.isdecimal() else outcome,
        "keep": None if keep is None else PEFs.from_pretrained(keep),
        "given": editing.given or None,
    }
    direction = analyzer.edit(fishers, dataset, **given)
    adapter = direction.to_adapter(rank, kind=kind, model=analyzer.model)
    direction.save_pretrained(output / "direction")
    adapter.save_pretrained(output / "adapter")
    report = {name: value for name, value in direction.info.items() if name not in ("versions", "label_names")}
    write_result(output / "report.json", report)
    kept = adapter.retained_energy
    rows = [
        [name, str(each["examples"]), *(f"{each[column]:+.3f}" for column in ("wanted", "predicted", "realised"))]
        for name, each in direction.info["changes"].items()
    ]
    reached = direction.info["reached"]
    title = (
        f"in {output}: mean change of the log-odds of {direction.info['outcome']}, in nats; {reached:.0%} of what was "
        f"wanted is realised; the adapter keeps {kept:.0%} of the change"
    )
    headers = ("", "examples", "wanted", "predicted", "realised")
    values = {"output": str(output), "retained_energy": kept, "loads_in": adapter.loads_in, **report}
    numbers = "flips" not in direction.info  # which all move
    moved = ("", HALF_SQUARED if numbers else "mean KL, nats", *(() if numbers else ("answers changed",)))
    shown = Group(table(title, headers, rows), table("how far predictions moved", moved, _moved(direction.info)))
    return Result(values, shown, {"revision": analyzer.revision})


def _moved(info: Mapping[str, Any]) -> list[list[str]]:
    """A row for the examples that should change, for the rest of their predictions, and for those that should not.

    Args:
        info: of an edit. It has no shares of changed answers for a regression, and nothing on others if there are none.
    """
    named = (
        ("examples that should change", "kl", "flips"),
        ("of this, beside the outcome", "kl_beside", ""),
        ("examples that should stay the same", "kl_of_others", "flips_of_others"),
    )
    rows = [[name, f"{info[kl]:.3g}", f"{info[flips]:.0%}" if flips in info else ""]
            for name, kl, flips in named if kl in info]  # fmt: skip
    return rows if "flips" in info else [row[:2] for row in rows]
