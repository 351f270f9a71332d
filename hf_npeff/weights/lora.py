"""LoRA adapters: the best low-rank approximation of every weight's delta, with the names that PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_npeff.config import check_scale
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.weights.adapter_folder import PREFIX
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.layouts import Layout, place_of_experts
from hf_npeff.weights.peft_config import check_rank, peft_config, retained

MATRICES = ("linear", "conv1d", "embedding")
"""Layouts that get two factors."""
_EXACT_SVD = 1024
"""The SVD is exact if the smaller side is at most this. Chosen: seconds at most, on a CPU."""


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B (out, rank) and A (rank, in) with BA the best approximation of a matrix, and the share of ‖·‖² that it keeps.

    Exact for small matrices; randomised (Halko et al. 2011) with a fixed seed for large ones.
    """
    wide = matrix.float()
    if min(wide.shape) <= _EXACT_SVD:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Eight directions more than are kept (Halko et al.: 5 to 10); four rounds for spectra that fall slowly.
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
    info: Mapping[str, Any],
    absolute: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """A LoRA adapter by truncated SVD of every weight's delta.

    Args:
        deltas: {parameter name: ΔW}, shaped like the parameters.
        layouts: the layout of every parameter.
        rank: the rank of every module; smaller matrices are padded with zeros.
        scale: a factor for the deltas.
        info: `model`, `revision` and `task`.
        absolute: the weights of norms in the model, because PEFT stores their new values.

    Raises:
        ValueError: if the rank is larger than that of every matrix, the scale is 0 or not finite, or there is a bias
            without the weight of its module.
        UnsupportedModelError: if LoRA does not support a parameter.
    """
    scale = check_scale(scale)
    check_rank(rank)
    if other := [name for name in deltas if layouts[name] == "other"]:
        raise UnsupportedModelError(
            f"LoRA does not support the parameter {other[0]}: it is no weight, bias or norm that only its own module "
            "uses; use kind='delta'"
        )
    matrices = [n for n in deltas if layouts[n] in MATRICES]
    fused = [n for n in deltas if layouts[n] in ("experts", "experts-transposed")]
    largest = max((min(deltas[n].shape[-2:]) for n in (*matrices, *fused)), default=0)
    if rank > largest:
        raise ValueError(f"rank={rank} is more than the rank of any of the matrices; use at most {largest}")
    kept = dict.fromkeys(deltas, 1.0)
    factors = {}
    for name in matrices:
        B, A, kept[name] = low_rank(deltas[name].mT if layouts[name] == "conv1d" else deltas[name], rank)
        factors[name] = B, A
    experts = {}
    for name in fused:
        stacked = deltas[name] if layouts[name] == "experts" else deltas[name].mT
        experts[name], kept[name] = _lora_of_experts(stacked, rank, scale)
    vectors = {name: delta for name, delta in deltas.items() if name not in factors and name not in experts}
    kept_of = retained(deltas, kept), kept
    return assembled(
        factors,
        vectors,
        layouts,
        rank=rank,
        scale=scale,
        info=info,
        retained=kept_of,
        absolute=absolute,
        experts=experts,
    )


def assembled(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    vectors: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    *,
    rank: int,
    scale: float,
    info: Mapping[str, Any],
    retained: tuple[float, dict[str, float]],
    absolute: Mapping[str, Tensor] | None = None,
    experts: Mapping[str, dict[str, Tensor]] | None = None,
) -> Adapter:
    """A LoRA adapter from given factors.

    Args:
        factors: {weight: (B (out, q), A (q, in))} with BA its change (out, in), and q ≤ rank.
        vectors: {parameter: change} of biases and norms.
        layouts: the layout of every parameter.
        rank: the rank of every module; smaller factors are padded with zeros.
        scale: a factor for the changes.
        info: `model`, `revision` and `task`.
        retained: the share of the squared norm of the change that the factors keep, in total and by weight.
        absolute: the weights of norms in the model, because PEFT stores their new values.
        experts: {weight of fused experts: its scaled factors with PEFT's names}.

    Raises:
        ValueError: if there is a bias without the weight of its module, or a norm without its weight in the model.
        UnsupportedModelError: if LoRA does not support a parameter.
    """
    tensors: dict[str, Tensor] = {}
    targets = []
    for name, (B, A) in factors.items():
        module = name.rpartition(".")[0]
        for place in (info.get("tied") or {}).get(name, [module]):  # a tied weight changes in all of its modules
            embeds = place in (info.get("tied_embeddings") or ())
            embeds = embeds or (place == module and layouts[name] == "embedding")
            pair = _lora_pair(_padded(B, rank, 1), _padded(A, rank, 0), scale, embeds)
            tensors |= {f"{PREFIX}{place}.{key}": value.clone() for key, value in pair.items()}
            targets.append(place)
    for name, pair in (experts or {}).items():
        tensors |= {f"{PREFIX}{place_of_experts(name, layouts)}.{key}": value for key, value in pair.items()}
    biases, norms = _biases_and_norms(vectors, layouts, scale, absolute or {})
    tensors |= {f"{PREFIX}{name}": value for name, value in norms.items()}
    saved = [name.rpartition(".")[0] for name in norms]
    if experts and biases:
        raise UnsupportedModelError(
            f"PEFT does not support a bias together with fused experts ({next(iter(experts))}); use kind='delta'"
        )
    tensors |= _lora_biases(biases, targets, saved, tensors)
    config = {
        **peft_config("LORA", info, rank, targets),
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(biases),
        "fan_in_fan_out": any(layouts[n] == "conv1d" for n in layouts),
        "modules_to_save": saved or None,
        "use_rslora": False,
    }
    if experts:
        config["target_parameters"] = list(experts)
    return Adapter("lora", tensors, config, retained[0], dict(layouts), retained[1])


def _biases_and_norms(
    vectors: Mapping[str, Tensor], layouts: Mapping[str, Layout], scale: float, absolute: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{module: the change of its bias}, and {norm's weight: its new value}.

    Raises:
        ValueError: if the present value of a norm is not known.
        UnsupportedModelError: if a parameter is neither.
    """
    biases, norms = {}, {}
    for name, delta in vectors.items():
        if layouts[name] == "bias":
            biases[name.rpartition(".")[0]] = delta * scale
        elif layouts[name] != "norm":
            raise UnsupportedModelError(f"LoRA does not support the parameter {name}; use kind='delta'")
        elif name not in absolute:
            raise ValueError(f"PEFT stores the new value of {name}: pass the model to to_adapter(model=...)")
        else:
            norms[name] = absolute[name].float() + scale * delta.float()
    return biases, norms


def _lora_pair(B: Tensor, A: Tensor, scale: float, embeds: bool) -> dict[str, Tensor]:
    """The factors of ΔW = BA (out, in) with PEFT's names; for an embedding ΔW, shaped like its weight, is (BA)ᵀ.

    Args:
        B: (out, rank).
        A: (rank, in).
        scale: a factor for the delta.
        embeds: whether the weight is an embedding's.
    """
    if embeds:
        return {"lora_embedding_A": B.mT.contiguous(), "lora_embedding_B": A.mT.contiguous() * scale}
    return {"lora_A.weight": A, "lora_B.weight": B * scale}


def _lora_of_experts(delta: Tensor, rank: int, scale: float) -> tuple[dict[str, Tensor], float]:
    """The best factors of ΔW_e (E, out, in) for each expert, and the share of ‖·‖² that they keep.

    They have the layout of PEFT's `ParamWrapper`: A (E·rank, in) by expert, B (out, rank·E) by direction.
    """
    parts = [low_rank(each, rank) for each in delta]
    A = torch.cat([_padded(A, rank, 0) for _, A, _ in parts])
    B = torch.stack([_padded(B, rank, 1) for B, _, _ in parts], -1).flatten(1)
    energies = [float(each.double().square().sum()) for each in delta]
    kept = sum(share * energy for (_, _, share), energy in zip(parts, energies, strict=True))
    return {"lora_A.weight": A, "lora_B.weight": B * scale}, kept / sum(energies) if any(energies) else 1.0


def _lora_biases(
    biases: Mapping[str, Tensor], targets: Sequence[str], saved: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The biases {module: delta} with PEFT's names; if there is one, every target gets one.

    Raises:
        ValueError: if there is a bias without the weight of its module.
    """
    if alone := [module for module in biases if module not in targets and module not in saved]:
        raise ValueError(f"the bias {alone[0]}.bias needs its module's weight in the direction; use kind='delta'")
    padded = {}
    for module in targets if biases else ():
        out = tensors.get(f"{PREFIX}{module}.lora_B.weight")
        if module in biases or out is not None:
            zero = torch.zeros(0 if out is None else len(out))
            padded[f"{PREFIX}{module}.lora_B.bias"] = biases.get(module, zero)
    return padded
