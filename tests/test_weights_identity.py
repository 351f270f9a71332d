"""Which weights a model has: what the hash tells apart, and what is refused when a model has changed since."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from packaging.version import Version
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_npeff import FisherConfig, IncompatibleWeightsError, NPEFFAnalyzer, ParameterDirection, PEFs
from hf_npeff.data import Examples
from hf_npeff.fisher import weights_hash
from hf_npeff.fisher.metric import pilot_examples
from hf_npeff.fisher.pilot_predictions import pilot_predictions
from hf_npeff.fisher.weights_hash import digest, identity_of
from hf_npeff.pefs import weights_identity
from hf_npeff.pefs.weights_identity import SEVERAL, WeightsIdentity, joined
from tests.tiny import tiny_batch, tiny_model

CONFIG = FisherConfig(rank=2, sketch="identity", target_modules=["q_proj"])


def lora(model: Any, **settings: Any) -> Any:
    """A LoRA that does something."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["v_proj"], **settings}))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return wrapped.eval()


def set_scale(model: Any, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", factor)


def of(model: nn.Module) -> WeightsIdentity:
    return identity_of(model)


# The hash of one tensor


def by_hand(tensor: Tensor) -> str:
    """The definition in the module's docstring, with Python's whole numbers."""
    generator = torch.Generator().manual_seed(0)
    n = weights_hash._WORDS
    w = [2 * x + 1 for x in torch.randint(-(2**62), 2**62, (n,), generator=generator).tolist()]
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    hashed, at = hashlib.sha256(), 0
    for at in range(0, len(content) // (8 * n) * 8 * n, 8 * n):
        total = 0
        for x, weight in zip(struct.unpack(f"<{n}q", content[at : at + 8 * n]), w, strict=True):
            y = (x * weight) & (2**64 - 1)
            signed = y - 2**64 if y >= 2**63 else y  # the shift keeps the sign
            total += y ^ ((signed >> 32) & (2**64 - 1))
        hashed.update((total & (2**64 - 1)).to_bytes(8, "little"))
    hashed.update(content[len(content) // (8 * n) * 8 * n :])
    return hashed.hexdigest()[:32]


def test_the_hash_of_a_tensor_is_its_definition() -> None:
    """Oracle: Python's whole numbers, on more than two blocks and bytes that fill no word."""
    tensor = torch.randn(2 * 8 * weights_hash._WORDS // 2 + 1001, generator=torch.Generator().manual_seed(1))
    assert digest(tensor.bfloat16()) == by_hand(tensor.bfloat16())
    assert digest(tensor[:5]) == by_hand(tensor[:5]) and digest(tensor[:0]) == by_hand(tensor[:0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_the_hash_is_of_numbers_not_of_memory(dtype: torch.dtype) -> None:
    """Oracle: identity with a tensor of the same numbers at an address that begins within a word."""
    tensor = (100 * torch.randn(700, 501)).to(dtype)
    room = torch.empty(tensor.numel() + 1, dtype=dtype)
    room[1:] = tensor.flatten()
    assert digest(room[1:].view(700, 501)) == digest(tensor) == digest(tensor.T.contiguous().T)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "one number's last bit": lambda t: t.view(torch.int64)[333, 7].add_(1),
    "all signs": lambda t: t.neg_(),
    "two numbers of a row change places": lambda t: t[:, :2].copy_(t[:, [1, 0]]),
    "two rows change places": lambda t: t[:2].copy_(t[[1, 0]]),
    "one number more, one less by as much": lambda t: (t[0, 0].add_(1), t[0, 1].sub_(1)),
    "the same words the other way around": lambda t: t.copy_(t.flip(1)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_notices_every_change(change: str) -> None:
    """Oracle: the tensor before and after, compared number by number; float64 numbers are whole words."""
    before = torch.randn(1024, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    after = before.clone()
    CHANGES[change](after)
    assert not torch.equal(before, after) and digest(before) != digest(after)


# Models


def step_of_an_optimiser(model: Any) -> None:
    model(torch.tensor([[9, 10, 11]]), labels=torch.tensor([[9, 10, 11]])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    model.zero_grad()


@torch.no_grad()
def merged_lora(model: Any) -> None:
    """What `merge_and_unload` leaves in the weights."""
    merged = lora(copy.deepcopy(model)).merge_and_unload()
    model.load_state_dict(merged.state_dict())


def one_norm(model: Any) -> None:
    model.model.norm.weight.data.mul_(1 + 1e-15)  # behind autograd's back: its version counter does not notice


@pytest.mark.parametrize("change", [step_of_an_optimiser, merged_lora, one_norm])
def test_a_model_that_changed_in_place_has_other_weights(change: Callable[[Any], None]) -> None:
    """Oracle: the state dict before and after."""
    model = tiny_model("llama")
    before, kept = of(model), copy.deepcopy(model.state_dict())
    assert of(model) == before
    change(model)
    assert any(not torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert of(model).hash != before.hash
    model.load_state_dict(kept)
    assert of(model) == before


@pytest.mark.parametrize("scale", ["absmax", "state2.absmax", "offset", "SCB"])
def test_the_scales_of_a_quantised_weight_count(scale: str) -> None:
    """Oracle: the same integers with another scale are other weights; bitsandbytes keeps scales in attributes."""

    def identity(size: float) -> WeightsIdentity:
        values = {name: torch.ones(3) for name in ("absmax", "state2.absmax", "offset", "SCB")}
        values[scale] = torch.full((3,), size)
        layer = nn.Linear(4, 3)
        weight: Any = layer.weight
        weight.data = torch.arange(12.0).view(3, 4)
        layer.bias = None  # type: ignore[assignment]
        weight.SCB = values["SCB"]
        second = SimpleNamespace(absmax=values["state2.absmax"])
        weight.quant_state = SimpleNamespace(absmax=values["absmax"], offset=values["offset"], state2=second)
        return of(layer)

    assert identity(1.0) == identity(1.0)
    assert identity(1.0).hash != identity(2.0).hash


def test_buffers_that_are_saved_count_and_types_do() -> None:
    """Oracle: which buffers the state dict holds; a bfloat16 copy predicts something else."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    before = of(model)
    assert isinstance(model.cache, Tensor) and isinstance(model[1].running_mean, Tensor)
    model.cache.add_(1)
    assert of(model) == before
    model[1].running_mean.add_(1e-3)
    changed = of(model)
    assert changed != before and of(model.bfloat16()) != changed


def test_adapters_count_while_they_act() -> None:
    """Oracle: what the model predicts for one prompt, bit for bit; names of adapters change nothing."""
    ids = torch.tensor([[9, 10, 11, 12]])
    bare = tiny_model("llama")
    plain = of(bare)
    model = lora(copy.deepcopy(bare))
    wrapped = of(model)
    assert wrapped.hash == plain.hash and list(wrapped.adapters) == ["default"] and wrapped != plain
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, bare(ids).logits) and of(model) == plain
    set_scale(model, 0.5)
    assert of(model).adapters["default"] != wrapped.adapters["default"]
    set_scale(model, 1.0)
    assert of(model) == wrapped
    model.merge_adapter()
    merged = of(model)
    assert merged.adapters == {} and merged.hash != plain.hash
    assert merged.hash == of(model.merge_and_unload()).hash
    named = peft.get_peft_model(copy.deepcopy(bare), peft.LoraConfig(r=2, target_modules=["v_proj"]), "other")
    values = lora(copy.deepcopy(bare)).state_dict()
    named.load_state_dict({name.replace(".default.", ".other."): value for name, value in values.items()})
    assert weights_identity.difference(of(named).to_dict(), wrapped.to_dict()) is None


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers asks for PEFT {MIN_PEFT_VERSION} here"
)
def test_an_adapter_that_transformers_put_in_is_the_one_that_peft_put_around() -> None:
    """Oracle: the model of PEFT with the same numbers."""
    bare = tiny_model("llama")
    around = lora(copy.deepcopy(bare))
    values = around.state_dict()
    put_in = copy.deepcopy(bare)
    put_in.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in put_in.named_parameters():
            parameter.copy_(values[f"base_model.model.{name}"])
    assert of(put_in) == of(around)


def test_virtual_tokens_are_an_adapter() -> None:
    """Oracle: PEFT's own prediction with and without them."""
    bare = tiny_model("llama", dtype=torch.float32)
    model = peft.get_peft_model(
        copy.deepcopy(bare), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with_tokens = of(model)
    assert list(with_tokens.adapters) == ["default"] and with_tokens.hash == of(bare).hash
    with model.disable_adapter():
        assert of(model) == of(bare)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.add_(0.1)
    assert of(model).adapters != with_tokens.adapters


def test_a_tied_weight_is_read_once_and_copies_on_disk_or_offloaded_are_the_same(tmp_path: Path) -> None:
    """Oracle: identity with the model in memory."""
    model = tiny_model("qwen3", dtype=torch.float32)
    here = of(model)
    read: list[str] = []
    original = weights_hash.digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_hash, "digest", lambda t: read.append("") or original(t))  # type: ignore[func-returns-value]
        assert of(model) == here
    assert len(read) == len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False)))
    model.save_pretrained(tmp_path / "saved")
    assert of(type(model).from_pretrained(tmp_path / "saved")) == here
    on_cpu, on_disk = copy.deepcopy(model), copy.deepcopy(model)
    cpu_offload(on_cpu, execution_device=torch.device("cpu"))
    disk_offload(on_disk, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in on_disk.parameters())
    assert of(on_cpu) == here and of(on_disk) == here


def test_weights_that_cannot_be_read_are_said_to_be_unknown(caplog: Any) -> None:
    """Oracle: the hash is missing with a reason, and nothing is refused on account of it."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    unknown = of(model).to_dict()
    assert unknown["hash"] is None and "meta" in unknown["unknown"] and "cannot be identified" in caplog.text
    weights_identity.check_same_weights(unknown, of(nn.Linear(2, 2)).to_dict(), "PEFs", "")


# What is refused


@torch.no_grad()
def moved(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.add_(0.1)  # not even under analysis


def directly(model: Any, data: list[dict[str, Any]]) -> Tensor:
    """Log-probabilities of the likeliest next token, one example at a time, by the model alone."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([e["input_ids"]])).logits[0, -1].log_softmax(-1).amax() for e in data])


def analysed(model: Any, folder: Path) -> tuple[NPEFFAnalyzer, list[dict[str, Any]], PEFs]:
    data = tiny_batch(tiny_model("llama"), 8, seed=4)
    analyzer = NPEFFAnalyzer(model, fisher=CONFIG)
    return analyzer, data, analyzer.compute_pefs(data, folder)


@pytest.mark.parametrize("kind", ["in place", "merged", "disabled", "scaled"])
def test_the_same_call_on_other_weights_is_refused(kind: str, tmp_path: Path) -> None:
    """Oracle: the model called directly; begun again, its log-probabilities are those that are stored."""
    model = tiny_model("llama") if kind == "in place" else lora(tiny_model("llama"))
    analyzer, data, before = analysed(model, tmp_path)
    torch.testing.assert_close(before.log_probs, directly(model, data))
    if kind == "in place":
        moved(model)
    elif kind == "merged":
        model.merge_adapter()
    elif kind == "scaled":
        set_scale(model, 3.0)
    else:
        model.base_model.disable_adapter_layers()
    with pytest.raises(IncompatibleWeightsError, match="resume=False") as caught:
        analyzer.compute_pefs(data, tmp_path)
    assert str(tmp_path) in str(caught.value) and "check_weights=False" in str(caught.value)
    assert torch.equal(analyzer.compute_pefs(data, tmp_path, check_weights=False).factors, before.factors)
    again = analyzer.compute_pefs(data, tmp_path, resume=False)
    torch.testing.assert_close(again.log_probs, directly(model, data))
    if kind != "merged":
        assert not torch.allclose(again.log_probs, before.log_probs, atol=1e-3)  # type: ignore[arg-type]


def test_a_run_that_was_interrupted_does_not_go_on_with_other_weights(tmp_path: Path) -> None:
    """Oracle: the error, and the shards that were there are untouched."""
    model = tiny_model("llama")
    data = tiny_batch(model, 8, seed=4)
    analyzer = NPEFFAnalyzer(model, fisher=CONFIG)

    def stop(module: Any, args: Any) -> None:
        if len(list(tmp_path.glob("pefs-*.safetensors"))) == 2:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        analyzer.compute_pefs(data, tmp_path, shard_size=2)
    handle.remove()
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    moved(model)
    with pytest.raises(IncompatibleWeightsError, match="other weights"):
        analyzer.compute_pefs(data, tmp_path, shard_size=2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept and len(kept) > 4


def test_what_replays_cotangents_refuses_other_weights(tmp_path: Path) -> None:
    """Oracle: the error; with check_weights=False the same calls run."""
    model = tiny_model("llama")
    analyzer, data, pefs = analysed(model, tmp_path)
    found = analyzer.decompose(pefs, 2, max_iterations=300, progress=False)
    direction = analyzer.lift(found, 0, pefs, data)
    assert found.info["weights"] == pefs.info["weights"] == direction.info["weights"] == of(model).to_dict()
    moved(model)
    calls: dict[str, Callable[..., Any]] = {
        "lift": lambda **how: analyzer.lift(found, 0, pefs, data, **how),
        "adjoint": lambda **how: analyzer.lift(found, 0, pefs, data, method="adjoint", **how),
        "lift_each": lambda **how: list(analyzer.lift_each(found, [0], pefs, data, **how)),
        "token_alignments": lambda **how: analyzer.token_alignments(found, pefs, data, [0], n_top=2, **how),
        "evaluate_components": lambda **how: analyzer.evaluate_components(found, pefs, data, [0], lift=how, n_top=2),
    }
    for call in calls.values():
        with pytest.raises(IncompatibleWeightsError, match="check_weights=False"):
            call()
    for name in ("adjoint", "token_alignments"):
        calls[name](check_weights=False)


def test_files_keep_the_weights_and_cards_name_them(tmp_path: Path) -> None:
    """Oracle: config.json, the safetensors header and the cards as text."""
    from safetensors import safe_open

    model = tiny_model("llama")
    analyzer, data, pefs = analysed(model, tmp_path / "pefs")
    found = analyzer.decompose(pefs, 2, max_iterations=300, progress=False)
    direction = analyzer.lift(found, 0, pefs, data)
    now = of(model).to_dict()
    found.save_pretrained(tmp_path / "decomposition")
    direction.save_pretrained(tmp_path / "direction")
    direction.to_adapter(rank=1).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "pefs" / "config.json").read_text())["weights"] == now
    assert json.loads((tmp_path / "decomposition" / "config.json").read_text())["pefs"]["weights"] == now
    assert ParameterDirection.load(tmp_path / "direction").info["weights"] == now
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_model_weights"] == now["hash"]
    for folder in ("direction", "adapter"):
        assert str(now["hash"]) in (tmp_path / folder / "README.md").read_text()


def test_weights_that_meet_are_warned_of(tmp_path: Path, caplog: Any) -> None:
    """Oracle: the log; PEFs of different weights that are joined cannot be lifted."""
    model = tiny_model("llama")
    analyzer, data, pefs = analysed(model, tmp_path)
    found = analyzer.decompose(pefs, 2, max_iterations=300, progress=False)
    found.transform(pefs)
    direction = analyzer.lift(found, 0, pefs, data)
    assert "different weights" not in caplog.text and "other weights" not in caplog.text
    moved(model)
    other = analyzer.compute_pefs(data, like=found)
    found.transform(other, check_weights=False)
    assert "different weights" not in caplog.text
    found.transform(other)
    assert "are of a model with different weights" in caplog.text
    analyzer.evaluate_direction(direction, found, 0, data, scale=0.1, n_top=2)
    assert "the change was made with other weights" in caplog.text
    caplog.clear()
    both = PEFs.concatenate([pefs[:4], other[4:]])
    assert "different weights are joined" in caplog.text
    joint = analyzer.decompose(both, 2, max_iterations=300, progress=False)
    with pytest.raises(IncompatibleWeightsError, match="joined"):
        analyzer.lift(joint, 0, both, data)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_joined_weights_are_nobodys_whatever_the_order(order: tuple[int, ...]) -> None:
    """Oracle: the kinds themselves. Two known ones differ; what is unknown stays so; what says nothing has no say."""
    a, b = (WeightsIdentity(name * 8).to_dict() for name in "ab")
    several, unread = (WeightsIdentity(None, unknown=why).to_dict() for why in (SEVERAL, "on no device"))
    for parts, expected in (
        ([None, a, b], several), ([several, a, a], several), ([unread, a, a], unread), ([unread, several, a], several),
        ([None, a, a], a), ([None, None, None], None),
    ):  # fmt: skip
        assert joined([parts[i] for i in order]) == expected


def test_stores_of_older_versions_load_and_say_once_that_weights_are_not_checked(tmp_path: Path, caplog: Any) -> None:
    """Oracle: the log; of a model that predicts something else the error, which needs no hash."""
    weights_identity._say_once.cache_clear()
    model = tiny_model("llama")
    analyzer, data, _ = analysed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        pefs = analyzer.compute_pefs(data, tmp_path)
    assert len(pefs) == 8 and caplog.text.count("do not say with which weights") == 1
    moved(model)
    with pytest.raises(IncompatibleWeightsError):
        analyzer.compute_pefs(data, tmp_path)


# Examples


def content(**record: Any) -> str:
    example: str = Examples([record])[0].content
    return example


def test_all_that_a_model_is_given_is_in_the_hash_of_an_example() -> None:
    """Oracle: identity of what the model is given. A mask that hides nothing is what is made where there is none."""
    ids = [5, 6, 7]
    plain = content(input_ids=ids)
    assert plain == content(input_ids=torch.tensor(ids)) == content(input_ids=ids, attention_mask=[1, 1, 1])
    assert content(input_ids=[ids, [8]]) == content(input_ids=[ids, [8]], attention_mask=[[1, 1, 1], [1]])
    images = torch.arange(8.0)
    others = [
        content(input_ids=ids, attention_mask=[1, 1, 0]),
        content(input_ids=ids, labels=[5, 6, 7]),
        content(input_ids=ids, token_type_ids=[0, 0, 1]),
        content(input_ids=ids, pixel_values=images.view(2, 4)),
        content(input_ids=ids, pixel_values=images.view(4, 2)),
        content(input_ids=ids, pixel_values=images.view(2, 4) + 1),
        content(input_ids=ids, pixel_values=images.view(2, 4).double() + 1e-12),
    ]
    assert len({plain, *others}) == len(others) + 1
    assert content(inputs_embeds=[[0.1, 0.2]]) == content(inputs_embeds=torch.tensor([[0.1, 0.2]]))


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "token-classification"])
def test_random_texts_are_predicted_alike_together_and_alone(task: str) -> None:
    """Oracle: the model's own log-softmax of each text by itself, at the positions that rows are made of."""
    model = tiny_model("llama", task)
    with NPEFFAnalyzer(model).forward_pass() as forward:
        together = pilot_predictions(forward)
        alone = [forward.outputs([pilot]) for pilot in pilot_examples(model, 0)]
    wanted = []
    for outputs in alone:
        log_p = outputs.logits[outputs.valid].double().log_softmax(-1)
        wanted += [float(log_p.amax(-1).sum()), float(-(log_p.exp() * log_p).sum())]
    assert together is not None and len(wanted) == 8
    assert together["values"] == pytest.approx(wanted, abs=together["tolerance"])
    assert 0 < together["tolerance"] < 1e-2
