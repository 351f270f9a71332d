"""Fused experts: rows by hooks on the experts' own call, against brute force and plain sums of outer products."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer, UnsupportedModelError
from hf_npeff.fisher.bare_model import bare_parameters
from hf_npeff.fisher.expert_search import find_experts
from hf_npeff.fisher.gradients import Receiver, RowCollector
from hf_npeff.fisher.linear_maps import find_linear_maps
from hf_npeff.fisher.routing import Routing
from hf_npeff.pefs.sketches import Sketch
from hf_npeff.weights.activations import ChangedActivations
from hf_npeff.weights.lifting import combination
from tests import reference, tiny
from tests.logged import warned_by

V = 12
"""Vocabulary: brute force takes a backward pass per class."""
_BASE = {
    "vocab_size": V, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": tiny.BOS, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 48,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 3},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0}},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 20, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2, "head_dim": 4,
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 1},
    "dbrx": {
        "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 48,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "longcat_flash": {
        "num_layers": 1, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 20,
        "ffn_hidden_size": 24, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "num_key_value_heads": 2, "head_dim": 4,
    },
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1,
    },
}  # fmt: skip


def model_of(family: str, seed: int = 0, **options: Any) -> Any:
    """A random model with peaked predictions, in float32."""
    config = transformers.AutoConfig.for_model(family, **(_BASE | CONFIGS[family] | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2 and "bias" not in name:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def examples_of(n: int = 4, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token ids of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 7, 5, 6, 4, 8][:n]
    return [{"input_ids": torch.randint(5, V, (length,), generator=generator).tolist()} for length in lengths]


def analyzer_of(model: Any, side: str = "right", **settings: Any) -> NPEFFAnalyzer:
    """An analyzer that keeps every row, unsketched."""
    defaults: dict[str, Any] = {"rank": 64, "output_factor": "exact", "sketch": "identity", "storage_dtype": "float64"}
    return NPEFFAnalyzer(model, tiny.tiny_tokenizer(padding_side=side), fisher=FisherConfig(**(defaults | settings)))


def padded(examples: list[dict[str, list[int]]], side: str) -> dict[str, Tensor]:
    """A batch as a tokenizer pads it."""
    width = max(len(e["input_ids"]) for e in examples)
    ids, mask = [], []
    for e in examples:
        own, fill = e["input_ids"], width - len(e["input_ids"])
        ids.append([tiny.PAD] * fill + own if side == "left" else own + [tiny.PAD] * fill)
        mask.append([0] * fill + [1] * len(own) if side == "left" else [1] * len(own) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def dense_rows(model: Any, example: dict[str, list[int]], maps: Any) -> Tensor:
    """B (V, p) with BᵀB the Fisher at the last position, by one backward pass of autograd for every class."""
    tensors = [model.get_parameter(m.parameter) for m in maps]
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, -1]
        J = []
        for logit in logits:
            each = torch.autograd.grad(logit, tensors, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, each, strict=True)]
            J.append(torch.cat([matrix_of(m, p).flatten() for m, p in zip(maps, parts, strict=True)]))
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
    p = logits.detach().double().softmax(-1)
    stacked = torch.stack(J).double()
    return p.sqrt()[:, None] * (stacked - p @ stacked)


def matrix_of(m: Any, value: Tensor) -> Tensor:
    """A gradient as the stores have it: the experts' (out, in) one below the other."""
    if value.dim() == 2 and value.shape == m.shape:
        return value
    if value.dim() == 3 and value.shape[-1] == m.shape[1]:
        return value.flatten(0, 1)
    return value.reshape(-1, m.shape[1], value.shape[-1]).mT.flatten(0, 1)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", CONFIGS)
def test_fishers_of_fused_experts_in_padded_batches_equal_brute_force(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: JᵀSJ by autograd on each example alone, without padding; the analyzer sees batches of three.

    No expert is left out, and no example goes alone.
    """
    model = model_of(family)
    examples = examples_of(3)
    known: list[Tensor] = []
    for side in ("right", "left"):
        analyzer = analyzer_of(model, side)
        with caplog.at_level(logging.WARNING):
            pefs = analyzer.compute_pefs(padded(examples, side), batch_size=3, progress=False)
        assert not warned_by(caplog, "fisher.forward")
        assert not re.search(r"proj \(|_linear|\.mlp\.[wv]", caplog.text)
        assert any(m.fused is not None for m in analyzer.maps)
        known = known or [dense_rows(model, example, analyzer.maps) for example in examples]
        for i, B in enumerate(known):
            A = pefs.factors[i].double() * pefs.norms[i].sqrt()
            assert reference.relative_error_of_factors(B, A) <= 1e-4


@pytest.mark.parametrize("kind", ["identity", "kronecker", "countsketch", "two-stage"])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_experts_are_the_sketch_of_their_dense_gradients(kind: Any, batch: int) -> None:
    """Oracle: Σ δxᵀ laid out in a dense (E·out, in) matrix by a loop over the rows, through `Sketch.apply`.

    One expert has no rows, and a row of zeros stands for a token with fewer experts than the others.
    """
    E, out, into, tokens, slots = 4, 6, 5, 4 * batch, 2
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, E - 1, (tokens * slots,), generator=generator)
    chosen, order = torch.sort(index, stable=True)
    routing = Routing(torch.bincount(chosen, minlength=E).tolist(), order, tokens, slots, batch)
    x, delta = (torch.randn(tokens * slots, n, generator=generator) for n in (into, out))
    dim = {"kronecker": 3, "countsketch": 7, "two-stage": 7, "identity": None}[kind]
    sketch = Sketch({"w": (E * out, into), "v": (2, 3)}, kind, dim, seed=1)
    collector = RowCollector(sketch)
    collector.start(batch, torch.device("cpu"), torch.float32)
    saved = collector.take_routed_input("w", x, routing)
    collector.take_routed_gradient("w", saved, delta, routing)
    dense = torch.zeros(batch, E, out, into)
    for row in range(tokens * slots):
        example = int(order[row]) // (slots * tokens // batch)
        dense[example, int(chosen[row])] += torch.outer(delta[row], x[row])
    wanted = sketch.apply({"w": dense.flatten(1, 2), "v": torch.zeros(batch, 2, 3)})
    torch.testing.assert_close(collector.finish(), wanted, rtol=1e-5, atol=1e-5)


class _Plain(Receiver):
    """What a receiver gets that knows nothing of experts."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def take_input(self, name: str, x: Tensor) -> Tensor:
        return x

    def take_gradient(self, name: str, saved: Tensor, delta: Tensor) -> None:
        self.total = delta.mT @ saved


def test_a_receiver_that_knows_nothing_of_experts_gets_the_same_gradients() -> None:
    """Oracle: the sum of outer products by a loop."""
    routing = Routing([1, 0, 3], torch.tensor([2, 0, 1, 3]), 2, 2, 2)
    x, delta = torch.arange(8.0).reshape(4, 2), torch.arange(12.0).reshape(4, 3)
    plain = _Plain()
    plain.take_routed_gradient("w", plain.take_routed_input("w", x, routing), delta, routing)
    dense = torch.zeros(2, 3, 3, 2)
    for row, (place, expert) in enumerate(zip([2, 0, 1, 3], [0, 2, 2, 2], strict=True)):
        dense[place // 2, expert] += torch.outer(delta[row], x[row])
    assert plain.total is not None
    torch.testing.assert_close(plain.total, dense.flatten(1, 2))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_gives_the_same_rows_and_comes_back(implementation: str) -> None:
    """Oracle: the rows of the eager one; the module's own forward pass is there afterwards, also after an error."""
    model = model_of("olmoe")
    settings: dict[str, Any] = {"sketch": "countsketch", "sketch_dim": 512, "rank": 3}
    wanted = analyzer_of(model, **settings).compute_pefs(examples_of(3), progress=False)
    model.set_experts_implementation(implementation)
    before = model(torch.tensor([[6, 7, 8]])).logits
    pefs = analyzer_of(model, **settings).compute_pefs(examples_of(3), progress=False)
    assert pefs.fingerprint == wanted.fingerprint
    for i in range(3):
        assert reference.relative_error_of_factors(wanted.factors[i], pefs.factors[i]) <= 1e-5
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(torch.tensor([[6, 7, 8]])).logits, before)


def test_experts_that_are_named_are_seen_by_hooks() -> None:
    """Oracle: the PEFs of the same weights among the targets; nothing is left to autograd."""
    model = model_of("gpt_oss")
    sketch: dict[str, Any] = {"sketch": "countsketch", "sketch_dim": 512, "rank": 3}
    among = analyzer_of(model, target_modules=["gate_up_proj", "down_proj"], **sketch)
    named = analyzer_of(model, target_modules=(), parameters=("gate_up_proj", "down_proj"), **sketch)
    assert len(among.maps) == 4 and not named.parameters
    a, b = (each.compute_pefs(examples_of(3), progress=False) for each in (among, named))
    assert a.fingerprint == b.fingerprint
    torch.testing.assert_close(a.factors, b.factors)


def test_experts_are_left_out_by_their_own_name_and_by_their_modules() -> None:
    """Oracle: the names."""
    model = model_of("mixtral")
    assert sum(m.fused is not None for m in find_linear_maps(model)) == 4
    assert not any(m.fused for m in find_linear_maps(model, exclude_modules=["experts"]))
    left = find_linear_maps(model, exclude_modules=r".*gate_up_proj")
    assert [m.parameter.rpartition(".")[2] for m in left if m.fused is not None] == ["down_proj"] * 2


class _Doubled(torch.nn.Module):
    """Looks like experts, and gives twice what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 4, 4))
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for slot in range(top_k_index.shape[1]):
            for t, e in enumerate(top_k_index[:, slot].tolist()):
                gate, up = (self.gate_up_proj[e] @ hidden_states[t]).chunk(2)
                total[t] += self.factor * top_k_weights[t, slot] * (self.down_proj[e] @ (self.act_fn(gate) * up))
        return total

    factor = 2.0


def test_modules_that_compute_something_else_than_experts_are_left_out() -> None:
    """Oracle: a module of the same parameters whose formula differs by a factor, and the one without it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = _Doubled()
    assert not find_experts(other)
    plain = copy.copy(other)
    plain.factor = 1.0
    assert list(find_experts(plain)) == [""]


class _Limited(_Doubled):
    """Looks like experts, and limits what they give, which only large numbers reach."""

    factor = 1.0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights).clamp(-200, 200)


class _WithMore(_Doubled):
    """Looks like experts, and needs what is not there."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise KeyError("capacity")


def test_experts_that_limit_large_numbers_are_left_out() -> None:
    """Oracle: the limit; random tokens of norm one do not reach it, those thirty times as large do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        limited = _Limited()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    assert limited(x, index, weights).abs().max() < 200 <= limited(30 * x, index, weights).abs().max()
    assert not find_experts(limited)


@pytest.mark.parametrize(("cls", "reason"), [(_Doubled, "0.5 of its norm"), (_WithMore, "KeyError('capacity')")])
def test_the_log_says_why_what_looks_like_experts_is_none(
    cls: type[_Doubled], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: half of what the module gives is missing; the error that it raises."""
    with caplog.at_level(logging.INFO):
        assert not find_experts(torch.nn.ModuleDict({"mlp": cls()}))
    assert cls.__name__ in caplog.text and "mlp" in caplog.text and reason in caplog.text


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_experts_in_an_adapter_have_its_rows_and_those_of_before_are_refused(family: str) -> None:
    """Oracle: JᵀSJ by autograd over the weights inside PEFT's wrapper; the adapter moves what the model predicts.

    An analyzer that was made before knows the experts under another name, where no hook would see them.
    """
    model, examples = model_of(family), examples_of(3)
    bare = analyzer_of(model)
    known = dense_rows(model, examples[0], bare.maps)
    parameters = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=parameters)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    analyzer = analyzer_of(wrapped)
    pefs = analyzer.compute_pefs(examples, batch_size=3, progress=False)
    weights = bare_parameters(wrapped)
    wrapped.get_parameter = weights.__getitem__
    for i, example in enumerate(examples):
        rows = dense_rows(wrapped, example, analyzer.maps)
        A = pefs.factors[i].double() * pefs.norms[i].sqrt()
        assert reference.relative_error_of_factors(rows, A) <= 1e-4
        assert i > 0 or reference.relative_error_of_factors(known, A) > 1e-2
    with pytest.raises(UnsupportedModelError, match=r"experts.*NPEFFAnalyzer"):
        bare.compute_pefs(examples, progress=False)
    assert all("forward" not in vars(module) for module in wrapped.modules())


def _on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("how", ["disk_offload", "lora", "modules_to_save"])
def test_fused_experts_under_a_wrapper_have_the_rows_of_the_bare_model(how: str, tmp_path: Path) -> None:
    """Oracle: the bare model in one process; a new adapter changes nothing, and offloaded weights are the same.

    Two processes with FSDP2: tests/test_processes.py.
    """
    examples = examples_of(3)
    truth = analyzer_of(model_of("mixtral")).compute_pefs(examples, batch_size=3, progress=False)
    wrap: dict[str, Any] = {
        "disk_offload": lambda model: _on_disk(model, tmp_path),
        "lora": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])),
        "modules_to_save": lambda model: get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"])
        ),
    }
    model = wrap[how](model_of("mixtral")).eval()
    pefs = analyzer_of(model).compute_pefs(examples, batch_size=3, progress=False)
    assert pefs.sketch().shapes == truth.sketch().shapes
    assert any("experts" in name for name in truth.sketch().shapes)
    torch.testing.assert_close(pefs.factors, truth.factors, atol=1e-6, rtol=1e-6)
    assert pefs.info["selftest"]["difference_error"] < 1e-2


def test_experts_in_8_bits_are_left_out_since_their_scales_lie_elsewhere() -> None:
    """Oracle: the same module in 32 bits, whose experts are seen."""
    plain = _Doubled()
    plain.factor = 1.0
    assert find_experts(plain)
    for name in ("gate_up_proj", "down_proj"):
        setattr(plain, name, torch.nn.Parameter(getattr(plain, name).detach().to(torch.float8_e4m3fn), False))
    assert not find_experts(plain)


@pytest.fixture(scope="module")
def lifted() -> dict[str, Any]:
    """A model of every layout with one of its components in the weights."""
    made = {}
    for family in ("qwen3_moe", "gpt_oss", "dbrx", "llama4_text"):
        model = model_of(family)
        analyzer = analyzer_of(model, sketch="countsketch", sketch_dim=2048, rank=3)
        examples = examples_of(6)
        pefs = analyzer.compute_pefs(examples, progress=False)
        decomposition = analyzer.decompose(pefs, 2, n_restarts=1)
        made[family] = model, analyzer, examples, pefs, decomposition
    return made


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx", "llama4_text"])
def test_directions_lifted_in_fused_experts_are_sums_of_autograds_gradients(lifted: Any, family: str) -> None:
    """Oracle: Σ coef · row of the stored cotangents, each row by autograd over the weights as they are stored."""
    model, analyzer, examples, pefs, decomposition = lifted[family]
    direction = analyzer.lift(decomposition, 0, pefs, examples, selective=False)
    coefficients = combination(decomposition, pefs)[0][0]
    names = [m.parameter for m in analyzer.maps]
    total = {n: torch.zeros(model.get_parameter(n).shape) for n in names}
    tensors = [model.get_parameter(n).requires_grad_(True) for n in names]
    for i, example in enumerate(examples):
        hidden = model.model if hasattr(model, "model") else model.transformer
        state = hidden(input_ids=torch.tensor([example["input_ids"]])).last_hidden_state[0, -1:]
        v = torch.einsum("c,cts->ts", coefficients[i].float(), pefs.cotangents[i].float())
        output = state if v.shape[-1] == state.shape[-1] else model.get_output_embeddings()(state)
        for name, g in zip(names, torch.autograd.grad((output * v).sum(), tensors, allow_unused=True), strict=True):
            total[name] += 0 if g is None else g
    for tensor in tensors:
        tensor.requires_grad_(False)
    assert {n: v.shape for n, v in direction.items()} == {n: v.shape for n, v in total.items()}
    assert direction.cosine(total) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_direction_in_fused_experts_acts_in_the_activations_and_as_an_adapter(
    lifted: Any, family: str, tmp_path: Any
) -> None:
    """Oracle: W + s·ΔW in the weights; of the adapter, PEFT's own reading of the file on a fresh model, and `delta`."""
    model, analyzer, examples, pefs, decomposition = lifted[family]
    direction = analyzer.lift(decomposition, 0, pefs, examples, selective=False)
    ids = torch.tensor([[6, 7, 8, 9]])
    base = model(ids).logits.detach()
    with direction.applied_to(model, 0.5):
        wanted = model(ids).logits.detach()
    assert float((wanted - base).norm()) > 1e-2 * float(base.norm())
    with direction.applied_in_activations(model, 0.5):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids).logits, base)
    adapter = direction.to_adapter(rank=16, scale=0.5)
    adapter.save_pretrained(tmp_path / "lora")
    fresh = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(fresh(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    for name, delta in direction.items():
        torch.testing.assert_close(adapter.delta(name), 0.5 * delta, rtol=1e-4, atol=1e-5)
    with adapter.applied_in_activations(model):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_rank_one_has_rank_one_in_every_expert(lifted: Any, tmp_path: Any) -> None:
    """Oracle: the best approximation of every ΔW_e by SVD, added to the weights of a fresh model; `measure` too."""
    model, analyzer, examples, pefs, decomposition = lifted["qwen3_moe"]
    direction = analyzer.lift(decomposition, 0, pefs, examples, selective=False)
    adapter = direction.to_adapter(rank=1, scale=0.5)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in direction.items():
            U, S, V = torch.linalg.svd(delta, full_matrices=False)
            moved.get_parameter(name).add_(0.5 * S[..., :1, None] * U[..., :1] @ V[..., :1, :])
    ids = torch.tensor([[6, 7, 8, 9]])
    adapter.save_pretrained(tmp_path / "lora")
    fresh = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(fresh(ids).logits, moved(ids).logits, rtol=1e-4, atol=1e-4)
    with adapter.applied_in_activations(model):
        torch.testing.assert_close(model(ids).logits, moved(ids).logits, rtol=1e-4, atol=1e-4)


def test_directions_in_layouts_that_adapters_do_not_carry_are_refused_by_name(lifted: Any) -> None:
    """Oracle: the name of the weight, and what to do."""
    for family, name in (("dbrx", "w1"), ("llama4_text", "gate_up_proj")):
        _, analyzer, examples, pefs, decomposition = lifted[family]
        direction = analyzer.lift(decomposition, 0, pefs, examples, selective=False)
        with pytest.raises(UnsupportedModelError, match=rf"{name}.*kind='delta'"):
            direction.to_adapter(rank=1)
        with pytest.raises(UnsupportedModelError, match=rf"{name}.*applied_to"):
            direction.linear_deltas()


def test_examples_of_a_batch_have_their_own_changes_of_fused_experts(lifted: Any) -> None:
    """Oracle: each example alone with its step in the weights."""
    model, analyzer, examples, pefs, decomposition = lifted["qwen3_moe"]
    deltas = [analyzer.lift(decomposition, j, pefs, examples, selective=False) for j in (0, 1)]
    ids = torch.tensor([[6, 7, 8], [9, 10, 11], [5, 6, 7]])
    with ChangedActivations(model, [d.linear_deltas() for d in deltas]) as changed:
        changed.assign([0, 1, 0], [0.5, -0.3, 0.0])
        together = model(ids).logits
    for i, (number, scale) in enumerate([(0, 0.5), (1, -0.3)]):
        with deltas[number].applied_to(model, scale):
            torch.testing.assert_close(together[i], model(ids[i : i + 1]).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[2], model(ids[2:]).logits[0], rtol=1e-4, atol=1e-4)


def test_rows_under_a_change_in_the_activations_are_those_of_the_changed_weights(lifted: Any) -> None:
    """Oracle: the same PEFs with the weights moved; both replace the experts' forward pass, one inside the other."""
    model, analyzer, examples, pefs, decomposition = lifted["qwen3_moe"]
    direction = analyzer.lift(decomposition, 0, pefs, examples, selective=False)
    settings: dict[str, Any] = {"sketch": "countsketch", "sketch_dim": 512, "rank": 3}
    with direction.applied_to(model, 0.5):
        wanted = analyzer_of(model, **settings).compute_pefs(examples, progress=False)
    with direction.applied_in_activations(model, 0.5):
        found = analyzer_of(model, **settings).compute_pefs(examples, progress=False)
    torch.testing.assert_close(found.norms, wanted.norms, rtol=1e-3, atol=0)
    assert not torch.allclose(pefs.norms, wanted.norms, rtol=1e-2)
    assert all("forward" not in vars(module) for module in model.modules())


def test_tokens_of_fused_experts_add_up_to_the_alignment(lifted: Any) -> None:
    """Oracle: contributions and what has no place sum to the alignment, and a sum of δxᵀ by the plain receiver."""
    for family in ("qwen3_moe", "gpt_oss"):
        _, analyzer, examples, pefs, decomposition = lifted[family]
        for alignment in analyzer.token_alignments(decomposition, pefs, examples, {0: range(6)}):
            total = sum(alignment.contributions) + alignment.unplaced
            assert total == pytest.approx(alignment.alignment, rel=1e-3)
            assert abs(alignment.unplaced) <= 1e-6 * abs(alignment.alignment)
