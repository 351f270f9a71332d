"""The section "what this adapter changes" of a model card, from a change report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.files import write_atomically
from hf_npeff.sharing.hub import is_hub_id
from hf_npeff.sharing.markdown import TITLE, escaped, front_matter, number, percent, table

TITLE_OF_SECTION = "## What this adapter changes"
_BEGIN, _END = "<!-- what this adapter changes, by hf_npeff -->", "<!-- end of what this adapter changes -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END) + "\n?", re.DOTALL)
_COMPONENTS, _ANSWERS, _COMMON, _MODULES = 8, 10, 5, 5
"""Rows of the section's tables. Chosen: a card stays readable; change.json has all."""
_CITATION = re.compile(r"^## (Citation|BibTeX)", re.MULTILINE)


def change_section(report: Mapping[str, Any], *, texts: bool = False) -> str:
    """The section as Markdown; whatever data or people brought is escaped.

    Args:
        report: a change report, as its `to_dict` gives it.
        texts: whether texts of examples, words from them and the model's answers are shown.

    Raises:
        CorruptStoreError: if it is not a change report.
    """
    try:
        return _section(report, texts)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CorruptStoreError(f"this is not a change report: {error!r}") from error


def _section(report: Mapping[str, Any], texts: bool) -> str:
    kl = [float(x) for x in report["kl"]]
    n, (low, high) = len(kl), report["kl_interval"]
    lines = [
        TITLE_OF_SECTION,
        "",
        f"Measured on {n:,} examples, against the base model: a mean KL of {number(sum(kl) / n)} nats "
        f"(95% interval {number(low)} to {number(high)}), and {len(report['changed']):,} changed answers.",
        "",
        "The components of the base model through which it acts, found by [NPEFF](https://arxiv.org/abs/2310.04649), "
        "the most changed first:",
        "",
    ]
    head = ["component", *(["in common (automatic)"] if texts else []), "KL", "over random", "p", "|cosine|", "became"]
    rows: list[list[str]] = [[escaped(name) for name in head], ["---"] * len(head)]
    for each in report["components"][:_COMPONENTS]:
        common = [escaped(each["automatic_label"] or "–", TITLE)] if texts else []
        numbers = [number(each[name]) for name in ("kl", "kl_over_random", "p", "cosine")]
        rows.append([escaped(each["label"], TITLE), *common, *numbers, escaped(each["growth"] or "–")])
    lines += [table(rows), "", *_curve(report)]
    if texts:
        lines += _of_texts(report)
    shares = list(report["modules"].items())[:_MODULES]
    where = ", ".join(f"{escaped(name)} {percent(share)}" for name, share in shares)
    lines += [f"Where, by share of the squared norm: {where}.", ""]
    lines += [
        "*KL* of a component is the mean over the examples, weighted by their coefficients. *Over random* is its share "
        "of the KL, divided by its share under random changes of the weights, and *p* is the share of random changes "
        "under which it is as large. *Became* compares the components' coefficients before and after the change.",
        "",
    ]
    return "\n".join([_BEGIN, *lines, _END, ""])


def _curve(report: Mapping[str, Any]) -> list[str]:
    """The table of steps from the base model to the adapter, with accuracies if there are labels."""
    groups = list(dict.fromkeys(name for step in report["curve"] for name in step["accuracy"]))
    if not groups:
        return []
    rows = [["part of the change", "KL", *(f"right: {escaped(group)}" for group in groups)]]
    rows.append(["---"] * len(rows[0]))
    for step in report["curve"]:
        scores = [percent(step["accuracy"].get(group)) for group in groups]
        rows.append([percent(step["scale"]), number(step["kl"]), *scores])
    return [table(rows), ""]


def _of_texts(report: Mapping[str, Any]) -> list[str]:
    """What the most changed examples have in common, and answers that changed."""
    lines: list[str] = []
    for group in report.get("groups", ()):
        if common := [escaped(a["feature"], TITLE) for a in group["associations"][:_COMMON]]:
            lines += [f"- Examples {escaped(group['name'])} have more often than the others: {', '.join(common)}."]
    lines += [""] if lines else []
    changed = report["changed"][:_ANSWERS]
    if changed:
        rows = [["example", "before", "after"], ["---"] * 3]
        rows += [
            [escaped(row.get("text") or row["id"]), escaped(row["before"]), escaped(row["after"])] for row in changed
        ]
        lines += [table(rows), ""]
    return lines


def add_change_section(folder: Path, section: str, base_model: object) -> None:
    """Put the section into README.md, before the citation or at the end; an existing section is replaced.

    Args:
        folder: the folder of the card; a short card is written if there is none.
        section: the result of `change_section`.
        base_model: the base model, for a new card.
    """
    path = folder / "README.md"
    if path.is_file():
        card = _SECTION.sub("", path.read_text(encoding="utf-8"))
    else:
        known = base_model if is_hub_id(base_model) else None
        header = front_matter({"library_name": "peft", "base_model": known, "tags": ["npeff"]})
        card = f"{header}\n# An adapter{'' if known is None else f' of {escaped(known)}'}\n"
    citation = _CITATION.search(card)
    at = len(card) if citation is None else citation.start()
    before = card[:at].rstrip("\n")
    write_atomically(path, f"{before}\n\n{section}\n{card[at:]}".encode())
