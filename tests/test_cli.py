"""The command line, through real processes on a tiny model; docs/cli.md is what the commands say of themselves.

What files hold is read with the library, whose own tests stand behind it; exit codes, streams and JSON are the shell's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
import transformers
import typer
import yaml
from typer.testing import CliRunner

import hf_npeff
from hf_npeff import NPEFF, Adapter, Decomposition, DecompositionConfig, FisherConfig, ParameterDirection, PEFs
from hf_npeff.cli import app
from hf_npeff.commands import acting, looking
from hf_npeff.commands.inputs import DataOptions, ModelOptions, read_data
from hf_npeff.commands.options import attribute_docs
from hf_npeff.decomposition.matching import matches, similarities
from tests import warm_processes
from tests.hub_server import HubServer
from tests.test_report import read as page_facts
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs" / "cli.md"


def run(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m hf_npeff` as a process of its own, without a network unless `env` has one."""
    return warm_processes.run(["-m", "hf_npeff", *arguments], cwd=cwd, env=env)


def told(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON of a command that succeeded."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass
class World:
    """A folder with a model, data, and what the first three commands made of them."""

    folder: Path
    computed: Any
    decomposed: Any
    bars: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("gpt2", "sequence-classification", dtype=torch.float32).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(WORDS), (24, 6), generator=generator).tolist()
    rows = [{"id": f"e{i}", "text": " ".join(WORDS[j] for j in row), "label": i % 3} for i, row in enumerate(drawn)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "new.txt").write_text("\n".join(row["text"] for row in rows[:3]) + "\n\n")
    (folder / "notes.docx").write_text("not data")
    settings = ("--rank", 2, "--sketch", "countsketch", "--sketch-dim", 256)
    shown = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    computed = run("compute", "model", "data.jsonl", "-o", "pefs", *settings, "--json", cwd=folder, env=shown)
    decomposed = run("decompose", "pefs", "-o", "found", "--n-components", 4, "--n-restarts", 2, "--json", cwd=folder)
    return World(folder, told(computed), told(decomposed), computed.stderr)


def test_compute_and_decompose_write_what_they_say_and_how_to_do_it_again(world: World) -> None:
    pefs = PEFs.from_pretrained(world.folder / "pefs")
    assert (len(pefs), pefs.rank, pefs.dim) == (24, 2, 256)
    assert [world.computed[name] for name in ("examples", "rank", "dim")] == [24, 2, 256]
    assert pefs.config == FisherConfig(rank=2, sketch="countsketch", sketch_dim=256)
    assert "PEFs" in world.bars and "24/24" in world.bars  # on stderr: stdout was JSON alone
    found = Decomposition.from_pretrained(world.folder / "found")
    assert found.config == DecompositionConfig(n_components=4, n_restarts=2)
    assert world.decomposed["explained"] == found.explained
    content = yaml.safe_load((world.folder / "pefs" / "run.yaml").read_text())
    assert content["command"] == "compute"
    assert {field.name for field in fields(FisherConfig)} - set(content["settings"]) == {
        "exclude_modules", "parameters",
    }  # fmt: skip


def test_report_refuses_other_weights_unless_it_is_told_not_to_compare(world: World, tmp_path: Path) -> None:
    """Oracle: the error's words, and the page; the model's weights are half of what they were."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world.folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    page, inputs = tmp_path / "page.html", ("--pefs", "pefs", "--model", tmp_path / "other", "--data", "data.jsonl")
    paths = [str(world.folder / v) if v in ("pefs", "data.jsonl") else str(v) for v in inputs]
    arguments = ["report", str(world.folder / "found"), *paths, "--map", "none", "--top", "1", "-o", str(page)]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1 and "other weights than the model has now" in refused.output
    assert not page.exists()
    done = CliRunner().invoke(app, [*arguments, "--no-check-weights"])
    assert done.exit_code == 0, done.output
    assert page.exists()


def test_a_run_yaml_replays_to_the_same_result_and_options_beside_it_go_first(world: World) -> None:
    told(run("compute", "--config", "pefs/run.yaml", "-o", "again/pefs", "--json", cwd=world.folder))
    told(run("decompose", "--config", "found/run.yaml", "-o", "again/found", "--json", cwd=world.folder))
    for name, tensor in (("pefs", "pefs-00000.safetensors"), ("found", "decomposition.safetensors")):
        before = (world.folder / name / tensor).read_bytes()
        assert (world.folder / "again" / name / tensor).read_bytes() == before
        first, second = ((world.folder / at / "run.yaml").read_text() for at in (name, f"again/{name}"))
        assert second == first.replace(f"output: {name}\n", f"output: again/{name}\n")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "line",
    [
        "explain found model new.txt",
        "perturb found pefs model data.jsonl --component 2 --kind delta --scale 0.1 --n-top 4 --n-others 8 "
        "--eval data.jsonl --by label",
        "perturb found pefs model data.jsonl --all --rank 2 --scale 0.1 --n-top 4 --n-others 8",
        "edit pefs model data.jsonl --change one.json --outcome 0 --ridge 0.001 --no-check-weights",
    ],
)
def test_the_run_yaml_of_a_command_that_uses_components_replays(
    world: World, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what the first run printed and wrote down; only the folder is another."""
    monkeypatch.chdir(world.folder)
    (world.folder / "one.json").write_text(json.dumps({"e0": 0.02}))
    first = CliRunner().invoke(app, [*line.split(), "-o", str(tmp_path / "a"), "--json"])
    assert first.exit_code == 0, first.output
    again = ["--config", str(tmp_path / "a" / "run.yaml"), "-o", str(tmp_path / "b"), "--json"]
    second = CliRunner().invoke(app, [line.split()[0], *again])
    assert second.exit_code == 0, second.output
    written = [yaml.safe_load((tmp_path / at / "run.yaml").read_text()) for at in "ab"]
    assert written[1]["settings"].pop("output") != written[0]["settings"].pop("output")
    assert written[1] == written[0]
    assert json.loads(second.stdout) | {"output": ""} == json.loads(first.stdout) | {"output": ""}


def test_components_explain_and_perturb(world: World) -> None:
    named = run("components", "found", "--component", 2, "--rename", "past [bold]tense", "--top", 4, cwd=world.folder)
    assert named.returncode == 0, named.stderr
    found = Decomposition.from_pretrained(world.folder / "found")
    top = found[2].top_examples(4)
    assert found.names == {2: "past [bold]tense"} and "past [bold]tense" in named.stdout
    assert top.texts is not None and all(text in named.stdout for text in top.texts)
    explained = told(run("explain", "found", "model", "new.txt", "-o", "told", "--json", cwd=world.folder))
    assert json.loads((world.folder / "told" / "coefficients.json").read_text()) == explained
    assert explained["components"][2] == "past [bold]tense"
    W = torch.tensor([example["coefficients"] for example in explained["examples"]])
    pefs = PEFs.from_pretrained(world.folder / "pefs")
    torch.testing.assert_close(W, found.transform(pefs[:3]), rtol=1e-4, atol=1e-5)  # the texts of the first three
    options: tuple[object, ...] = ("--component", 2, "-o", "off", "--rank", 2, "--n-top", 4, "--n-others", 8)
    options += ("--eval", "data.jsonl", "--by", "label", "--spare", "--search-rounds", 1)
    report = told(run("perturb", "found", "pefs", "model", "data.jsonl", *options, "--json", cwd=world.folder))
    groups = report["held_out"]["steps"][0]["groups"]
    assert {name: group["n"] for name, group in groups.items()} == {"all": 24} | {f"label={i}": 8 for i in range(3)}
    assert report["component"] == 2 and report["best"]["top"] == pytest.approx(0.5, rel=0.1)
    direction = ParameterDirection.load(world.folder / "off" / "direction")
    assert direction.norm == pytest.approx(1) and direction.info["component"] == 2
    assert direction.info["spared"]["rank"] == 2 and report["retained_energy"] == pytest.approx(1, abs=1e-4)
    assert report["off_target"]["tried"] > 0
    settings = json.loads((world.folder / "off" / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"]) == ("LORA", 2)
    assert (world.folder / "off" / "run.yaml").is_file() and (world.folder / "off" / "report.json").is_file()


LOADS_ALL = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
given = json.loads(sys.argv[1])
logits = {}
for j in given["components"]:
    model = AutoModelForSequenceClassification.from_pretrained(given["model"])
    model = PeftModel.from_pretrained(model, given["repo"], subfolder=f"component-{j}").eval()
    with torch.no_grad():
        logits[j] = model(input_ids=torch.tensor([given["tokens"]])).logits[0].tolist()
space = {}
code = open(given["card"]).read().split("```python\\n")[1].split("```")[0]
exec(code, space)
logits["card"] = type(space["model"]).__name__
print(json.dumps(logits))
"""


def test_all_components_become_adapters_in_one_run_and_one_repository(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: W + ΔW of each adapter; PEFT loads each from a loopback Hub by its folder, and the card's code runs."""
    options = ("--all", "-o", str(tmp_path / "all"), "--n-top", "4", "--n-others", "8", "--rank", "2", "--json")
    monkeypatch.chdir(world.folder)
    lifted = CliRunner().invoke(app, ["perturb", "found", "pefs", "model", "data.jsonl", *options])
    assert lifted.exit_code == 0, lifted.output
    report = json.loads(lifted.stdout)
    found = Decomposition.from_pretrained(world.folder / "found")
    assert [r["component"] for r in report["components"]] == list(range(len(found)))
    assert json.loads((tmp_path / "all" / "report.json").read_text())["components"] == report["components"]
    page = ("--perturbation", str(tmp_path / "all"), "--map", "none", "-o", str(tmp_path / "all.html"))
    shown = CliRunner().invoke(app, ["report", "found", *page])
    assert shown.exit_code == 0, shown.output
    facts = page_facts(tmp_path / "all.html")[0]
    assert list(facts["reports"]) == list(facts["adapters"]) == [str(j) for j in range(len(found))]
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(world.folder / "model").eval()
    tokens = [9, 10, 11]
    truth, before = {}, model(input_ids=torch.tensor([tokens])).logits[0]
    for j, each in enumerate(report["components"]):
        adapter = Adapter.from_pretrained(tmp_path / "all" / f"component-{j}")
        moved = ParameterDirection({n: adapter.delta(n) for n in adapter.layouts}, adapter.layouts, unit=False)
        assert moved.norm == pytest.approx(abs(each["best"]["scale"]), rel=0.3), "the measured step, cut to rank 2"
        with torch.no_grad(), moved.applied_to(model, 1.0):
            truth[str(j)] = model(input_ids=torch.tensor([tokens])).logits[0]
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        env = hub.env("hf_alice", home=tmp_path / "home")
        pushed = told(
            run("push", tmp_path / "all", "alice/all", "--components", "all", "--json", cwd=tmp_path, env=env)
        )
        assert pushed["kind"] == "adapters" and pushed["url"].startswith(hub.url)
        some = run("push", tmp_path / "all", "alice/some", "--components", "0,2", "--json", cwd=tmp_path, env=env)
        assert some.returncode == 0, some.stderr
        files = hub.repos["alice/all"].files()
        few = {name.split("/")[0] for name in hub.repos["alice/some"].files() if "/" in name}
        (tmp_path / "card.md").write_bytes(
            files["README.md"].replace(b'"model"', json.dumps(str(world.folder / "model")).encode())
        )
        given = {"components": list(range(len(found))), "model": str(world.folder / "model"), "repo": "alice/all",
                 "tokens": tokens, "card": str(tmp_path / "card.md")}  # fmt: skip
        done = warm_processes.run(["-c", LOADS_ALL, json.dumps(given)], env=env)
    wrong = CliRunner().invoke(app, ["push", str(tmp_path / "all"), "alice/x", "--components", "99"])  # before any Hub
    assert done.returncode == 0, done.stderr
    logits = json.loads(done.stdout.splitlines()[-1])
    assert logits.pop("card").startswith("PeftModel") and few == {"component-0", "component-2"}
    for j, expected in truth.items():
        assert (torch.tensor(logits[j]) - expected).abs().max() < 1e-4 and (expected - before).abs().max() > 1e-3
    assert wrong.exit_code == 1 and "[99]" in wrong.stderr
    card = files["README.md"].decode()
    assert all(f"component-{j}" in card for j in range(len(found))) and 'subfolder="component-0"' in card
    assert b'"alice/all", subfolder="component-2"' in files["component-2/README.md"]
    assert not any(name.endswith(("lifted.json", "run.yaml", "report.json")) for name in files)


def test_edit_writes_a_direction_of_its_natural_length_and_an_adapter(world: World) -> None:
    """Oracle: what the folder holds, and the realised change in the report, of the sign that was asked for."""
    pefs = PEFs.from_pretrained(world.folder / "pefs")
    (world.folder / "changes.json").write_text(json.dumps({pefs.example_ids[0]: -0.02}))
    assert pefs.predictions is not None
    options = ("--change", "changes.json", "--outcome", int(pefs.predictions[0]), "--ridge", 0.001, "-o", "edited")
    report = told(run("edit", "pefs", "model", "data.jsonl", *options, "--json", cwd=world.folder))
    (change,) = report["changes"].values()
    assert change["wanted"] == pytest.approx(-0.02) and change["realised"] < -0.001
    direction = ParameterDirection.load(world.folder / "edited" / "direction")
    assert direction.info["natural_scale"] == 1 and direction.info["method"] == "edit"
    assert report["outcome"].startswith("class ")
    seen = run("edit", "pefs", "model", "data.jsonl", *options[:-1], "again", cwd=world.folder).stdout
    for name, kl in (("should change", "kl"), ("beside the outcome", "kl_beside"), ("should stay", "kl_of_others")):
        line = next(line for line in seen.splitlines() if name in line)
        assert f"{report[kl]:.3g}" in line and (f"{report['flips_of_others']:.0%}" in line or kl != "kl_of_others")
    settings = json.loads((world.folder / "edited" / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"]) == ("LORA", 4)


def test_push_recognises_each_kind_of_folder_and_keeps_texts_here(world: World) -> None:
    """Against a loopback Hub; what it holds afterwards."""
    Decomposition.from_pretrained(world.folder / "found").save_pretrained(
        world.folder / "licensed", license="mit", datasets=["alice/words"]
    )
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        env = hub.env("hf_alice", home=world.folder / "home")
        adapter = world.folder / "adapter"
        direction = ParameterDirection({"w": torch.eye(2)}, {"w": "linear"}, {"model": "alice/tiny", "component": 0})
        direction.to_adapter(1).save_pretrained(adapter)
        (adapter / "private.txt").write_text("a remark")
        done = run("push", "licensed", "alice/found", "--private", "--json", cwd=world.folder, env=env)
        assert "alice/found is made from the local model" in done.stderr
        pushed = told(done)
        assert pushed["kind"] == "decomposition" and pushed["url"].startswith(hub.url)
        assert told(run("push", "adapter", "alice/off", "--json", cwd=world.folder, env=env))["kind"] == "adapter"
        refused = run("push", world.folder, "alice/all", cwd=world.folder, env=env)
        files = {repo.rpartition("/")[2]: hub.repos[repo].files() for repo in hub.repos}
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("error: ") and "has no decomposition" in refused.stderr
    assert "adapter_model.safetensors" in files["off"] and "private.txt" not in files["off"]
    assert b'"alice/off"' in files["off"]["README.md"]
    assert "run.yaml" not in files["found"] and "decomposition.safetensors" in files["found"]
    assert b"king" not in files["found"]["examples.parquet"]
    assert b"license: mit" in files["found"]["README.md"] and b"- alice/words" in files["found"]["README.md"]


def test_compare_matches_a_permutation(world: World) -> None:
    """Planted truth: the same decomposition with its components in another order."""
    found = Decomposition.from_pretrained(world.folder / "found")
    order = [2, 0, 3, 1]
    other = Decomposition(
        found.coefficients[:, order], found.pseudo_fishers[order], config=found.config, info=found.info,
        example_ids=found.example_ids, columns=found.columns,
    )  # fmt: skip
    other.save_pretrained(world.folder / "other")
    compared = told(run("compare", "found", "other", "--json", cwd=world.folder))
    assert {pair["first"]: pair["second"] for pair in compared["pairs"]} == {j: i for i, j in enumerate(order)}
    assert compared["mean"] == pytest.approx(1) and compared["same_model_mean"] is None
    assert compared["without_partner"] == {"first": [], "second": []}


def test_compare_says_what_two_fits_of_one_model_give_and_what_has_no_partner(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same rows fitted from another start and matched here; a component of noise, which matches nothing."""
    monkeypatch.chdir(world.folder)
    found = Decomposition.from_pretrained("found")
    W = found.coefficients.clone()
    W[:, 3] = torch.rand(24, generator=torch.Generator().manual_seed(0))
    noisy = Decomposition(
        W, found.pseudo_fishers, config=found.config, info=found.info, example_ids=found.example_ids,
        columns=found.columns,
    )  # fmt: skip
    noisy.save_pretrained("noisy")
    arguments = ["compare", "found", "noisy", "--pefs", "pefs"]
    compared = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    pefs = PEFs.from_pretrained("pefs")
    again = NPEFF.from_config(replace(found.config, seed=found.config.seed + 1)).fit(pefs)
    expected = {i: s for i, _, s in matches(similarities(found, again)[1])}
    assert {pair["first"]: pair["same_model"] for pair in compared["pairs"]} == pytest.approx(expected)
    assert compared["same_model_mean"] == pytest.approx(sum(expected.values()) / 4)
    lonely = compared["without_partner"]["second"]
    assert compared["pairs"][-1]["second"] == 3 and compared["pairs"][-1]["similarity"] < 0.9
    assert all(each["top"] and each["component"] in range(4) for each in lonely)
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}).stdout
    assert "two fits of the first model" in shown and found[0].top_examples(1).lines()[0][:20] in shown


def test_without_shared_examples_pseudo_fishers_are_compared_and_without_scipy_greedily(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Decomposition.from_pretrained(world.folder / "found")
    other = Decomposition(
        found.coefficients[:, :3], -found.pseudo_fishers[[3, 1, 0]], config=found.config, info=found.info,
        example_ids=[f"other {i}" for i in range(24)],
    )  # fmt: skip
    monkeypatch.setattr("hf_npeff.decomposition.matching.find_spec", lambda name: None)
    measure, S = similarities(found, other)
    pairs = matches(S)
    assert measure == "cosine of pseudo-Fishers"
    assert {i: j for i, j, _ in pairs} == {3: 0, 1: 1, 0: 2}
    other.info["fingerprint"] = "another"
    with pytest.raises(ValueError, match=r"examples.*sketch"):
        similarities(found, other)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("components nowhere/at/all", 1, "neither a folder nor the id"),
        ("components model", 1, "config.json"),
        ("components .", 1, "has no decomposition: config.json is missing"),
        ("components found --component 9", 1, "there are 4 components"),
        ("components found --component 9 --debug", 1, "Traceback"),
        ("components found --rename x", 2, "--component"),
        ("compute model notes.docx -o x", 1, "not a type of file"),
        ("compute model nothing.jsonl -o x", 1, "there is no file nothing.jsonl"),
        ("compute model data.jsonl -o x --columns colour", 1, "colour"),
        ("compute model data.jsonl", 2, "--output"),
        ("compute model data.jsonl -o x --rank 0", 1, "rank must be"),
        ("compute model data.jsonl -o x --sketch magic", 2, "magic"),
        ("compute no/model data.jsonl -o x", 1, "no/model"),
        ("compute modle data.jsonl -o x", 1, "no folder modle (did you mean model?)"),
        ("compute model dota.jsonl -o x", 1, "no file dota.jsonl (did you mean data.jsonl"),
        ("components fuond", 1, "no folder fuond (did you mean found?)"),
        ("compute --config found/run.yaml", 2, "decompose"),
        ("compute --config data.jsonl", 2, "run.yaml"),
        ("compute --config nothing.yaml", 2, "there is no file nothing.yaml"),
        ("decompose nowhere/at/all -o x", 1, "neither a folder nor the id"),
        ("perturb found pefs model new.txt --component 0 -o x", 1, "not in this dataset"),
        ("push nowhere user/repo", 1, "no folder nowhere"),
        ("push foundd user/repo", 1, "no folder foundd (did you mean found?)"),
        ("push found user/repo --components all", 1, "is not a folder of several"),
        ("perturb found pefs model data.jsonl -o x", 1, "either --component"),
        ("perturb foundd pefs model data.jsonl -o x", 1, "no folder foundd (did you mean found?)"),
        ("perturb found pefs model data.jsonl --all --component 0 -o x", 1, "either --component"),
        ("perturb found pefs model data.jsonl --all --kind shira -o x", 1, "--kind is for a single component"),
        ("perturb found pefs model data.jsonl --component 0 --by label -o x", 1, "give --eval too"),
        ("perturb found pefs model data.jsonl --component 0 --eval dota.jsonl -o x", 1, "no file dota.jsonl"),
        ("dissolve", 2, "dissolve"),
    ],
)
def test_bad_input_ends_in_one_line(
    world: World, arguments: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process; a real one is looked at where a folder is pushed that is none of ours."""
    monkeypatch.chdir(world.folder)
    done = CliRunner().invoke(app, arguments.split(), prog_name="hf-npeff")
    assert done.exit_code == code and message in done.stderr and not done.stdout
    if code == 1 and "--debug" not in arguments:
        assert done.stderr.count("error: ") == 1 and done.stderr.endswith("\n") and "Traceback" not in done.stderr
    assert not (world.folder / "x").exists()


def test_the_demo_gets_its_options_and_a_dry_run_writes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself runs in its own test, on a real model."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("hf_npeff.demo.run", lambda **arguments: (print("a table"), given.update(arguments)))
    monkeypatch.chdir(world.folder)
    done = CliRunner().invoke(app, ["demo", "--queries", "4", "--output", "shown", "--json"])
    assert (
        json.loads(done.stdout) == {"output": "shown"}
        and "a table" in done.stderr
        and given.pop("output_dir") == Path("shown")
    )
    assert given == {"queries": 4, "rank": 8, "components": 14, "seed": 0}
    done = CliRunner().invoke(app, ["compute", "model", "data.jsonl", "--dry-run", "--json", "-o", "none"])
    assert json.loads(done.stdout)["n"] == 24 and not (world.folder / "none").exists()


def test_the_version_is_told() -> None:
    """By an interpreter that has imported nothing before."""
    command = [sys.executable, "-m", "hf_npeff", "--version"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == hf_npeff.__version__


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    """Oracle: click's own parameters of each command; the script is what `--show-completion` prints, in a real bash."""
    program = tmp_path / "hf-npeff"
    start = "import sys; sys.argv[0] = 'hf-npeff'; from hf_npeff.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    program.chmod(0o755)
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    asked = ("decompose", "components", "push")
    lines = ["com", "decompose --solver ", *(f"{name} --" for name in asked)]
    script = 'eval "$(hf-npeff --show-completion)"\n' + "\n".join(
        f'COMP_WORDS=(hf-npeff {line.rpartition(" ")[0]} "{line.rpartition(" ")[2]}")\n'
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _hf_npeff_completion hf-npeff; echo "${COMPREPLY[*]}"'
        for line in lines
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert found[:2] == [{"compute", "components", "compare"}, {"block_power", "reference"}], done.stderr
    for name, options in zip(asked, found[2:], strict=True):
        expected = {o for p in commands[name].params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
        assert options - {"--help"} == expected, name


def test_every_example_in_the_help_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: click's own parser, on each command line that a help text shows; nothing is run."""
    monkeypatch.chdir(tmp_path)
    commands = every_command()
    shown = {name: re.findall(rf"`hf-npeff {name} ([^`]+)`", command.help) for name, command in commands.items()}
    assert not [name for name, lines in shown.items() if not lines], "every command shows an example"
    for name, line in ((name, line) for name, lines in shown.items() for line in lines):
        arguments = shlex.split(line)
        if "--config" in arguments:
            replayed = tmp_path / arguments[arguments.index("--config") + 1]
            replayed.parent.mkdir(parents=True, exist_ok=True)
            settings = {"model": "user/model", "data": "data.txt"}
            replayed.write_text(yaml.safe_dump({"command": name, "settings": settings}))
        assert commands[name].make_context(name, arguments).params


def test_data_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": 'a, "b"\nc', "label": 1}, {"text": "d", "label": 0}]
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""\nc",1\nd,0\n')
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("one \u2028 line\n\n two\n")
    for ending in ("csv", "json", "jsonl", "parquet"):
        assert list(read_data(str(tmp_path / f"a.{ending}"), DataOptions())) == rows
        assert list(read_data(str(tmp_path / f"a.{ending}"), DataOptions(max_examples=1))) == rows[:1]
    assert read_data(str(tmp_path / "a.txt"), DataOptions()) == ["one \u2028 line", "two"]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match="line 2"):
        read_data(str(tmp_path / "bad.jsonl"), DataOptions())
    with pytest.raises(ValueError, match="--split"):
        read_data(str(tmp_path / "a.txt"), DataOptions(split="train"))


def test_every_option_has_its_line_in_the_docs_of_its_field() -> None:
    for cls in (FisherConfig, DecompositionConfig, ModelOptions, DataOptions):
        assert set(attribute_docs(cls)) == {field.name for field in fields(cls)}


def every_command() -> dict[str, Any]:
    """{name: command}, those of groups as "group name"."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {sub}": c for sub, c in inner.items()}
    return found


def help_of_every_command() -> str:
    """docs/cli.md: what `--help` says, without the terminal's frames."""
    group: Any = typer.main.get_command(app)
    groups = [g.typer_instance for g in app.registered_groups if g.typer_instance]
    callbacks = [c.callback for one in (app, *groups) for c in one.registered_commands if c.callback]
    kinds = {callback.__name__: callback.__annotations__ for callback in callbacks}
    kinds |= {name.replace("_", "-"): kind for name, kind in kinds.items()}
    parts = ["# The command line", "", "<!-- Made by `python -m tests.test_cli`. -->", "", group.help.strip()]
    for name, command in every_command().items():
        words = " ".join(["hf-npeff", name, *(p.name.upper() for p in command.params if is_argument(p)), "[OPTIONS]"])
        parts += ["", f"## {name}", "", f"    {words}", "", command.help.strip().replace(":\n-", ":\n\n-")]
        panels: dict[str, list[str]] = {}
        for p in (p for p in command.params if p.name not in COMMON):
            title = getattr(p, "rich_help_panel", None) or ("Arguments" if is_argument(p) else "Options")
            panels.setdefault(title, []).append(line_of(p, kinds[name.split()[-1]][p.name]))
        for title, lines in panels.items():
            parts += ["", f"{title}:", "", *lines]
    common = [line_of(p, bool) for p in group.commands["push"].params if p.name in COMMON]
    return "\n".join([*parts, "", "## Of every command", "", *common, ""])


COMMON = {"config", "as_json", "debug"}


def is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def line_of(parameter: Any, kind: Any) -> str:
    if is_argument(parameter):
        return f"- `{parameter.name.upper()}`: {parameter.help}"
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    facts = ["one of " + ", ".join(get_args(plain))] if get_origin(plain) is Literal else []
    default = parameter.default
    if parameter.required:
        facts.append("required")
    elif default is not None and default is not False:
        facts.append(f"default {' '.join(map(str, default)) if isinstance(default, list) else default}")
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return f"- {names}: {parameter.help}" + (f" ({'; '.join(facts)})" if facts else "")


def test_the_docs_hold_the_help_of_every_command() -> None:
    assert DOCS.read_text(encoding="utf-8") == help_of_every_command(), "run `python -m tests.test_cli`"


def test_the_help_names_every_command_and_option() -> None:
    for name, command in every_command().items():
        done = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0 and "hf-npeff" in done.stdout
        missing = [o for p in command.params for o in p.opts if o.startswith("--") and o not in done.stdout]
        assert not missing, f"{name}: {missing}"


if __name__ == "__main__":
    DOCS.write_text(help_of_every_command(), encoding="utf-8")


@pytest.mark.parametrize(("target", "reached", "said"), [(0.5, False, "0.5"), (0.5, True, ""), (None, False, "")])
def test_a_title_says_where_the_longest_step_misses_the_target(target: float | None, reached: bool, said: str) -> None:
    """Oracle: by hand; a step that was given has no target."""
    title = acting._missed(SimpleNamespace(target=target, reached=reached))  # type: ignore[arg-type]
    assert (said in title and "does not reach" in title) if said else title == ""


def test_columns_that_coincide_are_named_in_the_overview() -> None:
    """Oracle: by hand; columns that coincide are named, words are not."""
    association = {"feature": "label = positive", "same": ["prediction = positive", "good"], "share": 0.9, "rest": 0.1}
    line = looking._association_line(association)
    assert line == "label = positive and prediction = positive (90%, others 10%)"
