"""The section of docs/benchmarks.md on all components at once: low-rank lifting, and measuring in the activations."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.measure import kept
from tests.benchmarks.tables import machine_of, number, table, verdict

LOW_RANK = """## All components at once

`python -m tests.benchmarks.low_rank`, one thread, processor time. Adapters of rank 4, all from the same passes over the
data, over the time of computing the PEFs in the same process; the cosine of an adapter is that with the best cut of
exact lifting, by a whole SVD, of six components."""
MEASURING = """Measuring 16 components, lifting included: adapters of plain components, measured together in the
activations, and, as this library did before, directions lifted whole, four at a time, each measured with moved weights
(`tests/benchmarks/in_place.py`). A report is of 16 top examples at both signs of a step that is searched for, 64 others
at both, and both groups after a random step: 240 forward passes of one example at the least, which both ways have to
make; so no way to measure is much faster than the earlier one by itself."""


def low_rank_section() -> str:
    """Every model that was measured."""
    parts = [LOW_RANK, machine_of("low-rank")]
    for model, figures in kept("low-rank").get("models", {}).items():
        if "ways" in figures:
            parts.append(_lifting(model, figures))
        if "measuring" in figures:
            parts.append(_measuring(model, figures["measuring"]))
        if "solving" in figures:
            parts.append(_solving(model, figures["solving"]))
    return "\n\n".join(parts)


def _lifting(model: str, figures: dict[str, Any]) -> str:
    lines = [
        (way, number(f["time / PEFs"]), number(f["cosine"], 3), number(f["least"], 3), f"{f['energy']:.0%}")
        for way, f in figures["ways"].items()
    ]
    header = ("directions", "time / PEFs", "cosine, median", "least", "energy kept")
    text = f"### {model}: {figures['components']} components of {figures['n']} examples\n\n{table(header, lines)}"
    one_pass = [f for way, f in figures["ways"].items() if "two passes" not in way]
    slowest = max(f["time / PEFs"] for f in one_pass)
    median, least = min(f["cosine"] for f in one_pass), min(f["least"] for f in one_pass)
    text += (
        f"\n\nBars, of one pass: at most 1.5 × the time of the PEFs: {slowest:.2f}, {verdict(slowest <= 1.5)}; cosine "
        f"at least .98 in the median, .95 at the least: {median:.3f} and {least:.3f}, "
        f"{verdict(median >= 0.98 and least >= 0.95)}."
    )
    if memory := figures.get("memory"):
        over = memory["over, adapters"]
        text += (
            f" Memory over that of computing the PEFs ({memory['PEFs']:,.0f} MiB at their peak), in sizes of the "
            f"adapters ({memory['adapters']:.0f} MiB), at most 2: {over:.1f}, {verdict(over <= 2)}."
        )
    return text


def _measuring(model: str, f: dict[str, float]) -> str:
    lines = [
        ("together", number(f["lifting, s"], 1), number(f["together, s"] - f["lifting, s"], 1)),
        ("in place", number(f["lifting whole, s"], 1), number(f["in place, s"] - f["lifting whole, s"], 1)),
    ]
    return (
        f"{MEASURING}\n\n{model}:\n\n{table(('', 'lifting, s', 'measuring, s'), lines)}\n\n"
        f"Together {f['ratio']:.1f} × as fast, {f['ratio without lifting']:.1f} × without lifting; bar 6: "
        f"{verdict(f['ratio'] >= 6)}. KL in float32 differs from that of moved weights by at most "
        f"{f['KL differs, nats']:.1g} nats (bar 1e-4): {verdict(f['KL differs, nats'] <= 1e-4)}."
    )


def _solving(model: str, f: dict[str, float]) -> str:
    return (
        f"{model}: solving for all selective directions together takes {f['together, s']:.1f} s, each by itself, as "
        f"before, {f['apart, s']:.0f} s, {f['ratio']:.0f} × as long; {f['same ridge']:.0%} of those compared take the "
        "same ridge."
    )
