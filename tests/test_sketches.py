"""The sketch P: linear, seeded, unbiased, with an adjoint that is one, and the same wherever it is made."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hf_npeff.errors import FormatVersionError
from hf_npeff.pefs import sketches
from hf_npeff.pefs.sides import FoldedSide
from hf_npeff.pefs.sketches import Sketch, _shifted_sum
from tests import reference

SHAPES = {"a.weight": (6, 5), "b.weight": (3, 9), "c.weight": (2, 2)}
KINDS = [("kronecker", 3), ("countsketch", 7), ("countsketch", 200), ("two-stage", 11), ("identity", None)]
P = sum(a * b for a, b in SHAPES.values())
OF_ROTATIONS = "78afbb81e70694ea096d9b9ae3296b32"
ROW_OF_ROTATIONS = [-7.22, -8.92, -12.92, 6.19, 20.3, 16.58, -17.32, -18.87, -30.59, -29.28, 21.99]


def split(row: Tensor, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, Tensor]:
    """A row (…, p) → {name: (…, out, in)}."""
    parts = row.split([a * b for a, b in shapes.values()], dim=-1)
    return {
        name: part.reshape(*row.shape[:-1], *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def join(deltas: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in deltas.values()])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_the_adjoint_is_the_transpose(kind: str, dim: int | None) -> None:
    """Oracle: the identity ⟨Pa, b⟩ = ⟨a, Pᵀb⟩ for five random pairs in float64, and P from unit vectors."""
    sketch = Sketch(SHAPES, kind, dim, seed=3)

    def apply(row: Tensor) -> Tensor:
        return sketch.apply(split(row))

    def adjoint(row: Tensor) -> Tensor:
        return join(sketch.adjoint(row))

    for seed in range(5):
        assert reference.adjoint_gap(apply, adjoint, P, sketch.dim, seed=seed) < 1e-12
    forward = reference.dense_matrix(apply, P)
    backward = reference.dense_matrix(adjoint, sketch.dim)
    torch.testing.assert_close(backward, forward.T, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "dim"), [*KINDS[:4], ("two-stage", 40)])
def test_a_sketch_preserves_inner_products_on_average(kind: str, dim: int) -> None:
    """Oracle: statistical, E[PᵀP] = I. 1,500 seeds (300 for two-stage), every entry within 5 standard errors."""
    shapes = {"a": (4, 3), "b": (2, 3)}
    if kind == "two-stage":
        shapes = {"a": (140, 1), "b": (2, 3)}  # a side of 128 does something to the first
    columns = [0, 1, sum(a * b for a, b in shapes.values()) - 1]
    units = torch.eye(sum(a * b for a, b in shapes.values()), dtype=torch.float64)[columns]
    samples = []
    for seed in range(1500 if kind != "two-stage" else 300):
        rows = Sketch(shapes, kind, min(dim, 2) if kind == "kronecker" else dim, seed).apply(split(units, shapes))
        samples.append(rows @ rows.T)
    grams = torch.stack(samples)
    error = (grams.mean(0) - torch.eye(3)).abs()
    standard = grams.std(0) / math.sqrt(len(grams))
    assert (error <= 5 * standard + 1e-6).all(), (error, standard)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_a_sketch_is_linear_and_takes_batches(kind: str, dim: int | None) -> None:
    """Oracle: the identity P(2a − 3b) = 2Pa − 3Pb, and a batch against its examples one by one."""
    sketch = Sketch(SHAPES, kind, dim, seed=1)
    rows = normal(4, P)
    batch = sketch.apply(split(rows))
    singles = torch.stack([sketch.apply(split(row)) for row in rows])
    torch.testing.assert_close(batch, singles, atol=1e-12, rtol=0)
    together = sketch.apply(split(2 * rows[0] - 3 * rows[1]))
    torch.testing.assert_close(together, 2 * batch[0] - 3 * batch[1], atol=1e-11, rtol=0)


def test_identity_keeps_every_number_in_order() -> None:
    """Oracle: the input itself."""
    row = normal(P)
    sketch = Sketch(SHAPES, "identity")
    torch.testing.assert_close(sketch.apply(split(row)), row, atol=0, rtol=0)
    assert sketch.dim == P


def test_kronecker_is_the_kronecker_product_of_its_sides() -> None:
    """Oracle: P_out ∇ P_inᵀ written as (P_out ⊗ P_in) vec(∇), module by module."""
    sketch = Sketch(SHAPES, "kronecker", 3, seed=2)
    row = normal(P)
    out = sketch.apply(split(row))
    for name, value in split(row).items():
        outer = sketch.project_output(name, torch.eye(value.shape[0], dtype=torch.float64)).T
        inner = sketch.project_input(name, torch.eye(value.shape[1], dtype=torch.float64)).T
        expected = torch.kron(outer, inner) @ value.flatten()
        assert sketch.blocks is not None
        torch.testing.assert_close(out[sketch.blocks[name]], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_the_two_halves_make_the_same_rows_as_apply(kind: str, dim: int | None) -> None:
    """Oracle: `apply` on Σ_t δ_t x_tᵀ, for the factored path that hooks take."""
    sketch = Sketch(SHAPES, kind, dim, seed=5)
    x = {name: normal(2, 4, shape[1], seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    delta = {name: normal(2, 4, shape[0], seed=10 + i) for i, (name, shape) in enumerate(SHAPES.items())}
    rows = sketch.new_rows(2, dtype=torch.float64)
    for name in reversed(SHAPES):  # the order of the modules does not matter
        inputs, outputs = sketch.project_input(name, x[name]), sketch.project_output(name, delta[name])
        sketch.add(rows, name, outputs.mT @ inputs)
    expected = sketch.apply({name: delta[name].mT @ x[name] for name in SHAPES})
    torch.testing.assert_close(sketch.finish(rows), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("shape", "at_once", "number"),
    [((6, 5), 1, 1), ((21, 4), 1, 3), ((21, 4), 120, 2), ((4, 28), 1, 4), ((4, 28), 120, 2)],
)
def test_slices_of_a_gradient_add_up_to_the_whole(
    shape: tuple[int, int], at_once: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `add` of the whole gradient, where rows hold whole blocks of d = 14, several of them do, or none."""
    monkeypatch.setattr(sketches, "_AT_ONCE", at_once)
    sketch = Sketch({"w": shape}, "countsketch", 14, seed=5)
    values = normal(2, *shape)
    whole, parts = (sketch.new_rows(2, dtype=torch.float64) for _ in range(2))
    sketch.add(whole, "w", values)
    slices = sketch.slices("w", 2, torch.device("cpu"))
    assert len(slices) == number
    for part in slices:
        sketch.add(parts, "w", values[:, part], part.start)
    torch.testing.assert_close(parts, whole, atol=0, rtol=0)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_a_sketch_is_rebuilt_from_its_description(kind: str, dim: int | None) -> None:
    """Oracle: bitwise equality after a round trip through JSON."""
    sketch = Sketch(SHAPES, kind, dim, seed=9)
    again = Sketch.from_dict(json.loads(json.dumps(sketch.to_dict())))
    row = split(normal(P))
    assert again.fingerprint == sketch.fingerprint
    assert torch.equal(again.apply(row), sketch.apply(row))


def test_a_block_depends_on_its_own_name_shape_and_the_seed_alone() -> None:
    """Oracle: invariance of a module's block under other modules, their order, and the global random state."""
    torch.manual_seed(0)
    first = Sketch(SHAPES, "kronecker", 3, seed=4)
    torch.manual_seed(1)
    second = Sketch({"z.weight": (4, 4), "b.weight": (3, 9), "a.weight": (6, 5)}, "kronecker", 3, seed=4)
    x = normal(5)
    assert torch.equal(first.project_input("a.weight", x), second.project_input("a.weight", x))
    other = Sketch(SHAPES, "kronecker", 3, seed=5)
    assert not torch.equal(first.project_input("a.weight", x), other.project_input("a.weight", x))


def test_making_a_sketch_leaves_the_global_generator_alone() -> None:
    """Oracle: the generator's state before."""
    before = torch.get_rng_state()
    Sketch(SHAPES, "two-stage", 11, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_changes_with_every_ingredient() -> None:
    """Oracle: the fingerprints of eight sketches that differ in one ingredient each are all different."""
    sketches = [
        Sketch(SHAPES, "countsketch", 7, 0),
        Sketch(SHAPES, "countsketch", 7, 1),
        Sketch(SHAPES, "countsketch", 8, 0),
        Sketch(SHAPES, "two-stage", 7, 0),
        Sketch(SHAPES, "kronecker", 7, 0),
        Sketch({**SHAPES, "c.weight": (2, 3)}, "countsketch", 7, 0),
        Sketch({"A.weight" if n == "a.weight" else n: s for n, s in SHAPES.items()}, "countsketch", 7, 0),
        Sketch(dict(reversed(SHAPES.items())), "countsketch", 7, 0),
    ]
    assert len({s.fingerprint for s in sketches}) == len(sketches)
    assert sketches[0].fingerprint == Sketch(SHAPES, "countsketch", 7, 0).fingerprint


def test_another_process_makes_the_same_sketch() -> None:
    """Oracle: the same rows, to the bit, and the same fingerprint from a fresh interpreter."""
    program = (
        "import torch; from hf_npeff.pefs.sketches import Sketch; torch.set_num_threads(1); torch.manual_seed(77)\n"
        f"shapes = {SHAPES!r}\n"
        "for kind, dim in (('kronecker', 3), ('two-stage', 11)):\n"
        "    s = Sketch(shapes, kind, dim, 6)\n"
        "    row = s.apply({n: torch.ones(shape, dtype=torch.float64) for n, shape in shapes.items()})\n"
        "    print(s.fingerprint, *map(float.hex, row.tolist()))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for line, (kind, dim) in zip(ran.stdout.splitlines(), (("kronecker", 3), ("two-stage", 11)), strict=True):
        sketch = Sketch(SHAPES, kind, dim, 6)
        row = sketch.apply({n: torch.ones(shape, dtype=torch.float64) for n, shape in SHAPES.items()})
        assert line.split() == [sketch.fingerprint, *map(float.hex, row.tolist())]


def test_misuse_is_refused() -> None:
    """Oracle: the documented errors."""
    with pytest.raises(ValueError, match="'fourier'"):
        Sketch(SHAPES, "fourier", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_modules"):
        Sketch({}, "identity")
    with pytest.raises(ValueError, match=r"kronecker.*None"):
        Sketch(SHAPES, "kronecker", None)
    sketch = Sketch(SHAPES, "kronecker", 3)
    with pytest.raises(ValueError, match=r"\['a\.weight', 'b\.weight', 'c\.weight'\].*\['a\.weight'\]"):
        sketch.apply({"a.weight": normal(6, 5)})
    with pytest.raises(ValueError, match=r"\(5, 6\)"):
        sketch.apply({**split(normal(P)), "a.weight": normal(5, 6)})
    with pytest.raises(ValueError, match=r"22.*3"):
        sketch.adjoint(normal(3))
    for wrong in ({}, {"kind": "kronecker"}, {**sketch.to_dict(), "shapes": 3}, {**sketch.to_dict(), "kind": "x"}):
        with pytest.raises(FormatVersionError):
            Sketch.from_dict(wrong)


@pytest.mark.parametrize("size", [1, 7, 21, 1000])
def test_many_blocks_a_kernel_give_what_one_block_after_the_other_gives(size: int) -> None:
    """Oracle: the loop that a CPU runs; the way a GPU takes is run here, with a ragged end and rounds of blocks."""
    sketch = Sketch({"w": (1, size)}, "countsketch", 7, 3)
    values = torch.randn(4, 1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = sketch._part("w")
    assert part.signs is not None
    together = _shifted_sum(values.flatten(1), part.signs, part.turns, 7, torch.float64, together=5)
    torch.testing.assert_close(together, sketch.apply({"w": values}), rtol=0, atol=1e-12)


# Sides


@pytest.mark.parametrize(("n", "k"), [(9, 4), (8, 4), (5, 4), (300, 128)])
def test_a_folded_side_is_blocks_with_signs_turned_and_added_up(n: int, k: int) -> None:
    """Oracle: the matrix entry by entry, of the numbers that are drawn; of part of the numbers, the rest being zero."""
    side = FoldedSide(n, k, torch.Generator().manual_seed(1))
    drawn = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (n,), generator=drawn, dtype=torch.int8) * 2 - 1
    turns = torch.randint(0, k, (math.ceil(n / k),), generator=drawn)
    P = torch.zeros(k, n, dtype=torch.float64)
    for i in range(n):
        P[(i % k + turns[i // k]) % k, i] = signs[i]
    x, y = normal(2, 3, n), normal(2, 3, k, seed=1)
    torch.testing.assert_close(side.times(x), x @ P.T)
    torch.testing.assert_close(side.times(x[0, 0]), P @ x[0, 0])
    torch.testing.assert_close(side.adjoint(y), y @ P)
    torch.testing.assert_close(side._dense(x), P.T)  # what a GPU multiplies by
    for start, stop in ((0, 1), (1, n), (n // 2, n - 1)):
        torch.testing.assert_close(side.times(x[..., start:stop], start), x[..., start:stop] @ P[:, start:stop].T)
    few_bits = side.times(x.bfloat16())
    assert few_bits.dtype == torch.bfloat16
    torch.testing.assert_close(few_bits, (x.bfloat16().double() @ P.T).bfloat16(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("apart", [1, 64, 128])
def test_massive_activations_do_not_spoil_a_fold(apart: int) -> None:
    """Oracle: exact inner products; the mean square error (1 + ⟨a, b⟩²) / k of any map of one density for all places.

    Four places are thirty times as large as the others in every example, as in the residual streams of many language
    models; places a whole block apart would meet in one sum if blocks were not turned. Statistical, 2,000 draws.
    """
    n, k, examples = 768, 128, 12
    x = normal(examples, n)
    x[:, 100 : 100 + 4 * apart : apart] *= 30
    x /= x.norm(dim=1, keepdim=True)
    exact, off = x @ x.T, ~torch.eye(examples, dtype=torch.bool)
    errors = []
    for seed in range(2000):
        y = FoldedSide(n, k, torch.Generator().manual_seed(seed)).times(x)
        errors.append((y @ y.T - exact)[off].square().mean())
    assert float(torch.stack(errors).mean()) <= 1.1 * float((1 + exact[off].square()).mean() / k)


def test_a_description_from_before_there_were_folds_gives_the_rows_that_it_gave() -> None:
    """Oracle: fingerprint and row as version 0.1.0 wrote them."""
    shapes = {"a.weight": [140, 3], "b.weight": [3, 9]}
    written = {"kind": "two-stage", "dim": 11, "seed": 3, "shapes": [[name, shape] for name, shape in shapes.items()]}
    sketch = Sketch.from_dict(written)
    assert sketch.fingerprint == OF_ROTATIONS and sketch.to_dict() == written
    values = {"a.weight": torch.arange(420.0).reshape(140, 3) / 100, "b.weight": torch.arange(27.0).reshape(3, 9) / 10}
    torch.testing.assert_close(sketch.apply(values), torch.tensor(ROW_OF_ROTATIONS), rtol=0, atol=0.01)
    folded = Sketch(sketch.shapes, "two-stage", 11, 3)
    assert folded.sides == "folded" and folded.fingerprint != sketch.fingerprint
    with pytest.raises(FormatVersionError):
        Sketch.from_dict({**written, "sides": "torn"})
