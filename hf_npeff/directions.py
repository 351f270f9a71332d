"""ParameterDirection: a unit direction in parameter space, applied to a model or written as an adapter."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from hf_npeff.adapters import Adapter, AdapterKind, Layout, check_scale, dense, load_delta, lora, shira
from hf_npeff.cards import adapter_card, direction_card, write_card
from hf_npeff.errors import CorruptStoreError
from hf_npeff.files import FORMAT_VERSION, read_json, read_tensors, sha256_of, write_atomically, write_json
from hf_npeff.hub import LIBRARY, push_folder, resolve_folder, text_columns

if TYPE_CHECKING:
    from hf_npeff.components import Decomposition
    from hf_npeff.perturbation import PerturbationReport

_FILE = "direction.safetensors"
_FILES = (_FILE, "config.json", "adapter_config.json", "adapter_model.safetensors", "README.md")
_DELTA_CODE = """from hf_npeff import ParameterDirection

direction = ParameterDirection.from_pretrained(".")
with direction.applied_to(model, direction.info["scale"]):
    ...  # the model as this adapter makes it"""


def _squared(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float64))) ** 2


class ParameterDirection(Mapping[str, Tensor]):
    """{parameter name: ΔW}, of unit norm over all parameters together.

    Args:
        deltas: shaped like the parameters; scaled here to unit norm where they are not of it.
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
        squared = sum(_squared(value) for value in deltas.values())
        if not 0 < squared < float("inf"):
            raise ValueError("a direction must be finite and not zero")
        if abs(squared - 1) < 1e-6:  # as lifting hands them over: no second copy
            self._deltas = {name: value.detach() for name, value in deltas.items()}
        else:
            self._deltas = {name: value.detach() / squared**0.5 for name, value in deltas.items()}
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
        return sum(map(_squared, self._deltas.values())) ** 0.5

    @property
    def energies(self) -> dict[str, float]:
        """{parameter name: its share of the squared norm}."""
        return {name: _squared(value) for name, value in self._deltas.items()}

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
                    weight: Tensor = parameters[name]
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    weight.copy_(weight.to(wide) + scale * delta.to(weight.device, wide))
            yield model
        finally:
            with torch.no_grad():
                for name, kept in before.items():
                    parameters[name].copy_(kept)

    def to_adapter(
        self,
        rank: int = 1,
        scale: float = 1.0,
        *,
        kind: AdapterKind = "lora",
        model: nn.Module | None = None,
        report: PerturbationReport | None = None,
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
                absolute = {n: p.detach().cpu() for n, p in model.named_parameters() if n in self}
            adapter = lora(self, self.layouts, rank=rank, scale=scale, facts=self.info, absolute=absolute)
        elif kind == "shira":
            adapter = shira(self, self.layouts, rank=rank, scale=scale, facts=self.info)
        elif kind == "delta":
            adapter = dense(self, self.layouts, scale=scale, facts=self.info)
        else:
            raise ValueError(f"kind must be 'lora', 'shira' or 'delta', but it is {kind!r}")
        facts = self._card_facts(report, decomposition, include_texts)
        if "component" in self.info:
            adapter.card = adapter_card(
                **facts | {"scale": scale},
                rank=None if kind == "delta" else rank,
                retained_energy=adapter.retained_energy,
                kind={"lora": "LoRA", "shira": "SHiRA", "delta": "dense"}[kind],
                auto_class=str(self.info.get("architecture") or "AutoModel"),
                code=_DELTA_CODE if kind == "delta" else None,
            )
        return adapter

    def _card_facts(
        self, report: PerturbationReport | None, decomposition: Decomposition | None, include_texts: bool
    ) -> dict[str, Any]:
        """What cards say of the direction, as arguments of `adapter_card` and `direction_card`."""
        facts: dict[str, Any] = {
            "base_model": str(self.info.get("model") or "unknown"),
            "revision": self.info.get("revision"),
            "component": self.info.get("component"),
            "lift": self.info.get("method"),
        }
        if decomposition is not None and facts["component"] is not None:
            component = decomposition[facts["component"]]
            top = component.top_examples(10)
            kept = set(top.columns) - (set() if include_texts else set(text_columns(decomposition.columns)))
            column = decomposition.text_column if decomposition.text_column in kept else None
            lines: list[Any] = list(top.ids if column is None else top.columns[column])
            if "prediction" in kept:
                lines = [f"{x} → {y}" for x, y in zip(lines, top.columns["prediction"], strict=True)]
            facts |= {"name": component.name, "top_examples": [str(line) for line in lines]}
        if report is not None:
            measured = report.summary()
            facts |= {name: measured[name] for name in ("scale", "kl_top", "kl_others", "kl_random", "ratio")}
        return facts

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        report: PerturbationReport | None = None,
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
        self._save(Path(directory), None, report, decomposition, include_texts)

    def _save(
        self,
        folder: Path,
        repo_id: str | None,
        report: PerturbationReport | None,
        decomposition: Decomposition | None,
        include_texts: bool,
    ) -> None:
        card = direction_card(**self._card_facts(report, decomposition, include_texts), repo_id=repo_id)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, card)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.items()}
        write_atomically(folder / _FILE, tensors_to_bytes(tensors))
        write_json(
            folder / "config.json",
            {
                "format_version": FORMAT_VERSION,
                "library_name": LIBRARY,
                "layouts": self.layouts,
                "info": self.info,
                "sha256": sha256_of(folder / _FILE),
            },
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        report: PerturbationReport | None = None,
        decomposition: Decomposition | None = None,
        include_texts: bool = False,
    ) -> str:
        """Publish the files of `save_pretrained` as a model repository.

        Args:
            repo_id: user/name; made where it is missing.
            private: whether a new repository is private; True also refuses an existing public one.
            token: None takes the one of `hf auth login`.
            revision: the branch, made where it is missing.
            create_pr: open a pull request instead of committing.
            commit_message: the commit's title.
            report: what `evaluate_direction` measured, for the card.
            decomposition: whose top examples the card shows.
            include_texts: show their texts; ids and predictions otherwise.

        Returns:
            The address of the commit or of the pull request.

        Raises:
            OSError: if the upload is refused or the Hub cannot be reached.
            ValueError: if the id is malformed, or a private repository is public.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id, report, decomposition, include_texts)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload direction",
            )

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
                info = {**config["info"], "scale": scale}
                return cls({name: deltas[name] / scale for name in config["layouts"]}, config["layouts"], info)
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptStoreError(f"{folder / 'adapter_config.json'} is not a delta's: {error!r}") from error
        config = read_json(folder / "config.json")
        path = folder / _FILE
        if not path.is_file() or sha256_of(path) != config.get("sha256"):
            raise CorruptStoreError(f"{path} is missing or not what was written")
        layouts, found = config.get("layouts"), config.get("info")
        tensors = read_tensors(path)
        if not isinstance(layouts, dict) or not isinstance(found, dict) or set(layouts) != set(tensors):
            raise CorruptStoreError(f"{folder / 'config.json'} does not fit {path.name}")
        try:
            return cls({name: tensors[name] for name in layouts}, layouts, found)
        except ValueError as error:
            raise CorruptStoreError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
    ) -> ParameterDirection:
        """Read what `save_pretrained` or `push_to_hub` wrote, or an adapter of kind "delta".

        Args:
            id_or_path: a folder, or a repository's id on the Hub.
            revision: branch, tag or commit.
            token: for private repositories; None takes the one of `hf auth login`.
            cache_dir: the Hub client's cache, where it is not the usual one.
            local_files_only: use the cache alone.
            subfolder: the folder within, with forward slashes.

        Raises:
            OSError: if there is no such folder, repository or revision, or the Hub cannot be reached.
            ValueError: if the id is malformed, or the subfolder leads out of the repository.
            CorruptStoreError: if a file is missing, altered or foreign.
            FormatVersionError: if another version of the format wrote it.
        """
        folder = resolve_folder(
            id_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
            allow_patterns=_FILES,
        )
        return cls.load(folder)
