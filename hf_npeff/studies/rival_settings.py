"""Settings of the studies that fit every method to the same rows: minimal pairs, and fair readings."""

from __future__ import annotations

from dataclasses import dataclass

PAIR_DATA = ("planted_cues", "word_relations", "home_assistant")


@dataclass(frozen=True)
class RivalsConfig:
    """How every method is fitted.

    Gradient Atoms and dictionary learning have settings near the best mean margin of both readings on seed 10 of the
    planted cues, which no study measures (`python -m tests.benchmarks.pair_settings planted_cues`).

    Attributes:
        n_components: the number of features of every method.
        n_restarts: the number of restarts of NPEFF, of k-means and of gradient clustering, alike.
        layers: layers whose hidden states are read, evenly spread.
        sae_k: features of an example that the autoencoder of hidden states keeps.
        gradient_k: features of an example that the autoencoder of gradients keeps.
        sae_steps: the number of steps of an autoencoder's training.
        atoms_alpha: weight of the L1 penalty of Gradient Atoms.
        atoms_ridge: ridge of Gradient Atoms' whitening, as a share of the mean eigenvalue.
        dictionary_alpha: weight of the L1 penalty of dictionary learning on PEFs.
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
        data: which data sets, of planted_cues, word_relations and home_assistant; all by default.
        sentences: sentences with planted cues, each also without each of its cues.
        words: words of each class of the word relations.
        per_attribute: pairs of every attribute of Home Assistant's sentences, at least, where there are as many.
        steps: the number of steps of fine-tuning on Home Assistant's sentences.
        rank: rows kept per example, c.
        seeds: data, models and fits with the seeds first_seed, first_seed + 1, ….
        first_seed: the first seed.
        untrained: whether seed first_seed comes again with random weights.

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
        """The data, in the table's order."""
        given = PAIR_DATA if self.data is None else self.data
        return (given,) if isinstance(given, str) else tuple(given)


@dataclass(frozen=True)
class FairConfig(RivalsConfig):
    """How fair readings and their controls are measured.

    Attributes:
        n_components: the number of features of every method.
        sizes: numbers of components of the splitting curve, rising.
        told_at: AUROC of a probe of the model's output from which an attribute counts as one that the output tells.
        seeds: fits of every method, with other seeds, for the stability; 1 for none.
        seed: the seed of the halves and of everything fitted.

    Raises:
        ValueError: if a setting is out of its range.
    """

    n_components: int = 24
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    told_at: float = 0.8
    seeds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.sizes) != sorted(set(self.sizes)) or (self.sizes and self.sizes[0] < 1):
            raise ValueError(f"sizes must be rising numbers of at least 1, but they are {self.sizes}")
        if not 0.5 <= self.told_at <= 1 or self.seeds < 1 or self.seed < 0:
            raise ValueError("told_at must be in [0.5, 1], seeds at least 1, seed at least 0")
