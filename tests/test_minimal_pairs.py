"""Several factors by minimal pairs. Oracles: brute force over all pairs, planted features, definitions, files."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.studies import pair_study
from hf_npeff.studies.minimal_pairs import (
    Margin,
    assigned,
    divergences,
    folds,
    margin_of,
    pair_margins,
    shuffled,
    summary,
)
from hf_npeff.studies.pair_data import (
    attributes_of,
    crossed_relations,
    cue_rows,
    home_assistant_rows,
    minimal_pairs,
    with_bases,
)
from hf_npeff.studies.pair_methods import all_features, answers, layers_of
from hf_npeff.studies.pair_study import MinimalPairsResult, run_minimal_pairs
from hf_npeff.studies.rival_settings import MinimalPairsConfig
from hf_npeff.studies.settings import PlantedConfig
from tests import reference
from tests.tiny import tiny_batch, tiny_model

pytest.importorskip("sklearn", reason="the methods are scikit-learn's")
pytest.importorskip("scipy", reason="features are matched by scipy")


def crossed(n_bases: int = 12) -> tuple[list[dict[str, Any]], list[str]]:
    """Two colours and two yes-or-no factors, fully crossed in every base."""
    factors, bases = [], []
    for base in range(n_bases):
        for colour, big, loud in itertools.product(("red", "blue"), (False, True), (False, True)):
            factors.append({"colour": colour, "big": big, "loud": loud})
            bases.append(f"base {base}")
    return factors, bases


class TestPairs:
    def test_pairs_are_all_that_differ_in_one_factor(self) -> None:
        """Oracle: brute force over all ordered pairs of examples."""
        factors, bases = crossed(3)
        found = {(p.has, p.lacks, p.attribute, p.instead) for p in minimal_pairs(factors, bases)}
        expected = set()
        for i, k in itertools.permutations(range(len(factors)), 2):
            names = [f for f in factors[i] if factors[i][f] != factors[k][f]]
            if bases[i] == bases[k] and len(names) == 1:
                if names[0] == "colour":
                    expected.add((i, k, f"colour={factors[i]['colour']}", f"colour={factors[k]['colour']}"))
                elif factors[i][names[0]]:
                    expected.add((i, k, names[0], None))
        assert found == expected and len(found) == 3 * (8 + 4 + 4)
        names, have = attributes_of(factors)
        assert names == ["colour=red", "big", "loud", "colour=blue"]
        assert have[5].tolist() == [False, False, True, True]

    def test_prompts_of_a_word_share_their_demonstrations(self) -> None:
        """Oracle: the word list: the words shown are the same, whatever relation, letters and separator."""
        pytest.importorskip("gensim", reason="the word list comes with gensim")
        rows = crossed_relations(words=2, seed=1)
        assert len(rows) == 2 * (3 + 2 + 2) * 4
        for base in {row["base"] for row in rows}:
            members = [row for row in rows if row["base"] == base]
            words = {tuple(line.split(":")[0].split(" ->")[0].lower() for line in row["text"].split("\n"))
                     for row in members}  # fmt: skip
            assert len(words) == 1
            for row in members:
                upper, colon = row["factors"]["upper"], row["factors"]["colon"]
                assert (row["text"] == row["text"].upper()) == upper and row["text"].endswith(":" if colon else "->")
        assert {row["answer"].lower() for row in rows if row["factors"]["relation"] == "past tense"} != {
            row["answer"].lower() for row in rows if row["factors"]["relation"] == "participle"
        }

    def test_a_sentence_comes_again_without_each_of_its_cues(self) -> None:
        """Oracle: the token ids: a cue is there where its factor says so, and pairs differ in one token."""
        config = PlantedConfig(cues=5, labels=2, most=3, length=6)
        rows = cue_rows(config, bases=8, seed=0)
        for row in rows:
            there = {f"cue {token - 3}" for token in row["input_ids"] if 3 <= token < 8}
            assert there == {name for name, has in row["factors"].items() if has}
        pairs = minimal_pairs([row["factors"] for row in rows], [row["base"] for row in rows])
        assert len(pairs) == len(rows) - 8
        for pair in pairs:
            both = zip(rows[pair.has]["input_ids"], rows[pair.lacks]["input_ids"], strict=True)
            assert sum(a != b for a, b in both) == 1

    def test_sentences_of_a_base_differ_in_one_place(self) -> None:
        """Oracle: the texts: cut after the common beginning and before the common end, at most three words are left."""
        pytest.importorskip("hassil", reason="it reads the grammars")
        pytest.importorskip("home_assistant_intents", reason="it has the grammars")
        rows = with_bases(home_assistant_rows(per_template=2), per_attribute=2)
        assert len({row["text"] for row in rows}) == len(rows) > 10
        for base in {row["base"] for row in rows}:
            before, after = (part.split() for part in base.split(" … " if " … " in base else "…"))
            for row in (row for row in rows if row["base"] == base):
                words = row["text"].split()
                assert words[: len(before)] == before and (not after or words[-len(after) :] == after)
                assert len(words) - len(before) - len(after) <= 3


class TestMargins:
    def test_margins_by_hand(self) -> None:
        """Oracle: the definition."""
        change = torch.tensor([2.0, -1.0, 0.5, -4.0])
        assert margin_of(change, 0, []) == (pytest.approx(-2 / 6), False)
        assert margin_of(change, 0, [3]) == (pytest.approx(1 / 3), True)
        assert margin_of(change, 1, [3]) == (-1.0, False)  # it falls where it should rise
        assert margin_of(torch.zeros(4), 0, []) == (-1.0, False)  # nothing moves
        assert margin_of(torch.tensor([1.0, 0.0]), 0, []) == (1.0, True)

    def test_features_are_assigned_one_to_one(self) -> None:
        """Oracle: all assignments tried, with AUROCs by counting pairs."""
        generator = torch.Generator().manual_seed(0)
        W, have = torch.rand(40, 4, generator=generator), torch.rand(40, 3, generator=generator) < 0.4
        choose = torch.arange(40) < 25
        features, scores = assigned(W, have, choose)
        table = [[reference.auroc(W[choose, j], have[choose, a]) for j in range(4)] for a in range(3)]
        best = max(itertools.permutations(range(4), 3), key=lambda p: sum(table[a][j] for a, j in enumerate(p)))
        assert features == list(best) and scores == pytest.approx([table[a][j] for a, j in enumerate(best)])
        with pytest.raises(ValueError, match=r"3 attributes.*2"):
            assigned(W[:, :2], have, choose)

    def test_planted_features_have_a_margin_of_one_and_tangled_ones_less(self) -> None:
        """Oracle: planted: a feature for each attribute; then one that mixes two; then the layer that is right."""
        factors, bases = crossed()
        names, have = attributes_of(factors)
        pairs = minimal_pairs(factors, bases)
        right, noise = have.float(), torch.rand(len(bases), 4, generator=torch.Generator().manual_seed(0))
        for way in pair_margins([right], have, names, pairs, bases, 0).values():
            assert summary(way) == {"margin": 1, "low": 1, "high": 1, "hits": 1, "pairs": len(pairs),
                                    "attributes": dict.fromkeys(sorted(names), 1)}  # fmt: skip
        tangled = right.clone()
        tangled[:, 1] = right[:, 1] + right[:, 2]
        found = summary(pair_margins([tangled], have, names, pairs, bases, 0)["one layer"])
        assert found["attributes"]["big"] == 1 and found["attributes"]["loud"] < 0.3
        both = pair_margins([noise, right], have, names, pairs, bases, 0)
        assert summary(both["one layer"])["margin"] == summary(both["layer by attribute"])["margin"] == 1
        half = torch.cat([right[:, :2], noise[:, :2]], 1)  # one layer knows red and big, the other loud and blue
        other = torch.cat([noise[:, :2], right[:, 2:]], 1)
        ways = pair_margins([half, other], have, names, pairs, bases, 0)
        assert summary(ways["layer by attribute"])["hits"] > summary(ways["one layer"])["hits"]
        control = pair_margins([right], shuffled(have, 1), names, pairs, bases, 0)["one layer"]
        assert summary(control)["margin"] < 0.5

    def test_features_are_chosen_on_other_bases_than_those_measured(self) -> None:
        """Oracle: features that are right on the first half of a fold and turned around on the second never rise."""
        factors, bases = crossed()
        names, have = attributes_of(factors)
        half = folds(bases, have, 0)[0][0]
        W = torch.where(half[:, None], have.float(), 1 - have.float())
        found = summary(pair_margins([W], have, names, minimal_pairs(factors, bases), bases, 0)["one layer"])
        assert found["hits"] < 0.5

    def test_both_halves_have_every_kind_of_base(self) -> None:
        """Oracle: by hand: four bases with one attribute and two with another; the halves part all examples."""
        bases = [f"{kind}{i}" for kind, count in (("a", 4), ("b", 2)) for i in range(count) for _ in range(2)]
        have = torch.tensor([[base[0] == "a", base[0] == "b"] for base in bases])
        (first, measured), (second, others) = folds(bases, have, 0)
        assert torch.equal(first, ~second) and measured | others == set(bases) and not measured & others
        assert [sum(base.startswith(kind) for base in measured) for kind in "ab"] == [2, 1]

    def test_attributes_count_equally_and_bases_are_drawn_whole(self) -> None:
        """Oracle: the mean of means by hand; ±1.96 standard errors of the means of bases, within a fifth."""
        margins = [Margin("a", f"base {i}", float(i % 2), i % 2 == 1) for i in range(200) for _ in range(3)]
        found = summary([*margins, Margin("b", "base 0", -0.5, False)])
        assert found["margin"] == pytest.approx((0.5 - 0.5) / 2) and found["hits"] == pytest.approx(0.25)
        alone = summary(margins)
        assert alone["high"] - 0.5 == pytest.approx(1.96 * 0.5 / 200**0.5, rel=0.2)
        with pytest.raises(ValueError, match="at least one"):
            summary([])


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """A tiny classifier, its examples as two bases with a factor each."""
    model = tiny_model("bert", dtype=torch.float32)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=8))
    return {"analyzer": analyzer, "dataset": tiny_batch(model, 40, seed=3)}


def test_every_method_is_read_both_ways_and_at_every_layer(small: dict[str, Any]) -> None:
    """Oracle: names, shapes, and that no reading is a copy of the other."""
    config = MinimalPairsConfig(n_components=5, n_restarts=1, sae_steps=30, layers=2)
    features, known = all_features(small["analyzer"], small["dataset"], "first", config, 0)
    methods = {name.rsplit(", ", 1)[0] for name in features} - {"random"}
    assert methods == {
        "NPEFF", "NPEFF, power 0.5", "NPEFF, power 0.25", "Gradient Atoms, not whitened",
        "gradient clustering", "gradient clustering, all rows", "Gradient Atoms",
        "dictionary learning on PEFs", "NMF on PEFs", "autoencoder of gradients", "SAE", "activations, k-means",
        "activations, NMF",
    }  # fmt: skip
    for name in methods:
        pair = [features[f"{name}, {way}"] for way in ("competing", "alone")]
        assert all(W.shape == (40, 5) for layers in pair for W in layers), name
        assert len(pair[0]) == len(pair[1]) == (2 if name.startswith(("SAE", "activations")) else 1)
        assert not torch.equal(pair[0][0], pair[1][0])
    assert 0 < known["explained by NPEFF"] <= 1
    assert layers_of(small["analyzer"].model, 2) == [0, 1] and layers_of(small["analyzer"].model, 1) == [1]


def test_divergences_are_the_kl_of_the_two_answers(small: dict[str, Any]) -> None:
    """Oracle: KL of the dense logits of one example at a time."""
    predictions = answers(small["analyzer"], small["dataset"], 8)
    factors = [{"odd": bool(i % 2)} for i in range(40)]
    pairs = minimal_pairs(factors, [str(i // 2) for i in range(40)])
    found = divergences(predictions, pairs)
    kls = [reference.kl(predictions.logits[p.has][0], predictions.logits[p.lacks][0]) for p in pairs]
    assert found == {"odd": pytest.approx(sum(kls) / len(kls), rel=1e-5)}


def test_the_study_keeps_its_parts_and_writes_its_page(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: how often a part is computed; the page read back; identity through JSON."""
    pytest.importorskip("matplotlib", reason="it draws the figures")
    calls: list[int] = []
    names = (pair_study.REFERENCE, "gradient clustering, alone", "Gradient Atoms, alone", "activations, k-means, alone")

    def fitted(analyzer: Any, dataset: Any, position: str, config: Any, seed: int) -> tuple[Any, dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        features = {name: [torch.rand(40, 4, generator=generator)] for name in names}
        return {**features, "SAE, alone": [torch.rand(40, 4, generator=generator) for _ in range(2)]}, {"none": None}

    def part(config: MinimalPairsConfig, seed: int, trained: bool, load_model: Any) -> dict[str, Any]:
        calls.append(seed)
        factors, bases = crossed(5)
        rows = [{"text": "", "factors": f, "base": b} for f, b in zip(factors, bases, strict=True)]
        return pair_study._measured(small["analyzer"], rows, "first", lambda said: [True], config, seed)

    monkeypatch.setattr(pair_study, "all_features", fitted)
    monkeypatch.setattr(pair_study, "answers", lambda a, d, b: answers(a, small["dataset"], b))
    monkeypatch.setitem(pair_study._DATA, "home_assistant", part)
    config = MinimalPairsConfig(data="home_assistant", seeds=2)
    result = run_minimal_pairs(config, parts=tmp_path / "parts")
    assert calls == [0, 1, 0] and len(list((tmp_path / "parts").iterdir())) == 3
    again = run_minimal_pairs(config, parts=tmp_path / "parts")
    assert calls == [0, 1, 0] and again.to_dict() == result.to_dict()
    result.write(tmp_path)
    read = MinimalPairsResult.from_dict(json.loads((tmp_path / "result.json").read_text()))
    assert read.page() == (tmp_path / "README.md").read_text() and read.config == config
    assert set(read.data["home_assistant"]["trained"]) == {*names, "SAE, alone", "SAE, alone, layer by attribute"}
    less = read.data["home_assistant"]["differences"]
    rows = read.data["home_assistant"]["trained"]
    for name in names:  # means over the same pairs, so differences of means
        assert less[name]["margin"] == pytest.approx(rows[pair_study.REFERENCE]["margin"] - rows[name]["margin"])
    assert "random weights" in read.table() and read.data["home_assistant"]["facts"]["pairs"] == 160


def test_the_page_is_that_of_its_results(tmp_path: Path) -> None:
    """Identity: docs/studies/minimal_pairs, written again from its result.json."""
    pytest.importorskip("matplotlib", reason="it draws the figures")
    from tests.test_docs import REPOSITORY

    folder = REPOSITORY / "docs" / "studies" / "minimal_pairs"
    result = MinimalPairsResult.from_dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    result.write(tmp_path)
    for name in ("README.md", "table.md", "result.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8"), name
    text = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")
    assert result.best_table() in text


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"data": "clouds"}, "clouds"), ({"seeds": 0}, "seeds"), ({"atoms_alpha": 0.0}, "atoms_alpha"),
     ({"data": ()}, "data")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: dict[str, Any], named: str) -> None:
    """Oracle: the error names the setting."""
    with pytest.raises(ValueError, match=named):
        MinimalPairsConfig(**setting)


def test_word_relations_need_a_language_model() -> None:
    """Oracle: the error names what to pass, before anything is computed."""
    with pytest.raises(ValueError, match="load_model"):
        run_minimal_pairs(MinimalPairsConfig(data="word_relations"))
