"""Model cards: what they say, that their code runs, and that nothing a user brings can change their structure.

`python -m tests.test_cards` writes the examples in model_cards/ anew.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from hf_npeff import Decomposition, PEFs
from hf_npeff.config import DecompositionConfig, FisherConfig
from hf_npeff.sharing.cards import decomposition_card, pefs_card, point_card_to
from hf_npeff.sharing.direction_cards import DirectionFacts, adapter_card, direction_card
from hf_npeff.sharing.gallery_cards import gallery_card
from hf_npeff.sharing.markdown import escaped, plain
from tests.planted import planted

REPOSITORY = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOPICS = ("past tense", "comparative", "capital of a country", "plural")
NASTY = [
    "| a | b |\n|---|---|",
    "]] [click](https://evil.example) ![x](y)",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "```\n# Not a heading\n```python\nimport os\n",
    "---\nlicense: mit\n---",
    "\\| `code` **bold** _it_ ~~gone~~ $x^2$ $$y$$ &lt; &amp; &#60;",
    "https://evil.example www.evil.example me@evil.example @somebody #1 <https://evil.example>",
    "- item",
    "1. item",
    "+ item",
    "> quote",
    "# heading",
    "a\u202egnitirw\u202c\u200b\x00\x07\r\n\tb",
    "lone \ud800 surrogate",
    "trailing backslash \\",
    "{{ jinja }} $front_matter ${title} $$ %s {0}",
    "=====",
    "[^1]: note",
    "<!-- comment",
    "é漢字😀 “quotes” 'single' \"double\"",
    "   ",
    "x" * 5000,
]


def example_decomposition() -> Decomposition:
    """Four planted components of 48 examples, made without a solver so that every digit is the same everywhere."""
    _, directions, weights = planted(48, 2, 32, 4, overlap=0.1, noise=0.0, active=2, seed=0)
    topics = weights.argmax(1).tolist()
    blocks = [["model.layers.0.mlp.up_proj.weight", [4, 8]]]
    info = {
        "format_version": 1,
        "fingerprint": "00112233445566778899aabbccddeeff",
        "fisher": FisherConfig(rank=2, sketch="kronecker", sketch_dim=16).to_dict(),
        "sketch": {"kind": "kronecker", "dim": 16, "seed": 0, "shapes": blocks},
        "selftest": {"examples": 8, "sketch_error": 0.0421, "row_error": 1e-6, "coverage": 0.79, "tried": {}},
        "model": "example-org/tiny-causal-lm",
        "revision": COMMIT,
        "architecture": "LlamaForCausalLM",
        "task": "causal-lm",
        "versions": {"hf_npeff": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "dataset": {"examples": 48, "hash": "aa"},
    }
    return Decomposition(
        weights.float(),
        directions.float(),
        config=DecompositionConfig(n_components=4),
        info=info,
        example_ids=[f"relation-{i}" for i in range(48)],
        columns={
            "label": [TOPICS[t] for t in topics],
            "prediction": [f"word{i}" for i in range(48)],
            "text": [f"A made-up prompt about {TOPICS[t]}, number {i}" for i, t in enumerate(topics)],
        },
        stability=torch.tensor([0.99, 0.97, 0.62, 0.98]),
        loss_history=[0.4, 0.09],
        names={j: TOPICS[j] for j in range(3)},
        evaluations={0: {"ratio": 34.2}, 1: {"ratio": 18.0}},
    )


def example_cards() -> dict[str, str]:
    """The cards in model_cards/: what a push would write, texts left out of the first."""
    decomposition = example_decomposition()
    about = DirectionFacts(
        "example-org/tiny-causal-lm",
        component=1,
        revision=COMMIT,
        name="comparative",
        top_examples=["tall → taller", "smart → smarter", "wide → wider"],
        lift="adjoint of the sketch",
        scale=2.5,
        kl_top=1.2,
        kl_others=0.036,
        kl_worst=0.21,
        kl_searched=0.34,
        kl_random=0.0000021,
        ratio=33.3,
        top_flips=0.75,
        other_flips=0.03,
        worst="relation-7 → word7",
        measured="the whole direction",
        stability=0.97,
        coverage=0.79,
        sketch_error=0.0421,
        weights="9efb9e5502969068136b8341fa81e306",
    )
    gallery = {
        "base_model": "example-org/tiny-causal-lm",
        "revision": COMMIT,
        "auto_class": "AutoModelForCausalLM",
        "components": [
            {
                "component": j,
                "folder": f"component-{j}",
                "name": TOPICS[j] if j < 3 else None,
                "examples": [f"relation-{i} → word{i}" for i in range(j, 48, 4)],
                "scale": (-1) ** j * 0.25,
                "kl_top": 0.5 if j < 3 else 0.02,
                "target_missed": None if j < 3 else 0.5,
                "kl_others": 0.01 * (j + 1),
                "kl_worst": 0.1 * (j + 1),
                "kl_random": 2e-6,
                "top_flips": 0.75,
                "stability": float(decomposition.stability[j]),
                "retained_energy": 0.6,
            }
            for j in range(4)
        ],
    }
    rows, _, _ = planted(12, 2, 32, 4, overlap=0.1, noise=0.0, active=1, seed=0)
    pefs = PEFs.from_factors(rows, label=[TOPICS[i % 4] for i in range(12)])
    pefs.info |= decomposition.info
    return {
        "decomposition.md": decomposition_card(
            decomposition,
            repo_id="example-org/tiny-causal-lm-npeff",
            columns=["label", "prediction"],
            datasets=["example-org/word-relations"],
            license="apache-2.0",
        ),
        "pefs.md": pefs_card(pefs, repo_id="example-org/tiny-causal-lm-pefs", left_out=["text"]),
        "adapter.md": adapter_card(
            about,
            rank=1,
            retained_energy=0.81,
            auto_class="AutoModelForCausalLM",
            repo_id="example-org/tiny-comparative",
        ),
        "direction.md": direction_card(about, repo_id="example-org/tiny-comparative-direction"),
        "gallery.md": gallery_card(gallery, repo_id="example-org/tiny-components"),
    }


def parts(card: str) -> tuple[dict[str, Any], list[Any], str]:
    """The front matter as YAML, the body as Markdown tokens and as HTML, by readers that are not ours."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    body = card[match.end() :]
    reader = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
    return yaml.safe_load(match[1]), reader.parse(body), reader.render(body)


def code_blocks(card: str) -> list[str]:
    return [token.content for token in parts(card)[1] if token.type == "fence" and token.info == "python"]


def cells(card: str) -> list[list[str]]:
    """The text of every table cell, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", parts(card)[2], re.DOTALL)
    return [
        [
            html.unescape(re.sub("<[^>]*>", "", cell))
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def skeleton(card: str) -> list[str]:
    """The structure of a card: its blocks and inline marks, without any text and without empty comments."""
    found = []
    for token in parts(card)[1]:
        found.append(f"{token.type} {token.tag} {token.info}")
        children = [c for c in token.children or () if c.type not in ("text", "text_special", "softbreak")]
        found += [f"  {child.type}" for child in children if child.content != "<!-- -->"]
    return found


def test_a_components_card_says_what_it_does_how_surely_and_how_it_was_made() -> None:
    """Oracle: the numbers that the card was given, each beside its name; nothing is said where nothing is known."""
    rows = {row[0]: row[1] for row in cells(example_cards()["adapter.md"]) if len(row) == 2}
    expected = {
        "What was measured": "the whole direction",
        "Effect: KL on its top examples": "1.2; 75% of the answers change",
        "Off target: KL on other examples": "0.036; 3% of the answers change",
        "Off target: KL on the worst of the other examples": "0.21: relation-7 → word7",
        "Off target: KL on the worst input found by a search that replaces tokens": "0.34",
        "Control: KL of a random direction of the same size on its top examples": "2.1e-06",
        "Stability of the component": "0.97",
        "Share of the parameters analysed": "79.0%",
        "Error of the sketch": "0.0421",
        "Hash of the weights it was made and tested with": "9efb9e5502969068136b8341fa81e306",
    }
    assert {name: rows.get(name) for name in expected} == expected
    bare = adapter_card(DirectionFacts("org/model", component=0, stability=float("nan")))
    assert "Nothing was measured." in bare and "Stability" not in bare
    table = cells(example_cards()["gallery.md"])
    assert table[0][3] == "Stability" and [row[3] for row in table[1:]] == ["0.99", "0.97", "0.62", "0.98"]
    assert [row[8] for row in table[1:]] == ["0.1", "0.2", "0.3", "0.4"] and table[1][6] == "75%"
    assert [row[5] for row in table[1:]] == ["0.5", "0.5", "0.5", "0.02 (wanted: 0.5)"]


@pytest.mark.parametrize("name", ["decomposition.md", "pefs.md", "adapter.md", "direction.md"])
def test_the_example_cards_in_the_repository_are_what_the_code_writes(name: str) -> None:
    """Identity with the file; a difference is renewed with `python -m tests.test_cards` and then read."""
    assert (REPOSITORY / "model_cards" / name).read_text(encoding="utf-8") == example_cards()[name]


def test_the_cards_front_matter_is_what_the_hub_files_them_by() -> None:
    """The fields, read by PyYAML and by the Hub client's own card class."""
    from huggingface_hub import ModelCard

    found, _, _ = parts(example_cards()["decomposition.md"])
    assert found == {
        "library_name": "hf_npeff",
        "license": "apache-2.0",
        "base_model": "example-org/tiny-causal-lm",
        "base_model_relation": "adapter",
        "datasets": ["example-org/word-relations"],
        "tags": ["npeff", "interpretability", "fisher-information", "npeff-decomposition"],
    }
    assert ModelCard(example_cards()["decomposition.md"]).data.library_name == "hf_npeff"
    assert parts(example_cards()["adapter.md"])[0]["library_name"] == "peft"
    assert "license" not in parts(example_cards()["pefs.md"])[0]
    local = example_decomposition()
    local.info |= {"model": "/home/somebody/secret/model", "revision": None}
    card = decomposition_card(local, repo_id="a/b")
    assert "base_model" not in parts(card)[0]
    assert "a local model (model)" in card


def test_the_table_has_a_line_for_each_component_with_what_is_known() -> None:
    """Values computed here from the planted coefficients."""
    decomposition = example_decomposition()
    head, *rows = cells(decomposition_card(decomposition, columns=["prediction"]))[:5]
    assert head == ["component", "active on", "stability", "KL ratio", "top examples"]
    W = decomposition.coefficients
    for j, row in enumerate(rows):
        top = W[:, j].topk(3).indices.tolist()
        share = float((W[:, j] > 0.05 * W.sum(1)).float().mean())
        name = f"{j}: {TOPICS[j]}" if j < 3 else "3"
        ratio = {0: "34.2", 1: "18"}.get(j, "–")
        stability = ["0.99", "0.97", "0.62", "0.98"][j]
        assert row == [name, f"{share:.1%}", stability, ratio, " · ".join(f"word{i}" for i in top)]
    text = decomposition_card(decomposition)
    assert f"A made-up prompt about {TOPICS[0]}" in text and "91.0%" in text
    assert "made-up prompt" not in decomposition_card(decomposition, columns=["label", "prediction"])
    ids = decomposition_card(decomposition, columns=["label"])
    assert "relation-" in ids and "Left out, because they may be private: prediction, text." in ids
    facts = dict(row for row in cells(text) if len(row) == 2)
    assert facts["Error of the sketch"] == "0.0421 in inner products of PEFs, measured on 8 examples"
    assert facts["Commit"] == COMMIT
    unknown = Decomposition(
        W, decomposition.pseudo_fishers, config=decomposition.config, info={}, example_ids=["a"] * 48
    )
    assert "an unknown share" in decomposition_card(unknown)


def test_the_code_in_the_cards_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved folders, whose cards' code is executed in them; the Hub's is in tests/test_hub.py."""
    decomposition = example_decomposition()
    decomposition.info["sketch"] = None  # no model to load
    decomposition.save_pretrained(tmp_path / "decomposition")
    rows, _, _ = planted(12, 2, 32, 4, overlap=0.1, noise=0.0, active=1, seed=0)
    PEFs.from_factors(rows).save_pretrained(tmp_path / "pefs")
    for name, made in (("decomposition", "decomposition"), ("pefs", "decomposition")):
        monkeypatch.chdir(tmp_path / name)
        blocks = code_blocks((tmp_path / name / "README.md").read_text(encoding="utf-8"))
        assert len(blocks) == 1
        space: dict[str, Any] = {}
        exec(blocks[0], space)
        assert isinstance(space[made], Decomposition)
    assert len(space["decomposition"]) == 3
    for card in example_cards().values():
        for block in code_blocks(card):
            ast.parse(block)


def test_the_code_of_an_adapter_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PEFT adapter made by PEFT, loaded by the card's lines."""
    from peft import LoraConfig, get_peft_model

    from tests.tiny import tiny_model

    model = tiny_model("gpt2", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=1, target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
    card = adapter_card(DirectionFacts(str(tmp_path / "base"), component=0), auto_class="AutoModelForCausalLM")
    monkeypatch.chdir(tmp_path / "adapter")
    space: dict[str, Any] = {}
    exec(code_blocks(card)[0], space)
    assert type(space["model"]).__name__ == "PeftModel"


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_nothing_a_user_brings_changes_a_cards_structure(nasty: str) -> None:
    """The blocks and marks of each card are those of a harmless text; a Markdown reader shows the text itself."""
    harmless = "harmless"
    for make in (_hostile_decomposition, _hostile_adapter, _hostile_direction, _hostile_pefs):
        card = make(nasty)
        card.encode()
        assert skeleton(card) == skeleton(make(harmless)), make.__name__
        assert parts(card)[0] == parts(make(harmless))[0]
        assert "\nlicense: mit" not in card and "\u202e" not in card
    shown = cells(_hostile_decomposition(nasty))
    assert (plain(nasty) or "–") in shown[1][-1].split(" · ")
    assert shown[1][0] == f"0: {plain(nasty, 80)}".strip()
    for block in code_blocks(_hostile_decomposition(nasty)):
        ast.parse(block)


def _hostile_decomposition(text: str) -> str:
    decomposition = example_decomposition()
    decomposition.names = {0: text}
    decomposition.columns = {"text": [text] * 48, text: [0] * 48}
    decomposition.info |= {"revision": text, "architecture": text, "versions": {text: text}, "model": f"/x/{text}/m"}
    decomposition.info["fisher"]["target_modules"] = text
    return decomposition_card(decomposition, repo_id="a/b")


def test_a_published_card_loads_from_its_repository_and_its_texts_stay(tmp_path: Path) -> None:
    """Oracle: the card that is written for the repository in the first place, and a README that is not ours."""
    about = DirectionFacts("org/model", component=1, top_examples=['it said "." and no more', "```python"])
    (tmp_path / "README.md").write_text(adapter_card(about), encoding="utf-8")
    point_card_to(tmp_path, "me/adapter")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == adapter_card(about, repo_id="me/adapter")
    (tmp_path / "README.md").write_text('```python\nload(".")\n```\n', encoding="utf-8")
    point_card_to(tmp_path, "me/adapter")
    assert "me/adapter" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def _hostile_adapter(text: str) -> str:
    return adapter_card(
        DirectionFacts(f"/x/{text}/m", component=0, revision=text, name=text, top_examples=[text], lift=text)
    )


def _hostile_direction(text: str) -> str:
    return direction_card(DirectionFacts(f"/x/{text}/m", revision=text, name=text, top_examples=[text], lift=text))


def _hostile_pefs(text: str) -> str:
    pefs = PEFs.from_factors(torch.eye(4))
    pefs.columns[text] = [0] * 4
    pefs.info |= {"revision": text, "task": text, "model": f"/x/{text}/m"}
    return pefs_card(pefs, left_out=[text])


def test_escaping_is_shown_as_the_text_and_leaves_plain_text_alone() -> None:
    """A Markdown reader's rendering, against the value on one line; links by `linkify`-like readers have no hold."""
    reader = MarkdownIt("commonmark", {"html": True})
    for value in (*NASTY, "75.0%", "-1.5", "tall -> taller", "It's 3 o'clock.", "C:/x"):
        rendered = html.unescape(re.sub("<[^>]*>", "", reader.render(f"x {escaped(value)}"))).removesuffix("\n")
        assert rendered.removeprefix("x").strip() == plain(value)
        assert not re.search(r"://|www\.|@\w", escaped(value))
    assert escaped("75.0%") == "75.0%" and escaped("plain words, as they are.") == "plain words, as they are."
    assert len(plain("y" * 500)) == 120


@pytest.mark.parametrize(
    "arguments",
    [
        {"license": "mit\nfoo: bar"},
        {"license": ""},
        {"datasets": ["a b"]},
        {"datasets": ["../x"]},
        {"auto_class": "os; x"},
    ],
    ids=str,
)
def test_malformed_metadata_is_refused(arguments: dict[str, Any]) -> None:
    """Planted values that are no licenses, data sets or classes."""
    with pytest.raises(ValueError, match="|".join(arguments)):
        adapter_card(DirectionFacts("a/b", component=0), **arguments)


def test_every_placeholder_of_a_template_is_filled() -> None:
    """A text that looks like a placeholder stays; no other is left."""
    for name, card in example_cards().items():
        assert not re.search(r"\$[a-z_]+", card), name
        assert not re.search(r"\n\n\n", card), name


if __name__ == "__main__":
    (REPOSITORY / "model_cards").mkdir(exist_ok=True)
    for name, card in example_cards().items():
        (REPOSITORY / "model_cards" / name).write_text(card, encoding="utf-8")
