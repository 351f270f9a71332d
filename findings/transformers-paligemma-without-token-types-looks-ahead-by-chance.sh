#!/usr/bin/env bash
# transformers 5.23.0: PaliGemma called without `token_type_ids`, which are optional, attends to later tokens of the prompt
# or does not, by what has nothing to do with the prompt: with SDPA (the default) and no padding it does; with SDPA
# beside a longer prompt it does not, and with eager attention it never does. So its logits change by what it is batched
# with, and by the attention implementation. No warning. With `token_type_ids` of 0 all three look ahead and agree.
# Cause: the causal mask is built, found to be nothing but causal, and left out for SDPA, whose layers are told by
# `use_bidirectional_attention` (True in PaliGemma's text config) that they are not causal.
# Expected: one kind of attention for one call, as PaliGemma's prompts, bidirectional, or an error that names the argument.
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/ahead.py" <<'PYTHON'
import torch
import transformers
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

IMAGE, PATCHES = 63, 4
PROMPT = [IMAGE] * PATCHES + [5, 6, 7]
OTHER_END = [IMAGE] * PATCHES + [5, 6, 20]
LONGER = [IMAGE] * PATCHES + [8, 9, 10, 11, 12, 13]

torch.manual_seed(0)
vision = SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
    projection_dim=32,
)  # fmt: skip
text = GemmaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, initializer_range=0.1,
)  # fmt: skip
config = PaliGemmaConfig(
    vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=32, pad_token_id=0
)
model = PaliGemmaForConditionalGeneration(config).double().eval()
images = torch.randn(2, 3, 28, 28, dtype=torch.double)


@torch.no_grad()
def logits(rows, token_types):
    """Of the first row, at its own tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    given = {"token_type_ids": torch.zeros_like(ids)} if token_types else {}
    out = model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=images[: len(rows)], **given)
    return out.logits[0, : len(rows[0])]


print("transformers", transformers.__version__)
looks_ahead, last = {}, {}
for token_types in (False, True):
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        for beside in ([], [LONGER]):
            here, changed = (logits([row, *beside], token_types) for row in (PROMPT, OTHER_END))
            case = (token_types, name, bool(beside))
            looks_ahead[case] = bool((here[PATCHES] - changed[PATCHES]).abs().max() > 1e-6)
            last[case] = here[-1]
            print(
                "with token types   " if token_types else "without token types", f"{name:5s}",
                "beside a longer prompt" if beside else "alone                 ",
                "the first word's logits move with the last word:", looks_ahead[case],
            )  # fmt: skip
apart = (last[False, "sdpa", False] - last[False, "sdpa", True]).abs().max() / last[False, "sdpa", True].abs().max()
print(f"the next word's logits, SDPA without token types, alone against beside a longer prompt: {float(apart):.0%} apart")
as_described = (
    [case for case, value in looks_ahead.items() if value and not case[0]] == [(False, "sdpa", False)]
    and all(value for case, value in looks_ahead.items() if case[0])
    and float(apart) > 0.01
)
raise SystemExit(0 if as_described else "transformers no longer behaves as described")
PYTHON
"$folder/venv/bin/python" "$folder/ahead.py"
