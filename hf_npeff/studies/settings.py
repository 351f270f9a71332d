"""Settings of the studies: frozen dataclasses, from which the command line takes its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from hf_npeff.config import Balance

METHODS = ("npeff", "gradient_clustering", "sae", "kmeans", "nmf", "random")


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is.

    Attributes:
        queries: prompts of a relation; there are eight relations.
        rank: rows kept per example.
        components: components of the decomposition.
        seed: seed of prompts, sketch and starts.
    """

    queries: int = 28
    rank: int = 8
    components: int = 14
    seed: int = 0


@dataclass(frozen=True)
class ComparisonConfig:
    """How the methods are fitted.

    Attributes:
        n_components: the number of components of every method: components, clusters, features.
        methods: which methods, of npeff, gradient_clustering, sae, kmeans, nmf and random; all by default.
        power: the power of NPEFF's PEFs; see DecompositionConfig.
        balance: the balance of NPEFF's modules; see DecompositionConfig.
        n_restarts: the number of restarts of NPEFF, of k-means, and of gradient clustering, alike.
        sae_expansion: further rows for autoencoders with this many times as many features; 1 for none.
        sae_k: features of an example that TopK keeps.
        sae_kind: "topk" or "l1".
        sae_l1: weight of the L1 penalty.
        sae_steps: the number of steps of the autoencoder's training.
        layer: whose output the activation methods read; negative numbers count from the end.
        position: "first", "last", or "auto": first for encoders with a classifier, else last.
        seeds: fits of every method, with other seeds, for the stability; 1 for none.
        batch_size: how many examples a forward pass takes.
        seed: the seed of everything random.

    Raises:
        ValueError: if a setting is out of its range.
    """

    n_components: int = 16
    methods: str | tuple[str, ...] | None = None
    power: float = 1.0
    balance: Balance = "none"
    n_restarts: int = 8
    sae_expansion: int = 8
    sae_k: int = 4
    sae_kind: Literal["topk", "l1"] = "topk"
    sae_l1: float = 0.05
    sae_steps: int = 1500
    layer: int = -1
    position: Literal["auto", "first", "last"] = "auto"
    seeds: int = 2
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.wanted) - set(METHODS)):
            raise ValueError(f"there are no methods {unknown}; there are {', '.join(METHODS)}")
        if not self.wanted or min(self.n_components, self.n_restarts, self.seeds, self.sae_expansion) < 1:
            raise ValueError("n_components, n_restarts, seeds and sae_expansion must be at least 1, with some method")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The methods, in the table's order."""
        named = (self.methods,) if isinstance(self.methods, str) else self.methods
        return METHODS if named is None else tuple(named)


@dataclass(frozen=True)
class FactorsConfig:
    """How annotated attributes are measured.

    Attributes:
        found_at: the AUROC, on the other half, from which an attribute counts as found.
        top: examples of a component whose purity is taken.
        min_count: examples that have, and that lack, an attribute in each half, at least.
        at_least: measure only examples with at least so many attributes.
        seed: the seed of the halves.

    Raises:
        ValueError: if a setting is out of its range.
    """

    found_at: float = 0.9
    top: int = 10
    min_count: int = 5
    at_least: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.found_at <= 1 or self.top < 1 or self.min_count < 1 or self.at_least < 0:
            raise ValueError("found_at must be in [0.5, 1], top and min_count at least 1, at_least at least 0")


@dataclass(frozen=True)
class SelectivityConfig:
    """How selectivity is measured.

    Attributes:
        target_kl: mean KL on the attribute's examples, in nats, that every method is brought to.
        n_top: examples that have the attribute.
        n_others: examples that lack it.
        max_attributes: the most attributes, those with the most examples first.
        batch_size: how many examples a forward pass takes.
        seed: the seed of the examples drawn.

    Raises:
        ValueError: if a setting is out of its range.
    """

    target_kl: float = 0.3
    n_top: int = 16
    n_others: int = 48
    max_attributes: int = 8
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target_kl < math.inf:
            raise ValueError(f"target_kl must be a positive number, but it is {self.target_kl!r}")
        if min(self.n_top, self.n_others, self.max_attributes, self.batch_size) < 1:
            raise ValueError("n_top, n_others, max_attributes and batch_size must be at least 1")


@dataclass(frozen=True)
class PlantedConfig:
    """A task with planted heuristics.

    Attributes:
        cues: the number of cues; cue i serves label i mod `labels`.
        labels: the number of labels, each yes or no.
        fillers: words that mean nothing.
        length: words of a sentence.
        most: cues of a sentence, at most.
        likely: probability of a label where one of its cues is present.
        unlikely: probability of a label where none of its cues is present.
        n_train: sentences to train on.
        n: sentences to analyse.
        steps: the number of steps of training.
        hidden: width of the model, of two layers.
        seed: the seed of the data and the model.

    Raises:
        ValueError: if a setting is out of its range.
    """

    cues: int = 12
    labels: int = 6
    fillers: int = 40
    length: int = 10
    most: int = 4
    likely: float = 0.8
    unlikely: float = 0.02
    n_train: int = 8000
    n: int = 600
    steps: int = 800
    hidden: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.labels <= self.cues or not 1 <= self.most <= min(self.cues, self.length):
            raise ValueError("expected labels ≤ cues, and most between 1 and the smaller of cues and length")
        if not 0 < self.unlikely < self.likely < 1:
            raise ValueError("expected 0 < unlikely < likely < 1: a certain label has no Fisher")
        if min(self.fillers, self.n_train, self.n, self.steps, self.hidden) < 1:
            raise ValueError("fillers, n_train, n, steps and hidden must be at least 1")


@dataclass(frozen=True)
class RatingsConfig:
    """What raters are shown.

    Attributes:
        features: the number of features of every method, drawn at random.
        shown: top examples that show the theme.
        members: further top examples, to be picked.
        distractors: examples of the lower half, not to be picked.
        seed: the seed of everything drawn, and of the order.

    Raises:
        ValueError: if a number is out of range.
    """

    features: int = 8
    shown: int = 6
    members: int = 3
    distractors: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.features, self.shown, self.members, self.distractors) < 1:
            raise ValueError("features, shown, members and distractors must be at least 1")


@dataclass(frozen=True)
class InContextConfig:
    """What is asked, and how it is decomposed.

    Attributes:
        queries: the number of prompts of every relation.
        shots: numbers of demonstrations, rising.
        shuffled: whether every condition comes again with shuffled answers.
        n_components: the number of components of the decomposition of all prompts together.
        power: the power of the PEFs; see DecompositionConfig.
        n_restarts: the number of restarts of the decomposition.
        batch_size: prompts of a forward pass.
        seed: the seed of everything drawn.

    Raises:
        ValueError: if a setting is out of its range.
    """

    queries: int = 5
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    shuffled: bool = True
    n_components: int = 14
    power: float = 0.5
    n_restarts: int = 8
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        given: Any = self.shots
        shots = [given] if isinstance(given, int) else list(given)
        if shots != sorted(set(shots)) or len(shots) < 2 or min(shots) < 0:
            raise ValueError(f"shots must be two or more rising numbers of at least 0, but they are {self.shots}")
        if min(self.queries, self.n_components, self.n_restarts, self.batch_size) < 1:
            raise ValueError("queries, n_components, n_restarts and batch_size must be at least 1")


@dataclass(frozen=True)
class MechanismsConfig:
    """Toy models whose mechanisms are known, and how they are decomposed.

    Attributes:
        toys: features and hidden numbers of each toy model of superposition, as "5-2"; 5-2 and 40-10 by default.
        probability: probability that a feature is there, in training and in the examples.
        steps: the number of steps of training.
        batch_size: examples of a step.
        learning_rate: the first learning rate; it falls to 0.
        n: examples to analyse, none of them all zero.
        n_restarts: the number of restarts of the decomposition.
        seeds: toys of every size, with the seeds 0, 1, ….

    Raises:
        ValueError: if a setting is out of its range.
    """

    toys: str | tuple[str, ...] | None = None
    probability: float = 0.05
    steps: int = 4000
    batch_size: int = 1024
    learning_rate: float = 5e-3
    n: int = 1000
    n_restarts: int = 8
    seeds: int = 5

    def __post_init__(self) -> None:
        for features, hidden in self.sizes:
            if not 1 <= hidden < features:
                raise ValueError(f"a toy of {features} features needs 1 to {features - 1} hidden numbers, not {hidden}")
        if not 0 < self.probability <= 1 or self.learning_rate <= 0:
            raise ValueError("probability must be in (0, 1], and learning_rate positive")
        if min(self.steps, self.batch_size, self.n, self.n_restarts, self.seeds) < 1:
            raise ValueError("steps, batch_size, n, n_restarts and seeds must be at least 1")

    @property
    def names(self) -> tuple[str, ...]:
        """The toys, in the table's order."""
        given = ("5-2", "40-10") if self.toys is None else self.toys
        return (given,) if isinstance(given, str) else tuple(given)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(features, hidden numbers) of every toy.

        Raises:
            ValueError: if there are none, or one is not written as "5-2".
        """
        parts = [name.split("-") for name in self.names]
        if not parts or any(len(p) != 2 or not all(x.isdecimal() for x in p) for p in parts):
            raise ValueError(f"toys must be written as features-hidden, as '5-2', but they are {self.toys!r}")
        return [(int(a), int(b)) for a, b in parts]
