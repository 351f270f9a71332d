"""Parameters that are one in memory, but not to autograd: each has a gradient of its own, and a change moves all."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from torch import nn

from hf_npeff.errors import UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.linear_layers import is_at_hand


def check_memory(model: nn.Module, analysed: Collection[str]) -> None:
    """Check that no analysed parameter lies in the memory of another one, as after `b.weight.data = a.weight.data`.

    A parameter that is tied, so that both modules have the same object, is one parameter.

    Args:
        model: the model.
        analysed: names of the analysed parameters.

    Raises:
        UnsupportedModelError: if one does; the error names both.
    """
    places: dict[int, list[tuple[int, int, str, int]]] = {}
    for name, parameter in bare_parameters(model).items():
        if is_at_hand(parameter) and parameter.numel():
            start = int(parameter.storage_offset())
            last = int(
                sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            )
            if last + 1 == parameter.numel():  # parameters with gaps may interleave without sharing a number
                place = (start, start + last, name, id(parameter))
                places.setdefault(parameter.untyped_storage()._cdata, []).append(place)
    for together in places.values():
        together.sort()
        for first, second in itertools.pairwise(together):
            if second[0] <= first[1] and first[3] != second[3] and {first[2], second[2]} & set(analysed):
                raise UnsupportedModelError(
                    f"{first[2]} and {second[2]} are two parameters in the same memory, so a change of one changes the "
                    "other, but each has a gradient of its own. Tie them (give both modules the same parameter object, "
                    "as transformers' tie_weights does), or give each its own copy"
                )
