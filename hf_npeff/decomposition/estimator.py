"""NPEFF, the estimator: fit, transform and expand, with restarts, balancing, early stopping and chunks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_npeff.config import GRAM_LIMIT, Balance, DecompositionConfig, Precision, Solver
from hf_npeff.decomposition.chunks import ChunkedRows
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.distributed import ShardedRows
from hf_npeff.decomposition.held_out import HeldOut, until_held_out_rises
from hf_npeff.decomposition.objective import loss_of, overlaps
from hf_npeff.decomposition.solvers import (
    DenseRows,
    Fit,
    Rows,
    block_power,
    gram_space,
    reference,
)
from hf_npeff.decomposition.starts import solve, start_from_surplus
from hf_npeff.decomposition.weighting import balance_scales, balanced
from hf_npeff.pefs.store import PEFs, check_pefs, check_same_sketch
from hf_npeff.pefs.weights_identity import warn_of_other_weights
from hf_npeff.processes import Processes

logger = logging.getLogger(__name__)
_NEAR = 0.02
"""Stability is measured over restarts whose explained share is at most this much below the best. Chosen: worse restarts
are in another optimum, so they say nothing about the best one. Only `stability` depends on it."""
Callback = Callable[[int, int, float], bool | None]
"""Called with (restart, iteration, relative loss). If it returns true, that restart stops."""


class NPEFF:
    """Non-negative per-example Fisher factorisation, as an estimator in the style of scikit-learn.

    Minimises Σ_i ‖F_i − Σ_j W_ij g_j g_jᵀ‖²_F over W ≥ 0 and unit g_j (Matena & Raffel, arXiv:2310.04649).

    Args:
        n_components: the number of components, r.
        solver: "block_power" (default) or "reference", the paper's algorithm.
        max_iterations: the most iterations of one start.
        tolerance: a start ends when iterations improve the loss by less than this share of it.
        balance: "module" first divides every module's block by its mean norm, "none" does not.
        power: γ in (0, 1]: PEFs are first replaced by their matrix powers F^γ; 1 is the paper's method.
        seed: the seed of the starts.
        n_restarts: how many independent starts are made; the best is kept, the others show how stable its components
            are.
        learning_rate: the learning rate of the reference solver.
        memory_budget: bytes of rows held in memory at once; None holds all.
        precision: the precision of block_power's products: "float32", "tf32" (CUDA) or "bfloat16" (half the memory).
        device: the device for the decomposition; None uses that of the rows. Results are on the CPU.
        callbacks: called with (restart, iteration, relative loss); returning true stops that start.
        progress: show a progress bar with the explained fraction.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> estimator = NPEFF(n_components=3, power=0.5, seed=0)
        >>> decomposition = estimator.fit(pefs[:20], validation=pefs[20:])
        >>> estimator.transform(pefs).shape
        torch.Size([24, 3])
        >>> len(estimator.expand(pefs, n_new=1))
        4
        >>> again = estimator.refit(pefs)
    """

    def __init__(
        self,
        n_components: int = DecompositionConfig.n_components,
        *,
        solver: Solver = DecompositionConfig.solver,
        max_iterations: int = DecompositionConfig.max_iterations,
        tolerance: float = DecompositionConfig.tolerance,
        balance: Balance = DecompositionConfig.balance,
        power: float = DecompositionConfig.power,
        seed: int = DecompositionConfig.seed,
        n_restarts: int = DecompositionConfig.n_restarts,
        learning_rate: float = DecompositionConfig.learning_rate,
        memory_budget: int | None = DecompositionConfig.memory_budget,
        precision: Precision = DecompositionConfig.precision,
        device: str | torch.device | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = False,
    ):
        self.config = DecompositionConfig(
            n_components=n_components,
            solver=solver,
            max_iterations=max_iterations,
            tolerance=tolerance,
            balance=balance,
            power=power,
            n_restarts=n_restarts,
            learning_rate=learning_rate,
            memory_budget=memory_budget,
            precision=precision,
            seed=seed,
        )
        self.device = None if device is None else torch.device(device)
        self.callbacks = list(callbacks)
        self.progress = progress
        self.decomposition_: Decomposition | None = None

    def __repr__(self) -> str:
        settings = repr(self.config).partition("(")[2].removesuffix(")")
        return f"NPEFF({settings or f'n_components={self.config.n_components}'})"

    @classmethod
    def from_config(cls, config: DecompositionConfig, **kwargs: Any) -> NPEFF:
        """An estimator with a config's settings.

        Example:
            >>> estimator = NPEFF.from_config(decomposition.config, progress=True)
        """
        return cls(**config.to_dict(), **kwargs)

    def fit(self, pefs: PEFs, validation: PEFs | None = None) -> Decomposition:
        """Decompose PEFs.

        Started by `torchrun`, each process works on its share of the examples, and all return the same decomposition.
        Every process passes all PEFs: loaded from disk, they stay there.

        Args:
            pefs: the n PEFs.
            validation: held-out PEFs with the same sketch; a start ends when their loss no longer falls.

        Returns:
            The decomposition of the best restart.

        Raises:
            ValueError: if there are fewer rows than components, only zero PEFs, or rows that are not finite; if modules
                cannot be balanced because the sketch adds them up; if the reference solver gets validation PEFs or a
                memory budget.
            FloatingPointError: if the reference solver diverges because its learning rate is too high.
            IncompatibleSketchError: if `validation` was made with another sketch.
        """
        config = self.config
        self._check_fit(pefs, validation)
        scales = balance_scales(pefs) if config.balance == "module" else None
        processes = Processes.current()
        shared = (
            processes if config.solver == "block_power" else Processes()
        )  # without it every process would do all the work
        rows, to_rows = self._rows(pefs, scales, shared)
        held_out = None
        if validation is not None:
            held_out = HeldOut(self._plain_rows(validation, scales, processes, "float32"), to_rows)
        fits = []
        shown = self.progress and processes.index == 0
        with tqdm(total=config.n_restarts, desc="NPEFF", unit="start", disable=not shown) as bar:
            for restart in range(config.n_restarts):
                fits.append(self._start(rows, restart, held_out, bar))
                bar.update()
        best = min(fits, key=lambda fit: fit.losses[-1])
        if not best.converged:
            logger.warning(
                "the iteration limit of %d was reached before the tolerance of %g; raise max_iterations",
                config.max_iterations,
                config.tolerance,
            )
        stability = _stability(best, [fit for fit in fits if fit is not best])
        best = _on_every_process(best, rows, processes)
        return self._finish(pefs, rows, best, to_rows, scales, processes.first(stability))

    def _check_fit(self, pefs: PEFs, validation: PEFs | None) -> None:
        """Check everything that can be checked before the first iteration."""
        check_pefs(pefs)
        r, n_rows = self.config.n_components, len(pefs) * pefs.rank
        if r > n_rows:
            raise ValueError(
                f"n_components={r} is more than the {n_rows} rows of {len(pefs)} PEFs; use at most {n_rows}"
            )
        if validation is not None:
            check_same_sketch(pefs, validation, "PEFs")
            made, held_out = pefs.info.get("weights"), validation.info.get("weights")
            warn_of_other_weights(made, held_out, "PEFs and validation PEFs are of a model with different weights")
            if self.config.solver == "reference":
                raise ValueError("the reference solver cannot use validation PEFs; use solver='block_power'")
        device = self.device or pefs.device
        if self.config.precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision='tf32' needs a CUDA device, but the rows are on {device}; pass device='cuda'")
        _check_not_zero(pefs)
        _check_finite(pefs)

    def _last(self, pefs: PEFs) -> Decomposition:
        """The fitted decomposition, from which a fit with these PEFs continues."""
        if self.decomposition_ is None:
            raise ValueError("nothing has been fitted yet: call fit first")
        check_same_sketch(self.decomposition_, pefs)
        _check_not_zero(pefs)
        return self.decomposition_

    def _weighted(self, pefs: PEFs, scales: Tensor | None) -> Tensor:
        """The rows (n, c, d) that are decomposed, on the device of the decomposition."""
        return balanced(pefs.factors, scales, self.config.power).to(self.device or pefs.device)

    def _rows(self, pefs: PEFs, scales: Tensor | None, processes: Processes) -> tuple[Rows, Callable[[Tensor], Tensor]]:
        """The rows as the solver sees them, and the function that maps its G back to rows of d numbers."""
        n, c, d = len(pefs), pefs.rank, pefs.dim
        budget = self.config.memory_budget
        fits = budget is None or n * c * d * 4 <= budget  # float32
        if not fits or n * c >= d or n * c > GRAM_LIMIT:
            return self._plain_rows(pefs, scales, processes, self.config.precision), lambda G: G
        X, back = self._weighted(pefs[:1], scales).new_zeros(0, 0, 0), None
        if processes.index == 0:  # small: only the first process computes the coordinates
            X, back = gram_space(self._weighted(pefs, scales))
        X = processes.first(X)

        def to_rows(G: Tensor) -> Tensor:
            return processes.first(G if back is None else back(G))

        local = DenseRows(processes.share_of(X), self.config.precision)
        return (local if processes.count == 1 else ShardedRows(local, n, processes, X)), to_rows

    def _plain_rows(self, pefs: PEFs, scales: Tensor | None, processes: Processes, precision: Precision) -> Rows:
        """All rows without a change of coordinates, or this process's share of them, in memory or in chunks."""
        mine = processes.share_of(pefs)
        budget = self.config.memory_budget
        local: Rows
        if budget is not None and len(mine) * pefs.rank * pefs.dim * 4 > budget:  # four bytes: float32
            chunk = max(1, budget // (pefs.rank * pefs.dim * 4))
            local = ChunkedRows(mine, lambda part: self._weighted(part, scales), chunk, precision)
        else:
            local = DenseRows(self._weighted(mine, scales), precision)
        if processes.count == 1:
            return local
        return ShardedRows(local, len(pefs), processes, self._weighted(pefs[:1], scales))

    def _start(self, rows: Rows, restart: int, held_out: HeldOut | None, bar: Any) -> Fit:
        config = self.config
        # Different seeds have different starts if there are fewer than a million restarts.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + restart)

        def progress(iteration: int, loss: float) -> bool:
            bar.set_postfix_str(f"{1 - loss:.1%} explained", refresh=False)
            stop = [callback(restart, iteration, loss) for callback in self.callbacks]
            return bool(stop) and bool(rows.reduce(torch.tensor(float(any(stop)))) > 0)

        if config.solver == "reference":
            if not isinstance(rows, DenseRows):
                raise ValueError("the reference solver holds all rows in memory; leave memory_budget at None")
            return reference(
                rows,
                config.n_components,
                generator,
                learning_rate=config.learning_rate,
                max_iterations=config.max_iterations,
                tolerance=config.tolerance,
                progress=progress,
            )
        if held_out is not None:
            G, _ = start_from_surplus(rows, config.n_components, generator)
            return until_held_out_rises(rows, G, held_out, config, progress)
        limits = {"max_iterations": config.max_iterations, "tolerance": config.tolerance}
        return solve(rows, config.n_components, generator, progress=progress, **limits)  # type: ignore[arg-type]

    def _finish(
        self,
        pefs: PEFs,
        rows: Rows,
        fit: Fit,
        to_rows: Callable[[Tensor], Tensor],
        scales: Tensor | None,
        stability: Tensor,
        *,
        keep_order: bool = False,
    ) -> Decomposition:
        """The decomposition of a fit: components sorted by their total coefficients, with W at its minimum for G."""
        G = to_rows(fit.G).cpu()
        W = fit.W.cpu()
        order = torch.arange(len(G)) if keep_order else torch.argsort(W.sum(0), descending=True)
        decomposition = Decomposition(
            W[:, order].contiguous(),
            G[order].contiguous(),
            config=self.config,
            info={k: v for k, v in pefs.info.items() if k != "format_version"},
            example_ids=pefs.example_ids,
            columns={k: v for k, v in pefs.columns.items() if k != "example_id"},
            stability=stability[order],
            scales=scales,
            converged=fit.converged,
        )
        processes = Processes.current()
        explained = decomposition.explain(processes.share_of(pefs), device=self.device)
        W, N = (processes.gather(value, len(pefs)) for value in explained)
        decomposition.coefficients = W
        total = rows.total().cpu()
        final = float(loss_of(total, W.to(N.dtype), N, overlaps(decomposition.pseudo_fishers)) / total)
        decomposition.loss_history = [*fit.losses, final]
        self.decomposition_ = decomposition
        return decomposition

    def transform(self, pefs: PEFs) -> Tensor:
        """W (n, r) of PEFs with the fitted components.

        Raises:
            ValueError: if `fit` has not run.
            IncompatibleSketchError: if the PEFs were made with another sketch.
        """
        if self.decomposition_ is None:
            raise ValueError("nothing has been fitted yet: call fit first, or use Decomposition.transform")
        return self.decomposition_.transform(pefs)

    def expand(self, pefs: PEFs, n_new: int, *, joint: bool = True) -> Decomposition:
        """Add components to the fitted ones: first the new ones alone, then, unless `joint` is false, all together.

        Args:
            pefs: the PEFs of the fit, or other PEFs with the same sketch.
            n_new: how many components to add.
            joint: whether the old components change as well in the end.

        Raises:
            ValueError: if `fit` has not run, there would be more components than rows, or all PEFs are zero.
            IncompatibleSketchError: if the PEFs were made with another sketch.
        """
        old = self._last(pefs)
        if n_new < 1 or len(old) + n_new > len(pefs) * pefs.rank:
            raise ValueError(f"n_new must be between 1 and {len(pefs) * pefs.rank - len(old)}, but it is {n_new}")
        processes = Processes.current()
        rows = self._plain_rows(pefs, old.scales, processes, self.config.precision)
        G = old.pseudo_fishers.to(self.device or pefs.device)
        W = old.transform(processes.share_of(pefs), device=self.device).to(G)
        N, H = rows.energies(G), overlaps(G)
        explained = rows.gather(2 * (W * N).sum(1) - ((W @ H) * W).sum(1))
        W = torch.cat([W, W.new_zeros(len(W), n_new)], 1)
        some = (pefs.norms > 0).nonzero()[:, 0]  # a zero PEF has no direction
        worst = some[torch.argsort(explained[some], stable=True)]
        G = torch.cat([G, rows.top_directions(worst.repeat(-(-n_new // len(worst)))[:n_new].tolist())])
        limits = {"max_iterations": self.config.max_iterations, "tolerance": self.config.tolerance}
        fit = block_power(rows, G, W=W, fixed=len(old), **limits)  # type: ignore[arg-type]
        if joint:
            second = block_power(rows, fit.G, W=fit.W, **limits)  # type: ignore[arg-type]
            fit = Fit(second.W, second.G, fit.losses + second.losses, second.converged)
        fit = _on_every_process(fit, rows, processes)
        self.config = dataclasses.replace(self.config, n_components=len(old) + n_new)
        stability = torch.cat([old.stability, torch.full((n_new,), float("nan"))])
        result = self._finish(pefs, rows, fit, lambda G: G, old.scales, stability, keep_order=True)
        result.names = dict(old.names)
        return result

    def refit(self, pefs: PEFs, *, move: bool = True) -> Decomposition:
        """Fit again from the last components, which keep their numbers and names: after more training, or on more data.

        Args:
            pefs: PEFs with the same sketch as those of the fit.
            move: whether the components change; if not, only W is computed again.

        Raises:
            ValueError: if `fit` has not run, or all PEFs are zero.
            IncompatibleSketchError: if the PEFs were made with another sketch.
        """
        old = self._last(pefs)
        processes = Processes.current()
        rows = self._plain_rows(pefs, old.scales, processes, self.config.precision)
        G = old.pseudo_fishers.to(self.device or pefs.device)
        if move:
            config = self.config
            fit = block_power(rows, G, max_iterations=config.max_iterations, tolerance=config.tolerance)
            fit = _on_every_process(fit, rows, processes)
        else:
            fit = Fit(G.new_zeros(len(pefs), len(G)), G, [], True)
        stability = (
            torch.full_like(old.stability, float("nan")) if move else old.stability
        )  # one start alone has no stability
        result = self._finish(pefs, rows, fit, lambda G: G, old.scales, stability, keep_order=True)
        result.names = dict(old.names)
        return result


def _check_not_zero(pefs: PEFs) -> None:
    if not bool((pefs.norms > 0).any()):
        raise ValueError("all PEFs are zero: the model is certain of every prediction, so there is nothing to explain")


def _check_finite(pefs: PEFs) -> None:
    """Refuse rows that are not finite. This reads the store once; a fit reads it hundreds of times."""
    if all(bool(torch.isfinite(chunk.factors).all()) for chunk in pefs.chunks(256)):  # bounds the memory
        return
    bad = [i for i in range(len(pefs)) if not bool(torch.isfinite(pefs[i : i + 1].factors).all())]
    raise ValueError(f"the rows of {len(bad)} PEFs are not finite, such as those of {bad[:10]}; leave them out")


def _on_every_process(fit: Fit, rows: Rows, processes: Processes) -> Fit:
    """The fit with all coefficients, bit for bit the same on every process."""
    return dataclasses.replace(fit, W=processes.first(rows.gather(fit.W)), G=processes.first(fit.G))


def _stability(best: Fit, others: Sequence[Fit]) -> Tensor:
    """(r,) the mean, over the other starts that explain nearly as much, of every component's best |cosine|."""
    if not others:
        return torch.full((len(best.G),), float("nan"))
    explained = 1 - best.losses[-1]
    near = [fit for fit in others if 1 - fit.losses[-1] >= (1 - _NEAR) * explained]
    near = near or [min(others, key=lambda fit: fit.losses[-1])]
    return torch.stack([(best.G @ fit.G.T).abs().amax(1) for fit in near]).mean(0).float().cpu()
