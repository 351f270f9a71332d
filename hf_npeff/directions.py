"""ParameterDirection: a unit direction in parameter space, applied to a model or written as an adapter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from hf_npeff.adapters import Adapter, AdapterKind, Layout, check_scale, dense, lora, shira
from hf_npeff.errors import CorruptStoreError
from hf_npeff.files import FORMAT_VERSION, read_json, read_tensors, sha256_of, write_atomically, write_json

_FILE = "direction.safetensors"


class ParameterDirection(Mapping[str, Tensor]):
    """{parameter name: ΔW}, of unit norm over all parameters together.

    Args:
        deltas: shaped like the parameters; scaled here to unit norm.
        layouts: what every parameter is: "linear", "conv1d", "embedding", "bias" or "norm".
        info: how it was made: model, revision, task, component, method, estimated cosine, …

    Raises:
        ValueError: if there are no deltas, or they are zero or not finite.
    """

    def __init__(
        self, deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], info: Mapping[str, Any] | None = None
    ):
        if not deltas or set(deltas) != set(layouts):
            raise ValueError("a direction needs deltas, and a layout for each of them")
        squared = sum(float(value.double().square().sum()) for value in deltas.values())
        if not 0 < squared < float("inf"):
            raise ValueError("a direction must be finite and not zero")
        self._deltas = {name: (value.double() / squared**0.5).to(value.dtype) for name, value in deltas.items()}
        self.layouts: dict[str, Layout] = dict(layouts)
        self.info: dict[str, Any] = dict(info or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def norm(self) -> float:
        """Over all parameters together: 1 to rounding."""
        return sum(float(value.double().square().sum()) for value in self._deltas.values()) ** 0.5

    @property
    def energies(self) -> dict[str, float]:
        """{parameter name: its share of the squared norm}."""
        return {name: float(value.double().square().sum()) for name, value in self._deltas.items()}

    def cosine(self, other: Mapping[str, Tensor]) -> float:
        """⟨self, other⟩ / ‖other‖.

        Raises:
            ValueError: if the other is over other parameters, or zero.
        """
        if set(other) != set(self):
            raise ValueError("the two are over different parameters")
        inner = sum(float((self[n].double() * other[n].double()).sum()) for n in self)
        norm = sum(float(v.double().square().sum()) for v in other.values()) ** 0.5
        if norm == 0:
            raise ValueError("the other direction is zero")
        return inner / norm / self.norm

    def random_like(self, seed: int = 0) -> ParameterDirection:
        """A Gaussian random direction over the same parameters, of equal norm."""
        generator = torch.Generator().manual_seed(seed)
        deltas = {n: torch.randn(v.shape, generator=generator).to(v.device) for n, v in self._deltas.items()}
        return ParameterDirection(deltas, self.layouts, {"method": "random", "seed": seed})

    def __repr__(self) -> str:
        what = f"component {self.info['component']}" if "component" in self.info else "a direction"
        return f"ParameterDirection({what} in {len(self)} parameters, {self.info.get('method', 'given')})"

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """The model with θ + scale·direction inside `with`; the parameters come back bit for bit, exceptions included.

        Uses may be nested. The sum is taken in float32 or wider and rounded to the parameter's type.

        Raises:
            ValueError: if the scale is 0 or not finite, or the model lacks a parameter or has one of another shape.
        """
        scale = check_scale(scale)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if missing := [name for name in self if name not in parameters]:
            raise ValueError(
                f"the model has no parameters named {missing[:3]}; is it the one the direction was made for?"
            )
        wrong = {
            name: tuple(parameters[name].shape) for name, value in self.items() if parameters[name].shape != value.shape
        }
        if wrong:
            raise ValueError(
                f"the model's parameters have other shapes than the direction's: {dict(list(wrong.items())[:3])}"
            )
        before = {name: parameters[name].detach().clone() for name in self}
        try:
            with torch.no_grad():
                for name, delta in self.items():
                    weight = parameters[name]
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    weight.copy_(weight.to(wide) + scale * delta.to(weight.device, wide))
            yield model
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    parameters[name].copy_(weight)

    def to_adapter(
        self, rank: int = 1, scale: float = 1.0, *, kind: AdapterKind = "lora", model: nn.Module | None = None
    ) -> Adapter:
        """scale·direction as an adapter.

        Args:
            rank: of a LoRA's modules, or SHiRA's r.
            scale: the length of the step, for instance a `PerturbationReport`'s.
            kind: "lora" (truncated SVD), "shira" (sparse) or "delta" (dense, for `ParameterDirection.from_pretrained`).
            model: needed where norms are part of the direction, which PEFT stores whole.

        Raises:
            ValueError: if the rank or scale is out of range.
            UnsupportedModelError: if the kind cannot carry one of the parameters.
        """
        if kind == "lora":
            absolute = None
            if model is not None:
                absolute = {n: p.detach().cpu() for n, p in model.named_parameters() if n in self}
            return lora(self, self.layouts, rank=rank, scale=scale, facts=self.info, absolute=absolute)
        if kind == "shira":
            return shira(self, self.layouts, rank=rank, scale=scale, facts=self.info)
        if kind == "delta":
            return dense(self, scale=scale, facts=self.info)
        raise ValueError(f"kind must be 'lora', 'shira' or 'delta', but it is {kind!r}")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write direction.safetensors and config.json.

        Args:
            directory: made where it is missing.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.items()}
        write_atomically(folder / _FILE, tensors_to_bytes(tensors))
        write_json(
            folder / "config.json",
            {
                "format_version": FORMAT_VERSION,
                "library_name": "hf_npeff",
                "layouts": self.layouts,
                "info": self.info,
                "sha256": sha256_of(folder / _FILE),
            },
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> ParameterDirection:
        """Read what `save_pretrained` wrote.

        Raises:
            CorruptStoreError: if a file is missing, altered or foreign.
            FormatVersionError: if another version of the format wrote it.
        """
        folder = Path(directory)
        config = read_json(folder / "config.json")
        path = folder / _FILE
        if not path.is_file() or sha256_of(path) != config.get("sha256"):
            raise CorruptStoreError(f"{path} is missing or not what was written")
        layouts, info = config.get("layouts"), config.get("info")
        tensors = read_tensors(path)
        if not isinstance(layouts, dict) or not isinstance(info, dict) or set(layouts) != set(tensors):
            raise CorruptStoreError(f"{folder / 'config.json'} does not fit {path.name}")
        try:
            return cls(tensors, layouts, info)
        except ValueError as error:
            raise CorruptStoreError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ParameterDirection:
        """Read a direction from a folder; see `load`."""
        return cls.load(path)
