"""The certificate of a measured step on the page: effects on a component's examples, on others, and at worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_npeff.encoding.columns import label_names_of
from hf_npeff.sharing.protocols import DecompositionLike, HasDict

_GROUPS = 8
"""The most groups of a dose curve. Chosen: colour-blind readers can distinguish so many colours."""


def as_facts(report: HasDict | Mapping[str, Any], decomposition: DecompositionLike, texts: bool) -> dict[str, Any]:
    """The facts of a PerturbationReport that the page shows.

    Args:
        report: the report, or the result of its `to_dict`.
        decomposition: the decomposition of the measured component.
        texts: whether texts that the page does not already have are included.

    Raises:
        ValueError: if the report has examples that the decomposition does not have.
    """
    content = dict(report if isinstance(report, Mapping) else report.to_dict())
    check_same_examples("the report", content.get("changed") or (), decomposition)
    changed = [{k: v for k, v in row.items() if k != "text"} for row in content.get("changed") or ()]
    kept = {k: content.get(k) for k in ("target", "best", "opposite", "random", "reached")}
    others = list(content.get("other_examples") or ())
    facts = {
        **kept,
        "n_top": len(content.get("top_examples") or ()),
        "n_others": len(others),
        "changed": changed,
        "tried": list(content.get("tried") or ()),
    }
    if (searched := content.get("off_target")) is not None:
        facts["searched"] = _searched(searched, others, texts)
    if (held_out := content.get("held_out")) is not None:
        facts["held_out"] = measured_facts(held_out, decomposition, texts)
    return facts


def _searched(search: Mapping[str, Any], others: Sequence[int], texts: bool) -> dict[str, Any]:
    """The most moved inputs of the pool, which are the report's other examples, and the inputs of the search."""
    worst = [_case(row, texts) | {"example": _at(others, row["index"])} for row in search["worst"]]
    ends = [
        _case(row, texts) | {"replaced": row["replaced"], "own": row["own"], "start": _at(others, row["index"])}
        for row in search["searched"]
    ]
    return {"tried": search["tried"], "worst": worst, "ends": ends}


def _at(others: Sequence[int], place: int) -> int | None:
    return others[place] if 0 <= place < len(others) else None


def _case(row: Mapping[str, Any], texts: bool) -> dict[str, Any]:
    """An input, its KL, and the answers before and after."""
    text = row.get("text") if texts else None
    return {"kl": row["kl"], "before": row["before"], "after": row["after"], "text": text, "id": row.get("id")}


def measured_facts(
    measurement: HasDict | Mapping[str, Any], decomposition: DecompositionLike, texts: bool
) -> dict[str, Any]:
    """The facts of a Measurement that the page shows: its groups by step size, and the most moved examples.

    Args:
        measurement: the measurement, or the result of its `to_dict`.
        decomposition: the decomposition of the measured component, for the names of classes.
        texts: whether texts of its examples are included.
    """
    content = dict(measurement if isinstance(measurement, Mapping) else measurement.to_dict())
    first = content["steps"][0]["rank"]
    own = [s for s in content["steps"] if s["rank"] == first and s.get("quantised") is None]
    steps = sorted(own, key=lambda s: (s["random"], s["scale"]))
    names = list(steps[0]["groups"])[:_GROUPS]
    label, classes = label_names_of(decomposition.columns, decomposition.info)
    called = {f"{label}={number}": f"{label}={name}" for number, name in classes.items()}
    if not texts:  # a group is named by a value of a column, which may be a text
        names = names[:1]
    shown = ("n", "kl", "kl_interval", "flips", "accuracy", "error")
    longest = max((s for s in steps if not s["random"]), key=lambda s: abs(s["scale"]))
    return {
        "n": content["n"],
        "steps": [
            {
                "scale": s["scale"],
                "random": s["random"],
                "groups": {
                    called.get(name, name): {key: s["groups"][name].get(key) for key in shown} for name in names
                },
            }
            for s in steps
        ],
        "worst_scale": longest["scale"],
        "worst": [_case(row, texts) for row in longest["groups"][names[0]]["worst"]],
    }


def check_same_examples(what: str, rows: Sequence[Mapping[str, Any]], decomposition: DecompositionLike) -> None:
    """Check that every row's index and id belong to the same example of the decomposition.

    Raises:
        ValueError: if there is such a row.
    """
    ids = decomposition.example_ids
    for row in rows:
        if not 0 <= row["index"] < len(ids) or ids[row["index"]] != row["id"]:
            raise ValueError(
                f"{what} has {row['id']!r} as its example {row['index']}, but the decomposition does not: they do not "
                "belong together"
            )
