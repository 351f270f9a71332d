"""Settings of the studies, as frozen dataclasses. The command line takes its options from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from hf_npeff.config import Balance

METHODS = ("npeff", "gradient_clustering", "sae", "kmeans", "nmf", "random")
"""Those of every comparison, if nothing else is asked for."""
RIVALS = ("line_clusters", "gradient_atoms", "gradient_autoencoder", "pef_dictionary", "pef_nmf")
"""Further methods on the same rows; see baselines/row_dictionaries.py."""


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is.

    Attributes:
        queries: the number of prompts for each of the eight relations.
        rank: the number of rows kept for each example.
        components: the number of components of the decomposition.
        seed: the seed of prompts, sketch and starts.
    """

    queries: int = 28
    rank: int = 8
    components: int = 14
    seed: int = 0


@dataclass(frozen=True)
class ComparisonConfig:
    """How the methods are fitted.

    Attributes:
        n_components: the number of components, clusters or features of every method.
        methods: which methods to fit. None fits npeff, gradient_clustering, sae, kmeans, nmf and random; there are also
            line_clusters, gradient_atoms, gradient_autoencoder, pef_dictionary and pef_nmf.
        power: the power γ of NPEFF's PEFs, as in DecompositionConfig.
        balance: how NPEFF balances modules, as in DecompositionConfig.
        n_restarts: the number of restarts of NPEFF, of k-means and of gradient clustering.
        sae_expansion: also fit an autoencoder with this many times as many features; 1 fits no other.
        sae_k: how many features of each example a TopK autoencoder keeps.
        sae_kind: the kind of autoencoder, "topk" or "l1".
        sae_l1: the weight of an l1 autoencoder's penalty.
        sae_steps: the number of training steps of an autoencoder.
        layer: the layer whose output the activation methods read; negative numbers count from the end.
        position: the token at which activations are read: "first", "last", or "auto", which is the first for encoders
            with a classifier and the last for all other models.
        seeds: how many fits of every method, each with another seed, for the stability; 1 measures no stability.
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
        if unknown := sorted(set(self.wanted) - {*METHODS, *RIVALS}):
            raise ValueError(f"the methods {unknown} do not exist; the methods are {', '.join((*METHODS, *RIVALS))}")
        if not self.wanted or min(self.n_components, self.n_restarts, self.seeds, self.sae_expansion) < 1:
            raise ValueError(
                "n_components, n_restarts, seeds and sae_expansion must be at least 1, and there must be a method"
            )

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names of the methods, in the order of the tables."""
        named = (self.methods,) if isinstance(self.methods, str) else self.methods
        return METHODS if named is None else tuple(named)


@dataclass(frozen=True)
class FactorsConfig:
    """How annotated attributes are measured.

    Attributes:
        found_at: an attribute counts as found if its AUROC on the other half is at least this.
        top: the purity of a feature is measured on this many top examples.
        min_count: an attribute is measured only if, in each half, at least so many examples have it and lack it.
        at_least: measure only examples with at least so many attributes.
        seed: the seed that divides the examples into halves.

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
        target_kl: the mean KL on the attribute's examples, in nats, to which every method's step is scaled.
        n_top: how many examples that have the attribute.
        n_others: how many examples that lack the attribute.
        max_attributes: the most attributes to measure; those with the most examples come first.
        batch_size: how many examples a forward pass takes.
        seed: the seed for drawing examples.

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

    @property
    def for_signs(self) -> SelectivityConfig:
        """The same with half as many examples: on so many the better sign of a direction is chosen."""
        return replace(self, n_top=-(-self.n_top // 2), n_others=-(-self.n_others // 2))


@dataclass(frozen=True)
class PlantedConfig:
    """A task with planted heuristics.

    Attributes:
        cues: the number of cues; cue i serves label i mod `labels`.
        labels: the number of yes-or-no labels.
        fillers: the number of filler words, which do not affect labels.
        length: the number of words of a sentence.
        most: the most cues of a sentence.
        likely: the probability of a label if one of its cues is present.
        unlikely: the probability of a label if none of its cues is present.
        n_train: the number of sentences to train on.
        n: the number of sentences to analyse.
        steps: the number of training steps.
        hidden: the width of the model, which has two layers.
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
            raise ValueError("expected 0 < unlikely < likely < 1, because the Fisher of a certain label is zero")
        if min(self.fillers, self.n_train, self.n, self.steps, self.hidden) < 1:
            raise ValueError("fillers, n_train, n, steps and hidden must be at least 1")


@dataclass(frozen=True)
class RatingsConfig:
    """What raters are shown.

    Attributes:
        features: the number of features of every method, drawn at random.
        shown: how many top examples show the theme.
        members: how many more top examples there are to pick.
        distractors: how many examples from the lower half are mixed with them.
        seed: the seed for drawing features and examples, and for their order.

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
    """The prompts of in-context learning, and how they are decomposed.

    Attributes:
        queries: the number of prompts of every relation.
        shots: the numbers of demonstrations, in rising order.
        shuffled: whether every condition is repeated with shuffled answers.
        n_components: the number of components of the decomposition of all prompts together.
        power: the power γ of the PEFs, as in DecompositionConfig.
        n_restarts: the number of restarts of the decomposition.
        batch_size: how many prompts a forward pass takes.
        seed: the seed of everything random.

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
            raise ValueError(
                f"shots must be two or more numbers of at least 0 in rising order, but they are {self.shots}"
            )
        if min(self.queries, self.n_components, self.n_restarts, self.batch_size) < 1:
            raise ValueError("queries, n_components, n_restarts and batch_size must be at least 1")


@dataclass(frozen=True)
class MechanismsConfig:
    """Toy models whose mechanisms are known, and how they are decomposed.

    Attributes:
        toys: sizes of the toy models of superposition, as features-dimensions: "5-2" has 5 features in 2 dimensions.
            None uses 5-2 and 40-10.
        probability: the probability that a feature is present, in training and in the examples.
        steps: the number of training steps.
        batch_size: how many examples a training step takes.
        learning_rate: the initial learning rate, which falls to 0.
        n: the number of examples to analyse; examples that are all zero are not used.
        n_restarts: the number of restarts of the decomposition.
        seeds: how many toys of each size; their seeds are 0, 1, ….
        induction_steps: the number of training steps of the language model that repeats; 0 leaves this model out.
        induction_n: how many of its sequences are analysed.
        induction_seeds: how many of these models; their seeds are 0, 1, ….

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
    induction_steps: int = 600
    induction_n: int = 300
    induction_seeds: int = 3

    def __post_init__(self) -> None:
        if self.induction_steps < 0 or self.induction_n < 2 or self.induction_seeds < 1:
            raise ValueError("induction_steps must be at least 0, induction_n at least 2, induction_seeds at least 1")
        for features, hidden in self.sizes:
            if not 1 <= hidden < features:
                raise ValueError(f"a toy of {features} features needs 1 to {features - 1} dimensions, not {hidden}")
        if not 0 < self.probability <= 1 or self.learning_rate <= 0:
            raise ValueError("probability must be in (0, 1], and learning_rate positive")
        if min(self.steps, self.batch_size, self.n, self.n_restarts, self.seeds) < 1:
            raise ValueError("steps, batch_size, n, n_restarts and seeds must be at least 1")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the toys, in the order of the tables."""
        given = ("5-2", "40-10") if self.toys is None else self.toys
        return (given,) if isinstance(given, str) else tuple(given)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(features, dimensions) of every toy.

        Raises:
            ValueError: if there are no toys, or one is not written as "5-2".
        """
        parts = [name.split("-") for name in self.names]
        if not parts or any(len(p) != 2 or not all(x.isdecimal() for x in p) for p in parts):
            raise ValueError(f"toys must be written as features-dimensions, such as '5-2', but they are {self.toys!r}")
        return [(int(a), int(b)) for a, b in parts]
