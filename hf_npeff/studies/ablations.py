"""What every setting costs and what it changes: PEFs and decompositions over grids of settings, read from one file.

A grid file is YAML. It has `base` settings, and `blocks`, each of which is the product of its axes. The settings are
those of `FisherConfig` and `DecompositionConfig`, with the class before the name, and two that only this study has:

    base: {fisher.rank: 4, decomposition.n_components: 16}
    blocks:
      output factor: {fisher.output_factor: [spectral, projection, sampling], fisher.rank: [1, 4]}
      early stopping: {validation: [0, 0.2]}       # share of examples held out for early stopping
      normalisation: {normalise: [true, false]}    # whether PEFs have unit norm
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.method import MethodResult
from hf_npeff.config import DecompositionConfig, FisherConfig
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.errors import NPEFFError
from hf_npeff.pefs.store import PEFs
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.factors import run_factors
from hf_npeff.studies.measures import agreement
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.result import StudyResult, markdown, model_name, number
from hf_npeff.studies.settings import FactorsConfig

logger = logging.getLogger(__name__)
_OWN = {"validation": 0.0, "normalise": True}


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        block: the name of its block.
        varied: {axis: value}, the settings in which the points of a block differ.
        fisher: the settings of its PEFs.
        decomposition: the settings of its decomposition.
        validation: the share of the examples that is held out for early stopping; 0 holds none out.
        normalise: whether PEFs are scaled to unit norm.
    """

    block: str
    varied: dict[str, Any]
    fisher: FisherConfig
    decomposition: DecompositionConfig
    validation: float
    normalise: bool


def read_grid(text: str, fisher: FisherConfig | None = None) -> list[Setting]:
    """The points of a grid file.

    Args:
        text: YAML, see the module.
        fisher: the settings that `base` and the axes change.

    Raises:
        ValueError: if the text is not a grid, or a setting does not exist or is out of its range.

    Example:
        >>> grid = read_grid("{base: {decomposition.n_restarts: 1}, blocks: {rank: {fisher.rank: [1, 2]}}}")
        >>> len(grid)
        2
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the grid is not valid YAML: {error}") from error
    known = isinstance(content, dict) and not set(content) - {"base", "blocks"}
    if not known or not isinstance(content.get("blocks"), dict):
        raise ValueError("a grid has `blocks`, {name: {setting: [values]}}, and may have `base`, {setting: value}")
    base = dict(content.get("base") or {})
    settings = []
    for block, axes in content["blocks"].items():
        if not isinstance(axes, dict) or not all(isinstance(v, list) and v for v in axes.values()):
            raise ValueError(f"the block {block!r} must have a list of values for every setting, but it is {axes!r}")
        for values in itertools.product(*axes.values()):
            varied = dict(zip(axes, values, strict=True))
            settings.append(_setting(str(block), varied, {**base, **varied}, fisher or FisherConfig()))
    if not settings:
        raise ValueError("the grid has no blocks")
    return settings


def _setting(block: str, varied: dict[str, Any], values: Mapping[str, Any], fisher: FisherConfig) -> Setting:
    parts: dict[str, dict[str, Any]] = {"fisher": fisher.to_dict(), "decomposition": DecompositionConfig().to_dict()}
    own = dict(_OWN)
    for name, value in values.items():
        part, _, key = name.partition(".")
        if name in own:
            own[name] = value
        elif part in parts and key in parts[part]:
            parts[part][key] = value
        else:
            known = [f"{p}.{f.name}" for p, c in (("fisher", FisherConfig), ("decomposition", DecompositionConfig))
                     for f in fields(c)]  # fmt: skip
            raise ValueError(
                f"block {block!r}: there is no setting {name!r}; the settings are {', '.join([*known, *own])}"
            )
    if not isinstance(own["normalise"], bool) or not 0 <= float(own["validation"]) < 1:
        raise ValueError(f"block {block!r}: normalise must be true or false, validation a share, but they are {own}")
    fit = parts["decomposition"]
    if not own["normalise"] and (fit["power"] != 1 or fit["balance"] != "none"):
        raise ValueError(
            f"block {block!r}: power and balance always scale PEFs to unit norm; leave them out with normalise: false"
        )
    try:
        configs = FisherConfig(**parts["fisher"]), DecompositionConfig(**parts["decomposition"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"block {block!r}, {varied}: {error}") from error
    return Setting(block, varied, *configs, float(own["validation"]), own["normalise"])


@dataclass(frozen=True)
class Ablation:
    """One point, measured.

    Attributes:
        block: the name of its block.
        varied: {axis: value}, the settings in which the points of a block differ.
        pef_seconds: the seconds to compute the PEFs; points that share PEFs have the same value.
        fit_seconds: the seconds to decompose them with one seed.
        numbers: how many numbers the rows of one example have, c·d.
        sketch_error: the measured relative error of inner products of PEFs, or None.
        explained: the share of Σ‖F‖² explained, for the PEFs of this point. Points with different PEFs cannot be
            compared by it.
        iterations: the number of iterations of the best start.
        stability: the mean stability of the components over restarts.
        agreement: the agreement of the coefficients of two seeds.
        mean_auroc: the mean AUROC over the attributes; NaN if there are none.
        found: how many attributes were found.
        attributes: how many attributes were measured.
        failed: why the point could not be run, or None.
    """

    block: str
    varied: dict[str, Any]
    pef_seconds: float = float("nan")
    fit_seconds: float = float("nan")
    numbers: int = 0
    sketch_error: float | None = None
    explained: float = float("nan")
    iterations: int = 0
    stability: float = float("nan")
    agreement: float = float("nan")
    mean_auroc: float = float("nan")
    found: int = 0
    attributes: int = 0
    failed: str | None = None


_NUMBERS = {f.name for f in fields(Ablation) if f.type == "float"}


def _read(row: Mapping[str, Any]) -> Ablation:
    """A row from a file, whose None are numbers that are not finite, where they are not absent."""
    known: dict[str, Any] = {k: math.nan if v is None and k in _NUMBERS else v for k, v in row.items()}
    return Ablation(**known)


@dataclass
class AblationsResult(StudyResult):
    """The outcome of `run_ablations`.

    Attributes:
        rows: an `Ablation` for each point.
        examples: how many examples were analysed.
        model: the name of the model.
    """

    rows: list[Ablation]
    examples: int
    model: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        rows = [asdict(row) for row in self.rows]
        return {"study": "ablations", "model": self.model, "examples": self.examples, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AblationsResult:
        """What `to_dict` wrote, also after a file, where numbers that are not finite are None."""
        return cls([_read(row) for row in values["rows"]], values["examples"], values["model"])

    def table(self) -> str:
        """A table for each block."""
        parts = []
        header = ["PEFs, s", "fit, s", "numbers", "sketch error", "explained", "iterations", "stability", "seeds agree",
                  "mean AUROC", "found"]  # fmt: skip
        for block in dict.fromkeys(row.block for row in self.rows):
            mine = [row for row in self.rows if row.block == block]
            axes = list(mine[0].varied)
            body = []
            for row in mine:
                cells: list[object] = [row.varied[axis] for axis in axes]
                if row.failed:
                    body.append([*cells, f"failed: {row.failed}", *[""] * (len(header) - 1)])
                    continue
                cells += [number(row.pef_seconds, 1), number(row.fit_seconds, 1), row.numbers]
                cells += [number(row.sketch_error), number(row.explained), row.iterations, number(row.stability, 2)]
                cells += [number(row.agreement, 2), number(row.mean_auroc), f"{row.found} of {row.attributes}"]
                body.append(cells)
            parts += [f"**{block}**", "", markdown([*axes, *header], body), ""]
        return "\n".join(parts).rstrip()

    def draw(self, figure: Any) -> None:
        """Mean AUROC against time, with a colour for each block."""
        axes = figure.add_subplot()
        for block in dict.fromkeys(row.block for row in self.rows):
            mine = [row for row in self.rows if row.block == block and not row.failed]
            seconds = [row.pef_seconds + row.fit_seconds for row in mine]
            value = [row.mean_auroc if row.attributes else row.explained for row in mine]
            axes.scatter(seconds, value, label=block)
            for row, x, y in zip(mine, seconds, value, strict=True):
                # Small: labels of many points
                axes.annotate(", ".join(map(str, row.varied.values())), (x, y), fontsize=6, alpha=0.8)
        measured = any(row.attributes for row in self.rows)
        axes.set(xscale="log", xlabel="seconds, PEFs and one fit", ylabel="mean AUROC" if measured else "explained")
        axes.legend(frameon=False, fontsize=7)


def run_ablations(
    analyzer: NPEFFAnalyzer,
    dataset: Any,
    grid: Sequence[Setting],
    attributes: Attributes | None = None,
    *,
    factors: FactorsConfig | None = None,
    batch_size: int = 16,
    parts: Path | None = None,
) -> AblationsResult:
    """Run every point of a grid. If a point fails, its row says why.

    Args:
        analyzer: the analyzer of the model.
        dataset: as for `NPEFFAnalyzer.compute_pefs`.
        grid: the points, from `read_grid`.
        attributes: the attributes of the examples; None measures no factors.
        factors: the settings of the measurement.
        batch_size: how many examples a forward pass takes.
        parts: a folder where the points of finished PEFs are kept; a run that was interrupted goes on there.

    Raises:
        ValueError: if the attributes do not have one value for each example.

    Example:
        >>> grid = read_grid("{base: {decomposition.n_restarts: 1}, blocks: {rank: {fisher.rank: [1, 2]}}}")
        >>> result = run_ablations(analyzer, dataset, grid)
    """
    if attributes is not None and len(attributes.values) != len(dataset):
        raise ValueError(f"the dataset has {len(dataset)} examples, but the attributes have {len(attributes.values)}")
    groups: dict[str, list[int]] = {}  # points with the same PEFs, which are made once
    for i, point in enumerate(grid):
        groups.setdefault(repr(point.fisher), []).append(i)
    rows: dict[int, Ablation] = {}
    for number_of_group, members in enumerate(groups.values()):
        points = [grid[i] for i in members]
        made_with = {
            "points": [
                {**vars(p), **{k: getattr(p, k).to_dict() for k in ("fisher", "decomposition")}} for p in points
            ],
            "model": analyzer.weights(),
            "examples": len(dataset),
            "factors": asdict(factors or FactorsConfig()) if attributes is not None else None,
            "batch_size": batch_size,
        }
        compute = partial(_group, analyzer, dataset, points, attributes, factors, batch_size)
        part = kept_part(parts, f"pefs-{number_of_group}", made_with, compute)
        rows |= zip(members, (_read(row) for row in part["rows"]), strict=True)
    return AblationsResult([rows[i] for i in range(len(grid))], len(dataset), model_name(analyzer.provenance()))


def _group(
    analyzer: NPEFFAnalyzer,
    dataset: Any,
    points: Sequence[Setting],
    attributes: Attributes | None,
    factors: FactorsConfig | None,
    batch_size: int,
) -> dict[str, Any]:
    """The rows of points with the same PEFs; what fails is reported in its row."""
    made: tuple[PEFs, float] | None = None
    rows = []
    for point in points:
        try:
            made = made or _pefs(analyzer, dataset, point.fisher, batch_size)
            rows.append(_measure(point, *made, attributes, factors))
        except (ValueError, NPEFFError, FloatingPointError) as error:
            logger.warning("%s, %s: %s", point.block, point.varied, error)
            rows.append(Ablation(point.block, point.varied, failed=str(error)))
    return {"rows": [asdict(row) for row in rows]}


def _pefs(analyzer: NPEFFAnalyzer, dataset: Any, fisher: FisherConfig, batch_size: int) -> tuple[PEFs, float]:
    started = time.perf_counter()
    pefs = analyzer.with_fisher(fisher).compute_pefs(dataset, batch_size=batch_size)
    return pefs, time.perf_counter() - started


def raw_norms(pefs: PEFs) -> PEFs:
    """PEFs divided by their mean norm, so that they keep different norms. Normalisation is compared with these."""
    norms = pefs.norms.double()
    scale = (norms / norms.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    factors = pefs.factors.float() * scale[:, None, None].float()
    return PEFs({"factors": factors, "norms": torch.ones_like(pefs.norms)}, pefs.columns, pefs.info)


def _measure(
    point: Setting, pefs: PEFs, pef_seconds: float, attributes: Attributes | None, factors: FactorsConfig | None
) -> Ablation:
    used = pefs if point.normalise else raw_norms(pefs)
    fits = []
    seconds = 0.0
    for seed in (point.decomposition.seed, point.decomposition.seed + 1):
        config = {**point.decomposition.to_dict(), "seed": seed}
        train, validation = _split(used, point.validation)
        started = time.perf_counter()
        fits.append(NPEFF(**config).fit(train, validation))
        seconds = seconds or time.perf_counter() - started
    W = [fit.transform(used) for fit in fits]
    mean_auroc, n_found, measured = float("nan"), 0, 0
    if attributes is not None:
        row = run_factors([MethodResult("NPEFF", W[0].float())], attributes, factors).methods[0]
        mean_auroc, n_found, measured = row.mean_auroc, row.found, len(row.attributes)
    return Ablation(
        point.block,
        point.varied,
        pef_seconds,
        seconds,
        pefs.rank * pefs.dim,
        pefs.sketch_error,
        fits[0].explained,
        len(fits[0].loss_history) - 2,
        float(fits[0].stability.nanmean()),
        agreement(W[0], W[1]),
        mean_auroc,
        n_found,
        measured,
    )


def _split(pefs: PEFs, share: float) -> tuple[PEFs, PEFs | None]:
    if share == 0:
        return pefs, None
    held: Tensor = torch.zeros(len(pefs), dtype=torch.bool)
    held[torch.randperm(len(pefs), generator=torch.Generator().manual_seed(0))[: max(1, round(share * len(pefs)))]] = (
        True
    )
    return pefs.filter(~held), pefs.filter(held)
