#!/usr/bin/env bash
# mlx-lm 0.32.2, which itself needs transformers 5.7 or later, loads a Llama or OLMo 2 that transformers 5.23's
# save_pretrained wrote with a rotary base of 10000, whatever the base is (500000 in Llama 3), and without its rotary
# scaling: logits of the first token are right, those of later ones are another model's. No warning. transformers 5
# writes both into `rope_parameters` alone; mlx-lm's Llama reads `rope_theta` and `rope_scaling`, where version 4 wrote
# them. Its Qwen3 reads either. With the two copied there, logits agree. So a Llama 3 after merge_and_unload and
# save_pretrained, or a fine-tuned one, goes wrong, while the file it came from loads rightly.
# Expected: the logits of transformers, or an error, as mlx-lm gives for GPT-NeoX and Granite.
# Downloads about 350 MB with CPU builds of torch and mlx; Linux, Python 3.11. Exits 0 while mlx-lm behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet mlx-lm==0.32.2 "mlx[cpu]==0.32.4" transformers==5.23.0 torch==2.13.0
cat > "$folder/loaded.py" <<'PYTHON'
import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy
import torch
import transformers
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
folder = Path(sys.argv[1])
sizes = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
)
ids = torch.randint(2, 64, (1, 48), generator=torch.Generator().manual_seed(1))


scaling = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def far(model_type, base, scaled, at_the_top):
    """The largest difference of a logit, over their spread, of the first position and of all."""
    torch.manual_seed(0)
    rope = {"rope_theta": base} | (scaling if scaled else {"rope_type": "default"})
    config = transformers.AutoConfig.for_model(model_type, **sizes, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        expected = model(ids, use_cache=False).logits[0]
    model.save_pretrained(folder)
    if at_the_top:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": base, "rope_scaling": rope}))
    loaded, _ = load_model(folder)
    logits = torch.from_numpy(numpy.array(loaded(mx.array(ids.numpy())).astype(mx.float32)))[0]
    error = (logits - expected).abs().amax(-1) / expected.std()
    return float(error[0]), float(error.max())


print("mlx-lm", importlib.metadata.version("mlx-lm"), "transformers", transformers.__version__)
good = True
for model_type, base, scaled, at_the_top in (
    ("llama", 1e4, False, False), ("llama", 1e4, True, False), ("llama", 1e4, True, True),
    ("llama", 5e5, False, False), ("llama", 5e5, False, True), ("olmo2", 5e5, False, False),
    ("qwen3", 5e5, False, False),
):  # fmt: skip
    first, every = far(model_type, base, scaled, at_the_top)
    wrong = model_type != "qwen3" and (base != 1e4 or scaled) and not at_the_top
    notes = ", scaled" * scaled + ", copied" * at_the_top
    print(f"{model_type}, base {base:.0f}{notes}: logits off by {first:.1e} at the first token, {every:.1e} at any")
    good = good and first < 1e-3 and (every > 0.1 if wrong else every < 1e-3)
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/loaded.py" "$folder/model" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
