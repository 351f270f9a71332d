"""Carrying out an edit: the goal, the step towards it, and trying the step on the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import EditRequest
from hf_npeff.data import Example
from hf_npeff.fisher.distributions import Gaussian
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.directions import ParameterDirection
from hf_npeff.weights.edits import (
    Functionals,
    Length,
    Shown,
    Wanted,
    changes_by_id,
    largest_step,
    removal,
    solve,
    warn_of_share,
)
from hf_npeff.weights.lifting import lift_combination
from hf_npeff.weights.log_odds import (
    Naming,
    Observed,
    head_of_examples,
    observe,
    outcome_in_words,
    outcomes_of,
    warn_of_other_spelling,
)
from hf_npeff.weights.plans import check_kept
from hf_npeff.weights.reach import Reach
from hf_npeff.weights.row_space import combined_rows, row_space
from hf_npeff.weights.selective import most_different

logger = logging.getLogger(__name__)
_HALF = 0.5
"""An edit that realises less than this share of the wanted changes gets a warning. Chosen: less is nearer to none."""
_ITERATIONS = 8
"""Iterations that are advised where one realises too little. Measured: a tiny BERT whose answers a word of the training
data misleads realised .05 of an edit with one iteration, at a quarter of the step, and 1.00 with eight; its held-out
accuracy on sentences with that word rose from .54 to 1.00, and no other answer changed."""
_ALL = 0.99
"""From this share of the changes on, rows express all of them for a reader, and more rows would not help."""


@dataclass(frozen=True)
class Goal:
    """The goal of an edit.

    Attributes:
        outcomes: (n,) the number of the outcome of every example.
        wanted: the wanted changes of their log-odds.
        before: the model's predictions before any change.
        outcome: the outcomes in words, such as "class 'positive'".
    """

    outcomes: list[int]
    wanted: Wanted
    before: Observed
    outcome: str

    def missing(self, now: Observed) -> Wanted:
        """The changes that are still missing, for every example, including those that should stay the same."""
        return replace(self.wanted, changes=self.wanted.changes - (now.values - self.before.values))

    def reach(self, after: Observed) -> Reach:
        """The KL, since before any change, of what should move and of what should not."""
        return Reach.of(self.before.predictions, after.predictions, self.outcomes, self.wanted.changes != 0)


@dataclass(frozen=True)
class Step:
    """A weight change towards a goal, not tried yet.

    Attributes:
        deltas: {parameter: matrix (out, in)} with their own length.
        predicted: (n,) the predicted changes of the log-odds.
        info: how the step was found.
    """

    deltas: dict[str, Tensor]
    predicted: Tensor
    info: dict[str, Any]


def goal_of(
    forward: ForwardPass, pefs: PEFs, examples: Sequence[Example], request: EditRequest, naming: Naming
) -> Goal:
    """The goal in numbers.

    Raises:
        UnsupportedModelError: if the model predicts places in its input.
        ValueError: if ids, columns or outcomes are wrong.
    """
    kind, k = head_of_examples(forward, examples)
    outcomes = outcomes_of(request.outcome, naming, len(examples), kind, k)
    wanted = None if request.change is None else changes_by_id(request.change, pefs.example_ids)
    before = observe(forward, examples, outcomes, request.batch_size)
    warn_of_other_spelling(request.outcome, naming, outcomes, before.predictions)
    if wanted is None:
        assert request.remove is not None
        wanted = removal(request.remove, request.given, pefs.columns, before.values, request.towards)
    return Goal(outcomes, wanted, before, outcome_in_words(request.outcome, outcomes, naming, kind))


def step_towards(
    forward: ForwardPass,
    pefs: PEFs,
    examples: Sequence[Example],
    goal: Goal,
    request: EditRequest,
    sketch: Sketch,
    device: torch.device | None,
) -> tuple[Step, Observed]:
    """One solution at the present weights of the model and the rows, and the model's predictions there."""
    assert pefs.cotangents is not None
    now = observe(forward, examples, goal.outcomes, request.batch_size, cotangents=True)
    wanted = goal.missing(now)
    assert now.cotangents is not None
    functionals = Functionals.of(now.cotangents, pefs.cotangents.cpu())
    share = functionals.share(wanted.changes)
    warn_of_share(share)
    targets = functionals.targets(wanted.changes)
    space = row_space(pefs, memory_budget=request.memory_budget, device=device)
    kept = None if request.keep is None else space.coordinates(request.keep)
    solution = solve(space, targets, kept, request.ridge)
    coefficients = space.coefficients(solution.y).cpu()
    aim = combined_rows(pefs, coefficients[None], None, space.rows)[0].cpu()
    deltas, cosine = lift_combination(forward, pefs, examples, coefficients, aim, sketch, request.batch_size)
    info = {"expressible": share, "estimated_cosine": cosine, **solution.info}
    info["predicted_kl"] = float(0.5 * solution.moved.square().sum(1).mean())
    return Step(deltas, functionals.read(solution.moved.cpu()), info), now


def tried(
    forward: ForwardPass,
    direction: ParameterDirection,
    examples: Sequence[Example],
    goal: Goal,
    now: Observed,
    step: Step,
    request: EditRequest,
) -> Length:
    """The largest step that does what was predicted and no more, tried on the model.

    Raises:
        NoStepError: if no step does.
    """

    def shown_at(scale: float) -> Shown:
        with direction.applied_to(forward.model, scale):
            after = observe(forward, examples, goal.outcomes, request.batch_size)
        return Shown(after.values - now.values, goal.reach(after))

    return largest_step(goal.missing(now), step.predicted, shown_at, step.info.get("ridge"))


def warn_of_what_is_not_reached(info: Mapping[str, Any], iterations: int) -> None:
    """Warn if an edit with this `info` realises less than half of the wanted changes.

    Args:
        info: the information on the edit.
        iterations: how many were asked for; where fewer were made, no further step did what was predicted.
    """
    steps = info["steps"]
    if info["reached"] >= _HALF:
        return
    way = []
    if len(steps) == iterations:
        again = max(_ITERATIONS, 2 * iterations)
        way = [f"more iterations, each of which solves again at the changed weights (iterations={again})"]
    if info["disturbing"] is not None:  # the step that was refused for it would have reached more
        way.append("a larger ridge, which moves less of what should stay the same")
    elif len(steps) < iterations or min(steps) == 1:
        way.append("a smaller ridge")
    if info["expressible"] <= _ALL:
        way.append("PEFs of a larger rank")
    logger.warning(
        "the edit realises %.0f%% of the wanted changes. Its ridge is %.1g, its steps are %s of the solutions, and the "
        "rows express %.0f%% of these changes. Try %s, or smaller changes",
        100 * info["reached"],
        info["ridge"],
        " and ".join(f"{step:g}" for step in steps),
        100 * info["expressible"],
        ", or ".join(way),
    )


def outcome_info(goal: Goal, after: Observed, predicted: Tensor) -> dict[str, Any]:
    """The wanted, predicted and realised changes by group or id; KL and changed answers, of the others too."""
    wanted = goal.wanted
    realised = after.values - goal.before.values
    columns = [wanted.means(values).tolist() for values in (wanted.changes, predicted, realised)]
    sizes = torch.bincount(wanted.groups[wanted.groups >= 0], minlength=len(wanted.names)).tolist()
    rows = zip(wanted.names, sizes, *columns, strict=True)
    moving, reach = wanted.changes != 0, goal.reach(after)
    kl = goal.before.predictions.kl_to(after.predictions)
    info: dict[str, Any] = {
        "outcome": goal.outcome,
        "changes": {name: {"examples": n, "wanted": w, "predicted": p, "realised": r} for name, n, w, p, r in rows},
        "reached": wanted.reached(realised),
        "kl": float(kl[moving].mean()),
        "kl_beside": reach.beside,
    }
    if reach.others is not None:
        info["kl_of_others"] = reach.others
        info["change_of_others"] = float(realised[~moving].abs().mean())
    if goal.before.predictions.distribution is not Gaussian:  # whose numbers all change
        answers = zip(goal.before.predictions.answers(), after.predictions.answers(), strict=True)
        flips = torch.tensor([not torch.equal(a, b) for a, b in answers], dtype=torch.float64)
        info["flips"] = float(flips[moving].mean())
        if reach.others is not None:
            info["flips_of_others"] = float(flips[~moving].mean())
    return info


def lift_contrast(
    forward: ForwardPass,
    pefs: PEFs,
    examples: Sequence[Example],
    contrast: tuple[Tensor, Tensor],
    request: EditRequest,
    sketch: Sketch,
    device: torch.device | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The lifted direction with the largest effect on some examples for a given effect on others.

    Args:
        forward: the forward pass of the model.
        pefs: the PEFs of all examples.
        examples: the examples of the PEFs.
        contrast: the examples to move and the examples to leave alone, (n,) bool each.
        request: ridge, keep, memory, batch size.
        sketch: the sketch of the PEFs.
        device: the device for solving.
    """
    if request.keep is not None:
        check_kept(pefs, request.keep)
    space = row_space(pefs, memory_budget=request.memory_budget, device=device)
    kept = None if request.keep is None else space.coordinates(request.keep)
    at = space.rows.device
    moving, staying = (mask.to(at) for mask in contrast)
    y, info = most_different(Contrast(space, moving.to(space.rows), staying, kept), request.ridge)
    coefficients = space.coefficients(y).cpu()
    aim = combined_rows(pefs, coefficients[None], None, space.rows)[0].cpu()
    deltas, cosine = lift_combination(forward, pefs, examples, coefficients, aim, sketch, request.batch_size)
    return deltas, {"method": "contrast", "estimated_cosine": cosine, **info}


def sides(pefs: PEFs, ids: Sequence[Any], against: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
    """The examples to move and the examples to leave alone, (n,) bool each.

    Raises:
        ValueError: if an id is unknown or on both sides, or there are no examples to move.
    """
    places = {name: i for i, name in enumerate(pefs.example_ids)}
    masks = []
    for name, chosen in (("ids", ids), ("against", against if against is not None else ())):
        if isinstance(chosen, str) or not isinstance(chosen, Sequence):
            raise ValueError(f"{name} must be a list of example ids, but it is {chosen!r}")
        if unknown := [i for i in chosen if str(i) not in places]:
            raise ValueError(f"{len(unknown)} of {name} are not among these PEFs, for instance {unknown[:3]}")
        mask = torch.zeros(len(pefs), dtype=torch.bool)
        mask[[places[str(i)] for i in chosen]] = True
        masks.append(mask)
    moving, staying = masks
    if not bool(moving.any()):
        raise ValueError("ids= names no example to move")
    if against is None:
        staying = ~moving
    if both := [pefs.example_ids[i] for i in (moving & staying).nonzero()[:, 0].tolist()]:
        raise ValueError(
            f"{len(both)} examples are both in the set to move and in the set to leave alone, for instance {both[:3]}"
        )
    return moving, staying
