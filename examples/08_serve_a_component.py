"""Serve a component in vLLM together with its base model, and give both the same prompt.

    python examples/08_serve_a_component.py runs/demo/adapter --prompt "big -> bigger\nsmall ->"

It starts `vllm serve` with the adapter's base model, and with the adapter as a second model. It asks both for the next
tokens, one after the other, and prints the answers. vLLM runs in an environment of its own, whose interpreter --python
names: on a GPU one with `pip install vllm`, on a CPU the one that `make runtimes-vllm` makes. On a CPU the base model
    is
right only if no adapter is used in the same batch (docs/adapters.md), so the requests are made one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from hf_npeff import Adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for --max-lora-rank."""


def ask(url: str, model: str, prompt: str, tokens: int) -> tuple[str, dict[str, float]]:
    """The most likely continuation, and the log-probabilities of the most likely next tokens."""
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 5}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
    return choice["text"], choice["logprobs"]["top_logprobs"][0]


def wait(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until the server answers."""
    for _ in range(int(seconds)):
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended with {server.returncode} before it served anything")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"vLLM did not answer within {seconds:.0f} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of a LoRA adapter, such as `hf-npeff perturb` writes")
    parser.add_argument("--base", help="another path of the base model, instead of the one in the adapter")
    parser.add_argument("--prompt", default="Paris is to France as Rome is to")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--python", default=".venv-runtimes/vllm/bin/python", help="interpreter that has vLLM")
    parser.add_argument("--dtype", default="auto", help="float32 to compare with PEFT")
    parser.add_argument("--seconds", type=float, default=600, help="how long the server may take to start")
    arguments = parser.parse_args()
    adapter = Adapter.from_pretrained(arguments.adapter)
    if "vLLM" not in adapter.loads_in:
        raise SystemExit(f"vLLM does not load all of this adapter; these do: {', '.join(adapter.loads_in)}")
    base = arguments.base or adapter.config["base_model_name_or_path"]
    rank = next(r for r in RANKS if r >= adapter.config["r"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [arguments.python, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name",
               "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", arguments.dtype, "--enable-lora",
               "--max-lora-rank", str(rank), "--lora-modules", f"component={arguments.adapter}", "--max-model-len",
               "512", "--enforce-eager"]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    # A GiB of cache is enough for one prompt; it counts on a CPU alone.
    server = subprocess.Popen(command, env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ})
    try:
        wait(url, server, arguments.seconds)
        for model in ("base", "component"):
            text, likely = ask(url, model, arguments.prompt, arguments.tokens)
            print(f"{model:10} {arguments.prompt!r} → {text!r}")
            print(" " * 10, ", ".join(f"{token!r} {value:.3f}" for token, value in likely.items()))
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
