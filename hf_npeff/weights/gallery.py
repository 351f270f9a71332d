"""A folder with the adapters of several components, each in a folder that PEFT loads; adapters.json and a card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.cards import point_card_to, write_card
from hf_npeff.sharing.files import read_json, write_json
from hf_npeff.sharing.gallery_cards import gallery_card
from hf_npeff.sharing.protocols import ReportLike
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.lifted_adapters import folder_of

INDEX = "adapters.json"
_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


def save_gallery(adapters: Sequence[Adapter], folder: Path, reports: Sequence[ReportLike] = ()) -> None:
    """Write every adapter into its component's folder, and, last, adapters.json and README.md.

    Args:
        adapters: the components' adapters, already scaled.
        folder: the folder; it is created if it is missing.
        reports: the measurement of each component, or nothing.

    Raises:
        ValueError: if there are no adapters, or one does not belong to a component.
    """
    rows = []
    for number, adapter in enumerate(adapters):
        about = adapter.about
        if about is None or about.component is None:
            raise ValueError("a gallery needs adapters of components, as lift_adapters makes them")
        place = folder_of(folder, about.component)
        adapter.save_pretrained(place)
        measured: dict[str, Any] = reports[number].summary() if reports else {}
        rows.append(
            {
                "component": about.component,
                "folder": place.name,
                "name": about.name,
                "examples": list(about.top_examples),
                "scale": about.scale,
                "kl_top": measured.get("kl_top"),
                "target_missed": measured.get("target") if measured.get("reached") is False else None,
                "kl_others": measured.get("kl_others"),
                "kl_worst": measured.get("kl_worst"),
                "kl_random": measured.get("kl_random"),
                "top_flips": measured.get("top_flips"),
                "stability": about.stability,
                "retained_energy": adapter.retained_energy,
            }
        )
    if not rows:
        raise ValueError("there are no adapters")
    first = adapters[0]
    gallery = {
        "format_version": 1,
        "base_model": first.config.get("base_model_name_or_path"),
        "revision": first.config.get("revision"),
        "auto_class": first.architecture,
        "components": rows,
    }
    write_json(folder / INDEX, gallery)
    write_card(folder, gallery_card(gallery))


def copy_gallery(
    folder: Path, to: Path, repo_id: str, components: Sequence[int] | None = None, **card: Any
) -> list[int]:
    """Copy the published part of a gallery: folders of components, and a card whose code loads from the repository.

    Args:
        folder: a folder that `save_gallery` wrote.
        to: an empty folder.
        repo_id: the repository to which it will be pushed.
        components: the numbers of the components to copy; None copies all.
        **card: `license` and `datasets` of the card.

    Returns:
        The numbers of the components.

    Raises:
        CorruptStoreError: if a file is missing or foreign.
        ValueError: if a component is not in the gallery.
    """
    gallery = read_json(folder / INDEX)
    rows: Any = gallery.get("components")
    known: dict[int, dict[str, Any]] = {}
    for row in rows if isinstance(rows, list) else ():
        number: Any = row.get("component") if isinstance(row, dict) else None
        is_number = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        if not is_number or row.get("folder") != folder_of(folder, number).name:
            raise CorruptStoreError(f"{folder / INDEX} names a component in an unknown way: {str(row)[:100]}")
        known[number] = row
    wanted = list(known) if components is None else list(components)
    if missing := [j for j in wanted if j not in known]:
        raise ValueError(f"{folder} has no adapters of the components {missing}; it has {sorted(known)}")
    for j in wanted:
        place = folder_of(to, j)
        place.mkdir()
        for name in _FILES:
            source = folder_of(folder, j) / name
            if not source.is_file():
                raise CorruptStoreError(f"{source} is missing")
            shutil.copy(source, place)
        point_card_to(place, repo_id, subfolder=place.name)
    chosen = {**gallery, "components": [known[j] for j in wanted]}
    write_json(to / INDEX, chosen)
    write_card(to, gallery_card(chosen, repo_id=repo_id, **card))
    return wanted
