"""What is published on a loopback Hub comes back, to the right people, whole, and says clearly when it does not.

Users are processes of their own with caches of their own, driven through the real client: see `tests/hub_server.py`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from hf_npeff import CorruptStoreError, Decomposition, FormatVersionError, NPEFFError, PEFs
from hf_npeff.config import DecompositionConfig
from hf_npeff.sharing.files import sha256_of
from hf_npeff.sharing.hub import clear_errors, is_hub_id, resolve_folder, text_columns
from tests import warm_processes
from tests.hub_server import HubServer

REPOSITORY = Path(__file__).resolve().parent.parent
NEW_TEXTS = ["the old king sees a red bird", "a dog ran and the fish was sad", "paris is not italy"]
PREAMBLE = """
import json, logging, sys
from pathlib import Path
given, out = json.loads(sys.argv[1]), {}

def message(function, *arguments, **options):
    '''The class and message of the error a call ends in.'''
    try:
        function(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
"""


def person(hub: HubServer, script: str, *, token: str | None, home: Path, **given: Any) -> dict[str, Any]:
    """Run a script as a user with a cache of their own; `given` goes in as JSON, the script's `out` comes back."""
    code = f"{PREAMBLE}\n{textwrap.dedent(script)}\nprint(json.dumps(out))"
    home.mkdir(parents=True, exist_ok=True)
    done = warm_processes.run(["-c", code, json.dumps(given, default=str)], env=hub.env(token, home=home), cwd=home)
    assert done.returncode == 0, done.stderr
    assert "hf_alice" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


ALICE = """
import torch
from huggingface_hub import HfApi
from hf_npeff import NPEFF, Decomposition, FisherConfig, NPEFFAnalyzer
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

api = HfApi()
model = tiny_model("gpt2", dtype=torch.float32)
model.push_to_hub("alice/tiny")
tiny_tokenizer().push_to_hub("alice/tiny")
generator = torch.Generator().manual_seed(0)
words = torch.randint(0, len(WORDS), (24, 6), generator=generator).tolist()
data = [
    {"id": f"e{i}", "text": " ".join(WORDS[j] for j in row), "label": i % 2, "kind": ["up", "down"][i % 2],
     "note": f"private remark {i}"}
    for i, row in enumerate(words)
]
config = FisherConfig(rank=3, sketch="countsketch", sketch_dim=512, seed=5)
analyzer = NPEFFAnalyzer.from_pretrained("alice/tiny", fisher=config)
pefs = analyzer.compute_pefs(data)
decomposition = NPEFF(4, n_restarts=2).fit(pefs)
decomposition.rename(1, "king | queen")
out["commit"] = api.model_info("alice/tiny").sha
out["url"] = decomposition.push_to_hub("alice/npeff", datasets=["alice/words"], license="apache-2.0")
first = api.model_info("alice/npeff").sha
out["first"] = first
decomposition.rename(0, "second thoughts")
out["pr"] = decomposition.push_to_hub("alice/npeff", create_pr=True)
out["branch"] = decomposition.push_to_hub("alice/npeff", revision="next", commit_message="Names")
decomposition.push_to_hub("alice/secret", private=True, include_texts=True)
out["refused"] = message(decomposition.push_to_hub, "alice/npeff", private=True, include_texts=True)
out["other"] = message(decomposition.push_to_hub, "bob/npeff")
out["token"] = message(decomposition.push_to_hub, "alice/npeff", token="hf_wrongwrongwrong")
pefs.push_to_hub("alice/pefs")
pefs[:8].push_to_hub("alice/pefs", commit_message="Fewer")
decomposition.save_pretrained("local")
api.upload_folder(repo_id="alice/npeff", folder_path="local", path_in_repo="runs/one", revision="next")
api.create_repo("alice/empty")
new = analyzer.compute_pefs(given["texts"])
out["W"] = decomposition.transform(new).tolist()
out["G"] = decomposition.pseudo_fishers.sum(1).tolist()
"""


@dataclass
class World:
    hub: HubServer
    home: Path
    alice: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub on which Alice has published a model, its decomposition and its PEFs."""
    home = tmp_path_factory.mktemp("hub")
    with HubServer(tokens={"hf_alice": "alice", "hf_bob": "bob"}) as hub:
        yield World(hub, home, person(hub, ALICE, token="hf_alice", home=home / "alice", texts=NEW_TEXTS))


def test_a_push_holds_our_files_and_no_texts_unless_they_are_asked_for(world: World) -> None:
    """The bytes on the server, read with pyarrow; the private push is the control that texts can go along."""
    import io

    import pyarrow.parquet as pq

    public, secret = world.hub.repos["alice/npeff"], world.hub.repos["alice/secret"]
    names = {".gitattributes", "config.json", "decomposition.safetensors", "examples.parquet", "README.md"}
    assert public.files().keys() == secret.files().keys() == names
    columns = pq.read_table(io.BytesIO(public.files()["examples.parquet"])).column_names
    assert sorted(columns) == ["content_hash", "example_id", "id", "kind", "label", "prediction"]
    kept = pq.read_table(io.BytesIO(secret.files()["examples.parquet"])).column_names
    assert {"text", "note"} <= set(kept)
    for revision in ("main", "refs/pr/1"):
        assert not any(b"private remark" in content for content in public.files(revision).values())
    assert any(b"private remark" in content for content in secret.files().values())
    assert secret.private and not public.private
    card = public.files()["README.md"].decode()
    assert "Left out, because they may be private: note, text." in card
    assert world.alice["commit"] in card


def test_pull_requests_branches_and_refusals_leave_main_as_it_was(world: World) -> None:
    """History on the server; names inside config.json tell the three states apart."""
    repo = world.hub.repos["alice/npeff"]

    def names(revision: str) -> dict[str, str]:
        return json.loads(repo.files(revision)["config.json"])["names"]

    assert names("main") == {"1": "king | queen"}
    assert names("refs/pr/1") == names("next") == {"0": "second thoughts", "1": "king | queen"}
    assert [c.title for c in repo.history()] == ["Upload decomposition", "initial commit"]
    assert "/discussions/1" in world.alice["pr"]
    assert world.alice["first"] in world.alice["url"]
    kind, text = world.alice["refused"]
    assert kind == "ValueError" and "alice/npeff exists and is public" in text
    kind, text = world.alice["other"]
    assert kind == "OSError" and "bob/npeff" in text and "may not" in text
    kind, text = world.alice["token"]
    assert kind == "OSError" and "token" in text and "wrongwrong" not in text
    shards = [name for name in world.hub.repos["alice/pefs"].files() if name.endswith(".safetensors")]
    assert shards == ["pefs-00000.safetensors"]


def test_a_second_user_gets_the_same_coefficients_from_ids_and_new_texts_alone(world: World) -> None:
    """Alice's own coefficients, to 1e-5: with her Fisher config, and with like= from an analyzer with the defaults."""
    bob = person(
        world.hub,
        """
        from hf_npeff import Decomposition, NPEFFAnalyzer, PEFs, list_decompositions
        import torch
        out["listed"] = list_decompositions("alice/tiny")
        decomposition = Decomposition.from_pretrained(out["listed"][0])
        out["commit"], out["columns"] = decomposition.commit, sorted(decomposition.columns)
        base, revision = decomposition.info["model"], decomposition.info["revision"]
        analyzer = NPEFFAnalyzer.from_pretrained(base, revision=revision, fisher=decomposition.fisher_config)
        new = analyzer.compute_pefs(given["texts"])
        out["same_config"] = decomposition.transform(new).tolist()

        default = NPEFFAnalyzer.from_pretrained(base)
        before = default.fisher
        out["like"] = decomposition.transform(default.compute_pefs(given["texts"], like=decomposition)).tolist()
        out["untouched"] = default.fisher == before
        out["incompatible"] = message(decomposition.transform, default.compute_pefs(given["texts"]))
        pefs = PEFs.from_pretrained("alice/pefs")
        out["pefs"] = [len(pefs), pefs.fingerprint == decomposition.fingerprint, sorted(pefs.columns)]
        out["of_pefs"] = (decomposition.transform(pefs) - decomposition.coefficients[:8]).abs().max().item()
        from tests.tiny import tiny_model, tiny_tokenizer
        wider = tiny_model("gpt2", n_embd=24, n_head=2, dtype=torch.float32)
        other = NPEFFAnalyzer(wider, tiny_tokenizer())
        out["no_model"] = message(other.compute_pefs, given["texts"], like=PEFs.from_factors(torch.eye(3)))
        out["other_model"] = message(other.compute_pefs, given["texts"], like=decomposition)

        readme = Path(__import__("huggingface_hub").hf_hub_download("alice/npeff", "README.md")).read_text()
        space = {}
        for block in readme.split("```python\\n")[1:]:
            exec(block.split("```")[0], space)
        out["card"] = list(space["coefficients"].shape)
        """,
        token=None,
        home=world.home / "bob",
        texts=NEW_TEXTS,
    )
    expected = torch.tensor(world.alice["W"])
    assert expected.max() > 0.02
    assert bob["listed"] == ["alice/npeff"]
    assert bob["commit"] == world.alice["first"]
    assert (torch.tensor(bob["same_config"]) - expected).abs().max() < 1e-5
    assert (torch.tensor(bob["like"]) - expected).abs().max() < 1e-5
    assert bob["untouched"]
    assert bob["incompatible"][0] == "IncompatibleSketchError" and "like=decomposition" in bob["incompatible"][1]
    assert bob["pefs"] == [8, True, ["content_hash", "example_id", "id", "kind", "label", "prediction"]]
    assert bob["of_pefs"] < 1e-3  # the solver's own tolerance
    assert bob["other_model"][0] == "IncompatibleSketchError" and "alice/tiny" in bob["other_model"][1]
    assert bob["no_model"][0] == "ValueError" and "not made by hf_npeff" in bob["no_model"][1]
    assert bob["card"] == [2, 4]


def test_revisions_folders_tokens_and_the_cache(world: World) -> None:
    """Names inside what was loaded tell the revisions apart; the Hub's log shows what was asked for."""
    script = """
        from hf_npeff import Decomposition
        load = Decomposition.from_pretrained
        out["main"] = load("alice/npeff").names
        out["branch"] = load("alice/npeff", revision="next").names
        out["pr"] = load("alice/npeff", revision="refs/pr/1").names
        out["first"] = load("alice/npeff", revision=given["first"]).names
        out["inner"] = load("alice/npeff", revision="next", subfolder="runs/one").names
        out["cache"] = load("alice/npeff", cache_dir="elsewhere").commit
        out["elsewhere"] = sorted(p.name for p in Path("elsewhere").iterdir() if p.name.startswith("models"))
        out["again"] = load("alice/npeff", local_files_only=True).names
        for name, arguments in given["wrong"].items():
            out[name] = message(load, **arguments)
        out["secret"] = load("alice/secret", token="hf_alice").columns["note"][0]
    """
    wrong = {
        "missing": {"id_or_path": "alice/never"},
        "private": {"id_or_path": "alice/secret", "token": False},
        "revision": {"id_or_path": "alice/npeff", "revision": "v9"},
        "subfolder": {"id_or_path": "alice/npeff", "subfolder": "runs/two"},
        "outside": {"id_or_path": "alice/npeff", "subfolder": "../other"},
        "absolute": {"id_or_path": "alice/npeff", "subfolder": "/etc"},
        "uncached": {"id_or_path": "alice/pefs", "local_files_only": True},
        "malformed": {"id_or_path": "alice/np--eff"},
        "path": {"id_or_path": "./alice/npeff/there"},
        "not_ours": {"id_or_path": "alice/tiny"},
        "empty": {"id_or_path": "alice/empty"},
        "pefs": {"id_or_path": "alice/pefs"},
        "bad_token": {"id_or_path": "alice/secret", "token": "hf_badbadbadbad\n"},
    }
    home = world.home / "carol"
    before = len(world.hub.requests)
    out = person(world.hub, script, token=None, home=home, first=world.alice["first"], wrong=wrong)
    both = {"0": "second thoughts", "1": "king | queen"}
    assert out["branch"] == out["pr"] == out["inner"] == both
    assert out["first"] == out["main"] == out["again"] == {"1": "king | queen"}
    assert out["secret"] == "private remark 0"
    assert out["cache"] == world.alice["first"] and out["elsewhere"] == ["models--alice--npeff"]
    agents = [call.headers["User-Agent"] or "" for call in world.hub.requests[before:]]
    assert any("hf_npeff/" in agent for agent in agents)
    expected = {
        "missing": ("OSError", "alice/never"),
        "private": ("OSError", "hf auth login"),
        "revision": ("OSError", "'v9'"),
        "subfolder": ("OSError", "'runs/two'"),
        "outside": ("ValueError", "'..'"),
        "absolute": ("ValueError", "within the repository"),
        "uncached": ("OSError", "local_files_only=False"),
        "malformed": ("ValueError", "user/name"),
        "path": ("OSError", "neither a folder"),
        "not_ours": ("FormatVersionError", "not written by hf_npeff"),
        "empty": ("OSError", "holds no files of hf_npeff"),
        "pefs": ("CorruptStoreError", "not the config of a decomposition"),
        "bad_token": ("OSError", "alice/secret"),
    }
    for name, (kind, part) in expected.items():
        assert out[name] is not None, name
        assert out[name][0] == kind, (name, out[name])
        assert part in out[name][1], (name, out[name])
        assert "badbad" not in out[name][1] and "Traceback" not in out[name][1]
    weights = [c for c in world.hub.requests[before:] if c.method == "GET" and c.path.endswith("model.safetensors")]
    assert not weights  # of the repository that is not ours, nothing large was fetched
    assert sorted(p.name for p in home.iterdir() if not p.name.startswith(".")) == ["elsewhere", "hub"]


def test_without_a_network_what_was_read_is_read_again_and_the_rest_is_refused(tmp_path: Path) -> None:
    """A Hub that goes away; then a push that meets nobody leaves no file behind."""
    small_decomposition().save_pretrained(tmp_path / "local")
    push = """
        from hf_npeff import Decomposition
        decomposition = Decomposition.from_pretrained(given["local"])
        out["broken"] = message(decomposition.push_to_hub, "alice/model") if given["break"] else None
        decomposition.push_to_hub("alice/model")
        out["warned"] = Decomposition.from_pretrained("alice/model").names
    """
    gone = """
        import os, tempfile, time
        time.sleep = lambda seconds: None  # the client's waits between its attempts
        from hf_npeff import Decomposition, PEFs, list_decompositions
        os.environ["TMPDIR"] = tempfile.tempdir = os.getcwd()
        decomposition = Decomposition.from_pretrained("alice/model")
        out["names"] = decomposition.names
        out["other"] = message(Decomposition.from_pretrained, "alice/other")
        out["pefs"] = message(PEFs.from_pretrained, "alice/other")
        out["push"] = message(decomposition.push_to_hub, "alice/model", token="hf_secretsecret")
        out["list"] = message(list_decompositions, "alice/tiny")
        out["left"] = [name for name in os.listdir() if name.startswith("tmp")]
    """
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        hub.fail_next("PUT", "^/lfs/", status=400)
        given = {"local": tmp_path / "local", "break": True}
        out = person(hub, push, token="hf_alice", home=tmp_path / "home", **given)
        assert out["broken"][0] == "OSError" and "alice/model" in out["broken"][1]
        assert [c.title for c in hub.repos["alice/model"].history()] == ["Upload decomposition", "initial commit"]
        hub.stop()
        out = person(hub, gone, token=None, home=tmp_path / "home")
    assert out["names"] == {"0": "a name"}
    for name in ("other", "pefs", "push", "list"):
        kind, text = out[name]
        assert kind == "OSError" and "cannot be reached" in text, out[name]
        assert "secretsecret" not in text
    assert out["left"] == []


# Without a Hub


def small_decomposition() -> Decomposition:
    """Three components of ten examples; every number is known."""
    G = torch.nn.functional.normalize(torch.arange(1.0, 13).reshape(3, 4).cos(), dim=1)
    W = torch.arange(30.0).reshape(10, 3) / 30
    info = PEFs.from_factors(torch.eye(4)).info
    return Decomposition(
        W,
        G,
        config=DecompositionConfig(n_components=3),
        info=info,
        example_ids=[f"e{i}" for i in range(10)],
        columns={"text": [f"text {i}" for i in range(10)], "label": [i % 2 for i in range(10)]},
        loss_history=[0.5, 0.25],
        scales=torch.ones(4),
        names={0: "a name"},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_decomposition().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_comes_back_as_it_was(saved: Path) -> None:
    """Identity of every tensor and field; `datasets` reads the examples."""
    import datasets

    before, after = small_decomposition(), Decomposition.from_pretrained(saved)
    for name in ("coefficients", "pseudo_fishers", "scales"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    for name in ("config", "info", "example_ids", "columns", "names", "loss_history", "evaluations", "converged"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.commit is None
    assert torch.equal(Decomposition.from_pretrained(saved.parent, subfolder="saved").coefficients, before.coefficients)
    table = datasets.Dataset.from_parquet(str(saved / "examples.parquet"), cache_dir=str(saved.parent / "cache"))
    assert table["example_id"][:2] == ["e0", "e1"] and table["text"][0] == "text 0"


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors under a checksum that fits them, as somebody with an editor would make."""
    path = folder / "decomposition.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    rewrite_config(folder, lambda c: c["files"].update({path.name: sha256_of(path)}))


def truncate(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def flip(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(bytes(content))


def truncate_and_resign(folder: Path) -> None:
    truncate(folder, "decomposition.safetensors")
    path = folder / "decomposition.safetensors"
    rewrite_config(folder, lambda c: c["files"].update({path.name: sha256_of(path)}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[NPEFFError], str]] = {
    "older format": (lambda f: rewrite_config(f, lambda c: c.update(format_version=0)), FormatVersionError, "0"),
    "newer format": (lambda f: rewrite_config(f, lambda c: c.update(format_version=99)), FormatVersionError, "99"),
    "no format": (lambda f: rewrite_config(f, lambda c: c.pop("format_version")), FormatVersionError, "hf_npeff"),
    "unknown setting": (
        lambda f: rewrite_config(f, lambda c: c["decomposition"].update(colour="red")),
        FormatVersionError,
        "colour",
    ),
    "missing setting": (
        lambda f: rewrite_config(f, lambda c: c["pefs"]["fisher"].pop("rank")),
        FormatVersionError,
        "rank",
    ),
    "missing field": (lambda f: rewrite_config(f, lambda c: c.pop("n_examples")), CorruptStoreError, "n_examples"),
    "a list for a field": (lambda f: rewrite_config(f, lambda c: c.update(names=[1])), CorruptStoreError, "config"),
    "not JSON": (lambda f: truncate(f, "config.json"), CorruptStoreError, "config.json"),
    "truncated tensors": (lambda f: truncate(f, "decomposition.safetensors"), CorruptStoreError, "SHA-256"),
    "truncated, checksum adapted": (truncate_and_resign, CorruptStoreError, "cannot be read"),
    "altered tensors": (lambda f: flip(f, "decomposition.safetensors"), CorruptStoreError, "SHA-256"),
    "altered examples": (lambda f: flip(f, "examples.parquet"), CorruptStoreError, "SHA-256"),
    "no tensors": (lambda f: (f / "decomposition.safetensors").unlink(), CorruptStoreError, "missing"),
    "other shape": (
        lambda f: rewrite_tensors(f, lambda t: t.update(coefficients=torch.zeros(9, 3))),
        CorruptStoreError,
        "(9, 3)",
    ),
    "other scales": (lambda f: rewrite_tensors(f, lambda t: t.update(scales=torch.ones(5))), CorruptStoreError, "(5,)"),
    "no G": (lambda f: rewrite_tensors(f, lambda t: t.pop("pseudo_fishers")), CorruptStoreError, "pseudo_fishers"),
    "a number for G": (
        lambda f: rewrite_tensors(f, lambda t: t.update(pseudo_fishers=torch.tensor(1.0))),
        CorruptStoreError,
        "shapes",
    ),
    "other number of examples": (
        lambda f: rewrite_config(f, lambda c: c.update(n_examples=11)),
        CorruptStoreError,
        "11",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(saved: Path, damage: str) -> None:
    """The undamaged folder loads; each change alone is refused with the words that name it."""
    assert len(Decomposition.from_pretrained(saved)) == 3
    change, kind, part = DAMAGE[damage]
    change(saved)
    with pytest.raises(kind, match=re.escape(part)):
        Decomposition.from_pretrained(saved)


def test_a_save_that_fails_leaves_what_was_there(saved: Path, tmp_path: Path) -> None:
    """Identity of the folder's bytes before and after; nothing appears where nothing was."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    broken = small_decomposition()
    broken.evaluations = {0: {"ratio": float("nan")}}
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(ValueError, match="nan"):
            broken.save_pretrained(folder)
    with pytest.raises(ValueError, match="license"):
        small_decomposition().save_pretrained(saved, license="free: [as in beer]")
    with pytest.raises(ValueError, match="datasets"):
        small_decomposition().save_pretrained(saved, datasets=["a\nb"])
    with pytest.raises(ValueError, match="'colour'"):
        small_decomposition().save_pretrained(saved, include_columns=["colour"])
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_somebody_elses_readme_is_not_overwritten_and_our_card_is(saved: Path) -> None:
    """The bytes written here; the second save's card names the component."""
    other = small_decomposition()
    other.rename(2, "renamed later")
    other.save_pretrained(saved)
    assert "renamed later" in (saved / "README.md").read_text()
    (saved / "README.md").write_text("# My thesis\n")
    other.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "# My thesis\n"


def test_pefs_are_saved_with_a_card_and_read_through_links(tmp_path: Path) -> None:
    """Identity of rows and columns; the Hub's cache is made of links, so links are followed, and still checked."""
    pefs = PEFs.from_factors(torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0)), label=[0, 1] * 3)
    pefs.save_pretrained(tmp_path / "pefs")
    assert "Per-example Fishers" in (tmp_path / "pefs" / "README.md").read_text()
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "pefs").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    again = PEFs.from_pretrained(tmp_path / "links")
    assert torch.equal(again.factors, pefs.factors) and again.columns == pefs.columns
    flip(tmp_path / "pefs", "pefs-00000.safetensors")
    with pytest.raises(CorruptStoreError, match="SHA-256"):
        PEFs.from_pretrained(tmp_path / "links")
    with pytest.raises(ValueError, match="pefs"):
        pefs.save_pretrained(tmp_path / "pefs")
    with pytest.raises(CorruptStoreError, match=r"manifest\.json"):
        small_decomposition().save_pretrained(tmp_path / "decomposition")
        PEFs.from_pretrained(tmp_path / "decomposition")


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/a", "C:\\a", "a\\..\\..", "", ".", "\\\\host\\share", "a\0b"])
def test_a_subfolder_stays_inside(saved: Path, subfolder: str) -> None:
    """Planted: none of these may be joined to a path."""
    with pytest.raises(ValueError, match="subfolder"):
        resolve_folder(saved, subfolder=subfolder)


def test_a_path_that_is_missing_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    """No network is needed for the answer."""
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c", ""):
        with pytest.raises(OSError, match=re.escape(f"'{name}'")):
            Decomposition.from_pretrained(name)


def test_another_commit_of_the_model_warns_and_names_both(caplog: pytest.LogCaptureFixture) -> None:
    """Planted revisions; the same one, an unknown one and another model stay silent."""
    decomposition, pefs = small_decomposition(), PEFs.from_factors(torch.eye(4))
    cases = [
        ("m", "aaa", "m", "bbb", 1),
        ("m", "aaa", "m", "aaa", 0),
        ("m", "aaa", "m", None, 0),
        ("m", "aaa", "n", "bbb", 0),
    ]
    for model, commit, other, other_commit, warnings in cases:
        decomposition.info |= {"model": model, "revision": commit}
        pefs.info |= {"model": other, "revision": other_commit}
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_npeff"):
            decomposition.transform(pefs)
        assert len(caplog.records) == warnings
        if warnings:
            assert "aaa" in caplog.text and "bbb" in caplog.text


def test_text_columns_follow_the_written_rule() -> None:
    """Planted columns, each with the answer that the docstring gives."""
    n = 200
    columns = {
        "text": ["same"] * n,
        "note": [f"note {i}" for i in range(n)],
        "label": ["yes", "no"] * (n // 2),
        "topic": [f"topic {i % 64}" for i in range(n)],
        "many": [f"name {i % 65}" for i in range(n)],
        "long": ["x" * 65, "y" * 65] * (n // 2),
        "score": [i / 7 for i in range(n)],
        "count": list(range(n)),
        "flag": [True, None] * (n // 2),
        "gaps": [None, "a", "b", None] * (n // 4),
        "lists": [["words"]] * n,
        "prediction": [f"token {i}" for i in range(n)],
        "content_hash": [f"{i:032x}" for i in range(n)],
    }
    assert text_columns(columns) == ["text", "note", "many", "long", "lists"]
    assert text_columns({"answers": ["a", "b", "b"]}) == ["answers"]  # too few to tell: not published


def test_hub_ids_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted names."""
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("gpt2") and is_hub_id("org/model-1.0_x")
    for name in ("/home/me/model", "a/b/c", "a b", "../x", "a/..", "x\n", "", None, "[x](y)"):
        assert not is_hub_id(name), name
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_id("gpt2")


def test_no_token_reaches_a_message() -> None:
    """A client that puts the token into its error; the original is kept out of the traceback too."""
    token = "hf_verysecretindeed"
    for error in (
        ValueError(f"Illegal header value b'Bearer {token}'"),
        OSError(f"{token} refused"),
        ConnectionError(token),
    ):
        with pytest.raises(OSError) as caught, clear_errors("org/name", token=token):
            raise error
        assert "verysecret" not in str(caught.value) and "org/name" in str(caught.value)
        assert caught.value.__suppress_context__
    with pytest.raises(KeyError), clear_errors("org/name"):
        raise KeyError("a bug is not hidden")
    assert issubclass(HfHubHTTPError, OSError)


def test_a_file_of_a_pefs_store_copied_from_elsewhere_is_noticed(tmp_path: Path) -> None:
    """A shard of other PEFs under the same name has another checksum."""
    for name, seed in (("a", 0), ("b", 1)):
        rows = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(seed))
        PEFs.from_factors(rows).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "b" / "pefs-00000.safetensors", tmp_path / "a")
    with pytest.raises(CorruptStoreError, match="SHA-256"):
        PEFs.from_pretrained(tmp_path / "a")
