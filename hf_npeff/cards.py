"""Model cards: README.md of what is published, from the templates in `templates/`.

Whatever a user, a data set or a model brought (names, texts, ids) is escaped: in Markdown it shows as the text that it
is, in YAML it goes through `yaml.safe_dump`, and in code through `json.dumps`. Objects are read, never imported.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

from hf_npeff.files import write_atomically
from hf_npeff.hub import DECOMPOSITION_TAG, LIBRARY, is_hub_id

if TYPE_CHECKING:
    from hf_npeff.components import Decomposition
    from hf_npeff.store import PEFs

TAGS = ("npeff", "interpretability", "fisher-information")
TOP_EXAMPLES = 3
_CELL, _TITLE, _LINES = 120, 80, 256
_TEMPLATES = Path(__file__).parent / "templates"
_TEXT_TASKS = ("causal-lm", "sequence-classification", "token-classification")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_RATIO_NOTE = """
*KL ratio*: how much more the predictions of its own top examples change than those of others when the weights move
along it."""
_CITATION = """\
```bibtex
@article{matena2023npeff,
  title   = {{NPEFF}: Non-Negative Per-Example Fisher Factorization},
  author  = {Matena, Michael and Raffel, Colin},
  journal = {arXiv preprint arXiv:2310.04649},
  year    = {2023}
}
```"""


# Values into Markdown


def plain(value: object, length: int = _CELL) -> str:
    """A value on one line: white space joined, invisible characters dropped, cut to `length` characters."""
    spaced = "".join(" " if c.isspace() else c for c in str(value))
    visible = "".join(c for c in spaced if unicodedata.category(c)[0] != "C")
    text = " ".join(visible.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def escaped(value: object, length: int = _CELL) -> str:
    """A value as Markdown that shows exactly its text: no markup, table cell, link, mention, formula or HTML in it."""
    text = re.sub(r"([\\`*{}\[\]|#~!$^]|(?<!\w)_|_(?!\w))", r"\\\1", plain(value, length))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"(?i)(://|@|www(?=\.))", _not_linked, text)
    text = re.sub(r"^([-+=])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def _not_linked(match: re.Match[str]) -> str:
    """Readers make links of bare addresses, some even after escaping; an empty comment inside keeps them from it."""
    return f"{match[0][0]}<!-- -->{match[0][1:]}" if match[0] != "@" else "@<!-- -->"


def _literal(value: str) -> str:
    """A string in Python code."""
    return json.dumps(value) if value.isascii() else ascii(value)


def front_matter(values: Mapping[str, Any]) -> str:
    """The metadata of a card between its lines of dashes; empty values are left out."""
    kept = {name: value for name, value in values.items() if value not in (None, "", [], ())}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def percent(share: float | None) -> str:
    """A share for people."""
    return "an unknown share" if share is None or not math.isfinite(share) else f"{share:.1%}"


def number(value: object) -> str:
    """A number to three digits, a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Lines of a table whose cells are Markdown already."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def fill(template: str, **values: object) -> str:
    """A template with its values; they are not read for placeholders themselves."""
    text = Template((_TEMPLATES / f"{template}.md").read_text(encoding="utf-8"))
    return text.substitute({name: str(value) for name, value in values.items()})


def write_card(folder: Path, card: str) -> None:
    """Write README.md, unless there is one already that is not a card of ours: that is somebody's work."""
    path = folder / "README.md"
    if path.exists() and f"library_name: {LIBRARY}" not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_atomically(path, card.encode())


def _metadata(tag: str, model: object, datasets: Sequence[str], license: str | None, library: str = LIBRARY) -> str:
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"license must be an identifier of the Hub such as 'apache-2.0', but it is {license!r}")
    if wrong := [name for name in datasets if not is_hub_id(name)]:
        raise ValueError(f"datasets must be ids of data sets on the Hub, but these are not: {wrong}")
    base = model if is_hub_id(model) else None
    return front_matter(
        {
            "library_name": library,
            "license": license,
            "base_model": base,
            "base_model_relation": None if base is None else "adapter",
            "datasets": list(datasets),
            "tags": [*TAGS, tag],
        }
    )


def _model(model: object, revision: object = None) -> str:
    """The model as a link to its commit, where it is on the Hub."""
    if not is_hub_id(model):
        return f"a local model ({escaped(Path(str(model)).name)})"
    address = f"https://huggingface.co/{model}"
    if isinstance(revision, str) and re.fullmatch("[0-9a-f]{7,64}", revision):
        address += f"/tree/{revision}"
    return f"[{escaped(model)}]({address})"


def _fact_rows(rows: Iterable[tuple[str, object]]) -> str:
    """Lines of a table of two columns; the values are escaped, and those that are None left out."""
    return table((name, escaped(value)) for name, value in rows if value is not None)


# Decompositions and PEFs


def _source_facts(info: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What is known of where PEFs come from, a line each."""
    sketch, tested = info.get("sketch") or {}, info.get("selftest") or {}
    error = tested.get("sketch_error")
    versions = info.get("versions") or {}
    return [
        ("Commit", info.get("revision")),
        ("Architecture", info.get("architecture")),
        ("Task", info.get("task")),
        ("Sketch", sketch.get("kind")),
        (
            "Error of the sketch",
            None
            if error is None
            else f"{number(float(error))} in inner products of PEFs, measured on {tested.get('examples')} examples",
        ),
        ("Share of the parameters analysed", None if not tested else percent(tested.get("coverage"))),
        ("Fingerprint", info.get("fingerprint")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]


def _datasets(info: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    known: Any = (info.get("dataset") or {}).get("name")
    return list(given) or ([known] if is_hub_id(known) else [])


def _included(kept: Sequence[str], left_out: Sequence[str], file: str) -> str:
    names = ", ".join(escaped(name) for name in kept)
    text = f"{file} the examples' ids" + (f" and these columns: {names}." if kept else ".")
    if left_out:
        text += f" Left out, because they may be private: {', '.join(escaped(name) for name in left_out)}."
    return text


def decomposition_card(
    decomposition: Decomposition,
    *,
    repo_id: str | None = None,
    columns: Sequence[str] | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a decomposition.

    Args:
        decomposition: what it is about.
        repo_id: where it will be found; None for a folder, whose code runs in that folder.
        columns: those that are published with it, and so may be shown; None: all.
        datasets: ids of the data sets that the examples are from.
        license: an identifier of the Hub; the card has none by default.

    Raises:
        ValueError: if the license or a data set's id is malformed.
    """
    info = decomposition.info
    kept = [name for name in decomposition.columns if columns is None or name in columns]
    text = decomposition.text_column
    kind = "texts" if text in kept else "predictions" if "prediction" in kept else "ids"
    shown = {"texts": text, "predictions": "prediction", "ids": None}[kind]
    model = info.get("model")
    where = "." if repo_id is None else repo_id
    load = ["from hf_npeff import Decomposition", ""]
    load += [
        f"decomposition = Decomposition.from_pretrained({_literal(where)})"
        + ("  # this folder" if repo_id is None else "")
    ]
    load += ["for component in decomposition:", "    print(component, component.top_examples(3).ids)"]
    summary = [
        ("Examples", number(len(decomposition.example_ids))),
        ("Components", number(len(decomposition))),
        ("Explained", percent(decomposition.explained)),
        *_source_facts(info),
    ]
    configs = {"fisher": info.get("fisher"), "decomposition": decomposition.config.to_dict()}
    name = plain(model if is_hub_id(model) else Path(str(model)).name, _TITLE) if model else "rows made elsewhere"
    lines, ratios = _component_lines(decomposition, shown)
    return fill(
        "decomposition",
        front_matter=_metadata(DECOMPOSITION_TAG, model, _datasets(info, datasets), license),
        title=escaped(f"NPEFF components of {name}"),
        n_components=number(len(decomposition)),
        n_examples=number(len(decomposition.example_ids)),
        explained=percent(decomposition.explained),
        source="from rows made elsewhere" if model is None else f"under {_model(model, info.get('revision'))}",
        components=lines,
        ratio_note=_RATIO_NOTE if ratios else "",
        top_kind=kind,
        load_code="\n".join(load),
        explain=_explain(model, info),
        facts=_fact_rows(summary),
        included=_included(kept, [c for c in decomposition.columns if c not in kept], "`examples.parquet` holds"),
        configs=json.dumps(configs, indent=2),
        citation=_CITATION,
    )


def _component_lines(decomposition: Decomposition, column: str | None) -> tuple[str, bool]:
    """The table of components, and whether any KL ratio was measured."""
    ratios = {j: measured.get("ratio") for j, measured in decomposition.evaluations.items()}
    measured = any(number(ratio) != "–" for ratio in ratios.values())
    head = ["component", "active on", "stability", *(["KL ratio"] if measured else []), "top examples"]
    rows: list[list[str]] = [head, ["---"] * len(head)]
    for component in list(decomposition)[:_LINES]:
        top = component.top_examples(TOP_EXAMPLES)
        values = top.ids if column is None else top.columns[column]
        shown = [escaped(v) or "–" for v, w in zip(values, top.coefficients, strict=True) if w > 0]
        title = (
            str(component.index) if component.name is None else f"{component.index}: {escaped(component.name, _TITLE)}"
        )
        ratio = [number(ratios.get(component.index))] if measured else []
        rows.append(
            [title, percent(component.active_share), number(component.stability), *ratio, " · ".join(shown) or "–"]
        )
    more = len(decomposition) - _LINES
    return table(rows) + (f"\n\n{more:,} more are in the files." if more > 0 else ""), measured


def _explain(model: object, info: Mapping[str, Any]) -> str:
    """How to explain new inputs with somebody else's components; nothing for rows made elsewhere."""
    if model is None or info.get("sketch") is None:
        return ""
    revision = info.get("revision")
    pinned = "" if not isinstance(revision, str) else f", revision={_literal(revision)}"
    code = [
        "from hf_npeff import NPEFFAnalyzer",
        "",
        f"analyzer = NPEFFAnalyzer.from_pretrained({_literal(str(model))}{pinned})",
    ]
    if info.get("task") in _TEXT_TASKS:
        code += ['pefs = analyzer.compute_pefs(["a new text", "and another"], like=decomposition)']
        code += ["coefficients = decomposition.transform(pefs)  # (examples, components)"]
    else:
        code += ["", "", "def explain(dataset):", '    """(examples, components)"""']
        code += ["    return decomposition.transform(analyzer.compute_pefs(dataset, like=decomposition))"]
    sentence = "To see which of these components carry the model's predictions on new inputs:"
    return "\n".join(["", sentence, "", "```python", *code, "```", ""])


def pefs_card(
    pefs: PEFs,
    *,
    repo_id: str | None = None,
    left_out: Sequence[str] = (),
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a store of PEFs; see `decomposition_card`.

    Args:
        pefs: what it is about, with the columns that are published.
        repo_id: where it will be found; None for a folder.
        left_out: names of the columns that were not published.
        datasets: ids of the data sets that the examples are from.
        license: an identifier of the Hub.

    Raises:
        ValueError: if the license or a data set's id is malformed.
    """
    info = pefs.info
    model = info.get("model")
    where = "." if repo_id is None else repo_id
    name = plain(model if is_hub_id(model) else Path(str(model)).name, _TITLE) if model else "rows made elsewhere"
    code = ["from hf_npeff import NPEFF, PEFs", "", f"pefs = PEFs.from_pretrained({_literal(where)})", "print(pefs)"]
    r = max(1, min(16, len(pefs) // 4))
    code += [f"decomposition = NPEFF({r}).fit(pefs)"]
    return fill(
        "pefs",
        front_matter=_metadata("npeff-pefs", model, _datasets(info, datasets), license),
        title=escaped(f"Per-example Fishers of {name}"),
        n_examples=number(len(pefs)),
        source="from rows made elsewhere" if model is None else f"under {_model(model, info.get('revision'))}",
        rank=number(pefs.rank),
        dim=number(pefs.dim),
        load_code="\n".join(code),
        facts=_fact_rows([("Examples", number(len(pefs))), *_source_facts(info)]),
        included=_included([c for c in pefs.columns if c != "example_id"], left_out, "The files hold the rows,"),
        configs=json.dumps({"fisher": info.get("fisher")}, indent=2),
        citation=_CITATION,
    )


# Directions and adapters


def adapter_card(
    *,
    base_model: str,
    component: int,
    revision: str | None = None,
    name: str | None = None,
    top_examples: Sequence[str] = (),
    kl_top: float | None = None,
    kl_others: float | None = None,
    kl_random: float | None = None,
    ratio: float | None = None,
    scale: float | None = None,
    rank: int | None = None,
    retained_energy: float | None = None,
    kind: str = "LoRA",
    lift: str | None = None,
    auto_class: str = "AutoModel",
    repo_id: str | None = None,
    code: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a component saved as a PEFT adapter.

    Args:
        base_model: the model's id or folder.
        component: its number in the decomposition.
        revision: the model's commit.
        name: what a person called the component.
        top_examples: a line each; texts only where they may be published.
        kl_top: mean KL(original ‖ perturbed) on its top examples, in nats.
        kl_others: the same on other examples.
        kl_random: the same for a random direction of the same size.
        ratio: kl_top / kl_others.
        scale: the step along the unit direction.
        rank: of the adapter's matrices.
        retained_energy: share of the direction's squared norm that the adapter keeps.
        kind: of adapter, for people.
        lift: how the direction was lifted to the weights, for people.
        auto_class: transformers' class that loads the model.
        repo_id: where the adapter will be found; None for a folder, whose code runs in that folder.
        code: instead of the usual lines that load it with PEFT.
        datasets: ids of the data sets that the examples are from.
        license: an identifier of the Hub.

    Raises:
        ValueError: if the license, a data set's id or `auto_class` is malformed.
    """
    if not auto_class.isidentifier():
        raise ValueError(f"auto_class must be the name of a class of transformers, but it is {auto_class!r}")
    pinned = "" if revision is None else f", revision={_literal(revision)}"
    usual = [
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f"model = {auto_class}.from_pretrained({_literal(base_model)}{pinned})",
        f"model = PeftModel.from_pretrained(model, {_literal('.' if repo_id is None else repo_id)})",
    ]
    facts = [
        ("Commit of the base model", revision),
        ("Lifted by", lift),
        ("Kind", kind),
        ("Rank", rank),
        ("Energy of the direction that it keeps", None if retained_energy is None else percent(retained_energy)),
        *_effects(scale, kl_top, kl_others, kl_random, ratio),
    ]
    label = str(component) if name is None else f"{component} ({plain(name, _TITLE)})"
    return fill(
        "adapter",
        front_matter=_metadata("npeff-adapter", base_model, datasets, license, library="peft"),
        title=escaped(f"NPEFF component {label} as an adapter"),
        what=f"Component {escaped(label)}",
        kind=f"a {escaped(kind)} adapter",
        model=_model(base_model, revision),
        examples=_example_lines(top_examples),
        facts=_fact_rows(facts),
        load_code=code if code is not None else "\n".join(usual),
        citation=_CITATION,
    )


def direction_card(
    *,
    base_model: str,
    component: int | None = None,
    revision: str | None = None,
    name: str | None = None,
    top_examples: Sequence[str] = (),
    kl_top: float | None = None,
    kl_others: float | None = None,
    kl_random: float | None = None,
    ratio: float | None = None,
    scale: float | None = None,
    kind: str | None = None,
    lift: str | None = None,
    repo_id: str | None = None,
    code: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a direction in weight space; the arguments are those of `adapter_card`.

    Args:
        base_model: the model's id or folder.
        component: its number in the decomposition, or None for another direction.
        revision: the model's commit.
        name: what a person called the component.
        top_examples: a line each; texts only where they may be published.
        kl_top: mean KL(original ‖ perturbed) on its top examples, in nats.
        kl_others: the same on other examples.
        kl_random: the same for a random direction of the same size.
        ratio: kl_top / kl_others.
        scale: the step that was measured.
        kind: of direction, for people.
        lift: how it was lifted to the weights, for people.
        repo_id: where it will be found; None for a folder, whose code runs in that folder.
        code: instead of the usual line that loads it.
        datasets: ids of the data sets that the examples are from.
        license: an identifier of the Hub.

    Raises:
        ValueError: if the license or a data set's id is malformed.
    """
    usual = [
        "from hf_npeff import ParameterDirection",
        "",
        f"direction = ParameterDirection.from_pretrained({_literal('.' if repo_id is None else repo_id)})",
    ]
    facts = [
        ("Commit of the base model", revision),
        ("Kind", kind),
        ("Lifted by", lift),
        *_effects(scale, kl_top, kl_others, kl_random, ratio),
    ]
    what = "direction" if component is None else f"component {component}"
    label = what if name is None else f"{what} ({plain(name, _TITLE)})"
    return fill(
        "direction",
        front_matter=_metadata("npeff-direction", base_model, datasets, license),
        title=escaped(f"NPEFF {label} in the weights"),
        what=escaped(label[0].upper() + label[1:]),
        model=_model(base_model, revision),
        examples=_example_lines(top_examples),
        facts=_fact_rows(facts),
        load_code=code if code is not None else "\n".join(usual),
        citation=_CITATION,
    )


def _effects(
    scale: float | None, kl_top: float | None, kl_others: float | None, kl_random: float | None, ratio: float | None
) -> list[tuple[str, object]]:
    values = {
        "Step": scale,
        "KL on its top examples": kl_top,
        "KL on other examples": kl_others,
        "KL of a random direction of the same size": kl_random,
        "Ratio": ratio,
    }
    return [(name, None if value is None else number(value)) for name, value in values.items()]


def _example_lines(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(line) or '–'}" for line in lines[:20]) or "None are published with it."
