"""Settings of what is kept, which round-trip through JSON: of PEFs and of a decomposition."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from hf_npeff.config.checks import check_choice, check_integer, check_positive
from hf_npeff.config.choices import (
    Balance,
    OutputFactor,
    Positions,
    Precision,
    SketchKind,
    Solver,
    SpectralMetric,
    StorageDtype,
)
from hf_npeff.errors import FormatVersionError

_Config = TypeVar("_Config", bound="_JsonConfig")


class _JsonConfig:
    """What both configs share: plain dictionaries out, checked dictionaries in."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}  # type: ignore[call-overload]

    def __repr__(self) -> str:
        changed = ", ".join(
            f"{field.name}={value!r}"
            for field in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) != field.default
        )
        return f"{type(self).__name__}({changed})"

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


@dataclass(frozen=True, repr=False)
class FisherConfig(_JsonConfig):
    """How per-example Fishers are computed.

    Attributes:
        rank: rows kept per example, c (`exact` with one output term keeps all of its own).
        output_factor: which rows stand for the output distribution. "auto" is "exact" where that takes at most `rank`
            rows, else "spectral", the near-optimal ones; "projection" and "sampling" are unbiased random ones.
        spectral_metric: in what the "spectral" rows of a language model are the best ones: the metric of its last
            "hidden" state, which is free, or that of the "parameters", measured by h backward passes over four texts.
            "auto" measures it for causal language models of h ≤ 256; ask for it where n is large beside h. Of an
            embedding, whose own directions count alike, it is always measured unless "hidden" is asked for.
        positions: where a sequence model's prediction is taken: "last" (the next token after the prompt), "labels"
            (wherever a label is given), "all"; "auto" is the task's own: "last" for causal and seq2seq LMs, the mask
            tokens for masked LMs, every token for token classification.
        target_modules: the linear maps under analysis, with PEFT's meaning: "all-linear" (all but a language model's
            output embedding), a regular expression for the whole name, or a list of names or name endings.
        exclude_modules: left out of those, a regular expression or a list.
        parameters: further parameters (biases, norms, embeddings): a regular expression for the whole
            name, or a list of names. They are analysed by `torch.autograd`, at a higher cost.
        sketch: how the p numbers of a row become d. "auto" takes the cheapest that meets `sketch_tolerance` on the
            first examples; "identity" keeps all p.
        sketch_dim: for "kronecker" the side of a module's block, otherwise d. None: chosen by "auto", else 16
            (kronecker) or 16,384.
        sketch_tolerance: relative error of the inner products of PEFs that "auto" must meet; above it there is a
            warning.
        storage_limit: the most numbers that "auto" may store of a row.
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
        check_integer("rank", self.rank, 1)
        check_integer("seed", self.seed, 0)
        check_integer("storage_limit", self.storage_limit, 1)
        if self.sketch_dim is not None:
            check_integer("sketch_dim", self.sketch_dim, 1)
        check_positive("sketch_tolerance", self.sketch_tolerance)
        check_choice("output_factor", self.output_factor, OutputFactor)
        check_choice("spectral_metric", self.spectral_metric, SpectralMetric)
        check_choice("positions", self.positions, Positions)
        check_choice("sketch", self.sketch, SketchKind)
        if self.sketch_dim is not None and self.sketch in ("auto", "identity"):
            raise ValueError(
                f"sketch_dim={self.sketch_dim} goes with sketch='kronecker', 'countsketch' or 'two-stage'; "
                f"{self.sketch!r} finds its own (storage_limit is the most numbers a row that 'auto' may take)"
            )
        check_choice("storage_dtype", self.storage_dtype, StorageDtype)


@dataclass(frozen=True, repr=False)
class DecompositionConfig(_JsonConfig):
    """How PEFs are decomposed.

    Attributes:
        n_components: the number of components, r.
        solver: "block_power" (no learning rate, the loss never rises) or "reference" (the paper's gradient steps).
        max_iterations: the most iterations of one start.
        tolerance: least improvement of the loss by an iteration, as a share of it; a start ends below that.
        balance: "module" divides every module's block of the rows by the square root of its PEF's mean norm before the
            decomposition, so that modules weigh alike; "none" does not.
        power: γ in (0, 1]. PEFs are replaced by their matrix powers F^γ at unit norm: 1 is the paper's, less
            keeps an example's leading row from drowning the others, of which examples share more.
        n_restarts: independent starts, of which the best is kept; the others tell how stable its components are.
        learning_rate: η of the reference solver; block_power has none.
        memory_budget: bytes of PEF rows held at once; more are read in chunks from the store. None: all in memory.
        precision: the number type of block_power's two products with the rows: "float32"; "tf32", on a CUDA device;
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
        check_integer("n_components", self.n_components, 1)
        check_integer("max_iterations", self.max_iterations, 1)
        check_integer("n_restarts", self.n_restarts, 1)
        check_integer("seed", self.seed, 0)
        if self.memory_budget is not None:
            check_integer("memory_budget", self.memory_budget, 1)
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be a finite number of at least 0, but it is {self.tolerance!r}")
        check_positive("learning_rate", self.learning_rate)
        check_positive("power", self.power)
        if self.power > 1:
            raise ValueError(f"power must be at most 1, but it is {self.power!r}")
        check_choice("solver", self.solver, Solver)
        check_choice("balance", self.balance, Balance)
        check_choice("precision", self.precision, Precision)
        if self.solver == "reference" and self.precision != "float32":
            raise ValueError(f"the reference solver works in float32; precision={self.precision!r} is block_power's")
