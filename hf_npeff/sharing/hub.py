"""Folders to and from the Hugging Face Hub, and the columns that may be uploaded.

Downloads go to the client's cache and uploads from a finished folder in one commit, so that nothing half-written is
left in a user's folder. Every failure of the client becomes an OSError (or a ValueError for an argument) that says what
to do; tokens never appear in a message.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_npeff import __version__
from hf_npeff.encoding.record import USUAL_TEXTS, Encoded

LIBRARY = "hf_npeff"
DECOMPOSITION_TAG = "npeff-decomposition"
"""On every published decomposition's card, so that `list_decompositions` finds it."""

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)
_TOKEN = re.compile(r"(hf_|api_org_|Bearer\s+)[^\s'\",)]{2,}")
_NETWORK = ("httpx", "httpcore", "requests", "urllib3")  # whichever the installed client is built on
_NO_CONNECTION = ("ConnectError", "ConnectionError")  # of httpx and of requests; a slow connection is none of them
_SECONDS = 10
"""How long the Hub may take to answer when it is asked whether it can be reached; the client waits as long."""


def is_hub_id(name: object) -> bool:
    """Whether `name` can be a repository on the Hub: of the right form, and no folder here."""
    return isinstance(name, str) and bool(_REPO_ID.fullmatch(name)) and ".." not in name and not os.path.isdir(name)


def shown_model(model: object) -> str:
    """The name of a model as it is shown: its id on the Hub, or the last part of its folder."""
    return str(model) if is_hub_id(model) else Path(str(model)).name


def resolve_folder(
    id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """A local folder, or a repository of the Hub, which is downloaded into the client's cache.

    Args:
        id_or_path: a folder, which has precedence, or a repository's id.
        revision: branch, tag or commit.
        token: for private repositories; None uses the one of `hf auth login`, False sends none.
        cache_dir: the client's cache, if it is not the usual one.
        local_files_only: use only the cache.
        subfolder: the folder within, with forward slashes.
        allow_patterns: the names of files worth downloading, within the subfolder.

    Raises:
        OSError: if the folder, repository or revision does not exist, may not be read, or cannot be reached and is not
            in the cache.
        ValueError: if the id is malformed, or the subfolder leads out of the repository.
    """
    inner = _checked_subfolder(subfolder)
    name = os.fspath(id_or_path)
    local = Path(name).expanduser()
    if name and local.is_dir():
        return _within(local, inner, name)
    if not isinstance(id_or_path, str) or not _REPO_ID.fullmatch(name):
        raise OSError(
            f"{name!r} is neither a folder nor the id of a repository on the Hub (user/name){near_names(name)}"
        )
    prefix = "" if inner is None else f"{glob.escape(str(inner))}/"
    patterns = None if allow_patterns is None else [prefix + pattern for pattern in allow_patterns]
    with clear_errors(name, revision=revision, token=token, local_files_only=local_files_only):
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=patterns if patterns is not None else (f"{prefix}*" if prefix else None),
            library_name=LIBRARY,
            library_version=__version__,
        )
    return _within(Path(folder), inner, name)


def no_folder(name: str) -> str:
    """Says that a folder does not exist, and names similar ones: a mistyped path is not a network error."""
    return f"there is no folder {name}{near_names(name)}"


def _not_here(name: str, writing: bool) -> str:
    """The beginning of an error of the Hub about a name that may have been meant as a path; empty for other names."""
    return "" if writing or not _REPO_ID.fullmatch(name) else f"{no_folder(name)}; as a repository on the Hub, "


def near_names(name: str) -> str:
    """A question that names files and folders with nearly the name of a missing path; empty if there are none."""
    path = Path(name).expanduser()
    try:
        known = [each.name for each in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, known)
    return f" (did you mean {' or '.join(str(path.with_name(each)) for each in near)}?)" if near else ""


def _within(folder: Path, inner: PurePosixPath | None, name: str) -> Path:
    place = folder if inner is None else folder / inner
    if not place.is_dir():
        raise OSError(f"{name} holds no files of hf_npeff" + ("" if inner is None else f" in a folder {str(inner)!r}"))
    return place


def _checked_subfolder(subfolder: str | None) -> PurePosixPath | None:
    if subfolder is None:
        return None
    path, windows = PurePosixPath(subfolder), PureWindowsPath(subfolder)
    if not path.parts or ".." in windows.parts or path.is_absolute() or windows.anchor or "\0" in subfolder:
        raise ValueError(f"subfolder must be a path within the repository, without '..', but it is {subfolder!r}")
    return PurePosixPath(*windows.parts)


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the client's cache stands for; None for any other folder."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", path.name):
            return path.name
    return None


def commit_of_model(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> str | None:
    """The commit that a model's revision stands for now, from the place of its config.json in the client's cache.

    transformers' models do not know their commit. None for a folder, and where there is no such file.
    """
    if not is_hub_id(model_id):
        return None
    try:
        path = hf_hub_download(
            str(model_id),
            "config.json",
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only,
            library_name=LIBRARY,
            library_version=__version__,
        )
    except (OSError, ValueError):  # loading the model then says what is wrong
        return None
    return commit_of(Path(path).parent)


def check_reachable(
    name: str | os.PathLike[str],
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> None:
    """Check that the Hub answers for a repository none of whose files are in the cache.

    transformers asks for one file after the other, and the client tries each several times. Without this, a mistyped
    path is an error only after minutes on a machine without a network.

    Args:
        name: a folder, which is not checked, or a repository's id.
        files: the files of which one has to be there.
        revision: branch, tag or commit.
        token: as in `resolve_folder`.
        cache_dir: as in `resolve_folder`.
        local_files_only: makes no check, as offline mode does: nothing waits for the Hub then.

    Raises:
        OSError: if the Hub cannot be reached.
    """
    if local_files_only or is_offline_mode() or not is_hub_id(name):
        return
    cache = None if cache_dir is None else str(cache_dir)
    if any(isinstance(try_to_load_from_cache(str(name), file, cache, revision), str) for file in files):
        return
    try:  # once, because the client repeats a connection that cannot be made for half a minute
        get_session().head(hf_hub_url(str(name), files[0], revision=revision), timeout=_SECONDS)
    except Exception as error:  # of a client that may be another; all but a missing connection meet the download too
        if type(error).__name__ in _NO_CONNECTION:
            with clear_errors(str(name), token=token, revision=revision):
                raise
    try:
        hf_hub_download(str(name), files[0], revision=revision, token=token, cache_dir=cache, library_name=LIBRARY)
    except LocalEntryNotFoundError:
        with clear_errors(str(name), token=token, revision=revision):
            raise
    except (OSError, ValueError):  # a missing repository or file: the loader says what is wrong
        return


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    repo_type: str = "model",
    delete_patterns: Sequence[str] | None = None,
) -> str:
    """Upload a folder's files in one commit; the repository is created if it does not exist.

    Args:
        folder: the folder to upload.
        repo_id: user/name.
        private: whether a new repository is private; True also raises an error for an existing public one. None uses
            the account's default.
        token: None uses the one of `hf auth login`.
        revision: the branch; it is created if it does not exist.
        create_pr: open a pull request instead of committing.
        commit_message: the commit's title.
        repo_type: "model", "dataset" or "space"; a new Space is a static one.
        delete_patterns: files of the repository that are deleted in the same commit unless they are uploaded again.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        OSError: if the upload is refused or the Hub cannot be reached. Then nothing is committed, and files that were
            already sent need not be sent again.
        ValueError: if the id is malformed, or `private` is true and the repository is public.
    """
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with clear_errors(repo_id, revision=revision, token=token, writing=True):
        sdk = "static" if repo_type == "space" else None
        api.create_repo(repo_id, private=private, repo_type=repo_type, space_sdk=sdk, exist_ok=True)
        public = private is True and api.repo_info(repo_id, repo_type=repo_type).private is not True
        if not public:
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload with {LIBRARY}",
                delete_patterns=list(delete_patterns) if delete_patterns is not None else None,
            )
            return str(commit.pr_url or commit.commit_url)
    raise ValueError(
        f"private=True, but {repo_id} exists and is public; nothing was uploaded. Make it private on its settings "
        "page, or push to another repository"
    )


def list_decompositions(base_model: str, *, token: str | bool | None = None) -> list[str]:
    """The ids of the decompositions that are published for a model, found by the tags of their cards.

    Args:
        base_model: the model's id.
        token: a token, for seeing private ones too.

    Raises:
        OSError: if the Hub cannot be reached or refuses.
        ValueError: if `base_model` is not a model's id.

    Example:
        >>> for decomposition in list_decompositions("org/any-model"):  # doctest: +SKIP
        ...     print(decomposition)
    """
    if not isinstance(base_model, str) or not _REPO_ID.fullmatch(base_model):
        raise ValueError(f"base_model must be a model's id on the Hub, but it is {base_model!r}")
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with clear_errors("the list of models", token=token):
        return [model.id for model in api.list_models(filter=[DECOMPOSITION_TAG, f"base_model:{base_model}"])]


@contextmanager
def clear_errors(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    writing: bool = False,
) -> Iterator[None]:
    """Turn the errors of the Hub's client into an OSError or ValueError that says what to do, without any token in it.

    The original is left out of the traceback: clients put headers and addresses into their messages.
    """
    at = name if revision is None else f"{name} at revision {revision!r}"
    try:
        yield
    except (
        HFValidationError,
        OfflineModeIsEnabled,
        EntryNotFoundError,
        LocalTokenNotFoundError,
        HfHubHTTPError,
    ) as error:
        clearer: Exception = _clearer(error, name, at, local_files_only=local_files_only, writing=writing)
    except Exception as error:
        if type(error).__module__.startswith(_NETWORK) or isinstance(error, ConnectionError | TimeoutError):
            why = f"the Hub cannot be reached ({_shortly(error, token)}); check the connection"
            clearer = OSError(f"{_not_here(name, writing)}{at}: {why}")
        elif isinstance(error, OSError | ValueError | RuntimeError):
            clearer = OSError(f"{at}: the transfer failed: {_shortly(error, token)}")
        else:
            raise
    else:
        return
    raise clearer from None


def _clearer(error: Exception, name: str, at: str, *, local_files_only: bool, writing: bool) -> Exception:
    log_in = "pass token= or log in with `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return ValueError(f"{name!r} is not the id of a repository on the Hub (user/name)")
    if isinstance(error, LocalTokenNotFoundError):
        return OSError(f"{at}: no token was found; {log_in}")
    if isinstance(error, GatedRepoError):
        return OSError(f"{name} is gated: ask for access on its page on the Hub, and {log_in}")
    if isinstance(error, RepositoryNotFoundError):
        if writing and status == 401:
            return OSError(f"{at} cannot be written to without a valid token; {log_in}")
        near = near_names(name)
        return OSError(
            f"there is no folder and no repository {name}, or it is private: check the name, or {log_in}{near}"
        )
    if isinstance(error, RevisionNotFoundError):
        return OSError(
            f"{name} exists, but not {at.removeprefix(name).strip() or 'its main branch'}; check the revision"
        )
    if isinstance(error, OfflineModeIsEnabled):
        here = _not_here(name, writing)
        return OSError(f"{here}{at} needs the Hub, and HF_HUB_OFFLINE=1 forbids that; unset it")
    if isinstance(error, LocalEntryNotFoundError):
        remedy = "use local_files_only=False once" if local_files_only else "check the connection"
        reached = "" if local_files_only else ", and the Hub cannot be reached"
        return OSError(f"{_not_here(name, writing)}{at} is not in the cache{reached}; {remedy}")
    if isinstance(error, EntryNotFoundError):
        return OSError(f"{at} lacks a file that is needed")
    if status == 401:
        return OSError(f"{at}: the Hub accepts no request without a valid token here; {log_in}")
    if status == 403:
        return OSError(
            f"{at}: this account may not do that; check the name, and that the token may write, or use create_pr"
        )
    return OSError(f"{at}: the Hub answered with the status {status}; try again later")


def _shortly(error: Exception, token: str | bool | None) -> str:
    """The first line of an error, without anything that looks like a token."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(token, str) and token.strip():
        text = text.replace(token, "…").replace(token.strip(), "…")
    return _TOKEN.sub("…", text)[:300]


# What may leave

_NEVER_TEXT = ("prediction", "content_hash", "id", "example_id", "idx", "guid")
_ALWAYS_TEXT = {
    *USUAL_TEXTS, "sentence2", "hypothesis", "question1", "question2", "context", "answer", "completion", "response",
    "messages",
}  # fmt: skip
_LABEL_VALUES, _LABEL_LENGTH = 64, 64
"""The most values of a column of labels, and characters of one. Chosen: names of classes are short and few; what is
taken for texts by mistake only stays here."""


def text_columns(columns: Mapping[str, Sequence[Any]], info: Mapping[str, Any] | None = None) -> list[str]:
    """The columns that count as texts, which are uploaded to the Hub only with `include_texts=True`.

    Numbers, booleans and None are never texts. Neither are `prediction` and `content_hash`, which hf_npeff wrote, ids
    (`id`, `example_id`, `idx`, `guid`), nor label-like columns: those with at most 64 different values, none longer
    than 64 characters, each used twice on average. All other columns are texts. Columns with a usual name of inputs,
    such as `text` and `prompt`, are texts unless they have only numbers. Columns that the model was given are always
    texts.

    Args:
        columns: {name: values} stored with the results.
        info: the `info` of the PEFs or the decomposition, which says which columns the model was given.
    """
    record = Encoded.of(info or {})
    given = set() if record is None else {*record.columns, *record.shown, record.target}
    return [
        name
        for name, values in columns.items()
        if name in given or (name not in _NEVER_TEXT and _holds_texts(name, values))
    ]


def _holds_texts(name: str, values: Sequence[Any]) -> bool:
    others = [value for value in values if not isinstance(value, bool | int | float | None)]
    if not others:
        return False
    if name in _ALWAYS_TEXT or not all(isinstance(value, str) and len(value) <= _LABEL_LENGTH for value in others):
        return True
    different = len(set(others))
    return different > _LABEL_VALUES or 2 * different > len(others)
