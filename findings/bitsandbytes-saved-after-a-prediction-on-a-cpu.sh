#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX-512 for bfloat16: a Linear4bit (nf4, scales not quantised themselves) that has
# predicted once gives a state_dict whose scales lie in another order, and predicts with that order itself from then on.
# So saving a model of 4 bits after using it writes another model, and leaves another one in memory: the first
# prediction packs the weight for a kernel and transposes its scales, and state_dict unpacks the weight alone.
# Expected: state_dict changes nothing; what it holds is the layer's weight, as when it is taken before any prediction,
# and as with compress_statistics=True (double quantisation), where it is.
# Downloads about 500 MB with a CPU build of torch; Python 3.11. Exits 0 while bitsandbytes behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6 packaging==26.3
cat > "$folder/saved.py" <<'PYTHON'
import sys

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

OUT, IN = 256, 512


def layer_of(compress):
    return Linear4bit(IN, OUT, bias=False, compute_dtype=torch.float32, compress_statistics=compress, quant_type="nf4")


def off(layer):
    with torch.no_grad():
        return float((layer(x) - truth).norm() / truth.norm())


torch.manual_seed(0)
weight = torch.randn(OUT, IN) * torch.rand(OUT, IN // 64).repeat_interleave(64, 1)  # blocks of different sizes
x = torch.randn(4, IN)
truth = x @ weight.T
print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
print("relative error of the output: in memory, then of what state_dict gave, then in memory after that")
results = {}
for compress in (False, True):
    for predicts in (False, True):
        layer = layer_of(compress)
        layer.load_state_dict({"weight": weight})
        layer = layer.to("cpu").eval()
        before = off(layer) if predicts else None
        saved = {name: value.clone() for name, value in layer.state_dict().items()}
        statistics = {name.removeprefix("weight."): value for name, value in saved.items() if name != "weight"}
        loaded = layer_of(compress).eval()
        loaded.weight = Params4bit.from_prequantized(data=saved["weight"], quantized_stats=statistics, device="cpu")
        results[compress, predicts] = before, off(loaded), off(layer)
        how = "after a prediction" if predicts else "before any"
        print(f"double quantisation {'on ' if compress else 'off'}, {how:18}", *("    -" if error is None else f"{error:.3f}" for error in results[compress, predicts]))
before, loaded, after = results.pop((False, True))
fine = all(error is None or error < 0.12 for errors in results.values() for error in errors)
sys.exit(0 if fine and before < 0.12 and loaded > 0.5 and after > 0.5 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/saved.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
