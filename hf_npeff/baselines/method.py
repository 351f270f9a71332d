"""A method as a row of a table: coefficients for every example, and how to switch one of its features off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.errors import CorruptStoreError
from hf_npeff.sharing.files import FORMAT_VERSION, json_bytes, read_json, read_tensors, write_atomically


class Intervention(Protocol):
    """Something done to a model by degrees; `ParameterDirection` is one, the ablation of a feature another."""

    def applied_to(self, model: nn.Module, scale: float = 1.0) -> AbstractContextManager[nn.Module]:
        """The model under the intervention inside `with`; it comes back as it was."""


Interventions = Callable[[Sequence[int]], Sequence[Intervention]]
"""From numbers of features to what switches them; called only where it is needed, since lifting costs passes."""


@dataclass(frozen=True)
class MethodResult:
    """What one method found.

    Attributes:
        name: the name of the row.
        coefficients: (n, r), how much of each feature is in each example; a larger one is more.
        seconds: processor time that finding it took, of all threads, PEFs or activations included.
        interventions: from numbers of features to interventions, or None where the method has none.
        facts: settings and diagnostics, as JSON types.

    Raises:
        ValueError: if the coefficients are not finite numbers (n, r).

    Example:
        >>> npeff = MethodResult.of_decomposition(decomposition)
        >>> other = MethodResult("my method", torch.rand(24, 3))
        >>> npeff.coefficients.shape == other.coefficients.shape
        True
    """

    name: str
    coefficients: Tensor
    seconds: float = float("nan")
    interventions: Interventions | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        W = self.coefficients
        if W.dim() != 2 or 0 in W.shape or not W.is_floating_point():
            raise ValueError(f"{self.name}: coefficients must be floating-point (n, r), not {W.dtype} {tuple(W.shape)}")
        if not bool(torch.isfinite(W).all()):
            raise ValueError(f"{self.name}: {int((~torch.isfinite(W)).any(1).sum())} examples have NaN coefficients")

    def __len__(self) -> int:
        return self.coefficients.shape[1]

    @classmethod
    def of_decomposition(
        cls,
        decomposition: Decomposition,
        *,
        name: str = "NPEFF",
        seconds: float = float("nan"),
        interventions: Interventions | None = None,
    ) -> MethodResult:
        """A decomposition as a row."""
        diagnostics = {
            "explained": decomposition.explained,
            "stability": decomposition.stability.tolist(),
            "config": decomposition.config.to_dict(),
            "fisher": decomposition.info.get("fisher"),
        }
        return cls(name, decomposition.coefficients.float(), seconds, interventions, diagnostics)


_FILES = ("coefficients.safetensors", "methods.json")


def save_methods(folder: Path, methods: Sequence[MethodResult], texts: Sequence[str]) -> None:
    """Write the coefficients of several methods and the texts of their examples, for ratings.

    Raises:
        ValueError: if a method is of another number of examples than there are texts.
    """
    if wrong := [m.name for m in methods if len(m.coefficients) != len(texts)]:
        raise ValueError(f"{wrong} are not of the {len(texts)} examples with texts")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {str(i): method.coefficients.contiguous() for i, method in enumerate(methods)}
    write_atomically(folder / _FILES[0], tensors_to_bytes(tensors))
    names = {"format_version": FORMAT_VERSION, "methods": [m.name for m in methods], "texts": list(texts)}
    write_atomically(folder / _FILES[1], json_bytes(names))


def load_methods(folder: Path) -> tuple[list[MethodResult], list[str]] | None:
    """What `save_methods` wrote: methods without interventions, and texts; None where there is nothing.

    Raises:
        CorruptStoreError: if the two files do not fit together.
        FormatVersionError: if they were written by another version of the format.
    """
    if not all((folder / name).is_file() for name in _FILES):
        return None
    tensors, names = read_tensors(folder / _FILES[0]), read_json(folder / _FILES[1])
    texts, known = names.get("texts"), names.get("methods")
    if (
        not isinstance(known, list)
        or not isinstance(texts, list)
        or set(tensors) != {str(i) for i in range(len(known))}
        or any(len(W) != len(texts) for W in tensors.values())
    ):
        raise CorruptStoreError(f"{folder}: {_FILES[0]} and {_FILES[1]} do not fit together")
    return [MethodResult(str(name), tensors[str(i)]) for i, name in enumerate(known)], [str(t) for t in texts]


def check_enough(n: int, r: int, what: str) -> None:
    """Refuse more features than examples.

    Raises:
        ValueError: if r is not between 1 and n.
    """
    if not 1 <= r <= n:
        raise ValueError(f"{what}={r} must be between 1 and the number of examples, {n}; ask for fewer, or give more")
