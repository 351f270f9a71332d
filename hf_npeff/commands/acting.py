"""The command that moves the weights along a component, measures the step, and writes an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data, read_decomposition
from hf_npeff.commands.options import (
    AdapterKind,
    Data,
    DecompositionArgument,
    Keep,
    Model,
    Output,
    PEFsArgument,
    Result,
    command,
    table,
    write_result,
)
from hf_npeff.config import LiftRequest, PerturbationRequest

if TYPE_CHECKING:
    from hf_npeff.analyzer import NPEFFAnalyzer
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.pefs.store import PEFs
    from hf_npeff.weights.adapters import Adapter
    from hf_npeff.weights.perturbation import PerturbationReport

RANK = 4
"""The default rank of the adapters of --all, the same as in `lift_adapters`."""
_LIFTED_AT_ONCE = (
    "form", "semi_orthogonal", "top_examples", "selective", "ridge", "memory_budget", "batch_size", "check_weights",
)  # fmt: skip
"""Settings of lifting that `lift_adapters` takes too; `method` is always exact there."""

_Component = Annotated[int | None, typer.Option(help="Component number.")]
_Everything = Annotated[
    bool,
    typer.Option("--all", help="All components at once, from one pass over the data, each in a folder of its own."),
]
_Rank = Annotated[int | None, typer.Option(help="Rank of the adapter's matrices; 1 by default, and 4 with --all.")]
_Spare = Annotated[
    bool,
    typer.Option(
        "--spare",
        help="Also leave the layers' outputs on the other examples alone, and cut to the adapter's rank for that.",
    ),
]
_Eval = Annotated[
    str | None, typer.Option("--eval", help="Other data, which was not analysed; the step is measured on it too.")
]
_By = Annotated[
    str | None, typer.Option(help="Column of the --eval data; examples with the same value are measured as a group.")
]


@command
def perturb(
    decomposition: DecompositionArgument,
    pefs: PEFsArgument,
    model: Model,
    data: Data,
    output: Output,
    loading: ModelOptions,
    reading: DataOptions,
    lifting: LiftRequest,
    measuring: PerturbationRequest,
    component: _Component = None,
    everything: _Everything = False,
    rank: _Rank = None,
    kind: AdapterKind = "lora",
    keep: Keep = None,
    spare: _Spare = False,
    evaluate_on: _Eval = None,
    by: _By = None,
) -> Result:
    """Switch a component off: lift it to the weights, measure the step, and write it as an adapter.

    The folder gets `direction`, `adapter` (which PEFT loads) and report.json. With --all it gets a folder component-N
    for each component, which PEFT loads, adapters.json and a card. PEFs and data have to be those of the decomposition.

    Examples:
    - `hf-npeff perturb runs/components runs/pefs distilbert/distilgpt2 prompts.txt --component 3 -o runs/off-3`
    - `hf-npeff perturb runs/components runs/pefs org/model a.jsonl --component 3 --spare --search-rounds 8 -o runs/off`
    - `hf-npeff perturb runs/components runs/pefs org/model a.jsonl --all -o runs/adapters`
    """
    if everything == (component is not None):
        raise ValueError(f"give either --component with a number, or --all{_missing(decomposition)}")
    if component is None:
        alone = {"--kind": kind != "lora", "--spare": spare, "--eval": evaluate_on is not None, "--by": by is not None}
        if given := [name for name, is_given in alone.items() if is_given]:
            raise ValueError(f"{given[0]} is for a single component: use it with --component, not with --all")
    if by is not None and evaluate_on is None:
        raise ValueError("--by names a column of the data of --eval: give --eval too")
    held_out = None if evaluate_on is None else read_data(evaluate_on, reading)
    opened = _opened(decomposition, pefs, model, data, loading, reading, keep)
    if component is None:
        return _all_perturbed(opened, output, lifting, measuring, RANK if rank is None else rank)
    component, rank = opened.decomposition.index_of(component), 1 if rank is None else rank
    analyzer, components, fishers, dataset, left_alone = opened
    direction = analyzer.lift(components, component, fishers, dataset, **vars(lifting) | {"keep": left_alone})
    if spare:
        cut, batch_size = rank if kind == "lora" else None, lifting.batch_size
        direction = analyzer.spare(direction, dataset, decomposition=components, rank=cut, batch_size=batch_size)
    report = analyzer.evaluate_direction(
        direction, components, component, dataset, **vars(measuring), held_out=held_out, by=by
    )
    about: dict[str, Any] = {"report": report, "decomposition": components}
    adapter = direction.to_adapter(rank, report.scale, kind=kind, model=analyzer.model, **about)
    direction.save_pretrained(output / "direction", **about)
    adapter.save_pretrained(output / "adapter")
    return _result_of(opened, report, adapter, output, evaluate_on)


def _missing(folder: str) -> str:
    """What an error adds where a folder does not exist; empty for what may be a repository on the Hub."""
    from hf_npeff.sharing.hub import is_hub_id, near_names, no_folder

    if Path(folder).is_dir() or (is_hub_id(folder) and not near_names(folder)):
        return ""
    return f"; {no_folder(folder)}"


class _Opened(NamedTuple):
    """Everything that lifting a component needs."""

    analyzer: NPEFFAnalyzer
    decomposition: Decomposition
    pefs: PEFs
    dataset: Any
    left_alone: PEFs | None


def _opened(
    decomposition: str, pefs: str, model: str, data: str, loading: ModelOptions, reading: DataOptions, keep: str | None
) -> _Opened:
    """The model, the decomposition, its PEFs and data, and the PEFs to leave alone."""
    from hf_npeff.pefs.store import PEFs

    components = read_decomposition(decomposition)
    fishers, dataset = PEFs.from_pretrained(pefs), read_data(data, reading)
    analyzer = analyzer_for(model, loading, components, reading)
    return _Opened(analyzer, components, fishers, dataset, None if keep is None else PEFs.from_pretrained(keep))


def _result_of(
    opened: _Opened, report: PerturbationReport, adapter: Adapter, output: Path, held_out: str | None
) -> Result:
    """The measurement of one component: written as report.json, and shown."""
    from rich.console import Group

    from hf_npeff.report.notebook import EFFECT_COLUMNS, MEASURE_COLUMNS, effect_rows, measure_rows

    write_result(output / "report.json", report.to_dict())
    kept = adapter.retained_energy
    values = {"output": str(output), "retained_energy": kept, "loads_in": adapter.loads_in, **report.to_dict()}
    label = opened.decomposition[report.component].label
    title = f"{label}: in {output}; the adapter keeps {kept:.0%} of the direction{_missed(report)}"
    shown: list[Any] = [table(title, EFFECT_COLUMNS, effect_rows(report))]
    if report.off_target is not None:
        shown.append(str(report.off_target))
    if report.held_out is not None:
        shown.append(table(f"On {held_out}", MEASURE_COLUMNS, measure_rows(report.held_out)))
    return Result(values, Group(*shown), {"revision": opened.analyzer.revision})


def _missed(report: PerturbationReport) -> str:
    """What a title adds where the longest step that is tried is too short."""
    if report.target is None or report.reached:
        return ""
    return f". The longest step that is tried does not reach the KL of {report.target:.3g} on its examples"


def _all_perturbed(
    opened: _Opened, output: Path, lifting: LiftRequest, measuring: PerturbationRequest, rank: int
) -> Result:
    """All components as adapters with the measured steps, each in a folder of its own."""
    from rich.console import Group

    from hf_npeff.report.notebook import EFFECT_COLUMNS, effect_rows
    from hf_npeff.weights.direction_folder import facts_of
    from hf_npeff.weights.gallery import save_gallery

    if lifting.method != "exact":
        raise ValueError(f"--all lifts with --method exact, not {lifting.method}")
    analyzer, components, fishers, dataset, left_alone = opened
    settings: dict[str, Any] = {name: getattr(lifting, name) for name in _LIFTED_AT_ONCE}
    adapters = analyzer.lift_adapters(components, fishers, dataset, rank, keep=left_alone, **settings)
    reports = analyzer.evaluate_adapters(adapters, components, dataset, fishers, **vars(measuring))
    measured = []
    for adapter, report in zip(adapters, reports, strict=True):
        about = replace(facts_of(adapter.info, report, components, False), measured="this adapter")
        measured.append(replace(adapter.scaled(report.scale), about=about))
    save_gallery(measured, output, reports)
    values = [report.to_dict() for report in reports]
    write_result(output / "report.json", {"components": values})
    shown = [
        table(f"{components[r.component].label}; keeps {a.kept}{_missed(r)}", EFFECT_COLUMNS, effect_rows(r))
        for a, r in zip(adapters, reports, strict=True)
    ]
    return Result({"output": str(output), "components": values}, Group(*shown), {"revision": analyzer.revision})
