"""What components' examples have in common: tails against sums over all draws, planted words, a calibrated null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_npeff import Decomposition, DecompositionConfig, FisherConfig
from hf_npeff.cli import app
from hf_npeff.decomposition.associations import AssociationRequest, log_tails
from hf_npeff.decomposition.features import features_of
from hf_npeff.encoding.record import Encoded
from hf_npeff.sharing.cards import decomposition_card
from tests.random_decomposition import WORDS, random_decomposition


def decomposition_of(W: torch.Tensor, columns: dict[str, list[Any]], **info: Any) -> Decomposition:
    """A decomposition with these coefficients and columns."""
    r = W.shape[1]
    about = {"fingerprint": "made", "fisher": FisherConfig().to_dict(), "sketch": None, "model": None, **info}
    return Decomposition(
        W,
        torch.eye(r),
        config=DecompositionConfig(n_components=r),
        info=about,
        example_ids=[str(i) for i in range(len(W))],
        columns=columns,
        stability=torch.ones(r),
        loss_history=[1.0, 0.5],
    )


def planted(seed: int = 0, n: int = 60) -> Decomposition:
    """Component 0 has the texts with "sesame oil", components 1 and 2 share those with "Zebra" at the end."""
    rng = torch.Generator().manual_seed(seed)
    words = [[WORDS[k] for k in torch.randint(len(WORDS), (8,), generator=rng).tolist()] for _ in range(n)]
    W = torch.zeros(n, 3)
    for i in range(n):
        j = i % 3
        W[i, j] = 1.0
        words[i] = [*words[i], "sesame", "oil", "is"] if j == 0 else [*words[i], "Zebra"]
    kinds = ["a" if i % 3 == 0 else "b" for i in range(n)]
    labels = [i % 2 for i in range(n)]
    predicted = [str(label) if i % 3 else "0" for i, label in enumerate(labels)]
    columns = {"text": [" ".join(w) for w in words], "label": labels, "prediction": predicted, "kind": kinds}
    return decomposition_of(W, columns, task="sequence-classification", label_names={"0": "no", "1": "yes"})


def test_tails_are_sums_over_all_ways_to_draw() -> None:
    """Oracle: the sum of exact whole-number binomials, Σ_{x≥k} C(K, x) C(n − K, m − x) / C(n, m)."""
    n, sizes = 13, torch.tensor([1, 4, 9, 13])
    for m in (1, 5, 12):
        tails = log_tails(n, m, sizes).exp()
        for row, K in zip(tails, sizes.tolist(), strict=True):
            for k, tail in enumerate(row.tolist()):
                ways = sum(math.comb(K, x) * math.comb(n - K, m - x) for x in range(k, min(K, m) + 1))
                assert tail == pytest.approx(ways / math.comb(n, m), abs=1e-12)


def test_planted_words_and_columns_are_named_first() -> None:
    """Oracle: planted words, a planted column with the same examples, and two components that share a word."""
    associations = planted().associations()
    first = associations[0].associations[0]
    assert first.share == 1 and first.rest == 0
    assert {first.feature, *first.same} >= {"kind = a", "sesame oil is", "ends with is"}
    assert associations[0].label is not None and "kind = a" in associations[0].label
    assert associations.groups["kind = b"] == [1, 2]
    words = planted().associations(columns=["text"])
    assert next(numbers for feature, numbers in words.groups.items() if "zebra" in feature) == [1, 2]
    assert "sesame oil" in words[0].associations[0].feature  # without the column the words stand for themselves
    kind = planted().associations(columns=["kind"])
    assert [a.feature for a in kind[0].associations] == ["kind = a"]


def test_a_threshold_says_the_number_that_parts_the_examples() -> None:
    """Oracle: the examples counted by the number in the feature's text; a column without any number has no feature."""
    years = [1951 + i for i in range(60)]
    columns = {"year": years, "score": [float("nan") for _ in years]}
    features = features_of(columns, {}, texts=False)
    assert sorted(feature.text.split()[:2] for feature in features) == [["year", "≤"], ["year", "≥"]]
    for feature in features:
        _, sign, number = feature.text.split()
        assert feature.where == [
            i for i, y in enumerate(years) if (y <= float(number) if sign == "≤" else y >= float(number))
        ]


def test_accuracy_is_counted_on_a_components_examples_and_on_the_others() -> None:
    """Oracle: the share of equal predictions and labels, counted here; of numbers, the mean difference."""
    decomposition = planted()
    right = [p == str(l) for p, l in zip(*(decomposition.columns[c] for c in ("prediction", "label")), strict=True)]
    inside = [r for i, r in enumerate(right) if i % 3 == 0]
    outside = [r for i, r in enumerate(right) if i % 3]
    assert decomposition.associations()[0].accuracy == pytest.approx(
        (sum(inside) / len(inside), sum(outside) / len(outside))
    )
    decomposition.columns |= {"prediction": [f"{i}.5" for i in range(60)], "label": [float(i) for i in range(60)]}
    decomposition.info["label_names"] = None
    assert decomposition.associations()[0].error == pytest.approx((0.5, 0.5))


def test_of_texts_that_have_nothing_to_do_with_components_few_have_any() -> None:
    """Oracle: with random coefficients, any association at all in at most 5% of decompositions; 150 of them, so that
    at most 9% are seen in 99% of cases (binomial: .05 + 2.3 · .018)."""
    settings: dict[str, Any] = {"shuffles": 39}
    found = 0
    for seed in range(150):
        decomposition = random_decomposition(36, 3, seed)
        decomposition.columns["text"] = [
            " ".join(w.rstrip("0123456789") for w in t.split()[:12]) for t in decomposition.columns["text"]
        ]
        found += any(one.associations for one in decomposition.associations(**settings))
    assert found <= 0.09 * 150


def test_without_texts_the_error_says_what_to_keep_and_columns_are_looked_at_alone() -> None:
    """Oracle: the error's words; and the association of the column that stays."""
    decomposition = planted()
    del decomposition.columns["text"]
    with pytest.raises(ValueError, match=r"columns=.*texts=False"):
        decomposition.associations()
    assert decomposition.associations(texts=False)[0].associations[0].feature == "kind = a"
    for name in list(decomposition.columns):
        del decomposition.columns[name]
    with pytest.raises(ValueError, match=r"texts.*columns"):
        decomposition.associations(texts=False)


def test_images_have_no_words_so_their_columns_are_looked_at_alone() -> None:
    """Oracle: the column by which the components were planted; and of texts that were not kept, the error."""
    decomposition = planted()
    del decomposition.columns["text"]
    decomposition.info["dataset"] = {"encoded": Encoded("image", ("image",)).to_dict()}
    assert decomposition.associations()[0].associations[0].feature == "kind = a"
    decomposition.info["dataset"] = {"encoded": Encoded("text", ("text",), shown=("text",)).to_dict()}
    with pytest.raises(ValueError, match=r"columns=.*texts=False"):
        decomposition.associations()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": ["nothing"]}, "nothing"),
        ({"shuffles": 5}, "19"),
        ({"level": 0.0}, "level"),
        ({"top": 0}, "top"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    """Oracle: a ValueError that names the setting, or what would do."""
    with pytest.raises(ValueError, match=words):
        planted().associations(**settings)


def test_a_component_that_is_active_everywhere_alike_has_no_associations() -> None:
    """Oracle: one component that carries all of every example singles out none of them."""
    decomposition = planted()
    alone = decomposition_of(torch.ones(60, 1), decomposition.columns)
    assert alone.associations()[0].associations == []


def test_of_many_examples_some_are_drawn_and_texts_of_any_writing_are_read() -> None:
    """Oracle: the number of examples that is told; a Chinese word whose characters stand in a row."""
    texts = [f"这 只 猫 在 家 {i}" if i % 2 else f"那 只 狗 在 家 {i}" for i in range(80)]
    W = torch.zeros(80, 2)
    for i in range(80):
        W[i, i % 2] = 1.0
    decomposition = decomposition_of(W, {"text": [t.replace(" ", "") for t in texts]})
    associations = decomposition.associations(max_examples=50)
    assert associations.n == 50
    assert "这只猫" in (associations[1].associations[0].feature, *associations[1].associations[0].same)
    assert AssociationRequest().max_examples >= 1000


def test_cards_have_associations_of_public_columns_alone() -> None:
    """Oracle: the planted word is on the card with texts, and nowhere on the one without."""
    decomposition = planted()
    assert "sesame" in decomposition_card(decomposition, columns=["text"])
    private = decomposition_card(decomposition, columns=["kind", "label"])
    assert "sesame" not in private and "kind = a" in private
    assert "In common" not in decomposition_card(decomposition, columns=[])


def test_the_command_shows_sorts_and_filters(tmp_path: Path) -> None:
    """Oracle: what `associations` gives for the same folder."""
    decomposition = planted()
    decomposition.save_pretrained(tmp_path / "made")

    def run(*arguments: str) -> list[dict[str, Any]]:
        result = CliRunner().invoke(app, ["components", str(tmp_path / "made"), "--json", *arguments])
        assert result.exit_code == 0, result.output
        components: list[dict[str, Any]] = json.loads(result.stdout)["components"]
        return components

    expected = decomposition.associations().to_dict()["components"]
    assert [c["associations"] for c in run()] == json.loads(json.dumps([e["associations"] for e in expected]))
    assert [c["index"] for c in run("--associated", "ZEBRA")] == [1, 2]
    scores = [c["accuracy"][0] for c in run("--sort", "accuracy")]
    assert scores == sorted(scores) and len(scores) == 3
    shown = CliRunner().invoke(app, ["components", str(tmp_path / "made"), "--component", "0"], env={"COLUMNS": "200"})
    words = " ".join(shown.output.split())  # wherever the title's lines break
    assert "automatic label" in words and "corrected p" in words
    for name in ("text", "label", "prediction", "kind"):
        del decomposition.columns[name]
    decomposition.save_pretrained(tmp_path / "bare")
    assert CliRunner().invoke(app, ["components", str(tmp_path / "bare")]).exit_code == 0
