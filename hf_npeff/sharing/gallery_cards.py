"""The card of a repository with adapters of several components, each in its own folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.cards import CITATION, HERE, fill, metadata, model_link
from hf_npeff.sharing.direction_cards import EMBEDDING_CLASS, loading_into_embeddings
from hf_npeff.sharing.markdown import TITLE, escaped, literal, number, percent, plain, table

_SHOWN = 3
"""Top examples of a component in the table. Chosen: a line each."""
_COLUMNS = (
    "Folder", "Component", "Top examples", "Stability", "Step", "KL on them", "Answers changed", "KL on others",
    "Worst", "Random", "Kept",
)  # fmt: skip


def gallery_card(
    gallery: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of several components' adapters.

    Args:
        gallery: what adapters.json holds: `base_model`, `revision`, `auto_class`, and `components`, each with its
            number, folder, name, examples, scale, kl_top, kl_others and retained_energy, and, of those that are written
            now, stability, top_flips, kl_worst, kl_random and target_missed.
        repo_id: where it will be found; None for a folder, whose code runs in that folder.
        datasets: ids of the data sets that the examples are from.
        license: an identifier of the Hub.

    Raises:
        CorruptStoreError: if `gallery` is not what is written.
        ValueError: if the license or a data set's id is malformed.
    """
    try:
        rows = [_row(component) for component in gallery["components"]]
        model, revision = gallery["base_model"], gallery["revision"]
        first, auto_class = str(gallery["components"][0]["folder"]), str(gallery["auto_class"])
        if not auto_class.isidentifier():
            raise ValueError(f"auto_class is {auto_class!r}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptStoreError(f"adapters.json is not what hf_npeff writes: {error!r}") from error
    pinned = "" if revision is None else f", revision={literal(revision)}"
    place = f"{literal(HERE if repo_id is None else repo_id)}, subfolder={literal(first)}"
    code = [
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f"model = {auto_class}.from_pretrained({literal(model)}{pinned})",
        f"model = PeftModel.from_pretrained(model, {place})",
    ]
    if auto_class == EMBEDDING_CLASS:
        # transformers passes on to PEFT what is in adapter_kwargs.
        within = f"{literal(HERE if repo_id is None else repo_id)}, adapter_kwargs={{'subfolder': {literal(first)}}}"
        code = loading_into_embeddings(model, pinned, within)
    return fill(
        "adapters",
        front_matter=metadata("npeff-adapter", model, datasets, license, "peft"),
        title=escaped(f"NPEFF components of {plain(str(model), TITLE)} as adapters"),
        n=len(rows),
        model=model_link(model, revision),
        table=table([_COLUMNS, ["---"] * len(_COLUMNS), *rows]),
        load_code="\n".join(code),
        citation=CITATION,
    )


def _row(component: Mapping[str, Any]) -> list[str]:
    step, top, others = (_number(component[name]) for name in ("scale", "kl_top", "kl_others"))
    stability, worst, random = (_number(component.get(name)) for name in ("stability", "kl_worst", "kl_random"))
    flips, wanted = component.get("top_flips"), component.get("target_missed")
    label = str(int(component["component"]))
    name = component["name"]
    examples = "; ".join(plain(str(line), TITLE) for line in component["examples"][:_SHOWN])
    return [
        escaped(component["folder"]),
        escaped(label if name is None else f"{label} ({plain(str(name), TITLE)})"),
        escaped(examples),
        stability,
        step,
        top if wanted is None else f"{top} (wanted: {_number(wanted)})",
        "–" if flips is None else f"{float(flips):.0%}",
        others,
        worst,
        random,
        percent(component["retained_energy"]),
    ]


def _number(value: Any) -> str:
    return "–" if value is None else number(float(value))
