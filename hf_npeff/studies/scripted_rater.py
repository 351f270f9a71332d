"""A rater without a language model: it compares texts by the words and the letters that they share.

Language models as raters bring what they know, and their score mixes that with what is rated. A script knows nothing
but the texts. A text is a vector of its words and of their trigrams of letters (of "_word_", so that beginnings and
ends count), each weighted by log(n / n_t), where n_t of the study's n texts have it, and brought to unit length. The
script picks the choices that are nearest to the mean of the texts shown.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_npeff.studies.ratings import Answers, RatingStudy, RatingTask

NAME = "script"
_THEME = 3
"""Words of the stated theme. Chosen: enough to see what was compared."""


def terms(text: str) -> Counter[str]:
    """Words of a text in small letters, and, after a "~", their trigrams of letters with "_" around each word."""
    words = re.findall(r"\w+", text.casefold())
    marked = [f"_{word}_" for word in words]
    return Counter([*words, *(f"~{word[i : i + 3]}" for word in marked for i in range(len(word) - 2))])


class WordVectors:
    """Unit vectors of texts, weighted by how rare their terms are among all texts of a study.

    Args:
        texts: all of them; one that comes twice counts once.
    """

    def __init__(self, texts: Sequence[str]):
        counts = {text: terms(text) for text in dict.fromkeys(texts)}
        having = Counter(term for each in counts.values() for term in each)
        self.places = {term: i for i, term in enumerate(sorted(having))}
        rarity = torch.tensor([math.log(len(counts) / having[term]) for term in self.places], dtype=torch.float64)
        rows = torch.zeros(len(counts), len(self.places), dtype=torch.float64)
        for row, each in zip(rows, counts.values(), strict=True):
            for term, count in each.items():
                row[self.places[term]] = count
        self.vectors = dict(zip(counts, nn.functional.normalize(rows * rarity, dim=1), strict=True))

    def of(self, texts: Sequence[str]) -> Tensor:
        """(n, t), in the order of the texts.

        Raises:
            KeyError: if a text is not among those of the study.
        """
        return torch.stack([self.vectors[text] for text in texts])


def two_groups(values: Sequence[float]) -> list[int]:
    """The numbers of the values in the upper of two groups, cut where the squares within both add up to least.

    Equal values are one group: then nothing is picked.
    """
    order = sorted(range(len(values)), key=lambda i: -values[i])
    best, cut = math.inf, 0
    for k in range(1, len(values)):
        if values[order[k - 1]] == values[order[k]]:
            continue
        parts = [torch.tensor([values[i] for i in part], dtype=torch.float64) for part in (order[:k], order[k:])]
        within = sum(float((part - part.mean()).square().sum()) for part in parts)
        if within < best:
            best, cut = within, k
    return sorted(order[:cut])


def rate_by_words(study: RatingStudy) -> Answers:
    """The script's answers to every task: the choices nearest to the mean of the texts shown, in two groups.

    Args:
        study: the tasks.

    Returns:
        Answers of the rater "script"; a theme is the heaviest words of that mean.

    Example:
        >>> rate_by_words(study).rater
        'script'
    """
    vectors = _vectors(study)
    themes, picked = {}, {}
    words = [(term, i) for term, i in vectors.places.items() if not term.startswith("~")]
    for task in study.tasks:
        mean = vectors.of(task.shown).mean(0)
        picked[task.id] = two_groups((vectors.of(task.choices) @ mean).tolist())
        heaviest = sorted(words, key=lambda word: -float(mean[word[1]]))[:_THEME]
        themes[task.id] = ", ".join(term for term, i in heaviest if float(mean[i]) > 0)
    return Answers(study.id, NAME, themes, picked)


def _vectors(study: RatingStudy) -> WordVectors:
    return WordVectors([text for task in study.tasks for text in (*task.shown, *task.choices)])


Intruder = Callable[[Sequence[str]], int | None]
"""From texts of which one does not belong to its number, or None where there is no answer."""


def intruder_by_words(study: RatingStudy) -> Intruder:
    """A script that names the text that is least like the mean of the others."""
    vectors = _vectors(study)

    def pick(texts: Sequence[str]) -> int:
        X = vectors.of(texts)
        others = (X.sum(0) - X) / (len(texts) - 1)
        return int((X * others).sum(1).argmin())

    return pick


def intruders_found(study: RatingStudy, pick: Intruder, *, most: int | None = None) -> dict[str, list[float]]:
    """{method: for every task the share of its distractors that are found among the texts shown}.

    At most `most` distractors of a task are tried, the first ones; None tries all.

    No answer counts as not found. Chance is 1 / (texts shown + 1). The intruder stands at a place that depends on its
    number alone, so that always naming one place finds a share of chance.
    """
    found: dict[str, list[float]] = {}
    for task in study.tasks:
        key = study.key[task.id]
        others = [i for i, member in enumerate(key.members) if not member][:most]
        each = [_finds(task, task.choices[i], i, pick) for i in others]
        found.setdefault(key.method, []).append(sum(each) / len(each))
    return found


def _finds(task: RatingTask, intruder: str, number: int, pick: Intruder) -> bool:
    place = number % (len(task.shown) + 1)
    return pick([*task.shown[:place], intruder, *task.shown[place:]]) == place
