"""Published autoencoders. Oracles: sae-lens itself where it is installed, else a stub with its documented interface."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff.baselines.activations import Site
from hf_npeff.baselines.sparse_autoencoder import load_published
from tests.hub_server import HubServer
from tests.test_hub import person
from tests.tiny import tiny_model


class StubSAE:
    """The part of `sae_lens.SAE` that is used: W_dec, encode, decode, cfg.metadata.hook_name (cfg.hook_name of old)."""

    def __init__(self, hook: str, old: bool):
        generator = torch.Generator().manual_seed(0)
        self.W_dec = torch.randn(5, 16, generator=generator)
        named = types.SimpleNamespace(hook_name=hook)
        self.cfg = named if old else types.SimpleNamespace(metadata=named)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.left = 1.0
        return (x @ self.W_dec.T).relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        left = self.left
        del self.left  # as the library's does with norms that encoding left
        return f @ self.W_dec + left


@pytest.mark.parametrize("old", [True, False])
def test_a_published_autoencoder_is_read_through_sae_lens(monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """Oracle: a stub with the documented interface; versions before 6 returned a triple."""
    asked: list[Any] = []

    class SAE:
        @classmethod
        def from_pretrained(cls, release: str, sae_id: str, device: str = "cpu") -> Any:
            asked.append((release, sae_id, device))
            sae = StubSAE(sae_id, old)
            return (sae, {}, None) if old else sae

    monkeypatch.setitem(sys.modules, "sae_lens", types.SimpleNamespace(SAE=SAE))
    published = load_published("a-release", "blocks.1.hook_resid_pre")
    assert asked == [("a-release", "blocks.1.hook_resid_pre", "cpu")] and published.layer == 0
    assert load_published("a-release", "blocks.1.hook_resid_post").layer == 1
    states = torch.randn(4, 16)
    result = published.result(states, site=Site(tiny_model("gpt2"), published.layer))
    assert torch.equal(result.coefficients, published.sae.encode(states)) and result.interventions is not None
    expected = published.encode(states)[:, 2, None] * published.sae.W_dec[2]
    assert torch.allclose(published.contribution(states, 2), expected, atol=1e-5)
    for hook in ("blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out"):
        with pytest.raises(ValueError, match=f"'{hook}'"):
            load_published("a-release", hook)


def installed(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> StubSAE:
    """A stub that sae-lens loads, with settings in its config and in its metadata."""
    sae = StubSAE("blocks.1.hook_resid_pre", old=False)
    for where in (sae.cfg, sae.cfg.metadata):
        vars(where).update(settings)
    loader = types.SimpleNamespace(from_pretrained=lambda **_: sae)
    monkeypatch.setitem(sys.modules, "sae_lens", types.SimpleNamespace(SAE=loader))
    return sae


@pytest.mark.parametrize("processing", [None, {}, {"fold_ln": True}, {"center_writing_weights": True}])
def test_an_autoencoder_of_centred_states_gets_them_centred(
    monkeypatch: pytest.MonkeyPatch, processing: dict[str, bool] | None
) -> None:
    """Oracle: the stub's formula on states whose mean over h is taken out where the metadata name it, else as is."""
    sae = installed(monkeypatch, model_from_pretrained_kwargs=processing)
    published = load_published("a-release", "blocks.1.hook_resid_pre")
    states = 3.0 + torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    centred = states - states.mean(1, keepdim=True) if (processing or {}).get("center_writing_weights") else states
    features = (centred @ sae.W_dec.T).relu()
    torch.testing.assert_close(published.encode(states), features)
    torch.testing.assert_close(
        published.contribution(states, 2), features[:, 2, None] * sae.W_dec[2], atol=1e-4, rtol=1e-4
    )


def test_an_autoencoder_that_wants_scaled_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the number that it wants is in no file, so there is no right answer."""
    installed(monkeypatch, normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match=r"expected_average_only_in.*fold_activation_norm_scaling_factor"):
        load_published("a-release", "blocks.1.hook_resid_pre")
    installed(monkeypatch, normalize_activations="layer_norm")
    assert not load_published("a-release", "blocks.1.hook_resid_pre").centred


def test_without_sae_lens_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the messages; a folder without an autoencoder is noticed first."""
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ModuleNotFoundError, match="sae-lens"):
        load_published("a", "blocks.1.hook_resid_pre")
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        load_published(str(tmp_path), "blocks.1.hook_resid_pre")


KINDS = ("standard", "topk", "jumprelu", "gated", "layer_norm", "rescaled")


def saved_by_sae_lens(kind: str, folder: Path, hook: str = "blocks.1.hook_resid_pre") -> Any:
    """An autoencoder of sae-lens with random weights, after `save_model`."""
    sae_lens = pytest.importorskip("sae_lens", reason="it is the library under test")
    classes = {"topk": "TopKSAE", "jumprelu": "JumpReLUSAE", "gated": "GatedSAE"}
    name = classes.get(kind, "StandardSAE")
    normed = {"layer_norm": "layer_norm", "rescaled": "constant_norm_rescale"}.get(kind, "none")
    settings: dict[str, Any] = {"normalize_activations": normed} | ({"k": 3} if kind == "topk" else {})
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=hook, model_name="tiny")
    sae = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(16, 24, metadata=metadata, **settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    sae.save_model(folder / hook)
    return sae


@pytest.mark.parametrize("kind", KINDS)
def test_what_sae_lens_saved_is_loaded_from_its_folder(kind: str, tmp_path: Path) -> None:
    """Oracle: the library's own features, and the change of its own reconstruction when one of them is set to zero."""
    sae = saved_by_sae_lens(kind, tmp_path)
    published = load_published(str(tmp_path), "blocks.1.hook_resid_pre")
    states = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = sae.encode(states)
        whole = sae.decode(features)
        feature = int(features.sum(0).argmax())
        without = sae.encode(states)
        without[:, feature] = 0
        rest = sae.decode(without)
    assert published.layer == 0 and bool((features[:, feature] > 0).any())
    assert torch.allclose(published.encode(states), features, atol=1e-5)
    assert torch.allclose(published.contribution(states, feature), whole - rest, atol=1e-5)
    result = published.result(states, site=Site(tiny_model("gpt2"), published.layer))
    assert result.coefficients.shape == (7, 24) and result.interventions is not None
    with pytest.raises(IndexError, match="24 features"):
        result.interventions([24])


BOB = """
import torch
from hf_npeff.baselines.sparse_autoencoder import load_published

published = load_published("alice/sae", "blocks.1.hook_resid_pre")
out["layer"] = published.layer
out["features"] = published.encode(torch.arange(16.0)[None] / 16).tolist()
"""


def test_what_sae_lens_saved_is_loaded_from_a_hub(tmp_path: Path) -> None:
    """Oracle: the library's own features; both sides run through the real client."""
    sae = saved_by_sae_lens("standard", tmp_path / "saved")
    alice = """
    from huggingface_hub import HfApi
    HfApi().create_repo("alice/sae")
    HfApi().upload_folder(repo_id="alice/sae", folder_path=given["folder"])
    """
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        person(hub, alice, token="hf_alice", home=tmp_path / "alice", folder=tmp_path / "saved")
        found = person(hub, BOB, token=None, home=tmp_path / "bob")
    with torch.no_grad():
        expected = sae.encode(torch.arange(16.0)[None] / 16)
    assert found["layer"] == 0 and torch.allclose(torch.tensor(found["features"]), expected, atol=1e-5)
