"""Settings of an analysis: frozen dataclasses, the only place in which a default stands.

Those of what is kept, `FisherConfig` and `DecompositionConfig`, round-trip through JSON. Those of one call, `…Request`,
are the arguments of a method of the analyzer. Methods and commands read their defaults here (tests/test_defaults.py).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from hf_npeff.errors import FormatVersionError

OutputFactor = Literal["auto", "exact", "spectral", "projection", "sampling"]
SpectralMetric = Literal["auto", "hidden", "parameters"]
Positions = Literal["auto", "last", "labels", "all"]
SketchKind = Literal["auto", "kronecker", "countsketch", "two-stage", "identity"]
StorageDtype = Literal["float64", "float32", "float16", "bfloat16"]
Solver = Literal["block_power", "reference"]
Balance = Literal["none", "module"]
Precision = Literal["float32", "tf32", "bfloat16"]
OnError = Literal["raise", "skip"]
LiftMethod = Literal["exact", "adjoint", "compressed_sensing"]
LiftForm = Literal["auto", "plain", "metric"]
SparseSolver = Literal["iht", "fista"]
Ridge = float | Literal["auto"]

BATCH_SIZE = 8
"""Examples of a forward pass. Chosen: a batch of prompts of a 7B model fits beside its weights on one GPU, and smaller
models gain little by more; the numbers do not depend on it beyond rounding."""

SHADED = 12
"""Top examples of a component whose tokens are shaded. Chosen: as many as a person reads on the page."""


def check_ridge(ridge: Any) -> None:
    """Refuse what is no ridge.

    Raises:
        ValueError: if it is neither "auto" nor a positive number.
    """
    number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
    if ridge != "auto" and not (number and 0 < ridge < math.inf):
        raise ValueError(
            f"ridge must be 'auto' or a positive number, a share of the largest eigenvalue, but it is {ridge!r}"
        )


GRAM_LIMIT = 8000
"""Rows n·c up to which a fit writes them in Gram space. Chosen: their Gram matrix has 0.5 GB there, in float64."""

_NO_OPTION: dict[str, Any] = {"option": False}
"""Metadata of a field that is no option of its own on the command line, which has another way to it."""

_Config = TypeVar("_Config", bound="_JsonConfig")


class _JsonConfig:
    """What both configs share: plain dictionaries out, checked dictionaries in."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """The config with these settings.

        Raises:
            FormatVersionError: if a setting is unknown or missing, so written by another version.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, dict) or set(values) != known:
            given = set(values) if isinstance(values, dict) else {type(values).__name__}
            raise FormatVersionError(
                f"a {cls.__name__} has the settings {sorted(known)}; these are unknown: {sorted(given - known)}, "
                f"and these are missing: {sorted(known - given)}. Was it written by another version of hf_npeff?"
            )
        return cls(**values)


def is_count(value: object) -> bool:
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_scale(scale: float) -> float:
    """A step's length and sign.

    Raises:
        ValueError: if it is 0, or no finite number.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < math.inf or scale == 0:
        raise ValueError(f"scale must be a finite number other than 0, but it is {scale!r}")
    return float(scale)


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, but it is {value!r}")


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but it is {value!r}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive, finite number, but it is {value!r}")


@dataclass(frozen=True)
class FisherConfig(_JsonConfig):
    """How per-example Fishers are computed.

    Attributes:
        rank: c, the rows kept per example (`exact` with one output term keeps all of its own).
        output_factor: which rows stand for the output distribution. "auto" is "exact" where that takes at most `rank`
            rows, else "spectral", the near-optimal ones; "projection" and "sampling" are unbiased random ones.
        spectral_metric: in what the "spectral" rows of a language model are the best ones: the metric of its last
            "hidden" state, which is free, or that of the "parameters", measured by h backward passes over four texts.
            "auto" measures it for causal language models of h ≤ 256; ask for it where n is large beside h.
        positions: where a sequence model's prediction is taken: "last" (the next token after the prompt), "labels"
            (wherever a label is given), "all"; "auto" is the task's own: "last" for causal and seq2seq LMs, the mask
            tokens for masked LMs, every token for token classification.
        target_modules: the linear maps under analysis, with PEFT's meaning: "all-linear" (all but a language model's
            output embedding), a regular expression for the whole name, or a list of names or name endings.
        exclude_modules: left out of those, a regular expression or a list.
        parameters: further parameters (biases, norms, embeddings, fused experts): a regular expression for the whole
            name, or a list of names. They are analysed by `torch.autograd`, at a higher cost.
        sketch: how p numbers a row become d. "auto" takes the cheapest that meets `sketch_tolerance` on the first
            examples; "identity" keeps all p.
        sketch_dim: for "kronecker" the side of a module's block, otherwise d. None: chosen by "auto", else 16
            (kronecker) or 16,384.
        sketch_tolerance: relative error of the inner products of PEFs that "auto" must meet, and that warns above.
        storage_limit: the most numbers a row that "auto" may store.
        seed: seed of the sketch and of random output factors.
        storage_dtype: number type of the rows on disk and in memory.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> config = FisherConfig(rank=8, target_modules=r".*mlp.*", sketch="countsketch", sketch_dim=4096)
        >>> FisherConfig.from_dict(config.to_dict()) == config
        True
    """

    rank: int = 4
    output_factor: OutputFactor = "auto"
    spectral_metric: SpectralMetric = "auto"
    positions: Positions = "auto"
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    parameters: str | tuple[str, ...] | None = None
    sketch: SketchKind = "auto"
    sketch_dim: int | None = None
    sketch_tolerance: float = 0.1
    storage_limit: int = 65_536
    seed: int = 0
    storage_dtype: StorageDtype = "float32"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "parameters"):
            value = getattr(self, name)
            if isinstance(value, list | set | frozenset):
                value = tuple(sorted(value) if not isinstance(value, list) else value)
                object.__setattr__(self, name, value)
            if not isinstance(value, str | tuple | None) or any(not isinstance(v, str) for v in value or ()):
                raise ValueError(f"{name} must be a string or a list of strings, but it is {value!r}")
        _check_integer("rank", self.rank, 1)
        _check_integer("seed", self.seed, 0)
        _check_integer("storage_limit", self.storage_limit, 1)
        if self.sketch_dim is not None:
            _check_integer("sketch_dim", self.sketch_dim, 1)
        _check_positive("sketch_tolerance", self.sketch_tolerance)
        _check_choice("output_factor", self.output_factor, OutputFactor)
        _check_choice("spectral_metric", self.spectral_metric, SpectralMetric)
        _check_choice("positions", self.positions, Positions)
        _check_choice("sketch", self.sketch, SketchKind)
        if self.sketch_dim is not None and self.sketch in ("auto", "identity"):
            raise ValueError(
                f"sketch_dim={self.sketch_dim} goes with sketch='kronecker', 'countsketch' or 'two-stage'; "
                f"{self.sketch!r} finds its own (storage_limit is the most numbers a row that 'auto' may take)"
            )
        _check_choice("storage_dtype", self.storage_dtype, StorageDtype)


@dataclass(frozen=True)
class DecompositionConfig(_JsonConfig):
    """How PEFs are decomposed.

    Attributes:
        n_components: r.
        solver: "block_power" (no learning rate, the loss never rises) or "reference" (the paper's gradient steps).
        max_iterations: the most iterations of one start.
        tolerance: a start ends when an iteration improves the loss by less than this share of it.
        balance: "module" divides every module's block of the rows by the square root of its PEF's mean norm before the
            decomposition, so that modules weigh alike; "none" does not.
        power: γ in (0, 1]. PEFs are replaced by their matrix powers F^γ at unit norm: 1 is the paper's, less
            keeps an example's leading row from drowning the others, of which examples share more.
        n_restarts: independent starts, of which the best is kept; the others tell how stable its components are.
        learning_rate: η of the reference solver; block_power has none.
        memory_budget: bytes of PEF rows held at once; more are read in chunks from the store. None: all in memory.
        precision: of which numbers block_power's two products with the rows are: "float32"; "tf32", on a CUDA device;
            "bfloat16", which also halves the memory of the rows. The final coefficients and loss are always of float32
            products.
        seed: seed of the starts.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> config = DecompositionConfig(n_components=64, power=0.5)
        >>> NPEFF.from_config(config).config == config
        True
    """

    n_components: int = 16
    solver: Solver = "block_power"
    max_iterations: int = 300
    tolerance: float = 1e-5
    balance: Balance = "none"
    power: float = 1.0
    n_restarts: int = 8
    learning_rate: float = 3e-3
    memory_budget: int | None = None
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("n_components", self.n_components, 1)
        _check_integer("max_iterations", self.max_iterations, 1)
        _check_integer("n_restarts", self.n_restarts, 1)
        _check_integer("seed", self.seed, 0)
        if self.memory_budget is not None:
            _check_integer("memory_budget", self.memory_budget, 1)
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be a finite number of at least 0, but it is {self.tolerance!r}")
        _check_positive("learning_rate", self.learning_rate)
        _check_positive("power", self.power)
        if self.power > 1:
            raise ValueError(f"power must be at most 1, but it is {self.power!r}")
        _check_choice("solver", self.solver, Solver)
        _check_choice("balance", self.balance, Balance)
        _check_choice("precision", self.precision, Precision)
        if self.solver == "reference" and self.precision != "float32":
            raise ValueError(f"the reference solver works in float32; precision={self.precision!r} is block_power's")


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

    output_dir: Path | None = field(default=None, metadata=_NO_OPTION)
    batch_size: int | Literal["auto"] = BATCH_SIZE
    shard_size: int = 1024
    on_error: OnError = "raise"
    check_weights: bool = True
    progress: bool = field(default=False, metadata=_NO_OPTION)

    def __post_init__(self) -> None:
        _check_choice("on_error", self.on_error, OnError)
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
    keep: Any = field(default=None, metadata=_NO_OPTION)
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.method, LiftMethod)
        _check_choice("form", self.form, LiftForm)
        _check_choice("solver", self.solver, SparseSolver)
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
            raise ValueError("ridge and keep are of selective directions: they go with selective=True")

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

    change: Any = field(default=None, metadata=_NO_OPTION)
    remove: str | None = None
    given: str | None = "label"
    outcome: int | str | None = field(default=None, metadata=_NO_OPTION)
    keep: Any = field(default=None, metadata=_NO_OPTION)
    ridge: Ridge = "auto"
    iterations: int = 1
    memory_budget: int | None = None
    batch_size: int = BATCH_SIZE
    check_weights: bool = True

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
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
class PerturbationRequest:
    """How a direction is measured.

    These are arguments of `NPEFFAnalyzer.evaluate_direction`.

    Attributes:
        target_kl: mean KL on the top examples, in nats, that each sign's step is to reach.
        scale: the step itself, instead of one that reaches `target_kl`.
        n_top: top examples to measure.
        n_others: others to measure, drawn from the examples on which the component is not active.
        batch_size: examples of a forward pass.
        seed: seed of the drawing of others, the random direction and the bootstrap.

    Raises:
        ValueError: if a setting is out of its range.
    """

    target_kl: float = 0.5
    scale: float | None = None
    n_top: int = 16
    n_others: int = 64
    batch_size: int = BATCH_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_top, self.n_others, self.batch_size) < 1:
            raise ValueError(
                "n_top, n_others and batch_size must be at least 1, but they are "
                f"{self.n_top}, {self.n_others} and {self.batch_size}"
            )
        _check_positive("target_kl", self.target_kl)
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
    worst: int = 5
    batch_size: int = BATCH_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
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
            _check_integer(name, getattr(self, name), 1)
        _check_integer("rounds", self.rounds, 0)
