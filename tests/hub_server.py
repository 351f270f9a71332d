"""A Hugging Face Hub on the loopback interface, for tests that drive the real `huggingface_hub` client.

    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        subprocess.run([sys.executable, script], env=hub.env(token="hf_alice", home=tmp_path), check=True)
        assert "config.json" in hub.repos["alice/model"].files()

Repositories live in memory. What is modelled is what a user of the Hub can observe: who may read and write, commits,
branches, tags and pull requests, regular and LFS files, card metadata and the tags made from it, and refusals with the
headers by which the client tells them apart. Xet (`env` switches it off), organisations, gating, discussions and merges
are not modelled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".npz")
LFS_THRESHOLD = 10 * 1024 * 1024  # larger files cannot be committed inline, whatever their name
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
MAIN = "refs/heads/main"


class HubError(Exception):
    """A refusal: `code` becomes the X-Error-Code header, from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = "", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.details = status, code, details or {}


@dataclass(frozen=True)
class Blob:
    """A file's content; `oid` is git's (of the pointer, for an LFS file), `etag` the Hub's."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def lfs_info(self, oid_key: str) -> dict[str, Any]:
        """The `lfs` entry of a listing: trees call the checksum `oid`, siblings call it `sha256`."""
        if not self.lfs:
            return {}
        return {"lfs": {oid_key: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}}


@dataclass(frozen=True)
class Commit:
    """One state of a repository's files, by path."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository; `kind` is `models`, `datasets` or `spaces`, as in the Hub's paths."""

    kind: str
    id: str
    private: bool = False
    created: str = field(default_factory=lambda: timestamp())
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # uploaded objects by SHA-256, whether or not committed
    pulls: list[str] = field(default_factory=list)  # who opened refs/pr/1, refs/pr/2, …

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def key(self) -> str:
        """The path of its page, and its key in `HubServer.repos`."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def head(self, revision: str = "main") -> Commit:
        """The commit a branch, tag, full ref or commit hash stands for."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {path: blob.data for path, blob in self.head(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """A revision's commits, newest first."""
        commits = [self.head(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def writable_ref(self, revision: str) -> str:
        """The branch or pull request a commit to `revision` moves."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise HubError(404, f"No branch {revision}", "RevisionNotFound")

    def commit(
        self, ref: str, parent: str | None, files: Mapping[str, Blob], author: str, title: str, message: str = ""
    ) -> Commit:
        """Record `files` as the child of `parent` and move `ref` to it."""
        listing = [self.key, len(self.commits), parent, title, sorted((path, blob.oid) for path, blob in files.items())]
        sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, author, timestamp(), dict(files))
        self.refs[ref] = sha
        return self.commits[sha]


@dataclass
class Call:
    """A request as a route sees it; `user` is None without a token, `params` are the path's named groups, unquoted."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes = b""
    user: str | None = None
    params: dict[str, str] = field(default_factory=dict)
    status: int | None = None  # None until answered, and where the connection was dropped

    def json(self) -> dict[str, Any]:
        content = json.loads(self.body or b"{}")
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        return content

    def flag(self, name: str) -> bool:
        return self.asked(name).lower() in ("1", "true")

    def asked(self, name: str) -> str:
        return self.query.get(name, [""])[0]


@dataclass
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    broken: bool = False  # only half of the body is sent


@dataclass
class Failure:
    method: str
    path: re.Pattern[str]
    times: int
    status: int | None


Route = Callable[["HubServer", Call], Any]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
FILE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    """Register a handler; it returns a Reply, or what is sent as JSON with status 200."""

    def register(handler: Route) -> Route:
        ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split())
        return handler

    return register


def timestamp() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def checked_path(path: str) -> str:
    """`path`, if it stays inside a repository and out of its `.git`."""
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts):
        raise HubError(400, f"Invalid path: {path!r}")
    return path


def parsed_card(text: str) -> dict[str, Any]:
    """The metadata of a card, {} without any; ValueError if the Hub would refuse it."""
    match = FRONT_MATTER.match(text)
    try:
        card = (yaml.safe_load(match[1]) if match else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"invalid YAML: {error}") from error
    if not isinstance(card, dict):
        raise ValueError("the metadata must be a mapping")
    tags = card.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError('"tags" must be a list of strings')
    return card


def card_of(commit: Commit) -> dict[str, Any]:
    try:
        return parsed_card(commit.files["README.md"].data.decode())
    except (KeyError, ValueError):  # no card, or a broken one that came by a way that does not validate
        return {}


def tags_of(commit: Commit) -> list[str]:
    """The tags the Hub shows and filters by: the card's own, and those made from its fields and from the files."""
    card = card_of(commit)

    def values(name: str) -> list[str]:
        value = card.get(name) or []
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    adapter = "adapter_config.json" in commit.files
    relation = card.get("base_model_relation") or ("adapter" if adapter else "finetune")
    tags = values("library_name") + values("pipeline_tag")
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []
    tags += values("tags") + values("language") + [f"dataset:{name}" for name in values("datasets")]
    tags += [f"base_model:{prefix}{name}" for prefix in ("", f"{relation}:") for name in values("base_model")]
    tags += [f"license:{name}" for name in values("license")] + ["region:us"]
    return list(dict.fromkeys(tags))


def repo_info(repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """All the Hub tells about a repository at a commit."""
    card = card_of(commit)
    siblings = [
        {"rfilename": path} | ({"size": len(b.data), "blobId": b.oid} | b.lfs_info("sha256") if blobs else {})
        for path, b in sorted(commit.files.items())
    ]
    return {
        "_id": hashlib.sha1(repo.key.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "likes": 0,
        "downloads": 0,
        "private": repo.private,
        "tags": tags_of(commit),
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "createdAt": repo.created,
        "author": repo.owner,
        "sha": commit.sha,
        "lastModified": commit.date,
        "gated": False,
        "disabled": False,
        "siblings": siblings,
        "cardData": card,
    }


def apply_operation(files: dict[str, Blob], lfs: Mapping[str, bytes], key: str, value: dict[str, Any]) -> None:
    """Carry out one line of a commit on `files`."""
    path = checked_path(str(value.get("path", "")).rstrip("/"))
    if key == "file":
        content = base64.b64decode(value["content"], validate=True)
        if len(content) > LFS_THRESHOLD:
            raise HubError(400, f"{path} is larger than 10 MiB and must be uploaded with LFS")
        files[path] = Blob(content)
    elif key == "lfsFile":
        if value.get("oid") not in lfs:
            raise HubError(400, f"The LFS object of {path} was not uploaded")
        files[path] = Blob(lfs[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        doomed = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(f"{path}/"))]
        if not doomed:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        for name in doomed:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation: {key}")


_port = 0
"""Of the first server of this process. Later ones take it too, so that processes may wait that know its address."""


def _listening(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    global _port
    try:
        server = ThreadingHTTPServer(("127.0.0.1", _port), handler)
    except OSError:  # two servers at a time
        return ThreadingHTTPServer(("127.0.0.1", 0), handler)
    _port = _port or server.server_address[1]
    return server


class HubServer:
    """The server as a context manager; `tokens` maps a token to its user.

    `repos` holds models by id and other repositories by `datasets/<id>`, `spaces/<id>`; `requests` logs every call.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = dict(tokens or {})
        self.repos: dict[str, Repo] = {}
        self.requests: list[Call] = []
        self._failures: list[Failure] = []
        self._tickets: dict[str, tuple[Repo, str, int]] = {}  # what a signed LFS address may receive
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _listening(handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go down, before the end of the `with` block too; what was stored stays in `repos`."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def env(self, token: str | None = None, *, home: str | Path) -> dict[str, str]:
        """The environment of a client process: this Hub, this token or none, and a cache of its own under `home`."""
        inherited = {k: v for k, v in os.environ.items() if not re.match(r"(?i)HF_|HUGGING|.*_PROXY$|TRANSFORMERS_", k)}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def fail_next(self, method: str, path_regex: str, times: int = 1, status: int | None = 500) -> None:
        """Make the next `times` matching calls fail without effect.

        `status=None` breaks the connection instead: before the answer, or for a GET in the middle of it.
        """
        self._failures.append(Failure(method, re.compile(path_regex), times, status))

    def calls(self, method: str, path_regex: str) -> list[Call]:
        """The logged requests that match."""
        return [call for call in self.requests if call.method == method and re.search(path_regex, call.path)]

    def answer(self, method: str, target: str, headers: Message, body: bytes) -> Reply | None:
        """The reply to one request; None if the connection is to be dropped."""
        parts = urlsplit(target)
        call = Call(method, unquote(parts.path), parse_qs(parts.query), headers, body)
        with self._lock:
            self.requests.append(call)
            try:
                reply = self._injected_failure(call)
                if reply is None or reply.broken:
                    reply = self._dispatch(call, parts.path, broken=reply is not None)
            except ConnectionError:
                return None
            except HubError as error:
                reply = self._refusal(error)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reply = self._refusal(HubError(400, f"Malformed request: {error!r}"))
            call.status, call.body = reply.status, b""
        return reply

    @staticmethod
    def _refusal(error: HubError) -> Reply:
        headers = {"X-Error-Message": str(error).encode("unicode_escape").decode()}
        headers |= {"X-Error-Code": error.code} if error.code else {}
        headers |= {name: value for name, value in error.details.items() if name in ("X-Repo-Commit", "Content-Range")}
        return Reply(error.status, json.dumps({"error": str(error), **error.details}).encode(), headers)

    def _injected_failure(self, call: Call) -> Reply | None:
        for failure in self._failures:
            if failure.times > 0 and failure.method == call.method and failure.path.search(call.path):
                failure.times -= 1
                if failure.status is not None:
                    raise HubError(failure.status, "Injected failure")
                if call.method != "GET":
                    raise ConnectionError
                return Reply(200, b"", broken=True)
        return None

    def _dispatch(self, call: Call, raw_path: str, broken: bool) -> Reply:
        token = call.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        call.user = self.tokens.get(token)
        for method, pattern, handler in ROUTES:
            if method == call.method and (match := pattern.fullmatch(raw_path)):
                call.params = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                result = handler(self, call)
                if not isinstance(result, Reply):
                    body = json.dumps(result, default=str).encode()
                    result = Reply(200, body, {"Content-Type": "application/json"})
                result.broken = broken
                return result
        raise HubError(404, f"No such route: {call.method} {call.path}")

    # Who may do what.

    def _user(self, call: Call) -> str:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        return call.user

    def _readable(self, call: Call) -> Repo:
        """The repository of the call; a private one looks to others exactly as if it did not exist."""
        kind = call.params.get("kind", "models")
        repo = self.repos.get(call.params["repo"] if kind == "models" else f"{kind}/{call.params['repo']}")
        if repo is None or (repo.private and call.user != repo.owner):
            raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, call: Call, also: str | None = None) -> Repo:
        """The repository of the call, to be written to by its owner, or by the user `also`."""
        repo = self._readable(call)
        if call.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if call.user not in (repo.owner, also):
            raise HubError(403, f"You don't have the rights to write to {repo.id}")
        return repo

    def _own_key(self, call: Call) -> tuple[str, str]:
        """Kind and id of the repository that a call to `/api/repos/…` names in its body."""
        user, content = self._user(call), call.json()
        owner, name = content.get("organization") or user, str(content.get("name"))
        if owner != user:
            raise HubError(403, f"You don't have the rights to do this under the namespace {owner}")
        if not re.fullmatch(r"(?!.*(--|\.\.))\w[\w.-]{0,95}(?<![.-])", name, re.ASCII):
            raise HubError(400, f"Invalid repository name: {name}")
        kind = f"{content.get('type') or 'model'}s"
        if kind not in ("models", "datasets", "spaces"):
            raise HubError(400, f"Invalid repository type: {kind}")
        return kind, f"{owner}/{name}"

    # Accounts and small things.

    @route("GET", "/api/agent-harnesses")
    def _agent_harnesses(self, call: Call) -> Any:
        return {"standardEnvVars": [], "harnesses": {}}

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Any:
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": self._user(call), "fullname": call.user, "orgs": [], "auth": access}

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Any:
        try:
            card = parsed_card(str(call.json().get("content", "")))
        except ValueError as error:
            raise HubError(400, "Invalid metadata", details={"errors": [{"message": str(error)}]}) from error
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return {"errors": [], "warnings": [] if card else [warning]}

    # Repositories.

    @route("POST", "/api/repos/create")
    def _create(self, call: Call) -> Any:
        kind, repo_id = self._own_key(call)
        content = call.json()
        repo = Repo(kind, repo_id, private=content.get("visibility") == "private" or bool(content.get("private")))
        described = {"url": f"{self.url}/{repo.key}", "id": repo_id, "name": repo_id}
        if repo.key in self.repos:
            raise HubError(409, "You already created this repo", details=described)
        repo.commit(MAIN, None, {".gitattributes": Blob(GIT_ATTRIBUTES)}, repo.owner, "initial commit")
        self.repos[repo.key] = repo
        return described

    @route("DELETE", "/api/repos/delete")
    def _delete(self, call: Call) -> Any:
        kind, repo_id = self._own_key(call)
        call.params = {"kind": kind, "repo": repo_id}
        del self.repos[self._writable(call).key]
        return {}

    @route("PUT", f"{REPO}/settings")
    def _settings(self, call: Call) -> Any:
        repo, visibility = self._writable(call), call.json().get("visibility")
        if visibility not in ("public", "private"):
            raise HubError(400, f"visibility must be public or private, not {visibility}")
        repo.private = visibility == "private"
        return {"private": repo.private}

    @route("GET", "/api/(?P<kind>models|datasets|spaces)")
    def _list(self, call: Call) -> Any:
        """Brief unless asked for more; a filter is a tag, and all of them must hold."""
        kind, tags, search = call.params["kind"], set(call.query.get("filter", [])), call.asked("search").lower()
        visible = [r for r in self.repos.values() if r.kind == kind and (not r.private or r.owner == call.user)]
        found = [
            info
            for info in (repo_info(repo, repo.head()) for repo in visible)
            if tags <= set(info["tags"])
            and search in info["id"].lower()
            and call.asked("author") in ("", info["author"])
            and call.asked("pipeline_tag") in ("", info["pipeline_tag"])
        ]
        found.sort(key=lambda info: info[call.asked("sort") or "createdAt"], reverse=True)
        hidden = set() if call.flag("full") else {"author", "sha", "lastModified", "gated", "disabled", "siblings"}
        hidden |= set() if call.flag("cardData") else {"cardData"}
        if "expand" in call.query:
            hidden = found[0].keys() - {"_id", "id", *call.query["expand"]} if found else set()
        limited = found[: int(call.asked("limit") or len(found))]
        return [{name: value for name, value in info.items() if name not in hidden} for info in limited]

    @route("GET", f"{REPO}/refs")
    def _refs(self, call: Call) -> Any:
        repo = self._readable(call)

        def under(prefix: str) -> list[dict[str, str]]:
            refs = [(ref, sha) for ref, sha in repo.refs.items() if ref.startswith(prefix)]
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in refs]

        listing: dict[str, Any] = {"branches": under("refs/heads/"), "converts": [], "tags": under("refs/tags/")}
        return listing | ({"pullRequests": under("refs/pr/")} if call.flag("include_prs") else {})

    @route("GET", f"{REPO}/commits/(?P<rev>[^/]+)")
    def _commits(self, call: Call) -> Any:
        return [
            {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in self._readable(call).history(call.params["rev"])
        ]

    @route("POST DELETE", f"{REPO}/(?P<what>branch|tag)/(?P<name>[^/]+)")
    def _branch_or_tag(self, call: Call) -> Any:
        """A branch is created by its name from a starting point, a tag at a revision under the name in the body."""
        repo, content, name = self._writable(call), call.json(), call.params["name"]
        creating, is_tag = call.method == "POST", call.params["what"] == "tag"
        target = name if is_tag else str(content.get("startingPoint") or "main")
        name = str(content.get("tag")) if is_tag and creating else name
        ref = f"refs/tags/{name}" if is_tag else f"refs/heads/{name}"
        checked_path(name)
        if creating:
            if ref in repo.refs:
                raise HubError(409, f"{ref} already exists")
            repo.refs[ref] = repo.head(target).sha
        elif ref == MAIN:
            raise HubError(403, "The main branch cannot be deleted")
        elif repo.refs.pop(ref, None) is None:
            raise HubError(404, f"{ref} does not exist", "RevisionNotFound")
        return {}

    # Reading files.

    @route("GET", f"{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
    def _tree(self, call: Call) -> Any:
        files, folder = self._readable(call).head(call.params["rev"]).files, call.params.get("path", "")
        prefix = f"{folder}/" if folder else ""
        below = sorted(path for path in files if path.startswith(prefix))
        if folder and not below:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        parents = {path[:i] for path in below for i, letter in enumerate(path) if letter == "/" and i >= len(prefix)}
        entries = self._entries(files, [*sorted(parents), *below])
        return [e for e in entries if call.flag("recursive") or "/" not in e["path"][len(prefix) :]]

    @route("POST", f"{REPO}/paths-info/(?P<rev>[^/]+)")
    def _paths_info(self, call: Call) -> Any:
        files = self._readable(call).head(call.params["rev"]).files
        return self._entries(files, [path.strip("/") for path in parse_qs(call.body.decode()).get("paths", [])])

    @staticmethod
    def _entries(files: Mapping[str, Blob], paths: list[str]) -> list[dict[str, Any]]:
        """The listing of files and folders; paths that do not exist are left out."""
        entries: list[dict[str, Any]] = []
        for path in paths:
            if path in files:
                blob = files[path]
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
                entries.append(entry | blob.lfs_info("oid"))
            elif below := sorted(name + blob.oid for name, blob in files.items() if name.startswith(f"{path}/")):
                oid = hashlib.sha1("".join(below).encode()).hexdigest()
                entries.append({"type": "directory", "path": path, "size": 0, "oid": oid})
        return entries

    @route("GET HEAD", FILE)
    def _resolve(self, call: Call) -> Reply:
        commit = self._readable(call).head(call.params["rev"])
        blob = commit.files.get(call.params["path"])
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if asked is None or not any(asked.groups()):
            return Reply(200, blob.data, headers)
        size = len(blob.data)
        start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", details={"Content-Range": f"bytes */{size}"})
        return Reply(206, blob.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    # Writing files: preupload asks how, LFS objects go ahead of the commit that names them.

    @route("POST", f"{REPO}/preupload/(?P<rev>[^/]+)")
    def _preupload(self, call: Call) -> Any:
        repo = self._committable(call)
        remote = repo.head(call.params["rev"]).files
        answers = []
        for file in call.json().get("files", []):
            path = checked_path(file["path"])
            as_lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_THRESHOLD
            oid = remote[path].etag if path in remote else None  # lets the client leave out what has not changed
            mode = "lfs" if as_lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers, "commitOid": repo.head(call.params["rev"]).sha}

    @route("POST", r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def _lfs_batch(self, call: Call) -> Any:
        # Whoever may read may send objects, for a pull request: they are seen by nobody until a commit names them.
        repo, answers = self._writable(call, also=call.user), []
        for item in call.json().get("objects", []):
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.lfs:
                ticket = secrets.token_hex(16)
                self._tickets[ticket] = repo, item["oid"], item["size"]
                address = f"{self.url}/lfs/{ticket}"
                answer["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    @route("PUT POST", "/lfs/(?P<ticket>[0-9a-f]+)(?P<verify>/verify)?")
    def _lfs_object(self, call: Call) -> Any:
        """The ticket in the address is the permission, as in a pre-signed one: the client sends no token with it."""
        repo, oid, size = self._tickets.get(call.params["ticket"]) or (None, "", 0)
        if repo is None:
            raise HubError(403, "Invalid or expired signature")
        if "verify" in call.params:
            if len(repo.lfs.get(oid, b"")) != size or call.json() != {"oid": oid, "size": size}:
                raise HubError(404, f"The LFS object {oid} was not uploaded")
            return {}
        if len(call.body) != size or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, f"The content sent is not that of {oid}")
        repo.lfs[oid] = call.body
        return Reply(200, b"", {"ETag": f'"{oid}"'})

    def _committable(self, call: Call) -> Repo:
        """The repository, for its owner; for anyone who opens a pull request, and then for its author."""
        repo = self._readable(call)
        if call.flag("create_pr"):
            return self._writable(call, also=call.user)
        pull = re.fullmatch(r"refs/pr/(\d+)", repo.writable_ref(call.params["rev"]))
        return self._writable(call, also=repo.pulls[int(pull[1]) - 1] if pull else None)

    @route("POST", f"{REPO}/commit/(?P<rev>[^/]+)")
    def _commit(self, call: Call) -> Any:
        repo = self._committable(call)
        base = repo.head(call.params["rev"])
        files, header = dict(base.files), {}
        for line in call.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            else:
                apply_operation(files, repo.lfs, key, value)
        folders = {path[:i] for path in files for i, letter in enumerate(path) if letter == "/"}
        if clash := folders & files.keys():
            raise HubError(400, f"Both a file and a folder: {sorted(clash)}")
        if not header.get("summary"):
            raise HubError(400, "A commit needs a summary")
        if header.get("parentCommit", base.sha) != base.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        author, page = self._user(call), f"{self.url}/{repo.key}"
        if call.flag("create_pr"):
            repo.pulls.append(author)
            ref, pull_page = f"refs/pr/{len(repo.pulls)}", f"{page}/discussions/{len(repo.pulls)}"
        else:
            ref, pull_page = repo.writable_ref(call.params["rev"]), None
        sha = repo.commit(ref, base.sha, files, author, header["summary"], header.get("description", "")).sha
        return {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "pullRequestUrl": pull_page}

    # Last, because a repository may be called like one of the words above.

    @route("GET", f"{REPO}(?:/revision/(?P<rev>[^/]+))?")
    def _info(self, call: Call) -> Any:
        repo = self._readable(call)
        info = repo_info(repo, repo.head(call.params.get("rev", "main")), blobs=call.flag("blobs"))
        wanted = call.query.get("expand")
        return {k: v for k, v in info.items() if k in ("_id", "id", *wanted)} if wanted else info


class _Handler(BaseHTTPRequestHandler):
    """Bytes in and out; what they mean is HubServer's."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; joined to a delayed ACK they cost 40 ms

    def _serve(self) -> None:
        try:
            reply = self.hub.answer(self.command, self.path, self.headers, self._read_body())
            if reply is None:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[: len(reply.body) // 2] if reply.broken else reply.body)
            self.close_connection = self.close_connection or reply.broken
        except ConnectionError:  # the client went away
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `HubServer.requests` is the log."""
