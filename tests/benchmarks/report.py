"""Writes docs/benchmarks.md, its figures and the README's table of speed from what the other scripts kept.

python -m tests.benchmarks.report
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks import figures
from tests.benchmarks.measure import kept
from tests.benchmarks.report_low_rank import low_rank_section
from tests.benchmarks.report_rows import fidelity_section, rows_section, speed_table
from tests.benchmarks.tables import image, machine_of, number, table

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "benchmarks.md"
README = REPOSITORY / "README.md"
SPEED_MARK = "<!-- speed -->"
INTRODUCTION = """# How fast, against whom

Every time is given as a ratio. The two things that are compared take turns in one process, and the figure is the median
of at least five rounds, so whatever slows the machine down cancels. The ratios were measured on two CPU cores that
other work shared, with one thread each; seconds only give the scale. The letters n, c, d and r are explained in
[the method](method.md#letters). `make bench` writes this page, and each section names the script that measures it.
`make bench-quick` compares a few of the ratios with those kept here. A *bar* is a goal that was set before measuring.
[One of the decisions](decisions/2026-11-23-solver-experiments.md) says what was tried to make the solver faster and
fits more stable, and what did not help.
"""
SOLVER = """## Solver

`python -m tests.benchmarks.solver` compares block_power with the paper's algorithm at the best of five learning rates.
Both make 400 iterations at most. The figures are medians over five seeds with one start each, in processor time; where
a cell has two figures, the first is ours. The time of block_power includes its start, and the way to Gram space and
back. Planted problems have 2,000 examples, c = 4 and d = 512, but those in eight and in two rows, which have 1,500 and
4,000 examples and d = 384 and 256; real ones have 256 PEFs and 16 components."""
SOLVER_AS_IT_IS = """### Against the algorithm as published, on the rows as they are"""
SOLVER_GRAM = """### Against the paper's algorithm given our Gram space

Both run in Gram space, and the time to get there is not counted. The starts of a fit share that time, so these are the
savings of every start but the first."""
SOLVER_LIMIT = """"It reaches our end" counts the seeds from which the reference reaches our final loss; from the others
it stops at a worse optimum. "Ours worse" counts the seeds from which our single start ends with a higher loss than the
reference's."""
STABILITY = """## Stability: do two independent fits find the same components?

`python -m tests.benchmarks.stability` measures the share of components that have a partner of their own at
|cosine| ≥ 0.9 in another fit. The figures are means over pairs of fits; each fit is the best of 1, 4 or 12 starts. The
models are SmolLM2 on word relations (MLPs of layers 10–29), and a MiniLM fine-tuned on Home Assistant's intents (all
linear maps). Direct starts choose examples by k-means++. The default takes twice as many components at first and
removes the least needed."""
SCALING = """## Scaling

`python -m tests.benchmarks.scaling` doubles each size four times and leaves the others at their base. The exponent e is
that of a + b·x^e (a, b ≥ 0), fitted to the five points. The constant is a as a share of the first point: the self-test
and Python's own work. "Flat" means less than a quarter more for sixteen times the size. A countsketch reads every
number of a gradient once, whatever d is. Coordinate descent on W costs r² for each example."""
LARGE_FIT = """## A large fit

`python -m tests.benchmarks.large_fit` times the phases of one start of a planted problem, in processor seconds with one
thread. A start first iterates in the leading subspace, then in all dimensions. *Products* read all rows."""
LIFTING = """## Lifting

`python -m tests.benchmarks.lifting` lifts components of a trained BERT classifier of 2 layers and of a fine-tuned
MiniLM. The columns are the cosine with the same component of an unsketched decomposition; the time over that of exact
lifting; the length of the step that moves the top examples by 0.1 nats, over that of exact lifting; and the KL on the
top examples over the KL on others at this step."""
LIFTING_MEANS = """Except for IHT, the KL ratio is about the same for all methods, because the error of the adjoint is a
random direction, which moves no prediction. The error shows in the length of the step, about 1 / cosine times that of
exact
lifting: the rest of the step is noise in the weights, which an adapter of low rank would have to hold."""
STOPPING = """## Early stopping

`python -m tests.benchmarks.stopping` stops the same starts when an iteration improves the loss by less than the
tolerance, and compares them with a tolerance of 1e-7. The default is 1e-5. The figures are medians over five starts."""


def solver_section() -> str:
    problems = kept("solver").get("problems", {})
    gram = {name: f for name, f in problems.items() if name.endswith("in Gram space")}
    plain = {name: f for name, f in problems.items() if name not in gram}
    parts = [SOLVER, machine_of("solver"), SOLVER_AS_IT_IS, solver_table(plain), solver_verdict(plain)]
    if gram:
        parts += [SOLVER_GRAM, solver_table(gram), solver_verdict(gram)]
    return "\n\n".join([*parts, SOLVER_LIMIT])


def solver_table(problems: dict[str, Any]) -> str:
    lines = []
    for name, f in problems.items():
        n, ends = f["seeds"], f["reached"]
        lines.append((
            name, f"1/{1 / f['share']:.1f}", f"1/{1 / f['slowest']:.1f}" if f["slowest"] else "never",
            f"{number(f['seconds'][0])} and {number(f['seconds'][1])}",
            f"{f['iterations'][0]:g} and {f['iterations'][1]:g}", f"{f['loss']:.5f} and {f['reference']:.5f}",
            f"{f['best'][0]:.5f} and {f['best'][1]:.5f}", f"{f['worse']} of {n}",
            f"{ends} of {n}" if ends else "never",
            "–" if f["found"] is None else f"{f['found'][0]:g} and {f['found'][1]:g} of {f['r']}",
            f"{f['MiB'][0]:.0f} and {f['MiB'][1]:.0f}",
        ))  # fmt: skip
    header = (
        "problem", "time to the reference's loss", "slowest seed", "seconds to each one's end", "iterations",
        "loss, median", "loss, best of all seeds", "ours worse", "it reaches our end", "directions found", "MiB",
    )  # fmt: skip
    return table(header, lines)


def solver_verdict(problems: dict[str, Any]) -> str:
    fast, faster = (sum(f["share"] <= share for f in problems.values()) for share in (0.2, 0.1))
    good = sum(f["worse"] == 0 for f in problems.values())
    ends = sum(f["best"][0] <= f["best"][1] * 1.0001 for f in problems.values())
    return (
        f"Bars: at least 10 × faster on {faster} of {len(problems)} problems, 5 × on {fast}; no start ends worse "
        f"on {good}; the best start, which is what a fit keeps, ends no worse than the reference's best on {ends}."
    )


def settings_of(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(row[key] for key in ("n", "c", "power", "r"))


def stability_section() -> str:
    parts = [STABILITY]
    for model in ("SmolLM2", "MiniLM"):
        record = kept(f"stability-{model}")
        direct = {settings_of(row): row for row in kept(f"stability-{model}-direct").get("table", [])}
        lines = []
        for row in sorted(record.get("table", []), key=lambda r: (r["r"], -r["power"], r["c"], r["n"])):
            before = direct.get(settings_of(row), {}).get("agreement", {})
            agreement = [number(found.get(R)) for found in (row["agreement"], before) for R in ("1", "4", "12")]
            settings = [f"{row[key]:g}" for key in ("n", "c", "power", "r")]
            lines.append((*settings, number(row["explained"], 3), number(row["auroc"], 3), *agreement))
        header = ("n", "c", "power", "r", "explained", "AUROC", "best of 1", "best of 4", "best of 12")
        if direct:
            header += ("1, direct starts", "4, direct", "12, direct")
        if lines:
            kept_columns = [line[: len(header)] for line in lines]
            parts.append(f"### {model}\n\n*{record['machine']}*\n\n" + table(header, kept_columns))
    parts.append(image(figures.stability(), "agreement of independent fits against the number of examples"))
    return "\n\n".join(parts)


def exponent(points: dict[str, Any], which: int) -> tuple[str, str]:
    """The fitted exponent and the constant share of time (0) or memory (1)."""
    e, a = points["exponents"][which], points["constants"][which]
    return ("flat", "–") if e is None else (number(e), f"{a:.0%}")


def scaling_section() -> str:
    found = kept("scaling")
    lines = [
        (
            {"rows": "computing PEFs", "fit": "fit"}[stage], letter, f"{p['sizes'][0]} … {p['sizes'][-1]}",
            *(exponent(p, 0)), *(exponent(p, 1)), " ".join(f"{s:.3g}" for s in p["seconds"]),
            " ".join(f"{m:.0f}" for m in p["MiB"]),
        )
        for stage in ("rows", "fit") for letter, p in found.get(stage, {}).items()
    ]  # fmt: skip
    header = ("stage", "", "sizes", "exponent of time", "constant", "of memory", "constant", "seconds", "MiB")
    return (
        SCALING + "\n\n" + machine_of("scaling") + "\n\n" + table(header, lines) + "\n\n"
        + image(figures.scaling(), "time and memory against n, c, d and r on log axes")
    )  # fmt: skip


def large_fit_section() -> str:
    found = kept("large-fit")
    phases = ("products", "coordinate descent on W", "the rest")
    lines = [
        (
            stage, str(found["iterations"].get(stage, "–")), *(number(seconds.get(p, 0.0), 1) for p in phases),
            number(sum(seconds.values()), 1), number(sum(seconds.values()) / seconds["products"]),
        )
        for stage, seconds in found["stages"].items()
    ]  # fmt: skip
    total = sum(sum(seconds.values()) for seconds in found["stages"].values())
    header = ("stage", "iterations", *(f"{p}, s" for p in phases), "together, s", "over its products")
    return (
        LARGE_FIT + f"\nHere n = {found['n']:,}, c = {found['c']}, d = {found['d']:,} and r = {found['r']}.\n\n"
        + machine_of("large-fit") + "\n\n" + table(header, lines)
        + f"\n\nOne start takes {total:.0f} s and finds {found['found']} of {found['r']} planted directions. It adds "
        f"{found['MiB']:.0f} MiB to the {found['rows, MiB']:.0f} MiB of the rows."
    )  # fmt: skip


def lifted(ways: dict[str, dict[str, Any]], n: int) -> str:
    lines = [
        (
            way, number(f["cosine"], 4), number(f["lowest"], 4), number(f["time"]), number(f.get("step"), 1),
            number(f["KL ratio"], 1), f"{f['reached']} of {n}",
        )
        for way, f in ways.items()
    ]  # fmt: skip
    return table(
        ("way", "cosine, median", "lowest", "time / exact", "step / exact", "KL ratio", "target reached"), lines
    )


def lifting_section() -> str:
    found = kept("lifting")
    parts = [LIFTING + "\n\n" + machine_of("lifting")]
    for dim, f in found.get("dims", {}).items():
        parts.append(f"{f['parameters']:,} parameters in {int(dim):,} numbers:\n\n" + lifted(f["ways"], 6))
    if real := found.get("real"):
        parts.append(
            f"MiniLM, {real['parameters']:,} parameters in {real['d']:,} numbers, cosine to exact lifting:\n\n"
            + lifted(real["ways"], real["components"])
        )
    parts.append(LIFTING_MEANS)
    if memory := found.get("memory"):
        parts.append(
            f"Lifting one component of a larger model adds {memory['added']:.0f} MiB at its peak; one copy of the "
            f"analysed weights has {memory['weights']:.0f} MiB."
        )
    return "\n\n".join(parts)


def stopping_section() -> str:
    parts = [STOPPING + "\n\n" + machine_of("stopping")]
    for name, rows in kept("stopping").get("problems", {}).items():
        lines = [
            (
                f"{r['tolerance']:g}", f"{r['iterations']:g}", number(r["time"]), number(r["explained"], 4),
                number(r["same"]), "–" if r["found"] is None else f"{r['found']:g}",
            )
            for r in rows
        ]  # fmt: skip
        header = ("tolerance", "iterations", "time", "explained", "components kept", "directions found")
        parts.append(f"{name}:\n\n" + table(header, lines))
    parts.append(image(figures.stopping(), "explained fraction and components kept against time"))
    return "\n\n".join(parts)


def startup_section() -> str:
    found = kept("startup")
    lines = [
        (
            f"`{name}`",
            number(f["ratio"], 1),
            number(f["of torch"]),
            f"{1000 * f['seconds']:.0f}",
            "yes" if f["torch"] else "no",
        )
        for name, f in found.get("commands", {}).items()
    ]
    header = ("a fresh process", "× `python -c pass`", "× `import torch`", "ms", "loads torch")
    wheel = found.get("wheel")
    size = f"\n\nThe wheel has {wheel['KiB']:.0f} KiB in {wheel['files']} files." if wheel else ""
    return (
        "## Start-up and size\n\n`python -m tests.benchmarks.startup`, medians of five.\n\n"
        + machine_of("startup") + "\n\n" + table(header, lines) + size
    )  # fmt: skip


SECTIONS = {
    "rows": rows_section,
    "fidelity-exact": fidelity_section,
    "solver": solver_section,
    "stability-SmolLM2": stability_section,
    "scaling": scaling_section,
    "large-fit": large_fit_section,
    "lifting": lifting_section,
    "low-rank": low_rank_section,
    "stopping": stopping_section,
    "startup": startup_section,
}


def main() -> None:
    parts = [INTRODUCTION] + [section() for name, section in SECTIONS.items() if kept(name)]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    before, _, after = README.read_text(encoding="utf-8").split(SPEED_MARK)
    README.write_text(f"{before}{SPEED_MARK}\n{speed_table()}\n{SPEED_MARK}{after}", encoding="utf-8")
    print(f"{PAGE}: {len(parts) - 1} of {len(SECTIONS)} sections")


if __name__ == "__main__":
    main()
