"""Many combinations of rows at once, directly at low rank: every cotangent is sent back once, however many there are.

The combinations themselves are never formed. For a weight, `thin_sums` holds r·k·(in + out) numbers, a fraction of the
weight, from which each combination is truncated to a rank. A second pass measures the leading directions again,
exactly.

Processes share the examples and add up the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.gradients import CalledOnceForAll, backward_passes
from hf_npeff.fisher.parameters import gradients
from hf_npeff.processes import Processes
from hf_npeff.weights.exact_lifting import place_of
from hf_npeff.weights.thin_sums import Bases, Cut, ProjectedSums, SampleSums, ThinSums, basis_of, is_kept_whole

_SAMPLED = 128
"""The number of examples whose gradients determine the bases; the random rows and X_j, Y_j still see what these miss.
With 64 a tenth of the time is saved, and cosines with the best cuts are the same for a MiniLM (.944 and .940, .996 and
.995), but five of the demo's six KL ratios are lower, their median 298 instead of 311."""
_PROBES = 12
"""The number of random rows in a basis; they estimate how much of a gradient the other rows miss."""


_HEAVY, _LIGHT = 1.2, 0.5
"""Weights with more energy than the first value, over the mean of all, get more directions, and weights with less than
the second get fewer. Chosen, with the sizes of `sizes_of`, so that memory is the same as with equal sizes for all."""


def sizes_of(rank: int, energy: float = 1.0) -> tuple[int, int]:
    """K and s of thin sums of a weight for a rank.

    The cosine over all weights matters, so the few weights that hold most of a change's energy get more. Measured
    on selective directions of four components of a MiniLM, rank 4: cosines with the best cut .986 .889 .806 .982 with
    k = 10 and s = 48 for every weight, .990 .910 .865 .984 with these at the same memory, 2.8 times that of the
    adapters, and .996 .961 .932 .995 with k = 16 and s = 96 at 5.4 times. Of plain directions it is above .99.

    Args:
        rank: the rank of the cuts.
        energy: the weight's share of the energy, over the mean of all weights.
    """
    k, s = max(2 * rank, rank + 3), max(14 * rank, 3 * _PROBES)  # no fewer than three directions beyond the rank
    if energy > _HEAVY:
        return max(5 * rank // 2, rank + 3), max(24 * rank, 3 * _PROBES)
    return (k, s) if energy > _LIGHT else (max(3 * rank // 2, rank + 2), max(9 * rank, 2 * _PROBES))


Places: TypeAlias = Mapping[str, tuple[tuple[int, int], torch.device, torch.dtype]]


@dataclass(frozen=True)
class Rows:
    """The unsketched rows of examples that are combined.

    Attributes:
        forward: the forward pass of the model that made them.
        examples: the n examples.
        cotangents: (n, c, t, s), as stored with the PEFs.
        coefficients: (r, n, c), of unscaled rows, for every combination.
        mixture: (n, c), a combination whose gradients span the same space as those of all combinations.
        batch_size: the number of examples in a forward pass.
        processes: the processes that share the examples.
    """

    forward: ForwardPass
    examples: Sequence[Example]
    cotangents: Tensor
    coefficients: Tensor
    mixture: Tensor
    batch_size: int
    processes: Processes

    @property
    def places(self) -> Places:
        """{parameter: shape, and where and in which type its sums are kept}."""
        weights = bare_parameters(self.forward.model)
        return {name: (shape, *place_of(weights.get(name))) for name, shape in self.forward.shapes.items()}

    @property
    def used(self) -> list[int]:
        """The examples that are part of any combination."""
        counted = self.coefficients.abs().sum((0, 2)) + self.mixture.abs().sum(1)
        return counted.nonzero()[:, 0].tolist()

    def batches(self, among: Sequence[int], size: int) -> list[list[int]]:
        """Batches of some examples."""
        return [[among[i] for i in batch] for batch in self.forward.batches([self.examples[i] for i in among], size)]


def mixture_of(coefficients: Tensor, seed: int = 0) -> Tensor:
    """A random combination (n, c) of combinations (r, n, c), each weighted by its size."""
    generator = torch.Generator().manual_seed(seed)
    size = coefficients.double().flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    signs = torch.randn(len(size), generator=generator, dtype=torch.float64) / size
    return torch.einsum("j,jic->ic", signs, coefficients.double())


def lift_low_rank(rows: Rows, rank: int, *, passes: int = 1, seed: int = 0) -> dict[str, Cut]:
    """Σ_i Σ_c coef_jic row_ic of unsketched rows, truncated to a rank, for every j.

    Args:
        rows: the rows to combine; the largest coefficient of every combination should be about 1.
        rank: the rank for every weight.
        passes: 2 measures each cut's leading directions again in a second pass over the examples, exactly.
        seed: the seed.

    Returns:
        {parameter: its cuts}, of rank `rank` or the largest possible for the weight.

    Raises:
        CalledOnceForAll: if a module mixes the examples of a batch, and a batch has only one example already.
    """
    try:
        return _lifted(rows, rank, passes, seed, rows.batch_size)
    except CalledOnceForAll:
        if rows.batch_size == 1:
            raise
        return _lifted(rows, rank, passes, seed, 1)


def _lifted(rows: Rows, rank: int, passes: int, seed: int, batch_size: int) -> dict[str, Cut]:
    places = rows.places
    sums = ThinSums(places, _bases(rows, places, rank, seed, batch_size), len(rows.coefficients))
    _go_through(rows, sums, batch_size)
    if passes == 1:
        return {name: sums.take(name, rank) for name in places}
    cuts = {name: sums.take(name, sizes_of(rank, torch.inf)[0]) for name in places}
    projected = ProjectedSums({name: cut for name, cut in cuts.items() if not is_whole(places[name][0], rank)})
    _go_through(rows, projected, batch_size)
    return {name: projected.take(name, cuts.pop(name), rank) for name in places}


def is_whole(shape: tuple[int, int], rank: int) -> bool:
    """Whether the whole sums of a weight are kept for a rank, so that the energy of its cuts is exact."""
    return is_kept_whole(shape, *sizes_of(rank))


def _bases(rows: Rows, places: Places, rank: int, seed: int, batch_size: int) -> dict[str, Bases]:
    """Bases of most of the space that some examples' gradients span; the same in every process.

    They take one backward pass of the mixture, over a sample of the examples.
    """
    large = {name: place[0] for name, place in places.items() if not is_whole(place[0], rank)}
    generator = torch.Generator().manual_seed(seed)
    maps = [m for m in rows.forward.maps if m.parameter in large]
    sample = SampleSums(large, sizes_of(rank, torch.inf)[1], generator)
    used = rows.used
    chosen = sorted(used[i] for i in torch.randperm(len(used), generator=generator)[:_SAMPLED].tolist())
    for indices in rows.batches(chosen, batch_size) if maps else ():
        stored = rows.cotangents[indices].double()
        cotangents = torch.einsum("ic,icts->its", rows.mixture[indices].double().to(stored.device), stored)
        source = rows.forward.source_of([rows.examples[i] for i in indices])
        backward_passes(rows.forward.model, maps, sample, len(indices), source, _always([cotangents]))
    drawn = {name: sample.of(name, shape) for name, shape in large.items()}
    energies = torch.tensor([float(left.double().square().sum()) for left, _ in drawn.values()], dtype=torch.float64)
    energies = rows.processes.first(energies / energies.mean().clamp_min(torch.finfo(torch.float64).tiny))
    bases = {}
    for (name, sides), energy in zip(drawn.items(), energies.tolist(), strict=True):
        k, s = sizes_of(rank, energy)
        if is_kept_whole(large[name], k, s):
            continue
        (left, p), (right, q) = (basis_of(side, k, s, _PROBES, generator) for side in sides)
        bases[name] = Bases(rows.processes.first(left), rows.processes.first(right), k, (p, q))
    return bases


def _always(cotangents: Sequence[Tensor]) -> Callable[[Tensor], Sequence[Tensor]]:
    """The cotangents that enter, independent of the source."""
    return lambda source: cotangents


def _go_through(rows: Rows, receiver: ThinSums | ProjectedSums, batch_size: int) -> None:
    """Send every cotangent back, each process for its share of the examples, and add up the sums of all processes."""
    forward, processes = rows.forward, rows.processes
    mine = [int(i) for i in processes.share_of(torch.tensor(rows.used)).tolist()] if rows.used else []
    batches = rows.batches(mine, batch_size)
    idle = forward.fsdp.most(len(batches)) - len(batches)  # processes that share a model run as many passes
    for indices, counted in [(b, 1.0) for b in batches] + [([rows.used[0]], 0.0)] * idle:
        stored = rows.cotangents[indices]
        receiver.begin(counted * rows.coefficients[:, indices])
        source = forward.source_of([rows.examples[i] for i in indices])
        if forward.maps:
            entering = _always(list(stored.unbind(1)))
            backward_passes(forward.model, forward.maps, receiver, len(indices), source, entering)
    for i in mine if forward.parameters else ():
        names = list(forward.parameters)
        source = forward.source_of([rows.examples[i]])
        for c, each in enumerate(gradients(forward.model, names, source, rows.cotangents[i : i + 1].transpose(0, 1))):
            for name, gradient in zip(names, each, strict=True):
                matrix = gradient.reshape(forward.parameters[name])
                receiver.add_matrix(name, matrix, rows.coefficients[:, i, c])
    for tensor in receiver.tensors() if processes.count > 1 else ():
        tensor.copy_(processes.sum(tensor))
