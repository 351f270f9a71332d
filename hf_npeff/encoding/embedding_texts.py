"""EmbeddingTexts: texts → what a SentenceTransformer reads, as its own `encode` prepares them."""

from __future__ import annotations

from typing import Any


class EmbeddingTexts:
    """Takes the place of a tokenizer for a SentenceTransformer, with its prompt, chat template and length limit.

    A text that is too long is not cut unless truncation is asked for; `encode` would silently cut it.

    Args:
        model: the SentenceTransformer. The prompt is the one of `model.default_prompt_name`, as in `encode`.
    """

    def __init__(self, model: Any):
        self._model = model

    @property
    def tokenizer(self) -> EmbeddingTexts:
        """The object itself, because a processor's tokenizer does not know the prompt."""
        return self

    @property
    def prompt(self) -> str:
        """The prompt before every text; empty if there is none."""
        name = getattr(self._model, "default_prompt_name", None)
        return "" if name is None else self._model.prompts[name] or ""

    def __call__(self, text: str, text_pair: str | None = None, **how: Any) -> dict[str, Any]:
        """The inputs of one text: token ids, what belongs to them, and how many of them are the prompt's.

        Args:
            text: the text to embed.
            text_pair: the second text of a pair, which is embedded together with the first.
            **how: arguments of the tokenizer, such as truncation and max_length. Special tokens are always those of the
                model's `encode`.
        """
        how.pop("add_special_tokens", None)
        settings = {"truncation": False, "padding": False, **how}
        given = text if text_pair is None else (text, text_pair)
        inputs = self._model.preprocess([given], prompt=self.prompt, processing_kwargs={"text": settings})
        encoded = {name: value[0].tolist() for name, value in inputs.items() if hasattr(value, "tolist")}
        return encoded | {name: value for name, value in inputs.items() if name == "prompt_length"}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the model's tokenizer's."""
        if name.startswith("__") or name == "_model":
            raise AttributeError(name)
        return getattr(self._model.tokenizer, name)
