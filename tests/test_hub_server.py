"""The loopback Hub, as the real `huggingface_hub` client sees it: every script below runs in a process of its own.

The client reads its endpoint when imported, hence the processes. A script fills `out`, which comes back as JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm_processes
from tests.hub_server import HubServer

PREAMBLE = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
given, out, api = json.loads(sys.argv[1]), {}, HfApi()

def refusal(function, *arguments, **options):
    '''The name of the error a call ends in, and the HTTP status behind it.'''
    try:
        function(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

def put(repo, path, content, **options):
    return api.upload_file(repo_id=repo, path_in_repo=path, path_or_fileobj=content, **options)
"""

# Git's own: `printf 'hello\n' | git hash-object --stdin`.
HELLO_OID = "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(tokens={"hf_alice": "alice", "hf_bob": "bob"}) as server:
        yield server


def client(hub: HubServer, script: str, *, token: str | None = "hf_alice", home: Path, **given: Any) -> dict[str, Any]:
    """Run a script with the real client; `given` goes in as JSON, the script's `out` comes back."""
    code = f"{PREAMBLE}\n{textwrap.dedent(script)}\nprint(json.dumps(out))"
    done = warm_processes.run(["-c", code, json.dumps(given, default=str)], env=hub.env(token, home=home), timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def raw(hub: HubServer, method: str, path: str, body: bytes = b"", token: str = "hf_alice") -> tuple[int, bytes]:
    """A request without the client, which would refuse to send it."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hub.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def safetensors_bytes(*values: float) -> bytes:
    """A float32 vector called `w` in the safetensors format, written by hand."""
    end = 4 * len(values)
    header = json.dumps({"w": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}f", *values)


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_pushed_folder_comes_back_byte_for_byte(hub: HubServer, tmp_path: Path) -> None:
    """The files as written here; git's and SHA-256's checksums; safetensors' own reader over HTTP ranges."""
    files = {
        "README.md": b"---\ntags: [hf_npeff]\n---\n# Card\n",
        "config.json": b'{"format_version": 1}',
        "deep/down/hello.txt": b"hello\n",
        "a name with spaces, é & 100%.txt": b"odd",
        "empty.txt": b"",
        "weights.safetensors": safetensors_bytes(1.5, -2.0),
    }
    folder = write_folder(tmp_path / "folder", files)
    out = client(
        hub,
        """
        out["url"] = str(api.create_repo("alice/model"))
        out["again"] = refusal(api.create_repo, "alice/model")
        out["exist_ok"] = str(api.create_repo("alice/model", exist_ok=True))
        push = lambda **options: api.upload_folder(repo_id="alice/model", folder_path=given["folder"], **options)
        out["commit"] = push(commit_message="First").oid
        out["unchanged"] = push(commit_message="Second").oid
        out["snapshot"] = snapshot_download("alice/model")
        out["local_dir"] = snapshot_download("alice/model", local_dir=given["elsewhere"], allow_patterns="deep/*")
        out["file"] = hf_hub_download("alice/model", "hello.txt", subfolder="deep/down")
        out["tree"] = {e.path: getattr(e, "blob_id", "folder") for e in api.list_repo_tree("alice/model", "deep")}
        info = api.get_paths_info("alice/model", ["deep/down/hello.txt", "deep", "weights.safetensors", "none"])
        out["oids"], out["sha256"], out["found"] = [info[0].blob_id, info[2].blob_id], info[2].lfs.sha256, len(info)
        tensor = api.parse_safetensors_file_metadata("alice/model", "weights.safetensors").tensors["w"]
        out["tensor"] = [tensor.dtype, tensor.shape]
        info = api.model_info("alice/model", files_metadata=True)
        out["sizes"] = {s.rfilename: s.size for s in info.siblings}
        push(allow_patterns="nothing", delete_patterns=["deep/*", "empty.txt"])
        out["left"] = api.list_repo_files("alice/model")
        """,
        home=tmp_path / "home",
        folder=folder,
        elsewhere=tmp_path / "elsewhere",
    )
    assert out["url"] == out["exist_ok"] == f"{hub.url}/alice/model"
    assert out["again"] == ["HfHubHTTPError", 409]
    assert out["unchanged"] == out["commit"]
    snapshot = Path(out["snapshot"])
    assert snapshot.name == out["commit"]
    attributes = {".gitattributes": hub.repos["alice/model"].files()[".gitattributes"]}
    received = {str(p.relative_to(snapshot)): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()}
    assert received == files | attributes
    assert hub.repos["alice/model"].files(out["commit"]) == files | attributes
    assert (Path(out["local_dir"]) / "deep/down/hello.txt").read_bytes() == b"hello\n"
    assert Path(out["file"]).read_bytes() == b"hello\n"
    assert out["tree"] == {"deep/down": "folder"}
    sha256, size = hashlib.sha256(files["weights.safetensors"]).hexdigest(), len(files["weights.safetensors"])
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    assert out["oids"] == [HELLO_OID, hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode()).hexdigest()]
    assert out["sha256"] == sha256
    assert out["found"] == 3
    assert out["tensor"] == ["F32", [2]]
    assert out["sizes"] == {name: len(content) for name, content in (files | attributes).items()}
    assert sorted(out["left"]) == sorted((files | attributes).keys() - {"deep/down/hello.txt", "empty.txt"})
    assert [c.title for c in hub.repos["alice/model"].history()][1:] == ["First", "initial commit"]


def test_a_private_repository_does_not_exist_for_others_and_only_its_owner_writes(
    hub: HubServer, tmp_path: Path
) -> None:
    """The client's own exceptions; a name that was never created must be refused in the same way as a private one."""
    attempts = """
        for repo in ("alice/secret", "alice/never"):
            out[repo] = [
                refusal(hf_hub_download, repo, "note.txt"),
                refusal(snapshot_download, repo),
                refusal(api.model_info, repo),
                refusal(api.list_repo_files, repo),
                refusal(put, repo, "mine.txt", b"mine"),
            ]
        out["listed"] = [model.id for model in api.list_models(author="alice")]
        out["public"] = Path(hf_hub_download("alice/open", "note.txt")).read_text()
        out["write"] = refusal(put, "alice/open", "mine.txt", b"mine")
        out["branch"] = refusal(api.create_branch, "alice/open", branch="mine")
        out["settings"] = refusal(api.update_repo_settings, "alice/open", private=True)
        out["delete"] = refusal(api.delete_repo, "alice/open")
        out["namespace"] = refusal(api.create_repo, "alice/mine")
    """
    owner = client(
        hub,
        """
        for repo, private in (("alice/secret", True), ("alice/open", False)):
            api.create_repo(repo, private=private)
            put(repo, "note.txt", b"for my eyes" if private else b"for all")
        out["note"] = Path(hf_hub_download("alice/secret", "note.txt")).read_text()
        out["private"] = api.model_info("alice/secret").private
        """,
        home=tmp_path / "alice",
    )
    assert owner == {"note": "for my eyes", "private": True}
    # Without a token the client reports every refusal of a repository as "not found", a write to a public one too.
    nobody = client(hub, attempts, token=None, home=tmp_path / "nobody")
    assert nobody["alice/secret"] == nobody["alice/never"] == [["RepositoryNotFoundError", 401]] * 5
    assert nobody["write"] == nobody["branch"] == ["RepositoryNotFoundError", 401]
    assert nobody["namespace"] == nobody["delete"] == ["HfHubHTTPError", 401]
    other = client(hub, attempts, token="hf_bob", home=tmp_path / "bob")
    assert other["alice/secret"] == other["alice/never"] == [["RepositoryNotFoundError", 404]] * 5
    for refused in ("write", "branch", "settings", "delete", "namespace"):
        assert other[refused] == ["HfHubHTTPError", 403], refused
    for out in (nobody, other):
        assert out["listed"] == ["alice/open"]
        assert out["public"] == "for all"
    assert hub.repos["alice/open"].files().keys() == {".gitattributes", "note.txt"}
    client(hub, 'api.update_repo_settings("alice/secret", private=False)', home=tmp_path / "alice")
    published = client(hub, attempts, token=None, home=tmp_path / "nobody2")
    assert published["alice/secret"][:4] == [None] * 4
    assert published["listed"] == ["alice/open", "alice/secret"]


def test_a_revision_is_pulled_as_it_was(hub: HubServer, tmp_path: Path) -> None:
    """Contents written here, pulled by commit, tag and branch; the client's exceptions for what is not there."""
    out = client(
        hub,
        """
        def read(revision):
            return Path(hf_hub_download("alice/model", "v.txt", revision=revision)).read_text()

        api.create_repo("alice/model")
        first = put("alice/model", "v.txt", b"one", commit_message="One").oid
        api.create_tag("alice/model", tag="v1.0", revision=first)
        second = put("alice/model", "v.txt", b"two", commit_message="Two", commit_description="Why").oid
        api.create_branch("alice/model", branch="feature/x", revision="v1.0")
        put("alice/model", "v.txt", b"three", revision="feature/x", commit_message="Three")
        out["read"] = {name: read(name) for name in ("main", "v1.0", "feature/x")}
        out["by_commit"] = [read(first), read(second)]
        out["shas"] = [first, second, *(api.model_info("alice/model", revision=name).sha for name in ("v1.0", "main"))]
        refs = api.list_repo_refs("alice/model", include_pull_requests=True)
        out["refs"] = [[r.name for r in kind] for kind in (refs.branches, refs.tags, refs.pull_requests)]
        commits = api.list_repo_commits("alice/model", revision="feature/x")
        out["titles"] = [commit.title for commit in commits]
        out["message"] = api.list_repo_commits("alice/model")[0].message
        add = [CommitOperationAdd("v.txt", b"late")]
        stale = dict(operations=add, commit_message="Late", parent_commit=first)
        out["stale"] = refusal(api.create_commit, "alice/model", **stale)
        out["no_revision"] = refusal(read, "v9")
        out["no_branch"] = refusal(put, "alice/model", "v.txt", b"x", revision="v9")
        out["no_file"] = refusal(hf_hub_download, "alice/model", "absent.txt")
        out["branch_again"] = refusal(api.create_branch, "alice/model", branch="feature/x")
        api.delete_branch("alice/model", branch="feature/x")
        api.delete_tag("alice/model", tag="v1.0")
        out["gone"] = [refusal(api.model_info, "alice/model", revision=name) for name in ("feature/x", "v1.0")]
        out["main_stays"] = refusal(api.delete_branch, "alice/model", branch="main")
        api.delete_repo("alice/model")
        out["deleted"] = refusal(api.model_info, "alice/model")
        """,
        home=tmp_path,
    )
    assert out["read"] == {"main": "two", "v1.0": "one", "feature/x": "three"}
    assert out["by_commit"] == ["one", "two"]
    first, second, tagged, head = out["shas"]
    assert (tagged, head) == (first, second)
    assert first != second
    assert out["refs"] == [["main", "feature/x"], ["v1.0"], []]
    assert out["titles"] == ["Three", "One", "initial commit"]
    assert out["message"] == "Why"
    assert out["stale"] == ["HfHubHTTPError", 412]
    assert out["no_revision"] == out["no_branch"] == ["RevisionNotFoundError", 404]
    assert out["no_file"] == ["RemoteEntryNotFoundError", 404]
    assert out["branch_again"] == ["HfHubHTTPError", 409]
    assert out["gone"] == [["RevisionNotFoundError", 404]] * 2
    assert out["main_stays"] == ["HfHubHTTPError", 403]
    assert out["deleted"] == ["RepositoryNotFoundError", 404]
    assert hub.repos == {}


def test_a_pull_request_leaves_main_alone_and_is_pulled_by_its_number(hub: HubServer, tmp_path: Path) -> None:
    """Bob may propose what he may not commit: the same push is refused without `create_pr`."""
    folder = write_folder(tmp_path / "folder", {"v.txt": b"two", "w.safetensors": safetensors_bytes(2.0)})
    client(hub, 'api.create_repo("alice/model"); put("alice/model", "v.txt", b"one")', home=tmp_path / "alice")
    out = client(
        hub,
        """
        push = dict(repo_id="alice/model", folder_path=given["folder"], commit_message="Two")
        out["direct"] = refusal(api.upload_folder, **push)
        pull = api.upload_folder(**push, create_pr=True)
        out["pull"] = [pull.pr_num, pull.pr_revision, pull.pr_url]
        put("alice/model", "more.txt", b"more", revision="refs/pr/1")
        out["files"] = api.list_repo_files("alice/model", revision="refs/pr/1")
        for revision in ("main", "refs/pr/1"):
            out[revision] = Path(hf_hub_download("alice/model", "v.txt", revision=revision)).read_text()
        refs = api.list_repo_refs("alice/model", include_pull_requests=True)
        out["refs"] = [r.ref for r in refs.pull_requests]
        out["second"] = put("alice/model", "v.txt", b"three", create_pr=True).pr_revision
        """,
        token="hf_bob",
        home=tmp_path / "bob",
        folder=folder,
    )
    assert out["direct"] == ["HfHubHTTPError", 403]
    assert out["pull"] == [1, "refs/pr/1", f"{hub.url}/alice/model/discussions/1"]
    assert (out["main"], out["refs/pr/1"]) == ("one", "two")
    assert sorted(out["files"]) == [".gitattributes", "more.txt", "v.txt", "w.safetensors"]
    assert out["refs"] == ["refs/pr/1"]
    assert out["second"] == "refs/pr/2"
    repo = hub.repos["alice/model"]
    assert repo.head("refs/pr/1").author == "bob"
    assert repo.files().keys() == {".gitattributes", "v.txt"}


def test_a_broken_upload_commits_nothing_and_a_second_push_sends_only_what_is_missing(
    hub: HubServer, tmp_path: Path
) -> None:
    """The log of requests: which LFS objects travelled, and how often."""
    files = {"a.safetensors": safetensors_bytes(1.0), "b.safetensors": safetensors_bytes(2.0, 3.0), "c.txt": b"c"}
    client(hub, 'api.create_repo("alice/model")', home=tmp_path / "home")
    push = """
        push = dict(repo_id="alice/model", folder_path=given["folder"], commit_message="All")
        out["error"] = refusal(api.upload_folder, **push)
    """
    options: dict[str, Any] = {"home": tmp_path / "home", "folder": write_folder(tmp_path / "folder", files)}
    repo = hub.repos["alice/model"]

    hub.fail_next("POST", "/commit/main", status=500)  # everything is sent, and then the commit fails
    assert client(hub, push, **options)["error"] == ["HfHubHTTPError", 500]
    assert repo.files().keys() == {".gitattributes"}
    assert [call.status for call in hub.calls("PUT", "^/lfs/")] == [200, 200]
    assert client(hub, push, **options)["error"] is None
    assert repo.files() == files | {".gitattributes": repo.files()[".gitattributes"]}
    assert len(hub.calls("PUT", "^/lfs/")) == 2
    assert [commit.title for commit in repo.history()] == ["All", "initial commit"]

    write_folder(options["folder"], {"d.safetensors": safetensors_bytes(4.0)})
    hub.fail_next("PUT", "^/lfs/", status=400)  # an error that the client does not retry
    assert client(hub, push, **options)["error"][0] == "RuntimeError"
    assert "d.safetensors" not in repo.files()
    hub.fail_next("PUT", "^/lfs/", status=503)  # two that it does, within one push
    hub.fail_next("POST", "/verify$", status=None)
    assert client(hub, push, **options)["error"] is None
    assert repo.files()["d.safetensors"] == safetensors_bytes(4.0)
    assert [call.status for call in hub.calls("PUT", "^/lfs/")] == [200, 200, 400, 503, 200]
    assert [call.status for call in hub.calls("POST", "/verify$")] == [200, 200, None, 200]


def test_a_large_file_travels_as_lfs_and_a_broken_download_is_resumed(hub: HubServer, tmp_path: Path) -> None:
    """SHA-256 of the bytes written here; after the break, a range from where the client's last chunk ended."""
    content = random.Random(0).randbytes(23_000_000)  # half of it is more than the 10 MiB that the client reads at once
    folder = write_folder(tmp_path / "folder", {"large.dat": content, "small.dat": content[:1000]})
    hub.fail_next("GET", "/large.dat$", status=None)
    out = client(
        hub,
        """
        import hashlib
        api.create_repo("alice/data", repo_type="dataset", private=True)
        push = api.upload_folder(repo_id="alice/data", repo_type="dataset", folder_path=given["folder"])
        large, small = api.get_paths_info("alice/data", ["large.dat", "small.dat"], repo_type="dataset")
        out["lfs"] = [large.size, large.lfs.size, large.lfs.sha256, small.lfs]
        path = hf_hub_download("alice/data", "large.dat", repo_type="dataset", revision=push.oid)
        out["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        """,
        home=tmp_path / "home",
        folder=folder,
    )
    sha256 = hashlib.sha256(content).hexdigest()
    assert out["lfs"] == [len(content), len(content), sha256, None]
    assert out["sha256"] == sha256
    gets = hub.calls("GET", "/large.dat$")
    assert [call.status for call in gets] == [200, 206]
    assert [call.headers["Range"] for call in gets] == [None, f"bytes={10 * 2**20}-"]
    assert hub.repos["datasets/alice/data"].files()["large.dat"] == content


def test_what_was_pulled_is_there_offline(hub: HubServer, tmp_path: Path) -> None:
    """First with the Hub up but `local_files_only`, seen in its log; then with the Hub gone."""
    pull = """
        out["snapshot"] = snapshot_download("alice/model", **given["options"])
        out["file"] = Path(hf_hub_download("alice/model", "sub/note.txt", **given["options"])).read_text()
    """
    absent = """
        out["absent_file"] = refusal(hf_hub_download, "alice/model", "other.txt", **given["options"])
        out["absent_repo"] = refusal(snapshot_download, "alice/other", **given["options"])
    """
    client(
        hub,
        """
        api.create_repo("alice/model")
        put("alice/model", "sub/note.txt", b"kept")
        put("alice/model", "w.safetensors", b"weights")
        """,
        home=tmp_path / "alice",
    )
    online = client(hub, pull + absent, home=tmp_path / "user", options={})
    assert online["absent_file"] == ["RemoteEntryNotFoundError", 404]
    (known_absent,) = (tmp_path / "user").rglob(".no_exist/*/other.txt")  # the client remembers it for that commit
    assert known_absent.parent.name == Path(online["snapshot"]).name
    before = len(hub.requests)
    local = client(hub, pull + absent, home=tmp_path / "user", options={"local_files_only": True})
    assert len(hub.requests) == before
    assert local["absent_file"] == local["absent_repo"] == ["LocalEntryNotFoundError", None]
    hub.stop()
    down = client(hub, pull, home=tmp_path / "user", options={})
    for out in (online, local, down):
        assert out["file"] == "kept"
        assert out["snapshot"] == online["snapshot"]
        assert {path.name for path in Path(out["snapshot"]).iterdir()} == {".gitattributes", "sub", "w.safetensors"}


def test_models_are_listed_by_what_their_cards_say(hub: HubServer, tmp_path: Path) -> None:
    """Cards written with the client's own ModelCardData, listed by tag, search and author."""
    out = client(
        hub,
        r"""
        from huggingface_hub import ModelCard, ModelCardData
        def publish(name, private=False, files=(), **card):
            api.create_repo(name, private=private)
            body = f"---\n{ModelCardData(**card).to_yaml()}\n---\n# Card\n"
            put(name, "README.md", body.encode())
            for file in files:
                put(name, file, b"{}")
        ours = dict(library_name="hf_npeff", license="apache-2.0", base_model_relation="adapter")
        publish("alice/tiny-npeff", base_model="org/tiny", tags=["fisher"], datasets=["org/texts"], **ours)
        publish("alice/big-npeff", base_model="org/big", tags=["fisher", "npeff"], **ours)
        publish("alice/hidden-npeff", private=True, base_model="org/tiny", **ours)
        publish("alice/lora", base_model="org/tiny", library_name="peft", files=["adapter_config.json"])
        publish("alice/plain", pipeline_tag="text-generation", files=["model.safetensors"])
        anyone = HfApi(token=False)
        def names(api=anyone, **query):
            return sorted(model.id.removeprefix("alice/") for model in api.list_models(**query))
        out["all"] = names()
        out["mine"] = names(api)
        out["library"] = names(filter="hf_npeff")
        out["both"] = names(filter=["hf_npeff", "base_model:adapter:org/tiny"])
        out["relation"] = names(filter="base_model:adapter:org/tiny")
        out["dataset"] = names(trained_dataset="org/texts")
        out["none"] = names(filter=["hf_npeff", "absent"])
        out["search"] = names(search="TINY")
        out["author"] = names(author="bob")
        out["limit"] = len(names(limit=2))
        out["pipeline"] = names(pipeline_tag="text-generation")
        brief, = anyone.list_models(filter="npeff")
        full, = anyone.list_models(filter="npeff", full=True, cardData=True)
        expanded, = anyone.list_models(filter="npeff", expand=["cardData"])
        out["brief"] = [brief.sha, brief.card_data, brief.library_name, brief.siblings]
        out["full"] = [full.sha == api.model_info(full.id).sha, full.card_data.base_model, len(full.siblings)]
        out["expanded"] = [expanded.card_data.license, expanded.tags]
        info = anyone.model_info("alice/tiny-npeff")
        out["info"] = [info.author, info.card_data.datasets, info.library_name, info.private]
        out["tags"] = info.tags
        out["plain"] = anyone.model_info("alice/plain").tags
        out["card"] = ModelCard.load("alice/tiny-npeff").data.base_model
        out["bad_yaml"] = refusal(put, "alice/plain", "README.md", b"---\na: [\n---\n")
        out["bad_tags"] = refusal(put, "alice/plain", "README.md", b"---\ntags: word\n---\n")
        """,
        home=tmp_path,
    )
    assert out["all"] == ["big-npeff", "lora", "plain", "tiny-npeff"]
    assert out["mine"] == ["big-npeff", "hidden-npeff", "lora", "plain", "tiny-npeff"]
    assert out["library"] == ["big-npeff", "tiny-npeff"]
    assert out["both"] == out["dataset"] == out["search"] == ["tiny-npeff"]
    assert out["relation"] == ["lora", "tiny-npeff"]
    assert out["none"] == out["author"] == []
    assert out["limit"] == 2
    assert out["pipeline"] == ["plain"]
    assert out["brief"] == [None, None, "hf_npeff", None]
    assert out["full"] == [True, "org/big", 2]
    assert out["expanded"] == ["apache-2.0", None]
    assert out["info"] == ["alice", ["org/texts"], "hf_npeff", False]
    expected = {"hf_npeff", "fisher", "dataset:org/texts", "base_model:org/tiny", "base_model:adapter:org/tiny"}
    assert set(out["tags"]) == expected | {"license:apache-2.0", "region:us"}
    assert set(out["plain"]) == {"text-generation", "safetensors", "region:us"}
    assert out["card"] == "org/tiny"
    assert out["bad_yaml"] == out["bad_tags"] == ["ValueError", None]


def test_a_wrong_token_opens_nothing(hub: HubServer, tmp_path: Path) -> None:
    """The same calls with a good token, no token and one the Hub does not know."""
    script = """
        out["whoami"] = refusal(api.whoami) or api.whoami()["name"]
        out["create"] = refusal(api.create_repo, "alice/model", exist_ok=True)
        out["push"] = refusal(put, "alice/model", "a.txt", b"a")
        out["pull"] = refusal(hf_hub_download, "alice/model", "a.txt", force_download=True)
    """
    good = client(hub, script, home=tmp_path / "good")
    assert good == {"whoami": "alice", "create": None, "push": None, "pull": None}
    wrong = client(hub, script, token="hf_wrong", home=tmp_path / "wrong")
    assert wrong["whoami"] == wrong["create"] == wrong["push"] == ["HfHubHTTPError", 401]
    assert wrong["pull"][0] == "ValueError"  # what the client makes of a failed forced download
    none = client(hub, script, token=None, home=tmp_path / "none")
    assert none["whoami"][0] == "LocalTokenNotFoundError"
    assert none["push"] == ["RepositoryNotFoundError", 401]
    assert none["pull"] is None
    assert len(hub.repos["alice/model"].history()) == 2


def test_what_the_client_would_never_send_is_refused(hub: HubServer, tmp_path: Path) -> None:
    """Requests made by hand; after each, the repository is what it was."""
    client(hub, 'api.create_repo("alice/model"); put("alice/model", "a", b"a")', home=tmp_path)
    repo, commit = hub.repos["alice/model"], "/api/models/alice/model/commit/main"
    before = repo.head()

    def committing(*operations: dict[str, Any]) -> tuple[int, bytes]:
        lines = [{"key": "header", "value": {"summary": "By hand"}}, *operations]
        return raw(hub, "POST", commit, b"\n".join(json.dumps(line).encode() for line in lines))

    def file(path: str, content: bytes = b"x") -> dict[str, Any]:
        encoded = base64.b64encode(content).decode()
        return {"key": "file", "value": {"path": path, "content": encoded, "encoding": "base64"}}

    for path in ("../x", "a/../../x", "/x", "b//x", "b/./x", ".git/config", "b\\x", "", "a/under-a-file", "nul\0"):
        assert committing(file("fine"), file(path))[0] == 400, path
    assert committing(file("large", bytes(10 * 1024 * 1024 + 1)))[0] == 400
    assert committing({"key": "lfsFile", "value": {"path": "w", "oid": "0" * 64, "size": 1}})[0] == 400
    assert committing({"key": "deletedFile", "value": {"path": "absent"}})[0] == 404
    assert committing({"key": "file", "value": {"path": "b", "content": "not base64!"}})[0] == 400
    assert committing({"key": "rename", "value": {"path": "a"}})[0] == 400
    assert raw(hub, "POST", commit, b"not json")[0] == 400
    assert raw(hub, "GET", "/alice/model/resolve/main/..%2F..%2Fetc%2Fpasswd")[0] == 404
    assert raw(hub, "GET", "/api/nothing")[0] == 404
    assert raw(hub, "POST", "/api/repos/create", b'{"name": "../up"}')[0] == 400
    assert repo.head() == before

    batch = json.dumps({"objects": [{"oid": hashlib.sha256(b"good").hexdigest(), "size": 4}]}).encode()
    status, answer = raw(hub, "POST", "/alice/model.git/info/lfs/objects/batch", batch)
    assert status == 200
    upload = json.loads(answer)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)
    assert raw(hub, "PUT", upload, b"evil", token="")[0] == 400
    assert raw(hub, "PUT", "/lfs/00", b"good", token="")[0] == 403
    assert repo.lfs == {}
    assert raw(hub, "PUT", upload, b"good", token="")[0] == 200
    assert list(repo.lfs.values()) == [b"good"]
    assert committing(file("fine"))[0] == 200  # the requests above were refused for what was wrong with them


def test_peft_transformers_and_datasets_load_from_it_and_a_trainer_pushes_to_it(hub: HubServer, tmp_path: Path) -> None:
    """Logits of the model with the adapter as it was before the push; the rows as they were; the Trainer's files."""
    out = client(
        hub,
        """
        import copy, torch, datasets, peft, transformers
        torch.manual_seed(0)
        sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        tokens = torch.arange(10)[None]
        lora = dict(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**lora)).eval()

        folder = Path(given["folder"])
        tuned.save_pretrained(folder / "adapter")
        base.save_pretrained(folder / "base")
        datasets.Dataset.from_dict({"id": [3, 1, 2]}).to_parquet(folder / "adapter/rows/examples.parquet")
        for name in ("adapter", "base"):
            api.create_repo(f"alice/{name}", private=True)
            api.upload_folder(repo_id=f"alice/{name}", folder_path=folder / name)

        def logits(model):
            with torch.no_grad():
                return model(tokens).logits
        pulled = transformers.AutoModelForCausalLM.from_pretrained("alice/base").eval()
        out["base"] = torch.equal(logits(pulled), logits(base))
        loaded = peft.PeftModel.from_pretrained(pulled, "alice/adapter").eval()
        out["adapter"] = (logits(loaded) - logits(tuned)).abs().max().item()
        out["effect"] = (logits(tuned) - logits(base)).abs().max().item()
        rows = datasets.load_dataset("parquet", data_files="hf://alice/adapter/rows/*.parquet", split="train")
        out["rows"] = rows["id"][:]

        rows = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
        options = dict(max_steps=1, report_to="none", use_cpu=True, push_to_hub=True, hub_model_id="alice/trained")
        arguments = transformers.TrainingArguments(given["folder"] + "/trained", **options)
        trainer = transformers.Trainer(base, arguments, train_dataset=rows)
        trainer.train()
        trainer.push_to_hub()
        out["trained"] = snapshot_download("alice/trained")
        """,
        home=tmp_path / "home",
        folder=tmp_path,
    )
    assert out["base"]
    assert out["adapter"] == 0.0
    assert out["effect"] > 1e-3
    assert out["rows"] == [3, 1, 2]
    weights = "model.safetensors"
    assert {"config.json", weights, "README.md", "training_args.bin"} <= hub.repos["alice/trained"].files().keys()
    assert (Path(out["trained"]) / weights).read_bytes() == (tmp_path / "trained" / weights).read_bytes()
