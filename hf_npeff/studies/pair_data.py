"""Examples that differ in exactly one factor: planted cues, crossed word relations, Home Assistant's sentences.

Every row has its factors, each of which is a word or a boolean, and its base: what rows of the same base have in
common.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.studies.datasets import _sentences
from hf_npeff.studies.planted import CLS, FIRST_CUE, SEP
from hf_npeff.studies.settings import PlantedConfig
from hf_npeff.studies.word_relations import package_folder, sections

Factors = Mapping[str, str | bool]


@dataclass(frozen=True)
class Pair:
    """Two examples of one base that differ in one factor. The reverse pair is a pair of its own.

    Attributes:
        has: the number of the example that has the attribute.
        lacks: the number of the example that lacks it.
        attribute: the attribute.
        instead: the attribute that the second example has instead; None if the factor is a boolean.
        base: the base that both share.
    """

    has: int
    lacks: int
    attribute: str
    instead: str | None
    base: str


def attributes_of(factors: Sequence[Factors]) -> tuple[list[str], Tensor]:
    """The names of the attributes, "factor=value" or a boolean factor, and which examples have them, (n, a) bool."""
    names = dict.fromkeys(
        name if isinstance(value, bool) else f"{name}={value}" for row in factors for name, value in row.items()
    )
    have = [[row.get(n) is True or (("=" in n) and row[n.split("=")[0]] == n.split("=")[1]) for n in names]
            for row in factors]  # fmt: skip
    return list(names), torch.tensor(have)


def minimal_pairs(factors: Sequence[Factors], bases: Sequence[str]) -> list[Pair]:
    """All pairs of one base that differ in exactly one factor; if the factor has several values, in both directions."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, base in enumerate(bases):
        members[base].append(i)
    pairs: list[Pair] = []
    for base, rows in members.items():
        for a, i in enumerate(rows):
            for k in rows[a + 1 :]:
                different = [name for name in factors[i] if factors[i][name] != factors[k][name]]
                if len(different) == 1:
                    pairs += _directed(i, k, different[0], factors, base)
    return pairs


def _directed(i: int, k: int, name: str, factors: Sequence[Factors], base: str) -> Iterator[Pair]:
    if isinstance(factors[i][name], bool):
        has, lacks = (i, k) if factors[i][name] else (k, i)
        yield Pair(has, lacks, name, None, base)
        return
    first, second = (f"{name}={factors[x][name]}" for x in (i, k))
    yield Pair(i, k, first, second, base)
    yield Pair(k, i, second, first, base)


# Word relations

_CLASSES = {
    "verb": ("participle", "past tense", "third person"),
    "adjective": ("comparative", "superlative"),
    "country": ("nationality", "capital"),
}


def _tables() -> dict[str, dict[str, str]]:
    """{relation: {word: answer}}; the past tense of "dance" is looked up through "dancing"."""
    given = sections()
    participle, past = given["gram5-present-participle"], given["gram7-past-tense"]
    cities = {**given["capital-world"], **given["capital-common-countries"]}
    return {
        "participle": participle,
        "past tense": {word: past[form] for word, form in participle.items() if form in past},
        "third person": given["gram9-plural-verbs"],
        "comparative": given["gram3-comparative"],
        "superlative": given["gram4-superlative"],
        "nationality": given["gram6-nationality-adjective"],
        "capital": {country: city for city, country in cities.items()},
    }


def crossed_relations(words: int = 6, shots: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Few-shot prompts, relation × capital letters × separator, with the same words and the same demonstrated words.

    Words are verbs (participle, past tense, third person), adjectives (comparative, superlative) and countries
    (nationality, capital), so that nothing but the relation changes.

    Args:
        words: how many words of each of the three classes.
        shots: how many solved pairs come before the query.
        seed: the seed for choosing words.

    Returns:
        Rows with `text`, `answer`, `factors` (relation, upper, colon) and `base` (the word).

    Raises:
        ValueError: if a class has too few words.
        ModuleNotFoundError: if gensim is not installed.
    """
    tables, rng = _tables(), random.Random(seed)
    rows = []
    for kind, relations in _CLASSES.items():
        common = sorted(set.intersection(*(set(tables[r]) for r in relations)))
        if len(common) < max(words, shots + 1):
            raise ValueError(f"{kind} has {len(common)} words, too few for words={words} and shots={shots}")
        for word in rng.sample(common, words):
            shown = rng.sample([w for w in common if w != word], shots)
            for relation in relations:
                for upper in (False, True):
                    for colon in (False, True):
                        sign = ":" if colon else " ->"
                        lines = [f"{w}{sign} {tables[relation][w]}" for w in shown] + [f"{word}{sign}"]
                        text, answer = "\n".join(lines), tables[relation][word]
                        factors = {"relation": relation, "upper": upper, "colon": colon}
                        text, answer = (text.upper(), answer.upper()) if upper else (text, answer)
                        rows.append({"text": text, "answer": answer, "factors": factors, "base": f"{kind} {word}"})
    return rows


# Planted cues


def cue_rows(config: PlantedConfig, bases: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences with planted cues. Each also comes with each of its cues in turn replaced by a filler word.

    Args:
        config: the task, as for `planted_sentences`.
        bases: how many sentences to start from; they have two cues or more if the task allows it.
        seed: the seed for drawing sentences.

    Returns:
        Rows with `input_ids`, `factors` (for each cue, whether it is present) and `base`.
    """
    rng = random.Random(seed)
    first_filler = FIRST_CUE + config.cues
    rows = []
    for number in range(bases):
        cues = rng.sample(range(config.cues), rng.randint(min(2, config.most), config.most))
        words = [FIRST_CUE + cue for cue in cues]
        words += [first_filler + rng.randrange(config.fillers) for _ in range(config.length - len(cues))]
        order = rng.sample(range(config.length), config.length)
        instead = first_filler + rng.randrange(config.fillers)
        for left_out in (None, *range(len(cues))):
            changed = [instead if i == left_out else word for i, word in enumerate(words)]
            kept = [cue for i, cue in enumerate(cues) if i != left_out]
            rows.append(
                {
                    "input_ids": [CLS, *(changed[i] for i in order), SEP],
                    "factors": {f"cue {cue}": cue in kept for cue in range(config.cues)},
                    "base": f"sentence {number}",
                }
            )
    return rows


# Home Assistant

INTENTS = (
    "HassTurnOn", "HassTurnOff", "HassIncreaseTimer", "HassDecreaseTimer", "HassPauseTimer", "HassUnpauseTimer",
    "HassCancelTimer", "HassTimerStatus",
)  # fmt: skip
"""The intents for which the grammar has most pairs that differ in a few words."""
SLOTS = ("area", "name", "floor", "minutes", "hours")
_SPAN = 3
"""How many adjacent words may differ. Chosen: "switch on the" against "turn off"; more would be another sentence."""
_LARGEST_BASE = 6
"""The most sentences of one base, so that no base makes up all of the data."""


def home_assistant_rows(per_template: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """English sentences of eight intents: rows of `text`, `factors` (the intent, which slots are filled), `targets`.

    Raises:
        ModuleNotFoundError: if home-assistant-intents or hassil is not installed.
    """
    package_folder("hassil", "run pip install hassil")
    folder = package_folder("home_assistant_intents", "run pip install home-assistant-intents hassil") / "data"
    grammar = json.loads((folder / "en.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = {}
    for row in _sentences(grammar, per_template, random.Random(seed)):
        text = row["text"].lower()
        if row["intent"] in INTENTS and text not in rows:
            factors = {"intent": row["intent"], **{slot: slot in row["slots"] for slot in SLOTS}}
            other = sorted(set(row["slots"]) - set(SLOTS))
            targets = [float(row["intent"] == name) for name in INTENTS] + [float(factors[s]) for s in SLOTS]
            rows[text] = {"text": text, "factors": factors, "other": other, "targets": targets}
    return list(rows.values())


def with_bases(rows: Sequence[Mapping[str, Any]], per_attribute: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences grouped in bases. Those of a base differ in a few adjacent words, and no two have the same factors.

    Bases are taken in a random order until every attribute has `per_attribute` pairs. No two bases share a
    sentence.

    Returns:
        The rows of the bases, with `base`.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        words = row["text"].split()
        for start in range(len(words) + 1):
            for end in range(start, min(len(words), start + _SPAN) + 1):
                if len(words) - (end - start) >= max(2, end - start):  # as much is shared as differs
                    places[f"{' '.join(words[:start])} … {' '.join(words[end:])}"].append(number)
    keys = sorted(key for key, members in places.items() if len(members) > 1)
    random.Random(seed).shuffle(keys)
    names, _ = attributes_of([row["factors"] for row in rows])
    counts, used, kept = dict.fromkeys(names, 0), set(), []
    for key in keys:
        group: dict[str, int] = {}
        for number in places[key]:
            if number not in used and rows[number]["other"] == rows[places[key][0]]["other"]:
                group.setdefault(json.dumps(rows[number]["factors"], sort_keys=True), number)
        members = list(group.values())[:_LARGEST_BASE]
        pairs = minimal_pairs([rows[m]["factors"] for m in members], [key] * len(members))
        if any(counts[pair.attribute] < per_attribute for pair in pairs):
            for pair in pairs:
                counts[pair.attribute] += 1
            used.update(members)
            kept += [{**rows[m], "base": key} for m in members]
        if min(counts.values()) >= per_attribute:
            break
    return kept
