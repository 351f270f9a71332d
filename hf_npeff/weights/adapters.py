"""Adapters: a change of the weights as PEFT's LoRA or SHiRA, or dense.

Keys and settings are those that PEFT loads: full module names as targets, one rank for all modules with zero padding,
lora_alpha equal to the rank, and the scale in B. Every adapter is a delta ΔW; the model runs with W + ΔW.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_npeff.config import check_scale
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.sharing.cards import write_card
from hf_npeff.sharing.direction_cards import DirectionFacts, adapter_card
from hf_npeff.sharing.pretrained import Readable, warn_of_local_model
from hf_npeff.sharing.runtimes import verdicts, where_it_loads
from hf_npeff.weights.activations import LinearDelta, changed_in_activations
from hf_npeff.weights.adapter_folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    base_weights_of,
    read_lora,
    scaled_lora,
    write_adapter,
)
from hf_npeff.weights.adapter_sums import stacked, sum_config
from hf_npeff.weights.gguf import check_gguf, write_gguf
from hf_npeff.weights.layouts import STORED_WHOLE, Layout, as_linear_delta, check_all_linear, place_of_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AdapterKind = Literal["lora", "shira", "delta"]
_KINDS = {"lora": "LoRA", "shira": "SHiRA", "delta": "dense"}


@dataclass(repr=False)
class Adapter(Readable):
    """A change of the weights as an adapter, to apply to a model or to write for PEFT.

    Attributes:
        kind: "lora", "shira" or "delta".
        tensors: the tensors of the safetensors file.
        config: the content of adapter_config.json.
        retained_energy: share of ‖ΔW‖² that the adapter keeps, 0 to 1; for lifted components, `is_estimate` says
            whether it is an estimate.
        layouts: {parameter: layout} of the changed parameters, such as "linear" or "bias".
        retained_by_weight: the retained energy of every weight.
        about: the direction that it was made from, for the card; without it no card is written.
        architecture: the class that loads the base model, for the card.
        shapes: the shapes of the parameters, if the tensors do not determine them (SHiRA).
        weights: hash of the base model's weights, kept as `base_model_weights` in the safetensors file's metadata.
        info: how a lifted component's adapter was made, as in `ParameterDirection.info`; empty for other adapters.

    Example:
        >>> adapter = direction.to_adapter(rank=2, scale=0.3)
        >>> 0 < adapter.retained_energy <= 1 and not adapter.is_estimate
        True
        >>> adapter.kept == f"{adapter.retained_energy:.0%}"
        True
        >>> round(sum(adapter.energies().values()), 6)
        1.0
        >>> with adapter.applied_in_activations(model):
        ...     moved = model(torch.tensor([[9, 10, 11]])).logits
        >>> adapter.linear_deltas().keys() == adapter.layouts.keys()
        True
        >>> all(adapter.delta(name).shape == model.get_parameter(name).shape for name in adapter.layouts)
        True
        >>> adapter.card(license="apache-2.0").startswith("---")
        True
        >>> sorted(adapter.factors()) == sorted(adapter.scaled(-2.0).factors())
        True
        >>> adapter.save_pretrained("runs/lora")  # PeftModel.from_pretrained(base, "runs/lora") loads it
        >>> Adapter.from_pretrained("runs/lora").layouts == Adapter.load("runs/lora").layouts == adapter.layouts
        True
        >>> adapter.loads_in
        ['PEFT', 'transformers', 'vLLM', 'llama.cpp', 'OpenVINO GenAI']
        >>> (adapter + -0.5 * adapter).config["r"]  # a sum is exact: its rank is the sum of the ranks
        4
        >>> Adapter.sum([adapter, adapter], scales=[1, -0.5]).layouts == adapter.layouts
        True
        >>> adapter.to_gguf("runs/lora.gguf", base=model.config)  # llama.cpp loads it with a GGUF file of the model
    """

    kind: AdapterKind
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    retained_energy: float
    layouts: dict[str, Layout]
    retained_by_weight: dict[str, float] = field(default_factory=dict)
    about: DirectionFacts | None = None
    architecture: str = "AutoModel"
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    _KIND = "adapter"
    _FILES = (WEIGHTS, CONFIG)

    @property
    def loads_in(self) -> list[str]:
        """The programs of `sharing.runtimes.RUNTIMES` that load all of the adapter."""
        verdict_of = verdicts(self.kind, self.layouts, self._task_type, self.architecture)
        return [name for name, verdict in verdict_of.items() if verdict == "loads"]

    @property
    def _task_type(self) -> str | None:
        """PEFT's name for the base model's task; None for a classifier, for which only the class is recorded."""
        return self.config.get("task_type") or ("other" if self.config.get("auto_mapping") else None)

    @property
    def is_estimate(self) -> bool:
        """Whether `retained_energy` is an estimate."""
        return self.info.get("retained_energy") == "estimated"

    @property
    def kept(self) -> str:
        """`retained_energy` in words: "62%", or "about 62%" if it is an estimate."""
        return f"{'about ' if self.is_estimate else ''}{self.retained_energy:.0%}"

    @classmethod
    def sum(cls, adapters: Sequence[Adapter], scales: Sequence[float] | None = None) -> Adapter:
        """The exact sum Σ scale·ΔW of several LoRA adapters for one model, as one adapter with the sum of their ranks.

        PEFT's `add_weighted_adapter` truncates such a sum to the largest rank, unless its type is "cat". `a + b` is
        such a sum. `-a` and `0.5 * a` are `a.scaled(...)`, and keep the information of `a` on retained energy.

        Args:
            adapters: one or more adapters.
            scales: a factor for each adapter, 1 by default; a negative one reverses a change.

        Raises:
            ValueError: if there are no adapters, they are for different models, or a scale is 0 or not finite.
            UnsupportedModelError: if one is not a LoRA, or changes norms or fused experts: add the directions instead.
        """
        adapters = list(adapters)
        scales = [1.0] * len(adapters) if scales is None else [check_scale(scale) for scale in scales]
        if not adapters or len(scales) != len(adapters):
            raise ValueError(
                f"a sum needs at least one adapter and a scale for each, but there are {len(adapters)} adapters and "
                f"{len(scales)} scales"
            )
        if other := [each.kind for each in adapters if each.kind != "lora"]:
            raise UnsupportedModelError(f"LoRA adapters can be summed, not {other[0]!r}: add the directions instead")
        if len({each.weights for each in adapters} - {None}) > 1:
            raise ValueError("the adapters are for models with different weights")
        scaled = [scaled_lora(each.tensors, scale) for each, scale in zip(adapters, scales, strict=True)]
        ranks, layouts = [each.config["r"] for each in adapters], [each.layouts for each in adapters]
        tensors, together = stacked(scaled, ranks, layouts)
        config = sum_config([each.config for each in adapters])
        first = adapters[0]
        return cls("lora", tensors, config, 1.0, together, architecture=first.architecture, weights=first.weights)

    def __add__(self, other: object) -> Adapter:
        """Both changes in one adapter; see `sum`."""
        return Adapter.sum([self, other]) if isinstance(other, Adapter) else NotImplemented

    def __mul__(self, scale: object) -> Adapter:
        """The change times a factor; see `scaled`."""
        return self.scaled(scale) if isinstance(scale, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        """The opposite change; see `scaled`."""
        return self * -1.0

    def __repr__(self) -> str:
        rank = f" of rank {self.config['r']}" if self.config.get("r") else ""
        whose = "" if self.about is None or self.about.component is None else f"component {self.about.component}, "
        kept = f"keeps {self.kept} of the change"
        return f"Adapter({whose}{_KINDS[self.kind]}{rank} in {len(self.layouts)} parameters, {kept})"

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_adapter

        return of_adapter(self)

    def linear_deltas(self) -> dict[str, LinearDelta]:
        """{parameter: ΔW (out, in)}, in factors for a LoRA.

        Raises:
            UnsupportedModelError: if it changes anything but weights of linear maps.
        """
        check_all_linear(self.layouts)
        return {name: self._linear_delta(name) for name in self.layouts}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{weight: (B (out, r), A (r, in))} of a LoRA, with ΔW = BA; for an embedding, the transpose.

        Raises:
            UnsupportedModelError: if it is not a LoRA.
        """
        if self.kind != "lora":
            raise UnsupportedModelError(f"only a LoRA has factors, and this adapter is {_KINDS[self.kind]}")
        deltas = {n: self._linear_delta(n) for n, kind in self.layouts.items() if kind not in ("bias", *STORED_WHOLE)}
        return {name: (delta.left, delta.right) for name, delta in deltas.items() if delta.right is not None}

    def energies(self) -> dict[str, float]:
        """{weight: its share of ‖ΔW‖²} of a LoRA, the largest first; ‖BA‖² = tr((BᵀB)(AAᵀ)), so no ΔW is formed.

        Raises:
            UnsupportedModelError: if it is not a LoRA.
        """
        wide = {name: (B.double(), A.double()) for name, (B, A) in self.factors().items()}
        squares = {name: float(((B.T @ B) * (A @ A.T)).sum()) for name, (B, A) in wide.items()}
        total = sum(squares.values()) or 1.0
        return dict(sorted(((n, value / total) for n, value in squares.items()), key=lambda item: -item[1]))

    def scaled(self, scale: float) -> Adapter:
        """The adapter with its change multiplied by a factor; a negative factor reverses it.

        Raises:
            UnsupportedModelError: if it stores the new value of a parameter, such as a norm or a head, and not its
                change.
            ValueError: if the scale is 0 or not finite.
        """
        scale = check_scale(scale)
        if stored := [name for name, layout in self.layouts.items() if self.kind == "lora" and layout in STORED_WHOLE]:
            raise UnsupportedModelError(
                f"the adapter stores the new value of {stored[0]} and not its change, so it cannot be scaled; lift "
                "again, or use to_adapter(scale=...)"
            )
        changes = ("lora_B.", "lora_embedding_B", "shira_weight")
        tensors = {
            name: value * scale if self.kind == "delta" or any(part in name for part in changes) else value
            for name, value in self.tensors.items()
        }
        config = {**self.config, **({"scale": self.config["scale"] * scale} if "scale" in self.config else {})}
        about = self.about and replace(self.about, scale=(self.about.scale or 1.0) * scale)
        return replace(self, tensors=tensors, config=config, about=about)

    def delta(self, name: str) -> Tensor:
        """ΔW of one parameter, dense and shaped like it.

        Raises:
            KeyError: if the adapter does not change that parameter.
            UnsupportedModelError: if it stores the parameter's new value, as PEFT does for norms and heads.
        """
        if name not in self.layouts:
            raise KeyError(f"{name!r} is not among this adapter's parameters: {list(self.layouts)[:3]} …")
        layout = self.layouts[name]
        if self.kind == "delta":
            return self.tensors[name]
        if layout in STORED_WHOLE:
            raise UnsupportedModelError(f"the adapter stores the new value of {name} and not its change")
        if layout == "bias":
            return self.tensors[f"{PREFIX}{name.removesuffix('bias')}lora_B.bias"]
        if layout in ("experts", "experts-transposed"):
            parts = self._parts_of_experts(name)
            return parts if layout == "experts" else parts.mT
        matrix = self._linear_delta(name).matrix()
        return matrix if layout == "linear" else matrix.mT

    def _parts_of_experts(self, name: str) -> Tensor:
        """ΔW_e (E, out, in) of fused experts, from factors in the layout of PEFT's `ParamWrapper`."""
        rank, stem = self.config["r"], place_of_experts(name, self.layouts)
        A, B = self.tensors[f"{PREFIX}{stem}.lora_A.weight"], self.tensors[f"{PREFIX}{stem}.lora_B.weight"]
        return torch.einsum("ore,eri->eoi", B.unflatten(1, (rank, -1)), A.unflatten(0, (-1, rank)))

    def _linear_delta(self, name: str) -> LinearDelta:
        """ΔW (out, in) of a weight; transposed for an embedding."""
        stem = f"{PREFIX}{name.removesuffix('weight')}"
        if self.kind == "delta":
            return as_linear_delta(self.tensors[name], self.layouts[name])
        if self.layouts[name] in ("experts", "experts-transposed"):
            parts = self._parts_of_experts(name)
            return LinearDelta(parts.flatten(0, 1), experts=len(parts))
        if self.kind == "shira":
            rows, columns = self.tensors[f"{stem}shira_indices"].long()
            values = self.tensors[f"{stem}shira_weight"]
            return LinearDelta(values.new_zeros(self.shapes[name]).index_put((rows, columns), values))
        # The scale is in B: lora_alpha is the rank.
        names = "lora_embedding_{}" if self.layouts[name] == "embedding" else "lora_{}.weight"
        return LinearDelta(self.tensors[stem + names.format("B")], self.tensors[stem + names.format("A")])

    @contextlib.contextmanager
    def applied_in_activations(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """Add scale·ΔW to the outputs of the base model's linear maps, inside `with`, without touching a weight.

        So the weights may be quantised, offloaded or sharded. The hooks are removed on exit, also after an exception.

        Raises:
            UnsupportedModelError: if the adapter changes anything other than linear maps; on exit, if the model reads
                one of the weights without calling its module.
            ValueError: if the scale is 0 or not finite, or the model lacks a parameter or has one of another shape.
        """
        with changed_in_activations(model, self.linear_deltas(), check_scale(scale)):
            yield model

    def card(self, repo_id: str | None = None, *, datasets: Sequence[str] = (), license: str | None = None) -> str:
        """The text of README.md; see `direction_cards.adapter_card`.

        Raises:
            ValueError: if the adapter's direction is not known, or the license or a data set's id is malformed.
        """
        if self.about is None:
            raise ValueError(
                "this adapter was not made from a direction of hf_npeff, so there is no information for a card"
            )
        return adapter_card(
            self.about,
            kind=_KINDS[self.kind],
            rank=self.config.get("r"),
            retained_energy=self.retained_energy,
            is_estimate=self.is_estimate,
            loads_in=where_it_loads(self.kind, self.layouts, self._task_type, self.architecture),
            auto_class=self.architecture,
            repo_id=repo_id,
            datasets=datasets,
            license=license,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json, adapter_model.safetensors and, if the adapter's direction is known, README.md.

        A README.md that is not a card of hf_npeff is left alone.

        Args:
            directory: the folder; it is created if it is missing. An adapter of the same shape in it is replaced.

        Raises:
            ValueError: if the folder has an adapter of another rank, kind or model, because PEFT reads two files, which
                cannot be replaced in one step.
        """
        card = None if self.about is None else self.card()
        write_adapter(Path(directory), self.tensors, self.config, weights_hash=self.weights, card=card)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Adapter:
        """Read a folder with a LoRA adapter, written by hf_npeff or by PEFT; a scale in `lora_alpha` goes into B.

        The adapter's direction is not read; to write a card again, use the direction.

        Raises:
            CorruptStoreError: if a file is missing or damaged, or keys and config are not those of a LoRA.
            UnsupportedModelError: if it is another kind of adapter, or its change is not BA·lora_alpha/r, as with DoRA,
                PiSSA or a setting such as `rank_pattern`.
        """
        tensors, config, layouts = read_lora(directory)
        base = (config.get("auto_mapping") or {}).get("base_model_class") or "AutoModel"
        return cls("lora", tensors, config, 1.0, layouts, architecture=base, weights=base_weights_of(directory))

    def to_gguf(
        self, path: str | os.PathLike[str], base: PretrainedConfig | str | os.PathLike[str] | None = None
    ) -> None:
        """Write the adapter for llama.cpp and programs that use it: one GGUF file with the factors in float32.

        Names, and the order of attention's rows, are those that llama.cpp expects for the model type. The types in
        `weights.gguf.ARCHITECTURES` were compared with llama.cpp itself.

        Args:
            path: the file to write; an existing file is replaced.
            base: the base model's config, its folder or id, or a GGUF file of it, whose names and shapes are then
                compared; None reads the config of the adapter's `base_model_name_or_path`.

        Raises:
            UnsupportedModelError: if it is not a LoRA, changes anything other than linear maps (llama.cpp drops or
                refuses norms, biases, embeddings and experts), or the model type is not one of those.
            ValueError: if the base model's config cannot be read, or its GGUF file has other tensors.
            ModuleNotFoundError: if the package gguf is missing.
        """
        check_gguf(self.kind, self.layouts)
        write_gguf(self.tensors, self.config, path, base)

    def _publish(self, folder: Path, repo_id: str, *, datasets: Sequence[str] = (), license: str | None = None) -> None:
        """Upload the adapter; the arguments are those of `push_to_hub`."""
        warn_of_local_model(repo_id, self.config.get("base_model_name_or_path"))
        if self.about is not None:
            write_card(folder, self.card(repo_id, datasets=datasets, license=license))
        replace(self, about=None).save_pretrained(folder)
