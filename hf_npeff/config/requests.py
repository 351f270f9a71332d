"""Settings of one call that computes: PEFs, lifting, edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_npeff.config.checks import check_choice, check_integer, check_positive, check_ridge, is_count
from hf_npeff.config.choices import BATCH_SIZE, NO_OPTION, LiftForm, LiftMethod, OnError, Ridge, SparseSolver, Towards


@dataclass(frozen=True)
class ComputeRequest:
    """How the data set is gone through.

    These are arguments of `NPEFFAnalyzer.compute_pefs`.

    Attributes:
        output_dir: where shards are written as they are ready; None keeps everything in memory.
        batch_size: examples of a batch, or "auto" to halve it when memory runs out.
        shard_size: examples of a shard, which is a file.
        on_error: what happens to an example for which the model gives NaN or infinite numbers: "raise" stops there,
            "skip" leaves it out.
        check_weights: refuse to go on with PEFs of other weights than the model has now.
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
        """Whether examples for which the model gives NaN are left out."""
        return self.on_error == "skip"

    def check_in_step(self) -> None:
        """Refuse what lets one process do more passes than another: those of a sharded model do each one together.

        Raises:
            ValueError: if there is any of it.
        """
        apart = "would let the processes of a sharded model fall out of step"
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
        top_examples: lift from this many examples with the largest coefficients only; for the exact method.
        form: form of a balanced decomposition's directions: "plain", the combination of unscaled rows, or "metric",
            that times D², steepest in the balanced metric and the more selective by measurement; "auto" takes it.
        semi_orthogonal: first take out of g its projection on the components nearly orthogonal to it.
        solver: solver of compressed sensing: iterative hard thresholding ("iht") or "fista".
        batch_size: examples of a forward pass.
        check_weights: refuse PEFs and decompositions of other weights than the model has now.
        selective: take the direction (O + λI)⁻¹ g, which moves the component most for what it does to the examples on
            which it is not active; O is the mean of their PEFs, of raw norms. None does so where examples are left
            alone, and nothing else that is asked for rules it out (adjoint or compressed sensing, top_examples,
            semi_orthogonal); False gives the component's own direction.
        ridge: λ of a selective direction as a share of the largest eigenvalue of O; "auto" cross-validates it over the
            examples, in the sketch.
        keep: PEFs of other data, of the same sketch and weights, that a selective direction leaves alone too.
        memory_budget: bytes that may be used to solve for a selective direction; with less than the span of all rows
            needs, its leading part is used. None sets no bound.

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
            raise ValueError("top_examples goes with method='exact' only: the other methods read no example")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but it is {self.batch_size}")
        check_ridge(self.ridge)
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(f"memory_budget must be at least 1 byte, but it is {self.memory_budget}")
        if self.selective and (self.method != "exact" or self.top_examples is not None):
            raise ValueError(
                "selective=True combines the rows of all examples: it goes with method='exact' and without top_examples"
            )
        if not self.may_be_selective and (self.ridge != "auto" or self.keep is not None):
            raise ValueError("ridge and keep are for selective directions: use them with selective=True")

    @property
    def may_be_selective(self) -> bool:
        """Whether selective directions are asked for, or left open (None) and nothing else rules them out."""
        plain = self.method != "exact" or self.top_examples is not None or self.semi_orthogonal
        return bool(self.selective) or (self.selective is None and not plain)


@dataclass(frozen=True)
class EditRequest:
    """How log-odds are moved by a weight change.

    These are arguments of `NPEFFAnalyzer.edit`.

    Attributes:
        change: {example id: nats by which the log-odds of its outcome are to change}, or, of a regression, by how much
            the predicted number is; all other examples are to stay as they are.
        remove: column whose influence is to be taken out, instead: the mean log-odds of the examples with each of its
            values move to the mean of all, which stays.
        given: column within each value of which `remove` compares examples; None compares all.
        towards: where the log-odds move to. "mean": to the mean of all. "highest": the examples of the value with the
            highest mean log-odds stay, and those of the others get their log-odds, rank by rank. With the label as the
            outcome that is the value with which the model is right, so that what it does there is what it is to do
            everywhere.
        outcome: whose log-odds: the number of a class, label, token or output; the name of a class; a text of one
            token; or a column that holds one for every example. None where there is one only, or two classes.
        keep: PEFs of other data, of the same sketch and weights, that are to be left alone too.
        ridge: size of the change against what it misses, as a share of the largest eigenvalue of the rows' Gram matrix;
            "auto" takes the one of the least error on examples that are held out, in the sketch.
        iterations: how often to solve: again with rows computed at the new weights, for what is still missing. `keep`
            stays as it was computed.
        memory_budget: bytes that may be used to solve; with less than the span of all rows needs, its leading part is
            used. None sets no bound.
        batch_size: examples of a forward pass.
        check_weights: refuse PEFs of other weights than the model has now.

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
        """Refuse what does not say one thing that is to change.

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
    """How a weight change is made to leave what layers give on some inputs as it is.

    These are arguments of `NPEFFAnalyzer.spare`.

    Attributes:
        ridge: λ: how much of an input's own second moment is added to what the tokens show of all inputs together.
        rank: what every weight's change is cut to, losing the least of what counts there; None leaves it whole. One
            for all of several changes, or one each.
        batch_size: examples of a forward pass.

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
            ValueError: if there are as many ranks as something else.
        """
        if not isinstance(self.rank, Sequence):
            return [self.rank] * changes
        if len(self.rank) != changes:
            raise ValueError(f"there are {changes} changes and {len(self.rank)} ranks; give one rank, or one for each")
        return list(self.rank)
