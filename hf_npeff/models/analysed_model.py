"""The analysed model: its head, the analysed weights, how it is run, and information on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example, Examples
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.embedding_texts import EmbeddingTexts
from hf_npeff.encoding.record import Encoded, ModelNeeds, Reading
from hf_npeff.errors import IncompatibleSketchError, UnsupportedModelError
from hf_npeff.fisher.bare_model import base_of, is_sentence_transformer
from hf_npeff.fisher.batching import BatchTrials
from hf_npeff.fisher.embeddings import check_sentence_transformer
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.frozen import frozen
from hf_npeff.fisher.fsdp import FSDPModel
from hf_npeff.fisher.heads import finds_last_by_padding, head_of
from hf_npeff.fisher.limits import ModelLimits
from hf_npeff.fisher.linear_maps import by_hooks, find_linear_maps, shapes_of, without_parameters
from hf_npeff.fisher.outputs import OutputHead, traits_of
from hf_npeff.fisher.parameters import find_parameters, modules_of
from hf_npeff.fisher.tasks import task_of
from hf_npeff.fisher.undisturbed import check_default_device
from hf_npeff.fisher.weights_hash import identity_of
from hf_npeff.models.checkpoints import load_checkpoint
from hf_npeff.models.description import ModelDescription
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs
from hf_npeff.processes import Processes, on_cpu
from hf_npeff.records import records_of
from hf_npeff.sharing.files import read_json
from hf_npeff.weights.decomposed import check_decomposed
from hf_npeff.weights.lifting import align

logger = logging.getLogger(__name__)

_SEEN = 8
"""Examples whose labels are looked at for their form, which is the same for all examples of a data set."""
_Self = TypeVar("_Self", bound="AnalysedModel")


_IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""The names in transformers' configs for the token that stands for a part of an image."""


def _is_of(model: Any, processing_class: Any) -> bool:
    """Whether only the SentenceTransformer's own tokenizer is asked for, which by itself adds no prompt."""
    return processing_class is None or any(processing_class is own for own in (model.tokenizer, model.processor))


class AnalysedModel:
    """A model with the settings under which it is analysed; `NPEFFAnalyzer` adds the stages.

    Attributes:
        model: the transformers model, or the SentenceTransformer around it.
        processing_class: its tokenizer, image processor or processor, or None.
        fisher: how PEFs are computed.
        head: the output head, which says what the model predicts, and where.
        maps: the analysed linear maps.
        parameters: {name: shape} of other analysed parameters.
        task: the given task; None if the model's class determines it.
        revision: the model's commit, or None.
        fsdp: keeps processes in step if FSDP2 shards the weights over them.
        reading: which columns of data sets are read, if a call does not say.
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
        check_default_device()
        if not isinstance(fisher, FisherConfig | None):
            raise ValueError(f"fisher must be a FisherConfig, but it is {fisher!r}; write FisherConfig(**settings)")
        before_compiling = getattr(model, "_orig_mod", None)
        model = before_compiling if isinstance(before_compiling, nn.Module) else model
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        check_sentence_transformer(model)
        if is_sentence_transformer(model) and _is_of(model, processing_class):
            processing_class = EmbeddingTexts(model)
        if not hasattr(base_of(model), "config"):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a transformers model: it has no config. Load one with its head through "
                "NPEFFAnalyzer.from_pretrained or an Auto class"
            )
        self.fsdp = FSDPModel(model)
        self.fsdp.release()
        self.model = model
        self.processing_class = processing_class
        self.fisher = fisher or FisherConfig()
        self._accelerator = accelerator
        self.task = task
        self.reading = Reading()
        self.revision: str | None = getattr(getattr(base_of(model), "config", None), "_commit_hash", None)
        self._sketch: Sketch | None = None
        self._used_otherwise: frozenset[str] = frozenset()  # see SelfTest
        self._trials = BatchTrials()
        self._liked: tuple[str, Any] | None = None
        parameters = find_parameters(model, self.fisher.parameters)
        maps = find_linear_maps(model, self.fisher.target_modules, self.fisher.exclude_modules)
        maps, self.parameters = by_hooks(model, maps, parameters)
        self.maps = without_parameters(model, maps, self.parameters)
        modules = {name for m in self.maps for name in m.modules} | modules_of(model, self.parameters)
        mask_token = getattr(processing_class, "mask_token_id", None)
        self.head = head_of(model, task, self.fisher.positions, modules, mask_token)
        self.fsdp.watch_head(*traits_of(self.head).weights)

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
        """Load a model and its processing class from the Hub or a folder, or a PEFT adapter with its base model.

        The class comes from `config.architectures`, or for an adapter from its task; `task` overrides this. The other
        arguments are those of transformers' `from_pretrained`. `revision` is that of the adapter, if there is one; the
        adapter names the revision of its base model.

        Raises:
            UnsupportedModelError: if the architecture has no supported head, or an adapter names no base model.
            OSError: if the model does not exist.
        """
        settings = {"dtype": dtype, "device_map": device_map}
        if quantization_config is not None:
            settings["quantization_config"] = quantization_config
        checkpoint = load_checkpoint(
            model_id,
            task=task if isinstance(task, str) else None,
            processing_class=processing_class,
            revision=revision,
            where={"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only},
            trust_remote_code=trust_remote_code,
            settings=settings,
        )
        processing_class = checkpoint.processing_class
        analyzer = cls(checkpoint.model, processing_class, fisher=fisher, accelerator=accelerator, task=task)
        analyzer.revision = checkpoint.commit
        return analyzer

    # The same model with other settings

    def with_fisher(self: _Self, fisher: FisherConfig, task: str | OutputHead | None = None) -> _Self:
        """An analyzer of the same model with another Fisher config and, if `task` is given, another head."""
        task = self.task if task is None else task
        other = type(self)(self.model, self.processing_class, fisher=fisher, accelerator=self._accelerator, task=task)
        other.revision, other.reading = self.revision, self.reading
        return other

    def with_settings_of(self: _Self, like: PEFs | Decomposition) -> _Self:
        """An analyzer of the same model with the Fisher config and sketch of `like`.

        Raises:
            ValueError: if the rows of `like` were not made by hf_npeff.
            IncompatibleSketchError: if the model does not have the parameters of `like`.
        """
        if like.info.get("sketch") is None:
            raise ValueError(
                "like= needs PEFs of a model, or their decomposition, but these rows were not made by hf_npeff"
            )
        sketch = Sketch.from_dict(like.info["sketch"])
        other = self.with_fisher(FisherConfig.from_dict(like.info["fisher"]))
        tested = like.info.get("selftest") or {}
        other._used_otherwise = frozenset(tested.get("used_otherwise") or ())
        left_out = tested.get("left_out") or ()
        other.maps = [m for m in other.maps if m.parameter not in left_out]
        ours = other.shapes
        if (
            any(name.startswith("base_model.model.") for name in sketch.shapes)
            and not sketch.shapes.keys() & ours.keys()
        ):
            raise IncompatibleSketchError(
                "like= was made by an older version of hf_npeff, which used the names of PEFT's wrappers for weights; "
                "a sketch depends on names, so compute those PEFs again"
            )
        if ours != sketch.shapes:
            differing = sorted(k for k in {*ours, *sketch.shapes} if ours.get(k) != sketch.shapes.get(k))
            raise IncompatibleSketchError(
                f"like= is of the model {like.info.get('model')}, but other parameters of this model are analysed; "
                f"these differ: {', '.join(differing[:5])}"
            )
        other._sketch = sketch
        return other

    def for_decomposition(self: _Self, decomposition: Decomposition) -> _Self:
        """This analyzer, if it has the decomposition's sketch, otherwise one that has.

        Raises:
            IncompatibleSketchError: if the decomposition belongs to another commit, or a model with other parameters.
        """
        known = decomposition.info.get("revision")
        if known is not None and self.revision is not None and known != self.revision:
            raise IncompatibleSketchError(
                f"the decomposition is of the model at commit {known}, and this model is at {self.revision}; load that "
                "revision"
            )
        if self._sketch is not None and self._sketch.fingerprint == decomposition.fingerprint:
            return self
        if self._liked is None or self._liked[0] != decomposition.fingerprint:
            self._liked = (decomposition.fingerprint, self.with_settings_of(decomposition))
        self._liked[1].reading = self.reading
        return self._liked[1]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{parameter: (out, in)} of all analysed weights."""
        return shapes_of(self.maps, self.parameters)

    # How it is run

    @contextmanager
    def forward_pass(self, *, one_at_a_time: bool = False) -> Iterator[ForwardPass]:
        """The forward pass of the model, which is frozen inside `with` and restored afterwards.

        Args:
            one_at_a_time: whether every batch has a single example, even if the model could take more.
        """
        base: Any = base_of(self.model)
        own_pad = getattr(base.config, "pad_token_id", None)
        pad = getattr(self.processing_class, "pad_token_id", None)
        by_padding = finds_last_by_padding(base)
        if pad is None or (own_pad is not None and by_padding):
            pad = own_pad  # the padding token that the model uses to find the last token
        single = by_padding and own_pad is None
        self.fsdp.release()
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.callback(self.fsdp.release)
            forward = ForwardPass(
                self.model,
                self.head,
                self.maps,
                pad,
                self.device,
                parameters=self.parameters,
                describe=self.describe,
                one_at_a_time=single or one_at_a_time,
                trials=self._trials,
                fsdp=self.fsdp,
            )
            yield forward

    def sketch_for(self, folder: Path | None) -> Sketch | None:
        """The sketch that is already fixed: by earlier PEFs, or by a store that a run continues.

        Args:
            folder: the store; its sketch is used if the settings do not determine one.
        """
        if folder is not None and (folder / "config.json").exists():
            before = read_json(folder / "config.json").get("sketch")
            if before is not None and self._could_make(Sketch.from_dict(before)):
                return Sketch.from_dict(before)  # otherwise the comparison of configs will name the difference
        return self._sketch

    def _could_make(self, sketch: Sketch) -> bool:
        """Whether the settings allow this sketch, so that a run may continue with it."""
        known = {m.parameter for m in self.maps} | set(self.parameters)
        config = self.fisher
        same = config.sketch == "auto" or (config.sketch == sketch.kind and config.sketch_dim in (None, sketch.setting))
        return same and set(sketch.shapes) <= known and sketch.seed == config.seed

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        own = next(self.model.parameters()).device
        if own.type != "meta":
            return own
        hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(device) for device in devices if device is not None), own)

    def processes(self) -> Processes:
        """The processes of a run, and which of them this is; an accelerator is made only if there are several.

        Raises:
            ValueError: if the accelerator has fewer processes than were started.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self._accelerator is None and started > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=on_cpu())
            if not hasattr(self.model, "hf_device_map") and not self.fsdp.active:
                self.model.to(self._accelerator.device)
        if self._accelerator is None:
            return Processes()
        if self._accelerator.num_processes < started:
            raise ValueError(
                f"{started} processes were started, but the accelerator has {self._accelerator.num_processes}; on CPUs "
                "make it with Accelerator(cpu=True)"
            )
        return Processes.of(self._accelerator)

    def examples_of(self, decomposition: Decomposition, dataset: Any, pefs: PEFs | None = None) -> list[Example]:
        """The data set's examples in the decomposition's order, after comparing their contents with the analysed ones.

        Raises:
            IncompatibleSketchError: if `pefs` have another sketch.
            ValueError: if `pefs` or the data set are of other examples.
        """
        contents = decomposition.columns.get("content_hash")
        if pefs is not None:
            check_decomposed(decomposition, pefs)
            contents = pefs.content_hashes  # a decomposition may have been saved without columns
        info = decomposition.info if pefs is None else pefs.info
        examples = self.read(dataset, like=info, positions=decomposition.fisher_config.positions)
        return align(examples, decomposition.example_ids, contents)

    def read(
        self,
        dataset: Any,
        reading: Reading | None = None,
        *,
        like: Mapping[str, Any] | None = None,
        positions: str | None = None,
        max_examples: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> Examples:
        """The examples of a data set, encoded for the model.

        Args:
            dataset: see `compute_pefs`.
            reading: which columns are read; unset fields come from `self.reading`, and then from how `like` was read.
            like: `info` of PEFs; the same columns are read again, if the data set has them.
            positions: the positions of predictions; None uses those of the Fisher config.
            max_examples: use only this many examples, the first ones.
            columns: the columns to keep with the results.

        Raises:
            ValueError: if the data is empty, cannot be encoded, it is not clear which columns to read, the column of
                labels has no labels, or its labels are vectors and the config of a classifier does not say of what.
        """
        check_default_device()
        records = records_of(dataset, max_examples, self.needs.image_token)
        asked = given = (reading or Reading()).or_of(self.reading)
        known = None if like is None or len(records) == 0 else Encoded.of(like)
        if known is not None:
            asked = asked.or_of(known.reading.within(records[0]))
        needs = self.needs if positions is None else replace(self.needs, positions=positions)
        examples = Examples(
            records, self.processing_class, max_examples=max_examples, columns=columns, reading=asked, needs=needs
        )
        if given.label_column is not None:
            examples.check_labelled(given.label_column)
        column = examples.encoded.label_column
        names = ("labels", "label") if column is None else (column,)  # those that transformers reads
        self.description.check_problem_type([v for name in names for v in examples.first_values(name, _SEEN)])
        return examples

    @property
    def needs(self) -> ModelNeeds:
        """The properties of the model that decide how examples are encoded."""
        base: Any = base_of(self.model)
        task = getattr(self.head, "task", None) or task_of(base)
        names = self.description.label_names
        return ModelNeeds(
            task,
            self.fisher.positions,
            ModelLimits.of(self.model, needs_labels=False).positions,
            None if names is None else {int(number): name for number, name in names.items()},
            next((token for name in _IMAGE_TOKENS if (token := getattr(base.config, name, None)) is not None), None),
        )

    def weights(self) -> dict[str, Any]:
        """The identity of the model's current weights: a `WeightsIdentity` as JSON types."""
        check_default_device()
        self.fsdp.release()
        return identity_of(self.model).to_dict()

    # Information on it

    @property
    def description(self) -> ModelDescription:
        """The information on the model that does not need running it."""
        return ModelDescription(self.model, self.head, self.processing_class, self.fisher, self.revision)

    def provenance(self, weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The information on the model that is stored with all results.

        Args:
            weights: the identity of its weights, if it is already known; computing it reads all weights.

        Returns:
            Names, commit, weights, task, classes and versions.
        """
        return self.description.provenance(self.weights() if weights is None else weights)

    def rows_per_example(self, choices: int | None = None) -> int:
        """c, the number of rows for each example, as far as it is known before the model runs.

        Args:
            choices: the number of choices in multiple choice, which are its classes.
        """
        return self.description.rows_per_example(choices)

    def describe(self, predictions: Tensor) -> list[str]:
        """Predictions in words: tokens, class names, or numbers."""
        return self.description.describe(predictions)
