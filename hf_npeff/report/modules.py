"""How a component is spread over a model: its energy by module, as a table of layers and kinds of modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_npeff.pefs.sketches import Sketch

if TYPE_CHECKING:
    from hf_npeff.decomposition.decomposition import Decomposition

_LAYER = re.compile(r"^(?P<prefix>.*?)\.?(?P<number>\d+)\.(?P<kind>.+?)(\.weight)?$")


@dataclass(frozen=True)
class ModuleEnergies:
    """Shares of components' energy.

    Attributes:
        layers: names of the rows, in the model's order.
        kinds: names of the columns.
        shares: (components, layers, kinds); NaN where there is no such module, and for components that are not known.
        exact: the components whose shares are of directions in the parameters; others are estimated from the sketch.
    """

    layers: list[str]
    kinds: list[str]
    shares: np.ndarray
    exact: list[int]


def estimated_energies(decomposition: Decomposition) -> dict[int, dict[str, float]] | None:
    """Shares from the blocks of g where every module has its own block of the sketch; None where modules are summed.

    The sketch keeps squared lengths on average, so the share of a block estimates the module's. A balanced component is
    taken in its metric, as it is lifted.
    """
    if decomposition.info.get("sketch") is None:
        return None
    blocks = Sketch.from_dict(decomposition.info["sketch"]).blocks
    if blocks is None:
        return None
    G = decomposition.pseudo_fishers.double()
    if decomposition.scales is not None:
        G = G * decomposition.scales.double()
    squares = G.square()
    total = squares.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    shares = {name: (squares[:, block].sum(1) / total).tolist() for name, block in blocks.items()}
    return {j: {name: values[j] for name, values in shares.items()} for j in range(len(G))}


def place_of(parameter: str) -> tuple[str, str]:
    """Layer and kind of module by a parameter's name: the first number in it is the layer's."""
    match = _LAYER.match(parameter)
    if match is None:
        return "", parameter.removesuffix(".weight")
    return f"{match['prefix']}.{match['number']}", match["kind"]


def analysed_parameters(decomposition: Decomposition) -> list[str]:
    """Their names in the model's order; none where rows were made elsewhere."""
    sketch = decomposition.info.get("sketch")
    return [] if sketch is None else [*Sketch.from_dict(sketch).shapes]


def by_layer(
    energies: Mapping[int, Mapping[str, float]], r: int, exact: Sequence[int] = (), order: Sequence[str] = ()
) -> ModuleEnergies:
    """Energies by parameter → by layer and kind.

    Args:
        energies: {component: {parameter: share}}.
        r: components of the decomposition.
        exact: the components whose energies were measured in the parameters.
        order: parameters in the model's order; those that are not in it come last, in the order of `energies`.
    """
    known = dict.fromkeys(name for shares in energies.values() for name in shares)
    names = list(dict.fromkeys([*(name for name in order if name in known), *known]))
    places = {name: place_of(name) for name in names}
    layers = list(dict.fromkeys(layer for layer, _ in places.values() if layer))
    if any(not layer for layer, _ in places.values()):
        layers.append("")
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    shares = np.full((r, len(layers), len(kinds)), np.nan, dtype=np.float32)
    for j, values in energies.items():
        for name, value in values.items():
            layer, kind = places[name]
            at = (j, layers.index(layer), kinds.index(kind))
            shares[at] = value if np.isnan(shares[at]) else shares[at] + value
    return ModuleEnergies(_short(layers), kinds, shares, list(exact))


def _short(layers: Sequence[str]) -> list[str]:
    """Layer names without what they have in common."""
    prefixes = {layer.rpartition(".")[0] for layer in layers if layer}
    if len(prefixes) <= 1:
        return [layer.rpartition(".")[2] if layer else "other" for layer in layers]
    return [layer or "other" for layer in layers]
