"""The figures of docs/benchmarks.md, from the kept figures: SVG, the same bytes for the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from tests.benchmarks.measure import kept

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
STYLE = {
    "svg.hashsalt": "hf_npeff", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.dpi": 100,
}  # fmt: skip
INK = ("#1f5fa8", "#c8553d", "#4a8f5b", "#8a5fb0", "#777777")


def save(figure: Any, name: str) -> str:
    """The name of the file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FOLDER / f"benchmarks-{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return f"figures/benchmarks-{name}.svg"


def rows(models: dict[str, dict[str, Any]]) -> str:
    """Error against time of every way that makes rows; `models` {model: {way: {ratio, error}}}."""
    figure, axes = plt.subplots(1, len(models), figsize=(3.3 * len(models), 3.2), sharey=True, squeeze=False)
    for axis, (model, ways) in zip(axes[0], models.items(), strict=True):
        for label, found in ways.items():
            if found.get("error") is None or "ratio" not in found:
                continue
            own = label.startswith(("kronecker", "two-stage", "countsketch", "auto"))
            axis.plot(found["ratio"], found["error"], "o" if own else "s", color=INK[0] if own else INK[1])
            axis.annotate(label, (found["ratio"], found["error"]), xytext=(4, 3), textcoords="offset points", size=7)
        axis.set(title=model, xlabel="time / floor", xscale="log", yscale="log")
        axis.axhline(0.1, color="#999999", lw=0.8, ls=":")
    axes[0][0].set_ylabel("error of PEF inner products")
    return save(figure, "rows")


def stability() -> str:
    """Agreement of independent fits against n."""
    models = [model for model in ("SmolLM2", "MiniLM") if kept(f"stability-{model}")]
    panels = [(model, r) for model in models for r in (8, 16)]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.0 * len(panels), 2.9), sharey=True)
    for axis, (model, r) in zip(axes, panels, strict=True):
        table = [row for row in kept(f"stability-{model}").get("table", []) if row["r"] == r and row["c"] == 4]
        for power, ink in ((1.0, INK[1]), (0.5, INK[0])):
            some = [row for row in table if row["power"] == power]
            for restarts, style in (("12", "-o"), ("1", ":.")):
                axis.plot(
                    [row["n"] for row in some], [row["agreement"].get(restarts) for row in some], style, color=ink,
                    label=f"F^{power:g}, best of {restarts}",
                )  # fmt: skip
        axis.axhline(0.9, color="#999999", lw=0.8, ls="--")
        axis.set(title=f"{model}, r = {r}", xlabel="examples", xscale="log", ylim=(0, 1.03))
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("components found again")
    axes[-1].legend(fontsize=7, loc="lower right")
    return save(figure, "stability")


def scaling() -> str:
    """Seconds and MiB against every size."""
    found = kept("scaling")
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 5.4))
    for column, stage in enumerate(("rows", "fit")):
        for i, (letter, points) in enumerate(found.get(stage, {}).items()):
            sizes = [size / points["sizes"][0] for size in points["sizes"]]
            for row, (what, k) in enumerate((("seconds", 0), ("MiB", 1))):
                e = points["exponents"][k]
                label = f"{letter}: " + ("flat" if e is None else f"exponent {e:.2f}")
                axes[row][column].plot(sizes, points[what], "-o", color=INK[i], label=label, ms=4)
        for row, what in enumerate(("seconds of processor time", "MiB at the peak")):
            axes[row][column].set(xlabel="times the base size", ylabel=what, xscale="log", yscale="log")
            axes[row][column].legend(fontsize=7)
        axes[0][column].set_title({"rows": "computing PEFs", "fit": "ten iterations of the fit"}[stage])
    return save(figure, "scaling")


def stopping() -> str:
    """What is kept against the time that it takes."""
    found = kept("stopping").get("problems", {})
    figure, axes = plt.subplots(
        1, max(1, len(found)), figsize=(3.1 * max(1, len(found)), 2.9), sharey=True, squeeze=False
    )
    for axis, (name, table) in zip(axes[0], found.items(), strict=True):
        times = [row["time"] for row in table]
        axis.plot(times, [row["explained"] for row in table], "-o", color=INK[0], label="explained fraction")
        axis.plot(times, [row["same"] for row in table], "-s", color=INK[1], label="components kept")
        axis.set(title=name, xlabel="time / time to convergence", xscale="log", ylim=(0, 1.03))
    axes[0][0].set_ylabel("share of the converged fit")
    axes[0][-1].legend(fontsize=7, loc="lower right")
    return save(figure, "stopping")


def fidelity(table: list[dict[str, Any]], prompts: int) -> str:
    """Fisher error and agreement against seconds, of a truth from so many prompts."""
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.0))
    for factor, ink in zip(("spectral", "projection", "sampling"), INK, strict=False):
        some = [row for row in table if row["factor"] == factor]
        for axis, key in zip(axes, ("error", "agreement"), strict=True):
            axis.plot([row["seconds"] for row in some], [row[key] for row in some], "-o", color=ink, label=factor, ms=4)
            for row in some:
                where = (row["seconds"], row[key])
                axis.annotate(str(row["c"]), where, xytext=(3, 3), textcoords="offset points", size=6)
    axes[0].set(xlabel="seconds", ylabel="relative Fisher error", xscale="log", yscale="log")
    axes[1].set(xlabel="seconds", ylabel="agreement of coefficients", xscale="log", ylim=(0, 1.03))
    axes[0].legend(fontsize=7)
    return save(figure, f"fidelity-{prompts}")
