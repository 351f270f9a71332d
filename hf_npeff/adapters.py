"""Adapter files for a weight delta: LoRA and SHiRA exactly as PEFT writes them, and dense deltas of our own.

Keys and settings follow what PEFT loads: full module names as targets, one rank for all modules with zero padding,
lora_alpha equal to the rank, and the scale folded into B. Every adapter is a delta ΔW, so W + ΔW is what runs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_npeff.errors import CorruptStoreError, UnsupportedModelError
from hf_npeff.files import FORMAT_VERSION, read_json, read_tensors, sha256_of, write_atomically, write_json
from hf_npeff.hub import push_folder

if TYPE_CHECKING:
    from hf_npeff.components import Decomposition

AdapterKind = Literal["lora", "shira", "delta"]
Layout = Literal["linear", "conv1d", "embedding", "bias", "norm", "other"]
_PREFIX = "base_model.model."
_EXACT_SVD = 1024
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM"}
_WEIGHTS = "adapter_model.safetensors"


def layout_of(model: nn.Module, parameter: str) -> Layout:
    """What a parameter is to PEFT."""
    path, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "bias" and isinstance(module, nn.Linear | Conv1D):
        return "bias"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if "norm" in type(module).__name__.lower() else "other"


@dataclass
class Adapter:
    """An adapter in memory, ready to be written.

    Attributes:
        kind: "lora", "shira" or "delta".
        tensors: what the safetensors file holds.
        config: adapter_config.json.
        retained_energy: share of ‖ΔW‖² that the adapter keeps, 0 to 1.
        retained_by_weight: the same for every weight.
        card: README.md, or None.
    """

    kind: AdapterKind
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    retained_energy: float
    retained_by_weight: dict[str, float] = field(default_factory=dict)
    card: str | None = None

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json, adapter_model.safetensors and, where there is one, the card.

        Args:
            directory: made where it is missing.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        write_atomically(folder / _WEIGHTS, tensors_to_bytes(tensors, {"format": "pt"}))
        config = self.config
        if self.kind == "delta":
            config = {**config, "sha256": sha256_of(folder / _WEIGHTS)}
        write_json(folder / "adapter_config.json", config)
        if self.card is not None:
            write_atomically(folder / "README.md", self.card.encode())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Publish the files of `save_pretrained` as a model repository.

        Args:
            repo_id: user/name; made where it is missing.
            private: whether a new repository is private; True also refuses an existing public one.
            token: None takes the one of `hf auth login`.
            revision: the branch, made where it is missing.
            create_pr: open a pull request instead of committing.
            commit_message: the commit's title.

        Returns:
            The address of the commit or of the pull request.

        Raises:
            OSError: if the upload is refused or the Hub cannot be reached.
            ValueError: if the id is malformed, or a private repository is public.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload adapter",
            )


def save_components(
    decomposition: Decomposition,
    adapters: Mapping[int, Adapter],
    directory: str | os.PathLike[str],
    *,
    include_columns: bool | Sequence[str] = True,
) -> None:
    """A decomposition with adapters of several of its components, one in components/003 for instance.

    PEFT loads one with `PeftModel.from_pretrained(model, directory, subfolder="components/003")`. `AutoPeftModel` takes
    no subfolder: for it, save an adapter alone.

    Args:
        decomposition: written to the folder itself.
        adapters: {component: its adapter}.
        directory: made where it is missing.
        include_columns: which of the decomposition's columns are written.

    Raises:
        IndexError: if a component does not exist.
        ValueError: if a column does not exist.
    """
    chosen = {decomposition.index_of(j): adapter for j, adapter in adapters.items()}
    decomposition.save_pretrained(directory, include_columns=include_columns)
    for j, adapter in chosen.items():
        adapter.save_pretrained(Path(directory) / "components" / f"{j:03d}")


def check_scale(scale: float) -> float:
    """A finite number other than 0.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < float("inf") or scale == 0:
        raise ValueError(f"scale must be a finite number other than 0, but it is {scale!r}")
    return float(scale)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B (out, rank) and A (rank, in) with BA the best approximation of a matrix, and the share of ‖·‖² it keeps.

    Exact for small matrices; randomised (Halko et al. 2011) with a fixed seed for large ones.
    """
    wide = matrix.float()
    if min(wide.shape) <= _EXACT_SVD:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(wide, q=min(rank + 8, *wide.shape), niter=4)
        U, S, V = U[:, :rank], S[:rank], V[:, :rank]
    energy = float(wide.double().square().sum())
    kept = float(S.double().square().sum()) / energy if energy > 0 else 1.0
    root = S.sqrt()
    return U * root, (V * root).T, min(kept, 1.0)


def _padded(matrix: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - matrix.shape[dim]
    if missing == 0:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def lora(
    deltas: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    *,
    rank: int,
    scale: float,
    facts: Mapping[str, Any],
    absolute: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """A LoRA adapter by truncated SVD of every weight's delta.

    Args:
        deltas: {parameter name: ΔW}, shaped like the parameters.
        layouts: what every parameter is.
        rank: of every module; smaller matrices are zero-padded.
        scale: the deltas are multiplied with it.
        facts: `model`, `revision` and `task`.
        absolute: the norms' weights in the model: PEFT stores those whole.

    Raises:
        ValueError: if the rank exceeds that of every matrix, the scale is 0 or not finite, or a bias comes without the
            weight of its module.
        UnsupportedModelError: if a parameter is of no kind that LoRA carries.
    """
    scale = check_scale(scale)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive whole number, but it is {rank!r}")
    matrices = [n for n in deltas if layouts[n] in ("linear", "conv1d", "embedding")]
    largest = max((min(deltas[n].shape) for n in matrices), default=0)
    if rank > largest:
        raise ValueError(f"rank={rank} exceeds the rank that any of the matrices can have; use at most {largest}")
    tensors: dict[str, Tensor] = {}
    targets, saved, biases = [], [], []
    kept: dict[str, float] = {}
    energies: dict[str, float] = {}
    for name, delta in deltas.items():
        module, _, leaf = name.rpartition(".")
        layout = layouts[name]
        energies[name] = float(delta.double().square().sum())
        if layout in ("linear", "conv1d"):
            # lora_B lora_A is (out, in) for both; Conv1D keeps its weight transposed.
            B, A, kept[name] = low_rank(delta.mT if layout == "conv1d" else delta, rank)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = _padded(A, rank, 0)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = _padded(B, rank, 1) * scale
            targets.append(module)
        elif layout == "embedding":
            B, A, kept[name] = low_rank(delta.mT, rank)  # ΔW = (BA)ᵀ
            tensors[f"{_PREFIX}{module}.lora_embedding_A"] = _padded(A, rank, 0)
            tensors[f"{_PREFIX}{module}.lora_embedding_B"] = _padded(B, rank, 1) * scale
            targets.append(module)
        elif layout == "bias":
            biases.append((module, delta * scale, name))
            kept[name] = 1.0
        elif layout == "norm":
            if absolute is None or name not in absolute:
                raise ValueError(f"PEFT stores {name} whole: pass the model to to_adapter(model=...)")
            tensors[f"{_PREFIX}{module}.{leaf}"] = absolute[name].float() + scale * delta.float()
            saved.append(module)
            kept[name] = 1.0
        else:
            raise UnsupportedModelError(f"{name} is not a weight that LoRA carries; use kind='delta'")
    for module, bias, name in biases:
        if module not in targets and module not in saved:
            raise ValueError(f"the bias {name} needs its module's weight in the direction; use kind='delta'")
        if module in targets:
            tensors[f"{_PREFIX}{module}.lora_B.bias"] = bias
    if biases:
        for module in targets:
            key = f"{_PREFIX}{module}.lora_B.bias"
            out = tensors.get(f"{_PREFIX}{module}.lora_B.weight")
            if key not in tensors and out is not None:
                tensors[key] = torch.zeros(len(out))
    total = sum(energies.values())
    energy = sum(kept[n] * energies[n] for n in deltas) / total if total else 1.0
    config = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(str(facts.get("task"))),
        "base_model_name_or_path": facts.get("model"),
        "revision": facts.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(biases),
        "fan_in_fan_out": any(layouts[n] == "conv1d" for n in deltas),
        "target_modules": targets,
        "modules_to_save": saved or None,
        "use_rslora": False,
        "auto_mapping": _auto_mapping(facts),
    }
    return Adapter("lora", tensors, config, energy, kept)


def _auto_mapping(facts: Mapping[str, Any]) -> dict[str, str] | None:
    """What AutoPeftModel needs where the task has no type of PEFT's that loads without a saved head."""
    if str(facts.get("task")) in _TASK_TYPES or not facts.get("architecture"):
        return None
    return {"base_model_class": str(facts["architecture"]), "parent_library": str(facts.get("module"))}


def shira(
    deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], *, rank: int, scale: float, facts: Mapping[str, Any]
) -> Adapter:
    """A sparse SHiRA adapter: the r·(in + out) largest entries of every linear weight's delta.

    Args:
        deltas: {parameter name: ΔW (out, in)}.
        layouts: all "linear": PEFT's SHiRA takes nothing else.
        rank: r, PEFT's measure of how many entries a module has.
        scale: the deltas are multiplied with it.
        facts: `model`, `revision` and `task`.

    Raises:
        UnsupportedModelError: if a parameter is not a linear map's weight.
        ValueError: if the rank or the scale is out of range.
    """
    scale = check_scale(scale)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive whole number, but it is {rank!r}")
    if wrong := [n for n in deltas if layouts[n] != "linear"]:
        raise UnsupportedModelError(f"SHiRA carries nn.Linear weights only, not {wrong[:3]}; use LoRA or kind='delta'")
    tensors: dict[str, Tensor] = {}
    kept: dict[str, float] = {}
    energies: dict[str, float] = {}
    targets = []
    for name, delta in deltas.items():
        module = name.rpartition(".")[0]
        flat = delta.flatten().float()
        size = rank * sum(delta.shape)
        if size > flat.numel():
            raise ValueError(
                f"rank={rank} asks for {size} entries of {name}, which has {flat.numel()}; use a smaller rank or LoRA"
            )
        where = torch.topk(flat.abs(), size).indices.sort().values
        tensors[f"{_PREFIX}{module}.shira_weight"] = flat[where] * scale
        rows, columns = where // delta.shape[1], where % delta.shape[1]
        tensors[f"{_PREFIX}{module}.shira_indices"] = torch.stack([rows, columns]).to(torch.int32)
        energies[name] = float(flat.double().square().sum())
        kept[name] = float(flat[where].double().square().sum()) / energies[name] if energies[name] else 1.0
        targets.append(module)
    total = sum(energies.values())
    config = {
        "peft_type": "SHIRA",
        "task_type": _TASK_TYPES.get(str(facts.get("task"))),
        "base_model_name_or_path": facts.get("model"),
        "revision": facts.get("revision"),
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",
        "target_modules": targets,
        "auto_mapping": _auto_mapping(facts),
    }
    energy = sum(kept[n] * energies[n] for n in deltas) / total if total else 1.0
    return Adapter("shira", tensors, config, energy, kept)


def dense(
    deltas: Mapping[str, Tensor], layouts: Mapping[str, Layout], *, scale: float, facts: Mapping[str, Any]
) -> Adapter:
    """The whole delta, for `ParameterDirection.from_pretrained`.

    Raises:
        ValueError: if the scale is 0 or not finite.
    """
    scale = check_scale(scale)
    config = {
        "format_version": FORMAT_VERSION,
        "library_name": "hf_npeff",
        "kind": "delta",
        "base_model_name_or_path": facts.get("model"),
        "revision": facts.get("revision"),
        "scale": scale,
        "layouts": dict(layouts),
        "info": dict(facts),
    }
    return Adapter("delta", {name: value.float() * scale for name, value in deltas.items()}, config, 1.0)


def load_delta(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """{parameter name: ΔW} and the config of a dense delta's folder.

    Raises:
        CorruptStoreError: if a file is missing, altered or foreign.
        FormatVersionError: if another version of the format wrote it.
    """
    folder = Path(directory)
    path = folder / _WEIGHTS
    if read_json(folder / "adapter_config.json", None).get("kind") != "delta":
        raise CorruptStoreError(f"{folder} does not hold a dense delta; PEFT's adapters load with PeftModel")
    config = read_json(folder / "adapter_config.json")
    if not path.is_file() or sha256_of(path) != config.get("sha256"):
        raise CorruptStoreError(f"{path} is missing or not what was written")
    return read_tensors(path), config
