"""Known mechanisms: toy models of superposition. Oracles: dense Jacobians, loops over columns, files read back."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff.studies import induction
from hf_npeff.studies.mechanisms import MechanismsResult, run_mechanisms, similarities, toy_pefs
from hf_npeff.studies.parts import kept_part
from hf_npeff.studies.settings import MechanismsConfig
from hf_npeff.studies.superposition import sparse_features, superposition_model, train_superposition
from tests import reference
from tests.benchmarks import modular_addition

pytest.importorskip("sklearn", reason="the command asks for the libraries of the studies")


def test_the_pefs_of_a_toy_are_those_of_its_dense_jacobian() -> None:
    """Oracle: reverse-mode Jacobian of ReLU(WᵀWx + b) by W, one input at a time; unit variance: F = JᵀJ."""
    model = superposition_model(5, 2, seed=0)
    with torch.no_grad():
        model.bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(3))
    x = sparse_features(30, 5, 0.4, torch.Generator().manual_seed(1))
    x = x[x.sum(1) > 0]
    pefs = toy_pefs(model, x)
    for i, row in enumerate(x):
        W, b = model.embed.detach(), model.bias.detach()
        J = torch.autograd.functional.jacobian(lambda w, r=row, c=b: (w.T @ (w @ r) + c).relu(), W).flatten(1)
        A = pefs.factors[i]
        unit = reference.unit(J).to(A.dtype)
        assert torch.allclose(A.T @ A, unit.T @ unit, atol=1e-5), i


def test_similarities_are_those_of_a_loop_over_columns() -> None:
    """Oracle: the definitions, column by column and with the other columns set to zero."""
    generator = torch.Generator().manual_seed(0)
    G, W = torch.randn(4, 6, generator=generator), torch.randn(2, 3, generator=generator)
    by_column, whole = similarities(G, W)
    for r in range(4):
        for j in range(3):
            part = G[r].reshape(2, 3)
            alone = torch.zeros(2, 3)
            alone[:, j] = W[:, j]
            cosine = torch.nn.functional.cosine_similarity
            assert float(by_column[r, j]) == pytest.approx(abs(float(cosine(part[:, j], W[:, j], dim=0))), abs=1e-6)
            assert float(whole[r, j]) == pytest.approx(
                abs(float(cosine(part.flatten(), alone.flatten(), dim=0))), abs=1e-6
            )
    zero = torch.zeros(1, 6)
    zero[0, 0] = 1.0  # columns 1 and 2 of this direction are zero
    assert similarities(zero, W)[0][0, 1:].tolist() == [0, 0]


def test_training_makes_a_pentagon() -> None:
    """Oracle: known since Elhage et al.: five sparse features in two dimensions lie 72° apart, at equal lengths."""
    model = superposition_model(5, 2, seed=0)
    train_superposition(model, probability=0.05, steps=1500, batch_size=512, learning_rate=1e-2, seed=0)
    W = model.embed.detach()
    angles = torch.atan2(W[1], W[0]).sort().values
    gaps = torch.diff(angles, append=angles[:1] + 2 * torch.pi)
    assert torch.allclose(gaps, torch.full((5,), 2 * torch.pi / 5), atol=0.1)
    lengths = W.norm(dim=0)
    assert float(lengths.max() / lengths.min()) < 1.1


def test_components_are_the_columns_and_a_random_dictionary_is_not(tmp_path: Path) -> None:
    """Oracle: the model's own columns; the bar of 0.95 is the study's; a finished part is not computed again."""
    config = MechanismsConfig(toys="5-2", steps=1500, batch_size=512, learning_rate=1e-2, n=200, n_restarts=2, seeds=1,
                              induction_steps=0)  # fmt: skip
    result = run_mechanisms(config, parts=tmp_path)
    rows = result.toys[0]["rows"]
    assert rows["NPEFF"]["whole"] > 0.95 > 0.7 > rows["random directions"]["whole"]
    assert rows["NPEFF"]["by_column"] >= rows["NPEFF"]["whole"] > rows["NPEFF, weights untrained"]["whole"]
    assert rows["NPEFF"]["coefficients"] > 0.9
    file = tmp_path / "5-2-0.json"
    kept = json.loads(file.read_text())
    kept["part"]["loss"] = -1.0
    file.write_text(json.dumps(kept))
    assert run_mechanisms(config, parts=tmp_path).toys[0]["loss"] == -1.0


def test_a_part_of_other_settings_is_computed_again(tmp_path: Path) -> None:
    """Oracle: how often it is computed."""
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"value": float("nan"), "pair": (1, 2)}

    for settings in ({"seed": 0}, {"seed": 0}, {"seed": 1}, {"seed": (1,)}, {"seed": [1]}):
        assert kept_part(tmp_path, "a", settings, compute) == {"value": None, "pair": [1, 2]}
    assert len(calls) == 3
    assert kept_part(None, "a", {}, compute)["pair"] == [1, 2] and len(calls) == 4


def test_the_page_is_that_of_its_results(tmp_path: Path) -> None:
    """Identity: docs/studies/mechanisms, written again from its result.json; its figures carry its first sentence."""
    pytest.importorskip("matplotlib", reason="it draws the figures")
    from tests.test_docs import REPOSITORY

    folder = REPOSITORY / "docs" / "studies" / "mechanisms"
    result = MechanismsResult.from_dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    result.write(tmp_path)
    for name in ("README.md", "table.md", "result.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8"), name
    assert min(min(result.values(toy, "NPEFF", "whole")) for toy in ("5-2", "40-10")) >= 0.95
    assert result.config == MechanismsConfig()


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"toys": "5x2"}, "'5x2'"), ({"toys": "2-5"}, "2 features"), ({"probability": 0.0}, "probability"),
     ({"seeds": 0}, "seeds"), ({"toys": ()}, "toys")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: dict[str, Any], named: str) -> None:
    """Oracle: the error names the setting."""
    with pytest.raises(ValueError, match=named):
        MechanismsConfig(**setting)


def test_frequencies_are_those_of_a_slow_fourier_sum() -> None:
    """Oracle: sums of cosines and sines by hand; planted waves; the strength is that of the two waves added up."""
    p, generator = 7, torch.Generator().manual_seed(0)
    waves = torch.randn(2, p, 3, generator=generator)
    assert torch.allclose(modular_addition.spectrum(waves), reference.frequency_shares(waves), atol=1e-6)
    t = torch.arange(p).double()
    planted = torch.cos(2 * torch.pi * 2 * t / p + 0.3)[:, None] + 5.0  # the mean does not count
    assert modular_addition.spectrum(planted).tolist() == pytest.approx([0, 1, 0], abs=1e-9)
    pairs, x = modular_addition.all_pairs(p)
    strong = modular_addition.strengths(pairs, p)
    for k in range(1, 4):
        wave = torch.stack([torch.cos(2 * torch.pi * k * t / p), torch.sin(2 * torch.pi * k * t / p)], 1)
        assert torch.allclose((x.double() @ wave).square().sum(1) / 4, strong[:, k - 1])
    assert len(pairs) == 28 and bool((x.sum(1) == 2).all())


def test_the_page_of_modular_addition_is_what_is_kept() -> None:
    """Oracle: the page, made again from the JSON beside it."""
    kept = json.loads(modular_addition.PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    again = modular_addition.page(kept["networks"], kept["numbers"])
    assert again == modular_addition.PAGE.read_text(encoding="utf-8")


def test_half_of_the_sequences_repeat_and_the_others_follow_the_table() -> None:
    """Oracle: the definitions, token by token; frequencies of 400 sequences within four standard errors."""
    x, repeated = induction.sequences(400, torch.Generator().manual_seed(0))
    assert abs(float(repeated.double().mean()) - 0.5) < 4 * (0.25 / 400) ** 0.5
    followed = set()
    steps = []
    for row, repeats in zip(x.tolist(), repeated.tolist(), strict=True):
        periods = [p for p in range(6, 13) if row[p:] == row[:-p]]
        assert bool(periods) or not repeats
        if repeats:
            assert len(set(row[: periods[0]])) == periods[0]
        else:
            steps += list(itertools.pairwise(row))
    most = {a: max({b for c, b in steps if c == a}, key=[b for c, b in steps if c == a].count) for a in range(32)}
    followed = [most[a] == b for a, b in steps]
    expected = 0.9 + 0.1 / 32  # by the table, or by chance
    assert abs(sum(followed) / len(steps) - expected) < 4 * (0.1 / len(steps)) ** 0.5
    assert sorted(most.values()) == list(range(32))


def test_a_language_model_that_repeats_is_measured_before_and_after_training() -> None:
    """Oracle: the definitions of what is returned; the page has a row for each."""
    made = induction.one_model(steps=1, n=16, n_restarts=1, seed=0)
    rows = made["rows"]
    assert list(rows) == ["NPEFF", "NPEFF, power 0.5", "random directions", "NPEFF, weights untrained"]
    assert all(0 <= rows[name][way] <= 1 for name in rows for way in ("coefficients", "alignments"))
    assert all(0 < rows["NPEFF"][where] < 1 for where in ("attention", "attention of others"))
    page = MechanismsResult([], MechanismsConfig(), [made])._induction_page()
    assert all(f"| {name} |" in page for name in rows)


def test_the_feature_of_repetitions_is_chosen_on_one_half_and_measured_on_the_other() -> None:
    """Oracle: by hand. Column 1 ranks the first half rightly and the second wrongly."""
    repeated = torch.tensor([True, False, True, False])
    scores = torch.tensor([[0.0, 1], [1, 0], [1, 0], [0, 1]])
    assert induction.best_of(scores, repeated) == (0.0, 1)


def test_a_network_that_adds_is_held_against_its_frequencies() -> None:
    """Oracle: it adds every pair rightly; its neurons are nearer to waves than random directions are."""
    found = modular_addition.measured(5, steps=200, seed=1, n_restarts=1)
    rows = found["rows"]
    assert found["accuracy"] == 1
    share = modular_addition.MEASURES[0]
    assert rows["the network's neurons"][share] > rows["random directions"][share]
    text = modular_addition.page([found], 5)
    assert all(f"| {row} |" in text for row in rows) and "right on at least 100%" in text
