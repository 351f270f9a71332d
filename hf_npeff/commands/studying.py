"""Commands that run a study. Each writes result.json, table.md and figure.svg."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_npeff.commands.inputs import DataOptions, ModelOptions, analyzer_for, read_data
from hf_npeff.commands.options import Data, Model, Output, Result, command
from hf_npeff.config import FisherConfig
from hf_npeff.extras import require
from hf_npeff.studies.rival_settings import FairConfig, MinimalPairsConfig
from hf_npeff.studies.settings import (
    ComparisonConfig,
    FactorsConfig,
    InContextConfig,
    MechanismsConfig,
    PlantedConfig,
    RatingsConfig,
    SelectivityConfig,
)

if TYPE_CHECKING:
    from hf_npeff.studies.attributes import Attributes
    from hf_npeff.studies.result import StudyResult

AttributeColumns = Annotated[
    list[str], typer.Option(help="A column of annotations. Repeat the option for several.", show_default=False)
]
Task = Annotated[str, typer.Argument(help="clinc150, snli, sst2, triviaqa or yahoo_answers_topics.")]


def _written(result: StudyResult, folder: Path) -> Result:
    from hf_npeff.sharing.files import finite

    result.write(folder)
    return Result(finite(result.to_dict()), f"{result.table()}\n\nin {folder}")


def _attributes(dataset: Any, names: list[str], min_count: int) -> Attributes:
    from hf_npeff.records import records_of
    from hf_npeff.studies.attributes import Attributes

    rows = list(records_of(dataset, None))
    if missing := [name for name in names if all(name not in row for row in rows)]:
        raise ValueError(f"no row has the columns {missing}; there are {sorted(rows[0])}")
    return Attributes.from_columns({name: [row.get(name) for row in rows] for name in names}, min_count=min_count)


def study(function: Callable[..., Result]) -> Callable[..., None]:
    """Make a command that needs the libraries of the extra `eval`; without them it stops at once."""

    @functools.wraps(function)
    def checked(**settings: Any) -> Result:
        require("a study", "sklearn", "scipy", "matplotlib")
        return function(**settings)

    return command(checked)


@study
def factors(
    model: Model,
    data: Data,
    attributes: AttributeColumns,
    loading: ModelOptions,
    reading: DataOptions,
    fisher: FisherConfig,
    comparison: ComparisonConfig,
    measured: FactorsConfig,
    output: Output = Path("runs/factors"),
) -> Result:
    """Which annotated attributes do NPEFF and the baselines find?

    Example: `hf-npeff study factors runs/model rows.jsonl --attributes intent --attributes slots -o runs/factors`
    """
    from hf_npeff.baselines.method import save_methods
    from hf_npeff.studies.comparison import fit_methods
    from hf_npeff.studies.factors import run_factors

    dataset = read_data(data, reading)
    annotated = _attributes(dataset, attributes, measured.min_count)
    analyzer = analyzer_for(model, loading, fisher, reading)
    compared = fit_methods(analyzer, dataset, comparison)
    result = run_factors(compared.methods, annotated, measured, seeds=compared.seeds)
    kept = compared.decomposition
    if kept is not None and kept.texts is not None:  # for `study ratings`
        save_methods(output, compared.methods, kept.texts)
    return _written(result, output)


@study
def selectivity(
    model: Model,
    data: Data,
    attributes: AttributeColumns,
    loading: ModelOptions,
    reading: DataOptions,
    fisher: FisherConfig,
    comparison: ComparisonConfig,
    measured: FactorsConfig,
    switching: SelectivityConfig,
    output: Output = Path("runs/selectivity"),
) -> Result:
    """Which method's features, when switched off, move an attribute's examples and no others?

    Example: `hf-npeff study selectivity runs/model rows.jsonl --attributes intent -o runs/selectivity`
    """
    from hf_npeff.studies.comparison import fit_methods
    from hf_npeff.studies.factors import run_factors
    from hf_npeff.studies.selectivity import run_selectivity

    dataset = read_data(data, reading)
    annotated = _attributes(dataset, attributes, measured.min_count)
    analyzer = analyzer_for(model, loading, fisher, reading)
    compared = fit_methods(analyzer, dataset, comparison)
    scores = run_factors(compared.methods, annotated, measured)
    return _written(run_selectivity(analyzer, compared.methods, dataset, annotated, scores, switching), output)


@study
def planted(
    config_: PlantedConfig,
    seeds: Annotated[int, typer.Option(help="How many tasks to make, with the seeds 0, 1, …")] = 5,
    found_at: Annotated[float, typer.Option(help="The AUROC from which a cue counts as found.")] = 0.9,
    output: Output = Path("runs/planted"),
) -> Result:
    """Which planted cues do NPEFF and the baselines find, in a model whose training labels depend on known cues?

    Finished seeds are kept in the folder's `parts`; an interrupted run continues there.

    Example: `hf-npeff study planted --seeds 1 -o runs/planted`
    """
    from hf_npeff.studies.planted import run_planted

    return _written(run_planted(config_, seeds=range(seeds), found_at=found_at, parts=output / "parts"), output)


@study
def fair(
    model: Model,
    data: Data,
    attributes: AttributeColumns,
    loading: ModelOptions,
    reading: DataOptions,
    fisher: FisherConfig,
    measured: FairConfig,
    position: Annotated[str, typer.Option(help="The token at which hidden states are read: first or last.")] = "last",
    output: Output = Path("runs/fair"),
) -> Result:
    """What does every method find, at every layer and with both ways to read it, compared with controls?

    Example: `hf-npeff study fair runs/model rows.jsonl --attributes intent --position first -o runs/fair`
    """
    from hf_npeff.studies.fair import run_fair

    if position not in ("first", "last"):
        raise typer.BadParameter(f"position must be first or last, but it is {position!r}")
    dataset = read_data(data, reading)
    annotated = _attributes(dataset, attributes, 1)
    analyzer = analyzer_for(model, loading, fisher, reading)
    return _written(run_fair(analyzer, dataset, annotated, position, measured), output)


@study
def mechanisms(toys_: MechanismsConfig, output: Output = Path("runs/mechanisms")) -> Result:
    """Do components find the known mechanisms of toy models of superposition?

    Finished toy models are kept in the folder's `parts`; an interrupted run continues there.

    Example: `hf-npeff study mechanisms --seeds 2 -o runs/mechanisms`
    """
    from hf_npeff.studies.mechanisms import run_mechanisms

    return _written(run_mechanisms(toys_, parts=output / "parts"), output)


@study
def minimal_pairs(paired: MinimalPairsConfig, output: Output = Path("runs/minimal_pairs")) -> Result:
    """When one factor of an example changes, does only the feature that stands for it move?

    Finished seeds are kept in the folder's `parts`; an interrupted run continues there.

    Example: `hf-npeff study minimal_pairs --data home_assistant --seeds 1 -o runs/minimal_pairs`
    """
    from hf_npeff.demo import load_model
    from hf_npeff.studies.pair_study import run_minimal_pairs

    return _written(run_minimal_pairs(paired, load_model=load_model, parts=output / "parts"), output)


@command
def ratings(
    folder: Annotated[Path, typer.Argument(help="The folder of an exported rating study, or the folder to write.")],
    rated: RatingsConfig,
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="The methods to rate: a decomposition, or a folder that `study factors` wrote. Repeat for several."
        ),
    ] = None,
    answers: Annotated[
        list[str] | None, typer.Option(help="The file with a rater's answers. Repeat for several.")
    ] = None,
    rater: Annotated[
        str | None, typer.Option(help="A chat model as an additional rater: its id on the Hub, or its folder.")
    ] = None,
    scripted: Annotated[
        bool, typer.Option(help="A script as an additional rater: it compares words and letters.")
    ] = False,
    remote: Annotated[bool, typer.Option(help="Run the chat model through the Hub's inference providers.")] = False,
    output: Output = Path("runs/ratings"),
) -> Result:
    """Can people, or a language model, tell a component's examples from others?

    With `--export` a form and a key are written; with `--answers`, `--rater` or `--scripted` they are scored.

    Examples:
    - `hf-npeff study ratings runs/rating --export runs/factors`
    - `hf-npeff study ratings runs/rating --answers answers-Ann.json --answers answers-Bo.json -o runs/ratings`
    - `hf-npeff study ratings runs/rating --rater HuggingFaceTB/SmolLM2-1.7B-Instruct -o runs/ratings`
    """
    from hf_npeff.studies.detection import score_ratings
    from hf_npeff.studies.raters import rate
    from hf_npeff.studies.ratings import RatingStudy
    from hf_npeff.studies.scripted_rater import rate_by_words

    if export:
        made = _rating_study(export, rated)
        made.export(folder)
        text = f"{len(made.tasks)} tasks in {folder}: form.html is for raters, key.json is not"
        return Result({"study": made.id, "tasks": len(made.tasks), "excluded": made.excluded}, text)
    study = RatingStudy.load(folder)
    given = [study.read_answers(Path(path)) for path in answers or ()]
    if rater is not None:
        given.append(rate(study, _chat(rater, remote), cache=folder / "cache"))
    if scripted:
        given.append(rate_by_words(study))
    if not given:
        raise typer.BadParameter(
            "nothing to score: add --answers, --rater or --scripted, or --export to make the tasks"
        )
    return _written(score_ratings(study, given), output)


def _rating_study(names: list[str], rated: RatingsConfig) -> Any:
    from hf_npeff.studies.ratings import RatingStudy

    methods, texts = _read_methods(names[0])
    for name in names[1:]:
        further, others = _read_methods(name)
        if others != texts:
            raise ValueError(
                f"{name} is of other examples than {names[0]}; all methods have to be rated on the same examples"
            )
        methods += further
    return RatingStudy.make(methods, texts, rated)


def _read_methods(name: str) -> tuple[list[Any], list[str]]:
    """The methods in a folder that `study factors` wrote, or a decomposition as a method, with the examples' texts."""
    from hf_npeff.baselines.method import MethodResult, load_methods
    from hf_npeff.commands.inputs import read_decomposition

    if (kept := load_methods(Path(name))) is not None:
        return kept
    decomposition = read_decomposition(name)
    texts = decomposition.texts
    if texts is None:
        raise ValueError(f"{name} has no texts, which raters need")
    return [MethodResult.of_decomposition(decomposition, name=name)], texts


def _chat(model: str, remote: bool) -> Any:
    from hf_npeff.studies.raters import InferenceChat, LocalChat

    if remote:
        from huggingface_hub import InferenceClient

        return InferenceChat(InferenceClient(), model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return LocalChat(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), name=model)


@study
def in_context(
    loading: ModelOptions,
    fisher: FisherConfig,
    asked: InContextConfig,
    model: Annotated[
        str | None, typer.Option(help="The model's id or folder; SmolLM2-135M-Instruct by default.")
    ] = None,
    output: Output = Path("runs/in_context"),
) -> Result:
    """Which components appear when a language model is given more demonstrations?

    The result is kept in the folder's `parts`, from which the next run reads it.

    Example: `hf-npeff study in_context --queries 5 --rank 4 -o runs/in_context`
    """
    from dataclasses import replace

    from hf_npeff.analyzer import NPEFFAnalyzer
    from hf_npeff.studies.in_context import run_in_context

    if model is None:
        from hf_npeff.demo import TARGETS, load_model

        if fisher == replace(FisherConfig(), rank=fisher.rank, seed=fisher.seed):  # as the demo analyses it
            fisher = replace(fisher, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384)
        network, tokenizer = load_model()
        if loading.device_map is not None:
            network = network.to(loading.device_map)
        analyzer = NPEFFAnalyzer(network, tokenizer, fisher=fisher)
    else:
        analyzer = analyzer_for(model, loading, fisher)
    return _written(run_in_context(analyzer, asked, parts=output / "parts"), output)


@study
def ablations(
    model: Model,
    data: Data,
    loading: ModelOptions,
    reading: DataOptions,
    fisher: FisherConfig,
    measured: FactorsConfig,
    grid: Annotated[
        Path | None, typer.Option(help="A file with the grid of settings; hf_npeff's own by default.")
    ] = None,
    attributes: Annotated[
        list[str] | None, typer.Option(help="A column of annotations. Repeat the option for several.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a forward pass.")] = 16,
    output: Output = Path("runs/ablations"),
) -> Result:
    """What does each setting cost, and what does it gain?

    Finished PEFs' settings are kept in the folder's `parts`; an interrupted run continues there.

    Example: `hf-npeff study ablations runs/model rows.jsonl --grid grid.yaml --attributes intent -o runs/ablations`
    """
    from importlib.resources import files

    from hf_npeff.studies.ablations import read_grid, run_ablations

    default = files("hf_npeff.studies").joinpath("grid.yaml")
    points = read_grid((grid or default).read_text(encoding="utf-8"), fisher)
    dataset = read_data(data, reading)
    annotated = _attributes(dataset, attributes, measured.min_count) if attributes else None
    analyzer = analyzer_for(model, loading, fisher, reading)
    given: dict[str, Any] = {"factors": measured, "batch_size": batch_size, "parts": output / "parts"}
    result = run_ablations(analyzer, dataset, points, annotated, **given)
    return _written(result, output)


@study
def tasks(
    name: Task,
    model: Annotated[str, typer.Option(help="Any causal language model: its id on the Hub, or its folder.")],
    loading: ModelOptions,
    fisher: FisherConfig,
    comparison: ComparisonConfig,
    measured: FactorsConfig,
    data: Annotated[
        str | None, typer.Option(help="A file with rows in the task's format; the task's own data set by default.")
    ] = None,
    max_examples: Annotated[int, typer.Option(help="How many examples to use: the first ones that fit.")] = 500,
    output: Output = Path("runs/tasks"),
) -> Result:
    """Analyse a causal language model on TriviaQA, CLINC150, Yahoo Answers Topics, SNLI or SST-2.

    Example: `hf-npeff study tasks snli --model distilbert/distilgpt2 --max-examples 1000 -o runs/snli`
    """
    from hf_npeff.studies.prompted import load_task, make_prompts, run_task

    known = load_task(name)
    rows = None if data is None else read_data(data, DataOptions())
    prompts = make_prompts(known, rows, max_examples=max_examples)
    analyzer = analyzer_for(model, loading, fisher)
    return _written(run_task(analyzer, prompts, known, comparison, measured), output)


STUDIES = (factors, fair, selectivity, mechanisms, minimal_pairs, planted, ratings, in_context, ablations, tasks)
"""In the order of the help."""
