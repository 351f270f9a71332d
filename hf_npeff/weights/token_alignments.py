"""The contribution of every position of an example to the example's alignment with a component.

The alignment of example i with component j is N_ij = ‖A_i g_j‖² = Σ_c ⟨a_ic, g_j⟩². A row is a gradient, and a gradient
is a sum over the positions at which a weight was used, so with b_ijc = ⟨a_ic, g_j⟩

    N_ij = Σ_c b_ijc Σ_t ⟨a_ict, g_j⟩ = Σ_t n_ijt,      n_ijt = Σ_c b_ijc ⟨a_ict, g_j⟩

The rows of an example mix by its cotangents, so Σ_c b_ijc a_ict comes from a single backward pass. No row of a position
is ever formed: ⟨P(δ_t x_tᵀ), g⟩ = (P_out δ_t)ᵀ M (P_in x_t) with M the adjoint of the sketch's placement at g, exactly
and for every kind of sketch. Contributions may be negative; they sum to N_ij.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.weighting import mixing_of
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.fisher.gradients import CalledOnceForAll, Receiver, backward_passes
from hf_npeff.fisher.parameters import sketched_rows
from hf_npeff.fisher.routing import Routing, product_by_expert
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.decomposed import Decomposed, check_decomposed

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class TokenAlignment:
    """The alignment of one example with one component, position by position.

    Attributes:
        component: the number of the component.
        example: the example's position among the analysed ones.
        alignment: N_ij, for the example's PEF as it was decomposed (unit norm, balance, power).
        tokens: the token at each position; None if the input is not text.
        contributions: the contribution of each position; together with `unplaced` they sum to `alignment`.
        unplaced: the contribution of weights that are not used at positions of the input: pooled heads, decoders, and
            parameters that hooks do not see (biases, norms, embeddings).
    """

    component: int
    example: int
    alignment: float
    tokens: list[str] | None
    contributions: list[float]
    unplaced: float

    def __repr__(self) -> str:
        where = f"component {self.component}, example {self.example}"
        return f"TokenAlignment({where}, {len(self.contributions)} positions, {self.alignment:.3g})"


class TokenCollector(Receiver):
    """A receiver that computes the inner product of every position's gradient with one direction g in the sketch.

    Args:
        sketch: P.
        g: (d,).
        positions: the number of positions of an example in the input; a module that runs at another number of
            positions is not placed.
        placed: whether a parameter is used at positions of the input at all.
    """

    def __init__(self, sketch: Sketch, g: Tensor, positions: int, placed: Callable[[str], bool] = lambda name: True):
        self._sketch = sketch
        self._g = g
        self._positions = positions
        self._is_placed = placed
        self._matrices: dict[str, Tensor] = {}
        self.placed = torch.zeros(0, positions, dtype=torch.float64)
        self.unplaced = torch.zeros(0, dtype=torch.float64)

    def after_forward(self, source: Tensor, passes: int) -> None:
        """Begin the contributions of every example."""
        self.placed = torch.zeros(len(source), self._positions, dtype=torch.float64)
        self.unplaced = torch.zeros(len(source), dtype=torch.float64)

    def take_input(self, name: str, x: Tensor) -> Tensor:
        """P_in x, once a forward pass."""
        return self._sketch.project_input(name, x)

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        """Add (P_out δ_t)ᵀ M (P_in x_t) of every position t."""
        delta = self._sketch.project_output(name, delta)
        M = self._matrix(name, delta)
        self._add(name, ((delta.to(M.dtype) @ M) * saved.to(M.dtype)).sum(-1, dtype=torch.float64).cpu())

    def take_routed_input(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """P_in x of fused experts."""
        return self._sketch.project_input(name, x)

    def take_routed_gradient(self, name: str, saved: Tensor, delta: Tensor, routing: Routing) -> None:
        """Add the same of every token, summed over its experts."""
        if self._sketch.has_output_side(name):
            delta = self._sketch.project_output_by_expert(name, delta, routing.counts)
            M = self._matrix(name, delta)
            through = delta.to(M.dtype) @ M
        else:
            parts = self._matrix(name, delta).unflatten(0, (len(routing.counts), -1))
            through = product_by_expert(delta.to(parts.dtype), parts.mT, routing.counts)
        each = (through * saved.to(through.dtype)).sum(-1, keepdim=True, dtype=torch.float64)
        self._add(name, routing.by_example(each).unflatten(1, (-1, routing.slots)).sum((2, 3)).cpu())

    def _matrix(self, name: str, delta: Tensor) -> Tensor:
        """M (k_out, k_in), where δ is and in float32 or wider."""
        if name not in self._matrices:
            self._matrices[name] = self._sketch.placement_adjoint(name, self._g)
        return self._matrices[name].to(delta.device, torch.promote_types(delta.dtype, torch.float32))

    def _add(self, name: str, contributions: Tensor) -> None:
        """Contributions (B, t) of every position to its place, or to what has none."""
        if contributions.shape[1] == self._positions and self._is_placed(name):
            self.placed += contributions
        else:
            self.unplaced += contributions.sum(1)


def token_alignments(
    forward: ForwardPass,
    decomposed: Decomposed,
    chosen: Mapping[int, Sequence[int]],
    decode: Decode | None,
    batch_size: int,
) -> list[TokenAlignment]:
    """Alignments of chosen examples, position by position, from one backward pass for every example and component.

    Args:
        forward: the forward pass of the model that made the rows.
        decomposed: the decomposition with its PEFs and examples.
        chosen: {component: examples}; examples on which a component's coefficient is zero are left out.
        decode: token ids → text; None if there is no tokenizer.
        batch_size: the number of examples in a forward pass.

    Raises:
        IncompatibleSketchError: if the PEFs have another sketch than the decomposition.
        ValueError: if they are of other examples, or have no cotangents because their rows were not made by hf_npeff.
    """
    check_decomposed(decomposed.decomposition, decomposed.pefs)
    cotangents, sketch = decomposed.cotangents(), decomposed.sketch().to(forward.device)
    replay = _Replay(forward, sketch, decomposed, cotangents, decode)
    alignments: dict[tuple[int, int], TokenAlignment] = {}
    for j, given in chosen.items():
        wanted = [i for i in given if decomposed.decomposition.coefficients[i, j] > 0]
        for batch in forward.batches([decomposed.examples[i] for i in wanted], batch_size):
            for alignment in replay.run(j, [wanted[at] for at in batch]):
                alignments[j, alignment.example] = alignment
    return [alignments[j, i] for j, given in chosen.items() for i in given if (j, i) in alignments]


def scaled(decomposition: Decomposition, j: int) -> Tensor:
    """D∘g_j: its inner products with unbalanced rows are those of g_j with balanced ones."""
    g = decomposition.pseudo_fishers[j].double()
    return g if decomposition.scales is None else g * decomposition.scales.double()


def mixed_rows(decomposition: Decomposition, pefs: PEFs, j: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """N_ij (m,) of m examples, and the weights (m, c) with which their unscaled rows make Σ_c b_ijc a_ic, float64."""
    part = pefs[list(indices)]
    A = part.factors.to(torch.promote_types(part.factors.dtype, torch.float32))
    T = mixing_of(A, decomposition.scales, decomposition.config.power)
    b = torch.einsum("iab,ibd,d->ia", T, A.double(), scaled(decomposition, j))
    norms = part.norms.double()
    weights = torch.einsum("ia,iab->ib", b, T) * torch.where(norms > 0, norms, 1.0).rsqrt()[:, None]
    return b.square().sum(1), weights


@dataclass(frozen=True)
class _Replay:
    """Passes over examples whose cotangents are known."""

    forward: ForwardPass
    sketch: Sketch
    decomposed: Decomposed
    cotangents: Tensor
    decode: Decode | None

    def run(self, j: int, indices: list[int]) -> list[TokenAlignment]:
        """Run a batch, or its examples one by one if a module runs once for the whole batch."""
        try:
            return self._batch(j, indices)
        except CalledOnceForAll:
            return [alignment for i in indices for alignment in self._batch(j, [i])]

    def _batch(self, j: int, indices: list[int]) -> list[TokenAlignment]:
        forward, batch = self.forward, [self.decomposed.examples[i] for i in indices]
        decomposition = self.decomposed.decomposition
        N, weights = mixed_rows(decomposition, self.decomposed.pefs, j, indices)
        ids, mask = _input_positions(forward, batch)
        g = scaled(decomposition, j)
        seq2seq = bool(getattr(getattr(forward.model, "config", None), "is_encoder_decoder", False))
        positions = _patches(forward, batch) if mask is None else mask.shape[1]
        collector = TokenCollector(self.sketch, g, positions, _Placed(seq2seq))
        # Very small or large norms lose no precision if the largest cotangent is 1 meanwhile.
        V = torch.einsum("ic,icts->its", weights, self.cotangents[indices].double())
        largest = V.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
        V = V / largest[:, None, None]
        source = forward.source_of(batch)
        backward_passes(forward.model, forward.maps, collector, len(batch), source, lambda _: [V])
        placed = collector.placed * largest[:, None]
        unplaced = (collector.unplaced + self._by_autograd(batch, V, g)) * largest
        alignments = []
        for row, i in enumerate(indices):
            keep = slice(None) if mask is None else mask[row]
            values, tokens = placed[row][keep].tolist(), None
            if ids is not None:
                tokens, values = in_pieces(ids[row][keep].tolist(), values, self.decode)
            alignments.append(TokenAlignment(j, i, float(N[row]), tokens, values, float(unplaced[row])))
        return alignments

    def _by_autograd(self, batch: Sequence[Example], V: Tensor, g: Tensor) -> Tensor:
        """The part (m,) of parameters that hooks do not see, for cotangents (m, t, s)."""
        forward, total = self.forward, torch.zeros(len(batch), dtype=torch.float64)
        for row, example in enumerate(batch if forward.parameters else ()):
            source, cotangent = forward.source_of([example]), V[None, row : row + 1].to(forward.device)
            rows = sketched_rows(forward.model, forward.parameters, self.sketch, source, cotangent)
            total[row] = float(rows[0].double().cpu() @ g)
        return total


@dataclass(frozen=True)
class _Placed:
    """Whether a parameter is used at the positions of the input: the decoder of an encoder-decoder is not."""

    seq2seq: bool

    def __call__(self, name: str) -> bool:
        return not (self.seq2seq and "decoder" in name.split("."))


def _input_positions(forward: ForwardPass, batch: Sequence[Example]) -> tuple[Tensor | None, Tensor | None]:
    """Token ids (B, t) of the padded batch, and which of them are not padding; choices come one after another."""
    values = forward.batch(batch, "cpu")
    if "input_ids" not in values:
        return None, None
    return values["input_ids"].flatten(1), None if values.real is None else values.real.flatten(1)


class _Counter(Receiver):
    """A receiver that only notes at how many positions linear maps run."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def take_input(self, name: str, x: Tensor) -> None:
        self.counts.append(x.shape[1])

    def take_routed_input(self, name: str, x: Tensor, routing: Routing) -> None:
        self.counts.append(routing.tokens // routing.batch)


def _patches(forward: ForwardPass, batch: Sequence[Example]) -> int:
    """Positions of an image: the most common number at which the model's linear maps run."""
    counter = _Counter()
    backward_passes(forward.model, forward.maps, counter, len(batch), forward.source_of(batch), lambda _: ())
    return max(set(counter.counts), key=lambda t: (counter.counts.count(t), t), default=1)


def in_pieces(ids: Sequence[int], values: Sequence[float], decode: Decode | None) -> tuple[list[str], list[float]]:
    """Tokens as the text that each adds, and their values; tokens that share a character become one piece.

    A token's text is what it adds to the text of the piece before it, because tokenizers write a token differently at
    the beginning of a text.
    """
    if decode is None:
        return [str(i) for i in ids], list(values)
    pieces: list[str] = []
    sums: list[float] = []
    before: list[int] = []
    group: list[int] = []
    total = 0.0
    for number, (token, value) in enumerate(zip(ids, values, strict=True)):
        group.append(int(token))
        total += value
        start, whole = decode(before) if before else "", decode(before + group)
        added = whole[len(start) :] if whole.startswith(start) else decode(group)
        if added.endswith("\ufffd") and number < len(ids) - 1 and len(group) < 8:
            continue  # part of a character: at most four bytes, and eight tokens even where each is half of one
        pieces.append(added)
        sums.append(total)
        before, group, total = group, [], 0.0
    return pieces, sums
