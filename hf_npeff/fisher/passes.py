"""FisherPass: a batch of examples → rows, with the sketch chosen and tested on the first of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_npeff.config import FisherConfig, OutputFactor
from hf_npeff.data import Example, collate
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.factors import Cotangents, HiddenMetric, cotangents, reduce_rows, resolve, seeds_of
from hf_npeff.fisher.fsdp import Sharding
from hf_npeff.fisher.gradients import CalledOnceForAll, LinearHooks, LinearMap, RowCollector, find_linear_maps
from hf_npeff.fisher.heads import OutputHead, Outputs
from hf_npeff.fisher.metric import is_free, measure_metric, pilot_examples
from hf_npeff.fisher.parameters import fused_parameters, sketched_rows
from hf_npeff.fisher.selftest import (
    ROW_TOLERANCE,
    ROW_TOLERANCE_16_BIT,
    Run,
    SelfTest,
    candidates,
    check_rows,
    measure_sketches,
)
from hf_npeff.pefs.norms import normalise
from hf_npeff.pefs.sketches import Sketch

logger = logging.getLogger(__name__)
_SELFTEST_EXAMPLES = 8
_SELFTEST_TOKENS = 2048
_PADDING_EXAMPLES = 64
_SELFTEST_ROWS = 4
_NO_LOGITS = "the model gives NaN or infinite logits"
DEFAULT_DIMS = {"kronecker": 16, "countsketch": 16_384, "two-stage": 16_384, "identity": None}


class NotFiniteError(ValueError):
    """What the model gives for some examples of a batch is NaN or infinite.

    Attributes:
        places: of these examples in the batch.
        reason: without their names.
    """

    def __init__(self, examples: Sequence[Example], places: list[int], reason: str, remedy: str):
        super().__init__(f"{reason}, for the examples {[examples[i].id for i in places]}; {remedy}")
        self.places = places
        self.reason = reason


class PaddingError(ValueError):
    """The model gives NaN for examples in a padded batch, and numbers for each of them alone."""


class FisherPass:
    """Everything that turns a batch of examples into rows: the model, its head, the maps and the sketch.

    Args:
        model: frozen (see `gradients.frozen`).
        head: what it predicts.
        maps: the linear maps under analysis.
        config: rank, output factor, sketch.
        pad_token_id: what input ids are padded with.
        device: of the model's inputs.
        sketch: a fixed one; None to choose and measure one in `prepare`.
        describe: predictions of a batch → one string an example, kept as the column `prediction`.
        one_at_a_time: never put two examples into a batch.
        feels_padding: whether padding changes what the model predicts; None where that was not tried.
        parameters: other parameters under analysis, as `find_parameters` returns them.
        sharding: how processes keep in step where the model's weights are sharded over them.
    """

    def __init__(
        self,
        model: nn.Module,
        head: OutputHead,
        maps: Sequence[LinearMap],
        config: FisherConfig,
        pad_token_id: int | None,
        device: torch.device,
        sketch: Sketch | None = None,
        describe: Callable[[Tensor], list[str]] | None = None,
        one_at_a_time: bool = False,
        feels_padding: bool | None = None,
        parameters: Mapping[str, tuple[int, int]] | None = None,
        sharding: Sharding | None = None,
    ):
        self.model = model
        self.head = head
        self.maps = maps
        self.config = config
        self.device = device
        self.pad_token_id = pad_token_id
        self.sketch = sketch
        self.selftest: SelfTest | None = None
        self.metric: HiddenMetric | None = None
        self.describe = describe
        self.one_at_a_time = one_at_a_time
        self.feels_padding = feels_padding
        self.parameters = dict(parameters or {})
        self.sharding = sharding or Sharding(model)

    def batch(self, examples: Sequence[Example], device: torch.device | str) -> dict[str, Tensor]:
        """The inputs that the model takes, padded; a head of one's own gets all columns of lists."""
        return collate(examples, self.pad_token_id, device, getattr(self.head, "takes", None))

    def batch_size(self, examples: Sequence[Example], wanted: int) -> int:
        """`wanted`, or 1 where a batch would change rows: tried once, on the shortest and the longest of a few."""
        if self.one_at_a_time or wanted == 1:
            return 1
        if self.feels_padding is None:
            few = [examples[i] for i in range(min(len(examples), _PADDING_EXAMPLES))]
            self.feels_padding = self._padding_changes(*(f(few, key=lambda e: e.length) for f in (min, max)))
        return 1 if self.feels_padding else wanted

    @torch.no_grad()
    def _padding_changes(self, short: Example, long: Example) -> bool | None:
        """Whether the model predicts otherwise for an example that is padded; None if none would be.

        Transformers hide padding from attention, but a Fourier transform or a convolution over the tokens mixes it in.
        """
        if short.length == long.length:
            return None
        if self.sharding.active:
            return False
        try:
            together, alone = self.outputs([short, long]), self.outputs([short])
        except NotFiniteError:
            return False  # whoever runs the batch says which example it is
        padded, own = together.logits[0][together.valid[0]], alone.logits[0][alone.valid[0]]
        padded, own = padded[padded.isfinite()], own[own.isfinite()]
        if padded.shape != own.shape:
            return False
        change = float((padded - own).norm() / own.norm().clamp_min(torch.finfo(own.dtype).tiny))
        if change <= self._tolerance:
            return False
        logger.warning(
            "padding changes the model's logits by %.1f%%: going on with one example at a time", 100 * change
        )
        return True

    @property
    def _tolerance(self) -> float:
        """How much rows and logits may differ by rounding, relative."""
        narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        return ROW_TOLERANCE_16_BIT if narrow else ROW_TOLERANCE

    def outputs(self, examples: Sequence[Example]) -> Outputs:
        """One forward pass.

        Raises:
            NotFiniteError: if a logit is not finite (the examples are named).
            UnsupportedModelError: if the model has no way to compute in the type of its weights.
        """
        try:
            outputs = self.head.outputs(self.model, self.batch(examples, self.device))
        except RuntimeError as error:
            if "Double" not in str(error) or all(p.dtype != torch.float64 for p in self.model.parameters()):
                raise
            raise UnsupportedModelError(
                f"the model does not run in float64 ({error}): load it in float32, or, where its experts are at fault, "
                "with experts_implementation='eager'"
            ) from error
        self.sharding.gather_head(outputs.source)
        finite = torch.isfinite(outputs.logits) | outputs.logits.isneginf()
        fine = (finite | ~outputs.valid[..., None]).flatten(1).all(1)
        if not bool(fine.all()):
            places = (~fine).nonzero()[:, 0].tolist()
            remedy = "leave them out (on_error='skip') or fix the model"
            raise NotFiniteError(examples, places, _NO_LOGITS, remedy)
        return outputs

    def factor(self, outputs: Outputs) -> OutputFactor:
        """The output factor in use."""
        return resolve(self.config.output_factor, outputs, self.config.rank)

    def _cotangents(self, outputs: Outputs, examples: Sequence[Example]) -> Cotangents:
        factor, seeds = self.factor(outputs), seeds_of([e.id for e in examples], self.config.seed)
        return cotangents(outputs, factor, self.config.rank, seeds, self.metric)

    def run(self, examples: Sequence[Example]) -> Run:
        """A repeatable pass over a batch, with one row for every column of the cotangents of all terms together."""
        try:
            outputs = self.outputs(examples)
        except NotFiniteError as error:
            self.tell_padding(examples, error)
            raise
        V = self._cotangents(outputs, examples).values.transpose(1, 2)
        singles = tuple(Run(functools.partial(self._source, [e]), V[i : i + 1]) for i, e in enumerate(examples))
        return Run(functools.partial(self._source, examples), V, singles)

    def _source(self, examples: Sequence[Example]) -> Tensor:
        return self.outputs(examples).source

    def prepare(self, examples: Sequence[Example], *, skip: bool = False) -> SelfTest:
        """Choose the sketch, where it is open, and run the self-test on the first examples.

        Maps that hooks do not see are taken out of `maps`, with a warning.

        Args:
            examples: the first ones.
            skip: pass over those that give NaN.

        Raises:
            NotFiniteError: if the model gives NaN; with `skip`, if it does for all of them.
            UnsupportedModelError: if the rows from the hooks are not the model's gradients.
        """
        few = self._first(examples, skip)
        self.one_at_a_time = self.batch_size(few, 2) == 1
        error, unseen = self._check_rows(few[:2])
        total = self._size()
        self._warn_of_what_is_left_out(unseen, total)
        self.maps = [m for m in self.maps if m not in unseen]
        if self.sketch is not None and self.sketch.shapes != self.shapes:
            self.sketch = None
        self.sketch, measured, tried = self._measured_sketch(few)
        self.sketch.to(self.device)
        covered = sum(a * b for a, b in self.shapes.values()) / max(total, 1)
        left_out = tuple(m.parameter for m in unseen)
        self.selftest = SelfTest(len(few), measured, error, min(covered, 1.0), tried, left_out)
        if error is not None and error > self._tolerance:
            much = "altogether" if error == float("inf") else f"by {error:.1%}"
            raise UnsupportedModelError(
                f"the rows from hooks differ {much} from autograd's gradients: some module is used in a way that "
                "hooks do not see. Leave it out with exclude_modules, name its weight in `parameters`, or load the "
                "model in float32."
            )
        return self.selftest

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{parameter: (out, in)} of everything under analysis."""
        return {m.parameter: m.shape for m in self.maps} | self.parameters

    def _first(self, examples: Sequence[Example], skip: bool) -> list[Example]:
        """The examples of the self-test: the first ones that are short enough together."""
        few: list[Example] = []
        for example in examples:
            if len(few) == _SELFTEST_EXAMPLES:
                break
            fits = sum(e.length for e in few) + example.length <= _SELFTEST_TOKENS
            if fits and not (skip and self._not_finite(example)):
                few.append(example)
        return few or [min(examples, key=lambda e: e.length)]

    def _measured_sketch(self, few: Sequence[Example]) -> tuple[Sketch, float | None, dict[str, float]]:
        """The sketch as it is given, set or chosen; its error, None where one example cannot tell; those tried."""
        runs = [self.run([e]) for e in few] if self.one_at_a_time else [self.run(few)]
        narrowest = min(_SELFTEST_ROWS, *(run.values.shape[1] for run in runs))
        runs = [_narrowed(run, narrowest) for run in runs]
        measure = functools.partial(measure_sketches, self.model, self.maps, self.parameters, runs)
        config, sketch = self.config, self.sketch
        tried: dict[str, float] = {}
        if sketch is None and config.sketch != "auto":
            sketch = Sketch(self.shapes, config.sketch, config.sketch_dim or DEFAULT_DIMS[config.sketch], config.seed)
        elif sketch is None:
            tries = candidates(config, self.shapes)
            if len(tries) == 1 or len(few) == 1:
                sketch = Sketch(self.shapes, *tries[-1], seed=config.seed)
            else:
                sketch, tried = measure(tries, config.seed, config.sketch_tolerance)
        if sketch.kind == "identity":
            return sketch, 0.0, tried
        if len(few) == 1:
            return sketch, None, tried
        key = f"{sketch.kind} {sketch.setting}"
        if key not in tried:
            tried |= measure([(sketch.kind, sketch.setting)], sketch.seed, None)[1]
        return sketch, tried[key], tried

    def choose_metric(self) -> None:
        """Decide in which metric spectral rows are the best, and measure that of the parameters; before `prepare`.

        Raises:
            ValueError: if the config asks for the metric of the parameters, and rows do not enter at the hidden state
                of a causal language model.
        """
        wanted = self.config.spectral_metric
        usable = getattr(self.head, "task", None) == "causal-lm" and getattr(self.head, "at_hidden", False)
        # Linear weights may also be analysed as `parameters`: what is analysed decides, not how.
        others = find_linear_maps(self.model) if usable and self.parameters else []
        maps = [*self.maps, *(m for m in others if m.parameter in self.parameters)]
        pilots = pilot_examples(self.model, self.config.seed) if usable and maps else []
        usable = bool(pilots) and self.factor(self.outputs(pilots[:1])) == "spectral"
        if wanted == "parameters" and not usable:
            raise ValueError(
                "spectral_metric='parameters' is of spectral rows that enter at a causal language model's last hidden "
                "state; leave spectral_metric at 'auto' for this model and output factor"
            )
        self.metric = None
        if not usable or wanted == "hidden":
            return
        h = self.outputs(pilots[:1]).source.shape[-1]
        if wanted == "auto":
            wanted = "parameters" if is_free(h) else "hidden"
            self.config = replace(self.config, spectral_metric=wanted)
        if wanted == "parameters":
            sources = [functools.partial(self._source, [pilot]) for pilot in pilots]
            self.metric = measure_metric(self.model, maps, sources, self.config.seed)

    def _check_rows(self, few: Sequence[Example]) -> tuple[float | None, list[LinearMap]]:
        if not self.maps:
            return None, []
        if not self.one_at_a_time:
            try:
                return self._check_rows_of(few)
            except CalledOnceForAll as error:
                logger.warning("%s; going on with one example at a time", error)
                self.one_at_a_time = True
        return self._check_rows_of(few[-1:])

    def _check_rows_of(self, few: Sequence[Example]) -> tuple[float | None, list[LinearMap]]:
        run = self.run(few)
        self.sharding.release()  # a weight that is whole for the moment is not at hand
        return check_rows(self.model, self.maps, run, self.config.seed)

    def _size(self) -> int:
        """Numbers in all weights, those of a 4-bit weight as it is used and not as it is packed."""
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        sizes = {id(weight): weight.numel() for weight in weights.values()}
        sizes |= {id(weights[m.parameter]): m.shape[0] * m.shape[1] for m in self.maps}
        return sum(sizes.values())

    def _warn_of_what_is_left_out(self, unseen: Sequence[LinearMap], total: int) -> None:
        if unseen:
            share = sum(m.shape[0] * m.shape[1] for m in unseen) / total
            logger.warning(
                "the model reads the weights of %s without calling these modules, so hooks do not see them: %.1f%% of "
                "the parameters are left out. Name them in FisherConfig(parameters=...) to analyse them",
                ", ".join(m.parameter for m in unseen),
                100 * share,
            )
        if fused := fused_parameters(self.model, self.shapes):
            logger.warning(
                "%s are fused weights, not linear maps, and are left out: %.1f%% of the parameters. Name them in "
                "FisherConfig(parameters=...) to analyse them",
                ", ".join(fused),
                100 * sum(fused.values()),
            )

    def tell_padding(self, examples: Sequence[Example], error: NotFiniteError) -> None:
        """Say so where it is the padding of a batch, and no example, for which the model gives NaN.

        Raises:
            PaddingError: if it is.
        """
        if len(examples) == 1 or self.sharding.active or error.reason != _NO_LOGITS:
            return
        named = [examples[i] for i in error.places]
        try:
            for example in named:
                self.outputs([example])
        except NotFiniteError:
            return
        raise PaddingError(
            f"{error.reason}, for the examples {[e.id for e in named]} in a padded batch, and numbers for each of them "
            "alone: use batch_size=1, or load the model in float32"
        ) from error

    def _not_finite(self, example: Example) -> bool:
        """Whether the model gives NaN, in its logits or behind the narrowest of sketches."""
        sketch = self.sketch
        self.sketch = Sketch(self.shapes, "kronecker", 1).to(self.device)
        try:
            self.rows([example])
        except NotFiniteError:
            return True
        finally:
            self.sketch = sketch
        return False

    def rows(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """All that is stored of a batch: unit-norm factors, norms, cotangents, predictions, log_probs, entropies."""
        assert self.sketch is not None
        collector = RowCollector(self.sketch)
        with LinearHooks(self.model, self.maps, collector) as hooks:
            hooks.begin(len(examples))
            outputs = self.outputs(examples)
            V, joint = self._cotangents(outputs, examples)
            entering = _entering(V, joint)
            passes = self.sharding.most(len(entering))
            stacked = []
            for number in range(passes):
                v = entering[number] if number < len(entering) else torch.zeros_like(entering[0])
                collector.start(len(V), outputs.source.device, outputs.source.dtype)
                if self.maps:
                    hooks.backward(outputs.source, v, last=number == passes - 1)
                stacked.append(collector.finish())
            rows = torch.stack(stacked[: len(entering)], 1)
        if self.parameters:
            for e, example in enumerate(examples):
                single = Run(functools.partial(self._source, [example]), torch.stack([v[e] for v in entering])[None])
                values = single()[1].transpose(0, 1)
                rows[e] += sketched_rows(self.model, self.parameters, self.sketch, single.forward, values)
        if not bool(torch.isfinite(rows).all()):
            places = (~torch.isfinite(rows).flatten(1).all(1)).nonzero()[:, 0].tolist()
            remedy = "load the model in float32, or leave them out (on_error='skip')"
            raise NotFiniteError(examples, places, "the gradients are not finite", remedy)
        if not joint:
            rows, V = reduce_rows(rows, V, self.config.rank)
        unit, norms = normalise(rows)
        return {"factors": unit, "norms": norms, "cotangents": V.transpose(1, 2), **_predictions(outputs)}


def _entering(V: Tensor, joint: bool) -> list[Tensor]:
    """What enters at the source (B, t, s) in every backward pass: all terms together, or one term after another."""
    if joint:
        return list(V.unbind(2))
    passes = []
    for term in range(V.shape[1]):
        for column in range(V.shape[2]):
            v = torch.zeros_like(V[:, :, 0])
            v[:, term] = V[:, term, column]
            passes.append(v)
    return passes


def _narrowed(run: Run, columns: int) -> Run:
    singles = tuple(_narrowed(single, columns) for single in run.singles)
    return Run(run.forward, run.values[:, :columns], singles)


def _predictions(outputs: Outputs) -> dict[str, Tensor]:
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
