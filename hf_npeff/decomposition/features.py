"""Features of examples: words of their texts and values of their columns, and which examples have them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_npeff.encoding.columns import CORRECT, INTERNAL, as_column, correctness, with_label_names
from hf_npeff.encoding.record import shown_columns

Kind = Literal["word", "words", "begins", "ends", "column"]
_LEAST = 3
"""The least number of examples that have a feature, and that lack it. Fewer show nothing, and most words are rare."""
_LONGEST = 3
"""The most words of a run of words. Chosen: longer runs say little more, and there is a run for every word of a
text."""
_MOST_WORDS = 600
"""How many words of an example are read, half of them from the beginning and half from the end. Bounds the time for
documents."""
_MOST_FEATURES = 50_000
"""The most features that are tried; the most frequent ones are. Bounds the memory."""
_NUMBERS = (0.25, 0.75)
"""Quantiles of a column of numbers: being below the first is a feature, and so is being above the second."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+(?:['’]\w+)*|[^\w\s]", re.UNICODE)
"""A word, a sign, or one character of a script that puts no spaces between words (Han, kana)."""
_SAYS_MOST: dict[str, int] = {"column": 0, "words": 1, "word": 2, "begins": 3, "ends": 4}
"""Which of several features with the same examples is shown: a column first, since a person named it, then
the longest run of words."""


@dataclass(frozen=True)
class Feature:
    """Features that the same examples have: the one that is shown, and the others."""

    kind: Kind
    text: str
    same: tuple[str, ...]
    where: list[int]


def features_of(columns: Mapping[str, Sequence[Any]], info: Mapping[str, Any], *, texts: bool = True) -> list[Feature]:
    """Features of some but not all examples: words, runs of words, beginnings and ends of texts, values of columns.

    Args:
        columns: {name: n values}.
        info: the `info` of the decomposition: its record of what was encoded says which columns are the texts.
        texts: whether to use texts.

    Returns:
        The features, the most frequent first. Features with the same examples are merged into one.

    Raises:
        ValueError: if `texts` is true and no texts were kept, or there are no columns.
    """
    read = shown_columns(columns, info)
    if texts and not read:
        raise ValueError(
            "no texts were kept with these examples, so their words are not known: keep the column of texts "
            "(compute_pefs(columns=…), save_pretrained(include_columns=…)), or use only the other columns with "
            "texts=False"
        )
    others = {name: values for name, values in columns.items() if name not in read and name not in INTERNAL}
    if not texts and not others:
        raise ValueError("neither texts nor columns were kept with these examples, so they have no features")
    has: dict[tuple[Kind, str], list[int]] = {}
    _add_columns(has, others, info, columns)
    for name in read if texts else ():
        _add_words(has, f"{name}: " if len(read) > 1 else "", columns[name])
    return _distinct(has, len(next(iter(columns.values()))))


def _add_words(has: dict[tuple[Kind, str], list[int]], prefix: str, texts: Sequence[Any]) -> None:
    """Add the words of texts, runs of words, and how texts begin and end. Case is ignored."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            continue
        places = [match.span() for match in _WORD.finditer(text)]
        parts = [places]
        if len(places) > _MOST_WORDS:
            parts = [places[: _MOST_WORDS // 2], places[-_MOST_WORDS // 2 :]]
        seen: set[tuple[Kind, str]] = set()
        for part in parts:
            for start in range(len(part)):
                for size in range(1, min(_LONGEST, len(part) - start) + 1):
                    words = " ".join(text[part[start][0] : part[start + size - 1][1]].split()).casefold()
                    if size > 1 or any(character.isalnum() for character in words):
                        seen.add(("word" if size == 1 else "words", prefix + words))
        if places:
            seen.add(("begins", f"{prefix}begins with {text[slice(*places[0])].casefold()}"))
            seen.add(("ends", f"{prefix}ends with {text[slice(*places[-1])].casefold()}"))
        for feature in seen:
            has.setdefault(feature, []).append(i)


def _add_columns(
    has: dict[tuple[Kind, str], list[int]],
    columns: Mapping[str, Sequence[Any]],
    info: Mapping[str, Any],
    kept: Mapping[str, Sequence[Any]],
) -> None:
    """Add the values of columns; for numbers, the lowest and highest quarter; and whether predictions are right."""
    described = [as_column(name, values) for name, values in with_label_names(columns, info).items()]
    if CORRECT not in columns and (correct := correctness(kept, info.get("label_names"), info)) is not None:
        described.append(correct)
    for column in described:
        if column.kind == "category" and column.data is not None:
            of_value: dict[int, list[int]] = defaultdict(list)
            for i, code in enumerate(column.data.tolist()):
                of_value[code].append(i)
            for code, where in of_value.items():
                if (value := column.values[code]) is not None:
                    has["column", f"{column.name} = {value}"] = where
        elif column.kind == "number" and column.data is not None:
            data = torch.from_numpy(column.data).double()
            known = data[~data.isnan()]
            if not len(known):
                continue
            low, high = torch.quantile(known, torch.tensor(_NUMBERS, dtype=torch.float64)).tolist()
            has["column", f"{column.name} ≤ {low:g}"] = (data <= low).nonzero()[:, 0].tolist()
            has["column", f"{column.name} ≥ {high:g}"] = (data >= high).nonzero()[:, 0].tolist()


def _distinct(has: Mapping[tuple[Kind, str], list[int]], n: int) -> list[Feature]:
    by_examples: dict[tuple[int, ...], list[tuple[Kind, str]]] = defaultdict(list)
    for feature, where in has.items():
        if _LEAST <= len(where) <= n - _LEAST:
            by_examples[tuple(where)].append(feature)
    features = []
    for places, names in by_examples.items():
        names.sort(key=lambda name: (_SAYS_MOST[name[0]], -len(name[1]), name[1]))
        # Ten, which a person can read; prompts with the same demonstrations have hundreds.
        same = tuple(text for _, text in names[1:11])
        features.append(Feature(names[0][0], names[0][1], same, list(places)))
    features.sort(key=lambda f: (-len(f.where), f.text))
    return features[:_MOST_FEATURES]
