"""The sections of docs/benchmarks.md on rows: ways to make them, and output factors."""

from __future__ import annotations

from typing import Any

from tests.benchmarks import figures
from tests.benchmarks.measure import kept
from tests.benchmarks.tables import image, machine_of, number, table, verdict

SPEED = {
    "kronecker 16": 'hf_npeff, `sketch="kronecker"`',
    "auto": 'hf_npeff, `sketch="auto"` (default)',
    "torch.func, no sketch": "torch.func, whole gradients",
    "bergson": "bergson",
    "dattri": "dattri",
    "dattri-llm": "dattri-llm",
}
"""The ways to make rows that the README shows, and their names there."""
FACTORS = ("spectral", "projection", "sampling")
ROWS = """## Rows: time, memory and fidelity together

`python -m tests.benchmarks.rows` measures hf_npeff and `torch.func`; `make bench-peers` measures bergson, dattri and
dattri-llm, in an environment of its own.

Every way computes c rows for each example, on all linear maps except the output embedding. The floor is one forward
pass and c backward passes without weight gradients, in the same process. BERT-like and GPT-2-like models have 4 layers,
hidden size 256, 8 × 64 tokens and c = 8. SmolLM2-135M has 4 prompts and c = 4. The error is that of inner products of
PEFs, ‖K̂ − K‖ / ‖K‖ over pairs of different examples, compared with unsketched rows. Examples a second are those of one
process. A ratio is the median of the rounds, with the smallest and the largest in brackets. Memory is what one pass
adds at its peak, in a process of its own (`torch.func`: over 2 examples). `auto` chooses the cheapest sketch with an
error of at most 0.1. bergson, dattri and dattri-llm project every module to 16 × 16 numbers, as `kronecker 16` does;
none of them reuses a forward pass for several cotangents. `torch.func` is left out for SmolLM2, because its gradients
take 1.7 GB for each example before a sketch shortens them. traker is left out, because it computes one projected
gradient of a scalar output for each example, not c rows of a Fisher."""


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
        base = record_of_ours(model, kept("peers").get("models", {}).get(model, {}))
        memory = kept("peers").get("memory", {}) | kept("rows").get("memory", {})
        adds = number(memory.get(model, {}).get("floor"), 0)
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
                way, spread(values), number(values["rate"], 1), number(values.get("error"), 3),
                number(values.get("MiB"), 0), note,
            ))  # fmt: skip
        header = ("rows", "time / floor", "examples a second", "error", "MiB", "")
        parts.append(head + "\n\n" + table(header, lines))
    parts.append(image(figures.rows(models), "error of inner products against time, for every way to make rows"))
    parts.append(rows_verdicts(models))
    return "\n\n".join(parts)


def spread(values: dict[str, Any]) -> str:
    """The median ratio, and the least and the largest of the rounds."""
    low, high = values.get("range", (None, None))
    return number(values["ratio"]) + (f" ({number(low)}–{number(high)})" if low is not None else "")


def speed_table() -> str:
    """The README's table: time over the floor, and error, of a few ways on every model."""
    models = all_rows()
    lines = []
    for way, name in SPEED.items():
        cells = []
        for ways in models.values():
            figures_of_way = ways.get(way, {})
            # Rows that nothing shortened are what errors are measured against.
            error = 0.0 if way == "torch.func, no sketch" else figures_of_way.get("error")
            ratio = figures_of_way.get("ratio")
            cells.append("–" if ratio is None else f"{number(ratio)} × / {number(error)}")
        lines.append((name, *cells))
    return table(("time over the floor / error", *models), lines)


def rows_verdicts(models: dict[str, dict[str, Any]]) -> str:
    def ratio_of(model: str, way: str) -> float:
        return models[model].get(way, {}).get("ratio", float("nan"))

    lines = []
    for model in models:
        kronecker, count = ratio_of(model, "kronecker 16"), ratio_of(model, "countsketch 4096")
        line = f"- {model}: Kronecker at most 1.15 × the floor: {kronecker:.2f}, {verdict(kronecker <= 1.15)}"
        if count == count:
            line += f"; blocked countsketch at most 2.4 ×: {count:.2f}, {verdict(count <= 2.4)}"
        lines.append(line + ".")
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
        lines = [(f, *(number(times.get(f"{f} {c}")) for c in ranks)) for f in FACTORS]
        parts.append(
            "`python -m tests.benchmarks.fidelity --time-only`: the time of a whole pass over 2 SmolLM2 prompts (MLPs "
            "of layers 10–29), over that with spectral rows and c = 4.\n\n"
            + table(("rows", *(f"c = {c}" for c in ranks)), lines)
        )
        share = times["spectral 4"] / times["projection 32"]
        parts.append(
            f"Spectral c = 4 takes {share:.2f} of the time of projection c = 32 (bar 0.2): {verdict(share <= 0.2)}."
        )
    if few := kept("fidelity").get("errors"):
        values = few["values"]
        ranks = sorted({int(label.split()[1]) for label in values})
        lines = [(f, *(number(values.get(f"{f} {c}"), 3) for c in ranks)) for f in FACTORS]
        best, other = values["spectral 4"], values["projection 32"]
        parts.append(
            f"`python -m tests.benchmarks.fidelity --errors-only`: relative Fisher error, mean of {few['prompts']} "
            f"prompts, against their leading {few['rows']} rows.\n\n"
            + table(("rows", *(f"c = {c}" for c in ranks)), lines)
            + f"\n\nSpectral c = 4 at least as faithful as projection c = 32: {best:.3f} against {other:.3f}, "
            f"{verdict(best <= other)}."
        )
    if found := kept("fidelity").get("metrics"):
        parts.append(metrics_table(found))
    for name in sorted(n for n in ("fidelity-exact", "fidelity-many") if kept(n)):
        parts.append(fidelity_table(kept(name)))
    return "\n\n".join(parts)


def metrics_table(found: dict[str, Any]) -> str:
    values = found["values"]
    ranks = sorted({int(label.split()[1]) for label in values})
    lines = [(name, *(number(values[f"{name} {c}"], 3) for c in ranks)) for name in ("hidden", "parameters")]
    return (
        f"`python -m tests.benchmarks.fidelity --metric-only`: spectral rows that are the best ones in the metric of "
        f"the last hidden state, or in that of the parameters (`spectral_metric`), Fisher error of {found['prompts']} "
        f"prompts against their leading {found['rows']} rows. Measuring the metric of the parameters takes as long as "
        f"{found['as prompts']:.0f} prompts at c = {found['c']}, once.\n\n"
        + table(("metric", *(f"c = {c}" for c in ranks)), lines)
    )


def fidelity_table(found: dict[str, Any]) -> str:
    lines = [
        (
            r["factor"], str(r["c"]), number(r["error"], 3), number(r["agreement"]), number(r["auroc"], 3),
            number(r["seconds"], 1),
        )
        for r in found["rows"]
    ]  # fmt: skip
    command = f"--prompts {found['prompts']} --truth {found['truth']} --power {found['power']:g}"
    text = (
        f"`python -m tests.benchmarks.fidelity {command}` on {found['machine']}: relative Fisher error against the\n"
        f"leading {found['truth']} of 576 rows, and agreement of the coefficients of {found['components']} components "
        f"(`power={found['power']:g}`) with those of this truth;\ntwo fits of the truth from other starts agree at "
        f"{found['agreement of two fits']:.2f}, its AUROC is {found['auroc of the truth']:.3f}.\n\n"
    )
    text += table(("rows", "c", "Fisher error", "agreement", "AUROC", "seconds"), lines)
    if len({r["factor"] for r in found["rows"] if r["seconds"]}) > 1:
        drawn = figures.fidelity(found["rows"], found["prompts"])
        text += "\n\n" + image(drawn, "error and agreement against seconds; numbers are c")
    return text + "\n\n" + fidelity_bar(found)


def fidelity_bar(found: dict[str, Any]) -> str:
    """Spectral c = 4 against projection c = 32, by both measures."""
    rows = {(row["factor"], row["c"]): row for row in found["rows"]}
    few, many = rows["spectral", 4], rows["projection", 32]
    text = (
        f"Spectral c = 4 at least as faithful as projection c = 32: by Fisher error {few['error']:.3f} against "
        f"{many['error']:.3f}, {'met' if few['error'] <= many['error'] else 'missed'};\nby agreement "
        f"{few['agreement']:.2f} against {many['agreement']:.2f}, "
    )
    if found["agreement of two fits"] < many["agreement"]:
        return text + "but two fits of the truth itself agree less, so this difference says nothing."
    if few["agreement"] >= many["agreement"]:
        return text + "met."
    enough = [
        row["c"] for row in found["rows"] if row["factor"] == "spectral" and row["agreement"] >= many["agreement"]
    ]
    return text + (
        f"missed: c = {min(enough, default=0)} is needed. Leaving rows out is biased; a random projection is not, and\n"
        "over many examples its noise averages out."
    )
