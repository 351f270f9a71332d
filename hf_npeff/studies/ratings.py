"""Ratings by people and language models: does the theme of a feature's top examples single out its other examples?

A task shows some of a feature's top examples and, below them, other top examples mixed with distractors. A rater states
the theme and picks the examples that share it. Raters do not learn which method a task is from: methods are mixed, the
order is random, and the key is a separate file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from hf_npeff.baselines.method import MethodResult
from hf_npeff.sharing.files import write_atomically
from hf_npeff.studies.settings import RatingsConfig

_FORMAT = 1
"""The format version of key.json, so that later formats can be recognised."""


@dataclass(frozen=True)
class RatingTask:
    """What a rater sees.

    Attributes:
        id: the id of the task, which does not reveal the method.
        shown: texts that have the theme.
        choices: texts, some of which have the theme.
    """

    id: str
    shown: list[str]
    choices: list[str]


@dataclass(frozen=True)
class RatingKey:
    """What a rater does not see.

    Attributes:
        method: the method whose feature the task is about.
        feature: the number of the feature.
        members: for each choice, whether it is one of the feature's top examples.
    """

    method: str
    feature: int
    members: list[bool]


@dataclass(frozen=True)
class Answers:
    """The answers of one rater.

    Attributes:
        study: the id of the study that was rated.
        rater: the name of the rater.
        themes: {task: the stated theme}.
        picked: {task: the indices of the choices that were picked}.
        refused: {task: the reason why there is no answer}.
    """

    study: str
    rater: str
    themes: dict[str, str]
    picked: dict[str, list[int]]
    refused: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The answers as JSON types, as the form saves them."""
        answers = {task: {"theme": self.themes.get(task, ""), "picked": picked} for task, picked in self.picked.items()}
        return {"study": self.study, "rater": self.rater, "answers": answers, "refused": self.refused}


@dataclass(frozen=True)
class RatingStudy:
    """Blinded tasks and their key.

    Attributes:
        tasks: the tasks, in the order in which they are shown.
        key: {task: its `RatingKey`}.
        excluded: {method and feature: the reason why it has no task}.

    Example:
        >>> from hf_npeff.baselines import MethodResult
        >>> from hf_npeff.studies.settings import RatingsConfig
        >>> texts = [row["text"] for row in dataset]
        >>> methods = [MethodResult.of_decomposition(decomposition)]
        >>> config = RatingsConfig(features=2, shown=3, members=2, distractors=2)
        >>> study = RatingStudy.make(methods, texts, config)
        >>> study.export(Path("runs/rating"))
        >>> RatingStudy.load(Path("runs/rating")) == study
        True
    """

    tasks: list[RatingTask]
    key: dict[str, RatingKey]
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A hash of the tasks. Answers to other tasks are refused."""
        content = json.dumps([asdict(task) for task in self.tasks], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def make(
        cls,
        methods: Sequence[MethodResult],
        texts: Sequence[str],
        config: RatingsConfig | None = None,
        *,
        alike: Sequence[Hashable] | None = None,
    ) -> RatingStudy:
        """Make tasks for features of several methods.

        Args:
            methods: the results of the methods, each with coefficients for the same n examples.
            texts: the texts of these examples.
            config: the settings.
            alike: a value of each example, such as its number of words or its label, in which the distractors are to be
                like the members: they have the members' values in turn. What raters find then does not come from that
                value.

        Raises:
            ValueError: if a method or `alike` has another number of examples, or no feature has enough examples.
        """
        config = config or RatingsConfig()
        if alike is not None and len(alike) != len(texts):
            raise ValueError(f"alike has {len(alike)} values, but there are {len(texts)} texts")
        rng = random.Random(config.seed)
        made: list[tuple[RatingTask, RatingKey]] = []
        excluded: dict[str, str] = {}
        for method in methods:
            if len(method.coefficients) != len(texts):
                raise ValueError(
                    f"{method.name} has coefficients for {len(method.coefficients)} examples, but there are "
                    f"{len(texts)} texts"
                )
            features = list(range(len(method)))
            count = 0
            for feature in rng.sample(features, len(features)):
                if count == config.features:
                    break
                drawn = _task(method, feature, texts, config, rng, alike)
                if isinstance(drawn, str):
                    excluded[f"{method.name}, feature {feature}"] = drawn
                else:
                    made.append(drawn)
                    count += 1
        if not made:
            raise ValueError(f"no feature has enough examples for a task: {excluded}")
        rng.shuffle(made)
        return cls([task for task, _ in made], {task.id: key for task, key in made}, excluded)

    def export(self, folder: Path) -> None:
        """Write form.html and tasks.jsonl, which are for raters, and key.json, which raters must not see."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"study": self.id, **asdict(task)}, ensure_ascii=False) for task in self.tasks]
        write_atomically(folder / "tasks.jsonl", ("\n".join(lines) + "\n").encode())
        key = {"format": _FORMAT, "study": self.id, "excluded": self.excluded}
        key["key"] = {task: asdict(entry) for task, entry in self.key.items()}
        write_atomically(folder / "key.json", (json.dumps(key, indent=1, ensure_ascii=False) + "\n").encode())
        write_atomically(folder / "form.html", self.form().encode())

    def form(self) -> str:
        """One HTML page that works without a network and saves answers as JSON."""
        content = {"study": self.id, "tasks": [asdict(task) for task in self.tasks]}
        shown = json.dumps(content, ensure_ascii=False)
        for character in "<>&\u2028\u2029":  # no text may end the script that contains it
            shown = shown.replace(character, f"\\u{ord(character):04x}")
        page = files("hf_npeff.studies").joinpath("templates/rating.html").read_text(encoding="utf-8")
        return page.replace("__STUDY__", shown)

    @classmethod
    def load(cls, folder: Path) -> RatingStudy:
        """Read what `export` wrote.

        Raises:
            ValueError: if the tasks and the key belong to different studies.
            OSError: if a file is missing.
        """
        if missing := [name for name in ("tasks.jsonl", "key.json") if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{folder} is not the folder of a study of ratings: {missing[0]} is missing; `export` writes it "
                "(hf-npeff study ratings FOLDER --export DECOMPOSITION)"
            )
        lines = (folder / "tasks.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        tasks = [RatingTask(row["id"], row["shown"], row["choices"]) for row in rows]
        study = cls(tasks, {task: RatingKey(**entry) for task, entry in key["key"].items()}, key["excluded"])
        if study.id != key["study"] or {task.id for task in tasks} != set(study.key):
            raise ValueError(f"tasks.jsonl and key.json in {folder} belong to different studies")
        return study

    def read_answers(self, path: Path) -> Answers:
        """Read and check a rater's file.

        Raises:
            ValueError: if it belongs to another study, or is not a rater's file.
            OSError: if it cannot be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            study, rater, given = str(content["study"]), str(content["rater"]), dict(content["answers"])
            picked = {task: [int(i) for i in answer["picked"]] for task, answer in given.items()}
            themes = {task: str(answer.get("theme", "")) for task, answer in given.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a rater's file: {error!r}") from error
        answers = Answers(study, rater, themes, picked, dict(content.get("refused", {})))
        self.check(answers, str(path))
        return answers

    def check(self, answers: Answers, where: str = "the answers") -> None:
        """Check that answers belong to this study.

        Raises:
            ValueError: if they belong to another study, have unknown tasks or choices, or have no rater.
        """
        if answers.study != self.id:
            raise ValueError(f"{where}: the answers belong to the study {answers.study}, but this is {self.id}")
        if not answers.rater.strip():
            raise ValueError(f"{where}: the rater has no name")
        if unknown := sorted(set(answers.picked) - set(self.key)):
            raise ValueError(f"{where}: unknown tasks {unknown[:3]}")
        for task, picked in answers.picked.items():
            count = len(self.key[task].members)
            if any(not 0 <= i < count for i in picked) or len(set(picked)) < len(picked):
                raise ValueError(f"{where}: task {task} has {count} choices, but {picked} were picked")


def _task(
    method: MethodResult,
    feature: int,
    texts: Sequence[str],
    config: RatingsConfig,
    rng: random.Random,
    alike: Sequence[Hashable] | None = None,
) -> tuple[RatingTask, RatingKey] | str:
    """The task of one feature, or the reason why there is none."""
    w = method.coefficients[:, feature].double()
    order = torch.argsort(w, descending=True, stable=True).tolist()
    top: list[int] = []
    for i in order:  # a text that comes twice would be recognised
        if len(top) < config.shown + config.members and texts[i] not in {texts[j] for j in top}:
            top.append(i)
    if len(top) < config.shown + config.members:
        return f"only {len(top)} different texts"
    lowest = float(w[top[-1]])
    tops = {texts[i] for i in top}
    bottom = [i for i in order[len(order) // 2 :] if float(w[i]) < lowest and texts[i] not in tops]
    distractors = list({texts[i]: i for i in bottom}.values())
    if len(distractors) < config.distractors:
        return f"only {len(distractors)} examples have clearly smaller coefficients than its top {len(top)}"
    rng.shuffle(top)
    shown, members = top[: config.shown], top[config.shown :]
    others = rng.sample(distractors, config.distractors) if alike is None else []
    for k in range(config.distractors if alike is not None else 0):
        assert alike is not None
        value = alike[members[k % len(members)]]
        left = [i for i in distractors if alike[i] == value and i not in others]
        if not left:
            return f"too few examples have clearly smaller coefficients and the value {value!r} of a top one"
        others.append(rng.choice(left))
    choices = [(i, True) for i in members] + [(i, False) for i in others]
    rng.shuffle(choices)
    task = RatingTask(f"{rng.getrandbits(64):016x}", [texts[i] for i in shown], [texts[i] for i, _ in choices])
    return task, RatingKey(method.name, feature, [member for _, member in choices])
