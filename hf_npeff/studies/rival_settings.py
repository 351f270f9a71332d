"""Settings of the studies that fit every method to the same rows: minimal pairs and fair readings."""

from __future__ import annotations

from dataclasses import dataclass

PAIR_DATA = ("planted_cues", "word_relations", "home_assistant")


@dataclass(frozen=True)
class RivalsConfig:
    """How every method is fitted.

    The settings of Gradient Atoms and dictionary learning are near the best mean margin of both readings on seed 10 of
    the planted cues. No study measures that seed (`python -m tests.benchmarks.pair_settings planted_cues`).

    Attributes:
        n_components: the number of features of every method.
        n_restarts: the number of restarts of NPEFF, of k-means and of gradient clustering.
        layers: how many layers' hidden states are read; the layers are evenly spaced.
        sae_k: how many features of each example the autoencoder of hidden states keeps.
        gradient_k: how many features of each example the autoencoder of gradients keeps.
        sae_steps: the number of training steps of an autoencoder.
        atoms_alpha: the weight of the L1 penalty of Gradient Atoms.
        atoms_ridge: the ridge of Gradient Atoms' whitening, as a share of the mean eigenvalue.
        dictionary_alpha: the weight of the L1 penalty of dictionary learning on PEFs.
        batch_size: how many examples a forward pass takes.

    Raises:
        ValueError: if a setting is out of its range.
    """

    n_components: int = 16
    n_restarts: int = 4
    layers: int = 3
    sae_k: int = 4
    gradient_k: int = 4
    sae_steps: int = 500
    atoms_alpha: float = 0.03
    atoms_ridge: float = 1.0
    dictionary_alpha: float = 0.03
    batch_size: int = 32

    def __post_init__(self) -> None:
        counts = (self.n_components, self.n_restarts, self.layers, self.sae_k, self.gradient_k, self.sae_steps)
        if min(*counts, self.batch_size) < 1:
            raise ValueError("n_components, n_restarts, layers, sae_steps and other counts must be at least 1")
        if min(self.atoms_alpha, self.atoms_ridge, self.dictionary_alpha) <= 0:
            raise ValueError("atoms_alpha, atoms_ridge and dictionary_alpha must be positive")


@dataclass(frozen=True)
class MinimalPairsConfig(RivalsConfig):
    """Pairs of examples that differ in one factor.

    Attributes:
        data: which data sets to use: planted_cues, word_relations, home_assistant; None uses all.
        sentences: how many sentences with planted cues; each also comes without each of its cues in turn.
        words: how many words of each class of the word relations.
        per_attribute: the least number of pairs for each attribute of Home Assistant's sentences, if there are enough.
        steps: the number of fine-tuning steps on Home Assistant's sentences.
        rank: the number of rows kept for each example, c.
        seeds: how many seeds; data, models and fits are made for the seeds first_seed, first_seed + 1, ….
        first_seed: the first seed.
        untrained: also analyse a model with random weights, for seed first_seed.

    Raises:
        ValueError: if a setting is out of its range.
    """

    data: str | tuple[str, ...] | None = None
    sentences: int = 48
    words: int = 4
    per_attribute: int = 12
    steps: int = 120
    rank: int = 4
    seeds: int = 3
    first_seed: int = 0
    untrained: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names or not set(self.names) <= set(PAIR_DATA):
            raise ValueError(f"data must be among {PAIR_DATA}, but it is {self.data!r}")
        if (
            min(self.sentences, self.words, self.per_attribute, self.steps, self.rank, self.seeds) < 1
            or self.first_seed < 0
        ):
            raise ValueError("words, per_attribute, steps, rank and seeds must be at least 1, first_seed at least 0")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the data sets, in the order of the tables."""
        given = PAIR_DATA if self.data is None else self.data
        return (given,) if isinstance(given, str) else tuple(given)


@dataclass(frozen=True)
class FairConfig(RivalsConfig):
    """How fair readings and their controls are measured.

    Attributes:
        n_components: the number of features of every method.
        sizes: the numbers of components of the splitting curve, in rising order.
        predictable_at: an attribute counts as predictable from the model's output if a probe of the output has at least
            this AUROC.
        seeds: how many fits of every method, each with another seed, for the stability; 1 measures no stability.
        seed: the seed of the halves and of the fits.

    Raises:
        ValueError: if a setting is out of its range.
    """

    n_components: int = 24
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    predictable_at: float = 0.8
    seeds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.sizes) != sorted(set(self.sizes)) or (self.sizes and self.sizes[0] < 1):
            raise ValueError(f"sizes must be numbers of at least 1 in rising order, but they are {self.sizes}")
        if not 0.5 <= self.predictable_at <= 1 or self.seeds < 1 or self.seed < 0:
            raise ValueError("predictable_at must be in [0.5, 1], seeds at least 1, seed at least 0")
