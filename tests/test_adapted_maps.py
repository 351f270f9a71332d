"""Weights inside PEFT's adapters: rows are what a change of the weights does, or the adapter is refused by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from hf_npeff import NPEFFCallback, ParameterDirection, UnsupportedModelError
from hf_npeff.fisher.adapted_maps import check_adapted_maps
from hf_npeff.fisher.bare_model import bare_parameters
from tests import reference
from tests.analyses import analyzer_of, in_parameters
from tests.tiny import tiny_batch, tiny_model

QUERY = {"target_modules": ["query"]}
FOLLOWED: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(r=2, lora_bias=True, **QUERY),
    "IA3": peft.IA3Config(feedforward_modules=[], **QUERY),
    "LoHa": peft.LoHaConfig(r=2, **QUERY),
    "VeRA": peft.VeraConfig(r=2, **QUERY),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, **QUERY),
}
REFUSED: dict[str, tuple[str, peft.PeftConfig]] = {
    "DoRA": ("DoRA", peft.LoraConfig(r=2, use_dora=True, **QUERY)),
    "HRA": ("HRALinear", peft.HRAConfig(r=2, **QUERY)),
    "SHiRA": ("shira", peft.ShiraConfig(r=2, **QUERY)),
}


def adapted(config: peft.PeftConfig) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)  # PEFT draws its first weights globally
        model = peft.get_peft_model(tiny_model("bert", num_labels=3), config).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the adapter's
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def both_ways(model: Any, example: dict[str, Any], rows: Tensor | None = None) -> tuple[float, float]:
    """δᵀFδ along the queries' own weights, which DoRA does not depend on, and a random part: by rows, and by moving.

    Without `rows` they are autograd's.
    """
    inputs = {"input_ids": torch.tensor([example["input_ids"]])}
    weights = {n: p for n, p in bare_parameters(model).items() if n.endswith("query.weight")}
    generator = torch.Generator().manual_seed(7)
    noise = [0.3 * float(w.std()) * torch.randn(w.shape, generator=generator).to(w) for w in weights.values()]
    directions = [w.detach() + part for w, part in zip(weights.values(), noise, strict=True)]
    if rows is None:
        actual = {id(p): n for n, p in model.named_parameters()}
        names = [actual[id(p)] for p in weights.values()]
        terms = reference.terms_of("sequence-classification")
        try:
            rows = reference.example_factor(model, inputs, names, terms)
        except RuntimeError:  # no gradient reaches the weights
            rows = torch.zeros(1, sum(w.numel() for w in weights.values()))
    flat = torch.cat([d.flatten() for d in directions])
    moved = reference.curvature_by_moving(lambda: model(**inputs).logits[0], [*weights.values()], directions)
    return float((rows.double() @ flat).square().sum()), moved


@pytest.mark.parametrize("kind", FOLLOWED)
def test_rows_inside_an_adapter_are_what_a_change_of_the_weights_does(kind: str) -> None:
    """Oracle: KL when the weights are moved, without a gradient; the model's mode comes back as it was."""
    model = adapted(FOLLOWED[kind])
    data = tiny_batch(tiny_model("bert"), 2, seed=3)
    analyzer = analyzer_of(model.train(), rank=3, target_modules=["query"])
    modes = [module.training for module in model.modules()]
    rows = in_parameters(analyzer, analyzer.compute_pefs(data))
    assert [module.training for module in model.modules()] == modes
    for example, own in zip(data, rows, strict=True):
        by_rows, moved = both_ways(model.eval(), example, own)
        assert by_rows == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_hides_what_it_does_with_a_weight_is_refused_until_it_is_merged(kind: str) -> None:
    """Oracle: KL when the weights are moved. Autograd's rows miss it; those of the merged adapter do not."""
    name, config = REFUSED[kind]
    model = adapted(config)
    data = tiny_batch(tiny_model("bert"), 2, seed=3)
    hidden, moved = both_ways(model, data[0])
    assert abs(hidden - moved) > 0.2 * max(hidden, moved)
    analyzer = analyzer_of(model, rank=3)
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*layer\.0\.attention\.self\.query.*merge_adapter"):
        analyzer.compute_pefs(data)
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    change = ParameterDirection({weight: torch.eye(16)}, {weight: "linear"})
    with pytest.raises(UnsupportedModelError, match="merge_adapter"):
        analyzer.measure(change, data, ranks=(2,))
    others = analyzer_of(model, rank=3, exclude_modules=["query"]).compute_pefs(data)
    assert len(others) == 2
    model.merge_adapter()
    analyzer = analyzer_of(model, rank=3, target_modules=["query"])
    for example, rows in zip(data, in_parameters(analyzer, analyzer.compute_pefs(data)), strict=True):
        by_rows, moved = both_ways(model, example, rows)
        assert by_rows == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_own_weights_and_low_precision_are_told_apart_too(dtype: torch.dtype) -> None:
    """Oracle: LoRA is linear in each of its weights; DoRA's norm depends on all of them, and acts while it is on."""
    for config, wrong in ((FOLLOWED["LoRA"], False), (REFUSED["DoRA"][1], True)):
        model = adapted(config).to(dtype)
        for part in ("base_layer", "lora_A.default", "lora_B.default"):
            names = [name for name, _ in model.named_modules() if name.endswith(part)]
            assert len(names) == 2
            if not wrong:
                check_adapted_maps(model, names)
                continue
            with pytest.raises(UnsupportedModelError, match="DoRA"):
                check_adapted_maps(model, names)
            with model.disable_adapter():
                check_adapted_maps(model, names)


def test_a_callback_refuses_such_an_adapter_before_training() -> None:
    """Oracle: the error of the analysis, where training begins."""
    callback = NPEFFCallback(tiny_batch(tiny_model("bert"), 4, seed=1), n_components=1)
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        callback.on_train_begin(None, None, None, model=adapted(REFUSED["DoRA"][1]))  # type: ignore[arg-type]
