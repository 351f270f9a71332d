"""Commands that compute PEFs from a model and a data set, and decompose them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data
from hf_npeff.commands.options import Data, MaybeOutput, Model, Output, PEFsArgument, Result, command
from hf_npeff.config import ComputeRequest, DecompositionConfig, FisherConfig
from hf_npeff.studies.settings import DemoConfig

if TYPE_CHECKING:
    from hf_npeff.pefs.store import PEFs


@command
def demo(
    size: DemoConfig,
    output: Output = Path("runs/demo"),
) -> Result:
    """Find the components of SmolLM2 on word relations, and switch one of them off.

    Example: `hf-npeff demo --queries 16`
    """
    from hf_npeff.demo import run

    run(**vars(size), output_dir=output)
    return Result({"output": str(output)}, f"Everything is in {output}.")


@command
def compute(
    model: Model,
    data: Data,
    loading: ModelOptions,
    reading: DataOptions,
    fisher: FisherConfig,
    request: ComputeRequest,
    output: MaybeOutput = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="A column of the data set to keep with the results; all by default. Repeat for several."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue with the results that the folder has.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print how much computation, memory and disk it takes.")
    ] = False,
) -> Result:
    """Compute the per-example Fisher matrices (PEFs) of a data set, into a folder.

    Examples:
    - `hf-npeff compute distilbert/distilgpt2 prompts.txt -o runs/pefs --dry-run`
    - `hf-npeff compute distilbert/distilgpt2 prompts.jsonl -o runs/pefs --target-modules '.*mlp.*' --rank 8`
    - `hf-npeff compute user/bert-mnli nyu-mll/glue --subset mnli --split validation_matched -o runs/mnli`
    - `hf-npeff compute --config runs/pefs/run.yaml -o runs/again`
    """
    if output is None and not dry_run:
        raise typer.BadParameter("name the folder to write; only --dry-run needs none", param_hint="--output")
    dataset = read_data(data, reading)
    analyzer = analyzer_for(model, loading, fisher, reading)
    if dry_run:
        cost = analyzer.estimate(dataset)
        return Result(asdict(cost) | {"flops": cost.flops}, str(cost))
    pefs = analyzer.compute_pefs(
        dataset,
        output,
        batch_size=request.batch_size,
        columns=columns or None,
        resume=resume,
        shard_size=request.shard_size,
        on_error=request.on_error,
        check_weights=request.check_weights,
    )
    values = {"output": str(output), "revision": analyzer.revision, **_summary_of(pefs)}
    return Result(values, f"{pefs!r}\n{_read_of(pefs)}\nin {output}", {"revision": analyzer.revision})


def _read_of(pefs: PEFs) -> str:
    """A line that says which columns the model was given, and how many examples were cut."""
    from hf_npeff.encoding.record import Encoded

    cut = (pefs.info.get("dataset") or {}).get("truncated")
    return f"{Encoded.of(pefs.info)}" + (f"; {cut:,} examples were cut" if cut else "")


def _summary_of(pefs: PEFs) -> dict[str, Any]:
    return {
        "model": pefs.info.get("model"),
        "examples": len(pefs),
        "skipped": pefs.info.get("skipped", []),
        "dataset": pefs.info.get("dataset"),
        "rank": pefs.rank,
        "dim": pefs.dim,
        "bytes": pefs.nbytes,
        "sketch": pefs.sketch().kind,
        "sketch_error": pefs.sketch_error,
        "fingerprint": pefs.fingerprint,
    }


@command
def decompose(
    pefs: PEFsArgument,
    output: Output,
    decomposition: DecompositionConfig,
    validation: Annotated[
        str | None, typer.Option(help="Held-out PEFs; the fit stops when their loss stops falling.")
    ] = None,
) -> Result:
    """Decompose PEFs into components, into a folder.

    Example: `hf-npeff decompose runs/pefs -o runs/components --n-components 32`
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    from hf_npeff.decomposition.estimator import NPEFF
    from hf_npeff.pefs.store import PEFs

    held_out = None if validation is None else PEFs.from_pretrained(validation)
    estimator = NPEFF.from_config(decomposition, progress=not are_progress_bars_disabled())
    fitted = estimator.fit(PEFs.from_pretrained(pefs), held_out)
    fitted.save_pretrained(output)
    values = {
        "output": str(output),
        "examples": len(fitted.example_ids),
        "components": len(fitted),
        "explained": fitted.explained,
        "converged": fitted.converged,
        "stability": fitted.stability.tolist(),
    }
    return Result(values, f"{fitted!r}\nin {output}; look at it with: hf-npeff components {output}")
