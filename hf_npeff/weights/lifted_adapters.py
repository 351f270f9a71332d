"""Components as low-rank adapters, all of them from one pass over the data, each a folder that PEFT loads."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hf_npeff.config import LiftRequest
from hf_npeff.errors import CorruptStoreError
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.processes import Processes
from hf_npeff.progress import working
from hf_npeff.sharing.files import read_json, read_tensors, sha256_of, write_json
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.decomposed import Decomposed
from hf_npeff.weights.fewer_cotangents import ESTIMATED, ROUNDING, with_fewer_cotangents
from hf_npeff.weights.layouts import Layout
from hf_npeff.weights.lifting import check_faithful
from hf_npeff.weights.lora import MATRICES, assembled
from hf_npeff.weights.low_rank import Rows, is_whole, lift_low_rank, mixture_of
from hf_npeff.weights.plans import Plan
from hf_npeff.weights.thin_sums import Cut

logger = logging.getLogger(__name__)
RECORD = "lifted.json"
"""The file in a component's folder that says what it was lifted from, so that a run continues where it stopped."""


@dataclass(frozen=True)
class LiftedWeights:
    """Information on the parameters that adapters change.

    Attributes:
        layouts: the layout of every parameter.
        sizes: the shape of every parameter.
        absolute: the current weights of norms, because PEFT stores their new values.
        info: information on the model, as in a direction's `info`.
    """

    layouts: dict[str, Layout]
    sizes: dict[str, tuple[int, ...]]
    absolute: dict[str, Tensor]
    info: dict[str, Any]


def folder_of(output_dir: Path, component: int) -> Path:
    """The folder of a component's adapter."""
    return output_dir / f"component-{component}"


def lift_to_adapters(
    forward: ForwardPass,
    decomposed: Decomposed,
    plans: Sequence[Plan],
    request: LiftRequest,
    changed: LiftedWeights,
    *,
    of_run: Sequence[Plan],
    rank: int,
    passes: int,
    processes: Processes,
) -> Iterator[Adapter]:
    """Components as LoRA adapters of their unit directions, from one pass over the examples.

    Args:
        forward: the forward pass of the model that made the rows.
        decomposed: the decomposition with its PEFs and examples.
        plans: the plans of the components, with coefficients.
        request: form and batch size.
        changed: the weights that adapters change.
        of_run: the plans of all components of a run, including those already lifted. The bases for low rank depend on
            all of them, so a resumed run gives the same result.
        rank: the rank for every weight.
        passes: 2 measures the leading directions again, exactly.
        processes: the processes that share the examples.

    Yields:
        The adapter of each plan, in order.

    Raises:
        ValueError: if the model's gradients do not add up to a component, because its weights are different.
    """
    everything = torch.stack([p.coefficients for p in of_run if p.coefficients is not None])
    whole = all(is_whole(shape, rank) for shape in forward.shapes.values())
    cotangents, everything = with_fewer_cotangents(
        decomposed.pefs, decomposed.cotangents(), everything, ROUNDING if whole else ESTIMATED
    )
    place = {p.component: i for i, p in enumerate(of_run)}
    stacked = everything[[place[p.component] for p in plans]]
    # Gradients keep their precision, whatever the size of norms, when the largest coefficient is 1; scale is free.
    stacked = stacked / stacked.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    of_examples = (decomposed.examples, cotangents, stacked)
    rows = Rows(forward, *of_examples, mixture_of(everything), request.batch_size, processes)
    label = f"lifting {len(plans)} components to rank {rank}"
    with working(label, passes * len(processes.share(len(rows.used)))):
        cuts = lift_low_rank(rows, rank, passes=passes)
    sketch, scales = decomposed.sketch(), decomposed.decomposition.scales
    metric = request.form != "plain" and scales is not None and sketch.blocks is not None
    for number, p in enumerate(plans):
        parts = {name: _Part.of(cut, number) for name, cut in cuts.items()}
        cosine = _cosine(parts, p.target, sketch, scales)
        info = p.info | {"estimated_cosine": cosine, "form": "metric" if metric else "plain", "passes": passes}
        info["retained_energy"] = "exact" if whole else "estimated"
        if metric:
            assert scales is not None and sketch.blocks is not None
            parts = {n: part.times(float(scales[sketch.blocks[n].start]) ** 2) for n, part in parts.items()}
        kept, total = (sum(values) for values in zip(*((q.kept, q.energy) for q in parts.values()), strict=True))
        check_faithful(info, cosine / max(kept / total, 1e-12) ** 0.5 if total > 0 else 0.0)
        yield _adapter(parts, total**0.5, changed, rank, info)


@dataclass(frozen=True)
class _Part:
    """One weight's share of one component: BA, and its squared norms.

    Attributes:
        left: B (out, q).
        right: A (q, in).
        kept: ‖BA‖².
        energy: ‖D‖² of the whole, at least `kept`.
    """

    left: Tensor
    right: Tensor
    kept: float
    energy: float

    @classmethod
    def of(cls, cut: Cut, number: int) -> _Part:
        """The part of one component, from the cuts of all components."""
        values = cut.values[number].cpu()
        kept = float(values.double().square().sum())
        root = values.sqrt()
        left, right = cut.left[number].cpu() * root, (cut.right[number].cpu() * root).mT
        return cls(left.contiguous(), right.contiguous(), kept, max(float(cut.energy[number]), kept))

    def times(self, factor: float) -> _Part:
        """Scaled."""
        return _Part(self.left * factor, self.right, self.kept * factor**2, self.energy * factor**2)


def _cosine(parts: Mapping[str, _Part], target: Tensor, sketch: Sketch, scales: Tensor | None) -> float:
    """The cosine between the sketch of a component's cut and the component."""
    largest = max((float(part.left.abs().max()) for part in parts.values()), default=0.0) or 1.0
    sketched = sketch.apply_factors({n: (p.left / largest, p.right / largest) for n, p in parts.items()}).double()
    sketched = sketched if scales is None else sketched * scales
    norm = float(sketched.norm() * target.norm())
    return float(sketched @ target) / norm if norm > 0 else 0.0


def _adapter(
    parts: Mapping[str, _Part], norm: float, weights: LiftedWeights, rank: int, own: Mapping[str, Any]
) -> Adapter:
    """A component's LoRA, cut from its unit direction."""
    factors, vectors, kept = {}, {}, {}
    for name, part in parts.items():
        layout = weights.layouts[name]
        kept[name] = part.kept / part.energy if part.energy > 0 else 1.0
        left = part.left / (norm or 1.0)
        if layout in MATRICES:
            factors[name] = left, part.right
        else:
            vectors[name] = (left @ part.right).reshape(weights.sizes[name])
            kept[name] = 1.0
    total = sum(part.energy for part in parts.values())
    share = sum(kept[name] * part.energy for name, part in parts.items()) / total if total > 0 else 1.0
    info = {**weights.info, **own}
    adapter = assembled(
        factors,
        vectors,
        weights.layouts,
        rank=rank,
        scale=1.0,
        info=info,
        retained=(share, kept),
        absolute=weights.absolute,
    )
    return replace(adapter, info=info)


# On disk


def settings_hash(plan: Plan, settings: Mapping[str, Any]) -> str:
    """A hash that identifies the lifting of a component: its combination of rows, and how it is truncated."""
    assert plan.coefficients is not None
    digest = hashlib.sha256(plan.coefficients.double().contiguous().numpy().tobytes())
    digest.update(repr(sorted(settings.items())).encode())
    return digest.hexdigest()


def save_lifted(adapter: Adapter, folder: Path, settings: str) -> None:
    """Write an adapter in PEFT's format and, last, the record that identifies it."""
    (folder / RECORD).unlink(missing_ok=True)
    adapter.save_pretrained(folder)
    record = {
        "format_version": 1,
        "settings": settings,
        "sha256": sha256_of(folder / "adapter_model.safetensors"),
        "retained_energy": adapter.retained_energy,
        "retained_by_weight": adapter.retained_by_weight,
        "layouts": adapter.layouts,
        "info": adapter.info,
    }
    write_json(folder / RECORD, record)


def load_lifted(folder: Path, settings: str | None = None) -> Adapter | None:
    """An adapter that `save_lifted` wrote; None if there is no finished one.

    Args:
        folder: the component's folder.
        settings: the hash that it must have been lifted with.

    Raises:
        CorruptStoreError: if files are altered.
        ValueError: if the adapter was lifted from something else, or in another way.
    """
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    if settings is not None and record.get("settings") != settings:
        raise ValueError(
            f"{folder} has an adapter that was lifted from other PEFs or in another way; use another folder, or remove "
            "it"
        )
    path = folder / "adapter_model.safetensors"
    if not path.is_file() or sha256_of(path) != record.get("sha256"):
        raise CorruptStoreError(f"{path} is missing or was altered; remove the folder and lift again")
    try:
        tensors, info = read_tensors(path), dict(record["info"])
        config = read_json(folder / "adapter_config.json", None)
        made = Adapter(
            "lora", tensors, config, float(record["retained_energy"]), dict(record["layouts"]),
            dict(record["retained_by_weight"]), info=info,
        )  # fmt: skip
        made.factors()
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CorruptStoreError(f"{folder / RECORD} is not the record of an adapter: {error!r}") from error
    return made
