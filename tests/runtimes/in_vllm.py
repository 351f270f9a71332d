"""`python -m tests.runtimes.in_vllm`: adapters in vLLM against PEFT, all in one engine.

Exits 1 where a logit's change is further off than `OF_EFFECT` of the largest change, or a probability than `BOUND`.
Needs an interpreter with vLLM in --python (`make runtimes` makes one).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.runtimes.bases import model_of
from tests.runtimes.cases import PATTERNS, TOKENS, Difference, cases_of, report

BOUND = 1e-4
"""Of a probability, in float32."""
OF_EFFECT = 1e-3
"""Log-probabilities come back as numbers of 32 bits, and sums go in another order."""
WIDE = {"hidden_size": 128, "head_dim": 32}
"""Heads of 32 dimensions are the smallest that vLLM runs on a CPU."""
FAMILIES = ("llama", "qwen2", "gemma")
"""GQA; biases beside the fused q, k and v; tied embeddings."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    differences = []
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = model_of(family, **WIDE)
            model.save_pretrained(folder / "model")
            patterns = {**PATTERNS, "embeddings": r"embed_tokens\.weight"} if family == "llama" else PATTERNS
            cases = cases_of(model, folder / "adapters", patterns=patterns, selective=family == "llama")
            asked = {
                "model": str(folder / "model"),
                "tokens": TOKENS,
                "max_lora_rank": 8,  # the least of those that vLLM takes above the adapters' 4
                "adapters": [str(folder / "adapters" / case.folder) for case in cases],
            }
            (folder / "requests.json").write_text(json.dumps(asked))
            script = Path(__file__).with_name("vllm_engine.py")
            command = [arguments.python, script, folder / "requests.json", folder / "answers.json"]
            subprocess.run(command, check=True, timeout=1200)
            base, *answers = map(torch.tensor, json.loads((folder / "answers.json").read_text()))
            for case, answer in zip(cases, answers, strict=True):
                differences.append((family, case.name, Difference.of(case.normalised(), base, answer)))
    return report(differences, BOUND, OF_EFFECT)


if __name__ == "__main__":
    sys.exit(main())
