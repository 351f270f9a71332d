"""The predictions of a model's head and their positions: transformers' tasks, and the protocol for other heads."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_npeff.encoding.labels import IGNORED
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_module_names, base_of, is_sentence_transformer
from hf_npeff.fisher.distributions import Bernoulli, Distribution, Gaussian, Softmax
from hf_npeff.fisher.embeddings import EMBEDDING_TASK, EmbeddingHead
from hf_npeff.fisher.fsdp import FSDPModel
from hf_npeff.fisher.head_weights import inside, weight_of
from hf_npeff.fisher.memory import is_out_of_memory
from hf_npeff.fisher.output_embedding import WatchedEmbedding, has_path_beside, is_jacobian
from hf_npeff.fisher.outputs import HeadJacobian, HeadTraits, OutputHead, Outputs
from hf_npeff.fisher.tasks import AUTO_CLASSES, task_of
from hf_npeff.fisher.terms import gathered, packed, real_tokens, shifted, up_to_the_last

logger = logging.getLogger(__name__)


_KNOWN = ", ".join(AUTO_CLASSES)
_VOCABULARY_TASKS = ("masked-lm", "causal-lm", "seq2seq-lm")
_CLASSIFIER_NAMES = ("score", "classifier", "classification_head", "qa_outputs", "classifier.out_proj",
                     "classification_head.out_proj", "classifier.dense")  # fmt: skip


def finds_last_by_padding(model: nn.Module) -> bool:
    """Whether a model finds an example's last token by its config's padding token, as classifying decoders do."""
    return hasattr(base_of(model), "score")  # transformers' name for a decoder's classifier


def head_of(
    model: nn.Module,
    task: str | OutputHead | None,
    positions: str,
    under_analysis: set[str],
    mask_token: int | None = None,
) -> OutputHead:
    """The output head of a transformers model.

    Args:
        model: any transformers model, PEFT-wrapped or not.
        task: the task's name, or an object with the `OutputHead` protocol; None uses the task of the model's class.
        positions: see `FisherConfig`.
        under_analysis: the analysed modules; cotangents enter after all of them.
        mask_token: the input id at whose positions a masked LM predicts; None uses `labels`.

    Raises:
        UnsupportedModelError: if the head is not one of the known ones.
        ValueError: if `positions` makes no sense for the task.
    """
    if task is not None and not isinstance(task, str):
        if not isinstance(task, OutputHead):
            raise ValueError(f"task must be a name ({_KNOWN}) or an object with an `outputs` method, not {task!r}")
        return task
    if is_sentence_transformer(model) and task in (None, EMBEDDING_TASK):
        return EmbeddingHead(model, positions)
    base = base_of(model)
    name = task or task_of(base)
    if name is None or name not in AUTO_CLASSES:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no output head that hf_npeff knows (task={task!r}; known: {_KNOWN}). "
            "Load the model with such a head, or pass as `task` an object with the hf_npeff.OutputHead protocol: "
            "outputs(model, batch) -> Outputs, which says where cotangents enter, which tensor the logits are, and "
            "what their distribution is."
        )
    modules = dict(model.named_modules())
    return TransformersHead(base, name, positions, {id(modules[path]) for path in under_analysis}, mask_token)


class TransformersHead:
    """`OutputHead` for the heads of transformers.

    Attributes:
        traits: see `HeadTraits`.
        positions: see `FisherConfig`.
        embedding: the output embedding, whose input is the last hidden state, or None.
        classifier: the last linear map of a classifier, or None.
    """

    def __init__(
        self, model: nn.Module, task: str, positions: str, under_analysis: set[int], mask_token: int | None = None
    ):
        config: Any = model.config
        self.task = task
        self.positions = positions
        self.config = config
        self.distribution: type[Distribution] = Softmax
        if task == "sequence-classification":
            kind = getattr(config, "problem_type", None)
            if kind == "regression" or (kind is None and config.num_labels == 1):
                self.distribution = Gaussian
            elif kind == "multi_label_classification":
                self.distribution = Bernoulli
        if task not in (*_VOCABULARY_TASKS, "token-classification") and positions not in ("auto", "last"):
            raise ValueError(f"positions={positions!r} makes no sense for {task}, which predicts once; use 'auto'")
        if positions == "last" and task in ("masked-lm", "token-classification"):
            raise ValueError(f"positions='last' makes no sense for {task}; use 'auto', 'labels' or 'all'")
        self.embedding = self._embedding(model) if task in _VOCABULARY_TASKS else None
        parts = () if self.embedding is None else self.embedding.modules()
        analysed = any(id(part) in under_analysis for part in parts)
        self.classifier = None if self.embedding is not None else self._classifier(model)
        self._mask_token = mask_token
        self._has_jacobian = True
        self.traits = HeadTraits(
            task,
            takes=frozenset({*inspect.signature(model.forward).parameters, "labels"}),
            at_hidden=self.embedding is not None and not analysed,
            vocabulary=self.embedding is not None,
            weights=tuple(module for module in (self.embedding, self.classifier) if module is not None),
        )

    @staticmethod
    def _embedding(model: nn.Module) -> nn.Module | None:
        embedding: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        return embedding if embedding is not None and isinstance(inside(embedding), nn.Linear) else None

    def _classifier(self, model: nn.Module) -> nn.Module | None:
        modules: dict[str, nn.Module] = {}
        for name, place in bare_module_names(model).items():  # of what bears one name, a wrapper comes first
            modules.setdefault(place, model.get_submodule(name))
        for name in _CLASSIFIER_NAMES:
            linear = inside(modules[name]) if name in modules else None
            if isinstance(linear, nn.Linear) and linear.out_features == getattr(self.config, "num_labels", None):
                return modules[name]
        return None

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """Run the model and collect the logits of every term.

        Raises:
            UnsupportedModelError: if the model returns no logits.
            ValueError: if labels are missing for `positions="labels"`, or an example has nothing to predict.
        """
        arguments = self._arguments(model, batch)
        if self.embedding is not None:
            index, valid = self._select(arguments, batch)
            return self._vocabulary_outputs(model, arguments, index, valid)
        result = model(**arguments)
        if self.task == "question-answering":
            return self._answer_outputs(result, batch)
        logits = _logits_of(result)
        if logits.dim() == 3:
            index, valid = self._select(arguments, batch)
            logits = gathered(logits, index + self._virtual_tokens(model, logits, arguments))
            several = self.several
        else:
            logits, valid = logits[:, None], torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
            several = False
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        jacobian = None
        weight = None if self.classifier is None else weight_of(self.classifier, wide)
        if weight is not None and len(weight) == wide.shape[-1]:
            jacobian = HeadJacobian(weight)
        return Outputs(logits, wide, valid, self.distribution, jacobian, several=several)

    @property
    def several(self) -> bool:
        """Whether an example may have several terms, one for each position that counts."""
        return self.positions in ("labels", "all") or self.task in ("masked-lm", "token-classification")

    def _arguments(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        takes = self.traits.takes or frozenset()
        arguments: dict[str, Any] = {k: v for k, v in batch.items() if k in takes and k != "labels"}
        if self.task == "seq2seq-lm" and "decoder_input_ids" not in arguments:
            if "labels" in batch:
                arguments["decoder_input_ids"] = shifted(model, batch["labels"].clone())  # some models write into it
                if "decoder_attention_mask" in takes:
                    arguments["decoder_attention_mask"] = up_to_the_last(batch["labels"] != IGNORED).long()
            else:
                start = getattr(self.config, "decoder_start_token_id", None)
                if start is None:
                    raise UnsupportedModelError(
                        "the model's config names no decoder_start_token_id, so there is nothing to predict the first "
                        "token from; set it, or add columns `decoder_input_ids` or `labels`"
                    )
                size = next(iter(batch.values()))  # for any input of the encoder: tokens, images, sound
                arguments["decoder_input_ids"] = torch.full((len(size), 1), start, device=size.device)
        if "use_cache" in takes:
            arguments["use_cache"] = False
        if "return_dict" in takes:
            arguments["return_dict"] = True
        return arguments

    def _select(self, arguments: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The positions of the terms (B, t), and which of them exist."""
        decoder = self.task == "seq2seq-lm"
        ids = arguments.get("decoder_input_ids" if decoder else "input_ids")
        if ids is None and "inputs_embeds" in arguments:
            ids = arguments["inputs_embeds"][..., 0]
        if ids is None:
            raise UnsupportedModelError(
                f"a {self.task} model predicts at tokens, and the examples have neither input_ids nor inputs_embeds "
                f"(they have {sorted(batch)}); add the tokens that belong to these inputs"
            )
        real = real_tokens(batch, ids, decoder)
        rule = self.positions
        if rule == "auto":
            rule = {"masked-lm": "mask", "token-classification": "labels" if "labels" in batch else "all"}.get(
                self.task, "last"
            )
            if rule == "mask" and self._mask_token is None:
                rule = "labels"
        if rule == "last":
            positions = torch.arange(ids.shape[1], device=ids.device)
            last = torch.where(real, positions, -1).amax(1)
            return last[:, None], torch.ones_like(last[:, None], dtype=torch.bool)
        if rule == "labels":
            if "labels" not in batch:
                raise ValueError("positions='labels' needs a `labels` column (−100 where nothing is counted)")
            counted = batch["labels"] != IGNORED
            if self.task == "causal-lm":  # the label at t is predicted at t − 1
                counted = F.pad(counted[:, 1:], (0, 1))
        elif rule == "mask":
            counted = ids == self._mask_token
        else:
            counted = real
        counted = counted & real if not decoder else counted
        return packed(counted, rule)

    def _virtual_tokens(self, model: nn.Module, states: Tensor, arguments: Mapping[str, Any]) -> int:
        """The number of positions before the first token, which prompt tuning and p-tuning learn.

        Raises:
            UnsupportedModelError: if the number of positions differs for an unknown reason.
        """
        ids = arguments.get("decoder_input_ids" if self.task == "seq2seq-lm" else "input_ids")
        if ids is None or states.shape[1] == ids.shape[1]:
            return 0
        settings = getattr(model, "active_peft_config", None)
        if settings is not None and settings.is_prompt_learning and states.shape[1] > ids.shape[1]:
            return states.shape[1] - ids.shape[1]
        raise UnsupportedModelError(
            f"{type(base_of(model)).__name__} gives {states.shape[1]} positions for {ids.shape[1]} tokens, and it is "
            "not known which position belongs to which token; pass `task`, an object with a method outputs(model, "
            "batch)"
        )

    def _vocabulary_outputs(
        self, model: nn.Module, arguments: Mapping[str, Any], index: Tensor, valid: Tensor
    ) -> Outputs:
        """Logits only of the positions that count; the output embedding gets no other positions to multiply."""
        assert self.embedding is not None

        def counted(hidden: Tensor) -> Tensor:
            return gathered(hidden, index.to(hidden.device) + self._virtual_tokens(model, hidden, arguments))

        with WatchedEmbedding(self.embedding, counted, first=self.traits.at_hidden) as watched:
            logits = self._logits_at_counted(model, arguments, watched)
        if logits is None:
            logits = counted(_logits_of(model(**arguments)))
            return self._at_logits(logits, valid, "needs its states at all positions to make its logits")
        if watched.linear is None or watched.hidden is None:
            return self._at_logits(gathered(logits, index), valid, watched.why_not)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        weight = weight_of(self.embedding, wide)
        if weight is None:
            return self._at_logits(
                logits, valid, "has an adapter around its output embedding that does more than add to it"
            )
        slope = None
        if logits is not watched.linear and torch.is_grad_enabled():
            (slope,) = torch.autograd.grad(logits.sum(), watched.linear, retain_graph=True)
            slope = slope.detach().to(wide.dtype).flatten(0, 1)
            slope = None if bool((slope == 1).all()) else slope
        jacobian = HeadJacobian(weight, slope)
        if self.traits.at_hidden and torch.is_grad_enabled() and watched.hidden.requires_grad:
            fsdp = FSDPModel(model)
            fsdp.watch_head(self.embedding)
            beside = has_path_beside(self.embedding, logits, watched.hidden)
            if beside or not is_jacobian(jacobian, logits, watched.hidden, fsdp.gather_head):
                self._has_jacobian = False  # nor if the states require no gradient, so that nothing can be compared
        if not self._has_jacobian:
            return self._at_logits(logits, valid, "does more than multiply by the weight of its output embedding")
        source = watched.hidden if self.traits.at_hidden else logits
        return Outputs(source, wide, valid, self.distribution, jacobian, self.traits.at_hidden, self.several)

    @staticmethod
    def _logits_at_counted(model: nn.Module, arguments: Mapping[str, Any], watched: WatchedEmbedding) -> Tensor | None:
        """Logits of the positions that the embedding gets; None if the model mixes in other positions."""
        try:
            logits = _logits_of(model(**arguments))
        except RuntimeError as error:
            if watched.hidden is None or is_out_of_memory(error):
                raise
            logger.info("with only its states at the counted positions, the model fails: %r", error)
            return None
        return logits if watched.hidden is None or logits.shape[:2] == watched.hidden.shape[:2] else None

    def _at_logits(self, logits: Tensor, valid: Tensor, why: str) -> Outputs:
        """Let cotangents enter at the logits (B, t, k): right for every model, but with k numbers instead of h."""
        if self.traits.at_hidden:
            logger.warning(
                "the model %s, so cotangents enter at the logits and have %d numbers each", why, logits.shape[-1]
            )
        self.traits = replace(self.traits, at_hidden=False)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        return Outputs(logits, wide, valid, self.distribution, None, several=self.several)

    def _answer_outputs(self, result: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """Two softmaxes over the real positions: where the answer starts and where it ends.

        Raises:
            UnsupportedModelError: if the model answers in another way, as ViLT does by classes and TAPAS by cells.
        """
        given = sorted(getattr(result, "keys", list)())
        if not {"start_logits", "end_logits"} <= set(given):
            raise UnsupportedModelError(
                f"the model does not answer by the start and the end of a span of its input (it gives {given}); "
                "pass task='sequence-classification' if it predicts a class for each example, or an object with the "
                "hf_npeff.OutputHead protocol"
            )
        logits = torch.stack([result["start_logits"], result["end_logits"]], 1)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        real = real_tokens(batch, logits[:, 0], decoder=False)
        wide = wide.masked_fill(~real[:, None].to(wide.device), float("-inf"))
        return Outputs(logits, wide, torch.ones(wide.shape[:2], dtype=torch.bool, device=wide.device), Softmax)


def _logits_of(result: Any) -> Tensor:
    logits = result.get("logits") if hasattr(result, "get") else None
    if isinstance(result, tuple):
        raise UnsupportedModelError(
            "the model returns a tuple, whose parts have no names: set model.config.return_dict = True"
        )
    if logits is None:
        raise UnsupportedModelError(
            "the model returns no logits, so there is no prediction to compute a Fisher of; load it with a head "
            f"({_KNOWN}), or pass as `task` an object with the hf_npeff.OutputHead protocol"
        )
    return logits
