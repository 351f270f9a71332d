"""The settings that are saved with PEFs and with a decomposition; they round-trip through JSON."""

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
    """Base of both configs: conversion to plain dictionaries, and from checked ones."""

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

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_config

        return of_config(self)

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """The config with these settings.

        Raises:
            FormatVersionError: if a setting is unknown or missing, because another version wrote it.
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
        rank: how many rows (gradients) are kept for each example, c. With `output_factor="exact"` and a single
            prediction, all rows are kept.
        output_factor: which output directions the rows are the gradients of. "exact" keeps the whole Fisher, "spectral"
            the best approximation of it; "projection" and "sampling" are random and unbiased. "auto" is "exact" if that
            takes at most `rank` rows, otherwise "spectral".
        spectral_metric: the metric in which the "spectral" rows are the best approximation: that of the last "hidden"
            state, which costs nothing, or that of the "parameters", which takes h backward passes over four texts.
            "auto" uses "parameters" for causal language models with h ≤ 256 and for embedding models, otherwise
            "hidden". Ask for "parameters" if there are many more examples than h, the size of the hidden state.
        positions: the positions at which a sequence model's predictions are analysed: "last" (the next token after the
            prompt), "labels" (every position that has a label) or "all". "auto" depends on the task: "last" for causal
            and seq2seq LMs, the mask tokens for masked LMs, every token for token classification.
        target_modules: the linear maps to analyse, with PEFT's meaning: "all-linear" (all except a language model's
            output embedding), a regular expression for the whole name, or a list of names or name endings.
        exclude_modules: modules to leave out of `target_modules`, as a regular expression or a list.
        parameters: further parameters to analyse (biases, norms, embeddings), as a regular expression for the whole
            name or a list of names. They are analysed by `torch.autograd`, at a higher cost.
        sketch: the random projection that shortens a row from p to d numbers. "auto" chooses the cheapest one that
            meets `sketch_tolerance` on the first examples; "identity" keeps all p.
        sketch_dim: the side of a module's block for "kronecker", otherwise d. By default "auto" chooses it; other
            sketches use 16 (kronecker) or 16,384.
        sketch_tolerance: relative error of the inner products of PEFs that "auto" has to meet; above it there is a
            warning.
        storage_limit: the most numbers of a row that "auto" may store.
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
                f"{self.sketch!r} chooses it itself (storage_limit is the most numbers of a row that 'auto' may store)"
            )
        check_choice("storage_dtype", self.storage_dtype, StorageDtype)


@dataclass(frozen=True, repr=False)
class DecompositionConfig(_JsonConfig):
    """How PEFs are decomposed.

    Attributes:
        n_components: the number of components, r.
        solver: "block_power" (no learning rate, the loss never rises) or "reference" (the paper's gradient steps).
        max_iterations: the most iterations of one start.
        tolerance: a start ends when an iteration improves the loss by less than this share of it.
        balance: "module" divides every module's block of the rows by the square root of its PEF's mean norm before the
            decomposition, so that all modules have equal weight; "none" leaves the rows as they are.
        power: γ in (0, 1]. PEFs are replaced by their matrix powers F^γ at unit norm. 1 is the paper's method; less
            weakens each example's strongest row, so that the others, which examples share more, count for more.
        n_restarts: how many independent starts are made. The best is kept; the others show how stable its components
            are.
        learning_rate: η of the reference solver; block_power has none.
        memory_budget: bytes of PEF rows held in memory at once; if there are more, they are read in chunks from the
            store. By default all are held in memory.
        precision: the number type of block_power's two products with the rows: "float32"; "tf32", on a CUDA device;
            "bfloat16", which also halves the memory of the rows. The final coefficients and loss always use float32.
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
            raise ValueError(f"the reference solver works in float32; precision={self.precision!r} is for block_power")
