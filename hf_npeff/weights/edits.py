"""Edits: weight changes, computed from stored rows, that move chosen log-odds by chosen amounts and leave others alone.

Let u_i be the gradient of example i's log-odds where cotangents enter, and V_i its stored cotangents, so that
A_i = V_i J (c rows). Written in them, u_i ≈ V_iᵀ α_i, a weight change δ moves the log-odds by α_i·(A_i δ). Among all
changes of the output that move them by Δ_i the one of the least KL moves the rows by

    t_i = α_i Δ_i / ‖α_i‖²,        ½‖t_i‖² = ½ Δ_i² p(1 − p)  for two classes: signs come with α_i

since KL_i = ½‖A_i δ‖² to second order. Examples with no wanted change have t_i = 0. What is solved is ridge regression

    minimise Σ_i ‖A_i δ − t_i‖² + Σ_keep ‖B_i δ‖² + λ‖δ‖²   over δ in the span of the rows

in the coordinates of `row_space`: (XᵀX + X_keepᵀX_keep + λI) y = Xᵀt. It is the Gauss-Newton step towards predictions
with the wanted log-odds, in the span of a few rows. λ is a share of the largest eigenvalue; "auto" chooses the one with
the least error on held-out examples, by folds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import Ridge, Towards
from hf_npeff.weights.reach import Reach
from hf_npeff.weights.ridge import FOLDS, RIDGES, choose_ridge, folds_of
from hf_npeff.weights.ridge_systems import effective_rank, fold_grams, gram, solve_shifted, top_eigenvalue
from hf_npeff.weights.row_space import RowSpace

logger = logging.getLogger(__name__)
STEPS = (0.25, 0.5, 1.0)
"""The shares of the solution that are tried on the model."""
AS_PREDICTED = 0.5
"""A step does what was predicted if the changes differ from the predicted ones by less than this share of them.
Chosen: half of a wanted change is still useful."""
_EXPRESSIBLE = 0.5
"""If the rows express less than this share of the wanted change, there is a warning. Chosen: half."""
_TINY = torch.finfo(torch.float64).tiny
_RANK = 1e-8
"""Eigenvalues of the Gram matrix of an example's cotangents with a smaller share are rounding of float32."""


@dataclass(frozen=True)
class Wanted:
    """The wanted changes of log-odds.

    Attributes:
        changes: (n,) float64, in nats; 0 for examples that should stay the same.
        groups: (n,) the number of the group in which an example's change is judged; −1 if no change is wanted.
        names: the names of the groups.
    """

    changes: Tensor
    groups: Tensor
    names: list[str]

    def means(self, values: Tensor) -> Tensor:
        """The means (groups,) of values (n,)."""
        which = self.groups >= 0
        number = len(self.names)
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, self.groups[which], values[which].double())
        return sums / torch.bincount(self.groups[which], minlength=number).clamp_min(1)

    def reached(self, realised: Tensor) -> float:
        """The share of the wanted changes that was realised, by group: Σ n w r / Σ n w². It is 1 for all of them."""
        sizes = torch.bincount(self.groups[self.groups >= 0], minlength=len(self.names)).double()
        wanted, means = self.means(self.changes), self.means(realised)
        scale = float((sizes * wanted.square()).sum())
        return float((sizes * wanted * means).sum()) / scale if scale else 1.0

    def error(self, realised: Tensor, predicted: Tensor) -> float:
        """The difference between realised and predicted changes (n,) by group, as a share of the predicted ones."""
        sizes = torch.bincount(self.groups[self.groups >= 0], minlength=len(self.names)).double()
        a, b = self.means(realised), self.means(predicted)
        scale = float((sizes * b.square()).sum())
        if scale == 0:
            return float("inf")
        error = float((sizes * (a - b).square()).sum() / scale) ** 0.5
        return error if error == error else float("inf")


def changes_by_id(change: Mapping[Any, float], ids: Sequence[str]) -> Wanted:
    """Changes for examples that are named by id.

    Raises:
        ValueError: if there are none, an id is unknown, a change is not finite, or all changes are 0.
    """
    if not isinstance(change, Mapping) or not change:
        raise ValueError("change= needs {example id: nats}, with at least one example")
    places = {name: i for i, name in enumerate(ids)}
    if unknown := [name for name in change if str(name) not in places]:
        raise ValueError(f"{len(unknown)} of {len(change)} ids are not among these PEFs, for instance {unknown[:3]}")
    changes, groups = torch.zeros(len(ids), dtype=torch.float64), torch.full((len(ids),), -1)
    for number, (name, value) in enumerate(change.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise ValueError(f"the change of {name!r} must be a finite number of nats, but it is {value!r}")
        changes[places[str(name)]], groups[places[str(name)]] = float(value), number
    if not bool(changes.any()):
        raise ValueError("all changes are 0; leave examples that should stay the same out of change=")
    return Wanted(changes, groups, [str(name) for name in change])


def removal(
    column: str,
    given: str | None,
    columns: Mapping[str, Sequence[Any]],
    values: Tensor,
    towards: Towards = "mean",
) -> Wanted:
    """The changes after which log-odds no longer depend on a column, within each value of `given`.

    Towards the "mean": for each value of the column, the mean log-odds of its examples move to the mean of all examples
    with the same value of `given`. That mean does not change; two equally large groups each move half of the way.
    Towards the "highest": the examples of the value with the highest mean stay, and the others get their distribution
    of log-odds. Each example moves to the quantile that it has among its own, (rank − ½) / number, which is the least
    possible movement (optimal transport in one dimension; Feldman et al. 2015 repair data in this way).

    Args:
        column: the column whose influence is taken out.
        given: a column; examples are compared only within each of its values. None compares all examples.
        columns: {name: values}.
        values: (n,) log-odds.
        towards: the goal, "mean" or "highest".

    Raises:
        ValueError: if a column is missing, has a single value or as many as examples, or values are missing.
    """
    attribute = _values(column, columns)
    labels = [None] * len(attribute) if given is None else _values(given, columns)
    if len(set(attribute)) == 1:
        raise ValueError(
            f"the column {column!r} has a single value, {attribute[0]!r}, so it has no influence to take out"
        )
    if len(set(attribute)) > len(attribute) // 2:
        raise ValueError(
            f"the column {column!r} has {len(set(attribute))} values in {len(attribute)} examples: use a column with "
            "few values, such as ranges of a number"
        )
    if given is not None and len(set(labels)) > len(labels) // 2:
        raise ValueError(
            f"only examples with the same value of {given!r} are compared, and it has {len(set(labels))} values in "
            f"{len(labels)} examples: give given=None to compare all examples, or a column with few values"
        )
    changes, groups = torch.zeros(len(values), dtype=torch.float64), torch.full((len(values),), -1)
    names: list[str] = []
    alone = []
    for label in dict.fromkeys(labels):
        mine = [i for i, other in enumerate(labels) if other == label]
        present = list(dict.fromkeys(attribute[i] for i in mine))
        if len(present) < 2:
            alone.append(label)
            continue
        members = {value: [i for i in mine if attribute[i] == value] for value in present}
        highest = max(present, key=lambda value: float(values[members[value]].mean()))
        for value, which in members.items():
            if towards == "mean":
                changes[which] = values[mine].mean() - values[which].mean()
            elif value != highest:
                changes[which] = matched(values[which], values[members[highest]]) - values[which]
            groups[which] = len(names)
            names.append(f"{column}={value}" + ("" if given is None else f", {given}={label}"))
    if not names:
        raise ValueError(
            f"within each value of {given!r} the column {column!r} has a single value, so there is nothing to compare"
        )
    if not bool(changes.any()):
        raise ValueError(f"the outcome is the same for all values of {column!r}, so there is no influence to take out")
    if alone:
        logger.warning(
            "for %s = %s, %s has a single value, so these examples should stay the same", given, alone, column
        )
    return Wanted(changes, groups, names)


def matched(values: Tensor, others: Tensor) -> Tensor:
    """For each of n numbers, the value of other numbers (k,) at the same quantile, with interpolation."""
    ranks = values.argsort(stable=True).argsort(stable=True).to(others)
    return torch.quantile(others, (ranks + 0.5) / len(values))


def _values(name: str, columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    if name not in columns:
        hint = "; give given=None to compare all examples with each other" if name == "label" else ""
        raise ValueError(f"these PEFs have no column {name!r}; they have {sorted(columns)}{hint}")
    values = [tuple(value) if isinstance(value, list) else value for value in columns[name]]  # several labels
    missing = [i for i, value in enumerate(values) if value is None or value != value]
    if missing:
        raise ValueError(f"the column {name!r} has no value for {len(missing)} examples, for instance {missing[:3]}")
    return values


@dataclass(frozen=True)
class Functionals:
    """Log-odds as combinations of stored rows.

    Attributes:
        alpha: (n, c), u_i ≈ Σ_c α_ic v_ic.
        expressed: (n,) ‖Σ_c α_ic v_ic‖² / ‖u_i‖².
    """

    alpha: Tensor
    expressed: Tensor

    @classmethod
    def of(cls, u: Tensor, stored: Tensor) -> Functionals:
        """Express gradients u (n, t, s) in stored cotangents (n, c, t', s'), by least squares for every example."""
        t, s = (max(a, b) for a, b in zip(u.shape[1:], stored.shape[2:], strict=True))
        u = torch.nn.functional.pad(u, (0, s - u.shape[2], 0, t - u.shape[1])).flatten(1).double()
        V = torch.nn.functional.pad(stored, (0, s - stored.shape[3], 0, t - stored.shape[2])).flatten(2).double()
        K = V @ V.mT
        values, U = torch.linalg.eigh(K)
        kept = values > values[:, -1:].clamp_min(torch.finfo(torch.float64).tiny) * _RANK
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
        coordinates = (U.mT @ (V @ u[..., None]))[..., 0]
        alpha = (U @ (inverse * coordinates)[..., None])[..., 0]
        expressed = (inverse * coordinates.square()).sum(1) / u.square().sum(1).clamp_min(_TINY)
        return cls(alpha, expressed.clamp(0, 1))

    def targets(self, changes: Tensor) -> Tensor:
        """T (n, c): the changes of the rows for changes (n,) of the log-odds, at the least KL."""
        size = self.alpha.square().sum(1, keepdim=True)
        return torch.where(size > 0, self.alpha * changes[:, None] / size.clamp_min(_TINY), 0.0)

    def share(self, changes: Tensor) -> float:
        """The share of the wanted changes (n,), squared, that stored rows express."""
        weights = changes.square()
        return float((weights * self.expressed).sum() / weights.sum().clamp_min(_TINY))

    def read(self, moved: Tensor) -> Tensor:
        """The changes (n,) of the log-odds if rows change by (n, c)."""
        return (self.alpha * moved).sum(1)


def warn_of_share(share: float) -> None:
    """Warn if the rows express less than half of the wanted change."""
    if share < _EXPRESSIBLE:
        logger.warning(
            "the stored rows express %.0f%% of the wanted change: the outcome's gradient lies mostly outside them. "
            "Compute PEFs with a larger rank, or choose outcomes that the model finds likelier",
            100 * share,
        )


@dataclass(frozen=True)
class Solution:
    """The solution of a ridge regression.

    Attributes:
        y: (m,) the solution in the coordinates of the space.
        moved: (n, c) the changes of the rows.
        info: ridge, effective rank, cross-validated error.
    """

    y: Tensor
    moved: Tensor
    info: dict[str, Any]


def solve(space: RowSpace, targets: Tensor, kept: Tensor | None, ridge: Ridge) -> Solution:
    """The weight change that moves rows by targets and leaves others alone.

    Args:
        space: the space of the rows.
        targets: t (n, c).
        kept: (n', c', m), the coordinates of other data's rows that should not move, or None.
        ridge: λ over the largest eigenvalue of XᵀX + X_keepᵀX_keep, or "auto".

    Raises:
        ValueError: if all targets are 0.
    """
    X = space.rows
    t = targets.to(X)
    if not bool(t.any()):
        raise ValueError(
            "there is nothing to change: the wanted changes are 0, or the outcome's gradient lies outside the stored "
            "rows"
        )
    b = torch.einsum("ncm,nc->m", X, t)
    M = gram(X) if kept is None else gram(X) + gram(kept)
    top = top_eigenvalue(M)
    chosen = choose_ridge(ridge, lambda: _held_out_errors(X, t, kept, top), min)
    shift = chosen.share * top
    y = solve_shifted(M, b, shift)
    info: dict[str, Any] = {**chosen.info(), "effective_rank": effective_rank(M, shift), **space.info()}
    return Solution(y, torch.einsum("ncm,m->nc", X, y), info)


def _held_out_errors(X: Tensor, t: Tensor, kept: Tensor | None, top: float) -> dict[float, float]:
    """{ridge: Σ‖A_i δ − t_i‖² over Σ‖t_i‖², for δ made without the example's fold}; 1 means no improvement."""
    folds = min(FOLDS, len(X))
    if folds < 2:
        raise ValueError(
            "ridge='auto' needs to hold examples out, but there is only one; set ridge= to a number such as 0.01"
        )
    wanted = t.abs().sum(1) > 0
    fold_of = folds_of(wanted, folds)
    fold_of = torch.where(wanted, fold_of, folds_of(~wanted, folds))
    grams = fold_grams(X, fold_of, folds)
    out = fold_of[:, None] == torch.arange(folds, device=X.device)
    b = torch.einsum("ncm,nfc->fm", X, t[:, None] * (~out).to(X)[..., None])
    kept_fold = None
    if kept is not None:
        kept_fold = folds_of(torch.ones(len(kept), dtype=torch.bool, device=X.device), folds)
        grams += fold_grams(kept, kept_fold, folds)
    left = grams.sum(0) - grams
    solutions = torch.stack([solve_shifted(left, b, share * top) for share in RIDGES], -1)  # (folds, m, ridges)
    missed = torch.zeros(len(RIDGES), dtype=torch.float64)
    for f, Y in enumerate(solutions):
        missed += (X[out[:, f]] @ Y - t[out[:, f]][..., None]).square().sum((0, 1)).cpu()
        if kept is not None and kept_fold is not None:
            missed += (kept[kept_fold == f] @ Y).square().sum((0, 1)).cpu()
    return dict(zip(RIDGES, (missed / float(t.square().sum())).tolist(), strict=True))


class NoStepError(ValueError):
    """No step along a change does what was predicted and nothing else."""


@dataclass(frozen=True)
class Shown:
    """What the model shows at a step.

    Attributes:
        changes: (n,) the changes of the log-odds.
        reach: the KL of what should move and of what should not.
    """

    changes: Tensor
    reach: Reach


@dataclass(frozen=True)
class Length:
    """The length of a step that was kept.

    Attributes:
        step: the share of the solution.
        errors: {step: error} of the steps that were tried.
        disturbing: the step that was refused because of what it moves beside the wanted changes; None if there is none.
    """

    step: float
    errors: dict[str, float]
    disturbing: float | None = None


def largest_step(
    wanted: Wanted, predicted: Tensor, shown_at: Callable[[float], Shown], ridge: float | None = None
) -> Length:
    """The largest of a quarter, a half and the whole that does what was predicted and no more, tried on the model.

    Args:
        wanted: the groups in which changes are judged.
        predicted: (n,) the predicted changes of the whole step.
        shown_at: a step → what the model shows.
        ridge: the ridge with which the step was solved, for the error message.

    Raises:
        NoStepError: if no step does.
    """
    errors: dict[str, float] = {}
    best = disturbing = None
    why = ""
    for step in STEPS:
        shown = shown_at(step)
        error = errors[f"{step:g}"] = wanted.error(shown.changes, step * predicted)
        if error > AS_PREDICTED:
            why = f"does what was predicted: even a quarter of the step differs from its prediction by {error:.0%}"
            break
        if shown.reach.disturbs:
            disturbing = step
            why = (
                "leaves alone what should stay the same: even at a quarter of the step the mean KL of "
                f"{'other predictions' if shown.reach.limited else 'other examples'} is {shown.reach.kept:.2g} nats, "
                f"and that of the outcomes that should change is {shown.reach.moved:.2g}"
            )
            break
        best = step
    if best is None:
        raised = "" if ridge is None else f", which was {ridge:.1g}, for instance to {10 * ridge:.1g}"
        raise NoStepError(
            f"no step {why}. Raise ridge{raised}, ask for smaller changes, or compute PEFs whose rows express more of "
            "the outcome (a larger rank)"
        )
    return Length(best, errors, disturbing)
