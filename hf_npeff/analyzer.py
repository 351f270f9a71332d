"""NPEFFAnalyzer: the few-line way through all stages; no arithmetic."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from hf_npeff.components import Decomposition
from hf_npeff.config import FisherConfig
from hf_npeff.data import Examples
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.files import read_json
from hf_npeff.fisher.compute import FisherPass, compute, dataset_hash, share_of
from hf_npeff.fisher.distributions import OutputHead, base_of, head_of, task_of_class
from hf_npeff.fisher.gradients import find_linear_maps, frozen
from hf_npeff.fisher.sketches import Sketch
from hf_npeff.store import PEFs

logger = logging.getLogger(__name__)

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


class NPEFFAnalyzer:
    """A model under analysis.

    The model is used in eval mode without parameter gradients, and is handed back as it came (mode, requires_grad,
    hooks, random state), exceptions included.

    Args:
        model: a transformers model, PEFT-wrapped or not.
        processing_class: its tokenizer, image processor or processor; needed unless the data is encoded.
        fisher: how PEFs are computed.
        accelerator: an `accelerate.Accelerator`; by default one is made when it is needed.
        task: the head's task where the model's class does not tell it, or an object with the `OutputHead` protocol.

    Raises:
        UnsupportedModelError: if the model predicts nothing that is known.
        ValueError: if `fisher` does not fit the model.
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
        self.model = model
        self.processing_class = processing_class
        self.fisher = fisher or FisherConfig()
        self._accelerator = accelerator
        self._task = task
        self._sketch: Sketch | None = None
        self.maps = find_linear_maps(model, self.fisher.target_modules, self.fisher.exclude_modules)
        modules = {name for m in self.maps for name in m.modules}
        self.head = head_of(model, task, self.fisher.positions, modules)
        if hasattr(self.head, "use_mask_token"):
            self.head.use_mask_token(getattr(processing_class, "mask_token_id", None))

    @classmethod
    def from_pretrained(
        cls,
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
    ) -> NPEFFAnalyzer:
        """Load a model and its processing class from the Hub or a folder.

        The Auto class comes from `config.architectures`; `task` overrides it. The other arguments are those of
        transformers' `from_pretrained`.

        Raises:
            UnsupportedModelError: if the architecture has no head that is known.
            OSError: if there is no such model.
        """
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        config = transformers.AutoConfig.from_pretrained(model_id, **hub)
        architectures = getattr(config, "architectures", None) or []
        name = task if isinstance(task, str) else next(filter(None, map(task_of_class, architectures)), None)
        if name not in _AUTO_CLASSES:
            raise UnsupportedModelError(
                f"{model_id} has the architectures {architectures}, and none has a head that hf_npeff knows; pass task=, "
                f"one of {', '.join(_AUTO_CLASSES)}"
            )
        arguments: dict[str, Any] = {"dtype": dtype, "device_map": device_map, **hub}
        if quantization_config is not None:
            arguments["quantization_config"] = quantization_config
        model = getattr(transformers, _AUTO_CLASSES[name]).from_pretrained(model_id, **arguments)
        if processing_class is None:
            processing_class = _processing_class(model_id, name, hub)
        return cls(model, processing_class, fisher=fisher, accelerator=accelerator, task=task)

    # Examples → PEFs

    def compute_pefs(
        self,
        dataset: Any,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        batch_size: int | Literal["auto"] = 8,
        max_examples: int | None = None,
        columns: Sequence[str] | None = None,
        resume: bool = True,
        shard_size: int = 1024,
    ) -> PEFs:
        """Per-example Fishers of a data set.

        Args:
            dataset: `datasets.Dataset`, `IterableDataset` (needs `max_examples`), list of strings, list of
                dictionaries, dictionary of tensors, or DataLoader.
            output_dir: where shards are written as they are ready; None keeps everything in memory.
            batch_size: examples of a batch, or "auto" to halve it when memory runs out.
            max_examples: only the first ones.
            columns: what to keep beside the rows; None keeps every column of strings, numbers or booleans.
            resume: go on with what `output_dir` holds; False begins again.
            shard_size: examples of a shard.

        Returns:
            PEFs in the data set's order.

        Raises:
            ValueError: if the data is empty, cannot be encoded or is too long for the model; if the config asks for
                what the model does not have; if the model gives NaN (the examples are named).
            UnsupportedModelError: if the model has no logits or uses a module in a way that hooks do not see.
            IncompatibleSketchError: if `output_dir` holds PEFs of another model, config or data set.
        """
        if batch_size != "auto" and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive whole number or 'auto', but it is {batch_size!r}")
        if not isinstance(shard_size, int) or shard_size < 1:
            raise ValueError(f"shard_size must be a positive whole number, but it is {shard_size!r}")
        examples = Examples(dataset, self.processing_class, max_examples=max_examples, columns=columns)
        self._check(examples)
        accelerator = self._processes()
        process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        if processes > 1 and output_dir is None:
            raise ValueError("with several processes PEFs are gathered on disk: pass output_dir")
        folder = None if output_dir is None else Path(output_dir)
        barrier = accelerator.wait_for_everyone if accelerator is not None else _no_barrier
        if folder is not None and not resume and process == 0 and folder.exists():
            _remove_store(folder)
        barrier()
        with self._at_work(folder) as work:
            work.prepare(examples[: min(len(examples), 64)])
            assert work.sketch is not None and work.selftest is not None
            self._sketch = work.sketch
            if process == 0:
                logger.info("%s", work.selftest.line(work.sketch))
                error = work.selftest.sketch_error
                if error is not None and error > self.fisher.sketch_tolerance:
                    logger.warning(
                        "the sketch's error in PEF inner products is %.3f, above the tolerance %.3g: raise sketch_dim or "
                        "storage_limit, or use sketch='countsketch'",
                        error,
                        self.fisher.sketch_tolerance,
                    )
            result = compute(
                work,
                examples,
                facts={**self._facts(), "dataset": {"examples": len(examples), "hash": dataset_hash(examples)}},
                output_dir=folder,
                batch_size=None if batch_size == "auto" else batch_size,
                shard_size=shard_size,
                shares=[share_of(len(examples), i, processes) for i in range(processes)],
                process=process,
                barrier=barrier,
                progress=process == 0 and _progress_wanted(),
            )
        return result

    @contextmanager
    def _at_work(self, folder: Path | None = None) -> Any:
        """A frozen model and the pass over its batches."""
        sketch = self._sketch
        if folder is not None and (folder / "config.json").exists():
            sketch = Sketch.from_dict(read_json(folder / "config.json")["sketch"])
            if set(sketch.shapes) != {m.parameter for m in self.maps} or sketch.seed != self.fisher.seed:
                sketch = self._sketch  # the comparison of configs will name the difference
        base: Any = base_of(self.model)
        pad = getattr(self.processing_class, "pad_token_id", None)
        pad = getattr(base.config, "pad_token_id", None) if pad is None else pad
        single = hasattr(base, "score") and getattr(base.config, "pad_token_id", None) is None
        with frozen(self.model):
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
            )

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.model.parameters()).device

    def _processes(self) -> Any:
        """The accelerator, made only where several processes run."""
        if self._accelerator is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator()
            if not hasattr(self.model, "hf_device_map"):
                self.model.to(self._accelerator.device)
        return self._accelerator

    def _check(self, examples: Examples) -> None:
        """Everything about the data that can be known before the model runs."""
        config: Any = base_of(self.model).config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        labelled = self.fisher.positions != "labels"
        for example in examples:
            if limit is not None and example.length > limit:
                raise ValueError(
                    f"example {example.id!r} has {example.length} tokens, and the model has {limit} positions; shorten it"
                )
            if not labelled and "labels" not in example.inputs:
                raise ValueError(
                    f"positions='labels' needs token labels, and example {example.id!r} has none; add a `labels` column "
                    "(−100 where nothing is counted)"
                )

    def _facts(self) -> dict[str, Any]:
        base: Any = base_of(self.model)
        return {
            "model": getattr(base, "name_or_path", None) or type(base).__name__,
            "revision": getattr(base.config, "_commit_hash", None),
            "architecture": type(base).__name__,
            "task": getattr(self.head, "task", type(self.head).__name__),
            "versions": {name: _version(name) for name in ("hf_npeff", "torch", "transformers", "accelerate")},
        }

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

    # PEFs → decomposition

    def decompose(self, pefs: PEFs, n_components: int = 16, *, validation: PEFs | None = None, **settings: Any) -> Decomposition:
        """Decompose PEFs: `NPEFF(n_components, **settings).fit(pefs, validation)`."""
        settings.setdefault("progress", _progress_wanted())
        return NPEFF(n_components, **settings).fit(pefs, validation)


def _processing_class(model_id: Any, task: str, hub: Mapping[str, Any]) -> Any:
    loader = transformers.AutoImageProcessor if task == "image-classification" else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(model_id, **hub)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s has no processing class that loads (%s); pass encoded data", model_id, error)
        return None


def _remove_store(folder: Path) -> None:
    """Remove the files of a store, and nothing else."""
    for pattern in ("config.json", "manifest.json", "pefs-*"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _no_barrier() -> None:
    return None


def _progress_wanted() -> bool:
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() not in ("1", "ON", "YES", "TRUE")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


