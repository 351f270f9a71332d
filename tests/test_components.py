"""Decompositions and components: what a person reads, and what a folder keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import NPEFF, CorruptStoreError, Decomposition, FormatVersionError, IncompatibleSketchError, PEFs
from hf_npeff.decomposition.weighting import balanced, mixing_of
from tests.planted import planted


@pytest.fixture(scope="module")
def fitted() -> tuple[PEFs, Decomposition]:
    A, _, _ = planted(40, 3, 12, 4, overlap=0.1, noise=0.2, active=2, seed=0)
    mixed = [i if i % 2 else f"odd {i}" for i in range(40)]
    pefs = PEFs.from_factors(A, text=[f"text {i}" for i in range(40)], label=list(range(40)), mixed=mixed)
    return pefs, NPEFF(4, n_restarts=3).fit(pefs)


def test_top_examples_are_those_with_the_largest_coefficients(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: Python's sort of the coefficients."""
    _, found = fitted
    for component in found:
        top = component.top_examples(5)
        W = component.coefficients.tolist()
        assert top.indices == sorted(range(40), key=lambda i: -W[i])[:5]
        assert top.coefficients == [W[i] for i in top.indices]
        assert top.ids == [str(i) for i in top.indices]
        assert top.texts == [f"text {i}" for i in top.indices]
        assert top.columns["label"] == top.indices
        rows = list(top)
        assert len(top) == len(rows) == 5
        assert rows[0]["text"] == f"text {top.indices[0]}"
    assert len(found[0].top_examples(1000)) == 40
    with pytest.raises(ValueError, match=r"k .*0"):
        found[0].top_examples(0)


def test_explain_is_transform_with_the_alignments_it_is_from(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: ‖A_i g_j‖² term by term."""
    pefs, found = fitted
    W, N = found.explain(pefs[:7])
    brute = [[float((A @ g).square().sum()) for g in found.pseudo_fishers] for A in pefs.factors[:7]]
    torch.testing.assert_close(N, torch.tensor(brute))
    torch.testing.assert_close(W, found.transform(pefs[:7]), rtol=0, atol=0)


def test_components_are_numbered_and_can_be_named(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: a list's manners."""
    _, found = fitted
    assert [c.index for c in found] == list(range(len(found))) == [0, 1, 2, 3]
    assert found[-1].index == 3
    for wrong in (4, -5):
        with pytest.raises(IndexError, match="4"):
            found[wrong]
    for strange in ("a", 1.0, True):
        with pytest.raises(TypeError):
            found[strange]  # type: ignore[index]
    found.rename(-1, "  plurals ")
    assert found[3].name == found[3].label == "plurals"
    assert "plurals" in repr(found[3])
    found.rename(3, None)
    assert found[3].name is None
    for wrong_name in ("", "  ", 3):
        with pytest.raises(ValueError, match="name"):
            found.rename(0, wrong_name)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        found.rename(9, "x")


def test_stability_and_activity_are_shown(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: the definition of active_share, counted here; the component's line shows both."""
    _, found = fitted
    W = found.coefficients
    for component in found:
        share = sum(float(w[component.index]) > 0.05 * float(w.sum()) for w in W) / 40
        assert component.active_share == pytest.approx(share)
        assert f"{component.stability:.2f}" in repr(component)


def test_a_saved_decomposition_loads_to_the_same_bits(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: bitwise equality of tensors, equality of everything else, and the same transform."""
    pefs, found = fitted
    found.rename(2, "ünïcode")
    found.evaluations[1] = {"kl": 0.5}
    found.save_pretrained(tmp_path / "d")
    again = Decomposition.from_pretrained(tmp_path / "d")
    for name in ("coefficients", "pseudo_fishers", "stability"):
        assert torch.equal(getattr(again, name), getattr(found, name))
        assert getattr(again, name).dtype == getattr(found, name).dtype
    for name in ("loss_history", "config", "example_ids", "columns", "names", "info", "converged", "evaluations"):
        assert getattr(again, name) == getattr(found, name)
    assert again.explained == found.explained
    assert torch.equal(again.transform(pefs), found.coefficients)
    assert again.scales is None
    again.save_pretrained(tmp_path / "again")
    for file in ("decomposition.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "d" / file).read_bytes()


def test_texts_may_stay_private(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: no byte of the texts in any file; the other columns are kept."""
    _, found = fitted
    found.save_pretrained(tmp_path / "d", include_columns=["label"])
    assert set(Decomposition.load(tmp_path / "d").columns) == {"label"}
    found.save_pretrained(tmp_path / "none", include_columns=False)
    assert Decomposition.load(tmp_path / "none").columns == {}
    for path in (tmp_path / "none").rglob("*"):
        assert not path.is_file() or b"text 7" not in path.read_bytes()
    with pytest.raises(ValueError, match="colour"):
        found.save_pretrained(tmp_path / "x", include_columns=["colour"])


def test_one_restart_can_be_saved_though_its_stability_is_unknown(tmp_path: Path, fitted: Any) -> None:
    """Oracle: NaN comes back as NaN."""
    found = NPEFF(2, n_restarts=1).fit(fitted[0])
    found.save_pretrained(tmp_path / "d")
    assert math.isnan(Decomposition.load(tmp_path / "d")[0].stability)


@pytest.mark.parametrize("victim", ["decomposition.safetensors", "examples.parquet", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_damage_is_noticed_and_the_file_named(
    tmp_path: Path, fitted: tuple[PEFs, Decomposition], victim: str, damage: str
) -> None:
    """Oracle: a CorruptStoreError that names the file."""
    fitted[1].save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / victim
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-9])
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=victim):
        Decomposition.load(tmp_path / "d")


def test_wrong_contents_are_refused(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: the documented errors."""
    fitted[1].save_pretrained(tmp_path / "d")
    config = tmp_path / "d" / "config.json"
    good = json.loads(config.read_text())
    for change, error in (
        ({"format_version": 99}, FormatVersionError),
        ({"n_examples": 39}, CorruptStoreError),
        ({"n_components": 3}, CorruptStoreError),
        ({"names": {"9": "x"}}, CorruptStoreError),
        ({"names": 3}, CorruptStoreError),
        ({"files": None}, CorruptStoreError),
        ({"decomposition": {**good["decomposition"], "new": 1}}, FormatVersionError),
    ):
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(error):
            Decomposition.load(tmp_path / "d")


def test_pefs_of_another_sketch_are_refused(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: a fingerprint of the same size that differs."""
    pefs, found = fitted
    other = PEFs.from_factors(pefs.factors, fingerprint="another")
    with pytest.raises(IncompatibleSketchError, match=r"rows-of-12.*another"):
        found.transform(other)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_rows_of_a_power_have_the_matrix_power_as_their_fisher_whatever_rotation_was_stored(power: float) -> None:
    """Oracle: F^γ by a dense eigendecomposition of the d × d matrix, scaled to unit Frobenius norm."""
    A = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    D = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    scaled = A * D
    values, vectors = torch.linalg.eigh(scaled.mT @ scaled)
    F = (vectors * values.clamp_min(0).pow(power)[:, None] * (values > 1e-9)[:, None]) @ vectors.mT
    F = F / F.flatten(1).norm(dim=1)[:, None, None]
    for rows in (A, rotation @ A, 1e-6 * A):
        found = balanced(rows, D, power)
        torch.testing.assert_close(found.mT @ found, F, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(mixing_of(rows, D, power) @ (rows * D), found, rtol=1e-8, atol=1e-10)
