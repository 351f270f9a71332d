"""Where adapters load: the table, the file's own promises, and sums. Other programs are run by `make runtimes`.

Oracles: PEFT's logits against the model with W + ΔW; the page against the table; dense sums.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_npeff import Adapter, UnsupportedModelError
from hf_npeff.sharing.runtimes import RUNTIMES, table, verdicts, where_it_loads
from tests.test_adapters import direction_of, logits, setting

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adapters.md"
BEGIN, END = "<!-- programs: python -m tests.test_where_it_loads -->\n", "<!-- end of programs -->\n"


def test_the_page_has_the_table() -> None:
    """Identity with `sharing.runtimes.table`."""
    inner = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert inner.splitlines() == table()


def test_the_worst_part_decides() -> None:
    """Oracle: the rows of the table."""
    by_name = {runtime.name: runtime.verdicts for runtime in RUNTIMES if runtime.name != "sentence-transformers"}
    assert set(verdicts("lora", {"a.weight": "linear", "b.weight": "conv1d"}).values()) == {"loads"}
    mixed = verdicts("lora", {"a.weight": "linear", "norm.weight": "norm"})
    assert mixed == {name: told["norms"] for name, told in by_name.items()}
    assert mixed["OpenVINO GenAI"] == "dropped" and mixed["vLLM"] == "refused" and mixed["PEFT"] == "loads"
    linear = {"a.weight": "linear"}
    assert verdicts("shira", linear) == {name: told["SHiRA"] for name, told in by_name.items()}
    assert verdicts("delta", linear) == {} and where_it_loads("delta", linear) == "only hf_npeff"


def test_an_adapter_and_its_card_say_where_it_loads() -> None:
    """Oracle: the rows of the table, read by hand."""
    model, _ = setting("llama", "causal-lm")
    plain = direction_of(model).to_adapter(rank=2)
    assert plain.loads_in == ["PEFT", "transformers", "vLLM", "llama.cpp", "OpenVINO GenAI"]
    plain.config["task_type"] = "FEATURE_EXTRACTION"
    assert plain.loads_in == ["PEFT", "transformers", "sentence-transformers"]
    plain.config |= {"task_type": None, "auto_mapping": {"base_model_class": "BertForSequenceClassification"}}
    assert plain.loads_in == ["PEFT", "transformers"]  # the others run language models
    norms = direction_of(model, r"(q_proj|norm)\.weight").to_adapter(rank=2, model=model)
    assert norms.loads_in == ["PEFT", "transformers"]
    assert "| Loads in | PEFT, transformers; not OpenVINO GenAI, which silently drops a part" in norms.card()
    # transformers takes a SHiRA adapter whole and applies it to other entries of the weights: nothing is dropped.
    silent = "PEFT; not transformers, which silently changes other weights"
    assert where_it_loads("shira", {"a.weight": "linear"}) == silent


@pytest.mark.parametrize("kind", ["lora", "shira"])
@pytest.mark.parametrize("module", ["in_proj", "out_proj"])
def test_an_adapter_on_out_proj_of_a_mamba_says_that_peft_refuses_it(module: str, kind: Any, tmp_path: Path) -> None:
    """Oracle: PEFT and transformers themselves."""
    model, _ = setting("mamba", "causal-lm")
    direction = direction_of(model, rf".*{module}\.weight")
    direction.info["architecture"] = type(model).__name__
    adapter = direction.to_adapter(rank=2, kind=kind)
    adapter.save_pretrained(tmp_path)
    for name, loads in (("PEFT", PeftModel.from_pretrained), ("transformers", type(model).load_adapter)):
        if name in adapter.loads_in:
            loads(copy.deepcopy(model), tmp_path)
        elif kind == "lora":
            with pytest.raises(ValueError, match="out_proj"):
                loads(copy.deepcopy(model), tmp_path)
    assert ("PEFT" in adapter.loads_in) == (module == "in_proj" or kind == "shira")
    assert adapter.loads_in or "| Loads in | only hf_npeff |" in adapter.card()


@pytest.mark.parametrize("scale", [0.7, -3.0])
def test_a_program_that_ignores_lora_alpha_sees_the_whole_change(scale: float, tmp_path: Path) -> None:
    """OpenVINO GenAI reads the factors alone: alpha = r, and scale·ΔW is the product of what is in the file."""
    model, _ = setting("llama", "causal-lm")
    direction = direction_of(model)
    adapter = direction.to_adapter(rank=16, scale=scale)
    assert adapter.config["lora_alpha"] == adapter.config["r"] == 16 and not adapter.config["use_rslora"]
    adapter.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, delta in direction.items():
        stem = f"base_model.model.{name.removesuffix('weight')}"
        product = stored[f"{stem}lora_B.weight"] @ stored[f"{stem}lora_A.weight"]
        torch.testing.assert_close(product, scale * delta, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pattern", [r"down_proj\.weight", r"(q_proj|norm)\.weight", r"(embed_tokens|lm_head)\.weight"])
def test_transformers_loads_it_without_peft_model(pattern: str, tmp_path: Path) -> None:
    """Oracle: W + ΔW; logits within 1e-5 of an effect above .01."""
    model, inputs = setting("llama", "causal-lm")
    before, direction = logits(model, inputs), direction_of(model, pattern)
    with direction.applied_to(model, 0.7):
        truth = logits(model, inputs)
    assert (truth - before).abs().max() > 0.01
    direction.to_adapter(rank=16, scale=0.7, model=model).save_pretrained(tmp_path)
    model.load_adapter(tmp_path)
    torch.testing.assert_close(logits(model, inputs), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "task"), [("llama", "causal-lm"), ("gpt2", "causal-lm")])
def test_a_sum_is_exact(family: str, task: str, tmp_path: Path) -> None:
    """Oracle: W + ΔW₁ − ½ΔW₂ in PEFT, of adapters in overlapping weights; saved, and read again."""
    model, inputs = setting(family, task)
    both = r"(q_proj|down_proj|c_fc|c_attn)\.weight", r"(down_proj|up_proj|embed_tokens|c_fc|c_proj)\.weight"
    first, second = (direction_of(model, p, seed=i).to_adapter(rank=1 + i) for i, p in enumerate(both))
    total = Adapter.sum([first, second], scales=[1, -0.5])
    assert total.config["r"] == total.config["lora_alpha"] == 3
    for name in total.layouts:
        parts = [s * a.delta(name) for s, a in ((1, first), (-0.5, second)) if name in a.layouts]
        torch.testing.assert_close(total.delta(name), sum(parts[1:], start=parts[0]), atol=1e-6, rtol=0)
    total.save_pretrained(tmp_path / "sum")
    with torch.no_grad():
        for name in total.layouts:
            model.get_parameter(name).add_(total.delta(name))
        truth = logits(model, inputs)
        for name in total.layouts:
            model.get_parameter(name).sub_(total.delta(name))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(model, tmp_path / "sum"), inputs), truth, atol=1e-5, rtol=0
    )
    again = Adapter.from_pretrained(tmp_path / "sum")
    assert again.layouts == total.layouts
    by_signs = first + -0.5 * second
    assert all(torch.equal(by_signs.tensors[key], value) for key, value in total.tensors.items())
    assert all(torch.equal((-first).delta(name), -first.delta(name)) for name in first.layouts)


def test_what_cannot_be_summed_is_refused() -> None:
    """Oracle: what each error names."""
    model, _ = setting("llama", "causal-lm")
    plain = direction_of(model).to_adapter()
    norms: Any = direction_of(model, r"(q_proj|norm)\.weight").to_adapter(model=model)
    with pytest.raises(UnsupportedModelError, match=r"norm\.weight \(norm\)"):
        plain + norms
    with pytest.raises(UnsupportedModelError, match="'delta'"):
        Adapter.sum([plain, direction_of(model).to_adapter(kind="delta")])
    with pytest.raises(ValueError, match="0"):
        Adapter.sum([])
    other = direction_of(model).to_adapter()
    other.config["base_model_name_or_path"] = "somebody/else"
    with pytest.raises(ValueError, match="somebody/else"):
        plain + other


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    lines = "".join(f"{line}\n" for line in table())
    PAGE.write_text(before + BEGIN + lines + END + rest.partition(END)[2], encoding="utf-8")
