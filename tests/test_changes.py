"""Changes between models: two checkpoints, adapters of PEFT, sums. Oracles are PEFT's own merge and arithmetic."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from hf_npeff import IncompatibleWeightsError, NPEFFAnalyzer, ParameterDirection, UnsupportedModelError
from hf_npeff.weights.adapters import Adapter
from hf_npeff.weights.change_sums import outside
from hf_npeff.weights.directions import as_direction
from hf_npeff.weights.own_weights import tied_weights
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[9, 10, 11, 12]])


def model_of(family: str = "llama", **settings: Any) -> Any:
    return tiny_model(family, dtype=torch.float32, **settings)


def state(model: Any) -> dict[str, Any]:
    """Everything of a model that must be as it was: weights, what is trained, modules."""
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        "modules": [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


def adapted(model: Any, config: peft.PeftConfig, seed: int = 5) -> Any:
    """The model with an adapter that does something."""
    outside = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    base = {id(p) for p in outside.get_base_model().state_dict(keep_vars=True).values()}
    with torch.no_grad():
        for name, parameter in outside.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_", "oft_", "modules_to_save", "ia3_", "shira_")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert base
    return outside.eval()


LINEAR = ["q_proj", "v_proj", "up_proj"]
ADAPTERS: dict[str, tuple[str, peft.PeftConfig]] = {
    "LoRA": ("llama", peft.LoraConfig(r=2, target_modules=LINEAR)),
    "rsLoRA, biases": ("bert", peft.LoraConfig(r=4, use_rslora=True, bias="all", target_modules=["query", "dense"])),
    "DoRA": ("llama", peft.LoraConfig(r=2, use_dora=True, target_modules=LINEAR)),
    "LoRA of Conv1D": ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "LoRA of an embedding": ("llama", peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "saved whole": ("bert", peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])),
    "LoHa": ("llama", peft.LoHaConfig(r=2, target_modules=LINEAR)),
    "LoKr": ("llama", peft.LoKrConfig(r=2, target_modules=LINEAR)),
    "OFT": ("llama", peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])),
    "IA3": ("llama", peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapters_change_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    """Oracle: `between` the base model and PEFT's own merge_and_unload; the base model is handed back bit for bit."""
    family, config = ADAPTERS[kind]
    settings = {"task": "sequence-classification"} if "saved" in kind else {}
    if "embedding" in kind:
        settings["tie_word_embeddings"] = False
    wrapped = adapted(model_of(family, **settings), copy.deepcopy(config))
    wrapped.save_pretrained(tmp_path / "adapter")
    base = model_of(family, **settings)
    before = state(base)
    change = ParameterDirection.from_adapter(tmp_path / "adapter", base=base)
    assert_same(before, state(base))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    again = ParameterDirection.between(base, merged)
    assert set(change) == set(again) and change.norm == pytest.approx(again.norm, rel=1e-5)
    for name, value in change.items():
        torch.testing.assert_close(value, again[name], atol=2e-6, rtol=1e-5)
    for end in (wrapped, tmp_path / "adapter"):
        there = ParameterDirection.between(base, end) if end is wrapped else change
        with there.applied_to(base), torch.no_grad():
            moved = base(IDS).logits
        torch.testing.assert_close(moved, wrapped(IDS).logits, atol=2e-4, rtol=1e-4)


def test_a_wrapped_model_tells_its_own_change_and_stays_as_it_is() -> None:
    """Oracle: the change of the same adapter between the bare and the wrapped model; everything of the model equal."""
    wrapped = adapted(model_of(), peft.LoraConfig(r=2, target_modules=LINEAR))
    before = state(wrapped)
    change = ParameterDirection.from_adapter(wrapped)
    assert_same(before, state(wrapped))
    again = ParameterDirection.between(model_of(), wrapped)
    assert set(change) == set(again) and change.cosine(again) == pytest.approx(1, abs=1e-6)
    assert change.info["weights"] == ParameterDirection.between(model_of(), wrapped).info["weights"]
    assert change.info["weights"]["adapters"] == {}


def test_sixteen_bits_lose_nothing_of_an_adapter_and_are_compared_in_their_own_type() -> None:
    """Oracle: BA·alpha/r in float32; and a copy in bfloat16 differs by nothing."""
    base = model_of().to(torch.bfloat16)
    wrapped = adapted(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    change = ParameterDirection.from_adapter(wrapped)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    expected = (
        layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * layer.scaling["default"]
    )
    torch.testing.assert_close(change["model.layers.0.self_attn.q_proj.weight"], expected, atol=1e-6, rtol=1e-3)
    with pytest.raises(ValueError, match="to rounding"):
        ParameterDirection.between(model_of(), model_of().to(torch.bfloat16))
    moved = copy.deepcopy(base)
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight.add_(1.0)
    change = ParameterDirection.between(model_of(), moved)
    assert list(change) == ["model.layers.1.mlp.up_proj.weight"]


def test_a_tied_weight_comes_once_and_two_of_it_are_refused() -> None:
    """Oracle: the one name; a head that was untied and trained is no change of the tied model."""
    tied, after = (model_of("llama", tie_word_embeddings=True) for _ in range(2))
    with torch.no_grad():
        after.model.embed_tokens.weight.add_(0.5)
    change = ParameterDirection.between(tied, after)
    assert list(change) == ["model.embed_tokens.weight"] and change.layouts["model.embed_tokens.weight"] == "embedding"
    after.lm_head.weight = torch.nn.Parameter(after.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match="tied"):
        ParameterDirection.between(tied, after)


def test_arithmetic_is_that_of_the_weights() -> None:
    """Oracle: the same sums of the tensors; a parameter that one change lacks is not changed by it."""
    base, first, second = model_of(), model_of(), model_of()
    with torch.no_grad():
        first.model.layers[0].mlp.up_proj.weight.add_(torch.randn(24, 16, generator=torch.Generator().manual_seed(1)))
        first.model.norm.weight.add_(0.25)
        second.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    a, b = (ParameterDirection.between(base, other) for other in (first, second))
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    total = a + 0.5 * b - a * 0.25
    torch.testing.assert_close(total[up], 0.75 * a[up] + 0.5 * b[up])
    torch.testing.assert_close(total[norm], 0.75 * a[norm])
    torch.testing.assert_close((-a)[up], -a[up])
    assert total.info["model"] == a.info["model"] and total.info["natural_scale"] == 1.0
    assert sum(a.energies().values()) == pytest.approx(1) and next(iter(a.energies())) == up
    assert outside(a, {up: (24, 16)}) == pytest.approx({norm: float(a[norm].norm()) / a.norm})
    with pytest.raises(ValueError, match="cancel"):
        _ = a - a
    with pytest.raises(ValueError, match="scale"):
        _ = 0.0 * a


def test_what_is_taken_out_is_gone_and_the_rest_stays() -> None:
    """Oracle: the residual of a least-squares fit of the directions to the change, by torch.linalg.lstsq."""
    base, after = model_of(), model_of()
    with torch.no_grad():
        after.model.layers[0].mlp.up_proj.weight.add_(1.0)
        after.model.layers[1].mlp.up_proj.weight.mul_(1.25)
    change = ParameterDirection.between(base, after)
    directions = [change.random_like(seed) + 0.3 * change for seed in (1, 2)]
    left = change.without(directions)
    V = torch.stack([torch.cat([d[n].flatten() for n in change]) for d in directions], 1).double()
    tau = torch.cat([change[n].flatten() for n in change]).double()
    residual = tau - V @ torch.linalg.lstsq(V, tau[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.cat([left[n].flatten() for n in change]).double(), residual, atol=1e-5, rtol=1e-4)
    assert all(abs(left.cosine(direction)) < 1e-5 for direction in directions)
    with pytest.raises(ValueError, match=r"left.*directions"):
        change.without(change)
    assert change.without([]) is change


def test_several_adapters_add_up_with_their_weights(tmp_path: Path) -> None:
    """Oracle: the weighted sum of each adapter's change."""
    for number in (0, 1):
        adapted(model_of(), peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=number).save_pretrained(
            tmp_path / str(number)
        )
    folders = [str(tmp_path / str(number)) for number in (0, 1)]
    a, b = (ParameterDirection.from_adapter(folder, base=model_of()) for folder in folders)
    both = ParameterDirection.from_adapter({folders[0]: 1.0, folders[1]: -0.5}, base=model_of())
    expected = a - 0.5 * b
    assert both.info["adapters"] == {folders[0]: 1.0, folders[1]: -0.5}
    assert (both - expected * (1 + 1e-3)).norm < 2e-3 * both.norm


def test_folders_are_read_and_a_saved_change_comes_back(tmp_path: Path) -> None:
    """Oracle: the change between the same models at hand."""
    before, after = model_of("gpt2"), model_of("gpt2")
    with torch.no_grad():
        after.transformer.h[0].mlp.c_fc.weight.add_(0.5)
    for name, model in (("before", before), ("after", after)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    change = ParameterDirection.between(tmp_path / "before", str(tmp_path / "after"))
    assert change.cosine(ParameterDirection.between(before, after)) == pytest.approx(1)
    change.save_pretrained(tmp_path / "change")
    again = ParameterDirection.load(tmp_path / "change")
    assert again.norm == pytest.approx(change.norm) and again.info["after"] == str(tmp_path / "after")
    change.to_adapter(rank=1, scale=1.0).save_pretrained(tmp_path / "lora")
    lora = ParameterDirection.from_adapter(tmp_path / "lora")  # its base model is the recorded one
    assert lora.cosine(change) == pytest.approx(1, abs=1e-5)


def bad_ends(tmp_path: Path) -> dict[str, tuple[Any, Any, type[Exception], str]]:
    """{what is wrong: (before, after, error, a word of it)}."""
    base = model_of()
    other = tiny_tokenizer()
    for name in ("one", "two"):
        base.save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "two")
    with torch.no_grad():
        changed = model_of()
        changed.model.norm.weight.add_(1.0)
    quantised = model_of()
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(24, 16, dtype=torch.int8), requires_grad=False
    )
    prompts = peft.get_peft_model(model_of(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    return {
        "another architecture": (base, model_of("gpt2"), ValueError, "architecture"),
        "another vocabulary": (base, model_of(vocab_size=70), ValueError, "vocabular"),
        "another width": (base, model_of(intermediate_size=32), ValueError, "shapes"),
        "another tokenizer": (tmp_path / "one", tmp_path / "two", ValueError, "tokenizer"),
        "quantised and not": (base, quantised, UnsupportedModelError, "rounding"),
        "no change": (base, model_of(), ValueError, "same weights"),
        "virtual tokens": (base, prompts, UnsupportedModelError, "virtual"),
        "no such folder": (base, str(tmp_path / "none"), OSError, "none"),
        "no model": (base, 3, ValueError, "int"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "another architecture",
        "another vocabulary",
        "another width",
        "another tokenizer",
        "quantised and not",
        "no change",
        "virtual tokens",
        "no such folder",
        "no model",
    ],
)
def test_two_models_that_do_not_belong_together_are_refused(what: str, tmp_path: Path) -> None:
    """Oracle: the error's class, and what it names."""
    before, after, error, word = bad_ends(tmp_path)[what]
    with pytest.raises(error, match=word):
        ParameterDirection.between(before, after)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Oracle: by the recorded name, by shapes, by the hash that our adapters keep; and `base` stays as it is."""
    wrapped = adapted(model_of(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    base = model_of()
    base.name_or_path = "org/this"
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/that"})
    )
    with pytest.raises(ValueError, match="org/that"):
        ParameterDirection.from_adapter(tmp_path / "lora", base=base)
    assert ParameterDirection.from_adapter(tmp_path / "lora", base=base, check_base=False).norm > 0
    for wrong in (model_of(hidden_size=32, head_dim=16), model_of("bert")):
        before = state(wrong)
        with pytest.raises(ValueError, match="lora"):
            ParameterDirection.from_adapter(tmp_path / "lora", base=wrong)
        assert_same(before, state(wrong))
    change = ParameterDirection.from_adapter(tmp_path / "lora", base=base, check_base=False)
    change.to_adapter(rank=2).save_pretrained(tmp_path / "ours")
    with pytest.raises(IncompatibleWeightsError, match="hash"):
        ParameterDirection.from_adapter(tmp_path / "ours", base=model_of(seed=1))
    with pytest.raises(IncompatibleWeightsError, match="cannot be added"):
        _ = change + ParameterDirection.between(model_of(seed=1), model_of(seed=2))


@pytest.mark.parametrize(
    ("adapter", "error", "word"),
    [
        ("nowhere at all", OSError, "neither a folder"),
        ({}, ValueError, "weight"),
        ({"a": float("nan")}, ValueError, "weight"),
        (7, ValueError, "adapter"),
    ],
)
def test_what_is_no_adapter_is_refused(adapter: Any, error: type[Exception], word: str) -> None:
    """Oracle: the error's class, and what it names."""
    with pytest.raises(error, match=word):
        ParameterDirection.from_adapter(adapter, base=model_of())


def test_an_adapter_that_does_nothing_is_refused_and_so_is_one_without_a_base(tmp_path: Path) -> None:
    """Oracle: the error's class, and what it names."""
    peft.get_peft_model(model_of(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "zero")
    with pytest.raises(ValueError, match="changes nothing"):
        ParameterDirection.from_adapter(tmp_path / "zero", base=model_of())
    config = json.loads((tmp_path / "zero" / "adapter_config.json").read_text())
    (tmp_path / "zero" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UnsupportedModelError, match="base="):
        ParameterDirection.from_adapter(tmp_path / "zero")
    assert NPEFFAnalyzer(model_of()).weights()["hash"]


def tied_pair(names: list[str]) -> tuple[Any, Any]:
    """A tiny model with tied weights, and the same with a LoRA at some of their modules."""
    base = model_of("llama", tie_word_embeddings=True)
    return base, adapted(model_of("llama", tie_word_embeddings=True), peft.LoraConfig(r=2, target_modules=names))


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_an_adapter_of_one_module_of_a_tied_weight_is_no_change_of_the_weight(names: list[str], tmp_path: Path) -> None:
    """Oracle: PEFT adds what it learned behind that module alone; the weight would move in both."""
    base, wrapped = tied_pair(names)
    wrapped.save_pretrained(tmp_path)
    for make in (
        lambda: ParameterDirection.from_adapter(tmp_path, base=base, check_base=False),
        lambda: ParameterDirection.from_adapter(wrapped),
    ):
        with pytest.raises(ValueError, match="tie_word_embeddings=False"):
            make()


def test_an_adapter_of_both_modules_of_a_tied_weight_moves_it_once(tmp_path: Path) -> None:
    """Oracle: the model with the direction that the adapter was made of; PEFT's own logits."""
    base = model_of("llama", tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    rows, columns = base.get_parameter(name).shape
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    direction = ParameterDirection({name: delta}, {name: "embedding"}, tied_weights(base, [name]))
    made = direction.to_adapter(rank=2, scale=0.5)
    made.save_pretrained(tmp_path)
    with direction.applied_to(base, 0.5), torch.no_grad():
        expected = base(IDS).logits
    loaded = peft.PeftModel.from_pretrained(model_of("llama", tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    read = Adapter.load(tmp_path)
    assert len(read.layouts) == 2
    changes = [as_direction(made, base), as_direction(read, base)]
    changes.append(ParameterDirection.from_adapter(tmp_path, base=base, check_base=False))
    for change in changes:
        with change.applied_to(base), torch.no_grad():
            torch.testing.assert_close(base(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fine", [torch.float16, torch.float32])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_coarser_copy_differs_by_nothing_whichever_comes_first(fine: torch.dtype, backwards: bool) -> None:
    """Oracle: bfloat16 has the same bytes as float16, and fewer digits: a copy in it is the same model."""
    ends = [model_of().to(fine), model_of().to(fine).to(torch.bfloat16)]
    with pytest.raises(ValueError, match="to rounding"):
        ParameterDirection.between(*(reversed(ends) if backwards else ends))


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_an_adapter_that_begins_by_changing_the_base_is_told_whole(begun: Any, tmp_path: Path) -> None:
    """Oracle: PEFT's own logits; the base model bit for bit; its factors alone are refused."""
    base = model_of()
    wrapped = adapted(model_of(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=begun))
    wrapped.save_pretrained(tmp_path)
    before = state(base)
    change = ParameterDirection.from_adapter(tmp_path, base=base)
    assert_same(before, state(base))
    loaded = peft.PeftModel.from_pretrained(model_of(), tmp_path)
    with change.applied_to(base), torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, loaded(IDS).logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(base(IDS).logits, wrapped(IDS).logits, atol=2e-5, rtol=1e-4)
    with pytest.raises(UnsupportedModelError, match=f"init_lora_weights='{begun}'"):
        Adapter.load(tmp_path)


def test_an_adapter_of_some_tokens_is_not_read_as_one_of_all(tmp_path: Path) -> None:
    """Oracle: PEFT's activated LoRA, which acts from a token sequence on."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[10], task_type="CAUSAL_LM")
    adapted(model_of(), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="alora_invocation_tokens"):
        Adapter.load(tmp_path)


def test_an_adapter_with_a_module_saved_whole_is_not_scaled(tmp_path: Path) -> None:
    """Oracle: what is saved is the new head, so that no factor of it is a scaled change."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
    wrapped = adapted(model_of(task="sequence-classification"), config)
    wrapped.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    for act in (lambda: adapter.scaled(2.0), lambda: 2.0 * adapter, lambda: adapter.delta("score.weight")):
        with pytest.raises(UnsupportedModelError, match=r"score\.weight"):
            act()
