"""EmbeddingHead: the output of a SentenceTransformer, a vector.

The embedding e(x, θ) of a text, pooled and normalised as the model does it, is treated as the mean of a Gaussian of
unit variance in each of its k coordinates:

    p(y | x) = N(y; e, I),   F = E[∇log p ∇log pᵀ] = Jᵀ I J = JᵀJ,   J = ∂e/∂θ   (k×p)

since ∇_θ log p = Jᵀ (y − e) and E[(y − e)(y − e)ᵀ] = I. So S = I, and the KL between the embeddings of two models is
half their squared distance, ½‖e − e′‖²; where they are normalised, that is 1 − cos(e, e′), as a search by cosine sees.
After a normalisation e = u/‖u‖, J = (I − e eᵀ) J_u/‖u‖, so the length of u does not affect F.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import base_of, is_sentence_transformer
from hf_npeff.fisher.distributions import Distribution, Gaussian
from hf_npeff.fisher.outputs import HeadTraits, Outputs

EMBEDDING_TASK = "feature-extraction"
"""The task name of PEFT and transformers for such models."""
_OTHERS = {
    "CrossEncoder": "it classifies pairs of texts: pass `model.transformers_model`, a classifier of transformers",
    "SparseEncoder": "its embeddings have a coordinate for every token: pass `model.transformers_model`, a masked LM",
    "MultiVectorEncoder": "it returns a vector for every token of a text, and no vector for the whole text",
}
"""The other kinds of model in sentence-transformers, and what to do instead."""


class EmbeddingHead:
    """`OutputHead` of a SentenceTransformer: one Gaussian for each example, with the embedding as its mean.

    Args:
        model: the SentenceTransformer.
        positions: see `FisherConfig`.

    Attributes:
        traits: see `HeadTraits`.
        task: the task's name.
        distribution: the distribution whose mean is the embedding.
        several: whether an example may have several terms.
        size: k, the dimension of an embedding; None if the model does not say.

    Raises:
        UnsupportedModelError: if the model is not a transformer that reads texts, followed by other modules.
        ValueError: if `positions` is set, because a text has only one embedding.
    """

    task = EMBEDDING_TASK
    distribution: type[Distribution] = Gaussian
    several = False

    def __init__(self, model: nn.Module, positions: str):
        if positions != "auto":
            raise ValueError(f"positions={positions!r} makes no sense for an embedding, because a text has only one")
        check_sentence_transformer(model)
        sequence: Any = model
        first: Any = sequence[0]
        # Models with a chat template put every text through it, and say so in the batch.
        self._modality = "message" if "message" in getattr(first, "modality_config", {}) else "text"
        body: Any = base_of(model)
        size = getattr(sequence, "get_embedding_dimension", lambda: None)()
        self.size: int | None = None if size is None else int(size)
        takes = {*inspect.signature(body.forward).parameters, "prompt_length"} - {"labels", "args", "kwargs"}
        self.traits = HeadTraits(EMBEDDING_TASK, takes=frozenset(takes), embeds=True)

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """The embeddings of a batch, with the same dimension as those of `encode`."""
        assert self.traits.takes is not None
        features: dict[str, Any] = {name: batch[name] for name in batch if name in self.traits.takes}
        embedding = model({**features, "modality": self._modality})["sentence_embedding"]
        size: int | None = getattr(model, "truncate_dim", None)
        embedding = embedding[:, None] if size is None else embedding[:, None, :size]
        wide = embedding.detach().to(torch.promote_types(embedding.dtype, torch.float32))
        return Outputs(embedding, wide, torch.ones(wide.shape[:2], dtype=torch.bool, device=wide.device), Gaussian)


def check_sentence_transformer(model: nn.Module) -> None:
    """Check that a model of sentence-transformers is a SentenceTransformer for texts, built on a transformer.

    Raises:
        UnsupportedModelError: if it is not; the message says what to do instead.
    """
    for kind in type(model).__mro__:
        if isinstance(model, nn.Sequential) and kind.__name__ in _OTHERS:
            raise UnsupportedModelError(f"{kind.__name__} is not analysed as it is: {_OTHERS[kind.__name__]}")
    if not is_sentence_transformer(model):
        return
    sequence: Any = model
    first = sequence[0] if len(sequence) else None
    bodies = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    inside = set() if not bodies else {id(part) for part in bodies[0].modules()}
    if not bodies or any(id(body) not in inside for body in bodies) or not _is_below(bodies[0], first):
        backend = getattr(model, "backend", "torch")
        where = f", run by {backend}" if backend != "torch" else ""
        raise UnsupportedModelError(
            f"the first module of this SentenceTransformer is a {type(first).__name__}{where}; hf_npeff needs a single "
            "transformers model in PyTorch there. Static embeddings, routers and other backends are not supported"
        )
    modalities = list(getattr(model, "modalities", ["text"]))
    reads = getattr(first, "modality_config", {"text": {"method": "forward"}})
    text = reads.get("message", reads.get("text", {}))
    if not set(modalities) <= {"text", "message"} or text.get("method", "forward") != "forward":
        raise UnsupportedModelError(
            f"this SentenceTransformer reads {modalities}, its texts through `{text.get('method', 'forward')}`; "
            "hf_npeff needs one that reads only texts, through `forward`"
        )
    if not hasattr(model, "preprocess"):
        raise UnsupportedModelError(
            "this SentenceTransformer has no method `preprocess`: install sentence-transformers 6.2 or later"
        )


def _is_below(part: nn.Module, module: nn.Module | None) -> bool:
    return module is not None and any(part is each for each in module.modules())
