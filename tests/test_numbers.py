"""Numbers at their limits give finite results or clear errors, and the same numbers come out every time.

The tolerances of determinism are those that docs/robustness.md promises.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import NPEFF, Decomposition, PEFs
from tests import planted, tiny, workers
from tests.analyses import analyzer_of, brute_force, errors
from tests.tiny import tiny_batch, tiny_model

ROOT = Path(__file__).parents[1]


def promised(what: str) -> float:
    """A tolerance as the documentation states it."""
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {what} |"))
    return float(re.search(r"\d+e-\d+|0(?= )", row.rsplit("|", 2)[1])[0])  # type: ignore[index]


def finite(decomposition: Decomposition) -> bool:
    parts = (decomposition.coefficients, decomposition.pseudo_fishers, torch.tensor(decomposition.loss_history))
    return all(bool(torch.isfinite(part).all()) for part in parts)


def sound(decomposition: Decomposition, folder: Path) -> Decomposition:
    """Finite, not negative, of unit rows, and the same after it was kept."""
    assert finite(decomposition) and bool((decomposition.coefficients >= 0).all())
    torch.testing.assert_close(
        decomposition.pseudo_fishers.norm(dim=1), torch.ones(len(decomposition)), rtol=0, atol=1e-4
    )
    decomposition.save_pretrained(folder)
    assert torch.equal(Decomposition.load(folder).coefficients, decomposition.coefficients)
    return decomposition


# Stores of few bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
@pytest.mark.parametrize("settings", [{}, {"power": 0.5}, {"memory_budget": 20_000}])
def test_a_store_of_few_bits_decomposes_like_one_of_many(
    dtype: torch.dtype, bits: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Oracle: the same rows in float32; what is explained differs by no more than the rounding."""
    A, _, _ = planted.planted(60, 2, 40, 4, overlap=0.1, noise=0.2, active=2, seed=0)
    whole = PEFs.from_factors(A.float())
    PEFs.from_factors(A.to(dtype)).save(tmp_path / "few")
    few = PEFs.load(tmp_path / "few")
    assert few.dtype == dtype
    options: dict[str, Any] = {"n_restarts": 2, "max_iterations": 60, **settings}
    ours = sound(NPEFF(4, **options).fit(few), tmp_path / "d")
    theirs = NPEFF(4, **options).fit(whole)
    assert abs(ours.explained - theirs.explained) < 4 * 2.0**-bits
    W = ours.transform(few)
    assert bool(torch.isfinite(W).all())


# Tiny and huge gradients ----------------------------------------------------------------------------------------------


def regression(scale: float) -> Any:
    """An analyzer of a regression model whose gradients below its head are all multiplied by a number."""
    model = tiny.tiny_model("bert", num_labels=1, problem_type="regression", dtype=torch.float32)
    with torch.no_grad():
        model.classifier.weight.mul_(scale)
    settings: dict[str, Any] = {
        "rank": 1,
        "target_modules": r".*(query|intermediate\.dense)",
        "storage_dtype": "float32",
    }
    return analyzer_of(model, **settings)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e18])
def test_gradients_of_any_size_give_the_same_components(scale: float, tmp_path: Path) -> None:
    """Identity: the Fisher of a unit Gaussian is JᵀJ, so unit PEFs, W and lifts of a scaled J are those of J."""
    data = tiny.tiny_batch(tiny.tiny_model("bert", num_labels=1), 8, seed=3)
    one, scaled = regression(1.0), regression(scale)
    theirs, ours = one.compute_pefs(data, batch_size=4), scaled.compute_pefs(data, batch_size=4)
    assert bool(torch.isfinite(ours.norms).all()) and bool((ours.norms > 0).all())
    torch.testing.assert_close(ours.norms, theirs.norms * scale**2, rtol=1e-4, atol=0)
    for i in range(8):
        torch.testing.assert_close(ours.gram(i), theirs.gram(i), rtol=0, atol=1e-4)
    first = sound(one.decompose(theirs, 2, n_restarts=2), tmp_path / "one")
    second = sound(scaled.decompose(ours, 2, n_restarts=2), tmp_path / "scaled")
    assert second.explained == pytest.approx(first.explained, abs=1e-3)
    for method in ("exact", "adjoint"):
        direction = scaled.lift(second, 0, ours, data, method=method)
        assert direction.norm == pytest.approx(1, abs=1e-4)
    assert (
        abs(
            one.lift(first, 0, theirs, data, selective=False).cosine(
                scaled.lift(second, 0, ours, data, selective=False)
            )
        )
        > 0.99
    )


def test_rows_from_1e_minus_20_to_1e_plus_20_in_one_set_are_all_of_unit_norm(tmp_path: Path) -> None:
    """Oracle: float64; examples of every size, zero among them, decomposed together."""
    A = torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([1e-20, 1e-15, 1e-10, 1e-5, 1.0, 1e5, 1e10, 1e20, 0.0])
    pefs = PEFs.from_factors(A * sizes[:, None, None])
    for i in range(8):
        expected = A[i].double().T @ A[i].double()
        torch.testing.assert_close(pefs.gram(i).double(), expected / expected.norm(), rtol=0, atol=1e-5)
        assert float(pefs.norms[i]) == pytest.approx(float(expected.norm()) * float(sizes[i].double()) ** 2, rel=1e-4)
    assert float(pefs.norms[8]) == 0 and not pefs.factors[8].any()
    for settings in ({}, {"power": 0.5}, {"solver": "reference", "learning_rate": 1e-3}):
        sound(NPEFF(2, n_restarts=2, max_iterations=50, **settings).fit(pefs), tmp_path / "d")


# Sets that are degenerate ---------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("r", [1, 2, 5, 12])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_copies_of_one_example_are_explained_by_its_rows(r: int, power: float, tmp_path: Path) -> None:
    """Oracle: F = Σ λ u uᵀ of two rows: two components explain it all, one explains λ₁² / (λ₁² + λ₂²)."""
    A = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(1)).repeat(6, 1, 1)
    found = sound(NPEFF(r, n_restarts=1, max_iterations=60, power=power).fit(PEFs.from_factors(A)), tmp_path)
    values = torch.linalg.eigvalsh(A[0] @ A[0].T).pow(power)
    best = 1.0 if r > 1 else float(values[-1] ** 2 / (values**2).sum())
    assert found.explained == pytest.approx(best, abs=1e-3)
    torch.testing.assert_close(found.coefficients.sum(1), found.coefficients.sum(1)[:1].expand(6), rtol=1e-3, atol=1e-4)


def test_more_components_than_examples_and_one_example_alone(tmp_path: Path) -> None:
    """Oracle: r up to the number of rows explains everything; more is refused with that number."""
    A = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(2))
    pefs = PEFs.from_factors(A)
    assert sound(NPEFF(6, n_restarts=2, max_iterations=200).fit(pefs), tmp_path / "a").explained > 0.99
    with pytest.raises(ValueError, match=r"n_components=7.*6"):
        NPEFF(7).fit(pefs)
    alone = sound(NPEFF(1).fit(pefs[:1]), tmp_path / "b")
    assert alone.coefficients.shape == (1, 1)
    assert alone.explained == pytest.approx(float(torch.linalg.eigvalsh(pefs.gram(0))[-1] ** 2), abs=1e-4)


def test_one_example_goes_through_all_stages(tmp_path: Path) -> None:
    """Oracle: the lift of its only component is the gradient of that example's own row, up to sign."""
    analyzer, data = workers.analyzer(rank=1, output_factor="spectral"), workers.examples(1)
    pefs = analyzer.compute_pefs(data, tmp_path / "p")
    found = sound(analyzer.decompose(pefs, 1), tmp_path / "d")
    assert found.explained == pytest.approx(1, abs=1e-4)
    assert analyzer.lift(found, 0, pefs, data, selective=False).info["estimated_cosine"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="n_top"):
        analyzer.evaluate_direction(analyzer.lift(found, 0, pefs, data, selective=False), found, 0, data)


# Predictions without doubt --------------------------------------------------------------------------------------------


def certain(factor: float, **settings: Any) -> Any:
    """An analyzer of a classifier whose logits are multiplied by a number."""
    analyzer = workers.analyzer(**settings)
    with torch.no_grad():
        analyzer.model.classifier.weight.mul_(factor)
    return analyzer


@pytest.mark.one_in(2)
@pytest.mark.parametrize("output_factor", ["exact", "spectral", "projection", "sampling"])
@pytest.mark.parametrize("factor", [1e2, 1e4, 1e30])
def test_a_saturated_softmax_gives_finite_pefs_or_none(output_factor: str, factor: float, tmp_path: Path) -> None:
    """Oracle: p = 1 to rounding has S = 0, so a zero PEF; everything stays finite, and zeros alone are refused."""
    analyzer = certain(factor, output_factor=output_factor)
    pefs = analyzer.compute_pefs(workers.examples(6), tmp_path / "p")
    assert bool(torch.isfinite(pefs.factors).all()) and bool(torch.isfinite(pefs.norms).all())
    assert pefs.log_probs is not None and bool(torch.isfinite(pefs.log_probs).all())
    if factor == 1e30:
        assert not pefs.norms.any() and not pefs.factors.any()
    if not pefs.norms.any():
        with pytest.raises(ValueError, match="PEFs"):
            analyzer.decompose(pefs, 2)
        return
    found = sound(analyzer.decompose(pefs, 2, n_restarts=1), tmp_path / "d")
    assert not found.coefficients[pefs.norms == 0].any()
    assert bool(torch.isfinite(found.transform(pefs)).all())


def test_fishers_of_predictions_without_doubt_equal_brute_force() -> None:
    """Oracle: every gradient by autograd, 1 − p summed from the other classes; Fishers of 1e-40 and less among them."""
    model = tiny_model("bert", dtype=torch.float64)
    with torch.no_grad():
        model.classifier.weight.mul_(300)
    data = tiny_batch(model, 4, seed=3)
    analyzer = analyzer_of(model, target_modules=["query", "classifier"])
    pefs = analyzer.compute_pefs(data, progress=False)
    assert float(pefs.norms.min()) > 0 and float(pefs.norms.max()) < 1e-40
    assert max(errors(analyzer, pefs, brute_force(analyzer, data))) < 1e-8


def test_predictions_that_are_all_equal_are_no_trouble(tmp_path: Path) -> None:
    """Oracle: a head of zeros predicts 1/k everywhere, and below it every gradient is zero: refused in words."""
    analyzer = certain(0.0, target_modules=["query", "value"])
    pefs = analyzer.compute_pefs(workers.examples(5))
    assert pefs.log_probs is not None
    torch.testing.assert_close(pefs.log_probs, torch.full((5,), pefs.log_probs[0].item()))
    with pytest.raises(ValueError, match="PEFs"):
        analyzer.decompose(pefs, 2)
    head = certain(0.0, target_modules=["classifier"])
    with torch.no_grad():
        head.model.classifier.bias.zero_()
    pefs = head.compute_pefs(workers.examples(5))
    assert pefs.log_probs is not None and pefs.log_probs[0].item() == pytest.approx(-math.log(3), abs=1e-6)
    sound(head.decompose(pefs, 2, n_restarts=1), tmp_path)


# The same every time --------------------------------------------------------------------------------------------------


def everything(threads: int = 1, batch_size: int = 4) -> tuple[PEFs, Decomposition]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        analyzer = workers.analyzer()
        pefs = analyzer.compute_pefs(workers.examples(8), batch_size=batch_size)
        return pefs, NPEFF(3, n_restarts=1, max_iterations=20).fit(pefs)
    finally:
        torch.set_num_threads(before)


def digest() -> str:
    pefs, decomposition = everything()
    parts = (pefs.factors, pefs.norms, decomposition.coefficients, decomposition.pseudo_fishers)
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


def test_another_process_computes_the_same_bits() -> None:
    """Identity of a digest of rows, norms, W and G; Python's hash seed is another in each."""
    assert promised("another process") == 0
    code = "import torch; torch.set_num_threads(1); from tests.test_numbers import digest; print(digest())"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == digest(), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("what", "settings"),
    [("other numbers of threads", {"threads": 2}), ("other batch sizes", {"batch_size": 1})],
)
def test_threads_and_batches_change_no_more_than_is_promised(what: str, settings: dict[str, int]) -> None:
    """Oracle: one thread, batches of four. PEFs by their Gram matrices; explained fraction of the decomposition."""
    (theirs, first), (ours, second) = everything(), everything(**settings)
    tolerance = promised(what)
    for i in range(len(ours)):
        torch.testing.assert_close(ours.gram(i), theirs.gram(i), rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=tolerance, atol=0)
    assert abs(first.explained - second.explained) <= 100 * tolerance
    assert json.dumps(ours.info, sort_keys=True).count("fingerprint") and ours.fingerprint == theirs.fingerprint
