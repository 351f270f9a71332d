"""The loop from examples to a store of PEFs, over batches and processes; it resumes.

Each process takes a contiguous share of the examples and writes its own shards; within a shard, examples are batched
by length and put back into the data set's order. Memory does not grow with the number of examples. Where FSDP2 shards
the model's weights over the processes, those with fewer batches run one example over and over, and throw its rows
away, until the last has finished.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_npeff.data import Example, Examples, batches_by_length
from hf_npeff.errors import NPEFFError
from hf_npeff.files import FORMAT_VERSION
from hf_npeff.fisher.passes import FisherPass, NotFiniteError
from hf_npeff.shards import StoreWriter, joined_columns, padded_cat
from hf_npeff.store import PEFs

logger = logging.getLogger(__name__)
_AUTO_EXAMPLES = 64
_AUTO_TOKENS = 16_384


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
        digest.update(f"{example.id}\0{example.content}\0".encode(errors="surrogatepass"))
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
    barrier: Callable[[], None],
    progress: bool,
    skip: bool = False,
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
        skip: leave out examples for which the model gives NaN, instead of stopping at them.

    Returns:
        The PEFs; the loaded store on every process.

    Raises:
        ValueError: if the model gives NaN; with `skip`, if it does for every example. Without it, if the store was
            begun with it and lacks examples.
        NPEFFError: if memory runs out, or another process dies or does not answer in time.
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
    meet = _meeting(barrier, output_dir)
    if output_dir is not None:
        if process == 0:
            writer = StoreWriter(output_dir, info)
        meet()
        if writer is None:
            writer = StoreWriter(output_dir, info, write_info=False)
        done = writer.done()
        if not skip and (left_out := writer.skipped()):
            raise ValueError(
                f"{output_dir} was begun with on_error='skip', and {_these(left_out)} were left out; go on with "
                "on_error='skip', or begin again with resume=False"
            )
        meet()
    kept, left_out = [], []
    sizer = _BatchSize(1 if work.one_at_a_time else batch_size)
    parts = list(_missing(shares[process], done, shard_size))
    already = len(shares[process]) - sum(map(len, parts))
    idle = _idle_batches(work, parts, sizer)
    bar = tqdm(total=len(shares[process]), initial=already, desc="PEFs", unit="example", disable=not progress)
    with _interruption_told(output_dir), bar:
        for part in parts:
            tensors, columns, skipped = _shard(work, [examples[i] for i in part], sizer, bar, skip)
            if writer is not None:
                writer.write_shard(part.start, tensors, columns, skipped)
                continue
            left_out += skipped
            if tensors:
                kept.append((tensors, columns))
        for _ in range(idle):
            work.rows([examples[0]])
    if writer is None or output_dir is None:
        info |= _told_of_skipped(left_out, len(examples))
        return PEFs({}, joined_columns([columns for _, columns in kept]), info, [tensors for tensors, _ in kept])
    meet()
    left_out = writer.skipped()
    meet()
    if process == 0 or len(left_out) == len(examples):
        _told_of_skipped(left_out, len(examples))
    if process == 0:
        writer.finish(len(examples))
    meet()
    return PEFs.load(output_dir, verify=False)


def _meeting(barrier: Callable[[], None], output_dir: Path | None) -> Callable[[], None]:
    """The barrier, with an error for people where another process never comes."""

    def meet() -> None:
        try:
            barrier()
        except RuntimeError as error:  # torch.distributed's errors, time-outs among them
            raise NPEFFError(
                "another process died, or did not answer within the time-out of the process group; the shards that "
                f"are finished stay in {output_dir}, and starting the run again goes on from them"
            ) from error

    return meet


@contextmanager
def _interruption_told(output_dir: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if output_dir is None:
            logger.warning("interrupted, and nothing is kept: with an output_dir, a run can be resumed")
        else:
            logger.warning(
                "interrupted: the finished shards are in %s; the same call again goes on from them", output_dir
            )
        raise


def _these(skipped: Sequence[Mapping[str, str]]) -> str:
    """Skipped examples in a few words."""
    few = ", ".join(repr(one["id"]) for one in skipped[:5])
    return f"{len(skipped)} examples ({few}{', …' if len(skipped) > 5 else ''})"


def _told_of_skipped(skipped: Sequence[Mapping[str, str]], n: int) -> dict[str, Any]:
    """What `info` says of skipped examples, of which people are warned.

    Raises:
        ValueError: if nothing is left.
    """
    if not skipped:
        return {}
    reasons = "; ".join(sorted({one["reason"] for one in skipped}))
    if len(skipped) == n:
        raise ValueError(f"none of the {n} examples can be analysed: {reasons}")
    logger.warning("%s of %d were left out: %s", _these(skipped), n, reasons)
    return {"skipped": [dict(one) for one in skipped]}


def _idle_batches(work: FisherPass, parts: Sequence[range], sizer: _BatchSize) -> int:
    """How many batches another process has more: a sharded model needs all of them in every pass."""
    batches = sum(-(-len(part) // sizer.value) for part in parts)
    return work.sharding.most(batches) - batches


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
    work: FisherPass, examples: Sequence[Example], sizer: _BatchSize, bar: Any, skip: bool
) -> tuple[dict[str, Tensor], dict[str, list[Any]], list[dict[str, str]]]:
    """The tensors and columns of one shard, in the order of the examples, and {id, reason} of those left out."""
    lengths = [e.length for e in examples]
    order: list[int] = []
    results: list[dict[str, Tensor]] = []
    dtype = getattr(torch, work.config.storage_dtype)
    pending = list(range(len(examples)))
    reasons: dict[int, str] = {}
    while pending:
        left = [lengths[i] for i in pending]
        batch = [pending[i] for i in next(batches_by_length(left, sizer.value, sizer.max_tokens))]
        try:
            rows = work.rows([examples[i] for i in batch])
        except NotFiniteError as error:
            if not skip:
                raise
            reasons |= {batch[place]: error.reason for place in error.places}
            pending = [i for i in pending if i not in reasons]
            bar.update(len(error.places))
            continue
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
    skipped = [{"id": examples[i].id, "reason": reasons[i]} for i in sorted(reasons)]
    if not results:
        return {}, {}, skipped
    tensors = _in_order(results, order)
    examples = [example for i, example in enumerate(examples) if i not in reasons]
    columns: dict[str, list[Any]] = {
        "example_id": [e.id for e in examples],
        "content_hash": [e.content for e in examples],
    }
    kept = {name for e in examples for name in e.columns} - set(columns)
    columns |= {name: [e.columns.get(name) for e in examples] for name in sorted(kept)}
    if work.describe is not None and "prediction" not in columns:
        columns["prediction"] = work.describe(tensors["predictions"])
    return tensors, columns, skipped


def _in_order(results: Sequence[Mapping[str, Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of batches as those of one shard, its examples put back from `order`."""
    place = torch.argsort(torch.tensor(order))
    fill = {"predictions": -1}
    tensors = {}
    for name in results[0]:
        values = [r[name] for r in results]
        if name == "cotangents":  # (B, c, t, s): batches differ in their number of terms
            values = [v.transpose(1, 2) for v in values]
        joined = padded_cat(values, fill.get(name, 0))[place]
        tensors[name] = joined.transpose(1, 2).contiguous() if name == "cotangents" else joined
    return tensors
