"""Scores of ratings: how well raters tell a feature's held-out examples from distractors, and how far they agree.

Detection accuracy is the mean of two shares: the members that were picked, and the distractors that were not. Chance is
one half, however many examples are picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_npeff.extras import load
from hf_npeff.studies.measures import bootstrap_interval
from hf_npeff.studies.ratings import Answers, RatingStudy, RatingTask
from hf_npeff.studies.result import StudyResult, markdown, number


@dataclass(frozen=True)
class Detection:
    """A method's detection accuracy.

    Attributes:
        method: the name of the method.
        tasks: how many of its tasks at least one rater answered.
        accuracy: the mean over its tasks of the mean over raters; 0.5 is chance.
        interval: the 95% interval of the accuracy, by bootstrap over tasks.
        alpha: Krippendorff's alpha for nominal values, over the choices of its tasks; None if no task has two raters.
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
        study: the id of the study.
        raters: {rater: how many tasks they answered}.
        detection: the detection accuracy of each method.
        alpha: Krippendorff's alpha over all tasks, or None.
        unanswered: {rater: {task: the reason, or "no answer"}}.
        excluded: {method and feature: the reason why it has no task}.
        themes: {task: {rater: theme}}, with the method and the feature from the key.
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
        return {
            "study": "ratings",
            "id": self.study,
            **{k: v for k, v in vars(self).items() if k not in ("detection", "study")},
            "detection": rows,
        }

    def table(self) -> str:
        """A table with a row for each method; below it, the unanswered tasks and the features without a task."""
        rows = [
            [d.method, d.tasks, number(d.accuracy), f"{d.interval[0]:.2f}–{d.interval[1]:.2f}", number(d.alpha, 2)]
            for d in self.detection
        ]
        lines = [markdown(["method", "tasks", "detection accuracy", "95% interval", "alpha"], rows), ""]
        lines.append(f"Krippendorff's alpha over all tasks: {number(self.alpha, 2)}; {len(self.raters)} raters.")
        for rater, missing in self.unanswered.items():
            if missing:
                lines.append(
                    f"{rater} did not answer {len(missing)} tasks: {'; '.join(sorted(set(missing.values())))}."
                )
        lines += [f"No task for {what}: {why}." for what, why in self.excluded.items()]
        return "\n".join(lines)

    def draw(self, figure: Any) -> None:
        """The detection accuracy of each method, with its interval."""
        axes = figure.add_subplot()
        for position, d in enumerate(self.detection):
            spread = [[max(d.accuracy - d.interval[0], 0)], [max(d.interval[1] - d.accuracy, 0)]]
            axes.errorbar([position], [d.accuracy], yerr=spread, marker="o", capsize=4)
        axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")  # chance
        axes.set_xticks(range(len(self.detection)), [d.method for d in self.detection], rotation=20, ha="right")
        axes.set(ylabel="detection accuracy (chance 0.5)", ylim=(0, 1.05))


def detection_accuracy(members: Sequence[bool], picked: Sequence[int]) -> float:
    """The mean of the share of members picked and the share of distractors not picked; 0.5 is chance.

    Raises:
        ValueError: if there are no members, or no distractors.
    """
    if all(members) or not any(members):
        raise ValueError("detection accuracy needs at least one member and one distractor")
    hits = sum(members[i] for i in picked)
    false = len(picked) - hits
    return (hits / sum(members) + 1 - false / (len(members) - sum(members))) / 2


def krippendorff_alpha(ratings: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha for nominal values (raters × units), which are NaN if a rater did not answer.

    It is None if it is undefined: no unit has two ratings, or all ratings are equal.

    Raises:
        ModuleNotFoundError: if `krippendorff` is not installed.
    """
    krippendorff = load("krippendorff", "agreement")
    matrix = torch.tensor([list(row) for row in ratings], dtype=torch.float64)
    paired = matrix[:, (~matrix.isnan()).sum(0) >= 2]
    known = paired[~paired.isnan()]
    if not len(known) or len(known.unique()) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=matrix.numpy(), level_of_measurement="nominal"))


def score_ratings(study: RatingStudy, answers: Sequence[Answers]) -> RatingsResult:
    """The detection accuracy of each method, and how far raters agree.

    Args:
        study: the study, with its key.
        answers: the answers of each rater.

    Raises:
        ValueError: if there are no answers, two are by the same rater, or they belong to another study.

    Example:
        >>> from hf_npeff.studies.ratings import Answers
        >>> answers = Answers(study.id, "a rater", themes={}, picked={task: [0, 1] for task in study.key})
        >>> result = score_ratings(study, [answers])
    """
    names = [a.rater for a in answers]
    if not answers or len(set(names)) < len(names):
        raise ValueError(f"expected the answers of different raters, but got {names or 'none'}")
    for rater in answers:
        study.check(rater, f"the answers of {rater.rater}")
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
    """Krippendorff's alpha, where each choice of each task is a unit that was picked or not."""
    if len(answers) < 2:
        return None

    def choices(a: Answers) -> list[float]:
        values: list[float] = []
        for task in tasks:
            picked = a.picked.get(task.id)
            values += [float("nan") if picked is None else float(i in picked) for i in range(len(task.choices))]
        return values

    return krippendorff_alpha([choices(a) for a in answers])
