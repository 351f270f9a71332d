"""Base classes of stored objects: reading from a folder or the Hub, and publishing as a repository."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hf_npeff.sharing.hub import commit_of, is_hub_id, push_folder, resolve_folder

logger = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="Readable")


class Publishable:
    """An object whose files can be published on the Hub.

    A class writes them in `_publish`, whose arguments `push_to_hub` takes too.
    """

    _KIND: ClassVar[str] = "files"
    """For the commit's title."""
    _REPLACED: ClassVar[tuple[str, ...] | None] = None
    """Patterns of files that are deleted in the repository unless they are uploaded again."""

    def _publish(self, *folder_and_repo_id: Any, **contents: Any) -> None:
        """Write the files of the repository into an empty folder."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        **contents: Any,
    ) -> str:
        """Publish the files of `save_pretrained`, and a card, as a model repository.

        Args:
            repo_id: user/name; the repository is created if it does not exist.
            private: whether a new repository is private; True also raises an error for an existing public one.
            token: None uses the one of `hf auth login`.
            revision: the branch; it is created if it does not exist.
            create_pr: open a pull request instead of committing.
            commit_message: the commit's title.
            **contents: arguments for what is published and for the card, if the class takes them. `include_texts`:
                publish, or show, columns that `hub.text_columns` counts as texts (not by default); `datasets`: ids of
                the data sets of the examples; `license`: an identifier of the Hub such as "apache-2.0"; `report` and
                `decomposition`: the measurement of a direction, and the decomposition of its component.

        Returns:
            The address of the commit or of the pull request.

        Raises:
            OSError: if the upload is refused or the Hub cannot be reached.
            ValueError: if the id, license or a data set's id is malformed, or a private repository is public.
            TypeError: if the class does not take one of `contents`.

        Example:
            >>> decomposition.push_to_hub("me/model-npeff", private=True, license="apache-2.0")  # doctest: +SKIP
            'https://huggingface.co/me/model-npeff/commit/…'
        """
        with tempfile.TemporaryDirectory() as folder:
            self._publish(Path(folder), repo_id, **contents)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {self._KIND}",
                delete_patterns=self._REPLACED,
            )


class Readable(Publishable):
    """An object that can be read from its folder.

    Attributes:
        commit: the commit of the Hub repository that it was read from, or None.
    """

    _FILES: ClassVar[tuple[str, ...]] = ()
    """Patterns of the files that are worth downloading."""
    commit: str | None = None

    @classmethod
    def load(cls: type[_Self], directory: str | os.PathLike[str]) -> _Self:
        """Read a folder that `save_pretrained` wrote."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        id_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
    ) -> _Self:
        """Read an object that `save_pretrained` or `push_to_hub` wrote; every checksum is compared.

        Args:
            id_or_path: a folder, or a repository's id on the Hub.
            revision: branch, tag or commit.
            token: for private repositories; None uses the one of `hf auth login`.
            cache_dir: the Hub client's cache, if it is not the usual one.
            local_files_only: use only the cache.
            subfolder: the folder within, with forward slashes.

        Raises:
            OSError: if the folder, repository or revision does not exist, or the Hub cannot be reached.
            ValueError: if the id is malformed, or the subfolder leads out of the repository.
            CorruptStoreError: if files are missing, altered, unfinished, or do not fit together.
            FormatVersionError: if another version of the format wrote them.

        Example:
            >>> decomposition.save_pretrained("me/model-npeff")  # a folder of this name, or push_to_hub
            >>> Decomposition.from_pretrained("me/model-npeff").explained == decomposition.explained
            True
        """
        folder = resolve_folder(
            id_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
            allow_patterns=cls._FILES,
        )
        loaded = cls.load(folder)
        loaded.commit = commit_of(folder)
        return loaded


def warn_of_local_model(repo_id: str, model: object) -> None:
    """Warn that an object published as `repo_id` is made from a model that only this machine has."""
    if model is not None and not is_hub_id(model):
        logger.warning(
            "%s is made from the local model %s, which nobody else can load; publish the model first", repo_id, model
        )
