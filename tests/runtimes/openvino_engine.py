"""Likely next tokens in OpenVINO GenAI, with and without adapters.

python openvino_engine.py requests.json answers.json, by the interpreter of an environment that has openvino-genai and
optimum-intel; nothing of this repository is imported. requests: {model, tokens, beams, adapters: [file]}; answers:
{token: log-probability} of the `beams` most likely next tokens, of the base and of each adapter.
"""

import json
import subprocess
import sys

import numpy as np


def main() -> None:
    import openvino as ov
    import openvino_genai as genai

    with open(sys.argv[1]) as file:
        asked = json.load(file)
    converted = asked["model"] + "-openvino"
    convert = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--task", "text-generation-with-past"]
    options = ["--model", asked["model"], "--weight-format", "fp32", converted]
    subprocess.run([sys.executable, *convert, *options], check=True)
    tokens = ov.Tensor(np.array([asked["tokens"]], dtype=np.int64))
    inputs = genai.TokenizedInputs(tokens, ov.Tensor(np.ones((1, len(asked["tokens"])), dtype=np.int64)))
    answers = []
    for path in [None, *asked["adapters"]]:
        adapters = {} if path is None else {"adapters": genai.AdapterConfig(genai.Adapter(path))}
        pipeline = genai.LLMPipeline(
            converted, "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32", **adapters
        )
        # A beam of one token is a next token, and its score the log-probability.
        config = genai.GenerationConfig(
            max_new_tokens=1, num_beams=asked["beams"], num_return_sequences=asked["beams"], ignore_eos=True
        )
        out = pipeline.generate(inputs, config)
        answers.append({int(t[-1]): float(s) for t, s in zip(out.tokens, out.scores)})  # noqa: B905
    with open(sys.argv[2], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
