"""Nothing that is read runs, no token gets out, and nobody's code is trusted unless the user says so."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hf_npeff import NPEFFAnalyzer, ParameterDirection, UnsupportedModelError
from hf_npeff.cli import app
from tests import warm_processes
from tests.hub_server import HubServer
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_npeff"

# The source -----------------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "pty", "commands",
    "ctypes", "runpy", "code", "codeop", "imp",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_ATTRIBUTES = {
    ("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("torch", "save"), ("torch", "jit"), ("pd", "read_pickle"), ("importlib", "reload"), ("tempfile", "mktemp"),
}  # fmt: skip
SPAWNING = re.compile(r"(spawn|exec)[lvpe]+")


def dangers(source: str) -> list[str]:
    """What a source does that could run what it reads, a line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            if pair in FORBIDDEN_ATTRIBUTES or (pair[0] == "os" and SPAWNING.fullmatch(pair[1])):
                found.append(f"{node.lineno}: uses {'.'.join(pair)}")
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: calls {node.func.id}")
        found += [f"{node.lineno}: {danger}" for danger in _dangers_of_call(node)]
    return found


def _dangers_of_call(call: ast.Call) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = ast.unparse(call.func)
    if name == "torch.load" and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and "allow_pickle" in given and not _is(given["allow_pickle"], False):
        yield "np.load of pickles"
    if "shell" in given and not _is(given["shell"], False):
        yield "a shell"
    if name.endswith(("extract", "extractall")) and not _is(given.get("filter"), "data"):
        yield "an archive unpacked without filter='data'"
    if "trust_remote_code" in given and isinstance(given["trust_remote_code"], ast.Constant):
        yield "trust_remote_code not left to the user"


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value


def test_nothing_in_the_package_unpickles_evaluates_or_opens_a_shell() -> None:
    """Oracle: the syntax tree of every module."""
    files = [*PACKAGE.rglob("*.py")]
    assert len(files) > 60
    found = {str(path.relative_to(ROOT)): dangers(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import os\nos.system('ls')", "eval('1')", "exec('1')",
        "import torch\ntorch.load('a')", "import torch\ntorch.load('a', weights_only=False)", "yaml.load(x)",
        "np.load('a', allow_pickle=True)", "run('ls', shell=True)", "f = __import__('os')", "tar.extractall('a')",
        "M.from_pretrained('a', trust_remote_code=True)", "import subprocess as s", "os.execvp('a', [])",
        "import os\nrun = os.popen",
    ],
)  # fmt: skip
def test_the_check_of_the_source_finds_what_is_planted(source: str) -> None:
    """Oracle: one danger each."""
    assert dangers(source)


CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
Path({canary!r}).touch()
class OurConfig(GPT2Config):
    model_type = "ours"
class OurForCausalLM(GPT2LMHeadModel):
    config_class = OurConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model's folder with code of its own, and the file that the code makes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder, canary = tmp_path / "model", tmp_path / "it ran"
    tiny_model("gpt2", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "modeling_ours.py").write_text(CODE.format(canary=str(canary)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "ours", "architectures": ["OurForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_ours.OurConfig", "AutoModelForCausalLM": "modeling_ours.OurForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, canary


def test_code_of_a_models_repository_runs_only_when_the_user_says_so(with_code: tuple[Path, Path]) -> None:
    """Oracle: a file that the code makes; it is made with trust_remote_code=True, the control."""
    folder, canary = with_code
    with pytest.raises(ValueError, match="trust_remote_code"):
        NPEFFAnalyzer.from_pretrained(folder)
    assert not canary.exists()
    analyzer = NPEFFAnalyzer.from_pretrained(folder, trust_remote_code=True)
    assert canary.exists()
    assert "trust_remote_code" not in json.dumps(analyzer.provenance()) + json.dumps(analyzer.fisher.to_dict())


def test_comparing_models_never_runs_their_code(with_code: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: a file that the code makes; the control is the loaded model, which the message asks for."""
    folder, canary = with_code
    plain = tmp_path / "plain"
    model = tiny_model("gpt2", dtype=torch.float32)
    model.save_pretrained(plain)
    tiny_tokenizer().save_pretrained(plain)
    (tmp_path / "data.txt").write_text("the cat\na dog ran\n")
    with pytest.raises(UnsupportedModelError, match=r"ParameterDirection\.between"):
        ParameterDirection.between(model, folder)
    arguments = ["diff", str(plain), str(folder), str(tmp_path / "data.txt"), "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1 and "its own code" in refused.output
    assert not canary.exists()
    after = NPEFFAnalyzer.from_pretrained(folder, trust_remote_code=True).model
    with pytest.raises(ValueError, match=r"same weights|architecture"):
        ParameterDirection.between(model, after)


def test_a_replayed_run_does_not_bring_its_trust_along(with_code: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: the same file; a run.yaml that asks for trust, and one written by a run that had it."""
    folder, canary = with_code
    (tmp_path / "data.txt").write_text("the cat\na dog ran\n")
    arguments = ["compute", str(folder), str(tmp_path / "data.txt"), "-o", str(tmp_path / "out"), "--rank", "1"]
    runner = CliRunner()
    evil = tmp_path / "run.yaml"
    evil.write_text(yaml.safe_dump({"command": "compute", "settings": {"trust_remote_code": True, "rank": 1}}))
    refused = runner.invoke(app, [*arguments, "--config", str(evil)])
    assert refused.exit_code == 1 and "trust_remote_code" in refused.output
    assert not canary.exists()
    done = runner.invoke(app, [*arguments, "--trust-remote-code"])
    assert done.exit_code == 0, done.output
    assert canary.exists() and "trust" not in (tmp_path / "out" / "run.yaml").read_text()


# Tokens ---------------------------------------------------------------------------------------------------------------

CANARY = "hf_CANARYcanaryCANARYcanary0123456789"

SECRETIVE = """
import logging, os, sys, traceback, json, pickle, warnings
from pathlib import Path

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
for name in ("httpcore", "httpcore2", "httpx", "httpx2", "urllib3", "filelock"):  # of others
    logging.getLogger(name).setLevel(logging.WARNING)

import torch
from hf_npeff import NPEFF, Decomposition, FisherConfig, NPEFFAnalyzer, ParameterDirection, PEFs, NPEFFError
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

token = given["token"]
tiny_model("gpt2", dtype=torch.float32).push_to_hub("alice/tiny", token=token)
tiny_tokenizer().push_to_hub("alice/tiny", token=token)
said = []

def attempt(function, *arguments, **options):
    try:
        thing = function(*arguments, **options)
    except Exception as error:
        said.append("".join(traceback.format_exception(error)))
        said.append(repr(error) + repr(error.args) + repr(vars(error)))
        chain = error
        while chain is not None:
            said.append(repr(chain) + str(chain))
            chain = chain.__cause__ or chain.__context__
        return None
    said.append(repr(thing) + str(thing))
    for name in ("__dict__",):
        said.append(repr(getattr(thing, name, "")))
    return thing

analyzer = attempt(
    NPEFFAnalyzer.from_pretrained, "alice/tiny", token=token,
    fisher=FisherConfig(rank=2, sketch="countsketch", sketch_dim=64),
)
data = [{"id": f"e{i}", "text": " ".join(WORDS[i : i + 5])} for i in range(8)]
pefs = attempt(analyzer.compute_pefs, data, "pefs")
decomposition = attempt(NPEFF(2, n_restarts=1).fit, pefs)
direction = attempt(analyzer.lift, decomposition, 0, pefs, data, method="adjoint")
adapter = attempt(direction.to_adapter)
for thing, name in ((pefs, "p"), (decomposition, "d"), (direction, "v"), (adapter, "a")):
    thing.save_pretrained("kept-" + name)
    attempt(thing.push_to_hub, "alice/" + name, token=token)
    attempt(thing.push_to_hub, "bob/" + name, token=token)  # not hers
    attempt(thing.push_to_hub, "no such: id", token=token)
    attempt(thing.push_to_hub, "alice/" + name, token=token + "X")
for kind in (PEFs, Decomposition, ParameterDirection):
    for name in ("alice/p", "alice/d", "alice/v", "alice/none", "bob/x", "a b"):
        attempt(kind.from_pretrained, name, token=token)
        attempt(kind.from_pretrained, name, token=token + "X", revision="none")
attempt(NPEFFAnalyzer.from_pretrained, "alice/none", token=token)
attempt(NPEFFAnalyzer.from_pretrained, "alice/tiny", token=token + "X")
attempt(NPEFFAnalyzer.from_pretrained, "alice/tiny", token=token, revision="none")
Path("said.txt").write_text("\\n".join(said))
out["said"] = len(said)
"""


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a user with a token leaves behind on a loopback Hub: files, and all that was printed or logged."""
    home = tmp_path_factory.mktemp("secret")
    code = f"import json, sys\ngiven, out = json.loads(sys.argv[1]), {{}}\n{SECRETIVE}\nprint(json.dumps(out))"
    with HubServer(tokens={CANARY: "alice", "hf_other": "bob"}) as hub:
        env = hub.env(home=home / "hub")
        done = warm_processes.run(["-c", code, json.dumps({"token": CANARY})], env=env, cwd=home)
        assert done.returncode == 0, done.stderr[-3000:]
        stored = b"\n".join(
            content for repo in hub.repos.values() for content in _contents_of(repo)
        )  # what others can download
    (home / "on the hub").write_bytes(stored)
    return home, done.stdout + done.stderr


def _contents_of(repo: Any) -> Iterator[bytes]:
    """All bytes that a repository of the loopback Hub holds, whatever it keeps them in."""
    pending = [vars(repo)]
    while pending:
        thing = pending.pop()
        if isinstance(thing, bytes):
            yield thing
        elif isinstance(thing, str):
            yield thing.encode()
        elif isinstance(thing, dict):
            pending += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set):
            pending += list(thing)
        elif hasattr(thing, "__dict__"):
            pending.append(vars(thing))


def test_a_token_is_in_no_file_log_card_repr_or_exception(secretive: tuple[Path, str]) -> None:
    """Oracle: a canary, searched for in every byte that was written, printed, logged, raised, shown or uploaded."""
    home, printed = secretive
    said = (home / "said.txt").read_text()
    assert "there is no folder and no repository alice/none" in said  # the errors are those that were meant
    assert "ParameterDirection(component 0" in said and "hf_npeff" in printed
    secrets = (CANARY, CANARY[3:], CANARY[::-1])
    found = [where for where, text in (("printed", printed), ("said", said)) if any(s in text for s in secrets)]
    searched = 0
    for path in home.rglob("*"):
        if path.is_file():
            searched += 1
            content = path.read_bytes()
            found += [str(path) for secret in secrets if secret.encode() in content]
    assert not found
    assert searched > 30
    assert CANARY[:8] not in printed
    assert (home / "on the hub").stat().st_size > 10_000  # the control: there was something to find it in


def test_no_option_of_the_command_line_takes_a_token() -> None:
    """Oracle: the documented commands; what is on a command line is in the shell's history and in run.yaml."""
    assert "--token" not in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_a_log_of_everything_tells_nothing_of_texts(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Oracle: a private text, searched for in the package's log at its most talkative."""
    caplog.set_level(logging.DEBUG, logger="hf_npeff")
    analyzer = NPEFFAnalyzer(tiny_model("gpt2", dtype=torch.float32), tiny_tokenizer())
    secret = "the queen sees a red fish"
    pefs = analyzer.compute_pefs([secret, "a dog ran", "paris is old", "the cat sat"], tmp_path / "p")
    analyzer.decompose(pefs, 2, n_restarts=1).save_pretrained(tmp_path / "d")
    assert secret not in caplog.text and "red fish" not in caplog.text
