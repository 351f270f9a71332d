"""What a change did, for people: the commands in processes of their own, cards, the page in a browser, ids on a Hub."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from typer.testing import CliRunner

from hf_npeff import ChangeReport, CorruptStoreError, Decomposition, ParameterDirection
from hf_npeff.cli import app
from hf_npeff.report.data import Extras, gather
from hf_npeff.report.page import write
from hf_npeff.sharing.change_cards import TITLE_OF_SECTION, add_change_section, change_section
from tests import warm_processes
from tests.browser import Browser, Page, find_browser
from tests.hub_server import HubServer
from tests.test_cli import run, told
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

SMALL = ("--rank", 2, "--sketch", "countsketch", "--sketch-dim", 256, "--n-components", 3, "--n-restarts", 1)


@dataclass
class World:
    """A folder with a model, one after a change, an adapter, data, and what `diff` said."""

    folder: Path
    said: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("changing")
    model = tiny_model("gpt2", "sequence-classification", dtype=torch.float32)
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.transformer.h[1].mlp.c_fc.weight.mul_(-1)
    for name, each in (("model", model), ("after", after)):
        each.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    base = type(model).from_pretrained(folder / "model")
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, task_type="SEQ_CLS", modules_to_save=[])
    wrapped = peft.get_peft_model(base, config)
    drawer = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=drawer)
    wrapped.save_pretrained(folder / "lora")
    (folder / "lora" / "README.md").unlink(missing_ok=True)
    drawn = torch.randint(0, len(WORDS), (24, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"text": " ".join(WORDS[j] for j in row), "label": i % 3} for i, row in enumerate(drawn)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("diff", "model", "after", "data.jsonl", "-o", "diff", *SMALL, "--steps", 0.5, "--json", cwd=folder)
    return World(folder, told(done))


def test_diff_writes_the_change_its_report_and_a_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the report on disk is what was printed; the direction is that between both folders."""
    report = ChangeReport.load(world.folder / "diff")
    assert world.said["mean_kl"] == pytest.approx(report.mean_kl) and len(report.kl) == 24
    assert [step["scale"] for step in world.said["curve"]] == [0, 0.5, 1]
    change = ParameterDirection.load(world.folder / "diff" / "change")
    expected = ParameterDirection.between(world.folder / "model", world.folder / "after")
    assert list(change) == ["transformer.h.1.mlp.c_fc.weight"] and change.cosine(expected) == pytest.approx(1)
    assert "What changed" in (world.folder / "diff" / "report.html").read_text(encoding="utf-8")
    assert len(Decomposition.load(world.folder / "diff" / "components")) == 3
    monkeypatch.chdir(world.folder)
    again = CliRunner().invoke(app, ["diff", "--config", "diff/run.yaml", "-o", "again", "--no-page", "--no-texts"])
    assert again.exit_code == 0, again.output
    assert "From before to after" in again.stdout and not (world.folder / "again" / "report.html").exists()
    assert ChangeReport.load(world.folder / "again").associations == []
    assert ChangeReport.load(world.folder / "again").kl == pytest.approx(report.kl)


def test_an_adapter_is_explained_and_its_card_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the change of the adapter; what a loopback Hub got has the section, and no text unless asked for."""
    known = ("--decomposition", "diff/components", "--pefs", "diff/pefs", "--steps", "0.5", "--no-growth")
    monkeypatch.chdir(world.folder)
    done = CliRunner().invoke(app, ["explain-adapter", "lora", "data.jsonl", "-o", "explained", *known, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["change"]["adapters"] == {"lora": 1.0} and said["mean_kl"] > 0
    assert not (world.folder / "explained" / "pefs").exists()
    assert len(said["changed"]) >= 3, "the adapter of this test changes too few answers to show any"
    again = run(
        "explain-adapter", "--config", "explained/run.yaml", "-o", "again-explained", "--json", cwd=world.folder
    )
    assert told(again)["curve"] == said["curve"]
    texts = [json.loads(line)["text"] for line in (world.folder / "data.jsonl").read_text().splitlines()]
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        env = hub.env("hf_alice", home=world.folder / "home")
        pushed = run("push", "lora", "alice/lora", "--explained", "explained", cwd=world.folder, env=env)
        assert pushed.returncode == 0, pushed.stderr
        card = hub.repos["alice/lora"].files()["README.md"].decode()
    assert card.count(TITLE_OF_SECTION) == 1 and "Over random" in card
    assert not any(text[:20] in card for text in texts)
    whole = change_section(ChangeReport.load(world.folder / "explained").to_dict(), texts=True)
    assert any(row["text"] in whole for row in said["changed"])


def test_ids_on_a_hub_are_taken_for_both_ends(world: World, tmp_path: Path) -> None:
    """Oracle: the change between the folders; the adapter's base model comes by its id too."""
    script = """
import json, sys
from transformers import AutoModelForSequenceClassification as Model
from tests.tiny import tiny_tokenizer
import peft
from hf_npeff import ParameterDirection
folder = sys.argv[1]
for name in ("model", "after"):
    Model.from_pretrained(f"{folder}/{name}").push_to_hub(f"alice/{name}")
    tiny_tokenizer().push_to_hub(f"alice/{name}")
adapter = peft.PeftModel.from_pretrained(Model.from_pretrained("alice/model"), f"{folder}/lora")
adapter.peft_config["default"].base_model_name_or_path = "alice/model"
adapter.push_to_hub("alice/lora")
change = ParameterDirection.between("alice/model", "alice/after")
lora = ParameterDirection.from_adapter("alice/lora")
print(json.dumps({"norm": change.norm, "revision": change.info["revision"], "lora": lora.norm,
                  "base": lora.info["model"]}))
"""
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        done = warm_processes.run(["-c", script, world.folder], env=hub.env("hf_alice", home=tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    here = ParameterDirection.between(world.folder / "model", world.folder / "after")
    assert found["norm"] == pytest.approx(here.norm) and len(found["revision"]) == 40
    assert found["lora"] == pytest.approx(ParameterDirection.from_adapter(world.folder / "lora").norm, rel=1e-5)
    assert found["base"] == "alice/model"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("diff", "model", "model", "data.jsonl"), "same weights"),
        (("diff", "model", "nowhere", "data.jsonl"), "nowhere"),
        (("diff", "model", "after", "data.jsonl", "--pefs", "diff/pefs"), "decomposition"),
        (("explain-adapter", "model", "data.jsonl"), "adapter"),
        (("push", "diff/components", "alice/c", "--explained", "diff"), "has none"),
        (("push", "lora", "alice/c", "--explained", "model"), "change.json"),
    ],
)
def test_bad_input_ends_in_one_line(
    world: World, arguments: tuple[str, ...], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the exit code, and what the message names."""
    monkeypatch.chdir(world.folder)
    more = () if arguments[0] == "push" else ("-o", "bad", *map(str, SMALL))
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code in (1, 2) and word in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_a_card_has_one_section_whatever_it_held_before(world: World, tmp_path: Path) -> None:
    """Oracle: what stood there stays, the section is replaced, and nothing in a report is markup."""
    report = ChangeReport.load(world.folder / "diff").to_dict()
    report["components"][0]["label"] = "<script>|x|\n# title"
    section = change_section(report, texts=True)
    assert "<script>" not in section and "\n# title" not in section
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# Mine\n\nText.\n\n## Citation\n\nMe.\n")
    for _ in range(2):
        add_change_section(tmp_path, section, "org/model")
    card = (tmp_path / "README.md").read_text()
    assert card.count(TITLE_OF_SECTION) == 1 and card.startswith("---\nlibrary_name: peft\n---\n# Mine\n\nText.")
    assert card.index(TITLE_OF_SECTION) < card.index("## Citation") and card.endswith("Me.\n")
    with pytest.raises(CorruptStoreError):
        change_section({"kl": [1.0]})


def test_a_report_of_another_decomposition_is_refused_and_private_texts_stay_out(world: World) -> None:
    """Oracle: the error; and the words of the data are nowhere in what a page without texts holds."""
    decomposition = Decomposition.load(world.folder / "diff" / "components")
    report = ChangeReport.load(world.folder / "diff")
    page = gather(decomposition, Extras(change=report), texts=False, layout=None)
    held = json.dumps(page.facts["change"])
    assert not any(row["text"] in held for row in report.changed + report.unexplained)
    with pytest.raises(ValueError, match="do not belong"):
        gather(decomposition, Extras(change={**report.to_dict(), "n": 3}), texts=True, layout=None)
    others = copy.copy(decomposition)  # as many examples, and others
    others.example_ids = [f"other-{i}" for i in range(report.n)]
    with pytest.raises(ValueError, match="do not belong"):
        gather(others, Extras(change=report), texts=True, layout=None)


@pytest.fixture(scope="module")
def page(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    executable = find_browser()
    if executable is None:
        pytest.skip("Chromium is not installed; `make browser` installs it where apt can")
    browser = Browser(executable)
    decomposition = Decomposition.load(world.folder / "diff" / "components")
    target = tmp_path_factory.mktemp("page") / "page.html"
    write(decomposition, target, extras=Extras(change=ChangeReport.load(world.folder / "diff")), layout=None)
    opened = browser.open(target.as_uri())
    yield opened
    assert opened.errors == []
    browser.close()


def test_the_page_shows_what_changed(world: World, page: Page) -> None:
    """Oracle: the report: components in its order, every changed answer, every point of the way; links lead on."""
    report = ChangeReport.load(world.folder / "diff")
    page.show("#/change")
    assert page.texts("main h1") == ["What changed"]
    assert len(page.texts(".change-component")) == len(report.components)
    links = page.each(".change-component th a", "e.hash")
    assert links == [f"#/component/{each.component}" for each in report.components if not each.new]
    section = "section[aria-labelledby=s-answers-that-changed] tbody tr"
    assert len(page.texts(section)) == len(report.changed)
    way = page.texts("section[aria-labelledby=s-from-before-to-after] tbody th")
    assert len(way) == len(report.curve) + len(report.without)
    for width in (1280, 390):
        page.resize(width, 844)
        page.show("#/")
        page.show("#/change")
        assert page.run("document.scrollingElement.scrollWidth") <= width
