"""The model under analysis: its head, the weights that are covered, how it is run, and what is known of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from hf_npeff.components import Decomposition
from hf_npeff.config import FisherConfig
from hf_npeff.data import Examples
from hf_npeff.decomposition.sharding import on_cpu
from hf_npeff.errors import IncompatibleSketchError, UnsupportedModelError
from hf_npeff.files import read_json
from hf_npeff.fisher.gradients import find_linear_maps, frozen, without_parameters
from hf_npeff.fisher.heads import OutputHead, base_of, head_of, task_of_class
from hf_npeff.fisher.parameters import find_parameters, modules_of
from hf_npeff.fisher.passes import FisherPass
from hf_npeff.fisher.sharded import Sharding
from hf_npeff.fisher.sketches import Sketch
from hf_npeff.hub import commit_of_model
from hf_npeff.store import PEFs

logger = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="AnalysedModel")
_AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}


class AnalysedModel:
    """A model with the settings under which it is analysed; `NPEFFAnalyzer` adds the stages.

    Attributes:
        model: the transformers model.
        processing_class: its tokenizer, image processor or processor, or None.
        fisher: how PEFs are computed.
        head: what it predicts, and where.
        maps: the linear weights under analysis.
        parameters: {name: shape} of other parameters under analysis.
        revision: the model's commit, or None.
        sharding: how processes keep in step where FSDP2 shards the weights over them.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any = None,
        *,
        fisher: FisherConfig | None = None,
        accelerator: Any = None,
        task: str | OutputHead | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model must be a loaded model, but it is {model!r}; NPEFFAnalyzer.from_pretrained takes ids and paths"
            )
        if not isinstance(fisher, FisherConfig | None):
            raise ValueError(f"fisher must be a FisherConfig, but it is {fisher!r}; write FisherConfig(**settings)")
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        self.sharding = Sharding(model)
        self.sharding.release()
        self.model = model
        self.processing_class = processing_class
        self.fisher = fisher or FisherConfig()
        self._accelerator = accelerator
        self._task = task
        self.revision: str | None = getattr(getattr(base_of(model), "config", None), "_commit_hash", None)
        self._sketch: Sketch | None = None
        self._liked: tuple[str, Any] | None = None
        self.parameters = find_parameters(model, self.fisher.parameters)
        maps = find_linear_maps(model, self.fisher.target_modules, self.fisher.exclude_modules)
        self.maps = without_parameters(model, maps, self.parameters)
        modules = {name for m in self.maps for name in m.modules} | modules_of(model, self.parameters)
        self.head = head_of(model, task, self.fisher.positions, modules)
        if hasattr(self.head, "use_mask_token"):
            self.head.use_mask_token(getattr(processing_class, "mask_token_id", None))
        self.sharding.watch_head(getattr(self.head, "embedding", None), getattr(self.head, "metric", None))

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        model_id: str | os.PathLike[str],
        *,
        task: str | OutputHead | None = None,
        fisher: FisherConfig | None = None,
        processing_class: Any = None,
        accelerator: Any = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        quantization_config: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> _Self:
        """Load a model and its processing class from the Hub or a folder.

        The Auto class comes from `config.architectures`; `task` overrides it. The other arguments are those of
        transformers' `from_pretrained`.

        Raises:
            UnsupportedModelError: if the architecture has no head that is known.
            OSError: if there is no such model.
        """
        where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        commit = commit_of_model(model_id, revision=revision, **where)
        hub = {"revision": commit or revision or "main", **where, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(model_id, **hub)
        architectures = getattr(config, "architectures", None) or []
        name = task if isinstance(task, str) else next(filter(None, map(task_of_class, architectures)), None)
        if name not in _AUTO_CLASSES:
            raise UnsupportedModelError(
                f"{model_id} has the architectures {architectures}, and none has a head that hf_npeff knows; pass "
                f"task=, one of {', '.join(_AUTO_CLASSES)}"
            )
        arguments: dict[str, Any] = {"dtype": dtype, "device_map": device_map, **hub}
        if quantization_config is not None:
            arguments["quantization_config"] = quantization_config
        model = getattr(transformers, _AUTO_CLASSES[name]).from_pretrained(model_id, **arguments)
        if processing_class is None:
            processing_class = _processing_class(model_id, name, hub)
        analyzer = cls(model, processing_class, fisher=fisher, accelerator=accelerator, task=task)
        analyzer.revision = commit
        return analyzer

    # The same model with other settings

    def _like(self: _Self, like: PEFs | Decomposition) -> _Self:
        """An analyzer of the same model with the Fisher config and sketch of `like`."""
        if like.info.get("sketch") is None:
            raise ValueError("like= needs PEFs, or a decomposition of PEFs, of a model; these rows were made elsewhere")
        sketch = Sketch.from_dict(like.info["sketch"])
        config = FisherConfig.from_dict(like.info["fisher"])
        other = type(self)(
            self.model, self.processing_class, fisher=config, accelerator=self._accelerator, task=self._task
        )
        left_out = (like.info.get("selftest") or {}).get("left_out") or ()
        other.maps = [m for m in other.maps if m.parameter not in left_out]
        ours = {m.parameter: m.shape for m in other.maps} | other.parameters
        if ours != sketch.shapes:
            differing = sorted(k for k in {*ours, *sketch.shapes} if ours.get(k) != sketch.shapes.get(k))
            raise IncompatibleSketchError(
                f"like= is of the model {like.info.get('model')}, and this model has other parameters under analysis: "
                f"these differ: {', '.join(differing[:5])}"
            )
        other._sketch, other.revision = sketch, self.revision
        return other

    def _with_like(self: _Self, decomposition: Decomposition) -> _Self:
        """This analyzer, where it has the decomposition's sketch, or one that has."""
        known = decomposition.info.get("revision")
        if known is not None and self.revision is not None and known != self.revision:
            raise IncompatibleSketchError(
                f"the decomposition is of the model at commit {known}, and this model is at {self.revision}; load that "
                "revision"
            )
        if self._sketch is not None and self._sketch.fingerprint == decomposition.fingerprint:
            return self
        if self._liked is None or self._liked[0] != decomposition.fingerprint:
            self._liked = (decomposition.fingerprint, self._like(decomposition))
        return self._liked[1]

    # How it is run

    @contextmanager
    def _at_work(self, folder: Path | None = None) -> Any:
        """A frozen model and the pass over its batches."""
        sketch = self._sketch
        if folder is not None and (folder / "config.json").exists():
            before = read_json(folder / "config.json").get("sketch")
            if before is not None and self._could_make(Sketch.from_dict(before)):
                sketch = Sketch.from_dict(before)  # else the comparison of configs will name the difference
        base: Any = base_of(self.model)
        own_pad = getattr(base.config, "pad_token_id", None)
        pad = getattr(self.processing_class, "pad_token_id", None)
        if pad is None or (own_pad is not None and hasattr(base, "score")):
            pad = own_pad  # a decoder's classifier finds the last token by the padding that its config names
        single = hasattr(base, "score") and own_pad is None
        self.sharding.release()
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.callback(self.sharding.release)
            yield FisherPass(
                self.model,
                self.head,
                self.maps,
                self.fisher,
                pad,
                self.device,
                sketch,
                self._describe,
                one_at_a_time=single,
                parameters=self.parameters,
                sharding=self.sharding,
            )

    def _refuse_sharded(self, what: str) -> None:
        if self.sharding.active:
            raise UnsupportedModelError(
                f"{what} moves weights, and these are sharded over processes; load the whole model in one process"
            )

    def _could_make(self, sketch: Sketch) -> bool:
        """Whether the settings leave this sketch open, so that a run may go on with it."""
        known = {m.parameter for m in self.maps} | set(self.parameters)
        config = self.fisher
        same = config.sketch == "auto" or (config.sketch == sketch.kind and config.sketch_dim in (None, sketch.setting))
        return same and set(sketch.shapes) <= known and sketch.seed == config.seed

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        own = next(self.model.parameters()).device
        if own.type != "meta":
            return own
        hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(device) for device in devices if device is not None), own)

    def _processes(self) -> Any:
        """The accelerator, made only where several processes run."""
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self._accelerator is None and started > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=on_cpu())
            if not hasattr(self.model, "hf_device_map") and not self.sharding.active:
                self.model.to(self._accelerator.device)
        if self._accelerator is not None and self._accelerator.num_processes < started:
            raise ValueError(
                f"{started} processes were started, but the accelerator knows of "
                f"{self._accelerator.num_processes}; on CPUs "
                "make it with Accelerator(cpu=True)"
            )
        return self._accelerator

    def _check(self, examples: Examples) -> None:
        """Everything about the data that can be known before the model runs."""
        config: Any = base_of(self.model).config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        for module in self.model.modules():
            positions = getattr(module, "position_embeddings", None)
            if limit is not None and isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
                limit = (
                    positions.num_embeddings - positions.padding_idx - 1
                )  # RoBERTa counts from the one after padding
        labelled = self.fisher.positions != "labels"
        vocabulary = _vocabulary(self.model)
        for example in examples:
            ids = example.inputs.get("input_ids") or [0]
            if vocabulary is not None and not isinstance(ids[0], list) and not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ValueError(
                    f"example {example.id!r} has token ids from {min(ids)} to {max(ids)}, and the model's vocabulary "
                    f"has {vocabulary}; encode it with the model's own tokenizer"
                )
            if example.length == 0:
                raise ValueError(f"example {example.id!r} has no tokens, so nothing to predict from; leave it out")
            if limit is not None and example.length > limit:
                raise ValueError(
                    f"example {example.id!r} has {example.length} tokens, and the model has {limit} positions; "
                    "shorten it"
                )
            if not labelled and "labels" not in example.inputs:
                raise ValueError(
                    f"positions='labels' needs token labels, and example {example.id!r} has none; add a `labels` "
                    "column (−100 where nothing is counted)"
                )
            if not labelled and all(label == -100 for label in example.inputs["labels"]):
                raise ValueError(
                    f"positions='labels' finds nothing to predict in example {example.id!r}: all its labels are −100"
                )

    def _facts(self) -> dict[str, Any]:
        base: Any = base_of(self.model)
        return {
            "model": getattr(base, "name_or_path", None) or type(base).__name__,
            "revision": self.revision,
            "architecture": type(base).__name__,
            "task": getattr(self.head, "task", type(self.head).__name__),
            "label_names": self._label_names(),
            "versions": {name: _version(name) for name in ("hf_npeff", "torch", "transformers", "accelerate")},
        }

    def _label_names(self) -> dict[str, str] | None:
        """{number of a class: its name}; None of a language model."""
        base: Any = base_of(self.model)
        if getattr(self.head, "embedding", None) is not None:
            return None
        return {
            str(number): str(name) for number, name in (getattr(base.config, "id2label", None) or {}).items()
        } or None

    def _describe(self, predictions: Tensor) -> list[str]:
        """Predictions for people: tokens, class names, or numbers."""
        base: Any = base_of(self.model)
        vocabulary = getattr(self.head, "embedding", None) is not None
        names = getattr(base.config, "id2label", None) or {}

        def one(value: Any) -> str:
            if isinstance(value, list):
                return "".join(map(one, value)) if vocabulary else ", ".join(one(v) for v in value if v != -1)
            if isinstance(value, float):
                return f"{value:.3g}"
            if value < 0:
                return ""
            if vocabulary:
                return self.processing_class.decode([value]) if hasattr(self.processing_class, "decode") else str(value)
            return str(names.get(value, value)) if predictions.dim() == 1 else str(value)

        return [one(value) for value in predictions.tolist()]


def _processing_class(model_id: Any, task: str, hub: Mapping[str, Any]) -> Any:
    loader = transformers.AutoImageProcessor if task == "image-classification" else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(model_id, **hub)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s has no processing class that loads (%s); pass encoded data", model_id, error)
        return None


def _vocabulary(model: Any) -> int | None:
    """Tokens that the input embedding knows; None where there is none."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
