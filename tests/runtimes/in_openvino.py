"""`python -m tests.runtimes.in_openvino`: adapters in OpenVINO GenAI against PEFT, the safetensors file alone.

Likely next tokens of a random Llama in float32, with a cache of 32 bits. Exits 1 where one's log-probability is further
off than `BOUND`. Needs an interpreter with openvino-genai and optimum-intel in --python (`make runtimes-openvino`).
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
from tests.runtimes.cases import TOKENS, cases_of

BOUND = 1e-4
"""Of a log-probability; sums go in another order."""
LIKELY = 20
"""Tokens compared: beams of one token each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of an environment with OpenVINO GenAI")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_of("llama")
        model.save_pretrained(folder / "model")
        cases = cases_of(model, folder / "adapters", selective=True)
        files = [str(folder / "adapters" / case.folder / "adapter_model.safetensors") for case in cases]
        asked = {"model": str(folder / "model"), "tokens": TOKENS, "beams": LIKELY, "adapters": files}
        (folder / "requests.json").write_text(json.dumps(asked))
        script = Path(__file__).with_name("openvino_engine.py")
        command = [arguments.python, script, folder / "requests.json", folder / "answers.json"]
        subprocess.run(command, check=True, timeout=1200)
        answers = json.loads((folder / "answers.json").read_text())
    wanted = [("none", cases[0].base), *((case.name, case.expected) for case in cases)]
    worst = 0.0
    for (adapter, logits), answer in zip(wanted, answers, strict=True):
        expected = logits.log_softmax(-1)
        off = max(abs(value - float(expected[int(token)])) for token, value in answer.items())
        print(f"{adapter:20} largest difference of a log-probability: {off:.1e}")
        worst = max(worst, off)
    return 0 if worst < BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
