#!/usr/bin/env bash
# CTranslate2 4.8.5, which has a converter for Gemma 2, makes another model of one, without a word: the soft caps of
# attention and of the logits, the sliding window and query_pre_attn_scalar are all left out. It returns logits above
# 30, where the logits of a Gemma 2 end. With the caps off, a scalar equal to head_dim and a text inside the window,
# logits agree to rounding. Of the real models the caps concern all three, the scalar that of 27B (144, with heads of
# 128), the window texts of more than 4096 tokens. Its converter for Gemma 4 keeps the cap of the logits.
# Expected: the logits of transformers, or an error.
# Downloads about 350 MB with a CPU build of torch; Python 3.11. Exits 0 while CTranslate2 behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet ctranslate2==4.8.5 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0
cat > "$folder/converted.py" <<'PYTHON'
import sys

import ctranslate2
import numpy
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models, pre_tokenizers

folder = sys.argv[1]
HEAD, TOKENS = 16, 48
words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{i}" for i in range(4, 64))])}
tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)
ids = torch.randint(4, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def compared(**settings):
    """The largest logit of transformers and of CTranslate2, and the largest difference."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, **settings,
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            large = "embed" in name or "q_proj" in name  # so that logits and scores reach their caps
            parameter.add_(torch.randn(parameter.shape), alpha=1.0 if large else 0.1)
        expected = model(ids, use_cache=False).logits[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    TransformersConverter(folder).convert(f"{folder}/converted", force=True)
    generator = ctranslate2.Generator(f"{folder}/converted", device="cpu", compute_type="float32", intra_threads=1)
    batch = [[f"w{i}" for i in ids[0].tolist()]]
    logits = torch.from_numpy(numpy.array(generator.forward_batch(batch)))[0]
    return float(expected.max()), float(logits.max()), float((logits - expected).abs().max())


print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__)
plain = dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=HEAD, sliding_window=64)
good = True
for what, setting in {
    "no caps, scalar = head_dim, window over the text": {},
    "cap of the logits, 30": {"final_logit_softcapping": 30.0},
    "cap of attention, 50": {"attn_logit_softcapping": 50.0},
    "scalar 18 for heads of 16": {"query_pre_attn_scalar": 18},
    "window of 8": {"sliding_window": 8},
}.items():
    theirs, converted, far = compared(**(plain | setting))
    print(f"{what:49} largest logit {theirs:6.2f}, converted {converted:6.2f}; largest difference {far:.1e}")
    good = good and (far > 1e-2 if setting else far < 1e-3)
    if "final_logit_softcapping" in setting:
        good = good and theirs <= 30 < converted
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/converted.py" "$folder/model" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
