"""One thread, no network, no progress bars, no GPU: what every test may rely on."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two processes of a test would each want a card of their own; CUDA_VISIBLE_DEVICES=0 runs the other tests beside one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch

torch.set_num_threads(1)
