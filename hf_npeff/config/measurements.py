"""Settings of one call that measures: what a weight change does, what examples have in common."""

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
        target_kl: mean KL on the top examples, in nats, that each sign's step is to reach.
        scale: the step itself, instead of one that reaches `target_kl`.
        n_top: top examples to measure.
        n_others: others to measure, drawn from the examples on which the component is not active.
        batch_size: examples of a forward pass.
        seed: seed of the drawing of others, the random direction, the search and the bootstrap.
        search_rounds: rounds of a search for inputs that the best step moves although they are not the component's:
            the most moved of the others, with other tokens in them. 0 searches for none.

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
        scales: steps along the change; 1 for an adapter or an edit as it is.
        ranks: what every weight's change is cut to; None is the change as it is.
        by: a column whose values make groups, beside that of all examples.
        both_signs: measure every scale backwards too.
        random: measure a random change of equal norm at every size.
        quantise: grids of 8 and 4 bits, "int8", "Q8_0", "Q4_0" and "nf4", to which the base model is rounded: the
            change is then measured as an adapter beside it, and merged into it before it is rounded.
        worst: how many of the most changed examples of every group are named.
        batch_size: examples of a forward pass.
        seed: seed of the random change and of the bootstrap.

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
        """The scales, with the opposite signs where those are asked for; each once, in order."""
        signed = [s for scale in self.scales for s in ((scale, -scale) if self.both_signs else (scale,))]
        return list(dict.fromkeys(map(float, signed)))


@dataclass(frozen=True)
class OffTargetRequest:
    """How inputs are looked for that a change moves although it was not meant for them.

    These are arguments of `NPEFFAnalyzer.off_target`.

    Attributes:
        scale: the step along the change; 1 for an adapter or an edit as it is.
        worst: how many of the most moved inputs of the pool are named.
        rounds: rounds of the search for worse inputs by other tokens; 0 measures the pool alone.
        starts: inputs of the pool that the search begins with, the most moved ones.
        candidates: inputs that are tried in a round, for each that it began with.
        batch_size: examples of a forward pass.
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
    """How associations are looked for.

    These are arguments of `Decomposition.associations`.

    Attributes:
        top: associations of a component that are kept, the most certain ones.
        level: corrected p-value up to which an association counts.
        shuffles: how often the examples are shuffled; the smallest corrected p-value is 1 / (shuffles + 1).
        max_examples: if there are more examples, so many are drawn at random.
        seed: the seed of the shuffles and the drawing.

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
        steps: parts of the change at which the way from before to after is measured; 1 is always among them.
        by: a column whose values make groups of the curve.
        take_out: components that are taken out of the change one at a time, the most changed ones.
        growth: whether PEFs are computed after the change, to see which components grew, shrank, appeared or vanished.
        n_new: components that are added for what the others do not explain after the change; needs `growth`.
        examples: how many examples are listed as most changed, and as changed and unexplained.
        draws: random changes that a component's KL is compared with.
        batch_size: examples of a forward pass.
        seed: seed of the random changes and the bootstrap.
        check_weights: refuse a decomposition, PEFs or a change of other weights than the model has now.

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
        """The steps in order, each once, with 1."""
        return sorted({*map(float, self.steps), 1.0})
