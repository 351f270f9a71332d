"""Model cards: the README.md of published objects, from the templates in `templates/`.

Names, texts and ids from users, data sets and models are escaped by `hf_npeff.sharing.markdown`. Objects are read, but
their classes are not imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from hf_npeff.encoding.columns import described_by
from hf_npeff.encoding.record import Encoded, shown_columns, shown_texts
from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.files import write_atomically
from hf_npeff.sharing.hub import DECOMPOSITION_TAG, LIBRARY, is_hub_id, shown_model
from hf_npeff.sharing.markdown import TITLE, escaped, front_matter, literal, number, percent, plain, table
from hf_npeff.sharing.protocols import DecompositionLike, PEFsLike

TAGS = ("npeff", "interpretability", "fisher-information")
TOP_EXAMPLES = 3
"""Examples of a component in a card. Chosen: one line each fits a screen."""
_LINES = 256
"""Components in a card's table. Chosen: the card stays readable; the files have all."""
_CARD_LIMIT = 2**20
"""The most characters of a README.md that are read: bounds memory."""
_TEMPLATES = Path(__file__).parent / "templates"
_TEXT_TASKS = ("causal-lm", "sequence-classification", "token-classification", "feature-extraction")
_CODE = re.compile(r"^```python\n.*?^```$", re.MULTILINE | re.DOTALL)
"""A block of code. No text from a user can begin one, because `escaped` removes its backticks."""
HERE = "."
"""The path in the code of a card that is in the folder itself."""
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_RATIO_NOTE = """
*KL ratio*: how much more the predictions on the component's top examples change than those on others, when the weights
are moved along the component."""
_LABEL_NOTE = """
*In common*: an automatic label of words and column values that its examples have more often than the others; the test
is corrected for everything that was tried."""
CITATION = """\
```bibtex
@article{matena2023npeff,
  title   = {{NPEFF}: Non-Negative Per-Example Fisher Factorization},
  author  = {Matena, Michael and Raffel, Colin},
  journal = {arXiv preprint arXiv:2310.04649},
  year    = {2023}
}
```"""


def fill(template: str, **values: object) -> str:
    """A template filled with values; placeholders within values are not replaced."""
    text = Template((_TEMPLATES / f"{template}.md").read_text(encoding="utf-8"))
    return text.substitute({name: str(value) for name, value in values.items()})


def write_card(folder: Path, card: str) -> None:
    """Write README.md, unless there is one that is not a card of hf_npeff."""
    path = folder / "README.md"
    if path.exists() and not _is_ours(_read_card(path)):
        return
    write_atomically(path, card.encode())


def said_on_card(folder: Path) -> dict[str, Any]:
    """`license` and `datasets` of hf_npeff's card in a folder, for the card that replaces it.

    Raises:
        CorruptStoreError: if its front matter cannot be read.
    """
    path = folder / "README.md"
    text = _read_card(path)
    if not _is_ours(text):
        return {}
    try:
        head = yaml.safe_load(text.split("---\n")[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{path} has front matter that cannot be read ({type(error).__name__})") from None
    known = {name: head[name] for name in ("license", "datasets") if name in head} if isinstance(head, dict) else {}
    datasets = known.get("datasets", [])
    named = isinstance(datasets, list) and all(isinstance(name, str) for name in datasets)
    if not isinstance(head, dict) or not isinstance(known.get("license", ""), str) or not named:
        raise CorruptStoreError(f"{path} has front matter that was not written by hf_npeff: {str(known)[:200]}")
    return known


def point_card_to(folder: Path, repo_id: str, subfolder: str | None = None) -> None:
    """Change the code of hf_npeff's card in a folder so that it loads from a repository instead of the folder.

    Args:
        folder: the folder of the card.
        repo_id: the repository.
        subfolder: the folder within the repository, for adapters that PEFT loads.
    """
    place = literal(repo_id) if subfolder is None else f"{literal(repo_id)}, subfolder={literal(subfolder)}"
    path = folder / "README.md"
    if _is_ours(_read_card(path)):
        text = path.read_text(encoding="utf-8")
        pointed = _CODE.sub(lambda block: block[0].replace(literal(HERE), place), text)
        write_atomically(path, pointed.encode())


def _read_card(path: Path) -> str:
    """The beginning of README.md; empty if it is not a file."""
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(_CARD_LIMIT)


def _is_ours(card: str) -> bool:
    return card.startswith("---\n") and f"\n- {TAGS[0]}\n" in card


def metadata(tag: str, model: object, datasets: Sequence[str], license: str | None, library: str = LIBRARY) -> str:
    """The front matter of a card, which the Hub reads.

    Raises:
        ValueError: if the license or a data set's id is malformed.
    """
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


def model_link(model: object, revision: object = None) -> str:
    """The model as a link to its commit, if it is on the Hub."""
    if not is_hub_id(model):
        return f"a local model ({escaped(shown_model(model))})"
    address = f"https://huggingface.co/{model}"
    if isinstance(revision, str) and re.fullmatch("[0-9a-f]{7,64}", revision):
        address += f"/tree/{revision}"
    return f"[{escaped(model)}]({address})"


def fact_rows(rows: Iterable[tuple[str, object]]) -> str:
    """Lines of a table with two columns; values are escaped, and rows with None left out."""
    return table((name, escaped(value)) for name, value in rows if value is not None)


# Decompositions and PEFs


def _source_facts(info: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The facts on the origin of PEFs, each on a line."""
    sketch, tested = info.get("sketch") or {}, info.get("selftest") or {}
    error = tested.get("sketch_error")
    versions = info.get("versions") or {}
    encoded = Encoded.of(info)
    return [
        ("Commit", info.get("revision")),
        ("Architecture", info.get("architecture")),
        ("Task", info.get("task")),
        ("Columns read", None if encoded is None else str(encoded)),
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
    decomposition: DecompositionLike,
    *,
    repo_id: str | None = None,
    columns: Sequence[str] | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a decomposition.

    Args:
        decomposition: the decomposition.
        repo_id: the repository; None for a folder, in which the card's code runs.
        columns: the columns that are published with it, and so may be shown; None means all.
        datasets: ids of the data sets of the examples.
        license: an identifier of the Hub; the card has none by default.

    Raises:
        ValueError: if the license or a data set's id is malformed.
    """
    info = decomposition.info
    kept = [name for name in decomposition.columns if columns is None or name in columns]
    public = {name: decomposition.columns[name] for name in kept}
    texts = shown_texts(public, info)
    kind = "texts" if texts is not None else "predictions" if "prediction" in kept else "ids"
    shown = {"texts": texts, "predictions": public.get("prediction"), "ids": decomposition.example_ids}[kind]
    model = info.get("model")
    where = HERE if repo_id is None else repo_id
    load = ["from hf_npeff import Decomposition", ""]
    load += [
        f"decomposition = Decomposition.from_pretrained({literal(where)})"
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
    name = plain(shown_model(model), TITLE) if model else "rows made elsewhere"
    lines, notes = _component_lines(decomposition, shown or (), kept)
    return fill(
        "decomposition",
        front_matter=metadata(DECOMPOSITION_TAG, model, _datasets(info, datasets), license),
        title=escaped(f"NPEFF components of {name}"),
        n_components=number(len(decomposition)),
        n_examples=number(len(decomposition.example_ids)),
        explained=percent(decomposition.explained),
        source="from rows made elsewhere" if model is None else f"under {model_link(model, info.get('revision'))}",
        components=lines,
        notes="".join(notes),
        top_kind=kind,
        load_code="\n".join(load),
        explain=_explain(model, info),
        facts=fact_rows(summary),
        included=_included(kept, [c for c in decomposition.columns if c not in kept], "`examples.parquet` holds"),
        configs=json.dumps(configs, indent=2),
        citation=CITATION,
    )


def _component_lines(
    decomposition: DecompositionLike, lines: Sequence[Any], kept: Sequence[str]
) -> tuple[str, list[str]]:
    """The table of components, with a line for each example, and notes on its columns.

    Args:
        decomposition: the decomposition.
        lines: the text of each example.
        kept: names of the columns that may be used.
    """
    ratios = {j: measured.get("ratio") for j, measured in decomposition.evaluations.items()}
    measured = any(number(ratio) != "–" for ratio in ratios.values())
    associations = _associations(decomposition, kept)
    scored = any(each["accuracy"] is not None for each in associations)
    labelled = any(each["automatic_label"] is not None for each in associations)
    head = ["component", "active on", "stability"]
    head += [name for name, wanted in (("right", scored), ("KL ratio", measured), ("in common", labelled)) if wanted]
    head += ["top examples"]
    rows: list[list[str]] = [head, ["---"] * len(head)]
    for component in list(decomposition)[:_LINES]:
        top = component.top_examples(TOP_EXAMPLES)
        shown = [escaped(lines[i]) or "–" for i, w in zip(top.indices, top.coefficients, strict=True) if w > 0]
        title = (
            str(component.index) if component.name is None else f"{component.index}: {escaped(component.name, TITLE)}"
        )
        row = [title, percent(component.active_share), number(component.stability)]
        if scored:
            accuracy = associations[component.index]["accuracy"]
            row.append("–" if accuracy is None else percent(accuracy[0]))
        if measured:
            row.append(number(ratios.get(component.index)))
        if labelled:
            row.append(escaped(associations[component.index]["automatic_label"] or "–", TITLE))
        rows.append([*row, " · ".join(shown) or "–"])
    more = len(decomposition) - _LINES
    notes = [note for note, wanted in ((_RATIO_NOTE, measured), (_LABEL_NOTE, labelled)) if wanted]
    return table(rows) + (f"\n\n{more:,} more are in the files." if more > 0 else ""), notes


def _associations(decomposition: DecompositionLike, kept: Sequence[str]) -> list[Mapping[str, Any]]:
    """What each component's examples have in common, in the columns that may be used; empty if there are none."""
    names = described_by(kept)
    if not names:
        return []
    texts = bool(shown_columns({name: decomposition.columns[name] for name in names}, decomposition.info))
    components: list[Mapping[str, Any]] = decomposition.associations(columns=names, texts=texts).to_dict()["components"]
    return components


def _explain(model: object, info: Mapping[str, Any]) -> str:
    """How to explain new inputs with these components; empty for rows that were not made by hf_npeff."""
    if model is None or info.get("sketch") is None:
        return ""
    revision = info.get("revision")
    pinned = "" if not isinstance(revision, str) else f", revision={literal(revision)}"
    code = [
        "from hf_npeff import NPEFFAnalyzer",
        "",
        f"analyzer = NPEFFAnalyzer.from_pretrained({literal(str(model))}{pinned})",
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
    pefs: PEFsLike,
    *,
    repo_id: str | None = None,
    left_out: Sequence[str] = (),
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a store of PEFs; see `decomposition_card`.

    Args:
        pefs: the PEFs, with the columns that are published.
        repo_id: the repository; None for a folder.
        left_out: names of the columns that were not published.
        datasets: ids of the data sets of the examples.
        license: an identifier of the Hub.

    Raises:
        ValueError: if the license or a data set's id is malformed.
    """
    info = pefs.info
    model = info.get("model")
    where = HERE if repo_id is None else repo_id
    name = plain(shown_model(model), TITLE) if model else "rows made elsewhere"
    code = ["from hf_npeff import NPEFF, PEFs", "", f"pefs = PEFs.from_pretrained({literal(where)})", "print(pefs)"]
    r = max(1, min(16, len(pefs) // 4))  # the default, or so few that a component has four examples
    code += [f"decomposition = NPEFF({r}).fit(pefs)"]
    return fill(
        "pefs",
        front_matter=metadata("npeff-pefs", model, _datasets(info, datasets), license),
        title=escaped(f"Per-example Fishers of {name}"),
        n_examples=number(len(pefs)),
        source="from rows made elsewhere" if model is None else f"under {model_link(model, info.get('revision'))}",
        rank=number(pefs.rank),
        dim=number(pefs.dim),
        load_code="\n".join(code),
        facts=fact_rows([("Examples", number(len(pefs))), *_source_facts(info)]),
        included=_included([c for c in pefs.columns if c != "example_id"], left_out, "The files hold the rows,"),
        configs=json.dumps({"fisher": info.get("fisher")}, indent=2),
        citation=CITATION,
    )
