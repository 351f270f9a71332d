"""Checkpoints of a model or a PEFT adapter, in a folder or on the Hub → the model and its processing class."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.embeddings import EMBEDDING_TASK
from hf_npeff.fisher.tasks import AUTO_CLASSES, loader_of
from hf_npeff.sharing.files import read_json
from hf_npeff.sharing.hub import check_reachable, commit_of_model, is_hub_id, near_names, no_folder

logger = logging.getLogger(__name__)
_TASK_OF_ADAPTER = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""{PEFT's name of a task: the name in hf_npeff}."""
_CLASSIFIERS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
"""Endings of the names of a classifier's last weight in an adapter; the weight has a row for each class."""
_PROCESSING_CLASSES = {"image-classification": "AutoImageProcessor", "audio-classification": "AutoFeatureExtractor"}


@dataclass(frozen=True)
class Checkpoint:
    """A model that was loaded.

    Attributes:
        model: the model, wrapped by PEFT if the checkpoint is an adapter.
        processing_class: its tokenizer, image processor or processor, or None.
        commit: the commit of the model on the Hub, or for an adapter that of its base model; None for a folder.
        task: the task of the model.
    """

    model: nn.Module
    processing_class: Any
    commit: str | None
    task: str


def load_checkpoint(
    model_id: str | os.PathLike[str],
    *,
    task: str | None,
    processing_class: Any,
    revision: str | None,
    where: Mapping[str, Any],
    trust_remote_code: bool = False,
    settings: Mapping[str, Any],
) -> Checkpoint:
    """Load a model, or an adapter with the base model that it names.

    Args:
        model_id: a folder, or an id on the Hub.
        task: the wanted task; None uses that of the checkpoint.
        processing_class: the processing class to use; None loads one.
        revision: the revision of the checkpoint. An adapter names the revision of its base model itself.
        where: `token`, `cache_dir` and `local_files_only` for every download.
        trust_remote_code: as in transformers.
        settings: further arguments of transformers' `from_pretrained`.

    Raises:
        OSError: if the model, or an adapter's base model, does not exist.
        UnsupportedModelError: if the architecture has no supported head, or the adapter names no base model.
    """
    _check_place(model_id)
    check_reachable(model_id, ("config.json", "adapter_config.json"), revision=revision, **where)
    path = transformers.utils.find_adapter_config_file(os.fspath(model_id), revision=revision, **where)
    if path is None:
        return _load_model(model_id, task, processing_class, revision, where, trust_remote_code, settings)
    adapter = read_json(Path(path), None)
    base, pinned = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not isinstance(base, str) or not base or not isinstance(pinned, str | None):
        raise UnsupportedModelError(
            f"{model_id} is an adapter that names no base model; load the base model and the adapter yourself "
            "(peft.PeftModel.from_pretrained) and pass the model to NPEFFAnalyzer"
        )
    _check_place(base, f"the adapter {os.fspath(model_id)!r} is of the base model {base!r}, which")
    if task is None:
        task = _TASK_OF_ADAPTER.get(str(adapter.get("task_type")))
    from peft import PeftModel  # takes a second, and only an adapter needs it

    commit = commit_of_model(model_id, revision=revision, **where)
    of_adapter = {**where, "revision": commit or revision or "main"}
    classes = (
        _number_of_classes(model_id, of_adapter)
        if task in ("sequence-classification", "token-classification")
        else None
    )
    settings = dict(settings) if classes is None else {**settings, "num_labels": classes}
    checkpoint = _load_model(base, task, processing_class, pinned, where, trust_remote_code, settings)
    if checkpoint.task == EMBEDDING_TASK:
        inner: Any = checkpoint.model
        inner.load_adapter(os.fspath(model_id), adapter_kwargs=of_adapter)
        return checkpoint
    model = PeftModel.from_pretrained(checkpoint.model, os.fspath(model_id), **of_adapter)
    return Checkpoint(model.eval(), checkpoint.processing_class, checkpoint.commit, checkpoint.task)


def _check_place(model_id: str | os.PathLike[str], what: str | None = None) -> None:
    if not os.path.isdir(model_id) and not is_hub_id(model_id):
        what = repr(os.fspath(model_id)) if what is None else what
        near = near_names(os.fspath(model_id))
        raise OSError(f"{what} is neither a folder nor the id of a model on the Hub (user/name){near}")


def _load_model(
    model_id: str | os.PathLike[str],
    task: str | None,
    processing_class: Any,
    revision: str | None,
    where: Mapping[str, Any],
    trust_remote_code: bool,
    settings: Mapping[str, Any],
) -> Checkpoint:
    commit = commit_of_model(model_id, revision=revision, **where)
    hub = {"revision": commit or revision or "main", **where, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(model_id, **hub)
    except OSError as error:
        if os.path.isdir(model_id):
            raise
        raise OSError(f"{no_folder(os.fspath(model_id))}; on the Hub: {str(error).splitlines()[0]}") from error
    loader = None if task == EMBEDDING_TASK else loader_of(config, task)
    if loader is None and task in (None, EMBEDDING_TASK):
        model = _sentence_transformer(model_id, hub, settings)
        if model is not None:
            return Checkpoint(model, processing_class, commit, EMBEDDING_TASK)
    if loader is None:
        raise UnsupportedModelError(
            f"{model_id} has the architectures {getattr(config, 'architectures', None) or []}, and none of them has a "
            f"head that hf_npeff knows; pass task=, one of {', '.join(AUTO_CLASSES)}"
        )
    known_task, class_name = loader
    model = _loaded(getattr(transformers, class_name), model_id, {**settings, **hub})
    if processing_class is None:
        processing_class = _processing_class(model_id, known_task, hub)
    return Checkpoint(model, processing_class, commit, known_task)


def _loaded(auto_class: Any, model_id: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """The model, with transformers' own attention if the package for the config's attention is missing."""
    try:
        return auto_class.from_pretrained(model_id, **arguments)
    except ImportError as error:
        if "flash" not in str(error).lower():
            raise
        logger.warning("%s is loaded with attention 'sdpa', which computes the same: %s", model_id, error)
        return auto_class.from_pretrained(model_id, **arguments, attn_implementation="sdpa")


def _sentence_transformer(model_id: Any, hub: Mapping[str, Any], settings: Mapping[str, Any]) -> nn.Module | None:
    """The SentenceTransformer of a checkpoint; None if it has no modules.json, which lists its modules.

    Raises:
        UnsupportedModelError: if the package sentence-transformers is missing.
    """
    where = {name: hub[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in hub}
    listed = transformers.utils.cached_file(
        os.fspath(model_id),
        "modules.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    if listed is None:
        return None
    try:
        from sentence_transformers import SentenceTransformer  # not a requirement, and it takes seconds
    except ImportError as error:
        raise UnsupportedModelError(
            f"{os.fspath(model_id)} is a model of sentence-transformers: pip install sentence-transformers"
        ) from error
    given = {name: value for name, value in settings.items() if value is not None}
    model: nn.Module = SentenceTransformer(
        os.fspath(model_id),
        device=None if "device_map" in given else "cpu",
        revision=hub["revision"],
        token=hub.get("token"),
        cache_folder=hub.get("cache_dir"),
        local_files_only=bool(hub.get("local_files_only")),
        trust_remote_code=bool(hub.get("trust_remote_code")),
        model_kwargs=given,
    )
    return model.eval()


def _number_of_classes(model_id: str | os.PathLike[str], where: Mapping[str, Any]) -> int | None:
    """The number of classes of a classifier that an adapter saves; None if it saves none."""
    from safetensors import safe_open

    # PEFT also reads pickled files; of those nothing is looked at here.
    path = transformers.utils.cached_file(
        os.fspath(model_id), "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False, **where
    )
    if path is None:
        return None
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.endswith(_CLASSIFIERS)]  # noqa: SIM118
        return int(file.get_slice(names[0]).get_shape()[0]) if names else None


def _processing_class(model_id: Any, task: str, hub: Mapping[str, Any]) -> Any:
    """A model's processing class; for a language model that also takes images or sounds, its tokenizer."""
    loader = getattr(transformers, _PROCESSING_CLASSES.get(task, "AutoTokenizer"))
    try:
        return loader.from_pretrained(model_id, **hub)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        # TypeError: if files are missing, some tokenizers use None as a path.
        logger.warning("%s has no processing class that can be loaded (%s); pass encoded data", model_id, error)
        return None
