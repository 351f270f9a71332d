"""Do maps get all tokens of an example, or only some, such as those of images?

Hooks divide the rows that a map gets among the examples of a batch in equal shares. A map that gets the tokens of one
kind, from all examples together, has as many of each example as this has tokens of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.fisher.linear_maps import LinearMap


@torch.no_grad()
def gets_some_tokens(model: nn.Module, maps: Sequence[LinearMap], run: Callable[[], Any], tokens: int) -> bool:
    """Whether a map gets rows without a dimension of examples, of which there are not equally many for every token.

    Args:
        model: the model.
        maps: the maps.
        run: a forward pass over one example.
        tokens: the number of its tokens.
    """
    counts: set[int] = set()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Tensor) and x.shape[0] != 1:
            counts.add(x.shape[:-1].numel())

    modules = dict(model.named_modules())
    names = dict.fromkeys(name for m in maps for name in m.modules)
    handles = [modules[name].register_forward_pre_hook(count, with_kwargs=True) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return any(n % tokens for n in counts)
