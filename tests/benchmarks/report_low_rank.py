"""The section of docs/benchmarks.md on all components at once: low-rank lifting, and measuring in the activations."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.measure import kept
from tests.benchmarks.tables import machine_of, number, table, verdict

LOW_RANK = """## All components at once

`python -m tests.benchmarks.low_rank` makes adapters of rank 4 of all components in the same passes over the data, with
one thread, in processor time. The time is given over that of computing the PEFs in the same process. The cosine
compares an adapter with the best truncation of exact lifting, by a full SVD, for six components."""
MEASURING = """The next table is of measuring 16 components, lifting included. "Together" are adapters of plain
components, measured together in the activations. "In place" is what this library did before: whole directions are
lifted, four at a time, and each is measured with moved weights (`tests/benchmarks/in_place.py`). A report has 16 top
examples and 64 others at both signs of a step that is searched for, and both groups after a random step. Both ways have
to make these 240 forward passes of one example, so measuring alone cannot become much faster than before."""


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
        f"\n\nBars for one pass: at most 1.5 × the time of the PEFs: {slowest:.2f}, {verdict(slowest <= 1.5)}; cosine "
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
