"""The loop from examples to a store of PEFs, over batches and processes; it resumes.

Each process takes a contiguous share of the examples and writes its own shards; within a shard, examples are batched
by length and put back into the data set's order. Memory does not grow with the number of examples.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_npeff.config import FisherConfig, OutputFactor
from hf_npeff.data import Example, Examples, batches_by_length, collate
from hf_npeff.errors import NPEFFError, UnsupportedModelError
from hf_npeff.fisher.distributions import OutputHead, Outputs
from hf_npeff.fisher.factors import cotangents, reduce_rows, resolve, seeds_of
from hf_npeff.fisher.gradients import CalledOnceForAll, LinearHooks, LinearMap, RowCollector
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
from hf_npeff.fisher.sketches import Sketch
from hf_npeff.store import FORMAT_VERSION, PEFs, StoreWriter, joined_columns, normalise, padded_cat

logger = logging.getLogger(__name__)
_SELFTEST_EXAMPLES = 8
_SELFTEST_TOKENS = 2048
_SELFTEST_ROWS = 4
_AUTO_EXAMPLES = 64
_AUTO_TOKENS = 16_384
DEFAULT_DIMS = {"kronecker": 16, "countsketch": 16_384, "two-stage": 16_384, "identity": None}


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
        parameters: other parameters under analysis, as `find_parameters` returns them.
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
        parameters: Mapping[str, tuple[int, int]] | None = None,
    ):
        self.model = model
        self.head = head
        self.maps = maps
        self.config = config
        self.device = device
        self.pad_token_id = pad_token_id
        self.sketch = sketch
        self.selftest: SelfTest | None = None
        self.describe = describe
        self.one_at_a_time = one_at_a_time
        self.parameters = dict(parameters or {})

    def outputs(self, examples: Sequence[Example]) -> Outputs:
        """One forward pass.

        Raises:
            ValueError: if a logit is not finite (the examples are named).
        """
        outputs = self.head.outputs(self.model, collate(examples, self.pad_token_id, self.device))
        finite = torch.isfinite(outputs.logits) | outputs.logits.isneginf()
        fine = (finite | ~outputs.valid[..., None]).flatten(1).all(1)
        if not bool(fine.all()):
            bad = [examples[i].id for i in (~fine).nonzero()[:, 0].tolist()]
            raise ValueError(
                f"the model gives NaN or infinite logits for the examples {bad}; leave them out or fix the model"
            )
        return outputs

    def factor(self, outputs: Outputs) -> OutputFactor:
        """The output factor in use."""
        return resolve(self.config.output_factor, outputs, self.config.rank)

    def _seeds(self, examples: Sequence[Example]) -> list[int]:
        return seeds_of([e.id for e in examples], self.config.seed)

    def _run(self, examples: Sequence[Example]) -> Run:
        """A repeatable pass over a batch, with one row for every column of the cotangents of all terms together."""
        outputs = self.outputs(examples)
        V = cotangents(outputs, self.factor(outputs), self.config.rank, self._seeds(examples)).values.transpose(1, 2)
        singles = tuple(Run(functools.partial(self._source, [e]), V[i : i + 1]) for i, e in enumerate(examples))
        return Run(functools.partial(self._source, examples), V, singles)

    def _source(self, examples: Sequence[Example]) -> Tensor:
        return self.outputs(examples).source

    def prepare(self, examples: Sequence[Example]) -> SelfTest:
        """Choose the sketch, where it is open, and run the self-test on the first examples.

        Maps that hooks do not see are taken out of `maps`, with a warning.

        Raises:
            UnsupportedModelError: if the rows from the hooks are not the model's gradients.
        """
        few: list[Example] = []
        for example in examples:
            if len(few) < _SELFTEST_EXAMPLES and sum(e.length for e in few) + example.length <= _SELFTEST_TOKENS:
                few.append(example)
        few = few or [min(examples, key=lambda e: e.length)]
        error, unseen = self._check_rows(few[:2])
        total = sum(p.numel() for p in self.model.parameters())
        self._warn_of_what_is_left_out(unseen, total)
        self.maps = [m for m in self.maps if m not in unseen]
        shapes = {m.parameter: m.shape for m in self.maps} | self.parameters
        if self.sketch is not None and self.sketch.shapes != shapes:
            self.sketch = None
        runs = [self._run([e]) for e in few] if self.one_at_a_time else [self._run(few)]
        narrowest = min(_SELFTEST_ROWS, *(run.values.shape[1] for run in runs))
        runs = [_narrowed(run, narrowest) for run in runs]
        measure = functools.partial(measure_sketches, self.model, self.maps, self.parameters, runs)
        tried: dict[str, float] = {}
        if self.sketch is None:
            if self.config.sketch == "auto":
                tries = candidates(self.config, shapes)
                if len(tries) == 1 or len(few) == 1:
                    self.sketch = Sketch(shapes, *tries[-1], seed=self.config.seed)
                else:
                    self.sketch, tried = measure(tries, self.config.seed, self.config.sketch_tolerance)
            else:
                dim = self.config.sketch_dim or DEFAULT_DIMS[self.config.sketch]
                self.sketch = Sketch(shapes, self.config.sketch, dim, self.config.seed)
        measured: float | None = None
        if self.sketch.kind == "identity":
            measured = 0.0
        elif len(few) > 1:
            key = f"{self.sketch.kind} {self.sketch.setting}"
            if key not in tried:
                tried |= measure([(self.sketch.kind, self.sketch.setting)], self.sketch.seed, None)[1]
            measured = tried[key]
        self.sketch.to(self.device)
        covered = sum(a * b for a, b in shapes.values()) / max(total, 1)
        left_out = tuple(m.parameter for m in unseen)
        self.selftest = SelfTest(len(few), measured, error, min(covered, 1.0), tried, left_out)
        narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        if error is not None and error > (ROW_TOLERANCE_16_BIT if narrow else ROW_TOLERANCE):
            much = "altogether" if error == float("inf") else f"by {error:.1%}"
            raise UnsupportedModelError(
                f"the rows from hooks differ {much} from autograd's gradients: some module is used in a way that "
                "hooks do not see. Leave it out with exclude_modules, name its weight in `parameters`, or load the "
                "model in float32."
            )
        return self.selftest

    def _check_rows(self, few: Sequence[Example]) -> tuple[float | None, list[LinearMap]]:
        if not self.maps:
            return None, []
        if not self.one_at_a_time:
            try:
                return check_rows(self.model, self.maps, self._run(few), self.config.seed)
            except CalledOnceForAll as error:
                logger.warning("%s; going on with one example at a time", error)
                self.one_at_a_time = True
        return check_rows(self.model, self.maps, self._run(few[-1:]), self.config.seed)

    def _warn_of_what_is_left_out(self, unseen: Sequence[LinearMap], total: int) -> None:
        if unseen:
            share = sum(m.shape[0] * m.shape[1] for m in unseen) / total
            logger.warning(
                "the model reads the weights of %s without calling these modules, so hooks do not see them: %.1f%% of "
                "the parameters are left out. Name them in FisherConfig(parameters=...) to analyse them",
                ", ".join(m.parameter for m in unseen),
                100 * share,
            )
        analysed = {m.parameter: m.shape for m in self.maps} | self.parameters
        if fused := fused_parameters(self.model, analysed):
            logger.warning(
                "%s are fused weights, not linear maps, and are left out: %.1f%% of the parameters. Name them in "
                "FisherConfig(parameters=...) to analyse them",
                ", ".join(fused),
                100 * sum(fused.values()),
            )

    def rows(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """All that is stored of a batch: unit-norm factors, norms, cotangents, predictions, log_probs, entropies."""
        assert self.sketch is not None
        collector = RowCollector(self.sketch)
        with LinearHooks(self.model, self.maps, collector) as hooks:
            hooks.begin(len(examples))
            outputs = self.outputs(examples)
            factor = self.factor(outputs)
            V, joint = cotangents(outputs, factor, self.config.rank, self._seeds(examples))
            entering = _entering(V, joint)
            stacked = []
            for number, v in enumerate(entering):
                collector.start(len(V), outputs.source.device, outputs.source.dtype)
                if self.maps:
                    hooks.backward(outputs.source, v, last=number == len(entering) - 1)
                stacked.append(collector.finish())
            rows = torch.stack(stacked, 1)
        if self.parameters:
            for e, example in enumerate(examples):
                single = Run(functools.partial(self._source, [example]), torch.stack([v[e] for v in entering])[None])
                values = single()[1].transpose(0, 1)
                rows[e] += sketched_rows(self.model, self.parameters, self.sketch, single.forward, values)
        if not joint:
            rows, V = reduce_rows(rows, V, self.config.rank)
        if not bool(torch.isfinite(rows).all()):
            bad = [examples[i].id for i in (~torch.isfinite(rows).flatten(1).all(1)).nonzero()[:, 0].tolist()]
            raise ValueError(
                f"the gradients of the examples {bad} are not finite; load the model in float32, or leave them out"
            )
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


def share_of(n: int, process: int, processes: int) -> range:
    """The contiguous share of n examples of one of several processes; sizes differ by one at most."""
    return range(n * process // processes, n * (process + 1) // processes)


def _missing(share: range, done: Mapping[int, int], size: int) -> Iterator[range]:
    """What no finished shard holds of a share, whatever run wrote them, in parts of at most `size` examples."""
    at = share.start
    for start, length in [*sorted(done.items()), (share.stop, 0)]:
        stop = min(start, share.stop)
        for first in range(at, stop, size):
            yield range(first, min(first + size, stop))
        at = max(at, start + length)


def dataset_hash(examples: Iterable[Example]) -> str:
    """Tells a data set from another when a run resumes: ids and contents, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}\0{example.content}\0".encode())
    return digest.hexdigest()[:32]


def compute(
    work: FisherPass,
    examples: Examples,
    *,
    facts: Mapping[str, Any],
    output_dir: Path | None,
    batch_size: int | None,
    shard_size: int,
    shares: Sequence[range],
    process: int,
    barrier: Any,
    progress: bool,
) -> PEFs | None:
    """Compute the PEFs of all examples; with several processes, this one's share.

    Args:
        work: the pass over a batch, prepared.
        examples: all of them.
        facts: model, revision, task, versions and data set for config.json.
        output_dir: where the store is written; None keeps it in memory (one process only).
        batch_size: the most examples of a batch; None finds one by halving when memory runs out.
        shard_size: examples of a shard.
        shares: every process's contiguous share.
        process: which of them this is.
        barrier: called where processes wait for one another.
        progress: whether to show a progress bar.

    Returns:
        The PEFs; the loaded store on every process.
    """
    assert work.sketch is not None and work.selftest is not None
    resolved = replace(work.config, sketch=work.sketch.kind, sketch_dim=work.sketch.setting)
    info = {
        "format_version": FORMAT_VERSION,
        "fingerprint": work.sketch.fingerprint,
        "fisher": resolved.to_dict(),
        "sketch": work.sketch.to_dict(),
        "selftest": work.selftest.to_dict(),
        **facts,
    }
    writer, done = None, {}
    if output_dir is not None:
        if process == 0:
            writer = StoreWriter(output_dir, info)
        barrier()
        if writer is None:
            writer = StoreWriter(output_dir, info, write_info=False)
        done = writer.done()
        barrier()
    kept = []
    sizer = _BatchSize(1 if work.one_at_a_time else batch_size)
    parts = list(_missing(shares[process], done, shard_size))
    already = len(shares[process]) - sum(map(len, parts))
    with tqdm(total=len(shares[process]), initial=already, desc="PEFs", unit="example", disable=not progress) as bar:
        for part in parts:
            tensors, columns = _shard(work, [examples[i] for i in part], sizer, bar)
            if writer is None:
                kept.append((tensors, columns))
            else:
                writer.write_shard(part.start, tensors, columns)
    if writer is None or output_dir is None:
        return PEFs({}, joined_columns([columns for _, columns in kept]), info, [tensors for tensors, _ in kept])
    barrier()
    if process == 0:
        writer.finish(len(examples))
    barrier()
    return PEFs.load(output_dir, verify=False)


class _BatchSize:
    """The most examples of a batch: fixed, or bounded by padded tokens, which are halved when memory runs out."""

    def __init__(self, fixed: int | None):
        self.value = _AUTO_EXAMPLES if fixed is None else fixed
        self.max_tokens = _AUTO_TOKENS if fixed is None else None

    def halve(self, batch: int, length: int, error: BaseException) -> None:
        """Fewer tokens than those of a batch that was too large, or the error for people."""
        if self.max_tokens is None or batch == 1:
            advice = "use a smaller batch_size, or batch_size='auto'" if batch > 1 else "use shorter examples"
            raise NPEFFError(f"out of memory with {batch} examples of {length} tokens in a batch; {advice}") from error
        self.max_tokens = batch * length // 2
        logger.warning("out of memory: going on with at most %d tokens in a batch", self.max_tokens)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _shard(
    work: FisherPass, examples: Sequence[Example], sizer: _BatchSize, bar: Any
) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """The tensors and columns of one shard, in the order of the examples."""
    lengths = [e.length for e in examples]
    order: list[int] = []
    results: list[dict[str, Tensor]] = []
    dtype = getattr(torch, work.config.storage_dtype)
    pending = list(range(len(examples)))
    while pending:
        left = [lengths[i] for i in pending]
        batch = [pending[i] for i in next(batches_by_length(left, sizer.value, sizer.max_tokens))]
        try:
            rows = work.rows([examples[i] for i in batch])
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            sizer.halve(len(batch), max(lengths[i] for i in batch), error)
            continue
        rows["factors"] = rows["factors"].to(dtype)
        results.append({name: value.detach().cpu() for name, value in rows.items()})
        order += batch
        taken = set(batch)
        pending = [i for i in pending if i not in taken]
        bar.update(len(batch))
    place = torch.argsort(torch.tensor(order))
    names = results[0]
    fill = {"predictions": -1}
    tensors = {}
    for name in names:
        values = [r[name] for r in results]
        if name == "cotangents":  # (B, c, t, s): batches differ in their number of terms
            values = [v.transpose(1, 2) for v in values]
        joined = padded_cat(values, fill.get(name, 0))[place]
        tensors[name] = joined.transpose(1, 2).contiguous() if name == "cotangents" else joined
    columns: dict[str, list[Any]] = {
        "example_id": [e.id for e in examples],
        "content_hash": [e.content for e in examples],
    }
    kept = {name for e in examples for name in e.columns} - set(columns)
    columns |= {name: [e.columns.get(name) for e in examples] for name in sorted(kept)}
    if work.describe is not None and "prediction" not in columns:
        columns["prediction"] = work.describe(tensors["predictions"])
    return tensors, columns
