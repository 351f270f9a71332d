"""Settings of calls that compute: PEFs, lifting, edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_npeff.config.checks import check_choice, check_integer, check_positive, check_ridge, is_count
from hf_npeff.config.choices import BATCH_SIZE, NO_OPTION, LiftForm, LiftMethod, OnError, Ridge, SparseSolver, Towards


@dataclass(frozen=True)
class ComputeRequest:
    """How the PEFs of a data set are computed.

    These are arguments of `NPEFFAnalyzer.compute_pefs`.

    Attributes:
        output_dir: the folder to which results are written as they are ready; None keeps everything in memory.
        batch_size: how many examples a batch has; "auto" halves it when memory runs out.
        shard_size: how many examples a shard has; every shard is a file.
        on_error: what happens to an example for which the model gives NaN or infinite numbers: "raise" stops,
            "skip" leaves the example out.
        check_weights: raise an error if the folder has PEFs that were made with other weights than the model has now.
        progress: show a progress bar.

    Raises:
        ValueError: if a setting is out of its range.
    """

    output_dir: Path | None = field(default=None, metadata=NO_OPTION)
    batch_size: int | Literal["auto"] = BATCH_SIZE
    shard_size: int = 1024
    on_error: OnError = "raise"
    check_weights: bool = True
    progress: bool = field(default=False, metadata=NO_OPTION)

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, OnError)
        if self.batch_size != "auto" and not is_count(self.batch_size):
            raise ValueError(f"batch_size must be a positive whole number or 'auto', but it is {self.batch_size!r}")
        if not is_count(self.shard_size):
            raise ValueError(f"shard_size must be a positive whole number, but it is {self.shard_size!r}")

    @property
    def skip(self) -> bool:
        """Whether to leave out examples for which the model gives NaN."""
        return self.on_error == "skip"

    def check_in_step(self) -> None:
        """Check the settings for a sharded model, of which all processes have to make the same number of passes.

        Raises:
            ValueError: if a setting lets one process make more passes than another.
        """
        apart = "would let one process of a sharded model make more passes than the others"
        if self.skip:
            raise ValueError(f"on_error='skip' {apart}; use on_error='raise'")
        if self.batch_size == "auto":
            raise ValueError(f"batch_size='auto' {apart}; give a whole number")


@dataclass(frozen=True)
class LiftRequest:
    """How a component is lifted to the weights.

    These are arguments of `NPEFFAnalyzer.lift`.

    Attributes:
        method: "exact" (one backward pass with the stored cotangents), "adjoint" (Pᵀg, noisy) or "compressed_sensing"
            (the sparse direction whose sketch is g).
        top_examples: lift from only this many examples, those with the largest coefficients; for the exact method.
        form: how a component of a balanced decomposition is read: "plain", the combination of unscaled rows, or
            "metric", that times D², which is steepest in the balanced metric and was more selective when measured.
            "auto" is "metric".
        semi_orthogonal: first subtract from g its projection on the components that are nearly orthogonal to it.
        solver: the solver for compressed sensing: iterative hard thresholding ("iht") or "fista".
        batch_size: how many examples a forward pass takes.
        check_weights: raise an error if the PEFs or the decomposition were made with other weights than the model has
            now.
        selective: use the direction (O + λI)⁻¹ g, which has the largest effect on the component's examples for a given
            effect on the examples on which the component is not active; O is the mean of the latter's PEFs, with raw
            norms. False uses the component's own direction. None is selective if there are examples to leave alone and
            no other setting rules it out (adjoint, compressed sensing, top_examples, semi_orthogonal).
        ridge: λ of a selective direction, as a share of the largest eigenvalue of O; "auto" chooses it by
            cross-validation over the examples, in the sketch.
        keep: PEFs of other data that a selective direction should leave alone too; they need the same sketch and
            weights.
        memory_budget: bytes that may be used to solve for a selective direction. If the span of all rows needs more,
            only its leading part is used. None sets no limit.

    Raises:
        ValueError: if a setting is out of its range.
    """

    method: LiftMethod = "exact"
    top_examples: int | None = None
    form: LiftForm = "auto"
    semi_orthogonal: bool = False
    solver: SparseSolver = "iht"
    batch_size: int = BATCH_SIZE
    check_weights: bool = True
    selective: bool | None = None
    ridge: Ridge = "auto"
    keep: Any = field(default=None, metadata=NO_OPTION)
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, LiftMethod)
        check_choice("form", self.form, LiftForm)
        check_choice("solver", self.solver, SparseSolver)
        if self.top_examples is not None and self.top_examples < 1:
            raise ValueError(f"top_examples must be at least 1, but it is {self.top_examples}")
        if self.top_examples is not None and self.method != "exact":
            raise ValueError("top_examples is for method='exact' only; the other methods do not read examples")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but it is {self.batch_size}")
        check_ridge(self.ridge)
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(f"memory_budget must be at least 1 byte, but it is {self.memory_budget}")
        if self.selective and (self.method != "exact" or self.top_examples is not None):
            raise ValueError(
                "selective=True combines the rows of all examples; use it with method='exact' and without top_examples"
            )
        if not self.may_be_selective and (self.ridge != "auto" or self.keep is not None):
            raise ValueError("ridge and keep are for selective directions: use them with selective=True")

    @property
    def may_be_selective(self) -> bool:
        """Whether selective directions are asked for, or are left open (None) and no other setting rules them out."""
        plain = self.method != "exact" or self.top_examples is not None or self.semi_orthogonal
        return bool(self.selective) or (self.selective is None and not plain)


@dataclass(frozen=True)
class EditRequest:
    """How log-odds are moved by a weight change.

    These are arguments of `NPEFFAnalyzer.edit`.

    Attributes:
        change: {example id: nats by which the log-odds of its outcome should change}. For a regression, the amount by
            which the predicted number should change. All other examples should stay as they are.
        remove: instead of `change`, a column whose influence is taken out: for each of its values, the mean log-odds of
            the examples move to the mean of all examples.
        given: a column; `remove` compares only examples with the same value in it. None compares all examples.
        towards: the goal of `remove`. "mean" moves to the mean of all examples. "highest" leaves the examples of the
            value with the highest mean log-odds alone, and moves the others to their log-odds, rank by rank. With the
            label as the outcome, this is the value for which the model is right most, so the model learns to do the
            same everywhere.
        outcome: the outcome whose log-odds change: the number of a class, label, token or output; the name of a class;
            a text of one token; or a column that has one of these for every example. It may be left out if there is
            only one outcome, or two classes.
        keep: PEFs of other data that should be left alone too; they need the same sketch and weights.
        ridge: regularisation of the change, as a share of the largest eigenvalue of the rows' Gram matrix; more makes
            the change smaller and less exact. "auto" chooses the value with the least error on held-out examples, in
            the sketch.
        iterations: how often to solve. Each further iteration computes the rows at the new weights and solves for what
            is still missing. The PEFs in `keep` are not computed again.
        memory_budget: bytes that may be used to solve. If the span of all rows needs more, only its leading part is
            used. None sets no limit.
        batch_size: how many examples a forward pass takes.
        check_weights: raise an error if the PEFs were made with other weights than the model has now.

    Raises:
        ValueError: if a setting is out of its range.
    """

    change: Any = field(default=None, metadata=NO_OPTION)
    remove: str | None = None
    given: str | None = "label"
    towards: Towards = "mean"
    outcome: int | str | None = field(default=None, metadata=NO_OPTION)
    keep: Any = field(default=None, metadata=NO_OPTION)
    ridge: Ridge = "auto"
    iterations: int = 1
    memory_budget: int | None = None
    batch_size: int = BATCH_SIZE
    check_weights: bool = True

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        check_choice("towards", self.towards, Towards)
        if min(self.iterations, self.batch_size) < 1 or (self.memory_budget is not None and self.memory_budget < 1):
            raise ValueError(
                "iterations, batch_size and memory_budget must be at least 1, but they are "
                f"{self.iterations}, {self.batch_size} and {self.memory_budget}"
            )

    def check_goal(self) -> None:
        """Check that there is exactly one goal.

        Raises:
            ValueError: if not exactly one of `change` and `remove` is given.
        """
        if (self.change is None) == (self.remove is None):
            raise ValueError(
                "give either change={example id: nats} or remove=, the name of a column"
                + ("" if self.change is None else "; both were given")
            )


@dataclass(frozen=True)
class SpareRequest:
    """How to make a weight change that leaves the outputs of layers on some inputs alone.

    These are arguments of `NPEFFAnalyzer.spare`.

    Attributes:
        ridge: λ, the regularisation: λ times the diagonal of the inputs' second moments C = E[xxᵀ] is added to C.
        rank: the rank to which every weight's change is truncated, where that disturbs the spared inputs least; None
            does not truncate. For several changes, one rank for all or one for each.
        batch_size: how many examples a forward pass takes.

    Raises:
        ValueError: if a setting is out of its range.
    """

    ridge: float = 0.1  # measured: half and four times as much do about as well, docs/languages.md
    rank: int | Sequence[int | None] | None = None
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_positive("ridge", self.ridge)
        check_integer("batch_size", self.batch_size, 1)
        for rank in self.rank if isinstance(self.rank, Sequence) else (self.rank,):
            if rank is not None:
                check_integer("rank", rank, 1)

    def ranks(self, changes: int) -> list[int | None]:
        """The rank of each of several changes.

        Raises:
            ValueError: if there is more than one rank, but not one for each change.
        """
        if not isinstance(self.rank, Sequence):
            return [self.rank] * changes
        if len(self.rank) != changes:
            raise ValueError(f"there are {changes} changes and {len(self.rank)} ranks; give one rank, or one for each")
        return list(self.rank)
