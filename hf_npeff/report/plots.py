"""The page's figures as plotly objects, for notebooks.

Every function takes what the library hands out and returns a `plotly.graph_objects.Figure`. plotly is in the extra
`viz`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_npeff.decomposition.matching import matches, similarities
from hf_npeff.encoding.columns import CORRECT, Column, columns_of
from hf_npeff.extras import load
from hf_npeff.report.examples import Layout, explained_by, place
from hf_npeff.report.modules import analysed_parameters, by_layer, estimated_energies
from hf_npeff.report.training import read_run

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from hf_npeff.decomposition.component import Component
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.sharing.protocols import DecompositionLike
    from hf_npeff.weights.measurement import Measurement
    from hf_npeff.weights.perturbation import PerturbationReport
    from hf_npeff.weights.token_alignments import TokenAlignment

OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7a7a7a")
"""Eight colours that colour-blind readers can distinguish (Okabe and Ito)."""
_OTHERS = "#9aa0a8"
_MOST_VALUES = 12
"""The most bars of a chart. Chosen: labels stay readable."""


def _plotly() -> Any:
    """plotly.graph_objects.

    Raises:
        ModuleNotFoundError: if plotly is not installed.
    """
    return load("plotly.graph_objects", "a figure")


def _figure(go: Any, *traces: Any, title: str = "", x: str = "", y: str = "", **layout: Any) -> go.Figure:
    figure = go.Figure(list(traces))
    figure.update_layout(
        title=title,
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        colorway=OKABE_ITO,
        margin={"t": 48},
        **layout,
    )
    return figure


def _column(decomposition: DecompositionLike, name: str) -> Column:
    """A column that can colour a map.

    Raises:
        ValueError: if there is none of that name.
    """
    known = {
        c.name: c for c in columns_of(decomposition.columns, decomposition.info.get("label_names"), decomposition.info)
    }
    usable = [c.name for c in known.values() if c.kind != "text"]
    if name not in usable:
        raise ValueError(f"there is no column {name!r} of categories or numbers; there are {usable}")
    return known[name]


def overview(decomposition: Decomposition) -> go.Figure:
    """Share of the examples on which each component is active, and its stability by colour."""
    go = _plotly()
    components = list(decomposition)
    marker = {"color": [c.stability for c in components], "colorscale": "Viridis", "cmin": 0, "cmax": 1}
    bar = go.Bar(
        x=[c.label for c in components],
        y=[c.active_share for c in components],
        marker={**marker, "colorbar": {"title": "stability"}},
    )
    return _figure(go, bar, title="Components", y="active on", yaxis_tickformat=".0%")


def coefficients(component: Component, bins: int = 40) -> go.Figure:
    """Histogram of a component's coefficients above zero."""
    go = _plotly()
    values = component.coefficients[component.coefficients > 0].numpy()
    return _figure(
        go, go.Histogram(x=values, nbinsx=bins), title=component.label, x="coefficient", y="examples", yaxis_type="log"
    )


def by_column(component: Component, column: str = CORRECT) -> go.Figure:
    """A column's values on the examples on which the component is active, compared with all examples.

    Args:
        component: whose examples.
        column: its name, or "prediction correct".

    Raises:
        ValueError: if there is no such column of categories or numbers.
    """
    go = _plotly()
    decomposition = component.decomposition
    shown = _column(decomposition, column)
    active = component.active.numpy()
    assert shown.data is not None
    if shown.kind == "number":
        traces = [
            go.Histogram(x=values, name=name, histnorm="probability")
            for name, values in (("active", shown.data[active]), ("all", shown.data))
        ]
        return _figure(go, *traces, title=component.label, x=column, y="share", yaxis_tickformat=".0%")
    counts, everywhere = Counter(shown.data[active].tolist()), Counter(shown.data.tolist())
    codes = [code for code, _ in counts.most_common(_MOST_VALUES)]
    names = [shown.values[code] or "no value" for code in codes]
    bars = [
        go.Bar(x=names, y=[c[code] / max(sum(c.values()), 1) for code in codes], name=name)
        for name, c in (("where it is active", counts), ("all examples", everywhere))
    ]
    return _figure(go, *bars, title=component.label, x=column, y="share", yaxis_tickformat=".0%", barmode="group")


def modules(
    decomposition: Decomposition, component: int, energies: Mapping[int, Mapping[str, float]] | None = None
) -> go.Figure:
    """Share of a component's energy by layer and kind of module.

    Args:
        decomposition: whose component.
        component: the number of the component.
        energies: {component: {parameter: share}} from `direction.energies()`; None estimates them from the sketch.

    Raises:
        ValueError: if they are not given and this sketch adds the modules up.
    """
    go = _plotly()
    j = decomposition.index_of(component)
    known = energies or estimated_energies(decomposition)
    if known is None or j not in known:
        raise ValueError("this sketch adds the modules up; lift the component and pass {j: direction.energies()}")
    table = by_layer({j: known[j]}, len(decomposition), order=analysed_parameters(decomposition))
    heat = go.Heatmap(z=table.shares[j], x=table.kinds, y=table.layers, colorscale="Viridis", hoverongaps=False)
    return _figure(
        go, heat, title=f"{decomposition[j].label}: energy", x="module", y="layer", yaxis_autorange="reversed"
    )


def neighbours(decomposition: Decomposition) -> go.Figure:
    """The |cosine| of all pairs of components."""
    go = _plotly()
    G = decomposition.pseudo_fishers.double()
    labels = [c.label for c in decomposition]
    heat = go.Heatmap(z=(G @ G.T).abs().numpy(), x=labels, y=labels, colorscale="Viridis", zmin=0, zmax=1)
    return _figure(go, heat, title="|cosine| of components", yaxis_autorange="reversed")


def example(decomposition: Decomposition, i: int, k: int = 8) -> go.Figure:
    """What explains one example: a bar of its components, other components, and what is not explained.

    Raises:
        IndexError: if there is no such example.
    """
    go = _plotly()
    n = len(decomposition.example_ids)
    if not -n <= i < n:
        raise IndexError(f"there are {n} examples, numbered from 0; {i} does not exist")
    i %= n
    explained = explained_by(decomposition.coefficients[i : i + 1], decomposition.pseudo_fishers, k)
    parts = [
        (decomposition[int(j)].label, float(share), OKABE_ITO[at % len(OKABE_ITO)])
        for at, (j, share) in enumerate(zip(explained.components[0], explained.parts[0], strict=True))
        if share > 0
    ]
    total = float(explained.total[0])
    parts.append(("other components", max(total - sum(share for _, share, _ in parts), 0.0), _OTHERS))
    parts.append(("not explained", max(1 - total, 0.0), "#e5e5e5"))
    bars = [go.Bar(x=[share], y=[""], name=name, orientation="h", marker_color=color) for name, share, color in parts]
    title = f"Example {decomposition.example_ids[i]}: {total:.1%} explained"
    return _figure(go, *bars, title=title, barmode="stack", xaxis_tickformat=".0%", height=240)


def example_map(
    decomposition: Decomposition, color: str | int | None = None, *, layout: Layout = "tsne", seed: int = 0
) -> go.Figure:
    """All examples on a plane; those with similar mixtures of components lie close together.

    Args:
        decomposition: whose examples.
        color: a column's name, or a component's number; None leaves them alike.
        layout: t-SNE or principal components.
        seed: the seed of the layout.

    Raises:
        ValueError: if there is no such column.
        IndexError: if there is no such component.
        ModuleNotFoundError: if scikit-learn or plotly is not installed.
    """
    go = _plotly()
    xy = place(decomposition.coefficients, layout, seed)
    texts = decomposition.texts or decomposition.example_ids
    hover = np.array([str(text)[-120:].replace("<", "‹") for text in texts])

    def points(where: Any, **marker: Any) -> Any:
        return {"x": xy[where, 0], "y": xy[where, 1], "text": hover[where], "mode": "markers", "marker": marker}

    everyone = slice(None)
    if color is None:
        traces = [go.Scattergl(points(everyone))]
    elif isinstance(color, int):
        values = decomposition[color].coefficients.numpy()
        traces = [go.Scattergl(points(everyone, color=values, colorscale="Viridis", showscale=True))]
    else:
        column = _column(decomposition, color)
        assert column.data is not None
        if column.kind == "number":
            traces = [go.Scattergl(points(everyone, color=column.data, colorscale="Viridis", showscale=True))]
        else:
            codes = [code for code, _ in Counter(column.data.tolist()).most_common()]
            named, rest = (codes, []) if len(codes) <= 8 else (codes[:7], codes[7:])  # as many as there are colours
            traces = [
                go.Scattergl(points(column.data == code), name=column.values[code] or "no value") for code in named
            ]
            if rest:
                traces.append(go.Scattergl(points(np.isin(column.data, rest), color=_OTHERS), name="other values"))
    return _figure(go, *traces, title="Examples", xaxis_visible=False, yaxis_visible=False)


def comparison(first: Decomposition, second: Decomposition) -> go.Figure:
    """The similarity of all pairs of components, with matched pairs on the diagonal.

    Raises:
        ValueError: if the two share neither examples nor the sketch.
    """
    go = _plotly()
    measure, S = similarities(first, second)
    pairs = matches(S)
    rows = [i for i, _, _ in pairs] + [i for i in range(len(first)) if i not in {p[0] for p in pairs}]
    columns = [j for _, j, _ in pairs] + [j for j in range(len(second)) if j not in {p[1] for p in pairs}]
    heat = go.Heatmap(
        z=S[rows][:, columns].clamp_min(0).numpy(),
        x=[f"{second[j].label} ({j})" for j in columns],
        y=[f"{first[i].label} ({i})" for i in rows],
        colorscale="Viridis",
        zmin=0,
        zmax=1,
    )
    return _figure(go, heat, title=measure, x="second", y="first", yaxis_autorange="reversed")


def training(folder: str | Path, components: int) -> go.Figure:
    """The share of the examples that each component leads, over the steps of a run with an NPEFFCallback.

    Args:
        folder: the folder of the run, or of a checkpoint.
        components: r.

    Raises:
        FileNotFoundError: if there is no history.
        ValueError: if it is of another number of components.
    """
    go = _plotly()
    run = read_run(Path(folder), components)
    heat = go.Heatmap(z=run.share.T, x=[str(s) for s in run.steps], y=list(range(components)), colorscale="Viridis")
    return _figure(go, heat, title="Share of examples led", x="step", y="component")


def perturbation(report: PerturbationReport) -> go.Figure:
    """KL on a component's top examples and on others, for the step, the other sign and a random direction."""
    go = _plotly()
    effects = [("this step", report.best), ("the other sign", report.opposite), ("a random direction", report.random)]
    known = [(name, effect) for name, effect in effects if effect is not None]
    bars = [
        go.Bar(x=[name for name, _ in known], y=[getattr(effect, field) for _, effect in known], name=label)
        for field, label in (("top", "top examples"), ("others", "others"))
    ]
    title = f"Component {report.component}: KL ratio {report.ratio:.3g}"
    return _figure(go, *bars, title=title, y="KL, nats", barmode="group")


def doses(measurement: Measurement, rank: int | None = None) -> go.Figure:
    """Mean KL of every group by the step's size, with 95% intervals; the other sign dotted, a random change dashed.

    Args:
        measurement: from `NPEFFAnalyzer.measure`.
        rank: which of its ranks.

    Raises:
        ValueError: if nothing was measured at that rank.
    """
    go = _plotly()
    steps = [step for step in measurement.steps if step.rank == rank and step.quantised is None]
    if not steps:
        raise ValueError(f"rank {rank} was not measured; measured ranks: {[s.rank for s in measurement.steps]}")
    kinds = {
        ("", "solid"): [s for s in steps if not s.random and s.scale > 0],
        (", other sign", "dot"): [s for s in steps if not s.random and s.scale < 0],
        (", random change", "dash"): [s for s in steps if s.random],
    }
    traces = []
    for number, group in enumerate(steps[0].groups):
        colour = OKABE_ITO[number % len(OKABE_ITO)]
        for (what, dash), measured in kinds.items():
            line = sorted(measured, key=lambda step: abs(step.scale))
            effects = [step.groups[group] for step in line]
            spread = {
                "array": [e.kl_interval[1] - e.kl for e in effects],
                "arrayminus": [e.kl - e.kl_interval[0] for e in effects],
            }
            trace = go.Scatter(
                x=[abs(step.scale) for step in line],
                y=[e.kl for e in effects],
                error_y={"type": "data", **spread},
                name=group + what,
                legendgroup=group,
                line={"color": colour, "dash": dash},
            )
            traces += [trace] if line else []
    return _figure(go, *traces, title=measurement.change, x="step", y="KL, nats", yaxis_type="log", xaxis_type="log")


def tokens(alignments: Sequence[TokenAlignment]) -> go.Figure:
    """The contribution of every token to an example's alignment with a component, with a panel for each example.

    Raises:
        ValueError: if there are none.
    """
    if not alignments:
        raise ValueError("there are no alignments; NPEFFAnalyzer.token_alignments computes them")
    figure = load("plotly.subplots", "a figure").make_subplots(
        rows=len(alignments), cols=1, subplot_titles=[f"example {a.example}" for a in alignments]
    )
    for row, alignment in enumerate(alignments, 1):
        names = [f"{t} {token!r}" for t, token in enumerate(alignment.tokens or [""] * len(alignment.contributions))]
        colours = [OKABE_ITO[1] if c > 0 else OKABE_ITO[4] for c in alignment.contributions]
        figure.add_bar(x=names, y=alignment.contributions, marker_color=colours, row=row, col=1, showlegend=False)
    figure.update_layout(template="plotly_white", height=260 * len(alignments), title="Contributions to the alignment")
    return figure
