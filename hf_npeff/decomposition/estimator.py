"""NPEFF, the estimator: fit, transform and expand, with restarts, balancing, stopping and chunks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_npeff.components import Decomposition, balance_scales, balanced
from hf_npeff.config import Balance, DecompositionConfig, Solver
from hf_npeff.decomposition.objective import loss_of, nonnegative_coefficients, overlaps
from hf_npeff.decomposition.sharding import Processes, ShardedRows, share_of
from hf_npeff.decomposition.solvers import (
    DenseRows,
    Fit,
    Progress,
    Rows,
    block_power,
    gram_space,
    reference,
    start_from_examples,
    top_directions,
)
from hf_npeff.store import PEFs, check_same_sketch

logger = logging.getLogger(__name__)
_GRAM_LIMIT = 8000
_NEAR = 0.02
Callback = Callable[[int, int, float], bool | None]
"""Called with (restart, iteration, relative loss); a true answer stops that restart."""


class ChunkedRows:
    """Rows read from a store in chunks of a bounded size, for PEFs that do not fit in memory."""

    def __init__(self, pefs: PEFs, scales: Tensor | None, chunk: int, power: float = 1.0):
        self.pefs = pefs
        self.scales = scales
        self.power = power
        self.chunk = chunk
        self.n = len(pefs)
        self.dim = pefs.dim

    def _parts(self) -> Any:
        start = 0
        for part in self.pefs.chunks(self.chunk):
            A = balanced(part.factors, self.scales, self.power)
            yield slice(start, start + len(part)), A
            start += len(part)

    def total(self) -> Tensor:
        """See `Rows`."""
        return torch.stack([DenseRows(A).total() for _, A in self._parts()]).sum()

    def energies(self, G: Tensor) -> Tensor:
        """See `Rows`."""
        return torch.cat([DenseRows(A).energies(G) for _, A in self._parts()])

    def pull(self, G: Tensor, W: Tensor) -> Tensor:
        """See `Rows`."""
        C = torch.zeros_like(G)
        for where, A in self._parts():
            C += DenseRows(A).pull(G, W[where])
        return C

    def reduce(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """See `Rows`."""
        return value

    def top_directions(self, indices: list[int]) -> Tensor:
        """See `Rows`."""
        return top_directions(balanced(self.pefs[indices].factors, self.scales, self.power))


class NPEFF:
    """Non-negative per-example Fisher factorisation, with scikit-learn's manners.

    Minimises Σ_i ‖F_i − Σ_j W_ij g_j g_jᵀ‖²_F over W ≥ 0 and unit g_j (Matena & Raffel, arXiv:2310.04649).

    Args:
        n_components: r.
        solver: "block_power" (default) or "reference", the paper's.
        max_iterations: the most iterations of one start.
        tolerance: a start ends when iterations improve the loss by less than this share of it.
        balance: "module" divides every module's block by its mean norm first, "none" does not.
        power: γ in (0, 1]: PEFs are replaced by their matrix powers F^γ first; 1 is the paper's.
        seed: of the starts.
        n_restarts: independent starts; the best is kept, the others tell how stable its components are.
        learning_rate: of the reference solver.
        memory_budget: bytes of rows held at once; None holds all.
        callbacks: called with (restart, iteration, relative loss); a true answer stops that start.
        progress: show a progress bar with the explained fraction.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        n_components: int = 16,
        *,
        solver: Solver = "block_power",
        max_iterations: int = 300,
        tolerance: float = 1e-5,
        balance: Balance = "none",
        power: float = 1.0,
        seed: int = 0,
        n_restarts: int = 8,
        learning_rate: float = 3e-3,
        memory_budget: int | None = None,
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
            seed=seed,
        )
        self.callbacks = list(callbacks)
        self.progress = progress
        self.decomposition_: Decomposition | None = None

    @classmethod
    def from_config(cls, config: DecompositionConfig, **kwargs: Any) -> NPEFF:
        """An estimator with a config's settings."""
        return cls(**config.to_dict(), **kwargs)

    def fit(self, pefs: PEFs, validation: PEFs | None = None) -> Decomposition:
        """Decompose PEFs.

        Started by `torchrun`, each process works on its share of the examples, and all return the same decomposition.
        Every process passes all PEFs: loaded from disk, they stay there.

        Args:
            pefs: n of them.
            validation: held-out PEFs of the same sketch; a start stops when it stops explaining them better.

        Returns:
            The best restart.

        Raises:
            ValueError: if there are fewer rows than components, or nothing but zero PEFs; if modules cannot be balanced
                because the sketch adds them up; if the reference solver is given validation PEFs or a memory budget.
            FloatingPointError: if the reference solver diverges: its learning rate is too high.
            IncompatibleSketchError: if `validation` was made with another sketch.
        """
        config = self.config
        r = config.n_components
        n_rows = len(pefs) * pefs.rank
        if r > n_rows:
            raise ValueError(f"n_components={r} exceeds the {n_rows} rows of {len(pefs)} PEFs; use at most {n_rows}")
        if not bool((pefs.norms > 0).any()):
            raise ValueError(
                "all PEFs are zero: the model is certain of every prediction, and there is nothing to explain"
            )
        if validation is not None:
            check_same_sketch(pefs.fingerprint, validation.fingerprint, "PEFs", "validation PEFs")
            if config.solver == "reference":
                raise ValueError("the reference solver does not watch validation PEFs; use solver='block_power'")
        scales = balance_scales(pefs) if config.balance == "module" else None
        processes = Processes()
        rows, to_rows = self._rows(pefs, scales, processes)
        held_out = None
        if validation is not None:
            held_out = _HeldOut(balanced(validation.factors, scales, config.power), to_rows, processes)
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
        best = dataclasses.replace(best, W=processes.first(rows.gather(best.W)), G=processes.first(best.G))
        return self._finish(pefs, rows, best, to_rows, scales, processes.first(stability))

    def _rows(self, pefs: PEFs, scales: Tensor | None, processes: Processes) -> tuple[Rows, Callable[[Tensor], Tensor]]:
        """The rows as the solver will see them, and the way from its G back to rows of d numbers."""
        if processes.count > 1 and self.config.solver == "block_power":
            return self._shared_rows(pefs, scales, processes)
        bytes_in_memory = pefs.nbytes * (4 // min(4, pefs._shards[0]["factors"].element_size()))
        budget = self.config.memory_budget
        if budget is not None and bytes_in_memory > budget:
            per_example = max(1, bytes_in_memory // len(pefs))
            return ChunkedRows(pefs, scales, max(1, budget // per_example), self.config.power), lambda G: G
        A = balanced(pefs.factors, scales, self.config.power)
        nc = A.shape[0] * A.shape[1]
        if nc < A.shape[2] and nc <= _GRAM_LIMIT:
            X, to_rows = gram_space(A)
            return DenseRows(X), to_rows
        return DenseRows(A), lambda G: G

    def _shared_rows(
        self, pefs: PEFs, scales: Tensor | None, processes: Processes
    ) -> tuple[Rows, Callable[[Tensor], Tensor]]:
        """As `_rows`, for this process's share of the examples."""
        n, c, d = len(pefs), pefs.rank, pefs.dim
        share = share_of(n, processes.index, processes.count)
        budget = self.config.memory_budget
        fits = budget is None or n * c * d * 4 <= budget
        if fits and n * c < d and n * c <= _GRAM_LIMIT:  # small: the first process alone finds the coordinates
            X, back = torch.zeros(0, 0, 0), None
            if processes.index == 0:
                X, back = gram_space(balanced(pefs.factors, scales, self.config.power))
            X = processes.first(X)

            def to_rows(G: Tensor) -> Tensor:
                return processes.first(G if back is None else back(G))

            return ShardedRows(DenseRows(X[share.start : share.stop]), n, processes, X.device), to_rows
        mine = pefs[share.start : share.stop]
        if budget is not None and len(share) * c * d * 4 > budget:
            local: Rows = ChunkedRows(mine, scales, max(1, budget // (c * d * 4)), self.config.power)
        else:
            local = DenseRows(balanced(mine.factors, scales, self.config.power))
        return ShardedRows(local, n, processes, pefs._shards[0]["factors"].device), lambda G: G

    def _start(self, rows: Rows, restart: int, held_out: _HeldOut | None, bar: Any) -> Fit:
        config = self.config
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
        G = start_from_examples(rows, config.n_components, generator)
        if held_out is None:
            return block_power(
                rows, G, max_iterations=config.max_iterations, tolerance=config.tolerance, progress=progress
            )
        return _until_held_out_rises(rows, G, held_out, config, progress)

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
        """The decomposition of a fit: components by the weight they carry, W at its minimum for the final G."""
        G = to_rows(fit.G)
        order = torch.arange(len(G)) if keep_order else torch.argsort(fit.W.sum(0), descending=True)
        decomposition = Decomposition(
            fit.W[:, order].contiguous(),
            G[order].contiguous(),
            config=self.config,
            info={k: v for k, v in pefs.info.items() if k != "format_version"},
            example_ids=pefs.example_ids,
            columns={k: v for k, v in pefs.columns.items() if k != "example_id"},
            stability=stability[order],
            scales=scales,
            converged=fit.converged,
        )
        W = decomposition.transform(pefs)
        decomposition.coefficients = W
        N = rows.gather(rows.energies(fit.G))[:, order]
        total = rows.total()
        final = float(loss_of(total, W.to(N.dtype), N, overlaps(fit.G[order])) / total)
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
            raise ValueError("nothing is fitted yet: call fit first, or use Decomposition.transform")
        return self.decomposition_.transform(pefs)

    def expand(self, pefs: PEFs, n_new: int, *, joint: bool = True) -> Decomposition:
        """Add components to the fitted ones: first the new ones alone, then, unless `joint` is false, all together.

        Args:
            pefs: what the decomposition was fitted on, or other PEFs of the same sketch.
            n_new: how many to add.
            joint: whether the old ones move as well in the end.

        Raises:
            ValueError: if `fit` has not run, there would be more components than rows, or all PEFs are zero.
            IncompatibleSketchError: if the PEFs were made with another sketch.
        """
        old = self.decomposition_
        if old is None:
            raise ValueError("nothing is fitted yet: call fit first")
        if n_new < 1 or len(old) + n_new > len(pefs) * pefs.rank:
            raise ValueError(f"n_new must be between 1 and {len(pefs) * pefs.rank - len(old)}, but it is {n_new}")
        if not bool((pefs.norms > 0).any()):
            raise ValueError("all PEFs are zero: there is nothing to explain")
        check_same_sketch(old.fingerprint, pefs.fingerprint, "the decomposition", "PEFs")
        rows: Rows = DenseRows(balanced(pefs.factors, old.scales, self.config.power))
        G = old.pseudo_fishers.clone()
        W = torch.cat([old.transform(pefs), torch.zeros(len(pefs), n_new)], 1)
        N, H = rows.energies(G), overlaps(G)
        explained = (2 * (W[:, : len(old)] * N).sum(1)) - ((W[:, : len(old)] @ H) * W[:, : len(old)]).sum(1)
        some = (pefs.norms > 0).nonzero()[:, 0]  # a zero PEF has no direction to offer
        worst = some[torch.argsort(explained[some], stable=True)]
        G = torch.cat([G, rows.top_directions(worst.repeat(-(-n_new // len(worst)))[:n_new].tolist())])
        limits = {"max_iterations": self.config.max_iterations, "tolerance": self.config.tolerance}
        fit = block_power(rows, G, W=W, fixed=len(old), **limits)  # type: ignore[arg-type]
        if joint:
            second = block_power(rows, fit.G, W=fit.W, **limits)  # type: ignore[arg-type]
            fit = Fit(second.W, second.G, fit.losses + second.losses, second.converged)
        self.config = dataclasses.replace(self.config, n_components=len(old) + n_new)
        stability = torch.cat([old.stability, torch.full((n_new,), float("nan"))])
        result = self._finish(pefs, rows, fit, lambda G: G, old.scales, stability, keep_order=True)
        result.names = dict(old.names)
        return result

    def refit(self, pefs: PEFs, *, move: bool = True) -> Decomposition:
        """Fit again from the last components, which keep their numbers and names: after more training, or on more data.

        Args:
            pefs: of the same sketch as those that were fitted.
            move: whether the components move; if not, W alone is found anew.

        Raises:
            ValueError: if `fit` has not run, or all PEFs are zero.
            IncompatibleSketchError: if the PEFs were made with another sketch.
        """
        old = self.decomposition_
        if old is None:
            raise ValueError("nothing is fitted yet: call fit first")
        if not bool((pefs.norms > 0).any()):
            raise ValueError("all PEFs are zero: there is nothing to explain")
        check_same_sketch(old.fingerprint, pefs.fingerprint, "the decomposition", "PEFs")
        rows: Rows = DenseRows(balanced(pefs.factors, old.scales, self.config.power))
        G = old.pseudo_fishers.clone()
        if move:
            config = self.config
            fit = block_power(rows, G, max_iterations=config.max_iterations, tolerance=config.tolerance)
            first = Processes().first
            fit = dataclasses.replace(fit, W=first(fit.W), G=first(fit.G))
        else:
            fit = Fit(G.new_zeros(len(pefs), len(G)), G, [], True)
        stability = torch.full_like(old.stability, float("nan")) if move else old.stability  # moved by one start alone
        result = self._finish(pefs, rows, fit, lambda G: G, old.scales, stability, keep_order=True)
        result.names = dict(old.names)
        return result


class _HeldOut:
    """Relative loss of held-out PEFs, their coefficients at their minimum."""

    def __init__(self, A: Tensor, to_rows: Callable[[Tensor], Tensor], processes: Processes):
        self.rows = DenseRows(A)
        self.to_rows = to_rows
        self.processes = processes
        self.total = self.rows.total()

    def loss(self, G: Tensor) -> float:
        G = self.to_rows(G)
        N, H = self.rows.energies(G), overlaps(G)
        W = nonnegative_coefficients(N, H)
        return float(self.processes.first(loss_of(self.total, W, N.double(), H.double()) / self.total))


def _until_held_out_rises(
    rows: Rows, G: Tensor, held_out: _HeldOut, config: DecompositionConfig, progress: Progress, every: int = 10
) -> Fit:
    """Rounds of a few iterations, until the held-out loss no longer improves; the best round is kept."""
    fit = block_power(
        rows, G, max_iterations=min(every, config.max_iterations), tolerance=config.tolerance, progress=progress
    )
    best, best_loss = fit, held_out.loss(fit.G)
    losses = list(fit.losses)
    done = every
    worse = 0
    while not fit.converged and done < config.max_iterations:

        def onwards(iteration: int, loss: float, done: int = done) -> bool:
            return progress(done + iteration, loss)

        fit = block_power(
            rows,
            fit.G,
            W=fit.W,
            max_iterations=min(every, config.max_iterations - done),
            tolerance=config.tolerance,
            progress=onwards,
        )
        losses += fit.losses[1:]
        done += every
        now = held_out.loss(fit.G)
        if now < best_loss * (1 - config.tolerance):
            best, best_loss, worse = Fit(fit.W, fit.G, list(losses), True), now, 0
        else:
            worse += 1
            if worse >= 2:
                return dataclasses.replace(best, converged=True)
    return dataclasses.replace(best, converged=fit.converged)


def _stability(best: Fit, others: Sequence[Fit]) -> Tensor:
    """(r,): mean best |cosine| of every component with the other starts that explain nearly as much."""
    if not others:
        return torch.full((len(best.G),), float("nan"))
    explained = 1 - best.losses[-1]
    near = [fit for fit in others if 1 - fit.losses[-1] >= (1 - _NEAR) * explained]
    near = near or [min(others, key=lambda fit: fit.losses[-1])]
    return torch.stack([(best.G @ fit.G.T).abs().amax(1) for fit in near]).mean(0).float().cpu()
