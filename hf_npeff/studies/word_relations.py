"""Word relations: few-shot prompts with annotated attributes, made from the word list of a package."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

WORD_RELATIONS = {
    "capital": ("capital-common-countries", "capital-world"),
    "nationality": ("gram6-nationality-adjective",),
    "plural": ("gram8-plural",),
    "plural verb": ("gram9-plural-verbs",),
    "comparative": ("gram3-comparative",),
    "participle": ("gram5-present-participle",),
    "past tense": ("gram7-past-tense",),
    "city → state": ("city-in-state",),
}
"""The relations, and the sections of questions-words.txt (Mikolov et al. 2013) that hold their pairs."""


def package_folder(name: str, install: str) -> Path:
    """The folder of an installed package. The package is not imported.

    Raises:
        ModuleNotFoundError: if it is not installed. The message says what to install.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed; {install}", name=name)
    return Path(next(iter(spec.submodule_search_locations)))


def sections() -> dict[str, dict[str, str]]:
    """{section: {word: answer}} of gensim's copy of questions-words.txt, in the file's order.

    Raises:
        ModuleNotFoundError: if gensim is not installed.
    """
    path = package_folder("gensim", "run pip install 'hf-npeff[demo]'") / "test" / "test_data" / "questions-words.txt"
    answers: dict[str, dict[str, str]] = {}
    pairs: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            pairs = answers.setdefault(line[1:].strip(), {})
        else:
            a, b, c, d = line.split()
            pairs |= {a: b, c: d}
    return answers


def word_pairs() -> dict[str, list[tuple[str, str]]]:
    """{relation: [(word, answer), …]} from gensim's copy of questions-words.txt, in the file's order.

    Raises:
        ModuleNotFoundError: if gensim is not installed.
    """
    given = sections()
    return {
        relation: list({pair: None for name in names for pair in given[name].items()})
        for relation, names in WORD_RELATIONS.items()
    }


def word_relation_prompts(queries: int = 32, shots: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Few-shot prompts: `shots` solved pairs of one relation, then a word without its answer.

    Args:
        queries: the number of prompts for each relation. If a relation has fewer pairs, words are used again after
        other demonstrations.
        shots: the number of solved pairs before the query.
        seed: the seed for choosing demonstrations.

    Returns:
        Rows with `text`, `word`, `answer` and `relation`, in random order. The word is not called `query`, because a
        column of that name would be read together with `text`, as a pair.

    Raises:
        ValueError: if a relation has fewer than `shots` + 1 pairs, or a number is out of range.
        ModuleNotFoundError: if gensim is not installed.
    """
    if queries < 1 or shots < 0:
        raise ValueError(f"queries must be at least 1 and shots at least 0, but they are {queries} and {shots}")
    rng = random.Random(seed)
    prompts = []
    for relation, pairs in word_pairs().items():
        if len(pairs) <= shots:
            raise ValueError(f"{relation} has {len(pairs)} pairs, too few for {shots} shots")
        shuffled = rng.sample(pairs, len(pairs))
        for i in range(queries):
            word, answer = shuffled[i % len(pairs)]
            demonstrations = rng.sample([pair for pair in pairs if pair != (word, answer)], shots)
            lines = [f"{a} -> {b}" for a, b in demonstrations] + [f"{word} ->"]
            prompts.append({"text": "\n".join(lines), "word": word, "answer": answer, "relation": relation})
    rng.shuffle(prompts)
    return prompts
