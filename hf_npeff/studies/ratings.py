"""Ratings by people and language models: can the theme of a feature's top examples tell its other examples apart?

A task shows some of a feature's top examples and, below, held-out ones among distractors; a rater states the theme and
picks those that belong. Raters never learn which method a task is from: methods are mixed, the order is seeded, and the
key is a file of its own. Detection accuracy is the mean of the share of members picked and the share of distractors
left: chance is one half, however many are picked.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from hf_npeff.baselines.method import MethodResult
from hf_npeff.files import write_atomically
from hf_npeff.studies.measures import bootstrap_interval
from hf_npeff.studies.result import StudyResult, markdown, number
from hf_npeff.studies.settings import RatingsConfig

_FORMAT = 1


@dataclass(frozen=True)
class RatingTask:
    """What a rater sees.

    Attributes:
        id: of the task; says nothing of the method.
        shown: texts that have the theme.
        choices: texts, some of which have it.
    """

    id: str
    shown: list[str]
    choices: list[str]


@dataclass(frozen=True)
class RatingKey:
    """What a rater does not see.

    Attributes:
        method: whose feature the task is of.
        feature: its number.
        members: for every choice whether it is one of the feature's top examples.
    """

    method: str
    feature: int
    members: list[bool]


@dataclass(frozen=True)
class Answers:
    """What one rater said.

    Attributes:
        study: id of the study that was rated.
        rater: name.
        themes: {task: stated theme}.
        picked: {task: indices of the choices that were picked}.
        refused: {task: why there is no answer}.
    """

    study: str
    rater: str
    themes: dict[str, str]
    picked: dict[str, list[int]]
    refused: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As the form saves it."""
        answers = {task: {"theme": self.themes.get(task, ""), "picked": found} for task, found in self.picked.items()}
        return {"study": self.study, "rater": self.rater, "answers": answers, "refused": self.refused}


@dataclass(frozen=True)
class RatingStudy:
    """Blinded tasks and their key.

    Attributes:
        tasks: in the order in which they are shown.
        key: {task: what it is of}.
        excluded: {method and feature: why it has no task}.
    """

    tasks: list[RatingTask]
    key: dict[str, RatingKey]
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A hash of the tasks: answers to others are refused."""
        content = json.dumps([asdict(task) for task in self.tasks], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def make(
        cls, methods: Sequence[MethodResult], texts: Sequence[str], config: RatingsConfig | None = None
    ) -> RatingStudy:
        """Tasks for features of several methods.

        Args:
            methods: coefficients of the same n examples.
            texts: of these examples.
            config: settings.

        Raises:
            ValueError: if a method is of other examples, or no feature has enough of them.
        """
        config = config or RatingsConfig()
        rng = random.Random(config.seed)
        made: list[tuple[RatingTask, RatingKey]] = []
        excluded: dict[str, str] = {}
        for method in methods:
            if len(method.coefficients) != len(texts):
                raise ValueError(
                    f"{method.name} has coefficients of {len(method.coefficients)} examples, and there are "
                    f"{len(texts)} texts"
                )
            features = list(range(len(method)))
            count = 0
            for feature in rng.sample(features, len(features)):
                if count == config.features:
                    break
                found = _task(method, feature, texts, config, rng)
                if isinstance(found, str):
                    excluded[f"{method.name}, feature {feature}"] = found
                else:
                    made.append(found)
                    count += 1
        if not made:
            raise ValueError(f"no feature has enough examples for a task: {excluded}")
        rng.shuffle(made)
        return cls([task for task, _ in made], {task.id: key for task, key in made}, excluded)

    def export(self, folder: Path) -> None:
        """Write form.html and tasks.jsonl for raters, and key.json, which raters must not get."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"study": self.id, **asdict(task)}, ensure_ascii=False) for task in self.tasks]
        write_atomically(folder / "tasks.jsonl", ("\n".join(lines) + "\n").encode())
        key = {"format": _FORMAT, "study": self.id, "excluded": self.excluded}
        key["key"] = {task: asdict(found) for task, found in self.key.items()}
        write_atomically(folder / "key.json", (json.dumps(key, indent=1, ensure_ascii=False) + "\n").encode())
        write_atomically(folder / "form.html", self.form().encode())

    def form(self) -> str:
        """One HTML page that works without a network and saves answers as JSON."""
        content = {"study": self.id, "tasks": [asdict(task) for task in self.tasks]}
        shown = json.dumps(content, ensure_ascii=False)
        for character in "<>&\u2028\u2029":  # no text may end the script that it stands in
            shown = shown.replace(character, f"\\u{ord(character):04x}")
        page = files("hf_npeff.studies").joinpath("templates/rating.html").read_text(encoding="utf-8")
        return page.replace("__STUDY__", shown)

    @classmethod
    def load(cls, folder: Path) -> RatingStudy:
        """Read what `export` wrote.

        Raises:
            ValueError: if the tasks and the key do not belong together.
            OSError: if a file is missing.
        """
        lines = (folder / "tasks.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        tasks = [RatingTask(row["id"], row["shown"], row["choices"]) for row in rows]
        found = cls(tasks, {task: RatingKey(**entry) for task, entry in key["key"].items()}, key["excluded"])
        if found.id != key["study"] or {task.id for task in tasks} != set(found.key):
            raise ValueError(f"tasks.jsonl and key.json in {folder} are of different studies")
        return found

    def read_answers(self, path: Path) -> Answers:
        """A rater's file, checked.

        Raises:
            ValueError: if it is of another study, or no rater's file.
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
        """Refuse answers that are not of this study.

        Raises:
            ValueError: if they are of another study, of unknown tasks or choices, or have no rater.
        """
        if answers.study != self.id:
            raise ValueError(f"{where}: of the study {answers.study}, but this is {self.id}")
        if not answers.rater.strip():
            raise ValueError(f"{where}: the rater has no name")
        if unknown := sorted(set(answers.picked) - set(self.key)):
            raise ValueError(f"{where}: unknown tasks {unknown[:3]}")
        for task, found in answers.picked.items():
            count = len(self.key[task].members)
            if any(not 0 <= i < count for i in found) or len(set(found)) < len(found):
                raise ValueError(f"{where}: task {task} has {count} choices, and {found} were picked")


def _task(
    method: MethodResult, feature: int, texts: Sequence[str], config: RatingsConfig, rng: random.Random
) -> tuple[RatingTask, RatingKey] | str:
    """A task of one feature, or why there is none."""
    w = method.coefficients[:, feature].double()
    order = torch.argsort(w, descending=True, stable=True).tolist()
    top: list[int] = []
    for i in order:  # texts that come twice would give themselves away
        if len(top) < config.shown + config.members and texts[i] not in {texts[j] for j in top}:
            top.append(i)
    if len(top) < config.shown + config.members:
        return f"only {len(top)} different texts"
    lowest = float(w[top[-1]])
    tops = {texts[i] for i in top}
    bottom = [i for i in order[len(order) // 2 :] if float(w[i]) < lowest and texts[i] not in tops]
    distractors = list({texts[i]: i for i in bottom}.values())
    if len(distractors) < config.distractors:
        return f"only {len(distractors)} examples lie clearly below its top {len(top)}"
    rng.shuffle(top)
    shown, members = top[: config.shown], top[config.shown :]
    choices = [(i, True) for i in members] + [(i, False) for i in rng.sample(distractors, config.distractors)]
    rng.shuffle(choices)
    task = RatingTask(f"{rng.getrandbits(64):016x}", [texts[i] for i in shown], [texts[i] for i, _ in choices])
    return task, RatingKey(method.name, feature, [member for _, member in choices])


@dataclass(frozen=True)
class Detection:
    """A method's detection accuracy.

    Attributes:
        method: its name.
        tasks: how many were answered by someone.
        accuracy: mean over its tasks of the mean over raters; 0.5 is chance.
        interval: 95%, by bootstrap over tasks.
        alpha: Krippendorff's, nominal, over its tasks' choices; None with fewer than two raters of a task.
    """

    method: str
    tasks: int
    accuracy: float
    interval: tuple[float, float]
    alpha: float | None


@dataclass
class RatingsResult(StudyResult):
    """The outcome of `score_ratings`.

    Attributes:
        study: its id.
        raters: {name: tasks answered}.
        detection: a row a method.
        alpha: over all tasks.
        unanswered: {rater: {task: why, or "no answer"}}.
        excluded: {method and feature: why it had no task}.
        themes: {task: {rater: theme}}, with the key's method and feature.
    """

    study: str
    raters: dict[str, int]
    detection: list[Detection]
    alpha: float | None
    unanswered: dict[str, dict[str, str]]
    excluded: dict[str, str]
    themes: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        rows = [asdict(row) for row in self.detection]
        return {"name": "ratings", **{k: v for k, v in vars(self).items() if k != "detection"}, "detection": rows}

    def table(self) -> str:
        """A row a method, and what is missing."""
        rows = [
            [d.method, d.tasks, number(d.accuracy), f"{d.interval[0]:.2f}–{d.interval[1]:.2f}", number(d.alpha, 2)]
            for d in self.detection
        ]
        lines = [markdown(["method", "tasks", "detection accuracy", "95% interval", "alpha"], rows), ""]
        lines.append(f"Krippendorff's alpha over all tasks: {number(self.alpha, 2)}; {len(self.raters)} raters.")
        for rater, missing in self.unanswered.items():
            if missing:
                lines.append(f"{rater} left {len(missing)} tasks: {'; '.join(sorted(set(missing.values())))}.")
        lines += [f"No task for {what}: {why}." for what, why in self.excluded.items()]
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """Detection accuracy with its interval, method by method."""
        axes = figure.add_subplot()
        for position, d in enumerate(self.detection):
            spread = [[max(d.accuracy - d.interval[0], 0)], [max(d.interval[1] - d.accuracy, 0)]]
            axes.errorbar([position], [d.accuracy], yerr=spread, marker="o", capsize=4)
        axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(self.detection)), [d.method for d in self.detection], rotation=20, ha="right")
        axes.set(ylabel="detection accuracy (chance 0.5)", ylim=(0, 1.05))


def detection_accuracy(members: Sequence[bool], picked: Sequence[int]) -> float:
    """Mean of the share of members picked and the share of distractors left; 0.5 is chance.

    Raises:
        ValueError: if there are no members, or no distractors.
    """
    if all(members) or not any(members):
        raise ValueError("detection needs members and distractors")
    hits = sum(members[i] for i in picked)
    false = len(picked) - hits
    return (hits / sum(members) + 1 - false / (len(members) - sum(members))) / 2


def krippendorff_alpha(ratings: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha for nominal values, raters × units, NaN where a rater did not answer.

    None where it is undefined: no unit has two ratings, or all ratings are equal.

    Raises:
        ModuleNotFoundError: if `krippendorff` is not installed.
    """
    try:
        import krippendorff
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "agreement is computed by krippendorff, which is not installed; run pip install 'hf-npeff[eval]'",
            name="krippendorff",
        ) from error
    matrix = torch.tensor([list(row) for row in ratings], dtype=torch.float64)
    paired = matrix[:, (~matrix.isnan()).sum(0) >= 2]
    known = paired[~paired.isnan()]
    if not len(known) or len(known.unique()) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=matrix.numpy(), level_of_measurement="nominal"))


def score_ratings(study: RatingStudy, answers: Sequence[Answers]) -> RatingsResult:
    """Detection accuracy per method, and how far raters agree.

    Args:
        study: with its key.
        answers: one a rater.

    Raises:
        ValueError: if there are none, two are of one rater, or they are of another study.
    """
    names = [a.rater for a in answers]
    if not answers or len(set(names)) < len(names):
        raise ValueError(f"expected answers of different raters, but got {names or 'none'}")
    for found in answers:
        study.check(found, f"the answers of {found.rater}")
    methods = list(dict.fromkeys(sorted(key.method for key in study.key.values())))
    rows = []
    for method in methods:
        mine = [task for task in study.tasks if study.key[task.id].method == method]
        scores = [score for task in mine if (score := _task_score(study, task.id, answers)) is not None]
        if scores:
            values = torch.tensor(scores, dtype=torch.float64)
            alpha = _alpha(study, mine, answers)
            rows.append(Detection(method, len(scores), float(values.mean()), bootstrap_interval(values), alpha))
    unanswered = {
        a.rater: {t.id: a.refused.get(t.id, "no answer") for t in study.tasks if t.id not in a.picked} for a in answers
    }
    themes = {
        task.id: {
            "method": study.key[task.id].method,
            "feature": str(study.key[task.id].feature),
            **{f"theme of {a.rater}": a.themes[task.id] for a in answers if task.id in a.themes},
        }
        for task in study.tasks
    }
    raters = {a.rater: len(a.picked) for a in answers}
    alpha = _alpha(study, study.tasks, answers)
    return RatingsResult(study.id, raters, rows, alpha, unanswered, study.excluded, themes)


def _task_score(study: RatingStudy, task: str, answers: Sequence[Answers]) -> float | None:
    scores = [detection_accuracy(study.key[task].members, a.picked[task]) for a in answers if task in a.picked]
    return sum(scores) / len(scores) if scores else None


def _alpha(study: RatingStudy, tasks: Sequence[RatingTask], answers: Sequence[Answers]) -> float | None:
    """Over every choice of the tasks as a unit: picked or not."""
    if len(answers) < 2:
        return None

    def said(a: Answers) -> list[float]:
        values: list[float] = []
        for task in tasks:
            count = len(task.choices)
            found: Mapping[int, bool] | None = None
            if task.id in a.picked:
                found = {i: i in a.picked[task.id] for i in range(count)}
            values += [float(found[i]) if found is not None else float("nan") for i in range(count)]
        return values

    return krippendorff_alpha([said(a) for a in answers])
