"""ParameterDirection: a direction in parameter space, to apply to a model or to write as an adapter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_npeff.config import check_scale
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.errors import CorruptStoreError
from hf_npeff.fisher.bare_model import named_weights
from hf_npeff.pefs.weights_identity import shown
from hf_npeff.sharing.cards import write_card
from hf_npeff.sharing.direction_cards import direction_card
from hf_npeff.sharing.pretrained import Readable, warn_of_local_model
from hf_npeff.sharing.protocols import ReportLike
from hf_npeff.weights.activations import LinearDelta, changed_in_activations
from hf_npeff.weights.adapter_folder import PREFIX
from hf_npeff.weights.adapters import Adapter, AdapterKind
from hf_npeff.weights.arithmetic import DirectionArithmetic
from hf_npeff.weights.dense_delta import dense
from hf_npeff.weights.direction_folder import DIRECTION_FILE, facts_of, read_direction, write_direction
from hf_npeff.weights.layouts import Layout, as_linear_delta, check_all_linear
from hf_npeff.weights.lora import lora
from hf_npeff.weights.moved_weights import squared_norm, weights_moved
from hf_npeff.weights.own_weights import each_once, own_weights
from hf_npeff.weights.peft_config import loading_class
from hf_npeff.weights.shira import shira


class ParameterDirection(Readable, DirectionArithmetic):
    """A change of the weights, {parameter name: ΔW}, scaled to unit norm over all parameters, or with its own length.

    Args:
        deltas: tensors shaped like the parameters; they are scaled to unit norm.
        layouts: the kind of every parameter: "linear", "conv1d", "experts" (E, out, in), "experts-transposed"
            (E, in, out), "embedding", "bias" or "norm".
        info: how it was made: model, revision, task, component, method, estimated cosine, …
        unit: False keeps the length of the deltas, so that a scale of 1 applies the whole change; `info` then has
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
        >>> with direction.applied_in_activations(model, scale=0.3):  # also of quantised weights
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
    _FILES = (DIRECTION_FILE, "config.json", "adapter_config.json", "adapter_model.safetensors", "README.md")

    def __init__(
        self,
        deltas: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        info: Mapping[str, Any] | None = None,
        *,
        unit: bool = True,
    ):
        if not deltas or set(deltas) != set(layouts):
            raise ValueError("a direction needs deltas and a layout for each of them")
        squared = sum(squared_norm(value) for value in deltas.values())
        if not 0 < squared < float("inf"):
            raise ValueError("a direction must be finite and not zero")
        if not unit or abs(squared - 1) < 1e-6:  # as lifting returns them, without a second copy
            self._deltas = {name: value.detach() for name, value in deltas.items()}
        else:
            self._deltas = {name: value.detach() / squared**0.5 for name, value in deltas.items()}
        self.layouts: dict[str, Layout] = dict(layouts)
        self.info: dict[str, Any] = dict(info or {}) | ({} if unit else {"natural_scale": 1.0})

    def _changed(
        self, deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], info: Mapping[str, Any]
    ) -> ParameterDirection:
        return ParameterDirection(deltas, layouts, info, unit=False)

    # Changes that are there already

    @classmethod
    def between(
        cls,
        before: Any,
        after: Any,
        *,
        task: str | None = None,
        dtype: str | torch.dtype = "auto",
        revisions: tuple[str | None, str | None] = (None, None),
        **where: Any,
    ) -> ParameterDirection:
        """The change from one model's weights to another's: by training, a merge, an adapter, an edit.

        Weights of different dtypes are compared in the coarser one. A tied weight is counted once. The models do not
        change; active adapters count as part of them.

        Args:
            before: the model before the change: loaded, a folder, or an id on the Hub. A PEFT adapter stands for its
                base model with the adapter.
            after: the model after the change, in the same forms.
            task: the task of the head, if a checkpoint's architecture does not determine it.
            dtype: the dtype in which checkpoints are loaded.
            revisions: branches, tags or commits of the two checkpoints.
            **where: `token`, `cache_dir` and `local_files_only` for downloads.

        Returns:
            A direction with a natural scale of 1, over the parameters that differ. `info` names both models.

        Raises:
            OSError: if a checkpoint does not exist.
            UnsupportedModelError: if weights are quantised, offloaded or sharded, or PEFT cannot merge an adapter.
            ValueError: if the models have different architectures, vocabulary sizes or tokenizers, or are equal.

        Example:
            >>> change = ParameterDirection.between("org/any-model", model)
            Traceback (most recent call last):
            ValueError: the two models have the same weights: no change
        """
        from hf_npeff.models.change_ends import change_between

        change = change_between(before, after, task=task, dtype=dtype, revisions=revisions, where=where)
        return cls(*change, unit=False)

    @classmethod
    def from_adapter(
        cls,
        adapter: Any,
        *,
        base: Any = None,
        task: str | None = None,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        check_base: bool = True,
        **where: Any,
    ) -> ParameterDirection:
        """The change of the base model's weights by a PEFT adapter, of any kind that PEFT can merge.

        Args:
            adapter: a folder, an id on the Hub, several adapters as {adapter: weight}, whose changes are added up, or a
                PEFT model with active adapters.
            base: the base model: loaded, a folder or an id; None loads the model that the adapter names.
            task: the task of the head, if the base model's architecture does not determine it.
            dtype: the dtype in which the base model is loaded.
            revision: the revision of the adapter.
            check_base: raise an error if the adapter names another base model on the Hub, or other weights of it.
            **where: `token`, `cache_dir` and `local_files_only` for downloads.

        Returns:
            A direction with a natural scale of 1.

        Raises:
            IncompatibleWeightsError: if the adapter says that it was made for other weights.
            OSError: if the adapter or its base model does not exist.
            UnsupportedModelError: if PEFT cannot merge the adapter, or the base model is quantised or offloaded.
            ValueError: if the adapter does not fit the base model, changes modules that share a weight in different
                ways, or changes nothing.

        Example:
            >>> direction.to_adapter(rank=2, scale=0.3).save_pretrained("runs/some-lora")
            >>> change = ParameterDirection.from_adapter("runs/some-lora", base=model)
            >>> half = ParameterDirection.from_adapter({"runs/some-lora": 0.5}, base=model)
            >>> round(change.cosine(half), 3), round(half.norm / change.norm, 3)
            (1.0, 0.5)
            >>> (change - 2 * half).norm < 1e-6 * change.norm
            Traceback (most recent call last):
            ValueError: the changes cancel: their sum is zero
        """
        from hf_npeff.models.change_ends import change_of_adapter

        change = change_of_adapter(
            adapter, base, task=task, dtype=dtype, revision=revision, check_base=check_base, where=where
        )
        return cls(*change, unit=False)

    def __getitem__(self, name: str) -> Tensor:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def norm(self) -> float:
        """The norm over all parameters together: 1 up to rounding, or the length of a change that is not a unit."""
        return sum(map(squared_norm, self._deltas.values())) ** 0.5

    def cosine(self, other: Mapping[str, Tensor]) -> float:
        """⟨self, other⟩ / (‖self‖ ‖other‖).

        Raises:
            ValueError: if the other has other parameters, or is zero.
        """
        if set(other) != set(self):
            raise ValueError("the two directions have different parameters")
        inner = sum(float((self[n].double() * other[n].double()).sum()) for n in self)
        norm = sum(map(squared_norm, other.values())) ** 0.5
        if norm == 0:
            raise ValueError("the other direction is zero")
        return inner / norm / self.norm

    def norm_in(self, model: nn.Module) -> float:
        """The longest sensible scale: ‖θ‖ of the changed parameters over the direction's length; 1 if ‖θ‖ is 0."""
        parameters = named_weights(model)
        known = (parameters[name].detach() for name in self if name in parameters)
        return sum(squared_norm(p.float()) for p in known) ** 0.5 / self.norm or 1.0

    def random_like(self, seed: int = 0) -> ParameterDirection:
        """A Gaussian random direction over the same parameters, of equal norm; zero in those where this one is zero."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {n: torch.randn(v.shape, generator=generator).to(v.device) for n, v in self._deltas.items()}
        deltas = {n: v * bool(self._deltas[n].any()) for n, v in drawn.items()}
        random = ParameterDirection(deltas, self.layouts, {"method": "random", "seed": seed})
        if "natural_scale" not in self.info:
            return random
        return ParameterDirection({n: v * self.norm for n, v in random.items()}, self.layouts, random.info, unit=False)

    def __repr__(self) -> str:
        what = f"component {self.info['component']}" if "component" in self.info else "a direction"
        return f"ParameterDirection({what} in {len(self)} parameters, {self.info.get('method', 'given')})"

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """The model with θ + scale·direction inside `with`; the parameters are restored bit for bit.

        This also holds after an exception. Uses may be nested. The sum is computed in float32 or wider and rounded to
        the parameter's dtype. In 16 bits, most of a small step may be lost by rounding. If the cosine of the rounded
        step with the wanted one is below .99, a warning gives its length and cosine.

        Raises:
            UnsupportedModelError: if the model's weights are sharded over processes, or one is quantised or offloaded,
                so that nothing can be added to it.
            ValueError: if the scale is 0 or not finite, or the model lacks a parameter or has one of another shape.
        """
        with weights_moved(model, self, check_scale(scale)):
            yield model

    def linear_deltas(self) -> dict[str, LinearDelta]:
        """{parameter: ΔW (out, in)}.

        Raises:
            UnsupportedModelError: if the direction changes anything other than weights of linear maps.
        """
        check_all_linear(self.layouts)
        return {n: as_linear_delta(v, self.layouts[n]) for n, v in self._deltas.items()}

    @contextlib.contextmanager
    def applied_in_activations(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """The model as if its weights were θ + scale·direction, inside `with`, added to the outputs of linear maps.

        No weight is touched. Every linear map needs a second product. The hooks are removed on exit, also after an
        exception.

        Raises:
            UnsupportedModelError: if the direction changes anything other than linear maps; on exit, if the model reads
                one of the weights without calling its module.
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
            rank: the rank of a LoRA's modules, or SHiRA's r.
            scale: the length of the step, for example the scale of a `PerturbationReport`.
            kind: "lora" (truncated SVD), "shira" (sparse) or "delta" (dense, for `ParameterDirection.from_pretrained`).
            model: the model; needed if the direction has norms, because PEFT stores their new values.
            report: the result of `evaluate_direction`, for the card.
            decomposition: the decomposition whose top examples the card shows.
            include_texts: whether the card shows their texts; otherwise it shows ids and predictions.

        Raises:
            ValueError: if the rank or scale is out of range.
            UnsupportedModelError: if this kind of adapter cannot hold one of the parameters.
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
        adapter.about = replace(facts_of(self.info, report, decomposition, include_texts), scale=scale)
        adapter.weights = shown(self.info.get("weights"))
        adapter.architecture = loading_class(self.info)
        return adapter

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        report: ReportLike | None = None,
        decomposition: Decomposition | None = None,
        include_texts: bool = False,
    ) -> None:
        """Write direction.safetensors, config.json and README.md.

        A README.md that is not a card of hf_npeff is left alone.

        Args:
            directory: the folder; it is created if it is missing.
            report: the result of `evaluate_direction`, for the card.
            decomposition: the decomposition whose top examples the card shows.
            include_texts: whether the card shows their texts; otherwise it shows ids and predictions.
        """
        folder = Path(directory)
        card = direction_card(facts_of(self.info, report, decomposition, include_texts))
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, card)
        write_direction(folder, self._deltas, self.layouts, self.info)

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
        """Upload the direction; the arguments are those of `save_pretrained` and of the card."""
        warn_of_local_model(repo_id, self.info.get("model"))
        about = facts_of(self.info, report, decomposition, include_texts)
        write_card(folder, direction_card(about, repo_id=repo_id, datasets=datasets, license=license))
        write_direction(folder, self._deltas, self.layouts, self.info)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> ParameterDirection:
        """Read a folder that `save_pretrained` wrote, or a dense delta, whose scale is then `info["scale"]`.

        Raises:
            CorruptStoreError: if a file is missing, altered or foreign.
            FormatVersionError: if another version of the format wrote it.
        """
        deltas, layouts, info = read_direction(Path(directory))
        try:
            return cls(deltas, layouts, info, unit="natural_scale" not in info)
        except ValueError as error:
            raise CorruptStoreError(f"{directory} has no direction: {error}") from error


def as_direction(change: ParameterDirection | Adapter, model: nn.Module) -> ParameterDirection:
    """An adapter as a dense direction with its own length; a direction is returned as it is.

    Raises:
        UnsupportedModelError: if the adapter stores the new value of a norm.
        ValueError: if it changes the modules that share a tied weight in different ways.
    """
    if isinstance(change, ParameterDirection):
        return change
    whole = {name: change.delta(name).float() for name in change.layouts}
    # A LoRA changes only the modules that it has factors for; other changes affect the weight wherever it is used.
    places = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in change.tensors}
    also = {f"{place}.weight" for place in places} if change.kind == "lora" else own_weights(model)
    deltas = each_once(model, whole, also)
    info = {"model": change.config.get("base_model_name_or_path"), "revision": change.config.get("revision")}
    layouts = {name: change.layouts[name] for name in deltas}
    return ParameterDirection(deltas, layouts, {**info, "method": "adapter"}, unit=False)
