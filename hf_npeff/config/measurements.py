"""Settings of calls that measure: what a weight change does, what examples have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_npeff.config.checks import check_choice, check_integer, check_positive, check_scale, is_count
from hf_npeff.config.choices import BATCH_SIZE, Quantisation


@dataclass(frozen=True)
class PerturbationRequest:
    """How a direction is measured.

    These are arguments of `NPEFFAnalyzer.evaluate_direction`.

    Attributes:
        target_kl: the mean KL on the component's top examples, in nats, that the step has to reach, for each sign.
        scale: use this step instead of searching for one that reaches `target_kl`.
        n_top: how many of the component's top examples to measure.
        n_others: how many other examples to measure, drawn from those on which the component is not active.
        batch_size: how many examples a forward pass takes.
        seed: seed for drawing the other examples, the random direction, the search and the bootstrap.
        search_rounds: rounds of a search for inputs that the step moves although they are not the component's. The
            search starts from the most moved of the others and replaces tokens in them. 0 makes no search.

    Raises:
        ValueError: if a setting is out of its range.
    """

    target_kl: float = 0.5
    scale: float | None = None
    n_top: int = 16
    n_others: int = 64
    batch_size: int = BATCH_SIZE
    seed: int = 0
    search_rounds: int = 0

    def __post_init__(self) -> None:
        check_integer("search_rounds", self.search_rounds, 0)
        if min(self.n_top, self.n_others, self.batch_size) < 1:
            raise ValueError(
                "n_top, n_others and batch_size must be at least 1, but they are "
                f"{self.n_top}, {self.n_others} and {self.batch_size}"
            )
        check_positive("target_kl", self.target_kl)
        if self.scale is not None:
            check_scale(self.scale)


@dataclass(frozen=True)
class MeasureRequest:
    """How a weight change is measured on any data.

    These are arguments of `NPEFFAnalyzer.measure`.

    Attributes:
        scales: steps along the change; 1 applies an adapter or an edit as it is.
        ranks: ranks to which every weight's change is truncated; None leaves the change as it is.
        by: a column; examples with the same value in it are measured as a group, beside all examples.
        both_signs: measure the opposite sign of every scale too.
        random: measure a random change of equal norm at every scale too.
        quantise: number formats of 8 and 4 bits, "int8", "Q8_0", "Q4_0" and "nf4", to which the base model is rounded.
            The change is then measured as an adapter beside the rounded model, and merged into it before rounding.
        worst: how many of the most changed examples of every group are named.
        batch_size: how many examples a forward pass takes.
        seed: seed for the random change and the bootstrap.

    Raises:
        ValueError: if a setting is out of its range.
    """

    scales: tuple[float, ...] = (1.0,)
    ranks: tuple[int | None, ...] = (None,)
    by: str | None = None
    both_signs: bool = False
    random: bool = True
    quantise: tuple[Quantisation, ...] = ()
    worst: int = 5
    batch_size: int = BATCH_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        for scheme in self.quantise:
            check_choice("quantise", scheme, Quantisation)
        if not self.scales or not self.ranks:
            raise ValueError(f"scales and ranks must not be empty, but they are {self.scales} and {self.ranks}")
        for scale in self.scales:
            check_scale(scale)
        for rank in self.ranks:
            if rank is not None and not is_count(rank):
                raise ValueError(f"ranks must be positive whole numbers or None, but one is {rank!r}")
        if self.batch_size < 1 or self.worst < 0:
            raise ValueError(
                f"batch_size must be at least 1 and worst at least 0, but they are {self.batch_size} and {self.worst}"
            )

    @property
    def steps(self) -> list[float]:
        """The scales, with the opposite signs if they are asked for; each once, in order."""
        signed = [s for scale in self.scales for s in ((scale, -scale) if self.both_signs else (scale,))]
        return list(dict.fromkeys(map(float, signed)))


@dataclass(frozen=True)
class OffTargetRequest:
    """How to search for inputs that a change moves although it was not meant for them.

    These are arguments of `NPEFFAnalyzer.off_target`.

    Attributes:
        scale: the step along the change; 1 applies an adapter or an edit as it is.
        worst: how many of the most moved inputs of the pool are named.
        rounds: rounds of the search for worse inputs, which replaces tokens; 0 only measures the pool.
        starts: how many inputs of the pool the search starts from, the most moved ones.
        candidates: how many inputs a round tries for each of these.
        batch_size: how many examples a forward pass takes.
        seed: seed of the search.

    Raises:
        ValueError: if a setting is out of its range.
    """

    scale: float = 1.0
    worst: int = 5
    rounds: int = 8
    starts: int = 4
    candidates: int = 16
    batch_size: int = BATCH_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        for name in ("worst", "starts", "candidates", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        check_integer("rounds", self.rounds, 0)


@dataclass(frozen=True)
class AssociationRequest:
    """How to search for associations.

    These are arguments of `Decomposition.associations`.

    Attributes:
        top: how many associations of each component are kept, the most certain ones.
        level: the largest corrected p-value at which an association counts.
        shuffles: how often the examples are shuffled; the smallest corrected p-value is 1 / (shuffles + 1).
        max_examples: if there are more examples than this, a random sample of this size is used.
        seed: seed for the shuffles and the sample.

    Raises:
        ValueError: if a setting is out of its range.
    """

    top: int = 10
    level: float = 0.05
    shuffles: int = 100
    max_examples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.top, self.shuffles, self.max_examples) < 1:
            raise ValueError("top, shuffles and max_examples must be at least 1")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be between 0 and 1, but it is {self.level!r}")
        if 1 / (self.shuffles + 1) > self.level:
            raise ValueError(
                f"with shuffles={self.shuffles} corrected p-values are at least {1 / (self.shuffles + 1):.3g}, so none "
                f"reaches level={self.level:g}; use at least {math.ceil(1 / self.level) - 1} shuffles"
            )


@dataclass(frozen=True)
class ChangeRequest:
    """How a change is explained.

    These are arguments of `NPEFFAnalyzer.explain_change`.

    Attributes:
        steps: which parts of the change are measured on the way from before to after, such as 0.5; 1 is always added.
        by: a column; the curve has a line for the examples with each of its values.
        take_out: how many components are taken out of the change, one at a time; the most changed ones.
        growth: whether PEFs are computed after the change, to see which components grew, shrank, appeared or vanished.
        n_new: how many components are added for what the others do not explain after the change; needs `growth`.
        examples: how many examples are listed as most changed, and as changed and unexplained.
        draws: how many random changes a component's KL is compared with.
        batch_size: how many examples a forward pass takes.
        seed: seed for the random changes and the bootstrap.
        check_weights: raise an error if the decomposition, the PEFs or the change were made with other weights than the
            model has now.

    Raises:
        ValueError: if a setting is out of its range.
    """

    steps: tuple[float, ...] = (0.25, 0.5, 0.75)
    by: str | None = None
    take_out: int = 1
    growth: bool = True
    n_new: int = 1
    examples: int = 20
    draws: int = 200
    batch_size: int = BATCH_SIZE
    seed: int = 0
    check_weights: bool = True

    def __post_init__(self) -> None:
        for step in self.steps:
            check_scale(step)
        for name, least in (("take_out", 0), ("n_new", 0), ("examples", 0), ("draws", 20), ("batch_size", 1)):
            check_integer(name, getattr(self, name), least)

    @property
    def scales(self) -> list[float]:
        """The steps in ascending order, each once, with 1 among them."""
        return sorted({*map(float, self.steps), 1.0})
