"""Log-probabilities of the next token in vLLM, base and adapters in one engine.

python vllm_engine.py requests.json answers.json, by the interpreter of an environment that has vLLM; nothing of this
repository is imported. requests: {model, tokens, max_lora_rank, adapters: [folder]}; answers: log-probabilities
(vocabulary,) of the base and of each adapter.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB: a tiny model's
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with open(sys.argv[1]) as file:
        asked = json.load(file)
    engine = LLM(
        asked["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=asked["max_lora_rank"],
        max_loras=len(asked["adapters"]),
        max_logprobs=-1,
        max_model_len=64,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )
    adapters = [LoRARequest(f"adapter-{i}", i + 1, path) for i, path in enumerate(asked["adapters"])]
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    answers = []
    # The adapters share a batch; the base has one of its own, since beside adapters a CPU may answer for it with
    # the weights of one of them (findings/vllm-cpu-base-request-beside-several-loras.sh).
    for requests in ([None], adapters):
        prompts = [{"prompt_token_ids": asked["tokens"]} for _ in requests]
        for output in engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False):
            likely = output.outputs[0].logprobs[0]
            answers.append([likely[token].logprob for token in range(len(likely))])
    with open(sys.argv[2], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
