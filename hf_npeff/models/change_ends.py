"""The two models of a change: loaded, in folders or on the Hub, including adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.errors import IncompatibleWeightsError, UnsupportedModelError
from hf_npeff.fisher.bare_model import acting_adapters, base_of, is_wrapper
from hf_npeff.models.checkpoints import Checkpoint, load_checkpoint
from hf_npeff.pefs.weights_identity import shown
from hf_npeff.sharing.files import read_json
from hf_npeff.sharing.hub import is_hub_id
from hf_npeff.weights.change_sums import summed
from hf_npeff.weights.changes import difference, provenance
from hf_npeff.weights.layouts import Layout, layouts_of
from hf_npeff.weights.own_weights import each_once, tied_weights
from hf_npeff.weights.peft_changes import adapter_deltas, deltas_of_adapter

Change = tuple[dict[str, Tensor], dict[str, Layout], dict[str, Any]]
"""{parameter: ΔW}, {parameter: layout}, and the change's `info`."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def change_between(
    before: Any,
    after: Any,
    *,
    task: str | None,
    dtype: str | torch.dtype,
    revisions: tuple[str | None, str | None],
    where: Mapping[str, Any],
) -> Change:
    """The change from one model to another; see `ParameterDirection.between`."""
    ends = [
        _loaded(which, task, dtype, revision, where) for which, revision in zip((before, after), revisions, strict=True)
    ]
    _check_vocabularies(*(end.processing_class for end in ends))
    deltas, info = difference(ends[0].model, ends[1].model)
    if ends[0].commit is not None:
        info["revision"] = ends[0].commit
    if ends[1].commit is not None:
        info["after_revision"] = ends[1].commit
    return deltas, layouts_of(ends[0].model, deltas), info


def change_of_adapter(
    adapter: Any,
    base: Any,
    *,
    task: str | None,
    dtype: str | torch.dtype,
    revision: str | None,
    check_base: bool,
    where: Mapping[str, Any],
) -> Change:
    """The change of a base model by adapters; see `ParameterDirection.from_adapter`."""
    if isinstance(adapter, nn.Module):
        return _of_wrapped(adapter, base)
    wanted = _weights(adapter)
    places = {name: _files_of(name, revision, where) for name in wanted}
    recorded = {name: _recorded_base(name, place) for name, place in places.items()}
    named = next(iter(recorded.values()))
    end = _base(base, named, task, dtype, where)
    if any(is_wrapper(module) for module in end.model.modules()):
        raise ValueError(
            "base= is already wrapped by PEFT; pass the bare model as base=, or the wrapped model as the adapter"
        )
    about = provenance(end.model) | ({} if end.commit is None else {"revision": end.commit})
    if check_base:
        for name, place in places.items():
            _check_recorded(name, recorded[name][0], place, about)
    parts = [(w, each_once(end.model, deltas_of_adapter(end.model, str(places[name])))) for name, w in wanted.items()]
    deltas, layouts = summed(parts, [layouts_of(end.model, part) for _, part in parts])
    if not deltas:
        raise ValueError(f"the changes of the adapters {list(wanted)} with these weights cancel")
    info = about | {"method": "adapter", "adapters": wanted} | tied_weights(end.model, deltas)
    return deltas, layouts, info


def _loaded(
    which: Any, task: str | None, dtype: str | torch.dtype, revision: str | None, where: Mapping[str, Any]
) -> Checkpoint:
    """A loaded model, or a checkpoint, which is loaded."""
    if isinstance(which, nn.Module):
        compiled = getattr(which, "_orig_mod", None)
        return Checkpoint(compiled if isinstance(compiled, nn.Module) else which, None, None, task or "")
    if not isinstance(which, str | os.PathLike):
        raise ValueError(f"expected a loaded model, a folder or an id on the Hub, but got {type(which).__name__}")
    settings = {"dtype": dtype}
    try:
        return load_checkpoint(
            which, task=task, processing_class=None, revision=revision, where=where, settings=settings
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{os.fspath(which)} has its own code, which is not run when models are compared; load the model yourself "
            "and pass the loaded model to ParameterDirection.between or from_adapter"
        ) from error


def check_tokenizer(
    before: Any, after: str, revision: str | None = None, *, trust_remote_code: bool = False, **where: Any
) -> None:
    """Check that a checkpoint's tokenizer gives tokens the same ids as another one; without one nothing is checked.

    Args:
        before: a tokenizer, or None.
        after: a folder, or an id on the Hub.
        revision: the revision of the checkpoint.
        trust_remote_code: as in transformers, which asks on the terminal if it is not set.
        **where: arguments for downloads.

    Raises:
        ValueError: if the ids differ.
    """
    from transformers import AutoTokenizer

    if not callable(getattr(before, "get_vocab", None)):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            after, revision=revision or "main", trust_remote_code=trust_remote_code, **where
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # an adapter, or a checkpoint of weights alone
    _check_vocabularies(before, tokenizer)


def base_named_by(adapter: str, **where: Any) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision.

    Raises:
        OSError: if the adapter does not exist.
        UnsupportedModelError: if it names no base model.
    """
    base, revision = _recorded_base(adapter, _files_of(adapter, None, where))
    if base is None:
        raise UnsupportedModelError(f"the adapter {adapter} names no base model; pass base= (--base)")
    return base, revision


def _check_vocabularies(before: Any, after: Any) -> None:
    """Check that two tokenizers give tokens the same ids."""
    vocabularies = []
    for tokenizer in (before, after):
        get = getattr(tokenizer, "get_vocab", None)
        if not callable(get):
            return
        vocabularies.append(get())
    a, b = vocabularies
    moved = [token for token in a if token in b and a[token] != b[token]]
    only = sorted(a.keys() ^ b.keys())
    if moved or only:
        what = f"{len(moved)} tokens have different ids" if moved else f"{len(only)} tokens are in only one of them"
        raise ValueError(
            f"the tokenizers of the two models differ: {what}, for instance {(moved or only)[:3]}. So the same text "
            "gives them different inputs, and predictions cannot be compared. If the tokens that you use are the same, "
            "load the models yourself and pass the loaded models"
        )


# Adapters


def _weights(adapter: Any) -> dict[str, float]:
    """{adapter: its weight}."""
    if isinstance(adapter, str | os.PathLike):
        return {os.fspath(adapter): 1.0}
    if isinstance(adapter, Mapping) and adapter:
        numbers = {os.fspath(name): weight for name, weight in adapter.items()}
        if all(isinstance(w, int | float) and not isinstance(w, bool) and w == w for w in numbers.values()):
            return {name: float(weight) for name, weight in numbers.items()}
    raise ValueError(
        "expected an adapter's folder or id, a model that PEFT wrapped, or {adapter: weight} of several, but got "
        f"{adapter!r:.100}"
    )


def _files_of(name: str, revision: str | None, where: Mapping[str, Any]) -> Path:
    """The folder of an adapter, which is downloaded if it is on the Hub.

    Raises:
        OSError: if the adapter does not exist.
    """
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        folder = Path(name)
    elif is_hub_id(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[_CONFIG, _WEIGHTS], **where))
    else:
        raise OSError(f"{name!r} is neither a folder nor the id of an adapter on the Hub (user/name)")
    if not (folder / _CONFIG).is_file():
        raise OSError(f"{name} has no adapter: {_CONFIG} is missing")
    if not (folder / _WEIGHTS).is_file():
        raise OSError(f"{name} has no {_WEIGHTS}; pickled adapters are not read, so save it with safetensors")
    return folder


def _recorded_base(name: str, folder: Path) -> tuple[str | None, str | None]:
    """The base model, and its revision, that an adapter names."""
    config = read_json(folder / _CONFIG, None)
    if config.get("kind") == "delta":
        raise ValueError(f"{name} is a dense delta of hf_npeff; read it with ParameterDirection.from_pretrained")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return base if isinstance(base, str) and base else None, revision if isinstance(revision, str) else None


def _base(
    base: Any,
    named: tuple[str | None, str | None],
    task: str | None,
    dtype: str | torch.dtype,
    where: Mapping[str, Any],
) -> Checkpoint:
    """The base model: the given one, or the one that the adapter names."""
    if base is not None:
        return _loaded(base, task, dtype, None, where)
    if named[0] is None:
        raise UnsupportedModelError("the adapter names no base model; pass base=, a model, a folder or an id")
    return _loaded(named[0], task, dtype, named[1], where)


def _check_recorded(name: str, recorded: str | None, folder: Path, about: Mapping[str, Any]) -> None:
    """Check that an adapter does not name another base model.

    Names are compared if both are ids on the Hub, because a folder may have any model. The hash of the base model's
    weights, which adapters written by hf_npeff have, is always compared.
    """
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, "pt") as file:
        made = (file.metadata() or {}).get("base_model_weights")
    if made is not None and (now := shown(about.get("weights"))) is not None and made != now:
        raise IncompatibleWeightsError(
            f"the adapter {name} was made for weights with the hash {made}, but those of {about['model']} have {now}; "
            "load that model, or skip this check with check_base=False"
        )
    base = str(about["model"])
    named = base != about["architecture"]  # which stands in for a name that is not known
    if named and recorded is not None and is_hub_id(recorded) and is_hub_id(base) and recorded != base:
        raise ValueError(
            f"the adapter {name} is for the base model {recorded}, but this is {base}; load that model, or skip this "
            "check with check_base=False"
        )


def _of_wrapped(model: nn.Module, base: Any) -> Change:
    """The change by the active adapters of a model that PEFT wrapped."""
    if base is not None:
        raise ValueError("a wrapped model contains its base model: leave out base=")
    deltas = adapter_deltas(model)
    for wrapper in model.modules():
        around: Any = wrapper
        if is_wrapper(wrapper) and hasattr(around, "modules_to_save") and acting_adapters(wrapper):
            raise UnsupportedModelError(
                "the adapter saves whole modules (modules_to_save); give its folder, or use "
                "ParameterDirection.between(base, wrapped model)"
            )
    if not deltas:
        raise ValueError("this model has no active adapter, or the adapter's change is zero")
    names = sorted({name for module in model.modules() if is_wrapper(module) for name in acting_adapters(module)})
    acting: list[Any] = [m for m in model.modules() if is_wrapper(m) and acting_adapters(m)]
    try:
        for wrapper in acting:
            wrapper._disable_adapters = True  # not enable_adapters, which also changes what is trained
        about = provenance(model)
    finally:
        for wrapper in acting:
            wrapper._disable_adapters = False
    info = about | {"method": "adapter", "adapters": dict.fromkeys(names, 1.0)}
    deltas = each_once(model, deltas)
    return deltas, layouts_of(base_of(model), deltas), info | tied_weights(model, deltas)
