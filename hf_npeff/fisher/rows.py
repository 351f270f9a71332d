"""RowMaker: a batch of examples → the rows of their Fishers, with a sketch that is already chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_npeff.config import FisherConfig
from hf_npeff.data import Example
from hf_npeff.fisher.eigenpairs import HiddenMetric
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError
from hf_npeff.fisher.gradients import RowCollector, backward_passes
from hf_npeff.fisher.output_factors import Cotangents, cotangents, reduce_rows, resolve, seeds_of
from hf_npeff.fisher.outputs import Outputs
from hf_npeff.fisher.parameters import sketched_rows
from hf_npeff.fisher.selftest import SelfTest
from hf_npeff.pefs.norms import normalise
from hf_npeff.pefs.sketches import Sketch


@dataclass(frozen=True)
class RowMaker:
    """Turns a batch of examples into rows; `prepare` makes a tested one.

    Attributes:
        forward: the forward pass.
        config: rank and output factor.
        sketch: the sketch that shortens the rows.
        metric: the metric of the hidden state in which spectral rows are the best ones; None uses the hidden state's
            own.
        selftest: the result of the self-test; None if the maker was not tested.
        tested: the examples whose rows the self-test compared with autograd's.
    """

    forward: ForwardPass
    config: FisherConfig
    sketch: Sketch
    metric: HiddenMetric | None = None
    selftest: SelfTest | None = None
    tested: tuple[Example, ...] = ()

    def log(self, tolerance: float) -> None:
        """Log the result of the self-test, and warn if the sketch is less accurate than the tolerance."""
        if self.selftest is not None:
            self.selftest.log(self.sketch, tolerance)

    def rows(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The tensors to store for a batch: rows at unit norm, norms, cotangents, predictions, log_probs, entropies.

        Raises:
            NotFiniteError: if logits or gradients are not finite (the examples are named).
            UnsupportedModelError: if no analysed map influences the output, or a map's inputs cannot be assigned to
                examples.
        """
        return self.rows_and_calls(examples)[0]

    def rows_and_calls(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], frozenset[str]]:
        """The same tensors, and the parameters of the linear maps whose modules were called.

        Raises:
            NotFiniteError: see `rows`.
            UnsupportedModelError: see `rows`.
        """
        chosen: list[Cotangents] = []

        def entering(outputs: Outputs) -> list[Tensor]:
            chosen.append(choose_cotangents(self.config, self.metric, outputs, examples))
            return _enter(*chosen[0])

        outputs, rows, ran = self._collect(examples, entering)
        V, joint = chosen[0]
        if not bool(torch.isfinite(rows).all()):
            places = (~torch.isfinite(rows).flatten(1).all(1)).nonzero()[:, 0].tolist()
            remedy = "load the model in float32, or leave them out (on_error='skip')"
            raise NotFiniteError(examples, places, "the gradients are not finite", remedy)
        if not joint:
            rows, V = reduce_rows(rows, V, self.config.rank)
        unit, norms = normalise(rows)
        tensors = {"factors": unit, "norms": norms, "cotangents": V.transpose(1, 2), **predictions_of(outputs)}
        return tensors, ran

    def rows_of(self, examples: Sequence[Example], values: Tensor) -> Tensor:
        """Sketched rows (B, c, d) for given cotangents (B, c, t, s)."""
        return self._collect(examples, lambda outputs: list(values.unbind(1)))[1]

    def _collect(
        self, examples: Sequence[Example], entering: Callable[[Outputs], list[Tensor]]
    ) -> tuple[Outputs, Tensor, frozenset[str]]:
        """The outputs of a batch, its sketched rows (B, m, d) for m cotangents (B, t, s), and the maps that ran.

        Processes that share a model run as many backward passes as the one that needs the most.
        """
        forward, collector = self.forward, RowCollector(self.sketch)
        outputs: list[Outputs] = []
        used: list[Tensor] = []

        def source() -> Tensor:
            outputs.append(forward.outputs(examples))
            return outputs[0].source

        def in_step(source: Tensor) -> list[Tensor]:
            used.extend(entering(outputs[0]))
            idle = forward.fsdp.most(len(used)) - len(used)
            return used + [torch.zeros_like(used[0])] * idle

        ran = backward_passes(forward.model, forward.maps, collector, len(examples), source, in_step)
        rows = collector.rows[:, : len(used)]
        if forward.parameters:
            for i, example in enumerate(examples):
                values = torch.stack([v[i : i + 1] for v in used])
                single = forward.source_of([example])
                rows[i] += sketched_rows(forward.model, forward.parameters, self.sketch, single, values)
        return outputs[0], rows, ran


def choose_cotangents(
    config: FisherConfig, metric: HiddenMetric | None, outputs: Outputs, examples: Sequence[Example]
) -> Cotangents:
    """The cotangents that make the rows of a batch with these outputs."""
    factor = resolve(config.output_factor, outputs, config.rank)
    if metric is not None and len(metric.root) != outputs.source.shape[-1]:
        metric = None  # cotangents enter at the logits, as a later pass has shown
    return cotangents(outputs, factor, config.rank, seeds_of([e.id for e in examples], config.seed), metric)


def _enter(V: Tensor, joint: bool) -> list[Tensor]:
    """The cotangents (B, t, s) of every backward pass: all terms together, or one term after another."""
    if joint:
        return list(V.unbind(2))
    passes = []
    for term in range(V.shape[1]):
        for column in range(V.shape[2]):
            v = torch.zeros_like(V[:, :, 0])
            v[:, term] = V[:, term, column]
            passes.append(v)
    return passes


def predictions_of(outputs: Outputs) -> dict[str, Tensor]:
    """The stored values of a batch's predictions: predictions, log_probs, and the entropies of classes."""
    B, t, _ = outputs.logits.shape
    distribution = outputs.distribution(outputs.logits.flatten(0, 1))
    best, log_probs = distribution.predictions()
    result = {"predictions": best.reshape(B, t, *best.shape[1:]), "log_probs": log_probs.reshape(B, t)}
    if outputs.distribution.name == "softmax":
        log_p = outputs.logits.flatten(0, 1).log_softmax(-1)
        entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
        result["entropies"] = entropy.reshape(B, t)
        result["predictions"] = torch.where(outputs.valid, result["predictions"], -1)
    for name in ("log_probs", "entropies"):
        if name in result:
            result[name] = torch.where(outputs.valid, result[name], 0.0)
    if t == 1:
        result = {name: value[:, 0] for name, value in result.items()}
    return result
