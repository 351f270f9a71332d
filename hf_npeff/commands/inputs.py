"""The inputs of commands: loading a model, reading data, reading decompositions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_npeff.config import FisherConfig
from hf_npeff.encoding.record import Reading

if TYPE_CHECKING:
    from hf_npeff.analyzer import NPEFFAnalyzer
    from hf_npeff.decomposition.decomposition import Decomposition


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded.

    Attributes:
        task: task of the head, such as "causal-lm", if the model's architecture does not determine it.
        revision: the model's branch, tag or commit.
        dtype: number type of the weights, such as "float32"; "auto" keeps the type in which they were saved.
        device_map: the device or devices of the model, such as "cuda" or "auto"; the CPU by default.
        trust_remote_code: run code from the model's repository.
    """

    task: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataOptions(Reading):
    """How the data is read.

    Attributes:
        split: split of a data set on the Hub, such as "validation".
        subset: configuration of a data set on the Hub, such as "mnli".
        max_examples: use only this many examples, the first ones.
    """

    split: str | None = None
    subset: str | None = None
    max_examples: int | None = None

    @property
    def columns(self) -> Reading:
        """Which columns are read."""
        return Reading(**{field.name: getattr(self, field.name) for field in fields(Reading)})


_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def read_data(data: str, reading: DataOptions) -> Any:
    """A data set from a file, whose ending says its type, or from the Hub.

    Raises:
        OSError: if the file or data set does not exist.
        ValueError: if its type is unknown, it cannot be read, or it has several splits and none was named.
    """
    from hf_npeff.sharing.hub import is_hub_id, near_names

    path = Path(data).expanduser()
    kind = path.suffix.lower()
    if path.is_file() or kind in _FILES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {data}{near_names(data)}")
        if reading.split is not None or reading.subset is not None:
            raise ValueError(f"--split and --subset are for data sets on the Hub, and {data} is a file")
        return _limited(_read_file(path, kind), reading.max_examples)
    if not path.is_dir() and not is_hub_id(data):
        raise FileNotFoundError(f"{data} is neither a file nor the id of a data set on the Hub{near_names(data)}")
    import datasets

    try:
        dataset = datasets.load_dataset(data, reading.subset, split=reading.split)
    except OSError as error:  # no connection, no such data set: the name may be that of a file
        if path.is_dir():
            raise
        raise OSError(
            f"there is no file and no folder {data}{near_names(data)}; on the Hub: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            raise ValueError(f"{data} has the splits {', '.join(map(str, dataset))}; choose one with --split")
        dataset = next(iter(dataset.values()))
    return _limited(dataset, reading.max_examples)


def _read_file(path: Path, kind: str) -> Any:
    if kind == ".csv":
        from pyarrow import csv

        return csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True)).to_pylist()
    if kind == ".parquet":
        import datasets
        import pyarrow.parquet as pq

        return datasets.Dataset(pq.read_table(path))
    if kind not in _FILES:
        raise ValueError(f"{path} is not a type of file that can be read; use a .jsonl, .csv, .parquet or .txt file")
    content = path.read_text(encoding="utf-8-sig")
    if kind == ".json":
        if not isinstance(rows := json.loads(content), list):
            raise ValueError(f"{path} should hold a list of examples, but holds a {type(rows).__name__}")
        return rows
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    if kind == ".txt":
        return [line.strip() for _, line in lines]
    rows = []
    for i, line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {i} is not JSON: {error}") from error
    return rows


def _limited(dataset: Any, limit: int | None) -> Any:
    if limit is None or not 0 < limit < len(dataset):
        return dataset  # a limit below 1 is refused where examples are encoded
    return dataset[:limit] if isinstance(dataset, list) else dataset.select(range(limit))


def analyzer_for(
    model: str, loading: ModelOptions, settings: FisherConfig | Decomposition, reading: DataOptions | None = None
) -> NPEFFAnalyzer:
    """The analyzer of the model, which reads the columns that the options name.

    For a decomposition it gets the decomposition's Fisher config, and its model's commit unless a revision was asked
    for.

    Raises:
        OSError: if the model cannot be loaded.
    """
    from hf_npeff.analyzer import NPEFFAnalyzer

    columns = Reading() if reading is None else reading.columns

    if isinstance(settings, FisherConfig):
        fisher = settings
    else:
        fisher = settings.fisher_config
        if loading.revision is None and settings.info.get("model") == model:
            loading = replace(loading, revision=settings.info.get("revision"))
    try:
        analyzer = NPEFFAnalyzer.from_pretrained(model, fisher=fisher, **asdict(loading))
    except OSError as error:
        raise OSError(f"the model {model} cannot be loaded: {error}") from error
    analyzer.reading = columns
    return analyzer


def read_decomposition(name: str) -> Decomposition:
    """From a folder or the Hub."""
    from hf_npeff.decomposition.decomposition import Decomposition

    return Decomposition.from_pretrained(name)
