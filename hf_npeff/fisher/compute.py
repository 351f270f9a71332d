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
from hf_npeff.fisher.selftest import ROW_TOLERANCE, SelfTest, candidates, measure_sketches, row_error
from hf_npeff.fisher.sketches import Sketch
from hf_npeff.store import FORMAT_VERSION, PEFs, StoreWriter, normalise, padded_cat

logger = logging.getLogger(__name__)
_SELFTEST_EXAMPLES = 8
_SELFTEST_TOKENS = 2048
_DEFAULT_DIMS = {"kronecker": 16, "countsketch": 16_384, "two-stage": 16_384, "identity": None}


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
            raise ValueError(f"the model gives NaN or infinite logits for the examples {bad}; leave them out or fix the model")
        return outputs

    def factor(self, outputs: Outputs) -> OutputFactor:
        """The output factor in use."""
        return resolve(self.config.output_factor, outputs, self.config.rank)

    def _run(self, examples: Sequence[Example], n: int) -> tuple[Tensor, Tensor]:
        """Source and cotangents (B, c, t, s) of one backward pass per row; several terms: the first one's rows."""
        outputs = self.outputs(examples)
        V, _ = cotangents(outputs, self.factor(outputs), self.config.rank, self._seeds(examples))
        return outputs.source, V.transpose(1, 2)

    def _seeds(self, examples: Sequence[Example]) -> list[int]:
        return seeds_of([e.id for e in examples], self.config.seed)

    def prepare(self, examples: Sequence[Example]) -> SelfTest:
        """Choose the sketch, where it is open, and run the self-test on the first examples.

        Raises:
            UnsupportedModelError: if the rows from the hooks are not the model's gradients.
        """
        short = sorted(range(len(examples)), key=lambda i: examples[i].length)
        few: list[Example] = []
        for i in sorted(short[: max(2, len(short))]):
            if len(few) < _SELFTEST_EXAMPLES and sum(e.length for e in few) + examples[i].length <= _SELFTEST_TOKENS:
                few.append(examples[i])
        few = few or [examples[short[0]]]
        error = self._check_rows(few[:2])
        run = functools.partial(self._run, few[:1] if self.one_at_a_time else few, n=1 if self.one_at_a_time else len(few))
        shapes = {m.parameter: m.shape for m in self.maps}
        tried: dict[str, float] = {}
        enough = len(few) > 1 and not self.one_at_a_time
        if self.sketch is None:
            if self.config.sketch == "auto":
                tries = candidates(self.config, shapes)
                if len(tries) == 1 or not enough:
                    self.sketch = Sketch(shapes, *tries[-1 if not enough else 0], seed=self.config.seed)
                else:
                    self.sketch, tried = measure_sketches(
                        self.model, self.maps, run, tries, self.config.seed, self.config.sketch_tolerance
                    )
            else:
                dim = self.config.sketch_dim or _DEFAULT_DIMS[self.config.sketch]
                self.sketch = Sketch(shapes, self.config.sketch, dim, self.config.seed)
        measured: float | None = None
        if self.sketch.kind == "identity":
            measured = 0.0
        elif enough:
            key = f"{self.sketch.kind} {self.sketch.setting}"
            if key not in tried:
                spec = [(self.sketch.kind, self.sketch.setting)]
                tried |= measure_sketches(self.model, self.maps, run, spec, self.sketch.seed, None)[1]
            measured = tried[key]
        self.sketch.to(self.device)
        total = sum(p.numel() for p in self.model.parameters())
        covered = sum(a * b for a, b in shapes.values()) / max(total, 1)
        self.selftest = SelfTest(len(few), measured, error, min(covered, 1.0), tried)
        if error is not None and error > ROW_TOLERANCE:
            raise UnsupportedModelError(
                f"the rows from hooks differ from autograd's gradients by {error:.1%}: some module is used in a way that "
                "hooks do not see. Leave it out with exclude_modules, or load the model in float32."
            )
        return self.selftest

    def _check_rows(self, few: Sequence[Example]) -> float | None:
        single = functools.partial(self._run, few[-1:], n=1)
        try:
            return row_error(
                self.model, self.maps, functools.partial(self._run, few, n=len(few)), single, self.config.seed
            )
        except CalledOnceForAll as error:
            logger.warning("%s; going on with one example at a time", error)
            self.one_at_a_time = True
            return row_error(self.model, self.maps, single, single, self.config.seed)

    def rows(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Everything that is stored of a batch: unit-norm factors, norms, cotangents, predictions, log_probs, entropies."""
        assert self.sketch is not None
        collector = RowCollector(self.sketch)
        with LinearHooks(self.model, self.maps, collector) as hooks:
            hooks.begin(len(examples))
            outputs = self.outputs(examples)
            factor = self.factor(outputs)
            V, joint = cotangents(outputs, factor, self.config.rank, self._seeds(examples))
            B, t, c, s = V.shape
            stacked = []
            passes = [(None, i) for i in range(c)] if joint else [(j, i) for j in range(t) for i in range(c)]
            for number, (term, i) in enumerate(passes):
                collector.start(B, outputs.source.device, outputs.source.dtype)
                entering = V[:, :, i] if term is None else torch.zeros_like(V[:, :, 0])
                if term is not None:
                    entering[:, term] = V[:, term, i]
                hooks.backward(outputs.source, entering, last=number == len(passes) - 1)
                stacked.append(collector.finish())
            rows = torch.stack(stacked, 1)
        if not joint:
            rows, V = reduce_rows(rows, V, self.config.rank)
        if not bool(torch.isfinite(rows).all()):
            bad = [examples[i].id for i in (~torch.isfinite(rows).flatten(1).all(1)).nonzero()[:, 0].tolist()]
            raise ValueError(f"the gradients of the examples {bad} are not finite; load the model in float32, or leave them out")
        unit, norms = normalise(rows)
        return {"factors": unit, "norms": norms, "cotangents": V.transpose(1, 2), **_predictions(outputs)}


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


def _ranges(share: range, size: int) -> Iterator[range]:
    for start in range(share.start, share.stop, size):
        yield range(start, min(start + size, share.stop))


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
    with tqdm(total=len(shares[process]), desc="PEFs", unit="example", disable=not progress) as bar:
        for part in _ranges(shares[process], shard_size):
            if done.get(part.start) == len(part):
                bar.update(len(part))
                continue
            tensors, columns = _shard(work, [examples[i] for i in part], sizer, bar)
            if writer is None:
                kept.append((tensors, columns))
            else:
                writer.write_shard(part.start, tensors, columns)
    if writer is None or output_dir is None:
        columns = {name: [v for _, c in kept for v in c[name]] for name in kept[0][1]}
        return PEFs({}, columns, info, [tensors for tensors, _ in kept])
    barrier()
    if process == 0:
        writer.finish(len(examples))
    barrier()
    return PEFs.load(output_dir, verify=False)


class _BatchSize:
    """The number of examples of a batch: fixed, or halved whenever memory runs out."""

    def __init__(self, fixed: int | None):
        self.automatic = fixed is None
        self.value = 64 if fixed is None else fixed

    def halve(self, error: BaseException) -> None:
        if not self.automatic or self.value == 1:
            raise NPEFFError(
                f"out of memory with {self.value} examples in a batch; use a smaller batch_size, or batch_size='auto'"
            ) from error
        self.value = max(1, self.value // 2)
        logger.warning("out of memory: going on with %d examples in a batch", self.value)


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
        batch = [pending[i] for i in next(batches_by_length([lengths[i] for i in pending], sizer.value))]
        try:
            rows = work.rows([examples[i] for i in batch])
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            sizer.halve(error)
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


