"""The data of a page: facts and arrays of a decomposition and of further results on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_npeff import __version__
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.matching import matches, similarities
from hf_npeff.encoding.columns import Column, columns_of, described_by
from hf_npeff.encoding.record import Encoded, shown_columns, shown_texts
from hf_npeff.report.certificates import as_facts, check_same_examples, measured_facts
from hf_npeff.report.examples import LANDMARKS, Layout, explained_by, nearest_components, place
from hf_npeff.report.modules import ModuleEnergies, analysed_parameters, by_layer, estimated_energies
from hf_npeff.report.pack import quantised
from hf_npeff.report.training import Run, read_run
from hf_npeff.sharing.files import finite
from hf_npeff.sharing.hub import shown_model, text_columns

if TYPE_CHECKING:
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.sharing.protocols import HasDict, ReportLike, TokenAlignmentLike

SHOWN_ELSEWHERE = 5
"""How many top examples a comparison shows for a component of the other decomposition."""


@dataclass
class PageData:
    """The data of a page: values as JSON types (`facts`), and arrays by name."""

    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Extras:
    """Further results on a decomposition; each may be missing.

    Attributes:
        alignments: alignments of top examples, position by position, from `NPEFFAnalyzer.token_alignments`.
        energies: {component: {parameter: share}}, from `direction.energies()`.
        reports: {component: PerturbationReport, or the result of its `to_dict`}.
        measurements: {component: Measurement, or the result of its `to_dict`}, for KL by step size on any data.
        adapters: {component: folder or repository of its adapter}.
        compare: another decomposition.
        training: the folder of a training run with an NPEFFCallback.
        change: a ChangeReport, or the result of its `to_dict`.
    """

    alignments: Sequence[TokenAlignmentLike] = ()
    energies: Mapping[int, Mapping[str, float]] | None = None
    reports: Mapping[int, ReportLike | Mapping[str, Any]] = field(default_factory=dict)
    measurements: Mapping[int, HasDict | Mapping[str, Any]] = field(default_factory=dict)
    adapters: Mapping[int, str] = field(default_factory=dict)
    compare: Decomposition | None = None
    training: Path | None = None
    change: HasDict | Mapping[str, Any] | None = None


def gather(decomposition: Decomposition, extras: Extras, *, texts: bool, layout: Layout | None) -> PageData:
    """Facts and arrays of a page.

    Args:
        decomposition: the decomposition.
        extras: further results on it.
        texts: whether the page has texts: the columns that `hub.text_columns` counts as texts, tokens, and texts in
            reports.
        layout: how the map is computed; None leaves it out.

    Raises:
        ValueError: if a component of the extras does not exist, or the comparison or training run does not fit.
        ModuleNotFoundError: if the map needs scikit-learn, which is not installed.
    """
    for name, numbers in _mentioned(extras).items():
        if unknown := sorted({j for j in numbers if not 0 <= j < len(decomposition)}):
            raise ValueError(
                f"{name} has the components {unknown[:5]}, but the decomposition has {len(decomposition)}, from 0"
            )
    page = PageData()
    notes: list[str] = []
    _add_decomposition(page, decomposition)
    _add_examples(page, decomposition, texts, notes)
    _add_associations(page, decomposition, texts)
    if layout is not None:
        n = len(decomposition.example_ids)
        page.arrays["xy"] = np.rint(place(decomposition.coefficients, layout) * 65535).astype(np.uint16)  # 16 bits
        placed = f"t-SNE of a sample of {LANDMARKS:,}; the others are placed beside their nearest neighbours in it"
        page.facts["layout"] = "principal components" if layout == "pca" else "t-SNE" if n <= LANDMARKS else placed
    else:
        notes.append("The map of examples was left out.")
    _add_alignments(page, extras.alignments, texts)
    _add_energies(page, decomposition, extras.energies, notes)
    page.facts["reports"] = {str(j): as_facts(report, decomposition, texts) for j, report in extras.reports.items()}
    page.facts["measurements"] = {
        str(j): measured_facts(each, decomposition, texts) for j, each in extras.measurements.items()
    }
    page.facts["adapters"] = {str(j): str(where) for j, where in extras.adapters.items()}
    if extras.compare is not None:
        _add_comparison(page, decomposition, extras.compare, texts)
    if extras.training is not None:
        _add_training(page, read_run(extras.training, len(decomposition)), texts)
    if extras.change is not None:
        page.facts["change"] = _change_facts(extras.change, decomposition, texts)
    page.facts["notes"] = notes
    return page


def _mentioned(extras: Extras) -> dict[str, list[int]]:
    return {
        "alignments": [alignment.component for alignment in extras.alignments],
        "energies": list(extras.energies or ()),
        "reports": list(extras.reports),
        "measurements": list(extras.measurements),
        "adapters": list(extras.adapters),
    }


def _add_decomposition(page: PageData, decomposition: Decomposition) -> None:
    info, G = decomposition.info, decomposition.pseudo_fishers
    model = info.get("model")
    page.facts |= {
        "version": __version__,
        "key": decomposition.key,
        "n": len(decomposition.example_ids),
        "r": len(decomposition),
        "model": None if model is None else shown_model(model),
        "revision": info.get("revision"),
        "architecture": info.get("architecture"),
        "task": info.get("task"),
        "sketch_error": (info.get("selftest") or {}).get("sketch_error"),
        "coverage": (info.get("selftest") or {}).get("coverage"),
        "read": None if (encoded := Encoded.of(info)) is None else str(encoded),
        "explained": decomposition.explained,
        "losses": [float(x) for x in decomposition.loss_history],
        "converged": decomposition.converged,
        "settings": decomposition.config.to_dict(),
        "fisher": {k: v for k, v in (info.get("fisher") or {}).items() if v is not None},
        "commit": decomposition.commit,
        "components": [
            {
                "name": component.name,
                "active": component.active_share,
                "stability": component.stability,
                "evaluation": decomposition.evaluations.get(component.index),
            }
            for component in decomposition
        ],
    }
    W = decomposition.coefficients.float().cpu().numpy()
    page.arrays["W"], page.arrays["W_largest"] = quantised(np.ascontiguousarray(W.T), axis=1)
    # A bit for each example, a row for each component: rounded coefficients would be ambiguous at the threshold.
    page.arrays["active"] = np.packbits(active_examples(decomposition.coefficients).cpu().numpy().T, axis=1)
    if len(decomposition) > 1:
        near, cosines = nearest_components(G)
        page.arrays["near"] = near.astype(np.uint32)
        page.arrays["near_cosine"] = cosines.astype(np.float32)


def _add_examples(page: PageData, decomposition: Decomposition, texts: bool, notes: list[str]) -> None:
    private = [] if texts else text_columns(decomposition.columns, decomposition.info)
    kept = {name: values for name, values in decomposition.columns.items() if name not in private}
    read = shown_columns(kept, decomposition.info)
    lines = shown_texts(kept, decomposition.info)
    page.facts["ids"] = decomposition.example_ids
    page.facts["text"] = None if lines is None else [None if t is None else str(t) for t in lines]
    if private:
        notes.append(f"Left out because they may be private: {', '.join(private)}.")
    elif lines is None:
        notes.append("No text was kept with the examples, so they are shown by their ids.")
    others, info = {k: v for k, v in kept.items() if k not in read}, decomposition.info
    columns = columns_of(others, info.get("label_names"), info)
    page.facts["columns"] = [_column_facts(page, at, column) for at, column in enumerate(columns)]
    explained = explained_by(decomposition.coefficients, decomposition.pseudo_fishers)
    page.arrays["explained"] = explained.total.astype(np.float32)
    page.arrays["part_component"] = explained.components.astype(np.uint32)
    page.arrays["part"] = explained.parts.astype(np.float32)


def _add_associations(page: PageData, decomposition: Decomposition, texts: bool) -> None:
    """What each component's examples have in common, in what may be shown of them."""
    private = [] if texts else text_columns(decomposition.columns, decomposition.info)
    kept = [name for name in described_by(decomposition.columns) if name not in private]
    if not kept:
        return
    read = shown_columns({name: decomposition.columns[name] for name in kept}, decomposition.info)
    associations = decomposition.associations(columns=kept, texts=bool(read))
    for shown, component in zip(page.facts["components"], associations, strict=True):
        shown["automatic"] = component.label
        shown["accuracy"], shown["error"] = component.accuracy, component.error
        shown["associations"] = [
            [a.feature, _short(a.share), _short(a.rest), _short(a.corrected), list(a.same), _short(a.log_p)]
            for a in component.associations
        ]
    page.facts["groups"] = [[feature, numbers] for feature, numbers in associations.groups.items()]


def _column_facts(page: PageData, at: int, column: Column) -> dict[str, Any]:
    if column.data is not None:
        page.arrays[f"column/{at}"] = column.data
    return {"name": column.name, "kind": column.kind, "values": column.values}


def _add_alignments(page: PageData, alignments: Sequence[TokenAlignmentLike], texts: bool) -> None:
    """{component: [example, alignment, tokens, contributions, unplaced]}; empty if texts must stay private."""
    shading: dict[str, list[dict[str, Any]]] = {}
    for alignment in alignments if texts else ():
        shading.setdefault(str(alignment.component), []).append(
            {
                "example": alignment.example,
                "alignment": _short(alignment.alignment),
                "tokens": alignment.tokens or [f"[{t}]" for t in range(len(alignment.contributions))],
                "contributions": [_short(c) for c in alignment.contributions],
                "unplaced": _short(alignment.unplaced),
            }
        )
    page.facts["shading"] = shading


def _short(value: float) -> float:
    """A number rounded to 6 digits, so that pages are small enough to mail."""
    return float(f"{value:.6g}")


def _add_energies(
    page: PageData,
    decomposition: Decomposition,
    measured: Mapping[int, Mapping[str, float]] | None,
    notes: list[str],
) -> None:
    energies = {**(estimated_energies(decomposition) or {}), **(measured or {})}
    if not energies:
        notes.append(
            "The page does not show how components are spread over modules: this sketch adds the modules up, and no "
            "directions were lifted."
        )
        return
    table: ModuleEnergies = by_layer(
        energies, len(decomposition), list(measured or ()), analysed_parameters(decomposition)
    )
    page.facts["modules"] = {"layers": table.layers, "kinds": table.kinds, "exact": table.exact}
    page.arrays["energy"] = table.shares


def _change_facts(report: HasDict | Mapping[str, Any], decomposition: Decomposition, texts: bool) -> dict[str, Any]:
    """What the page shows of a change; texts are those of the page's own examples."""
    content = finite(dict(report if isinstance(report, Mapping) else report.to_dict()))
    n, r = len(decomposition.example_ids), len(decomposition)
    own = [each for each in content["components"] if not each["new"]]
    if content["n"] != n or sorted(each["component"] for each in own) != list(range(r)):
        raise ValueError(
            f"the change report has {content['n']} examples and {len(own)} components, but the decomposition has {n} "
            f"and {r}: they do not belong together"
        )
    check_same_examples("the change report", [*content["changed"], *content["unexplained"]], decomposition)
    for name in ("changed", "unexplained"):
        content[name] = [{k: v for k, v in row.items() if k != "text"} for row in content[name]]
    if not texts:
        content["associations"] = []
        for each in content.get("groups", ()):
            each["associations"] = []
        for each in content["components"]:
            each["top"], each["automatic_label"] = [], None
    return {name: value for name, value in content.items() if name != "predicted"}


def _add_comparison(page: PageData, first: Decomposition, second: Decomposition, texts: bool) -> None:
    measure, S = similarities(first, second)
    pairs = matches(S)
    private = [] if texts else text_columns(second.columns, second.info)
    kept = {name: values for name, values in second.columns.items() if name not in private}
    shown = shown_texts(kept, second.info) or second.example_ids
    others = []
    for component in second:
        top = component.top_examples(SHOWN_ELSEWHERE)
        lines = [str(shown[i]) for i in top.indices]
        predictions = top.columns.get("prediction") or [None] * len(lines)
        others.append(
            {
                "label": component.label,
                "active": component.active_share,
                "stability": component.stability,
                "top": [[line, None if p is None else str(p)] for line, p in zip(lines, predictions, strict=True)],
            }
        )
    model = second.info.get("model")
    page.facts["comparison"] = {
        "measure": measure,
        "model": None if model is None else shown_model(model),
        "revision": second.info.get("revision"),
        "explained": second.explained,
        "n": len(second.example_ids),
        "components": others,
        "pairs": [[i, j, s] for i, j, s in pairs],
    }
    # 8 bits with a sign
    page.arrays["similarity"] = np.rint(np.nan_to_num(S.numpy()).clip(-1, 1) * 127).astype(np.int8)


def _add_training(page: PageData, run: Run, texts: bool) -> None:
    page.facts["training"] = {
        "steps": run.steps,
        "epochs": run.epochs,
        "explained": run.explained,
        "active": run.active,
        "association": run.association if texts else [None] * len(run.association),
    }
    for name in ("share", "cosine", "correlation", "accuracy", "associated"):
        page.arrays[f"training/{name}"] = getattr(run, name)
