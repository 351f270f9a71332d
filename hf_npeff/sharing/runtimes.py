"""Which programs load which parts of an adapter: one table for cards, reports and docs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["linear maps", "experts", "embeddings", "biases", "norms", "SHiRA", "Mamba's out_proj"]
Verdict = Literal["loads", "refused", "dropped", "wrong", "not tested"]
"""loads: logits are those of W + ΔW. refused: an error. dropped: loads without this part, silently. wrong: loads, but
the logits are wrong."""

_PART_OF: dict[str, Part] = {
    "linear": "linear maps",
    "conv1d": "linear maps",
    "experts": "experts",
    "experts-transposed": "experts",
    "embedding": "embeddings",
    "bias": "biases",
    "norm": "norms",
}
_MAMBA = ("Mamba", "FalconMamba", "FalconH1", "NemotronH")
"""The classes, by how their names begin, on whose `out_proj` PEFT refuses a LoRA: kernels for training read its weight
without calling the layer."""
_WORST: tuple[Verdict, ...] = ("wrong", "dropped", "refused", "not tested", "loads")
_SILENT: dict[Verdict, str] = {
    "dropped": "silently drops a part",
    "wrong": "silently changes other weights",
}
"""The cases that a card warns of, because the program itself does not."""


@dataclass(frozen=True)
class Runtime:
    """A program that runs models with adapters.

    Attributes:
        name: the program's usual name.
        version: the version that was tested.
        verdicts: {part of an adapter: what happens to it}.
        how: how to load an adapter, in words.
        shown_by: the command that tests the row.
        task_type: PEFT's name of the task of the tested models; None if it runs any model.
    """

    name: str
    version: str
    verdicts: Mapping[Part, Verdict]
    how: str
    shown_by: str
    task_type: str | None = None


_EVERYTHING: dict[Part, Verdict] = dict.fromkeys(
    ("linear maps", "experts", "embeddings", "biases", "norms", "SHiRA", "Mamba's out_proj"), "loads"
)
RUNTIMES: tuple[Runtime, ...] = (
    Runtime(
        "PEFT",
        "0.21.2",
        {**_EVERYTHING, "Mamba's out_proj": "refused"},
        "`PeftModel.from_pretrained(model, folder)`",
        "`pytest tests/test_adapters.py tests/test_experts.py`",
    ),
    Runtime(
        "transformers",
        "5.23.0",
        {**_EVERYTHING, "experts": "not tested", "SHiRA": "wrong", "Mamba's out_proj": "refused"},
        "`model.load_adapter(folder)`",
        "`pytest tests/test_where_it_loads.py`",
    ),
    Runtime(
        "sentence-transformers",
        "6.2.0",
        {**dict.fromkeys(_EVERYTHING, "not tested"), "linear maps": "loads"},
        "`model.load_adapter(folder)`; only embedding models",
        "`pytest tests/test_sentence_transformers.py`",
        "FEATURE_EXTRACTION",
    ),
    Runtime(
        "vLLM",
        "0.32.0",
        {
            "linear maps": "loads",
            "experts": "not tested",
            "embeddings": "loads",
            "biases": "refused",
            "norms": "refused",
            "SHiRA": "refused",
            "Mamba's out_proj": "not tested",
        },
        "`LLM(model, enable_lora=True, max_lora_rank=8)` or `vllm serve --enable-lora --lora-modules name=folder`",
        "`make runtimes-vllm`",
        "CAUSAL_LM",
    ),
    Runtime(
        "llama.cpp",
        "node-llama-cpp 3.22.1",
        {
            "linear maps": "loads",
            "experts": "refused",
            "embeddings": "refused",
            "biases": "refused",
            "norms": "refused",
            "SHiRA": "refused",
            "Mamba's out_proj": "refused",
        },
        "`adapter.to_gguf(file)`, then `--lora file`; the refusals are `to_gguf`'s",
        "`make runtimes`, `pytest tests/test_gguf.py`",
        "CAUSAL_LM",
    ),
    Runtime(
        "OpenVINO GenAI",
        "2026.4",
        {
            "linear maps": "loads",
            "experts": "not tested",
            "embeddings": "not tested",
            "biases": "not tested",
            "norms": "dropped",
            "SHiRA": "not tested",
            "Mamba's out_proj": "not tested",
        },
        '`AdapterConfig(Adapter("adapter_model.safetensors"))`, which ignores `lora_alpha`, but the scale is in B',
        "`make runtimes-openvino`",
        "CAUSAL_LM",
    ),
)


def _parts_of(kind: str, layouts: Mapping[str, str], architecture: str = "") -> set[Part]:
    """The parts of an adapter that programs treat differently.

    Args:
        kind: "lora", "shira" or "delta".
        layouts: {parameter: layout}.
        architecture: the class of the base model, if it is known.
    """
    if kind == "shira":
        return {"SHiRA"}
    refused = {name for name in layouts if name.endswith(".out_proj.weight") and architecture.startswith(_MAMBA)}
    return {"Mamba's out_proj" if name in refused else _PART_OF[layout] for name, layout in layouts.items()}


def verdicts(
    kind: str, layouts: Mapping[str, str], task_type: str | None = None, architecture: str = ""
) -> dict[str, Verdict]:
    """{program: the worst verdict on a part of the adapter}; empty for a dense change, which only hf_npeff reads.

    Args:
        kind: "lora", "shira" or "delta".
        layouts: {parameter: layout} of the changed parameters.
        task_type: PEFT's name of the base model's task; programs for other models are left out. None stands for a
            language model.
        architecture: the class of the base model, if it is known.
    """
    if kind == "delta":
        return {}
    parts = _parts_of(kind, layouts, architecture)
    return {
        runtime.name: min((runtime.verdicts[part] for part in parts), key=_WORST.index, default="loads")
        for runtime in RUNTIMES
        if runtime.task_type in (None, task_type or "CAUSAL_LM")
    }


def where_it_loads(kind: str, layouts: Mapping[str, str], task_type: str | None = None, architecture: str = "") -> str:
    """A line with the programs that load all of an adapter, and those that would load it wrongly.

    Args:
        kind: see `verdicts`.
        layouts: see `verdicts`.
        task_type: see `verdicts`.
        architecture: see `verdicts`.

    Example:
        >>> where_it_loads("lora", {"model.layers.0.mlp.up_proj.weight": "linear", "model.norm.weight": "norm"})
        'PEFT, transformers; not OpenVINO GenAI, which silently drops a part'
    """
    verdict_of = verdicts(kind, layouts, task_type, architecture)
    good = ", ".join(name for name, verdict in verdict_of.items() if verdict == "loads") or "only hf_npeff"
    warnings = [f"; not {name}, which {_SILENT[verdict]}" for name, verdict in verdict_of.items() if verdict in _SILENT]
    return good + "".join(warnings)


def table() -> list[str]:
    """The table in Markdown, with a row for each program; docs/adapters.md has it."""
    parts = list(_EVERYTHING)
    lines = [f"| program | version | {' | '.join(parts)} | how | shown by |", "|---" * (len(parts) + 4) + "|"]
    for runtime in RUNTIMES:
        cells = " | ".join(runtime.verdicts[part] for part in parts)
        lines.append(f"| {runtime.name} | {runtime.version} | {cells} | {runtime.how} | {runtime.shown_by} |")
    return lines
