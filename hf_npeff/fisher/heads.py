"""What a model's head predicts, and at which positions: the tasks of transformers, and the protocol for other heads."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import acting_adapters, bare_module_names, base_of, is_wrapper, wrapped_by
from hf_npeff.fisher.distributions import Bernoulli, Distribution, Gaussian, Softmax
from hf_npeff.fisher.fsdp import is_sharded
from hf_npeff.fisher.tasks import AUTO_CLASSES, task_of
from hf_npeff.padding import IGNORED, Batch

logger = logging.getLogger(__name__)


@dataclass
class HeadJacobian:
    """J_head (k×h) of every term, as two thin products: logits = f(U z), J_head = diag(f′(U z)) U.

    Attributes:
        weight: U (k, h).
        slope: f′ (N, k), or None where f is the identity.
    """

    weight: Tensor
    slope: Tensor | None = None

    def push(self, Q: Tensor) -> Tensor:
        """J_head Q: (N, h, m) → (N, k, m)."""
        Y = (Q.mT @ self.weight.T).mT
        return Y if self.slope is None else self.slope[..., None] * Y

    def pull(self, Y: Tensor) -> Tensor:
        """J_headᵀ Y: (N, k, m) → (N, h, m)."""
        Y = Y if self.slope is None else self.slope[..., None] * Y
        return (Y.mT @ self.weight).mT


@dataclass
class Outputs:
    """One forward pass as its head sees it: B examples with up to t terms each.

    Attributes:
        source: (B, t, s) in the autograd graph, where cotangents enter: the logits (s = k), or the hidden state that
            the output embedding reads (s = h).
        logits: (B, t, k), detached, float32 or wider.
        valid: (B, t) bool; False where an example has fewer terms.
        distribution: of every term.
        jacobian: J_head, or None where it is unknown and the identity stands in.
        at_hidden: whether `source` is the hidden state.
        several: whether examples of the data set may have several terms; their rows are then reduced to `rank` in
            every batch, also in one whose examples have a single term each.

    Example:
        >>> from hf_npeff.fisher.distributions import Softmax
        >>> logits = torch.tensor([[[0.0, 1.0, 2.0]]], requires_grad=True)  # one example, one term, three classes
        >>> outputs = Outputs(logits, logits.detach(), torch.ones(1, 1, dtype=torch.bool), Softmax)
        >>> outputs.distribution(outputs.logits[0]).predictions()[0]
        tensor([2])
    """

    source: Tensor
    logits: Tensor
    valid: Tensor
    distribution: type[Distribution]
    jacobian: HeadJacobian | None = None
    at_hidden: bool = False
    several: bool = False


@dataclass(frozen=True)
class HeadTraits:
    """What is known of a head before it has run; the defaults are those of a head of one's own.

    Attributes:
        task: the task's name, or the head's class.
        takes: names of the inputs that are of use to it, the others stay outside; None takes all.
        at_hidden: whether cotangents enter at the hidden state that the output embedding reads.
        vocabulary: whether it predicts tokens.
        weights: modules whose weights are read outside the forward pass.
    """

    task: str
    takes: Set[str] | None = None
    at_hidden: bool = False
    vocabulary: bool = False
    weights: tuple[nn.Module, ...] = ()


@runtime_checkable
class OutputHead(Protocol):
    """The one protocol to implement for a head that hf_npeff does not know; pass the object as `task=`.

    `outputs` runs the model on a batch (a dict of tensors on the model's device) and says what it predicts.
    `cotangents` enter at `Outputs.source`, so `source` must be in the autograd graph that the call builds. A head may
    have an attribute `traits`, a `HeadTraits`; without it the defaults hold (see `traits_of`).

    Example:
        >>> from hf_npeff.fisher.distributions import Softmax
        >>> class LastToken:
        ...     def outputs(self, model, batch):
        ...         logits = model(**batch).logits[:, -1:]
        ...         valid = torch.ones(logits.shape[:2], dtype=torch.bool)
        ...         return Outputs(logits, logits.detach(), valid, Softmax)
        >>> analyzer = NPEFFAnalyzer(model, tokenizer, task=LastToken())
        >>> len(analyzer.compute_pefs(["the cat sees the dog", "the dog sees the cat"]))
        2
    """

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """Run the model on a batch."""


def traits_of(head: OutputHead) -> HeadTraits:
    """What a head says of itself, or the defaults, with its class as the task."""
    traits: HeadTraits | None = getattr(head, "traits", None)
    return traits if traits is not None else HeadTraits(type(head).__name__)


_KNOWN = ", ".join(AUTO_CLASSES)
_VOCABULARY_TASKS = ("masked-lm", "causal-lm", "seq2seq-lm")
_CLASSIFIER_NAMES = ("score", "classifier", "classification_head", "qa_outputs", "classifier.out_proj",
                     "classification_head.out_proj", "classifier.dense")  # fmt: skip


def finds_last_by_padding(model: nn.Module) -> bool:
    """Whether a model finds an example's last token by the padding token of its config: decoders that classify do."""
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
        task: None to read it off the model's class, its name, or an object with the `OutputHead` protocol.
        positions: see `FisherConfig`.
        under_analysis: modules whose gradients are wanted; cotangents enter behind all of them.
        mask_token: the input id at whose positions a masked LM predicts; None reads `labels`.

    Raises:
        UnsupportedModelError: if the head is not one of the known ones.
        ValueError: if `positions` makes no sense for the task.
    """
    if task is not None and not isinstance(task, str):
        if not isinstance(task, OutputHead):
            raise ValueError(f"task must be a name ({_KNOWN}) or an object with an `outputs` method, not {task!r}")
        return task
    base = base_of(model)
    name = task or task_of(base)
    if name is None or name not in AUTO_CLASSES:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no output head that hf_npeff knows (task={task!r}; known: {_KNOWN}). "
            "Load the model with such a head, or pass as `task` an object with the hf_npeff.OutputHead protocol: "
            "outputs(model, batch) -> Outputs, which says where cotangents enter, the logits, and their distribution."
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
        return embedding if embedding is not None and isinstance(_inside(embedding), nn.Linear) else None

    def _classifier(self, model: nn.Module) -> nn.Module | None:
        modules: dict[str, nn.Module] = {}
        for name, place in bare_module_names(model).items():  # of what bears one name, a wrapper comes first
            modules.setdefault(place, model.get_submodule(name))
        for name in _CLASSIFIER_NAMES:
            linear = _inside(modules[name]) if name in modules else None
            if isinstance(linear, nn.Linear) and linear.out_features == getattr(self.config, "num_labels", None):
                return modules[name]
        return None

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """Run the model and gather the logits of every term.

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
            logits = _gather(logits, index + self._virtual_tokens(model, logits, arguments))
            several = self.several
        else:
            logits, valid = logits[:, None], torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
            several = False
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        jacobian = None
        weight = None if self.classifier is None else _weight_of(self.classifier, wide)
        if weight is not None and len(weight) == wide.shape[-1]:
            jacobian = HeadJacobian(weight)
        return Outputs(logits, wide, valid, self.distribution, jacobian, several=several)

    @property
    def several(self) -> bool:
        """Whether an example may have several terms, as many as it has counted positions."""
        return self.positions in ("labels", "all") or self.task in ("masked-lm", "token-classification")

    def _arguments(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        takes = self.traits.takes or frozenset()
        arguments: dict[str, Any] = {k: v for k, v in batch.items() if k in takes and k != "labels"}
        if self.task == "seq2seq-lm" and "decoder_input_ids" not in arguments:
            if "labels" in batch:
                arguments["decoder_input_ids"] = _shifted(model, batch["labels"].clone())  # some models write into it
                if "decoder_attention_mask" in takes:
                    arguments["decoder_attention_mask"] = _up_to_the_last(batch["labels"] != IGNORED).long()
            else:
                start = self.config.decoder_start_token_id
                arguments["decoder_input_ids"] = torch.full_like(batch["input_ids"][:, :1], start)
        if "use_cache" in takes:
            arguments["use_cache"] = False
        if "return_dict" in takes:
            arguments["return_dict"] = True
        return arguments

    def _select(self, arguments: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Positions of the terms (B, t) and which of them exist."""
        decoder = self.task == "seq2seq-lm"
        ids = arguments.get("decoder_input_ids" if decoder else "input_ids")
        if ids is None:
            ids = arguments["inputs_embeds"][..., 0]
        real = _real_of(batch, ids, decoder)
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
        return _packed(counted, rule)

    def _virtual_tokens(self, model: nn.Module, states: Tensor, arguments: Mapping[str, Any]) -> int:
        """How many positions (B, T, ·) has before the first token: those that prompt tuning and p-tuning learn.

        Raises:
            UnsupportedModelError: if the model has another number of positions for a reason that is not known.
        """
        ids = arguments.get("decoder_input_ids" if self.task == "seq2seq-lm" else "input_ids")
        if ids is None or states.shape[1] == ids.shape[1]:
            return 0
        settings = getattr(model, "active_peft_config", None)
        if settings is not None and settings.is_prompt_learning and states.shape[1] > ids.shape[1]:
            return states.shape[1] - ids.shape[1]
        raise UnsupportedModelError(
            f"{type(base_of(model)).__name__} gives {states.shape[1]} positions for {ids.shape[1]} tokens, and it is "
            "not known which of them belongs to which token; pass `task`, an object with a method outputs(model, batch)"
        )

    def _vocabulary_outputs(
        self, model: nn.Module, arguments: Mapping[str, Any], index: Tensor, valid: Tensor
    ) -> Outputs:
        """Logits of the counted positions only: the output embedding is handed nothing else to multiply."""
        assert self.embedding is not None
        seen: dict[str, Tensor] = {}
        here = threading.get_ident()
        why = "reads the weight of its output embedding without calling it"  # as MobileBERT does

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal why
            if threading.get_ident() != here:  # somebody else's prediction meanwhile
                return args
            if args[0].dim() != 3:  # ProphetNet's, with a dimension of the tokens that it predicts at once
                why = f"calls its output embedding on states of {args[0].dim()} dimensions"
                return args
            virtual = self._virtual_tokens(model, args[0], arguments)
            seen["hidden"] = _gather(args[0], index.to(args[0].device) + virtual)
            return (seen["hidden"], *args[1:])

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if threading.get_ident() != here or "hidden" not in seen:
                return output
            # A tensor of its own: the slope's backward pass must not reach hooks on the embedding's output.
            if output.requires_grad:
                seen["linear"] = output.view_as(output)
                return seen["linear"]
            seen["linear"] = output.detach().requires_grad_()
            return seen["linear"].clone()  # Chameleon changes its logits in place, which a leaf does not bear

        handles = [self.embedding.register_forward_pre_hook(before), self.embedding.register_forward_hook(after)]
        try:
            logits = _logits_of(model(**arguments))
        finally:
            for handle in handles:
                handle.remove()
        if "linear" not in seen:
            return self._at_logits(_gather(logits, index), valid, why)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        weight = _weight_of(self.embedding, wide)
        if weight is None:
            return self._at_logits(
                logits, valid, "has an adapter around its output embedding that does not only add to it"
            )
        slope = None
        if logits is not seen["linear"] and torch.is_grad_enabled():
            (slope,) = torch.autograd.grad(logits.sum(), seen["linear"], retain_graph=True)
            slope = slope.detach().to(wide.dtype).flatten(0, 1)
            slope = None if bool((slope == 1).all()) else slope
        source = seen["hidden"] if self.traits.at_hidden else logits
        return Outputs(
            source,
            wide,
            valid,
            self.distribution,
            HeadJacobian(weight, slope),
            self.traits.at_hidden,
            self.several,
        )

    def _at_logits(self, logits: Tensor, valid: Tensor, why: str) -> Outputs:
        """Cotangents that enter at the logits (B, t, k): right for every model, with k numbers where h would do."""
        if self.traits.at_hidden:
            logger.warning(
                "the model %s, so cotangents enter at the logits, with %d numbers each", why, logits.shape[-1]
            )
        self.traits = replace(self.traits, at_hidden=False)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        return Outputs(logits, wide, valid, self.distribution, None, several=self.several)

    def _answer_outputs(self, result: Any, batch: Mapping[str, Tensor]) -> Outputs:
        """Two softmaxes over the real positions: where the answer starts and where it ends."""
        logits = torch.stack([result["start_logits"], result["end_logits"]], 1)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        real = _real_of(batch, logits[:, 0], decoder=False)
        wide = wide.masked_fill(~real[:, None].to(wide.device), float("-inf"))
        return Outputs(logits, wide, torch.ones(wide.shape[:2], dtype=torch.bool, device=wide.device), Softmax)


def _inside(module: nn.Module) -> Any:
    """The module that a wrapper of PEFT's stands around, or the module itself."""
    return wrapped_by(module) if is_wrapper(module) else module


def _weight_of(module: nn.Module, like: Tensor) -> Tensor | None:
    """The weight (k, h) that a head acts with, wherever it is, with the dtype and device of its logits.

    What PEFT's adapters add to it is in it; None where they do something else than add.
    """
    linear = _inside(module)
    weight = linear.weight
    if weight.device.type == "meta":  # offloaded by Accelerate
        weight = linear._hf_hook.weights_map["weight"]
    if is_sharded(weight):
        weight = weight.full_tensor()
    weight = weight.detach().to(like.device, like.dtype)
    around: Any = module
    acting = acting_adapters(module) if is_wrapper(module) else []
    if not acting or hasattr(around, "modules_to_save"):  # of those the inner module is the adapter's own
        return weight
    if hasattr(around, "token_adapter"):
        merged: Tensor = around.token_adapter.get_merged_weights(acting)
        return merged.detach().to(weight)
    known = getattr(around, "scaling", {})
    scaled_otherwise = getattr(around, "use_dora", None) or {}
    if not hasattr(around, "get_delta_weight") or any(scaled_otherwise.get(name) for name in acting):
        return None
    with torch.no_grad():
        for name in acting:
            if name in known:
                weight = weight + around.get_delta_weight(name).to(weight)
    return weight


def _logits_of(result: Any) -> Tensor:
    logits = result.get("logits") if hasattr(result, "get") else None
    if logits is None:
        raise UnsupportedModelError(
            "the model returns no logits, so it predicts nothing that a Fisher could be taken of; load it with a head "
            f"({_KNOWN}), or pass as `task` an object with the hf_npeff.OutputHead protocol"
        )
    return logits


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads to predict labels (B, T): the start token, then the labels before each."""
    base: Any = base_of(model)
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        # Without padding: FSMT's decoder begins with the last of the labels, and padded ones end in −100.
        ends = _up_to_the_last(labels != IGNORED).sum(1).clamp(min=1).tolist()
        alone = [
            base.prepare_decoder_input_ids_from_labels(labels=row[None, :n])[0]
            for row, n in zip(labels, ends, strict=True)
        ]
        pad = base.config.pad_token_id or 0
        read = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True, padding_value=pad)
        return F.pad(read, (0, labels.shape[1] - read.shape[1]), value=pad)
    start, pad = base.config.decoder_start_token_id, base.config.pad_token_id
    if start is None or pad is None:
        raise UnsupportedModelError(
            "the model's config names no decoder_start_token_id or pad_token_id, so its labels cannot be turned into "
            "decoder inputs; set them, or give a column decoder_input_ids"
        )
    read = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return read.masked_fill(read == IGNORED, pad)


def _up_to_the_last(counted: Tensor) -> Tensor:
    """(B, T): True up to the last True of each row."""
    return counted.long().flip(1).cummax(1).values.flip(1).bool()


def _real_of(batch: Mapping[str, Tensor], ids: Tensor, decoder: bool) -> Tensor:
    """Which of the ids (B, T) are tokens and not padding, whatever masks the model itself takes."""
    if decoder and "decoder_input_ids" not in batch:
        return _up_to_the_last(batch["labels"] != IGNORED) if "labels" in batch else torch.ones_like(ids).bool()
    if isinstance(batch, Batch):
        real = batch.decoder_real if decoder else batch.real
    else:
        real = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    return torch.ones_like(ids).bool() if real is None or real.shape != ids.shape else real.bool()


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """(B, T, ·) at positions (B, t) → (B, t, ·)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _packed(counted: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """A mask (B, T) → the positions it marks, packed to the left (B, t), and which entries are real."""
    number = counted.sum(1)
    if bool((number == 0).any()):
        which = (number == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"positions={rule!r} finds nothing to predict in the examples {which} of a batch")
    t = int(number.max())
    order = torch.argsort(counted.to(torch.int8), dim=1, descending=True, stable=True)[:, :t]
    valid = torch.arange(t, device=counted.device)[None] < number[:, None]
    return torch.where(valid, order, order[:, :1]), valid
