"""Directions and adapters on a loopback Hub: who has only their ids moves the same model in the same way.

Users are processes of their own, driven through the real client: see `tests/hub_server.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from tests.hub_server import HubServer
from tests.test_hub import person

ALICE = """
import torch
from huggingface_hub import HfApi
from hf_npeff import NPEFF, FisherConfig, NPEFFAnalyzer
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

tiny_model("gpt2", dtype=torch.float32).push_to_hub("alice/tiny")
tiny_tokenizer().push_to_hub("alice/tiny")
words = torch.randint(0, len(WORDS), (24, 6), generator=torch.Generator().manual_seed(0)).tolist()
data = [{"id": f"e{i}", "text": "private " + " ".join(WORDS[j] for j in row)} for i, row in enumerate(words)]
fisher = FisherConfig(rank=2, sketch="kronecker", sketch_dim=4, target_modules=".*mlp.*")
analyzer = NPEFFAnalyzer.from_pretrained("alice/tiny", fisher=fisher)
pefs = analyzer.compute_pefs(data)
found = NPEFF(3, n_restarts=1).fit(pefs)
found.rename(1, "kings")
direction = analyzer.lift(found, 1, pefs, data, method="adjoint")
report = analyzer.evaluate_direction(direction, found, 1, data, n_top=4, n_others=8)
about = {"report": report, "decomposition": found}
tokens = torch.arange(8)[None] + 4
with torch.no_grad():
    with direction.applied_to(analyzer.model, 0.5) as moved:
        out["moved"] = moved(tokens).logits[0].tolist()
    out["base"] = analyzer.model(tokens).logits[0].tolist()
largest = max(min(v.shape) for v in direction.values() if v.dim() == 2)
exact = direction.to_adapter(largest, 0.5, **about)
out["kept"] = exact.retained_energy
out["urls"] = [
    exact.push_to_hub("alice/lora"),
    exact.push_to_hub("alice/lora", revision="next", commit_message="Again", license="mit"),
    direction.to_adapter(kind="delta", scale=0.5, **about).push_to_hub("alice/dense"),
    direction.push_to_hub("alice/direction", datasets=["alice/words"], **about),
    direction.push_to_hub("alice/direction", create_pr=True, include_texts=True, **about),
    direction.push_to_hub("alice/secret", private=True),
]
out["commit"] = HfApi().model_info("alice/direction").sha
out["ours"] = message(exact.push_to_hub, "alice/lora", private=True)
out["other"] = message(direction.push_to_hub, "bob/direction")
out["typo"] = message(direction.push_to_hub, "alice/typo", include_text=True)
out["license"] = message(exact.push_to_hub, "alice/typo", license="two words")
found.push_to_hub("alice/npeff")
direction.info["model"] = "./here"
direction.push_to_hub("alice/local")
direction.to_adapter().push_to_hub("alice/local-lora")
"""

BOB = """
import datasets, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from huggingface_hub import hf_hub_download
from hf_npeff import NPEFFAnalyzer, ParameterDirection

tokens = torch.arange(8)[None] + 4

def card_of(repo, **where):
    return Path(hf_hub_download(repo, "README.md", **where)).read_text()

def run_card(repo):
    space = {}
    for block in card_of(repo).split("```python\\n")[1:]:
        exec(block.split("```")[0], space)
    return space

def logits(model):
    with torch.no_grad():
        return model.eval()(tokens).logits[0].tolist()

out["lora"] = logits(run_card("alice/lora")["model"])
space = run_card("alice/dense")
with space["direction"].applied_to(space["model"], space["direction"].info["scale"]) as moved:
    out["dense"] = logits(moved)
direction = run_card("alice/direction")["direction"]
base = AutoModelForCausalLM.from_pretrained("alice/tiny", revision=direction.info["revision"])
with direction.applied_to(base, 0.5) as moved:
    out["direction"] = logits(moved)
out["commit"] = direction.commit
named = PeftModel.from_pretrained(base, "alice/lora", revision="next")
out["next"] = logits(named)
analysers = NPEFFAnalyzer.from_pretrained("alice/lora"), NPEFFAnalyzer.from_pretrained("alice/lora", revision="next")
out["analysed"], out["analysed next"] = (logits(a.model) for a in analysers)
out["base of analysed"] = [a.provenance()["model"] for a in analysers]
out["license"] = "license: mit" in card_of("alice/lora", revision="next")
out["cards"] = [card_of(repo) for repo in ("alice/lora", "alice/dense", "alice/direction")]
out["pr"] = card_of("alice/direction", revision="refs/pr/1")
out["secret"] = message(ParameterDirection.from_pretrained, "alice/secret")
out["no_token"] = message(direction.push_to_hub, "bob/direction")
out["kinds"] = message(ParameterDirection.from_pretrained, "alice/lora")
rows = datasets.load_dataset("parquet", data_files="hf://alice/npeff/examples.parquet", split="train")
out["rows"] = [rows["example_id"][3], sorted(rows.column_names)]
"""


class World(NamedTuple):
    hub: HubServer
    alice: dict[str, Any]
    bob: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What Alice has published, and what Bob made of it without a token."""
    home = tmp_path_factory.mktemp("hub")
    with HubServer(tokens={"hf_alice": "alice", "hf_bob": "bob"}) as hub:
        alice = person(hub, ALICE, token="hf_alice", home=home / "alice")
        yield World(hub, alice, person(hub, BOB, token=None, home=home / "bob"))


def test_a_second_users_model_moves_as_the_first_users_did(world: World) -> None:
    """Oracle: Alice's logits with the direction added to the weights, without any adapter; by the cards' own code."""
    moved, base = torch.tensor(world.alice["moved"]), torch.tensor(world.alice["base"])
    assert (moved - base).abs().max() > 1e-2 and world.alice["kept"] == pytest.approx(1, abs=1e-5)
    for name in ("lora", "next", "dense", "direction", "analysed", "analysed next"):
        torch.testing.assert_close(torch.tensor(world.bob[name]), moved, rtol=1e-4, atol=1e-4, msg=name)
    assert world.bob["commit"] == world.alice["commit"]
    assert world.bob["base of analysed"] == ["alice/tiny"] * 2


def test_cards_name_their_repository_and_show_texts_only_when_asked(world: World) -> None:
    """The bytes that Bob downloaded; the pull request with texts is the control."""
    for repo, card in zip(("alice/lora", "alice/dense", "alice/direction"), world.bob["cards"], strict=True):
        assert f'from_pretrained(model, "{repo}")' in card or f'from_pretrained("{repo}")' in card
        assert "kings" in card and "Ratio" in card and "private" not in card and '"."' not in card
    assert "private" in world.bob["pr"] and "alice/words" in world.bob["cards"][2] and world.bob["license"]
    assert [card.split("library_name: ")[1].split("\n")[0] for card in world.bob["cards"]] == [
        "peft", "hf_npeff", "hf_npeff",
    ]  # fmt: skip


def test_the_repositories_hold_exactly_the_files_that_readers_expect(world: World) -> None:
    """The server's own state."""
    adapter = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert world.hub.repos["alice/lora"].files().keys() == world.hub.repos["alice/dense"].files().keys() == adapter
    direction = {".gitattributes", "README.md", "config.json", "direction.safetensors"}
    assert world.hub.repos["alice/direction"].files().keys() == direction
    settings = json.loads(world.hub.repos["alice/lora"].files()["adapter_config.json"])
    assert (settings["peft_type"], settings["base_model_name_or_path"]) == ("LORA", "alice/tiny")
    assert world.hub.repos["alice/lora"].history("next")[0].title == "Again"
    assert "/discussions/1" in world.alice["urls"][4]
    assert world.hub.repos["alice/secret"].private
    assert world.bob["rows"] == ["e3", ["content_hash", "example_id", "id", "prediction"]]


def test_what_cannot_be_pushed_or_read_says_why_and_leaves_nothing(world: World) -> None:
    """The messages, and that no repository was made."""
    for name, kind, part in (
        ("ours", "ValueError", "exists and is public"),
        ("other", "OSError", "may not"),
        ("typo", "TypeError", "include_text"),
        ("license", "ValueError", "license must be"),
    ):
        assert world.alice[name][0] == kind and part in world.alice[name][1], world.alice[name]
    assert "alice/typo" not in world.hub.repos
    for repo in ("alice/local", "alice/local-lora"):
        assert f"{repo} is made from the local model ./here" in world.alice["stderr"]
    assert "alice/npeff is made" not in world.alice["stderr"]
    assert world.bob["secret"][0] == "OSError" and "hf auth login" in world.bob["secret"][1]
    assert world.bob["no_token"][0] == "OSError" and "hf auth login" in world.bob["no_token"][1]
    assert world.bob["kinds"][0] == "CorruptStoreError" and "PeftModel" in world.bob["kinds"][1]
