"""Writes docs/benchmarks.md and its figures from the figures that the other scripts kept.

python -m tests.benchmarks.report
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import figures
from tests.benchmarks.measure import kept

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
INTRODUCTION = """# How fast, against whom

Every figure of time is a ratio of two things that took turns in one process (medians of at least five rounds of the
ratio within a round), so that what slows the machine down cancels. They were taken on two CPU cores that other work
shared, one thread each; seconds, where they stand, only give the scale. This page is written by `make bench`; each
section names the script that measures it. `make bench-quick` compares a few of the ratios with those kept here. What
was tried to make the solver faster and fits steadier, and what did not win, is in
[decisions](decisions/2026-11-23-solver-experiments.md).
"""
ROWS = """## Rows: time, memory and fidelity together

`python -m tests.benchmarks.rows`; bergson, dattri and dattri-llm by `make bench-peers`, in an environment of their own.

c rows an example on all linear maps but the output embedding. The floor is one forward pass and c backward passes that
form no weight gradient, in the same process. BERT-like and GPT-2-like: 4 layers, hidden size 256, 8 × 64 tokens, c = 8.
SmolLM2-135M: 4 prompts, c = 4. The error is that of inner products of PEFs, ‖K̂ − K‖ / ‖K‖ over pairs of different
examples, against rows that no sketch shortened: a fast row and a faithful row stand side by side. Examples a second are
at the speed of one process. Memory is what one pass adds, in a process of its own. `auto` takes the cheapest sketch
with an error of at most 0.1."""
SOLVER = """## Solver

`python -m tests.benchmarks.solver`: block_power against the paper's algorithm at the best of five learning rates, 400
iterations at most, medians over five seeds, one start each, processor time with the start included; of two figures the
first is ours. Planted: 2,000 examples, c = 4, d = 512. Real: 256 PEFs each, 16 components, in Gram space."""
SOLVER_LIMIT = """A start spends its first five iterations on twice as many components. Where the reference stops early
at a worse optimum (the planted problems without much overlap), that costs part of the lead on the way to *its* loss; it
does not come to ours."""
STABILITY = """## Stability: do two independent fits find the same components?

`python -m tests.benchmarks.stability`: the share of components that have a partner of their own at |cosine| ≥ 0.9 in
another fit, mean over pairs of fits; a fit is the best of R starts. F^0.5 is `power=0.5`. SmolLM2's word relations
(MLPs of layers 10–29), and a MiniLM fine-tuned on Home Assistant's intents (all linear maps). Direct starts are
k-means++ over examples; the default takes twice as many and gives up the least needed."""
SCALING = """## Scaling

`python -m tests.benchmarks.scaling`: each size doubled four times, the others at their base; exponents are slopes on
log axes over all five points. Constant parts (the self-test, Python's own work) keep them below their limits, which are
1 for time in n, c and d."""
LIFTING = """## Lifting

`python -m tests.benchmarks.lifting`: a trained BERT classifier of 2 layers; cosine to the same component of an
unsketched decomposition; time over exact lifting; KL on the top examples over KL on others where the step has moved the
former by 0.1 nats."""
STOPPING = """## Early stopping

`python -m tests.benchmarks.stopping`: the same starts, stopped when an iteration improves the loss by less than the
tolerance, against a tolerance of 1e-7. The default is 1e-5. Medians over five starts."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def image(path: str, text: str) -> str:
    return f"![{text}]({path})"


def machine_of(*names: str) -> str:
    found = dict.fromkeys(record["machine"] for name in names if (record := kept(name)))
    return "\n".join(f"*{line}*" for line in found)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:,.{digits}f}"


def all_rows() -> dict[str, dict[str, Any]]:
    """{model: {way: figures}} of ours, of torch.func and of the peers."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("rows", "peers"):
        record = kept(name)
        for model, measured in record.get("models", {}).items():
            memory = record.get("memory", {}).get(model, {})
            for way, values in measured["ways"].items():
                values = values | {"MiB": memory.get(way)}
                if "ratio" in values:  # at the speed of the process that measured our rows
                    values["rate"] *= measured["floor"] / record_of_ours(model, measured)["floor"]
                found.setdefault(model, {}).setdefault(way, values)
    return found


def record_of_ours(model: str, otherwise: dict[str, Any]) -> dict[str, Any]:
    return kept("rows").get("models", {}).get(model, otherwise)


def rows_section() -> str:
    models = all_rows()
    parts = [
        ROWS,
        machine_of("rows", "peers"),
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in kept("peers").get("versions", {}).items())
        + ".",
    ]
    for model, ways in models.items():
        base = kept("rows").get("models", {}).get(model, {})
        adds = number(kept("rows").get("memory", {}).get(model, {}).get("floor"), 0)
        head = f"### {model}\n\n`auto` took {base.get('auto takes', '–')}; the floor adds {adds} MiB."
        lines = []
        for way, values in ways.items():
            if "failed" in values:
                lines.append((way, "–", "–", "–", "–", f"fails: `{values['failed'][:110]}`"))
                continue
            covers = values.get("covers", 1.0)
            note = "" if covers > 0.9999 else f"covers {covers:.1%} of the parameters"
            if "dense" in way:
                note = "time of 64 of its numbers and 2 examples, scaled up"
            lines.append((
                way, number(values["ratio"]), number(values["rate"], 1), number(values.get("error"), 3),
                number(values.get("MiB"), 0), note,
            ))  # fmt: skip
        header = ("rows", "time / floor", "examples a second", "error", "MiB", "")
        parts.append(head + "\n\n" + table(header, lines))
    parts.append(image(figures.rows(models), "error of inner products against time, for every way to make rows"))
    parts.append(rows_verdicts(models))
    return "\n\n".join(parts)


def rows_verdicts(models: dict[str, dict[str, Any]]) -> str:
    def ratio_of(model: str, way: str) -> float:
        return models[model].get(way, {}).get("ratio", float("nan"))

    lines = []
    for model in models:
        kronecker, count = ratio_of(model, "kronecker 16"), ratio_of(model, "countsketch 4096")
        lines.append(
            f"- {model}: Kronecker at most 1.15 × the floor: {kronecker:.2f}, {verdict(kronecker <= 1.15)}; blocked "
            f"countsketch at most 2.4 ×: {count:.2f}, {verdict(count <= 2.4)}."
        )
        ways = kept("peers").get("models", {}).get(model, {}).get("ways", {})
        auto = ways.get("auto", {})
        for peer in ("bergson", "dattri", "dattri-llm"):
            other = ways.get(peer, {})
            if "ratio" in other and "ratio" in auto:
                faster, nearer = auto["ratio"] < other["ratio"], auto["error"] < other["error"]
                lines.append(
                    f"  `auto` against {peer}: {other['ratio'] / auto['ratio']:.1f} × as fast "
                    f"({verdict(faster)}), error {auto['error']:.3f} against {other['error']:.3f} ({verdict(nearer)})."
                )
    return "Bars:\n\n" + "\n".join(lines)


def fidelity_section() -> str:
    parts = ["## Output factors: fidelity per cost\n"]
    times = kept("fidelity").get("times", {})
    if times:
        ranks = sorted({int(label.split()[1]) for label in times})
        lines = [(f, *(number(times.get(f"{f} {c}")) for c in ranks)) for f in ("spectral", "projection")]
        parts.append(
            "`python -m tests.benchmarks.fidelity --time-only`: a whole pass over 4 SmolLM2 prompts, over that "
            "of spectral rows with c = 4.\n\n" + table(("rows", *(f"c = {c}" for c in ranks)), lines)
        )
        share = times["spectral 4"] / times["projection 32"]
        parts.append(
            f"Spectral c = 4 takes {share:.2f} of the time of projection c = 32 (bar 0.2): {verdict(share <= 0.2)}."
        )
    if few := kept("fidelity").get("errors"):
        values = few["values"]
        ranks = sorted({int(label.split()[1]) for label in values})
        factors = ("spectral", "projection", "sampling")
        lines = [(f, *(number(values.get(f"{f} {c}"), 3) for c in ranks)) for f in factors]
        best, other = values["spectral 4"], values["projection 32"]
        parts.append(
            f"`python -m tests.benchmarks.fidelity --errors-only`: relative Fisher error, mean of {few['prompts']} "
            f"prompts, against their leading {few['rows']} rows.\n\n"
            + table(("rows", *(f"c = {c}" for c in ranks)), lines)
            + f"\n\nSpectral c = 4 at least as faithful as projection c = 32: {best:.3f} against {other:.3f}, "
            f"{verdict(best <= other)}."
        )
    for name in sorted(n for n in ("fidelity-exact", "fidelity-many") if kept(n)):
        parts.append(fidelity_table(kept(name)))
    return "\n\n".join(parts)


def fidelity_table(found: dict[str, Any]) -> str:
    lines = [
        (
            r["factor"],
            str(r["c"]),
            number(r["error"], 3),
            number(r["agreement"]),
            number(r["auroc"], 3),
            number(r["seconds"], 1),
        )
        for r in found["rows"]
    ]
    command = f"--prompts {found['prompts']} --truth {found['truth']} --power {found['power']:g}"
    text = (
        f"`python -m tests.benchmarks.fidelity {command}` on {found['machine']}: relative Fisher error against the\n"
        f"leading {found['truth']} of 576 rows, and agreement of the coefficients of {found['components']} components "
        f"(F^{found['power']:g}) with those of that truth;\ntwo fits of the truth from other starts agree at "
        f"{found['agreement of two fits']:.2f}, its AUROC is {found['auroc of the truth']:.3f}.\n\n"
    )
    text += table(("rows", "c", "Fisher error", "agreement", "AUROC", "seconds"), lines)
    if len({r["factor"] for r in found["rows"] if r["seconds"]}) > 1:
        text += "\n\n" + image(figures.fidelity(found["rows"]), "error and agreement against seconds; numbers are c")
    return text


def solver_section() -> str:
    problems = kept("solver").get("problems", {})
    lines = []
    for name, f in problems.items():
        n = f["seeds"]
        best = f.get("best", (float("nan"),) * 2)
        lines.append((
            name, f"1/{1 / f['share']:.1f}", f"1/{1 / f['slowest']:.1f}" if f["slowest"] else "never",
            f"{f['iterations'][0]:g} and {f['iterations'][1]:g}", f"{f['loss']:.5f} and {f['reference']:.5f}",
            f"{best[0]:.5f} and {best[1]:.5f}", f"{f['worse']} of {n}", f"{f['reached']} of {n}",
            "–" if f["found"] is None else f"{f['found'][0]:g} and {f['found'][1]:g} of {f['r']}",
            f"{f['MiB'][0]:.0f} and {f['MiB'][1]:.0f}",
        ))  # fmt: skip
    header = (
        "problem", "time to the reference's loss", "slowest seed", "iterations", "loss, median", "loss, best of 5",
        "ours worse", "it reaches ours", "directions found", "MiB",
    )  # fmt: skip
    fast = sum(f["share"] <= 0.2 for f in problems.values())
    good = sum(f["worse"] == 0 for f in problems.values())
    ends = sum(f["best"][0] <= f["best"][1] * 1.0001 for f in problems.values() if "best" in f)
    verdicts = (
        f"Bars: at least 5 × faster on {fast} of {len(problems)} problems; no single start ends worse on {good}, and "
        f"the best of five starts, which is what a fit keeps, ends no worse on {ends}.\n\n{SOLVER_LIMIT}"
    )
    return "\n\n".join([SOLVER, machine_of("solver"), table(header, lines), verdicts])


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


def scaling_section() -> str:
    found = kept("scaling")
    lines = [
        (
            {"rows": "computing PEFs", "fit": "fit"}[stage], letter, f"{p['sizes'][0]} … {p['sizes'][-1]}",
            number(p["exponents"][0]), number(p["exponents"][1]), " ".join(f"{s:.3g}" for s in p["seconds"]),
            " ".join(f"{m:.0f}" for m in p["MiB"]),
        )
        for stage in ("rows", "fit") for letter, p in found.get(stage, {}).items()
    ]  # fmt: skip
    header = ("stage", "", "sizes", "exponent of time", "of memory", "seconds", "MiB")
    return (
        SCALING + "\n\n" + machine_of("scaling") + "\n\n" + table(header, lines) + "\n\n"
        + image(figures.scaling(), "time and memory against n, c, d and r on log axes")
    )  # fmt: skip


def lifting_section() -> str:
    found = kept("lifting")
    parts = [LIFTING + "\n\n" + machine_of("lifting")]
    for dim, figures_of in found.get("dims", {}).items():
        lines = [
            (
                way, number(f["cosine"], 4), number(f["lowest"], 4), number(f["time"]), number(f["KL ratio"], 1),
                str(f["reached"]),
            )
            for way, f in figures_of["ways"].items()
        ]  # fmt: skip
        header = ("way", "cosine, median", "lowest", "time / exact", "KL ratio", "target reached, of 6")
        parts.append(f"{figures_of['parameters']:,} parameters in {int(dim):,} numbers:\n\n" + table(header, lines))
    if memory := found.get("memory"):
        parts.append(
            f"Lifting one component of a larger model adds {memory['added']:.0f} MiB at its peak, where one copy of "
            f"the weights under analysis is {memory['weights']:.0f} MiB."
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
    "lifting": lifting_section,
    "stopping": stopping_section,
    "startup": startup_section,
}


def main() -> None:
    parts = [INTRODUCTION] + [section() for name, section in SECTIONS.items() if kept(name)]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    print(f"{PAGE}: {len(parts) - 1} of {len(SECTIONS)} sections")


if __name__ == "__main__":
    main()
