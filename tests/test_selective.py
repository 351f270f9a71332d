"""Selective directions: against dense solutions of their equations, without a sketch and in float64."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_npeff import Decomposition, FisherConfig, IncompatibleSketchError, NPEFFAnalyzer, ParameterDirection, PEFs
from hf_npeff.config import LiftRequest
from hf_npeff.weights.contrast import Contrast
from hf_npeff.weights.cross_validation import cross_validated, folds_of_kept, partition
from hf_npeff.weights.downdates import Downdates
from hf_npeff.weights.lifting import combination
from hf_npeff.weights.ridge import SELECTIVE_RIDGES, folds_of
from hf_npeff.weights.ridge_systems import effective_rank, fold_grams, gram, solve_shifted, top_eigenvalue
from hf_npeff.weights.row_space import bytes_needed, row_space, unscaled_rows
from hf_npeff.weights.selective import selective, selective_together
from tests import reference
from tests.logged import warned_by
from tests.tiny import tiny_batch, tiny_model

Case = tuple[NPEFFAnalyzer, list[Any], PEFs, Decomposition, PEFs]


@pytest.fixture(scope="module")
def case() -> Case:
    """A tiny BERT in float64 whose PEFs are not sketched, decomposed, and PEFs of other data with the same sketch."""
    model = tiny_model("bert")
    data = [{"id": f"e{i}", **e} for i, e in enumerate(tiny_batch(model, 16, seed=0))]
    fisher = FisherConfig(rank=2, sketch="identity", storage_dtype="float64", target_modules=["query", "value"])
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 4, n_restarts=4, max_iterations=3000, tolerance=1e-10, progress=False)
    other = analyzer.compute_pefs([{"id": f"k{i}", **e} for i, e in enumerate(tiny_batch(model, 6, seed=7))], like=pefs)
    return analyzer, data, pefs, found, other


def raw(pefs: PEFs) -> Tensor:
    """The unscaled rows (n, c, p)."""
    return torch.cat(list(unscaled_rows(pefs, None)))


def as_row(analyzer: NPEFFAnalyzer, direction: ParameterDirection, pefs: PEFs) -> Tensor:
    maps = {m.parameter: m for m in analyzer.maps}
    return torch.cat([maps[n].as_matrix(direction[n]).double().flatten() for n in pefs.sketch().shapes])


def quiet(found: Decomposition, j: int) -> Tensor:
    W = found.coefficients
    return W[:, j] <= 0.05 * W.sum(1)


def some_component(found: Decomposition) -> int:
    """One that leaves at least four examples alone."""
    return next(j for j in range(len(found)) if int(quiet(found, j).sum()) >= 4)


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def test_a_diagonal_matrix_is_not_decomposed_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same solutions in coordinates in which the matrix is not diagonal, to 1e-10."""
    X = row_space(case[2]).rows.flatten(0, 1)
    out, g, shifts = X[:3], X[5], [1e-4 * float((X.T @ X).diagonal().max())]
    Q = torch.linalg.qr(torch.randn(len(g), len(g), generator=torch.Generator().manual_seed(0)).double())[0]
    turned = Downdates(Q.T @ (X.T @ X) @ Q)
    truth = Q @ turned.from_eigenvectors(
        turned.solve(turned.to_eigenvectors(out @ Q), turned.to_eigenvectors(g @ Q), shifts)[:, 0]
    )
    monkeypatch.setattr(torch.linalg, "eigh", None)
    plain = Downdates(X.T @ X)
    assert torch.equal(plain.from_eigenvectors(plain.to_eigenvectors(g)), g)
    y = plain.from_eigenvectors(plain.solve(plain.to_eigenvectors(out), plain.to_eigenvectors(g), shifts)[:, 0])
    assert (y - truth).norm() < 1e-10 * truth.norm()


# Against the dense solution


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_a_selective_direction_is_the_dense_solution_of_its_equations(case: Case, ridge: float, kept: bool) -> None:
    """Oracle: reference.selective on the stored unsketched rows; relative difference ≤ 1e-8."""
    analyzer, data, pefs, found, other = case
    j = some_component(found)
    beta = combination(found, pefs)[0][j]
    g = torch.einsum("nc,ncp->p", beta, raw(pefs))
    truth = reference.selective(raw(pefs), g, quiet(found, j), ridge, raw(other) if kept else None)
    direction = analyzer.lift(found, j, pefs, data, selective=True, ridge=ridge, keep=other if kept else None)
    assert (as_row(analyzer, direction, pefs) - unit(truth)).norm() < 1e-8
    assert direction.info["estimated_cosine"] > 0.999999
    assert direction.info["left_alone"] == int(quiet(found, j).sum()) + (len(other) if kept else 0)
    assert direction.info["cosine_with_component"] == pytest.approx(float(unit(truth) @ unit(g)), abs=1e-8)


def test_the_solution_is_the_best_of_all_weight_changes(case: Case) -> None:
    """Oracle: the objective itself, at the solution and at perturbations of it in the whole parameter space."""
    analyzer, data, pefs, found, _ = case
    j = some_component(found)
    A, alone = raw(pefs), quiet(found, j)
    g = torch.einsum("nc,ncp->p", combination(found, pefs)[0][j], A)
    O = sum(a.T @ a for a in A[alone]) / int(alone.sum())
    ridge = 1e-2 * torch.linalg.eigvalsh(O)[-1]
    delta = as_row(analyzer, analyzer.lift(found, j, pefs, data, selective=True, ridge=1e-2), pefs)

    def objective(x: Tensor) -> float:
        return float((g @ x) ** 2 / (x @ O @ x + ridge * x.square().sum()))

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = unit(torch.randn(len(delta), generator=generator, dtype=torch.float64))
        assert objective(delta + 0.05 * step) < objective(delta)


def test_a_large_ridge_gives_the_component(case: Case) -> None:
    """Oracle: the plain direction; cosine ≥ 1 − 1e-9 at a ridge of 1e6, and monotone on the way there."""
    analyzer, data, pefs, found, _ = case
    j = some_component(found)
    plain = analyzer.lift(found, j, pefs, data, selective=False)
    cosines = [
        analyzer.lift(found, j, pefs, data, selective=True, ridge=r).cosine(plain) for r in (1e-3, 1e-1, 10.0, 1e6)
    ]
    assert cosines == sorted(cosines) and cosines[0] < 0.999 and cosines[-1] > 1 - 1e-9


@pytest.mark.parametrize("form", ["plain", "metric"])
def test_balanced_and_powered_components_are_selective_in_both_forms(form: Any) -> None:
    """Oracle: reference.selective on rows times D ("metric") or as they are; the metric form is that times D."""
    model = tiny_model("bert")
    data = tiny_batch(model, 14, seed=3)
    fisher = FisherConfig(rank=2, sketch="identity", storage_dtype="float64", target_modules=["query", "value"])
    analyzer = NPEFFAnalyzer(model, fisher=fisher)
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(
        pefs, 4, n_restarts=3, max_iterations=3000, tolerance=1e-10, balance="module", power=0.5, progress=False
    )
    j = some_component(found)
    D = found.scales.double() if form == "metric" else torch.ones(pefs.dim).double()  # type: ignore[union-attr]
    A = raw(pefs) * D
    g = torch.einsum("nc,ncp->p", combination(found, pefs)[0][j], A)
    truth = D * reference.selective(A, g, quiet(found, j), 1e-2)
    direction = analyzer.lift(found, j, pefs, data, selective=True, ridge=1e-2, form=form)
    assert (as_row(analyzer, direction, pefs) - unit(truth)).norm() < 1e-7
    assert direction.info["estimated_cosine"] > 0.99999 and direction.info["form"] == form


# Coordinates


@pytest.mark.parametrize("tall", [False, True])
def test_coordinates_of_rows_keep_inner_products_and_come_back_as_combinations(tall: bool) -> None:
    """Identities: XXᵀ = AAᵀ, and Aᵀβ = Q y for β = T y, with more rows than numbers and with fewer."""
    n, c, d = (30, 2, 20) if tall else (6, 2, 20)
    pefs = PEFs.from_factors(torch.randn(n, c, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    space = row_space(pefs)
    A, X = raw(pefs).flatten(0, 1), space.rows.flatten(0, 1)
    torch.testing.assert_close(X @ X.T, A @ A.T)
    y = torch.randn(X.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(A.T @ space.coefficients(y).flatten(), space.basis @ y)
    assert space.exact and space.info() == {"rows": n * c, "dimensions": min(n * c, d), "captured": 1.0}


def test_within_a_memory_budget_the_leading_part_is_used_and_its_share_said() -> None:
    """Oracle: the best possible share, from the singular values; directions that are asked about lie within."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(s, 60, generator=generator, dtype=torch.float64))[0] for s in (300, 200))
    S = 0.8 ** torch.arange(60, dtype=torch.float64)
    pefs = PEFs.from_factors(((U * S) @ V.T).reshape(150, 2, 200))
    A = raw(pefs).flatten(0, 1)
    best = torch.linalg.svdvals(A).square()
    beta = torch.randn(1, 150, 2, generator=generator, dtype=torch.float64)
    space = row_space(pefs, inside=beta, memory_budget=bytes_needed(21, 300, 200))
    m = space.rows.shape[-1]
    assert m == 21 and not space.exact
    assert 0.95 * float(best[: m - 1].sum() / best.sum()) < space.captured < 1
    g = A.T @ beta.flatten()
    assert (space.basis @ (space.basis.T @ g) - g).norm() < 1e-9 * g.norm()
    torch.testing.assert_close(space.basis.T @ space.basis, torch.eye(m, dtype=torch.float64))
    y = torch.randn(m, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(A.T @ space.coefficients(y).flatten(), space.basis @ y, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="too few"):
        row_space(pefs, inside=beta, memory_budget=1000)


def test_systems_of_folds_are_solved_side_by_side() -> None:
    """Oracle: dense solutions, the trace of M(M + λI)⁻¹ and eigenvalues; rows of a rank of two among others."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, 12, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(12)
    X[:5, :, 2:] = 0
    fold_of = torch.tensor([0] * 5 + [1] * 9 + [-1] * 6)
    grams = fold_grams(X, fold_of, 2)
    truth = torch.stack([X[fold_of == f].flatten(0, 1).T @ X[fold_of == f].flatten(0, 1) for f in (0, 1)])
    torch.testing.assert_close(grams, truth)
    torch.testing.assert_close(gram(X, fold_of >= 0), truth.sum(0))
    g = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    eye = torch.eye(12, dtype=torch.float64)
    for shift in (1.0, 1e-6):
        solution = torch.stack([torch.linalg.inv(M + shift * eye) @ v for M, v in zip(truth, g, strict=True)])
        torch.testing.assert_close(solve_shifted(grams, g, shift), solution, rtol=1e-8, atol=1e-10)
        trace = float(torch.trace(truth[1] @ torch.linalg.inv(truth[1] + shift * eye)))
        assert effective_rank(grams[1], shift) == pytest.approx(trace, rel=1e-6)
    for M in truth:
        assert top_eigenvalue(M) == pytest.approx(float(torch.linalg.eigvalsh(M)[-1]), rel=1e-12)
    assert top_eigenvalue(torch.zeros(4, 4, dtype=torch.float64)) == 0


# Cross-validation


@pytest.mark.parametrize("kept", [False, True])
def test_the_cross_validated_score_is_that_of_examples_that_were_left_out(case: Case, kept: bool) -> None:
    """Oracle: reference.held_out_selectivity, a dense solution for every fold."""
    _, _, pefs, found, other = case
    j = some_component(found)
    space = row_space(pefs)
    alone, W = quiet(found, j), found.coefficients[:, j].double()
    contrast = Contrast(space, W, alone, space.coordinates(other) if kept else None)
    beta = combination(found, pefs)[0][j]
    (scores,) = cross_validated([contrast], beta[None], [contrast.top()])
    fold_of, number = partition(contrast)
    folds = [alone & (fold_of == f) for f in range(number)]
    if int((~alone & (W > 0)).sum()) >= 2 * number:
        folds = [fold | (folds_of(~alone & (W > 0), number) == f) for f, fold in enumerate(folds)]
    else:
        pytest.fail("choose a case with enough active examples")
    keep_folds = [folds_of_kept(raw(other), number) == f for f in range(number)]
    for share in (1.0, SELECTIVE_RIDGES[4]):
        truth = reference.held_out_selectivity(
            raw(pefs), beta, W, alone, [f.nonzero()[:, 0].tolist() for f in folds], share * contrast.top(),
            raw(other) if kept else None, [f.nonzero()[:, 0].tolist() for f in keep_folds] if kept else (),
        )  # fmt: skip
        assert scores[share] == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("kept", [False, True])
def test_directions_solved_together_are_those_of_each_by_itself(case: Case, kept: bool) -> None:
    """Oracle: M of each, dense, from the rows left alone: its folds, its scores and (M + λI)⁻¹ g; relative 1e-9."""
    _, _, pefs, found, other = case
    space = row_space(pefs)
    W, X = found.coefficients.double(), space.rows
    known = space.coordinates(other) if kept else None
    chosen = [j for j in range(len(found)) if int(quiet(found, j).sum()) >= 2]
    assert len(chosen) > 2
    contrasts = [Contrast(space, W[:, j], quiet(found, j), known) for j in chosen]
    betas = combination(found, pefs)[0][chosen]
    for contrast, beta, (coefficients, y, info) in zip(
        contrasts, betas, selective_together(contrasts, betas, "auto"), strict=True
    ):
        M, g = contrast.disturbance(), torch.einsum("nc,ncm->m", beta, X)
        shift = info["ridge"] * float(torch.linalg.eigvalsh(M)[-1])
        truth = torch.linalg.solve(M + shift * torch.eye(len(M), dtype=M.dtype), g)
        assert (y - truth).norm() < 1e-9 * truth.norm()
        torch.testing.assert_close(coefficients, space.coefficients(truth), rtol=1e-7, atol=1e-9)
        assert info["effective_rank"] == pytest.approx(effective_rank(M, shift), rel=1e-9)
        assert torch.equal(coefficients, selective(contrast, beta, info["ridge"])[0]), "a run that goes on finds it"
        (alone,) = cross_validated([contrast], beta[None], [contrast.top()])
        assert list(info["cross_validation"].values()) == pytest.approx(list(alone.values()), rel=1e-9)


@pytest.mark.parametrize("taken", [0, 3, 25])
def test_rows_are_taken_out_of_a_matrix_for_many_ridges(taken: int) -> None:
    """Oracle: dense inverses of what is left, with few rows taken out, none, and more than products are used for."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 40, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(40)
    g = torch.randn(40, generator=generator, dtype=torch.float64)
    B, A = X.T @ X, X[:taken]
    left, eye = B - A.T @ A, torch.eye(40, dtype=torch.float64)
    known = Downdates(B)
    shifts = [1.0, 1e-3, 1e-5]
    truth = torch.stack([torch.linalg.solve(left + shift * eye, g) for shift in shifts], 1)
    W, h = known.to_eigenvectors(A), known.to_eigenvectors(g)
    solved = known.from_eigenvectors(known.solve(W, h, shifts).T).T
    assert ((solved - truth).norm(dim=0) < 1e-9 * truth.norm(dim=0)).all()
    assert known.solve(W, h, [1e-12]).isfinite().all()
    assert known.top(W) == pytest.approx(float(torch.linalg.eigvalsh(left)[-1]), rel=1e-12)
    for shift in shifts:
        trace = float(torch.trace(left @ torch.linalg.inv(left + shift * eye)))
        assert known.effective_rank(W, shift) == pytest.approx(trace, rel=1e-9)


def test_examples_are_parted_once_unless_those_to_be_left_alone_lie_unevenly() -> None:
    """Identities: directions share folds; one that leaves few alone parts those, each fold with as many up to one."""
    pefs = PEFs.from_factors(torch.randn(30, 1, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    space, W = row_space(pefs), torch.ones(30, dtype=torch.float64)
    alone = torch.arange(30) >= 4
    shared, folds = partition(Contrast(space, W, alone))
    assert folds == 5 and sorted(torch.bincount(shared).tolist()) == [6] * 5
    assert torch.equal(shared, partition(Contrast(space, W, torch.arange(30) < 26))[0])
    few = Contrast(space, W, shared == 0)
    own, folds = partition(few)
    assert folds == 5 and torch.equal(own >= 0, few.alone)
    assert sorted(torch.bincount(own[few.alone]).tolist()) == [1, 1, 1, 1, 2]


def test_auto_takes_the_ridge_of_the_best_score_and_says_so(case: Case) -> None:
    """Oracle: the scores in `info`, and the direction of that ridge given as a number."""
    analyzer, data, pefs, found, _ = case
    j = some_component(found)
    chosen = analyzer.lift(found, j, pefs, data, selective=True)
    scores = chosen.info["cross_validation"]
    assert chosen.info["cross_validated"] == max(scores.values()) and len(scores) == len(SELECTIVE_RIDGES)
    assert scores[f"{chosen.info['ridge']:.2g}"] == chosen.info["cross_validated"]
    again = analyzer.lift(found, j, pefs, data, selective=True, ridge=chosen.info["ridge"])
    assert again.cosine(chosen) > 1 - 1e-9


# Two sets of examples


@pytest.mark.parametrize("kept", [False, True])
def test_a_contrast_is_the_dense_generalised_eigenvector(case: Case, kept: bool) -> None:
    """Oracle: reference.generalised_eigenvector of dense matrices; difference up to the sign ≤ 1e-7."""
    analyzer, data, pefs, _, other = case
    ids, against = ["e1", "e4", "e9"], ["e0", "e2", "e3", "e5", "e7", "e8"]
    direction = analyzer.lift_examples(pefs, data, ids, against, ridge=0.01, keep=other if kept else None)
    A = raw(pefs)
    Q = reference.orthonormal_basis(A)
    alone = [A[int(i[1:])] for i in against] + (list(raw(other)) if kept else [])
    T, O = (Q.T @ sum(a.T @ a for a in some) @ Q / len(some) for some in ([A[1], A[4], A[9]], alone))
    value, truth = reference.generalised_eigenvector(T, O, 0.01 * float(torch.linalg.eigvalsh(O)[-1]))
    found = as_row(analyzer, direction, pefs)
    truth = unit(Q @ truth)
    assert (found - truth * (found @ truth).sign()).norm() < 1e-7
    assert direction.info["eigenvalue"] == pytest.approx(value, rel=1e-8)
    assert direction.info["moved"] == 3 and direction.info["left_alone"] == len(alone)


def test_a_contrast_takes_the_ridge_of_the_best_held_out_ratio(case: Case) -> None:
    """Oracle: dense eigenvectors for every fold, judged on the fold's examples."""
    analyzer, data, pefs, _, _ = case
    ids = ["e1", "e4", "e9", "e11"]
    direction = analyzer.lift_examples(pefs, data, ids)
    A = raw(pefs)
    Q = reference.orthonormal_basis(A)
    X = A @ Q
    moving = torch.tensor([f"e{i}" in ids for i in range(len(data))])
    M = sum(x.T @ x for x in X[~moving]) / 12
    top = float(torch.linalg.eigvalsh(M)[-1])
    scores = direction.info["cross_validation"]
    for share in (0.1, 1e-3):
        target = others = 0.0
        for f in range(4):
            out, gone = folds_of(moving, 4) == f, folds_of(~moving, 4) == f
            T = sum(x.T @ x for x in X[moving & ~out]) / 3
            _, y = reference.generalised_eigenvector(T, M - sum(x.T @ x for x in X[gone]) / 12, share * top)
            y = y / (X[moving & ~out] @ y).norm()
            target += float((X[out] @ y).square().sum()) / 4
            others += float((X[gone] @ y).square().sum()) / 12
        assert scores[f"{share:.2g}"] == pytest.approx(target / others, rel=1e-4)
    assert direction.info["cross_validated"] == max(scores.values())


# Bad input


def test_what_cannot_be_selective_is_refused(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: the errors that the documentation promises; left open, a component without others is lifted plainly."""
    analyzer, data, pefs, found, other = case
    whole = analyzer.decompose(pefs, 1, max_iterations=3000, tolerance=1e-10, progress=False)
    with pytest.raises(ValueError, match=r"keep=.*selective=False"):
        analyzer.lift(whole, 0, pefs, data, selective=True)
    with caplog.at_level(logging.WARNING, logger="hf_npeff"):
        plain = analyzer.lift(whole, 0, pefs, data, selective=None)
    assert warned_by(caplog, "weights.plans") and "ridge" not in plain.info
    assert analyzer.lift(whole, 0, pefs, data, selective=True, keep=other).info["left_alone"] == len(other)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"selective": True, "method": "adjoint"}, "selective"),
        ({"selective": True, "top_examples": 3}, "selective"),
        ({"selective": True, "ridge": 0.0}, "ridge"),
        ({"selective": True, "ridge": "best"}, "ridge"),
        ({"selective": True, "ridge": float("nan")}, "ridge"),
        ({"selective": False, "ridge": 0.1}, "selective=True"),
        ({"selective": False, "keep": other}, "selective=True"),
        ({"selective": True, "memory_budget": 0}, "memory_budget"),
    ]
    for settings, words in wrong:
        with pytest.raises(ValueError, match=words):
            LiftRequest(**settings)
    alone = torch.zeros(len(pefs), dtype=torch.bool)
    alone[0] = True
    beta = torch.ones(len(pefs), pefs.rank)
    with pytest.raises(ValueError, match="only one"):
        selective(Contrast(row_space(pefs), torch.ones(len(pefs)), alone), beta, "auto")
    rows = PEFs.from_factors(torch.randn(4, 2, 8))
    with pytest.raises(IncompatibleSketchError):
        analyzer.lift(found, 0, pefs, data, selective=True, keep=rows)
    elsewhere = PEFs.concatenate([other])
    elsewhere.info = {**other.info, "model": "another/model"}
    with pytest.raises(IncompatibleSketchError, match="another model"):
        analyzer.lift(found, 0, pefs, data, selective=True, keep=elsewhere)
    with pytest.raises(ValueError, match="zero"):
        row_space(PEFs.from_factors(torch.zeros(4, 2, 8)))
    for ids, against, words in (
        (["e99"], None, "not among"),
        ([], None, "no example to move"),
        (["e1"], ["e1", "e2"], "both in the set to move"),
        ([f"e{i}" for i in range(16)], None, "no examples to leave alone"),
        ("e1", None, "a list of"),
    ):
        with pytest.raises(ValueError, match=words):
            analyzer.lift_examples(pefs, data, ids, against)
    with pytest.raises(ValueError, match="single example"):
        analyzer.lift_examples(pefs, data, ["e1"])
