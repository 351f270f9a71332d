"""Language models as raters: any `InferenceClient` and any local chat model, behind one small protocol.

Prompts are the files of `studies/prompts`. Answers are cached by rater and prompt. An answer that cannot be read is
asked for again; if that does not help, the task counts as refused. Nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Protocol

import torch

from hf_npeff.sharing.files import write_atomically
from hf_npeff.studies.ratings import Answers, RatingStudy, RatingTask

Messages = list[dict[str, str]]
"""Messages with `role` and `content`; the first one is the user's."""


class Chat(Protocol):
    """A language model that answers messages."""

    name: str

    def complete(self, messages: Messages) -> str:
        """The answer to the last message.

        Raises:
            OSError: if the model cannot be reached; `rate` then tries again.
        """


class InferenceChat:
    """A model behind `huggingface_hub.InferenceClient`.

    Args:
        client: the client, with its token and provider.
        model: the id of the model.
        max_tokens: the most tokens of an answer.

    Example:
        >>> from huggingface_hub import InferenceClient
        >>> chat = InferenceChat(InferenceClient(), "org/chat-model")
        >>> answers = rate(study, chat, cache=Path("runs/answers"))  # doctest: +SKIP
    """

    def __init__(self, client: Any, model: str, *, max_tokens: int = 128):
        self.client = client
        self.model = model
        self.max_tokens = max_tokens
        self.name = model

    def complete(self, messages: Messages) -> str:
        """See `Chat`."""
        answer = self.client.chat_completion(
            messages=messages, model=self.model, max_tokens=self.max_tokens, temperature=0.0, seed=0
        )
        return answer.choices[0].message.content or ""


class LocalChat:
    """A chat model of transformers in this process, decoded greedily.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer, which must have a chat template.
        name: the name of the rater.
        max_tokens: the most tokens of an answer.

    Raises:
        ValueError: if the tokenizer has no chat template.

    Example:
        >>> chat = LocalChat(model, tokenizer, name="tiny", max_tokens=4)
        >>> isinstance(chat.complete([{"role": "user", "content": "the cat"}]), str)
        True
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str | None = None, max_tokens: int = 48):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the tokenizer has no chat template; a rater must be a chat model")
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.name = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)

    @torch.no_grad()
    def complete(self, messages: Messages) -> str:
        """See `Chat`."""
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        pad = self.tokenizer.pad_token_id
        out = self.model.generate(
            **inputs,
            max_new_tokens=self.max_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        return str(self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


class Cached:
    """A chat whose answers are kept in a folder, with one JSON file for each prompt.

    Args:
        chat: the chat that answers new prompts.
            folder: the folder; it is created if it is missing.
    """

    def __init__(self, chat: Chat, folder: Path):
        self.chat = chat
        self.folder = folder
        self.name = chat.name

    def complete(self, messages: Messages) -> str:
        """See `Chat`."""
        content = json.dumps([self.name, messages], ensure_ascii=False)
        path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            return str(json.loads(path.read_text(encoding="utf-8"))["answer"])
        answer = self.chat.complete(messages)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"rater": self.name, "messages": messages, "answer": answer}
        write_atomically(path, json.dumps(kept, ensure_ascii=False, indent=1).encode())
        return answer


def rate(study: RatingStudy, chat: Chat, *, cache: Path | None = None, attempts: int = 3) -> Answers:
    """Ask a language model for the theme and the members of every task.

    Args:
        study: the tasks.
        chat: the rater.
        cache: a folder for answers; those in it are not asked for again.
        attempts: how often an answer is asked for if it does not come or cannot be read.

    Returns:
        The rater's answers. A task whose answer could not be read is in `refused`, with the last answer.

    Raises:
        ValueError: if `attempts` is less than 1.
        OSError: if the model could not be reached in so many attempts.

    Example:
        >>> answers = rate(study, LocalChat(model, tokenizer, max_tokens=2), attempts=1)
        >>> answers.study == study.id
        True
    """
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, but it is {attempts}")
    asked = Cached(chat, cache) if cache is not None else chat
    themes: dict[str, str] = {}
    picked: dict[str, list[int]] = {}
    refused: dict[str, str] = {}
    for task in study.tasks:
        answered = _one_task(task, asked, attempts)
        if isinstance(answered, str):
            refused[task.id] = answered
        else:
            themes[task.id], picked[task.id] = answered
    return Answers(study.id, chat.name, themes, picked, refused)


def _one_task(task: RatingTask, chat: Chat, attempts: int) -> tuple[str, list[int]] | str:
    shown = _listed(task.shown, "- ")
    messages: Messages = [{"role": "user", "content": prompt("theme", shown=shown)}]
    theme = ""
    for _ in range(attempts):
        theme = " ".join(_reached(chat, messages, attempts).split())
        if theme:
            break
    if not theme:
        return "no theme was stated"
    choices = "\n".join(f"{i}. {' '.join(text.split())}" for i, text in enumerate(task.choices, 1))
    messages = [{"role": "user", "content": prompt("pick", theme=theme[:300], shown=shown, choices=choices)}]
    answer = ""
    for _ in range(attempts):
        answer = _reached(chat, messages, attempts)
        numbers = read_numbers(answer, len(task.choices))
        if numbers is not None:
            return theme, [i - 1 for i in numbers]
        again = prompt("again", count=str(len(task.choices)))
        messages = [
            *messages,
            {"role": "assistant", "content": answer or "(nothing)"},
            {"role": "user", "content": again},
        ]
    return f"the answer cannot be read: {answer[:80]!r}"


def _reached(chat: Chat, messages: Messages, attempts: int) -> str:
    for attempt in range(attempts):
        try:
            return chat.complete(messages)
        except OSError:
            if attempt == attempts - 1:
                raise
    raise AssertionError("there is at least one attempt")


def read_numbers(answer: str, count: int) -> list[int] | None:
    """The JSON list of different numbers from 1 to `count` in an answer; None unless there is exactly one such list."""
    lists = re.findall(r"\[[^\[\]]*\]", answer)
    if len(lists) != 1:
        return None
    try:
        values = json.loads(lists[0])
    except ValueError:
        return None
    numbers = [i for i in values if isinstance(i, int) and not isinstance(i, bool) and 1 <= i <= count]
    return numbers if len(numbers) == len(values) == len(set(numbers)) else None


def prompt(name: str, **values: str) -> str:
    """A prompt of `studies/prompts`, with its values filled in.

    Raises:
        KeyError: if a value is missing.
    """
    text = files("hf_npeff.studies").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(values).strip()


def _listed(texts: Sequence[str], mark: str) -> str:
    return "\n".join(mark + " ".join(text.split()) for text in texts)
