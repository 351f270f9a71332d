"""The command line, `hf-npeff`: a command a stage. What is heavy is imported inside the commands."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_npeff import __version__
from hf_npeff.config import DecompositionConfig, FisherConfig
from hf_npeff.options import (
    DataOptions,
    ModelOptions,
    Result,
    analyzer_for,
    app,
    command,
    read_data,
    read_decomposition,
    table,
    write_result,
)

if TYPE_CHECKING:
    from hf_npeff.components import Decomposition

Model = Annotated[str, typer.Argument(help="The model's id on the Hub, or its folder.")]
Data = Annotated[str, typer.Argument(help="A file (.jsonl, .csv, .parquet, .txt), or a data set's id on the Hub.")]
Fishers = Annotated[str, typer.Argument(help="PEFs: a folder, or a repository on the Hub.")]
Found = Annotated[str, typer.Argument(help="A decomposition: a folder, or a repository on the Hub.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
MaybeOutput = Annotated[Path | None, typer.Option("--output", "-o", help="A folder to write.")]
BatchSize = Annotated[int, typer.Option(help="Examples of a forward pass.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Which heuristics does a Hugging Face model use, on which inputs, and what if one is switched off?

    A run goes `compute`, `decompose`, `components`, `perturb`, `push`; `demo` shows all of it on a small model.
    """


@command
def demo(
    queries: Annotated[int, typer.Option(help="Prompts a relation; there are eight.")] = 28,
    rank: Annotated[int, typer.Option(help="Rows kept per example.")] = 8,
    components: Annotated[int, typer.Option(help="Components of the decomposition.")] = 14,
    seed: Annotated[int, typer.Option(help="Of prompts, sketch and starts.")] = 0,
    output: Output = Path("runs/demo"),
) -> Result:
    """Find the components of SmolLM2 on word relations, and switch one of them off.

    Example: `hf-npeff demo --queries 16`
    """
    from hf_npeff.demo import run

    run(queries=queries, rank=rank, components=components, seed=seed, output_dir=output)
    return Result({"output": str(output)}, f"Everything is in {output}.")


@command
def compute(
    model: Model,
    data: Data,
    loading: ModelOptions,
    reading: DataOptions,
    fisher: FisherConfig,
    output: MaybeOutput = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="What to keep beside the rows; all by default. Repeat for several.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Examples of a batch, or auto.")] = "8",
    shard_size: Annotated[int, typer.Option(help="Examples of a file.")] = 1024,
    resume: Annotated[bool, typer.Option(help="Go on with what the folder holds.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it will cost, and stop.")] = False,
) -> Result:
    """Compute the per-example Fishers (PEFs) of a data set, into a folder.

    Examples:
    - `hf-npeff compute distilbert/distilgpt2 prompts.txt -o runs/pefs --dry-run`
    - `hf-npeff compute distilbert/distilgpt2 prompts.jsonl -o runs/pefs --target-modules '.*mlp.*' --rank 8`
    - `hf-npeff compute user/bert-mnli nyu-mll/glue --subset mnli --split validation_matched -o runs/mnli`
    - `hf-npeff compute --config runs/pefs/run.yaml -o runs/again`
    """
    if output is None and not dry_run:
        raise typer.BadParameter("PEFs need a folder", param_hint="--output")
    if batch_size != "auto" and not batch_size.isdecimal():
        raise typer.BadParameter("expected a whole number or auto", param_hint="--batch-size")
    dataset = read_data(data, reading)
    analyzer = analyzer_for(model, loading, fisher)
    if dry_run:
        cost = analyzer.estimate(dataset)
        return Result(asdict(cost) | {"flops": cost.flops}, str(cost))
    pefs = analyzer.compute_pefs(
        dataset,
        output,
        batch_size="auto" if batch_size == "auto" else int(batch_size),
        columns=columns or None,
        resume=resume,
        shard_size=shard_size,
    )
    values = {
        "output": str(output),
        "model": pefs.info.get("model"),
        "revision": analyzer.revision,
        "examples": len(pefs),
        "rank": pefs.rank,
        "dim": pefs.dim,
        "bytes": pefs.nbytes,
        "sketch": pefs.sketch().kind,
        "sketch_error": pefs.sketch_error,
        "fingerprint": pefs.fingerprint,
    }
    return Result(values, f"{pefs!r}\nin {output}", {"revision": analyzer.revision})


@command
def decompose(
    pefs: Fishers,
    output: Output,
    decomposition: DecompositionConfig,
    validation: Annotated[str | None, typer.Option(help="Held-out PEFs, to stop early.")] = None,
) -> Result:
    """Decompose PEFs into components, into a folder.

    Example: `hf-npeff decompose runs/pefs -o runs/components --n-components 32`
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    from hf_npeff.decomposition.estimator import NPEFF
    from hf_npeff.store import PEFs

    held_out = None if validation is None else PEFs.from_pretrained(validation)
    estimator = NPEFF.from_config(decomposition, progress=not are_progress_bars_disabled())
    found = estimator.fit(PEFs.from_pretrained(pefs), held_out)
    found.save_pretrained(output)
    values = {
        "output": str(output),
        "examples": len(found.example_ids),
        "components": len(found),
        "explained": found.explained,
        "converged": found.converged,
        "stability": found.stability.tolist(),
    }
    return Result(values, f"{found!r}\nin {output}; look at it with: hf-npeff components {output}")


@command
def components(
    decomposition: Found,
    component: Annotated[int | None, typer.Option(help="Only this one, with more of its examples.")] = None,
    top: Annotated[int | None, typer.Option(help="Examples to show: 3, or 20 of a single component.")] = None,
    rename: Annotated[str | None, typer.Option(help="Name the component, in its folder.")] = None,
) -> Result:
    """Show components and the examples that they explain most of.

    Examples:
    - `hf-npeff components runs/components`
    - `hf-npeff components runs/components --component 3 --top 50`
    - `hf-npeff components runs/components --component 3 --rename "past tense"`
    """
    found = read_decomposition(decomposition)
    if rename is not None:
        if component is None:
            raise typer.BadParameter("which one? add --component", param_hint="--rename")
        found.rename(component, rename)
        _save_again(found, Path(decomposition))
    count = (3 if component is None else 20) if top is None else top
    values, rows, lines = [], [], []
    for one in found if component is None else [found[component]]:
        best = one.top_examples(count)
        facts = {"index": one.index, "name": one.name, "active_share": one.active_share, "stability": one.stability}
        values.append({**facts, "evaluation": found.evaluations.get(one.index), "top": list(best)})
        texts = _shown(best.texts, best.ids, best.columns)
        rows.append((one.label, f"{one.active_share:.0%}", f"{one.stability:.2f}", "\n".join(texts)))
        lines = [(f"{w:.3f}", i, text) for w, i, text in zip(best.coefficients, best.ids, texts, strict=True)]
    if component is None:
        title = f"{decomposition}: {found.explained:.1%} of {len(found.example_ids):,} examples' PEFs explained"
        shown = table(title, ("component", "active", "stable", "top examples"), rows)
    else:
        title = "{}: active on {}, stability {}".format(*rows[0])
        shown = table(title, ("weight", "id", "example"), lines)
    return Result({"explained": found.explained, "components": values}, shown)


def _shown(texts: Sequence[Any] | None, ids: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Examples on a line each, with what the model predicts."""
    from hf_npeff.cards import plain

    lines = [plain(value) for value in (texts or ids)]
    predictions = columns.get("prediction") or [None] * len(lines)
    return [f"{a} → {plain(b)}" if b not in (None, "") else a for a, b in zip(lines, predictions, strict=True)]


def _save_again(decomposition: Decomposition, folder: Path) -> None:
    """Write a decomposition back, with what its card says of licence and data sets."""
    from huggingface_hub import ModelCard

    if not folder.is_dir():
        raise ValueError(f"{folder} is on the Hub, and names are kept in a folder: download it, rename there and push")
    card = folder / "README.md"
    facts = ModelCard.load(card).data.to_dict() if card.is_file() else {}
    decomposition.save_pretrained(folder, datasets=facts.get("datasets") or (), license=facts.get("license"))


@command
def explain(
    decomposition: Found,
    model: Model,
    data: Data,
    loading: ModelOptions,
    reading: DataOptions,
    output: MaybeOutput = None,
    batch_size: BatchSize = 8,
) -> Result:
    """Say which known components the model uses on new inputs.

    With `--output`, the coefficients are written to coefficients.json.

    Examples:
    - `hf-npeff explain runs/components distilbert/distilgpt2 new.txt`
    - `hf-npeff explain user/npeff-distilgpt2 distilbert/distilgpt2 new.txt --json`
    """
    found = read_decomposition(decomposition)
    analyzer = analyzer_for(model, loading, found)
    pefs = analyzer.compute_pefs(read_data(data, reading), like=found, batch_size=batch_size)
    coefficients = found.transform(pefs).tolist()
    labels = [one.label for one in found]
    texts = next((pefs.columns[name] for name in (found.text_column, "text") if name in pefs.columns), None)
    rows = []
    for line, weights in zip(_shown(texts, pefs.example_ids, pefs.columns), coefficients, strict=True):
        leading = sorted(range(len(labels)), key=weights.__getitem__, reverse=True)[:3]
        total = sum(weights) or 1.0
        rows.append((line, ", ".join(f"{labels[j]} {weights[j] / total:.0%}" for j in leading if weights[j] > 0)))
    examples = [
        {"id": i, "text": None if texts is None else texts[at], "coefficients": weights}
        for at, (i, weights) in enumerate(zip(pefs.example_ids, coefficients, strict=True))
    ]
    values = {"components": labels, "examples": examples}
    if output is not None:
        write_result(output / "coefficients.json", values)
    return Result(values, table(decomposition, ("example", "components"), rows), {"revision": analyzer.revision})


@command
def perturb(
    decomposition: Found,
    pefs: Fishers,
    model: Model,
    data: Data,
    component: Annotated[int, typer.Option(help="Its number.")],
    output: Output,
    loading: ModelOptions,
    reading: DataOptions,
    rank: Annotated[int, typer.Option(help="Of the adapter's matrices.")] = 1,
    kind: Annotated[Literal["lora", "shira", "delta"], typer.Option(help="Of adapter.")] = "lora",
    method: Annotated[
        Literal["exact", "adjoint", "compressed_sensing"], typer.Option(help="How the component is lifted.")
    ] = "exact",
    top_examples: Annotated[int | None, typer.Option(help="Lift from this many examples only.")] = None,
    target_kl: Annotated[float, typer.Option(help="Nats on the top examples that the step is to reach.")] = 0.5,
    scale: Annotated[float | None, typer.Option(help="A given step instead.")] = None,
    n_top: Annotated[int, typer.Option(help="Top examples to measure.")] = 16,
    n_others: Annotated[int, typer.Option(help="Others to measure.")] = 64,
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Of the others, the random direction and the bootstrap.")] = 0,
) -> Result:
    """Switch a component off: lift it to the weights, measure the step, and write it as an adapter.

    The folder gets `direction`, `adapter` (which PEFT loads) and report.json. PEFs and data are those of the
    decomposition.

    Example: `hf-npeff perturb runs/components runs/pefs distilbert/distilgpt2 prompts.txt --component 3 -o runs/off-3`
    """
    from hf_npeff.store import PEFs

    found = read_decomposition(decomposition)
    component = found.index_of(component)
    fishers, dataset = PEFs.from_pretrained(pefs), read_data(data, reading)
    analyzer = analyzer_for(model, loading, found)
    direction = analyzer.lift(
        found, component, fishers, dataset, method=method, top_examples=top_examples, batch_size=batch_size
    )
    report = analyzer.evaluate_direction(
        direction,
        found,
        component,
        dataset,
        target_kl=target_kl,
        scale=scale,
        n_top=n_top,
        n_others=n_others,
        batch_size=batch_size,
        seed=seed,
    )
    about: dict[str, Any] = {"report": report, "decomposition": found}
    adapter = direction.to_adapter(rank, report.scale, kind=kind, model=analyzer.model, **about)
    direction.save_pretrained(output / "direction", **about)
    adapter.save_pretrained(output / "adapter")
    write_result(output / "report.json", report.to_dict())
    values = {"output": str(output), "retained_energy": adapter.retained_energy, **report.to_dict()}
    effects = [("this step", report.best), ("the other sign", report.opposite), ("a random direction", report.random)]
    rows = [
        (name, f"{e.scale:.3g}", f"{e.top:.3g}", f"{e.others:.3g}", f"{e.ratio:.3g}", f"{e.top_flips:.0%}")
        for name, e in effects
        if e is not None
    ]
    columns = ("", "step", "KL on top", "KL on others", "ratio", "top flips")
    title = f"{found[component].label}: in {output}; the adapter keeps {adapter.retained_energy:.0%} of the direction"
    return Result(values, table(title, columns, rows), {"revision": analyzer.revision})


_PUBLISHED = {
    "direction": ("direction.safetensors", "config.json", "README.md"),
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "README.md"),
}


@command
def push(
    folder: Annotated[Path, typer.Argument(help="Of a decomposition, PEFs, a direction or an adapter.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hub, user/name; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Only in a private repository.")] = False,
    include_texts: Annotated[bool, typer.Option("--include-texts", help="Publish the examples' texts too.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit's title.")] = None,
) -> Result:
    """Publish a folder on the Hub. Texts stay here unless they are asked for.

    Examples:
    - `hf-npeff push runs/components user/npeff-distilgpt2`
    - `hf-npeff push runs/off-3/adapter user/distilgpt2-without-3 --private`
    """
    from hf_npeff.hub import push_folder
    from hf_npeff.store import PEFs

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    where: dict[str, Any] = {"private": private or None, "revision": revision, "create_pr": create_pr}
    where["commit_message"] = message
    if (folder / "decomposition.safetensors").is_file():
        kind, url = (
            "decomposition",
            read_decomposition(str(folder)).push_to_hub(repo, include_texts=include_texts, **where),
        )
    elif (folder / "manifest.json").is_file():
        kind, url = "pefs", PEFs.from_pretrained(folder).push_to_hub(repo, include_texts=include_texts, **where)
    else:
        kind = next((name for name, files in _PUBLISHED.items() if (folder / files[0]).is_file()), "")
        if not kind:
            raise ValueError(f"{folder} holds no decomposition, PEFs, direction or adapter")
        with tempfile.TemporaryDirectory() as published:
            for path in filter(Path.is_file, (folder / name for name in _PUBLISHED[kind])):
                shutil.copy(path, published)
            card = Path(published) / "README.md"
            if card.is_file():  # its code loads from the folder that it lies in
                card.write_text(card.read_text(encoding="utf-8").replace('"."', f'"{repo}"'), encoding="utf-8")
            url = push_folder(published, repo, **where)
    return Result({"kind": kind, "url": url}, url)


@command
def compare(first: Found, second: Found, output: MaybeOutput = None) -> Result:
    """Match the components of two decompositions.

    Of the same examples they are compared by the correlation of their coefficients, otherwise by the cosine of their
    pseudo-Fishers, which needs the same sketch. With `--output`, the matches are written to matches.json.

    Example: `hf-npeff compare runs/components runs/components-of-another-seed`
    """
    a, b = read_decomposition(first), read_decomposition(second)
    measure, pairs = matches(a, b)
    values = {
        "measure": measure,
        "pairs": [
            {"first": i, "first_label": a[i].label, "second": j, "second_label": b[j].label, "similarity": s}
            for i, j, s in pairs
        ],
        "mean": sum(s for *_, s in pairs) / len(pairs),
    }
    if output is not None:
        write_result(output / "matches.json", values)
    rows = [(a[i].label, b[j].label, f"{s:.3f}") for i, j, s in pairs]
    return Result(values, table(f"{measure}, mean {values['mean']:.3f}", (first, second, "similarity"), rows))


def matches(first: Decomposition, second: Decomposition) -> tuple[str, list[tuple[int, int, float]]]:
    """What was compared, and (component of the first, component of the second, similarity), the most similar first.

    One to one with the largest sum; without scipy greedily, the most similar pair first.

    Raises:
        ValueError: if they share neither two examples nor the sketch.
    """
    import torch

    keys = [d.columns.get("content_hash", d.example_ids) for d in (first, second)]
    places = [{key: i for i, key in enumerate(k)} for k in keys]
    shared = [key for key in places[0] if key in places[1]]
    if len(shared) > 1:
        measure = f"correlation of coefficients over {len(shared)} examples"
        W = [
            d.coefficients[[at[key] for key in shared]].double() for d, at in zip((first, second), places, strict=True)
        ]
        unit = [torch.nn.functional.normalize(w - w.mean(0), dim=0) for w in W]
        S = unit[0].T @ unit[1]
    elif first.fingerprint == second.fingerprint:
        measure = "cosine of pseudo-Fishers"
        S = (first.pseudo_fishers.double() @ second.pseudo_fishers.double().T).abs()
    else:
        raise ValueError("the two decompositions share neither examples nor the sketch: nothing can be compared")
    if find_spec("scipy") is not None:
        from scipy.optimize import linear_sum_assignment

        pairs = list(zip(*(x.tolist() for x in linear_sum_assignment(S.numpy(), maximize=True)), strict=True))
    else:
        pairs, left = [], S.clone()
        for _ in range(min(S.shape)):
            i, j = divmod(int(left.argmax()), S.shape[1])
            pairs.append((i, j))
            left[i], left[:, j] = -math.inf, -math.inf
    return measure, sorted(((i, j, float(S[i, j])) for i, j in pairs), key=lambda pair: -pair[2])


def main() -> None:
    """The entry point of `hf-npeff` and of `python -m hf_npeff`."""
    app(prog_name="hf-npeff")
