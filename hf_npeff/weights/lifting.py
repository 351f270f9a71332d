"""Lifting: from a component in the sketch to a direction in the parameters.

At a stationary point of the objective, with M = (WᵀW)∘(GGᵀ) and C_j = Σ_i Σ_c W_ij ⟨A_ic, g_j⟩ A_ic,

    ∂L/∂G = 0  ⇔  M G = C  ⇔  G = M⁻¹ C:    g_j = Σ_ic coef_jic A_ic,   coef_jic = Σ_l (M⁻¹)_jl W_il ⟨A_ic, g_l⟩

Every component is a known combination of PEF rows, and the same combination of the rows before the sketch is the
component in parameter space. Row ic is the gradient for the cotangent v_ic, and gradients are linear in it: one
backward pass with Σ_c coef_jic v_ic at every example gives it. Rows were scaled by 1/√‖F_i‖, and then weighted as
`mixing_of` says (balance, power, unit norm). The coefficients undo that, so they apply to unscaled rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from hf_npeff.config import LiftRequest
from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.decomposition.objective import alignments
from hf_npeff.decomposition.weighting import balanced, mixing_of
from hf_npeff.fisher.forward import ForwardPass
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.compressed_sensing import sparse_preimage
from hf_npeff.weights.decomposed import Decomposed, check_decomposed
from hf_npeff.weights.exact_lifting import lift_exact
from hf_npeff.weights.plans import Plan, made_selective

logger = logging.getLogger(__name__)
_FAITHFUL = 0.9
"""If the cosine of a lifted direction's sketch with its component is below this, there is a warning. Chosen: exact
lifting with the model that made the rows gives 1 up to rounding; no result depends on the value."""
_CONVERGED = 0.8
"""If the cosine of a component with the combination of rows that represents it is below this, lifting raises an error.
Chosen: it is 1 at a stationary point, and nearly 1 for a fit that stopped at its tolerance."""
_SAME_MODEL = 0.5
"""If the cosine of `_FAITHFUL` is below this, the weights must be those of another model. Chosen: half-way between 1
and 0, because gradients of other weights are nearly orthogonal to the component."""


@dataclass(frozen=True)
class Lifted:
    """One component in parameter space: {parameter: matrix (out, in)}, of unit norm, and how it was made."""

    deltas: dict[str, Tensor]
    info: dict[str, Any]


def plan(
    decomposition: Decomposition,
    wanted: Sequence[int],
    pefs: PEFs,
    request: LiftRequest,
    device: torch.device | None = None,
) -> list[Plan]:
    """The part of lifting that needs no model.

    Args:
        decomposition: the decomposition of `pefs`.
        wanted: the components to lift.
        pefs: the PEFs that were decomposed.
        request: method and form.
        device: the device for solving for selective directions; None uses that of the rows.

    Raises:
        ValueError: if the decomposition is far from a stationary point, the rows were not made by hf_npeff, or a
            selective direction is wanted and there are no examples to leave alone.
        IncompatibleSketchError: if the PEFs have another sketch.
    """
    scales = decomposition.scales
    if request.form == "metric" and scales is None:
        raise ValueError("form='metric' needs a balanced decomposition (balance='module'); this one is not")
    check_decomposed(decomposition, pefs)
    mixtures = _mixtures(decomposition, wanted, request.semi_orthogonal)
    targets = normalize(mixtures @ decomposition.pseudo_fishers.double(), dim=1)
    descriptions: list[dict[str, Any]] = [
        {"component": j, "method": request.method, "semi_orthogonal": request.semi_orthogonal} for j in wanted
    ]
    if request.method != "exact":
        return [Plan(j, g, None, info) for j, g, info in zip(wanted, targets, descriptions, strict=True)]
    rows = _combined_rows(decomposition, wanted, mixtures, pefs, request, descriptions)
    plans = [Plan(*parts) for parts in zip(wanted, targets, rows, descriptions, strict=True)]
    if request.may_be_selective:
        metric = scales if request.form != "plain" else None
        return made_selective(decomposition, plans, pefs, request, metric, device)
    return plans


def lift_components(
    forward: ForwardPass, decomposed: Decomposed, plans: Sequence[Plan], request: LiftRequest
) -> list[Lifted]:
    """Components in parameter space.

    Args:
        forward: the forward pass of the model that made the rows.
        decomposed: the decomposition with its PEFs and examples.
        plans: the plans that `plan` made.
        request: method and form.

    Raises:
        ValueError: if the model's gradients do not add up to a component, because its weights are different.
    """
    scales, sketch = decomposed.decomposition.scales, decomposed.sketch()
    if request.method == "exact":
        rows = torch.stack([p.coefficients for p in plans if p.coefficients is not None])
        directions = lift_exact(forward, decomposed.examples, decomposed.cotangents(), rows, request.batch_size)
    else:
        directions = [_from_sketch(sketch, unbalanced(p.target, scales).float(), request) for p in plans]
    # Measured: the metric form was more selective for 5 of 6 components of a small model and 3 of 3 of SmolLM2.
    metric = request.form != "plain" and scales is not None
    lifted = []
    for deltas, planned in zip(directions, plans, strict=True):
        info = planned.info | {
            "estimated_cosine": _sketched_cosine(deltas, planned.target, sketch, scales),
            "form": "metric" if metric else "plain",
        }
        if request.method == "exact":
            check_faithful(info, info["estimated_cosine"])
        scale_to_unit(in_metric(deltas, sketch, scales) if metric else deltas)
        lifted.append(Lifted(deltas, info))
    return lifted


def lift_combination(
    forward: ForwardPass,
    pefs: PEFs,
    examples: Sequence[Example],
    coefficients: Tensor,
    aim: Tensor,
    sketch: Sketch,
    batch_size: int,
) -> tuple[dict[str, Tensor], float]:
    """One combination of unscaled rows in parameter space, with its own length.

    Args:
        forward: the forward pass of the model that made the rows.
        pefs: the PEFs.
        examples: the examples of the PEFs, in their order.
        coefficients: the coefficients (n, c) of the combination.
        aim: (d,), the same combination of the sketched rows.
        sketch: the sketch of the PEFs.
        batch_size: the number of examples in a forward pass.

    Returns:
        {parameter: matrix (out, in)}, and the cosine of its sketch with `aim`.

    Raises:
        ValueError: if the rows were not made by hf_npeff, or the model's gradients do not add up to `aim`.
    """
    if pefs.cotangents is None:
        raise ValueError(
            "these PEFs have no cotangents (their rows were not made by hf_npeff), so they cannot be lifted"
        )
    (deltas,) = lift_exact(forward, examples, pefs.cotangents, coefficients[None], batch_size)
    largest = float(coefficients.abs().max())  # by which lift_exact divides
    for value in deltas.values():
        value.mul_(largest)
    cosine = _sketched_cosine(deltas, aim, sketch, None)
    if cosine < _SAME_MODEL:
        raise ValueError(
            f"the gradients of this model do not add up to the change (cosine {cosine:.3f}), so its weights are not "
            "those with which the PEFs were computed; load the model of the PEFs"
        )
    return deltas, cosine


def _combined_rows(
    decomposition: Decomposition,
    wanted: Sequence[int],
    mixtures: Tensor,
    pefs: PEFs,
    request: LiftRequest,
    descriptions: Sequence[dict[str, Any]],
) -> Tensor:
    """Coefficients (m, n, c) of exact lifting; also adds to the info how much of the combinations is kept."""
    if pefs.cotangents is None:
        raise ValueError("these PEFs have no cotangents (their rows were not made by hf_npeff); use method='adjoint'")
    coefficients, cosines = combination(decomposition, pefs)
    _check_stationary(wanted, cosines)
    rows = torch.einsum("mr,rnc->mnc", mixtures, coefficients)
    if request.top_examples is not None:
        shares = _keep_top_rows(rows, decomposition, wanted, pefs, request.top_examples)
        for info, share in zip(descriptions, shares, strict=True):
            info |= {"top_examples": request.top_examples, "weight_share": share}
    return rows


def _from_sketch(sketch: Sketch, g: Tensor, request: LiftRequest) -> dict[str, Tensor]:
    if request.method == "compressed_sensing" and sketch.adds_entries:
        logger.warning(
            "a %s sketch adds entries of the weights up, so compressed sensing cannot find out which of them are "
            "nonzero; use PEFs with sketch='kronecker', or method='exact', which works with any sketch",
            sketch.kind,
        )
    return sketch.adjoint(g) if request.method == "adjoint" else sparse_preimage(sketch, g, request.solver)


def check_faithful(info: Mapping[str, Any], cosine: float) -> None:
    """Check that a direction's sketch is the component; warn if it is only roughly so.

    Args:
        info: the information on the lifted component.
        cosine: the cosine between the direction's sketch and the component; for a part of the direction, over the
            cosine that this part should have.

    Raises:
        ValueError: if the cosine is far too small.
    """
    component = info["component"]
    if "top_examples" not in info and cosine < _SAME_MODEL:
        raise ValueError(
            f"the gradients of this model do not add up to component {component} (cosine {cosine:.3f}), so its weights "
            "are not those with which the PEFs were computed; load the model of the PEFs"
        )
    if cosine < _FAITHFUL:
        logger.warning(
            "component %d: the sketch of the lifted direction has a cosine of only %.3f with the component",
            component,
            cosine,
        )


def _mixtures(decomposition: Decomposition, wanted: Sequence[int], apart: bool) -> Tensor:
    """The lifted directions as combinations of components (m, r), float64."""
    mixtures = torch.zeros(len(wanted), len(decomposition), dtype=torch.float64)
    for row, j in enumerate(wanted):
        mixtures[row] = semi_orthogonal(decomposition, j) if apart else 0
        mixtures[row, j] = 1
    return mixtures


def _check_stationary(wanted: Sequence[int], cosines: Tensor) -> None:
    if bad := [j for j in wanted if cosines[j] < _CONVERGED]:
        raise ValueError(
            f"the components {bad} are not at a stationary point (cosine {float(cosines[bad[0]]):.2f} with the "
            "combination of rows that represents them); decompose with larger max_iterations or a smaller tolerance"
        )


def _keep_top_rows(
    rows: Tensor, decomposition: Decomposition, wanted: Sequence[int], pefs: PEFs, k: int
) -> Iterator[float]:
    """Restrict combinations (m, n, c) to each component's k top examples, in place; return the kept share of weight."""
    norms = pefs.norms.double().sqrt()[:, None]
    for row, j in enumerate(wanted):
        kept, share = keep_top(rows[row] * norms, decomposition.coefficients[:, j], k)
        rows[row] = kept / norms.clamp_min(1e-300)  # of zero PEFs, whose rows are zero
        yield share


def _sketched_cosine(deltas: Mapping[str, Tensor], g: Tensor, sketch: Sketch, scales: Tensor | None) -> float:
    """The cosine between the sketch of a direction, of any length, and its component g (d,)."""
    sketched = sketch.apply({name: deltas[name][None] for name in sketch.shapes})[0].double()
    sketched = sketched if scales is None else sketched * scales
    norm = float(sketched.norm() * g.norm())  # no ε: gradients may be as small as 1e-20
    return float(sketched @ g) / norm if norm > 0 else 0.0


def scale_to_unit(deltas: Mapping[str, Tensor]) -> None:
    """Scale all parameters together to unit norm, in place; zero stays zero."""
    norm = sum(float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2 for v in deltas.values()) ** 0.5
    for value in deltas.values():
        value.div_(norm or 1.0)


def combination(decomposition: Decomposition, pefs: PEFs) -> tuple[Tensor, Tensor]:
    """Every component as a combination of PEF rows.

    Args:
        decomposition: a decomposition with W and G at, or near, a stationary point.
        pefs: the PEFs that it was fitted on, in the same order.

    Returns:
        coefficients (r, n, c) of the *unscaled* rows, and the cosine (r,) of every combination, in the sketch, with
        its component: 1 at a stationary point.

    Raises:
        IncompatibleSketchError: if the PEFs have another sketch.
        ValueError: if they are of other examples.
    """
    check_decomposed(decomposition, pefs)
    W, G = decomposition.coefficients.double(), decomposition.pseudo_fishers.double()
    # Below the tolerance, in float64, a component is a combination of others.
    M_inverse = torch.linalg.pinv((W.T @ W) * (G @ G.T), hermitian=True, rtol=1e-10)
    coefficients, combined = [], torch.zeros_like(G)
    for here, chunk in pefs.placed_chunks(256):  # bounds the memory
        raw = chunk.factors.to(torch.promote_types(chunk.factors.dtype, torch.float32))
        A = balanced(raw, decomposition.scales, decomposition.config.power)
        B = alignments(A, decomposition.pseudo_fishers.to(A.dtype)).double()
        mixed = torch.einsum("jl,il,icl->jic", M_inverse, W[here], B)
        combined += mixed.flatten(1) @ A.double().flatten(0, 1)
        mixed = torch.einsum("jia,iac->jic", mixed, mixing_of(raw, decomposition.scales, decomposition.config.power))
        norms = chunk.norms.double()
        coefficients.append(mixed * torch.where(norms > 0, norms, 1.0).rsqrt()[None, :, None])
    cosines = cosine_similarity(combined, G, dim=1)
    return torch.cat(coefficients, 1), cosines


def semi_orthogonal(decomposition: Decomposition, j: int, limit: float = 0.3) -> Tensor:
    """g_j minus its projection on the components that are nearly orthogonal to it, as a combination (r,) of components.

    Components with |cosine| ≥ `limit` to g_j have a similar meaning and are not subtracted.
    """
    G = decomposition.pseudo_fishers.double()
    others = [l for l in range(len(G)) if l != j and abs(float(G[l] @ G[j])) < limit]
    weights = torch.zeros(len(G), dtype=torch.float64)
    weights[j] = 1
    if others:
        weights[others] = -torch.linalg.lstsq(G[others].T, G[j][:, None]).solution[:, 0]
    return weights


def keep_top(coefficients: Tensor, scores: Tensor, k: int) -> tuple[Tensor, float]:
    """A combination (n, c) restricted to the k examples with the largest scores, and their share of its weight.

    The weight of an example is Σ_c coef², with coefficients of unit rows (those of unscaled rows times their norms).
    """
    chosen = torch.argsort(scores, descending=True)[:k].tolist()
    total = float(coefficients.square().sum())
    kept = torch.zeros_like(coefficients)
    kept[chosen] = coefficients[chosen]
    return kept, float(kept.square().sum()) / total if total else 1.0


def unbalanced(g: Tensor, scales: Tensor | None) -> Tensor:
    """A component in the coordinates of the unscaled sketch: x with g = x∘D; 0 for a block that was left out."""
    if scales is None:
        return g
    # not used where a scale is 0, but must not be NaN
    return torch.where(scales > 0, g / scales.to(g.dtype).clamp_min(1e-30), 0.0)


def in_metric(deltas: dict[str, Tensor], sketch: Sketch, scales: Tensor | None) -> dict[str, Tensor]:
    """The plain combination times D² block by block, in place: steepest in the metric of the balanced problem."""
    if scales is None or sketch.blocks is None:
        return deltas
    return {name: value.mul_(float(scales[sketch.blocks[name].start]) ** 2) for name, value in deltas.items()}


def select(decomposition: Decomposition, components: int | Sequence[int]) -> list[int]:
    """Component numbers, checked.

    Raises:
        IndexError: if one does not exist.
        ValueError: if no component is named, or the first argument is not a decomposition.
    """
    if not isinstance(decomposition, Decomposition):
        raise ValueError(f"expected a Decomposition first, but got {type(decomposition).__name__}")
    wanted: list[Any] = list(components) if isinstance(components, Iterable) else [components]
    if not wanted:
        raise ValueError("no components are named")
    return [decomposition.index_of(j) for j in wanted]


def align(examples: Sequence[Example], ids: Sequence[str], contents: Sequence[str] | None) -> list[Example]:
    """The examples in the order of `ids`, after checking that their contents are those that were analysed.

    If ids are positions, another order of the data set gives them to other examples; the examples are then found by
    their contents.

    Raises:
        ValueError: if an example is missing, or its content has changed.
    """
    by_id = {example.id: example for example in examples}
    positions = list(by_id) == [str(i) for i in range(len(by_id))]
    if contents is not None and positions and len(set(contents)) == len(contents):
        by_content = {example.content: example for example in examples}
        if all(content in by_content for content in contents):
            return [replace(by_content[content], id=i) for i, content in zip(ids, contents, strict=True)]
    if missing := [i for i in ids if i not in by_id]:
        raise ValueError(
            f"{len(missing)} of {len(ids)} analysed examples are not in this dataset, for instance {missing[:3]}; give "
            "the dataset that the PEFs came from"
        )
    if contents is not None:
        changed = [i for i, content in zip(ids, contents, strict=True) if by_id[i].content != content]
        if changed:
            raise ValueError(
                f"{len(changed)} of {len(ids)} examples have a different content than when they were analysed, for "
                f"instance {changed[:3]}; pass the dataset of the PEFs, with the same processing class"
            )
    return [by_id[i] for i in ids]
