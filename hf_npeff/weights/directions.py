"""ParameterDirection: a unit direction in parameter space, applied to a model or written as an adapter."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from hf_npeff.config import check_scale
from hf_npeff.decomposition.component import example_lines
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.record import shown_texts
from hf_npeff.errors import CorruptStoreError, UnsupportedModelError
from hf_npeff.fisher.bare_model import named_weights
from hf_npeff.fisher.fsdp import FSDPModel
from hf_npeff.fisher.linear_layers import is_at_hand
from hf_npeff.pefs.weights_identity import check_identity, shown
from hf_npeff.sharing.cards import write_card
from hf_npeff.sharing.direction_cards import DirectionFacts, direction_card
from hf_npeff.sharing.files import FORMAT_VERSION, file_of, json_bytes, read_json, read_tensors, write_together
from hf_npeff.sharing.hub import LIBRARY, text_columns
from hf_npeff.sharing.pretrained import Readable, warn_of_local_model
from hf_npeff.sharing.protocols import ReportLike
from hf_npeff.weights.activations import LinearDelta, changed_in_activations
from hf_npeff.weights.adapters import (
    Adapter,
    AdapterKind,
    Layout,
    check_all_linear,
    dense,
    load_delta,
    shira,
)
from hf_npeff.weights.lora import lora

logger = logging.getLogger(__name__)
_FILE = "direction.safetensors"


_ROUNDED = 0.99
"""Below this cosine more than a fiftieth of the squared length of a step, 1 − .99², is what rounding made of it."""


class _Step:
    """A step that was wanted in weights of 16 bits, and the one that was taken, which rounding makes another."""

    def __init__(self) -> None:
        self._wanted, self._taken, self._inner = 0.0, 0.0, 0.0

    def add(self, wanted: Tensor, taken: Tensor) -> None:
        """Add one parameter's share."""
        self._wanted += _squared(wanted)
        self._taken += _squared(taken)
        self._inner += float((wanted.double() * taken.double()).sum())

    def tell(self) -> None:
        """Warn where the step that was taken points elsewhere."""
        if self._wanted == 0:
            return
        length = (self._taken / self._wanted) ** 0.5
        cosine = self._inner / (self._taken * self._wanted) ** 0.5 if self._taken else 0.0
        if cosine < _ROUNDED:
            logger.warning(
                "weights of 16 bits round the step: %.0f%% of its length are taken, at a cosine of %.2f with it. Load "
                "the model in float32, or use applied_in_activations",
                100 * length,
                cosine,
            )


def _squared(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float64))) ** 2


class ParameterDirection(Readable, Mapping[str, Tensor]):
    """{parameter name: ΔW}, of unit norm over all parameters together, or of the length that the change has.

    Args:
        deltas: shaped like the parameters; scaled here to unit norm where they are not of it.
        layouts: what every parameter is: "linear", "conv1d", "embedding", "bias" or "norm".
        info: how it was made: model, revision, task, component, method, estimated cosine, …
        unit: False keeps the deltas as long as they are, so that a scale of 1 makes the whole change; `info` then says
            `natural_scale`.

    Raises:
        ValueError: if there are no deltas, or they are zero or not finite.

    Example:
        >>> abs(direction.cosine(direction.random_like(seed=1))) < 0.2
        True
        >>> direction.norm_in(model) > 0
        True
        >>> with direction.applied_to(model, scale=0.3):
        ...     moved = model(torch.tensor([[9, 10, 11]])).logits
        >>> with direction.applied_in_activations(model, scale=0.3):  # no weight is touched: quantised ones will do
        ...     bool(torch.allclose(model(torch.tensor([[9, 10, 11]])).logits, moved, atol=1e-4))
        True
        >>> direction.linear_deltas().keys() == direction.keys()
        True
        >>> direction.to_adapter(rank=1, scale=0.3).save_pretrained("runs/adapter")
        >>> direction.save_pretrained("runs/direction")
        >>> ParameterDirection.load("runs/direction").info["component"]
        0
    """

    _KIND = "direction"
    _FILES = (_FILE, "config.json", "adapter_config.json", "adapter_model.safetensors", "README.md")

    def __init__(
        self,
        deltas: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        info: Mapping[str, Any] | None = None,
        *,
        unit: bool = True,
    ):
        if not deltas or set(deltas) != set(layouts):
            raise ValueError("a direction needs deltas, and a layout for each of them")
        squared = sum(_squared(value) for value in deltas.values())
        if not 0 < squared < float("inf"):
            raise ValueError("a direction must be finite and not zero")
        if not unit or abs(squared - 1) < 1e-6:  # as lifting hands them over: no second copy
            self._deltas = {name: value.detach() for name, value in deltas.items()}
        else:
            self._deltas = {name: value.detach() / squared**0.5 for name, value in deltas.items()}
        self.layouts: dict[str, Layout] = dict(layouts)
        self.info: dict[str, Any] = dict(info or {}) | ({} if unit else {"natural_scale": 1.0})

    def __getitem__(self, name: str) -> Tensor:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def norm(self) -> float:
        """Over all parameters together: 1 to rounding, or the length of a change whose natural scale is 1."""
        return sum(map(_squared, self._deltas.values())) ** 0.5

    def cosine(self, other: Mapping[str, Tensor]) -> float:
        """⟨self, other⟩ / ‖other‖.

        Raises:
            ValueError: if the other is over other parameters, or zero.
        """
        if set(other) != set(self):
            raise ValueError("the two are over different parameters")
        inner = sum(float((self[n].double() * other[n].double()).sum()) for n in self)
        norm = sum(map(_squared, other.values())) ** 0.5
        if norm == 0:
            raise ValueError("the other direction is zero")
        return inner / norm / self.norm

    def norm_in(self, model: nn.Module) -> float:
        """The longest sensible scale: ‖θ‖ of the moved parameters over the direction's length; 1 where that is 0."""
        parameters = named_weights(model)
        known = (parameters[name].detach() for name in self if name in parameters)
        return sum(_squared(p.float()) for p in known) ** 0.5 / self.norm or 1.0

    def random_like(self, seed: int = 0) -> ParameterDirection:
        """A Gaussian random direction over the same parameters, of equal norm."""
        generator = torch.Generator().manual_seed(seed)
        deltas = {n: torch.randn(v.shape, generator=generator).to(v.device) for n, v in self._deltas.items()}
        random = ParameterDirection(deltas, self.layouts, {"method": "random", "seed": seed})
        if "natural_scale" not in self.info:
            return random
        return ParameterDirection({n: v * self.norm for n, v in random.items()}, self.layouts, random.info, unit=False)

    def __repr__(self) -> str:
        what = f"component {self.info['component']}" if "component" in self.info else "a direction"
        return f"ParameterDirection({what} in {len(self)} parameters, {self.info.get('method', 'given')})"

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """The model with θ + scale·direction inside `with`; the parameters come back bit for bit, exceptions included.

        Uses may be nested. The sum is taken in float32 or wider and rounded to the parameter's type. Weights of 16 bits
        may round most of a small step away: a warning says the length and the cosine of the step that was taken, where
        the cosine is below .99.

        Raises:
            UnsupportedModelError: if the model's weights are sharded over processes, or one is quantised or offloaded,
                so that nothing can be added to it.
            ValueError: if the scale is 0 or not finite, or the model lacks a parameter or has one of another shape.
        """
        scale = check_scale(scale)
        if FSDPModel(model).active:
            raise UnsupportedModelError(
                "the model's weights are sharded over processes; load the whole model in one process to move them"
            )
        parameters = named_weights(model)
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
        if away := [name for name in self if not is_at_hand(parameters[name])]:
            raise UnsupportedModelError(
                f"nothing can be added to {away[:3]}: they are quantised or offloaded. Use applied_in_activations, or "
                "load the model whole, in a type of floating point"
            )
        before = {name: parameters[name].detach().clone() for name in self}
        step = _Step()
        try:
            with torch.no_grad():
                for name, delta in self.items():
                    weight: Tensor = parameters[name]
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    wanted = scale * delta.to(weight.device, wide)
                    weight.copy_(weight.to(wide) + wanted)
                    if weight.dtype != wide:
                        step.add(wanted, weight.to(wide) - before[name].to(wide))
            step.tell()
            yield model
        finally:
            with torch.no_grad():
                for name, kept in before.items():
                    parameters[name].copy_(kept)

    def linear_deltas(self) -> dict[str, LinearDelta]:
        """{parameter: ΔW (out, in)}.

        Raises:
            UnsupportedModelError: if the direction moves anything but weights of linear maps.
        """
        check_all_linear(self.layouts)
        return {n: LinearDelta(v if self.layouts[n] == "linear" else v.mT) for n, v in self._deltas.items()}

    @contextlib.contextmanager
    def applied_in_activations(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """The model as θ + scale·direction would make it inside `with`, added behind linear maps: no weight is touched.

        It costs a second product for every linear map. Hooks are gone on exit, exceptions included.

        Raises:
            UnsupportedModelError: if the direction moves anything but linear maps; on exit, if the model reads one of
                the weights without calling its module.
            ValueError: if the scale is 0 or not finite, or the model lacks a parameter or has one of another shape.
        """
        with changed_in_activations(model, self.linear_deltas(), check_scale(scale)):
            yield model

    def to_adapter(
        self,
        rank: int = 1,
        scale: float = 1.0,
        *,
        kind: AdapterKind = "lora",
        model: nn.Module | None = None,
        report: ReportLike | None = None,
        decomposition: Decomposition | None = None,
        include_texts: bool = False,
    ) -> Adapter:
        """scale·direction as an adapter.

        Args:
            rank: of a LoRA's modules, or SHiRA's r.
            scale: the length of the step, for instance a `PerturbationReport`'s.
            kind: "lora" (truncated SVD), "shira" (sparse) or "delta" (dense, for `ParameterDirection.from_pretrained`).
            model: needed where norms are part of the direction, which PEFT stores whole.
            report: what `evaluate_direction` measured, for the card.
            decomposition: whose top examples the card shows.
            include_texts: show their texts; ids and predictions otherwise.

        Raises:
            ValueError: if the rank or scale is out of range.
            UnsupportedModelError: if the kind cannot carry one of the parameters.
        """
        if kind == "lora":
            absolute = None
            if model is not None:
                absolute = {n: p.detach().cpu() for n, p in named_weights(model).items() if n in self}
            adapter = lora(self, self.layouts, rank=rank, scale=scale, info=self.info, absolute=absolute)
        elif kind == "shira":
            adapter = shira(self, self.layouts, rank=rank, scale=scale, info=self.info)
        elif kind == "delta":
            adapter = dense(self, self.layouts, scale=scale, info=self.info)
        else:
            raise ValueError(f"kind must be 'lora', 'shira' or 'delta', but it is {kind!r}")
        adapter.about = replace(self._facts(report, decomposition, include_texts), scale=scale)
        adapter.weights = shown(self.info.get("weights"))
        adapter.architecture = str(self.info.get("architecture") or "AutoModel")
        return adapter

    def _facts(
        self, report: ReportLike | None, decomposition: Decomposition | None, include_texts: bool
    ) -> DirectionFacts:
        """What cards say of the direction."""
        component = self.info.get("component")
        about = DirectionFacts(
            base_model=str(self.info.get("model") or "unknown"),
            revision=self.info.get("revision"),
            component=component,
            lift=self.info.get("method"),
            weights=shown(self.info.get("weights")),
        )
        if decomposition is not None and component is not None:
            lines = _example_lines(decomposition, component, include_texts)
            about = replace(about, name=decomposition[component].name, top_examples=lines)
        if report is not None:
            measured: dict[str, Any] = report.summary()
            names = ("scale", "kl_top", "kl_others", "kl_worst", "kl_random", "ratio")
            about = replace(about, **{name: measured[name] for name in names})
        return about

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        report: ReportLike | None = None,
        decomposition: Decomposition | None = None,
        include_texts: bool = False,
    ) -> None:
        """Write direction.safetensors, config.json and README.md.

        A README.md that is not a card of hf_npeff stays as it is.

        Args:
            directory: made where it is missing.
            report: what `evaluate_direction` measured, for the card.
            decomposition: whose top examples the card shows.
            include_texts: show their texts; ids and predictions otherwise.
        """
        folder = Path(directory)
        card = direction_card(self._facts(report, decomposition, include_texts))
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, card)
        self._write(folder)

    def _write(self, folder: Path) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.items()}
        content = tensors_to_bytes(tensors)
        config = {
            "format_version": FORMAT_VERSION,
            "library_name": LIBRARY,
            "layouts": self.layouts,
            "info": self.info,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_together(folder, {_FILE: content, "config.json": json_bytes(config)})

    def _publish(
        self,
        folder: Path,
        repo_id: str,
        *,
        report: ReportLike | None = None,
        decomposition: Decomposition | None = None,
        include_texts: bool = False,
        datasets: Sequence[str] = (),
        license: str | None = None,
    ) -> None:
        """`push_to_hub`'s own arguments: those of `save_pretrained`, and of the card."""
        warn_of_local_model(repo_id, self.info.get("model"))
        about = self._facts(report, decomposition, include_texts)
        write_card(folder, direction_card(about, repo_id=repo_id, datasets=datasets, license=license))
        self._write(folder)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> ParameterDirection:
        """Read what `save_pretrained` wrote, or a dense delta, whose scale is then `info["scale"]`.

        Raises:
            CorruptStoreError: if a file is missing, altered or foreign.
            FormatVersionError: if another version of the format wrote it.
        """
        folder = Path(directory)
        if (folder / "adapter_config.json").is_file():
            deltas, config = load_delta(folder)
            try:
                scale = check_scale(config.get("scale"))  # type: ignore[arg-type]
                layouts, info = _checked(deltas, config.get("layouts"), config.get("info"))
                shorter = {name: deltas[name] / scale for name in layouts}
                return cls(shorter, layouts, {**info, "scale": scale}, unit="natural_scale" not in info)
            except (TypeError, ValueError) as error:
                raise CorruptStoreError(f"{folder / 'adapter_config.json'} is not a delta's: {error!r}") from error
        config = read_json(folder / "config.json")
        tensors = read_tensors(file_of(folder, _FILE, config.get("sha256")))
        try:
            layouts, info = _checked(tensors, config.get("layouts"), config.get("info"))
            return cls({name: tensors[name] for name in layouts}, layouts, info, unit="natural_scale" not in info)
        except (TypeError, ValueError) as error:
            raise CorruptStoreError(f"{folder / 'config.json'} does not fit {_FILE}: {error}") from error


def _checked(tensors: Mapping[str, Tensor], layouts: Any, info: Any) -> tuple[dict[str, Layout], dict[str, Any]]:
    """The layouts and the description of a direction that was read.

    Raises:
        ValueError: if they do not fit the tensors, or anything is of another type than is written.
    """
    if not isinstance(layouts, dict) or not isinstance(info, dict) or set(layouts) != set(tensors):
        raise ValueError("the parameters are others")
    if wrong := [name for name, layout in layouts.items() if layout not in get_args(Layout)]:
        raise ValueError(f"there is no such layout: {layouts[wrong[0]]!r}")
    if wrong := [name for name, t in tensors.items() if not t.is_floating_point() or t.dtype.itemsize < 2]:
        raise ValueError(f"{wrong[0]!r} is of the type {tensors[wrong[0]].dtype}")
    texts = ("model", "revision", "architecture", "module", "task", "method", "fingerprint")
    if wrong := [name for name in texts if not isinstance(info.get(name), str | None)]:
        raise ValueError(f"{wrong[0]} is {info[wrong[0]]!r}")
    check_identity(info.get("weights"))
    tied = info.get("tied", {})
    if not isinstance(tied, dict) or not all(
        isinstance(places, list) and all(isinstance(place, str) for place in places) for places in tied.values()
    ):
        raise ValueError(f"tied is {tied!r:.200}")
    component = info.get("component")
    if component is not None and (not isinstance(component, int) or isinstance(component, bool) or component < 0):
        raise ValueError(f"component is {component!r}")
    return layouts, info


def _example_lines(decomposition: Decomposition, component: int, include_texts: bool) -> list[str]:
    """A component's top examples for a card: texts where they may be shown, else ids, with the predictions."""
    top = decomposition[component].top_examples(10)  # Chosen: what a card lists
    private = () if include_texts else text_columns(decomposition.columns, decomposition.info)
    kept = {name: values for name, values in top.columns.items() if name not in private}
    return example_lines(shown_texts(kept, decomposition.info) or top.ids, kept.get("prediction"))
