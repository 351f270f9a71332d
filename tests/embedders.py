"""Tiny embedding models: a stand-in for sentence-transformers, with its names and its order of modules, and real ones.

The stand-in has what hf_npeff relies on and no more: modules in a row that hand a dictionary on, `preprocess`,
`tokenizer`, `processor`, prompts, `max_seq_length`, `truncate_dim`. It imports neither that package nor hf_npeff.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import tiny_model, tiny_tokenizer

_BODIES = {"bert": "bert", "distilbert": "distilbert", "qwen3": "model"}
"""What the transformer inside a model with a head is called."""


class Transformer(nn.Module):
    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer, self.processor = model, tokenizer, tokenizer
        self.max_seq_length = 20
        self.modality_config = {"text": {"method": "forward"}}

    def preprocess(self, inputs: list[Any], prompt: str, processing_kwargs: Any = None) -> dict[str, Any]:
        settings = {"padding": True, "truncation": True, "max_length": self.max_seq_length}
        settings |= (processing_kwargs or {}).get("text", {})
        texts = [(prompt + text[0], text[1]) if isinstance(text, tuple) else prompt + text for text in inputs]
        encoded = dict(self.tokenizer(texts, return_tensors="pt", **settings))
        encoded |= {"modality": "text"}
        return encoded | ({"prompt_length": len(self.tokenizer(prompt)["input_ids"])} if prompt else {})

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        assert features["modality"] == "text"
        known = ("input_ids", "attention_mask", "token_type_ids")
        states = self.model(**{name: features[name] for name in known if name in features}).last_hidden_state
        features["token_embeddings"] = states  # in place, as sentence-transformers does it
        return features


class Pooling(nn.Module):
    def __init__(self, mode: str, include_prompt: bool = True):
        super().__init__()
        self.mode, self.include_prompt = mode, include_prompt

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states, mask = features["token_embeddings"], features["attention_mask"].clone()
        if not self.include_prompt and "prompt_length" in features:
            mask[:, : int(features["prompt_length"][0])] = 0
        places = torch.arange(mask.shape[1]).expand_as(mask)
        if self.mode == "mean":
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            last = self.mode == "lasttoken"
            place = torch.where(mask.bool(), places, -1 if last else 10**6)
            place = place.amax(1) if last else place.amin(1)
            pooled = states[torch.arange(len(states)), place]
        features["sentence_embedding"] = pooled
        return features


class Normalize(nn.Module):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["sentence_embedding"] = F.normalize(features["sentence_embedding"], dim=-1)
        return features


class SentenceTransformer(nn.Sequential):
    """The stand-in."""

    def __init__(self, *modules: nn.Module, size: int = 16):
        super().__init__(*modules)
        self.prompts: dict[str, str] = {"question": "is not : "}
        self.default_prompt_name: str | None = None
        self.truncate_dim: int | None = None
        self._size = size

    tokenizer = property(lambda self: self[0].tokenizer)
    processor = property(lambda self: self[0].processor)
    max_seq_length = property(lambda self: self[0].max_seq_length)

    def preprocess(self, inputs: list[Any], prompt: str = "", **how: Any) -> dict[str, Any]:
        return self[0].preprocess(inputs, prompt, **how)

    def get_embedding_dimension(self) -> int:
        return self._size if self.truncate_dim is None else self.truncate_dim

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings of texts, one at a time, by nothing but the modules."""
        prompt = "" if self.default_prompt_name is None else self.prompts[self.default_prompt_name]
        answers = [self({**_as_batch(self.preprocess([text], prompt))})["sentence_embedding"][0] for text in texts]
        return torch.stack(answers)[:, : self.truncate_dim]


def _as_batch(features: dict[str, Any]) -> dict[str, Any]:
    return {name: [value] if name == "prompt_length" else value for name, value in features.items()}


def body_of(family: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny transformer without a head."""
    return getattr(tiny_model(family, dtype=dtype, **options), _BODIES[family])


def embedder(
    family: str = "bert", pooling: str = "mean", *, normalised: bool = True, include_prompt: bool = True
) -> SentenceTransformer:
    """A stand-in around a tiny transformer, in float32 and eval mode."""
    modules = [Transformer(body_of(family), tiny_tokenizer()), Pooling(pooling, include_prompt)]
    return SentenceTransformer(*modules, *([Normalize()] if normalised else [])).eval()


def real_embedder(
    folder: Path, family: str = "bert", pooling: str = "mean", *, normalised: bool = True, chat: bool = False
) -> Any:
    """The same by sentence-transformers, saved in `folder`; the caller sees to it that the package is there."""
    from sentence_transformers import SentenceTransformer as Real
    from sentence_transformers.sentence_transformer import modules as parts

    tokenizer = tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None  # with one, every text would go through it
    body_of(family).save_pretrained(folder / "body")
    tokenizer.save_pretrained(folder / "body")
    row = [parts.Transformer(str(folder / "body")), parts.Pooling(16, pooling)]
    model = Real(modules=[*row, *([parts.Normalize()] if normalised else [])], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return Real(str(folder / "model"), device="cpu", prompts={"question": "is not : "})
