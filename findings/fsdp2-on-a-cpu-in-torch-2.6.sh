#!/usr/bin/env bash
# FSDP2 in torch 2.6.0 takes a CPU mesh and shards a model over it, and then fails in the first forward pass.
# Expected: a forward pass, as in later versions, or a refusal when the model is sharded.
# Downloads about 3 GB (PyPI's wheel is a CUDA build); Linux, Python 3.11. Exits 0 while torch behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-cache-dir torch==2.6.0 numpy==2.4.6
cat > "$folder/sharded.py" <<'PYTHON'
import os
import sys

import torch
from torch.distributed.fsdp import fully_shard

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", RANK="0", WORLD_SIZE="1")
torch.distributed.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
print("torch", torch.__version__)
fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
print("fully_shard on a CPU mesh: accepted")
try:
    model(torch.ones(1, 4))
except AttributeError as error:
    print(f"forward pass: AttributeError: {error}")
    sys.exit(0 if "record_event" in str(error) else 1)
print("forward pass: works")
sys.exit(1)
PYTHON
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" "$folder/sharded.py"
