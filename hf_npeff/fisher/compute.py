"""The loop from examples to a store of PEFs, over batches and processes; it can be resumed.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_npeff.config import ComputeRequest
from hf_npeff.data import Example, Examples, batches_by_length
from hf_npeff.errors import NPEFFError
from hf_npeff.fisher.batching import alike
from hf_npeff.fisher.forward import ForwardPass, NotFiniteError, PaddingError
from hf_npeff.fisher.gradients import CalledOnceForAll
from hf_npeff.fisher.kept_columns import CONTENT, renew_columns
from hf_npeff.fisher.memory import is_out_of_memory
from hf_npeff.fisher.rechecks import Rechecks
from hf_npeff.fisher.rounded_rows import RoundedRows
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.fisher.same_predictions import STORED, check_predictions, places_to_compare
from hf_npeff.pefs.shards import FILL, ID, StoreWriter, joined_columns, padded_cat
from hf_npeff.pefs.store import PEFs
from hf_npeff.pefs.weights_identity import check_same_weights
from hf_npeff.processes import Processes
from hf_npeff.sharing.files import FORMAT_VERSION, read_json

logger = logging.getLogger(__name__)
_AUTO_EXAMPLES = 64
"""Examples in the first batches with "auto". Chosen: more gain little; the rows do not depend on it."""
_AUTO_TOKENS = 16_384
"""Padded tokens in the first batches with "auto"; halved whenever memory runs out. Chosen: keeps a large GPU busy,
and a small one finds its size in a few attempts."""


def _missing(share: range, done: Mapping[int, int], size: int) -> Iterator[range]:
    """The examples of a share that no finished shard has, whatever run wrote it, in parts of at most `size`."""
    at = share.start
    for start, length in [*sorted(done.items()), (share.stop, 0)]:
        stop = min(start, share.stop)
        for first in range(at, stop, size):
            yield range(first, min(first + size, stop))
        at = max(at, start + length)


def dataset_hash(examples: Iterable[Example]) -> str:
    """A hash of ids and contents, in order, that identifies the data set when a run resumes."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}\0{example.content}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def check_store(request: ComputeRequest, weights: Mapping[str, Any]) -> None:
    """Check that a store at `output_dir` was made with the model's weights, unless the request allows others.

    Raises:
        IncompatibleWeightsError: if it was made with other weights.
    """
    path = None if request.output_dir is None else request.output_dir / "config.json"
    if path is not None and request.check_weights and path.exists():
        remedy = "Use another output_dir, or resume=False to begin again."
        made = read_json(path, None).get("weights")
        check_same_weights(made, weights, f"the PEFs in {request.output_dir}", remedy)


def _goes_on(folder: Path) -> str:
    return f"; the finished shards are kept in {folder}, and running the same call again continues from them"


def compute(
    maker: RowMaker,
    examples: Examples,
    origin: Mapping[str, Any],
    request: ComputeRequest,
    processes: Processes | None = None,
) -> PEFs:
    """Compute the PEFs of all examples; with several processes, of this process's share.

    Args:
        maker: the maker of the rows of a batch.
        examples: all examples.
        origin: model, revision, task, versions and data set, for config.json.
        request: where and how the PEFs are computed.
        processes: the processes of the run; by default only this one.

    Returns:
        The PEFs; the loaded store on every process.

    Raises:
        IncompatibleWeightsError: if the model's predictions for the examples of a store have changed.
        ValueError: if the model gives NaN. With `on_error="skip"`: only if it gives NaN for every example, or in a
            batch but not for its examples alone. With `on_error="raise"`, also if the store was begun with "skip" and
            lacks examples.
        NPEFFError: if memory runs out, or another process dies or does not answer in time.
    """
    resolved = replace(maker.config, sketch=maker.sketch.kind, sketch_dim=maker.sketch.setting)
    info = {
        "format_version": FORMAT_VERSION,
        "fingerprint": maker.sketch.fingerprint,
        "fisher": resolved.to_dict(),
        "sketch": maker.sketch.to_dict(),
        "selftest": None if maker.selftest is None else maker.selftest.to_dict(),
        **origin,
    }
    if request.output_dir is None:
        return _in_memory(maker, examples, info, request)
    return _in_folder(maker, examples, info, request, request.output_dir, processes or Processes())


def _in_memory(maker: RowMaker, examples: Examples, info: dict[str, Any], request: ComputeRequest) -> PEFs:
    shards: list[_Shard] = []
    _make_shards(maker, examples, range(len(examples)), {}, request, shards.append)
    left_out = [skipped for shard in shards for skipped in shard.skipped]
    info |= _report_skipped(left_out, len(examples))
    if checks := [check for shard in shards for check in shard.checks]:
        info["selftest"] = {**(info["selftest"] or {}), "later": checks}
    kept = [shard for shard in shards if shard.tensors]
    return PEFs({}, joined_columns([shard.columns for shard in kept]), info, [shard.tensors for shard in kept])


def _in_folder(
    maker: RowMaker,
    examples: Examples,
    info: Mapping[str, Any],
    request: ComputeRequest,
    folder: Path,
    processes: Processes,
) -> PEFs:
    """Write the shards that the folder lacks, and read the store when every process has done so."""
    first = processes.index == 0
    writer = None
    if first:
        writer = StoreWriter(folder, info)
    processes.meet(_goes_on(folder))
    writer = writer or StoreWriter(folder, info, write_info=False)
    done = writer.done()
    if request.check_weights and done:
        _check_predictions(maker, examples, writer, done)
    if first and done:
        renew_columns(writer, examples, done)
    if not request.skip and (left_out := writer.skipped()):
        raise ValueError(
            f"{folder} was begun with on_error='skip', and {_these(left_out)} were left out; continue with "
            "on_error='skip', or start again with resume=False"
        )
    processes.meet(_goes_on(folder))

    def write(shard: _Shard, into: StoreWriter = writer) -> None:
        into.write_shard(shard.start, shard.tensors, shard.columns, shard.skipped, shard.checks)

    _make_shards(maker, examples, processes.share(len(examples)), done, request, write)
    processes.meet(_goes_on(folder))
    left_out = writer.skipped()
    processes.meet(_goes_on(folder))
    if first or len(left_out) == len(examples):
        _report_skipped(left_out, len(examples))
    if first:
        writer.finish(len(examples))
    processes.meet(_goes_on(folder))
    return PEFs.load(folder, verify=False)


def _check_predictions(maker: RowMaker, examples: Examples, writer: StoreWriter, done: Mapping[int, int]) -> None:
    """Check on a few examples of a store that the model still has the same predictions.

    Raises:
        IncompatibleWeightsError: if the predictions differ.
    """
    start = next((start for start in sorted(done) if start in writer.filled()), None)
    if start is None:
        return  # all were left out
    tensors, columns = writer.shard(start)
    kept = range(start, start + done[start])
    if len(columns[ID]) < len(kept):  # some were left out
        stored = set(columns[ID])
        kept = [i for i in kept if examples[i].id in stored]  # type: ignore[assignment]
    some = places_to_compare(len(kept))
    check_predictions(
        maker.forward,
        [examples[kept[i]] for i in some],
        {name: tensors[name][some] if name in tensors else None for name in STORED},
        f"the PEFs in {writer.folder}",
        "Use another output_dir, or resume=False to begin again.",
    )


@dataclass(frozen=True)
class _Shard:
    """The results for a range of examples.

    Attributes:
        start: the place of the first example.
        tensors: the tensors, in the order of the examples; empty if all were left out.
        columns: {name: values}.
        skipped: {id, reason} of the examples that were left out.
        checks: the results of repeated self-tests (see `Rechecks`).
    """

    start: int
    tensors: dict[str, Tensor]
    columns: dict[str, list[Any]]
    skipped: list[dict[str, str]]
    checks: list[dict[str, Any]]


def _make_shards(
    maker: RowMaker,
    examples: Examples,
    share: range,
    done: Mapping[int, int],
    request: ComputeRequest,
    keep: Callable[[_Shard], None],
) -> None:
    """Make the missing shards of a share of the examples; then run idle passes while other processes need the model."""
    sizer = _BatchSize(1 if maker.forward.batch_size(examples, 2) == 1 else request.batch_size)
    parts = list(_missing(share, done, request.shard_size))
    already = len(share) - sum(map(len, parts))
    batches = sum(-(-len(part) // sizer.value) for part in parts)
    idle = maker.forward.fsdp.most(batches) - batches  # a sharded model needs all processes in every pass
    rechecks, rounded = Rechecks(maker, batches), RoundedRows(maker)
    bar = tqdm(total=len(share), initial=already, desc="PEFs", unit="example", disable=not request.progress)
    with _explaining_interruptions(request.output_dir), bar:
        for part in parts:
            keep(_shard(maker, part.start, [examples[i] for i in part], sizer, bar, request.skip, rechecks, rounded))
        for _ in range(idle):
            maker.rows([examples[0]])
    rounded.warn()


@contextmanager
def _explaining_interruptions(output_dir: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if output_dir is None:
            logger.warning("interrupted; nothing is kept. With an output_dir, a run can be resumed")
        else:
            logger.warning("interrupted; the finished shards are in %s. The same call continues from them", output_dir)
        raise


def _these(skipped: Sequence[Mapping[str, str]]) -> str:
    """Skipped examples in a few words."""
    few = ", ".join(repr(example["id"]) for example in skipped[:5])
    return f"{len(skipped)} examples ({few}{', …' if len(skipped) > 5 else ''})"


def _report_skipped(skipped: Sequence[Mapping[str, str]], n: int) -> dict[str, Any]:
    """Warn of skipped examples; return their record for `info`.

    Raises:
        ValueError: if all examples were skipped.
    """
    if not skipped:
        return {}
    reasons = "; ".join(sorted({example["reason"] for example in skipped}))
    if len(skipped) == n:
        raise ValueError(f"none of the {n} examples can be analysed: {reasons}")
    logger.warning("%s of %d were left out: %s", _these(skipped), n, reasons)
    return {"skipped": [dict(example) for example in skipped]}


class _BatchSize:
    """The most examples of a batch: fixed, or bounded by padded tokens, which are halved when memory runs out."""

    def __init__(self, size: int | Literal["auto"]):
        self.value = _AUTO_EXAMPLES if size == "auto" else size
        self.max_tokens = _AUTO_TOKENS if size == "auto" else None

    def halve(self, batch: int, length: int, error: BaseException) -> None:
        """Lower the limit below the tokens of a batch that was too large, or raise the error that says what to do."""
        if self.max_tokens is None or batch == 1:
            advice = "use a smaller batch_size, or batch_size='auto'" if batch > 1 else "use shorter examples"
            raise NPEFFError(f"out of memory with {batch} examples of {length} tokens in a batch; {advice}") from error
        self.max_tokens = batch * length // 2
        logger.warning("out of memory: continuing with at most %d tokens in a batch", self.max_tokens)


def _shard(
    maker: RowMaker,
    start: int,
    examples: Sequence[Example],
    sizer: _BatchSize,
    bar: Any,
    skip: bool,
    rechecks: Rechecks,
    rounded: RoundedRows,
) -> _Shard:
    """The examples from `start` on, in batches of similar length."""
    forward, checked = maker.forward, len(rechecks.results)
    order: list[int] = []
    results: list[dict[str, Tensor]] = []
    pending = list(range(len(examples)))
    reasons: dict[int, str] = {}
    while pending:
        batch = _next_batch(forward, examples, pending, sizer)
        together = [examples[i] for i in batch]
        try:
            with forward.blaming_padding(together):
                rows = maker.rows(together)
            rounded.take_out(together, rows)
            if not rechecks.accept(together, rows):
                continue  # one at a time from now on
        except NotFiniteError as error:
            if not skip:
                raise
            reasons |= {batch[place]: error.reason for place in error.places}
            pending = [i for i in pending if i not in reasons]
            bar.update(len(error.places))
            continue
        except (CalledOnceForAll, PaddingError) as error:
            if len(batch) == 1:
                raise
            forward.refuse_batches(str(error))
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            sizer.halve(len(batch), max(e.length for e in together), error)
            continue
        rows["factors"] = rows["factors"].to(getattr(torch, maker.config.storage_dtype))
        results.append({name: value.detach().cpu() for name, value in rows.items()})
        order += batch
        taken = set(batch)
        pending = [i for i in pending if i not in taken]
        bar.update(len(batch))
    skipped = [{"id": examples[i].id, "reason": reasons[i]} for i in sorted(reasons)]
    tensors = _in_order(results, order)
    kept = [example for i, example in enumerate(examples) if i not in reasons]
    columns = _columns(maker, kept, tensors) if kept else {}
    return _Shard(start, tensors, columns, skipped, rechecks.results[checked:])


def _next_batch(
    forward: ForwardPass, examples: Sequence[Example], pending: Sequence[int], sizer: _BatchSize
) -> list[int]:
    """Some of the remaining examples, of similar length, that may share a forward pass."""
    lengths = [examples[i].length for i in pending]
    batch = [pending[i] for i in next(batches_by_length(lengths, sizer.value, sizer.max_tokens))]
    batch = [batch[i] for i in alike([examples[i] for i in batch], forward.traits.takes)[0]]
    return batch if forward.may_share([examples[i] for i in batch]) else batch[:1]


def _columns(maker: RowMaker, examples: Sequence[Example], tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """The columns that are stored with the rows: ids, contents, the data set's columns, predictions in words."""
    columns: dict[str, list[Any]] = {
        ID: [e.id for e in examples],
        CONTENT: [e.content for e in examples],
    }
    kept = {name for e in examples for name in e.columns} - set(columns)
    columns |= {name: [e.columns.get(name) for e in examples] for name in sorted(kept)}
    describe = maker.forward.describe
    if describe is not None and not maker.forward.traits.embeds and "prediction" not in columns:
        columns["prediction"] = describe(tensors["predictions"])
    return columns


def _in_order(results: Sequence[Mapping[str, Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of batches as those of one shard, its examples put back from `order`."""
    place = torch.argsort(torch.tensor(order))
    tensors = {}
    for name in results[0] if results else ():
        values = [r[name] for r in results]
        if name == "cotangents":  # (B, c, t, s): batches differ in their number of terms
            values = [v.transpose(1, 2) for v in values]
        joined = padded_cat(values, FILL.get(name, 0))[place]
        tensors[name] = joined.transpose(1, 2).contiguous() if name == "cotangents" else joined
    return tensors
