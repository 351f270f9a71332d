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

from hf_npeff.adapters import layout_of
from hf_npeff.components import Decomposition
from hf_npeff.config import FisherConfig
from hf_npeff.data import Examples
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.decomposition.sharding import on_cpu
from hf_npeff.directions import ParameterDirection
from hf_npeff.errors import IncompatibleSketchError, UnsupportedModelError
from hf_npeff.files import read_json
from hf_npeff.fisher.compute import DEFAULT_DIMS, FisherPass, compute, dataset_hash, share_of
from hf_npeff.fisher.cost import Estimate, estimate, numbers_of
from hf_npeff.fisher.distributions import OutputHead, base_of, head_of, task_of_class
from hf_npeff.fisher.gradients import find_linear_maps, frozen
from hf_npeff.fisher.parameters import find_parameters, modules_of
from hf_npeff.fisher.selftest import candidates
from hf_npeff.fisher.sketches import Sketch
from hf_npeff.hub import commit_of_model
from hf_npeff.lifting import Form, LiftRequest, Method, align, lift_components, select
from hf_npeff.perturbation import PerturbationReport, choose_examples, evaluate
from hf_npeff.store import PEFs

logger = logging.getLogger(__name__)

_LIFTED_TOGETHER = 4
"""Components that share forward passes in `evaluate_components`; each holds a gradient of all analysed weights."""
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
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
            raise UnsupportedModelError(
                "the model's weights are sharded over processes (FSDP2, tensor parallelism), so every process would "
                "have to run the same batches, but processes share the examples out; load the whole model in every "
                "process, or one model over several devices with device_map"
            )
        self.model = model
        self.processing_class = processing_class
        self.fisher = fisher or FisherConfig()
        self._accelerator = accelerator
        self._task = task
        self.revision: str | None = getattr(getattr(base_of(model), "config", None), "_commit_hash", None)
        self._sketch: Sketch | None = None
        self._liked: tuple[str, NPEFFAnalyzer] | None = None
        self.parameters = find_parameters(model, self.fisher.parameters)
        maps = find_linear_maps(model, self.fisher.target_modules, self.fisher.exclude_modules)
        self.maps = [m for m in maps if m.parameter not in self.parameters]
        modules = {name for m in self.maps for name in m.modules} | modules_of(model, self.parameters)
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
        like: PEFs | Decomposition | None = None,
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
            like: PEFs or a decomposition whose Fisher config and sketch are used instead of the analyzer's own, so that
                `decomposition.transform` takes the result.

        Returns:
            PEFs in the data set's order.

        Raises:
            ValueError: if the data is empty, cannot be encoded or is too long for the model; if the config asks for
                what the model does not have; if the model gives NaN (the examples are named); if `like` is of rows
                made elsewhere.
            UnsupportedModelError: if the model has no logits or uses a module in a way that hooks do not see.
            IncompatibleSketchError: if `output_dir` holds PEFs of another model, config or data set, or the model does
                not have the parameters of `like`.
        """
        if like is not None:
            return self._like(like).compute_pefs(
                dataset,
                output_dir,
                batch_size=batch_size,
                max_examples=max_examples,
                columns=columns,
                resume=resume,
                shard_size=shard_size,
            )
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
            work.one_at_a_time |= batch_size == 1
            work.prepare(examples[: min(len(examples), 64)])
            assert work.sketch is not None and work.selftest is not None
            self._sketch = work.sketch
            self.maps = list(work.maps)
            if process == 0:
                logger.info("%s", work.selftest.line(work.sketch))
                error = work.selftest.sketch_error
                if error is not None and error > self.fisher.sketch_tolerance:
                    logger.warning(
                        "the sketch's error in PEF inner products is %.3f, above the tolerance %.3g: raise sketch_dim "
                        "or storage_limit, or use sketch='countsketch'",
                        error,
                        self.fisher.sketch_tolerance,
                    )
            result: Any = compute(
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

    def estimate(self, dataset: Any, *, tokens: float | None = None, n_components: int = 16) -> Estimate:
        """What an analysis will cost, without running anything; print it.

        Args:
            dataset: what `compute_pefs` would get, or a number of examples.
            tokens: of an example; by default the mean of the first 256, or 128 where there is only a number.
            n_components: r.
        """
        n = dataset if isinstance(dataset, int) else 0
        if not isinstance(dataset, int):
            examples = Examples(dataset, self.processing_class)
            n = len(examples)
            lengths = [examples[i].length for i in range(min(n, 256))]
            tokens = sum(lengths) / len(lengths) if tokens is None else tokens
        config: Any = base_of(self.model).config
        shapes = {m.parameter: m.shape for m in self.maps} | self.parameters
        if self._sketch is not None:
            kind, dim = self._sketch.kind, self._sketch.setting
        elif self.fisher.sketch == "auto":
            kind, dim = max(candidates(self.fisher, shapes), key=lambda t: numbers_of(t[0], t[1], shapes))
        else:
            kind, dim = self.fisher.sketch, self.fisher.sketch_dim or DEFAULT_DIMS[self.fisher.sketch]
        embeddings = {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        hidden = getattr(self.head, "at_hidden", False)
        text = config.get_text_config()
        return estimate(
            self.maps,
            sum(p.numel() for p in self.model.parameters() if id(p) not in embeddings),
            shapes,
            kind,
            dim,
            chosen=self._sketch is not None or self.fisher.sketch != "auto",
            n=n,
            tokens=128.0 if tokens is None else tokens,
            c=self.fisher.rank,
            r=n_components,
            source=getattr(text, "hidden_size", 1) if hidden else getattr(config, "num_labels", 1),
            storage_bytes=getattr(torch, self.fisher.storage_dtype).itemsize,
        )

    def _like(self, like: PEFs | Decomposition) -> NPEFFAnalyzer:
        """An analyzer of the same model with the Fisher config and sketch of `like`."""
        if like.info.get("sketch") is None:
            raise ValueError("like= needs PEFs, or a decomposition of PEFs, of a model; these rows were made elsewhere")
        sketch = Sketch.from_dict(like.info["sketch"])
        config = FisherConfig.from_dict(like.info["fisher"])
        other = NPEFFAnalyzer(
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
                parameters=self.parameters,
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
            if not hasattr(self.model, "hf_device_map"):
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
        for example in examples:
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

    def decompose(
        self, pefs: PEFs, n_components: int = 16, *, validation: PEFs | None = None, **settings: Any
    ) -> Decomposition:
        """Decompose PEFs: `NPEFF(n_components, **settings).fit(pefs, validation)`."""
        settings.setdefault("progress", _progress_wanted())
        return NPEFF(n_components, **settings).fit(pefs, validation)

    # Components → parameters

    def lift(
        self,
        decomposition: Decomposition,
        components: int | Sequence[int],
        pefs: PEFs,
        dataset: Any,
        *,
        method: Method = "exact",
        top_examples: int | None = None,
        form: Form = "auto",
        semi_orthogonal: bool = False,
        solver: Literal["iht", "fista"] = "iht",
        batch_size: int = 8,
    ) -> Any:
        """Components as directions in the parameters.

        Args:
            decomposition: of `pefs`.
            components: a number, or several, which share the forward passes.
            pefs: those that were decomposed.
            dataset: the one they came from, in any order; ids and contents are compared.
            method: "exact" (one backward pass with the stored cotangents), "adjoint" (Pᵀg, noisy) or
                "compressed_sensing" (the sparse direction whose sketch is g).
            top_examples: exact lifting from the examples with the largest coefficients only.
            form: of a balanced decomposition: "plain", the combination of unscaled rows, or "metric", that times D²,
                steepest in the balanced metric and the more selective by measurement; "auto" takes it.
            semi_orthogonal: first take out of g its projection on the components nearly orthogonal to it.
            solver: of compressed sensing: iterative hard thresholding ("iht") or "fista".
            batch_size: examples of a forward pass.

        Returns:
            A unit `ParameterDirection`, or a list of them where several components were asked for. `info` holds the
            method, the estimated cosine (the sketch of the direction against g) and, with `top_examples`, the share of
            the combination's weight that these carry.

        Raises:
            IndexError: if a component does not exist.
            IncompatibleSketchError: if the PEFs, the decomposition and the model do not belong together.
            ValueError: if the dataset or the PEFs are others than were decomposed, the decomposition is far from
                converged, or an argument is out of range.
        """
        request = LiftRequest(method, top_examples, form, semi_orthogonal, solver, batch_size)
        wanted = select(decomposition, components)
        directions = self._with_like(decomposition)._lift(decomposition, wanted, pefs, dataset, request)
        return directions[0] if hasattr(components, "__index__") else directions

    def _lift(
        self, decomposition: Decomposition, wanted: list[int], pefs: PEFs, dataset: Any, request: LiftRequest
    ) -> list[ParameterDirection]:
        examples = align(Examples(dataset, self.processing_class), pefs.example_ids, pefs.content_hashes)
        with self._at_work() as work:
            lifted = lift_components(work, decomposition, wanted, pefs, examples, request)
        transposed = {m.parameter: m for m in self.maps}
        shapes = dict(self.model.named_parameters(remove_duplicate=False))
        directions = []
        for found in lifted:
            deltas = {}
            for name in list(found.deltas):  # one at a time: what is transposed is copied
                value = found.deltas.pop(name)
                shaped = transposed[name].as_weight(value) if name in transposed else value.reshape(shapes[name].shape)
                deltas[name] = shaped.contiguous()
            layouts = {name: layout_of(self.model, name) for name in deltas}
            base: Any = base_of(self.model)
            info = {**self._facts(), "module": type(base).__module__, "fingerprint": pefs.fingerprint, **found.facts}
            directions.append(ParameterDirection(deltas, layouts, info))
        return directions

    def _with_like(self, decomposition: Decomposition) -> NPEFFAnalyzer:
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

    def evaluate_direction(
        self,
        direction: ParameterDirection,
        decomposition: Decomposition,
        component: int,
        dataset: Any,
        *,
        target_kl: float = 0.5,
        scale: float | None = None,
        n_top: int = 16,
        n_others: int = 64,
        batch_size: int = 16,
        seed: int = 0,
    ) -> PerturbationReport:
        """What moving the parameters along a direction does to a component's top examples and to others.

        Args:
            direction: from `lift`.
            decomposition: whose component is followed.
            component: its number.
            dataset: the one that was analysed, in any order.
            target_kl: mean KL on the top examples (nats) that each sign's step is to reach.
            scale: a given step instead.
            n_top: top examples.
            n_others: others, drawn from the examples on which the component is not active.
            batch_size: examples of a forward pass.
            seed: of the drawing, the random direction and the bootstrap.

        Returns:
            KL on both, their ratio with a bootstrap interval, flips, accuracy where the column `label` holds classes,
            answers that changed, for the more selective sign, the other, and a random direction of equal norm.

        Raises:
            IndexError: if the component does not exist.
            ValueError: if an argument is out of range, or the dataset or model does not fit.
        """
        component = decomposition.index_of(component)
        made = direction.info.get("revision")
        if made is not None and self.revision is not None and made != self.revision:
            raise ValueError(
                f"the direction was made for the model at commit {made}, and this model is at {self.revision}; load "
                "that revision"
            )
        if min(n_top, n_others, batch_size) < 1:
            raise ValueError("n_top, n_others and batch_size must be at least 1")
        top, others = choose_examples(decomposition, component, n_top, n_others, seed)
        examples = align(
            Examples(dataset, self.processing_class),
            decomposition.example_ids,
            decomposition.columns.get("content_hash"),
        )
        labels = decomposition.columns.get("label")
        whole = labels is not None and all(isinstance(x, int) and not isinstance(x, bool) for x in labels)
        column = decomposition.text_column
        with self._at_work() as work:
            return evaluate(
                work,
                direction,
                examples,
                top,
                others,
                component=component,
                target_kl=target_kl,
                scale=scale,
                batch_size=batch_size,
                seed=seed,
                labels=labels if whole else None,
                describe=self._describe,
                texts=decomposition.columns[column] if column else [None] * len(examples),
            )

    def evaluate_components(
        self,
        decomposition: Decomposition,
        pefs: PEFs,
        dataset: Any,
        components: Sequence[int] | None = None,
        *,
        lift: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> list[PerturbationReport]:
        """`lift` and `evaluate_direction` for several components, kept in `decomposition.evaluations`.

        Args:
            decomposition: of `pefs`.
            pefs: those that were decomposed.
            dataset: the one they came from.
            components: their numbers; None takes all.
            lift: arguments of `lift`.
            **settings: arguments of `evaluate_direction`.

        Returns:
            A report a component, in order.
        """
        wanted = select(decomposition, range(len(decomposition)) if components is None else components)
        reports = []
        for start in range(0, len(wanted), _LIFTED_TOGETHER):
            group = wanted[start : start + _LIFTED_TOGETHER]
            directions = self.lift(decomposition, group, pefs, dataset, **dict(lift or {}))
            for j, direction in zip(group, directions, strict=True):
                report = self.evaluate_direction(direction, decomposition, j, dataset, **settings)
                decomposition.evaluations[j] = report.summary()
                reports.append(report)
        return reports


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
